"""Films that attack the server: each gets a sentence, takes a bounded amount of memory and time, and leaves nothing."""

import socket
import struct
import subprocess
import sys

import httpx
import psutil
import pytest
from film_files import NO_FILMS, NUMBER, about_film, film_url, gif, mp4
from patience import PATIENCE, wait_until
from serving import data_url, running
from tiny_training import save_tiny_model

from visualrwkv_hf import FrameSampling, film_frames
from visualrwkv_hf.inference import film_process
from visualrwkv_hf.inference.film_process import read_film
from visualrwkv_hf.inference.progress import Left
from visualrwkv_hf.inference.server import Limits, build_app

pytest.importorskip("av", reason="needs the extra video")
pytest.importorskip("uvicorn", reason="needs the extra serve")

MEBI = 2**20
CHAT = "/v1/chat/completions"
LIMITS = Limits(
    picture_pixels=20_000, pictures=10, prompt_tokens=2000, film_bytes=MEBI, film_seconds=PATIENCE
)
WITHIN = dict(max_frames=NUMBER, max_total_pixels=10**7, seconds=PATIENCE)


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    return build_app(save_tiny_model(tmp_path_factory.mktemp("filmed") / "visualrwkv-tiny"), limits=LIMITS)


@pytest.fixture(scope="module")
def client(app):
    with running(app) as url, httpx.Client(base_url=url, timeout=PATIENCE) as client:
        yield client


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return mp4(tmp_path_factory.mktemp("film"))


def asked(*urls, **fields):
    return {"messages": [about_film("What moves?", *urls)], "max_tokens": 2} | fields


def refused(client, *urls, status=400, **fields):
    """The sentence with which a question about films is refused; the next question is answered."""
    response = client.post(CHAT, json=asked(*urls, **fields))
    assert response.status_code == status, response.text
    message = response.json()["error"]["message"]
    assert message.endswith(".") and len(message) < 400 and "\n" not in message and "AAAA" not in message
    assert (
        client.post(CHAT, json=asked(data_url("red"))).status_code == 200
    )  # a picture is a film of one frame
    return message


@pytest.mark.parametrize("content", NO_FILMS.values(), ids=NO_FILMS)
def test_what_is_no_film_is_refused(client, content):
    message = refused(client, film_url(content))
    assert message.startswith("Film 1: it cannot be read as a film: ") and "passwd" not in message


def test_films_cut_anywhere_are_refused_or_read(client, film):
    for length in range(100, len(film), len(film) // 6):
        response = client.post(CHAT, json=asked(film_url(film[:length])))
        assert response.status_code in (200, 400)
        if response.status_code == 400:
            assert "Film 1: it cannot be read as a film" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "url",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "concat:/etc/passwd",
        "rtsp://example.org/a",
        "data:text/plain;base64,AAAA",
        "data:application/x-mpegURL;base64,AAAA",
        "data:video/mp4,AAAA",
        "",
        None,
        7777,
    ],
)
def test_a_film_is_a_url_of_the_web_or_data(client, url):
    message = refused(client, url)
    assert message.startswith("Film 1: it must be")
    assert not url or str(url) not in message


@pytest.mark.parametrize(
    "fields",
    [
        {"path": "/etc/passwd"},
        {"url": "/etc/passwd"},
        {"video_url": {"url": "http://127.0.0.1:1/", "fps": 2}},
        {"image_url": "http://127.0.0.1:1/"},
        {"file_id": "a"},
    ],
)
def test_a_film_has_no_other_keys(client, fields):
    part = {"type": "video_url", "video_url": {"url": "http://127.0.0.1:1/"}} | fields
    response = client.post(CHAT, json={"messages": [{"role": "user", "content": [part]}]})
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert "unexpected fields" in message or "has the key url alone, not 'fps'" in message


@pytest.mark.parametrize(
    "options, words",
    [
        ([], "media_io_kwargs must be an object"),
        ({"audio": {}}, "media_io_kwargs must be an object"),
        ({"video": {"backend": "x"}}, "media_io_kwargs must be an object"),
        ({"video": {"num_frames": 0}}, "num_frames must be an integer from 1 to 10"),
        ({"video": {"num_frames": 11}}, "num_frames must be an integer from 1 to 10"),
        ({"video": {"num_frames": "x"}}, "num_frames must be an integer"),
        ({"video": {"fps": 0}}, "fps must be a number from 0.001 to 1000"),
        ({"video": {"fps": 1e300}}, "fps must be a number"),
        ({"video": {"fps": 1, "num_frames": 1}}, "either num_frames or fps"),
    ],
)
def test_options_of_films_are_refused(client, film, options, words):
    assert words in refused(client, film_url(film), media_io_kwargs=options)


def test_frames_count_as_pictures(client, film):
    options = {"video": {"fps": 99}}
    assert "Film 1: it gives more than 10 frames" in refused(client, film_url(film), media_io_kwargs=options)
    assert "Film 2: it gives more than 2 frames" in refused(client, *[film_url(film)] * 2)
    # The picture that comes last has its place.
    assert "Film 1: it gives more than 7 frames" in refused(client, film_url(film), *[data_url("red")] * 3)
    assert "at most 10 pictures" in refused(client, *[film_url(film)] * 11)
    part = {"type": "video_url", "video_url": {"url": film_url(film)}}
    options = {"media_io_kwargs": {"video": {"num_frames": 5}}, "max_output_tokens": 1}
    for count, status in ((2, 200), (3, 400)):
        body = {"input": [{"role": "user", "content": [part] * count}]} | options
        assert client.post("/v1/responses", json=body).status_code == status


