"""One token of one time mix: everything between its matrix products, in one launch.

For decoding, without gradients. Letters: B batch, N states of a pool, H heads, K = V size of a head, A = H K.

The state is read and written in place. Without `state_indices` the batch's states are [B, H, K, V], one per sequence.
With `state_indices` [B], `state` is a pool [N, H, K, V], of which sequence b uses row `state_indices[b]`: an engine
that serves many sequences gathers no states and scatters none. A negative index marks a slot of the batch that holds
no sequence (as when a captured graph has room for more sequences than there are): no state changes, and out is 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import (
    DECODE_GROUPS,
    DECODE_RANKS,
    DECODE_STAGES,
    DECODE_WARPS,
    HEAD_SIZES,
    NAMESPACE,
    call,
    has_rows_apart,
    needs_gradient,
    on_device_of,
    product_precision,
)

DECAY_SCALE = tl.constexpr(0.6065306597126334)
"""e^(-1/2). RWKV-7's log decays lie between -e^(-1/2) and 0."""


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
    """Compute RWKV-7's time mix of one token (arXiv 2503.14456, section 4) from its matrix products up to `output`.

        w = -e^(-1/2) sigmoid(w0 + decay);  eta = sigmoid(a0 + rate);  kk = k k_k / |k k_k|;  k' = k (1 + (eta - 1) k_a)
        v' = v + (v_first - v) sigmoid(v0 + value_gate)
        S <- diag(exp(w)) S + (kk eta) (-kk^T S) + k' v'^T;  y = r^T S
        out = (norm(y) + (sum r k' r_k) v') gate

    Arithmetic is in float32.

    Args:
        r: receptance, [B, A] or [B, 1, A]. So are decay, k, v, rate, gate, value_gate and v_first.
        decay: tanh(x_w w1) w2, without its bias w0.
        k: key.
        v: value.
        rate: (x_a a1) a2, the in-context learning rate without its bias a0.
        gate: sigmoid(x_g g1) g2.
        state: S, float32, updated in place: [B, H, K, V], or [N, H, K, V] with state_indices. Each [H, K, V] is
            contiguous; from one to the next may be farther, as in a pool that holds other states in between.
        w0: bias of decay, A elements.
        a0: bias of rate, A elements.
        k_k: A elements.
        k_a: A elements.
        r_k: A elements.
        norm_weight: weight of the norm over each head, A elements.
        norm_bias: bias of that norm, A elements.
        eps: epsilon of that norm.
        value_gate: (x_v v1) v2 without its bias v0. None, like `v_first` and `v0`, in layer 0, where v' = v.
        v_first: v of layer 0.
        v0: bias of value_gate, A elements.
        mask: bool [B] or [B, 1], False at pads: their state does not change and their out is 0.
        state_indices: int32 or int64 [B], the row of `state` that each sequence uses, no row twice; negative for none.
            The device does not check that they are below N.

    Returns:
        out, in the shape and dtype of r.

    Raises:
        ValueError: shapes do not fit, the state is not float32 or a [H, K, V] not contiguous, or only some of
            value_gate, v_first and v0 are given.
        RuntimeError: an input requires a gradient.
    """
    if len({value_gate is None, v_first is None, v0 is None}) != 1:
        raise ValueError("value_gate, v_first and v0 go together: give all or none.")
    tokens = {"r": r, "decay": decay, "k": k, "v": v, "rate": rate, "gate": gate}
    tokens |= {"value_gate": value_gate, "v_first": v_first}
    weights = {"w0": w0, "a0": a0, "v0": v0, "k_k": k_k, "k_a": k_a, "r_k": r_k}
    weights |= {"norm_weight": norm_weight, "norm_bias": norm_bias}
    _check("rwkv7_decode", tokens, weights, state, mask, state_indices)
    indices = {"mask": mask, "state_indices": state_indices}
    return call(_rwkv7_decode, **_contiguous(tokens | weights | indices), state=state, eps=eps)


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
    """Compute RWKV-6's or 5's time mix of one token (arXiv 2404.05892) from its matrix products up to `output`.

        w = -exp(time_decay + decay)
        y = r^T (S + diag(u) k v^T);  S <- diag(exp(w)) S + k v^T
        out = norm(y) silu(gate)

    Arithmetic is in float32.

    Args:
        r: receptance, [B, A] or [B, 1, A]. So are decay, k, v and gate.
        decay: the data-dependent part of the decay, added to time_decay (RWKV-6), or None (RWKV-5).
        k: key.
        v: value.
        gate: the gate before its silu.
        state: S, float32, updated in place: [B, H, K, V], or [N, H, K, V] with state_indices. Each [H, K, V] is
            contiguous; from one to the next may be farther, as in a pool that holds other states in between.
        time_decay: A elements.
        u: bonus of the current token, A elements.
        norm_weight: weight of the norm over each head, A elements.
        norm_bias: bias of that norm, A elements.
        eps: epsilon of that norm.
        mask: bool [B] or [B, 1], False at pads: their state does not change and their out is 0.
        state_indices: int32 or int64 [B], the row of `state` that each sequence uses, no row twice; negative for none.
            The device does not check that they are below N.

    Returns:
        out, in the shape and dtype of r.

    Raises:
        ValueError: shapes do not fit, or the state is not float32 or a [H, K, V] not contiguous.
        RuntimeError: an input requires a gradient.
    """
    tokens = {"r": r, "decay": decay, "k": k, "v": v, "gate": gate}
    weights = {"time_decay": time_decay, "u": u, "norm_weight": norm_weight, "norm_bias": norm_bias}
    _check("rwkv6_decode", tokens, weights, state, mask, state_indices)
    indices = {"mask": mask, "state_indices": state_indices}
    return call(_rwkv6_decode, **_contiguous(tokens | weights | indices), state=state, eps=eps)


