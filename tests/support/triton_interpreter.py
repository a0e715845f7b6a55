"""Make Triton's CPU interpreter compute as a GPU does, and count the bytes that its launches touch.

The interpreter holds bfloat16 as uint16 and computes with these bits as if they were numbers, rounds float32 to
bfloat16 towards zero, and never reduces a dot's operands to TF32. `install()` corrects the first two, `tf32_dots()`
the third.
"""

import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch

if importlib.util.find_spec("triton"):
    import numpy as np
    import triton
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle

    INTERPRETED = triton.knobs.runtime.interpret
else:  # Triton has no build for this machine
    INTERPRETED = False
    InterpreterBuilder = object

NEEDS_INTERPRETER = pytest.mark.skipif(
    not INTERPRETED, reason="no interpreted kernels: TRITON_INTERPRET is 0, or Triton is not installed"
)
"""Skips tests that run Triton's kernels on the CPU. A file that imports kernels at its top must also call
`pytest.importorskip("triton")` above these imports: without Triton they fail before any mark is seen."""
POISONED_KERNELS = [NEEDS_INTERPRETER, pytest.mark.usefixtures("poison")]
"""Does the same, and fills new tensors with NaN, so that tests fail if a kernel leaves an element unwritten (`poison`
in tests/kernels/conftest.py)."""


def is_bfloat16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def widen(handle):
    """Return a bfloat16 handle as a float32 one, and any other unchanged."""
    if not is_bfloat16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32), tl.float32)


def narrow(data):
    """Return a bfloat16 handle of float32 data, rounded to nearest even."""
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + even) >> np.uint32(16)
    return TensorHandle(np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)


def cut_to_tf32(handle):
    """Return a float32 operand without the 13 bits that tensor cores ignore, and any other unchanged."""
    if handle.dtype.scalar != tl.float32:
        return handle
    bits = np.ascontiguousarray(handle.data).view(np.uint32) & np.uint32(0xFFFFE000)
    return TensorHandle(bits.view(np.float32), tl.float32)


class FaithfulBuilder(InterpreterBuilder):
    """Computes with bfloat16 in float32 and rounds each result once."""

    def cast_impl(self, src, dst_type):
        if is_bfloat16(src) and dst_type.scalar == tl.bfloat16:
            return src
        if dst_type.scalar == tl.bfloat16:
            return narrow(src.data.astype(np.float32))
        src = widen(src)
        return TensorHandle(src.data.astype(interpreter._get_np_dtype(dst_type)), dst_type.scalar)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if rounding_mode != interpreter._ir.ROUNDING_MODE.RTZ and tl.bfloat16 in (
            src.dtype.scalar,
            dst_type.scalar,
        ):
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def get_bf16(self, value):
        return narrow(np.array([value], np.float32))

    def unary_op(self, arg, op):
        return narrow(op(widen(arg).data)) if is_bfloat16(arg) else super().unary_op(arg, op)

    def binary_op(self, lhs, rhs, op):
        if not is_bfloat16(lhs):
            return super().binary_op(lhs, rhs, op)
        result = op(widen(lhs).data, widen(rhs).data)
        return TensorHandle(result, tl.int1) if result.dtype == np.bool_ else narrow(result)

    def create_fma(self, x, y, z):
        result = super().create_fma(widen(x), widen(y), widen(z))
        return narrow(result.data) if is_bfloat16(z) else result

    def create_clampf(self, arg, lo, hi, propagate_nans):
        result = super().create_clampf(widen(arg), widen(lo), widen(hi), propagate_nans)
        return narrow(result.data) if is_bfloat16(arg) else result

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return super().create_dot(widen(a), widen(b), d, input_precision, max_num_imprecise_acc)


class Tf32Builder(FaithfulBuilder):
    """Also cuts the operands of a dot with input_precision "tf32".

    They are not rounded, because Triton passes them on as they are, and a GPU's tensor cores ignore their last bits.
    """

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if input_precision == interpreter._ir.INPUT_PRECISION.TF32:
            a, b = cut_to_tf32(a), cut_to_tf32(b)
        return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)


def apply_in_float32(self, input):
    """Do what `ReduceScanOpInterface.apply` does, but reduce bfloat16 inputs in float32 and round once, at the end."""
    if not isinstance(input, tuple):
        return apply_in_float32(self, (input,))[0]
    wide = tuple(
        tl.core.tensor(widen(x.handle), of_scalar(x.type, tl.float32)) if is_bfloat16(x.handle) else x
        for x in input
    )
    return tuple(
        tl.core.tensor(narrow(y.handle.data), of_scalar(y.type, tl.bfloat16)) if is_bfloat16(x.handle) else y
        for x, y in zip(input, _apply(self, wide))
    )


def of_scalar(type, scalar):
    """Return the type of a tensor of the same shape with another scalar type."""
    return tl.block_type(scalar, type.shape) if type.is_block() else scalar


if INTERPRETED:
    _apply = ReduceScanOpInterface.apply


def install() -> None:
    """Make interpreted kernels compute with bfloat16 as a GPU does. Do nothing if Triton is missing or compiles."""
    if INTERPRETED:
        interpreter.interpreter_builder.__class__ = FaithfulBuilder
        ReduceScanOpInterface.apply = apply_in_float32


@contextmanager
def tf32_dots() -> Iterator[None]:
    """Let an interpreted dot with input_precision "tf32" cut its operands inside the context; others do not."""
    builder = interpreter.interpreter_builder
    before = builder.__class__
    builder.__class__ = Tf32Builder
    try:
        yield
    finally:
        builder.__class__ = before


class Launch(NamedTuple):
    """Describes a launch of a kernel; `bytes` counts its tensor arguments once, however often they are read."""

    kernel: str
    bytes: int


def bytes_of(argument) -> int:
    """Return the bytes that a tensor, or a tuple of tensors, occupies; an expanded dimension counts once."""
    if isinstance(argument, tuple):
        return sum(map(bytes_of, argument))
    if not isinstance(argument, torch.Tensor):
        return 0
    sizes = (size if stride else 1 for size, stride in zip(argument.shape, argument.stride()))
    return math.prod(sizes) * argument.element_size()


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """Yield a list that receives the interpreted launches made inside the context, in order."""
    seen = []
    run = interpreter.InterpretedFunction.run

    def count(self, *args, **kwargs):
        seen.append(Launch(self.fn.__name__, sum(map(bytes_of, (*args, *kwargs.values())))))
        return run(self, *args, **kwargs)

    interpreter.InterpretedFunction.run = count
    try:
        yield seen
    finally:
        interpreter.InterpretedFunction.run = run
