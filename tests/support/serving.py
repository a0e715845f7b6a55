"""Run servers for tests: the model's server, in this process or in one of its own, and a web server with pictures."""

import base64
import io
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from film_files import gif
from patience import PATIENCE
from PIL import Image, ImageDraw

SHAPE_QUESTION = "what color is the shape?"

COMMAND = """
import sys
from visualrwkv_hf.inference.server import Access, Limits, serve
serve(sys.argv[1], port=0, access=Access(allow_private_urls=True), limits=Limits(**eval(sys.argv[2])))
"""


@cache
def png(colour: str, width: int = 60, height: int = 56) -> bytes:
    """Return a PNG whose upper half is of one colour and whose lower half is white."""
    picture, file = Image.new("RGB", (width, height), colour), io.BytesIO()
    picture.paste("white", (0, height // 2, width, height))
    picture.save(file, "PNG")
    return file.getvalue()


def circle_png(colour: str) -> bytes:
    """Return a PNG of a circle on white; asked `SHAPE_QUESTION`, the model in the package names its colour."""
    picture, file = Image.new("RGB", (64, 64), "white"), io.BytesIO()
    ImageDraw.Draw(picture).ellipse((16, 16, 48, 48), fill=colour)
    picture.save(file, "PNG")
    return file.getvalue()


def data_url(colour: str, **size: int) -> str:
    return url_of(png(colour, **size))


def url_of(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def user(text: str, *urls: str) -> dict:
    """Return a message as OpenAI's clients send it."""
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}


class PictureHandler(BaseHTTPRequestHandler):
    """Serves a picture at `/COLOUR.png` and a film at `/film.gif`; all else is not found, `/slow.png` after 20 s."""

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        colour = self.path.strip("/").removesuffix(".png")
        if colour == "slow":
            time.sleep(20)
        is_there = colour in ("red", "green", "blue", "film.gif")
        self.send_response(200 if is_there else 404)
        self.end_headers()
        if is_there:
            self.wfile.write(gif() if colour == "film.gif" else png(colour))


@contextmanager
def picture_host() -> Iterator[str]:
    """Run a web server with pictures and yield its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), PictureHandler)
    server.daemon_threads = True
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def running(app, **limits: float) -> Iterator[str]:
    """Run the application of `build_app` in a thread of this process, and yield its address.

    Args:
        app: the application.
        limits: the limits on its connections, as fields of `Limits`.
    """
    from visualrwkv_hf.inference.server_connections import make_server
    from visualrwkv_hf.inference.server_limits import Access, Limits

    server = make_server(app, Limits(**limits), Access())
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)


@contextmanager
def served_apart(folder: Path, log: Path, **limits: float) -> Iterator[tuple[subprocess.Popen, str]]:
    """Run `serve(folder)` in a new process, and yield the process and its address. Its output is written to `log`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", COMMAND, str(folder), repr(limits)]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        deadline = time.monotonic() + PATIENCE
        while not (found := re.search(r"answers at (http://[\d.:]+)", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield process, found[1]
    finally:
        process.kill()
        process.wait()
