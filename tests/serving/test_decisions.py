"""/v1/systemone: the answers are those of transformers' pipeline "decision", and a picture is read once."""

import base64
import io
import json
from types import SimpleNamespace

import httpx
import pytest
from patience import PATIENCE
from PIL import Image
from serving import png, running
from tiny_training import save_tiny_model
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from visualrwkv_hf.inference.server import Limits, build_app
from visualrwkv_hf.inference.server_generation import Answerer

pytest.importorskip("transformers.decision", reason="came with a later transformers")
pytest.importorskip("uvicorn", reason="needs the extra serve")

LIMITS = Limits(prompt_tokens=2000, pictures=4)
CONFIG = {"labels": {"noul": ["Y", "N"]}, "temperature": {"choice": 0.5}}
"""The vocabulary of the tiny model has single letters only."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("decides") / "visualrwkv-tiny", image_position="first")
    (folder / "decision.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope="module")
def served(folder):
    """The server, how many tokens each forward of its model read, and how many pictures its tower saw."""
    app = build_app(folder, limits=LIMITS)
    model, reads, pictures = app.state.model, [], []
    model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: reads.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    model.model.vision_tower.register_forward_pre_hook(lambda _, args: pictures.append(len(args[0])))
    with running(app) as url, httpx.Client(base_url=url, timeout=PATIENCE) as client:
        yield SimpleNamespace(client=client, model=model, reads=reads, pictures=pictures)


@pytest.fixture
def client(served):
    served.model.state_store.clear()
    served.reads.clear()
    served.pictures.clear()
    return served.client


def asset(colour):
    return {"type": "image", "format": "png", "data_base64": base64.b64encode(png(colour)).decode()}


QUESTIONS = {
    "red": {"type": "noul", "instructions": "Is it red?"},
    "kind": {"type": "choice", "instructions": "What is it?", "criteria": {"dot": None, "line": "Long"}},
    "size": {"type": "score", "instructions": "How big?", "criteria": ["small", "middling", "big"]},
}
REQUEST = {"state": "A picture: photo-1", "questions": QUESTIONS, "assets": {"photo-1": asset("red")}}


def decide(client, request=REQUEST, status=200):
    response = client.post("/v1/systemone", json=request)
    assert response.status_code == status, response.text
    return response.json()


@pytest.fixture(scope="module")
def expected(folder):
    """The answers of transformers' pipeline."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    return pipeline("decision", model=model, processor=processor, tokenizer=processor.tokenizer)


