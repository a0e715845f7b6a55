"""One token of one layer: what stands between the matrix products of a time mix, in one launch.

For reading token by token without gradients. Letters: B batch, H heads, K = V size of a head, A = H K.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import HEAD_SIZES, needs_gradient, on_device_of

DECAY_SCALE = tl.constexpr(0.6065306597126334)
"""e^(-1/2): the log decay of RWKV-7 lies between minus this and 0."""


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
) -> Tensor:
    """RWKV-7 (arXiv 2503.14456, section 4) from the matrix products of a token to what `output` reads.

        w = -e^(-1/2) sigmoid(w0 + decay);  eta = sigmoid(a0 + rate);  kk = k k_k / |k k_k|;  k' = k (1 + (eta - 1) k_a)
        v' = v + (v_first - v) sigmoid(v0 + value_gate)
        S <- diag(exp(w)) S + (kk eta) (-kk^T S) + k' v'^T;  y = r^T S
        out = (norm(y) + (sum r k' r_k) v') gate

    Computed in float32, without gradients.

    Args:
        r: receptance, [B, A] or [B, 1, A], as all up to gate, value_gate and v_first.
        decay: tanh(x_w w1) w2, without its bias w0.
        k: key.
        v: value.
        rate: (x_a a1) a2, in-context learning rate without its bias a0.
        gate: sigmoid(x_g g1) g2.
        state: S [B, H, K, V] float32, contiguous; written in place.
        w0: bias of decay, A elements.
        a0: bias of rate, A elements.
        k_k: A elements.
        k_a: A elements.
        r_k: A elements.
        norm_weight: of the norm per head, A elements.
        norm_bias: likewise.
        eps: of that norm.
        value_gate: (x_v v1) v2 without its bias v0; None with `v_first` and `v0` in layer 0: v' = v.
        v_first: values of layer 0.
        v0: bias of value_gate, A elements.
        mask: bool [B] or [B, 1], False at pads: their state stays as it was, their out is 0.

    Returns:
        out, of the shape and dtype of r.

    Raises:
        ValueError: shapes that do not fit, a state that is not contiguous float32, some but not all of value_gate,
            v_first and v0.
        RuntimeError: a gradient is asked for.
    """
    if len({value_gate is None, v_first is None, v0 is None}) != 1:
        raise ValueError("value_gate, v_first and v0 go together: give all or none.")
    tokens = {"r": r, "decay": decay, "k": k, "v": v, "rate": rate, "gate": gate}
    tokens |= {"value_gate": value_gate, "v_first": v_first}
    weights = {"w0": w0, "a0": a0, "v0": v0, "k_k": k_k, "k_a": k_a, "r_k": r_k}
    weights |= {"norm_weight": norm_weight, "norm_bias": norm_bias}
    _check("rwkv7_decode", tokens, weights, state, mask)
    return _rwkv7_decode(**_contiguous(tokens | weights | {"mask": mask}), state=state, eps=eps)


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
) -> Tensor:
    """RWKV-6 and 5 (arXiv 2404.05892) from the matrix products of a token to what `output` reads.

        w = -exp(time_decay + decay)
        y = r^T (S + diag(u) k v^T);  S <- diag(exp(w)) S + k v^T
        out = norm(y) silu(gate)

    Computed in float32, without gradients.

    Args:
        r: receptance, [B, A] or [B, 1, A], as all up to gate.
        decay: what the data add to time_decay (RWKV-6), or None (RWKV-5).
        k: key.
        v: value.
        gate: in front of its silu.
        state: S [B, H, K, V] float32, contiguous; written in place.
        time_decay: A elements.
        u: bonus of the current token, A elements.
        norm_weight: of the norm per head, A elements.
        norm_bias: likewise.
        eps: of that norm.
        mask: bool [B] or [B, 1], False at pads: their state stays as it was, their out is 0.

    Returns:
        out, of the shape and dtype of r.

    Raises:
        ValueError: shapes that do not fit, a state that is not contiguous float32.
        RuntimeError: a gradient is asked for.
    """
    tokens = {"r": r, "decay": decay, "k": k, "v": v, "gate": gate}
    weights = {"time_decay": time_decay, "u": u, "norm_weight": norm_weight, "norm_bias": norm_bias}
    _check("rwkv6_decode", tokens, weights, state, mask)
    return _rwkv6_decode(**_contiguous(tokens | weights | {"mask": mask}), state=state, eps=eps)


def _check(
    op: str,
    tokens: dict[str, Tensor | None],
    weights: dict[str, Tensor | None],
    state: Tensor,
    mask: Tensor | None,
) -> None:
    if state.dim() != 4 or state.shape[2] != state.shape[3] or state.shape[2] not in HEAD_SIZES:
        raise ValueError(
            f"state must be [B, H, K, K] with K one of {', '.join(map(str, HEAD_SIZES))}, "
            f"got {list(state.shape)}."
        )
    if state.dtype != torch.float32 or not state.is_contiguous():
        raise ValueError(f"state must be contiguous float32, got {state.dtype} of strides {state.stride()}.")
    B, H, K, _ = state.shape
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


# --- kernels: one program per sequence and head, its state in registers ----------------------------------


@triton.jit
def _not_a_pad(mask, i_b, o_k):
    """Whether sequence i_b has a token to read, [K]: as a vector, for the interpreter garbles a bool scalar."""
    return o_k >= 0 if mask is None else tl.load(mask + i_b + tl.zeros_like(o_k)) != 0


@triton.jit
def _gated_norm(b_y, b_bonus, norm_weight, norm_bias, gate, out, o_h, o_bh, m_real, eps, K: tl.constexpr):
    """Writes (norm(y) + bonus) gate of one head; b_y, b_bonus [K]."""
    b_centred = b_y - tl.sum(b_y, 0) / K
    b_norm = b_centred * tl.rsqrt(tl.sum(b_centred * b_centred, 0) / K + eps)
    b_norm = b_norm * tl.load(norm_weight + o_h).to(tl.float32) + tl.load(norm_bias + o_h).to(tl.float32)
    b_out = tl.where(m_real, (b_norm + b_bonus) * gate, 0.0)
    tl.store(out + o_bh, b_out.to(out.dtype.element_ty))


@triton.jit
def rwkv7_decode_fwd_kernel(
    r,
    decay,
    k,
    v,
    rate,
    gate,
    value_gate,
    v_first,
    w0,
    a0,
    v0,
    k_k,
    k_a,
    r_k,
    norm_weight,
    norm_bias,
    state,
    mask,
    out,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
):
    i_bh = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, K)
    o_h, o_bh = i_bh % H * K + o_k, i_bh * K + o_k
    m_real = _not_a_pad(mask, i_bh // H, o_k)
    p_state = state + i_bh * K * K + o_k[:, None] * K + o_k[None, :]
    b_S = tl.load(p_state)  # first, for all else is small

    b_r = tl.load(r + o_bh).to(tl.float32)
    b_k = tl.load(k + o_bh).to(tl.float32)
    b_v = tl.load(v + o_bh).to(tl.float32)
    b_decay = tl.load(w0 + o_h).to(tl.float32) + tl.load(decay + o_bh).to(tl.float32)
    b_rate = tl.sigmoid(tl.load(a0 + o_h).to(tl.float32) + tl.load(rate + o_bh).to(tl.float32))
    if v_first is not None:
        b_lerp = tl.sigmoid(tl.load(v0 + o_h).to(tl.float32) + tl.load(value_gate + o_bh).to(tl.float32))
        b_v += (tl.load(v_first + o_bh).to(tl.float32) - b_v) * b_lerp
    b_kk = b_k * tl.load(k_k + o_h).to(tl.float32)
    b_kk /= tl.maximum(tl.sqrt(tl.sum(b_kk * b_kk, 0)), 1e-12)
    b_k *= 1 + (b_rate - 1) * tl.load(k_a + o_h).to(tl.float32)
    b_bonus = tl.sum(b_r * b_k * tl.load(r_k + o_h).to(tl.float32), 0) * b_v

    b_sa = -tl.sum(b_kk[:, None] * b_S, 0)  # what the state holds under kk, [V]
    b_S *= tl.exp(tl.sigmoid(b_decay) * -DECAY_SCALE)[:, None]
    b_S += (b_kk * b_rate)[:, None] * b_sa[None, :] + b_k[:, None] * b_v[None, :]
    tl.store(p_state, b_S, mask=m_real[:, None])
    b_y = tl.sum(b_r[:, None] * b_S, 0)  # [V]
    b_gate = tl.load(gate + o_bh).to(tl.float32)
    _gated_norm(b_y, b_bonus, norm_weight, norm_bias, b_gate, out, o_h, o_bh, m_real, eps, K)


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
    mask,
    out,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
):
    i_bh = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, K)
    o_h, o_bh = i_bh % H * K + o_k, i_bh * K + o_k
    m_real = _not_a_pad(mask, i_bh // H, o_k)
    p_state = state + i_bh * K * K + o_k[:, None] * K + o_k[None, :]
    b_S = tl.load(p_state)  # first, for all else is small

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

NUM_WARPS = {32: 2, 64: 4, 128: 8}
"""By head size: the state takes 16, 32 or 64 registers of a thread."""


@torch.library.custom_op("visualrwkv::rwkv7_decode", mutates_args=("state",))
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
    eps: float,
) -> Tensor:
    B, H, K, _ = state.shape
    out = torch.empty_like(r)
    tokens = (r, decay, k, v, rate, gate, value_gate, v_first)
    weights = (w0, a0, v0, k_k, k_a, r_k, norm_weight, norm_bias)
    with on_device_of(r):
        rwkv7_decode_fwd_kernel[(B * H,)](
            *tokens, *weights, state, mask, out, eps, H=H, K=K, num_warps=NUM_WARPS[K]
        )
    return out


@_rwkv7_decode.register_fake
def _(r, *args, **kwargs):
    return torch.empty_like(r)


@torch.library.custom_op("visualrwkv::rwkv6_decode", mutates_args=("state",))
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
    eps: float,
) -> Tensor:
    B, H, K, _ = state.shape
    out = torch.empty_like(r)
    weights = (time_decay, u, norm_weight, norm_bias)
    with on_device_of(r):
        rwkv6_decode_fwd_kernel[(B * H,)](
            r, decay, k, v, gate, *weights, state, mask, out, eps, H=H, K=K, num_warps=NUM_WARPS[K]
        )
    return out


@_rwkv6_decode.register_fake
def _(r, *args, **kwargs):
    return torch.empty_like(r)
