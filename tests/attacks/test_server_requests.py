"""Requests that attack the server: each gets a sentence, reads no file of the machine and takes no memory."""

import asyncio
import base64
import io
import json
import struct
import tracemalloc
import zlib
from contextlib import suppress

import httpx
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import PATIENCE
from PIL import Image
from serving import data_url, running, user
from tiny_training import save_tiny_model, tiny_model, tiny_processor

from visualrwkv_hf.image_processing_visualrwkv import image_processor_for
from visualrwkv_hf.inference.server import Access, Limits, build_app
from visualrwkv_hf.inference.server_decisions import decision_config
from visualrwkv_hf.inference.server_limits import Refusal
from visualrwkv_hf.inference.server_messages import bytes_of_base64
from visualrwkv_hf.inference.server_requests import FIELDS, Rules, parse_json, read_request

pytest.importorskip("uvicorn", reason="needs the extra serve")

MEBI = 2**20
LIMITS = Limits(prompt_tokens=2000, picture_pixels=4_000_000, body_bytes=4 * MEBI, new_tokens=4000)
KEYS = ("first-key", "second-key")
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    return build_app(save_tiny_model(tmp_path_factory.mktemp("attacked") / "visualrwkv-tiny"), limits=LIMITS)


@pytest.fixture(scope="module")
def client(app):
    with running(app) as url, httpx.Client(base_url=url, timeout=PATIENCE) as client:
        yield client


def chat(*messages, **fields):
    return {"messages": list(messages) or [user("Hello")], "max_tokens": 2} | fields


def refused(response, *words, status=400):
    """The sentence with which a request was refused."""
    assert response.status_code == status, response.text
    message = response.json()["error"]["message"]
    assert all(word in message for word in words), message
    assert len(message) < 700 and "\n" not in message
    return message


def is_well(client):
    """Whether the server answers as ever."""
    return client.post(CHAT, json=chat()).json()["usage"]["completion_tokens"] <= 2


# --- the chat template -------------------------------------------------------------------------------------

LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "variable, value",
    [
        ("processor_kwargs", {"images": ["/etc/hostname"]}),
        ("chat_template", LOOPS),
        ("padding", "max_length"),
        ("max_length", 10_000_000),
        ("tokenize", False),
        ("messages", []),
        ("tools", [{}]),
        ("return_tensors", "np"),
        ("raise_exception", 1),
        ("", 1),
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/responses"])
def test_only_the_template_s_own_variables_are_taken(client, path, variable, value):
    body = chat() if path == CHAT else {"input": "Hello"}
    body["chat_template_kwargs"] = {variable: value}
    message = refused(client.post(path, json=body), repr(variable), "image_position, sandwich_history")
    assert "etc" not in message


@pytest.mark.parametrize(
    "variables",
    [
        {"image_position": ["first"]},
        {"image_position": 1},
        {"sandwich_history": "yes"},
        {"sandwich_history": 1},
        "first",
        [1],
    ],
)
def test_variables_have_their_types(client, variables):
    refused(client.post(CHAT, json=chat(chat_template_kwargs=variables)), "must be")


def test_a_client_s_own_template_is_refused(client):
    refused(client.post(CHAT, json=chat(chat_template=LOOPS)), "Unexpected fields", "'chat_template'")


# --- files of the server -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "../../secret.png",
        "data:text/plain;base64,AAAA",
        "data:image/png,AAAA",
        "data:image/png;base64",
        "ftp://example.org/a.png",
        " http://example.org/a.png",
        "gopher://example.org",
        "",
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==",
    ],
)
def test_a_picture_is_a_url_of_the_web_or_data(client, url):
    message = refused(client.post(CHAT, json=chat(user("?", url))), "Picture 1: it must be")
    assert not url.strip() or url not in message


@pytest.mark.parametrize("extra", [{"path": "/etc/passwd"}, {"image": "/etc/passwd"}, {"url": "/etc/passwd"}])
def test_content_has_no_other_keys(client, extra):
    for part in (
        {"type": "text", "text": "a"} | extra,
        {"type": "image_url", "image_url": data_url("red")} | extra,
    ):
        refused(client.post(CHAT, json=chat({"role": "user", "content": [part]})), "unexpected fields")
    part = {"type": "image"} | extra
    refused(client.post(CHAT, json=chat({"role": "user", "content": [part]})), "content of type 'image'")


