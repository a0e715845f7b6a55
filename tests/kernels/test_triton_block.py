"""One token through a block in a few launches: each kernel against plain torch, and the block against its parts."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("triton")

from tiny import awake, text_config
from triton_interpreter import INTERPRETED, launches

from visualrwkv_hf import VisualRWKVForCausalLM, kernel_backend, layer_state
from visualrwkv_hf.generations import GENERATIONS
from visualrwkv_hf.layer_state import LayerState, empty_pool
from visualrwkv_hf.rwkv7_time_mix import rwkv7_decode
from visualrwkv_hf.triton_kernels import block as fused
from visualrwkv_hf.triton_kernels.decode import rwkv7_decode_low_rank
from visualrwkv_hf.triton_kernels.norm_shift import norm_shift
from visualrwkv_hf.triton_kernels.products import products

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="Triton compiles here: TRITON_INTERPRET is 0")

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
"""Of a result rounded once to its dtype, relative to the norm of the float64 one."""


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def assert_close(actual, expected, dtype):
    error = (actual.double() - expected).norm() / expected.norm().clamp(min=1e-12)
    assert error < TOLERANCE[dtype], float(error)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("of_current", [False, True])
def test_norm_shift_equals_plain_torch(dtype, of_current):
    B, C, N = 3, 96, 5  # 96 is no power of two: the norm's row has a tail
    x, weight, bias = (random(*shape, dtype=dtype) for shape in ((B, 1, C), (C,), (C,)))
    pool = random(N, 2 * C, dtype=dtype, seed=1)[:, C:]  # other states lie in between
    mix = [random(C, dtype=dtype, seed=m) for m in range(2)]
    slots, mask = torch.tensor([4, 0, 2]), torch.tensor([True, False, True])
    before = pool.clone()
    mixed = norm_shift(
        x, weight, bias, 1e-5, pool, mix, mask=mask, state_indices=slots, of_current=of_current, ends=True
    )
    normed = F.layer_norm(x.double(), (C,), weight.double(), bias.double(), 1e-5)[:, 0].to(dtype).double()
    previous = torch.where(mask[:, None], before[slots].double(), normed)
    expected = [
        normed + (previous - normed) * (1 - m.double() if of_current else m.double()) for m in mix
    ] + [normed, previous]
    for actual, plain in zip(mixed, expected, strict=True):
        assert actual.shape == x.shape and actual.dtype == dtype
        assert_close(actual[:, 0], plain, dtype)
    assert torch.equal(pool[[0, 1, 3]], before[[0, 1, 3]])  # a pad's slot, and slots of nobody
    assert_close(pool[[4, 2]], normed[[0, 2]], dtype)


@pytest.mark.parametrize("rows", [1, 20, 64])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_products_equal_plain_torch(dtype, rows):
    C, sizes = 96, (64, 40, 24, 33)
    x = [random(rows, C, dtype=dtype, seed=m) for m in range(4)]
    linear = [True, True, False, False]
    weights = [
        random(*((n, C) if rows_first else (C, n)), dtype=dtype) / 8 for n, rows_first in zip(sizes, linear)
    ]
    plain = {
        "identity": lambda x: x,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "squared_relu": lambda x: x.relu() ** 2,
    }
    results = products(x, weights, list(plain), linear)
    for actual, x_m, w, f, rows_first in zip(results, x, weights, plain.values(), linear, strict=True):
        w = w.double().T if rows_first else w.double()
        assert_close(actual, f(x_m.double() @ w), dtype)
    residual, gate = random(rows, 64, dtype=dtype, seed=7), random(rows, 64, dtype=dtype, seed=8)
    (actual,) = products(x[:1], weights[:1], ["identity"], [True], residual=residual, gate=gate)
    expected = residual.double() + gate.double() * (x[0].double() @ weights[0].double().T)
    assert_close(actual, expected, dtype)


def test_products_refuses_what_it_does_not_serve():
    x, w = torch.zeros(65, 32), torch.zeros(16, 32)
    with pytest.raises(ValueError, match="at most 64 rows, got 65"):
        products([x], [w], ["identity"], [True])
    with pytest.raises(ValueError, match="do not fit a weight"):
        products([x[:4]], [w], ["identity"], [False])
    with pytest.raises(RuntimeError, match="no gradient"):
        products([x[:4].requires_grad_()], [w], ["identity"], [True])


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("B", [1, 19])  # 19 sequences are 7 programs a head, the last of 1 sequence
def test_decode_with_its_maps_equals_maps_and_decode(B, first):
    H, K, ranks = 2, 32, (48, 16, 70) if first else (48, 16, 70, 32)
    A = H * K
    r, k, v, v_first = (random(B, A, seed=s) for s in range(4))
    low = [random(B, D, seed=D) / 4 for D in ranks]
    up = [random(D, A, seed=D) / 4 for D in ranks]
    w0, a0, v0, k_k, k_a, r_k, weight, bias = (random(A, seed=s) for s in range(10, 18))
    state, mask = random(B + 2, H, K, K), torch.arange(B) != 2
    slots = torch.randperm(B + 2, generator=torch.Generator().manual_seed(1))[:B]
    expected_state = state.clone().double()
    decay, rate, gate, *lerp = (x.double() @ w.double() for x, w in zip(low, up))
    wide = {
        "decay": decay,
        "rate": rate,
        "gate": gate,
        "r": r,
        "k": k,
        "v": v,
        "w0": w0,
        "a0": a0,
        "k_k": k_k,
    }
    wide |= {"k_a": k_a, "r_k": r_k, "norm_weight": weight, "norm_bias": bias}
    if not first:
        wide |= {"value_gate": lerp[0], "v_first": v_first, "v0": v0}
    expected = rwkv7_decode(
        **{name: x.double() for name, x in wide.items()},
        state=expected_state,
        eps=64e-5,
        mask=mask,
        state_indices=slots,
    )
    actual = rwkv7_decode_low_rank(
        *(r, k, v, None if first else v_first, low, up, w0, a0, None if first else v0, k_k, k_a, r_k),
        *(weight, bias, state, mask, slots, 64e-5),
    )
    assert_close(actual, expected, torch.float32)
    assert_close(state, expected_state, torch.float32)


# --- the block ----------------------------------------------------------------------------------------

LAUNCHES = {5: 7, 6: 10, 7: 7}
"""Of a layer, for one token. RWKV-6 has one batched product of torch's beside them."""


