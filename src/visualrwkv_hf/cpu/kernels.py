"""The native kernels of the ops in `dispatch.OPS`."""

from collections.abc import Callable
from typing import Any

from .block import decode_block
from .blocks import decode_blocks
from .ops import unsupported, wkv6, wkv7

KERNELS: dict[str, Callable[..., Any]] = {
    "wkv6": wkv6,
    "wkv7": wkv7,
    "block_decode": decode_block,
    "blocks_decode": decode_blocks,
}

__all__ = ["KERNELS", "unsupported"]
