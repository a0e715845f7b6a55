"""The table of generations: what its rows promise, and a new generation as one row of a test."""

from functools import partial

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny import awake, text_config
from torch import nn

from visualrwkv_hf import VisualRWKVCache, VisualRWKVForCausalLM, VisualRWKVTextConfig
from visualrwkv_hf.channel_mix import Rwkv7ChannelMix
from visualrwkv_hf.conversion.generations import ORIGINAL_GENERATIONS
from visualrwkv_hf.conversion.key_map import rwkv_rows
from visualrwkv_hf.dispatch import OPS
from visualrwkv_hf.generations import GENERATIONS, Generation
from visualrwkv_hf.layer_state import CHANNEL_MIX_SHIFT, TIME_MIX_SHIFT, StateSpec, StateUpdate
from visualrwkv_hf.mixing import MixOutput, previous_token, store_last_token
from visualrwkv_hf.token_order import IN_ORDER, token_shift

VERSIONS = list(GENERATIONS)


def test_every_generation_can_be_converted():
    assert GENERATIONS.keys() == ORIGINAL_GENERATIONS.keys()


@pytest.mark.parametrize("version", VERSIONS)
def test_rows_name_fields_ops_and_tensors_that_exist(version):
    row, original = GENERATIONS[version], ORIGINAL_GENERATIONS[version]
    config = text_config(version)
    assert row.ranks.keys() == original.ranks.keys() and set(row.ops) <= OPS.keys()
    assert all(isinstance(getattr(config, field), int) for field in row.ranks)
    parameters = VisualRWKVForCausalLM(config).model.state_dict().keys() - {"embed_tokens.weight"}
    rows = rwkv_rows(version, config.num_hidden_layers, "", "")
    assert {name for key_row in rows for name in key_row.ours} == parameters
    block = VisualRWKVForCausalLM(config).model.layers[1]
    ranks = {
        field: block.get_parameter(source.tensor).shape[source.dim]
        for field, source in original.ranks.items()
    }
    assert ranks == {field: getattr(config, field) for field in original.ranks}
    assert list(block.get_parameter(original.heads).shape) == [config.num_attention_heads, config.head_dim]


def test_a_mark_belongs_to_one_generation():
    blocks = {v: VisualRWKVForCausalLM(text_config(v)).model.layers[0].state_dict().keys() for v in VERSIONS}
    for version, original in ORIGINAL_GENERATIONS.items():
        assert [v for v in VERSIONS if original.mark in blocks[v]] == [version]


# --- a new generation, as one row --------------------------------------------------------------------------


class AverageTimeMix(nn.Module):
    """out = O (mean_t + peak_t) with mean_t = d mean_{t-1} + (1 - d) V x_t and peak_t = max(peak_{t-1}, V x_t)."""

    def __init__(self, config: VisualRWKVTextConfig, layer_idx: int):
        super().__init__()
        self.head_dim = config.head_dim
        self.mix = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.decay = nn.Parameter(torch.empty(config.num_attention_heads, config.head_dim))
        self.value = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states, v_first=None, state=None, token_order=IN_ORDER):
        carried = previous_token(hidden_states, TIME_MIX_SHIFT, state, token_order)
        (x,) = token_shift(hidden_states, carried, [self.mix], token_order.previous, token_order.following)
        values, mask = self.value(x).unflatten(-1, (-1, self.head_dim)).float(), token_order.mask()
        start = [None if state is None else state.get(name) for name in ("mean", "peak")]
        means, peaks = self.scan(values, mask, *start)
        out = self.output((means + peaks).flatten(-2).to(hidden_states.dtype))
        if state is None:
            return MixOutput(out, v_first, {})
        updates = {TIME_MIX_SHIFT: store_last_token(hidden_states, carried, state, token_order)}
        for i, name in enumerate(("mean", "peak")):
            after = partial(self.after, i, values, mask) if state.record_past else None
            updates[name] = StateUpdate((means, peaks)[i][:, -1], after)
        return MixOutput(out, v_first, updates)

    def scan(self, values, mask, mean, peak):
        """All means and peaks [B, T, H, K] of `values` [B, T, H, K]; padding changes neither."""
        d, both = torch.sigmoid(self.decay), []
        mean = torch.zeros_like(values[:, 0]) if mean is None else mean
        peak = torch.zeros_like(values[:, 0]) if peak is None else peak
        for t, v in enumerate(values.unbind(1)):
            real = torch.ones(len(v), dtype=torch.bool) if mask is None else mask[:, t]
            mean = torch.where(real[:, None, None], d * mean + (1 - d) * v, mean)
            peak = torch.where(real[:, None, None], torch.maximum(peak, v), peak)
            both.append((mean, peak))
        return [torch.stack(states, 1) for states in zip(*both)]

    def after(self, i, values, mask, length, before):
        start = [before, None] if i == 0 else [None, before]
        return self.scan(values[:, :length], None if mask is None else mask[:, :length], *start)[i][:, -1]

    def init_weights(self):
        for parameter in (self.mix, self.decay):
            nn.init.uniform_(parameter)


