"""What users call: pipelines, streaming and the `visualrwkv ask` command give the answers of `generate`."""

import importlib.util
import json
import subprocess
import sys
from threading import Thread

import pytest
import torch
from paths import EXAMPLES, GOLDEN
from patience import PATIENCE
from PIL import Image
from tiny import tiny_vlm
from transformers import AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer, pipeline
from typer.testing import CliRunner

from visualrwkv_hf import VisualRWKVProcessor
from visualrwkv_hf.cli.app import app
from visualrwkv_hf.conversion.world_tokenizer import build_world_tokenizer
from visualrwkv_hf.image_processing_visualrwkv import image_processor_for
from visualrwkv_hf.inference.streaming import AnswerStreamer

CASE = GOLDEN / "k_e2e" / "v60_full_vocab"
EXAMPLE = EXAMPLES / "first_answer.py"
EXPECTED = json.loads((CASE / "generation.json").read_text())
GREEDY = {"max_new_tokens": 12, "do_sample": False}
QUESTION = "What is this?"


def saved(model, folder):
    image_processor = image_processor_for(model.config)
    processor = VisualRWKVProcessor.from_config(model.config, image_processor, build_world_tokenizer())
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return pipeline("image-text-to-text", saved(tiny_vlm(vocab_size=65536), tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def pictures():
    """Two, of other shapes and colours."""
    return [Image.open(CASE / name).convert("RGB") for name in ("a.png", "b.png")]


def chat(text, *images):
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def new_text(pipe, output, prompt_length):
    return pipe.processor.decode(output[prompt_length:], skip_special_tokens=True).rstrip()


def generated(pipe, conversation):
    """The answer by hand."""
    inputs = pipe.processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = pipe.model.generate(**inputs, **GREEDY)
    text = new_text(pipe, output[0], inputs["input_ids"].shape[1])
    assert text.strip()
    return text


def answers(pipe, text, **kwargs):
    return pipe(text=text, return_full_text=False, generate_kwargs=GREEDY, **kwargs)


@pytest.mark.parametrize("count", [0, 1, 2], ids=["text alone", "a picture", "two pictures"])
def test_a_chat_is_answered_as_by_generate(count, pipe, pictures):
    conversation = chat(QUESTION, *pictures[:count])
    (answer,) = answers(pipe, conversation)
    assert answer["generated_text"] == generated(pipe, conversation)


def test_pictures_make_a_difference(pipe, pictures):
    conversations = [chat(QUESTION), *(chat(QUESTION, picture) for picture in pictures)]
    assert len({generated(pipe, conversation) for conversation in conversations}) == 3


def test_the_whole_chat_is_returned(pipe, pictures):
    conversation = chat(QUESTION, pictures[0])
    (answer,) = pipe(text=conversation, generate_kwargs=GREEDY)
    *before, last = answer["generated_text"]
    assert before == conversation
    assert last == {"role": "assistant", "content": generated(pipe, conversation)}


@pytest.mark.parametrize("batch_size", [1, 2])
def test_chats_of_other_lengths_in_a_batch(batch_size, pipe, pictures):
    conversations = [
        chat(QUESTION, pictures[0]),
        chat("Say in a few words what there is to be seen in it, if anything.", pictures[1]),
    ]
    found = answers(pipe, conversations, batch_size=batch_size)
    assert [answer[0]["generated_text"] for answer in found] == [generated(pipe, c) for c in conversations]


def test_raw_text_and_pictures(pipe, pictures):
    text = f"User: <image>\n<image>\n{QUESTION}\n\nAssistant:"
    inputs = pipe.processor(images=pictures, text=text, return_tensors="pt")
    output = pipe.model.generate(**inputs, **GREEDY)
    (answer,) = answers(pipe, text, images=pictures)
    assert answer["generated_text"] == new_text(pipe, output[0], inputs["input_ids"].shape[1])


def test_raw_texts_of_other_lengths(pipe, pictures):
    texts = [f"User: <image>\n{question}\n\nAssistant:" for question in (QUESTION, "And what is that there?")]
    found = answers(pipe, texts, images=[[picture] for picture in pictures])
    for answer, text, picture in zip(found, texts, pictures):
        inputs = pipe.processor(images=picture, text=text, return_tensors="pt")
        output = pipe.model.generate(**inputs, **GREEDY)
        (one,) = answer if isinstance(answer, list) else [answer]
        assert one["generated_text"] == new_text(pipe, output[0], inputs["input_ids"].shape[1])


def test_a_stream_is_the_text(pipe, pictures):
    conversation = chat(QUESTION, pictures[0])
    inputs = pipe.processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    streamer = TextIteratorStreamer(
        pipe.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=PATIENCE
    )
    thread = Thread(target=pipe.model.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert sum(map(bool, pieces)) > 1
    assert "".join(pieces).rstrip() == generated(pipe, conversation)


# A converted checkpoint, end to end


def first_answer():
    specification = importlib.util.spec_from_file_location("first_answer", EXAMPLE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    example, folder = first_answer(), tmp_path_factory.mktemp("converted")
    return example.to_hf(
        example.original_checkpoint(folder / "original.safetensors"),
        folder / "model",
        vision_config={"clip_config": {"num_attention_heads": 4}},
        image_position="first",
        dtype="float32",
    )


def test_a_converted_checkpoint_generates_the_originals_ids(converted):
    processor = AutoProcessor.from_pretrained(converted)
    model = AutoModelForImageTextToText.from_pretrained(converted)
    inputs = processor.apply_chat_template(
        chat(QUESTION, CASE / EXPECTED["image"]),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, **GREEDY)
    assert output[0, inputs["input_ids"].shape[1] :].tolist() == EXPECTED["generated_ids"]
    assert model.generation_config.eos_token_id == [0, 261]
    assert model.generation_config.pad_token_id == 0


def test_a_pipeline_gives_the_originals_text(converted):
    conversation = chat(QUESTION, str(CASE / EXPECTED["image"]))
    (answer,) = answers(pipeline("image-text-to-text", str(converted)), conversation)
    assert answer["generated_text"] == EXPECTED["decoded"]


def test_the_stop_tokens_end_an_answer(converted, pictures):
    pipe = pipeline("image-text-to-text", str(converted))
    pipe.model.generation_config.max_new_tokens = 12
    inputs = pipe.processor(images=pictures[1], text=EXPECTED["prompt_input_text"], return_tensors="pt")
    for stop in pipe.model.generation_config.eos_token_id:
        with (
            torch.no_grad()
        ):  # another bias would be another model: the stop token takes the third word's place
            head = pipe.model.lm_head.weight
            word = EXPECTED["generated_ids"][2]
            rows = head[[stop, word]].clone()
            head[[stop, word]] = rows.flip(0)
            output = pipe.model.generate(**inputs, do_sample=False)
            head[[stop, word]] = rows
        new = output[0, inputs["input_ids"].shape[1] :].tolist()
        assert new == [*EXPECTED["generated_ids"][:2], stop]


def ask(*arguments):
    return CliRunner().invoke(app, ["ask", *map(str, arguments)])


def test_ask_prints_the_originals_text(converted):
    arguments = ["--model", converted, "--max-new-tokens", 12, "--device", "cpu"]
    result = ask(*arguments, CASE / EXPECTED["image"], QUESTION)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == EXPECTED["final_text"] + "\n"


def test_an_answer_is_streamed_without_white_space_around_it():
    """Not the space in front of the first word, nor the blank line that ends the turn."""
    streamer = AnswerStreamer(None)
    for piece in ("", " ", "\n A", " small\n", " cat.", "\n", "\n"):
        streamer.on_finalized_text(piece)
    streamer.on_finalized_text("\n", stream_end=True)
    assert "".join(streamer) == "A small\n cat."


def test_ask_places_the_picture_as_asked(converted):
    arguments = ["--model", converted, "--max-new-tokens", 12, "--device", "cpu", CASE / "b.png", QUESTION]
    by_position = {where: ask("--image-position", where, *arguments).stdout for where in ("first", "last")}
    assert by_position["first"] == EXPECTED["final_text"] + "\n"
    assert by_position["last"].strip() and by_position["last"] != by_position["first"]


def test_the_example_prints_the_originals_text_twice():
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(EXPECTED["final_text"]) == 2


def test_ask_reads_a_picture_from_a_pipe(converted):
    options = ["--model", str(converted), "--max-new-tokens", "12", "--device", "cpu"]
    command = [sys.executable, "-m", "visualrwkv_hf.cli", "ask", *options, "-", QUESTION]
    done = subprocess.run(command, input=(CASE / EXPECTED["image"]).read_bytes(), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == EXPECTED["final_text"] + "\n"
    assert done.stderr == b""  # no terminal: no progress
    done = subprocess.run(command, input=b"hello", capture_output=True)
    assert done.returncode == 1 and done.stderr.startswith(b"Error: '/dev/stdin' cannot be read as a picture")


# Errors of `ask`

PNG = (CASE / "b.png").read_bytes()
NO_PICTURES = {"text.png": b"not a picture", "cut.png": PNG[: len(PNG) // 2], "empty.png": b""}


def assert_one_sentence(result, *parts):
    """One line on stderr that says it, exit code 1, nothing on stdout, no traceback."""
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.strip()]
    assert line.startswith("Error: ") and all(part in line for part in parts), line


@pytest.mark.parametrize("name", NO_PICTURES)
def test_ask_names_a_file_that_is_no_picture(name, converted, tmp_path):
    (tmp_path / name).write_bytes(NO_PICTURES[name])
    result = ask("--model", converted, tmp_path / name, QUESTION)
    assert_one_sentence(result, str(tmp_path / name), "cannot be read as a picture")


def test_ask_names_a_picture_that_is_not_there(converted):
    assert_one_sentence(ask("--model", converted, "none.png", QUESTION), "There is no picture none.png.")


def test_ask_names_a_folder_without_a_model(tmp_path):
    result = ask("--model", tmp_path, CASE / "b.png", QUESTION)
    assert_one_sentence(result, f"{tmp_path} is not a model folder: it has no config.json.")


def test_ask_refuses_a_question_that_holds_a_picture(converted):
    result = ask("--model", converted, CASE / "b.png", "What is <image>?")
    assert_one_sentence(result, "contains '<image>', which is reserved")


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--device", "nowhere", "There is no device 'nowhere' here."),
        ("--dtype", "float8", "dtype must be one of auto, float32, bfloat16, float16, got 'float8'."),
        ("--image-position", "behind", "image_position must be 'first', 'middle' or 'last', got 'behind'."),
    ],
)
def test_ask_refuses_what_an_option_cannot_be(option, value, message, converted):
    assert_one_sentence(ask("--model", converted, option, value, CASE / "b.png", QUESTION), message)


def test_ask_without_a_model_answers_by_the_one_inside():
    result = ask("--max-new-tokens", 1, CASE / "b.png", QUESTION)
    assert result.exit_code == 0 and result.stdout.strip(), result.stderr


def test_ask_without_a_model_says_that_there_is_none_inside(monkeypatch):
    def missing():
        raise FileNotFoundError("There is no model inside.")

    monkeypatch.setattr("visualrwkv_hf.bundled.bundled_model", missing)
    assert_one_sentence(ask(CASE / "b.png", QUESTION), "There is no model inside.")
