"""State tuning: gradients reach the initial state alone, and a model begins with it whatever the way it reads."""

import json

import pytest
import torch
from chats import GREEDY, MODELS, batch_of, inputs_of, user
from hub_client import client_process, push_and_pull_state, refusal_of_state
from hub_server import Hub
from safetensors.torch import load_file, save_file
from tiny_training import TEXT_SAMPLE, tiny_model, tiny_processor, write_data
from transformers import pipeline

from visualrwkv_hf import (
    StateStore,
    TunedState,
    VisualRWKVDataCollator,
    VisualRWKVTrainer,
    VisualRWKVTrainingArguments,
    accelerate_on_cpu,
    load_conversations,
    lora_config,
)

LOGITS = dict(**GREEDY, output_logits=True, return_dict_in_generate=True)


@pytest.fixture(params=MODELS)
def model(request):
    return tiny_model(**MODELS[request.param])


@pytest.fixture
def rwkv7():
    return tiny_model(**MODELS["rwkv7"])


def random_state(model, seed=0, scale=1e3, **options) -> TunedState:
    """Large numbers, since a random model forgets most of them while it reads a picture."""
    state = TunedState.of(model, **options)
    generator = torch.Generator().manual_seed(seed)
    for weight in state.parameters():
        weight.data.normal_(std=scale, generator=generator)
    return state


def logits_of(model, inputs, **options) -> torch.Tensor:
    return torch.stack(model.generate(**inputs, **LOGITS, **options).logits)


def test_zeros_change_nothing_and_others_do(model):
    inputs = inputs_of(tiny_processor(model), user("What is it?", "red"))
    plain = logits_of(model, inputs)
    assert torch.equal(logits_of(model, inputs, initial_state=TunedState.of(model)), plain)
    assert not torch.allclose(logits_of(model, inputs, initial_state=random_state(model)), plain, atol=5e-3)


@pytest.mark.parametrize("options", [{}, dict(train_tokens=False), dict(layers=[1])])
def test_generate_and_forward_begin_alike(model, options):
    """An initial state of `generate`, an attached one in a training forward, and one with a cache."""
    inputs = inputs_of(tiny_processor(model), user("What is it?", "red"))
    state = random_state(model, **options)
    generated = logits_of(model, inputs, initial_state=state)[0, 0]
    TunedState.attach(model, state)
    for use_cache in (False, True):
        logits = model(**inputs, use_cache=use_cache).logits[0, -1]
        torch.testing.assert_close(logits, generated, rtol=0, atol=1e-3)  # float32, read in pieces
    torch.testing.assert_close(logits_of(model, inputs)[0, 0], generated, rtol=0, atol=1e-3)
    state.detach(model)
    assert not torch.allclose(model(**inputs).logits[0, -1], generated, atol=5e-3)


def test_gradients_are_the_slope_and_reach_the_state_alone(model):
    inputs = inputs_of(tiny_processor(model), user("What is it?", "red"))
    model = model.double()
    state = TunedState.attach(model, random_state(model, scale=1.0)).double()
    assert {n for n, w in model.named_parameters() if w.requires_grad} == {
        n for n, _ in model.named_parameters() if ".tuned_state." in n
    }
    inputs["pixel_values"] = inputs["pixel_values"].double()

    def loss():
        return model(**inputs, labels=inputs["input_ids"], use_cache=False).loss

    loss().backward()
    weights = list(state.parameters())
    assert all(weight.grad.abs().max() > 0 for weight in weights)
    step = [torch.randn_like(weight) * 1e-3 for weight in weights]
    slope = sum(float((weight.grad * s).sum()) for weight, s in zip(weights, step))
    ends = []
    for sign in (1, -2):
        for weight, s in zip(weights, step):
            weight.data += sign * s
        ends.append(float(loss().detach()))
    assert slope == pytest.approx((ends[0] - ends[1]) / 2, rel=0.05, abs=1e-6)


