"""The token shift in C against the plain torch function in float64, and its gradients against autograd's."""

from functools import partial

import pytest
import torch
from native_ops import NEEDS_NATIVE_OPS
from tiny import awake, text_config
from torch import Tensor

from visualrwkv_hf import VisualRWKVForCausalLM
from visualrwkv_hf.cpu import ops as native
from visualrwkv_hf.cpu import token_shift as native_shift
from visualrwkv_hf.dispatch import kernel_backend
from visualrwkv_hf.token_order import token_orders, token_shift

pytestmark = NEEDS_NATIVE_OPS

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3}
"""Relative, of a norm, by dtype. What the data add comes from matrix products, whose dtype autocast lowers."""

CASES = {
    "from the start": (3, None, None),
    "pads": (3, "pads", None),
    "an order and pads": (3, "order", None),
    "packed": (1, None, [0, 5, 5, 20, 70]),
    "packed, with pads": (1, "pads", [0, 30, 31, 70]),
}
"""Name -> rows, how they are read, bounds of packed sequences. A row has 70 tokens: the backward sums 64 at a time."""


def indices_of(rows: int, read: str | None, bounds: list[int] | None):
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(70).expand(rows, 70)
    mask = None if read is None else torch.rand(rows, 70, generator=generator) > 0.3
    order = None
    if read == "order":
        order = torch.stack([torch.randperm(70, generator=generator) for _ in range(rows)])
    packed = None if bounds is None else torch.tensor(bounds)
    (indices,) = token_orders(positions, mask, [order], packed)
    return indices, rows if bounds is None else len(bounds) - 1


def inputs(rows: int, sequences: int, targets: int, width: int, dynamic: bool, dtype: torch.dtype) -> list:
    generator = torch.Generator().manual_seed(1)
    randn = partial(torch.randn, generator=generator)
    tensors = [randn(rows, 70, width), randn(sequences, width), *randn(targets, 1, 1, width)]
    return tensors + ([randn(targets, rows, 70, width).to(dtype)] if dynamic else [])


def shifted(tensors: list[Tensor], targets: int, indices) -> tuple[list[Tensor], list[Tensor]]:
    """Return the targets, and the gradients of x, carried, the weights and what the data add to them."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    x, carried, *rest = tensors
    dynamic = rest[targets] if len(rest) > targets else None
    out = list(token_shift(x, carried, rest[:targets], indices.previous, indices.following, dynamic))
    ways = [torch.randn(y.shape, generator=torch.Generator().manual_seed(n)) for n, y in enumerate(out)]
    return out, list(torch.autograd.grad(sum((y * way.to(y)).sum() for y, way in zip(out, ways)), tensors))


def error(ours: Tensor, truth: Tensor) -> float:
    assert ours.shape == truth.shape
    return float((ours.detach().double() - truth.detach()).norm() / truth.detach().norm().clamp(min=1e-30))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("targets", "width"), [(6, 64), (5, 200), (1, 7)])
@pytest.mark.parametrize("case", CASES)
def test_targets_and_gradients_equal_plain(case, targets, width, dynamic, dtype):
    rows, read, bounds = CASES[case]
    indices, sequences = indices_of(rows, read, bounds)
    tensors = inputs(rows, sequences, targets, width, dynamic, dtype)
    with kernel_backend("native"):
        ours = shifted(tensors, targets, indices)
    with kernel_backend("torch"):
        truth = shifted([x.double() for x in tensors], targets, indices)
    assert [x.dtype for x in ours[1]] == [x.dtype for x in tensors]
    for found, expected in zip((*ours[0], *ours[1]), (*truth[0], *truth[1])):
        assert error(found, expected) < TOLERANCE[found.dtype]


@pytest.mark.parametrize(("dtype", "gradient"), [(torch.bfloat16, True), (torch.float32, False)])
def test_plain_torch_computes_where_it_is_faster(dtype, gradient, monkeypatch):
    monkeypatch.setattr(native_shift.TokenShiftFunction, "apply", None)
    x, carried, mix = torch.randn(2, 5, 8).to(dtype), torch.randn(2, 8).to(dtype), [torch.rand(8).to(dtype)]
    with torch.set_grad_enabled(gradient):
        with kernel_backend("native"):
            ours = token_shift(x, carried, mix)
        with kernel_backend("torch"):
            assert torch.equal(ours[0], token_shift(x, carried, mix)[0])


def test_one_target_may_have_no_gradient_and_laid_out_otherwise():
    x, carried = torch.randn(8, 2, 70).permute(1, 2, 0).requires_grad_(), torch.randn(2, 8)
    mix = [torch.rand(1, 1, 8) for _ in range(3)]
    gradients = []
    for backend in ("native", "torch"):
        with kernel_backend(backend):
            out = token_shift(x, carried, mix)
            gradients += torch.autograd.grad(out[1].transpose(1, 2).square().sum(), x)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("version", [5, 6, 7])
def test_training_shifts_tokens_in_c(version, monkeypatch):
    called = []
    library = native.library()
    call = library.call
    monkeypatch.setattr(library, "call", lambda name, *rest: (called.append(name), call(name, *rest)))
    model = awake(VisualRWKVForCausalLM(text_config(version))).train()
    ids = torch.randint(1, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    gradients = []
    for backend in ("native", "torch"):
        model.zero_grad()
        with kernel_backend(backend):
            model(ids, labels=ids).loss.backward()
        gradients.append({name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None})
    assert {"token_shift", "token_shift_backward"} <= set(called)
    ours, plain = gradients
    assert ours.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-4 * float(gradient.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("entry", [70, -3, 2**40, -(2**40)])
def test_entries_out_of_range_are_refused(entry, monkeypatch):
    x, carried = torch.zeros(2, 35, 4), torch.zeros(2, 4)
    seen = torch.zeros(2, 35, dtype=torch.long)
    seen[1, 3] = entry
    monkeypatch.setattr(native_shift, "_seen", lambda *_: seen)
    with kernel_backend("native"), pytest.raises(RuntimeError, match="ORDER_OUT_OF_RANGE"):
        token_shift(x, carried, [torch.zeros(4)])
