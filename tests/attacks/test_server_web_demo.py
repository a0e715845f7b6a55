"""The web demo attacked: what a stranger sends in the place of an uploaded picture is not opened."""

import contextlib
import importlib.util
import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from browser import DEMO, running_demo
from film_files import gif
from patience import PATIENCE
from serving import png
from tiny_training import save_tiny_model

for module in ("gradio", "matplotlib"):
    pytest.importorskip(module, reason="needs the extra demo")
httpx = pytest.importorskip("httpx", reason="needs the extra demo")

META = {"meta": {"_type": "gradio.FileData"}}
"""With it gradio checks a path itself; a stranger may leave it out."""


FILM = gif()


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("web_demo_attacked", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Page:
    """What the page's own code asks of its server, with whatever is given."""

    def __init__(self, client):
        self.client, self.sessions = client, itertools.count()
        config = client.get("/config").json()
        kinds = {component["id"]: component["type"] for component in config["components"]}
        steps = [
            (
                step["id"],
                [kinds.get(part) for part in step["inputs"]],
                [kinds.get(part) for part in step["outputs"]],
            )
            for step in config["dependencies"]
        ]
        text, state, chatbot = "multimodaltextbox", "state", "chatbot"
        self.keep_question = next(step for step, ins, outs in steps if (ins, outs) == ([text], [text, state]))
        self.keep_history = next(
            step for step, ins, outs in steps if ins == [chatbot] and outs[:1] == [state]
        )
        self.answer = next(step for step, ins, outs in steps if outs[-2:] == ["plot", "accordion"])

    def send(self, route, step, data, session):
        body = {"data": data, "fn_index": step, "session_hash": session}
        return self.client.post(f"/gradio_api/{route}", json=body)

    def ask(self, message, history=None):
        """Whether a question is answered, and all that is said."""
        session = f"session{next(self.sessions)}"
        said = self.send("run/predict", self.keep_question, [message], session).text
        if history is not None:
            said += self.send("run/predict", self.keep_history, [history], session).text
        self.send("queue/join", self.answer, [None, None], session)
        said += self.client.get("/gradio_api/queue/data", params={"session_hash": session}).text
        last = said.rpartition('"process_completed"')[2]
        return '"success":true' in last and "Not answered: " not in said, said

    def upload(self, data, name="a.png"):
        return self.client.post("/gradio_api/upload", files={"files": (name, data)})


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("attacked") / "visualrwkv-tiny")
    log = tmp_path_factory.mktemp("log") / "log"
    demo = running_demo(log, "--model", str(folder), "--max-new-tokens", "3")
    with demo as url, httpx.Client(base_url=url, timeout=PATIENCE) as client:
        yield Page(client)


def question(*files, text="Which colour?"):
    return {"text": text, "files": list(files)}


def test_an_uploaded_picture_is_read(page):
    (path,) = page.upload(png("red")).json()
    answered, said = page.ask(question({"path": path} | META))
    assert answered and "data:image" in said  # the figure