def test_rows_of_a_batch_begin_each_with_its_own(rwkv7):
    processor = tiny_processor(rwkv7)
    chats = [[user(text, "red")] for text in ("What is it?", "Is it a dot, or a line?", "What?")]
    states = [random_state(rwkv7, 1), None, random_state(rwkv7, 2)]
    inputs = batch_of(processor, chats)
    together = logits_of(rwkv7, inputs, initial_state=states)
    beams = rwkv7.generate(**inputs, **GREEDY, num_beams=2, initial_state=states)
    for row, (chat, state) in enumerate(zip(chats, states)):
        own = inputs_of(processor, *chat)
        options = {} if state is None else dict(initial_state=state)
        torch.testing.assert_close(
            together[0, row], logits_of(rwkv7, own, **options)[0, 0], rtol=0, atol=1e-3
        )
        alone = rwkv7.generate(**own, **GREEDY, num_beams=2, **options)[0, own["input_ids"].shape[1] :]
        found = beams[row, inputs["input_ids"].shape[1] :]
        assert torch.equal(found[: len(alone)], alone[: len(found)])


@pytest.mark.parametrize("options", [{}, dict(layers=[0]), dict(train_tokens=False)])
def test_one_token_does_not_change_what_it_begins_with(model, options):
    """Native ops write the next state in place."""
    ids = torch.tensor([[72]])
    state = random_state(model, scale=1.0, **options)
    before = {name: tensor.clone() for name, tensor in state.state_dict().items()}
    TunedState.attach(model, state)
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits
        model = accelerate_on_cpu(model)
        for _ in range(2):
            found = model(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.state_dict().items())


def test_a_model_may_be_cast_with_its_state(rwkv7, tmp_path):
    inputs = inputs_of(tiny_processor(rwkv7), user("What is it?", "red"))
    state = TunedState.attach(rwkv7, random_state(rwkv7, scale=1.0))
    identity = state.identity
    rwkv7.to(torch.bfloat16)
    assert torch.isfinite(rwkv7(**inputs.to(dtype=torch.bfloat16)).logits).all()
    assert state.identity != identity  # rounded
    rwkv7.save_pretrained(tmp_path)
    assert TunedState.from_pretrained(tmp_path, rwkv7).identity == state.identity


def test_saving_pushes_the_attached_state(rwkv7, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        TunedState, "push_to_hub", lambda self, *args, **options: pushed.append((args, options))
    )
    TunedState.attach(rwkv7)
    rwkv7.save_pretrained(
        tmp_path / "state", push_to_hub=True, private=True, commit_message="learned", tags=["x"]
    )
    rwkv7.save_pretrained(tmp_path / "state", push_to_hub=True, repo_id="ann/state", token="t")
    rwkv7.save_pretrained(tmp_path / "state", push_to_hub=True, is_main_process=False)
    assert pushed == [
        (("state", None), {"private": True, "commit_message": "learned"}),
        (("ann/state", "t"), {}),
    ]


def test_it_is_attached_inside_of_adapters(rwkv7):
    peft = pytest.importorskip("peft")
    inputs = inputs_of(tiny_processor(rwkv7), user("What is it?", "red"))
    state = random_state(rwkv7)
    TunedState.attach(rwkv7, state)
    expected = rwkv7(**inputs).logits
    state.detach(rwkv7)
    wrapped = peft.get_peft_model(rwkv7, lora_config(r=2))  # adapters begin with zeros
    state.fingerprint = TunedState.of(wrapped).fingerprint  # of weights that are named otherwise
    TunedState.attach(wrapped, state)
    torch.testing.assert_close(wrapped(**inputs).logits, expected)


