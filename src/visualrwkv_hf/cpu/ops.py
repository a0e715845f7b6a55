"""Ops in C for a CPU: the recurrences with their gradients, and matrix products for few rows.

They need a C compiler once (see library.py). Without one, and wherever torch.compile traces, the plain torch functions
compute the same. `accelerate_on_cpu` makes a model use them, and so does `kernel_backend("native")`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from .formats import FORMAT_OF, FORMATS
from .library import FLOAT, Library, load_library

RECURRENCES = ("wkv6", "wkv7")
WITH_GRADIENT = (*RECURRENCES, "token_shift")

MAX_ROWS = 8
"""Up to this many rows a product takes as long as reading its weights from memory."""

_library: Library | None = None
_failure = ""


def build_native_ops(folder: str | Path | None = None) -> Path:
    """Load the native ops into this process, and compile them first if that has not been done on this computer.

    Nothing computes with them until `accelerate_on_cpu` or `kernel_backend("native")` asks for it, and both call this
    by themselves.

    Args:
        folder: where the library is kept; None is the user's cache folder.

    Returns:
        The library's path.

    Raises:
        RuntimeError: if there is no C compiler, or the library cannot be built, written or loaded.
    """
    global _library
    _library, path = load_library(folder)
    return path


def unusable() -> str:
    """Return why no native op can run in this process. Empty if they can: the library is loaded at the first call."""
    global _failure
    if _library is None and not _failure:
        try:
            build_native_ops()
        except RuntimeError as error:
            _failure = str(error)
    return _failure if _library is None else ""


def library() -> Library:
    """Return the loaded library.

    Raises:
        RuntimeError: if it cannot be built or loaded.
    """
    if reason := unusable():
        raise RuntimeError(reason)
    return _library


def unsupported(op: str, *tensors: Tensor, gradient: bool) -> str:
    """Return why the native op cannot be used for these tensors; empty if it can.

    Args:
        op: "wkv6" or "wkv7" with r and v; "linear", "linear_int8", "linear_bf16", "rwkv6_decode", "rwkv7_decode",
            "block_decode", "blocks_decode", "token_decode" or "token_shift" with x; "attention_bf16" with q.
        tensors: see `op`.
        gradient: whether the op's gradient will be needed. Only those in WITH_GRADIENT have one.
    """
    if torch.compiler.is_compiling():
        return "torch.compile cannot trace native ops"
    if (
        torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return "torch.jit.trace, torch.func and forward-mode gradients cannot look into native ops"
    for x in tensors:
        if type(x) not in (Tensor, Parameter):
            return f"native ops read plain tensors, no {type(x).__name__}"
        if x.device.type != "cpu":
            return f"native ops need tensors on a CPU, not on {x.device.type}"
        if x.dtype == torch.float64:
            return "native ops compute in float32, not in float64"
    if gradient and op not in WITH_GRADIENT:
        return f"{op} has no gradient"
    if reason := unusable():
        return reason
    last, contract = tensors[0].shape[-1], library().contract
    if op in RECURRENCES and last > contract["MAX_KEYS"]:
        return f"keys of {last} elements are larger than {contract['MAX_KEYS']}"
    if op in ("linear", "linear_int8", "linear_bf16") and last % contract["COLUMN_MULTIPLE"]:
        return f"{last} columns are no multiple of {contract['COLUMN_MULTIPLE']}"
    if op == "linear_int8" and not contract["FAST_INT8"]:
        return "the CPU has no fast products of integers that ops.c knows"
    if op == "attention_bf16" and (last % 2 or last > contract["MOST_DIMS"]):
        return f"heads of {last} dimensions are odd or larger than {contract['MOST_DIMS']}"
    if op in ("linear_bf16", "attention_bf16") and not contract["FAST_BF16"]:
        return "the CPU has no products of bfloat16 that ops.c knows"
    return ""


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
    """Compute the recurrence of RWKV-6 and 5 token by token; see `wkv.wkv6`."""
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
    """Compute the recurrence of RWKV-7 token by token; see `wkv.wkv7`."""
    return WkvFunction.apply(r, w, k, v, a, b, None, initial_state, order, cu_seqlens)


class WkvFunction(Function):
    """Both recurrences: a and b are None in RWKV-6, u is None in RWKV-7."""

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
        (B, T, H, K), V = r.shape, v.shape[-1]
        begin, tokens = _tokens(r, order, cu_seqlens)
        state = _state(r, v, begin, initial_state)
        out = torch.empty(v.shape, **FLOAT)
        inputs = [_floats(x) for x in (r, w.float().exp(), k, v, a, b, u)]
        library().call("wkv", len(begin) - 1, B * T, H, K, V, begin, tokens, *inputs, state, out)
        return out.to(r.dtype), state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal_state: Tensor) -> tuple[Tensor | None, ...]:
        r, w, k, v, a, b, u, initial_state, order, cu_seqlens = ctx.saved_tensors
        begin, tokens = _tokens(r, order, cu_seqlens)
        N, (B, T, H, K), V = len(begin) - 1, r.shape, v.shape[-1]
        state = _state(r, v, begin, initial_state)
        inputs = [_floats(x) for x in (r, w.float().exp(), k, v, a, b, u)]
        gradients = [None if x is None else torch.empty(x.shape, **FLOAT) for x in (r, w, k, v, a, b)]
        du = None if u is None else torch.zeros(N, H, K, **FLOAT)
        dstate = dfinal_state.clone(memory_format=torch.contiguous_format)
        given = (N, B * T, H, K, V, begin, tokens, *inputs, state, _floats(dy))
        library().call("wkv_backward", *given, *gradients, du, dstate)
        gradients.append(None if u is None else du.sum(0))
        gradients = [None if x is None else dx.to(x.dtype) for x, dx in zip((r, w, k, v, a, b, u), gradients)]
        return *gradients, None if initial_state is None else dstate, None, None


def _tokens(r: Tensor, order: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return where each sequence begins, [N + 1], and which token is read at each position, [B T] or [B, T].

    Raises:
        ValueError: if `cu_seqlens` does not ascend from 0 to T. (`wkv.py` has checked `order`, and C checks it again.)
    """
    B, T = r.shape[:2]
    if cu_seqlens is None:
        begin = torch.arange(0, (B + 1) * T, T, device="cpu")
    else:
        begin = cu_seqlens.long().contiguous()
        if begin[0] != 0 or begin[-1] != T or bool((begin.diff() < 0).any()):
            raise ValueError(f"cu_seqlens must ascend from 0 to T = {T}, got {begin.tolist()}.")
    if order is None:
        return begin, torch.arange(B * T, device="cpu")
    # A number in `order` counts from the start of its row, one in ops.c from the start of the first row.
    start = T * torch.arange(B, device="cpu")[:, None]
    return begin, torch.where(order < 0, order - start, order + start).contiguous()


