"""generate() on a GPU records a decoding step and replays it; here a recorder for CPUs takes the graph's place."""

from types import SimpleNamespace

import fake_graphs
import pytest
import torch
from tiny import awake, pixels, prompt, text_config, tiny_vlm
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, GenerationConfig

from visualrwkv_hf import (
    VisualRWKVCache,
    VisualRWKVForCausalLM,
    VisualRWKVStaticCache,
    decode_graph,
    kernel_backend,
)
from visualrwkv_hf.decode_graph import EAGER_STEPS, GraphedStep, why_no_graph

GREEDY = dict(max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)


@pytest.fixture
def model() -> VisualRWKVForCausalLM:
    return awake(VisualRWKVForCausalLM(text_config(7)))


@pytest.fixture
def captures(monkeypatch) -> list:
    """Record steps on the CPU as if it were a GPU; a list with an entry for each record, its number of replays."""
    made = []

    def capture(step, device):
        output, replay = fake_graphs.capture(step, device)
        made.append(0)
        number = len(made) - 1

        def replays():
            made[number] += 1
            replay()

        return output, replays

    def like_on_a_gpu(self, model_kwargs, generation_config):
        cache = model_kwargs.get("past_key_values")
        return not generation_config.disable_compile and cache is not None and cache.is_compileable

    monkeypatch.setitem(decode_graph.CAPTURES, "cpu", capture)
    monkeypatch.setattr(VisualRWKVForCausalLM, "_valid_auto_compile_criteria", like_on_a_gpu)
    return made


def ids(B: int = 1, T: int = 7) -> torch.Tensor:
    return torch.randint(1, 300, (B, T), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("version", [5, 6, 7])
@pytest.mark.parametrize("B", [1, 3])
def test_replayed_steps_equal_dynamic_ones_to_the_bit(captures, version, B):
    model = awake(VisualRWKVForCausalLM(text_config(version)))
    options = GREEDY | dict(return_dict_in_generate=True, output_logits=True)
    graphed = model.generate(ids(B), **options)
    assert captures == [GREEDY["max_new_tokens"] - 1 - EAGER_STEPS]  # the prompt gives the first token
    dynamic = model.generate(ids(B), **options, cache_implementation="dynamic")
    assert len(captures) == 1
    assert graphed.sequences.tolist() == dynamic.sequences.tolist()
    for x, y in zip(graphed.logits, dynamic.logits, strict=True):
        assert torch.equal(x, y)
    caches = graphed.past_key_values, dynamic.past_key_values
    assert type(caches[0]) is type(caches[1]) is VisualRWKVCache
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == ids().shape[1] + 9
    for ours, theirs in zip(*(cache.layer_tensors() for cache in caches)):
        for name, state in ours.items():
            assert torch.equal(state, theirs[name])


def test_static_state_equals_dynamic_to_the_bit(model):
    caches = VisualRWKVCache(model.config), VisualRWKVStaticCache(model.config)
    with torch.no_grad():
        for tokens in (ids(2), *ids(2).split(1, 1)):
            logits = [model(tokens, past_key_values=cache).logits for cache in caches]
            assert torch.equal(*logits)
    for ours, theirs in zip(*(cache.layer_tensors() for cache in caches)):
        assert all(torch.equal(state, theirs[name]) for name, state in ours.items())


def test_kernels_are_replayed_too(captures, monkeypatch):
    """As on a GPU: the decoding ops are in the record, and write the state in place."""
    pytest.importorskip("triton")
    model = awake(VisualRWKVForCausalLM(text_config(7, head_dim=32, num_hidden_layers=2)))
    options = GREEDY | dict(max_new_tokens=6)
    with kernel_backend("triton"):
        graphed = model.generate(ids(), **options)
        dynamic = model.generate(ids(), **options, cache_implementation="dynamic")
    assert captures == [3] and graphed.tolist() == dynamic.tolist()


def test_sampling_is_the_same(captures, model):
    options = GREEDY | dict(do_sample=True, temperature=0.9, top_k=20)
    torch.manual_seed(1)
    graphed = model.generate(ids(2), **options)
    torch.manual_seed(1)
    assert graphed.tolist() == model.generate(ids(2), **options, cache_implementation="dynamic").tolist()
    assert len(captures) == 1


def test_pictures_and_kept_caches_continue(captures, monkeypatch):
    vlm = tiny_vlm(version=7)
    monkeypatch.setattr(
        type(vlm), "_valid_auto_compile_criteria", VisualRWKVForCausalLM._valid_auto_compile_criteria
    )
    inputs = dict(input_ids=prompt(vlm), pixel_values=pixels())
    first = vlm.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, ids()], 1)
    again = vlm.generate(longer, past_key_values=first.past_key_values, **GREEDY)
    assert len(captures) == 2 and all(captures)
    monkeypatch.delitem(decode_graph.CAPTURES, "cpu")
    assert again.tolist() == vlm.generate(longer, pixel_values=inputs["pixel_values"], **GREEDY).tolist()


def test_padding_of_the_prompt_changes_nothing(captures, model):
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids(2)], 1)
    mask = (padded != 0).long()
    answer = model.generate(padded, attention_mask=mask, **GREEDY)[:, padded.shape[1] :]
    assert answer.tolist() == model.generate(ids(2), **GREEDY)[:, ids().shape[1] :].tolist()
    assert len(captures) == 2