def test_a_store_keeps_states_of_other_beginnings_apart(rwkv7):
    inputs = inputs_of(tiny_processor(rwkv7), user("What is it?", "red"))
    store, state = StateStore(), random_state(rwkv7)
    plain, tuned = logits_of(rwkv7, inputs), logits_of(rwkv7, inputs, initial_state=state)
    for _ in range(2):
        torch.testing.assert_close(logits_of(rwkv7, inputs, state_store=store), plain, rtol=0, atol=1e-3)
        found = logits_of(rwkv7, inputs, state_store=store, initial_state=state)
        torch.testing.assert_close(found, tuned, rtol=0, atol=1e-3)
    assert store.hits == 2
    clients = [store.scoped(name) for name in ("one", "other")]
    for client in clients:  # none finds the other's states, of whichever beginning
        logits_of(rwkv7, inputs, state_store=client, initial_state=state)
    assert store.hits == 2
    TunedState.attach(rwkv7, state)
    for _ in range(2):
        torch.testing.assert_close(logits_of(rwkv7, inputs, state_store=store), tuned, rtol=0, atol=1e-3)
    assert store.hits == 4


def test_a_chat_is_read_from_a_tuned_state_and_continued(rwkv7):
    processor, state, store = tiny_processor(rwkv7), random_state(rwkv7), StateStore()
    inputs = inputs_of(processor, user("What is it?", "red"))
    tuned = logits_of(rwkv7, inputs, initial_state=state)
    rwkv7.read(processor, [user(None, "red")], state_store=store)  # from zeros
    for _ in range(2):
        kept = rwkv7.read(processor, [user(None, "red")], state_store=store, initial_state=state)
        found = logits_of(rwkv7, inputs, past_key_values=kept)
        torch.testing.assert_close(found, tuned, rtol=0, atol=1e-3)
    assert store.hits == 1


def test_scores_and_pipelines_begin_with_it(rwkv7):
    processor, state = tiny_processor(rwkv7), random_state(rwkv7)
    inputs, answers = inputs_of(processor, user("What is it?", "red")), ["yes", "a dot"]
    ask = pipeline("image-text-to-text", model=rwkv7, processor=processor)
    chat, options = [user("What is it?", "red")], dict(return_full_text=False, generate_kwargs=GREEDY)
    plain = rwkv7.score(inputs, answers, tokenizer=processor).log_probs
    kept = rwkv7.read(processor, [user(None, "red")], initial_state=state)
    continued = rwkv7.score(inputs, answers, tokenizer=processor, past_key_values=kept).log_probs
    (told,) = ask(chat, **{**options, "generate_kwargs": {**GREEDY, "initial_state": state}})
    TunedState.attach(rwkv7, state)
    attached = rwkv7.score(inputs, answers, tokenizer=processor).log_probs
    torch.testing.assert_close(attached, continued, rtol=0, atol=1e-3)
    assert not torch.allclose(attached, plain, atol=1e-2)
    (begun,) = ask(chat, **options)
    assert begun["generated_text"] == told["generated_text"]


def test_scores_begin_with_an_initial_state(rwkv7):
    """One for all rows or one for each, with a store, and where gradients flow to the pixels."""
    processor, store = tiny_processor(rwkv7), StateStore()
    states, answers = [random_state(rwkv7, 1), None, random_state(rwkv7, 2)], ["yes", "a dot", "a line"]
    chats = [[user(text, "red")] for text in ("What is it?", "Is it a dot, or a line?", "What?")]

    def score(inputs, initial_state, **options):
        scores = rwkv7.score(inputs, answers, tokenizer=processor, initial_state=initial_state, **options)
        return scores.log_probs

    alone = []
    for chat, state in zip(chats, states):
        inputs = inputs_of(processor, *chat)
        kept = rwkv7.read(processor, [user(None, "red")], initial_state=state)
        alone.append(rwkv7.score(inputs, answers, tokenizer=processor, past_key_values=kept).log_probs)
        for _ in range(2):  # the second time from the store
            found = score(inputs, state, state_store=store)
            torch.testing.assert_close(found, alone[-1], rtol=0, atol=1e-3)
    assert store.hits >= 3
    for side in ("left", "right"):
        inputs = batch_of(processor, chats, side)
        torch.testing.assert_close(score(inputs, states), torch.cat(alone), rtol=0, atol=1e-3)
    own = score(inputs_of(processor, *chats[0]), states[0])
    torch.testing.assert_close(score(inputs, states[0])[:1], own, rtol=0, atol=1e-3)
    assert not torch.allclose(score(inputs, states[0])[1:], torch.cat(alone)[1:], atol=1e-2)
    pixels = inputs["pixel_values"].requires_grad_()
    with_gradient = score({**inputs, "pixel_values": pixels}, states)
    torch.testing.assert_close(with_gradient.detach(), torch.cat(alone), rtol=0, atol=1e-3)
    with_gradient.sum().backward()
    assert all(of_row.abs().max() > 0 for of_row in pixels.grad)


