"""A state that is kept: frozen, aware of what it has read, and good for any number of continuations."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from .cache_visualrwkv import (
    Placement,
    VisualRWKVCache,
    batch_size_of,
    moved,
    sample_of,
    stacked,
    warn_moved,
)
from .placement import block_devices
from .prompt_identity import PromptIdentity
from .state_file import (
    MAX_BYTES,
    SavedState,
    model_fingerprint,
    processor_fingerprint,
    read_state,
    refuse_other,
    refuse_other_shapes,
    write_state,
)


@dataclass(frozen=True, eq=False)
class KeptState:
    """The state after a prompt. `model.read()`, [`~KeptState.load`] and a [`StateStore`] give one; nothing changes it.

    `generate(**inputs_of_the_whole_chat, past_key_values=kept)` checks that the inputs begin with what was read, and
    continues from a copy. Any number of threads may use one state at once.

    Attributes:
        layers: for each layer its states by name: the last tokens [B, C] that its token shifts have read
            (`token_shift0` of the time mix, `token_shift1` of the channel mix), and `wkv` [B, H, K, V] in float32.
        prompts: for each sample what it has read.
        pixel_dtype: the dtype of the pixels from which the hashes of its pictures were made.
        fingerprint: names and values that identify model and processor, and the tuned states with which the samples
            began if there were any; None if no processor was involved, as for the states that `generate()` leaves in a
            store.
    """

    layers: Sequence[Mapping[str, Tensor]]
    prompts: Sequence[PromptIdentity]
    pixel_dtype: torch.dtype = torch.float32
    fingerprint: Mapping[str, Mapping[str, Any]] | None = None
    _known_models: WeakSet = field(default_factory=WeakSet, repr=False)
    """Models that were found to be the one of the fingerprint; comparing looks at every weight."""

    @classmethod
    def of(
        cls, cache: VisualRWKVCache, prompts: Sequence[PromptIdentity], pixel_dtype: torch.dtype
    ) -> "KeptState":
        """Return a copy of what `cache` holds after `prompts`, one for each sample."""
        return cls(
            [{name: tensor.clone() for name, tensor in tensors.items()} for tensors in cache.layer_tensors()],
            tuple(prompts),
            pixel_dtype,
        )

    # --- what it is -----------------------------------------------------------------------------------

    @property
    def read_ids(self) -> list[Tensor]:
        """For each sample what it has read, int64 [T]: token ids, and a negative number at the tokens of a picture."""
        return [prompt.ids for prompt in self.prompts]

    @property
    def contents(self) -> list[Tensor]:
        """Deprecated: `read_ids`."""
        warn_moved("KeptState.contents", "KeptState.read_ids")
        return self.read_ids

    @property
    def batch_size(self) -> int:
        """The number of samples."""
        return batch_size_of(self.layers)

    @property
    def nbytes(self) -> int:
        """The number of bytes that the states take, however much they have read."""
        return sum(tensor.nbytes for tensors in self.layers for tensor in tensors.values())

    def get_seq_length(self) -> int:
        """Return the number of tokens read; of several samples the largest."""
        return max(prompt.length for prompt in self.prompts)

    # --- copies ---------------------------------------------------------------------------------------

    def to_cache(self, device: Placement = None, dtype: torch.dtype | None = None) -> VisualRWKVCache:
        """Return a cache that continues from here: on `device`, or on one for each layer, for a model of `dtype`."""
        return VisualRWKVCache.from_layers(moved(self.layers, device, dtype), self.get_seq_length())

    def copy(self) -> "KeptState":
        """Return another state that has read the same. Both may share tensors, since nothing changes them."""
        return replace(self)

    def to(self, device: Placement = None, dtype: torch.dtype | None = None) -> "KeptState":
        """Return this state on `device`, or on one for each layer, for a model of `dtype`.

        The WKV states stay in float32.
        """
        return replace(self, layers=moved(self.layers, device, dtype))

    def __getitem__(self, index: int) -> "KeptState":
        """Return one sample of a batch.

        Raises:
            IndexError: there is no such sample.
        """
        layers = sample_of(self.layers, index)
        copies = [{name: tensor.clone() for name, tensor in tensors.items()} for tensors in layers]
        one = replace(self, layers=copies, prompts=(self.prompts[index],))
        return one._begun_with([self.beginnings[index]])

    @classmethod
    def stack(cls, states: Sequence["KeptState"]) -> "KeptState":
        """Return one state with the samples of several, which may have read more or less.

        Raises:
            ValueError: no state is given, or states of different models or dtypes.
        """
        if len(dtypes := {str(state.pixel_dtype) for state in states}) > 1:
            raise ValueError(f"Only states of one dtype can be stacked, got {sorted(dtypes)}.")
        layers = stacked([state.layers for state in states])
        for state in states[1:]:
            if state.fingerprint and states[0].fingerprint:
                refuse_other("A state", state.fingerprint["model"], states[0].fingerprint["model"], "model")
        prompts = [prompt for state in states for prompt in state.prompts]
        stack = replace(states[0], layers=layers, prompts=tuple(prompts))
        return stack._begun_with([beginning for state in states for beginning in state.beginnings])

    # --- whose it is ----------------------------------------------------------------------------------

    @property
    def beginnings(self) -> Sequence[str | None]:
        """For each sample the identity of the tuned state with which it began; None for zeros, or if unknown."""
        identities = (self.fingerprint or {}).get("tuned_state", {}).get("identities")
        return identities or [None] * len(self.prompts)

    def _begun_with(self, beginnings: Sequence[str | None]) -> "KeptState":
        """Return this state with these `beginnings` in its fingerprint, if it has one."""
        if self.fingerprint is None:
            return self
        fingerprint = {name: part for name, part in self.fingerprint.items() if name != "tuned_state"}
        if any(beginnings):
            fingerprint["tuned_state"] = {"identities": [*beginnings]}
        return replace(self, fingerprint=fingerprint)

    def identified(self, model: nn.Module, processor, beginnings: Sequence[str | None] = ()) -> "KeptState":
        """Return this state with the fingerprints of the model and processor that have read it.

        Args:
            model: the model.
            processor: the processor.
            beginnings: for each sample the identity of the tuned state with which it began.
        """
        fingerprint = {"model": model_fingerprint(model), "processor": processor_fingerprint(processor)}
        named = replace(self, fingerprint=fingerprint, _known_models=WeakSet([model]))
        return named._begun_with(beginnings)

    def refuse_other_model(self, model: nn.Module, name: str = "The state") -> None:
        """Raise `ValueError` that names the differences if another model has read this state."""
        if model in self._known_models:
            return
        if self.fingerprint is not None:
            refuse_other(name, self.fingerprint["model"], model_fingerprint(model), "model")
        refuse_other_shapes(name, self.layers, model.config)
        self._known_models.add(model)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_known_models"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _known_models=WeakSet())

    # --- files ----------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write the state as safetensors, with what it has read and the fingerprints of its model and processor.

        The file is replaced in one step: whatever happens, there is the old one or the new one, whole.

        Raises:
            ValueError: `model.read()` has not made this state, so that its model and processor are not known.
            OSError: the file cannot be written.
        """
        if self.fingerprint is None:
            raise ValueError(
                "Only a state that model.read(processor, messages) made can be saved: of others the processor is not "
                "known."
            )
        write_state(path, SavedState(self.layers, self.prompts, self.pixel_dtype, self.fingerprint))

    @classmethod
    def load(
        cls, path: str | os.PathLike, model=None, processor=None, max_bytes: int = MAX_BYTES
    ) -> "KeptState":
        """Read a state that was saved; with `model` onto its devices and in its dtype.

        Args:
            path: the file.
            model: the model that the state is for. Without it this is checked when `generate` first gets the state.
            processor: the processor that the state is for; without it the processor is not checked.
            max_bytes: the largest file that is read.

        Raises:
            ValueError: the file is no whole state, or belongs to another model or processor; the message says what
                is wrong or what differs.
            OSError: the file cannot be read.
        """
        saved = read_state(path, max_bytes)
        state = cls(saved.layers, saved.prompts, saved.pixel_dtype, saved.fingerprint)
        if processor is not None:
            ours = processor_fingerprint(processor)
            refuse_other(str(path), saved.fingerprint["processor"], ours, "processor")
        if model is None:
            return state
        state.refuse_other_model(model, str(path))
        return state.to(block_devices(model), model.dtype)


def is_kept(state: object) -> bool:
    """Return whether this is a `KeptState`: the package's own, or that of a model with remote code."""
    return hasattr(state, "to_cache")


__all__ = ["KeptState"]
