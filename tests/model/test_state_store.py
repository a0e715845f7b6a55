"""StateStore: a prompt that begins like an earlier one reads only what is new."""

import copy
import dataclasses
import pickle
import threading

import pytest
import torch
from chats import (
    GREEDY,
    MODELS,
    assistant,
    batch_of,
    counted_tokens,
    inputs_of,
    user,
)
from patience import PATIENCE
from tiny import awake, text_config
from tiny_training import tiny_model, tiny_processor
from torch import nn
from transformers import StoppingCriteria, StoppingCriteriaList

from visualrwkv_hf import KeptState, StateStore, VisualRWKVCache, VisualRWKVForCausalLM
from visualrwkv_hf.prompt_identity import PromptIdentity, picture_number, refuse_other_beginning


def test_a_generation_config_can_ask_for_a_store(tmp_path):
    """For programs that load a model and know nothing of stores, such as `transformers serve`."""
    model = tiny_model(**MODELS["rwkv7"])
    processor = tiny_processor(model)
    assert model.state_store is None
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"max_states": 3}')
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.generation_config.max_states == loaded.state_store.max_states == 3
    inputs = inputs_of(processor, *CHAT, user("Where?"))
    with counted_tokens(loaded) as first:
        answer = loaded.generate(**inputs, **GREEDY)
    with counted_tokens(loaded) as again:
        assert torch.equal(loaded.generate(**inputs, **GREEDY), answer)
    assert loaded.state_store.hits == 1 and sum(again) < sum(first)
    assert torch.equal(model.generate(**inputs, **GREEDY, state_store=StateStore()), answer)
    loaded.state_store = None  # as the server's `--max-states 0`
    assert loaded.state_store is None


CHAT = [user("What is it?", "red"), assistant("A dot.")]


@pytest.fixture(scope="module", params=MODELS)
def bare(request):
    model = tiny_model(**MODELS[request.param])
    return model, tiny_processor(model)


@pytest.fixture
def model(bare):
    bare[0].state_store = StateStore()
    yield bare[0]
    bare[0].state_store = None


@pytest.fixture
def processor(bare):
    return bare[1]


def without_store(model, **inputs) -> torch.Tensor:
    store, model.state_store = model.state_store, None
    try:
        return model.generate(**inputs)
    finally:
        model.state_store = store


def state_of(*ids: int) -> KeptState:
    """Return a state of two layers, one head of 16, that says that it has read these."""
    layer = {"token_shift0": torch.zeros(1, 16), "token_shift1": torch.zeros(1, 16)}
    return KeptState(
        [layer | {"wkv": torch.zeros(1, 1, 16, 16)} for _ in range(2)], [PromptIdentity(torch.tensor(ids))]
    )


# --- the store ----------------------------------------------------------------------------------------


def test_the_longest_beginning_is_found():
    store = StateStore()
    for ids in ((1,), (1, 2, 3), (1, 2, 4), (1, 2, 3, 4, 5)):
        store.add(state_of(*ids))

    def found(*ids: int) -> list[int] | None:
        state = store.find(torch.tensor(ids))
        return None if state is None else state.read_ids[0].tolist()

    assert found(1, 2, 3, 4) == [1, 2, 3]
    assert found(1, 2, 3, 4, 5) == [1, 2, 3, 4, 5]
    assert found(1, 2) == [1]
    assert found(2, 2) is None
    assert (store.hits, store.misses) == (3, 1)


def test_what_was_used_longest_ago_goes_first():
    store = StateStore(max_states=2)
    store.add(state_of(1))
    store.add(state_of(2))
    assert store.find(torch.tensor([1, 9])) is not None
    store.add(state_of(3))
    assert store.find(torch.tensor([2])) is None
    assert store.find(torch.tensor([1])) is not None and len(store) == 2
    store.clear()
    assert not len(store) and store.nbytes == 0