def test_a_kept_state_says_how_it_began(rwkv7, tmp_path):
    processor, state = tiny_processor(rwkv7), random_state(rwkv7)
    chat = [user(None, "red")]
    tuned, plain = (rwkv7.read(processor, chat, initial_state=begun) for begun in (state, None))
    assert (tuned.beginnings, plain.beginnings) == ([state.identity], [None])
    stack = type(tuned).stack([plain, tuned, plain])
    for kept, beginnings in (
        (tuned, [state.identity]),
        (stack, [None, state.identity, None]),
        (stack[0], [None]),
        (stack[1], [state.identity]),
    ):
        kept.save(tmp_path / "kept")
        assert type(kept).load(tmp_path / "kept", rwkv7, processor).beginnings == beginnings
    TunedState.attach(rwkv7, state)
    assert rwkv7.read(processor, chat).beginnings == [state.identity]


def test_a_saved_state_is_the_same_and_small(rwkv7, tmp_path):
    state = random_state(rwkv7, layers=[0])
    state.save_pretrained(tmp_path)
    loaded = TunedState.from_pretrained(tmp_path, rwkv7)
    assert loaded.identity == state.identity
    inputs = inputs_of(tiny_processor(rwkv7), user("What?", "red"))
    assert torch.equal(
        logits_of(rwkv7, inputs, initial_state=loaded), logits_of(rwkv7, inputs, initial_state=state)
    )
    cache = loaded.to_cache(rwkv7, 3)
    assert cache.batch_size == 3 and cache.get_seq_length() == 0


def test_a_state_is_pushed_and_pulled(rwkv7, tmp_path):
    random_state(rwkv7).save_pretrained(tmp_path / "state")
    with Hub({"hf_ann": "ann"}) as hub, client_process(hub.url, tmp_path / "cache") as client:
        before, after = client(push_and_pull_state, str(tmp_path / "state"), "ann/dutch", "hf_ann")
        refusal = client(refusal_of_state, "ann/nothing")
    assert before == after
    pushed = hub.repos["ann/dutch"]
    assert set(pushed.files()) - {".gitattributes"} == {"tuned_state.safetensors"} and pushed.private
    assert "ann/nothing" in refusal


def test_a_folder_is_named_without_its_path(rwkv7, tmp_path):
    state = TunedState.of(rwkv7)
    state.base_model = str(tmp_path)
    state.save_pretrained(tmp_path / "state")
    assert TunedState.from_pretrained(tmp_path / "state").base_model == tmp_path.name


def test_the_trainer_learns_saves_and_resumes_a_state(rwkv7, tmp_path):
    data = load_conversations(write_data(tmp_path, [TEXT_SAMPLE] * 4))  # short: a random model forgets
    collator = VisualRWKVDataCollator(tiny_processor(rwkv7))
    before = {name: weight.clone() for name, weight in rwkv7.named_parameters()}

    def train(model, steps, **options):
        arguments = VisualRWKVTrainingArguments(
            str(tmp_path / "out"),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=4,
            learning_rate=20.0,
            learning_rate_final=20.0,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
        )
        trainer = VisualRWKVTrainer(model, arguments, train_dataset=data, data_collator=collator)
        trainer.train(**options)
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    state = TunedState.attach(rwkv7)
    losses = train(rwkv7, 4)
    assert losses[-1] < losses[0] - 0.1
    after = {name: weight for name, weight in rwkv7.named_parameters() if ".tuned_state." not in name}
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    checkpoint = tmp_path / "out" / "checkpoint-4"
    assert (checkpoint / "tuned_state.safetensors").exists() and not list(checkpoint.glob("model*"))
    assert TunedState.from_pretrained(checkpoint).identity == state.identity

    again = tiny_model(**MODELS["rwkv7"])
    resumed = TunedState.attach(again)
    assert train(again, 6, resume_from_checkpoint=True)[:4] == losses
    assert resumed.identity != state.identity
    train(rwkv7, 6, resume_from_checkpoint=str(checkpoint))
    torch.testing.assert_close(resumed.state_dict(), state.state_dict())


