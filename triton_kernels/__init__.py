"""Triton kernels for what a recurrent layer does between its matrix products. A leaf: it imports torch and triton."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from .chunks import DTYPES, HEAD_SIZES, interpreted
from .chunks import unsupported as unsupported_recurrence
from .decode import rwkv6_decode, rwkv7_decode
from .low_rank import low_rank
from .token_shift import token_shift
from .wkv6 import wkv6
from .wkv7 import wkv7

KERNELS: dict[str, Callable[..., Any]] = {
    "wkv6": wkv6,
    "wkv7": wkv7,
    "token_shift": token_shift,
    "low_rank": low_rank,
    "rwkv6_decode": rwkv6_decode,
    "rwkv7_decode": rwkv7_decode,
}


def unsupported(op: str, *tensors: Tensor, gradient: bool = False) -> str:
    """Why the kernel of `op` does not serve these tensors here; empty if it does.

    Args:
        op: a name of `KERNELS`.
        tensors: r and v of a recurrence, x and carried of a token shift, x of a low-rank map, x and the
            state of a decoding step, and the indices of states that lie in a pool.
        gradient: whether one will be asked for.
    """
    if op in ("wkv6", "wkv7"):
        r, v = tensors
        reason = unsupported_recurrence(r, v, gradient)
    elif tensors[0].dtype not in DTYPES:
        reason = f"{tensors[0].dtype} is not served"
    elif op == "token_shift" and len(tensors) > 1 and len(tensors[1]) != len(tensors[0]):
        x, carried = tensors
        reason = (
            f"it serves one carried token per row, not {len(carried)} for {len(x)} rows (packed sequences)"
        )
    elif op.endswith("decode") and len(tensors) > 2:
        reason = "states that lie in a pool are not served"
    elif op.endswith("decode") and tensors[1].shape[-1] not in HEAD_SIZES:
        reason = f"head sizes K = V in {HEAD_SIZES} are served, not {tensors[1].shape[-1]}"
    else:
        reason = ""
    return reason or unusable()


@torch.compiler.assume_constant_result
def unusable() -> str:
    """Why Triton cannot launch anything here, such as for want of a C compiler; empty if it can."""
    return "" if interpreted() else _driver_error()


@functools.cache
def _driver_error() -> str:
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # of many kinds: a missing driver, a compiler that fails
        return f"{type(error).__name__}: {error}"
    return ""