def test_bytes_are_limited():
    size = state_of(1).nbytes
    store = StateStore(max_bytes=2 * size)
    for number in range(5):
        store.add(state_of(number))
    assert len(store) == 2 and store.nbytes == 2 * size
    small = StateStore(max_bytes=size - 1)
    small.add(state_of(1))
    assert not len(small)


def test_pictures_are_compared_by_their_full_hashes():
    """Two pictures whose hashes begin with the same 63 bits have one number among the ids, and are two."""
    hashes = [bytes(range(8)) + bytes([last]) * 24 for last in (1, 2)]
    number = picture_number(hashes[0])
    assert number == picture_number(hashes[1]) < 0
    one, other = (PromptIdentity(torch.tensor([5, number, number, 6, 7]), (3,), (each,)) for each in hashes)
    store = StateStore()
    store.add(dataclasses.replace(state_of(1), prompts=[one.beginning(4)]))
    assert store.find(one) is not None and store.find(other) is None
    with pytest.raises(ValueError, match="picture 1 is another one"):
        refuse_other_beginning(one.beginning(4), other)
    refuse_other_beginning(one.beginning(4), one)


def test_states_that_nobody_could_find_are_refused():
    with pytest.raises(ValueError, match="of one sample that knows what it has read"):
        StateStore().add(VisualRWKVCache(text_config(7)))
    with pytest.raises(ValueError, match="max_states must be at least 1, got 0"):
        StateStore(max_states=0)


def test_a_copied_model_has_an_empty_store_of_its_own(model, processor):
    model.generate(**inputs_of(processor, user("What?")), **GREEDY)
    for other in (copy.deepcopy(model).state_store, pickle.loads(pickle.dumps(model.state_store))):
        assert len(model.state_store) and not len(other) and other.max_states == 16


def test_threads_share_a_store():
    store = StateStore(max_states=4)
    errors: list[BaseException] = []

    def work(start: int) -> None:
        try:
            for number in range(300):
                store.add(state_of(start, number % 7))
                found = store.find(torch.tensor([start, number % 7, 1]))
                assert found is None or found.read_ids[0][0] == start
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=[start]) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    assert not errors and len(store) <= 4


def test_a_scope_finds_only_its_own_states():
    """Nobody learns from a store whether somebody else has sent the same before."""
    store = StateStore(max_states=3)
    one, other = store.scoped("one"), store.scoped("other")
    one.add(state_of(1, 2))
    read = torch.tensor([1, 2, 3])
    assert other.find(read) is None and store.find(read) is None
    assert store.scoped("one").find(read) is not None
    other.add(state_of(1, 2))
    other.clear()
    assert other.find(read) is None and one.find(read) is not None
    assert (store.hits, store.misses, len(store)) == (2, 3, 1)
    for number in range(3):
        other.add(state_of(number))
    assert len(store) == 3 and one.find(read) is None, "the scopes share one limit"
    store.clear()
    assert not len(one)
    with pytest.raises(ValueError, match="needs a name that is not empty"):
        store.scoped("")


def test_a_scope_is_cleared_with_all_its_parts():
    """No name that a client chooses leads to another's part, nor to that of a model or a beginning."""
    store, read, models = StateStore(), torch.tensor([1, 2, 3]), [nn.Identity(), nn.Identity()]
    client, others = store.scoped("client"), [store.scoped("other"), store.scoped("client 1")]
    assert client.of_model(models[0]).scope == client.scope
    parts = [client, client.of_model(models[1]), client.scoped("1")]
    parts += [part.of_beginning("1") for part in parts]
    for part in (*parts, *others):
        assert part.find(read) is None
        part.add(state_of(1, 2))
    client.clear()
    assert not any(part.find(read) for part in parts)
    assert len(store) == 2 and all(part.find(read) for part in others)


# --- generate() over a store --------------------------------------------------------------------------


