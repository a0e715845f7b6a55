"""Products of many rows in bfloat16 against float64 on the same numbers, and against torch in a model."""

import copy

import pytest
import torch
from native_ops import NEEDS_NATIVE_OPS
from tiny import awake, text_config
from torch import nn

from visualrwkv_hf import VisualRWKVForCausalLM, VisualRWKVVisionConfig
from visualrwkv_hf.cpu import attention as native_attention
from visualrwkv_hf.cpu import layers as native_layers
from visualrwkv_hf.cpu import ops as native
from visualrwkv_hf.cpu import sam_attention
from visualrwkv_hf.dispatch import kernel_backend
from visualrwkv_hf.modeling_vision import VisualRWKVVisionModel

pytestmark = NEEDS_NATIVE_OPS


def vision_config(encoder: str) -> VisualRWKVVisionConfig:
    """Two layers with heads of 8 dimensions on a small picture; SAM's first layer has windows of a map of 4 x 4."""
    if encoder == "sam":
        sizes = dict(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_dim=48, output_channels=16
        )
        windows = dict(image_size=64, patch_size=16, window_size=3, global_attn_indexes=[1])
        return VisualRWKVVisionConfig(sam_config=sizes | windows, feature_layer=-1)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14)
    widths = {} if encoder == "dinov2" else {"intermediate_size": 48}
    return VisualRWKVVisionConfig(**{f"{encoder}_config": sizes | widths}, feature_layer=-1)


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


# --- attention ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "N, L, H, D", [(1, 1, 1, 2), (2, 17, 3, 8), (1, 40, 2, 72), (1, 130, 1, 64), (1, 48, 2, 160)]
)
def test_attention_equals_torchs(N, L, H, D):
    """Within bfloat16's rounding of the weights and of the result; scores reach 20, so that weights differ."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(N, L, H, D).bfloat16() for _ in range(3))
    scale = 2 * D**-0.5
    found = native.attention_bf16(q, k, v, scale)
    per_head = [x.transpose(1, 2).double() for x in (q, k, v)]
    exact = nn.functional.scaled_dot_product_attention(*per_head, scale=scale).transpose(1, 2)
    assert found.dtype == torch.bfloat16 and (found - exact).norm() < 2.0**-8 * exact.norm()


def test_attention_with_a_bias_for_rows_and_columns():
    torch.manual_seed(0)
    N, H, D, height, width = 2, 3, 16, 5, 7
    q, k, v = (torch.randn(N, height * width, H, D).bfloat16() for _ in range(3))
    across, along = torch.randn(N, H, 35, height), torch.randn(N, H, 35, width)
    found = native.attention_bf16(q, k, v, 0.25, across, along)
    per_head = [x.transpose(1, 2).double() for x in (q, k, v)]
    bias = (across[..., None] + along[..., None, :]).flatten(3).double()
    exact = nn.functional.scaled_dot_product_attention(*per_head, attn_mask=bias, scale=0.25).transpose(1, 2)
    assert (found - exact).norm() < 2.0**-8 * exact.norm()


def test_attention_of_extreme_scores():
    """Largest scores far from the others, equal ones, and a NaN in one head."""
    q = torch.zeros(1, 20, 3, 16).bfloat16()
    k, v = q.clone(), torch.randn(1, 20, 3, 16).bfloat16()
    q[:, :, 0], k[:, 7, 0] = 100, 100
    q[:, 3, 2, 0] = float("nan")
    found = native.attention_bf16(q, k, v, 1.0)
    assert torch.equal(found[0, :, 0], v[0, 7, 0].expand(20, 16))
    assert (found[0, :, 1] - v[0, :, 1].float().mean(0)).abs().max() < 2.0**-8
    assert found[0, 3, 2].isnan().all() and found[0, :3, 2].isfinite().all()


@pytest.mark.parametrize("encoders", ["clip", "siglip", "dinov2", "sam"])
@torch.no_grad()
def test_towers_attend_natively(encoders, monkeypatch):
    """Only the accelerated model, without a mask, and not for the torch backend or another choice of attention."""
    monkeypatch.setattr(native_attention, "has_tiles", lambda: False)
    counts, compute = [], native_attention.attention_bf16
    for module in (native_attention, sam_attention):
        monkeypatch.setattr(module, "attention_bf16", lambda *x: (counts.append(x[0].shape), compute(*x))[1])
    config = vision_config(encoders)
    torch.manual_seed(0)
    tower = VisualRWKVVisionModel(config).eval().bfloat16()
    other = VisualRWKVVisionModel(config).eval().bfloat16()
    for weight in tower.parameters():  # SAM's biases are zero at first
        weight.data += 0.2 * torch.randn_like(weight)
    native_attention.use_native_attention(tower)
    copied = copy.deepcopy(tower)
    side = next(iter(config.image_sizes.values()))
    pixels = torch.randn(1, 3, side, side).bfloat16()
    exact = copy.deepcopy(tower).float()(pixels.float()).last_hidden_state
    assert not counts
    found = tower(pixels).last_hidden_state
    assert len(counts) == 2
    assert torch.equal(copied(pixels).last_hidden_state, found) and len(counts) == 4
    other(pixels)
    with kernel_backend("torch"):
        plain = tower(pixels).last_hidden_state
    if encoders != "sam":  # which chooses when it is built
        tower.set_attn_implementation("eager")
        tower(pixels)
    assert len(counts) == 4
    assert 0 < (found - exact).norm() < 1.5 * (plain - exact).norm() < 0.1 * exact.norm()
