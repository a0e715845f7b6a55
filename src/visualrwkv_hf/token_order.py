"""The order in which a layer reads its tokens, and the token shift, which depends on it.

A layer may read the tokens in an order of its own, skips padding, and may find several packed sequences in one row.

Letters: B batch, T time, C hidden size, M targets of a token shift, S packed sequences, n sequences per row (S if
sequences are packed, else 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .dispatch import kernel
from .wkv import refuse_tokens_out_of_range, take


class TokenOrder(NamedTuple):
    """The order in which a layer reads the tokens. All None: in order of position, without padding or packing.

    "Entries" are indices into [the n carried tokens of the row, token 0, ..., token T-1].

    Attributes:
        order: [B, T], the token read at each position; `~token` (negative) marks padding, which is skipped.
        previous: [B, T], the entry read before each token; padding sees itself.
        following: [B, n + T], the inverse of `previous`: the token that sees each entry, -1 if none does.
        last: [B, n], the entry that each sequence read last.
        cu_seqlens: [S + 1], where packed sequences begin and end; B is 1.
    """

    order: Tensor | None = None
    previous: Tensor | None = None
    following: Tensor | None = None
    last: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def mask(self) -> Tensor | None:
        """Return bool [B, T], False where the token read is padding; None if there is none."""
        return None if self.order is None else self.order >= 0


IN_ORDER = TokenOrder()


def token_orders(
    positions: Tensor,
    mask: Tensor | None,
    orders: Sequence[Tensor | None],
    cu_seqlens: Tensor | None = None,
) -> list[TokenOrder]:
    """Return one `TokenOrder` for each entry of `orders`.

    Args:
        positions: 0, ..., T-1 in every row, int64 [B, T].
        mask: bool [B, T], False at padding; None if there is none.
        orders: permutations [B, T] that do not move padding and stay within a sequence; None is the order of
            positions.
        cu_seqlens: int64 [S + 1], the bounds of sequences packed into one row. The first token of sequence s sees
            carried token s.

    Raises:
        ValueError: an order names a token outside the sequence (checked on the CPU only: a GPU would have to wait).
    """
    result = []
    for order in orders:
        if mask is None and order is None and cu_seqlens is None:
            result.append(IN_ORDER)
            continue
        if order is not None:
            refuse_tokens_out_of_range("scan_orders", order, 0, positions.shape[1])
        tokens = positions if order is None else order
        real = None if mask is None else mask.gather(1, tokens)
        previous, last = _shift_entries(tokens, real, positions, cu_seqlens)
        following = torch.full_like(F.pad(tokens, (last.shape[1], 0)), -1).scatter(1, previous, positions)
        order = tokens if real is None else torch.where(real, tokens, ~tokens)
        result.append(TokenOrder(order, previous, following, last, cu_seqlens))
    return result


def _shift_entries(
    tokens: Tensor, real: Tensor | None, positions: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return `TokenOrder.previous` [B, T] and `.last` [B, n] for the `tokens` [B, T] read at each position."""
    n = 1 if cu_seqlens is None else len(cu_seqlens) - 1
    # 1 + the last position up to each one that is not padding; 0 is the start of the row: [B, 1 + T]
    reached = positions + 1 if real is None else torch.where(real, positions + 1, 0).cummax(1).values
    reached = F.pad(reached, (1, 0))
    entries = F.pad(tokens + n, (1, 0))  # [B, 1 + T], the entry read at each of these
    if cu_seqlens is None:
        seen, last = entries.gather(1, reached[:, :-1]), entries.gather(1, reached[:, -1:])
    else:
        seen, last = _entries_of_packed(reached[0], entries[0], positions[0], cu_seqlens)
    if real is not None:
        seen = torch.where(real, seen, tokens + n)
    return torch.empty_like(tokens).scatter(1, tokens, seen), last


