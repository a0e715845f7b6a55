"""The server, asked by the `openai` client: its answers are those of `generate`, whatever else happens."""

import json
import re
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from film_files import about_film, film_url, gif
from patience import PATIENCE, wait_until
from serving import data_url, picture_host, running, served_apart, user
from tiny_training import save_tiny_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from visualrwkv_hf.inference.server import Access, Limits, build_app, serve

openai = pytest.importorskip("openai", reason="needs the client of OpenAI")
pytest.importorskip("uvicorn", reason="needs the extra serve")

RED, GREEN = data_url("red"), data_url("green")
QUESTION = user("Which colour is it?", RED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("served") / "visualrwkv-tiny")


@pytest.fixture(scope="module")
def served(folder):
    """The model in the server, how many tokens each of its forwards read, how many pictures its tower saw."""
    app = build_app(folder, access=Access(allow_private_urls=True), limits=Limits(fetch_seconds=3))
    model, reads, pictures = app.state.model, [], []
    language_model, tower = model.model.language_model, model.model.vision_tower
    language_model.register_forward_pre_hook(
        lambda _, args, kwargs: reads.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    tower.register_forward_pre_hook(lambda _, args: pictures.append(len(args[0])))
    with running(app) as url:
        yield SimpleNamespace(url=url, model=model, reads=reads, pictures=pictures, line=app.state.line)


@pytest.fixture
def client(served):
    served.model.state_store.clear()
    served.reads.clear()
    served.pictures.clear()
    with client_of(served.url) as client:
        yield client


def client_of(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)


@pytest.fixture(scope="module")
def pictures():
    with picture_host() as url:
        yield url


@pytest.fixture(scope="module")
def expected(folder):
    """The answer to OpenAI messages that a model without a server gives."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)

    def answer(messages, tokens=12, **template):
        inputs = processor.apply_chat_template(
            [message | {"content": ours(message["content"])} for message in messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **template,
        )
        output = model.generate(
            **inputs, max_new_tokens=tokens, suppress_tokens=[model.config.image_token_id]
        )
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    return answer


def ours(content):
    """OpenAI's content in the words of transformers."""
    if isinstance(content, str):
        return content
    return [OURS.get(part["type"], dict)(part) for part in content]


OURS = {
    "image_url": lambda part: {"type": "image", "url": part["image_url"]["url"]},
    "video_url": lambda part: {"type": "video", "base64": part["video_url"]["url"]},
}


def ask(client, messages, tokens=12, **fields):
    reply = client.chat.completions.create(
        model="visualrwkv-tiny", messages=messages, max_tokens=tokens, **fields
    )
    return reply.choices[0].message.content


def stream(client, messages, tokens=12, **fields):
    return client.chat.completions.create(
        model="visualrwkv-tiny", messages=messages, max_tokens=tokens, stream=True, **fields
    )


def pieces(chunks):
    return list(pieces_as_they_come(chunks))


def pieces_as_they_come(chunks):
    return (chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


CHATS = {
    "text": [{"role": "user", "content": "Say yes."}],
    "picture": [QUESTION],
    "two pictures": [user("Which is warmer?", RED, GREEN)],
    "several turns": [
        {"role": "system", "content": "Be brief."},
        QUESTION,
        {"role": "assistant", "content": "Red."},
        user("And this one?", GREEN),
    ],
}


@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
def test_answer_is_that_of_generate(client, expected, messages):
    wanted = expected(messages)
    assert ask(client, messages) == wanted
    assert "".join(pieces(stream(client, messages))) == wanted


def test_the_first_words_come_before_the_last_ones_are_chosen(client, served, expected):
    go_on, calls = threading.Event(), []

    def hold(*_):
        calls.append(1)
        assert len(calls) < 10 or go_on.wait(PATIENCE)

    hook = served.model.model.language_model.register_forward_pre_hook(hold)
    try:
        chunks = stream(client, [QUESTION])
        parts = [next(part for part in pieces_as_they_come(chunks) if part)]
        go_on.set()
        parts += pieces(chunks)
    finally:
        go_on.set()
        hook.remove()
    assert "".join(parts) == expected([QUESTION])


def test_picture_at_a_url_is_the_picture(client, pictures):
    answer = ask(client, [user("Which colour is it?", f"{pictures}/red.png")])
    assert answer == ask(client, [QUESTION]) != ask(client, [user("Which colour is it?", GREEN)])


FILM = film_url(gif(), "image/gif")


def test_a_film_is_read_as_its_frames_are(client, served, expected):
    messages = [about_film("What moves?", FILM)]
    answer = ask(client, messages)
    assert answer == expected(messages) == "".join(pieces(stream(client, messages)))
    few = {"media_io_kwargs": {"video": {"num_frames": 2}}}
    assert ask(client, messages, extra_body=few) == expected(messages, num_frames=2)
    slow = {"media_io_kwargs": {"video": {"fps": 1}}}
    assert ask(client, messages, extra_body=slow) == expected(messages, fps=1)
    reply = client.responses.create(model="visualrwkv-tiny", input=messages, max_output_tokens=12)
    assert reply.output_text == answer
    # The question is repeated before the pictures of this model; after them nothing is read twice.
    served.pictures.clear()
    messages = [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": "And then?"}]
    assert ask(client, messages) == expected(messages)
    assert not served.pictures


def test_films_and_pictures_keep_their_places(client, expected):
    picture = user("", RED)["content"][0]
    film, text = about_film("Which is warmer?", FILM)["content"]
    for content in ([picture, film, text], [film, picture, text], [film, text, picture, film]):
        messages = [{"role": "user", "content": content}]
        few = {"media_io_kwargs": {"video": {"num_frames": 3}}}
        assert ask(client, messages, extra_body=few) == expected(messages, num_frames=3)


def test_a_film_at_a_url_is_the_film(client, pictures, expected):
    answer = ask(client, [about_film("What moves?", f"{pictures}/film.gif")])
    assert answer == expected([about_film("What moves?", FILM)])


def test_answer_goes_back_as_it_came_and_is_not_read_again(client, served, expected):
    messages = [QUESTION]
    answer = ask(client, messages)
    first = sum(served.reads)
    assert served.pictures == [1]
    messages = [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": "Sure?"}]
    served.reads.clear()
    second = ask(client, messages)
    # Greedy, so that the answer's text may be other tokens than were generated: at most it is read once more.
    assert sum(served.reads) < first / 2 + 12
    assert served.pictures == [1]
    assert second == expected(messages)


def test_another_picture_is_read(client, served, expected):
    ask(client, [QUESTION])
    other = [user("Which colour is it?", GREEN)]
    assert ask(client, other) == expected(other)
    assert served.pictures == [1, 1]


def test_chat_template_variables_come_through(client, expected):
    chat_template_kwargs = {"image_position": "first"}
    answer = ask(client, [QUESTION], extra_body={"chat_template_kwargs": chat_template_kwargs})
    assert answer == expected([QUESTION], image_position="first") != expected([QUESTION])


def test_responses_and_completions(client, expected):
    content = [
        {"type": "input_image", "image_url": RED},
        {"type": "input_text", "text": "Which colour is it?"},
    ]
    asked = dict(model="visualrwkv-tiny", input=[{"role": "user", "content": content}], max_output_tokens=12)
    assert client.responses.create(**asked).output_text == expected([QUESTION])
    events = list(client.responses.create(**asked, stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == expected([QUESTION])
    completion = client.completions.create(
        model="visualrwkv-tiny", prompt="User: Say yes.\n\nAssistant:", max_tokens=12
    )
    assert completion.choices[0].text.strip() == expected(CHATS["text"])


def test_temperature_asks_for_sampling_and_seed_repeats_it(client, expected):
    answers = [ask(client, [QUESTION], temperature=1.5, seed=seed) for seed in (1, 2, 1)]
    assert answers[0] == answers[2]
    assert len({*answers, expected([QUESTION])}) == 3
    assert ask(client, [QUESTION], temperature=0) == expected([QUESTION])


@pytest.mark.parametrize("length", [1, 3])
def test_an_answer_ends_before_a_stop_string(client, expected, length):
    whole = expected([QUESTION], tokens=40)
    stop = whole[7 : 7 + length]
    wanted = whole[: whole.index(stop)].rstrip()
    assert ask(client, [QUESTION], tokens=40, stop=[stop, "no such text"]) == wanted != whole
    chunks = list(stream(client, [QUESTION], tokens=40, stop=stop))
    assert "".join(pieces(chunks)) == wanted
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert ask(client, [QUESTION], tokens=40, stop=[]) == whole


def test_the_model_is_listed_and_answers_to_its_folder_too(client, folder):
    assert [model.id for model in client.models.list()] == ["visualrwkv-tiny"]
    for name in ("visualrwkv-tiny", str(folder)):
        reply = client.chat.completions.create(model=name, messages=[QUESTION], max_tokens=1)
        assert reply.model == "visualrwkv-tiny"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt' here: the model is 'visualrwkv-tiny'"):
        client.chat.completions.create(model="gpt", messages=[QUESTION])


def test_routes_that_load_and_unload_models_are_not_there(served):
    for route in ("load_model", "reset", "v1/audio/transcriptions"):
        with client_of(served.url) as client, pytest.raises(openai.NotFoundError):
            client.post(f"/../{route}", body={"model": "gpt2"}, cast_to=object)


FIELDS_THAT_WORK = {
    "bias": dict(logit_bias={"5": -100}),
    "no bias": dict(logit_bias={}),
    "no stop": dict(stop=[]),
    "no tools": dict(tools=[], tool_choice="none"),
    "format": dict(response_format={"type": "text"}),
    "passed over": dict(user="me", metadata={"a": "b"}, store=True, service_tier="auto"),
    "nulls": dict(extra_body={"seed": None, "stop": None, "logit_bias": None, "tools": None}),
}


@pytest.mark.parametrize("fields", FIELDS_THAT_WORK.values(), ids=FIELDS_THAT_WORK)
def test_fields_as_clients_send_them_are_taken(client, expected, fields):
    assert ask(client, [QUESTION], **fields) == expected([QUESTION])


ANSWER_SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "grey"]}, "sure": {"type": "boolean"}},
    "required": ["colour", "sure"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("options", [{}, dict(temperature=1.5, seed=3, frequency_penalty=2, top_p=0.9)])
def test_an_answer_fits_the_schema_whole_and_streamed(client, options):
    pytest.importorskip("llguidance", reason="needs the extra structured")
    options = options | dict(tokens=100, response_format=schema_format(ANSWER_SCHEMA))
    whole = ask(client, [QUESTION], **options)
    answer = json.loads(whole)
    assert answer["colour"] in ("red", "grey") and type(answer["sure"]) is bool and len(answer) == 2
    assert "".join(pieces(stream(client, [QUESTION], **options))) == whole
    text = {"format": {"type": "json_schema", "name": "answer", "schema": ANSWER_SCHEMA}}
    reply = client.responses.create(
        model="visualrwkv-tiny", input="Hello", text=text, max_output_tokens=100, temperature=0
    )
    assert json.loads(reply.output_text).keys() == answer.keys()


FORMS = {
    "json": ({"json": {"type": "integer", "minimum": 10, "maximum": 99}}, r"[1-9][0-9]"),
    "regex": ({"regex": "[0-9]{4}-[0-9]{2}"}, r"[0-9]{4}-[0-9]{2}"),
    "choice": ({"choice": ["a red dot", "a line"]}, "a red dot|a line"),
    "grammar": ({"grammar": 'start: "x" ("y" | "z") "w"', "regex": None}, "x[yz]w"),
}


@pytest.mark.parametrize("form, wanted", FORMS.values(), ids=FORMS)
def test_answers_have_the_form_that_vllms_clients_ask_for(client, form, wanted):
    pytest.importorskip("llguidance", reason="needs the extra structured")
    fields = {"structured_outputs": form}
    whole = ask(client, [QUESTION], tokens=40, extra_body=fields)
    assert re.fullmatch(wanted, whole)
    assert "".join(pieces(stream(client, [QUESTION], tokens=40, extra_body=fields))) == whole
    asked = dict(model="visualrwkv-tiny", extra_body=fields)
    reply = client.responses.create(**asked, input="Hello", max_output_tokens=40)
    assert re.fullmatch(wanted, reply.output_text)
    reply = client.completions.create(**asked, prompt="Hello:", max_tokens=40)
    assert re.fullmatch(wanted, reply.choices[0].text.strip())


NOTHING = {"role": "assistant", "content": ""}
CHATS_OF_CLIENTS = {
    "developer": (
        [{"role": "developer", "content": "Be brief."}, QUESTION],
        [{"role": "system", "content": "Be brief."}, QUESTION],
    ),
    "developer and system": (
        [{"role": "developer", "content": "Be brief."}, {"role": "system", "content": "Be kind."}, QUESTION],
        [{"role": "system", "content": "Be brief.\nBe kind."}, QUESTION],
    ),
    "content null": (
        [QUESTION, {"role": "assistant", "content": None}, user("Sure?")],
        [QUESTION, NOTHING, user("Sure?")],
    ),
    "keys without a value": (
        [QUESTION, NOTHING | {"refusal": None, "tool_calls": None, "annotations": []}, user("Sure?")],
        [QUESTION, NOTHING, user("Sure?")],
    ),
    "data URL in capitals": (
        [user("Which colour is it?", RED.replace("data:image/png;base64", "DATA:Image/PNG;BASE64"))],
        [QUESTION],
    ),
}
"""What a client sends, and what it means."""


@pytest.mark.parametrize("messages, meant", CHATS_OF_CLIENTS.values(), ids=CHATS_OF_CLIENTS)
def test_messages_as_clients_send_them_are_taken(client, expected, messages, meant):
    assert ask(client, messages) == expected(meant)


def test_a_banned_token_is_not_written_and_a_wanted_one_is(client, served, folder, expected):
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    (token,) = tokenizer.encode("z", add_special_tokens=False)
    assert ask(client, [QUESTION], tokens=5, logit_bias={str(token): 100}) == "zzzzz"
    first = expected([QUESTION])[0]
    banned = {str(i): -100 for i in range(1024) if tokenizer.decode([i]).startswith(first)}
    assert not ask(client, [QUESTION], logit_bias=banned).startswith(first)


def test_completion_can_repeat_its_prompt(client):
    asked = dict(model="visualrwkv-tiny", prompt="User: Say yes.\n\nAssistant:", max_tokens=5)
    plain = client.completions.create(**asked).choices[0].text
    assert client.completions.create(**asked, echo=True).choices[0].text == asked["prompt"] + plain
    chunks = client.completions.create(**asked, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == asked["prompt"] + plain


def test_usage_of_a_stream_comes_when_it_is_asked_for(client):
    chunks = list(stream(client, [QUESTION], tokens=5, stream_options={"include_usage": True}))
    assert not chunks[-1].choices and chunks[-1].usage.completion_tokens == 5
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert all(chunk.usage is None for chunk in stream(client, [QUESTION], tokens=5))


NESTED: dict = {}
for _ in range(70):
    NESTED = {"items": NESTED}


def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


REFUSALS = {
    "no message": (dict(messages=[]), "messages must be a list of at least one message"),
    "no list": (dict(messages="Hello"), "messages must be a list"),
    "no role": (
        dict(messages=[{"content": "Hello"}]),
        r"messages\[0\] must be an object with role and content",
    ),
    "role": (
        dict(messages=[{"role": "robot", "content": "Hello"}]),
        "must be 'user' or 'assistant'.*got 'robot'",
    ),
    "no content": (dict(messages=[{"role": "user"}]), r"messages\[0\] must have a text or a list.*got None"),
    "number": (dict(messages=[{"role": "user", "content": 7}]), r"messages\[0\] must have a text.*got 7"),
    "audio": (
        dict(messages=[QUESTION, {"role": "user", "content": [{"type": "input_audio"}]}]),
        r"messages\[1\] has content of type 'input_audio': it can be text",
    ),
    "tool calls": (
        dict(messages=[QUESTION, {"role": "assistant", "tool_calls": [{}]}]),
        r"messages\[1\] has tool_calls, which this model cannot read",
    ),
    "forged picture": (dict(messages=[user("An <image>")]), "contains '<image>', which is reserved"),
    "not a picture": (
        dict(messages=[user("?", RED, "data:image/png;base64,AAAA")]),
        "Picture 2: .* cannot be read as a picture",
    ),
    "half a picture": (dict(messages=[user("?", RED[:-80])]), "Picture 1: .* cannot be read as a picture"),
    "a file here": (
        dict(messages=[user("?", __file__)]),
        "Picture 1: it must be a URL of http or https, or data",
    ),
    "no picture": (
        dict(messages=[user("?", None)]),
        "Picture 1: it must be given as a URL, or as data:image",
    ),
    "unreachable": (
        dict(messages=[user("?", "http://127.0.0.1:1/red.png")]),
        "Picture 1: there is no picture that can be fetched at its URL",
    ),
    "assistant's picture": (
        dict(messages=[user("?"), {"role": "assistant", "content": user("", RED)["content"]}]),
        "Only user messages can hold pictures",
    ),
    "temperature": (dict(temperature=-1), "temperature must be 0 or a number from 1e-06 to 2, got -1"),
    "warm": (dict(temperature="warm"), "temperature must be .*got 'warm'"),
    "denormal": (dict(temperature=5e-324), "temperature must be .*got 5e-324"),
    "no tokens": (dict(max_tokens=0), "max_tokens must be an integer from 1 to 4096, got 0"),
    "endless": (dict(max_tokens=10**9), "max_tokens must be an integer from 1 to 4096, got 1000000000"),
    "penalty": (dict(frequency_penalty=-3), "frequency_penalty must be a number from -2 to 2, got -3"),
    "seed": (dict(seed=2**70), "seed must be an integer from"),
    "choices": (dict(n=2), "n can only be 1 or null here, got 2"),
    "tools": (dict(tools=[{"type": "function"}]), r"tools can only be \[\] or null here"),
    "no form": (
        dict(extra_body={"structured_outputs": {}}),
        "structured_outputs must be an object with one of json, regex, choice, grammar",
    ),
    "two forms": (
        dict(extra_body={"structured_outputs": {"regex": "a", "choice": ["a"]}}),
        "structured_outputs must be an object with one of",
    ),
    "another form": (
        dict(extra_body={"structured_outputs": {"structural_tag": "a"}}),
        "structured_outputs must be an object with one of",
    ),
    "form and format": (
        dict(extra_body={"structured_outputs": {"regex": "a"}}, response_format={"type": "json_object"}),
        "An answer can have one form",
    ),
    "no choices": (
        dict(extra_body={"structured_outputs": {"choice": []}}),
        r"Choices must be a list of at least one text, got \[\]",
    ),
    "expression": (dict(extra_body={"structured_outputs": {"regex": "(a"}}), "unclosed group"),
    "grammar": (dict(extra_body={"structured_outputs": {"grammar": "start: other"}}), "unknown name"),
    "no text fits": (dict(extra_body={"structured_outputs": {"json": False}}), "No text fits"),
    "format": (dict(response_format={"type": "xml"}), "type is text, json_object or json_schema"),
    "no schema": (
        dict(response_format={"type": "json_schema", "json_schema": {"name": "a"}}),
        "response_format.json_schema must be an object of description, name, schema, strict",
    ),
    "deep schema": (dict(response_format=schema_format(NESTED)), "nested 64 levels deep"),
    "schema": (dict(response_format=schema_format({"type": "colour"})), "Invalid type: colour"),
    "schema that nothing fits": (
        dict(response_format=schema_format({"type": "integer", "minimum": 2, "maximum": 1})),
        "No text fits what the answer must look like",
    ),
    "bias list": (dict(extra_body={"logit_bias": [5]}), "logit_bias must be an object"),
    "bias key": (
        dict(logit_bias={"word": 1}),
        "A key of logit_bias must be a token id below 1024, got 'word'",
    ),
    "bias token": (dict(logit_bias={"99999": 1}), "A key of logit_bias must be a token id below 1024"),
    "bias value": (
        dict(logit_bias={"5": "x"}),
        "A value of logit_bias must be a number from -100 to 100, got 'x'",
    ),
    "stops": (dict(stop=["a"] * 17), "stop must be a text or a list of at most 16"),
    "stop": (dict(stop=["a" * 257]), "A stop string must have 1 to 256 characters"),
    "template": (
        dict(extra_body={"chat_template_kwargs": {"image_position": "top"}}),
        "image_position must be 'first', 'middle' or 'last', got 'top'",
    ),
    "field": (dict(extra_body={"colour": 1}), "Unexpected fields in the request: 'colour'"),
    "generation": (
        dict(extra_body={"generation_config": "{}"}),
        "Unexpected fields in the request: 'generation_config'",
    ),
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("fields, message", REFUSALS.values(), ids=REFUSALS)
def test_a_bad_request_is_refused_with_a_sentence(client, served, fields, message, streamed):
    asked = dict(model="visualrwkv-tiny", messages=[QUESTION], max_tokens=2, stream=streamed) | fields
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        client.chat.completions.create(**asked)
    assert refused.value.body["type"] == "invalid_request_error"
    assert "Traceback" not in str(refused.value)
    assert not served.reads


def test_a_response_that_asks_for_what_is_not_there_is_refused(client, served):
    asked = dict(model="visualrwkv-tiny", input="Hello", max_output_tokens=2)
    for fields, message in (
        (dict(input=openai.omit), "input must be a text or a list"),
        (dict(previous_response_id="resp_1"), "previous_response_id can only be null here"),
        (dict(text={"format": {"type": "xml"}}), "type is text, json_object or json_schema"),
        (dict(input=[{"type": "function_call", "name": "f"}]), "must be an object with role and content"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            client.responses.create(**asked | fields)
    assert not served.reads


def test_a_picture_that_is_not_there_or_slow_is_refused_and_nobody_waits_for_it(client, pictures, expected):
    sentence = "Picture 1: there is no picture that can be fetched at its URL."
    with pytest.raises(openai.BadRequestError, match=sentence):
        ask(client, [user("?", f"{pictures}/grey.png")])
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(ask, client, [user("?", f"{pictures}/slow.png")])
        assert ask(client, [QUESTION]) == expected([QUESTION])
        with pytest.raises(openai.BadRequestError, match=sentence):
            slow.result()


def test_requests_at_the_same_time_get_their_own_answers(client, expected):
    chats = [
        [user(f"Which colour is it, {i}?", data_url(colour))] for i, colour in enumerate(["red", "blue"] * 4)
    ]
    wanted = [expected(chat) for chat in chats]
    assert len(set(wanted)) > 4
    with ThreadPoolExecutor(len(chats)) as pool:
        streams = pool.map(lambda chat: "".join(pieces(stream(client, chat))), chats[::2])
        answers = pool.map(lambda chat: ask(client, chat), chats[1::2])
        assert list(streams) == wanted[::2]
        assert list(answers) == wanted[1::2]


def test_a_cancelled_stream_ends_its_generation(client, served, expected):
    for _ in range(3):
        with stream(client, [QUESTION], tokens=4000) as chunks:
            next(chunks), next(chunks)
    line = served.line
    wait_until(lambda: not line._waiting and line._current is None, "the end of all answers")
    assert len(served.reads) < 3 * 4000
    assert ask(client, [QUESTION]) == expected([QUESTION])


def test_seeds_belong_to_their_requests(client):
    """Six at once, twice, each time in another order of arrival: one seed, one answer."""

    def seeded(seed):
        return ask(client, [QUESTION], tokens=8, temperature=1.5, seed=seed)

    alone = [seeded(seed) for seed in range(6)]
    assert len(set(alone)) == 6
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(seeded, range(6))) == alone
        assert list(pool.map(seeded, reversed(range(6)))) == alone[::-1]
    free = [ask(client, [QUESTION], tokens=8, temperature=1.5) for _ in range(3)]
    assert len({*free, *alone}) == 9


def test_half_precision(folder):
    app = build_app(folder, dtype="bfloat16", name="half")
    assert app.state.model.dtype == torch.bfloat16
    with running(app) as url, client_of(url) as client:
        reply = client.chat.completions.create(model="half", messages=[QUESTION], max_tokens=4)
        assert reply.usage.completion_tokens == 4


def test_what_cannot_be_served_is_refused(folder, monkeypatch):
    with pytest.raises(ValueError, match=r"dtype must be one of auto, .*got 'int3'"):
        build_app(folder, dtype="int3")
    with pytest.raises(ValueError, match="no device 'abacus'"):
        build_app(folder, device="abacus")
    with pytest.raises(ValueError, match="port must be an integer from 0 to 65535, got 99999"):
        serve(folder, port=99999)
    with pytest.raises(ValueError, match="waiting must be a number above 0, got -1"):
        Limits(waiting=-1)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    with pytest.raises(ImportError, match=r"pip install 'visualrwkv-hf\[serve\]'"):
        build_app(folder)


def test_server_in_its_own_process_answers_and_ends(folder, tmp_path, expected):
    with served_apart(folder, tmp_path / "log") as (process, url), client_of(url) as client:
        assert ask(client, [QUESTION]) == expected([QUESTION])
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE)
        assert "Traceback" not in (tmp_path / "log").read_text()
