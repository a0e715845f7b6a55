"""The time mix of RWKV-5 (x052) and RWKV-6 (x060): arXiv 2404.05892.

`decay_recurrence` states the equations from the matrix products of a token to the input of `output`; the modules below
it compute these products.

Letters: B batch, T time, S sequences, H heads, K = V size of a head, A = H K width of the time mix, C hidden size,
D rank of a low-rank map. Parameters carry the papers' names.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .low_rank import low_rank, matmul
from .mixing import parameters_of
from .time_mix import (
    Recurrence,
    TimeMix,
    at_least_float32,
    decode_plainly,
    norm_of_heads,
    plain_norm,
    split_heads,
)
from .wkv import wkv6

if TYPE_CHECKING:
    from .configuration_visualrwkv import VisualRWKVTextConfig


class DecayProducts(NamedTuple):
    """The matrix products of a token, [B, T, A] each. `gate` is before its silu; `decay` is None in RWKV-5."""

    r: Tensor
    decay: Tensor | None
    k: Tensor
    v: Tensor
    gate: Tensor


class DecayWeights(NamedTuple):
    """The parameters of the recurrence: `time_decay` of A elements, the bonus u [H, K] (`time_faaaa`)."""

    time_decay: Tensor
    u: Tensor


def decay_recurrence(
    products: DecayProducts,
    weights: DecayWeights,
    norm: Callable[[Tensor], Tensor],
    state: Tensor | None,
    order: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Recurrence:
    """Compute the equations of RWKV-5 and RWKV-6 after the matrix products (arXiv 2404.05892, section 4).

        w_t = -exp(time_decay + decay_t)                      log decay; RWKV-5 has no decay_t
        y_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T)
        S_t = diag(exp(w_t)) S_{t-1} + k_t v_t^T
        out = norm(y) silu(gate)

    Args:
        products: of each token.
        weights: of the layer.
        norm: of the heads, [N, A] -> [N, A].
        state: S [S, H, K, V]; None is zeros.
        order: see `wkv.wkv6`.
        cu_seqlens: likewise.
    """
    head_dim = weights.u.shape[-1]
    r, k, v = (split_heads(x, head_dim) for x in (products.r, products.k, products.v))  # [B, T, H, K]
    if products.decay is None:
        w = -torch.exp(at_least_float32(weights.time_decay)).expand(r.shape)
    else:
        w = split_heads(-torch.exp(at_least_float32(weights.time_decay + products.decay)), head_dim)

    run, inputs = partial(_wkv6, weights.u), (r, w, k, v)
    y, state = run(*inputs, state, order=order, cu_seqlens=cu_seqlens)  # [B, T, H, V], [S, H, K, V]

    return Recurrence(norm_of_heads(norm, y) * F.silu(products.gate), state, run, inputs)


def _wkv6(u: Tensor, r: Tensor, w: Tensor, k: Tensor, v: Tensor, state: Tensor | None, **tokens: Any):
    return wkv6(r, w, k, v, u, state, **tokens)


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
    """Compute `decay_recurrence` for one token of each sequence and write the state in place; see `decode_plainly`.

    Args:
        r: receptance, [B, A] or [B, 1, A], as all up to gate.
        decay: see [`DecayProducts`].
        k: key.
        v: value.
        gate: before its silu.
        state: S [B, H, K, V], or with state_indices a pool [N, H, K, V]; float32.
        time_decay: A elements.
        u: bonus, A elements.
        norm_weight: of the norm per head, A elements.
        norm_bias: likewise.
        eps: of that norm.
        mask: bool [B] or [B, 1], False at padding: the state stays as it was, out is 0.
        state_indices: int [B], distinct: the slot of each sequence.

    Returns:
        out, of the shape and dtype of r.
    """
    shape = state.shape[1:3]
    time_decay = time_decay.view(shape) if decay is None else time_decay.flatten()
    weights = DecayWeights(time_decay, u.view(shape))
    norm = plain_norm(shape[0], norm_weight, norm_bias, eps, state.dtype)
    return decode_plainly(
        decay_recurrence, DecayProducts(r, decay, k, v, gate), weights, norm, state, mask, state_indices
    )


class DecayTimeMix(TimeMix):
    """What RWKV-5 and RWKV-6 share: all but the products."""

    decode_op = "rwkv6_decode"
    plain_decode = staticmethod(rwkv6_decode)
    time_decay: nn.Parameter
    time_faaaa: nn.Parameter
    gate: nn.Linear

    def recur(self, products, v_first, state, token_order):
        return decay_recurrence(
            products, self._weights(), self.ln_x, state, token_order.order, token_order.cu_seqlens
        )

    def decode_arguments(self, products, v_first):
        return products._asdict() | self._weights()._asdict()

    def _weights(self) -> DecayWeights:
        return DecayWeights(self.time_decay, self.time_faaaa)


class Rwkv5TimeMix(DecayTimeMix):
    """RWKV-5.2 (arXiv 2404.05892, section 3): a decay per channel, constant in time.

    x_m = m x_t + (1 - m) x_{t-1} for m of r, k, v, g;  r = R x_r;  k = K x_k;  v = V x_v;  gate = G x_g;
    then `decay_recurrence`, and `output`.
    """

    def __init__(self, config: VisualRWKVTextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        for name in "kvrg":
            setattr(self, f"time_mix_{name}", nn.Parameter(torch.empty(1, 1, config.hidden_size)))
        self.time_decay = nn.Parameter(torch.empty(config.num_attention_heads, config.head_dim))
        self.time_faaaa = nn.Parameter(torch.empty(config.num_attention_heads, config.head_dim))
        self.gate = nn.Linear(config.hidden_size, config.attention_size, bias=False)

    def products(self, shift):
        x_k, x_v, x_r, x_g = shift([1 - m for m in parameters_of(self, "time_mix_", "kvrg")])  # [B, T, C]
        return DecayProducts(
            r=self.receptance(x_r), decay=None, k=self.key(x_k), v=self.value(x_v), gate=self.gate(x_g)
        )

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise all but the linear layers as the original does."""
        r01, r10, d = self._layer_position()
        init.copy_(self.time_mix_k, (d**r10).view(1, 1, -1))
        init.copy_(self.time_mix_v, (d**r10 + 0.3 * r01).view(1, 1, -1))
        init.copy_(self.time_mix_r, (d ** (0.5 * r10)).view(1, 1, -1))
        init.copy_(self.time_mix_g, (d ** (0.5 * r10)).view(1, 1, -1))
        _init_decay_and_bonus(self, r01)


