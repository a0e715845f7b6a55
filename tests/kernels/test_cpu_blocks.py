"""One token through all blocks in one call against blocks called one by one, and the threads that compute it."""

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from native_ops import NEEDS_NATIVE_OPS
from tiny import awake, text_config
from torch import nn

from visualrwkv_hf import VisualRWKVForCausalLM, accelerate_on_cpu
from visualrwkv_hf.cpu import library
from visualrwkv_hf.cpu.block import decode_block
from visualrwkv_hf.cpu.blocks import decode_blocks
from visualrwkv_hf.dispatch import kernel_backend
from visualrwkv_hf.layer_state import CHANNEL_MIX_SHIFT, TIME_MIX_SHIFT, WKV, LayerState, PlainStateHolder
from visualrwkv_hf.modeling_rwkv import VisualRWKVTextModel
from visualrwkv_hf.token_order import IN_ORDER

TOLERANCE = 1e-5
"""Relative, float32: sums of some hundred terms in another order."""

pytestmark = NEEDS_NATIVE_OPS


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def counts(monkeypatch) -> list[int]:
    """How many blocks each call in C computed."""
    seen, call = [], library.Library.call
    monkeypatch.setattr(
        library.Library,
        "call",
        lambda self, name, *given: (
            seen.append(given[0]) if name == "blocks" else None,
            call(self, name, *given),
        )[1],
    )
    return seen


def causal_lm(version: int, dtype: torch.dtype = torch.float32, weights: str | None = None, **fields):
    torch.manual_seed(version)
    model = awake(VisualRWKVForCausalLM(text_config(version, hidden_size=128, **fields))).to(dtype)
    return accelerate_on_cpu(model, weights=weights)


def tokens(model, ids: torch.Tensor, state=None, mask: torch.Tensor | None = None):
    """The logits of ids [B, T] read one by one after `state`, and the state after them."""
    logits = []
    for i in range(ids.shape[1]):
        out = model(
            ids[:, i : i + 1],
            past_key_values=state,
            attention_mask=None if mask is None else mask[:, : i + 1],
            use_cache=True,
        )
        state = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1), state


def same(state, other) -> bool:
    return all(
        torch.equal(x, y)
        for layer, twin in zip(state.layers, other.layers, strict=True)
        for x, y in zip(layer.tensors().values(), twin.tensors().values(), strict=True)
    )


