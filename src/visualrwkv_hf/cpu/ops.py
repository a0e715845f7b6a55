"""Ops compiled for the CPU at hand, on request: recurrences, a token's time mix, matrix times vector.

That takes a C compiler, once: the library is kept in the user's cache folder. Nothing here is needed: without it, and
wherever torch.compile traces, the plain torch functions compute the same. Of the ops only the recurrences have
gradients. native_layers.py has a model compute with them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

SOURCE = Path(__file__).with_name("ops.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-std=gnu11", "-fno-math-errno", "-shared", "-fPIC")
FOR_THIS_CPU = (
    ("-march=native", "-fopenmp"),
    ("-march=native",),  # Apple's compiler has no OpenMP
    ("-mcpu=native",),
)
"""What is tried in turn."""

COLUMNS, MAX_KEYS = 64, 256
"""Those of ops.c."""

SEGMENT = 16
"""Tokens whose states a thread holds in the backward: 256 KB for a head of 64."""

RECURRENCES = ("wkv6", "wkv7")

MAX_ROWS = 8
"""Up to here a product takes as long as its weights take from memory."""

_ADDRESS, _NUMBER, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
ARGUMENTS = {
    "wkv": [ctypes.c_int, *[_NUMBER] * 4, *[_ADDRESS] * 11],
    "wkv_backward": [ctypes.c_int, *[_NUMBER] * 6, *[_ADDRESS] * 20],
    "linear": [ctypes.c_int, *[_NUMBER] * 4, *[_ADDRESS] * 4],
    "rwkv_layer": [ctypes.c_int, *[_FLOAT] * 3, *[_ADDRESS] * 9],
}
"""Of the functions in ops.c."""

_library: ctypes.CDLL | None = None
_failure = ""


def build_native_ops(folder: str | Path | None = None) -> Path:
    """Compiles ops.c, unless that is done, and computes with it from now on.

    Args:
        folder: where the library is kept; None is the user's cache folder.

    Returns:
        The library's path.

    Raises:
        RuntimeError: there is no C compiler, or none of its calls succeeded.
    """
    global _library
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    path = (Path(folder) if folder else cache / "visualrwkv_hf") / f"native-{_fingerprint()}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _compile(path)
    _library = ctypes.CDLL(str(path))
    for name, arguments in ARGUMENTS.items():
        function = getattr(_library, name)
        function.argtypes, function.restype = arguments, None
    return path


def _fingerprint() -> str:
    """Of the source and of the CPU, for a home folder may be shared by several."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        cpu = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        cpu = platform.processor()
    return hashlib.sha256(SOURCE.read_bytes() + f"{FLAGS}{platform.machine()}{cpu}".encode()).hexdigest()[:16]


def _compile(path: Path) -> None:
    """Writes the library at once or not at all: another process may be doing the same."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise RuntimeError(f"Native ops need a C compiler ({', '.join(COMPILERS)}), and none was found.")
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        library = Path(scratch) / path.name
        for for_this_cpu in FOR_THIS_CPU:
            command = [compiler, *FLAGS, *for_this_cpu, str(SOURCE), "-o", str(library), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                library.replace(path)
                return
    raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")


# --- ops: the signatures and results of those in wkv.py and triton_kernels --------------------------------


def wkv6(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    initial_state: Tensor | None = None,
    order: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence of RWKV-6 and 5, token by token; see `wkv.wkv6`."""
    return WkvFunction.apply(r, w, k, v, None, None, u, initial_state, order, cu_seqlens)


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    order: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    min_log_decay: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The recurrence of RWKV-7, token by token; see `wkv.wkv7`."""
    return WkvFunction.apply(r, w, k, v, a, b, None, initial_state, order, cu_seqlens)


class WkvFunction(Function):
    """Both recurrences: a and b are None in RWKV-6, u in RWKV-7."""

    @staticmethod
    def forward(
        ctx: Any,
        r: Tensor,
        w: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        u: Tensor | None,
        initial_state: Tensor | None,
        order: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(r, w, k, v, a, b, u, initial_state, order, cu_seqlens)
        begin, tokens = _tokens(r, order, cu_seqlens)
        state = _state(r, v, begin, initial_state)
        out = torch.empty(v.shape)
        inputs = [_floats(x) for x in (r, w.exp(), k, v, a, b, u)]
        call("wkv", len(begin) - 1, *r.shape[2:], v.shape[-1], begin, tokens, *inputs, state, out)
        return out.to(r.dtype), state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal_state: Tensor) -> tuple[Tensor | None, ...]:
        r, w, k, v, a, b, u, initial_state, order, cu_seqlens = ctx.saved_tensors
        begin, tokens = _tokens(r, order, cu_seqlens)
        N, (H, K), V = len(begin) - 1, r.shape[2:], v.shape[-1]
        state = _state(r, v, begin, initial_state)
        inputs = [_floats(x) for x in (r, w.exp(), k, v, a, b, u)]
        segments = -(-int(begin.diff().max()) // SEGMENT)
        scratch = torch.empty(torch.get_num_threads(), segments + SEGMENT + 1, K, COLUMNS)
        gradients = [None if x is None else torch.empty(x.shape) for x in (r, w, k, v, a, b)]
        du = None if u is None else torch.zeros(N, H, K)
        dstate = dfinal_state.clone(memory_format=torch.contiguous_format)
        sizes = (N, H, K, V, SEGMENT, segments)
        given = (begin, tokens, *inputs, state, _floats(dy), scratch)
        call("wkv_backward", *sizes, *given, *gradients, du, dstate)
        gradients.append(None if u is None else du.sum(0))
        gradients = [None if x is None else dx.to(x.dtype) for x, dx in zip((r, w, k, v, a, b, u), gradients)]
        return *gradients, None if initial_state is None else dstate, None, None


def _tokens(r: Tensor, order: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where each sequence begins, [N + 1], and which token is read at each position, [B T] or [B, T]."""
    B, T = r.shape[:2]
    begin = torch.arange(0, (B + 1) * T, T) if cu_seqlens is None else cu_seqlens.long().contiguous()
    if order is None:
        return begin, torch.arange(B * T)
    # In `order` a number counts within its row, in ops.c from the first row.
    start = T * torch.arange(B)[:, None]
    return begin, torch.where(order < 0, order - start, order + start).contiguous()


