"""The recurrent state of VisualRWKV as a transformers cache: constant in size, however long the text."""

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.configuration_utils import PreTrainedConfig

from .cache_layer import VisualRWKVCacheLayer
from .layer_state import is_token

Placement = torch.device | str | list[torch.device] | None
"""States go to one device, or each layer's to its own of a list of devices; None leaves them where they are."""

if TYPE_CHECKING:
    from .kept_state import KeptState


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
        """Return the length in the form in which `advance` counts it."""
        return length

    @classmethod
    def from_layers(cls, layers: Sequence[Mapping[str, torch.Tensor]], length: int) -> "VisualRWKVCache":
        """Return a cache that has read `length` tokens, with copies of such states of each layer."""
        cache = cls.__new__(cls)
        cache._start([VisualRWKVCacheLayer.from_tensors(dict(tensors)) for tensors in layers], length)
        return cache

    is_static = False
    """Whether `torch.compile` may trace what advances this cache."""
    has_graph = False
    """Whether `generate()` may record the decoding step as a graph (see `decode_graph.py`): it sets this."""

    @property
    def is_compileable(self) -> bool:
        """Whether `generate()` lets `get_compiled_call` choose how a decoding step runs."""
        return self.is_static or self.has_graph

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

    def deactivate_past_recording(self) -> None:
        """Undo `activate_past_recording()`: keep no state of earlier tokens, which `crop` could go back to."""
        for layer in self.layers:
            layer.deactivate_past_recording()

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
        caches = [state for state in states if isinstance(state, VisualRWKVCache)]
        if len(caches) < len(states):
            warn_moved("VisualRWKVCache.stack(kept states)", "KeptState.stack")
            from .kept_state import KeptState

            return KeptState.stack(states)  # type: ignore[arg-type]
        layers = stacked([cache.layer_tensors() for cache in caches])
        return cls.from_layers(layers, max(int(cache._length) for cache in caches))

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


def refuse_key_values(given: object) -> None:
    """Raise `ValueError` for a cache of transformers' attention layers."""
    if given is not None and not hasattr(given, "advance"):
        raise ValueError(
            f"past_key_values must be a KeptState or a VisualRWKVCache, got {type(given).__name__}: a "
            "recurrent state is no key-value cache. Leave it out, or make one with "
            "VisualRWKVCache(model.config)."
        )


def moved(
    layers: Sequence[Mapping[str, torch.Tensor]],
    device: Placement,
    dtype: torch.dtype | None,
) -> list[dict[str, torch.Tensor]]:
    """Return the states on `device`, tokens in `dtype` and matrices in float32; None leaves either as it is."""
    devices = device if isinstance(device, list) else [device] * len(layers)
    return [
        {
            name: tensor.to(device=place, dtype=dtype if is_token(tensor) else None)
            for name, tensor in tensors.items()
        }
        for tensors, place in zip(layers, devices, strict=True)
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

    is_static = True

    def advance(self, num_tokens: int) -> None:
        device = self.layers[0].device
        if self._length.device != device:  # a CUDA graph takes no tensor of the CPU, nor one that moves
            self._length = self._length.to(device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self._length)
        self._length.add_(num_tokens)


__all__ = ["VisualRWKVCache", "VisualRWKVStaticCache"]
