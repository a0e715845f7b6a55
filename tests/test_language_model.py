"""The language model: against the papers' equations in float64, and against itself cut, padded and batched."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import rwkv as oracle
from tiny import awake, text_config

from visualrwkv_hf import VisualRWKVCache, VisualRWKVForCausalLM, VisualRWKVTextModel
from visualrwkv_hf.modeling_rwkv import refuse_non_finite

VERSIONS = (5, 6, 7)
ATOL = 1e-9  # float64, values around 4; float32 would hide an error behind the head norm's amplification


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda version: f"rwkv{version}")
def model(request) -> VisualRWKVForCausalLM:
    return _MODELS[request.param]


def ids_of(shape: tuple[int, int], seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 300, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_hidden_states_equal_the_equations(model):
    ids = ids_of((1, 70))  # more than two chunks of the recurrence
    config = model.config
    weights = {name: tensor.double() for name, tensor in model.model.state_dict().items()}
    expected = oracle.hidden_states(
        weights,
        config.rwkv_version,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.head_dim,
        model.model.embed_tokens(ids[0]),
    )
    actual = model.model(ids, use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=0)


def test_rwkv7_equals_the_independent_package():
    """PyPI's rwkv7-hf, written by others from the same paper."""
    rwkv7_hf = pytest.importorskip("rwkv7_hf")
    from judges import rwkv7_hf_logits

    model = awake(VisualRWKVForCausalLM(text_config(7, head_dim=64, hidden_size=128)))
    ids = ids_of((1, 40))
    with torch.no_grad():
        actual = model(ids, use_cache=False).logits
    torch.testing.assert_close(actual, rwkv7_hf_logits(rwkv7_hf, model, ids), atol=1e-4, rtol=0)


@settings(max_examples=10, deadline=None)
@given(cut=st.integers(1, 39), version=st.sampled_from(VERSIONS))
@torch.no_grad()
def test_prefix_then_suffix_equals_whole(cut, version):
    model = _MODELS[version]
    ids = ids_of((2, 40))
    whole = model(ids, use_cache=False).logits
    prefix = model(ids[:, :cut])
    suffix = model(ids[:, cut:], past_key_values=prefix.past_key_values)
    torch.testing.assert_close(torch.cat([prefix.logits, suffix.logits], 1), whole, atol=ATOL, rtol=0)
    assert suffix.past_key_values.get_seq_length() == 40


@torch.no_grad()
def test_token_by_token_equals_whole(model):
    ids = ids_of((2, 20))
    cache, logits = None, []
    for token in ids.split(1, dim=1):
        output = model(token, past_key_values=cache)
        cache = output.past_key_values
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), model(ids, use_cache=False).logits, atol=ATOL, rtol=0)


@settings(max_examples=15, deadline=None)
@given(
    real=st.lists(st.booleans(), min_size=2, max_size=60).filter(any),
    version=st.sampled_from(VERSIONS),
    cut=st.integers(0, 60),
)
@torch.no_grad()
def test_pads_of_any_side_or_middle_change_nothing(real, version, cut):
    model = _MODELS[version]
    mask = torch.tensor([real, [True] * len(real)])
    ids = ids_of(tuple(mask.shape))
    alone = model(ids[:1, mask[0]], use_cache=False).logits
    padded = model(ids, attention_mask=mask.long(), use_cache=False).logits
    torch.testing.assert_close(padded[:1, mask[0]], alone, atol=ATOL, rtol=0)

    cut = min(max(cut, 1), len(real) - 1)  # the same in two forwards, with the whole mask in the second
    first = model(ids[:, :cut], attention_mask=mask[:, :cut].long())
    second = model(ids[:, cut:], attention_mask=mask.long(), past_key_values=first.past_key_values)
    halves = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(halves[:1, mask[0]], alone, atol=ATOL, rtol=0)


@torch.no_grad()
def test_a_row_of_a_batch_equals_the_row_alone(model):
    ids = ids_of((3, 33))
    batch = model(ids, use_cache=False).logits
    torch.testing.assert_close(model(ids[1:2], use_cache=False).logits[0], batch[1], atol=ATOL, rtol=0)


@torch.no_grad()
def test_layers_read_in_their_order(model):
    """An order that reverses positions 5 to 14 in odd layers: seen by shift and recurrence, undone behind them."""
    ids = ids_of((1, 20))
    order = torch.arange(20)[None].clone()
    order[:, 5:15] = order[:, 5:15].flip(1)
    identity = torch.arange(20)[None]
    both = torch.stack([identity, order], 1)  # [B, D, T]
    plain = model.model(ids, use_cache=False).last_hidden_state
    same = model.model(
        ids, use_cache=False, scan_orders=torch.stack([identity, identity], 1)
    ).last_hidden_state
    scanned = model.model(ids, use_cache=False, scan_orders=both).last_hidden_state
    torch.testing.assert_close(same, plain, atol=ATOL, rtol=0)
    torch.testing.assert_close(
        scanned[:, :5], plain[:, :5], atol=ATOL, rtol=0
    )  # what comes before knows nothing
    assert (scanned[:, 5:15] - plain[:, 5:15]).abs().max() > 1e-2
    skipping = model.model(ids, use_cache=False, scan_orders=(None, order)).last_hidden_state
    torch.testing.assert_close(skipping, scanned, atol=0, rtol=0)


def test_gradients_reach_every_parameter(model):
    model.zero_grad()
    model(ids_of((2, 17)), labels=ids_of((2, 17))).loss.backward()
    without = [
        name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()
    ]
    assert without == []
    model.zero_grad()


def test_gradient_checkpointing_gives_the_same_gradients(model):
    ids = ids_of((2, 17))
    model.train()
    losses = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(model(ids, labels=ids, use_cache=False).loss)
        losses[-1].backward()
        assert all(weight.grad.isfinite().all() for weight in model.parameters())
    error = (losses[1] - losses[0]).abs() / losses[0]
    assert 0 < error < 0.02, float(error)  # products rounded to 8 bits, layer after layer
