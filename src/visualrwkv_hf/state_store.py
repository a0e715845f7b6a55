"""States of earlier prompts and answers, so that a prompt that begins like one of them reads only what is new."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import count
from threading import RLock
from weakref import WeakKeyDictionary

from torch import Tensor

from .kept_state import KeptState
from .prompt_identity import PromptIdentity


class StateStore:
    """The most recently used states, found by what they have read. `model.state_store = StateStore()` turns it on.

    `generate()` then continues from the stored state that has read the longest beginning of its prompt, and stores the
    states after the last picture, after the prompt and after the answer. Threads may share a store. A store does not
    notice when the model's weights or its active adapters change: call `clear()` then. States of several models that
    share a store are kept apart. A copy of a store, as `deepcopy(model)` makes one, is empty.

    A server with several clients gives each its own part, so that no client can tell from the time of an answer
    whether another one has sent the same picture or text before:

    ```python
    store = StateStore(max_states=64)
    model.generate(**inputs, state_store=store.scoped(api_key))
    ```

    Args:
        max_states: how many states are kept; the least recently used one is dropped first.
        max_bytes: how many bytes the states may take together; None means no limit.

    Attributes:
        scope: the part of the store in which `find` looks and `add` stores: the names given to `scoped`, and what tells
            apart several models and beginnings; empty for a store that was made directly.
        hits: how often `find` found a state, in all scopes together.
        misses: how often it found none.
    """

    def __init__(self, max_states: int = 16, max_bytes: int | None = None):
        if max_states < 1:
            raise ValueError(f"max_states must be at least 1, got {max_states}.")
        self.scope: Scope = ()
        self._shelf = _Shelf(max_states, max_bytes)

    def scoped(self, scope: str) -> "StateStore":
        """Return a view of this store that finds only what was added under the same `scope`, e.g. a client's key.

        A view of a view is a part of it. All share the limits: the least recently used state is dropped first.

        Raises:
            ValueError: `scope` is empty.
        """
        if not scope:
            raise ValueError("scoped() needs a name that is not empty, for example the key of a client.")
        return self._part(scope)

    def _part(self, name: "str | int | bytes") -> "StateStore":
        view = type(self).__new__(type(self))
        view.scope, view._shelf = (*self.scope, name), self._shelf
        return view

    def __reduce__(self):
        return type(self), (self.max_states, self.max_bytes)

    def __len__(self) -> int:
        return len(self._shelf.states)

    def of_model(self, model: object) -> "StateStore":
        """Return the part of this store that is for a model: the store itself for the first one that uses it."""
        with self._shelf.lock:
            if (number := self._shelf.models.get(model)) is None:
                number = self._shelf.models[model] = next(self._shelf.numbers)
        return self._part(number) if number else self

    def of_beginning(self, identity: str) -> "StateStore":
        """Return the part of this store for states that began with the tuned states of this identity."""
        return self._part(identity.encode())

    @property
    def max_states(self) -> int:
        return self._shelf.max_states

    @property
    def max_bytes(self) -> int | None:
        return self._shelf.max_bytes

    @property
    def hits(self) -> int:
        return self._shelf.hits

    @property
    def misses(self) -> int:
        return self._shelf.misses

    @property
    def nbytes(self) -> int:
        """Bytes that the states of all scopes take."""
        with self._shelf.lock:
            return self._shelf.nbytes

    def add(self, state: KeptState) -> None:
        """Store a state of one sample.

        Raises:
            ValueError: the state is of several samples, or is a cache that does not know what it has read.
        """
        prompts: Sequence[PromptIdentity] = getattr(state, "prompts", ())
        if len(prompts) != 1:
            raise ValueError("Only a state of one sample that knows what it has read can be kept.")
        length = prompts[0].length
        key = (self.scope, length, prompts[0].digests([length])[length])
        with self._shelf.lock:
            self._shelf.put(key, state)

    def find(self, prompt: PromptIdentity | Tensor) -> KeptState | None:
        """Return the state that has read the longest beginning of `prompt`, or None.

        Args:
            prompt: what is to be read; for text also its token ids alone, int64 [T].
        """
        prompt, shelf = PromptIdentity(prompt) if isinstance(prompt, Tensor) else prompt, self._shelf
        with shelf.lock:
            lengths = {key[1] for key in shelf.states if key[0] == self.scope}
            for length, digest in sorted(prompt.digests(lengths).items(), reverse=True):
                if (key := (self.scope, length, digest)) in shelf.states:
                    shelf.states.move_to_end(key)
                    shelf.hits += 1
                    return shelf.states[key]
            shelf.misses += 1
            return None

    def clear(self) -> None:
        """Drop all states; a view drops those of its scope, of all models and beginnings."""
        with self._shelf.lock:
            for key in [key for key in self._shelf.states if key[0][: len(self.scope)] == self.scope]:
                del self._shelf.states[key]


Scope = tuple[str | int | bytes, ...]
"""Parts of parts of a store: names from `scoped`, numbers of models, and identities of beginnings in bytes. Their types
differ, so that no name that a client chooses is another part's."""

Key = tuple[Scope, int, bytes]
"""Scope, number of tokens read, and SHA-256 of what was read: all token ids and the full hashes of all pictures."""


class _Shelf:
    """What the views of a store share. Whoever uses it holds `lock`."""

    def __init__(self, max_states: int, max_bytes: int | None):
        self.max_states, self.max_bytes = max_states, max_bytes
        self.states: OrderedDict[Key, KeptState] = OrderedDict()
        self.hits = self.misses = 0
        self.models: WeakKeyDictionary[object, int] = WeakKeyDictionary()
        self.numbers = count()
        self.lock = RLock()

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self.states.values())

    def put(self, key: Key, state: KeptState) -> None:
        self.states[key] = state
        self.states.move_to_end(key)
        while len(self.states) > self.max_states or (
            self.max_bytes is not None and self.states and self.nbytes > self.max_bytes
        ):
            self.states.popitem(last=False)


__all__ = ["StateStore"]
