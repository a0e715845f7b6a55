"""`generate()` with one call in C for each token, against transformers' own loop over calls of the model."""

import pytest
import torch
from native_ops import NEEDS_NATIVE_OPS
from tiny import awake, pixels, prompt, text_config, tiny_vlm
from torch import nn
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from visualrwkv_hf import (
    StateStore,
    VisualRWKVCache,
    VisualRWKVForCausalLM,
    accelerate_on_cpu,
    generation_visualrwkv,
)
from visualrwkv_hf.cpu import library
from visualrwkv_hf.decode_loop import TRIED_STEPS
from visualrwkv_hf.dispatch import kernel_backend

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""Relative to the largest logit: sums in another order, and steps of the dtype where they round to another number."""

GREEDY = dict(max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
WITH_LOGITS = GREEDY | dict(return_dict_in_generate=True, output_logits=True, output_scores=True)

pytestmark = NEEDS_NATIVE_OPS


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The names of the functions of ops.c that were called."""
    names, call = [], library.Library.call
    monkeypatch.setattr(
        library.Library, "call", lambda self, name, *given: (names.append(name), call(self, name, *given))[1]
    )
    return names


@pytest.fixture
def stock(monkeypatch):
    """Generate by transformers' loop."""

    def generate(model, *args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(generation_visualrwkv, "why_stock_loop", lambda *_: "the test compares with it")
            return model.generate(*args, **options)

    return generate


def causal_lm(version: int = 7, dtype: torch.dtype = torch.float32, weights: str | None = None):
    torch.manual_seed(version)
    model = awake(VisualRWKVForCausalLM(text_config(version, hidden_size=128))).to(dtype)
    return accelerate_on_cpu(model, weights=weights)


def ids(B: int = 1, T: int = 7) -> torch.Tensor:
    return torch.randint(1, 300, (B, T), generator=torch.Generator().manual_seed(3))


INPUT_STEP = 1e-3
"""Relative, with weights of few bits: their inputs are rounded to 16 bits, now and then to another step."""


def assert_same(ours, theirs, dtype: torch.dtype, weights: str | None = None) -> None:
    """Compare logits and ids; a row is followed until two logits are so close that rounding chooses among them."""
    differs = torch.zeros(len(ours.sequences), dtype=torch.bool)
    first = ours.sequences.shape[1] - len(ours.logits)
    for step, (x, y) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
        limit = (TOLERANCES[dtype] + INPUT_STEP * bool(weights)) * float(y.abs().max())
        assert x.dtype == y.dtype == torch.float32
        assert float((x - y)[~differs].abs().max()) <= limit
        tokens = [output.sequences[:, first + step] for output in (ours, theirs)]
        for row in (tokens[0] != tokens[1]).logical_and(~differs).nonzero().flatten():
            assert abs(float(y[row, tokens[0][row]] - y[row, tokens[1][row]])) <= limit
            differs[row] = True
    assert not differs.any() or dtype != torch.float32 or weights


FORMATS = [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "int8"), (torch.bfloat16, "int4")]


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("dtype, weights", [*FORMATS, (torch.float16, None), (torch.float32, "int4")])
@pytest.mark.parametrize("version", [5, 6, 7])
def test_greedy_answers_are_those_of_the_stock_loop(calls, stock, version, dtype, weights, B):
    model = causal_lm(version, dtype, weights)
    mask = torch.ones_like(ids(B))
    mask[0, :2] = int(B == 1)  # padding on the left
    ours = model.generate(ids(B), attention_mask=mask, **WITH_LOGITS)
    assert calls.count("token") == GREEDY["max_new_tokens"] - 1
    calls.clear()
    theirs = stock(model, ids(B), attention_mask=mask, **WITH_LOGITS)
    assert "token" not in calls
    assert_same(ours, theirs, dtype, weights)
    assert type(ours) is type(theirs) and type(ours.past_key_values) is VisualRWKVCache
    assert ours.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length()
    assert all(torch.equal(*pair) for pair in zip(ours.logits, ours.scores, strict=True))
    alone = model.generate(ids(B), attention_mask=mask, **GREEDY)
    assert alone.tolist() == ours.sequences.tolist()  # the ids that C chooses