def _state(r: Tensor, v: Tensor, begin: Tensor, initial_state: Tensor | None) -> Tensor:
    """Return a copy of the first states, [N, H, K, V], which C overwrites."""
    if initial_state is None:
        return torch.zeros(len(begin) - 1, *r.shape[2:], v.shape[-1], **FLOAT)
    return initial_state.clone(memory_format=torch.contiguous_format)


def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """Compute scale * (x W^T) for a few rows x, in float32 whatever the format of W.

    With int8 and int4 weights a CPU with AVX2 rounds each row of x to 16 bits, so by at most 1/65278 of its largest
    number.

    Args:
        x: [..., in], of at most a few rows: the time grows with each of them.
        weight: W [out, in], contiguous, in a dtype of `formats.FORMATS`; `in` is a multiple of 16. int4 weights are
            uint8 [out, in / 2], and `in` is a multiple of 32.
        scale: [out] for int8 weights, [out, in / 32] for int4 weights.

    Returns:
        [..., out] in the dtype of x.
    """
    tag = _format_for(x, weight)
    out = torch.empty(*x.shape[:-1], len(weight), **FLOAT)
    rows, columns, count = len(weight), x.shape[-1], x.numel() // x.shape[-1]
    scale = None if scale is None else scale.to(FORMATS[tag].scale_dtype).contiguous()
    library().call("linear", count, columns, rows, tag, weight, scale, _floats(x), out)
    return out.to(x.dtype)


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Compute x W^T for many rows x in integers: x is rounded to 8 bits, with a scale for every 256 columns of a row.

    Args:
        x: [..., in], in a dtype of `formats.FLOAT_DTYPES`; `in` is a multiple of 16.
        weight: W of int8 or int4 as in `linear`. int4 is brought to 8 bits, with a scale for every 256
            columns of a row.
        scale: as in `linear`.

    Returns:
        [..., out] in the dtype of x.
    """
    x, tag = x.contiguous(), _format_for(x, weight)
    out = x.new_empty(*x.shape[:-1], len(weight))
    rows, columns, count = len(weight), x.shape[-1], x.numel() // x.shape[-1]
    scale = scale.to(FORMATS[tag].scale_dtype).contiguous()
    library().call("linear_int8", count, columns, rows, tag, weight, scale, FORMAT_OF[x.dtype], x, out)
    return out


def linear_bf16(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x W^T + bias for many rows x by the CPU's instruction for bfloat16, which sums in float32.

    Args:
        x: bfloat16 [..., in]; `in` is a multiple of 16.
        weight: W, bfloat16 [out, in], contiguous.
        bias: bfloat16 [out], contiguous, or None for zeros.

    Returns:
        bfloat16 [..., out].
    """
    _format_for(x, weight)
    if bias is not None and (bias.dtype != torch.bfloat16 or bias.shape != weight.shape[:1]):
        raise RuntimeError(f"The bias must be bfloat16 [{len(weight)}], got {bias.dtype} {list(bias.shape)}.")
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], len(weight))
    rows, columns, count = len(weight), x.shape[-1], x.numel() // x.shape[-1]
    library().call("linear_bf16", count, columns, rows, weight, bias, x, out)
    return out


