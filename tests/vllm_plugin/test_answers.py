"""An engine of vLLM writes the tokens that `generate` writes, for every release, however it divides the work."""

import numpy as np
import pytest
import torch
from PIL import Image
from released_folders import released_config, write_release, write_text_model
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from visualrwkv_hf import VisualRWKVForConditionalGeneration, bundled_model
from visualrwkv_hf.conversion.releases import RELEASES
from visualrwkv_hf.generations import GENERATIONS
from visualrwkv_hf.modeling_visualrwkv import is_trivial

NEW_TOKENS = 6
QUESTION = "a red square, what is to the left of it and why would it be there"
WORDS = tuple(QUESTION.split())


def picture(number: int) -> Image.Image:
    random = np.random.default_rng(number)
    height, width = random.integers(40, 150, 2)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def mixed_chats(count: int, new_picture=picture) -> list[list[dict]]:
    """Chats with a picture, text alone and two pictures by turns, with questions of 1 to 15 words."""
    chats = []
    for number in range(count):
        pictures = [new_picture(10 * number + n) for n in range((1, 0, 2)[number % 3])]
        question = " ".join(WORDS[: 1 + number * 7 % 15]) + f" {number}?"
        content = [{"type": "image", "image": image} for image in pictures]
        chats.append([{"role": "user", "content": [*content, {"type": "text", "text": question}]}])
    return chats


@torch.no_grad()
def generated(model, processor, chat) -> list[int]:
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def requests(processor, chats) -> list[dict]:
    """What an engine takes: the text of the chat template, and the pictures."""
    made = []
    for chat in chats:
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        request = {"prompt": text}
        if pictures := [part["image"] for part in chat[0]["content"] if part["type"] == "image"]:
            request["multi_modal_data"] = {"image": pictures}
        made.append(request)
    return made


def sampling(**options):
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=NEW_TOKENS, **options)


def answers(engine, given) -> list[list[int]]:
    return [list(done.outputs[0].token_ids) for done in engine.generate(given, sampling(), use_tqdm=False)]


def answers_after_preemption(engine, given, every: int = 4) -> list[list[int]]:
    """Take all running requests out of the engine after every few steps, so that it reads them again."""
    core, found = engine.llm_engine, {}
    scheduler = core.engine_core.engine_core.scheduler
    for number, request in enumerate(given):
        core.add_request(str(number), request, sampling())
    steps = preempted = 0
    while core.has_unfinished_requests():
        for done in core.step():
            if done.finished:
                found[int(done.request_id.split("-")[0])] = list(done.outputs[0].token_ids)
        steps += 1
        if steps % every == 0 and steps <= 5 * every:
            preempted += sum(bool(request.num_output_tokens) for request in scheduler.running)
            scheduler.reset_prefix_cache(reset_running_requests=True)
    assert preempted > 3, "no request had written anything"
    return [found[number] for number in range(len(given))]


@pytest.mark.parametrize("release", RELEASES)
def test_an_engine_writes_what_generate_writes(release, tmp_path, start_engine):
    """Pictures of all sizes, text alone and two pictures; a step has room for one picture and a few tokens."""
    folder = write_release(tmp_path / "model", release)
    processor = AutoProcessor.from_pretrained(folder)
    model = VisualRWKVForConditionalGeneration.from_pretrained(folder).eval()
    config = released_config(release)
    chats = mixed_chats(32)
    expected = [generated(model, processor, chat) for chat in chats]
    budget = config.num_image_tokens + (3 if is_trivial(config.scan) else 1)
    engine = start_engine(folder, max_num_batched_tokens=max(budget, 8))
    assert answers(engine, requests(processor, chats)) == expected
    assert len({tuple(ids) for ids in expected}) > 16, "the model does not tell requests apart"
    if release in ("v6.0", "v7.00"):
        assert answers_after_preemption(engine, requests(processor, chats)) == expected


@pytest.mark.parametrize("version", GENERATIONS)
def test_an_engine_writes_what_a_text_model_writes(version, tmp_path, start_engine):
    folder = write_text_model(tmp_path / "model", version)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    texts = [" ".join(WORDS[: 1 + number % 15]) + f" {number}?" for number in range(32)]
    expected = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            output = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        expected.append(output[0, ids.shape[1] :].tolist())
    engine = start_engine(folder, max_num_batched_tokens=11)
    assert answers(engine, texts) == expected
    assert answers(engine, texts[4:5]) == expected[4:5], "a row alone"


def test_an_engine_writes_what_the_model_in_the_package_writes(start_engine):
    folder = bundled_model()
    processor = AutoProcessor.from_pretrained(folder)
    model = VisualRWKVForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    chats = mixed_chats(32)
    expected = [generated(model, processor, chat) for chat in chats]
    engine = start_engine(folder, max_num_batched_tokens=32)
    given = requests(processor, chats)
    assert answers(engine, given) == expected
    assert answers_after_preemption(engine, given) == expected
    assert [answers(engine, [request])[0] for request in given[:3]] == expected[:3], "a row alone"