# --- refusals -----------------------------------------------------------------------------------------


def test_states_that_do_not_fit_are_refused(rwkv7, tmp_path):
    state = random_state(rwkv7)
    state.save_pretrained(tmp_path)
    other = tiny_model(**MODELS["rwkv7"])
    other.lm_head.weight.data += 1
    inputs = inputs_of(tiny_processor(rwkv7), user("What?", "red"))
    for attempt in (
        lambda: other.generate(**inputs, **GREEDY, initial_state=state),
        lambda: TunedState.from_pretrained(tmp_path, other),
        lambda: TunedState.attach(other, state),
        lambda: other.score(inputs, [[1]], initial_state=state),
    ):
        with pytest.raises(ValueError, match="The tuned state is for another model: weights"):
            attempt()
    with pytest.raises(ValueError, match="rwkv_version 7 there, 6 here"):
        TunedState.from_pretrained(tmp_path, tiny_model(version=6))
    with pytest.raises(ValueError, match="has 2 states, the inputs are of 1 samples"):
        rwkv7.generate(**inputs, **GREEDY, initial_state=[state, None])
    with pytest.raises(ValueError, match="has 2 states, the inputs are of 1 samples"):
        rwkv7.score(inputs, [[1]], initial_state=[state, None])
    kept = rwkv7.read(tiny_processor(rwkv7), [user(None, "red")])
    with pytest.raises(ValueError, match="without past_key_values"):
        rwkv7.generate(**inputs, **GREEDY, initial_state=state, past_key_values=kept)
    with pytest.raises(ValueError, match="without past_key_values"):
        rwkv7.score(inputs, [[1]], initial_state=state, past_key_values=kept)
    pixels = {**inputs, "pixel_values": inputs["pixel_values"].clone().requires_grad_()}
    rwkv7.model.language_model.gradient_checkpointing = True
    with pytest.raises(ValueError, match="initial_state and gradient checkpointing exclude each other"):
        rwkv7.train().score(pixels, [[1]], initial_state=state)
    rwkv7.eval().model.language_model.gradient_checkpointing = False
    with pytest.raises(ValueError, match="no option with which a prompt is read at once"):
        rwkv7.generate(**inputs, **GREEDY, initial_state=state, use_cache=False)
    with pytest.raises(ValueError, match="layers must be some of 0 to 1"):
        TunedState.of(rwkv7, layers=[2])
    TunedState.attach(rwkv7)
    with pytest.raises(ValueError, match="has a tuned state already"):
        TunedState.attach(rwkv7)


def test_damaged_files_are_refused(rwkv7, tmp_path):
    path = tmp_path / "tuned_state.safetensors"
    random_state(rwkv7).save_pretrained(tmp_path)
    data = path.read_bytes()
    tensors = {
        name: tensor.clone() for name, tensor in load_file(path).items()
    }  # not mapped: the file is cut below
    about = {
        "format": "visualrwkv_hf.tuned_state",
        "about": json.dumps({"base_model": "", "fingerprint": {}}),
    }
    for write in (
        lambda: path.write_bytes(data[: len(data) // 2]),
        lambda: path.write_bytes(b""),
        lambda: save_file(tensors, path),
        lambda: save_file(tensors, path, about),
        lambda: path.write_bytes(data.replace(b"layers.0.wkv", b"layers.9.wkv")),
        lambda: path.write_bytes(data.replace(b"layers.0.wkv", b"layers.0.wkx")),
        lambda: path.write_bytes(data[:-4] + b"\x00\x00\xc0\x7f"),
    ):
        write()
        with pytest.raises(ValueError, match="is not a tuned state"):
            TunedState.from_pretrained(tmp_path)
