"""An engine of vLLM writes the tokens that `generate` writes, for every release, however it divides the work."""

import io

import pytest
import torch
from PIL import Image
from released_folders import released_config, write_release, write_text_model
from serving import SHAPE_QUESTION, circle_png
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer
from vllm_engines import (
    NEW_TOKENS,
    WORDS,
    answers,
    answers_after_preemption,
    generated,
    mixed_chats,
    requests,
    sampling,
    strange_pngs,
)

from visualrwkv_hf import VisualRWKVForConditionalGeneration, bundled_model
from visualrwkv_hf.conversion.releases import RELEASES
from visualrwkv_hf.generations import GENERATIONS
from visualrwkv_hf.inference.facts import facts_of
from visualrwkv_hf.modeling_visualrwkv import is_trivial


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
    assert answers_after_preemption(engine, texts) == expected


def test_an_answer_stops_at_the_end_of_text_and_at_two_line_breaks(tmp_path, start_engine):
    """The tokens 0 and 261 end an answer because the folder's generation config says so."""
    engine = start_engine(write_text_model(tmp_path / "model", 7))
    for token, reason in ((0, "stop"), (261, "stop"), (262, "length")):
        wanted = sampling(logit_bias={token: 100.0})
        (done,) = engine.generate(["what is red"], wanted, use_tqdm=False)
        assert done.outputs[0].finish_reason == reason
        assert list(done.outputs[0].token_ids) == [token] * (1 if reason == "stop" else NEW_TOKENS)


def test_an_engine_writes_what_the_model_in_the_package_writes(start_engine):
    folder = bundled_model()
    processor = AutoProcessor.from_pretrained(folder)
    model = VisualRWKVForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    chats = mixed_chats(32)
    expected = [generated(model, processor, chat) for chat in chats]
    engine = start_engine(folder, max_num_batched_tokens=model.config.num_image_tokens + 1)
    given = requests(processor, chats)
    assert answers(engine, given) == expected
    assert answers_after_preemption(engine, given) == expected
    assert [answers(engine, [request])[0] for request in given[:3]] == expected[:3], "a row alone"


def test_transparent_and_16_bit_pictures_are_those_that_generate_sees(start_engine):
    folder = bundled_model()
    processor = AutoProcessor.from_pretrained(folder)
    model = VisualRWKVForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    pictures = [Image.open(io.BytesIO(png)) for png in (*strange_pngs().values(), circle_png("white"))]
    content = [
        [{"type": "image", "image": one}, {"type": "text", "text": SHAPE_QUESTION}] for one in pictures
    ]
    chats = [[{"role": "user", "content": parts}] for parts in content]
    expected = [generated(model, processor, chat) for chat in chats]
    assert expected[2] not in expected[:2], "the model does not tell the pictures from white ones"
    assert answers(start_engine(folder), requests(processor, chats)) == expected


def test_without_a_temperature_vllm_samples_unless_the_engine_was_told():
    from vllm import SamplingParams
    from vllm.config import ModelConfig

    folder = str(bundled_model())
    assert not ModelConfig(folder).get_diff_sampling_param() and SamplingParams().temperature == 1
    greedy = ModelConfig(folder, override_generation_config={"temperature": 0})
    assert greedy.get_diff_sampling_param() == {"temperature": 0}


def test_a_further_request_takes_the_bytes_of_a_state(tmp_path, start_engine):
    folder = write_text_model(tmp_path / "model", 7)
    engine = start_engine(folder)
    pool = engine.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    taken = sum(tensor.size for tensor in pool.kv_cache_tensors) / pool.num_blocks
    assert taken == facts_of(folder)["state_bytes"]
