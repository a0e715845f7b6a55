"""The language model of VisualRWKV: RWKV-5 (x052), RWKV-6 (x060) and RWKV-7 (x070).

RWKV-5 and RWKV-6: arXiv 2404.05892. RWKV-7: arXiv 2503.14456.

Letters: B batch, T time, H heads, K = V size of a head, A = H K width of the time mix, C hidden size,
F width of the channel mix, D rank of a low-rank map. Inside a block parameters carry the papers' names.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_visualrwkv import CHANNEL_MIX_SHIFT, TIME_MIX_SHIFT, VisualRWKVCache, VisualRWKVCacheLayer
from .configuration_visualrwkv import VisualRWKVTextConfig
from .dispatch import accelerated_ops, chosen_backend, kernel, kernel_backend
from .generation_visualrwkv import VisualRWKVGenerationMixin
from .loss_visualrwkv import LateLogits, is_worth_slicing, loss_options, sliced_loss, visualrwkv_loss
from .low_rank import low_rank
from .remote_code import ship_remote_code
from .token_order import AS_IT_COMES, Reading, last_token, readings_of, token_shift
from .wkv import take, tokens_of, wkv6, wkv7

DECAY_SCALE = 0.6065306597126334
"""e^(-1/2): the log decay of RWKV-7 lies between minus this and 0."""


HUB_ARGUMENTS = ("commit_message", "commit_description", "private", "revision", "create_pr", "tags")
"""What `save_pretrained(push_to_hub=True)` hands on to `push_to_hub()` alone."""


def precise(x: torch.Tensor) -> torch.Tensor:
    """Decays are computed in float32 at least, whatever the model's dtype."""
    return x if x.dtype == torch.float64 else x.float()


def carried_token(
    hidden_states: torch.Tensor, which: int, state: VisualRWKVCacheLayer | None
) -> torch.Tensor:
    """What token shift `which` sees before the first of `hidden_states` [B, T, C]: [B, C], zeros at the start."""
    carried = state.token_shift(which) if state is not None else None
    return torch.zeros_like(hidden_states[:, 0]) if carried is None else carried


def carry_on(
    hidden_states: torch.Tensor,
    carried: torch.Tensor,
    which: int,
    state: VisualRWKVCacheLayer,
    reading: Reading,
) -> None:
    """Keeps what token shift `which` read last of `hidden_states` [B, T, C], after `carried` [B, C]."""

    def after(length: int, before: torch.Tensor | None) -> torch.Tensor:
        before = torch.zeros_like(hidden_states[:, 0]) if before is None else before
        return last_token(hidden_states, before, reading, length)

    last = last_token(hidden_states, carried, reading)
    state.update_token_shift(which, hidden_states.shape[1], last, after)


def weights_of(module: nn.Module, prefix: str, names: Sequence[str]) -> list[torch.Tensor]:
    """The parameters prefix + name of a module, [1, 1, C] each."""
    return [getattr(module, prefix + name) for name in names]