def _entries_of_packed(
    reached: Tensor, entries: Tensor, positions: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the entry read before each position [1, T] and the one each sequence read last [1, S].

    Where nothing of its own sequence was read, that is the sequence's carried token.
    """
    begins, ends = cu_seqlens[:-1], cu_seqlens[1:]
    sequence = torch.searchsorted(cu_seqlens, positions, right=True) - 1  # [T]
    before, at_end = reached[:-1], reached[ends]
    seen = torch.where(before > begins[sequence], entries[before], sequence)
    last = torch.where(at_end > begins, entries[at_end], torch.arange(len(ends), device=ends.device))
    return seen[None], last[None]


def token_shift(
    x: Tensor,
    carried: Tensor,
    mix: Sequence[Tensor],
    previous: Tensor | None = None,
    following: Tensor | None = None,
    dynamic: Tensor | None = None,
) -> Sequence[Tensor]:
    """Interpolate each token with the one read before it (arXiv 2404.05892, section 4.1; 2503.14456, section 4).

        mixed_{m,t} = x_t + (p_t - x_t) (mix_m + dynamic_{m,t}),   p_t = [carried, x_0, ..., x_{T-1}][previous_t]

    Args:
        x: [B, T, C].
        carried: what the first token of each sequence sees before it, [B, C]; [S, C] with B = 1 if sequences are
            packed.
        mix: M weights of the previous token, of C elements each.
        previous: see `TokenOrder`; None is the order of positions.
        following: see `TokenOrder`. Only the backward of a kernel reads it.
        dynamic: what the data add to the weights (RWKV-6), [M, B, T, C].

    Returns:
        M times [B, T, C] in the dtype of x.
    """
    carried = carried.to(x.dtype)
    shift = kernel("token_shift", x, carried) or plain_token_shift
    return shift(x, carried, mix, previous, following, dynamic)


def plain_token_shift(
    x: Tensor,
    carried: Tensor,
    mix: Sequence[Tensor],
    previous: Tensor | None = None,
    following: Tensor | None = None,
    dynamic: Tensor | None = None,
) -> Sequence[Tensor]:
    """Compute `token_shift` in plain torch; `following` is not read."""
    if previous is not None:
        entries = torch.cat([_by_row(carried, x), x], 1)  # [B, n + T, C]
        (p,) = take(previous, entries)
    elif x.shape[1] == 1:
        p = carried[:, None]
    else:
        p = torch.cat([carried[:, None], x[:, :-1]], 1)
    weight = torch.cat([m.view(1, 1, 1, -1) for m in mix]).to(x.dtype)  # [M, 1, 1, C]
    weight = weight if dynamic is None else weight + dynamic
    return torch.addcmul(x, p - x, weight).unbind()


def last_token(x: Tensor, carried: Tensor, token_order: TokenOrder, length: int | None = None) -> Tensor:
    """Return the token that each sequence read last, which the next step sees first: [B, C] or [S, C].

    Args:
        x: [B, T, C].
        carried: the token before the first, returned where all of x is padding, [B, C] or [S, C].
        token_order: the order in which x was read.
        length: read only this many positions (not for packed sequences); None is all.
    """
    if token_order.order is None:
        return x[:, -1 if length is None else length - 1]
    last = token_order.last if length is None else _last_entry(token_order.order[:, :length])  # [B, n]
    n = last.shape[1]
    token = x.gather(1, (last - n).clamp(min=0)[..., None].expand(-1, -1, x.shape[-1]))  # [B, n, C]
    token = torch.where((last >= n)[..., None], token, _by_row(carried.to(token.dtype), x))
    return token.flatten(0, 1)


def _by_row(carried: Tensor, x: Tensor) -> Tensor:
    """[S, C] or [B, C] -> [B, n, C], the carried tokens of each row of `x` [B, T, C]."""
    rows = x.shape[0]
    return carried.view(rows, len(carried) // max(rows, 1), x.shape[-1])


def _last_entry(order: Tensor) -> Tensor:
    """Return 1 + the last token of `order` [B, N] that is not padding, [B, 1]; 0 if all are padding."""
    position = torch.arange(1, order.shape[1] + 1, device=order.device)
    last = torch.where(order >= 0, position, 0).amax(1, keepdim=True)
    return F.pad(order + 1, (1, 0)).gather(1, last)