def test_a_follow_up_reads_only_its_own_words(model, processor):
    """The whole chat is sent again; what is read is the answer that was rendered anew, and the new question."""
    inputs = inputs_of(processor, CHAT[0])
    output = model.generate(**inputs, **GREEDY)
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    follow_up = inputs_of(processor, CHAT[0], assistant(answer or "-"), user("Is it big?"))
    with counted_tokens(model) as tokens:
        actual = model.generate(**follow_up, **GREEDY)
    new = follow_up["input_ids"].shape[1] - inputs["input_ids"].shape[1]
    assert sum(tokens) <= new + GREEDY["max_new_tokens"] - 1
    assert model.state_store.hits == 1
    assert actual.tolist() == without_store(model, **follow_up, **GREEDY).tolist()


def test_an_answer_that_is_rendered_as_it_was_generated_is_not_read_again(model, processor):
    """As models that were trained on text answer: here the ids themselves are sent back."""
    inputs = inputs_of(processor, CHAT[0])
    answered = model.generate(**inputs, **GREEDY)
    ids = torch.cat(
        [answered, processor.tokenizer("\n\nUser: Is it big?", return_tensors="pt")["input_ids"]], 1
    )
    follow_up = {"input_ids": ids, "pixel_values": inputs["pixel_values"]}
    with counted_tokens(model) as tokens:
        actual = model.generate(**follow_up, **GREEDY)
    # the last token of an answer is chosen but not read
    assert sum(tokens) == ids.shape[1] - answered.shape[1] + 1 + actual.shape[1] - ids.shape[1] - 1
    assert actual.tolist() == without_store(model, **follow_up, **GREEDY).tolist()


def test_another_question_about_the_same_picture(model, processor):
    """The state behind the picture is left too, where the picture stands first."""
    first = dict(image_position="first")
    model.generate(**inputs_of(processor, user("What is it?", "red"), **first), **GREEDY)
    inputs = inputs_of(processor, user("Is it big?", "red"), **first)
    with counted_tokens(model) as tokens:
        actual = model.generate(**inputs, **GREEDY)
    assert max(tokens) < 40 and model.state_store.hits == 1
    assert actual.tolist() == without_store(model, **inputs, **GREEDY).tolist()
    other = inputs_of(processor, user("Is it big?", "blue"), **first)
    assert model.generate(**other, **GREEDY).tolist() == without_store(model, **other, **GREEDY).tolist()


def test_a_picture_that_was_read_is_not_encoded_again(model, processor):
    model.read(processor, CHAT)
    encoded: list[int] = []
    handle = model.model.vision_tower.register_forward_pre_hook(
        lambda module, args: encoded.append(len(args[0]))
    )
    try:
        model.generate(**inputs_of(processor, *CHAT, user("And?")), **GREEDY)
        model.generate(**inputs_of(processor, *CHAT, user("And this?", "blue")), **GREEDY)
    finally:
        handle.remove()
    assert encoded == [1], "the new one"


def test_reading_is_found_and_finds(model, processor):
    model.read(processor, CHAT)
    with counted_tokens(model) as tokens:
        state = model.read(processor, CHAT)
        assert not tokens
        model.read(processor, [*CHAT, user("Is it big?")])
    assert 0 < sum(tokens) < 40
    assert state.fingerprint is not None


def test_a_loaded_state_can_be_put_in(model, processor, tmp_path):
    model.read(processor, CHAT).save(tmp_path / "state")
    model.state_store.clear()
    model.state_store.add(KeptState.load(tmp_path / "state", model, processor))
    inputs = inputs_of(processor, *CHAT, user("Is it big?"))
    with counted_tokens(model) as tokens:
        actual = model.generate(**inputs, **GREEDY)
    assert max(tokens) < 40
    assert actual.tolist() == without_store(model, **inputs, **GREEDY).tolist()


class StopAfter(StoppingCriteria):
    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("words", [1, 3])
