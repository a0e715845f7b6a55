"""The plain decode ops against the recurrences over many tokens: rows and pools of states, padding, dtypes."""

import pytest
import torch
from torch.nn import functional as F

from visualrwkv_hf.rwkv6_time_mix import DecayProducts, DecayWeights, decay_recurrence, rwkv6_decode
from visualrwkv_hf.rwkv7_time_mix import Rwkv7Products, Rwkv7Weights, rwkv7_decode, rwkv7_recurrence

B, T, H, K, EPS = 3, 6, 2, 8, 64e-5
GENERATIONS = {
    "rwkv5": (rwkv6_decode, DecayProducts, DecayWeights, ("decay",)),
    "rwkv6": (rwkv6_decode, DecayProducts, DecayWeights, ()),
    "rwkv7, first layer": (rwkv7_decode, Rwkv7Products, Rwkv7Weights, ("value_gate", "v0")),
    "rwkv7": (rwkv7_decode, Rwkv7Products, Rwkv7Weights, ()),
}


@pytest.fixture(params=GENERATIONS)
def case(request):
    """The op, its products [B, T, A] and weights, v_first, the norm's weights, a state [B, H, K, K] and the whole."""
    op, products_of, weights_of, missing = GENERATIONS[request.param]
    generator = torch.Generator().manual_seed(0)

    def drawn(names, *shape):
        return {n: None if n in missing else torch.randn(shape, generator=generator) for n in names}

    products, weights = drawn(products_of._fields, B, T, H * K), drawn(weights_of._fields, H * K)
    state = torch.randn(B, H, K, K, generator=generator)
    norm = {
        "norm_weight": torch.randn(H * K, generator=generator),
        "norm_bias": torch.ones(H * K),
        "eps": EPS,
    }
    layer = {}
    if op is rwkv7_decode:
        layer = {"v_first": torch.randn(B, T, H * K, generator=generator)}
    return op, products, weights, layer, norm, state, whole(op, products, weights, layer, norm, state)


def whole(op, products, weights, layer, norm, state):
    def normed(y):
        return F.group_norm(y, H, norm["norm_weight"], norm["norm_bias"], EPS)

    if op is rwkv7_decode:
        weights = Rwkv7Weights(**weights | {"r_k": weights["r_k"].view(H, K)})
        return rwkv7_recurrence(Rwkv7Products(**products), weights, normed, layer["v_first"], state)
    time_decay = weights["time_decay"] if products["decay"] is not None else weights["time_decay"].view(H, K)
    weights = DecayWeights(time_decay, weights["u"].view(H, K))
    return decay_recurrence(DecayProducts(**products), weights, normed, state)


def token(tensors, t):
    return {name: None if x is None else x[:, t] for name, x in tensors.items()}


def decoded(op, products, weights, layer, norm, t, **states):
    layer = {} if products.get("value_gate", 0) is None else layer  # the first layer has no earlier values
    return op(**token(products, t), **weights, **token(layer, t), **norm, **states)


def test_token_by_token_equals_all_at_once(case):
    op, *inputs, state, expected = case
    state = state.clone()
    outs = [decoded(op, *inputs, t, state=state) for t in range(T)]
    torch.testing.assert_close(torch.stack(outs, 1), expected.out, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(state, expected.state, atol=1e-5, rtol=1e-5)


def test_slots_of_a_pool_equal_rows(case):
    op, *inputs, state, _ = case
    slots = torch.tensor([4, 0, 2])
    pool = torch.full((6, H, K, K), 7.0)
    pool[slots] = state
    rows = state.clone()
    for t in range(T):
        alone = decoded(op, *inputs, t, state=rows)
        assert torch.equal(decoded(op, *inputs, t, state=pool, state_indices=slots), alone)
    assert torch.equal(pool[slots], rows)
    assert (pool[[1, 3, 5]] == 7).all(), "slots of other sequences"


def test_padding_leaves_the_state_and_gives_zeros(case):
    op, *inputs, state, _ = case
    before, mask = state.clone(), torch.tensor([True, False, True])
    out = decoded(op, *inputs, 0, state=state, mask=mask)
    unmasked = before.clone()
    expected = decoded(op, *inputs, 0, state=unmasked)
    assert torch.equal(state[1], before[1]) and not out[1].any()
    assert torch.equal(state[mask], unmasked[mask]) and torch.equal(out[mask], expected[mask])


def test_the_state_stays_float32_for_bfloat16_tokens(case):
    """Computed in float32: only the inputs and the output are rounded."""
    op, products, weights, layer, norm, state, _ = case
    half = [
        {n: None if x is None else x.bfloat16() for n, x in d.items()} for d in (products, weights, layer)
    ]
    exact = [{n: None if x is None else x.float() for n, x in d.items()} for d in half]
    norms = {n: x.bfloat16() if torch.is_tensor(x) else x for n, x in norm.items()}
    exact_norms = {n: x.float() if torch.is_tensor(x) else x for n, x in norms.items()}
    rounded, state32 = state.clone(), state.clone()
    out = decoded(op, *half, norms, 0, state=rounded)
    expected = decoded(op, *exact, exact_norms, 0, state=state32)
    assert out.dtype == torch.bfloat16 and torch.equal(rounded, state32)
    assert torch.equal(out, expected.bfloat16())
