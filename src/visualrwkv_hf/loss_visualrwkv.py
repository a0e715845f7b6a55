"""The original's loss: cross entropy averaged per sample, then over the batch, and L2Wrap on the logits."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.configuration_utils import PreTrainedConfig

IGNORE_INDEX = -100

LOGITS_AT_ONCE = 2**26
"""Logits held at a time while training: 256 MiB in float32, the logits of 1,024 positions of 65,536 words."""


class L2Wrap(torch.autograd.Function):
    """Identity on the loss whose backward pulls the largest logit of every position towards zero.

    It adds strength * max_logit to the gradient of each position's largest logit, whatever gradient comes in
    (RWKV-LM): positions without label are pulled as well. The original's strength is 1e-4 / (B T).
    """

    @staticmethod
    def forward(ctx, loss: torch.Tensor, logits: torch.Tensor, strength: float) -> torch.Tensor:
        ctx.save_for_backward(logits)
        ctx.strength = strength
        return loss.clone()

    @staticmethod
    def backward(ctx, grad_loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (logits,) = ctx.saved_tensors
        largest, index = logits.max(dim=-1, keepdim=True)
        return grad_loss, torch.zeros_like(logits).scatter_(-1, index, largest * ctx.strength), None


class _Targets(NamedTuple):
    """What the positions are to say, and how much each counts."""

    ids: torch.Tensor  # [B T] the label of the position behind it, -100: none
    weights: torch.Tensor  # [B T] share of its cross entropy in the loss, float32
    pull: float  # strength of L2Wrap per position
    smoothing: float  # share of a uniform distribution in each target


def visualrwkv_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    config: PreTrainedConfig,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """The training loss of `logits` [B, T, vocab_size] for `labels` [B, T], as a scalar.

    Args:
        logits: of every position; the logits of position t are for the label of position t + 1.
        labels: token ids, -100 where there is none.
        config: the language model's; `loss_reduction` and `l2_wrap` are read.
        num_items_in_batch: with `loss_reduction="token"`, the number of labels that the sum is divided by
            (gradient accumulation); by default those of this batch.
        label_smoothing: epsilon of smoothed targets, (1 - epsilon) one-hot + epsilon / vocab_size (Szegedy et al.
            2016, section 7).

    Raises:
        ValueError: if the shapes differ.
    """
    if logits.shape[:2] != labels.shape:
        raise ValueError(
            f"logits are for {tuple(logits.shape[:2])} positions, labels for {tuple(labels.shape)}."
        )
    targets = _targets(labels.to(logits.device), config, num_items_in_batch, label_smoothing)
    return _weighted_loss(logits.flatten(0, 1), *targets)


def sliced_loss(
    hidden_states: torch.Tensor,
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    labels: torch.Tensor,
    config: PreTrainedConfig,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """`visualrwkv_loss(lm_head(hidden_states), ...)`, with at most `LOGITS_AT_ONCE` logits held at a time.

    The backward computes each slice anew: one product with the head more, for memory that does not grow with
    the batch.

    Args:
        hidden_states: of every position, [B, T, C].
        lm_head: [N, C] -> [N, vocab_size].
        labels: token ids, -100 where there is none, [B, T].
        config: the language model's.
        num_items_in_batch: see [`visualrwkv_loss`].
        label_smoothing: see [`visualrwkv_loss`].
    """
    ids, weights, pull, smoothing = _targets(
        labels.to(hidden_states.device), config, num_items_in_batch, label_smoothing
    )
    positions = max(1, LOGITS_AT_ONCE // config.vocab_size)

    def loss_of(hidden_states: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return _weighted_loss(lm_head(hidden_states), ids, weights, pull, smoothing)

    slices = (x.split(positions) for x in (hidden_states.flatten(0, 1), ids, weights))
    return torch.stack([checkpoint(loss_of, *parts, use_reentrant=False) for parts in zip(*slices)]).sum()


def loss_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return those keyword arguments of a model's `forward` that its loss reads."""
    return {name: kwargs[name] for name in ("num_items_in_batch", "label_smoothing") if name in kwargs}


def _targets(
    labels: torch.Tensor,
    config: PreTrainedConfig,
    num_items_in_batch: torch.Tensor | int | None,
    label_smoothing: float,
) -> _Targets:
    ids = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # [B, T]
    weights = REDUCTIONS[config.loss_reduction](ids != IGNORE_INDEX, num_items_in_batch)
    return _Targets(ids.flatten(), weights.flatten(), config.l2_wrap / ids.numel(), label_smoothing)


def _weighted_loss(
    logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, pull: float, smoothing: float
) -> torch.Tensor:
    losses = F.cross_entropy(  # [N]
        logits.float(), ids, ignore_index=IGNORE_INDEX, reduction="none", label_smoothing=smoothing
    )
    loss = (losses * weights).sum()
    return L2Wrap.apply(loss, logits, pull) if pull else loss


def mean_of_samples(valid: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
    """Weights [B, T] of a mean over each sample's labels, then over the samples; one without labels counts as 0."""
    return valid / (valid.sum(dim=1, keepdim=True).clamp(min=1) * valid.shape[0])


def mean_of_tokens(valid: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
    """Weights [B, T] of a mean over all labels of the batch, or of the batches that are accumulated."""
    return valid / (valid.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


REDUCTIONS = {"sample": mean_of_samples, "token": mean_of_tokens}


def is_worth_slicing(hidden_states: torch.Tensor, labels: torch.Tensor | None, vocab_size: int) -> bool:
    """Whether a step for `labels` would hold more logits than `LOGITS_AT_ONCE` for its backward."""
    positions = hidden_states.shape[0] * hidden_states.shape[1]
    return labels is not None and torch.is_grad_enabled() and positions * vocab_size > LOGITS_AT_ONCE


class LateLogits:
    """For the output of a sliced training step: `logits` are computed when they are read, and not part of it.

    Who trains on long batches need not hold them, and who looks at them still can. They carry no gradient.
    """

    _logits: Callable[[], torch.Tensor] | None = None

    @property
    def logits(self) -> torch.Tensor | None:
        """[B, T, vocab_size], computed anew at each look."""
        if self._logits is None:
            return None
        with torch.no_grad():
            return self._logits()

    @logits.setter
    def logits(self, value: None) -> None:
        """The field's default."""

    def computing(self, logits: Callable[[], torch.Tensor]) -> Any:
        """The output, whose logits `logits()` gives."""
        self._logits = logits
        return self
