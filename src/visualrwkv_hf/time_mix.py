"""The time mix of RWKV-5 (x052), RWKV-6 (x060) and RWKV-7 (x070): the part of a block that remembers.

RWKV-5 and RWKV-6: arXiv 2404.05892. RWKV-7: arXiv 2503.14456. For each generation a function states the equations from
the matrix products of a token to the input of `output`; the module above or below it computes these products.

Letters: B batch, T time, S sequences, H heads, K = V size of a head, A = H K width of the time mix, C hidden size,
D rank of a low-rank map. Parameters carry the papers' names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .dispatch import kernel
from .layer_state import TIME_MIX_SHIFT, WKV, LayerState, StateUpdate
from .low_rank import low_rank
from .token_order import IN_ORDER, TokenOrder, last_token, token_shift
from .wkv import take, tokens_of, wkv6, wkv7

if TYPE_CHECKING:
    from .configuration_visualrwkv import VisualRWKVTextConfig

DECAY_SCALE = 0.6065306597126334
"""e^(-1/2): the log decay of RWKV-7 lies between minus this and 0."""


# --- what every generation shares -----------------------------------------------------------------------


class MixOutput(NamedTuple):
    """What a time mix or a channel mix returns.

    Attributes:
        hidden_states: [B, T, C], to be added to the residual stream.
        v_first: what the first layer hands to all others, [B, T, A]; None where a generation hands on nothing.
        updates: the states after the last token; empty if no state was given.
    """

    hidden_states: Tensor
    v_first: Tensor | None
    updates: dict[str, StateUpdate]


class Recurrence(NamedTuple):
    """What the equations of a generation give for T tokens.

    Attributes:
        out: the input of `output`, [B, T, A].
        state: the WKV state after the last token, [S, H, K, V].
        run: the recurrence, `run(*inputs, state, order=...) -> (y, state)`.
        inputs: what it read, each [B, T, H, K]; with `run` enough to take tokens back.
    """

    out: Tensor
    state: Tensor
    run: Callable[..., tuple[Tensor, Tensor]]
    inputs: tuple[Tensor, ...]


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float32, or as it is in float64: decays are not computed in less, whatever the model's dtype."""
    return x if x.dtype == torch.float64 else x.float()


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, T, A] -> [B, T, H, K]."""
    return x.unflatten(-1, (-1, head_dim))


def norm_of_heads(norm: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """Normalise each head of y [B, T, H, V] -> [B, T, A]; `norm` takes [N, A]."""
    return norm(y.flatten(0, 1).flatten(1)).view(*y.shape[:2], -1)


def parameters_of(module: nn.Module, prefix: str, names: Sequence[str]) -> list[Tensor]:
    """Return the parameters prefix + name of a module."""
    return [getattr(module, prefix + name) for name in names]


def previous_token(x: Tensor, name: str, state: LayerState | None, token_order: TokenOrder) -> Tensor:
    """Return what the token shift `name` sees before the first token of x [B, T, C]: [S, C]; zeros at the start."""
    carried = None if state is None else state.get(name)
    if carried is not None:
        return carried
    sequences = x.shape[0] if token_order.cu_seqlens is None else len(token_order.cu_seqlens) - 1
    return torch.zeros_like(x[:, 0]) if sequences == x.shape[0] else x.new_zeros(sequences, x.shape[-1])


def store_last_token(x: Tensor, carried: Tensor, state: LayerState, token_order: TokenOrder) -> StateUpdate:
    """Return the token that a token shift reads first in the next step, after x [B, T, C] and `carried` [S, C]."""

    def after(length: int, before: Tensor | None) -> Tensor:
        before = torch.zeros_like(carried) if before is None else before
        return last_token(x, before, token_order, length)

    return StateUpdate(last_token(x, carried, token_order), after if state.record_past else None)


def wkv_state_after(
    recurrence: Recurrence, token_order: TokenOrder, length: int, before: Tensor | None
) -> Tensor:
    """Return the WKV state [B, H, K, V] after the first `length` positions: what cropping a cache goes back to."""
    inputs, order = recurrence.inputs, token_order.order
    if order is None:
        return recurrence.run(*(x[:, :length] for x in inputs), before)[1]
    order = order[:, :length]
    inputs = take(tokens_of(order), *inputs)
    position = torch.arange(length, device=order.device)
    return recurrence.run(*inputs, before, order=torch.where(order < 0, ~position, position))[1]


class TimeMix(nn.Module):
    """Time mixing: token shift -> projections -> WKV -> norm per head -> gate -> output.

    A generation defines `products` (the matrix products of each token), `recur` (its equations on them) and
    `decode_arguments` (the same for a kernel that computes `recur` for one token). A generation of another form
    overrides `forward`.
    """

    decode_op: ClassVar[str]
    """Name of the op that computes `recur` for one token and writes the WKV state in place."""

    def __init__(self, config: VisualRWKVTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        hidden_size, width = config.hidden_size, config.attention_size
        self.receptance = nn.Linear(hidden_size, width, bias=False)
        self.key = nn.Linear(hidden_size, width, bias=False)
        self.value = nn.Linear(hidden_size, width, bias=False)
        self.output = nn.Linear(width, hidden_size, bias=False)
        self.ln_x = nn.GroupNorm(config.num_attention_heads, width, eps=config.group_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        v_first: Tensor | None = None,
        state: LayerState | None = None,
        token_order: TokenOrder = IN_ORDER,
    ) -> MixOutput:
        """Mix each token with those that the layer read before it.

        Args:
            hidden_states: [B, T, C].
            v_first: values of the first layer, [B, T, A] (RWKV-7).
            state: what the layer remembers; None if nothing is to be remembered either.
            token_order: in which order the layer reads.
        """
        carried = previous_token(hidden_states, TIME_MIX_SHIFT, state, token_order)
        shift = partial(
            token_shift,
            hidden_states,
            carried,
            previous=token_order.previous,
            following=token_order.following,
        )
        products = self.products(shift)
        v_first = self.first_values(products, v_first)
        wkv = None if state is None else state.get(WKV)
        updates = {}
        if decode := self._decode_kernel(hidden_states, wkv, state):
            arguments = self.decode_arguments(products, v_first)
            out = decode(**arguments, state=wkv, mask=token_order.mask(), **self._norm_arguments())
            updates[WKV] = StateUpdate(wkv)
        else:
            recurrence = self.recur(products, v_first, wkv, token_order)
            out = recurrence.out
            if state is not None:
                after = partial(wkv_state_after, recurrence, token_order) if state.record_past else None
                updates[WKV] = StateUpdate(recurrence.state, after)
        if state is not None:
            updates[TIME_MIX_SHIFT] = store_last_token(hidden_states, carried, state, token_order)
        return MixOutput(self.output(out), v_first, updates)

    def products(self, shift: Callable[..., Sequence[Tensor]]) -> Any:
        """Return the matrix products of the shifted tokens, a NamedTuple of [B, T, A] each.

        `shift(M weights [1, 1, C], dynamic=None)` gives M times [B, T, C], each token mixed with the one before it.
        """
        raise NotImplementedError

    def first_values(self, products: Any, v_first: Tensor | None) -> Tensor | None:
        """Return what the layers after the first get as `v_first`."""
        return v_first

    def recur(
        self, products: Any, v_first: Tensor | None, state: Tensor | None, token_order: TokenOrder
    ) -> Recurrence:
        """Compute the equations of the generation on T tokens, from the WKV state [S, H, K, V]."""
        raise NotImplementedError

    def decode_arguments(self, products: Any, v_first: Tensor | None) -> dict[str, Any]:
        """Return the arguments of `decode_op` for these products, beside state, mask and norm."""
        raise NotImplementedError

    def init_weights(self) -> None:
        """Initialise the parameters as the original does."""
        raise NotImplementedError

    def _decode_kernel(
        self, hidden_states: Tensor, wkv: Tensor | None, state: LayerState | None
    ) -> Callable[..., Tensor] | None:
        """Return the kernel of `decode_op` if it serves: one token, a state to write to, no gradient, no record."""
        if wkv is None or hidden_states.shape[1] != 1 or torch.is_grad_enabled():
            return None
        if state is None or state.record_past:
            return None
        return kernel(self.decode_op, hidden_states, wkv)

    def _norm_arguments(self) -> dict[str, Any]:
        return {"norm_weight": self.ln_x.weight, "norm_bias": self.ln_x.bias, "eps": self.ln_x.eps}

    def _layer_position(self) -> tuple[float, float, Tensor]:
        """Return r01 = l / (L - 1), r10 = 1 - l / L and d_i = i / C: what the initialisation depends on."""
        num_layers, hidden_size = self.config.num_hidden_layers, self.config.hidden_size
        return (
            self.layer_idx / max(num_layers - 1, 1),
            1 - self.layer_idx / num_layers,
            torch.arange(hidden_size, dtype=torch.float32) / hidden_size,
        )


# --- RWKV-5 and RWKV-6: a decay per channel ---------------------------------------------------------------


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
    """The equations of RWKV-5 and RWKV-6 after the matrix products (arXiv 2404.05892, section 4).

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


