"""A state as a thing one can hold: read once, asked as often as wanted, copied, batched, moved, saved."""

import copy
import dataclasses
import pickle

import pytest
import torch
from chats import GREEDY, MODELS, TOWERS, assistant, batch_of, counted_tokens, inputs_of, picture, user
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_training import tiny_model, tiny_processor

from visualrwkv_hf import KeptState, StateStore, VisualRWKVCache, VisualRWKVProcessor
from visualrwkv_hf.image_processing_visualrwkv import image_processor_for
from visualrwkv_hf.prompt_identity import piece_ends
from visualrwkv_hf.state_file import model_fingerprint

LOGITS = dict(**GREEDY, output_logits=True, return_dict_in_generate=True)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return tiny_model(**MODELS[request.param])


@pytest.fixture(scope="module")
def processor(model):
    return tiny_processor(model)


def same_to_the_bit(one, other) -> bool:
    return torch.equal(one.sequences, other.sequences) and all(map(torch.equal, one.logits, other.logits))


def tensors_of(state: KeptState) -> list[torch.Tensor]:
    return [tensor.clone() for layer in state.layers for tensor in layer.values()]


# --- a question after a state is the question in one prompt -------------------------------------------

CHATS = {
    "stored picture": ([user(None, "red")], [user("What is it?", "red")], {"image_position": "first"}),
    "two pictures": (
        [user(None, "red", "blue")],
        [user("Which?", "red", "blue")],
        {"image_position": "first"},
    ),
    "picture in its own turn": (
        [user(None, "red")],
        [user(None, "red"), user("What is it?")],
        {"image_position": "first"},
    ),
    "follow-up": (
        [user("What is it?", "red"), assistant("A dot.")],
        [user("What is it?", "red"), assistant("A dot."), user("Is it big?")],
        {},
    ),
    "new picture in a follow-up": (
        [user("What is it?", "red"), assistant("A dot.")],
        [user("What is it?", "red"), assistant("A dot."), user("And this?", "blue")],
        {},
    ),
    "longer than a piece": (
        [user("Words, words. " * 150, "red"), assistant("A dot. " * 150)],
        [user("Words, words. " * 150, "red"), assistant("A dot. " * 150), user("Bye.")],
        {},
    ),
    "text alone": ([user("Hello."), assistant("Hi!")], [user("Hello."), assistant("Hi!"), user("Bye.")], {}),
}


@pytest.mark.parametrize("chat", CHATS)
def test_a_question_after_a_saved_state_is_the_question_in_one_prompt(model, processor, chat, tmp_path):
    """To the bit: one prompt is read in pieces that end where a state may end, so that both do the same arithmetic."""
    read, whole, template_variables = CHATS[chat]
    state = model.read(processor, read, **template_variables)
    state.save(tmp_path / "state.safetensors")
    loaded = KeptState.load(tmp_path / "state.safetensors", model=model, processor=processor)
    inputs = inputs_of(processor, *whole, **template_variables)
    expected = model.generate(**inputs, **LOGITS)
    for kept in (state, loaded):
        with counted_tokens(model) as tokens:
            assert same_to_the_bit(model.generate(**inputs, **LOGITS, past_key_values=kept), expected)
        assert max(tokens) <= inputs["input_ids"].shape[1] - state.get_seq_length() < 60


@pytest.mark.parametrize("tower", TOWERS)
def test_towers_whose_pictures_are_of_several_views_or_encoders(tower):
    model = tiny_model(**{"vocab_size": 1024, **TOWERS[tower]})
    tiling = "closest" if tower == "tiles with tokens" else "none"
    processor = VisualRWKVProcessor.from_config(
        model.config, image_processor_for(model.config, tiling), tiny_processor(model).tokenizer
    )
    wide = {"type": "image", "image": picture("green", 180)}
    read = [{"role": "user", "content": [wide, {"type": "text", "text": "What?"}]}, assistant("A dot.")]
    whole = [*read, user("And these?", "red", "blue")]
    inputs = inputs_of(processor, *whole)
    state = model.read(processor, read)
    after_state = model.generate(**inputs, **LOGITS, past_key_values=state)
    assert same_to_the_bit(after_state, model.generate(**inputs, **LOGITS))
    other = inputs_of(processor, whole[0] | user("What?", "red"), *whole[1:])
    with pytest.raises(ValueError, match=r"token \d+ is|picture 1 is another one"):
        model.generate(**other, **GREEDY, past_key_values=state)


