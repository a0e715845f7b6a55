"""The channel mix of RWKV-5, RWKV-6 and RWKV-7: the feed-forward half of a block, on shifted tokens.

RWKV-5 and RWKV-6: arXiv 2404.05892, section 4.3. RWKV-7: arXiv 2503.14456, section 4.

Letters: B batch, T time, C hidden size, F width of the channel mix. Parameters carry the papers' names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .layer_state import CHANNEL_MIX_SHIFT, LayerState
from .mixing import MixOutput, parameters_of, previous_token, store_last_token
from .token_order import IN_ORDER, TokenOrder, token_shift

if TYPE_CHECKING:
    from .configuration_visualrwkv import VisualRWKVTextConfig


class ChannelMix(nn.Module):
    """Channel mixing: a squared-ReLU MLP on the shifted tokens. RWKV-5 and RWKV-6 gate it with a receptance."""

    mix_names: ClassVar[tuple[str, ...]]
    """Parameters that weigh the two tokens of a shift, [1, 1, C] each."""

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
        hidden_states: Tensor,
        v_first: Tensor | None = None,
        state: LayerState | None = None,
        token_order: TokenOrder = IN_ORDER,
    ) -> MixOutput:
        """Mix the channels of each token with those of the token read before it; see `TimeMix.forward`."""
        carried = previous_token(hidden_states, CHANNEL_MIX_SHIFT, state, token_order)
        shifted = token_shift(
            hidden_states, carried, self.mix_weights(), token_order.previous, token_order.following
        )
        updates = {}
        if state is not None:
            updates[CHANNEL_MIX_SHIFT] = store_last_token(hidden_states, carried, state, token_order)
        return MixOutput(self.mix(*shifted), v_first, updates)

    def mix_weights(self) -> list[Tensor]:
        """Return the weights of the previous token, one for each of `mix_names`, [1, 1, C]."""
        return parameters_of(self, "", self.mix_names)

    def mix(self, *shifted: Tensor) -> Tensor:
        """Compute [B, T, C] from the shifted tokens, [B, T, C] each."""
        raise NotImplementedError

    def mlp(self, x: Tensor) -> Tensor:
        """Compute V relu(K x)^2, [B, T, C] -> the same shape."""
        return self.value(torch.relu(self.key(x)).square())

    def init_weights(self) -> None:
        """Initialise the mix weights: d^r10 for the current token (RWKV-5), 1 - d^r10 for the previous one (RWKV-6)."""
        position = torch.arange(self.config.hidden_size, dtype=torch.float32) / self.config.hidden_size
        weight = position ** (1 - self.layer_idx / self.config.num_hidden_layers)
        for name in self.mix_names:
            init.copy_(getattr(self, name), self.initial_mix(weight).view(1, 1, -1))

    @staticmethod
    def initial_mix(weight: Tensor) -> Tensor:
        """Return what a mix parameter starts with if the current token is to weigh `weight`."""
        return 1 - weight


class GatedChannelMix(ChannelMix):
    """out = sigmoid(R x_r) V relu(K x_k)^2."""

    def __init__(self, config: VisualRWKVTextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.receptance = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def mix(self, x_k, x_r):
        return torch.sigmoid(self.receptance(x_r)) * self.mlp(x_k)


class Rwkv5ChannelMix(GatedChannelMix):
    """x_m = m x_t + (1 - m) x_{t-1};  out = sigmoid(R x_r) V relu(K x_k)^2."""

    mix_names = ("time_mix_k", "time_mix_r")

    def mix_weights(self):
        return [1 - m for m in super().mix_weights()]

    @staticmethod
    def initial_mix(weight):
        return weight


class Rwkv6ChannelMix(GatedChannelMix):
    """x_m = x_t + (x_{t-1} - x_t) m;  out = sigmoid(R x_r) V relu(K x_k)^2."""

    mix_names = ("time_maa_k", "time_maa_r")


class Rwkv7ChannelMix(ChannelMix):
    """x_k = x_t + (x_{t-1} - x_t) m;  out = V relu(K x_k)^2, without receptance."""

    mix_names = ("x_k",)

    def mix(self, x_k):
        return self.mlp(x_k)

    def init_weights(self) -> None:
        """Initialise the mix weight with 1 - d^(r10^4), the key with small uniform values, the value with zeros."""
        hidden_size = self.config.hidden_size
        position = torch.arange(hidden_size, dtype=torch.float32) / hidden_size
        r10 = 1 - self.layer_idx / self.config.num_hidden_layers
        init.copy_(self.x_k, (1 - position ** (r10**4)).view(1, 1, -1))
        init.uniform_(self.key.weight, -0.5 / hidden_size**0.5, 0.5 / hidden_size**0.5)
        init.zeros_(self.value.weight)