class DecayTimeMix(TimeMix):
    """What RWKV-5 and RWKV-6 share: all but the products."""

    decode_op = "rwkv6_decode"
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
        low = torch.tanh(shift([self.time_maa_x])[0] @ self.time_maa_w1)
        low = low.unflatten(-1, (5, -1)).movedim(-2, 0)  # [5, B, T, D]
        lora = low @ self.time_maa_w2[:, None]  # [5, B, T, C]
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


# --- RWKV-7: the generalised delta rule -------------------------------------------------------------------


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
    """The equations of RWKV-7 after the matrix products (arXiv 2503.14456, section 4).

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
        v = torch.lerp(v, v_first, torch.sigmoid(weights.v0 + products.value_gate).to(v.dtype))
    w = -DECAY_SCALE * torch.sigmoid(at_least_float32(weights.w0 + products.decay))
    a = torch.sigmoid(weights.a0 + products.rate)
    kk = F.normalize(heads(k * weights.k_k), dim=-1, eps=1e-12)  # [B, T, H, K]
    r, w, k, v = heads(products.r), heads(w), heads(k * (1 + (a - 1) * weights.k_a)), heads(v)

    run, inputs = partial(wkv7, min_log_decay=-DECAY_SCALE), (r, w, k, v, -kk, kk * heads(a))
    y, state = run(*inputs, state, order=order, cu_seqlens=cu_seqlens)  # [B, T, H, V], [S, H, K, V]

    bonus = (r * k * weights.r_k).sum(-1, keepdim=True) * v  # [B, T, H, V]
    return Recurrence((norm_of_heads(norm, y) + bonus.flatten(-2)) * products.gate, state, run, inputs)


class Rwkv7TimeMix(TimeMix):
    """RWKV-7 (arXiv 2503.14456, section 4): the generalised delta rule.

    x_m = x_t + (x_{t-1} - x_t) m for m of r, w, k, v, a, g;  r = R x_r;  k = K x_k;  v = V x_v;
    decay = tanh(x_w w1) w2;  rate = (x_a a1) a2;  value_gate = (x_v v1) v2;  gate = sigmoid(x_g g1) g2;
    then `rwkv7_recurrence`, and `output`.
    """

    decode_op = "rwkv7_decode"

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
