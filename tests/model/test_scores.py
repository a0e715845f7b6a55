"""Scores of given answers: what a plain forward pass says, from one reading of the picture."""

import pytest
import torch
from chats import MODELS, TOWERS, assistant, batch_of, counted_tokens, inputs_of, picture, user
from tiny_training import tiny_model, tiny_processor
from transformers import pipeline

from visualrwkv_hf import StateStore, VisualRWKVForCausalLM
from visualrwkv_hf.scoring_visualrwkv import answer_ids

KINDS = MODELS | TOWERS
"""One for each kind of release."""
ANSWERS = ["yes", "yes, a red one", "no", "a dot", "a dot and a line"]
QUESTIONS = ["Is it red?", "Is it a cat, or is it a dog?", "What?"]
EXACT = dict(rtol=0, atol=1e-5)
"""float32; reading in pieces adds up in another order."""


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return tiny_model(**KINDS[request.param])


@pytest.fixture(scope="module")
def processor(model):
    return tiny_processor(model)


def plain_scores(model, inputs, answer: list[int]) -> torch.Tensor:
    """The log-softmax of one forward pass over prompt and answer, at the answer: [T]."""
    pixels = {name: value for name, value in inputs.items() if "pixel" in name or "tiles" in name}
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
    with torch.no_grad():
        logits = model(input_ids=ids, **pixels).logits[0, -len(answer) - 1 : -1]
    return logits.log_softmax(-1)[range(len(answer)), answer]


def assert_plain(scores, model, processor, inputs, row=0, answers=ANSWERS, end_of_turn=False):
    ids = answer_ids(answers, processor, end_of_turn)
    for answer, tokens, total, mean in zip(
        ids, scores.token_log_probs, scores.log_probs[row], scores.mean_log_probs[row]
    ):
        wanted = plain_scores(model, inputs, answer)
        torch.testing.assert_close(tokens[row], wanted, **EXACT)
        torch.testing.assert_close(total, wanted.sum(), rtol=0, atol=1e-5 * len(answer))
        torch.testing.assert_close(mean, wanted.mean(), **EXACT)


@pytest.mark.parametrize("end_of_turn", [False, True])
def test_scores_are_those_of_a_plain_forward(model, processor, end_of_turn):
    inputs = inputs_of(processor, user("What is it?", "red"))
    scores = model.score(inputs, ANSWERS, tokenizer=processor, end_of_turn=end_of_turn)
    assert_plain(scores, model, processor, inputs, end_of_turn=end_of_turn)
    assert scores.probabilities.sum(-1).allclose(torch.ones(1))


def test_a_kept_state_gives_the_same_scores_and_the_picture_is_not_read_again(model, processor):
    chat = [user("What is it?", "red"), assistant("A dot."), user("Is it big?")]
    state = model.read(processor, chat[:2])
    inputs = inputs_of(processor, *chat)
    with counted_tokens(model) as read:
        scores = model.score(inputs, ANSWERS, tokenizer=processor, past_key_values=state)
    assert sum(read) < 60 and inputs["input_ids"].shape[1] - state.get_seq_length() == read[0]
    assert_plain(scores, model, processor, inputs)


def test_rows_of_a_batch_are_scored_as_alone(rwkv7, rwkv7_processor):
    chats = [[user(question, "red")] for question in QUESTIONS]
    state = rwkv7.read(rwkv7_processor, [user(None, "red")])
    for kept in (None, state):
        for side in ("left", "right"):
            inputs = batch_of(rwkv7_processor, chats, side)
            scores = rwkv7.score(inputs, ANSWERS, tokenizer=rwkv7_processor, past_key_values=kept)
            assert scores.log_probs.shape == (3, len(ANSWERS))
            for row, chat in enumerate(chats):
                assert_plain(scores, rwkv7, rwkv7_processor, inputs_of(rwkv7_processor, *chat), row)


@pytest.mark.parametrize(
    "answers", [["yes"], ["yes", "yes"], ["a dot", "a dot and a line"], [[5], [5, 6], [5, 6, 7]], [[9, 8, 7]]]
)
def test_answers_with_a_common_beginning(rwkv7, rwkv7_processor, answers):
    inputs = inputs_of(rwkv7_processor, user("What is it?", "red"))
    assert_plain(
        rwkv7.score(inputs, answers, tokenizer=rwkv7_processor), rwkv7, rwkv7_processor, inputs, 0, answers
    )


