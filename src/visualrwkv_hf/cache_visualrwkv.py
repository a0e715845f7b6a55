"""The recurrent state of VisualRWKV as a transformers cache: constant in size, however long the text."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers.cache_utils import DynamicCache, LinearAttentionLayer
from transformers.configuration_utils import PreTrainedConfig

TIME_MIX_SHIFT, CHANNEL_MIX_SHIFT = 0, 1
"""Which of a layer's two token shifts."""


class _Step(NamedTuple):
    """What one forward did to one state; kept only while the past is recorded."""

    length: int
    before: torch.Tensor | None
    after: Callable[
        [int, torch.Tensor | None], torch.Tensor
    ]  # the state after the first n tokens of the step


class VisualRWKVCacheLayer(LinearAttentionLayer):
    """State of one block: two token shifts [B, C] and one matrix per head [B, H, K, V] in float32.

    The tensors stand where transformers' linear attention layers keep theirs (`conv_states` as [B, C, 1],
    `recurrent_states`), are written in place and keep their address, so that beam search, resetting and CUDA
    graphs work unchanged.
    """

    is_croppable = True

    def __init__(self, **kwargs):
        super().__init__(number_of_states=2)
        self.history: dict[str, list[_Step]] = {}

    def token_shift(self, which: int) -> torch.Tensor | None:
        """The last real token [B, C] that shift `which` saw, or None before the first."""
        return self.conv_states[which][..., 0] if self.has_previous_state[which] else None

    def wkv_state(self) -> torch.Tensor | None:
        """The state of the recurrence [B, H, K, V], or None before the first token."""
        return self.recurrent_states[0] if self.has_previous_state[TIME_MIX_SHIFT] else None

    def update_token_shift(
        self,
        which: int,
        length: int,
        last: torch.Tensor,
        after: Callable[[int, torch.Tensor | None], torch.Tensor],
    ) -> None:
        """Keeps `last` [B, C], what shift `which` read last of a step of `length` tokens.

        `after(n, before)` gives what it had read last after the first n of them, starting from `before`.
        """
        if self.record_past:
            self._record(f"shift{which}", length, self.token_shift(which), after)
        if not self.is_conv_states_initialized[which]:
            self.lazy_initialization(conv_states=last[..., None], state_idx=which)
        self.conv_states[which].copy_(last[..., None])
        self.has_previous_state[which] = True

    def update_wkv_state(
        self,
        length: int,
        state: torch.Tensor,
        after: Callable[[int, torch.Tensor | None], torch.Tensor],
    ) -> None:
        """Keeps `state` [B, H, K, V]; to be called before the layer's token shifts are updated.

        `after(n, before)` gives the state after the first n of the step's `length` tokens, starting from `before`.
        """
        if self.record_past:
            self._record("wkv", length, self.wkv_state(), after)
        self.update_recurrent_state(state)

    def _record(self, name: str, length: int, before: torch.Tensor | None, after: Callable) -> None:
        before = None if before is None else before.clone()
        self.history.setdefault(name, []).append(_Step(length, before, after))

    @torch.no_grad()
    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens and forgets the record; 0 only forgets it.

        Raises:
            RuntimeError: if the past was not recorded, or not that many tokens of it.
            ValueError: if the number is positive.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop() takes the number of tokens to remove as a negative int, got {tokens_to_remove}."
            )
        if tokens_to_remove and not self.record_past:
            raise RuntimeError(
                "crop() needs a recorded past: call activate_past_recording() before the tokens to remove."
            )
        states = (
            {name: self._rewound(name, -tokens_to_remove) for name in self.history}
            if tokens_to_remove
            else {}
        )
        self.history.clear()
        for which in (TIME_MIX_SHIFT, CHANNEL_MIX_SHIFT):
            if (name := f"shift{which}") in states:
                last = states[name]
                self.has_previous_state[which] = last is not None
                self.conv_states[which].copy_(0 if last is None else last[..., None])
        if "wkv" in states:
            self.recurrent_states[0].copy_(0 if states["wkv"] is None else states["wkv"])

    def _rewound(self, name: str, remove: int) -> torch.Tensor | None:
        """The state `name` as it was `remove` tokens ago."""
        recorded = sum(step.length for step in self.history[name])
        if remove > recorded:
            raise RuntimeError(f"Cannot remove {remove} tokens: only the last {recorded} are recorded.")
        for step in reversed(self.history[name]):
            if remove < step.length:
                return step.after(step.length - remove, step.before)
            remove -= step.length
            if not remove:
                return step.before
        raise AssertionError("unreachable: the record is at least as long as what is removed")

    def reset(self) -> None:
        super().reset()
        self.history.clear()


class VisualRWKVCache(DynamicCache):
    """The recurrent state of all layers, and the number of tokens that it has read.

    Created by `generate()` and accepted by it as `past_key_values`.

    Args:
        config: the model's configuration, or that of its language model.
    """

    def __init__(self, config: PreTrainedConfig):
        # A stock DynamicCache without attention layers cannot tell its length, which generate() asks for.
        text_config = config.get_text_config(decoder=True)
        super(DynamicCache, self).__init__(
            layers=[VisualRWKVCacheLayer() for _ in range(text_config.num_hidden_layers)]
        )
        self._length = self._zero_length()

    @staticmethod
    def _zero_length() -> int | torch.Tensor:
        return 0

    @property
    def is_compileable(self) -> bool:
        """Whether generate() may compile the decoding step by itself: only with the static cache."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int | torch.Tensor:
        """Number of tokens read so far, pads included."""
        return self._length

    def advance(self, num_tokens: int) -> None:
        """Counts tokens that all layers have read."""
        self._length = self._length + num_tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens (see [`VisualRWKVCacheLayer.crop`])."""
        super().crop(tokens_to_remove)
        self.advance(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self._length = self._zero_length()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sample `repeats` times."""
        self._index_batch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the samples `indices` [n]."""
        self._index_batch(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def _index_batch(self, index: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for layer in self.layers:
            for states in (layer.conv_states, layer.recurrent_states):
                states.update({i: index(tensor) for i, tensor in states.items() if tensor is not None})


class VisualRWKVStaticCache(VisualRWKVCache):
    """The same state for `torch.compile` and CUDA graphs: the length is a tensor, counted without a recompilation."""

    _length: torch.Tensor

    @staticmethod
    def _zero_length() -> torch.Tensor:
        return torch.zeros((), dtype=torch.long)

    @property
    def is_compileable(self) -> bool:
        return True

    def advance(self, num_tokens: int) -> None:
        device = self.layers[0].conv_states[TIME_MIX_SHIFT].device
        if self._length.device != device:  # a CUDA graph takes no tensor of the CPU, nor one that moves
            self._length = self._length.to(device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self._length)
        self._length.add_(num_tokens)


__all__ = ["VisualRWKVCache", "VisualRWKVStaticCache"]
