"""The recurrent state of one layer as plain tensors, and what a forward pass makes of it.

Letters: S sequences (the rows of a batch, or the sequences packed into one row), N slots of a pool, C hidden size,
H heads, K = V size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

TIME_MIX_SHIFT, CHANNEL_MIX_SHIFT, WKV = "token_shift0", "token_shift1", "wkv"
"""Names of the states that every released generation has: the last token that each token shift saw [S, C] in the
model's dtype, and one matrix per head [S, H, K, V] in float32. Saved states bear these names."""


class StateSpec(NamedTuple):
    """One state of a layer.

    Attributes:
        name: key of the state in `LayerState.tensors`.
        sizes: fields or properties of `VisualRWKVTextConfig` that give its shape for one sequence. A state of one
            dimension is a token and has the model's dtype; one of more dimensions is float32.
    """

    name: str
    sizes: tuple[str, ...]

    def shape(self, config: object) -> tuple[int, ...]:
        """Return the shape for one sequence of a model with this text configuration."""
        return tuple(getattr(config, size) for size in self.sizes)


class LayerState(NamedTuple):
    """What one layer remembers of the tokens that S sequences have read.

    Attributes:
        tensors: the states by name, each [S, ...]. Empty at the start of a text, where every state is zero.
        indices: int64 [S], distinct. If given, `tensors` are pools [N, ...] and sequence s uses slot `indices[s]`.
        record_past: whether the layer must also say how to take tokens back (see `StateUpdate.after`). Ops that
            write the state in place are not used then.
    """

    tensors: Mapping[str, Tensor]
    indices: Tensor | None = None
    record_past: bool = False

    def get(self, name: str) -> Tensor | None:
        """Return a state [S, ...], gathered if it lies in a pool; None at the start of a text."""
        tensor = self.tensors.get(name)
        return tensor if tensor is None or self.indices is None else tensor.index_select(0, self.indices)

    def updated(self, updates: Mapping[str, StateUpdate]) -> LayerState:
        """Return the state after a step. Pools are written in place, at `indices` only.

        A state without an update was written in place by the block.
        """
        if self.indices is None:
            values = {name: update.value for name, update in updates.items()}
            return self._replace(tensors={**self.tensors, **values})
        for name, update in updates.items():
            self.tensors[name].index_copy_(0, self.indices, update.value.to(self.tensors[name].dtype))
        return self


class StateUpdate(NamedTuple):
    """What a step of T tokens made of one state.

    Attributes:
        value: the state after the last token, [S, ...].
        after: `after(n, before)` computes the state after the first n of the T tokens from the state before them
            (None: the start of the text). Only present if `LayerState.record_past`.
    """

    value: Tensor
    after: Callable[[int, Tensor | None], Tensor] | None = None


class StateHolder(Protocol):
    """Whatever keeps the state of one layer between forward passes."""

    def state(self) -> LayerState:
        """Return the state that the layer continues from."""

    def update(self, num_tokens: int, updates: Mapping[str, StateUpdate]) -> None:
        """Keep what a step of `num_tokens` tokens made of the state."""


class PlainStateHolder:
    """Holds a `LayerState` as it is; for graphs and engines that manage the tensors themselves."""

    def __init__(self, state: LayerState):
        self._state = state

    def state(self) -> LayerState:
        return self._state

    def update(self, num_tokens: int, updates: Mapping[str, StateUpdate]) -> None:
        self._state = self._state.updated(updates)


def is_token(tensor: Tensor) -> bool:
    """Return whether a state [S, ...] is a token, which has the model's dtype, and not float32."""
    return tensor.dim() == 2


def empty_pool(
    specs: tuple[StateSpec, ...], config: object, slots: int, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """Return zeroed pools [N, ...] for one layer, as `LayerState.tensors` takes them with `indices`.

    Args:
        specs: the states of the generation (`GENERATIONS[version].states`).
        config: the text configuration.
        slots: N.
        dtype: the model's.
        device: the layer's.
    """
    shapes = {spec.name: (slots, *spec.shape(config)) for spec in specs}
    return {
        name: torch.zeros(shape, dtype=dtype if len(shape) == 2 else torch.float32, device=device)
        for name, shape in shapes.items()
    }
