"""The generations of RWKV that a model can be made of: one row each.

A new generation is a row here, with a time mix and a channel mix; a row of
`conversion.generations.ORIGINAL_GENERATIONS` reads its checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from .channel_mix import Rwkv5ChannelMix, Rwkv6ChannelMix, Rwkv7ChannelMix
from .layer_state import CHANNEL_MIX_SHIFT, TIME_MIX_SHIFT, WKV, StateSpec
from .rwkv6_time_mix import Rwkv5TimeMix, Rwkv6TimeMix
from .rwkv7_time_mix import Rwkv7TimeMix

STATES = (
    StateSpec(TIME_MIX_SHIFT, ("hidden_size",)),
    StateSpec(CHANNEL_MIX_SHIFT, ("hidden_size",)),
    StateSpec(WKV, ("num_attention_heads", "head_dim", "head_dim")),
)


class Generation(NamedTuple):
    """A generation of RWKV.

    Attributes:
        time_mix: the first half of a block, made by `time_mix(config, layer_idx)`. Both halves take
            (hidden_states, v_first, state, token_order) and return a `MixOutput`, as `TimeMix.forward` says, and
            initialise their parameters in `init_weights()`.
        channel_mix: the second half, likewise.
        ops: names of the ops that kernels may compute for it (see `dispatch.kernel`).
        states: what a layer remembers.
        ranks: default ranks of the low-rank maps, a field of `VisualRWKVTextConfig` -> a function of C.
        intermediate_size: default width of the channel mix, a function of C.
        attention_size_is_hidden_size: whether A must be C.
        hands_on_values: whether the first block hands its values (`v_first`, [B, T, A]) to all others.
        makes_compressors: whether its blocks can be those of a Visual Token Compressor.
    """

    time_mix: Callable[[Any, int], nn.Module]
    channel_mix: Callable[[Any, int], nn.Module]
    ops: tuple[str, ...]
    states: tuple[StateSpec, ...] = STATES
    ranks: dict[str, Callable[[int], int]] = {}
    intermediate_size: Callable[[int], int] = lambda hidden_size: int(hidden_size * 3.5) // 32 * 32
    attention_size_is_hidden_size: bool = False
    hands_on_values: bool = False
    makes_compressors: bool = False


def _doubled_if_wide(rank: int) -> Callable[[int], int]:
    """Return RWKV-6's rule for a rank: twice as much from C = 4096 on."""
    return lambda hidden_size: 2 * rank if hidden_size >= 4096 else rank


def _growing(factor: float, exponent: float) -> Callable[[int], int]:
    """Return RWKV-7's rule for a rank: factor C^exponent, as a multiple of 32 (RWKV-LM, `RWKV-v7`)."""

    def rank(hidden_size: int) -> int:
        size = max(0, hidden_size)  # a negative size is refused later, by its name
        return max(32, 32 * round(factor * size**exponent / 32))

    return rank


GENERATIONS: dict[int, Generation] = {
    5: Generation(
        Rwkv5TimeMix,
        Rwkv5ChannelMix,
        ops=("token_shift", "wkv6", "rwkv6_decode"),
    ),
    6: Generation(
        Rwkv6TimeMix,
        Rwkv6ChannelMix,
        ops=("token_shift", "low_rank", "wkv6", "rwkv6_decode"),
        ranks={"mix_low_rank_dim": _doubled_if_wide(32), "decay_low_rank_dim": _doubled_if_wide(64)},
    ),
    7: Generation(
        Rwkv7TimeMix,
        Rwkv7ChannelMix,
        ops=("token_shift", "low_rank", "wkv7", "rwkv7_decode"),
        ranks={
            "decay_low_rank_dim": _growing(1.8, 0.5),
            "a_low_rank_dim": _growing(1.8, 0.5),
            "v_low_rank_dim": _growing(1.3, 0.5),
            "gate_low_rank_dim": _growing(0.6, 0.8),
        },
        intermediate_size=lambda hidden_size: 4 * hidden_size,
        attention_size_is_hidden_size=True,
        hands_on_values=True,
        makes_compressors=True,
    ),
}
"""By the version that `VisualRWKVTextConfig.rwkv_version` names."""
