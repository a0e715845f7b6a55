"""The native decode ops against the plain ones: rows, slots of a strided pool, padding, dtypes, refusals."""

import pytest
import torch
from native_ops import NEEDS_NATIVE_OPS

from visualrwkv_hf.cpu import decode as native
from visualrwkv_hf.cpu.kernels import unsupported
from visualrwkv_hf.rwkv6_time_mix import rwkv6_decode
from visualrwkv_hf.rwkv7_time_mix import rwkv7_decode

pytestmark = NEEDS_NATIVE_OPS
B, N, H, EPS = 5, 9, 3, 64e-5
KINDS = {
    "rwkv5": (rwkv6_decode, native.rwkv6_decode, ("r", "k", "v", "gate"), ("time_decay", "u")),
    "rwkv6": (rwkv6_decode, native.rwkv6_decode, ("r", "decay", "k", "v", "gate"), ("time_decay", "u")),
    "rwkv7, first layer": (
        *(rwkv7_decode, native.rwkv7_decode),
        ("r", "decay", "k", "v", "rate", "gate"),
        ("w0", "a0", "k_k", "k_a", "r_k"),
    ),
    "rwkv7": (
        *(rwkv7_decode, native.rwkv7_decode),
        ("r", "decay", "k", "v", "rate", "gate", "value_gate", "v_first"),
        ("w0", "a0", "k_k", "k_a", "r_k", "v0"),
    ),
}


def arguments(kind, K, dtype=torch.float32):
    """The plain op, the native one and what both take, but for the state."""
    plain, op, products, weights = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    given = {name: torch.randn(B, 1, H * K, generator=generator).to(dtype) for name in products}
    given |= {name: torch.randn(H * K, generator=generator).to(dtype) for name in weights}
    given |= {
        name: torch.randn(H * K, generator=generator).to(dtype) for name in ("norm_weight", "norm_bias")
    }
    if kind == "rwkv5":
        given["decay"] = None
    return plain, op, given | {"eps": EPS}


def pool_between_others(K, tokens=7):
    """A pool of states [N, H, K, K] with other numbers between its slots, as vLLM's has, and the whole memory."""
    memory = torch.randn(N, H * K * K + tokens, generator=torch.Generator().manual_seed(1))
    return memory[:, tokens:].view(N, H, K, K), memory


def assert_same(found, expected, dtype=torch.float32):
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2}[
        dtype
    ]  # sums in another order; one rounding of out
    torch.testing.assert_close(found.float(), expected.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K", [8, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_slots_of_a_pool_are_read_and_written_where_they_lie(kind, K, dtype):
    plain, op, given = arguments(kind, K, dtype)
    slots = torch.tensor([7, 0, 3, 8, 5])
    (pool, memory), (expected_pool, expected_memory) = pool_between_others(K), pool_between_others(K)
    expected = plain(**given, state=expected_pool, state_indices=slots)
    assert_same(op(**given, state=pool, state_indices=slots), expected, dtype)
    assert_same(memory, expected_memory)
    others = [1, 2, 4, 6]
    assert torch.equal(memory[others], pool_between_others(K)[1][others])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_padding(kind):
    plain, op, given = arguments(kind, 16)
    mask = torch.tensor([True, False, True, True, False])
    state = torch.randn(B, H, 16, 16, generator=torch.Generator().manual_seed(2))
    before, expected_state = state.clone(), state.clone()
    expected = plain(**given, state=expected_state, mask=mask)
    found = op(**given, state=state, mask=mask)
    assert_same(found, expected)
    assert_same(state, expected_state)
    assert torch.equal(state[~mask], before[~mask]) and not found[~mask].any()


def test_a_slot_outside_the_pool_is_refused_before_anything_is_written():
    _, op, given = arguments("rwkv7", 8)
    pool, memory = pool_between_others(8)
    for slot in (-1, N):
        with pytest.raises(RuntimeError, match="SIZE_OUT_OF_RANGE"):
            op(**given, state=pool, state_indices=torch.tensor([0, 1, 2, 3, slot]))
    assert torch.equal(memory, pool_between_others(8)[1])


def test_states_that_c_cannot_read_are_named():
    x, state = torch.randn(B, 1, 24), torch.zeros(B, 3, 8, 8)
    assert not unsupported("rwkv7_decode", x, state, gradient=False)
    assert "not float32" in unsupported("rwkv7_decode", x, state.bfloat16(), gradient=False)
    for other in (state.transpose(2, 3), state[:1].expand(B, -1, -1, -1), state[..., :4]):
        assert "one after another" in unsupported("rwkv7_decode", x, other, gradient=False)
    assert "larger than" in unsupported("rwkv6_decode", x, torch.zeros(1, 1, 260, 260), gradient=False)