def test_the_states_are_those_of_the_stock_loop(stock):
    model = causal_lm(6)
    ours, theirs = (
        generate(ids(2), **WITH_LOGITS).past_key_values
        for generate in (model.generate, lambda *a, **k: stock(model, *a, **k))
    )
    for layer, other in zip(ours.layer_tensors(), theirs.layer_tensors(), strict=True):
        for name, state in layer.items():
            torch.testing.assert_close(state, other[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        dict(do_sample=True, temperature=0.9, top_k=20, top_p=1.0),
        dict(do_sample=True, temperature=1.3, top_k=0, top_p=0.8),
        dict(repetition_penalty=1.4, no_repeat_ngram_size=2),
        dict(do_sample=True, num_return_sequences=4),
    ],
    ids=["top-k", "top-p", "penalties", "several answers"],
)
def test_processors_and_sampling_are_those_of_the_stock_loop(calls, stock, options):
    model, options = causal_lm(7), WITH_LOGITS | options
    torch.manual_seed(1)
    ours = model.generate(ids(), **options)
    assert calls.count("token") == GREEDY["max_new_tokens"] - 1
    torch.manual_seed(1)
    theirs = stock(model, ids(), **options)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    for x, y in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


class Notes:
    """A streamer that notes its calls, and whether a token's tensor changes later."""

    def __init__(self):
        self.calls, self.given = [], []

    def put(self, tokens):
        self.calls.append((tokens.dtype, tokens.tolist()))
        self.given.append(tokens)

    def end(self):
        self.calls.append("end")
        assert [call[1] for call in self.calls[:-1]] == [tokens.tolist() for tokens in self.given]


def test_a_streamer_is_called_alike(stock):
    model, notes = causal_lm(7), (Notes(), Notes())
    model.generate(ids(), streamer=notes[0], **GREEDY)
    stock(model, ids(), streamer=notes[1], **GREEDY)
    assert notes[0].calls == notes[1].calls and len(notes[0].calls) == GREEDY["max_new_tokens"] + 2


