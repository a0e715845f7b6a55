"""One token of the time mix of many sequences, from its matrix products on: the recurrence, the norm and the gate.

`blocks.py` computes whole blocks for a few rows. For more rows torch's matrix products are faster, and what is between
them is computed here. States may be slots of a pool, which are read and written where they lie.

Letters: B batch, N slots of a pool, H heads, K key and value size of a head, A = H K.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..rwkv7_time_mix import DECAY_SCALE
from .library import FLOAT
from .ops import library

DECODES = ("rwkv6_decode", "rwkv7_decode")


def unsuitable(state: Tensor) -> str:
    """Return why C cannot read and write these states, [B or N, H, K, K]; empty if it can.

    The matrices of a sequence must lie together; there may be other numbers between those of two sequences.
    """
    if state.dtype != torch.float32:
        return f"states are {state.dtype}, not float32"
    if state.shape[-1] > (most := library().contract["MAX_KEYS"]):
        return f"keys of {state.shape[-1]} elements are larger than {most}"
    if not state[:1].is_contiguous() or _floats_between(state) < state[:1].numel():
        return "the matrices of a sequence do not lie one after another"
    return ""


def _floats_between(state: Tensor) -> int:
    """Return how many floats after a sequence's first matrix that of the next sequence begins."""
    return state.stride(0) if len(state) > 1 else state[:1].numel()


def rwkv6_decode(
    r: Tensor,
    decay: Tensor | None,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    state: Tensor,
    time_decay: Tensor,
    u: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    mask: Tensor | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """Compute the recurrence of RWKV-6 and 5 for one token of each sequence; see `rwkv6_time_mix.rwkv6_decode`."""
    return _decode(
        False,
        eps,
        (r, decay, k, v, None, F.silu(gate.float()), None, None),
        (time_decay, None, None, None, None, None, u, norm_weight, norm_bias),
        mask,
        state,
        state_indices,
    )


def rwkv7_decode(
    r: Tensor,
    decay: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    gate: Tensor,
    state: Tensor,
    w0: Tensor,
    a0: Tensor,
    k_k: Tensor,
    k_a: Tensor,
    r_k: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    value_gate: Tensor | None = None,
    v_first: Tensor | None = None,
    v0: Tensor | None = None,
    mask: Tensor | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """Compute the recurrence of RWKV-7 for one token of each sequence; see `rwkv7_time_mix.rwkv7_decode`."""
    return _decode(
        True,
        eps,
        (r, decay, k, v, rate, gate, value_gate, v_first),
        (w0, a0, v0, k_k, k_a, r_k, None, norm_weight, norm_bias),
        mask,
        state,
        state_indices,
    )


def _decode(
    is_rwkv7: bool,
    eps: float,
    products: tuple[Tensor | None, ...],
    weights: tuple[Tensor | None, ...],
    mask: Tensor | None,
    state: Tensor,
    slots: Tensor | None,
) -> Tensor:
    """Call ops.c, whose `TimeMix` has `products`, [B, A] or [B, 1, A] each, and `weights`, of A elements each.

    Raises:
        ValueError: the states are not those of these tokens.
    """
    r = products[0]
    assert r is not None
    N, H, K, _ = state.shape
    if r.shape[-1] != H * K or len(r) > N or (slots is None and len(r) != N):
        raise ValueError(f"state has the shape {tuple(state.shape)}, and r {tuple(r.shape)}.")
    inputs = [None if x is None else x.float().contiguous() for x in (*products, *weights)]
    mask = None if mask is None else mask.contiguous()
    slots = None if slots is None else slots.long().contiguous()
    out = torch.empty(r.shape, **FLOAT)
    sizes = (len(r), H, K, N, _floats_between(state), int(is_rwkv7))
    library().call("decode", *sizes, eps, DECAY_SCALE, *inputs, mask, slots, state, out)
    return out.to(r.dtype)
