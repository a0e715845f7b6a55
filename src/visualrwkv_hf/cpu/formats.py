"""The formats in which a weight is stored: one row says all that Python knows about a format."""

from typing import NamedTuple

import torch


class Format(NamedTuple):
    """A format of stored weights.

    Attributes:
        tag: the name in `FORMATS` of registers.h, which has the functions that read it.
        dtype: the dtype of the tensor that holds the weights.
        bits: bits of one weight, without its share of a scale.
        scale_dtype: the dtype of the scales that multiply the weights; None where there are none.
        group: how many neighbours in a row share a scale; 0 is a whole row.
    """

    tag: str
    dtype: torch.dtype
    bits: int
    scale_dtype: torch.dtype | None = None
    group: int = 0

    def columns(self, count: int) -> int:
        """Return how many elements of `dtype` hold a row of `count` weights."""
        return count * self.bits // (8 * self.dtype.itemsize)


FORMATS = (
    Format("F32", torch.float32, 32),
    Format("BF16", torch.bfloat16, 16),
    Format("F16", torch.float16, 16),
    Format("INT8", torch.int8, 8, torch.float32),
    Format("INT4", torch.uint8, 4, torch.bfloat16, group=32),
)
"""In the order of registers.h."""

FORMAT_OF = {row.dtype: index for index, row in enumerate(FORMATS)}
"""dtype -> its row, which is also the tag's number in C."""

FLOAT_DTYPES = tuple(row.dtype for row in FORMATS if row.scale_dtype is None)
"""dtypes of the models that have native ops."""