class AfterTokens(StoppingCriteria):
    """Ends row n after n + 2 tokens, and looks at all ids."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        assert input_ids.dtype == torch.int64 and (scores is None or len(scores) > 0)
        return torch.tensor([input_ids.shape[1] >= self.length + 2 + row for row in range(len(input_ids))])


@pytest.mark.parametrize(
    "options",
    [
        lambda theirs: dict(eos_token_id=[int(theirs[0, 9]), int(theirs[1, 11])]),
        lambda theirs: dict(eos_token_id=int(theirs[2, 10]), pad_token_id=17),
        lambda theirs: dict(stopping_criteria=StoppingCriteriaList([AfterTokens(7)])),
        lambda theirs: dict(eos_token_id=int(theirs[1, 8]), stopping_criteria=[AfterTokens(7)]),
        lambda theirs: dict(max_time=0.0),
        lambda theirs: dict(max_new_tokens=1),
    ],
    ids=["end tokens", "padding", "a criterion", "both", "time", "one token"],
)
def test_rows_end_as_in_the_stock_loop(stock, options):
    model = causal_lm(7)
    options = GREEDY | options(stock(model, ids(3), **GREEDY))
    ours = model.generate(ids(3), **options)
    assert ours.tolist() == stock(model, ids(3), **options).tolist()
    assert ours.shape[1] < 17 or 17 in ours[2]


def test_a_picture_is_read_and_a_state_is_kept_for_its_next_question(calls, stock):
    vlm = accelerate_on_cpu(tiny_vlm(version=7))
    inputs = dict(input_ids=prompt(vlm), pixel_values=pixels())
    stores = StateStore(4), StateStore(4)
    ours = vlm.generate(**inputs, **GREEDY, state_store=stores[0])
    assert calls.count("token") == GREEDY["max_new_tokens"] - 1
    theirs = stock(vlm, **inputs, **GREEDY, state_store=stores[1])
    assert ours.tolist() == theirs.tolist()
    assert len(stores[0]) == len(stores[1]) > 1
    longer = torch.cat([ours, ids()], 1)
    again = vlm.generate(longer, pixel_values=pixels(), **GREEDY, state_store=stores[0])
    assert again.tolist() == stock(vlm, longer, pixel_values=pixels(), **GREEDY).tolist()


def test_hooks_that_leave_after_the_first_token_cost_nothing(calls):
    """As the command line watches the reading of a prompt."""
    model = causal_lm(7)
    handle = model.model.register_forward_pre_hook(lambda module, given: None)

    class Leaves(Notes):
        def put(self, tokens):
            super().put(tokens)
            if len(self.given) == TRIED_STEPS:  # the prompt, and the first token
                handle.remove()

    model.generate(ids(), streamer=Leaves(), **GREEDY)
    assert calls.count("token") == GREEDY["max_new_tokens"] - 1


@pytest.mark.parametrize(
    "where", ["", "model", "model.embed_tokens", "model.norm", "lm_head", "model.layers.1.att.key"]
)
def test_hooks_that_stay_are_called_for_each_token(calls, stock, where):
    model, seen = causal_lm(7), []
    expected = stock(model, ids(), **GREEDY).tolist()
    model.get_submodule(where).register_forward_hook(lambda *_: seen.append(1))
    assert model.generate(ids(), **GREEDY).tolist() == expected
    assert "token" not in calls and len(seen) == GREEDY["max_new_tokens"]


def other_norm(model):
    model.model.norm = nn.Sequential(model.model.norm)


def biased_head(model):
    model.lm_head.bias = nn.Parameter(torch.zeros(model.lm_head.out_features))


@pytest.mark.parametrize(
    "change, options",
    [
        (other_norm, {}),
        (biased_head, {}),
        (lambda model: None, dict(output_hidden_states=True, return_dict_in_generate=True)),
        (lambda model: None, dict(num_beams=2)),
        (lambda model: None, dict(use_cache=False)),
        (lambda model: None, dict(num_return_sequences=9, do_sample=True)),
        (lambda model: model.train(), {}),
        (lambda model: setattr(model, "forward", model.forward), {}),
    ],
    ids=["norm", "bias", "hidden states", "beams", "no cache", "nine rows", "training", "forward"],
)
def test_what_c_does_not_compute_is_left_to_the_model(calls, change, options):
    model = causal_lm(7)
    change(model)
    model.generate(ids(), **GREEDY | options)
    assert "token" not in calls


def test_another_backend_and_a_subclass_are_left_to_the_model(calls):
    model = causal_lm(7)
    with kernel_backend("torch"):
        model.generate(ids(), **GREEDY)
    model.__class__ = type("Theirs", (VisualRWKVForCausalLM,), {"forward": VisualRWKVForCausalLM.forward})
    model.generate(ids(), **GREEDY)
    assert calls.count("token") == GREEDY["max_new_tokens"] - 1  # the inherited method is ours

    def forward(self, *args, **kwargs):
        return super(type(self), self).forward(*args, **kwargs)

    calls.clear()
    model.__class__ = type("Theirs", (VisualRWKVForCausalLM,), {"forward": forward})
    model.generate(ids(), **GREEDY)
    assert "token" not in calls


@pytest.mark.parametrize("broken", [None, float("nan"), float("inf"), -float("inf")])
def test_the_first_of_equal_logits_is_chosen_and_nan_before_all(stock, broken):
    model = causal_lm(7)
    model.lm_head.weight.data[100:] = model.lm_head.weight.data[:220].clone()
    if broken is not None:
        model.lm_head.weight.data[[70, 300], 0] = broken
    assert model.generate(ids(3), **GREEDY).tolist() == stock(model, ids(3), **GREEDY).tolist()


def test_an_id_outside_of_the_embedding_is_refused():
    model = causal_lm(7)
    model.model.embed_tokens = nn.Embedding(5, 128)
    with pytest.raises(RuntimeError, match="token refused its arguments"):
        model.generate(ids() % 5, **GREEDY)
