"""Run a WKV op with its gradients, and compare what two of them return."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def run(function: Callable[..., tuple[Tensor, Tensor]], inputs: Sequence[Tensor], **options) -> list[Tensor]:
    """Return an op's output, its final state and, from random gradients of both, the gradient of every input."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    y, state = function(*inputs, **options)
    generator = torch.Generator().manual_seed(1)
    # Weights of few bits: the gradient of y is rounded to the dtype of y, and that of a float64 y is not.
    weights = [torch.randn(x.shape, generator=generator).bfloat16() for x in (y, state)]
    total = sum((x.double() * weight.double()).sum() for x, weight in zip((y, state), weights))
    return [y.detach(), state.detach(), *torch.autograd.grad(total, inputs)]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return |actual - expected| / |expected|. Where all that is expected is zero, return |actual|.

    It is NaN or infinite where `actual` is, so that such a result fails.
    """
    actual, expected = actual.detach().double(), expected.detach()
    difference = (actual - expected).norm()
    return float(difference / expected.norm()) if expected.any() else float(difference)


def assert_same(actual: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float) -> None:
    errors = [relative_error(x, y) for x, y in zip(actual, expected, strict=True)]
    assert all(error <= tolerance for error in errors), errors


def assert_equal(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))