@pytest.fixture
def inside():
    """A web server of this machine, and what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            """Stay quiet."""

        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png("red"))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def refused(page, message, history=None):
    answered, said = page.ask(message, history)
    assert not answered, said
    return said


@pytest.mark.parametrize("meta", [{}, META])
def test_no_other_file_of_the_machine_is_opened(page, tmp_path, meta):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png("red"))
    (uploaded,) = page.upload(png("red")).json()
    (tmp_path / "secret.mp4").write_bytes(FILM)
    for path in (
        secret,
        tmp_path / "secret.mp4",
        f"{uploaded}/../../../../../../../..{secret}",
        f"file://{secret}",
        "/etc/hostname",
    ):
        refused(page, question({"path": str(path)} | meta))


@pytest.mark.parametrize("meta", [{}, META])
def test_no_address_inside_is_asked(page, inside, meta):
    url, asked = inside
    refused(page, question({"path": f"{url}/a.png"} | meta))
    refused(page, question({"path": "a.png", "url": url} | meta))
    assert not asked


@pytest.mark.parametrize("meta", [{}, META])
def test_a_history_names_no_file_either(page, inside, tmp_path, meta):
    url, asked = inside
    (tmp_path / "secret.png").write_bytes(png("red"))
    for path in (str(tmp_path / "secret.png"), f"{url}/a.png"):
        content = [{"type": "file", "file": {"path": path} | meta}]
        history = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
        ]
        answered, said = page.ask(question(), history)
        # Without its history a question is answered.
        assert not answered or '"error"' in said, said
    assert not asked


@pytest.mark.parametrize("data", [b"no picture", png("red")[:-60], b"%PDF-1.4"], ids=["text", "half", "pdf"])
def test_files_that_are_no_pictures_are_refused(page, data):
    refused(page, question({"path": page.upload(data).json()[0]} | META))


@pytest.mark.parametrize(
    "data", [b"no film", b"#EXTM3U\n/etc/passwd\n", FILM[:300]], ids=["text", "list", "half"]
)
def test_files_that_are_no_films_are_refused(page, data):
    said = refused(page, question({"path": page.upload(data, "a.mp4").json()[0]} | META))
    assert "The film a.mp4: it cannot be read as a film" in said and "passwd" not in said


def test_an_uploaded_film_is_read(page):
    """Whatever it is called: its format is told by its first bytes."""
    (path,) = page.upload(FILM, "a.mp4").json()
    answered, said = page.ask(question({"path": path} | META))
    assert answered and "data:image" in said  # the figure


def test_files_of_the_machine_are_not_served(page):
    for path in ("/etc/hostname", "../../etc/hostname", str(DEMO), "..%2f..%2fetc%2fhostname"):
        for route in ("/gradio_api/file=", "/file=", "/static/", "/assets/"):
            assert page.client.get(route + path).status_code in (400, 403, 404, 405)


def test_large_files_are_refused(page):
    with contextlib.suppress(
        httpx.TransportError
    ):  # gradio may close the connection without reading the rest
        assert page.upload(bytes(21 * 2**20)).status_code == 413
    assert page.ask(question(text="Are you well?"))[0]


def test_a_long_text_is_refused(page):
    refused(page, question(text="word " * 10_000))


@pytest.mark.parametrize(
    "message", [7, "text", {"text": 7}, {"text": "a", "files": 3}, {"text": "a", "files": [{}]}]
)
def test_messages_of_other_shapes_are_refused(page, message):
    refused(page, message)
    assert page.ask(question(text="Are you well?"))[0]


# --- the page's own checks --------------------------------------------------------------------------------


def test_pictures_lie_in_their_folders(demo, tmp_path):
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    (uploads / "a.png").write_bytes(png("red"))
    (tmp_path / "secret.png").write_bytes(png("red"))
    (uploads / "link.png").symlink_to(tmp_path / "secret.png")
    assert demo.checked_file(str(uploads / "a.png"), [uploads]) == str(uploads / "a.png")
    for path in (
        tmp_path / "secret.png",
        uploads / ".." / "secret.png",
        uploads / "link.png",
        uploads,
        "http://a/b",
        None,
    ):
        with pytest.raises(ValueError, match="must be uploaded here"):
            demo.checked_file(path, [uploads])


def test_pictures_have_a_largest_size(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "MAX_PIXELS", 100)
    (tmp_path / "a.png").write_bytes(png("red"))
    with pytest.raises(ValueError, match="60 x 56"):
        demo.checked_file(tmp_path / "a.png", [tmp_path])


def test_conversations_have_a_longest_length(demo):
    text, picture = {"type": "text", "text": "a" * 1000}, {"type": "image", "url": "a"}
    film = {"type": "video", "path": "a.mp4"}
    demo.refuse_too_much([{"content": [text] * 20}, {"content": [picture] * 8}, {"content": [film]}])
    for messages in (
        [{"content": [text] * 21}],
        [{"content": [picture]}] * 17,
        [{"content": [film] * 2}, {"content": [picture]}],
        [{"content": []}] * 201,
    ):
        with pytest.raises(ValueError, match="start a new one"):
            demo.refuse_too_much(messages)


def test_a_history_that_a_stranger_wrote_names_no_files(demo, tmp_path):
    for path in ("/etc/hostname", "http://127.0.0.1/a.png", "data:image/png;base64,AAAA"):
        message = {"role": "user", "content": [{"type": "file", "file": {"path": path}}]}
        with pytest.raises(ValueError, match="must be uploaded here"):
            demo.message_of(message, [tmp_path])
    for content in ([{"type": "component"}], [{"type": "text", "text": 7}]):
        with pytest.raises(ValueError, match="texts, pictures and films"):
            demo.message_of({"role": "user", "content": content}, [tmp_path])
    assert json.dumps(demo.message_of({"role": "user", "content": []}, [tmp_path]))