def block_of(version, layer=1):
    config = text_config(version, head_dim=32, hidden_size=64)
    return awake(VisualRWKVForCausalLM(config)).float().eval().model.layers[layer], config


def step(block, config, backend, B=3, pool=True, seed=0):
    """The outputs and states of a token after some state, and the launches."""
    version = config.rwkv_version
    tensors = empty_pool(GENERATIONS[version].states, config, B + 2, torch.float32, "cpu")
    for i, (name, tensor) in enumerate(tensors.items()):
        tensors[name] = random(*(2 * tensor.shape[0], *tensor.shape[1:]), seed=i)[
            ::2
        ]  # others lie in between
    state = LayerState(tensors if pool else {name: x[:B] for name, x in tensors.items()})
    if pool:
        state = state._replace(indices=torch.arange(B) + 1)
    x, v_first = random(B, 1, 64, seed=seed), random(B, 1, 64, seed=seed + 1)
    with torch.no_grad(), kernel_backend(backend), launches() as seen:
        out = block(x, v_first if version == 7 else None, state)
    return (out.hidden_states, *state.updated(out.updates).tensors.values()), seen


@pytest.mark.parametrize("version", [5, 6, 7])
@pytest.mark.parametrize("B, pool", [(1, False), (18, True)])
def test_a_block_in_few_launches_equals_its_parts(version, B, pool):
    block, config = block_of(version)
    expected, _ = step(block, config, "torch", B, pool)
    actual, seen = step(block, config, "triton", B, pool)
    assert len(seen) == LAUNCHES[version], Counter(launch.kernel for launch in seen)
    for x, y in zip(actual, expected, strict=True):
        assert_close(x, y.double(), torch.float32)


class Scaled(nn.Module):
    """A linear layer that an adapter has replaced."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 2 * self.layer(x)


def replaced(block):
    block.att.key = Scaled(block.att.key)


def hooked(block):
    block.ffn.value.register_forward_hook(lambda module, inputs, output: 3 * output)


def of_another_dtype(block):
    block.ffn.key.weight.data = block.ffn.key.weight.data.T.contiguous().T


@pytest.mark.parametrize("change", [replaced, hooked, of_another_dtype])
def test_a_changed_block_is_computed_by_its_parts(change):
    block, config = block_of(7)
    change(block)
    expected, _ = step(block, config, "torch")
    actual, seen = step(block, config, "triton")
    assert "norm_shift_fwd_kernel" not in {launch.kernel for launch in seen}
    for x, y in zip(actual, expected, strict=True):
        assert_close(x, y.double(), torch.float32)


def test_more_sequences_than_the_kernels_take_are_computed_by_the_blocks_parts():
    block, config = block_of(7)
    _, seen = step(block, config, "triton", B=65)
    assert "products_fwd_kernel" not in {launch.kernel for launch in seen}


def test_the_names_of_states_are_those_of_the_model():
    for name in ("TIME_MIX_SHIFT", "CHANNEL_MIX_SHIFT", "WKV"):
        assert getattr(fused, name) == getattr(layer_state, name)
