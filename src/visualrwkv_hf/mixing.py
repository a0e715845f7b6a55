"""What the two halves of a block, time mix and channel mix, have in common.

Letters: B batch, T time, S sequences (B, or those packed into one row), A width of the time mix, C hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .layer_state import LayerState, StateUpdate
from .token_order import TokenOrder, last_token


class MixOutput(NamedTuple):
    """What a time mix or a channel mix returns.

    Attributes:
        hidden_states: [B, T, C], to be added to the residual stream.
        v_first: what the first layer hands to all others, [B, T, A]; None where a generation hands on nothing.
        updates: the states after the last token; empty if no state was given.
    """

    hidden_states: Tensor
    v_first: Tensor | None
    updates: dict[str, StateUpdate]


def parameters_of(module: nn.Module, prefix: str, names: Sequence[str]) -> list[Tensor]:
    """Return the parameters prefix + name of a module."""
    return [getattr(module, prefix + name) for name in names]


def previous_token(x: Tensor, name: str, state: LayerState | None, token_order: TokenOrder) -> Tensor:
    """Return what the token shift `name` sees before the first token of x [B, T, C]: [S, C]; zeros at the start."""
    carried = None if state is None else state.get(name)
    if carried is not None:
        return carried
    sequences = x.shape[0] if token_order.cu_seqlens is None else len(token_order.cu_seqlens) - 1
    return torch.zeros_like(x[:, 0]) if sequences == x.shape[0] else x.new_zeros(sequences, x.shape[-1])


def store_last_token(x: Tensor, carried: Tensor, state: LayerState, token_order: TokenOrder) -> StateUpdate:
    """Return the token that a token shift reads first in the next step, after x [B, T, C] and `carried` [S, C]."""

    def after(length: int, before: Tensor | None) -> Tensor:
        before = torch.zeros_like(carried) if before is None else before
        return last_token(x, before, token_order, length)

    return StateUpdate(last_token(x, carried, token_order), after if state.record_past else None)
