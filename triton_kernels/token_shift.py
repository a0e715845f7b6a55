"""Token shift: every token interpolated with its predecessor, for all targets of a layer in one launch.

Letters: B batch, T time, C hidden size, M targets (what a layer mixes a token for: receptance, key, ...),
BT / BC tokens / channels of a tile.

Backward, with f(t) the token that reads t as its predecessor and W_m = mix_m + dynamic_m:
    dx_t = sum_m dmixed_{m,t} (1 - W_{m,t}) + dmixed_{m,f(t)} W_{m,f(t)}
    dW_{m,t} = dmixed_{m,t} (p_t - x_t)
so it gathers too: no atomics, and the same gradients every time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import DTYPES, on_device_of


class Tiles(NamedTuple):
    """Tokens and channels of a program."""

    BT: int
    BC: int
    num_warps: int


FORWARD = Tiles(BT=8, BC=128, num_warps=4)
FORWARD_OF_ONE_TOKEN = Tiles(BT=1, BC=128, num_warps=1)
BACKWARD = {2: Tiles(BT=64, BC=64, num_warps=8), 4: Tiles(BT=32, BC=32, num_warps=8)}
"""By bytes of an element. A tile leaves M float32 rows of the gradient of mix: long tiles, so that these are few."""


def token_shift(
    x: Tensor,
    carried: Tensor,
    mix: Tensor | Sequence[Tensor],
    previous: Tensor | None = None,
    following: Tensor | None = None,
    dynamic: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Interpolates every token with its predecessor p_t (arXiv 2404.05892, section 4.1; 2503.14456, section 4).

        mixed_{m,t} = x_t + (p_t - x_t) (mix_m + dynamic_{m,t}),   p_t = [carried, x_0, ..., x_{T-1}][previous_t]

    Computed in float32. Gradients of everything but the indices.

    Args:
        x: [B, T, C], T >= 1, bfloat16, float16 or float32.
        carried: the token before the first, [B, C].
        mix: weights of the predecessor: M tensors of C elements, or one [M, C].
        previous: int64 [B, T] in 0..T, indices that the device does not check; None is plain order, previous_t = t.
            A pad is its own predecessor, previous_t = 1 + t. No two tokens may share one, except that packed
            sequences may all begin behind `carried`, which then gets the gradient of one of them only.
        following: int64 [B, 1 + T], the way back: `following_of(previous)`. None computes it for the backward.
        dynamic: what the data add to the weights (RWKV-6), [M, B, T, C].

    Returns:
        M tensors [B, T, C] in the dtype of x.

    Raises:
        ValueError: shapes that do not fit, T = 0, float64.
    """
    mix = [m.contiguous() for m in mix]
    _check(x, carried, mix, previous, following, dynamic)
    if dynamic is not None:
        dynamic = dynamic.contiguous()
    if previous is not None:
        previous = previous.contiguous()
    if following is not None:
        following = following.contiguous()
    return tuple(_token_shift(x.contiguous(), carried.contiguous(), mix, previous, following, dynamic))


def following_of(previous: Tensor) -> Tensor:
    """Which token reads each entry of [carried, token 0, ..., token T-1] as its predecessor, -1 for none.

    Args:
        previous: int64 [B, T], index of each token's predecessor among those entries, no index twice in a row.

    Returns:
        int64 [B, 1 + T].
    """
    B, T = previous.shape
    tokens = torch.arange(T, device=previous.device).expand(B, T)
    return previous.new_full((B, 1 + T), -1).scatter(1, previous, tokens)


