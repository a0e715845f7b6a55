"""On a GPU, compiled: `TRITON_INTERPRET=0 pytest -m gpu`. What the interpreter does not know: races, memory, graphs."""

import pytest
import torch
from tiny import awake, text_config
from torch.nn.functional import normalize

from visualrwkv_hf import VisualRWKVForCausalLM, kernel_backend, wkv6, wkv7

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

# Relative to float64. Rounding the output alone is 1.7e-3 in bfloat16; dots round their operands once more.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SHAPES = {"picture": (1, 1088, 32, 64), "batch": (4, 515, 16, 64), "small heads": (2, 130, 4, 32)}
SHAPES |= {"large heads": (2, 130, 4, 128)}


def inputs_of(op, B, T, H, K, dtype):
    generator = torch.Generator().manual_seed(0)
    r, k, v, kk, noise = (torch.randn(B, T, H, K, generator=generator) for _ in range(5))
    kk, rate = normalize(kk, dim=-1), torch.rand(B, T, H, K, generator=generator)
    if op is wkv6:
        tokens = [r, -torch.exp(noise), k, v, torch.randn(H, K, generator=generator)]
    else:
        tokens = [r, -0.6065 * torch.sigmoid(noise), k, v, -kk, kk * rate]
    state = torch.randn(B, H, K, K, generator=generator)
    return [x.to(DEVICE, dtype) for x in tokens] + [state.to(DEVICE)]


def run(op, inputs, backend, order):
    inputs = [x.detach().requires_grad_() for x in inputs]
    options = {} if op is wkv6 else {"min_log_decay": -0.6065306597126334}
    with kernel_backend(backend):
        y, state = op(*inputs, order=order, **options)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(DEVICE)
    total = (y.double() * weights.double()).sum() + state.double().square().sum()
    return [y.detach(), state.detach(), *torch.autograd.grad(total, inputs)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("op", [wkv6, wkv7])
def test_op_equals_float64(op, shape, dtype):
    inputs = inputs_of(op, *shape, dtype)
    B, T = shape[:2]
    order = torch.arange(T, device=DEVICE).repeat(B, 1)
    order[:, 20:100] = order[:, 20:100].flip(1)
    order[0, :7] = ~order[0, :7]  # pads
    expected = run(op, [x.double() for x in inputs], "torch", order)
    actual = run(op, inputs, "triton", order)
    again = run(op, inputs, "triton", order)
    for x, y, z in zip(actual, expected, again):
        assert (x.double() - y).norm() <= TOLERANCE[dtype] * y.norm()
        assert torch.equal(x, z), "deterministic"


@torch.no_grad()
@pytest.mark.parametrize("shape", [SHAPES["picture"], (2, 1088, 16, 64)], ids=str)
@pytest.mark.parametrize("op", [wkv6, wkv7])
def test_op_without_gradients_equals_float64(op, shape):
    """In wkv7 the chunks of a picture's length are then longer, 64 tokens, which no training compiles."""
    inputs = inputs_of(op, *shape, torch.bfloat16)
    options = {} if op is wkv6 else {"min_log_decay": -0.6065306597126334}
    with kernel_backend("torch"):
        expected = op(*(x.double() for x in inputs), **options)
    with kernel_backend("triton"):
        actual, again = op(*inputs, **options), op(*inputs, **options)
    for x, y, z in zip(actual, expected, again):
        assert (x.double() - y).norm() <= TOLERANCE[torch.bfloat16] * y.norm()
        assert torch.equal(x, z), "deterministic"


def logits_and_gradients(model, ids, backend):
    model.zero_grad()
    with kernel_backend(backend):
        logits = model(ids, use_cache=False).logits.float()
        logits.square().mean().backward()
    return [logits.detach(), *(weight.grad.float() for weight in model.parameters())]


@pytest.mark.parametrize("version", [5, 6, 7])
def test_model_equals_plain_torch(version):
    model = awake(VisualRWKVForCausalLM(text_config(version, head_dim=64, hidden_size=256))).to(DEVICE)
    ids = torch.randint(1, 300, (2, 200), device=DEVICE)
    plain, ours = (logits_and_gradients(model, ids, backend) for backend in ("torch", "triton"))
    for x, y in zip(ours, plain):
        assert (x - y).norm() <= 1e-4 * y.norm()


@pytest.mark.parametrize("version", [5, 6, 7])
def test_model_in_bfloat16_is_as_exact_as_plain_torch(version):
    """These random weights magnify what is rounded, to a third of the gradients in RWKV-6, so that no tolerance
    would say much: plain torch's own error is the measure. On a CPU ours was up to 2.3 times as large, or smaller."""
    model = awake(VisualRWKVForCausalLM(text_config(version, head_dim=64, hidden_size=256)))
    model = model.to(DEVICE, torch.bfloat16)
    ids = torch.randint(1, 300, (2, 200), device=DEVICE)
    exact = logits_and_gradients(model.float(), ids, "torch")
    plain, ours = (logits_and_gradients(model.bfloat16(), ids, backend) for backend in ("torch", "triton"))
    for part in (slice(0, 1), slice(1, None)):  # logits, gradients
        x, y, z = (torch.cat([tensor.flatten() for tensor in found[part]]) for found in (ours, plain, exact))
        assert (x - z).norm() <= 4 * (y - z).norm()


@pytest.mark.parametrize("version", [5, 6, 7])
def test_generate_with_the_static_cache_equals_plain_torch(version):
    """generate() compiles the step, and on a GPU records it as a graph."""
    model = awake(VisualRWKVForCausalLM(text_config(version, head_dim=64, hidden_size=256)))
    model = model.to(DEVICE).float().eval()
    ids = torch.randint(1, 300, (2, 50), device=DEVICE)
    with kernel_backend("torch"):
        expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    with kernel_backend("triton"):
        for cache in ("dynamic", "static"):
            actual = model.generate(ids, max_new_tokens=20, do_sample=False, cache_implementation=cache)
            assert torch.equal(actual, expected)