def test_frames_that_are_too_large_are_not_decoded(client, tmp_path):
    large = mp4(tmp_path, 2, 640, 480)
    message = refused(client, film_url(large))
    assert "frames are too large: 640 x 480; at most 20,000 pixels are decoded" in message


def test_frames_of_a_request_have_a_limit_together(client, tmp_path):
    """Four times the pixels that one may have."""
    message = refused(client, film_url(mp4(tmp_path, 10, 160, 120)))
    assert message == "Film 1: its frames have more than 80,000 pixels together."


def test_large_films_are_refused(client):
    assert f"Film 1: it has more than {MEBI} bytes" in refused(client, film_url(bytes(MEBI + 1)), status=413)


def announcing(film, samples):
    """The film with a head that announces so many frames of one byte, all in one chunk."""
    forged = bytearray(film)
    sizes, chunks, times = (film.index(name) for name in (b"stsz", b"stsc", b"stts"))
    forged[sizes + 8 : sizes + 16] = struct.pack(">II", 1, samples)
    forged[chunks + 16 : chunks + 20] = struct.pack(">I", min(samples, 2**31 - 1))
    forged[times + 12 : times + 16] = struct.pack(">I", samples)
    return bytes(forged)


@pytest.mark.parametrize("samples", [10**6, 10**8, 2**32 - 1])
def test_a_head_that_announces_billions_of_frames(client, film, samples):
    process = psutil.Process()
    before = process.memory_info().rss
    assert "Film 1: " in refused(client, film_url(announcing(film, samples)))
    assert process.memory_info().rss - before < 100 * MEBI


def test_a_film_that_decodes_for_long_is_given_up(film, monkeypatch):
    monkeypatch.setattr(film_process, "START", "import time; time.sleep(9999)")
    with pytest.raises(ValueError, match=r"^it takes longer than 0.2 s to decode\.$"):
        read_film(film, FrameSampling(), **WITHIN | {"seconds": 0.2})
    assert not children()


def children():
    return [child for child in psutil.Process().children() if "sleep(9999)" in " ".join(child.cmdline())]


@pytest.mark.parametrize("end", ["os.abort()", "os._exit(0)", "1 / 0", "print('{\"size\": [9, 9]}')"])
def test_a_decoder_that_fails_is_a_sentence(film, monkeypatch, end):
    monkeypatch.setattr(film_process, "START", f"import os; {end}")
    with pytest.raises(ValueError, match=r"^it cannot be read as a film: its decoder failed"):
        read_film(film, FrameSampling(), **WITHIN)


def test_the_process_knows_no_keys(film, monkeypatch):
    monkeypatch.setenv("VISUALRWKV_API_KEY", "secret-key")
    told = "import os, json; print(json.dumps({'error': 'it knows: ' + ' '.join(sorted(os.environ))}))"
    monkeypatch.setattr(film_process, "START", told)
    with pytest.raises(ValueError, match=r"it knows: .*PATH") as known:
        read_film(film, FrameSampling(), **WITHIN)
    assert not [name for name in str(known.value).split() if "KEY" in name or "TOKEN" in name]


HUNGRY = (
    "import visualrwkv_hf.inference.film_process as process; from PIL import Image; "
    "process.iterate_film = lambda *_: [Image.new('RGB', (9, 9))] * bool(bytearray({})); process.main()"
)


def test_the_process_has_a_limit_on_memory(film, monkeypatch):
    pytest.importorskip("resource", reason="a limit of POSIX")
    monkeypatch.setattr(film_process, "START", HUNGRY.format(2**20))
    assert len(read_film(film, FrameSampling(), **WITHIN)) == 1
    monkeypatch.setattr(film_process, "START", HUNGRY.format(film_process.MEMORY_BYTES + 1))
    with pytest.raises(ValueError, match="needed too much memory"):
        read_film(film, FrameSampling(), **WITHIN)


def test_a_client_that_leaves_ends_the_decoding(app, client, film, monkeypatch):
    monkeypatch.setattr(film_process, "START", "import time; time.sleep(9999)")
    port = client.base_url.port
    body = httpx.Request("POST", "http://a", json=asked(film_url(film))).content
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        wait_until(children, "the beginning of the decoding")
    line = app.state.line
    wait_until(lambda: line._current is None and not children(), "the end of the decoding")
    monkeypatch.undo()
    assert client.post(CHAT, json=asked(film_url(film))).status_code == 200


def test_a_film_that_nobody_wants_is_left(film):
    with pytest.raises(Left):
        read_film(film, FrameSampling(), **WITHIN, is_left=lambda: True)


@pytest.mark.parametrize("sampling", [FrameSampling(), FrameSampling(fps=2), FrameSampling(num_frames=3)])
@pytest.mark.parametrize("kind", ["mp4", "gif"])
def test_the_frames_are_those_of_the_plain_reader(film, sampling, kind):
    content = film if kind == "mp4" else gif()
    frames, plain = read_film(content, sampling, **WITHIN), film_frames(content, sampling)
    assert [frame.tobytes() for frame in frames] == [frame.tobytes() for frame in plain]
    assert len(frames) == {None: 8, 2: 6, 3: 3}[sampling.fps or sampling.num_frames]


def test_files_of_the_current_folder_are_no_modules(film, tmp_path, monkeypatch):
    for name in ("av", "numpy", "json", "visualrwkv_hf"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    assert len(read_film(film, FrameSampling(), **WITHIN)) == 8
    assert not (tmp_path / "executed").exists()


def test_the_process_imports_neither_torch_nor_transformers():
    """They would take more time than a film."""
    code = film_process.START.replace(
        "main()", "import sys; print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]
