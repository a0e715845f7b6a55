"""Token shift: interpolate each token with the one read before it, for all targets of a layer in one launch.

Letters: B batch, T time, S sequences, n = S / B sequences packed in a row, C hidden size, M targets (what a layer mixes
tokens for: receptance, key, ...), BT / BC tokens / channels of a tile.

Backward, with f(t) the token that reads t as its predecessor, p_t the predecessor of t and W_m = mix_m + dynamic_m:
    dx_t = sum_m dmixed_{m,t} (1 - W_{m,t}) + dmixed_{m,f(t)} W_{m,f(t)}
    dW_{m,t} = dmixed_{m,t} (p_t - x_t)
The backward gathers as the forward does, so it needs no atomics and gives the same gradients every time.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import (
    DTYPES,
    NAMESPACE,
    SHIFT_BACKWARD,
    SHIFT_FORWARD,
    SHIFT_ONE_TOKEN,
    call,
    needs_gradient,
    on_device_of,
)


def token_shift(
    x: Tensor,
    carried: Tensor,
    mix: Tensor | Sequence[Tensor],
    previous: Tensor | None = None,
    following: Tensor | None = None,
    dynamic: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Interpolate every token with its predecessor p_t (arXiv 2404.05892, section 4.1; 2503.14456, section 4).

        mixed_{m,t} = x_t + (p_t - x_t) (mix_m + dynamic_{m,t})
        p_t = [carried_0, ..., carried_{n-1}, x_0, ..., x_{T-1}][previous_t]

    Arithmetic is in float32. Everything but the indices has a gradient.

    Args:
        x: [B, T, C], T >= 1, bfloat16, float16 or float32.
        carried: the token before the first of each sequence, [S, C]. S is B, or a multiple n B where every row packs n
            sequences: row b then has carried[b n], ..., carried[b n + n - 1].
        mix: weights of the predecessor: M tensors of C elements, or one [M, C].
        previous: int64 [B, T] in 0, ..., n + T - 1, the predecessor of each token. A pad is its own predecessor,
            previous_t = n + t. No two tokens of a row may share a predecessor; where they do, as packed sequences that
            all begin with the same carried token, it receives the gradient of one of them only. The device does not
            check the range. None is plain order, previous_t = t, and needs S = B.
        following: int64 [B, n + T], the inverse of previous: `following_of(previous, n)`. None computes it for the
            backward.
        dynamic: the data-dependent part of the weights (RWKV-6), [M, B, T, C].

    Returns:
        M tensors [B, T, C] in the dtype of x.

    Raises:
        ValueError: shapes do not fit, T = 0, x is float64, or S > B without previous.
    """
    mix = [m.contiguous() for m in mix]
    _check(x, carried, mix, previous, following, dynamic)
    options = [t if t is None else t.contiguous() for t in (previous, following, dynamic)]
    arguments = x.contiguous(), carried.contiguous(), mix, *options
    if needs_gradient(x, carried, dynamic, *mix):
        return tuple(_token_shift(*arguments))
    return tuple(call(_token_shift, *arguments))


def following_of(previous: Tensor, n: int = 1) -> Tensor:
    """Return which token follows each entry of [n carried tokens, token 0, ..., token T-1], -1 for none.

    Args:
        previous: int64 [B, T], the index of each token's predecessor among those entries.
        n: carried tokens of each row.

    Returns:
        int64 [B, n + T].
    """
    B, T = previous.shape
    tokens = torch.arange(T, device=previous.device).expand(B, T)
    return previous.new_full((B, n + T), -1).scatter(1, previous, tokens)