@pytest.mark.parametrize("text", ["{}", "%20{}%0a", " {}\n\f"])
def test_base64_may_be_escaped_and_have_spaces(text):
    content = bytes(range(256)) + b"=?"
    coded = base64.b64encode(content).decode()
    assert bytes_of_base64(text.format(coded)) == content
    assert (
        bytes_of_base64(text.format(coded.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D")))
        == content
    )
    with pytest.raises(ValueError):
        bytes_of_base64(text.format(coded[:-1] + "ü"))


@pytest.mark.parametrize("text", ["%41", "AA ", "%2B", "%0A", "%%2"])
def test_base64_takes_a_few_times_its_length(text):
    text *= 2**20 // 3
    tracemalloc.start()
    with suppress(ValueError):
        bytes_of_base64(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * len(text)


def test_half_characters_are_refused(client):
    said = b'{"prompt": "a\\ud800", "max_tokens": 1}'
    answer = client.post("/v1/completions", content=said, headers={"content-type": "application/json"})
    refused(answer, "holds half of a character")


def slow_jpegs():
    Image.new("L", (8, 8)).save(file := io.BytesIO(), "JPEG", progressive=True)
    whole = file.getvalue()
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    exif = b"\xff\xe1\x00\x08Exif\x00\x00"
    return {"scans": whole[:-2] + scan * 200 + whole[-2:], "exif": whole[:2] + exif * 100 + whole[2:]}


def tiff_of_one_pixel(tile):
    """A TIFF whose only tile has so many pixels on each side."""
    data = zlib.compress(bytes(tile * tile) if tile < 1000 else b"")
    shorts = {
        256: 1,
        257: 1,
        258: 8,
        259: 8,
        262: 1,
        277: 1,
    }  # width, height, bits, deflate, grey, one channel
    longs = {322: tile, 323: tile, 324: 8 + 2 + 12 * 10 + 4, 325: len(data)}
    fields = [struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in shorts.items()]
    fields += [struct.pack("<HHII", tag, 4, 1, value) for tag, value in longs.items()]
    return b"II" + struct.pack("<HIH", 42, 8, len(fields)) + b"".join(fields) + bytes(4) + data


def test_a_small_tiff_of_a_huge_tile_is_refused(client):
    """Its tile would be decoded in full: 875 kB took 900 MB."""

    def asked(tile):
        url = "data:image/tiff;base64," + base64.b64encode(tiff_of_one_pixel(tile)).decode()
        return client.post(CHAT, json=chat(user("What is it?", url)))

    assert asked(16).status_code == 200
    refused(asked(30_000), "a TIFF with tiles of 30000 x 30000 pixels")


@pytest.mark.parametrize("kind", ["scans", "exif"])
def test_a_jpeg_of_very_many_parts_is_refused(client, kind):
    """Each of 500,000 scans is as much work as the picture; pieces of EXIF data are joined one after the other."""
    url = "data:image/jpeg;base64," + base64.b64encode(slow_jpegs()[kind]).decode()
    refused(client.post(CHAT, json=chat(user("What is it?", url))), "more than 32 scans")


def test_what_a_data_url_holds_is_never_quoted(client):
    for secret in ("data:image/png;base64,U2VjcmV0U2VjcmV0U2VjcmV0", "data:image/png;base64,Secret*Secret"):
        message = refused(client.post(CHAT, json=chat(user("?", secret))), "Picture 1: ")
        assert "ecret" not in message and "U2Vj" not in message


# --- sizes -------------------------------------------------------------------------------------------------


def bomb(width, height):
    """A PNG of one colour, whose pixels take a thousand times its bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    compressor = zlib.compressobj(9)
    row = b"\0" * (width * 3 + 1)
    pixels = b"".join([compressor.compress(row) for _ in range(height)]) + compressor.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def as_url(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def test_a_picture_of_too_many_pixels_is_not_decoded(client):
    process = psutil.Process()
    is_well(client)
    before = process.memory_info().rss
    picture = as_url(bomb(9000, 9000))  # 243 MB
    part = {"type": "input_image", "image_url": picture}
    asked = {
        CHAT: chat(user("?", picture)),
        "/v1/responses": {"input": [{"role": "user", "content": [part]}]},
    }
    for path, body in asked.items():
        for stream in (False, True):
            refused(client.post(path, json=body | {"stream": stream}), "Picture 1: ", "9000 x 9000")
    assert process.memory_info().rss - before < 100 * MEBI
    assert is_well(client)


def test_pictures_of_a_request_together_have_a_limit(client):
    picture = as_url(bomb(1900, 1900))
    refused(client.post(CHAT, json=chat(user("?", *[picture] * 5))), "Picture 5: ")
    refused(client.post(CHAT, json=chat(user("?", *[data_url("red")] * 17))), "at most 16 pictures")


@pytest.fixture(scope="module")
def tiled_client(tmp_path_factory):
    """Of a model whose pictures are enlarged to whole tiles of 56 x 56 pixels, 16 tokens each."""
    siglip = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    tower = siglip | dict(image_size=56, patch_size=14)
    model = tiny_model(7, vision_config={"siglip_config": tower}, scan="unidirectional")
    processor = tiny_processor(model)
    processor.image_processor = image_processor_for(model.config, "closest")
    folder = tmp_path_factory.mktemp("tiled")
    for part in (model, processor):
        part.save_pretrained(folder)
    with (
        running(build_app(folder, limits=LIMITS)) as url,
        httpx.Client(base_url=url, timeout=PATIENCE) as client,
    ):
        yield client


@pytest.mark.parametrize(
    "size, sentence",
    [
        ((4_000_000, 1), "would be resized to 4000024 x 56; at most 178,956,970 are cut into tiles"),
        ((1, 700_000), "tiles have 39,200,000 pixels, they can have 32,000,000"),
        ((1900, 1900), "The pictures have 18496 tokens, a prompt can have 2000"),
    ],
)
def test_a_picture_that_becomes_large_is_refused_before_it_does(tiled_client, size, sentence, monkeypatch):
    """A row of 4,000,000 pixels, 4 kB as a file, would become 224 million pixels, and 2.7 GB of numbers."""
    monkeypatch.setattr("visualrwkv_hf.image_processing_visualrwkv.squash", None)
    refused(tiled_client.post(CHAT, json=chat(user("?", as_url(bomb(*size))))), sentence)


@pytest.mark.parametrize("kind", ["PPM", "EPS", "PDF", "ICO", "TGA", "PCX", "SGI"])
def test_other_formats_are_refused(client, kind):
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, kind)
    refused(client.post(CHAT, json=chat(user("?", as_url(file.getvalue())))), "Picture 1: ")


def test_bodies_have_a_limit_whether_they_say_their_length_or_not(client):
    large = json.dumps(chat(user("x" * 5 * MEBI))).encode()
    head = {"content-type": "application/json"}
    refused(client.post(CHAT, content=large, headers=head), f"{4 * MEBI} bytes", status=413)
    pieces = (large[i : i + 2**16] for i in range(0, len(large), 2**16))
    refused(client.post(CHAT, content=pieces, headers=head), f"{4 * MEBI} bytes", status=413)
    assert is_well(client)


def test_json_of_millions_of_values_is_not_parsed():
    for body in (
        b'{"a":[' + b"{}," * 10_000_000 + b"{}]}",
        b"[" * 30_000_000,
        b'{"a":[' + b"1," * 10_000_000 + b"1]}",
    ):
        tracemalloc.start()
        try:
            with pytest.raises(Refusal, match="too many values"):
                parse_json(body, Limits())
            assert tracemalloc.get_traced_memory()[1] < MEBI
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"messages": ' + b"[" * 100_000,
        b'{"max_tokens": Infinity}',
        b'{"temperature": NaN}',
        b'{"max_tokens": ' + b"9" * 10_000 + b"}",
    ],
    ids=range(11),
)
def test_a_body_that_is_no_json_object_is_refused(client, body):
    refused(
        client.post(CHAT, content=body, headers={"content-type": "application/json"}),
        "must be JSON" if body not in (b"[]", b"null", b'"text"') else "must be a JSON object",
    )


def test_other_content_types_are_refused(client):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        response = client.post(CHAT, content=json.dumps(chat()), headers={"content-type": kind})
        refused(response, "application/json", status=415)


def test_long_text_is_refused_before_it_is_tokenized(client, app, monkeypatch):
    tokenizer = app.state.line._work.processor.tokenizer
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *_, **__: pytest.fail("tokenized"))
    text = "word " * 60_000
    refused(client.post(CHAT, json=chat(user(text))), "300000 characters", "32000")
    refused(client.post("/v1/completions", json={"prompt": text}), "300000 characters")
    refused(client.post("/v1/responses", json={"input": text}), "300000 characters")
    refused(client.post("/v1/responses", json={"input": "a", "instructions": text}), "300001 characters")
    many = [{"role": "user", "content": ""}] * 3000
    refused(client.post(CHAT, json=chat(*many)), "3000 messages")


def test_a_prompt_of_too_many_tokens_is_not_read(client):
    refused(client.post(CHAT, json=chat(user("é1" * 5000))), "tokens, it can have 1 to 2000")
    refused(client.post("/v1/completions", json={"prompt": ""}), "The prompt has 0 tokens")


# --- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "path, fields",
    [
        (CHAT, '"max_tokens": 1e400'),
        (CHAT, '"max_tokens": 1.5'),
        (CHAT, '"max_tokens": ' + "[" * 900 + "]" * 900),
        (CHAT, '"messages": ' + "[" * 900 + "]" * 900),
        (CHAT, '"chat_template_kwargs": {"image_position": ' + "[" * 900 + "]" * 900 + "}"),
        (CHAT, '"max_tokens": true'),
        (CHAT, '"temperature": 5e-324'),
        (CHAT, '"temperature": 1e-300'),
        (CHAT, '"top_p": -0.1'),
        (CHAT, '"logit_bias": {"5": true}'),
        (CHAT, '"logit_bias": {"-1": 1}'),
        (CHAT, '"logit_bias": {"٣": 1}'),
        (CHAT, '"stop": [""]'),
        (CHAT, '"stop": {"a": 1}'),
        (CHAT, '"generation_config": "{\\"max_new_tokens\\": 1000000}"'),
        (CHAT, '"top_k": 5'),
        (CHAT, '"seed": "1"'),
        (CHAT, '"stream_options": 7'),
        (CHAT, '"presence_penalty": "high"'),
        ("/v1/completions", '"echo": "yes"'),
        ("/v1/completions", '"suffix": "end"'),
        ("/v1/completions", '"best_of": 2'),
        ("/v1/completions", '"prompt": ["a", "b"]'),
        ("/v1/responses", '"previous_response_id": "resp_0"'),
        ("/v1/responses", '"text": {"format": {"type": "json_schema"}}'),
        ("/v1/responses", '"background": true'),
        ("/v1/responses", '"truncation": "auto"'),
        ("/v1/responses", '"input": 7'),
        ("/v1/responses", '"input": []'),
        ("/v1/responses", '"input": [{"type": "reasoning"}]'),
        ("/v1/responses", '"input": null'),
    ],
)
def test_values_are_refused_before_an_answer_begins(client, path, fields, stream):
    starts = {
        CHAT: '"messages": [{"role": "user", "content": "Hi"}]',
        "/v1/completions": '"prompt": "Hi"',
        "/v1/responses": '"input": "Hi"',
    }
    body = f'{{{starts[path]}, "stream": {json.dumps(stream)}, {fields}}}'
    response = client.post(path, content=body.encode(), headers={"content-type": "application/json"})
    refused(response)
    assert response.headers["content-type"] == "application/json"


def test_half_characters_are_refused_and_can_be_reported(client):
    for body in (
        chat({"role": "user", "content": "a\ud800"}),
        chat({"role": "\udfff", "content": "a"}),
        chat(stop="\ud800"),
    ):
        response = client.post(CHAT, content=json.dumps(body), headers={"content-type": "application/json"})
        assert response.status_code in (200, 400), response.text
    body = json.dumps(chat(model="\ud800"))
    refused(
        client.post(CHAT, content=body, headers={"content-type": "application/json"}), "no model", status=404
    )
    assert is_well(client)


# --- who asks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.example"]
)
@pytest.mark.parametrize("path", ["/health", "/v1/models", CHAT])
def test_a_page_of_another_name_is_refused(client, path, host):
    response = client.request("POST" if path == CHAT else "GET", path, headers={"host": host})
    refused(response, "Host", status=403)


def test_nobody_may_read_answers_across_origins(client):
    response = client.options(
        CHAT, headers={"origin": "http://evil.example", "access-control-request-method": "POST"}
    )
    assert "access-control-allow-origin" not in response.headers
    assert (
        "access-control-allow-origin"
        not in client.get("/v1/models", headers={"origin": "http://evil.example"}).headers
    )


def test_a_key_is_asked_for(app, tmp_path):
    from starlette.applications import Starlette
    from starlette.middleware import Middleware

    from visualrwkv_hf.inference.server_routes import EXCEPTION_HANDLERS, Gate

    guarded = Starlette(
        routes=app.routes,
        middleware=[Middleware(Gate, access=Access(api_keys=KEYS))],
        exception_handlers=EXCEPTION_HANDLERS,
    )
    guarded.state.line = app.state.line
    transport = httpx.ASGITransport(guarded)

    async def ask(key):
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            head = {} if key is None else {"authorization": key.encode("latin-1")}
            assert (await client.get("/health", headers=head)).status_code == 200
            return (await client.get("/v1/models", headers=head)).status_code

    async def ask_all(keys):
        return [await ask(key) for key in keys]

    wrong = [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer first-ke",
        "Bearer first-keyy",
        "Basic first-key",
        "Bearer first-key second-key",
        "Bearer ä",
    ]
    assert asyncio.run(ask_all(wrong)) == [401] * len(wrong)
    assert asyncio.run(ask_all(["Bearer first-key", "bearer second-key"])) == [200, 200]


def test_nobody_is_two_clients_by_a_second_key():
    """The gate would look at one header, and who keeps the turns at the other."""
    from visualrwkv_hf.inference.server_routes import Gate

    headers = [
        (b"host", b"127.0.0.1"),
        *((b"authorization", f"Bearer {key}".encode()) for key in ("x", KEYS[0])),
    ]
    refusal = Gate(app=None, access=Access(api_keys=KEYS))._refusal(
        {"path": "/v1/models", "headers": headers}
    )
    assert refusal is not None and refusal.status == 400


def test_clients_do_not_go_on_from_one_another_s_states(app, client):
    """What one has sent makes no difference to another one, who could tell it from the time."""
    app.state.model.state_store.clear()
    reads = []
    hook = app.state.model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: reads.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )

    def tokens_read(salt):
        reads.clear()
        client.post(CHAT, json=chat(user("Is it red?", data_url("red")), prompt_cache_key=salt, max_tokens=1))
        return sum(reads)

    try:
        first = tokens_read("one")
        assert tokens_read("one") < first / 2
        assert tokens_read("two") == first
    finally:
        hook.remove()


def test_scopes_are_keys_or_addresses(app):
    from starlette.requests import Request

    from visualrwkv_hf.inference.server_routes import Service

    def client_of(access, key, host):
        scope = {
            "type": "http",
            "headers": [(b"authorization", f"Bearer {key}".encode())],
            "client": (host, 1),
        }
        return Service(app.state.line, None, Limits(), access).client_of(Request(scope))

    keys, none = Access(api_keys=KEYS), Access()
    assert (
        client_of(keys, KEYS[0], "10.0.0.1")
        == client_of(keys, KEYS[0], "10.0.0.2")
        != client_of(keys, KEYS[1], "10.0.0.1")
    )
    assert (
        client_of(none, KEYS[0], "10.0.0.1")
        == client_of(none, KEYS[1], "10.0.0.1")
        != client_of(none, KEYS[0], "10.0.0.2")
    )


# --- anything ----------------------------------------------------------------------------------------------

RULES = Rules(
    LIMITS,
    "model",
    frozenset({"alias"}),
    1024,
    {"image_position": str, "sandwich_history": bool},
    decision_config(""),
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["user", "auto", "none", "data:image/png;base64,AAAA", "http://a/b"]),
)
keys = st.one_of(
    st.text(max_size=6),
    st.sampled_from(
        [
            "role",
            "content",
            "type",
            "text",
            "image_url",
            "url",
            "format",
            "include_usage",
            "image_position",
            "video",
            "num_frames",
            "tool_calls",
            "effort",
        ]
    ),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)),
    max_leaves=10,
)
parts = st.fixed_dictionaries(
    {
        "type": st.sampled_from(
            ["text", "image_url", "input_image", "input_text", "output_text", "video_url", "x"]
        )
    },
    optional={"text": values, "image_url": values, "video_url": values, "detail": values},
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "developer", "tool"])},
    optional={
        "content": st.one_of(values, st.lists(parts, max_size=3)),
        "type": values,
        "refusal": values,
        "tool_calls": values,
    },
)


@settings(max_examples=400, derandomize=True, deadline=None, database=None)
@given(kind=st.sampled_from(sorted(FIELDS)), data=st.data())
def test_any_request_is_read_or_refused(kind, data):
    names = data.draw(st.lists(st.sampled_from([*FIELDS[kind], "other"]), max_size=4, unique=True))
    lists = st.one_of(values, st.lists(messages, max_size=3))
    body = {name: data.draw(lists if name in ("messages", "input") else values) for name in names}
    body.setdefault(
        {"chat": "messages", "completion": "prompt", "response": "input"}.get(kind, "state"), "Hello"
    )
    try:
        asked = read_request(kind, body, RULES)
    except Refusal as refusal:
        message = str(refusal)
        assert message.endswith(".") and len(message) < 700 and "AAAA" not in message
    else:
        assert 1 <= asked.new_tokens <= LIMITS.new_tokens