def _state(r: Tensor, v: Tensor, begin: Tensor, initial_state: Tensor | None) -> Tensor:
    """The first states, [N, H, K, V], to be written to."""
    if initial_state is None:
        return torch.zeros(len(begin) - 1, *r.shape[2:], v.shape[-1])
    return initial_state.clone(memory_format=torch.contiguous_format)


def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """scale * (x W^T), in float32 but for W, for a few rows x.

    Args:
        x: [..., in], of at most a few rows: each takes its own time.
        weight: W [out, in] in float32, bfloat16 or int8, contiguous; `in` a multiple of 16.
        scale: [out].

    Returns:
        [..., out] in the dtype of x.
    """
    out = torch.empty(*x.shape[:-1], len(weight))
    count = x.numel() // x.shape[-1]
    call(
        "linear",
        count,
        x.shape[-1],
        len(weight),
        weight.element_size(),
        weight,
        _floats(scale),
        _floats(x),
        out,
    )
    return out.to(x.dtype)


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def call(name: str, *arguments: Tensor | ctypes.Array | float | None) -> None:
    """Calls a function of the library; None is a null pointer."""
    addresses = (x.data_ptr() if isinstance(x, Tensor) else x for x in arguments)
    getattr(_library, name)(torch.get_num_threads(), *addresses)


def pointers(*tensors: Tensor | None) -> ctypes.Array:
    """An array of their addresses."""
    return (_ADDRESS * len(tensors))(*[x if x is None else x.data_ptr() for x in tensors])


def unsupported(op: str, *tensors: Tensor, gradient: bool) -> str:
    """Return why the native op cannot be used for these tensors; empty if it can.

    Args:
        op: "wkv6" or "wkv7" with r and v; "linear" or "block_decode" with x.
        tensors: see `op`.
        gradient: whether the op's gradient will be needed. Only the recurrences have one.
    """
    if torch.compiler.is_compiling():
        return "torch.compile cannot trace native ops"
    for x in tensors:
        if x.device.type != "cpu":
            return f"native ops need tensors on a CPU, not on {x.device.type}"
        if x.dtype == torch.float64:
            return "native ops compute in float32, not in float64"
    if op in RECURRENCES:
        if tensors[0].shape[-1] > MAX_KEYS:
            return f"keys of {tensors[0].shape[-1]} elements are larger than {MAX_KEYS}"
    elif gradient:
        return f"{op} has no gradient"
    return unusable()


def unusable() -> str:
    """Return why no native op can run in this process; empty if the library is loaded, which this tries first."""
    global _failure
    if _library is None and not _failure:
        try:
            build_native_ops()
        except RuntimeError as error:
            _failure = str(error)
    return _failure


__all__ = ["build_native_ops"]