def carried_per_row(x: Tensor, carried: Tensor) -> int:
    """Return n, the sequences of a row of x [B, T, C] by their carried tokens [n B, C]; 1 in an empty batch."""
    return carried.shape[0] // x.shape[0] if x.shape[0] else 1


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
    n = carried_per_row(x, carried) if carried.dim() == 2 else 0
    if not n or list(carried.shape) != [n * B, C]:
        raise ValueError(
            f"carried must be [S, {C}] with S = {B} sequences, or a multiple where they are packed, "
            f"got {list(carried.shape)}."
        )
    if n > 1 and previous is None:
        raise ValueError(f"carried has {n} tokens for each row: previous must say which token follows which.")
    wanted = {
        "previous": (previous, [B, T]),
        "following": (following, [B, n + T]),
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
    """Return this program's row of the batch (int64), tokens [BT, 1] and channels [BT, BC], each with its mask."""
    i_p = tl.program_id(0)
    n_t, n_c = tl.cdiv(T, BT), tl.cdiv(C, BC)
    o_t = ((i_p // n_c) % n_t * BT + tl.arange(0, BT))[:, None]
    # One index per token and channel: to load a row such as mix BT times costs less than to pass it between threads.
    o_c = tl.broadcast_to((i_p % n_c * BC + tl.arange(0, BC))[None, :], [BT, BC])
    return (i_p // n_c // n_t).to(tl.int64), o_t, o_t < T, o_c, o_c < C


@triton.jit
def _token_and_step(x, carried, previous, i_b, o_t, m_t, o_c, m_c, T, n, C: tl.constexpr):
    """Return x_t and p_t - x_t, [BT, BC] float32; n is the number of carried tokens of a row."""
    b_x = tl.load(x + (i_b * T + o_t) * C + o_c, mask=m_t & m_c, other=0).to(tl.float32)
    b_previous = o_t if previous is None else tl.load(previous + i_b * T + o_t, mask=m_t, other=0)
    m_token = b_previous >= n
    p_token = x + (i_b * T + b_previous - n) * C + o_c
    b_token = tl.load(p_token, mask=m_t & m_c & m_token, other=0).to(tl.float32)
    p_carried = carried + (i_b * n + b_previous) * C + o_c
    b_carried = tl.load(p_carried, mask=m_t & m_c & ~m_token, other=0).to(tl.float32)
    return b_x, tl.where(m_token, b_token, b_carried) - b_x


@triton.jit
def _weight(mix, dynamic, i_mb, o_t, m_t, o_c, m_c, T, C: tl.constexpr):
    """Return mix_m + dynamic_m of tokens o_t, [BT, BC] float32; i_mb is m B + b, int64."""
    b_weight = tl.load(mix + o_c, mask=m_c, other=0).to(tl.float32)
    if dynamic is not None:
        p_dynamic = dynamic + (i_mb * T + o_t) * C + o_c
        b_weight += tl.load(p_dynamic, mask=m_t & m_c, other=0).to(tl.float32)
    return b_weight


@triton.jit
def _gradient_of_predecessors(
    mix, dynamic, dmixed, following, i_b, o_entry, m_t, o_c, m_c, B, T, n, C: tl.constexpr, M: tl.constexpr
):
    """Return sum_m dmixed_m W_m of the tokens whose predecessors are the entries o_entry of [n carried, T tokens]."""
    if following is None:
        b_reader = o_entry
        m_reader = m_c & m_t & (b_reader < T)
    else:
        b_reader = tl.load(following + i_b * (T + n) + o_entry, mask=m_t, other=-1)
        m_reader = m_c & (b_reader >= 0)
    b_sum = tl.zeros(o_c.shape, tl.float32)
    for m in tl.static_range(M):
        p_dmixed = dmixed[m] + (i_b * T + b_reader) * C + o_c
        b_dmixed = tl.load(p_dmixed, mask=m_reader, other=0).to(tl.float32)
        b_sum += b_dmixed * _weight(mix[m], dynamic, m * B + i_b, b_reader, m_reader, o_c, m_c, T, C)
    return b_sum


@triton.jit(do_not_specialize=["B", "T", "n"])
def token_shift_fwd_kernel(
    x,
    carried,
    mix,  # M pointers
    previous,
    dynamic,
    mixed,  # M pointers
    B,
    T,
    n,
    C: tl.constexpr,
    M: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    i_b, o_t, m_t, o_c, m_c = _tile(T, C, BT, BC)
    b_x, b_step = _token_and_step(x, carried, previous, i_b, o_t, m_t, o_c, m_c, T, n, C)
    for m in tl.static_range(M):
        b_mixed = b_x + b_step * _weight(mix[m], dynamic, m * B + i_b, o_t, m_t, o_c, m_c, T, C)
        p_mixed = mixed[m] + (i_b * T + o_t) * C + o_c
        tl.store(p_mixed, b_mixed.to(mixed[m].dtype.element_ty), mask=m_t & m_c)


@triton.jit(do_not_specialize=["B", "T", "n"])
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
    n,
    C: tl.constexpr,
    M: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    i_b, o_t, m_t, o_c, m_c = _tile(T, C, BT, BC)
    _, b_step = _token_and_step(x, carried, previous, i_b, o_t, m_t, o_c, m_c, T, n, C)
    o_x = (i_b * T + o_t) * C + o_c
    b_dx = _gradient_of_predecessors(
        mix, dynamic, dmixed, following, i_b, n + o_t, m_t, o_c, m_c, B, T, n, C, M
    )
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

    n_tiles = tl.cdiv(T, BT)
    for i_n in range(i_tile % n_tiles, n, n_tiles):  # the row's tiles share its carried tokens
        o_entry = tl.zeros([1, BC], tl.int32) + i_n
        b_dcarried = _gradient_of_predecessors(
            mix, dynamic, dmixed, following, i_b, o_entry, m_row, o_row, m_row, B, T, n, C, M
        )
        p_dcarried = dcarried + (i_b * n + i_n) * C + o_row
        tl.store(p_dcarried, b_dcarried.to(dcarried.dtype.element_ty), mask=m_row)


# --- launches -----------------------------------------------------------------------------------------


def token_shift_forward(
    x: Tensor,
    carried: Tensor,
    mix: list[Tensor],
    previous: Tensor | None,
    dynamic: Tensor | None,
) -> list[Tensor]:
    """Launch the forward; return the M interpolations [B, T, C]."""
    B, T, C = x.shape
    mixed = [torch.empty_like(x) for _ in mix]
    BT, BC, num_warps = SHIFT_FORWARD if T > 1 else SHIFT_ONE_TOKEN
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
            carried_per_row(x, carried),
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
    """Launch the backward; return dx [B, T, C], dcarried [S, C], dmix [M, C], ddynamic [M, B, T, C] (or [0])."""
    B, T, C = x.shape
    M = len(mix)
    BT, BC, num_warps = SHIFT_BACKWARD[x.element_size()]
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
            carried_per_row(x, carried),
            C=C,
            M=M,
            BT=BT,
            BC=BC,
            num_warps=num_warps,
        )
    return dx, dcarried, dmix.sum((0, 1)), ddynamic


# --- the op -------------------------------------------------------------------------------------------


@torch.library.custom_op(f"{NAMESPACE}::token_shift", mutates_args=())
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


@torch.library.custom_op(f"{NAMESPACE}::token_shift_backward", mutates_args=())
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
        following = following_of(previous, carried_per_row(x, carried))
    dmixed = [d.contiguous() for d in dmixed]
    dx, dcarried, dmix, ddynamic = _token_shift_backward(
        x, carried, mix, previous, following, dynamic, dmixed
    )
    dmix = [d.to(m.dtype).view_as(m) for d, m in zip(dmix.unbind(), mix)]
    return dx, dcarried, dmix, None, None, None if dynamic is None else ddynamic


_token_shift.register_autograd(_gradients, setup_context=_save)
