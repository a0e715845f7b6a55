"""Triton kernels for what a recurrent layer computes between its matrix products. Imports only torch and triton."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .block import decode_block
from .decode import rwkv6_decode, rwkv7_decode
from .launches import DTYPES, HEAD_SIZES, has_matrix_units, has_rows_apart, interpreted
from .low_rank import low_rank
from .token_shift import token_shift
from .wkv6 import wkv6
from .wkv7 import wkv7


def _why_not_tensor(x: Tensor, *_: Tensor, gradient: bool = False) -> str:
    if x.dtype not in DTYPES:
        return f"{x.dtype} is not served"
    return "" if x.device.type == "cuda" or interpreted() else f"Triton does not run on {x.device.type}"


def _why_not_decode(x: Tensor, state: Tensor, *_: Tensor, gradient: bool = False) -> str:
    if state.shape[-1] not in HEAD_SIZES:
        return f"head sizes K = V in {HEAD_SIZES} are served, not {state.shape[-1]}"
    if not has_rows_apart(state):
        return f"each state must be contiguous and apart from the others, not of strides {state.stride()}"
    return _why_not_tensor(x)


def _why_not_block(x: Tensor, *_: Tensor, gradient: bool = False) -> str:
    if not has_matrix_units(x):
        return "a GPU of compute capability 8.0 or higher is needed"
    return _why_not_tensor(x)


def _why_not_recurrence(r: Tensor, v: Tensor, gradient: bool = False) -> str:
    K, V = r.shape[-1], v.shape[-1]
    if K != V or K not in HEAD_SIZES:
        return f"head sizes K = V in {HEAD_SIZES} are served, not K = {K} and V = {V}"
    if reason := _why_not_tensor(r):
        return reason
    if gradient and not has_matrix_units(r):
        return "gradients need a GPU of compute capability 8.0 or higher"
    return ""


class Op(NamedTuple):
    """A kernel, and why it does not serve some tensors.

    Attributes:
        kernel: the op, with the signature of its plain torch function.
        why_not: (tensors that decide, gradient=...) -> the reason in words, empty if the kernel serves them. The
            tensors are r and v of a recurrence, x and the state of a decoding step, else x.
    """

    kernel: Callable[..., Any]
    why_not: Callable[..., str]


KERNELS: dict[str, Op] = {
    "wkv6": Op(wkv6, _why_not_recurrence),
    "wkv7": Op(wkv7, _why_not_recurrence),
    "token_shift": Op(token_shift, _why_not_tensor),
    "low_rank": Op(low_rank, _why_not_tensor),
    "rwkv6_decode": Op(rwkv6_decode, _why_not_decode),
    "rwkv7_decode": Op(rwkv7_decode, _why_not_decode),
    "block_decode": Op(decode_block, _why_not_block),
}


def unsupported(op: str, *tensors: Tensor, gradient: bool = False) -> str:
    """Return why the kernel of `op` does not serve these tensors on this machine; empty if it does.

    Args:
        op: a name in `KERNELS`.
        tensors: those that decide, see `Op.why_not`.
        gradient: whether the caller needs one.
    """
    return KERNELS[op].why_not(*tensors, gradient=gradient) or unusable()


@torch.compiler.assume_constant_result
def unusable() -> str:
    """Return why Triton cannot launch anything on this machine, such as a missing C compiler; empty if it can."""
    return "" if interpreted() else _driver_error()


@functools.cache
def _driver_error() -> str:
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # of many kinds: a missing driver, a compiler that fails
        return f"{type(error).__name__}: {error}"
    return ""