class TimeMix(nn.Module):
    """Time mixing: token shift -> projections -> WKV -> per-head norm -> gate -> output.

    A generation writes `products` (the matrix products of a token), `prepare` (what goes into the recurrence),
    `wkv` (which recurrence), `step` (all three for one token in one kernel) and, if it has one, `bonus`.
    """

    step_name: ClassVar[str]

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
        hidden_states: torch.Tensor,
        v_first: torch.Tensor | None = None,
        state: VisualRWKVCacheLayer | None = None,
        reading: Reading = AS_IT_COMES,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states` [B, T, C] -> the same shape, and layer 0's values [B, T, C] (RWKV-7)."""
        carried = carried_token(hidden_states, TIME_MIX_SHIFT, state)
        products = self.products(partial(token_shift, hidden_states, carried, reading=reading))
        if step_kernel := self.step_kernel(hidden_states, state):
            carry_on(hidden_states, carried, TIME_MIX_SHIFT, state, reading)
            mask = None if reading.order is None else reading.order >= 0
            out, v_first = self.step(step_kernel, products, v_first, state.wkv_state(), mask)
            return self.output(out), v_first

        inputs, gate, v_first = self.prepare(products, v_first)
        before = state.wkv_state() if state is not None else None
        out, after = self.wkv(inputs, before, reading)  # [B, T, H, V], [B, H, K, V]
        if state is not None:
            state.update_wkv_state(
                hidden_states.shape[1], after, partial(self._wkv_state_after, inputs, reading)
            )
            carry_on(hidden_states, carried, TIME_MIX_SHIFT, state, reading)
        out = self.ln_x(out.flatten(0, 1).flatten(1)).view(gate.shape)  # [B, T, A]
        out = out + self.bonus(inputs)
        return self.output(out * gate), v_first

    def products(self, shift: Callable[..., Sequence[torch.Tensor]]) -> dict[str, torch.Tensor | None]:
        """The matrix products of the shifted tokens, [B, T, A] each, without what is done to them pointwise.

        `shift(M weights [1, 1, C])` interpolates each token with the one before it, M times [B, T, C].
        """
        raise NotImplementedError

    def prepare(
        self, products: dict[str, torch.Tensor | None], v_first: torch.Tensor | None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor | None]:
        """What the recurrence reads, each [B, T, H, K], the gate [B, T, A] and `v_first`."""
        raise NotImplementedError

    def wkv(
        self, inputs: dict[str, torch.Tensor], initial_state: torch.Tensor | None, reading: Reading
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The recurrence: output [B, T, H, V] and state [B, H, K, V] behind the last token."""
        raise NotImplementedError

    def step(
        self,
        step_kernel: Callable[..., torch.Tensor],
        products: dict[str, torch.Tensor | None],
        v_first: torch.Tensor | None,
        state: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What `output` reads of one token, [B, 1, A], and `v_first`; the state [B, H, K, V] is written in place."""
        raise NotImplementedError

    def step_kernel(
        self, hidden_states: torch.Tensor, state: VisualRWKVCacheLayer | None
    ) -> Callable[..., torch.Tensor] | None:
        """The kernel of a whole step, if one token is read without gradients, behind others, and not recorded."""
        if state is None or state.wkv_state() is None or state.record_past or torch.is_grad_enabled():
            return None
        return (
            kernel(self.step_name, hidden_states, state.wkv_state()) if hidden_states.shape[1] == 1 else None
        )

    def bonus(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor | float:
        """What is added behind the norm, [B, T, A]."""
        return 0.0

    def init_weights(self) -> None:
        """The original's initialisation."""
        raise NotImplementedError

    def heads(self, tensor: torch.Tensor) -> torch.Tensor:
        """[B, T, A] -> [B, T, H, K]."""
        return tensor.unflatten(-1, (-1, self.head_dim))

    def _wkv_state_after(
        self, inputs: dict[str, torch.Tensor], reading: Reading, length: int, before: torch.Tensor | None
    ) -> torch.Tensor:
        """The state behind the first `length` positions: what cropping a cache goes back to."""
        if reading.order is None:
            return self.wkv({name: x[:, :length] for name, x in inputs.items()}, before, reading)[1]
        order = reading.order[:, :length]
        inputs = dict(zip(inputs, take(tokens_of(order), *inputs.values())))
        position = torch.arange(length, device=order.device)
        return self.wkv(inputs, before, Reading(torch.where(order < 0, ~position, position)))[1]

    def _layer_position(self) -> tuple[float, float, torch.Tensor]:
        """r01 = l / (L - 1), r10 = 1 - l / L and d_i = i / C: what the initialisation depends on."""
        num_layers, hidden_size = self.config.num_hidden_layers, self.config.hidden_size
        return (
            self.layer_idx / max(num_layers - 1, 1),
            1 - self.layer_idx / num_layers,
            torch.arange(hidden_size, dtype=torch.float32) / hidden_size,
        )


class Wkv6TimeMix(TimeMix):
    """What RWKV-5 and RWKV-6 share: wkv6, w = exp(-exp(decay)), out = norm(y) silu(g)."""

    step_name = "rwkv6_decode"
    time_decay: nn.Parameter
    time_faaaa: nn.Parameter
    gate: nn.Linear

    def prepare(self, products, v_first):
        r, k, v = (self.heads(products[name]) for name in "rkv")
        if products["decay"] is None:
            w = -torch.exp(precise(self.time_decay)).expand(r.shape)
        else:
            w = self.heads(-torch.exp(precise(self.time_decay + products["decay"])))
        return {"r": r, "w": w, "k": k, "v": v}, F.silu(products["gate"]), v_first

    def wkv(self, inputs, initial_state, reading):
        return wkv6(
            **inputs,
            u=self.time_faaaa,
            initial_state=initial_state,
            order=reading.order,
            cu_seqlens=reading.cu_seqlens,
        )

    def step(self, step_kernel, products, v_first, state, mask):
        out = step_kernel(
            **products,
            state=state,
            time_decay=self.time_decay,
            u=self.time_faaaa,
            norm_weight=self.ln_x.weight,
            norm_bias=self.ln_x.bias,
            eps=self.ln_x.eps,
            mask=mask,
        )
        return out, v_first


class Rwkv5TimeMix(Wkv6TimeMix):
    """RWKV-5.2 (arXiv 2404.05892, section 3): a decay per channel, constant in time.

    x_m = m x_t + (1 - m) x_{t-1};  w = exp(-exp(time_decay));  y = WKV(r, w, k, v, u);  out = norm(y) silu(g).
    """

    def __init__(self, config: VisualRWKVTextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        for name in "kvrg":
            setattr(self, f"time_mix_{name}", nn.Parameter(torch.empty(1, 1, config.hidden_size)))
        self.time_decay = nn.Parameter(torch.empty(config.num_attention_heads, config.head_dim))
        self.time_faaaa = nn.Parameter(torch.empty(config.num_attention_heads, config.head_dim))
        self.gate = nn.Linear(config.hidden_size, config.attention_size, bias=False)

    def products(self, shift):
        x_k, x_v, x_r, x_g = shift([1 - m for m in weights_of(self, "time_mix_", "kvrg")])
        products = {"r": self.receptance(x_r), "k": self.key(x_k), "v": self.value(x_v)}
        return products | {"decay": None, "gate": self.gate(x_g)}

    @torch.no_grad()
    def init_weights(self) -> None:
        """The original's initialisation of what is not a linear layer."""
        r01, r10, d = self._layer_position()
        init.copy_(self.time_mix_k, (d**r10).view(1, 1, -1))
        init.copy_(self.time_mix_v, (d**r10 + 0.3 * r01).view(1, 1, -1))
        init.copy_(self.time_mix_r, (d ** (0.5 * r10)).view(1, 1, -1))
        init.copy_(self.time_mix_g, (d ** (0.5 * r10)).view(1, 1, -1))
        init.copy_(self.time_decay, _decay_speed(self.config.attention_size, r01).view_as(self.time_decay))
        init.copy_(
            self.time_faaaa, _first_token_bonus(self.config.attention_size, r01).view_as(self.time_faaaa)
        )


class Rwkv6TimeMix(Wkv6TimeMix):
    """RWKV-6 (arXiv 2404.05892, section 4): token shift and decay depend on the data.

    x_m = x_t + (x_{t-1} - x_t)(maa_m + lora_m);  w_t = exp(-exp(time_decay + lora(x_w)));  out = norm(y) silu(g).
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
        ranks = torch.tanh(shift([self.time_maa_x])[0] @ self.time_maa_w1)
        ranks = ranks.unflatten(-1, (5, -1)).movedim(-2, 0)  # [5, B, T, D]
        data_dependent = ranks @ self.time_maa_w2[:, None]  # [5, B, T, C]
        x_w, x_k, x_v, x_r, x_g = shift(weights_of(self, "time_maa_", "wkvrg"), dynamic=data_dependent)
        (decay,) = low_rank([x_w], [self.time_decay_w1], [self.time_decay_w2], ["tanh"])
        products = {"r": self.receptance(x_r), "k": self.key(x_k), "v": self.value(x_v)}
        return products | {"decay": decay, "gate": self.gate(x_g)}

    @torch.no_grad()
    def init_weights(self) -> None:
        """The original's initialisation of what is not a linear layer."""
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
        init.copy_(self.time_decay, _decay_speed(self.config.attention_size, r01).view_as(self.time_decay))
        init.copy_(
            self.time_faaaa, _first_token_bonus(self.config.attention_size, r01).view_as(self.time_faaaa)
        )


class Rwkv7TimeMix(TimeMix):
    """RWKV-7 (arXiv 2503.14456, section 4): the generalised delta rule.

    S_t = S_{t-1} (diag(w_t) - kk_t (a_t kk_t)^T) + k_t v_t^T with in-context learning rate a_t; layers after the
    first mix their values with the first layer's; out = (norm(y) + (r k r_k) v) g.
    """

    step_name = "rwkv7_decode"

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

    def _ranks(self) -> dict[str, int]:
        """Rank of each low-rank map: decay, in-context learning rate, value residual (not in layer 0), gate."""
        config = self.config
        ranks = {"w": config.decay_low_rank_dim, "a": config.a_low_rank_dim, "g": config.gate_low_rank_dim}
        return ranks if self.layer_idx == 0 else ranks | {"v": config.v_low_rank_dim}

    def products(self, shift):
        x_r, x_w, x_k, x_v, x_a, x_g = shift(weights_of(self, "x_", "rwkvag"))
        maps = {
            "decay": (x_w, self.w1, self.w2, "tanh"),
            "rate": (x_a, self.a1, self.a2, "identity"),
            "gate": (x_g, self.g1, self.g2, "sigmoid"),
        }
        if self.layer_idx > 0:
            maps["value_gate"] = (x_v, self.v1, self.v2, "identity")
        products = {"r": self.receptance(x_r), "k": self.key(x_k), "v": self.value(x_v), "value_gate": None}
        return products | dict(zip(maps, low_rank(*zip(*maps.values()))))

    def prepare(self, products, v_first):
        k, v = products["k"], products["v"]
        if products["value_gate"] is None:
            v_first = v
        else:
            v = torch.lerp(v, v_first, torch.sigmoid(self.v0 + products["value_gate"]).to(v.dtype))
        rate = torch.sigmoid(self.a0 + products["rate"])  # [B, T, C], in-context learning rate
        kk = F.normalize(self.heads(k * self.k_k), dim=-1, eps=1e-12)
        inputs = {
            "r": self.heads(products["r"]),
            "w": self.heads(-DECAY_SCALE * torch.sigmoid(precise(self.w0 + products["decay"]))),
            "k": self.heads(k * (1 + (rate - 1) * self.k_a)),
            "v": self.heads(v),
            "a": -kk,
            "b": kk * self.heads(rate),
        }
        return inputs, products["gate"], v_first

    def step(self, step_kernel, products, v_first, state, mask):
        first = products["value_gate"] is None
        out = step_kernel(
            **products,
            state=state,
            v_first=None if first else v_first,
            v0=None if first else self.v0,
            **{name: getattr(self, name) for name in ("w0", "a0", "k_k", "k_a", "r_k")},
            norm_weight=self.ln_x.weight,
            norm_bias=self.ln_x.bias,
            eps=self.ln_x.eps,
            mask=mask,
        )
        return out, products["v"] if first else v_first

    def wkv(self, inputs, initial_state, reading):
        return wkv7(
            **inputs,
            initial_state=initial_state,
            order=reading.order,
            cu_seqlens=reading.cu_seqlens,
            min_log_decay=-DECAY_SCALE,
        )

    def bonus(self, inputs):
        weight = (inputs["r"] * inputs["k"] * self.r_k).sum(-1, keepdim=True)  # [B, T, H, 1]
        return (weight * inputs["v"]).flatten(-2)

    @torch.no_grad()
    def init_weights(self) -> None:
        """The original's initialisation, linear layers included."""
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
        if self.layer_idx > 0:
            init.ones_(self.v0)
        init.constant_(self.k_k, 0.85)
        init.ones_(self.k_a)
        init.zeros_(self.r_k)
        for linear, bound in ((self.receptance, 0.5), (self.key, 0.05), (self.value, 0.5)):
            init.uniform_(linear.weight, -bound / hidden_size**0.5, bound / hidden_size**0.5)
        init.zeros_(self.output.weight)


def _decay_speed(width: int, r01: float) -> torch.Tensor:
    """-6 + 5 (n / (A - 1))^(0.7 + 1.3 r01), the initial decay of RWKV-5 and 6, [A]."""
    n = torch.arange(width, dtype=torch.float32) / max(width - 1, 1)
    return -6 + 5 * n ** (0.7 + 1.3 * r01)


def _first_token_bonus(width: int, r01: float) -> torch.Tensor:
    """r01 (1 - n / (A - 1)) + 0.1 ((n + 1) mod 3 - 1), the initial u of RWKV-5 and 6, [A]."""
    n = torch.arange(width, dtype=torch.float32)
    return r01 * (1 - n / max(width - 1, 1)) + 0.1 * ((n + 1) % 3 - 1)


class ChannelMix(nn.Module):
    """Channel mixing: a squared-ReLU MLP on the shifted tokens; RWKV-5 and 6 gate it with a receptance."""

    mix_names: ClassVar[tuple[str, ...]]

    def __init__(self, config: VisualRWKVTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        for name in self.mix_names:
            setattr(self, name, nn.Parameter(torch.empty(1, 1, config.hidden_size)))
        self.key = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.value = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        state: VisualRWKVCacheLayer | None = None,
        reading: Reading = AS_IT_COMES,
    ) -> torch.Tensor:
        """`hidden_states` [B, T, C] -> the same shape."""
        carried = carried_token(hidden_states, CHANNEL_MIX_SHIFT, state)
        shifted = token_shift(hidden_states, carried, self.mix_weights(), reading)
        if state is not None:
            carry_on(hidden_states, carried, CHANNEL_MIX_SHIFT, state, reading)
        return self.mix(*shifted)

    def mix_weights(self) -> list[torch.Tensor]:
        """Weights of the previous token, one per name of `mix_names`, [1, 1, C]."""
        return weights_of(self, "", self.mix_names)

    def mix(self, *shifted: torch.Tensor) -> torch.Tensor:
        """The shifted tokens, each [B, T, C] -> the same shape."""
        raise NotImplementedError

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """value(relu(key(x))^2), [B, T, C] -> the same shape."""
        return self.value(torch.relu(self.key(x)).square())

    def init_weights(self) -> None:
        """d^r10 for the current token (RWKV-5), the rest for the previous one (RWKV-6)."""
        position = torch.arange(self.config.hidden_size, dtype=torch.float32) / self.config.hidden_size
        weight = position ** (1 - self.layer_idx / self.config.num_hidden_layers)
        for name in self.mix_names:
            init.copy_(getattr(self, name), self.shift_weight(weight).view(1, 1, -1))

    @staticmethod
    def shift_weight(weight: torch.Tensor) -> torch.Tensor:
        return 1 - weight


class Rwkv5ChannelMix(ChannelMix):
    """x_m = m x_t + (1 - m) x_{t-1};  out = sigmoid(R x_r) V relu(K x_k)^2."""

    mix_names = ("time_mix_k", "time_mix_r")

    def __init__(self, config: VisualRWKVTextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.receptance = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def mix_weights(self):
        return [1 - m for m in super().mix_weights()]

    def mix(self, x_k, x_r):
        return torch.sigmoid(self.receptance(x_r)) * self.mlp(x_k)

    @staticmethod
    def shift_weight(weight):
        return weight


class Rwkv6ChannelMix(ChannelMix):
    """x_m = x_t + (x_{t-1} - x_t) m;  out = sigmoid(R x_r) V relu(K x_k)^2."""

    mix_names = ("time_maa_k", "time_maa_r")

    def __init__(self, config: VisualRWKVTextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.receptance = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def mix(self, x_k, x_r):
        return torch.sigmoid(self.receptance(x_r)) * self.mlp(x_k)


class Rwkv7ChannelMix(ChannelMix):
    """x_k = x_t + (x_{t-1} - x_t) m;  out = V relu(K x_k)^2, without receptance."""

    mix_names = ("x_k",)

    def mix(self, x_k):
        return self.mlp(x_k)

    def init_weights(self) -> None:
        """1 - d^(r10^4); small uniform key, zero value."""
        hidden_size = self.config.hidden_size
        position = torch.arange(hidden_size, dtype=torch.float32) / hidden_size
        r10 = 1 - self.layer_idx / self.config.num_hidden_layers
        init.copy_(self.x_k, (1 - position ** (r10**4)).view(1, 1, -1))
        init.uniform_(self.key.weight, -0.5 / hidden_size**0.5, 0.5 / hidden_size**0.5)
        init.zeros_(self.value.weight)


TIME_MIX: dict[int, type[TimeMix]] = {5: Rwkv5TimeMix, 6: Rwkv6TimeMix, 7: Rwkv7TimeMix}
CHANNEL_MIX: dict[int, type[ChannelMix]] = {5: Rwkv5ChannelMix, 6: Rwkv6ChannelMix, 7: Rwkv7ChannelMix}


class RwkvBlock(GradientCheckpointingLayer):
    """One block: x + att(ln1 x), then x + ffn(ln2 x), with the picture read in the block's own order."""

    accelerated = False
    """Whether "auto" picks native ops for this block on a CPU: `accelerate_on_cpu` sets it."""

    def __init__(self, config: VisualRWKVTextConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.ln1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ln2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.att = TIME_MIX[config.rwkv_version](config, layer_idx)
        self.ffn = CHANNEL_MIX[config.rwkv_version](config, layer_idx)

    def __call__(self, *args, **kwargs):
        if self.gradient_checkpointing and self.training:
            kwargs["backend"] = chosen_backend()  # autograd may compute this again in a thread of its own
        return super().__call__(*args, **kwargs)

    def forward(
        self,
        hidden_states: torch.Tensor,
        v_first: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        reading: Reading = AS_IT_COMES,
        backend: str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states` [B, T, C] -> the same, and `v_first` [B, T, C].

        Only the token shifts and the recurrence look at other tokens, so they alone read in the block's order.
        `backend` is what `kernel_backend` had chosen, which may have been in another thread.
        """
        chosen_elsewhere = backend not in (None, chosen_backend())
        state = past_key_values.layers[self.layer_idx] if past_key_values is not None else None
        with (
            kernel_backend(backend) if chosen_elsewhere else nullcontext(),
            accelerated_ops() if self.accelerated else nullcontext(),
        ):
            if (decode := self._decode_kernel(hidden_states, state)) and (
                decoded := decode(self, hidden_states, v_first, state, reading)
            ):
                return decoded
            mixed, v_first = self.att(self.ln1(hidden_states), v_first, state, reading)
            hidden_states = hidden_states + mixed
            hidden_states = hidden_states + self.ffn(self.ln2(hidden_states), state, reading)
        return hidden_states, v_first

    @staticmethod
    def _decode_kernel(
        hidden_states: torch.Tensor, state: VisualRWKVCacheLayer | None
    ) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None] | None] | None:
        """Return the kernel of a whole block for one token that follows others, without gradients, not recorded.

        That kernel returns None where the block or its state is not as it needs them.
        """
        if hidden_states.shape[1] != 1 or state is None or state.record_past or torch.is_grad_enabled():
            return None
        return kernel("block_decode", hidden_states) if state.wkv_state() is not None else None


class VisualRWKVPreTrainedModel(PreTrainedModel):
    """What all models here share: initialisation, loading with clear refusals, saving with remote code."""

    config_class = VisualRWKVTextConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RwkvBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = False  # a recorded past can be taken back: assisted decoding works
    _can_compile_fullgraph = True
    _supports_sdpa = True  # the vision tower's attention
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @property
    def accepts_loss_kwargs(self) -> bool:
        """For Trainer: whether the loss is a share of all labels of an accumulated batch (`num_items_in_batch`).

        A mean over samples is not: Trainer then averages the accumulated losses itself.
        """
        return self.config.get_text_config().loss_reduction == "token"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, TimeMix | ChannelMix):
            module.init_weights()
        elif isinstance(module, nn.Linear):
            # torch's own default. RWKV-7's blocks have set theirs: a block comes behind its linear layers.
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -1e-4, 1e-4)  # small, for ln0 stands behind it (RWKV-LM)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(
        cls, *args, output_loading_info: bool = False, ignore_mismatched_sizes: bool = False, **kwargs
    ):
        """As [`~transformers.PreTrainedModel.from_pretrained`], with refusals in place of warnings.

        Raises:
            ValueError: if the checkpoint lacks tensors of the model, has others or of other shapes (unless
                `ignore_mismatched_sizes=True`: then they are initialised), or holds NaN or infinite weights.
        """
        model, info = super().from_pretrained(
            *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if not ignore_mismatched_sizes:
            _refuse_misfit(cls.__name__, source, info)
        refuse_non_finite(model, source)
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self, save_directory, is_main_process: bool = True, push_to_hub: bool = False, **kwargs
    ) -> None:
        """Save as [`~transformers.PreTrainedModel.save_pretrained`] does, with the code that loads the model anywhere.

        A model with adapters (`add_adapter`, `load_adapter`) saves these alone, as transformers does: their folder
        has no `config.json` and needs no code.
        """
        if push_to_hub:  # by way of `push_to_hub()`, which saves the code before it uploads
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
            kwargs = {name: value for name, value in kwargs.items() if name not in HUB_ARGUMENTS}
        make_base_paths_absolute(self)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process and not getattr(self, "_hf_peft_config_loaded", False):
            ship_remote_code(save_directory)


def make_base_paths_absolute(model: nn.Module) -> None:
    """Make the folder that a model's adapters name as their base model absolute, if it is a folder.

    A relative path would be written into `adapter_config.json` and found from one working directory only.
    """
    for config in (getattr(model, "peft_config", None) or {}).values():
        folder = getattr(config, "base_model_name_or_path", None)
        if folder and Path(folder).is_dir():
            config.base_model_name_or_path = str(Path(folder).resolve())


def _refuse_misfit(model_name: str, source: object, info: dict) -> None:
    """Refuses a checkpoint whose tensors are not the model's; a base model leaves the head of a whole one aside."""
    unexpected = [key for key in info["unexpected_keys"] if not key.startswith("lm_head.")]
    misshapen = [f"{key} {list(found)} for {list(wanted)}" for key, found, wanted in info["mismatched_keys"]]
    for names, problem in (
        (info["missing_keys"], "lacks {} tensors of {}: {}"),
        (unexpected, "has {} tensors that {} does not: {}"),
        (misshapen, "has {} tensors of another shape than {}: {}"),
    ):
        if names:
            raise ValueError(
                f"{source} {problem.format(len(names), model_name, _some(sorted(names)))}. "
                "ignore_mismatched_sizes=True initialises them anew."
            )