def test_many_answers_are_read_in_several_batches(rwkv7, rwkv7_processor, monkeypatch):
    inputs = inputs_of(rwkv7_processor, user("What is it?", "red"))
    monkeypatch.setattr("visualrwkv_hf.scoring_visualrwkv.MAX_LOGITS_BYTES", 1)
    with counted_tokens(rwkv7) as read:
        scores = rwkv7.score(inputs, ANSWERS, tokenizer=rwkv7_processor)
    assert len(read) > len(ANSWERS)
    assert_plain(scores, rwkv7, rwkv7_processor, inputs)


def test_common_beginning_is_read_once(rwkv7):
    ids = torch.tensor([[1, 2, 3]])
    beginning = list(range(10, 30))
    with counted_tokens(rwkv7) as read:
        rwkv7.score({"input_ids": ids}, [[*beginning, 1], [*beginning, 2], [*beginning, 3]])
    assert sum(read) == 3 + 20


def test_scores_of_a_text_model(rwkv7):
    text = VisualRWKVForCausalLM(rwkv7.config.text_config).eval()
    ids = torch.tensor([[5, 6, 7]])
    scores = text.score({"input_ids": ids}, [[8, 9], [10]])
    logits = text(torch.tensor([[5, 6, 7, 8]])).logits[0].log_softmax(-1)
    torch.testing.assert_close(scores.log_probs[0, 0], logits[2, 8] + logits[3, 9], **EXACT)
    torch.testing.assert_close(scores.log_probs[0, 1], logits[2, 10], **EXACT)


def test_gradients_reach_the_pixels(model, processor):
    """Each pixel's gradient, summed over a random direction, is the slope of the scores along it."""
    model = model.double()
    try:
        inputs = inputs_of(processor, user("What is it?", "red"))
        names = [name for name in inputs if name.startswith("pixel")]
        pixels = {name: inputs[name].double().requires_grad_() for name in names}
        scores = model.score({**inputs, **pixels}, ANSWERS, tokenizer=processor)
        torch.testing.assert_close(
            scores.log_probs.detach(),
            model.score(
                {**inputs, **{n: p.detach() for n, p in pixels.items()}}, ANSWERS, tokenizer=processor
            ).log_probs,
            **EXACT,
        )
        scores.log_probs[0, 3].backward()
        step = {name: torch.randn_like(value) * 1e-3 for name, value in pixels.items()}
        slope = sum(float((value.grad * step[name]).sum()) for name, value in pixels.items())
        ends = []
        for sign in (-1, 1):
            moved = {name: (value + sign * step[name]).detach() for name, value in pixels.items()}
            ends.append(float(model.score({**inputs, **moved}, ANSWERS, tokenizer=processor).log_probs[0, 3]))
        assert slope == pytest.approx((ends[1] - ends[0]) / 2, rel=0.05, abs=1e-5)
        assert slope != 0
    finally:
        model.float()


def test_a_store_is_used_and_filled(rwkv7, rwkv7_processor):
    store = StateStore()
    first = inputs_of(rwkv7_processor, user("What is it?", "red"))
    second = inputs_of(rwkv7_processor, user("Is it big?", "red"))
    rwkv7.score(first, ANSWERS, tokenizer=rwkv7_processor, state_store=store)
    with counted_tokens(rwkv7) as read:
        scores = rwkv7.score(second, ANSWERS, tokenizer=rwkv7_processor, state_store=store)
    assert store.hits == 1 and rwkv7.config.num_image_tokens not in read
    assert_plain(scores, rwkv7, rwkv7_processor, second)


def test_scoring_changes_no_state(rwkv7, rwkv7_processor):
    state = rwkv7.read(rwkv7_processor, [user(None, "red")])
    before = [tensor.clone() for layer in state.layers for tensor in layer.values()]
    inputs = inputs_of(rwkv7_processor, user("What?", "red"))
    rwkv7.score(inputs, ANSWERS, tokenizer=rwkv7_processor, past_key_values=state)
    assert all(map(torch.equal, before, [tensor for layer in state.layers for tensor in layer.values()]))


