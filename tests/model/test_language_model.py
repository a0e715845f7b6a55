"""The language model: against the papers' equations in float64, and against itself cut, padded and batched."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import rwkv as oracle
from tiny import awake, text_config
from transformers import DataCollatorWithFlattening, DynamicCache

from visualrwkv_hf import VisualRWKVCache, VisualRWKVForCausalLM, VisualRWKVTextModel
from visualrwkv_hf.generations import GENERATIONS
from visualrwkv_hf.layer_state import TIME_MIX_SHIFT, WKV, LayerState
from visualrwkv_hf.modeling_base import refuse_non_finite

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


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"position_ids_start": 2}], ids=["from 0", "from 2"])
def test_samples_that_only_their_positions_tell_apart_are_read_alone(model, options):
    """What DataCollatorWithFlattening makes by default; logits and loss are those of each sample."""
    rows = [{"input_ids": ids_of((1, length), seed=length)[0].tolist()} for length in (9, 1, 30, 4)]
    packed = DataCollatorWithFlattening(**options)(rows)
    assert "cu_seq_lens_q" not in packed
    found = model(**packed)
    assert found.past_key_values is None
    alone = [model(torch.tensor([row["input_ids"]])).logits for row in rows]
    torch.testing.assert_close(found.logits, torch.cat(alone, 1), atol=ATOL, rtol=0)
    told = model(**DataCollatorWithFlattening(return_flash_attn_kwargs=True, **options)(rows))
    torch.testing.assert_close(found.loss, told.loss, atol=ATOL, rtol=0)
    hidden = model.model(packed["input_ids"], position_ids=packed["position_ids"]).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), found.logits, atol=ATOL, rtol=0)
    with pytest.raises(ValueError, match="position_ids that begin anew"):
        model(**packed, past_key_values=VisualRWKVCache(model.config))


@torch.no_grad()
@pytest.mark.parametrize(
    "positions, mask",
    [
        ([0, 1, 2, 3, 4, 5], None),
        ([7, 8, 9, 10, 11, 12], None),
        ([0, 1, 2, 5, 6, 9], None),
        ([1, 1, 0, 1, 2, 3], [0, 0, 1, 1, 1, 1]),
        ([0, 1, 2, 3, 1, 1], [1, 1, 1, 1, 0, 0]),
    ],
    ids=["from 0", "from 7", "with gaps", "pads on the left", "pads on the right"],
)
def test_positions_of_one_text_change_nothing(model, positions, mask):
    ids = ids_of((1, len(positions)))
    arguments = {"labels": ids, "attention_mask": None if mask is None else torch.tensor([mask])}
    expected = model(ids, **arguments)
    found = model(ids, **arguments, position_ids=torch.tensor([positions]))
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    assert found.past_key_values.get_seq_length() == len(positions)


def test_gradient_checkpointing_gives_the_same_gradients(model):
    ids = ids_of((2, 17))
    model.train()
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        if enabled:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    model.gradient_checkpointing_disable()
    model.eval().zero_grad()
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-5)


def test_state_is_float32_whatever_the_model(model):
    cache = VisualRWKVCache(model.config)
    ids = ids_of((2, 9))
    half = VisualRWKVForCausalLM(model.config).to(torch.bfloat16).eval()
    with torch.no_grad():
        logits = half(ids, past_key_values=cache).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    for layer in cache.layers:
        shapes = {name: tuple(tensor.shape) for name, tensor in layer.tensors().items()}
        specs = GENERATIONS[model.config.rwkv_version].states
        assert shapes == {spec.name: (2, *spec.shape(model.config)) for spec in specs}
        assert layer.tensors()[WKV].dtype == torch.float32
        assert layer.tensors()[TIME_MIX_SHIFT].dtype == torch.bfloat16


@torch.no_grad()
def test_bfloat16_is_close_to_float32(model):
    """8 bits of mantissa through three layers: the worst logit moves by about 2^-8 of their size per layer."""
    ids = ids_of((1, 40))
    exact = model(ids, use_cache=False).logits
    half = VisualRWKVForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    rounded = half.to(torch.bfloat16).eval()(ids, use_cache=False).logits.float()
    assert (rounded - exact).square().mean().sqrt() < 0.04 * exact.std()


@pytest.mark.parametrize("version", VERSIONS)
def test_initialisation_is_the_originals(version):
    torch.manual_seed(0)
    config = text_config(version, hidden_size=128, head_dim=64, num_hidden_layers=4)
    layer = VisualRWKVTextModel(config).layers[1]
    r01, r10 = 1 / 3, 1 - 1 / 4
    d = torch.arange(128) / 128
    n = torch.arange(128) / 127
    att, ffn = layer.att, layer.ffn
    if version == 7:
        torch.testing.assert_close(att.x_v.flatten(), 1 - (d ** (0.4 * r10) + 0.6 * r01))
        torch.testing.assert_close(att.w0.flatten(), -6.5 + 5 * n ** (0.85 + r01**0.5))
        torch.testing.assert_close(ffn.x_k.flatten(), 1 - d ** (r10**4))
        assert not att.w1.any() and not att.output.weight.any() and not ffn.value.weight.any()
        assert (att.k_k == 0.85).all() and (att.v0 == 1).all() and not att.r_k.any()
        assert 0.9 * 0.05 < att.key.weight.abs().max() * 128**0.5 <= 0.05
        gram = att.w2 @ att.w2.T  # rank 8 x 128: rows orthogonal with gain 0.1
        torch.testing.assert_close(gram, 0.01 * torch.eye(8), atol=1e-5, rtol=0)
        return
    name = "time_mix_v" if version == 5 else "time_maa_v"
    kept = d**r10 + 0.3 * r01
    torch.testing.assert_close(getattr(att, name).flatten(), kept if version == 5 else 1 - kept)
    torch.testing.assert_close(att.time_decay.flatten(), -6 + 5 * n ** (0.7 + 1.3 * r01))
    zigzag = 0.1 * ((torch.arange(128) + 1) % 3 - 1)
    torch.testing.assert_close(att.time_faaaa.flatten(), r01 * (1 - n) + zigzag)
    if version == 6:
        assert not att.time_maa_w1.any() and 0 < att.time_maa_w2.abs().max() <= 0.01
        torch.testing.assert_close(ffn.time_maa_k.flatten(), 1 - d**r10)


def test_fresh_weights_are_the_same_from_the_meta_device(tmp_path):
    """What a checkpoint lacks is initialised as if the model had been built in the open."""
    config = text_config(7)
    with torch.device("meta"):
        assert all(weight.is_meta for weight in VisualRWKVForCausalLM(config).parameters())
    model = VisualRWKVForCausalLM(config)
    state = {name: tensor for name, tensor in model.state_dict().items() if ".att.w0" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 3 tensors of VisualRWKVForCausalLM: model.layers.0.att.w0"):
        VisualRWKVForCausalLM.from_pretrained(tmp_path)
    partly = VisualRWKVForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    torch.testing.assert_close(partly.model.layers[1].att.w0, model.model.layers[1].att.w0)


def test_nan_weights_are_named(tmp_path):
    model = VisualRWKVForCausalLM(text_config(6))
    model.model.layers[1].att.key.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"NaN or infinite weights in 1 tensors: model.layers.1.att.key.weight"
    ):
        VisualRWKVForCausalLM.from_pretrained(tmp_path)
    model.model.layers[1].att.key.weight.data[3, 5] = float("-inf")
    with pytest.raises(ValueError, match=r"layers\.1\.att\.key\.weight"):
        refuse_non_finite(model)


def test_weights_of_eight_bits_are_looked_at():
    """torch compares no float8, and `e4m3fn` has NaN alone."""
    layer = torch.nn.Linear(4, 4, bias=False)
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    refuse_non_finite(layer)
    layer.weight.data = torch.full((4, 4), float("nan")).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="NaN or infinite weights in 1 tensors: weight"):
        refuse_non_finite(layer)


def test_a_cache_of_keys_and_values_is_refused():
    model, ids = VisualRWKVForCausalLM(text_config(6)), torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="must be a KeptState or a VisualRWKVCache, got DynamicCache"):
        model(ids, past_key_values=DynamicCache())


def test_unexpected_tensors_are_named(tmp_path):
    model = VisualRWKVForCausalLM(text_config(6))
    model.save_pretrained(
        tmp_path, state_dict={**model.state_dict(), "model.layers.0.att.odd": torch.ones(2)}
    )
    with pytest.raises(
        ValueError, match=r"has 1 tensors that VisualRWKVForCausalLM does not: model.layers.0.att.odd"
    ):
        VisualRWKVForCausalLM.from_pretrained(tmp_path)


def test_misshapen_tensors_are_refused(tmp_path):
    model = VisualRWKVForCausalLM(text_config(6))
    model.save_pretrained(tmp_path, state_dict={**model.state_dict(), "lm_head.weight": torch.ones(3, 64)})
    with pytest.raises(
        ValueError, match=r"another shape than VisualRWKVForCausalLM: lm_head.weight \[3, 64\]"
    ):
        VisualRWKVForCausalLM.from_pretrained(tmp_path)


def test_bad_masks_and_inputs_are_refused(model):
    ids = ids_of((1, 6))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=torch.zeros(1, 6, 64))
    with pytest.raises(ValueError, match=r"shorter \(4\) than the tokens given \(6\)"):
        model(ids, attention_mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"must be \[B, T\], got \(1, 1, 6, 6\)"):
        model(ids, attention_mask=torch.ones(1, 1, 6, 6))


_MODELS = {version: awake(VisualRWKVForCausalLM(text_config(version))).double() for version in VERSIONS}


@pytest.mark.parametrize("version", VERSIONS)
def test_trains_under_autocast(version):
    """Parameters in float32, products in bfloat16: as `TrainingArguments(bf16=True)` has it."""
    model = awake(VisualRWKVForCausalLM(text_config(version))).float().train()
    ids = ids_of((2, 40))
    losses = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(model(ids, labels=ids, use_cache=False).loss)
        losses[-1].backward()
        assert all(weight.grad.isfinite().all() for weight in model.parameters())
    error = (losses[1] - losses[0]).abs() / losses[0]
    assert 0 < error < 0.02, float(error)  # products rounded to 8 bits, layer after layer


@torch.no_grad()
def test_hidden_states_are_those_before_each_block_and_the_last(model):
    ids = ids_of((2, 9))
    for owner in (model, model.model):
        output = owner(ids, output_hidden_states=True, use_cache=False)
        assert len(output.hidden_states) == model.config.num_hidden_layers + 1
        torch.testing.assert_close(
            output.hidden_states[0], model.model.embed_norm(model.model.embed_tokens(ids))
        )
        assert torch.equal(output.hidden_states[-1], model.model(ids, use_cache=False).last_hidden_state)
    assert model(ids).hidden_states is None


def test_attention_maps_are_refused(model):
    for owner in (model, model.model):
        with pytest.raises(ValueError, match="RWKV computes no attention maps"):
            owner(ids_of((1, 4)), output_attentions=True)


@pytest.mark.parametrize("option", [{"tp_plan": "auto"}, {"tp_size": 2}], ids=str)
def test_tensor_parallelism_is_refused(tmp_path, option):
    VisualRWKVForCausalLM(text_config(7)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="VisualRWKVForCausalLM has no tensor-parallel plan, got tp_"):
        VisualRWKVForCausalLM.from_pretrained(tmp_path, **option)


@torch.no_grad()
def test_a_block_returns_the_state_that_its_next_tokens_need(model):
    """Plain tensors in and out, without a cache: two steps equal one, and no state is made unasked."""
    block = model.model.layers[1]
    x = torch.randn(2, 12, model.config.hidden_size, dtype=torch.float64)
    v_first = torch.randn_like(x)
    whole = block(x, v_first)
    assert whole.updates == {}
    first = block(x[:, :7], v_first[:, :7], LayerState({}))
    state = LayerState({}).updated(first.updates)
    second = block(x[:, 7:], v_first[:, 7:], state)
    both = torch.cat([first.hidden_states, second.hidden_states], 1)
    torch.testing.assert_close(both, whole.hidden_states, atol=ATOL, rtol=0)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.tensors.items()}
    assert shapes == {
        s.name: (2, *s.shape(model.config)) for s in GENERATIONS[model.config.rwkv_version].states
    }