def refuse_non_finite(model: nn.Module, source: object = "the model") -> None:
    """Raises `ValueError` naming every weight that holds NaN or infinity.

    Not read are weights on disk and those of other kinds (quantised, distributed): tensors of their own classes.
    """
    broken = [
        name
        for name, weight in model.state_dict(keep_vars=True).items()
        if type(weight.detach()) is torch.Tensor and not weight.is_meta and not _is_finite(weight)
    ]
    if broken:
        raise ValueError(f"{source} has NaN or infinite weights in {len(broken)} tensors: {_some(broken)}.")


def _is_finite(weight: torch.Tensor) -> bool:
    if not weight.is_floating_point() or not weight.numel():
        return True
    low, high = torch.aminmax(weight.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class VisualRWKVTextModel(VisualRWKVPreTrainedModel):
    """The blocks between embedding and head. The norm behind the embedding (ln0) is for text and picture alike."""

    input_modalities = ("text",)
    _can_record_outputs = {"hidden_states": RwkvBlock}

    def __init__(self, config: VisualRWKVTextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(
            RwkvBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        scan_orders: Sequence[torch.Tensor | None] | torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Reads tokens, from the start of the text or on from a cache.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T] or [B, past + T], 0 at pads. Pads change nothing, wherever they are.
            past_key_values: a [`VisualRWKVCache`], which is updated in place; or a [`KeptState`], which stays as it
                is: a copy of it continues and is returned.
            inputs_embeds: [B, T, C] in place of `input_ids`, in front of the embedding norm.
            use_cache: whether to return the state. Not while training.
            scan_orders: [B, D, T], or D entries [B, T] (None: the order of the text). Layer l reads the sequence
                in order l mod D, as an index: its position p is token `scan_orders[:, l % D, p]`.
            **kwargs: `output_hidden_states` and the like; `cu_seq_lens_q` [S + 1] of sequences packed in one row, as
                `DataCollatorWithFlattening(return_flash_attn_kwargs=True)` makes it.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None and not self.training:
            past_key_values = VisualRWKVCache(self.config)
        if hasattr(past_key_values, "to_cache"):  # a KeptState, which nothing changes: continue from a copy
            past_key_values = past_key_values.to_cache(inputs_embeds.device, inputs_embeds.dtype)
        cu_seqlens = kwargs.pop("cu_seq_lens_q", None)
        if cu_seqlens is not None:
            if past_key_values is not None:
                raise ValueError(
                    "Packed sequences (cu_seq_lens_q) end in many states: use_cache must be False."
                )
            cu_seqlens = cu_seqlens.long()
        positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
        readings = readings_of(
            positions.expand(inputs_embeds.shape[:2]),
            mask_of_pads(attention_mask, inputs_embeds.shape[1]),
            directions_of_layers(scan_orders),
            cu_seqlens,
        )

        hidden_states = self.embed_norm(inputs_embeds)  # [B, T, C]
        v_first = None
        for layer_idx, layer in enumerate(self.layers):
            reading = readings[layer_idx % len(readings)]
            hidden_states, v_first = layer(
                hidden_states, v_first, past_key_values=past_key_values, reading=reading
            )
        if past_key_values is not None:
            past_key_values.advance(inputs_embeds.shape[1])
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )


def mask_of_pads(attention_mask: torch.Tensor | dict | None, length: int) -> torch.Tensor | None:
    """Which of the last `length` tokens are no pads, bool [B, T]; None if there are none to pass over.

    `attention_mask` is [B, past + length], or what `generate()` makes of it for a compiled step.
    """
    mask = attention_mask.get("linear_attention") if isinstance(attention_mask, dict) else attention_mask
    if mask is None:
        return None
    if mask.ndim != 2:
        raise ValueError(f"attention_mask must be [B, T], got {tuple(mask.shape)}.")
    if mask.shape[1] < length:
        raise ValueError(f"attention_mask is shorter ({mask.shape[1]}) than the tokens given ({length}).")
    mask = mask[:, mask.shape[1] - length :].bool()
    # Looking at it waits for a GPU: too long for a single token.
    may_look = (length > 1 or mask.device.type == "cpu") and not torch.compiler.is_compiling()
    return None if may_look and bool(mask.all()) else mask


def directions_of_layers(
    scan_orders: Sequence[torch.Tensor | None] | torch.Tensor | None,
) -> Sequence[torch.Tensor | None]:
    """The orders [B, T] that the layers take in turn; None is the order of the text."""
    if scan_orders is None:
        return [None]
    return scan_orders.unbind(1) if isinstance(scan_orders, torch.Tensor) else scan_orders


class LateCausalLMOutputWithPast(LateLogits, CausalLMOutputWithPast):
    """Of a sliced training step."""


class VisualRWKVForCausalLM(VisualRWKVPreTrainedModel, VisualRWKVGenerationMixin):
    """RWKV-5, 6 or 7 with a language-modelling head: what a plain RWKV-World checkpoint becomes."""

    input_modalities = ("text",)
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: VisualRWKVTextConfig):
        super().__init__(config)
        self.model = VisualRWKVTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocab_size] and, with `labels` [B, T] (-100: no label), the loss.

        In a training step whose logits would take more than 256 MiB the loss is computed slice by slice, and the
        logits only if they are looked at.

        Args: see [`VisualRWKVTextModel.forward`]; `logits_to_keep` keeps the last n positions (0: all), or those
        that it indexes.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states, config = outputs.last_hidden_state, self.config
        rest = dict(
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        if is_worth_slicing(hidden_states, labels, config.vocab_size):
            loss = sliced_loss(hidden_states, self.lm_head, labels, config, **loss_options(kwargs))
            return LateCausalLMOutputWithPast(loss=loss, **rest).computing(
                partial(self.lm_head, hidden_states)
            )
        logits, loss = self.lm_head(kept_positions(hidden_states, logits_to_keep)), None
        if labels is not None:
            loss = visualrwkv_loss(logits, labels, config, **loss_options(kwargs))
        return CausalLMOutputWithPast(loss=loss, logits=logits, **rest)


def kept_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The positions of `hidden_states` [B, T, C] whose logits are asked for."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    return hidden_states[:, logits_to_keep]


__all__ = [
    "VisualRWKVForCausalLM",
    "VisualRWKVPreTrainedModel",
    "VisualRWKVTextModel",
]