def test_refusals(rwkv7, rwkv7_processor):
    inputs = inputs_of(rwkv7_processor, user("What?", "red"))
    for answers in ([], "yes"):
        with pytest.raises(ValueError, match="needs a list of at least one answer"):
            rwkv7.score(inputs, answers, tokenizer=rwkv7_processor)
    for answers in (["yes", " "], [[1], []]):
        with pytest.raises(ValueError, match="Answer 1 is empty"):
            rwkv7.score(inputs, answers, tokenizer=rwkv7_processor)
    with pytest.raises(ValueError, match=r"tokenizer=processor\.tokenizer"):
        rwkv7.score(inputs, ["yes"])
    with pytest.raises(ValueError, match=r"input_ids \[B, T\]"):
        rwkv7.score({"pixel_values": inputs["pixel_values"]}, [[1]])
    with pytest.raises(ValueError, match="input_ids and pictures"):
        rwkv7.score({**inputs, "scan_orders": torch.zeros(1, 1, 1)}, [[1]])
    state = rwkv7.read(rwkv7_processor, [user(None, "red")])
    with pytest.raises(ValueError, match="must be a KeptState"):
        rwkv7.score(inputs, [[1]], past_key_values=state.to_cache())
    pixels = inputs["pixel_values"].requires_grad_()
    with pytest.raises(ValueError, match="leave past_key_values out"):
        rwkv7.score({**inputs, "pixel_values": pixels}, [[1]], past_key_values=state)
    with pytest.raises(ValueError, match="picture 1 is another one"):
        rwkv7.score(inputs_of(rwkv7_processor, user("What?", "blue")), [[1]], past_key_values=state)


# --- transformers' pipeline "decision" ----------------------------------------------------------------


def decide(model, processor, store):
    """Answers to three questions about one picture, and how many tokens were read for each."""
    config = pytest.importorskip(
        "transformers.decision", reason="came with a later transformers"
    ).DecisionConfig
    decision = pipeline(
        "decision",
        model=model,
        processor=processor,
        tokenizer=processor.tokenizer,
        decision_config=config(labels={"noul": ["Y", "N"]}),
    )
    request = {
        "state": "A picture: photo-1",
        "assets": {"photo-1": picture("red")},
        "questions": {
            "red": {"type": "noul", "instructions": "Is it red?"},
            "kind": {
                "type": "choice",
                "instructions": "What is it?",
                "criteria": {"dot": None, "line": "Long"},
            },
            "size": {"type": "score", "instructions": "How big is it?", "criteria": ["small", "big"]},
        },
    }
    model.state_store = store
    try:
        with counted_tokens(model) as read:
            return decision(request), read
    finally:
        model.state_store = None


def test_decisions_with_a_store_read_the_picture_once(rwkv7):
    processor = tiny_processor(rwkv7)  # of its own: the pipeline adds tokens to its tokenizer
    plain, all_tokens = decide(rwkv7, processor, None)
    store = StateStore()
    kept, read = decide(rwkv7, processor, store)
    picture_tokens = rwkv7.config.num_image_tokens
    assert sum(count >= picture_tokens for count in all_tokens) == 3
    assert store.hits == 2 and sum(all_tokens) - sum(read) >= 2 * picture_tokens
    assert kept["red"]["noul"] == pytest.approx(plain["red"]["noul"], abs=1e-5)
    for question in ("kind", "size"):
        assert kept[question]["probabilities"] == pytest.approx(plain[question]["probabilities"], abs=1e-5)


def test_only_a_call_for_the_last_logits_looks_into_the_store(rwkv7, rwkv7_processor):
    inputs = inputs_of(rwkv7_processor, user("What?", "red"))
    last = torch.tensor([inputs["input_ids"].shape[1] - 1])
    plain = rwkv7(**inputs, use_cache=False, logits_to_keep=last)
    rwkv7.state_store = store = StateStore()
    try:
        rwkv7(**inputs, use_cache=False, logits_to_keep=last)  # with gradients
        with torch.no_grad():
            rwkv7(**inputs, use_cache=False, logits_to_keep=1)
            rwkv7(**inputs, use_cache=False, logits_to_keep=last - 1)
            rwkv7(**inputs, logits_to_keep=last)
            rwkv7(
                **inputs, use_cache=False, logits_to_keep=last, labels=inputs["input_ids"], skip_logits=False
            )
            assert not len(store)
            kept = rwkv7(**inputs, use_cache=False, logits_to_keep=last)
    finally:
        rwkv7.state_store = None
    assert len(store)
    torch.testing.assert_close(kept.logits, plain.logits, **EXACT)