def _check(
    x: Tensor,
    carried: Tensor,
    mix: list[Tensor],
    previous: Tensor | None,
    following: Tensor | None,
    dynamic: Tensor | None,
) -> None:
    if x.dim() != 3 or not x.shape[1]:
        raise ValueError(f"x must be [B, T, C] with T >= 1, got {list(x.shape)}.")
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be bfloat16, float16 or float32, got {x.dtype}.")
    B, T, C = x.shape
    if not mix or any(m.numel() != C for m in mix):
        raise ValueError(f"mix must be weights of C = {C} elements each, got {[list(m.shape) for m in mix]}.")
    wanted = {
        "carried": (carried, [B, C]),
        "previous": (previous, [B, T]),
        "following": (following, [B, 1 + T]),
        "dynamic": (dynamic, [len(mix), B, T, C]),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and list(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {list(tensor.shape)}.")
    for name, index in (("previous", previous), ("following", following)):
        if index is not None and index.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, got {index.dtype}.")
    if following is not None and previous is None:
        raise ValueError("following was given without previous.")


# --- kernels ------------------------------------------------------------------------------------------


@triton.jit
def _tile(T, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """Of this program: row of the batch (int64); tokens [BT, 1] and channels [BT, BC] with their masks."""
    i_p = tl.program_id(0)
    n_t, n_c = tl.cdiv(T, BT), tl.cdiv(C, BC)
    o_t = ((i_p // n_c) % n_t * BT + tl.arange(0, BT))[:, None]
    # For every token anew: loading a row such as mix BT times costs less than handing it round.
    o_c = tl.broadcast_to((i_p % n_c * BC + tl.arange(0, BC))[None, :], [BT, BC])
    return (i_p // n_c // n_t).to(tl.int64), o_t, o_t < T, o_c, o_c < C


@triton.jit
def _token_and_step(x, carried, previous, i_b, o_t, m_t, o_c, m_c, T, C: tl.constexpr):
    """x_t and p_t - x_t, [BT, BC] float32."""
    b_x = tl.load(x + (i_b * T + o_t) * C + o_c, mask=m_t & m_c, other=0).to(tl.float32)
    b_previous = o_t if previous is None else tl.load(previous + i_b * T + o_t, mask=m_t, other=0)
    m_token = b_previous > 0
    p_token = x + (i_b * T + b_previous - 1) * C + o_c
    b_token = tl.load(p_token, mask=m_t & m_c & m_token, other=0).to(tl.float32)
    b_carried = tl.load(carried + i_b * C + o_c, mask=m_t & m_c & ~m_token, other=0).to(tl.float32)
    return b_x, tl.where(m_token, b_token, b_carried) - b_x


@triton.jit
def _weight(mix, dynamic, i_mb, o_t, m_t, o_c, m_c, T, C: tl.constexpr):
    """mix_m + dynamic_m of tokens o_t, [BT, BC] float32; i_mb is m B + b, int64."""
    b_weight = tl.load(mix + o_c, mask=m_c, other=0).to(tl.float32)
    if dynamic is not None:
        p_dynamic = dynamic + (i_mb * T + o_t) * C + o_c
        b_weight += tl.load(p_dynamic, mask=m_t & m_c, other=0).to(tl.float32)
    return b_weight


@triton.jit
def _gradient_of_seen(
    mix, dynamic, dmixed, following, i_b, o_entry, m_t, o_c, m_c, B, T, C: tl.constexpr, M: tl.constexpr
):
    """sum_m dmixed_m W_m of the tokens that read these entries of [carried, tokens] as their predecessor."""
    if following is None:
        b_reader = o_entry
        m_reader = m_c & m_t & (b_reader < T)
    else:
        b_reader = tl.load(following + i_b * (T + 1) + o_entry, mask=m_t, other=-1)
        m_reader = m_c & (b_reader >= 0)
    b_sum = tl.zeros(o_c.shape, tl.float32)
    for m in tl.static_range(M):
        p_dmixed = dmixed[m] + (i_b * T + b_reader) * C + o_c
        b_dmixed = tl.load(p_dmixed, mask=m_reader, other=0).to(tl.float32)
        b_sum += b_dmixed * _weight(mix[m], dynamic, m * B + i_b, b_reader, m_reader, o_c, m_c, T, C)
    return b_sum


@triton.jit(do_not_specialize=["B", "T"])
def token_shift_fwd_kernel(
    x,
    carried,
    mix,  # M pointers
    previous,
    dynamic,
    mixed,  # M pointers
    B,
    T,
    C: tl.constexpr,
    M: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    i_b, o_t, m_t, o_c, m_c = _tile(T, C, BT, BC)
    b_x, b_step = _token_and_step(x, carried, previous, i_b, o_t, m_t, o_c, m_c, T, C)
    for m in tl.static_range(M):
        b_mixed = b_x + b_step * _weight(mix[m], dynamic, m * B + i_b, o_t, m_t, o_c, m_c, T, C)
        p_mixed = mixed[m] + (i_b * T + o_t) * C + o_c
        tl.store(p_mixed, b_mixed.to(mixed[m].dtype.element_ty), mask=m_t & m_c)


@triton.jit(do_not_specialize=["B", "T"])
def token_shift_bwd_kernel(
    x,
    carried,
    mix,  # M pointers
    previous,
    following,
    dynamic,
    dmixed,  # M pointers
    dx,
    dcarried,
    dmix,  # float32 [B, cdiv(T, BT), M, C], sums over the tokens of a tile
    ddynamic,
    B,
    T,
    C: tl.constexpr,
    M: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    i_b, o_t, m_t, o_c, m_c = _tile(T, C, BT, BC)
    _, b_step = _token_and_step(x, carried, previous, i_b, o_t, m_t, o_c, m_c, T, C)
    o_x = (i_b * T + o_t) * C + o_c
    b_dx = _gradient_of_seen(mix, dynamic, dmixed, following, i_b, 1 + o_t, m_t, o_c, m_c, B, T, C, M)
    i_tile = tl.program_id(0) // tl.cdiv(C, BC)  # of B cdiv(T, BT)
    o_row = (tl.program_id(0) % tl.cdiv(C, BC) * BC + tl.arange(0, BC))[None, :]
    m_row = o_row < C
    for m in tl.static_range(M):
        b_dmixed = tl.load(dmixed[m] + o_x, mask=m_t & m_c, other=0).to(tl.float32)
        b_dx += b_dmixed * (1 - _weight(mix[m], dynamic, m * B + i_b, o_t, m_t, o_c, m_c, T, C))
        b_dweight = b_dmixed * b_step
        p_dmix = dmix + (i_tile.to(tl.int64) * M + m) * C + o_row
        tl.store(p_dmix, tl.sum(b_dweight, 0)[None, :], mask=m_row)
        if dynamic is not None:
            p_ddynamic = ddynamic + ((m * B + i_b) * T + o_t) * C + o_c
            tl.store(p_ddynamic, b_dweight.to(ddynamic.dtype.element_ty), mask=m_t & m_c)
    tl.store(dx + o_x, b_dx.to(dx.dtype.element_ty), mask=m_t & m_c)

    if i_tile % tl.cdiv(T, BT) == 0:
        o_first = tl.zeros([1, BC], tl.int32)
        b_dcarried = _gradient_of_seen(
            mix, dynamic, dmixed, following, i_b, o_first, m_row, o_row, m_row, B, T, C, M
        )
        tl.store(dcarried + i_b * C + o_row, b_dcarried.to(dcarried.dtype.element_ty), mask=m_row)


# --- launches -----------------------------------------------------------------------------------------


def token_shift_forward(
    x: Tensor,
    carried: Tensor,
    mix: list[Tensor],
    previous: Tensor | None,
    dynamic: Tensor | None,
) -> list[Tensor]:
    """The M interpolations [B, T, C]."""
    B, T, C = x.shape
    mixed = [torch.empty_like(x) for _ in mix]
    BT, BC, num_warps = FORWARD if T > 1 else FORWARD_OF_ONE_TOKEN
    grid = (B * triton.cdiv(T, BT) * triton.cdiv(C, BC),)
    with on_device_of(x):
        token_shift_fwd_kernel[grid](
            x,
            carried,
            tuple(mix),
            previous,
            dynamic,
            tuple(mixed),
            B,
            T,
            C=C,
            M=len(mix),
            BT=BT,
            BC=BC,
            num_warps=num_warps,
        )
    return mixed


def token_shift_backward(
    x: Tensor,
    carried: Tensor,
    mix: list[Tensor],
    previous: Tensor | None,
    following: Tensor | None,
    dynamic: Tensor | None,
    dmixed: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients: dx [B, T, C], dcarried [B, C], dmix [M, C] float32, ddynamic [M, B, T, C] (or [0])."""
    B, T, C = x.shape
    M = len(mix)
    BT, BC, num_warps = BACKWARD[x.element_size()]
    n_t = triton.cdiv(T, BT)
    dx, dcarried = torch.empty_like(x), torch.empty_like(carried)
    dmix = torch.empty(B, n_t, M, C, dtype=torch.float32, device=x.device)
    ddynamic = x.new_empty(0) if dynamic is None else torch.empty_like(dynamic)
    with on_device_of(x):
        token_shift_bwd_kernel[(B * n_t * triton.cdiv(C, BC),)](
            x,
            carried,
            tuple(mix),
            previous,
            following,
            dynamic,
            tuple(dmixed),
            dx,
            dcarried,
            dmix,
            None if dynamic is None else ddynamic,
            B,
            T,
            C=C,
            M=M,
            BT=BT,
            BC=BC,
            num_warps=num_warps,
        )
    return dx, dcarried, dmix.sum((0, 1)), ddynamic


# --- the op -------------------------------------------------------------------------------------------


@torch.library.custom_op("visualrwkv::token_shift", mutates_args=())
def _token_shift(
    x: Tensor,
    carried: Tensor,
    mix: list[Tensor],
    previous: Tensor | None,
    following: Tensor | None,
    dynamic: Tensor | None,
) -> list[Tensor]:
    return token_shift_forward(x, carried, mix, previous, dynamic)


@_token_shift.register_fake
def _(x, carried, mix, previous, following, dynamic):
    return [torch.empty_like(x) for _ in mix]


@torch.library.custom_op("visualrwkv::token_shift_backward", mutates_args=())
def _token_shift_backward(
    x: Tensor,
    carried: Tensor,
    mix: list[Tensor],
    previous: Tensor | None,
    following: Tensor | None,
    dynamic: Tensor | None,
    dmixed: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return token_shift_backward(x, carried, mix, previous, following, dynamic, dmixed)


@_token_shift_backward.register_fake
def _(x, carried, mix, previous, following, dynamic, dmixed):
    dmix = x.new_empty((len(mix), x.shape[-1]), dtype=torch.float32)
    ddynamic = x.new_empty(0) if dynamic is None else torch.empty_like(dynamic)
    return torch.empty_like(x), torch.empty_like(carried), dmix, ddynamic


def _save(ctx, inputs, output):
    x, carried, mix, previous, following, dynamic = inputs
    ctx.save_for_backward(x, carried, previous, following, dynamic, *mix)


def _gradients(ctx, dmixed):
    x, carried, previous, following, dynamic, *mix = ctx.saved_tensors
    if previous is not None and following is None:
        following = following_of(previous)
    dmixed = [d.contiguous() for d in dmixed]
    dx, dcarried, dmix, ddynamic = _token_shift_backward(
        x, carried, mix, previous, following, dynamic, dmixed
    )
    dmix = [d.to(m.dtype).view_as(m) for d, m in zip(dmix.unbind(), mix)]
    return dx, dcarried, dmix, None, None, None if dynamic is None else ddynamic


_token_shift.register_autograd(_gradients, setup_context=_save)
