"""Products of many rows in integers against float64 on the same rounded weights: besides, x is rounded to 8 bits."""

import pytest
import torch
from native_ops import NEEDS_NATIVE_OPS
from tiny import awake, text_config
from torch import nn

from visualrwkv_hf import VisualRWKVForCausalLM
from visualrwkv_hf.cpu import formats, library
from visualrwkv_hf.cpu import layers as native_layers
from visualrwkv_hf.cpu import ops as native
from visualrwkv_hf.dispatch import kernel_backend

BLOCK = 256
"""Columns of a row of x that share a scale."""

pytestmark = NEEDS_NATIVE_OPS


def rounded_layer(kind: str, rows: int, columns: int) -> native_layers.RoundedLinear:
    linear = nn.Linear(columns, rows, bias=False)
    nn.init.normal_(linear.weight)
    return native_layers.ROUNDED_LINEARS[kind](linear)


def rounded_inputs(x: torch.Tensor) -> torch.Tensor:
    """x as the integers and scales of `linear_int8`, which are found in float32."""
    blocks = x.split(BLOCK, -1)
    largest = [block.abs().amax(-1, keepdim=True) for block in blocks]
    pairs = zip(blocks, largest)
    return torch.cat(
        [(block * (127 / most)).round().double() * most.double() / 127 for block, most in pairs], -1
    )