def test_a_cancelled_answer_leaves_what_was_read(model, processor, words):
    inputs = inputs_of(processor, CHAT[0])
    length = inputs["input_ids"].shape[1] + words
    stop = StoppingCriteriaList([StopAfter(length)])
    stopped = model.generate(**inputs, **GREEDY, stopping_criteria=stop)
    assert stopped.shape[1] == length
    goes_on = {"input_ids": stopped, "pixel_values": inputs["pixel_values"]}
    with counted_tokens(model) as tokens:
        actual = model.generate(**goes_on, **GREEDY)
    assert tokens[0] == 1
    assert actual.tolist() == without_store(model, **goes_on, **GREEDY).tolist()


class Breaks:
    """A streamer whose reader has gone away."""

    def __init__(self):
        self.put_calls = 0

    def put(self, value):
        self.put_calls += 1
        if self.put_calls == 4:
            raise ConnectionError("gone")

    def end(self):
        pass


def test_an_answer_that_broke_off_leaves_a_right_store(model, processor):
    inputs = inputs_of(processor, CHAT[0])
    with pytest.raises(ConnectionError):
        model.generate(**inputs, **GREEDY, streamer=Breaks())
    expected = without_store(model, **inputs, **GREEDY)
    for _ in range(2):
        assert model.generate(**inputs, **GREEDY).tolist() == expected.tolist()


def test_pads_are_no_part_of_a_prompt(model, processor):
    """On any side: a padded prompt finds what the bare one left, and the other way round."""
    inputs = inputs_of(processor, CHAT[0])
    expected = without_store(model, **inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    padded = {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (5, 0)),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (5, 0)),
        "pixel_values": inputs["pixel_values"],
    }
    for each in (padded, inputs, padded):
        actual = model.generate(**each, **GREEDY)[:, each["input_ids"].shape[1] :]
        assert actual.tolist() == expected.tolist()
    assert model.state_store.hits == 2


@pytest.mark.parametrize("pads", [1, 2])
def test_pads_before_a_text_alone_are_no_part_of_it_either(pads, model, processor):
    """One pad is as long as the answer's last token, which the model has not read."""
    chat = [user("Hello.")]
    inputs = inputs_of(processor, *chat)
    padded = {
        name: torch.nn.functional.pad(inputs[name], (pads, 0)) for name in ("input_ids", "attention_mask")
    }
    output = model.generate(**padded, **GREEDY)[0, padded["input_ids"].shape[1] :]
    longer = torch.cat([inputs["input_ids"][0], output, torch.tensor([72, 73, 74])])[None]
    actual = model.generate(longer, **GREEDY)
    assert model.state_store.hits == 1
    assert actual.tolist() == without_store(model, input_ids=longer, **GREEDY).tolist()


def test_models_that_share_a_store_keep_their_states_apart():
    store, models = StateStore(), [tiny_model(7), tiny_model(7)]
    models[1].lm_head.weight.data.neg_()
    models[1].model.language_model.layers[0].ffn.value.weight.data.neg_()
    inputs = inputs_of(tiny_processor(models[0]), CHAT[0])
    expected = [model.generate(**inputs, **GREEDY).tolist() for model in models]
    for _ in range(2):
        assert [
            model.generate(**inputs, **GREEDY, state_store=store).tolist() for model in models
        ] == expected
    assert store.hits == 2


def test_prompts_that_are_lengthened_are_right(model, bare):
    """Their first tokens depend on their length, so that longer chats begin otherwise."""
    processor = tiny_processor(model)
    processor.pad_prompt_to_multiple_of = 16
    for chat in (CHAT[:1], [*CHAT, user("Is it big?")], [*CHAT, user("Is it very big?")]):
        inputs = inputs_of(processor, *chat)
        actual = model.generate(**inputs, **GREEDY)
        assert actual.tolist() == without_store(model, **inputs, **GREEDY).tolist()


def test_the_originals_training_text_is_right(model, processor):
    """With sandwich_history a later question changes the beginning: nothing is found, nothing is wrong."""
    variables = dict(image_position="middle", sandwich_history=True)
    for chat in (CHAT[:1], [*CHAT, user("Is it big?")]):
        inputs = inputs_of(processor, *chat, **variables)
        actual = model.generate(**inputs, **GREEDY)
        assert actual.tolist() == without_store(model, **inputs, **GREEDY).tolist()
    assert model.state_store.hits == 0


