"""The norm before a token shift and the shift itself, for one token of each sequence, in one launch.

Letters: B batch, N slots of a pool, C hidden size, M targets of the shift, BC channels of a tile, W the next power of
two of C.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import (
    DTYPES,
    NAMESPACE,
    NORM_CHANNELS,
    NORM_WARPS,
    call,
    has_rows_apart,
    needs_gradient,
    on_device_of,
)


def norm_shift(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    carried: Tensor,
    mix: Sequence[Tensor],
    mask: Tensor | None = None,
    state_indices: Tensor | None = None,
    of_current: bool = False,
    ends: bool = False,
) -> tuple[Tensor, ...]:
    """Normalise a token, interpolate it with the one read before it, and keep it for the next step.

        n = norm(x);  mixed_m = n + (carried - n) mix_m;  carried <- n

    Arithmetic is in float32; n is rounded to the dtype of x first, as a layer norm of its own would round it.

    Args:
        x: [B, C] or [B, 1, C], bfloat16, float16 or float32.
        norm_weight: of the layer norm, C elements.
        norm_bias: likewise.
        eps: of the layer norm.
        carried: n of the last step in the dtype of x, updated in place: [B, C], or a pool [N, C] with state_indices. A
            row's elements are next to one another, and no two rows share memory.
        mix: weights of the previous token, M tensors of C elements.
        mask: bool [B] or [B, 1], False at pads, which are their own predecessor and are not kept.
        state_indices: int32 or int64 [B], distinct: the slot of each sequence; negative for none. The device does not
            check that they are below N.
        of_current: whether mix weighs the current token (RWKV-5).
        ends: whether to return n and the token before it as well (RWKV-6 mixes them again).

    Returns:
        M tensors, or M + 2, shaped and typed like x.

    Raises:
        ValueError: shapes or dtypes do not fit, or a row of carried is not contiguous or shares memory with another.
        RuntimeError: an input requires a gradient.
    """
    _check(x, norm_weight, norm_bias, carried, mix, mask, state_indices)
    if needs_gradient(x, norm_weight, norm_bias, carried, *mix):
        raise RuntimeError("norm_shift has no gradient: call it under torch.no_grad().")
    mix = [m.contiguous() for m in mix]
    x, norm_weight, norm_bias = (t.contiguous() for t in (x, norm_weight, norm_bias))
    indices = (None if t is None else t.contiguous() for t in (mask, state_indices))
    mixed = call(_norm_shift, x, norm_weight, norm_bias, eps, carried, mix, *indices, of_current, ends)
    return tuple(mixed.unbind())


def _check(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    carried: Tensor,
    mix: Sequence[Tensor],
    mask: Tensor | None,
    state_indices: Tensor | None,
) -> None:
    if x.dim() not in (2, 3) or (x.dim() == 3 and x.shape[1] != 1):
        raise ValueError(f"x must be [B, C] or [B, 1, C], got {list(x.shape)}.")
    B, C = x.shape[0], x.shape[-1]
    if x.dtype not in DTYPES or carried.dtype != x.dtype:
        raise ValueError(
            f"x and carried must be bfloat16, float16 or float32, got {x.dtype}, {carried.dtype}."
        )
    if any(w.numel() != C for w in (norm_weight, norm_bias, *mix)) or carried.shape[1:] != (C,):
        raise ValueError(f"norm_weight, norm_bias, mix and rows of carried must have C = {C} elements.")
    if not has_rows_apart(carried):
        raise ValueError(f"rows of carried must be contiguous and apart, got strides {carried.stride()}.")
    if state_indices is None and carried.shape[0] != B:
        raise ValueError(
            f"carried must be [B, C] = {[B, C]} without state_indices, got {list(carried.shape)}."
        )
    if state_indices is not None and (
        list(state_indices.shape) != [B] or state_indices.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"state_indices must be int32 or int64 [B] = [{B}], "
            f"got {state_indices.dtype} {list(state_indices.shape)}."
        )
    if mask is not None and (list(mask.shape) not in ([B], [B, 1]) or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool [B] = [{B}] or [B, 1], got {mask.dtype} {list(mask.shape)}.")


@triton.jit
def norm_shift_fwd_kernel(
    x,
    norm_weight,
    norm_bias,
    carried,
    stride,  # elements from one row of carried to the next
    mix,  # M pointers
    mask,
    state_indices,
    mixed,  # [M, B, C], or [M + 2, B, C]
    eps,
    B,
    C: tl.constexpr,
    M: tl.constexpr,
    W: tl.constexpr,
    BC: tl.constexpr,
    OF_CURRENT: tl.constexpr,
    ENDS: tl.constexpr,
):
    i_b = (tl.program_id(0) // tl.cdiv(C, BC)).to(tl.int64)
    o_row = tl.arange(0, W)
    b_row = tl.load(x + i_b * C + o_row, mask=o_row < C, other=0).to(tl.float32)
    b_mean = tl.sum(b_row, 0) / C
    b_row = tl.where(o_row < C, b_row - b_mean, 0.0)
    b_scale = tl.rsqrt(tl.sum(b_row * b_row, 0) / C + eps)

    o_c = tl.program_id(0) % tl.cdiv(C, BC) * BC + tl.arange(0, BC)
    m_c = o_c < C
    b_x = (tl.load(x + i_b * C + o_c, mask=m_c, other=0).to(tl.float32) - b_mean) * b_scale
    b_x *= tl.load(norm_weight + o_c, mask=m_c, other=0).to(tl.float32)
    b_x += tl.load(norm_bias + o_c, mask=m_c, other=0).to(tl.float32)
    b_new = b_x.to(mixed.dtype.element_ty)
    b_x = b_new.to(tl.float32)

    i_slot, m_real = i_b, m_c
    if state_indices is not None:
        i_slot = tl.load(state_indices + i_b).to(tl.int64)
        m_real = m_real & (o_c * 0 + i_slot >= 0)
    if mask is not None:  # as a vector: the interpreter garbles a bool scalar
        m_real = m_real & (tl.load(mask + i_b + tl.zeros_like(o_c)) != 0)
    p_carried = carried + i_slot * stride + o_c
    b_step = tl.where(m_real, tl.load(p_carried, mask=m_real, other=0).to(tl.float32) - b_x, 0.0)
    tl.store(p_carried, b_new, mask=m_real)
    for m in tl.static_range(M):
        b_weight = tl.load(mix[m] + o_c, mask=m_c, other=0).to(tl.float32)
        b_mixed = b_x + b_step * (1.0 - b_weight if OF_CURRENT else b_weight)
        tl.store(mixed + (m * B + i_b) * C + o_c, b_mixed.to(mixed.dtype.element_ty), mask=m_c)
    if ENDS:
        tl.store(mixed + (M * B + i_b) * C + o_c, b_new, mask=m_c)
        tl.store(mixed + ((M + 1) * B + i_b) * C + o_c, (b_x + b_step).to(mixed.dtype.element_ty), mask=m_c)


@torch.library.custom_op(f"{NAMESPACE}::norm_shift", mutates_args=("carried",))
def _norm_shift(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    carried: Tensor,
    mix: list[Tensor],
    mask: Tensor | None,
    state_indices: Tensor | None,
    of_current: bool,
    ends: bool,
) -> Tensor:
    C = x.shape[-1]
    B, BC = x.numel() // C, min(NORM_CHANNELS, triton.next_power_of_2(C))
    mixed = x.new_empty(len(mix) + 2 * ends, *x.shape)
    with on_device_of(x):
        norm_shift_fwd_kernel[(B * triton.cdiv(C, BC),)](
            x, norm_weight, norm_bias, carried, carried.stride(0), tuple(mix), mask, state_indices, mixed, eps, B,
            C=C, M=len(mix), W=triton.next_power_of_2(C), BC=BC, OF_CURRENT=of_current, ENDS=ends,
            num_warps=NORM_WARPS,
        )  # fmt: skip
    return mixed


@_norm_shift.register_fake
def _(x, norm_weight, norm_bias, eps, carried, mix, mask, state_indices, of_current, ends):
    return x.new_empty(len(mix) + 2 * ends, *x.shape)
