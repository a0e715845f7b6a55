"""The low-rank maps f(x W1) W2 of a layer for one token, in two launches for any number of maps.

The weights of one map are read in about a microsecond, so separate matrix products would take longer to launch than to
compute. Letters: B batch, M maps, C hidden size, D rank of a map, A output width, S splits of C, BC / BD / BA channels,
ranks, outputs of a tile.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import (
    DTYPES,
    LOW_RANK_DOWN,
    LOW_RANK_SPLIT,
    LOW_RANK_UP,
    LOW_RANK_WARPS,
    NAMESPACE,
    call,
    needs_gradient,
    on_device_of,
)
from .products import FUNCTIONS, applied

MAX_ROWS = 65_535
"""The largest B: a row is a program along the grid's third axis, which CUDA limits to this."""


def low_rank(
    x: Sequence[Tensor], down: Sequence[Tensor], up: Sequence[Tensor], functions: Sequence[str]
) -> Tensor:
    """Return y_m = f_m(x_m W1_m) W2_m for M maps (RWKV-7: arXiv 2503.14456, section 4; RWKV-6: 2404.05892, section 4).

    Arithmetic is in float32. There is no gradient. Each row reads all weights once, so for more than a few rows matrix
    products are faster.

    Args:
        x: M tensors [B, C] or [B, 1, C], bfloat16, float16 or float32, B <= 65,535.
        down: W1, M tensors [C, D_m].
        up: W2, M tensors [D_m, A].
        functions: f, M names out of `products.FUNCTIONS`.

    Returns:
        y, [M, B, A] or [M, B, 1, A] in the dtype of x.

    Raises:
        ValueError: shapes do not fit, an input is float64, a function is unknown, or B > 65,535.
        RuntimeError: an input requires a gradient.
    """
    _check(x, down, up, functions)
    names = [FUNCTIONS.index(name) for name in functions]
    x, down, up = ([tensor.contiguous() for tensor in tensors] for tensors in (x, down, up))
    return call(_low_rank, x, down, up, names)


def _check(
    x: Sequence[Tensor], down: Sequence[Tensor], up: Sequence[Tensor], functions: Sequence[str]
) -> None:
    if not x or len({len(x), len(down), len(up), len(functions)}) != 1:
        lengths = len(x), len(down), len(up), len(functions)
        raise ValueError(f"x, down, up and functions must be of M >= 1 maps each, got {lengths}.")
    if unknown := set(functions) - set(FUNCTIONS):
        raise ValueError(f"functions must be of {', '.join(FUNCTIONS)}, got {', '.join(sorted(unknown))}.")
    shape, A = list(x[0].shape), up[0].shape[-1]
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[1] != 1):
        raise ValueError(f"x must be [B, C] or [B, 1, C], got {shape}.")
    if shape[0] > MAX_ROWS:
        raise ValueError(f"x must have at most {MAX_ROWS:,} rows, got {shape[0]:,}: use matrix products.")
    for x_m, w1, w2 in zip(x, down, up):
        D = w1.shape[-1]
        if [list(x_m.shape), list(w1.shape), list(w2.shape)] != [shape, [shape[-1], D], [D, A]]:
            raise ValueError(
                f"x, down and up must be {shape}, [{shape[-1]}, D] and [D, {A}], "
                f"got {list(x_m.shape)}, {list(w1.shape)} and {list(w2.shape)}."
            )
    tensors = (*x, *down, *up)
    if any(tensor.dtype not in DTYPES for tensor in tensors):
        raise ValueError(
            f"low_rank serves bfloat16, float16 and float32, got {sorted({str(t.dtype) for t in tensors})}."
        )
    if needs_gradient(*tensors):
        raise RuntimeError("low_rank has no gradient: call it under torch.no_grad().")


# --- kernels ------------------------------------------------------------------------------------------


@triton.jit
def _down(
    x,
    w,
    partial,
    i_d,
    i_s,
    C: tl.constexpr,
    D: tl.constexpr,
    CS: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
):
    """Store ranks i_d BD, ... of x W1, summed over the channels of split i_s; x and partial point to one row."""
    o_d = i_d * BD + tl.arange(0, BD)
    b_sum = tl.zeros([BD], tl.float32)
    for i_c in tl.static_range(0, CS, BC):
        o_c = i_s * CS + i_c + tl.arange(0, BC)
        b_x = tl.load(x + o_c, mask=o_c < C, other=0).to(tl.float32)
        p_w = w + o_c[:, None] * D + o_d[None, :]
        b_w = tl.load(p_w, mask=(o_c[:, None] < C) & (o_d[None, :] < D), other=0).to(tl.float32)
        b_sum += tl.sum(b_x[:, None] * b_w, 0)
    tl.store(partial + o_d, b_sum, mask=o_d < D)


