"""In which order each layer reads the patches of a picture: pure functions and one table.

A recurrent model reads a picture as a line. VisualRWKV (arXiv 2406.13362, "2D Image Scanning") lets its
layers read it along different lines in turn: layer l takes direction l mod D of its scan. A permutation
says which patch is read when: position p of the line is patch order[p], row by row from the top left; after
the layer it is undone. Letters: B batch, T time, D distinct directions of a scan, L patches of a picture.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def raster(height: int, width: int) -> list[int]:
    """Row by row: the order in which the patches come."""
    return list(range(height * width))


def raster_reversed(height: int, width: int) -> list[int]:
    """From the last patch to the first."""
    return raster(height, width)[::-1]


def columns(height: int, width: int) -> list[int]:
    """Column by column, each from the top."""
    return [row * width + column for column in range(width) for row in range(height)]


def columns_reversed(height: int, width: int) -> list[int]:
    """Column by column from the right, each from the bottom."""
    return columns(height, width)[::-1]


def snake(height: int, width: int) -> list[int]:
    """Row by row, every other row from the right: neighbours in the line are neighbours in the picture."""
    rows = [list(range(row * width, (row + 1) * width)) for row in range(height)]
    return [patch for row, patches in enumerate(rows) for patch in (patches[::-1] if row % 2 else patches)]


def spiral(height: int, width: int) -> list[int]:
    """Clockwise from the top left inwards."""
    rows = [list(range(row * width, (row + 1) * width)) for row in range(height)]
    order: list[int] = []
    while rows:
        order += rows.pop(0)
        rows = [list(column) for column in zip(*rows)][::-1]  # the rest, turned: its right comes on top
    return order


def zigzag(height: int, width: int) -> list[int]:
    """Diagonal by diagonal from the top left, by turns up to the right and down to the left."""
    order: list[int] = []
    for diagonal in range(height + width - 1):
        down = range(max(0, diagonal - width + 1), min(diagonal, height - 1) + 1)
        order += [row * width + diagonal - row for row in (down if diagonal % 2 else reversed(down))]
    return order


SCANS: dict[str, tuple[Callable[[int, int], list[int]], ...]] = {
    "unidirectional": (raster,),
    "bidirectional": (raster, raster_reversed),
    "multidirectional": (raster, raster_reversed, columns, columns_reversed),
    "snake": (snake,),
    "spiral": (spiral,),
    "zigzag": (zigzag,),
}
"""Name of a scan -> its distinct directions, (height, width) -> order. Layer l takes direction l mod D."""


def directions_of(scan: str) -> tuple[Callable[[int, int], list[int]], ...]:
    """Return the directions of a scan.

    Raises:
        ValueError: an unknown name.
    """
    if scan in SCANS:
        return SCANS[scan]
    known = ", ".join(SCANS)
    if scan == "rotation":
        raise ValueError(
            "Scan 'rotation' is left out on purpose: the original code rotates the samples of a batch, not "
            f"the patches of a picture: it equals 'unidirectional', or mixes samples. Known: {known}."
        )
    raise ValueError(f"Unknown scan {scan!r}. Known: {known}.")


def num_directions(scan: str) -> int:
    """D, how many distinct directions the layers of a scan take in turn."""
    return len(directions_of(scan))


def is_identity(scan: str, direction: int) -> bool:
    """Return whether a layer in this direction (taken mod D) reads the patches in raster order, without permutation."""
    directions = directions_of(scan)
    return directions[direction % len(directions)] is raster


def grid_permutation(scan: str, direction: int, height: int, width: int) -> Tensor:
    """Which patch of a height x width grid is read when, int64 [L].

    Args:
        scan: a name of `SCANS`.
        direction: which of its directions, taken mod D: a layer's number will do.
        height: rows of the grid, in patches.
        width: columns of the grid, in patches.

    Raises:
        ValueError: an unknown scan, or a grid without patches.
    """
    directions = directions_of(scan)
    if height < 1 or width < 1:
        raise ValueError(f"A grid has at least one row and one column, got {height} x {width}.")
    return torch.tensor(directions[direction % len(directions)](height, width))


def sequence_orders(
    image_mask: Tensor, scan: str, height: int, width: int, leading: int = 0, trailing: int = 0
) -> Tensor:
    """Which position of a sequence with pictures is read when, in every direction of a scan.

    Each picture is a span of leading + height * width + trailing places. Only its patches move; class tokens
    before and after them, and all text, stay. Pictures may follow one another without text between.

    Args:
        image_mask: where the sequences have a place of a picture, bool [B, T].
        scan: a name of `SCANS`.
        height: rows of a picture, in patches.
        width: columns of a picture, in patches.
        leading: places of a picture before its patches.
        trailing: places of a picture after its patches.

    Returns:
        int64 [B, D, T]: position p is read from position order[b, d, p], in layers l with l mod D = d.

    Raises:
        ValueError: an unknown scan, a grid without patches, or places that are not whole pictures.
    """
    length = leading + height * width + trailing
    span = torch.arange(length).repeat(num_directions(scan), 1)  # [D, length]
    for direction, order in enumerate(span):
        patches = grid_permutation(scan, direction, height, width)
        order[leading : leading + height * width] = leading + patches
    span = span.to(image_mask.device)

    position = torch.arange(image_mask.shape[1], device=image_mask.device).expand(image_mask.shape)  # [B, T]
    last_text = torch.where(image_mask, -1, position).cummax(1).values
    nth = position - last_text - 1  # of its run of places; -1 for text, whose last one is itself
    offset = nth % length  # within its picture
    _refuse_parts(image_mask, nth, length)
    moved = (position - offset)[:, None] + span[:, offset].transpose(0, 1)  # [B, D, T]
    return torch.where(image_mask[:, None], moved, position[:, None])


def _refuse_parts(image_mask: Tensor, nth: Tensor, length: int) -> None:
    if torch.compiler.is_compiling() or image_mask.is_meta:
        return  # the values are not known
    ends = image_mask & ~torch.nn.functional.pad(image_mask[:, 1:], (0, 1))
    partial = ends & ((nth + 1) % length != 0)
    if partial.any():
        row, end = partial.nonzero()[0].tolist()
        found = int(nth[row, end]) + 1
        raise ValueError(
            f"Sequence {row} has a run of {found} picture tokens that ends at position {end}, but a picture "
            f"takes {length}. They must lie whole in one forward, since some layers read the last one first: "
            "do not cut a picture when truncating or prefilling in chunks."
        )


def inverse_order(order: Tensor) -> Tensor:
    """Return the inverse permutation, of the same shape: `order` followed by its inverse changes nothing.

    Args:
        order: permutations of 0..T-1, int64 [..., T].
    """
    position = torch.arange(order.shape[-1], device=order.device).expand(order.shape)
    return torch.empty_like(order).scatter_(-1, order, position)
