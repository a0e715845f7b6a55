"""States of earlier prompts and answers, so that one that begins alike reads only what is new."""

from collections import OrderedDict
from threading import RLock

from torch import Tensor

from .cache_visualrwkv import VisualRWKVCache


class StateStore:
    """The states used last, found by what they have read. `model.state_store = StateStore()` puts it to use.

    `generate()` then goes on from the longest beginning of its prompt that is in here, and leaves the states behind
    the last picture, the prompt and the answer. Threads may share it. It does not see a change of the model's
    weights: `clear()` it then. A copy of it, as `deepcopy(model)` makes one, is empty.

    Args:
        max_states: how many are kept; the one used longest ago goes first.
        max_bytes: how many bytes they may take together; None: no limit.

    Attributes:
        hits, misses: how often `find` found one, and how often it did not.
    """

    def __init__(self, max_states: int = 16, max_bytes: int | None = None):
        if max_states < 1:
            raise ValueError(f"max_states must be at least 1, got {max_states}.")
        self.max_states = max_states
        self.max_bytes = max_bytes
        self.hits = self.misses = 0
        self._states: OrderedDict[bytes, VisualRWKVCache] = OrderedDict()
        self._lock = RLock()

    def __reduce__(self):
        return type(self), (self.max_states, self.max_bytes)

    def __len__(self) -> int:
        return len(self._states)

    @property
    def nbytes(self) -> int:
        """Bytes that the states take."""
        with self._lock:
            return sum(state.nbytes for state in self._states.values())

    def add(self, state: VisualRWKVCache) -> None:
        """Keeps a state, as it is and not as a copy; it must be of one sample and know what it has read.

        Raises:
            ValueError: if it does not.
        """
        if len(state.contents) != 1:
            raise ValueError("Only a state of one sample that knows what it has read can be kept.")
        key = _key(state.contents[0])
        with self._lock:
            self._states[key] = state
            self._states.move_to_end(key)
            while len(self._states) > self.max_states or (
                self.max_bytes is not None and self._states and self.nbytes > self.max_bytes
            ):
                self._states.popitem(last=False)

    def find(self, contents: Tensor) -> VisualRWKVCache | None:
        """The state that has read most of the beginning of `contents` [T], or None. It is not a copy: see `copy()`."""
        wanted = _key(contents)
        with self._lock:
            for length in sorted({len(key) for key in self._states}, reverse=True):
                beginning = wanted[:length]
                if len(beginning) == length and beginning in self._states:
                    self._states.move_to_end(beginning)
                    self.hits += 1
                    return self._states[beginning]
            self.misses += 1
            return None

    def clear(self) -> None:
        """Forgets all states."""
        with self._lock:
            self._states.clear()


def _key(contents: Tensor) -> bytes:
    return contents.numpy().tobytes()


__all__ = ["StateStore"]
