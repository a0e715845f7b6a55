"""The server, asked by the `openai` client: its answers are those of `generate`, whatever else happens."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import psutil
import pytest
import torch
from serving import data_url, picture_host, png, running, served_apart, user
from tiny_training import save_tiny_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from visualrwkv_hf.inference import server
from visualrwkv_hf.inference.server import build_app

openai = pytest.importorskip("openai", reason="needs the extra serve")
pytest.importorskip("fastapi", reason="needs the extra serve")

RED, GREEN = data_url("red"), data_url("green")
QUESTION = user("Which colour is it?", RED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("served") / "visualrwkv-tiny")


@pytest.fixture(scope="module")
def served(folder):
    """The model in the server, how many tokens each of its forwards read, how many pictures its tower saw."""
    app = build_app(folder)
    model, reads, pictures = app.state.model, [], []
    language_model, tower = model.model.language_model, model.model.vision_tower
    language_model.register_forward_pre_hook(
        lambda _, args, kwargs: reads.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    tower.register_forward_pre_hook(lambda _, args: pictures.append(len(args[0])))
    with running(app) as url:
        yield SimpleNamespace(url=url, model=model, reads=reads, pictures=pictures)


@pytest.fixture
def client(served):
    served.model.state_store.clear()
    served.reads.clear()
    served.pictures.clear()
    with client_of(served.url) as client:
        yield client


def client_of(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)


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
    return [
        {"type": "image", "url": part["image_url"]["url"]} if part["type"] == "image_url" else part
        for part in content
    ]


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
    return [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]


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
    parts = pieces(stream(client, messages))
    assert "".join(parts) == wanted
    assert sum(map(bool, parts)) > 3  # it came word by word


def test_picture_at_a_url_is_the_picture(client, pictures):
    answer = ask(client, [user("Which colour is it?", f"{pictures}/red.png")])
    assert answer == ask(client, [QUESTION]) != ask(client, [user("Which colour is it?", GREEN)])


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


def test_stop_ends_an_answer(client, expected):
    whole = expected([QUESTION])
    answer = ask(client, [QUESTION], stop=[whole[4]])
    assert whole[4] in answer and whole.startswith(answer) and answer != whole


def test_the_model_is_listed_and_answers_to_its_folder_too(client, folder):
    assert [model.id for model in client.models.list()] == ["visualrwkv-tiny"]
    for name in ("visualrwkv-tiny", str(folder)):
        reply = client.chat.completions.create(model=name, messages=[QUESTION], max_tokens=1)
        assert reply.model == "visualrwkv-tiny"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt' here: the model is 'visualrwkv-tiny'"):
        client.chat.completions.create(model="gpt", messages=[QUESTION])


def test_routes_that_load_and_unload_models_are_not_there(served):
    for route in ("load_model", "reset", "v1/audio/transcriptions", "v1/systemone"):
        with client_of(served.url) as client, pytest.raises(openai.NotFoundError):
            client.post(f"/../{route}", body={"model": "gpt2"}, cast_to=object)


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
    "no content": (dict(messages=[{"role": "user"}]), r"messages\[0\] must have a text, got None"),
    "number": (dict(messages=[{"role": "user", "content": 7}]), r"messages\[0\] must have a text, got 7"),
    "audio": (
        dict(messages=[QUESTION, {"role": "user", "content": [{"type": "input_audio"}]}]),
        r"messages\[1\] has content of type 'input_audio': it can be text",
    ),
    "forged picture": (dict(messages=[user("An <image>")]), "contains '<image>', which is reserved"),
    "not a picture": (
        dict(messages=[user("?", RED, "data:image/png;base64,AAAA")]),
        "Picture 1: .* cannot be read as a picture",
    ),
    "half a picture": (dict(messages=[user("?", RED[:-80])]), "Picture 0: .* cannot be read as a picture"),
    "a file here": (
        dict(messages=[user("?", __file__)]),
        r"Picture 0: it must be a URL or data:image.*test_serve\.py",
    ),
    "no picture": (dict(messages=[user("?", None)]), "Picture 0: it must be a URL or data:image.*got 'None'"),
    "unreachable": (dict(messages=[user("?", "http://127.0.0.1:1/red.png")]), "Picture 0: .*connection"),
    "assistant's picture": (
        dict(messages=[user("?"), {"role": "assistant", "content": user("", RED)["content"]}]),
        "Only user messages can hold pictures",
    ),
    "temperature": (dict(temperature=-1), "temperature must be a number from 0 to 2, got -1"),
    "warm": (dict(temperature="warm"), "temperature must be a number from 0 to 2, got 'warm'"),
    "no tokens": (dict(max_tokens=0), "max_tokens must be a number from 1 to inf, got 0"),
    "penalty": (dict(frequency_penalty=-2), "frequency_penalty must be a number from -0.9 to 2, got -2"),
    "choices": (dict(n=2), "n can only be 1 here, got 2"),
    "tools": (dict(tools=[{"type": "function"}]), r"tools can only be \[\] here"),
    "template": (
        dict(extra_body={"chat_template_kwargs": {"image_position": "top"}}),
        "image_position must be 'first', 'middle' or 'last', got 'top'",
    ),
    "field": (dict(extra_body={"colour": 1}), "Unexpected fields in the request: {'colour'}"),
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("fields, message", REFUSALS.values(), ids=REFUSALS)
def test_a_bad_request_is_refused_with_a_sentence(client, served, fields, message, streamed):
    asked = dict(model="visualrwkv-tiny", messages=[QUESTION], max_tokens=2, stream=streamed) | fields
    with pytest.raises((openai.BadRequestError, openai.UnprocessableEntityError), match=message) as refused:
        client.chat.completions.create(**asked)
    assert refused.value.body["type"] == "invalid_request_error"
    assert "Traceback" not in str(refused.value)
    assert not served.reads


def test_a_picture_that_is_not_there_or_slow_is_refused_and_nobody_waits_for_it(
    client, pictures, expected, monkeypatch
):
    with pytest.raises(openai.BadRequestError, match=r"Picture 0: .*404 Not Found.*/grey\.png"):
        ask(client, [user("?", f"{pictures}/grey.png")])
    monkeypatch.setattr(server, "SECONDS_FOR_A_PICTURE", 3)
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(ask, client, [user("?", f"{pictures}/slow.png")])
        assert ask(client, [QUESTION]) == expected([QUESTION])
        assert not slow.done()
        with pytest.raises(openai.BadRequestError, match=r"Picture 0: .*slow\.png took longer than 3 s"):
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
        # Random words end within a character, which a stream waits for.
        assert list(streams) == [answer.rstrip("\ufffd") for answer in wanted[::2]]
        assert list(answers) == wanted[1::2]


def test_a_cancelled_stream_ends_its_generation(client, served, expected):
    for _ in range(3):
        with stream(client, [QUESTION], tokens=100_000) as chunks:
            next(chunks), next(chunks)
    deadline, seen = time.monotonic() + 20, -1
    while seen != len(served.reads):
        assert time.monotonic() < deadline
        seen = len(served.reads)
        time.sleep(0.3)
    assert ask(client, [QUESTION]) == expected([QUESTION])


def test_half_precision(folder):
    app = build_app(folder, dtype="bfloat16", name="half")
    assert app.state.model.dtype == torch.bfloat16
    with running(app) as url, client_of(url) as client:
        reply = client.chat.completions.create(model="half", messages=[QUESTION], max_tokens=4)
        assert reply.usage.completion_tokens == 4


def test_what_cannot_be_served_is_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"dtype must be one of auto, .*got 'int3'"):
        build_app(folder, dtype="int3")
    with pytest.raises(ValueError, match="no device 'abacus'"):
        build_app(folder, device="abacus")
    monkeypatch.setattr(server, "is_serve_available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install 'visualrwkv-hf\[serve\]'"):
        build_app(folder)


def test_server_in_its_own_process_answers_and_ends(folder, tmp_path, expected):
    with served_apart(folder, tmp_path / "log") as (process, url), client_of(url) as client:
        assert ask(client, [QUESTION]) == expected([QUESTION])
        process.send_signal(signal.SIGINT)
        process.wait(120)
        assert "Traceback" not in (tmp_path / "log").read_text()


# --- the soak -----------------------------------------------------------------------------------------


def soak(client, number):
    """One question of a kind that depends on its number. All answers are looked at."""
    colour = (
        f"#{number * 2654435761 % 0xFFFFFF:06x}"  # another picture each time: no state of an earlier one fits
    )
    first = user(f"Which colour is it, {number}?", data_url(colour, width=400, height=300))
    match number % 5:
        case 0:
            assert ask(client, [user(f"Count to {number}.")], tokens=4)
        case 1:
            assert ask(client, [first], tokens=4)
        case 2:
            assert "".join(pieces(stream(client, [first], tokens=4)))
        case 3:
            answer = ask(client, [first], tokens=4)
            assert ask(client, [first, {"role": "assistant", "content": answer}, user("Sure?")], tokens=4)
        case 4:
            with stream(client, [first], tokens=1000) as chunks:
                next(chunks)
            with pytest.raises(openai.BadRequestError):
                ask(client, [user("?", data_url(colour)[:-80])])


@pytest.mark.soak
def test_a_thousand_questions_leave_the_server_as_it_was(folder, tmp_path, questions=1000):
    with served_apart(folder, tmp_path / "log") as (process, url), client_of(url) as client:
        memory = psutil.Process(process.pid).memory_info

        def ask_all(numbers):
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(lambda number: soak(client, number), numbers))
            png.cache_clear()
            return memory().rss / 2**20

        # The warm-up fills the store of states, the allocator's arenas and Python's caches.
        before = ask_all(range(questions, questions + 300))
        started = time.monotonic()
        after = ask_all(range(questions))
        seconds = time.monotonic() - started
        threads = psutil.Process(process.pid).num_threads()
    print(
        f"{questions} questions in {seconds:.0f} s: {before:.1f} MiB before, {after:.1f} MiB after, {threads} threads"
    )
    # A decoded picture takes 0.34 MiB: one kept for each question would be more than 200 MiB.
    assert after - before < 16
    assert threads < 40