def test_long_texts_are_cut_at_multiples_but_never_inside_pictures():
    ids = torch.ones(40, dtype=torch.long)
    ids[6:22] = 9  # two pictures, one after the other
    assert piece_ends(ids, (), 9, longest=8) == [22, 24, 32]
    assert piece_ends(ids, (), 9, longest=6) == [6, 22, 24, 30, 36]
    assert piece_ends(ids, (), 9, longest=40) == [22]


def test_reading_in_pieces_is_reading_at_once(model, processor):
    """To rounding (float32, a few hundred terms): products with fewer rows are added up in another order."""
    inputs = inputs_of(processor, user("What is it?", "red"), assistant("A dot."), user("And?", "blue"))
    with torch.no_grad():
        expected = model(**inputs).logits[:, -1]
    actual = model.generate(**inputs, **LOGITS).logits[0]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_a_kept_state_stays_as_it_is(model, processor):
    state = model.read(processor, [user("What is it?", "red"), assistant("A dot.")])
    before = tensors_of(state)
    chat = [user("What is it?", "red"), assistant("A dot.")]
    answers = {
        question: model.generate(
            **inputs_of(processor, *chat, user(question)), **GREEDY, past_key_values=state
        )
        for question in ("Is it big?", "Why is that?")
    }
    again = model.generate(**inputs_of(processor, *chat, user("Is it big?")), **GREEDY, past_key_values=state)
    assert torch.equal(again, answers["Is it big?"])
    assert all(map(torch.equal, tensors_of(state), before))