@pytest.mark.parametrize(
    "options",
    [
        dict(num_beams=2),
        dict(prompt_lookup_num_tokens=2),
        dict(cache_implementation="dynamic"),
        dict(use_cache=False),
        dict(output_hidden_states=True, return_dict_in_generate=True),
        dict(disable_compile=True),
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_needs_the_dynamic_state_gets_it(captures, model, options):
    model.generate(ids(), **GREEDY | options)
    assert not captures


def test_a_prompt_read_in_chunks_is_followed_by_recorded_steps(captures, model):
    answer = model.generate(ids(), **GREEDY, prefill_chunk_size=2)
    assert answer.tolist() == model.generate(ids(), **GREEDY).tolist()
    assert len(captures) == 2


def test_a_hook_runs_at_every_token(captures, model):
    calls = []
    handle = model.lm_head.register_forward_hook(lambda *args: calls.append(None))
    model.generate(ids(), **GREEDY)
    assert len(calls) == GREEDY["max_new_tokens"] and not captures
    handle.remove()
    model.generate(ids(), **GREEDY)
    assert captures


def test_collected_hidden_states_leave_no_trace(captures, model):
    model.generate(ids(), **GREEDY, output_hidden_states=True, return_dict_in_generate=True)
    model.generate(ids(), **GREEDY)
    assert len(captures) == 1


def test_reasons(model, monkeypatch):
    config, cache = GenerationConfig(), VisualRWKVCache(model.config)
    assert why_no_graph(model, config, cache) == "nothing is recorded on cpu"
    monkeypatch.setitem(decode_graph.CAPTURES, "cpu", fake_graphs.capture)
    assert why_no_graph(model, config, cache) == ""
    for name, value in dict(num_beams=2, output_attentions=True, compile_config=CompileConfig()).items():
        assert why_no_graph(model, GenerationConfig(**{name: value}), cache)
    assert "another kind" in why_no_graph(model, config, VisualRWKVStaticCache(model.config))
    model.hf_device_map = {"a": 0, "b": 1}
    assert "several devices" in why_no_graph(model, config, cache)
    del model.hf_device_map
    model.lm_head._hf_hook = SimpleNamespace()
    assert "hooks" in why_no_graph(model, config, cache)
    del model.lm_head._hf_hook
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in why_no_graph(model, config, cache)
    model.lm_head.weight.ds_id = 1
    assert "spread" in why_no_graph(model, config, cache)
    assert "training" in why_no_graph(model.train(), config, cache)


def test_a_step_that_cannot_be_recorded_goes_on_in_python(captures, model, monkeypatch):
    def refuses(step, device):
        step()
        raise RuntimeError("operation not permitted when stream is capturing")

    expected = model.generate(ids(), **GREEDY, cache_implementation="dynamic")
    forward, calls = model.forward, []

    def looked_at(*args, **kwargs):
        calls.append(None)
        return forward(*args, **kwargs)

    monkeypatch.setitem(decode_graph.CAPTURES, "cpu", lambda step, device: refuses(lambda: None, device))
    monkeypatch.setattr(model, "forward", looked_at)
    with pytest.warns(UserWarning, match="cannot be recorded as a graph.*not permitted"):
        answer = model.generate(ids(), **GREEDY, return_dict_in_generate=True)
    assert answer.sequences.tolist() == expected.tolist() and len(calls) == GREEDY["max_new_tokens"]
    assert answer.past_key_values.get_seq_length() == expected.shape[1] - 1


def test_other_inputs_than_the_recorded_ones_are_computed(captures, model):
    step, cache = GraphedStep(model, lambda: pytest.fail("not static")), VisualRWKVCache(model.config)
    with torch.no_grad():
        model(ids(), past_key_values=cache)
        for token in ids().split(1, 1):
            step(input_ids=token, past_key_values=cache, use_cache=True)
        expected, count = cache.copy(), captures[0]
        more = step(input_ids=ids()[:, :1], past_key_values=cache, use_cache=True, output_hidden_states=True)
        assert more.hidden_states is not None and captures[0] == count
        step(input_ids=ids()[:, :3], past_key_values=cache, use_cache=True)
        model(torch.cat([ids()[:, :1], ids()[:, :3]], 1), past_key_values=expected)
    assert cache.get_seq_length() == expected.get_seq_length() == 18
    for ours, theirs in zip(cache.layer_tensors(), expected.layer_tensors()):
        for name, state in ours.items():
            torch.testing.assert_close(state, theirs[name])


def test_the_host_reads_one_value_a_token(captures, model):
    """Whether all answers have ended. Everything else is left to the device, so that it never waits for Python."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    def reads(tokens: int) -> int:
        with Reads() as mode:
            model.generate(ids(2), **GREEDY | dict(max_new_tokens=tokens, eos_token_id=[301, 302]))
        return mode.count

    assert reads(20) - reads(10) == 10


def test_a_static_cache_is_still_compiled(model, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        "transformers.modeling_utils.PreTrainedModel.get_compiled_call",
        lambda self, config: lambda **inputs: compiled.append(inputs) or self(**inputs),
    )
    step, cache = model.get_compiled_call(None), VisualRWKVStaticCache(model.config)
    with torch.no_grad():
        step(input_ids=ids(), past_key_values=cache)
    assert len(compiled) == 1 and isinstance(step, GraphedStep)
    assert not isinstance(model.get_compiled_call(CompileConfig()), GraphedStep)
