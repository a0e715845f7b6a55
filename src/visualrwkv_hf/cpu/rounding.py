"""Weights rounded to few bits: integers and the scales that multiply them, W = scale Q.

`accelerate_on_cpu` rounds weights in memory and conversion rounds them in files, by the same functions, so that both
compute the same numbers.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

PANEL_WEIGHTS = 1 << 22
"""Weights that are brought to float32 at a time, so that no second copy of a large weight is in memory."""


class Rounded(NamedTuple):
    """A weight of few bits.

    Attributes:
        integers: Q, int8 [out, in].
        scale: [out, in / group] in `scale_dtype` of the weight's; `group` neighbours of a row share one.
        bits: how many bits an integer takes: -2^(bits - 1) <= Q < 2^(bits - 1).
    """

    integers: Tensor
    scale: Tensor
    bits: int

    def widened(self) -> Tensor:
        """Return W in float32, [out, in]."""
        groups = self.integers.float().unflatten(1, (self.scale.shape[1], -1))
        return (groups * self.scale[..., None].float()).flatten(1)


class Rounding(NamedTuple):
    """A way to round a weight.

    Attributes:
        bits: of an integer.
        group: how many neighbours in a row share a scale; 0 is a whole row.
        multiple: what the length of a row must be a multiple of, so that it fills whole words of 32 bits and groups.
    """

    bits: int
    group: int
    multiple: int

    def suits(self, columns: int) -> bool:
        """Return whether rows of this length can be stored."""
        return columns > 0 and columns % self.multiple == 0


ROUNDINGS = {"int8": Rounding(8, 0, 4), "int4": Rounding(4, 32, 32)}
"""What a person names -> how weights are rounded."""

WEIGHTS = tuple(ROUNDINGS)

ROUNDED_IN_BLOCKS = re.compile(
    r"(?:.*\.)?layers\.\d+\.(?:att\.(?:receptance|key|value|gate|output)|ffn\.(?:key|value|receptance))"
)
"""Names of the linear layers of blocks, whose weights are rounded."""

HEAD = re.compile(r"(?:.*\.)?lm_head")
"""The head's weight is rounded to int8 in either case: in int4 it would cost more accuracy than a block's."""


def rounding_of(module: str, columns: int, weights: str | None) -> str | None:
    """Return how a linear layer's weight is stored in a model of "int8" or "int4" weights; None: as it is.

    Args:
        module: the layer's name in the model.
        columns: the length of a row of its weight.
        weights: a name in `ROUNDINGS`, or None.
    """
    if weights is None or not (HEAD.fullmatch(module) or ROUNDED_IN_BLOCKS.fullmatch(module)):
        return None
    names = ["int8"] if HEAD.fullmatch(module) else [weights, "int8"]
    return next((name for name in names if ROUNDINGS[name].suits(columns)), None)


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the scales of a weight: the weight's, or float32 for float64, which no reader takes."""
    return torch.float32 if dtype == torch.float64 else dtype


def rounded(weight: Tensor, name: str) -> Rounded:
    """Round a weight [out, in] of any float dtype; rows are brought to float32 a few at a time.

    The scales are rounded to what their dtype holds before the weights are divided by them. int4's are rounded
    to bfloat16 as well, which is what the native ops read: so a file and the memory hold the same numbers.

    Raises:
        ValueError: if a weight is NaN or infinite.
    """
    rounding = ROUNDINGS[name]
    rows, columns = weight.shape
    groups = columns // (rounding.group or columns)
    integers = torch.empty(rows, columns, dtype=torch.int8)
    scale = torch.empty(rows, groups, dtype=scale_dtype(weight.dtype))
    step = max(1, PANEL_WEIGHTS // columns)
    for start in range(0, rows, step):
        panel = (
            weight[start : start + step].detach().float().unflatten(1, (groups, -1))
        )  # [rows, groups, group]
        some = slice(start, start + len(panel))
        scale[some] = (
            _int8_scale(panel, scale.dtype) if rounding.bits == 8 else _int4_scale(panel, scale.dtype)
        )
        divisor = torch.where(scale[some] == 0, 1, scale[some]).float()[..., None]
        low, high = (-127, 127) if rounding.bits == 8 else (-8, 7)
        integers[some] = (panel / divisor).round_().clamp_(low, high).flatten(1).to(torch.int8)
    if not bool(torch.isfinite(scale).all()):
        raise ValueError("A weight that is to be rounded holds NaN or infinite values.")
    return Rounded(integers, scale, rounding.bits)


def _int8_scale(panel: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scales that make 127 of the largest weight of a row, [rows, 1]."""
    scale = (panel.abs().amax(2) / 127).to(dtype)
    return torch.where(scale == 0, torch.finfo(dtype).tiny, scale)


def _int4_scale(panel: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scales that make -8 of the largest weight of a group, [rows, groups]. They may be negative."""
    largest = panel.gather(2, panel.abs().argmax(2, keepdim=True)).squeeze(2)
    return (largest / -8).to(torch.bfloat16).to(dtype).to(torch.bfloat16).to(dtype)
