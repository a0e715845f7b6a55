"""Several threads, one model: each gets what it would get alone, or is told why not."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread

import pytest
import torch
from patience import PATIENCE
from PIL import Image
from tiny_training import tiny_model, tiny_processor
from transformers import TextIteratorStreamer

from visualrwkv_hf import StateStore, VisualRWKVCache

COLOURS = ("teal", "red", "white", "navy")
GREEDY = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
WAIT = PATIENCE
"""Seconds after which a test that hangs fails."""


class Bench:
    def __init__(self, version: int):
        self.model = tiny_model(version=version)
        self.processor = tiny_processor(self.model)

    def inputs(self, *messages: dict):
        return self.processor.apply_chat_template(
            [*messages], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )

    def answer(self, *messages: dict, **options) -> list[int]:
        return self.model.generate(**self.inputs(*messages), **GREEDY, **options)[0].tolist()


def shown(colour: str) -> dict:
    picture, text = Image.new("RGB", (60, 50), colour), f"Is it {colour}?"
    return {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}


def said(text: str, role: str = "user") -> dict:
    return {"role": role, "content": text}


@pytest.fixture(params=[6, 7])
def bench(request) -> Bench:
    return Bench(request.param)


def at_once(function, *arguments) -> list:
    """`function` of each argument, all in threads of their own."""
    with ThreadPoolExecutor(len(arguments)) as pool:
        return [future.result(WAIT) for future in [pool.submit(function, x) for x in arguments]]


def test_threads_with_their_own_chats(bench):
    alone = [bench.answer(shown(colour)) for colour in COLOURS]
    assert at_once(lambda colour: bench.answer(shown(colour)), *COLOURS) == alone
    assert len({tuple(answer) for answer in alone}) > 1


def test_threads_with_one_kept_state(bench):
    history = [shown("teal"), said("It is teal.", "assistant")]
    state = bench.model.read(bench.processor, history)
    before = [tensor.clone() for layer in state.layers for tensor in layer.values()]
    questions = ["Why?", "Is it dark?", "Are you sure of that?"]

    def follow_up(text: str) -> list[int]:
        return bench.answer(*history, said(text), past_key_values=state)

    alone = [follow_up(text) for text in questions]
    assert at_once(follow_up, *questions, *questions) == alone * 2
    after = [tensor for layer in state.layers for tensor in layer.values()]
    assert all(map(torch.equal, before, after))


def test_threads_with_one_store(bench):
    chats = [[shown(colour), said("It is.", "assistant"), said("Why?")] for colour in COLOURS[:2]]
    alone = [bench.answer(*chat) for chat in chats]
    for max_states in (16, 2):  # two: they push one another's states out
        bench.model.state_store = StateStore(max_states=max_states)
        for _ in range(2):
            assert at_once(lambda chat: bench.answer(*chat), *chats, *chats) == alone * 2
        assert bench.model.state_store.hits or max_states == 2


def test_a_cache_that_advances_in_place_is_refused_to_a_second_thread(bench):
    cache = VisualRWKVCache(bench.model.config)
    alone = bench.answer(shown("teal"))
    started, may_go_on = Event(), Event()

    def wait(input_ids, scores, **kwargs):
        started.set()
        may_go_on.wait(WAIT)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(bench.answer, shown("teal"), past_key_values=cache, stopping_criteria=[wait])
        assert started.wait(WAIT)
        try:
            with pytest.raises(ValueError, match="Another thread is generating from this cache"):
                bench.answer(shown("red"), past_key_values=cache)
        finally:
            may_go_on.set()
        assert first.result(WAIT) == alone
    bench.answer(shown("red"), past_key_values=cache.copy())
    assert bench.answer(shown("teal"), past_key_values=VisualRWKVCache(bench.model.config)) == alone


def test_a_cache_is_given_back_after_an_error(bench):
    cache = VisualRWKVCache(bench.model.config)
    with pytest.raises(ValueError):
        bench.answer(shown("teal"), past_key_values=cache, cache_implementation="static")
    assert bench.answer(shown("teal"), past_key_values=cache) == bench.answer(shown("teal"))


def test_a_thread_for_each_streamed_answer(bench):
    tokenizer = bench.processor.tokenizer
    prompts = [bench.inputs(shown(colour)) for colour in COLOURS]
    streamers = [TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=WAIT) for _ in prompts]
    threads = [
        Thread(target=bench.model.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})
        for inputs, streamer in zip(prompts, streamers)
    ]
    for thread in threads:
        thread.start()
    streamed = ["".join(streamer) for streamer in streamers]
    for thread in threads:
        thread.join(WAIT)
    for text, inputs in zip(streamed, prompts):
        output = bench.model.generate(**inputs, **GREEDY)
        assert text == tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
