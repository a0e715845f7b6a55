"""A server whose model begins with a tuned state: every route does, and a follow-up goes on from such a state."""

from types import SimpleNamespace

import httpx
import pytest
import torch
from patience import PATIENCE
from serving import data_url, running, user
from tiny_training import save_tiny_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from visualrwkv_hf import TunedState
from visualrwkv_hf.inference.server import _announcement, build_app
from visualrwkv_hf.inference.server_decisions import Decider, Decision, decision_config
from visualrwkv_hf.inference.server_limits import Limits

pytest.importorskip("uvicorn", reason="needs the extra serve")

RED = data_url("red")
QUESTION = user("Which colour is it?", RED)
GREEDY = dict(max_new_tokens=12, do_sample=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("served") / "visualrwkv-tiny", image_position="first")


@pytest.fixture(scope="module")
def tuned(folder, tmp_path_factory):
    """A state after which the model answers something else."""
    state = TunedState.of(AutoModelForImageTextToText.from_pretrained(folder))
    generator = torch.Generator().manual_seed(0)
    for weight in state.parameters():
        weight.data.normal_(std=1e3, generator=generator)
    state.save_pretrained(target := tmp_path_factory.mktemp("tuned"))
    return target


@pytest.fixture(scope="module")
def served(folder, tuned):
    """A client of the server, and how many tokens each forward of its model read."""
    app = build_app(folder, tuned_state=str(tuned))
    reads = []
    app.state.model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: reads.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    with running(app) as url, httpx.Client(base_url=f"{url}/v1", timeout=PATIENCE) as client:
        yield SimpleNamespace(client=client, reads=reads, app=app)


@pytest.fixture(scope="module")
def by_hand(folder, tuned):
    """What a model without a server answers: `by_hand(inputs)`, or with `initial_state=None` from zeros."""
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(folder).eval(),
        AutoProcessor.from_pretrained(folder),
    )
    state = TunedState.from_pretrained(tuned, model)

    def answer(prompt, initial_state=state):
        if isinstance(prompt, str):
            inputs = processor.tokenizer(prompt, return_tensors="pt")
        else:
            inputs = processor.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        suppressed = [model.config.image_token_id]
        options = dict(GREEDY, suppress_tokens=suppressed, initial_state=initial_state)
        output = model.generate(**inputs, **options)
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    return SimpleNamespace(answer=answer, model=model, processor=processor, state=state)


def post(served, route, **body):
    response = served.client.post(route, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def ours(message):
    """A message of OpenAI's in the words of transformers."""
    if isinstance(message["content"], str):
        return message
    kinds = {"image_url": lambda part: {"type": "image", "url": part["image_url"]["url"]}, "text": dict}
    return message | {"content": [kinds[part["type"]](part) for part in message["content"]]}


def test_the_line_at_the_start_names_it(served, tuned):
    assert f", begins with {tuned}) answers at http://127.0.0.1:1" in _announcement(
        served.app, "127.0.0.1", 1, False
    )


def test_a_conversation_begins_with_it_and_goes_on(served, by_hand):
    messages = [QUESTION]
    for question in ("And why?", None):
        served.reads.clear()
        reply = post(served, "/chat/completions", messages=messages, max_tokens=12)
        chat = [ours(message) for message in messages]
        answer = reply["choices"][0]["message"]["content"]
        assert answer == by_hand.answer(chat) != by_hand.answer(chat, None)
        if question is None:  # went on from the state that was kept
            assert sum(served.reads) < reply["usage"]["prompt_tokens"]
        messages = [
            *messages,
            {"role": "assistant", "content": answer},
            {"role": "user", "content": question},
        ]


def test_responses_and_completions_begin_with_it(served, by_hand):
    content = [
        {"type": "input_image", "image_url": RED},
        {"type": "input_text", "text": "Which colour is it?"},
    ]
    reply = post(
        served,
        "/responses",
        input=[{"role": "user", "content": content}],
        max_output_tokens=12,
        temperature=0,
    )
    (message,) = [part for part in reply["output"] if part["type"] == "message"]
    assert message["content"][0]["text"] == by_hand.answer([ours(QUESTION)])
    prompt = "User: Say yes.\n\nAssistant:"
    for _ in range(2):
        reply = post(served, "/completions", prompt=prompt, max_tokens=12)
        assert reply["choices"][0]["text"].strip() == by_hand.answer(prompt) != by_hand.answer(prompt, None)


def test_decisions_begin_with_it(served, by_hand, folder):
    config = decision_config(folder)
    if config is None:
        pytest.skip("transformers.decision came with a later transformers")
    questions = {
        "kind": {"type": "choice", "instructions": "What is it?", "criteria": {"dot": None, "line": None}}
    }
    decision = Decision("A red dot.", questions, [])
    decide = Decider(by_hand.model, by_hand.processor, config, Limits())
    plain = decide(decision, [], None, lambda: False)[0]["kind"]["probabilities"]
    TunedState.attach(by_hand.model, by_hand.state)
    try:
        wanted = decide(decision, [], None, lambda: False)[0]["kind"]["probabilities"]
    finally:
        by_hand.state.detach(by_hand.model)
    assert wanted != pytest.approx(plain, abs=1e-3)
    for _ in range(2):
        answer = post(served, "/systemone", state=decision.state, questions=questions)["answers"]["kind"]
        assert answer["probabilities"] == pytest.approx(wanted, abs=1e-5)
