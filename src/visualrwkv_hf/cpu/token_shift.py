"""The token shift in C, with its gradient, in float32, for training.

The gradients of plain torch go through memory several times; here those of a token's targets are computed together.
Letters: B batch, T time, C hidden size, M targets, n carried tokens of a row, S = B n.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..token_order import plain_token_shift
from .library import FLOAT
from .ops import library


def token_shift(
    x: Tensor,
    carried: Tensor,
    mix: Sequence[Tensor],
    previous: Tensor | None = None,
    following: Tensor | None = None,
    dynamic: Tensor | None = None,
) -> Sequence[Tensor]:
    """Interpolate each token with the one read before it; see `token_order.token_shift`. `following` is not read.

    Without gradients, and in other dtypes than float32, plain torch computes it: it is as fast or faster there.
    """
    if x.dtype != torch.float32 or not torch.is_grad_enabled():
        return plain_token_shift(x, carried, mix, previous, following, dynamic)
    return TokenShiftFunction.apply(x, carried, _seen(x, carried, previous), dynamic, *mix)


def _seen(x: Tensor, carried: Tensor, previous: Tensor | None) -> Tensor:
    """Return the token that each one sees, int64 [B, T], counted from the first of all rows; ~s is carried token s."""
    B, T = x.shape[:2]
    rows, n = torch.arange(B, device="cpu")[:, None], carried.shape[0] // B
    if previous is None:
        positions = torch.arange(T, device="cpu")
        return torch.where(positions == 0, ~rows, rows * T + positions - 1)
    return torch.where(previous < n, ~(rows * n + previous), rows * T + previous - n).contiguous()


class TokenShiftFunction(Function):
    """Its inputs are x [B, T, C] and carried [S, C] in float32, what `_seen` returns, dynamic [M, B, T, C] or None, and
    M weights of C elements."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, carried: Tensor, seen: Tensor, dynamic: Tensor | None, *mix: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, carried, seen, dynamic, *mix)
        out = [torch.empty(x.shape, **FLOAT) for _ in mix]
        library().call("token_shift", *_arguments(x, carried, seen, dynamic, mix), _addresses(out))
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dout: Tensor) -> tuple[Tensor | None, ...]:
        x, carried, seen, dynamic, *mix = ctx.saved_tensors
        given = [dmixed.float().contiguous() for dmixed in dout]
        dx, dcarried = torch.zeros(x.shape, **FLOAT), torch.zeros(carried.shape, **FLOAT)
        dmix = torch.empty(len(mix), x.shape[-1], **FLOAT)
        ddynamic = None if dynamic is None else torch.empty(dynamic.shape, **FLOAT)
        arguments = _arguments(x, carried, seen, dynamic, mix)
        gradients = (dx, dcarried, dmix, ddynamic)
        library().call("token_shift_backward", *arguments, _addresses(given), *gradients)
        return (
            dx,
            dcarried,
            None,
            None if ddynamic is None else ddynamic.to(dynamic.dtype),
            *(dm.view(m.shape).to(m.dtype) for dm, m in zip(dmix, mix)),
        )


def _arguments(
    x: Tensor, carried: Tensor, seen: Tensor, dynamic: Tensor | None, mix: Sequence[Tensor]
) -> list[Any]:
    """Return the arguments that both functions of token_shift.h begin with, after the number of threads."""
    weights = torch.stack([m.flatten() for m in mix])
    tensors = (None if t is None else t.float().contiguous() for t in (x, carried, weights, dynamic))
    return [len(mix), x.shape[0] * x.shape[1], x.shape[2], carried.shape[0], seen, *tensors]


def _addresses(tensors: Sequence[Tensor]) -> ctypes.Array:
    """Return an array of C with the tensors' addresses. The caller keeps the tensors."""
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


__all__ = ["token_shift"]
