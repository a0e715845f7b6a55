"""Connections that try to hold the server: silent, slow, too many, abandoned, or open while it is stopped."""

import asyncio
import itertools
import json
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import httpx
import pytest
from patience import PATIENCE, wait_until
from serving import data_url, running, served_apart, user
from tiny_training import save_tiny_model

from visualrwkv_hf.inference import server_generation
from visualrwkv_hf.inference.server import Limits, build_app

pytest.importorskip("uvicorn", reason="needs the extra serve")

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("held") / "visualrwkv-tiny")


@pytest.fixture(scope="module")
def served(folder):
    """The model in a server with short limits, and how often it was called."""
    limits = dict(head_seconds=1, body_seconds=1, write_seconds=2, connections=24)
    app = build_app(folder, limits=Limits(**limits))
    calls = []
    app.state.model.model.language_model.register_forward_pre_hook(lambda *_: calls.append(1))
    with running(app, **limits) as url:
        yield SimpleNamespace(url=url, calls=calls, app=app, port=int(url.rpartition(":")[2]))


@contextmanager
def connected(port, *, buffer=None):
    with socket.socket() as connection:
        if buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.settimeout(PATIENCE)
        connection.connect(("127.0.0.1", port))
        yield connection


def everything_of(connection):
    """What the server says until it closes the connection."""
    data = b""
    try:
        while piece := connection.recv(2**16):
            data += piece
    except ConnectionResetError:
        pass
    return data


def request_of(body, path=CHAT, **headers):
    data = json.dumps(body).encode()
    head = {"host": "127.0.0.1", "content-type": "application/json", "content-length": len(data)} | headers
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items()), "", ""]
    return "\r\n".join(lines).encode() + data


def chat(text="Hello", **fields):
    return {"messages": [user(text, data_url("red"))], "max_tokens": 2} | fields


def endless(text="Hello", **fields):
    """A question whose answer is one letter again and again: only its length ends it, not what random weights say."""
    return chat(text, max_tokens=4000, logit_bias={"65": 100}, **fields)


def is_well(url):
    return httpx.post(url + CHAT, json=chat(), timeout=PATIENCE).json()["usage"]["completion_tokens"] <= 2


def is_idle(served):
    """Wait until no request waits for the model or is answered."""
    line = served.app.state.line
    wait_until(lambda: not line._waiting and line._current is None, "the end of all answers")
    return True


# --- silence ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [b"", b"POST /v1/chat", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: "])
def test_a_head_that_does_not_come_ends_the_connection(served, said):
    with connected(served.port) as connection:
        connection.sendall(said)
        assert everything_of(connection) == b""


def test_a_head_that_drips_ends_the_connection(served):
    with connected(served.port) as connection, pytest.raises(OSError):
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        for number in range(PATIENCE * 10):
            connection.sendall(b"X-%d: y\r\n" % number)
            time.sleep(0.1)
        pytest.fail("it may drip forever")


def test_a_head_that_drips_after_an_answer_ends_the_connection(served):
    with connected(served.port) as connection, pytest.raises(OSError):
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200")
        for number in range(PATIENCE * 10):
            connection.sendall(b"G" if not number else b"E")
            time.sleep(0.1)
        pytest.fail("it may drip forever")


def test_a_head_without_end_is_refused(served):
    with connected(served.port) as connection:
        try:
            for _ in range(2000):
                connection.sendall(b"X: " + b"y" * 1000 + b"\r\n")
        except OSError:
            return
        assert everything_of(connection).startswith(b"HTTP/1.1 400")


def test_a_body_that_does_not_come_is_refused(served):
    with connected(served.port) as connection:
        connection.sendall(request_of(chat())[:-5])
        answer = everything_of(connection)
        assert answer.startswith(b"HTTP/1.1 408") and b"did not arrive within 1 s" in answer