@pytest.fixture
def one_by_one(monkeypatch) -> Callable[[], None]:
    """Call it to have the blocks called one by one from then on."""
    return lambda: monkeypatch.setattr(VisualRWKVTextModel, "_decoded", lambda *_: None)


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("version", [5, 6, 7])
def test_all_blocks_equal_one_after_the_other(version, dtype, weights, counts, one_by_one):
    """To the bit, and so do the states, with a pad between the tokens."""
    model = causal_lm(version, dtype, weights)
    ids, mask = torch.randint(1, 320, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[1, 3] = 0
    found, state = tokens(model, ids, mask=mask)
    assert counts == [3] * 5  # the first token has no state yet
    one_by_one()
    counts.clear()
    expected, other = tokens(model, ids, mask=mask)
    assert counts == [1] * 15
    assert torch.equal(found, expected) and same(state, other)


def replaced_weight(model) -> None:
    layer = model.model.layers[1].ffn.key
    layer.weight = nn.Parameter(2 * layer.weight)


def other_memory(model) -> None:
    model.model.layers[0].att.value.weight.data = 2 * model.model.layers[0].att.value.weight


def transposed_in_place(model) -> None:
    weight = model.model.layers[2].att.receptance.weight
    weight.data = weight.data.T


def written_weight(model) -> None:
    model.model.layers[1].att.key.weight.mul_(2)


def replaced_part(model) -> None:
    model.model.layers[1].ffn.value = nn.Linear(model.model.layers[1].ffn.value.in_features, 128, bias=False)


def other_block(model) -> None:
    model.model.layers[1] = copy.deepcopy(model.model.layers[2])


def exchanged_blocks(model) -> None:
    layers = model.model.layers._modules
    layers["1"], layers["2"] = layers["2"], layers["1"]


def hooked_block(model) -> None:
    model.model.layers[1].register_forward_pre_hook(lambda block, args: (2 * args[0], *args[1:]))


def hooked_part(model) -> None:
    model.model.layers[2].att.output.register_forward_hook(lambda part, args, out: 2 * out)


def forward_of_its_own(model) -> None:
    part = model.model.layers[0].ffn
    forward = type(part).forward
    part.forward = lambda *args, **kwargs: forward(part, 2 * args[0], *args[1:], **kwargs)


def with_bias(model) -> None:
    model.model.layers[0].att.key.bias = nn.Parameter(torch.randn(128))


CHANGES = {
    change.__name__: change
    for change in (
        replaced_weight,
        other_memory,
        transposed_in_place,
        written_weight,
        replaced_part,
        other_block,
        exchanged_blocks,
        hooked_block,
        hooked_part,
        forward_of_its_own,
        with_bias,
    )
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("version", [6, 7])
def test_what_changes_between_two_tokens_is_seen(version, change, counts):
    model = causal_lm(version)
    ids = torch.randint(1, 320, (1, 5))
    _, state = tokens(model, ids[:, :3])
    assert counts == [3] * 2
    before, other = tokens(model, ids[:, 3:], state.copy())[0], state.copy()
    CHANGES[change](model)
    found, state = tokens(model, ids[:, 3:], state)
    with kernel_backend("torch"):
        expected, _ = tokens(model, ids[:, 3:], other)
    assert (found - expected).norm() < TOLERANCE * expected.norm()
    assert (found - before).norm() > 100 * TOLERANCE * expected.norm()


def test_changing_the_dtype_between_two_tokens(counts):
    """Parameters stay the same objects then."""
    model = causal_lm(7)
    ids = torch.randint(1, 320, (1, 4))
    tokens(model, ids)
    found, _ = tokens(model.bfloat16(), ids)
    with kernel_backend("torch"):
        expected, _ = tokens(model, ids)
    assert found.dtype == torch.bfloat16 and counts == [3] * 6
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_other_batch_sizes_in_turn(counts):
    model = causal_lm(6)
    ids = torch.randint(1, 320, (3, 4))
    together, _ = tokens(model, ids)
    for row in range(3):
        alone, _ = tokens(model, ids[row : row + 1])
        # For some of these words the layers multiply float32's rounding by twenty, in plain torch as well.
        assert (alone - together[row : row + 1]).norm() < 5 * TOLERANCE * alone.norm()
    assert counts == [3] * 12


def test_hidden_states_are_captured():
    """transformers hooks the blocks for it, so they are called one by one."""
    model = causal_lm(7)
    ids = torch.randint(1, 320, (1, 3))
    _, state = tokens(model, ids[:, :2])
    out = model(ids[:, 2:], past_key_values=state, output_hidden_states=True)
    assert len(out.hidden_states) == 4


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_computes_the_same(threads):
    """Each row of a weight is one thread's, whichever, so its sum is the same."""
    model, ids, before = causal_lm(7), torch.randint(1, 320, (2, 5)), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected, state = tokens(model, ids)
        torch.set_num_threads(threads)
        for _ in range(20):
            found, other = tokens(model, ids)
            assert torch.equal(found, expected) and same(state, other)
    finally:
        torch.set_num_threads(before)


def test_callers_at_the_same_time_do_not_disturb_one_another():
    """One of them has the pool of threads, the others compute alone."""
    model, before = causal_lm(6), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ids = [torch.randint(1, 320, (1, 12)) for _ in range(4)]
        expected = [tokens(model, each)[0] for each in ids]
        found: list[torch.Tensor | None] = [None] * 4

        def read(n: int) -> None:
            with torch.no_grad():
                for _ in range(5):
                    found[n] = tokens(model, ids[n])[0]

        readers = [threading.Thread(target=read, args=(n,)) for n in range(4)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        assert all(torch.equal(x, y) for x, y in zip(found, expected))
    finally:
        torch.set_num_threads(before)


# --- states in a pool, as an engine keeps them ------------------------------------------------------------


def pools_of(model, slots: torch.Tensor, dtype: torch.dtype, count: int = 30):
    """A holder for each block and the memory in which its states lie, one slot after the other."""
    config, holders, memories = model.config, [], []
    C, H, K = config.hidden_size, config.num_attention_heads, config.head_dim
    for layer in range(config.num_hidden_layers):
        generator = torch.Generator().manual_seed(layer)
        memory = torch.randn(count, 2 * C + H * K * K, generator=generator)
        shifts = memory[:, : 2 * C].to(dtype)
        states = {TIME_MIX_SHIFT: shifts[:, :C], CHANNEL_MIX_SHIFT: shifts[:, C:]}
        states[WKV] = memory[:, 2 * C :].view(count, H, K, K)
        holders.append(PlainStateHolder(LayerState(states, indices=slots)))
        memories += [memory, shifts]
    return holders, memories


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("version", [5, 6, 7])
@pytest.mark.parametrize("rows", [1, 7, 18])
def test_slots_of_pools_are_read_and_written_where_they_lie(version, rows, dtype, weights, counts):
    """Rows that fill whole grids of products and rows that do not, against plain torch."""
    model = causal_lm(version, dtype, weights)
    slots = torch.randperm(30, generator=torch.Generator().manual_seed(rows))[:rows]
    x = torch.randn(rows, 1, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    (native, memories), (plain, expected_memories) = (pools_of(model, slots, dtype) for _ in range(2))
    found = [model.model.run_blocks(x * factor, [IN_ORDER], native) for factor in (1, 2)]
    layers = model.config.num_hidden_layers
    assert counts == [layers, layers], "all blocks in one call"
    with kernel_backend("torch"):
        expected = [model.model.run_blocks(x * factor, [IN_ORDER], plain) for factor in (1, 2)]
    # bfloat16: C rounds once for each block, torch after each op; weights of few bits: inputs in 16 bits
    tolerance = 0.06 if dtype == torch.bfloat16 else 1e-3 if weights else 1e-4
    for one, other in zip((*found, *memories), (*expected, *expected_memories)):
        assert (one - other).abs().max() <= tolerance * other.abs().max()
    untouched = [slot for slot in range(30) if slot not in slots.tolist()]
    before = pools_of(model, slots, dtype)[1]
    assert all(torch.equal(one[untouched], other[untouched]) for one, other in zip(memories, before))


@pytest.mark.parametrize("version", [5, 6, 7])
@torch.no_grad()
def test_one_norm_of_all_heads_is_so_from_pools_too(version):
    model, slots = causal_lm(version), torch.tensor([3, 1, 7])
    for layer in model.model.layers:
        layer.att.ln_x.num_groups = 1
    x = torch.randn(3, 1, 128, generator=torch.Generator().manual_seed(0))
    pooled, _ = pools_of(model, slots, torch.float32)
    rows = [
        PlainStateHolder(
            LayerState({name: state[slots].clone() for name, state in one.state().tensors.items()})
        )
        for one in pooled
    ]
    with kernel_backend("torch"):
        for factor in (1, 2):
            found, expected = (
                model.model.run_blocks(x * factor, [IN_ORDER], holders) for holders in (pooled, rows)
            )
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("version", [6, 7])
def test_blocks_in_two_calls_equal_all_in_one(version, counts):
    model = causal_lm(version).model
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    first.layers, second.layers = first.layers[:1], second.layers[1:]
    x, slots = torch.randn(3, 1, 128), torch.tensor([3, 1, 7])
    (expected, expected_memories), (found, memories) = (
        pools_of(model, slots, torch.float32) for _ in range(2)
    )
    whole = model.run_blocks(x, [IN_ORDER], expected)
    hidden, values = first.run_layers(first.embed_norm(x), None, [IN_ORDER], found[:1])
    hidden, _ = second.run_layers(hidden, values, [IN_ORDER], found[1:])
    assert counts == [3, 1, 2]
    for one, other in zip((hidden, *memories), (whole, *expected_memories)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("pools", [True, False])
def test_blocks_without_the_values_of_the_first_are_not_computed(pools, counts):
    """What lies in memory there would be mixed with theirs."""
    model = causal_lm(7).model
    x, layers, slots = torch.randn(2, 1, 128), model.layers[1:], torch.tensor([3, 1])
    states = [holder.state() for holder in pools_of(model, slots, torch.float32)[0][1:]]
    before = [{name: x.clone() for name, x in state.tensors.items()} for state in states]
    if pools:
        assert decode_blocks(layers, x, None, states, IN_ORDER) is None
    else:
        assert decode_block(layers[0], x, None, states[0], IN_ORDER) is None
    assert not counts
    for state, kept in zip(states, before):
        assert all(torch.equal(x, kept[name]) for name, x in state.tensors.items())


def test_slots_that_differ_between_blocks_or_lie_outside_are_not_computed_together(counts):
    model = causal_lm(7)
    x, slots = torch.randn(2, 1, 128), torch.tensor([3, 1])
    holders, _ = pools_of(model, slots, torch.float32)
    holders[1] = pools_of(model, torch.tensor([1, 3]), torch.float32)[0][1]
    model.model.run_blocks(x, [IN_ORDER], holders)
    assert model.config.num_hidden_layers not in counts
    with pytest.raises(RuntimeError, match="SIZE_OUT_OF_RANGE"):
        model.model.run_blocks(x, [IN_ORDER], pools_of(model, torch.tensor([0, 30]), torch.float32)[0])