@pytest.mark.parametrize(
    "options",
    [dict(num_beams=3), dict(num_beams=3, num_return_sequences=2), dict(prompt_lookup_num_tokens=3)],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("question", [user("Is it big?"), user("And these?", "blue", "green")])
def test_other_ways_of_decoding_start_from_a_state(model, processor, options, question):
    chat = [user("What is it?", "red"), assistant("A dot.")]
    inputs = inputs_of(processor, *chat, question)
    state = model.read(processor, chat)
    with counted_tokens(model) as tokens:
        actual = model.generate(**inputs, **GREEDY, **options, past_key_values=state)
    assert actual.tolist() == model.generate(**inputs, **GREEDY, **options).tolist()
    assert tokens[0] < inputs["input_ids"].shape[1] - state.get_seq_length() + 4


def test_samples_from_a_state(rwkv7, rwkv7_processor):
    inputs = inputs_of(rwkv7_processor, user("What is it?", "red"))
    state = rwkv7.read(rwkv7_processor, [user(None, "red")])
    torch.manual_seed(0)
    options = dict(max_new_tokens=6, do_sample=True, num_return_sequences=4, pad_token_id=0)
    output = rwkv7.generate(**inputs, **options, past_key_values=state)
    assert output.shape[0] == 4 and len({tuple(row) for row in output.tolist()}) > 1


# --- what read() leaves unread ------------------------------------------------------------------------


def test_a_picture_alone_is_read_to_its_end(rwkv7, rwkv7_processor):
    state = rwkv7.read(rwkv7_processor, [user(None, "red")])
    assert (state.read_ids[0] < 0).sum() == rwkv7.config.num_image_tokens
    assert state.read_ids[0][-1] < 0


def test_a_turn_is_read_to_its_end(model, processor):
    messages = [user("What is it?", "red"), assistant("A dot.")]
    rendered = inputs_of(processor, *messages)["input_ids"]
    assistant_prompt = processor.tokenizer("Assistant:")["input_ids"]
    state = model.read(processor, messages)
    assert state.get_seq_length() == rendered.shape[1] - len(assistant_prompt)


@pytest.mark.parametrize("template_variables", [{"image_position": "middle"}, {"image_position": "last"}])
def test_a_picture_that_its_question_will_precede_is_not_read(model, processor, template_variables):
    with pytest.raises(
        ValueError, match="image_position 'middle' and 'last' the question comes before its picture"
    ):
        model.read(processor, [user(None, "red")], **template_variables)


def test_the_originals_training_text_cannot_be_read(model, processor):
    """There later questions stand in front of the first picture."""
    with pytest.raises(ValueError, match="sandwich_history=True puts even later questions before"):
        model.read(processor, [user("What?", "red")], image_position="middle", sandwich_history=True)


def test_prompts_that_are_lengthened_cannot_be_read(rwkv7):
    processor = tiny_processor(rwkv7)
    processor.pad_prompt_to_multiple_of = 16
    with pytest.raises(ValueError, match=r"no state can continue it\. Set it to None"):
        rwkv7.read(processor, [user("What?", "red")])


def test_several_chats_are_not_read(rwkv7, rwkv7_processor):
    with pytest.raises(ValueError, match="takes one chat"):
        rwkv7.read(rwkv7_processor, [[user("a")], [user("b")]])


# --- refusals -----------------------------------------------------------------------------------------


def test_inputs_that_begin_otherwise_are_refused(model, processor):
    state = model.read(processor, [user("What is it?", "red"), assistant("A dot.")])
    ids = state.read_ids[0].tolist()

    def ask(*messages) -> None:
        model.generate(**inputs_of(processor, *messages), **GREEDY, past_key_values=state)

    with pytest.raises(ValueError, match="picture 1 is another one"):
        ask(user("What is it?", "blue"), assistant("A dot."), user("Is it big?"))
    answered = inputs_of(processor, user("What is it?", "red"), assistant("A hat."), user("Is it big?"))
    place = next(
        i for i, (was, now) in enumerate(zip(ids, answered["input_ids"][0].tolist())) if 0 <= was != now
    )
    now = int(answered["input_ids"][0, place])
    with pytest.raises(ValueError, match=f"token {place} is {now}, the state has read {ids[place]} there"):
        model.generate(**answered, **GREEDY, past_key_values=state)
    with pytest.raises(
        ValueError, match=r"has read \d+ tokens, the inputs have \d+ .*nothing is left to read"
    ):
        short = processor.apply_chat_template(
            [user("What is it?", "red"), assistant("A dot.")],
            tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        model.generate(**short, **GREEDY, past_key_values=state)


def test_a_text_whose_picture_is_not_given_is_refused(rwkv7, rwkv7_processor):
    state = rwkv7.read(rwkv7_processor, [user(None, "red")])
    inputs = inputs_of(rwkv7_processor, user("What?", "red"))
    with pytest.raises(ValueError, match="17 image placeholders, but no pixel_values were given"):
        rwkv7.generate(inputs["input_ids"], **GREEDY, past_key_values=state)


@pytest.mark.parametrize(
    "option",
    [
        dict(prefill_chunk_size=4),
        dict(use_cache=False),
        dict(cache_implementation="static"),
        dict(output_hidden_states=True, return_dict_in_generate=True),
        dict(token_healing=True),
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_that_need_the_whole_prompt_are_refused(rwkv7, rwkv7_processor, option):
    state = rwkv7.read(rwkv7_processor, [user("What?"), assistant("That.")])
    inputs = inputs_of(rwkv7_processor, user("What?"), assistant("That."), user("Why?"))
    with pytest.raises(ValueError, match=f"A kept state cannot go on with {next(iter(option))}"):
        rwkv7.generate(**inputs, **GREEDY, **option, past_key_values=state)


def test_inputs_of_a_whole_prompt_are_refused(rwkv7, rwkv7_processor):
    state = rwkv7.read(rwkv7_processor, [user("What?")])
    inputs = inputs_of(rwkv7_processor, user("What?"), assistant("That."))
    embeddings = rwkv7.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="A kept state cannot go on with inputs_embeds"):
        rwkv7.generate(**inputs, **GREEDY, inputs_embeds=embeddings, past_key_values=state)


def test_another_model_is_refused_in_memory(rwkv7, rwkv7_processor):
    state = rwkv7.read(rwkv7_processor, [user("What?")])
    other = tiny_model(**MODELS["rwkv5"])
    inputs = inputs_of(rwkv7_processor, user("What?"))
    with pytest.raises(ValueError, match="The state was read by another model: rwkv_version 7 there, 5 here"):
        other.generate(**inputs, **GREEDY, past_key_values=state)


# --- copies, batches, places --------------------------------------------------------------------------


def test_a_branch_does_not_disturb_its_stem(model, processor):
    state = model.read(processor, [user("What is it?", "red")])
    before = tensors_of(state)
    branch = state.to_cache()
    with torch.no_grad():
        expected = model(torch.tensor([[70, 71]]), past_key_values=branch).logits
        output = model(torch.tensor([[70, 71]]), past_key_values=state)  # forward also continues from a copy
    assert branch.get_seq_length() == output.past_key_values.get_seq_length() == state.get_seq_length() + 2
    assert torch.equal(output.logits, expected)
    assert all(map(torch.equal, tensors_of(state), before))
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.layers = branch.layers


def test_bytes_do_not_depend_on_length(rwkv7, rwkv7_processor):
    """Per layer two shifts of 32 values and two heads' 16 x 16 matrices, in float32."""
    short, long = (
        rwkv7.read(rwkv7_processor, messages)
        for messages in ([user("a")], [user("What? " * 30, "red", "blue")])
    )
    assert short.nbytes == long.nbytes == 2 * 4 * (2 * 32 + 2 * 16 * 16)


def test_states_of_different_lengths_make_a_batch(model, processor):
    """A row of the batch answers what it answers alone, and can be taken out of it."""
    chats = [
        [user("What is it?", "red"), assistant("A dot.")],
        [user("What are these two?", "blue", "green"), assistant("Dots and dots.")],
        [user("Hello."), assistant("Hi.")],
    ]
    states = [model.read(processor, chat) for chat in chats]
    batch = KeptState.stack(states)
    assert batch.batch_size == 3 and batch.nbytes == sum(state.nbytes for state in states)
    question = user("And how big is it?")
    whole = [[*chat, question] for chat in chats]
    inputs = batch_of(processor, whole)
    with counted_tokens(model) as tokens:
        together = model.generate(**inputs, **GREEDY, past_key_values=batch)[
            :, inputs["input_ids"].shape[1] :
        ]
    assert tokens[0] < 40, "only the question and the prompt for an answer"
    for row, (chat, state) in enumerate(zip(whole, states)):
        alone = inputs_of(processor, *chat)
        for kept in (state, batch[row]):
            output = model.generate(**alone, **GREEDY, past_key_values=kept)
            assert output[0, alone["input_ids"].shape[1] :].tolist() == together[row].tolist()
        assert batch[row].get_seq_length() == state.get_seq_length()
    with pytest.raises(IndexError, match="3 samples, asked for 3"):
        batch[3]
    assert all(map(torch.equal, tensors_of(batch[-1]), tensors_of(states[-1])))


def test_one_picture_many_questions_in_a_batch(rwkv7, rwkv7_processor):
    state = rwkv7.read(rwkv7_processor, [user(None, "red")])
    questions = ["What is it?", "How big is the thing in it?"]
    alone = []
    for question in questions:
        inputs = inputs_of(rwkv7_processor, user(question, "red"))
        alone.append(rwkv7.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :].tolist())
    inputs = batch_of(rwkv7_processor, [[user(question, "red")] for question in questions])
    together = rwkv7.generate(**inputs, **GREEDY, past_key_values=state)
    assert together[:, inputs["input_ids"].shape[1] :].tolist() == alone


def test_states_that_do_not_fit_are_not_stacked(rwkv7, rwkv7_processor):
    other = tiny_model(**{**MODELS["rwkv7"], "vocab_size": 1023})
    state = rwkv7.read(rwkv7_processor, [user("a")])
    others = other.read(tiny_processor(other), [user("a")])
    with pytest.raises(ValueError, match=r"another model: vocab_size 1023 there, 1024 here"):
        KeptState.stack([state, others])
    coarser = dataclasses.replace(state, pixel_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"of one dtype .* \['torch.bfloat16', 'torch.float32'\]"):
        KeptState.stack([state, coarser])
    with pytest.raises(ValueError, match="at least one"):
        KeptState.stack([])
    with pytest.raises(ValueError, match="The state is of 2 samples, the inputs are of 1"):
        rwkv7.generate(
            **inputs_of(rwkv7_processor, user("a")),
            **GREEDY,
            past_key_values=KeptState.stack([state, state]),
        )


def test_a_state_moves_between_dtypes():
    """It serves a model of bfloat16 that it was not read by; its recurrence stays in float32, its pixels are compared
    in the dtype that they were read in."""
    model = tiny_model(**MODELS["rwkv7"])
    processor = tiny_processor(model)
    state = model.read(processor, [user(None, "red")])
    halved = state.to(dtype=torch.bfloat16)
    layer = halved.layers[1]
    assert layer["wkv"].dtype == torch.float32 and layer["token_shift0"].dtype == torch.bfloat16
    assert state.layers[1]["token_shift0"].dtype == torch.float32
    half = tiny_model(**MODELS["rwkv7"]).to(torch.bfloat16)
    inputs = inputs_of(processor, user("What is it?", "red"))
    for kept in (state, halved):
        output = half.generate(**inputs, **LOGITS, past_key_values=kept)
        exact = model.generate(**inputs, **LOGITS)
        # bfloat16 has 8 bits; the layers add up their rounding
        assert (output.logits[0] - exact.logits[0]).norm() < 0.05 * exact.logits[0].norm()
    with pytest.raises(ValueError, match=r"torch.bfloat16, the state has read pixels of torch.float32"):
        half.generate(**inputs.to(dtype=torch.bfloat16), **GREEDY, past_key_values=state)


def test_a_state_read_in_bfloat16_takes_pixels_of_either_dtype():
    model = tiny_model(**MODELS["rwkv7"]).to(torch.bfloat16)
    processor = tiny_processor(model)
    state = model.read(processor, [user(None, "red")])
    inputs = inputs_of(processor, user("What is it?", "red"))
    cast = inputs_of(processor, user("What is it?", "red")).to(dtype=torch.bfloat16)
    outputs = [model.generate(**each, **GREEDY, past_key_values=state) for each in (inputs, cast)]
    assert outputs[0].tolist() == outputs[1].tolist() == model.generate(**cast, **GREEDY).tolist()


# --- files --------------------------------------------------------------------------------------------


@pytest.fixture
def saved(rwkv7, rwkv7_processor, tmp_path):
    path = tmp_path / "cat.safetensors"
    rwkv7.read(rwkv7_processor, [user(None, "red")]).save(path)
    return path


def test_a_file_is_plain_safetensors_and_loads_without_a_model(saved, rwkv7, rwkv7_processor):
    assert {"layers.0.wkv", "layers.1.token_shift1", "read_ids.0", "picture_hashes.0"} <= load_file(
        saved
    ).keys()
    state = KeptState.load(saved)
    inputs = inputs_of(rwkv7_processor, user("What?", "red"))
    expected = rwkv7.generate(**inputs, **GREEDY).tolist()
    assert rwkv7.generate(**inputs, **GREEDY, past_key_values=state).tolist() == expected


def test_a_batch_of_states_is_saved_and_loaded(rwkv7, rwkv7_processor, tmp_path):
    batch = KeptState.stack(
        [rwkv7.read(rwkv7_processor, [user(text, "red")]) for text in ("a", "much longer")] * 2
    )
    batch.save(tmp_path / "batch")
    loaded = KeptState.load(tmp_path / "batch", model=rwkv7)
    assert all(map(torch.equal, tensors_of(loaded), tensors_of(batch)))
    assert all(map(torch.equal, loaded.read_ids, batch.read_ids))


def test_a_state_for_another_model_is_refused_by_name(saved, rwkv7):
    wider = tiny_model(**{**MODELS["rwkv7"], "vocab_size": 1000})
    with pytest.raises(
        ValueError, match=r"cat.safetensors was read by another model: vocab_size 1024 there, 1000"
    ):
        KeptState.load(saved, model=wider)
    tuned = tiny_model(**MODELS["rwkv7"])
    tuned.model.multi_modal_projector.load_state_dict(
        {name: weight * 1.1 for name, weight in tuned.model.multi_modal_projector.state_dict().items()}
    )
    with pytest.raises(ValueError, match=r"another model: weights [0-9a-f]{16} there, [0-9a-f]{16} here"):
        KeptState.load(saved, model=tuned)
    with pytest.raises(ValueError, match="The state was read by another model: weights"):
        tuned.generate(torch.ones(1, 99, dtype=torch.long), past_key_values=KeptState.load(saved))


def test_a_state_for_another_processor_is_refused_by_name(saved, rwkv7):
    processor = tiny_processor(rwkv7)
    processor.chat_template = processor.chat_template.replace("User:", "Human:")
    with pytest.raises(ValueError, match=r"another processor: chat_template \w+ there, \w+ here"):
        KeptState.load(saved, processor=processor)
    processor = tiny_processor(rwkv7)
    processor.image_processor.image_mean = [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match=r"another processor: image_processor \w+ there, \w+ here"):
        KeptState.load(saved, processor=processor)


def test_a_model_and_a_processor_keep_their_fingerprints_in_a_folder(saved, rwkv7, rwkv7_processor, tmp_path):
    """In every dtype: bfloat16 is what the fingerprint rounds to."""
    rwkv7.save_pretrained(tmp_path / "model")
    rwkv7_processor.save_pretrained(tmp_path / "model")
    for dtype in (torch.float32, torch.bfloat16):
        again = type(rwkv7).from_pretrained(tmp_path / "model", dtype=dtype)
        assert model_fingerprint(again) == model_fingerprint(rwkv7)
        processor = VisualRWKVProcessor.from_pretrained(tmp_path / "model")
        state = KeptState.load(saved, again, processor)
        assert state.layers[0]["token_shift0"].dtype == dtype


def test_files_that_are_no_whole_state_are_refused(saved, tmp_path):
    whole = saved.read_bytes()
    for length in (0, 7, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut is not a whole state of VisualRWKV"):
            KeptState.load(tmp_path / "cut")
    save_file({"weight": torch.zeros(2)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="foreign is a safetensors file, but no state"):
        KeptState.load(tmp_path / "foreign")
    metadata = {"format": "visualrwkv_hf.state", "version": "9"}
    save_file({"weight": torch.zeros(2)}, tmp_path / "newer", metadata)
    with pytest.raises(ValueError, match="state of version 9, this package reads versions 1, 2"):
        KeptState.load(tmp_path / "newer")
    save_file({"weight": torch.zeros(2)}, tmp_path / "bare", metadata | {"version": "1"})
    with pytest.raises(ValueError, match="bare is not a whole state"):
        KeptState.load(tmp_path / "bare")
    with pytest.raises(FileNotFoundError):
        KeptState.load(tmp_path / "nothing")


def test_a_file_is_replaced_whole_or_not_at_all(saved, rwkv7, rwkv7_processor, monkeypatch):
    before = saved.read_bytes()
    state = rwkv7.read(rwkv7_processor, [user(None, "blue")])
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        state.save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_state_of_an_unknown_processor_is_not_saved(rwkv7, rwkv7_processor, tmp_path):
    state = rwkv7.read(rwkv7_processor, [user("a")])
    with pytest.raises(ValueError, match=r"Only a state that model\.read"):
        dataclasses.replace(state, fingerprint=None).save(tmp_path / "state")


def as_version_1(path) -> None:
    """Write a state file as the first version of the format did: other names, no full hashes."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() | {"version": "1"}
    tensors = {
        name.replace("read_ids", "contents"): tensor
        for name, tensor in load_file(path).items()
        if not name.startswith("picture_")
    }
    save_file(tensors, path, metadata)


def test_files_of_the_first_version_are_read(saved, rwkv7, rwkv7_processor, tmp_path):
    as_version_1(saved)
    assert "contents.0" in load_file(saved)
    state = KeptState.load(saved, rwkv7, rwkv7_processor)
    inputs = inputs_of(rwkv7_processor, user("What?", "red"))
    expected = rwkv7.generate(**inputs, **LOGITS)
    assert same_to_the_bit(rwkv7.generate(**inputs, **LOGITS, past_key_values=state), expected)
    with pytest.raises(ValueError, match="picture 1 is another one"):
        rwkv7.generate(**inputs_of(rwkv7_processor, user("What?", "blue")), **GREEDY, past_key_values=state)
    state.save(tmp_path / "again")
    again = KeptState.load(tmp_path / "again", rwkv7)
    assert all(map(torch.equal, tensors_of(again), tensors_of(state)))
    store = StateStore()
    store.add(again)
    full = rwkv7.read(rwkv7_processor, [user(None, "red")]).prompts[0]
    assert store.find(full) is None, "without full hashes it is not known to be of the same picture"


def test_the_names_of_the_last_release_still_work(saved, rwkv7):
    with pytest.warns(DeprecationWarning, match=r"use KeptState\.load"):
        state = VisualRWKVCache.load(saved, rwkv7)
    with pytest.warns(DeprecationWarning, match=r"use KeptState\.stack"):
        both = VisualRWKVCache.stack([state, state])
    assert both.batch_size == 2 and isinstance(both, KeptState)
    with pytest.warns(DeprecationWarning, match=r"use KeptState\.read_ids"):
        assert torch.equal(state.contents[0], state.read_ids[0])


def test_a_kept_state_can_be_pickled_and_copied(saved, rwkv7):
    state = KeptState.load(saved, rwkv7)
    for other in (pickle.loads(pickle.dumps(state)), copy.deepcopy(state), state.copy()):
        assert all(map(torch.equal, tensors_of(other), tensors_of(state)))
        other.refuse_other_model(rwkv7)