def attention_bf16(
    q: Tensor, k: Tensor, v: Tensor, scale: float, across: Tensor | None = None, along: Tensor | None = None
) -> Tensor:
    """Compute softmax(scale q k^T + bias) v in bfloat16, of which scores and sums are float32.

    Args:
        q: bfloat16 [N, L, H, D] of N pictures, L tokens and H heads; D is even and at most the contract's MOST_DIMS.
        k: likewise.
        v: likewise.
        scale: of the scores.
        across: a bias of each query to each row of a map of keys, [N, H, L, rows] with L = rows * columns; or None.
        along: a bias to each column, [N, H, L, columns].

    Returns:
        bfloat16 [N, L, H, D].
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    across, along = _floats(across), _floats(along)
    rows, columns = (0, 0) if across is None or along is None else (across.shape[-1], along.shape[-1])
    out = torch.empty_like(q)
    library().call("attention_bf16", *q.shape, rows, columns, scale, q, k, v, across, along, out)
    return out


def _format_for(x: Tensor, weight: Tensor) -> int:
    """Return the tag of a weight's format.

    Raises:
        RuntimeError: if x is wider or narrower than the weight.
    """
    tag = FORMAT_OF[weight.dtype]
    if weight.shape[1:] != (FORMATS[tag].columns(x.shape[-1]),):
        raise RuntimeError(
            f"x has {x.shape[-1]} columns, and the weight is stored in {list(weight.shape)} numbers of {weight.dtype}."
        )
    return tag


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


__all__ = ["build_native_ops"]
