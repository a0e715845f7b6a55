"""Products of many rows in bfloat16 against float64 on the same numbers, and against torch in a model."""

import pytest
import torch
from native_ops import NEEDS_NATIVE_OPS
from tiny import awake, text_config
from torch import nn

from visualrwkv_hf import VisualRWKVForCausalLM
from visualrwkv_hf.cpu import layers as native_layers
from visualrwkv_hf.cpu import ops as native
from visualrwkv_hf.dispatch import kernel_backend

pytestmark = NEEDS_NATIVE_OPS


@pytest.fixture(autouse=True)
def has_bf16(built):
    if not native.library().contract["FAST_BF16"]:
        pytest.skip("the CPU has no AVX512-BF16")


SHAPES = [(1, 16, 1), (3, 48, 17), (8, 256, 48), (13, 272, 50), (77, 528, 130), (100, 1040, 96)]
"""(rows of x, columns, rows of W): less than a tile, a register and a block, whole ones, and more."""


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("count, columns, rows", SHAPES)
def test_product_is_rounded_once(count, columns, rows, has_bias):
    """Sums are float32, so a result is that of float64 rounded to bfloat16, or a neighbour of it."""
    torch.manual_seed(0)
    x, weight = torch.randn(count, columns).bfloat16(), torch.randn(rows, columns).bfloat16()
    bias = torch.randn(rows).bfloat16() if has_bias else None
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    found = native.linear_bf16(x, weight, bias)
    assert found.dtype == torch.bfloat16 and found.shape == (count, rows)
    # Half a step of bfloat16, and float32's rounding of a sum of `columns` products.
    limit = 2.0**-8 * exact.abs() + 1e-6 * columns**0.5 * x.double().norm(dim=1, keepdim=True)
    assert ((found.double() - exact).abs() <= limit).all()


def test_rows_do_not_depend_on_one_another():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 20, 64).bfloat16(), torch.randn(40, 64).bfloat16()
    alone = native.linear_bf16(x[1, 3:4], weight)
    x[0, 0], x[1, 1, 5], x[0, 2, 7] = 0, float("inf"), float("nan")
    found = native.linear_bf16(x, weight)
    assert torch.equal(found[1, 3:4], alone) and not found[0, 0].any()
    assert not found[1, 1].isfinite().any() and found[0, 2].isnan().all()
    others = torch.ones(2, 20, dtype=torch.bool)
    others[1, 1] = others[0, 2] = False
    assert found[others].isfinite().all()


@pytest.fixture
def products(monkeypatch) -> list[int]:
    """How many rows each product in bfloat16 had."""
    counts, multiply = [], native_layers.linear_bf16
    monkeypatch.setattr(
        native_layers,
        "linear_bf16",
        lambda x, *w: (counts.append(x.numel() // x.shape[-1]), multiply(x, *w))[1],
    )
    monkeypatch.setattr(native_layers, "has_tiles", lambda: False)
    return counts


@pytest.mark.parametrize("version", [5, 6, 7])
@torch.no_grad()
def test_prompt_equals_plain(version, products):
    model = awake(VisualRWKVForCausalLM(text_config(version, hidden_size=128))).bfloat16()
    exact = awake(VisualRWKVForCausalLM(text_config(version, hidden_size=128)))
    exact.load_state_dict(model.state_dict())
    native_layers.accelerate_on_cpu(model)
    ids = torch.randint(1, 320, (2, 40))
    found, expected = model(ids).logits, exact(ids).logits
    assert set(products) == {80}
    with kernel_backend("torch"):
        plain = model(ids).logits
    error = [(each.float() - expected).norm() / expected.norm() for each in (found, plain)]
    assert error[0] < 1.5 * error[1]


def test_few_rows_gradients_and_autocast_are_torchs(products):
    torch.manual_seed(0)
    layer = native_layers.native_linear(nn.Linear(64, 32).bfloat16())
    x = torch.randn(native_layers.MANY_ROWS, 64).bfloat16()
    layer(x)
    with torch.no_grad():
        layer(x[1:])
        with kernel_backend("torch"):
            layer(x)
    assert not products
    with torch.no_grad():
        found = layer(x)
    assert products == [native_layers.MANY_ROWS]
    expected = x.double() @ layer.weight.double().T + layer.bias.double()
    assert (found.double() - expected).norm() < 2.0**-8 * expected.norm()
