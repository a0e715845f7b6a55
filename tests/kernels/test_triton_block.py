"""One token through a block in a few launches: each kernel against plain torch, and the block against its parts."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("triton")

from tiny import awake, text_config
from triton_interpreter import POISONED_KERNELS, launches

from visualrwkv_hf import VisualRWKVForCausalLM, kernel_backend, layer_state
from visualrwkv_hf.generations import GENERATIONS
from visualrwkv_hf.layer_state import LayerState, empty_pool
from visualrwkv_hf.rwkv7_time_mix import rwkv7_decode
from visualrwkv_hf.triton_kernels import block as fused
from visualrwkv_hf.triton_kernels.decode import rwkv7_decode_low_rank
from visualrwkv_hf.triton_kernels.norm_shift import norm_shift
from visualrwkv_hf.triton_kernels.products import FUNCTIONS, products

pytestmark = POISONED_KERNELS

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


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=[torch.zeros(65, 32)]), "at most 64 rows, got 65"),
        (dict(x=[torch.zeros(2, 2, 32)]), r"\[B, C\] or \[B, 1, C\], got \[2, 2, 32\]"),
        (dict(x=[]), r"of one length >= 1, got \(0, 1, 1, 1\)"),
        (dict(functions=["tanh"] * 2), r"of one length >= 1, got \(1, 1, 2, 1\)"),
        (dict(functions=["gelu"]), "squared_relu, got gelu"),
        (dict(by_output=[False]), "do not fit a weight"),
        (dict(weights=[torch.zeros(16, 32).half()]), "of one dtype"),
        (dict(residual=torch.zeros(4, 15)), r"residual must be \[B, N\] = \[4, 16\].*got \[4, 15\]"),
        (dict(gate=torch.zeros(3, 16)), r"gate must be \[B, N\] = \[4, 16\].*got \[3, 16\]"),
    ],
)
def test_products_refuses_what_it_does_not_serve(change, message):
    arguments = dict(x=[torch.zeros(4, 32)], weights=[torch.zeros(16, 32)])
    arguments |= dict(functions=["identity"], by_output=[True])
    with pytest.raises(ValueError, match=message):
        products(**(arguments | change))


def test_what_is_added_to_products_fits_all_of_them():
    x, weights, residual = torch.zeros(4, 32), [torch.zeros(16, 32), torch.zeros(8, 32)], torch.zeros(4, 16)
    with pytest.raises(ValueError, match=r"residual must be \[B, N\] = \[4, 8\].*got \[4, 16\]"):
        products([x, x], weights, ["identity"] * 2, [True] * 2, residual=residual)


def test_products_have_no_gradient():
    with pytest.raises(RuntimeError, match="no gradient"):
        products([torch.zeros(4, 32).requires_grad_()], [torch.zeros(16, 32)], ["identity"], [True])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_products_do_not_lose_nan(function):
    x, w = random(2, 32), random(16, 32)
    x[1, 3] = torch.nan
    (y,) = products([x], [w], [function], [True])
    assert not y[0].isnan().any() and y[1].isnan().all()


def norm_shift_arguments():
    """B = 3 sequences in the slots 4, 0, 2 of a pool of 5."""
    x, weight, bias, carried = (random(*shape) for shape in ((3, 32), (32,), (32,), (5, 32)))
    arguments = dict(x=x, norm_weight=weight, norm_bias=bias, eps=1e-5, carried=carried, mix=[random(32)])
    return arguments | dict(mask=torch.tensor([True, False, True]), state_indices=torch.tensor([4, 0, 2]))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(3, 2, 32)), r"\[B, C\] or \[B, 1, C\], got \[3, 2, 32\]"),
        (dict(x=torch.zeros(4, 32)), r"state_indices must be int32 or int64 \[B\] = \[4\]"),
        (dict(x=torch.zeros(2, 32)), r"state_indices must be int32 or int64 \[B\] = \[2\]"),
        (dict(state_indices=torch.zeros(3)), r"got torch.float32 \[3\]"),
        (dict(state_indices=None), r"carried must be \[B, C\] = \[3, 32\] .*got \[5, 32\]"),
        (dict(mask=torch.ones(2, dtype=torch.bool)), r"mask must be bool \[B\] = \[3\]"),
        (dict(mask=torch.ones(3)), r"got torch.float32 \[3\]"),
        (dict(carried=torch.zeros(5, 32).half()), "got torch.float32, torch.float16"),
        (dict(carried=torch.zeros(5, 31)), "C = 32 elements"),
        (dict(carried=torch.zeros(32, 5).T), r"contiguous and apart, got strides \(1, 5\)"),
        (dict(carried=torch.zeros(1, 32).expand(5, 32)), r"contiguous and apart, got strides \(0, 1\)"),
    ],
)
def test_norm_shift_refuses_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        norm_shift(**(norm_shift_arguments() | change))


def test_norm_shift_reads_columns_of_tables():
    arguments, strided = norm_shift_arguments(), norm_shift_arguments()
    for name in ("norm_weight", "norm_bias", "mask", "state_indices"):
        strided[name] = torch.stack([arguments[name], arguments[name].flip(0)], 1)[:, 0]
    mixed, expected = (torch.stack(norm_shift(**kwargs)) for kwargs in (strided, arguments))
    assert torch.equal(mixed, expected) and torch.equal(strided["carried"], arguments["carried"])


def test_norm_shift_counts_as_a_write_of_what_it_carries():
    arguments = norm_shift_arguments()
    before = arguments["carried"]._version
    norm_shift(**arguments)
    assert arguments["carried"]._version > before


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


def states_of(config, slots):
    return empty_pool(GENERATIONS[config.rwkv_version].states, config, slots, torch.float32, "cpu")


def some_states(config, slots):
    """States after some text, with others in between."""
    shapes = {name: x.shape[1:] for name, x in states_of(config, slots).items()}
    return {name: random(2 * slots, *shape, seed=i)[::2] for i, (name, shape) in enumerate(shapes.items())}


def step(block, config, backend, B=3, pool=True, seed=0):
    """The outputs and states of a token after some state, and the launches."""
    version = config.rwkv_version
    tensors = some_states(config, B + 2)
    state = LayerState(tensors if pool else {name: x[:B] for name, x in tensors.items()})
    if pool:
        state = state._replace(indices=torch.stack([torch.arange(B) + 1] * 2, 1)[:, 0])  # a column of a table
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


@pytest.mark.parametrize("version", [5, 6, 7])
def test_a_block_of_no_sequences_changes_no_state(version):
    block, config = block_of(version)
    (out, *states), seen = step(block, config, "triton", B=0)
    assert out.shape == (0, 1, 64) and len(seen) == LAUNCHES[version]
    assert all(torch.equal(x, y) for x, y in zip(states, some_states(config, 2).values(), strict=True))


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


def laid_out_otherwise(block):
    block.ffn.key.weight.data = block.ffn.key.weight.data.T.contiguous().T


def of_another_dtype(block):
    """Change weights that are multiplied or added element by element: torch computes these in the larger dtype."""
    for weight in (block.att.w0, block.att.r_k, block.ffn.x_k):
        weight.data = weight.data.bfloat16()


def biased(block):
    block.ffn.value.bias = nn.Parameter(torch.ones(64))


@pytest.mark.parametrize("change", [replaced, hooked, laid_out_otherwise, of_another_dtype, biased])
def test_a_changed_block_is_computed_by_its_parts(change):
    block, config = block_of(7)
    change(block)
    expected, _ = step(block, config, "torch")
    actual, seen = step(block, config, "triton")
    assert "norm_shift_fwd_kernel" not in {launch.kernel for launch in seen}
    for x, y in zip(actual, expected, strict=True):
        assert_close(x, y.double(), torch.float32)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_product_with_weights_of_another_dtype_is_refused(backend):
    block, config = block_of(7)
    block.ffn.key.weight.data = block.ffn.key.weight.data.bfloat16()
    with pytest.raises(RuntimeError, match="same dtype"):
        step(block, config, backend)


def of_one_group(block):
    block.att.ln_x.num_groups = 1


def of_no_groups(block):
    block.att.ln_x = nn.LayerNorm(64)


def without_weight(block):
    block.ln2 = nn.LayerNorm(64, elementwise_affine=False)


@pytest.mark.parametrize("change", [of_one_group, of_no_groups, without_weight])
def test_other_norms_are_computed_by_the_blocks_parts(change):
    block, config = block_of(7)
    change(block)
    expected, _ = step(block, config, "torch", pool=False)
    actual, seen = step(block, config, "triton", pool=False)
    assert "norm_shift_fwd_kernel" not in {launch.kernel for launch in seen}
    for x, y in zip(actual, expected, strict=True):
        assert_close(x, y.double(), torch.float32)


def test_more_sequences_than_the_kernels_take_are_computed_by_the_blocks_parts():
    block, config = block_of(7)
    expected, _ = step(block, config, "torch", B=65)
    actual, seen = step(block, config, "triton", B=65)
    assert "products_fwd_kernel" not in {launch.kernel for launch in seen}
    for x, y in zip(actual, expected, strict=True):
        assert_close(x, y.double(), torch.float32)


def refused(block, x, state, error, message):
    """Assert that a step with Triton kernels raises, and has written no state and launched none of the fused ones."""
    before = {name: tensor.clone() for name, tensor in state.tensors.items()}
    with torch.no_grad(), kernel_backend("triton"), launches() as seen, pytest.raises(error, match=message):
        block(x, random(*x.shape, seed=1), state)
    assert "norm_shift_fwd_kernel" not in {launch.kernel for launch in seen}
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("B", [2, 4])
@pytest.mark.parametrize("pool", [False, True])
def test_fewer_or_more_sequences_than_states_are_refused(B, pool):
    """The kernels would leave a state behind, or write past the last one."""
    block, config = block_of(7)
    state = LayerState(states_of(config, 5 if pool else 3), torch.arange(3) if pool else None)
    refused(block, random(B, 1, 64), state, ValueError, rf"S = {B} sequences.*got \[3, 64\]")


def test_a_recurrent_state_of_another_dtype_is_refused():
    block, config = block_of(7)
    states = states_of(config, 3)
    states["wkv"] = states["wkv"].bfloat16()
    refused(block, random(3, 1, 64), LayerState(states), ValueError, "must be float32")


def test_states_that_share_memory_are_not_written():
    """As where all sequences of a batch begin with the same one."""
    block, config = block_of(7)
    shared = {name: x[:1].expand(3, *x.shape[1:]) for name, x in states_of(config, 3).items()}
    refused(block, random(3, 1, 64), LayerState(shared), RuntimeError, "apart from the others")
    state = LayerState(shared | {"wkv": shared["wkv"].contiguous()})
    x, v_first, results = random(3, 1, 64), random(3, 1, 64, seed=1), []
    for backend in ("torch", "triton"):
        with torch.no_grad(), kernel_backend(backend):
            results.append(block(x, v_first, state._replace(tensors=dict(state.tensors))).hidden_states)
    assert_close(results[1], results[0].double(), torch.float32)


def test_the_names_of_states_are_those_of_the_model():
    for name in ("TIME_MIX_SHIFT", "CHANNEL_MIX_SHIFT", "WKV"):
        assert getattr(fused, name) == getattr(layer_state, name)
