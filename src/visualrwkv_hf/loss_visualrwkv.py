"""The original's loss: cross entropy averaged per sample, then over the batch, and L2Wrap on the logits."""

import torch
from torch.nn import functional as F
from transformers.configuration_utils import PreTrainedConfig

IGNORE_INDEX = -100


class L2Wrap(torch.autograd.Function):
    """Identity on the loss whose backward pulls the largest logit of every position towards zero.

    It adds factor * max_logit / (B T) to the gradient of each position's largest logit, whatever gradient comes in
    (RWKV-LM): positions without label are pulled as well.
    """

    @staticmethod
    def forward(ctx, loss: torch.Tensor, logits: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.save_for_backward(logits)
        ctx.factor = factor
        return loss.clone()

    @staticmethod
    def backward(ctx, grad_loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (logits,) = ctx.saved_tensors
        largest, index = logits.max(dim=-1, keepdim=True)
        positions = logits.shape[0] * logits.shape[1]
        return (
            grad_loss,
            torch.zeros_like(logits).scatter_(-1, index, largest * (ctx.factor / positions)),
            None,
        )


def visualrwkv_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    config: PreTrainedConfig,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """The training loss of `logits` [B, T, vocab_size] for `labels` [B, T], as a scalar.

    Args:
        logits: of every position; the logits of position t are for the label of position t + 1.
        labels: token ids, -100 where there is none.
        config: the language model's; `loss_reduction` and `l2_wrap` are read.
        num_items_in_batch: with `loss_reduction="token"`, the number of labels that the sum is divided by
            (gradient accumulation); by default those of this batch.

    Raises:
        ValueError: if the shapes differ.
    """
    if logits.shape[:2] != labels.shape:
        raise ValueError(
            f"logits are for {tuple(logits.shape[:2])} positions, labels for {tuple(labels.shape)}."
        )
    labels = labels.to(logits.device)
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # [B, T]
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    ).view_as(targets)
    loss = REDUCTIONS[config.loss_reduction](losses, targets != IGNORE_INDEX, num_items_in_batch)
    return L2Wrap.apply(loss, logits, config.l2_wrap) if config.l2_wrap else loss


def mean_of_samples(losses: torch.Tensor, valid: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """Mean over each sample's labels, then over the samples; one without labels counts as 0. All [B, T]."""
    return (losses.sum(dim=1) / valid.sum(dim=1).clamp(min=1)).mean()


def mean_of_tokens(losses: torch.Tensor, valid: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """Mean over all labels of the batch, or of the batches that are accumulated. All [B, T]."""
    total = valid.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return losses.sum() / total


REDUCTIONS = {"sample": mean_of_samples, "token": mean_of_tokens}