class Rwkv6TimeMix(DecayTimeMix):
    """RWKV-6 (arXiv 2404.05892, section 4): token shift and decay depend on the data.

    x_x = x_t + (x_{t-1} - x_t) maa_x;  lora_m = tanh(x_x w1)_m w2_m;
    x_m = x_t + (x_{t-1} - x_t) (maa_m + lora_m) for m of w, k, v, r, g;
    decay = tanh(x_w decay_w1) decay_w2;  r = R x_r;  k = K x_k;  v = V x_v;  gate = G x_g;
    then `decay_recurrence`, and `output`.
    """

    time_maa_x: nn.Parameter

    def __init__(self, config: VisualRWKVTextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        hidden_size, width = config.hidden_size, config.attention_size
        mix_rank, decay_rank = config.mix_low_rank_dim, config.decay_low_rank_dim
        for name in "xwkvrg":
            setattr(self, f"time_maa_{name}", nn.Parameter(torch.empty(1, 1, hidden_size)))
        self.time_maa_w1 = nn.Parameter(torch.empty(hidden_size, 5 * mix_rank))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, mix_rank, hidden_size))
        self.time_decay = nn.Parameter(torch.empty(1, 1, width))
        self.time_decay_w1 = nn.Parameter(torch.empty(hidden_size, decay_rank))
        self.time_decay_w2 = nn.Parameter(torch.empty(decay_rank, width))
        self.time_faaaa = nn.Parameter(torch.empty(config.num_attention_heads, config.head_dim))
        self.gate = nn.Linear(hidden_size, width, bias=False)

    def products(self, shift):
        low = torch.tanh(matmul(shift([self.time_maa_x])[0], self.time_maa_w1))
        low = low.unflatten(-1, (5, -1)).movedim(-2, 0)  # [5, B, T, D]
        lora = matmul(low, self.time_maa_w2[:, None])  # [5, B, T, C]
        x_w, x_k, x_v, x_r, x_g = shift(parameters_of(self, "time_maa_", "wkvrg"), dynamic=lora)  # [B, T, C]
        (decay,) = low_rank([x_w], [self.time_decay_w1], [self.time_decay_w2], ["tanh"])
        return DecayProducts(
            r=self.receptance(x_r), decay=decay, k=self.key(x_k), v=self.value(x_v), gate=self.gate(x_g)
        )

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise all but the linear layers as the original does."""
        r01, r10, d = self._layer_position()
        kept = dict.fromkeys("xwk", d**r10) | {
            "v": d**r10 + 0.3 * r01,
            "r": d ** (0.5 * r10),
            "g": d ** (0.5 * r10),
        }
        for name, weight in kept.items():
            init.copy_(getattr(self, f"time_maa_{name}"), (1 - weight).view(1, 1, -1))
        init.zeros_(self.time_maa_w1)
        init.uniform_(self.time_maa_w2, -0.01, 0.01)
        init.zeros_(self.time_decay_w1)
        init.uniform_(self.time_decay_w2, -0.01, 0.01)
        _init_decay_and_bonus(self, r01)


def _init_decay_and_bonus(time_mix: DecayTimeMix, r01: float) -> None:
    """Initialise, for channel n of A, what does not depend on the data.

    time_decay = -6 + 5 (n / (A - 1))^(0.7 + 1.3 r01)
    u = r01 (1 - n / (A - 1)) + 0.1 ((n + 1) mod 3 - 1)
    """
    n = torch.arange(time_mix.config.attention_size, dtype=torch.float32)
    relative = n / max(len(n) - 1, 1)
    init.copy_(time_mix.time_decay, (-6 + 5 * relative ** (0.7 + 1.3 * r01)).view_as(time_mix.time_decay))
    u = r01 * (1 - relative) + 0.1 * ((n + 1) % 3 - 1)
    init.copy_(time_mix.time_faaaa, u.view_as(time_mix.time_faaaa))
