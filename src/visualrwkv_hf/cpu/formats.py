"""The formats in which a weight is stored: one row says all that Python knows about a format."""

from typing import NamedTuple

import torch


class Format(NamedTuple):
    """A format of stored weights.

    Attributes:
        tag: the name in `FORMATS` of registers.h, which has the functions that read it.
        dtype: the dtype of the tensor that holds the weights.
        bits: bits of one weight, without its share of a scale.
        scaled: whether each row [in] of a weight [out, in] is multiplied by a float32 scale.
    """

    tag: str
    dtype: torch.dtype
    bits: int
    scaled: bool = False


FORMATS = (
    Format("F32", torch.float32, 32),
    Format("BF16", torch.bfloat16, 16),
    Format("F16", torch.float16, 16),
    Format("INT8", torch.int8, 8, scaled=True),
)
"""In the order of registers.h."""

FORMAT_OF = {row.dtype: index for index, row in enumerate(FORMATS)}
"""dtype -> its row, which is also the tag's number in C."""

FLOAT_DTYPES = tuple(row.dtype for row in FORMATS if not row.scaled)
"""dtypes of the models that have native ops."""

SCALED_DTYPES = tuple(row.dtype for row in FORMATS if row.scaled)