@triton.jit
def low_rank_down_fwd_kernel(
    x,  # M pointers
    down,  # M pointers
    partial,  # float32 [S, B, sum of D]
    B,
    M: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,  # M ranks
    RANKS: tl.constexpr,  # their sum
    CS: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
):
    i_d, i_s, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p_partial = partial + (i_s * B + i_b) * RANKS
    for m in tl.static_range(M):
        if (i_d >= 0) & (i_d < tl.cdiv(D[m], BD)):
            _down(x[m] + i_b * C, down[m], p_partial, i_d, i_s, C, D[m], CS, BC, BD)
        i_d -= tl.cdiv(D[m], BD)
        p_partial += D[m]


@triton.jit
def _up(
    partial,
    w,
    function: tl.constexpr,
    step,
    o_a,
    A: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    BD: tl.constexpr,
    BA: tl.constexpr,
):
    """Return f(sum of partial over S splits) W2, [BA]; `step` elements lie between the sums of two splits."""
    b_y = tl.zeros([BA], tl.float32)
    for i_d in tl.static_range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        b_low = tl.zeros([BD], tl.float32)
        for s in tl.static_range(S):
            b_low += tl.load(partial + s * step + o_d, mask=o_d < D, other=0)
        p_w = w + o_d[:, None] * A + o_a[None, :]
        b_w = tl.load(p_w, mask=(o_d[:, None] < D) & (o_a[None, :] < A), other=0).to(tl.float32)
        b_y += tl.sum(applied(b_low, function)[:, None] * b_w, 0)
    return b_y


@triton.jit
def low_rank_up_fwd_kernel(
    partial,  # float32 [S, B, sum of D]
    up,  # M pointers
    y,  # [M, B, A]
    B,
    M: tl.constexpr,
    A: tl.constexpr,
    D: tl.constexpr,  # M ranks
    RANKS: tl.constexpr,  # their sum
    FUNCTION: tl.constexpr,  # M indices of FUNCTIONS
    S: tl.constexpr,
    BD: tl.constexpr,
    BA: tl.constexpr,
):
    i_a, i_m, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_a = i_a * BA + tl.arange(0, BA)
    p_partial = partial + i_b * RANKS
    p_y = y + (i_m * B + i_b) * A + o_a
    for m in tl.static_range(M):
        if i_m == m:
            b_y = _up(p_partial, up[m], FUNCTION[m], tl.cast(B, tl.int64) * RANKS, o_a, A, D[m], S, BD, BA)
            tl.store(p_y, b_y.to(y.dtype.element_ty), mask=o_a < A)
        p_partial += D[m]


# --- the op -------------------------------------------------------------------------------------------


@torch.library.custom_op(f"{NAMESPACE}::low_rank", mutates_args=())
def _low_rank(x: list[Tensor], down: list[Tensor], up: list[Tensor], functions: list[int]) -> Tensor:
    (*batch, C), A, M = x[0].shape, up[0].shape[1], len(x)
    B, S = x[0].numel() // C, triton.cdiv(C, LOW_RANK_SPLIT)
    ranks = tuple(w.shape[1] for w in down)
    sizes = {"M": M, "D": ranks, "RANKS": sum(ranks), "num_warps": LOW_RANK_WARPS}
    partial = torch.empty(S, B, sum(ranks), dtype=torch.float32, device=x[0].device)
    y = torch.empty(M, *batch, A, dtype=x[0].dtype, device=x[0].device)
    blocks = sum(triton.cdiv(D, LOW_RANK_DOWN["BD"]) for D in ranks)
    with on_device_of(y):
        low_rank_down_fwd_kernel[(blocks, S, B)](
            tuple(x),
            tuple(down),
            partial,
            B,
            C=C,
            CS=LOW_RANK_SPLIT,
            **sizes,
            **LOW_RANK_DOWN,
        )
        low_rank_up_fwd_kernel[(triton.cdiv(A, LOW_RANK_UP["BA"]), M, B)](
            partial, tuple(up), y, B, A=A, FUNCTION=tuple(functions), S=S, **sizes, **LOW_RANK_UP
        )
    return y


@_low_rank.register_fake
def _(x, down, up, functions):
    return x[0].new_empty(len(x), *x[0].shape[:-1], up[0].shape[1])
