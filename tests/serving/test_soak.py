"""The server for a long time: fifty clients who ask, stream, leave, and send what is no request, all at once.

    pytest -s -m soak tests/serving/test_soak.py --soak-requests 10000

No request may be lost, the server's memory must stay, and it must answer `/health` all the while.
"""

import json
import random
import socket
import statistics
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from film_files import about_film, film_url, gif
from serving import data_url, png, served_apart, user
from tiny_training import save_tiny_model

pytest.importorskip("uvicorn", reason="needs the extra serve")

CLIENTS = 50
CHAT = "/v1/chat/completions"
SECONDS = 900
"""A request that takes longer is taken to be lost."""


class Client:
    """One of those who ask. Every method is one request; it fails if the answer is not what it must be."""

    def __init__(self, url: str, seed: int):
        self.http = httpx.Client(base_url=url, timeout=SECONDS)
        self.port = int(url.rpartition(":")[2])
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()

    def question(self, **fields) -> dict:
        """A question about a picture that nobody has seen, so that no state fits."""
        colour, number = f"#{self.random.randrange(2**24):06x}", self.random.randrange(10**9)
        url = data_url(colour, width=400, height=300)
        png.cache_clear()
        return {"messages": [user(f"Which colour is it, {number}?", url)], "max_tokens": 4} | fields

    def whole(self, body: dict, path: str = CHAT) -> dict:
        response = self.http.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def text(self) -> None:
        body = {"prompt": f"Count to {self.random.randrange(10**9)}.", "max_tokens": 4}
        assert self.whole(body, "/v1/completions")["usage"]["completion_tokens"] <= 4

    def picture(self) -> None:
        assert self.whole(self.question())["choices"][0]["finish_reason"] in ("stop", "length")

    def seeded(self) -> None:
        body = self.question(temperature=1.2, seed=self.random.randrange(2**40))
        once, again = (self.whole(body)["choices"][0]["message"]["content"] for _ in range(2))
        assert once == again

    def follow_up(self) -> None:
        body = self.question()
        answer = self.whole(body)["choices"][0]["message"]
        body["messages"] += [{"role": "assistant", "content": answer["content"]}, user("Sure?")]
        self.whole(body)

    def stream(self) -> None:
        body = self.question(stream=True, stream_options={"include_usage": True})
        with self.http.stream("POST", CHAT, json=body) as response:
            lines = [line for line in response.iter_lines() if line]
        assert response.status_code == 200 and lines[-1] == "data: [DONE]"
        events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        assert events[-1]["usage"]["completion_tokens"] <= 4
        assert [event["choices"][0]["finish_reason"] for event in events[:-1]][-1] in ("stop", "length")

    def leave(self) -> None:
        """Close the connection some time after a long answer was asked for, streamed or not."""
        body = json.dumps(self.question(max_tokens=4000, stream=self.random.random() < 0.5)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
            connection.sendall(body[: self.random.choice([len(body) // 2, len(body), len(body)])])
            time.sleep(self.random.random() * 0.5)

    def film(self) -> None:
        """Ask about a film, or about the beginning of one, which is read or refused."""
        whole = gif(self.random.randrange(2, 20))
        cut = whole[: self.random.choice([len(whole), self.random.randrange(len(whole))])]
        response = self.http.post(
            CHAT, json={"messages": [about_film("What moves?", film_url(cut))], "max_tokens": 4}
        )
        assert response.status_code == 200 or (response.status_code == 400 and len(cut) < len(whole))

    def decision(self) -> None:
        colour = f"#{self.random.randrange(2**24):06x}"
        asset = {"type": "image", "data_base64": data_url(colour).partition(",")[2]}
        question = {"type": "choice", "instructions": "Which is it?", "criteria": {"red": None, "blue": None}}
        body = {
            "state": "It is photo-1",
            "assets": {"photo-1": asset},
            "questions": {"a": question, "b": question},
        }
        assert self.whole(body, "/v1/systemone")["answers"].keys() == {"a", "b"}

    def bad(self) -> None:
        """Send what must be refused."""
        broken = self.question()
        picture = broken["messages"][0]["content"][0]["image_url"]
        picture["url"] = picture["url"][: -self.random.randrange(40, 200)]
        body, status = self.random.choice(
            [
                (broken, 400),
                (self.question(temperature=-1), 400),
                (self.question(max_tokens=10**12), 400),
                (self.question(chat_template_kwargs={"processor_kwargs": {"images": ["/etc/passwd"]}}), 400),
                (self.question(model="another"), 404),
                ({"messages": [user("?", "http://127.0.0.1:1/")]}, 400),
                ({"messages": [{"role": "robot", "content": "Hi"}]}, 400),
                ({"messages": 7}, 400),
            ]
        )
        response = self.http.post(CHAT, json=body)
        assert response.status_code == status and response.json()["error"]["message"].endswith((".", "..."))

    KINDS = (text, picture, seeded, follow_up, stream, leave, bad) * 4 + (film, decision)

    def ask(self, count: int) -> Counter[str]:
        """Send `count` requests of random kinds, and return how many of each were answered as they must be."""
        for _ in range(count):
            kind = self.random.choice(self.KINDS)
            kind(self)
            self.done[kind.__name__] += 1
        return self.done


def ask_all(url: str, count: int, seed: int) -> Counter[str]:
    """Let all clients ask at once."""
    clients = [Client(url, seed + number) for number in range(CLIENTS)]
    shares = [count // CLIENTS + (number < count % CLIENTS) for number in range(CLIENTS)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        return sum(pool.map(Client.ask, clients, shares), Counter())


def watch_health(url: str, times: list[float], stop: threading.Event) -> None:
    """Ask for the server's health again and again, and note how many seconds each answer took."""
    with httpx.Client(base_url=url, timeout=SECONDS) as http:
        while not stop.wait(0.05):
            started = time.monotonic()
            assert http.get("/health").json() == {"status": "ok"}
            times.append(time.monotonic() - started)


@pytest.mark.soak
def test_many_requests_leave_the_server_as_it_was(tmp_path, pytestconfig):
    requests = pytestconfig.getoption("--soak-requests")
    folder = save_tiny_model(tmp_path / "visualrwkv-tiny")
    with served_apart(folder, tmp_path / "log") as (server, url):
        process = psutil.Process(server.pid)

        def resident() -> float:
            return process.memory_info().rss / 2**20

        # The warm-up fills the store of states, the allocator's arenas and Python's caches.
        ask_all(url, max(300, requests // 10), seed=10**6)
        before, times, stop = resident(), [], threading.Event()
        with ThreadPoolExecutor(1) as pool:
            watching = pool.submit(watch_health, url, times, stop)
            started = time.monotonic()
            try:
                done = ask_all(url, requests, seed=0)
            finally:
                stop.set()
            watching.result()
        seconds, after = time.monotonic() - started, resident()
        threads, files = process.num_threads(), process.num_fds()
        log = (tmp_path / "log").read_text()
    p50, p99 = statistics.median(times), statistics.quantiles(times, n=100)[98]
    print(
        f"\n{done.total()} requests of {CLIENTS} clients in {seconds:.0f} s ({dict(done)}): "
        f"{before:.0f} MiB before, {after:.0f} MiB after; /health {len(times)} times, median {1e3 * p50:.0f} ms, "
        f"p99 {1e3 * p99:.0f} ms; {threads} threads, {files} open files"
    )
    assert done.total() == requests
    assert "Traceback" not in log
    # A decoded picture takes 0.34 MiB: one kept for each request would be hundreds of MiB.
    assert after - before < 24
    assert threads < 40 and files < 100