def test_a_refused_body_is_not_read_forever(served):
    """The refusal comes at once, and the connection ends although the body goes on."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: evil.example\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connected(served.port) as connection, pytest.raises(OSError):
        connection.sendall(head)
        assert connection.recv(2**16).startswith(b"HTTP/1.1 403")
        for _ in range(PATIENCE * 10):
            connection.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")
            time.sleep(0.1)
        pytest.fail("it is read forever")


# --- number -----------------------------------------------------------------------------------------------


def test_connections_that_are_too_many_are_told_so_and_the_others_go_on(served):
    held = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(40)]
    try:
        with connected(served.port) as connection:
            answer = everything_of(connection)
            assert (
                answer.startswith(b"HTTP/1.1 503") and json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
            )
    finally:
        for connection in held:
            connection.close()
    wait_until(lambda: httpx.get(f"{served.url}/health").status_code == 200, "a free connection")
    assert is_well(served.url)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a second address of this machine")
def test_one_address_leaves_connections_to_the_others(served):
    held = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(40)]
    try:
        with socket.create_connection(
            ("127.0.0.1", served.port), PATIENCE, source_address=("127.0.0.2", 0)
        ) as other:
            other.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            assert everything_of(other).startswith(b"HTTP/1.1 200")
    finally:
        for connection in held:
            connection.close()
    wait_until(lambda: httpx.get(f"{served.url}/health").status_code == 200, "a free connection")


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.0\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/responses HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: evil.example\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"GET http://127.0.0.1/health HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    ],
)
def test_bytes_that_are_no_request_get_a_4xx_or_no_answer(served, said):
    with connected(served.port) as connection:
        connection.sendall(said)
        connection.shutdown(socket.SHUT_WR)
        answer = everything_of(connection)
    assert not answer or answer.startswith(b"HTTP/1.1 4")
    assert is_well(served.url)


# --- abandoned --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
def test_an_abandoned_request_frees_the_model(served, stream, path):
    """Its 4000 tokens are not written: the model was called far less often when it is idle again."""
    body = {
        CHAT: endless(stream=stream),
        "/v1/completions": {"prompt": "Hello", "max_tokens": 4000, "stream": stream},
        "/v1/responses": {"input": "Hello", "max_output_tokens": 4000, "stream": stream},
    }[path]
    is_idle(served)
    served.calls.clear()
    with connected(served.port) as connection:
        connection.sendall(request_of(body, path))
        wait_until(lambda: len(served.calls) >= 5, "the beginning of an answer")
    assert is_idle(served) and len(served.calls) < 3500
    assert is_well(served.url)


LONG_PROMPT = {"prompt": "ab " * 4000, "max_tokens": 1}
"""It is read in at least ten pieces."""


@contextmanager
def held_at_first_piece(app):
    """Give an event that is set while the first piece of a prompt is read, and one that lets the reading go on."""
    reading, go_on = threading.Event(), threading.Event()

    def hold(*_):
        reading.set()
        assert go_on.wait(PATIENCE)

    hook = app.state.model.model.language_model.register_forward_hook(hold)
    try:
        yield reading, go_on
    finally:
        go_on.set()
        hook.remove()


def test_a_long_prompt_is_read_in_pieces(served):
    is_idle(served)
    served.calls.clear()
    answer = httpx.post(served.url + "/v1/completions", json=LONG_PROMPT, timeout=PATIENCE)
    assert answer.status_code == 200 and len(served.calls) >= 10


def test_an_abandoned_prompt_is_not_read_to_its_end(served):
    is_idle(served)
    served.calls.clear()
    line = served.app.state.line
    with held_at_first_piece(served.app) as (reading, _):
        with connected(served.port) as connection:
            connection.sendall(request_of(LONG_PROMPT | {"user": "leaves"}, "/v1/completions"))
            assert reading.wait(PATIENCE)
        assert line._current.cancelled.wait(PATIENCE)
    assert (
        is_idle(served) and len(served.calls) == 2
    )  # the second piece was not read: its hook comes before ours
    assert line._current is None and is_well(served.url)


def test_a_server_that_is_stopped_does_not_read_a_prompt_to_its_end(folder):
    app, calls = build_app(folder), []
    app.state.model.model.language_model.register_forward_pre_hook(lambda *_: calls.append(1))
    line = app.state.line
    with running(app) as url, held_at_first_piece(app) as (reading, go_on):
        port = int(url.rpartition(":")[2])
        with connected(port) as connection:
            connection.sendall(request_of(LONG_PROMPT, "/v1/completions"))
            assert reading.wait(PATIENCE)
            line.close()
            go_on.set()
            line.thread.join(PATIENCE)
            assert not line.thread.is_alive() and len(calls) == 2


def test_a_prompt_that_takes_too_long_is_refused(folder):
    app, calls = build_app(folder, limits=Limits(answer_seconds=1e-9)), []
    app.state.model.model.language_model.register_forward_pre_hook(lambda *_: calls.append(1))
    with running(app) as url:
        answer = httpx.post(url + "/v1/completions", json=LONG_PROMPT, timeout=PATIENCE)
    assert answer.status_code == 503 and "could not be read within 1e-09 s" in answer.text and len(calls) == 1


def test_a_request_that_leaves_before_its_turn_is_never_answered(served):
    is_idle(served)
    with connected(served.port) as first:
        first.sendall(request_of(endless(stream=True)))
        assert first.recv(100)
        for _ in range(5):
            with connected(served.port) as waiting:
                waiting.sendall(request_of(endless("Another?")))
                time.sleep(0.1)
        wait_until(lambda: not served.app.state.line._waiting, "the leaving of those who wait")
    assert is_idle(served) and is_well(served.url)


def test_bytes_after_a_request_do_not_hide_that_its_client_leaves(served):
    is_idle(served)
    served.calls.clear()
    with connected(served.port) as connection:
        connection.sendall(request_of(endless()))
        wait_until(lambda: len(served.calls) >= 5, "the beginning of an answer")
        connection.sendall(b"\r\n")
        time.sleep(0.1)
    assert is_idle(served) and len(served.calls) < 3500


def test_a_request_that_comes_early_is_answered_next(served):
    with connected(served.port) as connection:
        connection.sendall(request_of(chat()))
        time.sleep(0.05)
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        connection.sendall(b"Connection: close\r\n\r\n")
        answers = everything_of(connection)
    assert answers.count(b"HTTP/1.1 200 OK") == 2 and b"chat.completion" in answers.split(b"HTTP/1.1")[1]


def test_too_much_that_comes_early_ends_the_connection(served):
    with connected(served.port) as connection:
        connection.sendall(request_of(endless()))
        time.sleep(0.2)
        with suppress(OSError):
            connection.sendall(bytes(2**20))
        assert b"200 OK" not in everything_of(connection)
    assert is_idle(served)


def test_a_client_that_reads_nothing_does_not_hold_the_others(served):
    with connected(served.port, buffer=1024) as mute:
        mute.sendall(request_of(endless(stream=True)))
        assert is_well(served.url)


def test_a_client_that_reads_nothing_is_disconnected_after_a_time():
    """An answer without end, so that no buffer takes all of it."""
    ended = threading.Event()

    async def endless(scope, receive, send):
        if scope["type"] != "http":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})

        async def flood():
            while True:
                await send({"type": "http.response.body", "body": b"x" * 2**16, "more_body": True})
                await asyncio.sleep(0)

        task = asyncio.ensure_future(flood())
        while (await receive())["type"] != "http.disconnect":
            pass
        task.cancel()
        ended.set()

    line = SimpleNamespace(close=lambda: None, thread=threading.Thread(target=lambda: None))
    line.thread.start()
    endless.state = SimpleNamespace(line=line)
    with (
        running(endless, write_seconds=1) as url,
        connected(int(url.rpartition(":")[2]), buffer=1024) as mute,
    ):
        mute.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert ended.wait(PATIENCE)


def test_answers_have_a_longest_time(folder, monkeypatch):
    """With a clock that goes on by a second whenever it is looked at."""
    ticks = itertools.count()
    monkeypatch.setattr(server_generation, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    app = build_app(folder, limits=Limits(answer_seconds=50))
    with running(app) as url:
        answer = httpx.post(url + CHAT, json=endless(), timeout=PATIENCE).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert 0 < answer["usage"]["completion_tokens"] <= 50


# --- the end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent, code", [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 0)])
def test_a_signal_ends_the_server_while_streams_are_open(folder, tmp_path, sent, code):
    """Within the 5 seconds after which it ends itself in any case, and tells the streams."""
    with served_apart(folder, tmp_path / "log") as (process, url):
        port = int(url.rpartition(":")[2])
        with connected(port) as one, connected(port) as other, connected(port, buffer=1024) as mute:
            mute.sendall(request_of(endless(stream=True)))
            for connection in (one, other):
                connection.sendall(request_of(endless(stream=True)))
            time.sleep(1)
            process.send_signal(sent)
            assert process.wait(PATIENCE) == code
            told = everything_of(one)
            assert not told or b"The server is stopping." in told
        assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_server_that_is_stuck_ends_all_the_same(folder, tmp_path):
    """Nothing interrupts the tokenizer, here in megabytes of text; the process ends without it."""
    started = served_apart(folder, tmp_path / "log", prompt_tokens=2_000_000, body_bytes=2**26)
    with started as (process, url), connected(int(url.rpartition(":")[2])) as connection:
        connection.sendall(request_of({"prompt": "word " * 600_000, "max_tokens": 5}, "/v1/completions"))
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) in (0, 128 + signal.SIGINT)
