"""SAM's attention for some queries at a time against transformers', and how large the bias of its scores becomes."""

import pytest
import torch
from torch.nn import functional as F
from transformers import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionSdpaAttention

from visualrwkv_hf.cpu import sam_attention
from visualrwkv_hf.cpu.sam_attention import NativeSamAttention
from visualrwkv_hf.dispatch import kernel_backend

HEIGHT = WIDTH = 6
HEADS, QUERIES = 4, 10
"""QUERIES, of 36, are computed at a time: three times, and six at the end."""


@pytest.fixture
def layer():
    config = SamVisionConfig(hidden_size=32, num_attention_heads=HEADS, image_size=96, patch_size=16)
    torch.manual_seed(0)
    layer = SamVisionSdpaAttention(config, window_size=0).eval()
    for weight in layer.parameters():  # the biases are zero at first
        weight.data += 0.2 * torch.randn_like(weight)
    return layer


@pytest.fixture
def masks(monkeypatch):
    """The shapes of the biases that torch's attention was given, with room for those of QUERIES queries."""
    monkeypatch.setattr(sam_attention, "attends_natively", lambda *x: False)
    shapes, compute = [], F.scaled_dot_product_attention

    def attend(*x, attn_mask, **options):
        shapes.append(tuple(attn_mask.shape))
        monkeypatch.setattr(sam_attention, "BIAS_BYTES", 2 * HEADS * QUERIES * 36 * x[0].element_size())
        return compute(*x, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    return shapes


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2.0**-8)])
@torch.no_grad()
def test_attention_by_parts_equals_transformers(layer, masks, dtype, tolerance):
    x = torch.randn(2, HEIGHT, WIDTH, 32)
    exact = layer.double()(x.double())[0].double()
    layer, x = layer.to(dtype), x.to(dtype)
    whole = layer(x)[0]
    assert masks == [(2, HEADS, 36, 36)] * 2
    masks.clear()
    layer.__class__ = NativeSamAttention
    found = layer(x)[0]
    assert masks == [(2, HEADS, QUERIES, 36)] * 3 + [(2, HEADS, 6, 36)]
    assert (found - exact).norm() <= 1.1 * (whole - exact).norm() + tolerance * exact.norm()


def test_whoever_needs_gradients_or_plain_torch_gets_transformers(layer, masks):
    x = torch.randn(1, HEIGHT, WIDTH, 32)
    whole = layer(x)[0]
    layer.__class__ = NativeSamAttention
    found = layer(x)[0]
    with torch.no_grad(), kernel_backend("torch"):
        plain = layer(x)[0]
    assert masks == [(1, HEADS, 36, 36)] * 3
    assert torch.equal(found, whole) and found.requires_grad
    torch.testing.assert_close(plain, whole, rtol=0, atol=1e-5)  # torch computes gradients' scores otherwise
