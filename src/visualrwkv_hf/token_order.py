"""How a layer reads a sequence: in its own order, past the pads, each token with the one read before it.

Letters: B batch, T time, C hidden size, M targets of a token shift, S packed sequences.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .dispatch import kernel
from .wkv import take


class Reading(NamedTuple):
    """In which order the tokens are read. All None: as they come, none of them a pad.

    Indices of the token shift point into [what the cache carried, token 0, ..., token T-1].
    """

    order: torch.Tensor | None = None  # [B, T] position p is token order[p]; ~token: a pad, passed over
    previous: torch.Tensor | None = None  # [B, T] what was read before each token; a pad sees itself
    following: torch.Tensor | None = None  # [B, 1 + T] the way back: the token that sees it, -1: none
    last: torch.Tensor | None = None  # [B] what was read last
    cu_seqlens: torch.Tensor | None = None  # [S + 1] where packed sequences begin and end; B is 1


AS_IT_COMES = Reading()


def readings_of(
    positions: torch.Tensor,
    mask: torch.Tensor | None,
    orders: Sequence[torch.Tensor | None],
    cu_seqlens: torch.Tensor | None = None,
) -> list[Reading]:
    """How the layers read, one reading per order.

    Args:
        positions: 0, ..., T-1 in every row, int64 [B, T].
        mask: bool [B, T], False at pads; None: there are none.
        orders: permutations [B, T] that move no pad and stay within a sequence; None is the order of the text.
        cu_seqlens: int [S + 1], sequences packed in one row: the first token of each sees nothing before it.
    """
    readings = []
    for order in orders:
        if mask is None and order is None and cu_seqlens is None:
            readings.append(AS_IT_COMES)
            continue
        tokens = positions if order is None else order
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.gather(1, tokens)
        previous, last = _shift_indices(tokens, real, positions, cu_seqlens)
        following = torch.full_like(F.pad(tokens, (1, 0)), -1).scatter(1, previous, positions)
        readings.append(Reading(torch.where(real, tokens, ~tokens), previous, following, last, cu_seqlens))
    return readings


def _shift_indices(
    tokens: torch.Tensor, real: torch.Tensor, positions: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Reading.previous` [B, T] and `Reading.last` [B] of `tokens` [B, T], of which some are `real`."""
    up_to = torch.where(real, positions + 1, 0).cummax(1).values  # [B, T] the last real position, from 1
    before = F.pad(up_to[:, :-1], (1, 0))
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens, positions[0], right=True) - 1
        before = torch.where(before > cu_seqlens[sequence], before, 0)
    entries = F.pad(tokens + 1, (1, 0))  # [B, 1 + T] of each position, after what was carried
    seen = torch.where(real, entries.gather(1, before), tokens + 1)
    return torch.empty_like(tokens).scatter(1, tokens, seen), entries.gather(1, up_to[:, -1:])[:, 0]


def token_shift(
    hidden_states: torch.Tensor,
    carried: torch.Tensor,
    mix: Sequence[torch.Tensor],
    reading: Reading,
    dynamic: torch.Tensor | None = None,
) -> Sequence[torch.Tensor]:
    """Interpolations of each token with the one read before it: x_t + (x_{t-1} - x_t) m for M weights m.

    Args:
        hidden_states: x, [B, T, C].
        carried: what the first token sees before it, [B, C].
        mix: M weights of the previous token, of C elements each.
        reading: in which order the tokens are read.
        dynamic: added to the weight, per token, [M, B, T, C] (RWKV-6).

    Returns:
        M times [B, T, C] in the dtype of `hidden_states`.
    """
    carried = carried.to(hidden_states.dtype)
    if triton_token_shift := kernel("token_shift", hidden_states):
        return triton_token_shift(hidden_states, carried, mix, reading.previous, reading.following, dynamic)
    if reading.previous is not None:
        entries = torch.cat([carried[:, None], hidden_states], 1)  # [B, 1 + T, C]
        (previous,) = take(reading.previous, entries)
    elif hidden_states.shape[1] == 1:
        previous = carried[:, None]
    else:
        previous = torch.cat([carried[:, None], hidden_states[:, :-1]], 1)
    weight = torch.cat([m.view(1, 1, 1, -1) for m in mix]).to(hidden_states.dtype)  # [M, 1, 1, C]
    weight = weight if dynamic is None else weight + dynamic
    return torch.addcmul(hidden_states, previous - hidden_states, weight).unbind()


def last_token(
    hidden_states: torch.Tensor, carried: torch.Tensor, reading: Reading, length: int | None = None
) -> torch.Tensor:
    """What was read last of `hidden_states` [B, T, C], or of the first `length` positions: [B, C], to be carried on.

    It is `carried` [B, C] where all were pads.
    """
    if reading.order is None:
        return hidden_states[:, -1 if length is None else length - 1]
    last = reading.last if length is None else _last_entry(reading.order[:, :length])
    token = hidden_states.gather(1, (last - 1).clamp(min=0)[:, None, None].expand_as(hidden_states[:, :1]))
    return torch.where((last > 0)[:, None], token[:, 0], carried.to(token.dtype))


def _last_entry(order: torch.Tensor) -> torch.Tensor:
    """1 + the last entry of `order` [B, N] that is no pad, [B]; 0 if all are."""
    position = torch.arange(1, order.shape[1] + 1, device=order.device)
    last = torch.where(order >= 0, position, 0).amax(1, keepdim=True)
    return F.pad(order + 1, (1, 0)).gather(1, last)[:, 0]
