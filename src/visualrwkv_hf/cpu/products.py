"""Matrix products for many rows, such as the tokens of a prompt or the patches of a picture.

A CPU without units for bfloat16 or float16 multiplies them many times slower than float32. There a weight is widened to
float32 as it is used, one panel of rows at a time that stays in the cache: its stored form is the only one kept.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable

import torch
from torch import Tensor

from ..dispatch import chosen_backend

PANEL_ROWS = 512
"""Rows of a weight that are widened at a time: with 2,048 columns they take 4 MB as float32."""

UNITS = {
    torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
    torch.float16: ("_is_amx_fp16_supported",),
}
"""dtype -> the functions of torch.cpu, any of which says that an x86 CPU multiplies it faster than float32."""


@functools.cache
def has_unit(dtype: torch.dtype) -> bool:
    """Return whether this CPU multiplies matrices of a dtype at least as fast as those of float32.

    Processors other than x86 are taken to do so: torch does not say what they have.
    """
    if dtype not in UNITS or platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return any(getattr(torch.cpu, name, bool)() for name in UNITS[dtype])


@functools.cache
def has_tiles() -> bool:
    """Return whether this CPU multiplies tiles of bfloat16 (AMX), for which torch's library is the fastest."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which this CPU multiplies inputs of `dtype` fastest."""
    return dtype if has_unit(dtype) else torch.float32


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """Compute x W in `compute_dtype`, for a W that is small enough to be widened whole; see `low_rank.matmul`."""
    dtype = compute_dtype(x.dtype)
    return x @ weight if dtype == x.dtype else (x.to(dtype) @ weight.to(dtype)).to(x.dtype)


def may_use_panels(x: Tensor) -> bool:
    """Return whether `multiply_panels` may compute with x: without a gradient or a trace, and not for plain torch."""
    return (
        x.device.type == "cpu"
        and x.dtype != torch.float64
        and chosen_backend() in ("auto", "native")
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


def multiply_panels(
    x: Tensor,
    rows: int,
    widen: Callable[[slice], Tensor],
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Compute scale * (x W^T) + bias in `compute_dtype`, PANEL_ROWS rows of W at a time.

    Args:
        x: [..., in].
        rows: how many rows W [out, in] has.
        widen: returns those rows of W, in any dtype.
        scale: [out], or None for ones.
        bias: [out], or None for zeros.

    Returns:
        [..., out] in the dtype of x.
    """
    columns, dtype = x.shape[-1], compute_dtype(x.dtype)
    inputs = x.reshape(-1, columns).to(dtype)
    out = torch.empty(len(inputs), rows, dtype=dtype)
    panel = torch.empty(min(PANEL_ROWS, rows), columns, dtype=dtype)
    for start in range(0, rows, PANEL_ROWS):
        some = slice(start, min(start + PANEL_ROWS, rows))
        widened = panel[: some.stop - start].copy_(widen(some))
        torch.mm(inputs, widened.T, out=out[:, some])
    if scale is not None:
        out *= scale.to(dtype)
    if bias is not None:
        out += bias.to(dtype)
    return out.to(x.dtype).view(*x.shape[:-1], rows)
