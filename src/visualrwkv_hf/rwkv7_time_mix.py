"""The time mix of RWKV-7 (x070): arXiv 2503.14456.

`rwkv7_recurrence` states the equations from the matrix products of a token to the input of `output`; the module below
it computes these products.

Letters: B batch, T time, S sequences, H heads, K = V size of a head, A = H K width of the time mix, C hidden size,
D rank of a low-rank map. Parameters carry the papers' names.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .low_rank import low_rank
from .mixing import parameters_of
from .time_mix import (
    Recurrence,
    TimeMix,
    as_token,
    at_least_float32,
    decode_plainly,
    norm_of_heads,
    plain_norm,
    split_heads,
)
from .wkv import wkv7

if TYPE_CHECKING:
    from .configuration_visualrwkv import VisualRWKVTextConfig


DECAY_SCALE = 0.6065306597126334
"""e^(-1/2): the log decay of RWKV-7 lies between minus this and 0."""


class Rwkv7Products(NamedTuple):
    """The matrix products of a token, [B, T, A] each.

    `decay`, `rate` (in-context learning rate) and `value_gate` are without bias and before their sigmoid; `gate` is
    final. `value_gate` is None in the first layer.
    """

    r: Tensor
    decay: Tensor
    k: Tensor
    v: Tensor
    rate: Tensor
    gate: Tensor
    value_gate: Tensor | None


class Rwkv7Weights(NamedTuple):
    """The parameters of the recurrence, of A elements each; r_k is [H, K]. `v0` is None in the first layer."""

    w0: Tensor
    a0: Tensor
    v0: Tensor | None
    k_k: Tensor
    k_a: Tensor
    r_k: Tensor


def rwkv7_recurrence(
    products: Rwkv7Products,
    weights: Rwkv7Weights,
    norm: Callable[[Tensor], Tensor],
    v_first: Tensor | None,
    state: Tensor | None,
    order: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Recurrence:
    """Compute the equations of RWKV-7 after the matrix products (arXiv 2503.14456, section 4).

        w_t = -e^(-1/2) sigmoid(w0 + decay_t)                 log decay
        a_t = sigmoid(a0 + rate_t)                            in-context learning rate
        v_t = v_t + (v_first_t - v_t) sigmoid(v0 + value_gate_t)        not in the first layer
        kk_t = k_t k_k / |k_t k_k|  per head;  k_t = k_t (1 + (a_t - 1) k_a)
        S_t = diag(exp(w_t)) S_{t-1} - (kk_t a_t) (kk_t^T S_{t-1}) + k_t v_t^T
        y_t = r_t^T S_t
        out = (norm(y) + (sum over the head of r k r_k) v) gate

    Args:
        products: of each token.
        weights: of the layer.
        norm: of the heads, [N, A] -> [N, A].
        v_first: v of the first layer, [B, T, A].
        state: S [S, H, K, V]; None is zeros.
        order: see `wkv.wkv7`.
        cu_seqlens: likewise.
    """
    heads = partial(split_heads, head_dim=weights.r_k.shape[-1])
    k, v = products.k, products.v  # [B, T, A]
    if products.value_gate is not None:
        assert v_first is not None and weights.v0 is not None
        v = torch.lerp(v, v_first, torch.sigmoid(weights.v0 + products.value_gate).to(v.dtype))
    w = -DECAY_SCALE * torch.sigmoid(at_least_float32(weights.w0 + products.decay))
    a = torch.sigmoid(weights.a0 + products.rate)
    kk = F.normalize(heads(k * weights.k_k), dim=-1, eps=1e-12)  # [B, T, H, K]
    r, w, k, v = heads(products.r), heads(w), heads(k * (1 + (a - 1) * weights.k_a)), heads(v)

    run, inputs = partial(wkv7, min_log_decay=-DECAY_SCALE), (r, w, k, v, -kk, kk * heads(a))
    y, state = run(*inputs, state, order=order, cu_seqlens=cu_seqlens)  # [B, T, H, V], [S, H, K, V]

    bonus = (r * k * weights.r_k).sum(-1, keepdim=True) * v  # [B, T, H, V]
    return Recurrence((norm_of_heads(norm, y) + bonus.flatten(-2)) * products.gate, state, run, inputs)


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
    """Compute `rwkv7_recurrence` for one token of each sequence and write the state in place; see `decode_plainly`.

    Args: tokens r to gate and value_gate as in [`Rwkv7Products`] and v_first, [B, A] or [B, 1, A] each; weights as in
    [`Rwkv7Weights`], of A elements each; state, norm, mask and state_indices as in `rwkv6_decode`.

    Returns:
        out, of the shape and dtype of r.
    """
    shape = state.shape[1:3]
    w0, a0, k_k, k_a = (x.flatten() for x in (w0, a0, k_k, k_a))
    weights = Rwkv7Weights(w0, a0, None if v0 is None else v0.flatten(), k_k, k_a, r_k.view(shape))
    norm = plain_norm(shape[0], norm_weight, norm_bias, eps, state.dtype)
    products = Rwkv7Products(r, decay, k, v, rate, gate, value_gate)
    recurrence = partial(rwkv7_recurrence, v_first=as_token(v_first, state.dtype))
    return decode_plainly(recurrence, products, weights, norm, state, mask, state_indices)


class Rwkv7TimeMix(TimeMix):
    """RWKV-7 (arXiv 2503.14456, section 4): the generalised delta rule.

    x_m = x_t + (x_{t-1} - x_t) m for m of r, w, k, v, a, g;  r = R x_r;  k = K x_k;  v = V x_v;
    decay = tanh(x_w w1) w2;  rate = (x_a a1) a2;  value_gate = (x_v v1) v2;  gate = sigmoid(x_g g1) g2;
    then `rwkv7_recurrence`, and `output`.
    """

    decode_op = "rwkv7_decode"
    plain_decode = staticmethod(rwkv7_decode)
    w0: nn.Parameter
    a0: nn.Parameter
    v0: nn.Parameter

    def __init__(self, config: VisualRWKVTextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        hidden_size = config.hidden_size
        for name in "rwkvag":
            setattr(self, f"x_{name}", nn.Parameter(torch.empty(1, 1, hidden_size)))
        for name, rank in self._ranks().items():
            setattr(self, f"{name}1", nn.Parameter(torch.empty(hidden_size, rank)))
            setattr(self, f"{name}2", nn.Parameter(torch.empty(rank, hidden_size)))
            if name != "g":
                setattr(self, f"{name}0", nn.Parameter(torch.empty(1, 1, hidden_size)))
        self.k_k = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.k_a = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.r_k = nn.Parameter(torch.empty(config.num_attention_heads, config.head_dim))

    @property
    def _is_first(self) -> bool:
        """Whether this is the first layer, whose values all others mix with theirs."""
        return self.layer_idx == 0

    def _ranks(self) -> dict[str, int]:
        """Return the rank of each low-rank map: decay, in-context learning rate, gate, value residual."""
        config = self.config
        ranks = {"w": config.decay_low_rank_dim, "a": config.a_low_rank_dim, "g": config.gate_low_rank_dim}
        return ranks if self._is_first else ranks | {"v": config.v_low_rank_dim}

    def products(self, shift):
        x_r, x_w, x_k, x_v, x_a, x_g = shift(parameters_of(self, "x_", "rwkvag"))  # [B, T, C]
        maps = [
            (x_w, self.w1, self.w2, "tanh"),
            (x_a, self.a1, self.a2, "identity"),
            (x_g, self.g1, self.g2, "sigmoid"),
        ]
        if not self._is_first:
            maps.append((x_v, self.v1, self.v2, "identity"))
        decay, rate, gate, *value_gate = low_rank(*zip(*maps))  # [B, T, A]
        return Rwkv7Products(
            r=self.receptance(x_r),
            decay=decay,
            k=self.key(x_k),
            v=self.value(x_v),
            rate=rate,
            gate=gate,
            value_gate=value_gate[0] if value_gate else None,
        )

    def first_values(self, products, v_first):
        return products.v if self._is_first else v_first

    def recur(self, products, v_first, state, token_order):
        return rwkv7_recurrence(
            products, self._weights(), self.ln_x, v_first, state, token_order.order, token_order.cu_seqlens
        )

    def decode_arguments(self, products, v_first):
        v_first = None if self._is_first else v_first
        return products._asdict() | self._weights()._asdict() | {"v_first": v_first}

    def _weights(self) -> Rwkv7Weights:
        v0 = None if self._is_first else self.v0
        return Rwkv7Weights(self.w0, self.a0, v0, self.k_k, self.k_a, self.r_k)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise all parameters as the original does, those of the linear layers included."""
        r01, r10, d = self._layer_position()
        hidden_size = self.config.hidden_size
        kept = {"r": d ** (0.2 * r10), "w": d ** (0.9 * r10), "k": d ** (0.9 * r10) + 0.4 * r01}
        kept |= {"v": d ** (0.4 * r10) + 0.6 * r01, "a": d ** (0.9 * r10), "g": d ** (0.2 * r10)}
        for name, weight in kept.items():
            init.copy_(getattr(self, f"x_{name}"), (1 - weight).view(1, 1, -1))
        for name in self._ranks():
            up = getattr(self, f"{name}2")
            init.zeros_(getattr(self, f"{name}1"))
            init.orthogonal_(up, gain=0.1 * max(1.0, (up.shape[0] / up.shape[1]) ** 0.5))
        n = torch.arange(hidden_size, dtype=torch.float32) / max(hidden_size - 1, 1)
        init.copy_(self.w0, (-7 + 5 * n ** (0.85 + r01**0.5) + 0.5).view(1, 1, -1))
        init.zeros_(self.a0)
        if not self._is_first:
            init.ones_(self.v0)
        init.constant_(self.k_k, 0.85)
        init.ones_(self.k_a)
        init.zeros_(self.r_k)
        for layer, bound in ((self.receptance, 0.5), (self.key, 0.05), (self.value, 0.5)):
            init.uniform_(layer.weight, -bound / hidden_size**0.5, bound / hidden_size**0.5)
        init.zeros_(self.output.weight)
