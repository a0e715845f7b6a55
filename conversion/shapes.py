"""Read sizes off the shapes of a checkpoint's tensors."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import ConversionError

Shapes = Mapping[str, Sequence[int]]

HEAD_DIMS = {1152: 72}
"""Size of a vision encoder's head by its width: 72 in the so400m shape, else 64."""


def shape_of(shapes: Shapes, name: str, dims: int) -> list[int]:
    """Return the shape of a tensor of `dims` dimensions. Raises `ConversionError` if there is no such tensor."""
    if name not in shapes:
        raise ConversionError(f"Missing tensor {name}: the configuration cannot be told without it.")
    shape = list(shapes[name])
    if len(shape) != dims:
        raise ConversionError(f"Tensor {name} has shape {shape}: it must have {dims} dimensions.")
    return shape


def num_blocks(shapes: Shapes, prefix: str) -> int:
    """Return the number of blocks below `prefix`, which is followed by the block's index."""
    found = {int(m[1]) for name in shapes if (m := re.match(rf"{re.escape(prefix)}(\d+)\.", name))}
    if not found:
        raise ConversionError(f"Missing tensors {prefix}0.*: there is no block.")
    return max(found) + 1


def side_of(num_positions: int, name: str) -> int:
    """Return the side of a square grid of so many patches."""
    side = math.isqrt(num_positions)
    if side**2 != num_positions:
        raise ConversionError(f"{name} has {num_positions} positions of patches, which is not a square.")
    return side


def num_heads_of(width: int, given: Mapping[str, Any], field: str) -> int:
    """Return the number of heads that is given, or the one that is usual for the width."""
    if "num_attention_heads" in given:
        return given["num_attention_heads"]
    head_dim = HEAD_DIMS.get(width, 64)
    if width % head_dim:
        raise ConversionError(
            f"The number of heads of an encoder of width {width} is not in its shapes: "
            f"give vision_config.{field}.num_attention_heads."
        )
    return width // head_dim
