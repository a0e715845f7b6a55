"""The recurrent state of VisualRWKV as a transformers cache: constant in size, however long the text."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionLayer, StaticCache
from transformers.configuration_utils import PreTrainedConfig

if TYPE_CHECKING:
    from .kept_state import KeptState

TIME_MIX_SHIFT, CHANNEL_MIX_SHIFT = 0, 1
"""Which of a layer's two token shifts."""

SHIFT, WKV = "token_shift{}", "wkv"
"""Names of a layer's states."""


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

    def tensors(self) -> dict[str, torch.Tensor]:
        """The states there are, by name: the shifts [B, C], and `WKV` [B, H, K, V]."""
        shifts = {SHIFT.format(which): self.token_shift(which) for which in self.has_previous_state}
        return {
            name: tensor for name, tensor in (shifts | {WKV: self.wkv_state()}).items() if tensor is not None
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> "VisualRWKVCacheLayer":
        """A layer with copies of such states, without a record of the past."""
        layer = cls()
        if WKV in tensors:
            layer.update_recurrent_state(tensors[WKV])
        for which in layer.has_previous_state:
            if (last := tensors.get(SHIFT.format(which))) is not None:
                layer.lazy_initialization(conv_states=last[..., None], state_idx=which)
                layer.conv_states[which].copy_(last[..., None])
                layer.has_previous_state[which] = True
        return layer


class VisualRWKVCache(DynamicCache):
    """The running state of all layers and the number of tokens that it has read.

    `VisualRWKVCache(model.config)` is empty; `model(..., past_key_values=cache)` and `generate(...)` advance it in
    place. It does not know which tokens it has read: a [`KeptState`] does, and starts such a cache with
    [`~KeptState.to_cache`].

    Args:
        config: the configuration of the model, or of its language model.
    """

    def __init__(self, config: PreTrainedConfig):
        # A stock DynamicCache without attention layers cannot tell its length, which generate() asks for.
        text_config = config.get_text_config(decoder=True)
        self._start([VisualRWKVCacheLayer() for _ in range(text_config.num_hidden_layers)], 0)

    def _start(self, layers: list[VisualRWKVCacheLayer], length: int) -> None:
        Cache.__init__(self, layers=layers)
        self._length = self._counter(length)

    @staticmethod
    def _counter(length: int) -> int | torch.Tensor:
        """The length in the form in which `advance` counts it."""
        return length

    @classmethod
    def from_layers(cls, layers: Sequence[Mapping[str, torch.Tensor]], length: int) -> "VisualRWKVCache":
        """Return a cache that has read `length` tokens, with copies of such states of each layer."""
        cache = cls.__new__(cls)
        cache._start([VisualRWKVCacheLayer.from_tensors(dict(tensors)) for tensors in layers], length)
        return cache

    @property
    def is_compileable(self) -> bool:
        """Whether `generate()` may compile the decoding step: only with the static cache."""
        return False

    @property
    def is_empty(self) -> bool:
        """Whether nothing was read. Never waits for a GPU, unlike a comparison of `get_seq_length()`."""
        return not self.layers[0].tensors()

    def get_seq_length(self, layer_idx: int = 0) -> int | torch.Tensor:
        """Return the number of tokens read so far, padding included."""
        return self._length

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` tokens that all layers have read."""
        self._length = self._length + num_tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens (see [`VisualRWKVCacheLayer.crop`])."""
        super().crop(tokens_to_remove)
        self.advance(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self._length = self._counter(0)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sample `repeats` times."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the samples `indices` [n], in this order."""
        for layer in self.layers:
            for states in (layer.conv_states, layer.recurrent_states):
                states.update(
                    {
                        i: tensor.index_select(0, indices.to(tensor.device))
                        for i, tensor in states.items()
                        if tensor is not None
                    }
                )

    # --- copies ---------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """The number of samples; 0 if nothing was read. (`len()` is the number of layers, as in any cache.)"""
        return batch_size_of(self.layer_tensors())

    @property
    def nbytes(self) -> int:
        """The number of bytes that the states take, however much they have read."""
        return sum(tensor.nbytes for tensors in self.layer_tensors() for tensor in tensors.values())

    def layer_tensors(self) -> list[dict[str, torch.Tensor]]:
        """Return the states of each layer by name. They are the cache's own tensors, not copies."""
        return [layer.tensors() for layer in self.layers]

    def copy(self) -> "VisualRWKVCache":
        """Return a cache of its own that has read the same. A record of the past is not copied."""
        return self.from_layers(self.layer_tensors(), int(self._length))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "VisualRWKVCache":
        """Return a copy on `device`, for a model of `dtype`. The WKV states stay in float32."""
        return self.from_layers(moved(self.layer_tensors(), device, dtype), int(self._length))

    def __getitem__(self, index: int) -> "VisualRWKVCache":
        """Return a copy of one sample's state.

        Raises:
            IndexError: there is no such sample.
        """
        return self.from_layers(sample_of(self.layer_tensors(), index), int(self._length))

    @classmethod
    def stack(cls, states: "Sequence[VisualRWKVCache | KeptState]") -> "VisualRWKVCache | KeptState":
        """Return one cache of the samples of several, which may have read more or less.

        Raises:
            ValueError: no cache is given, or caches of models of different shapes.
        """
        if any(not isinstance(state, VisualRWKVCache) for state in states):
            warn_moved("VisualRWKVCache.stack(kept states)", "KeptState.stack")
            from .kept_state import KeptState

            return KeptState.stack(states)
        layers = stacked([state.layer_tensors() for state in states])
        return cls.from_layers(layers, max(int(state._length) for state in states))

    @classmethod
    def load(cls, path: str | os.PathLike, model=None, processor=None) -> "KeptState":
        """Deprecated: [`KeptState.load`]."""
        warn_moved("VisualRWKVCache.load", "KeptState.load")
        from .kept_state import KeptState

        return KeptState.load(path, model, processor)


def warn_moved(old: str, new: str) -> None:
    """Warn that `old` will go after one more release."""
    warnings.warn(
        f"{old} is deprecated and will be removed in the next release: use {new}.",
        DeprecationWarning,
        stacklevel=3,
    )


def batch_size_of(layers: Sequence[Mapping[str, torch.Tensor]]) -> int:
    """Return the number of samples of these states; 0 if nothing was read."""
    return len(next(iter(layers[0].values()))) if layers and layers[0] else 0


def moved(
    layers: Sequence[Mapping[str, torch.Tensor]],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> list[dict[str, torch.Tensor]]:
    """Return the states on `device`, all but the WKV states in `dtype`; None leaves either as it is."""
    return [
        {
            name: tensor.to(device=device, dtype=None if name == WKV else dtype)
            for name, tensor in tensors.items()
        }
        for tensors in layers
    ]


def sample_of(layers: Sequence[Mapping[str, torch.Tensor]], index: int) -> list[dict[str, torch.Tensor]]:
    """Return the states of one sample of a batch.

    Raises:
        IndexError: there is no such sample.
    """
    size = batch_size_of(layers)
    if not -size <= index < size:
        raise IndexError(f"The state has {size} samples, asked for {index}.")
    index %= size
    return [{name: tensor[index : index + 1] for name, tensor in tensors.items()} for tensors in layers]


def stacked(states: Sequence[Sequence[Mapping[str, torch.Tensor]]]) -> list[dict[str, torch.Tensor]]:
    """Return the states of all samples of several batches as one batch.

    Raises:
        ValueError: there are none, or their shapes differ.
    """
    if not states:
        raise ValueError("stack() needs at least one state.")
    shapes = {tuple(tuple(t.shape[1:]) for tensors in layers for t in tensors.values()) for layers in states}
    if len(shapes) > 1:
        raise ValueError(f"Only states of one model can be stacked, got states of shapes {sorted(shapes)}.")
    return [
        {name: torch.cat([tensors[name] for tensors in of_layer]) for name in of_layer[0]}
        for of_layer in zip(*states)
    ]


class VisualRWKVStaticCache(VisualRWKVCache, StaticCache):
    """The same state for `torch.compile` and CUDA graphs: the length is a tensor, counted without a recompilation.

    It is a `StaticCache` for `isinstance`, since `generate()` and exporters decide by that. Unlike other static caches
    it needs no `max_cache_len`: the state has one size, however much it has read.
    """

    _length: torch.Tensor

    @staticmethod
    def _counter(length: int) -> torch.Tensor:
        return torch.full((), length, dtype=torch.long)

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