@pytest.mark.parametrize(
    "options",
    [
        dict(num_beams=2),
        dict(do_sample=True, num_return_sequences=2),
        dict(prompt_lookup_num_tokens=2),
        dict(cache_implementation="static"),
        dict(prefill_chunk_size=64),
        dict(use_cache=False),
        dict(return_dict_in_generate=True, output_hidden_states=True),
    ],
    ids=lambda options: "-".join(options),
)
def test_other_ways_of_decoding_are_right(model, processor, options):
    """They may start from the store or not, and leave nothing wrong in it."""
    options = {**GREEDY, **options}
    model.generate(**inputs_of(processor, CHAT[0]), **GREEDY)
    inputs = inputs_of(processor, *CHAT, user("Is it big?"))
    torch.manual_seed(0)
    actual = model.generate(**inputs, **options)
    torch.manual_seed(0)
    expected = without_store(model, **inputs, **options)
    actual, expected = (getattr(output, "sequences", output).tolist() for output in (actual, expected))
    assert actual == expected
    again = model.generate(**inputs, **GREEDY)
    assert again.tolist() == without_store(model, **inputs, **GREEDY).tolist()


def test_clients_of_a_server_do_not_share_what_they_sent(model, processor):
    """`generate(state_store=...)` uses that store for this call in the place of the model's."""
    inputs, store = inputs_of(processor, CHAT[0]), model.state_store
    read: dict[str, int] = {}
    for client in ("one", "other", "one"):
        with counted_tokens(model) as tokens:
            model.generate(**inputs, **GREEDY, state_store=store.scoped(client))
        read[client] = max(tokens)
    assert read["one"] < read["other"]
    before = store.misses
    model.generate(**inputs, **GREEDY)
    assert store.misses == before + 1, "the model's own scope is another one"
    before = store.hits
    model.read(processor, CHAT[:1], state_store=store.scoped("one"))
    assert store.hits == before + 1, "`read` takes a store likewise"


def test_a_batch_does_without(model, processor):
    chats = [[user("What?", "red")], [user("What is that there?", "blue")]]
    inputs = batch_of(processor, chats)
    model.generate(**inputs, **GREEDY)
    assert not len(model.state_store)


def test_a_cache_that_is_given_is_used_as_it_is(model, processor):
    inputs = inputs_of(processor, CHAT[0])
    model.generate(**inputs, **GREEDY)
    cache = VisualRWKVCache(model.config)
    with counted_tokens(model) as tokens:
        model.generate(**inputs, **GREEDY, past_key_values=cache)
    assert sum(tokens) == cache.get_seq_length() and model.state_store.hits == 0


def test_a_returned_cache_goes_on_as_without_a_store(model, processor):
    """It is plain: what it has read is not looked at again."""
    inputs = inputs_of(processor, CHAT[0])
    for _ in range(2):  # the second time it comes from the store
        first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        longer = torch.cat([first.sequences, torch.tensor([[70, 71]])], 1)
        actual = model.generate(longer, **GREEDY, past_key_values=first.past_key_values)
        expected = without_store(model, input_ids=longer, pixel_values=inputs["pixel_values"], **GREEDY)
        assert actual.tolist() == expected.tolist()


def test_a_text_model_has_a_store_too():
    model = awake(VisualRWKVForCausalLM(text_config(7)))
    ids = torch.randint(1, 260, (1, 20), generator=torch.Generator().manual_seed(1))
    options = dict(GREEDY, eos_token_id=None)
    expected = model.generate(ids, **options)
    model.state_store = StateStore()
    first = model.generate(ids[:, :12], **options)
    assert model.generate(ids, **options).tolist() == expected.tolist()
    assert model.state_store.hits == 1 and first.shape[1] == 18
