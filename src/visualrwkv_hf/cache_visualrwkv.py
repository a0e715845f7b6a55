"""The recurrent state of VisualRWKV as a transformers cache: constant in size, however long the text."""

import copy
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicCache, LinearAttentionLayer
from transformers.configuration_utils import PreTrainedConfig

from .state_file import (
    SavedState,
    model_fingerprint,
    processor_fingerprint,
    read_state,
    refuse_other,
    write_state,
)

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
    """The recurrent state of all layers, and the number of tokens that it has read.

    `VisualRWKVCache(model.config)` is an empty one: `generate(..., past_key_values=cache)` advances it in place. A
    state that `model.read()`, [`~VisualRWKVCache.load`] or a [`StateStore`] gave knows what it has read: it is *kept*,
    `generate` starts from a copy of it and takes the whole chat, of which it reads what is new.

    Args:
        config: the model's configuration, or that of its language model.

    Attributes:
        contents: for each sample what it has read, int64 [T] (see [`contents.Prompt`]); empty if that is not known, as
            after a forward of the model.
        prompt: likewise, what `generate()` is about to have read; empty outside of it.
        pixel_dtype: in which the pixels were that `contents` stand for.
        fingerprint: names and values that tell model and processor; None for states that cannot be saved.
    """

    contents: Sequence[torch.Tensor] = ()
    prompt: Sequence[torch.Tensor] = ()
    pixel_dtype: torch.dtype = torch.float32
    fingerprint: dict[str, dict[str, Any]] | None = None
    _read_by: weakref.ref | None = None

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
        self.contents = ()  # whoever knows which tokens these were sets it again

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens (see [`VisualRWKVCacheLayer.crop`])."""
        super().crop(tokens_to_remove)
        self.advance(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self._length = self._zero_length()
        self.contents = ()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sample `repeats` times."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the samples `indices` [n]."""
        for layer in self.layers:
            for states in (layer.conv_states, layer.recurrent_states):
                states.update(
                    {
                        i: tensor.index_select(0, indices.to(tensor.device))
                        for i, tensor in states.items()
                        if tensor is not None
                    }
                )
        self.contents = rows_of(self.contents, indices)
        self.prompt = rows_of(self.prompt, indices)

    # --- a state as a thing one can hold --------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """Number of samples; 0 if nothing was read. (`len()` is the number of layers, as in any cache.)"""
        tensors = self.layers[0].tensors()
        return len(tensors[WKV]) if tensors else len(self.contents)

    @property
    def nbytes(self) -> int:
        """Bytes that the states take, whatever they have read."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors().values())

    def copy(self) -> "VisualRWKVCache":
        """Another state that has read the same: a branch. A record of the past is not copied."""
        return self._mapped(lambda name, tensor: tensor)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "VisualRWKVCache":
        """A copy on `device` for a model of `dtype`. The recurrence's state keeps its float32."""
        return self._mapped(
            lambda name, tensor: tensor.to(device=device, dtype=None if name == WKV else dtype)
        )

    def __getitem__(self, index: int) -> "VisualRWKVCache":
        """A copy of one sample's state.

        Raises:
            IndexError: there is no such sample.
        """
        if not -self.batch_size <= index < self.batch_size:
            raise IndexError(f"The state has {self.batch_size} samples, asked for {index}.")
        index %= self.batch_size
        one = self._mapped(lambda name, tensor: tensor[index : index + 1])
        one.contents = rows_of(self.contents, torch.tensor([index]))
        if one.contents:
            one._length = len(one.contents[0])
        return one

    @classmethod
    def stack(cls, states: Sequence["VisualRWKVCache"]) -> "VisualRWKVCache":
        """One state of all samples of several: a batch. They may have read more or less.

        Raises:
            ValueError: states of different models or dtypes, or none.
        """
        if not states:
            raise ValueError("stack() needs at least one state.")
        if len(dtypes := {str(state.pixel_dtype) for state in states}) > 1:
            raise ValueError(f"Only states of one dtype can be stacked, got {sorted(dtypes)}.")
        shapes = {state._shapes() for state in states}
        if len(shapes) > 1:
            raise ValueError(
                f"Only states of one model can be stacked, got states of shapes {sorted(shapes)}."
            )
        for state in states[1:]:
            if state.fingerprint and states[0].fingerprint:
                refuse_other("A state", state.fingerprint["model"], states[0].fingerprint["model"], "model")
        stacked = states[0]._rebuilt(
            [
                {name: torch.cat([layer.tensors()[name] for layer in layers]) for name in layers[0].tensors()}
                for layers in zip(*(state.layers for state in states))
            ]
        )
        stacked._length = max(state._length for state in states)
        known = all(state.contents for state in states)
        stacked.contents = [row for state in states for row in state.contents] if known else ()
        return stacked

    def save(self, path: str | os.PathLike) -> None:
        """Writes the state as safetensors, with what it has read and the fingerprint of its model and processor.

        The file appears whole or not at all.

        Raises:
            ValueError: `model.read()` has not made this state, so that nobody could tell what it belongs to.
        """
        if self.fingerprint is None or not self.contents:
            raise ValueError(
                "Only a state that model.read(processor, messages) made can be saved: no other knows its model, its "
                "processor and what it has read."
            )
        layers = [layer.tensors() for layer in self.layers]
        write_state(path, SavedState(layers, self.contents, self.pixel_dtype, self.fingerprint))

    @classmethod
    def load(cls, path: str | os.PathLike, model=None, processor=None) -> "VisualRWKVCache":
        """A state that was saved; with `model` where that is, and in its dtype.

        Args:
            path: the file.
            model: the model that it is for. Without it that is looked at when `generate` first gets the state.
            processor: the processor that it is for, if that is to be looked at.

        Raises:
            ValueError: the file is no whole state, or one of another model or processor: it says what differs.
            OSError: the file cannot be read.
        """
        saved = read_state(path)
        state = cls.__new__(cls)
        super(DynamicCache, state).__init__(layers=[VisualRWKVCacheLayer() for _ in saved.layers])
        state._length = max(map(len, saved.contents))
        state = state._rebuilt(saved.layers)
        state.contents, state.pixel_dtype = saved.contents, saved.pixel_dtype
        state.fingerprint = saved.fingerprint
        if processor is not None:
            ours = processor_fingerprint(processor)
            refuse_other(str(path), saved.fingerprint["processor"], ours, "processor")
        if model is None:
            return state
        state.refuse_other_model(model, str(path))
        return state.to(model.device, model.dtype)

    def set_fingerprint(self, model: torch.nn.Module, processor) -> None:
        """Says that these have read this state, as it is needed to save it."""
        self.fingerprint = {
            "model": model_fingerprint(model),
            "processor": processor_fingerprint(processor),
        }
        self._read_by = weakref.ref(model)

    def refuse_other_model(self, model: torch.nn.Module, name: str = "The state") -> None:
        """Raises `ValueError` saying what differs if another model has read this state. Plain states know none."""
        if self.fingerprint is None or (self._read_by is not None and self._read_by() is model):
            return
        refuse_other(name, self.fingerprint["model"], model_fingerprint(model), "model")
        self._read_by = weakref.ref(model)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_read_by"}

    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of one sample's states in each layer."""
        return tuple(tuple(t.shape[1:]) for layer in self.layers for t in layer.tensors().values())

    def _mapped(self, function: Callable[[str, torch.Tensor], torch.Tensor]) -> "VisualRWKVCache":
        """A copy whose tensors are `function(name, tensor)`."""
        layers = [
            {name: function(name, tensor) for name, tensor in layer.tensors().items()}
            for layer in self.layers
        ]
        return self._rebuilt(layers)

    def _rebuilt(self, layers: Sequence[dict[str, torch.Tensor]]) -> "VisualRWKVCache":
        """As this one, with copies of other states."""
        rebuilt = copy.copy(self)
        rebuilt._read_by = self._read_by
        rebuilt.layers = [VisualRWKVCacheLayer.from_tensors(tensors) for tensors in layers]
        rebuilt._length = copy.deepcopy(self._length)
        return rebuilt


def rows_of(rows: Sequence[torch.Tensor], indices: torch.Tensor) -> Sequence[torch.Tensor]:
    """Those of `rows`, if there are any."""
    return [rows[index] for index in indices.tolist()] if rows else ()


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
        self.contents = ()


__all__ = ["VisualRWKVCache", "VisualRWKVStaticCache"]