def int8_weight(layer: native_layers.RoundedLinear) -> torch.Tensor:
    """The weight that `linear_int8` multiplies: int4 is brought to 8 bits first, also in float32."""
    if isinstance(layer, native_layers.Int8Linear):
        return layer.widened().double()
    steps = layer.widened() / layer.scale.float().repeat_interleave(32, 1)  # Q - 8
    blocks = zip(steps.split(BLOCK, 1), layer.scale.float().split(BLOCK // 32, 1))
    return torch.cat([_in_8_bits(step, scale) for step, scale in blocks], 1)


def _in_8_bits(steps: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    largest = 8 * scale.abs().amax(1, keepdim=True)
    multiple = (scale * (127 / largest)).repeat_interleave(32, 1)
    return (multiple * steps.round()).round().double() * largest.double() / 127


SHAPES = [(1, 16, 3), (9, 80, 33), (17, 256, 64), (100, 272, 130), (600, 528, 70)]
"""(rows of x, columns, rows of W): less than a register, a tile, a block and a piece, and more. 528 columns end after a
fourth of an AMX register."""


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("count, columns, rows", SHAPES)
def test_product_is_that_of_the_rounded_numbers(count, columns, rows, kind):
    """Exact in integers, so what is left are float32's roundings of the sums of blocks."""
    if kind == "int4" and columns % 32:
        columns += 16
    torch.manual_seed(0)
    layer, x = rounded_layer(kind, rows, columns), torch.randn(count, columns)
    found = native.linear_int8(x, layer.weight, layer.scale)
    expected = rounded_inputs(x) @ int8_weight(layer).T
    # Of an int4 weight, 4 steps are 63.5 of the 127: there a compiler's fused multiply-add may round the other way.
    assert (found - expected).norm() < (1e-2 if kind == "int4" else 1e-5) * expected.norm()
    # Steps of 1/127 of the largest of up to 256 numbers, in x and for int4 in W.
    exact = x.double() @ layer.widened().double().T
    assert (found - exact).norm() < max(0.02, 0.1 / found.numel() ** 0.5) * exact.norm()


@pytest.mark.parametrize("dtype", formats.FLOAT_DTYPES)
def test_inputs_of_each_dtype(dtype):
    torch.manual_seed(0)
    layer, x = rounded_layer("int8", 50, 96), torch.randn(2, 20, 96).to(dtype)
    found = native.linear_int8(x, layer.weight, layer.scale)
    expected = native.linear_int8(x.float(), layer.weight, layer.scale)
    assert found.dtype == dtype and torch.equal(found, expected.to(dtype))


def test_largest_numbers_do_not_overflow():
    """Every integer 127: AVX2's product of 8 bits would saturate."""
    weight = torch.full((8, 2048), 127, dtype=torch.int8)
    for sign in (1, -1):
        x = sign * torch.ones(20, 2048)
        found = native.linear_int8(x, weight, torch.ones(8))
        assert torch.allclose(found, torch.full((20, 8), sign * 127.0 * 2048))


def test_rows_do_not_depend_on_one_another():
    """A row of zeros stays zero, a row with an outlier rounds no other one, and NaN stays in its row."""
    torch.manual_seed(0)
    layer, x = rounded_layer("int8", 40, 64), torch.randn(30, 64)
    alone = native.linear_int8(x[3:4], layer.weight, layer.scale)
    x[0], x[1, 5], x[2, 7] = 0, 1e6, float("nan")
    found = native.linear_int8(x, layer.weight, layer.scale)
    assert torch.equal(found[3:4], alone)
    assert not found[0].any() and found[3:].isfinite().all()


AVX2 = ("-mavx2", "-mfma", "-mf16c", "-fopenmp")
VNNI = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni")


@pytest.mark.parametrize("for_this_cpu", [(), AVX2, VNNI], ids=["none", "AVX2", "VNNI"])
def test_each_instruction_set(for_this_cpu, monkeypatch, tmp_path):
    """They differ in how many rows they take at once, and in whether products of 8 or of 16 bits are summed.

    The other tests are of this CPU's own, such as AMX.
    """
    if for_this_cpu == AVX2 and not torch.cpu._is_avx2_supported():
        pytest.skip("the CPU has no AVX2")
    if for_this_cpu == VNNI and not torch.cpu._is_vnni_supported():
        pytest.skip("the CPU has no VNNI")
    monkeypatch.setattr(library, "FOR_THIS_CPU", (for_this_cpu,))
    native.build_native_ops(tmp_path)
    assert native.library().contract["FAST_INT8"] == bool(for_this_cpu)
    for kind in ("int8", "int4"):
        for shape in SHAPES:
            test_product_is_that_of_the_rounded_numbers(*shape, kind)
    test_largest_numbers_do_not_overflow()
    test_rows_do_not_depend_on_one_another()


@pytest.fixture
def products(monkeypatch) -> list[int]:
    """How many rows each product in integers had."""
    counts, multiply = [], native_layers.linear_int8
    monkeypatch.setattr(
        native_layers,
        "linear_int8",
        lambda x, *w: (counts.append(x.numel() // x.shape[-1]), multiply(x, *w))[1],
    )
    return counts


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("version", [5, 6, 7])
@torch.no_grad()
def test_prompt_equals_plain_within_8_bits(version, kind, products):
    """Rounding what a layer reads to 8 bits changes about as much as rounding its weight to 8 bits has."""
    config = text_config(version, hidden_size=128)
    exact, model = awake(VisualRWKVForCausalLM(config)), awake(VisualRWKVForCausalLM(config))
    native_layers.accelerate_on_cpu(model, weights=kind)
    if not native.library().contract["FAST_INT8"]:
        pytest.skip("the CPU has no fast products of integers")
    ids = torch.randint(1, 320, (2, 40))
    found = model(ids).logits
    assert set(products) == {80}
    with kernel_backend("torch"):
        plain = model(ids).logits
        before = (plain - exact(ids).logits).norm()
    assert 0 < (found - plain).norm() < 3 * before


def test_integers_are_for_inference_only(products):
    """With a gradient, traced, under autocast or with the torch backend, x is not rounded."""
    layer, x = rounded_layer("int8", 32, 64), torch.randn(20, 64)
    expected = x.double() @ layer.widened().double().T
    exact = [layer(x)]
    with torch.no_grad(), kernel_backend("torch"):
        exact.append(layer(x))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    assert not products
    assert all((found - expected).norm() < 1e-5 * expected.norm() for found in exact)
