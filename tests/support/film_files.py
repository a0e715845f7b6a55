"""Make small films for tests, in which frame `n` is of a plain grey that tells its number."""

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

NUMBER, RATE, STEP = 30, 10, 8
"""The number of frames, frames per second, and the step in grey level, of 256, from one frame to the next."""

NO_FILMS = {
    "nothing": b"",
    "text": b"no film",
    "playlist": b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    "concat": b"ffconcat version 1.0\nfile /etc/passwd\n",
    "vector": b"<svg/>",
    "head alone": bytes(4) + b"ftyp" + bytes(100),
    "a transport stream of nothing": b"G" * 999,
}
"""Contents of files that are no films. Two of them name another file, which must not be opened."""


def grey(number: int, width: int = 96, height: int = 64) -> Image.Image:
    return Image.new("RGB", (width, height), (STEP * number % 256,) * 3)


def mp4(folder: Path, number: int = NUMBER, width: int = 96, height: int = 64) -> bytes:
    import imageio.v3 as imageio

    frames = np.stack([np.asarray(grey(n, width, height)) for n in range(number)])
    path = folder / f"{number}x{width}x{height}.mp4"
    imageio.imwrite(path, frames, plugin="pyav", codec="libx264", fps=RATE)
    return path.read_bytes()


def gif(number: int = NUMBER) -> bytes:
    file, pictures = io.BytesIO(), [grey(n) for n in range(number)]
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=1000 // RATE)
    return file.getvalue()


def film_url(content: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64," + base64.b64encode(content).decode()


def about_film(text: str, *urls: str) -> dict:
    """Return a message with films as vLLM's and transformers' servers take it."""
    films = [{"type": "video_url", "video_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*films, {"type": "text", "text": text}]}
