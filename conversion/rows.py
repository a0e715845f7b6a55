"""Rows of the key map: names in the original and in ours, and the transform between the tensors.

In a pattern `{l}` stands for the index of a block, and `{a,b}` for one row per alternative.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor


class Transform(NamedTuple):
    """One tensor of the original as tensors of ours, and back, without loss."""

    to_ours: Callable[[Tensor], tuple[Tensor, ...]]
    to_original: Callable[..., Tensor]


class Row(NamedTuple):
    """One tensor of the original and what becomes of it.

    `ours` is empty for a tensor that no computation reads: it may be missing from a checkpoint.
    """

    original: str
    ours: tuple[str, ...]
    transform: Transform

    @property
    def is_unused(self) -> bool:
        return not self.ours


SAME = Transform(lambda x: (x,), lambda x: x)


def _alternatives(pattern: str) -> list[str]:
    """`"a.{b,c}"` -> `["a.b", "a.c"]`; a placeholder without a comma stays."""
    pieces = re.split(r"\{([^{}]*,[^{}]*)\}", pattern)
    choices = [piece.split(",") if i % 2 else [piece] for i, piece in enumerate(pieces)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def renamed_rows(original: str, ours: str | Sequence[str], transform: Transform = SAME) -> list[Row]:
    """Return rows for the alternatives of `original`, each with the same alternative of every pattern of `ours`."""
    ours = [ours] if isinstance(ours, str) else ours
    names = [_alternatives(pattern) for pattern in ours]
    return [Row(name, group, transform) for name, group in zip(_alternatives(original), zip(*names))]


def same_rows(*patterns: str) -> list[Row]:
    """Return rows of tensors that have the same name on both sides."""
    return [Row(name, (name,), SAME) for pattern in patterns for name in _alternatives(pattern)]


def unused_rows(*patterns: str) -> list[Row]:
    """Return rows of tensors that no computation reads."""
    return [Row(name, (), SAME) for pattern in patterns for name in _alternatives(pattern)]


def written_out(rows: Iterable[Row], original: str, ours: str, layers: Iterable[int] = (0,)) -> Iterator[Row]:
    """Return the rows once per layer, with the layer's index and both sides' prefixes."""
    for layer in layers:
        for row in rows:
            names = tuple(ours + name.replace("{l}", str(layer)) for name in row.ours)
            yield Row(original + row.original.replace("{l}", str(layer)), names, row.transform)


def as_unused(rows: Iterable[Row]) -> list[Row]:
    """Return the rows of the same tensors where no computation reads them."""
    return [row._replace(ours=()) for row in rows]
