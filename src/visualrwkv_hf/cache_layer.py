"""The state of one block as a layer of a transformers cache, with a record of the past that can be taken back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from .layer_state import LayerState, StateUpdate, is_token


class _Step(NamedTuple):
    """What one forward pass did to one state; kept only while the past is recorded."""

    length: int
    before: Tensor | None
    after: Callable[[int, Tensor | None], Tensor]  # see `StateUpdate.after`


class _Place(NamedTuple):
    """Where a state is kept: `conv_states[number]` as [B, C, 1] if it is a token, else `recurrent_states[number]`."""

    is_token: bool
    number: int


class VisualRWKVCacheLayer(LinearAttentionLayer):
    """The states of one block for B samples: holds a `LayerState` between forward passes.

    The tensors are kept where transformers' linear attention layers keep theirs, are written in place and keep their
    address, so that beam search, resetting and CUDA graphs work unchanged.
    """

    is_croppable = True

    def __init__(self, **kwargs):
        super().__init__(number_of_states=1)
        self.places: dict[str, _Place] = {}
        self.history: dict[str, list[_Step]] = {}

    def state(self) -> LayerState:
        """Return the state that the block continues from; its tensors are the layer's own."""
        return LayerState(self.tensors(), record_past=self.record_past)

    def update(self, num_tokens: int, updates: Mapping[str, StateUpdate]) -> None:
        """Keep what a step of `num_tokens` tokens made of the states."""
        if self.record_past:
            before = {name: tensor.clone() for name, tensor in self.tensors().items()}
            for name, update in updates.items():
                assert update.after is not None, "the block was told to record the past"
                step = _Step(num_tokens, before.get(name), update.after)
                self.history.setdefault(name, []).append(step)
        for name, update in updates.items():
            self._write(name, update.value)
        self._set_presence(True)

    def tensors(self) -> dict[str, Tensor]:
        """Return the states by name: tokens [B, C] and matrices [B, H, K, V]; empty before the first token."""
        places = sorted(self.places.items()) if self._is_present() else []
        return {name: self._read(place) for name, place in places}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> VisualRWKVCacheLayer:
        """Return a layer with copies of these states, without a record of the past."""
        layer = cls()
        if tensors:
            layer.update(0, {name: StateUpdate(tensor) for name, tensor in tensors.items()})
        return layer

    @torch.no_grad()
    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens and forget the record; 0 only forgets it.

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
        remove = -tokens_to_remove
        rewound = {name: self._rewound(name, remove) for name in self.history} if remove else {}
        self.history.clear()
        for name, state in rewound.items():
            if state is None:
                self._read(self.places[name]).zero_()
                self._set_presence(False)
            else:
                self._write(name, state)

    def _rewound(self, name: str, remove: int) -> Tensor | None:
        """Return the state `name` as it was `remove` tokens ago; None at the start of the text."""
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

    def deactivate_past_recording(self) -> None:
        """Record no more tokens that could be taken back, and forget those that are recorded."""
        self.record_past = False
        self.history.clear()

    def reset(self) -> None:
        """Forget what was read; the tensors keep their address."""
        super().reset()
        self.history.clear()

    def _is_present(self) -> bool:
        return self.has_previous_state[0]

    def _set_presence(self, present: bool) -> None:
        for index in self.has_previous_state:
            self.has_previous_state[index] = present

    def _read(self, place: _Place) -> Tensor:
        return (
            self.conv_states[place.number][..., 0] if place.is_token else self.recurrent_states[place.number]
        )

    def _write(self, name: str, value: Tensor) -> None:
        if name not in self.places:
            self.places[name] = self._make_place(value)
        own = self._read(self.places[name])
        if value is not own:  # a kernel may have written the state in place
            own.copy_(value)

    def _make_place(self, value: Tensor) -> _Place:
        place = _Place(is_token(value), sum(p.is_token == is_token(value) for p in self.places.values()))
        if place.number >= self.number_of_states:
            self._add_index()
        if place.is_token:
            self.lazy_initialization(conv_states=value[..., None], state_idx=place.number)
        else:
            self.lazy_initialization(recurrent_states=value, state_idx=place.number)
        return place

    def _add_index(self) -> None:
        """Make room for another pair of a token and a matrix, in transformers' terms."""
        index = self.number_of_states
        self.number_of_states += 1
        self.conv_states[index] = self.recurrent_states[index] = None
        self.is_conv_states_initialized[index] = self.is_recurrent_states_initialized[index] = False
        self.has_previous_state[index] = self.has_previous_state[0]
        self.conv_kernel_size[index] = None