NEW = Generation(
    AverageTimeMix,
    Rwkv7ChannelMix,
    ops=("token_shift",),
    states=(
        StateSpec(TIME_MIX_SHIFT, ("hidden_size",)),
        StateSpec(CHANNEL_MIX_SHIFT, ("hidden_size",)),
        StateSpec("mean", ("num_attention_heads", "head_dim")),
        StateSpec("peak", ("num_attention_heads", "head_dim")),
    ),
)


@pytest.fixture
def model(monkeypatch) -> VisualRWKVForCausalLM:
    with pytest.raises(StrictDataclassError, match=r"rwkv_version must be one of 5, 6, 7, got 99\."):
        text_config(99)
    monkeypatch.setitem(GENERATIONS, 99, NEW)
    return awake(VisualRWKVForCausalLM(text_config(99)))


IDS = torch.randint(1, 300, (2, 24), generator=torch.Generator().manual_seed(0))
ATOL = 1e-5  # float32, logits around 3


@torch.no_grad()
def test_a_new_generation_reads_in_pieces_and_past_padding(model):
    whole = model(IDS, use_cache=False).logits
    prefix = model(IDS[:, :9])
    suffix = model(IDS[:, 9:], past_key_values=prefix.past_key_values)
    torch.testing.assert_close(torch.cat([prefix.logits, suffix.logits], 1), whole, atol=ATOL, rtol=0)
    shapes = {name: tuple(t.shape) for name, t in suffix.past_key_values.layers[0].tensors().items()}
    assert shapes == {spec.name: (2, *spec.shape(model.config)) for spec in NEW.states}

    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    padded = model(IDS, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(padded[:1, 5:], model(IDS[:1, 5:]).logits, atol=ATOL, rtol=0)


@torch.no_grad()
def test_a_new_generation_generates(model):
    """Greedily as without a cache, and beams and a batch with padding as each alone."""
    output = model.generate(IDS[:1], max_new_tokens=6, do_sample=False)
    ids = IDS[:1]
    for _ in range(6):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(output, ids)
    mask = torch.ones_like(IDS)
    mask[1, :10] = 0
    batch = model.generate(IDS, attention_mask=mask, max_new_tokens=4, num_beams=3)
    alone = model.generate(IDS[1:, 10:], max_new_tokens=4, num_beams=3)
    assert torch.equal(batch[1, 10:], alone[0])


@torch.no_grad()
def test_a_new_generation_takes_tokens_back(model):
    cache = VisualRWKVCache(model.config)
    model(IDS[:, :10], past_key_values=cache)
    for layer in cache.layers:
        layer.activate_past_recording()
    model(IDS[:, 10:17], past_key_values=cache)
    cache.crop(-4)
    again = model(IDS[:, 13:], past_key_values=cache).logits
    torch.testing.assert_close(again, model(IDS, use_cache=False).logits[:, 13:], atol=ATOL, rtol=0)


def test_a_new_generation_trains_and_is_saved(model, tmp_path):
    model(IDS, labels=IDS).loss.backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = VisualRWKVForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.rwkv_version == 99
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
