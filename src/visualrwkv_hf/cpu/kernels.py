"""The native kernels of the ops in `dispatch.OPS`."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .block import decode_block
from .blocks import decode_blocks
from .decode import DECODES, rwkv6_decode, rwkv7_decode, unsuitable
from .ops import unsupported as unsupported_op
from .ops import wkv6, wkv7
from .products import matmul
from .token import token_decode
from .token_shift import token_shift

KERNELS: dict[str, Callable[..., Any]] = {
    "wkv6": wkv6,
    "wkv7": wkv7,
    "token_shift": token_shift,
    "matmul": matmul,
    "rwkv6_decode": rwkv6_decode,
    "rwkv7_decode": rwkv7_decode,
    "block_decode": decode_block,
    "blocks_decode": decode_blocks,
    "token_decode": token_decode,
}


def unsupported(op: str, *tensors: Tensor, gradient: bool) -> str:
    """Return why the native op cannot be used for these tensors; empty if it can. See `ops.unsupported`.

    For "rwkv6_decode" and "rwkv7_decode" the tensors are x, the states and, if they lie in a pool, the indices.
    """
    if reason := unsupported_op(op, *tensors, gradient=gradient):
        return reason
    return unsuitable(tensors[1]) if op in DECODES else ""


__all__ = ["KERNELS", "unsupported"]
