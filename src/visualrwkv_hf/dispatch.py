"""The one place that chooses between the plain torch functions and a faster kernel, per call."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "triton")

TRITON_DEVICES = ("cuda",)
"""Types of devices whose tensors Triton kernels are meant for; torch calls AMD's so too."""

CPU_KERNELS: dict[str, Callable[..., Any]] = {}
"""Ops compiled for this CPU: empty until `native.build_native_ops()` fills it."""

CPU_GRADIENTS = ("wkv6", "wkv7")
"""Those of them that have gradients."""


class _Chosen(threading.local):  # not a ContextVar: torch.compile cannot trace those
    backend = "auto"


_chosen = _Chosen()


@contextmanager
def wkv_backend(name: str) -> Iterator[None]:
    """Choose the kernels within a `with` block, for this thread only.

    What torch.compile has traced keeps the choice it was traced with.

    Args:
        name: "auto" (Triton kernels on a CUDA device if installed, native ones on a CPU if built, else torch),
            "torch" (always the plain functions) or "triton" (never these).

    Raises:
        ValueError: another name. RuntimeError comes from the op if "triton" is asked for and cannot serve it.
    """
    if name not in BACKENDS:
        raise ValueError(f"Unknown WKV backend {name!r}: choose from {', '.join(BACKENDS)}.")
    before, _chosen.backend = _chosen.backend, name
    try:
        yield
    finally:
        _chosen.backend = before


def chosen_backend() -> str:
    """What `wkv_backend` has chosen for this thread."""
    return _chosen.backend


def kernel(op: str, *tensors: Tensor, gradient: bool = False) -> Callable[..., Any] | None:
    """The kernel of an op for these tensors, or None for its plain torch function.

    Args:
        op: a name of `visualrwkv_hf.triton_kernels.KERNELS`.
        tensors: those that decide whether it is served (see `visualrwkv_hf.triton_kernels.unsupported`).
        gradient: whether one will be asked for.

    Raises:
        RuntimeError: `wkv_backend("triton")` is in force and there is no such kernel, or not for these tensors.
    """
    if CPU_KERNELS and native_serves(*tensors, has_gradient=op in CPU_GRADIENTS):
        return CPU_KERNELS.get(op)
    backend = chosen_backend()
    if backend == "torch" or (backend == "auto" and tensors[0].device.type not in TRITON_DEVICES):
        return None
    # Imported late: this file also runs alone, from the Hub, without Triton.
    try:
        from visualrwkv_hf.triton_kernels import KERNELS, unsupported
    except ImportError as error:
        reason = str(error)
    else:
        reason = unsupported(op, *tensors, gradient=gradient)
        if not reason:
            return KERNELS[op]
    if backend == "triton":
        raise RuntimeError(f'wkv_backend("triton") is in force, but there is no {op} kernel: {reason}.')
    if not torch.compiler.is_compiling():  # a graph has no place for it
        _say_once(f"{op} runs as plain torch, slower than its Triton kernel: {reason}.")
    return None


def native_serves(*tensors: Tensor, has_gradient: bool = False) -> bool:
    """Whether a native op may compute with these tensors: on the CPU, in float32, no trace, no gradient it lacks."""
    return (
        _chosen.backend == "auto"
        and (has_gradient or not torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
        and all(x.device.type == "cpu" and x.dtype != torch.float64 for x in tensors)
    )


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=4)


_said: set[str] = set()
