"""Films of strangers, decoded in a process of their own that is bounded in memory and time.

FFmpeg's decoders are C, and a film of a hundred bytes can announce billions of frames. Whatever happens to the process,
the one that started it goes on: it waits for so many seconds, or until nobody wants the film any more, and kills it.
The film goes there, and its frames come back, in files without a name, so that neither side waits for the other.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import IO, Any

from PIL import Image

from ..films import FrameSampling, iterate_film
from .progress import Left

MEMORY_BYTES = 3 * 2**30
"""The most address space of the process: the interpreter and the libraries, the film, and a decoder's frames."""
CPU_SECONDS = 4
"""Processor seconds, of all threads together, that the process may use for each second that decoding may take. Then the
system ends it, even if the process that started it is no longer there to do so."""
ENVIRONMENT = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "SYSTEMROOT", "TMPDIR")
"""The only variables of the environment that the process inherits."""
POLL_SECONDS = 0.05
"""How long to wait before asking again whether the film is still wanted."""
START = "from visualrwkv_hf.inference.film_process import main; main()"
"""The program of the process. It runs in an empty folder, so that no file can be imported in place of a module."""


def read_film(
    content: bytes,
    sampling: FrameSampling,
    *,
    max_frames: int,
    max_total_pixels: int,
    seconds: float,
    is_left: Callable[[], bool] = lambda: False,
) -> list[Image.Image]:
    """Return the frames of a film that are sampled, as pictures in RGB, like [`film_frames`].

    Args:
        content: the film's bytes.
        sampling: which frames, and the most pixels of one.
        max_frames: how many frames there may be.
        max_total_pixels: how many pixels they may have together.
        seconds: how long decoding may take.
        is_left: asked several times a second; True ends it.

    Raises:
        ValueError: it cannot be read, or exceeds a limit. The message is a sentence that begins with "it".
        ImportError: `av` is not installed.
        Left: `is_left` said so.
    """
    wanted = {
        "num_frames": sampling.num_frames,
        "fps": sampling.fps,
        "max_pixels": sampling.max_pixels,
        "max_frames": max_frames,
        "max_total_pixels": max_total_pixels,
        "seconds": seconds,
    }
    with (
        tempfile.TemporaryFile() as film,
        tempfile.TemporaryFile() as frames,
        tempfile.TemporaryDirectory() as cwd,
    ):
        film.write(content)
        film.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-c", START, json.dumps(wanted)],
            stdin=film,
            stdout=frames,
            stderr=subprocess.DEVNULL,
            cwd=cwd,
            env=_environment(),
        )
        try:
            _wait(process, seconds, is_left)
        finally:
            process.kill()
            process.wait()
        frames.seek(0)
        return list(_read_frames(frames))


def _environment() -> dict[str, str]:
    """Return what the process needs of the environment: keys, for example of the server, are not there to be read."""
    kept = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    path = os.pathsep.join(filter(None, sys.path))
    return kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _wait(process: subprocess.Popen, seconds: float, is_left: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(POLL_SECONDS)
            return
        if is_left():
            raise Left
        if time.monotonic() > deadline:
            raise ValueError(f"it takes longer than {seconds:g} s to decode.")


def _read_frames(frames: IO[bytes]) -> Iterator[Image.Image]:
    """Yield what the process has written: after each line of JSON the pixels that it announces."""
    while (line := frames.readline()).endswith(b"\n"):
        said = json.loads(line)
        if error := said.get("error"):
            raise (ImportError if said.get("is_missing") else ValueError)(error)
        if said.get("end"):
            return
        width, height = said["size"]
        pixels = frames.read(3 * width * height)
        if len(pixels) == 3 * width * height:
            yield Image.frombytes("RGB", (width, height), pixels)
    raise ValueError("it cannot be read as a film: its decoder failed, or needed too much memory or time.")


# --- in the process -----------------------------------------------------------------------------------


def main() -> None:
    """Decode the film at the standard input, and write its frames to the standard output."""
    wanted, output = json.loads(sys.argv[1]), sys.stdout.buffer
    _limit_this_process(wanted)
    try:
        for frame in _frames_within(sys.stdin.buffer.read(), wanted):
            output.write(_line(size=frame.size))
            output.write(frame.tobytes())
        output.write(_line(end=True))
    except ImportError as error:
        output.write(_line(error=str(error), is_missing=True))
    except ValueError as error:
        output.write(_line(error=str(error).replace("bytes cannot", "it cannot", 1)))


def _frames_within(film: bytes, wanted: dict[str, Any]) -> Iterator[Image.Image]:
    sampling = FrameSampling(wanted["num_frames"], wanted["fps"], wanted["max_pixels"])
    count, pixels = 0, 0
    for frame in iterate_film(film, sampling):
        count, pixels = count + 1, pixels + frame.width * frame.height
        if count > wanted["max_frames"]:
            raise ValueError(
                f"it gives more than {wanted['max_frames']} frames, for which there is no room: ask for fewer."
            )
        if pixels > wanted["max_total_pixels"]:
            raise ValueError(f"its frames have more than {wanted['max_total_pixels']:,} pixels together.")
        yield frame
    if not count:
        raise ValueError("it cannot be read as a film: it has no frames.")


def _line(**said: Any) -> bytes:
    return json.dumps(said).encode() + b"\n"


def _limit_this_process(wanted: dict[str, Any]) -> None:
    """Bound memory, processor time and what is written; on systems without these limits the parent's clock is left."""
    try:
        import resource
    except ImportError:
        return
    seconds, written = CPU_SECONDS * int(wanted["seconds"] + 1), 3 * wanted["max_total_pixels"] + 2**20
    limits = {
        resource.RLIMIT_AS: MEMORY_BYTES,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: written,
        resource.RLIMIT_CORE: 0,
    }
    for limit, most in limits.items():
        with suppress(ValueError, OSError):  # a lower one holds already
            resource.setrlimit(limit, (most, most))


__all__ = ["read_film"]
