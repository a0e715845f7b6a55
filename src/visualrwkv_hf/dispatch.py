"""Choose, for each call, between an op's plain torch function and a faster kernel. Nothing else makes that choice."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "triton", "native")
"""Names that [`kernel_backend`] takes."""

TRITON_DEVICES = ("cuda",)
"""Types of the devices on which "auto" picks Triton kernels. torch calls AMD's devices "cuda" as well."""


class Op(NamedTuple):
    """Which backends have a kernel for an op. Its plain torch function is the code that calls [`kernel`]."""

    triton: bool = False
    native: bool = False


OPS = {
    "wkv6": Op(triton=True, native=True),
    "wkv7": Op(triton=True, native=True),
    "token_shift": Op(triton=True, native=True),
    "low_rank": Op(triton=True),
    "matmul": Op(native=True),
    "rwkv6_decode": Op(triton=True, native=True),
    "rwkv7_decode": Op(triton=True, native=True),
    "block_decode": Op(triton=True, native=True),
    "blocks_decode": Op(native=True),
    "token_decode": Op(native=True),
}
"""All ops that may have a kernel. A backend computes an op that it has no kernel for with plain torch."""


class _Chosen(threading.local):  # not a ContextVar: torch.compile cannot trace those
    backend = "auto"
    accelerated = False


_chosen = _Chosen()


@contextmanager
def kernel_backend(name: str) -> Iterator[None]:
    """Choose the kernels for the calls inside a `with` block, in this thread only.

    A function that torch.compile has traced keeps the choice that was in force during tracing.

    Args:
        name: "auto" picks Triton kernels on a CUDA device, if Triton is installed, and on a CPU the native ops inside
            a model that `accelerate_on_cpu` has changed; otherwise plain torch. "torch" always picks plain torch.
            "triton" and "native" pick that backend's kernel for every op that has one (see `OPS`), and the op raises
            where the kernel cannot be used.

    Raises:
        ValueError: if there is no backend of that name. An op raises `RuntimeError`, which names the op and the
            reason, if "triton" or "native" was asked for and cannot serve it.
    """
    if name not in BACKENDS:
        raise ValueError(f"Unknown kernel backend {name!r}: choose from {', '.join(BACKENDS)}.")
    before, _chosen.backend = _chosen.backend, name
    try:
        yield
    finally:
        _chosen.backend = before


def wkv_backend(name: str) -> Any:
    """The former name of [`kernel_backend`]. It warns, and will go with the next release."""
    warnings.warn("wkv_backend is now called kernel_backend.", DeprecationWarning, stacklevel=2)
    return kernel_backend(name)


def chosen_backend() -> str:
    """Return the name that `kernel_backend` has set for this thread."""
    return _chosen.backend


@contextmanager
def accelerated_ops() -> Iterator[None]:
    """Let "auto" pick native ops on a CPU inside a `with` block of this thread: for blocks of accelerated models."""
    before, _chosen.accelerated = _chosen.accelerated, True
    try:
        yield
    finally:
        _chosen.accelerated = before


def kernel(op: str, *tensors: Tensor, gradient: bool = False) -> Callable[..., Any] | None:
    """Return the kernel that computes an op for these tensors, or None if its plain torch function does.

    Args:
        op: a name in `OPS`.
        tensors: the tensors that decide whether a kernel can be used (see `unsupported` in `triton_kernels` and
            `cpu.ops`).
        gradient: whether the op's gradient will be needed.

    Raises:
        RuntimeError: if `kernel_backend` has asked for "triton" or "native", whose kernel cannot be used.
    """
    asked = chosen_backend()
    backend = _automatic(tensors[0]) if asked == "auto" else asked
    if backend == "torch" or not getattr(OPS[op], backend):
        return None
    found, reason = _find[backend](op, *tensors, gradient=gradient)
    if found is not None:
        return found
    if asked == backend:
        raise RuntimeError(f'kernel_backend("{backend}") is in force, but there is no {op} kernel: {reason}.')
    if not torch.compiler.is_compiling():  # a graph has no place for the warning
        name = "Triton" if backend == "triton" else backend
        _say_once(f"{op} runs as plain torch, slower than its {name} kernel: {reason}.")
    return None


def _automatic(tensor: Tensor) -> str:
    """Return the backend that "auto" stands for on the device of `tensor`."""
    if tensor.device.type in TRITON_DEVICES:
        return "triton"
    return "native" if _chosen.accelerated and tensor.device.type == "cpu" else "torch"


Found = tuple[Callable[..., Any] | None, str]
"""A kernel, or None and the reason why there is none."""


def _find_triton(op: str, *tensors: Tensor, gradient: bool) -> Found:
    # Imported late: this file also runs alone, from the Hub, where Triton may be missing.
    try:
        from visualrwkv_hf.triton_kernels import KERNELS, unsupported
    except ImportError as error:
        return None, str(error)
    reason = unsupported(op, *tensors, gradient=gradient)
    return (None, reason) if reason else (KERNELS[op].kernel, "")


def _find_native(op: str, *tensors: Tensor, gradient: bool) -> Found:
    try:
        from visualrwkv_hf.cpu.kernels import KERNELS, unsupported
    except ImportError as error:
        return None, str(error)
    reason = unsupported(op, *tensors, gradient=gradient)
    return (None, reason) if reason else (KERNELS[op], "")


_find: dict[str, Callable[..., Found]] = {"triton": _find_triton, "native": _find_native}


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=4)


_said: set[str] = set()