REQUESTS = {
    "a picture": REQUEST,
    "text": {"state": "I want a refund.", "questions": QUESTIONS},
    "an object": {"state": {"photo": "photo-1", "n": [1, None, "é"]}, "questions": QUESTIONS}
    | {"assets": {"photo-1": asset("red")}},
    "two pictures": {
        "state": "a: photo-1, b: photo-10",
        "questions": {"same": {"type": "noul", "instructions": "Is photo-1 like photo-10?"}},
        "assets": {"photo-1": asset("red"), "photo-10": asset("green")},
    },
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_answers_are_those_of_the_pipeline(client, expected, request_):
    # The pipeline's `load_image` takes base64 by itself too.
    wanted, reply = expected(request_), decide(client, request_)
    assert reply["model"] == "visualrwkv-tiny"
    assert reply["usage"]["input_tokens"] > 0 == reply["usage"]["output_tokens"]
    assert reply["answers"].keys() == wanted.keys()
    for name, answer in wanted.items():
        found = reply["answers"][name]
        assert found.keys() == answer.keys()
        for key, value in answer.items():
            is_number = isinstance(value, float) or key == "probabilities"
            assert found[key] == (pytest.approx(value, abs=1e-5) if is_number else value), key


def test_a_picture_is_read_once_for_all_questions_and_requests(client, served):
    tokens = served.model.config.num_image_tokens
    asked = decide(client)["usage"]["input_tokens"]
    assert served.pictures == [1] and sum(served.reads) <= asked - 2 * tokens
    served.reads.clear()
    more = {"more": {"type": "noul", "instructions": "Is it round?"}}
    asked = decide(client, REQUEST | {"questions": more})["usage"]["input_tokens"]
    assert served.pictures == [1] and sum(served.reads) <= asked - tokens
    decide(client, REQUEST | {"assets": {"photo-1": asset("green")}})
    assert served.pictures == [1, 1]


def test_marks_of_templates_are_text(client):
    """The tokens that transformers adds for them are none of the server's, not even after a decision."""
    decide(client, {"state": "<|mark|><|split|> {{ 7 }}", "questions": QUESTIONS})
    body = {"messages": [{"role": "user", "content": "<|mark|> <|split|>"}], "max_tokens": 3}
    assert client.post("/v1/chat/completions", json=body).status_code == 200


def test_labels_of_several_tokens_are_scored(tmp_path):
    """Yes and No, which the vocabulary of the tiny model has in pieces only; the pipeline refuses them."""
    folder = save_tiny_model(tmp_path / "model")
    app = build_app(folder)
    with running(app) as url, httpx.Client(base_url=url, timeout=PATIENCE) as client:
        question = {"red": QUESTIONS["red"]}
        found = decide(client, {"state": "I want a refund.", "questions": question})["answers"]["red"]["noul"]
    processor = AutoProcessor.from_pretrained(folder)
    text = "I want a refund.\n\nIs it red?\nAnswer Yes or No only."
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": text}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    labels = [processor.tokenizer.encode(label, add_special_tokens=False) for label in ("Yes", "No")]
    assert max(map(len, labels)) > 1
    assert found == pytest.approx(float(app.state.model.score(inputs, labels).probabilities[0, 0]), abs=1e-5)


NO_QUESTION = {"q": {"type": "choice", "instructions": "?", "criteria": {}}}
REFUSALS = {
    "no state": ({"questions": QUESTIONS}, "state must be a text, an object or a list, got None"),
    "no questions": ({"state": "a"}, "questions must be an object of 1 to 64 questions"),
    "none": ({"state": "a", "questions": {}}, "questions must be an object of 1 to 64 questions"),
    "many": ({"state": "a", "questions": {str(n): QUESTIONS["red"] for n in range(65)}}, "1 to 64 questions"),
    "kind": ({"state": "a", "questions": {"q": {"type": "guess"}}}, "Question 'q': `type` must be one of"),
    "options": ({"state": "a", "questions": NO_QUESTION}, "needs `criteria` with its options"),
    "labels": (
        {
            "state": "a",
            "questions": {"q": {"type": "choice", "criteria": dict.fromkeys(map(str, range(27)))}},
        },
        "at most 26 options",
    ),
    "no object": ({"state": "a", "questions": {"q": 7}}, "`type` must be one of"),
    "stream": (REQUEST | {"stream": True}, "Unexpected fields in the request: 'stream'"),
    "model": (REQUEST | {"model": "gpt"}, "no model 'gpt' here"),
    "assets": (REQUEST | {"assets": []}, "assets must be an object of at most 4 pictures"),
    "five": (REQUEST | {"assets": dict.fromkeys("abcde", asset("red"))}, "at most 4 pictures"),
    "a path": (REQUEST | {"assets": {"photo-1": "/etc/passwd"}}, "Picture 1: it must be given as"),
    "a url": (REQUEST | {"assets": {"photo-1": {"url": "http://a/"}}}, "Picture 1: it must be given as"),
    "more keys": (
        REQUEST | {"assets": {"photo-1": asset("red") | {"path": "/etc"}}},
        "unexpected fields: 'path'",
    ),
    "no base64": (
        REQUEST | {"assets": {"photo-1": {"data_base64": "*"}}},
        "Picture 1: it is not valid base64",
    ),
    "no picture": (
        REQUEST | {"assets": {"photo-1": {"data_base64": "AAAA"}}},
        "Picture 1: it cannot be read",
    ),
    "no name": (REQUEST | {"assets": {"": asset("red")}}, "its name in assets must have 1 to 64 characters"),
    "named often": (REQUEST | {"state": "photo-1 " * 5}, "Question 'red' names 5 pictures, at most 4"),
    "named everywhere": (REQUEST | {"assets": {"e": asset("red")}}, "Question 'red' names"),
    "reserved": ({"state": "<|endoftext|>", "questions": QUESTIONS}, "'<|endoftext|>', which is reserved"),
    "forged picture": ({"state": "<image>", "questions": QUESTIONS}, "'<image>', which is reserved"),
    "long": ({"state": "a" * 40_000, "questions": QUESTIONS}, "characters of text"),
    "long prompt": ({"state": "a " * 3_000, "questions": QUESTIONS}, "it can have 1 to 2000"),
}


@pytest.mark.parametrize("request_, words", REFUSALS.values(), ids=REFUSALS)
def test_refusals_are_a_sentence(client, request_, words):
    error = decide(client, request_, status=404 if "gpt" in words else 400)["error"]["message"]
    assert words in error and error.endswith((".", "...")) and "\n" not in error and len(error) < 600
    assert "passwd" not in error and "AAAA" not in error


def test_large_pictures_are_not_decoded(tmp_path_factory, folder):
    file = io.BytesIO()
    Image.new("L", (200, 200)).save(file, "PNG")
    large = {"data_base64": base64.b64encode(file.getvalue()).decode()}
    app = build_app(folder, limits=Limits(picture_pixels=1000))
    with running(app) as url, httpx.Client(base_url=url, timeout=PATIENCE) as client:
        assert (
            "200 x 200" in decide(client, REQUEST | {"assets": {"photo-1": large}}, 400)["error"]["message"]
        )


def test_answers_have_a_longest_time(folder):
    app = build_app(folder, limits=Limits(answer_seconds=1e-9))
    with running(app) as url, httpx.Client(base_url=url, timeout=PATIENCE) as client:
        assert "within 1e-09 s" in decide(client, status=503)["error"]["message"]


def test_without_a_store_the_picture_is_read_once_in_a_request(folder):
    app = build_app(folder, max_states=0)
    pictures = []
    app.state.model.model.vision_tower.register_forward_pre_hook(lambda _, args: pictures.append(1))
    with running(app) as url, httpx.Client(base_url=url, timeout=PATIENCE) as client:
        decide(client)
    assert pictures == [1]


def test_a_model_with_a_template_of_its_own_takes_no_decisions(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    (folder / "decision_template.jinja").write_text("{{ state }}<|mark|>")
    with running(build_app(folder)) as url, httpx.Client(base_url=url, timeout=PATIENCE) as client:
        assert "takes no decisions" in decide(client, status=501)["error"]["message"]
    assert Answerer(None, None, LIMITS, None).decide.config is None
