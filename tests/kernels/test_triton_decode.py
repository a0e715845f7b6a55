"""The fused decoding steps against the equations in float64, and against the recurrences over many tokens."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

from triton_interpreter import POISONED_KERNELS

from visualrwkv_hf.rwkv7_time_mix import DECAY_SCALE
from visualrwkv_hf.triton_kernels import decode
from visualrwkv_hf.triton_kernels.decode import rwkv6_decode, rwkv7_decode
from visualrwkv_hf.triton_kernels.wkv7 import wkv7 as triton_wkv7
from visualrwkv_hf.wkv import wkv6, wkv7

pytestmark = POISONED_KERNELS

# The kernel computes in float32 and rounds its output once; its inputs are what they are. The state is never rounded.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}
EPS = 64e-5


def plain7(r, decay, k, v, rate, gate, state, w0, a0, k_k, k_a, r_k, norm_weight, norm_bias, eps, **values):
    """RWKV-7 over the tokens [B, T, A] from `state`: out [B, T, A] and the state behind them."""
    heads = (state.shape[1], state.shape[2])
    eta = torch.sigmoid(a0 + rate)
    kk = F.normalize((k * k_k).unflatten(-1, heads), dim=-1)
    k = k * (1 + (eta - 1) * k_a)
    if values:
        v = torch.lerp(v, values["v_first"], torch.sigmoid(values["v0"] + values["value_gate"]))
    w = -DECAY_SCALE * torch.sigmoid(w0 + decay)
    r, w, k, v, eta = (x.unflatten(-1, heads) for x in (r, w, k, v, eta))
    y, after = wkv7(r, w, k, v, -kk, kk * eta, state)
    normed = F.group_norm(y.flatten(2).flatten(0, 1), heads[0], norm_weight, norm_bias, eps)
    bonus = (r * k * r_k.view(heads)).sum(-1, keepdim=True) * v
    return (normed.view(gate.shape) + bonus.flatten(2)) * gate, after


def plain6(r, decay, k, v, gate, state, time_decay, u, norm_weight, norm_bias, eps):
    """RWKV-6, and 5 with `decay` None, over the tokens [B, T, A] from `state`."""
    heads = (state.shape[1], state.shape[2])
    w = -torch.exp(time_decay + (torch.zeros_like(r) if decay is None else decay))
    r, w, k, v = (x.unflatten(-1, heads) for x in (r, w, k, v))
    y, after = wkv6(r, w, k, v, u.view(heads), state)
    normed = F.group_norm(y.flatten(2).flatten(0, 1), heads[0], norm_weight, norm_bias, eps)
    return normed.view(gate.shape) * F.silu(gate), after


TOKENS7 = ("r", "decay", "k", "v", "rate", "gate")
WEIGHTS7 = ("w0", "a0", "k_k", "k_a", "r_k", "norm_weight", "norm_bias")
TOKENS6 = ("r", "decay", "k", "v", "gate")
WEIGHTS6 = ("time_decay", "u", "norm_weight", "norm_bias")

VARIANTS = {
    "rwkv7": (rwkv7_decode, plain7, (*TOKENS7, "value_gate", "v_first"), (*WEIGHTS7, "v0")),
    "rwkv7-layer-0": (rwkv7_decode, plain7, TOKENS7, WEIGHTS7),
    "rwkv6": (rwkv6_decode, plain6, TOKENS6, WEIGHTS6),
    "rwkv5": (rwkv6_decode, plain6, tuple(name for name in TOKENS6 if name != "decay"), WEIGHTS6),
}


def inputs(variant, B, T, H, K, dtype=torch.float32):
    """What the tokens bring [B, T, A], the weights [A], and a state [B, H, K, K]."""
    _, _, token_names, weight_names = VARIANTS[variant]
    generator = torch.Generator().manual_seed(0)
    tokens = {name: torch.randn(B, T, H * K, generator=generator).to(dtype) for name in token_names}
    weights = {name: torch.randn(H * K, generator=generator).to(dtype) for name in weight_names}
    if variant == "rwkv5":
        tokens["decay"] = None
    state = torch.randn(B, H, K, K, generator=generator)
    return tokens, weights, state


def double(tensors):
    return {name: None if x is None else x.double() for name, x in tensors.items()}


def at(tokens, t):
    return {name: None if x is None else x[:, t : t + 1] for name, x in tokens.items()}


def error(ours, truth):
    return float((ours.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("K", [32, 64, 128])
def test_a_step_matches_the_equations(variant, K, dtype):
    op, plain, *_ = VARIANTS[variant]
    tokens, weights, state = inputs(variant, 2, 1, 2, K, dtype)
    out_true, state_true = plain(**double(tokens), **double(weights), state=state.double(), eps=EPS)
    out = op(**tokens, **weights, state=state, eps=EPS)
    assert out.dtype == dtype and out.shape == tokens["r"].shape
    assert error(out, out_true) < TOLERANCE[dtype]
    assert error(state, state_true) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("variant", VARIANTS)
def test_twenty_steps_equal_the_recurrence_over_twenty_tokens(variant):
    op, plain, *_ = VARIANTS[variant]
    tokens, weights, state = inputs(variant, 2, 20, 2, 32)
    out_true, state_true = plain(**double(tokens), **double(weights), state=state.double(), eps=EPS)
    address = state.data_ptr()
    out = torch.cat([op(**at(tokens, t), **weights, state=state, eps=EPS) for t in range(20)], 1)
    assert state.data_ptr() == address
    assert error(out, out_true) < 1e-5  # the norm amplifies what little rounding the state has gathered
    assert error(state, state_true) < 5e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_pads_leave_the_state_alone(variant):
    op = VARIANTS[variant][0]
    tokens, weights, state = inputs(variant, 3, 1, 2, 32)
    before, alone = state.clone(), state.clone()
    out = op(**tokens, **weights, state=state, eps=EPS, mask=torch.tensor([True, False, True]))
    out_alone = op(**tokens, **weights, state=alone, eps=EPS)
    assert torch.equal(state[1], before[1]) and not out[1].any()
    assert torch.equal(state[::2], alone[::2]) and torch.equal(out[::2], out_alone[::2])


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_states_of_a_pool_are_updated_in_place(variant, index):
    """Row i of the batch uses row state_indices[i] of the pool; the other rows do not change."""
    op = VARIANTS[variant][0]
    tokens, weights, states = inputs(variant, 3, 1, 2, 32)
    pool = torch.randn(7, 2, 32, 32, generator=torch.Generator().manual_seed(3))
    state_indices = torch.tensor([5, 0, 3], dtype=index)
    pool[state_indices.long()] = states
    before, address = pool.clone(), pool.data_ptr()
    out_alone = op(**tokens, **weights, state=states, eps=EPS)
    out = op(**tokens, **weights, state=pool, eps=EPS, state_indices=state_indices)
    assert torch.equal(out, out_alone) and pool.data_ptr() == address
    before[state_indices.long()] = states
    assert torch.equal(pool, before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pool_may_hold_other_states_between(variant):
    """As in vLLM's, where the states of a layer lie one after another in a slot."""
    op = VARIANTS[variant][0]
    tokens, weights, states = inputs(variant, 3, 1, 2, 32)
    slots = torch.randn(7, 64 + 2 * 32 * 32, generator=torch.Generator().manual_seed(3))
    pool = slots[:, 64:].view(7, 2, 32, 32)
    state_indices = torch.tensor([5, 0, 3])
    pool[state_indices] = states
    before = slots.clone()
    out_alone = op(**tokens, **weights, state=states, eps=EPS)
    out = op(**tokens, **weights, state=pool, eps=EPS, state_indices=state_indices)
    assert torch.equal(out, out_alone)
    before[:, 64:].view_as(pool)[state_indices] = states
    assert torch.equal(slots, before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_slot_without_a_sequence_changes_no_state(variant):
    op = VARIANTS[variant][0]
    tokens, weights, _ = inputs(variant, 4, 1, 2, 32)
    pool = torch.randn(3, 2, 32, 32, generator=torch.Generator().manual_seed(3))
    before = pool.clone()
    out = op(
        **tokens,
        **weights,
        state=pool,
        eps=EPS,
        mask=torch.tensor([True, True, False, True]),
        state_indices=torch.tensor([-1, 2, 1, -1]),
    )
    assert torch.equal(pool[:2], before[:2]) and not torch.equal(pool[2], before[2])
    assert out[1].any() and not out[[0, 2, 3]].any()


def test_a_key_of_zeros_removes_nothing():
    tokens, weights, state = inputs("rwkv7-layer-0", 1, 1, 1, 32)
    decayed = (
        torch.exp(-DECAY_SCALE * torch.sigmoid(weights["w0"] + tokens["decay"])).view(1, 1, 32, 1) * state
    )
    rwkv7_decode(**tokens | {"k": torch.zeros_like(tokens["k"])}, **weights, state=state, eps=EPS)
    assert error(state, decayed.double()) < TOLERANCE[torch.float32]


def test_a_small_key_is_normalised_too():
    tokens, weights, state = inputs("rwkv7-layer-0", 1, 1, 1, 32)
    tokens["k"] *= 1e-8
    _, state_true = plain7(**double(tokens), **double(weights), state=state.double(), eps=EPS)
    rwkv7_decode(**tokens, **weights, state=state, eps=EPS)
    assert error(state, state_true) < TOLERANCE[torch.float32]


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's numpy
def test_any_decay_is_finite():
    tokens, weights, state = inputs("rwkv6", 1, 1, 1, 32)
    tokens["decay"] = torch.linspace(-200, 200, 32).view(1, 1, 32)  # exp(-exp(x)) from 1 to 0
    out_true, state_true = plain6(**double(tokens), **double(weights), state=state.double(), eps=EPS)
    out = rwkv6_decode(**tokens, **weights, state=state, eps=EPS)
    assert error(out, out_true) < 1e-5 and error(state, state_true) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_need_no_time_axis_and_weights_no_shape(variant):
    op = VARIANTS[variant][0]
    tokens, weights, state = inputs(variant, 2, 1, 2, 32)
    same = state.clone()
    out = op(**tokens, **weights, state=state, eps=EPS)
    flat = {name: None if x is None else x[:, 0] for name, x in tokens.items()}
    shaped = {name: x.view(1, 1, -1) for name, x in weights.items()}
    assert torch.equal(op(**flat, **shaped, state=same, eps=EPS), out[:, 0])
    assert torch.equal(same, state)


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_as_one_graph_and_writes_the_state_in_place(variant):
    op = VARIANTS[variant][0]
    tokens, weights, state = inputs(variant, 2, 1, 2, 32)
    eager_state, address = state.clone(), state.data_ptr()

    def step(tokens, state):
        return op(**tokens, **weights, state=state, eps=EPS) * 2

    out = torch.compile(step, fullgraph=True, backend="aot_eager")(tokens, state)
    assert torch.equal(out, step(tokens, eager_state))
    assert torch.equal(state, eager_state) and state.data_ptr() == address


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_is_a_well_behaved_custom_op(monkeypatch, variant, masked):
    monkeypatch.undo()  # its own comparisons use torch.empty_like
    tokens, weights, state = inputs(variant, 2, 1, 1, 32)
    name = VARIANTS[variant][0].__name__
    op = getattr(torch.ops.visualrwkv, name).default
    arguments = {argument.name: None for argument in op._schema.arguments}
    arguments |= tokens | weights | {"state": state, "eps": EPS}
    arguments["mask"] = torch.tensor([True, False]) if masked else None
    arguments["state_indices"] = torch.tensor([1, 0]) if masked else None
    torch.library.opcheck(op, (), arguments)


def test_the_scale_of_the_decay_is_that_of_the_model():
    assert decode.DECAY_SCALE.value == DECAY_SCALE


@pytest.mark.parametrize("variant", VARIANTS)
def test_refuses_to_be_differentiated(variant):
    op = VARIANTS[variant][0]
    tokens, weights, state = inputs(variant, 1, 1, 1, 32)
    weights["norm_bias"].requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        op(**tokens, **weights, state=state, eps=EPS)
    with torch.no_grad():
        op(**tokens, **weights, state=state, eps=EPS)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(state=torch.zeros(1, 1, 48, 48)), r"one of 32, 64, 128, got \[1, 1, 48, 48\]"),
        (dict(state=torch.zeros(1, 1, 32, 64)), r"got \[1, 1, 32, 64\]"),
        (dict(state=torch.zeros(1, 1, 32, 32).half()), "float32 and .*, got torch.float16"),
        (dict(state=torch.zeros(1, 1, 32, 32).mT), r"strides \(1024, 1024, 1, 32\)"),
        (dict(state=torch.zeros(1, 1, 32, 32).expand(2, -1, -1, -1)), r"apart .* strides \(0, 1024, 32, 1\)"),
        (dict(k=torch.zeros(1, 2, 32)), r"k must be \[B, A\] = \[1, 32\] or \[B, 1, A\], got \[1, 2, 32\]"),
        (dict(w0=torch.zeros(31)), r"w0 must have A = 32 elements, got \[31\]"),
        (dict(mask=torch.ones(2, dtype=torch.bool)), r"mask must be bool \[B\] = \[1\]"),
        (dict(mask=torch.ones(1)), "got torch.float32"),
        (dict(r=torch.zeros(1, 32).double()), "got float64"),
        (dict(state_indices=torch.zeros(1)), r"int32 or int64 \[B\], got torch.float32 \[1\]"),
        (dict(state_indices=torch.zeros(2, dtype=torch.int64)), r"r must be \[B, A\] = \[2, 32\]"),
        (dict(v_first=torch.zeros(1, 32)), "all or none"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    tokens, weights, state = inputs("rwkv7-layer-0", 1, 1, 1, 32)
    with pytest.raises(ValueError, match=message):
        rwkv7_decode(**({**tokens, **weights, "state": state, "eps": EPS} | change))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_may_be_empty(variant):
    op = VARIANTS[variant][0]
    tokens, weights, _ = inputs(variant, 0, 1, 2, 32)
    pool = torch.randn(3, 2, 32, 32, generator=torch.Generator().manual_seed(3))
    before = pool.clone()
    nothing = torch.zeros(0, dtype=torch.int64)
    assert op(**tokens, **weights, state=pool, eps=EPS, state_indices=nothing).shape == (0, 1, 64)
    assert op(**tokens, **weights, state=pool[:0], eps=EPS).shape == (0, 1, 64)
    assert torch.equal(pool, before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_counts_as_a_write_of_the_state(variant):
    """A backward that has saved the state refuses to go on with what a step has made of it."""
    op = VARIANTS[variant][0]
    tokens, weights, state = inputs(variant, 2, 1, 2, 32)
    scale = torch.ones(()).requires_grad_()
    loss, version = (scale * state).sum(), state._version
    with torch.no_grad():
        op(**tokens, **weights, state=state, eps=EPS)
    assert state._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_state_of_inference_mode_has_no_version_to_count(variant):
    op = VARIANTS[variant][0]
    tokens, weights, state = inputs(variant, 2, 1, 2, 32)
    with torch.inference_mode():
        inference_state = state.clone()
    with torch.no_grad():
        out = op(**tokens, **weights, state=inference_state, eps=EPS)
        assert torch.equal(out, op(**tokens, **weights, state=state, eps=EPS))
    assert torch.equal(inference_state, state)


def test_a_state_that_wkv7_has_saved_must_not_change():
    tokens, weights, state = inputs("rwkv7-layer-0", 1, 1, 1, 32)
    x = torch.randn(1, 20, 1, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y, _ = triton_wkv7(x, -0.5 * x.abs(), x, x, -0.1 * x, 0.1 * x, state)
    with torch.no_grad():
        rwkv7_decode(**tokens, **weights, state=state, eps=EPS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