def _check(
    op: str,
    tokens: dict[str, Tensor | None],
    weights: dict[str, Tensor | None],
    state: Tensor,
    mask: Tensor | None,
    state_indices: Tensor | None,
) -> None:
    if state.dim() != 4 or state.shape[2] != state.shape[3] or state.shape[2] not in HEAD_SIZES:
        raise ValueError(
            f"state must be [B, H, K, K] (or [N, H, K, K]) with K one of {', '.join(map(str, HEAD_SIZES))}, "
            f"got {list(state.shape)}."
        )
    if state.dtype != torch.float32 or not has_rows_apart(state):
        raise ValueError(
            f"state must be float32 and each [H, K, V] contiguous and apart from the others, "
            f"got {state.dtype} of strides {state.stride()}."
        )
    N, H, K, _ = state.shape
    B = N if state_indices is None else state_indices.numel()
    if state_indices is not None and (
        state_indices.dim() != 1 or state_indices.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"state_indices must be int32 or int64 [B], got {state_indices.dtype} {list(state_indices.shape)}."
        )
    for name, x in tokens.items():
        if x is not None and list(x.shape) not in ([B, H * K], [B, 1, H * K]):
            raise ValueError(f"{name} must be [B, A] = {[B, H * K]} or [B, 1, A], got {list(x.shape)}.")
    for name, x in weights.items():
        if x is not None and x.numel() != H * K:
            raise ValueError(f"{name} must have A = {H * K} elements, got {list(x.shape)}.")
    if mask is not None and (mask.numel() != B or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool [B] = [{B}], got {mask.dtype} {list(mask.shape)}.")
    inputs = [x for x in (*tokens.values(), *weights.values(), state) if x is not None]
    if any(x.dtype == torch.float64 for x in inputs):
        raise ValueError(f"{op} computes in float32, got float64.")
    if needs_gradient(*inputs):
        raise RuntimeError(f"{op} has no gradient: call it under torch.no_grad().")


def _contiguous(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if x is None else x.contiguous() for name, x in tensors.items()}


# --- kernels: one program per sequence and head, which holds the head's state in registers ---------------


@triton.jit
def _state_of(state, stride, mask, state_indices, i_b, i_h, o_k, K: tl.constexpr):
    """Find the state of sequence i_b and head i_h; `stride` elements lie between one [H, K, V] and the next.

    Returns p_state [K, K], and m_real [K]: True where the sequence has a token to read. The mask is a vector because
    the interpreter garbles a bool scalar.
    """
    i_state, m_real = i_b, o_k >= 0
    if state_indices is not None:
        i_state = tl.load(state_indices + i_b).to(tl.int64)
        m_real = m_real & (o_k * 0 + i_state >= 0)
        i_state = tl.maximum(i_state, 0)
    if mask is not None:
        m_real = m_real & (tl.load(mask + i_b + tl.zeros_like(o_k)) != 0)
    return state + i_state * stride + i_h * K * K + o_k[:, None] * K + o_k[None, :], m_real


@triton.jit
def _gated_norm(b_y, b_bonus, norm_weight, norm_bias, gate, out, o_h, o_bh, m_real, eps, K: tl.constexpr):
    """Store (norm(y) + bonus) gate of one head, 0 where not m_real; b_y, b_bonus, gate [K]."""
    b_centred = b_y - tl.sum(b_y, 0) / K
    b_norm = b_centred * tl.rsqrt(tl.sum(b_centred * b_centred, 0) / K + eps)
    b_norm = b_norm * tl.load(norm_weight + o_h).to(tl.float32) + tl.load(norm_bias + o_h).to(tl.float32)
    b_out = tl.where(m_real, (b_norm + b_bonus) * gate, 0.0)
    tl.store(out + o_bh, b_out.to(out.dtype.element_ty))


@triton.jit
def _rwkv7_token(
    r, k, v, v_first, b_decay, b_rate, b_gate, b_lerp, w0, a0, v0, k_k, k_a, r_k, norm_weight, norm_bias, state, stride,
    mask, state_indices, out, i_b, i_h, eps, H: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Compute a token of sequence i_b in head i_h; b_decay, b_rate, b_gate, b_lerp (the value gate) [K] float32."""
    o_k = tl.arange(0, K)
    o_h, o_bh = i_h * K + o_k, (i_b * H + i_h) * K + o_k
    p_state, m_real = _state_of(state, stride, mask, state_indices, i_b, i_h, o_k, K)
    b_S = tl.load(p_state)  # loaded first, because it is by far the largest

    b_r = tl.load(r + o_bh).to(tl.float32)
    b_k = tl.load(k + o_bh).to(tl.float32)
    b_v = tl.load(v + o_bh).to(tl.float32)
    b_decay += tl.load(w0 + o_h).to(tl.float32)
    b_rate = tl.sigmoid(tl.load(a0 + o_h).to(tl.float32) + b_rate)
    if v_first is not None:
        b_lerp = tl.sigmoid(tl.load(v0 + o_h).to(tl.float32) + b_lerp)
        b_v += (tl.load(v_first + o_bh).to(tl.float32) - b_v) * b_lerp
    b_kk = b_k * tl.load(k_k + o_h).to(tl.float32)
    b_kk /= tl.maximum(tl.sqrt(tl.sum(b_kk * b_kk, 0)), 1e-12)
    b_k *= 1 + (b_rate - 1) * tl.load(k_a + o_h).to(tl.float32)
    b_bonus = tl.sum(b_r * b_k * tl.load(r_k + o_h).to(tl.float32), 0) * b_v

    b_sa = -tl.sum(b_kk[:, None] * b_S, 0)  # minus what the state holds under the key kk, [V]
    b_S *= tl.exp(tl.sigmoid(b_decay) * -DECAY_SCALE)[:, None]
    b_S += (b_kk * b_rate)[:, None] * b_sa[None, :] + b_k[:, None] * b_v[None, :]
    tl.store(p_state, b_S, mask=m_real[:, None])
    # Read again, not kept: with 128 values of a head registers would spill.
    b_r = tl.load(r + o_bh, volatile=True).to(tl.float32)
    b_y = tl.sum(b_r[:, None] * b_S, 0)  # [V]
    _gated_norm(b_y, b_bonus, norm_weight, norm_bias, b_gate, out, o_h, o_bh, m_real, eps, K)


@triton.jit
def rwkv7_decode_fwd_kernel(
    r, decay, k, v, rate, gate, value_gate, v_first, w0, a0, v0, k_k, k_a, r_k, norm_weight, norm_bias, state, stride,
    mask, state_indices, out, eps, H: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(0).to(tl.int64)
    o_bh = i_bh * K + tl.arange(0, K)
    b_decay = tl.load(decay + o_bh).to(tl.float32)
    b_rate = tl.load(rate + o_bh).to(tl.float32)
    b_gate = tl.load(gate + o_bh).to(tl.float32)
    b_lerp = b_gate if v_first is None else tl.load(value_gate + o_bh).to(tl.float32)
    _rwkv7_token(
        r, k, v, v_first, b_decay, b_rate, b_gate, b_lerp, w0, a0, v0, k_k, k_a, r_k, norm_weight, norm_bias, state,
        stride, mask, state_indices, out, i_bh // H, i_bh % H, eps, H, K,
    )  # fmt: skip


@triton.jit
def _map_up(
    low, up, o_b, m_b, o_h, D: tl.constexpr, A: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Return low W2 of sequences o_b in channels o_h, float32 [len(o_b), K]; low is [B, D]."""
    b_y = tl.zeros([o_b.shape[0], o_h.shape[0]], tl.float32)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        p_low = low + o_b[:, None] * D + o_d[None, :]
        b_low = tl.load(p_low, mask=m_b[:, None] & (o_d[None, :] < D), other=0)
        b_up = tl.load(up + o_d[:, None] * A + o_h[None, :], mask=o_d[:, None] < D, other=0)
        b_y = tl.dot(b_low, b_up, b_y, input_precision=PRECISION)
    return b_y


@triton.jit(do_not_specialize=["B"])
def rwkv7_decode_low_rank_fwd_kernel(
    r, k, v, v_first, low, up, w0, a0, v0, k_k, k_a, r_k, norm_weight, norm_bias, state, stride, mask, state_indices,
    out, eps, B, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, G: tl.constexpr, BB: tl.constexpr,
    BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute G sequences of one head, and first their low-rank maps W2 (decay, rate, gate, value gate) together."""
    i_h = (tl.program_id(0) % H).to(tl.int64)
    i_first = (tl.program_id(0) // H).to(tl.int64) * G
    o_row, o_h = tl.arange(0, BB), i_h * K + tl.arange(0, K)
    o_b, m_b = i_first + o_row, (o_row < G) & (i_first + o_row < B)
    b_decays = _map_up(low[0], up[0], o_b, m_b, o_h, D[0], H * K, BD, PRECISION)
    b_rates = _map_up(low[1], up[1], o_b, m_b, o_h, D[1], H * K, BD, PRECISION)
    b_gates = _map_up(low[2], up[2], o_b, m_b, o_h, D[2], H * K, BD, PRECISION)
    b_lerps = b_gates
    if v_first is not None:
        b_lerps = _map_up(low[3], up[3], o_b, m_b, o_h, D[3], H * K, BD, PRECISION)
    for i in range(0, tl.minimum(B - i_first, G).to(tl.int32)):
        m_own = o_row[:, None] == i
        _rwkv7_token(
            r, k, v, v_first,
            tl.sum(tl.where(m_own, b_decays, 0.0), 0),
            tl.sum(tl.where(m_own, b_rates, 0.0), 0),
            tl.sum(tl.where(m_own, b_gates, 0.0), 0),
            tl.sum(tl.where(m_own, b_lerps, 0.0), 0),
            w0, a0, v0, k_k, k_a, r_k, norm_weight, norm_bias, state, stride, mask, state_indices, out, i_first + i,
            i_h, eps, H, K,
        )  # fmt: skip


@triton.jit
def rwkv6_decode_fwd_kernel(
    r,
    decay,
    k,
    v,
    gate,
    time_decay,
    u,
    norm_weight,
    norm_bias,
    state,
    stride,
    mask,
    state_indices,
    out,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
):
    i_bh = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, K)
    o_h, o_bh = i_bh % H * K + o_k, i_bh * K + o_k
    p_state, m_real = _state_of(state, stride, mask, state_indices, i_bh // H, i_bh % H, o_k, K)
    b_S = tl.load(p_state)  # loaded first, because it is by far the largest

    b_r = tl.load(r + o_bh).to(tl.float32)
    b_k = tl.load(k + o_bh).to(tl.float32)
    b_v = tl.load(v + o_bh).to(tl.float32)
    b_decay = tl.load(time_decay + o_h).to(tl.float32)
    if decay is not None:
        b_decay += tl.load(decay + o_bh).to(tl.float32)

    b_now = tl.sum(b_r * tl.load(u + o_h).to(tl.float32) * b_k, 0)
    b_y = tl.sum(b_r[:, None] * b_S, 0) + b_now * b_v  # [V]
    b_S = tl.exp(-tl.exp(b_decay))[:, None] * b_S + b_k[:, None] * b_v[None, :]
    tl.store(p_state, b_S, mask=m_real[:, None])
    b_gate = tl.load(gate + o_bh).to(tl.float32)
    b_gate *= tl.sigmoid(b_gate)
    _gated_norm(b_y, 0.0, norm_weight, norm_bias, b_gate, out, o_h, o_bh, m_real, eps, K)


# --- the ops ------------------------------------------------------------------------------------------


@torch.library.custom_op(f"{NAMESPACE}::rwkv7_decode", mutates_args=("state",))
def _rwkv7_decode(
    r: Tensor,
    decay: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    gate: Tensor,
    value_gate: Tensor | None,
    v_first: Tensor | None,
    w0: Tensor,
    a0: Tensor,
    v0: Tensor | None,
    k_k: Tensor,
    k_a: Tensor,
    r_k: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    state: Tensor,
    mask: Tensor | None,
    state_indices: Tensor | None,
    eps: float,
) -> Tensor:
    B, (_, H, K, _) = r.shape[0], state.shape
    out = torch.empty_like(r)
    tokens = (r, decay, k, v, rate, gate, value_gate, v_first)
    weights = (w0, a0, v0, k_k, k_a, r_k, norm_weight, norm_bias)
    with on_device_of(r):
        rwkv7_decode_fwd_kernel[(B * H,)](
            *tokens,
            *weights,
            state,
            state.stride(0),
            mask,
            state_indices,
            out,
            eps,
            H=H,
            K=K,
            num_warps=DECODE_WARPS[K],
        )
    return out


@_rwkv7_decode.register_fake
def _(r, *args, **kwargs):
    return torch.empty_like(r)


@torch.library.custom_op(f"{NAMESPACE}::rwkv7_decode_low_rank", mutates_args=("state",))
def rwkv7_decode_low_rank(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    v_first: Tensor | None,
    low: list[Tensor],
    up: list[Tensor],
    w0: Tensor,
    a0: Tensor,
    v0: Tensor | None,
    k_k: Tensor,
    k_a: Tensor,
    r_k: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    state: Tensor,
    mask: Tensor | None,
    state_indices: Tensor | None,
    eps: float,
) -> Tensor:
    """Compute `rwkv7_decode` of B sequences, and before it the products W2 of its low-rank maps.

    Arguments are as in [`rwkv7_decode`], but contiguous and unchecked. In place of decay, rate, gate and value_gate:
    `low`, the maps' inner values f(x W1), [B, D] each, and `up`, their W2, [D, A]. In the first layer there is no value
    gate.
    """
    B, (_, H, K, _) = r.shape[0], state.shape
    out = torch.empty_like(r)
    G = max(1, triton.cdiv(B, DECODE_GROUPS))
    with on_device_of(r):
        rwkv7_decode_low_rank_fwd_kernel[(H * triton.cdiv(B, G),)](
            r, k, v, v_first, tuple(low), tuple(up), w0, a0, v0, k_k, k_a, r_k, norm_weight, norm_bias, state,
            state.stride(0), mask, state_indices, out, eps, B, H=H, K=K, D=tuple(w.shape[0] for w in up), G=G,
            BB=max(16, triton.next_power_of_2(G)), BD=DECODE_RANKS, PRECISION=product_precision(r),
            num_warps=DECODE_WARPS[K], num_stages=DECODE_STAGES,
        )  # fmt: skip
    return out


@rwkv7_decode_low_rank.register_fake
def _(r, *args, **kwargs):
    return torch.empty_like(r)


@torch.library.custom_op(f"{NAMESPACE}::rwkv6_decode", mutates_args=("state",))
def _rwkv6_decode(
    r: Tensor,
    decay: Tensor | None,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    time_decay: Tensor,
    u: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    state: Tensor,
    mask: Tensor | None,
    state_indices: Tensor | None,
    eps: float,
) -> Tensor:
    B, (_, H, K, _) = r.shape[0], state.shape
    out = torch.empty_like(r)
    weights = (time_decay, u, norm_weight, norm_bias)
    with on_device_of(r):
        rwkv6_decode_fwd_kernel[(B * H,)](
            r,
            decay,
            k,
            v,
            gate,
            *weights,
            state,
            state.stride(0),
            mask,
            state_indices,
            out,
            eps,
            H=H,
            K=K,
            num_warps=DECODE_WARPS[K],
        )
    return out


@_rwkv6_decode.register_fake
def _(r, *args, **kwargs):
    return torch.empty_like(r)
