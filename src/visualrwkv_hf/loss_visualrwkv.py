"""The original's loss: cross entropy averaged per sample, then over the batch, and L2Wrap on the logits."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.configuration_utils import PreTrainedConfig

IGNORE_INDEX = -100

LOGITS_AT_ONCE = 2**26
"""Number of logits held at a time while training: 256 MiB in float32, the logits of 1,024 positions of 65,536 words."""


class L2Wrap(torch.autograd.Function):
    """Identity on the loss whose backward pulls the largest logit of every position towards zero.

    It adds strength * max_logit to the gradient of each position's largest logit, whatever gradient comes in
    (RWKV-LM): positions without label are pulled as well. The original's strength is 1e-4 / (B T). Where the loss is
    scaled (fp16), unscaling divides the pull as well and leaves nothing of it; [`VisualRWKVTrainer`] refuses that.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(loss: torch.Tensor, logits: torch.Tensor, strength: float) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor, torch.Tensor, float], output: torch.Tensor) -> None:
        _, logits, ctx.strength = inputs
        ctx.save_for_backward(logits)

    @staticmethod
    def backward(ctx, grad_loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (logits,) = ctx.saved_tensors
        largest, index = logits.max(dim=-1, keepdim=True)
        return grad_loss, torch.zeros_like(logits).scatter_(-1, index, largest * ctx.strength), None


class _Targets(NamedTuple):
    """What each position has to predict, and how much it counts."""

    ids: torch.Tensor  # [B T] the label that each position predicts, -100: none
    weights: torch.Tensor  # [B T] share of its cross entropy in the loss, float32
    pull: float  # strength of L2Wrap per position
    smoothing: float  # share of a uniform distribution in each target


def visualrwkv_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    config: PreTrainedConfig,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
    shift_labels: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the training loss of `logits` [B, T, vocab_size] as a scalar.

    Args:
        logits: of every position.
        labels: token ids [B, T], -100 where there is none; position t predicts label t + 1.
        config: the language model's; `loss_reduction` and `l2_wrap` are read.
        num_items_in_batch: with `loss_reduction="token"`, the number of labels that the sum is divided by
            (gradient accumulation); by default those of this batch. Without effect on a mean over samples.
        label_smoothing: epsilon of smoothed targets, (1 - epsilon) one-hot + epsilon / vocab_size (Szegedy et al.
            2016, section 7).
        shift_labels: token ids [B, T] used instead of `labels`: position t predicts `shift_labels[:, t]`.
        cu_seq_lens_q: where the S samples of a row begin and end, int [S + 1], if they are packed into one (B = 1).
            The first label of a sample is predicted by the end of the one before it, so it should be -100.

    Raises:
        ValueError: if the shapes differ, or there are no labels.
    """
    targets = _targets(
        logits, labels, shift_labels, config, num_items_in_batch, label_smoothing, cu_seq_lens_q
    )
    return _weighted_loss(logits.flatten(0, 1), *targets)


def sliced_loss(
    hidden_states: torch.Tensor,
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    labels: torch.Tensor | None,
    config: PreTrainedConfig,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
    shift_labels: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `visualrwkv_loss(lm_head(hidden_states), ...)` with at most `LOGITS_AT_ONCE` logits held at a time.

    The backward pass computes the logits of each slice a second time: one more product with the head, for memory
    that does not grow with the batch.

    Args:
        hidden_states: of every position, [B, T, C].
        lm_head: [N, C] -> [N, vocab_size].
        labels: see [`visualrwkv_loss`].
        config: the language model's.
        num_items_in_batch: see [`visualrwkv_loss`].
        label_smoothing: likewise.
        shift_labels: likewise.
        cu_seq_lens_q: likewise.

    Raises:
        ValueError: see [`visualrwkv_loss`].
    """
    ids, weights, pull, smoothing = _targets(
        hidden_states, labels, shift_labels, config, num_items_in_batch, label_smoothing, cu_seq_lens_q
    )
    positions = max(1, LOGITS_AT_ONCE // config.vocab_size)

    def loss_of(hidden_states: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return _weighted_loss(lm_head(hidden_states), ids, weights, pull, smoothing)

    slices = (x.split(positions) for x in (hidden_states.flatten(0, 1), ids, weights))
    return torch.stack([checkpoint(loss_of, *parts, use_reentrant=False) for parts in zip(*slices)]).sum()


def loss_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a model's `forward` that only its loss reads.

    They are no parameters of `forward`: transformers' Trainer takes every parameter with "label" in its name for one
    that a data set must have.
    """
    names = ("num_items_in_batch", "label_smoothing", "shift_labels", "cu_seq_lens_q")
    return {name: kwargs[name] for name in names if name in kwargs}


def _targets(
    predictions: torch.Tensor,
    labels: torch.Tensor | None,
    shift_labels: torch.Tensor | None,
    config: PreTrainedConfig,
    num_items_in_batch: torch.Tensor | int | None,
    label_smoothing: float,
    cu_seq_lens: torch.Tensor | None,
) -> _Targets:
    """Return the targets of `predictions` [B, T, ...]."""
    name, given = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
    if given is None:
        raise ValueError("A loss needs labels or shift_labels.")
    if predictions.shape[:2] != given.shape:
        raise ValueError(
            f"logits are for {tuple(predictions.shape[:2])} positions, {name} for {tuple(given.shape)}."
        )
    ids = given.to(predictions.device)  # [B, T]
    if shift_labels is None:
        ids = F.pad(ids[:, 1:], (0, 1), value=IGNORE_INDEX)
    cu_seq_lens = None if cu_seq_lens is None else cu_seq_lens.to(ids.device)
    weights = REDUCTIONS[config.loss_reduction](ids != IGNORE_INDEX, cu_seq_lens, num_items_in_batch)
    return _Targets(ids.flatten(), weights.flatten(), config.l2_wrap / ids.numel(), label_smoothing)


def _weighted_loss(
    logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, pull: float, smoothing: float
) -> torch.Tensor:
    losses = F.cross_entropy(  # [N]
        logits.float(), ids, ignore_index=IGNORE_INDEX, reduction="none", label_smoothing=smoothing
    )
    loss = (losses * weights).sum()
    return L2Wrap.apply(loss, logits, pull) if pull else loss


def mean_of_samples(
    valid: torch.Tensor, cu_seq_lens: torch.Tensor | None, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """Return weights [B, T] that average over each sample's labels, then over the samples.

    A sample without labels counts as 0.

    Args:
        valid: whether a position has a label, [B, T].
        cu_seq_lens: where the samples of a single row begin and end, [S + 1]; None if each row is a sample.
        num_items_in_batch: not read.
    """
    if cu_seq_lens is None:
        count, labels = valid.shape[0], valid.sum(dim=1, keepdim=True)
    else:
        count, before = len(cu_seq_lens) - 1, F.pad(valid[0].cumsum(0), (1, 0))[cu_seq_lens]
        labels = before.diff().repeat_interleave(cu_seq_lens.diff(), output_size=valid.shape[1])[None]
    return valid.float() / (labels.clamp(min=1) * count)


def mean_of_tokens(
    valid: torch.Tensor, cu_seq_lens: torch.Tensor | None, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """Return weights [B, T] that average over all labels of the batch, or of the batches that are accumulated.

    Without any label they are 0.
    """
    count = valid.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
    return valid.float() / count.to(valid.device).clamp(min=1)


REDUCTIONS = {"sample": mean_of_samples, "token": mean_of_tokens}


def is_worth_slicing(hidden_states: torch.Tensor, vocab_size: int) -> bool:
    """Return whether a training step on `hidden_states` [B, T, C] would hold more logits than `LOGITS_AT_ONCE`."""
    positions = hidden_states.shape[0] * hidden_states.shape[1]
    return torch.is_grad_enabled() and positions * vocab_size > LOGITS_AT_ONCE
