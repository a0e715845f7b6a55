"""Pictures and films that a person named: refused at once if they cannot be read; pipes are read like files."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..film_formats import FILM_SUFFIXES, is_film_file

if TYPE_CHECKING:
    from PIL import Image

MAX_PIPE_BYTES = 256 * 2**20
"""A pipe that gives more than this is refused: what is in it would have to be held in memory."""


LONGEST_SHOWN = 200
"""Characters of a name that an error repeats: it may be a picture's content in base64."""


def is_url(source: str) -> bool:
    """Return whether `source` is an address on the web."""
    return source.startswith(("http://", "https://"))


def refuse_missing_picture(source: str) -> None:
    """Refuse at once, without torch, what is no picture and no film: a model takes seconds to load.

    Args:
        source: a path or a URL. A URL is not fetched or decoded, and a pipe is not read.

    Raises:
        ValueError: there is no such file, it is a folder, or its content is no picture and no film.
    """
    if is_url(source) or source.startswith("data:"):
        return
    path = Path(source)
    if os.path.isdir(source):
        raise ValueError(f"{source} is a folder: `visualrwkv caption` asks about every picture in a folder.")
    if not os.path.exists(source):  # also of a text that is too long for a name
        shown = source if len(source) <= LONGEST_SHOWN else f"{source[:LONGEST_SHOWN]}..."
        hint = " Only http:// and https:// addresses are fetched." if "://" in source[:20] else ""
        raise ValueError(f"There is no picture {shown}.{hint}")
    if not path.is_file() or is_film(source):  # not a file: a pipe
        return
    from PIL import Image

    try:
        Image.open(path).close()
    except Image.DecompressionBombError:
        return  # it is a picture; how large it may be is decided when it is opened
    except Exception as error:  # decoders raise what they like
        reason = (
            error.strerror
            if isinstance(error, OSError) and error.strerror
            else "its content is no known format"
        )
        raise ValueError(f"{source!r} cannot be read as a picture: {reason}.") from error


def open_named_picture(source: str) -> "Image.Image":
    """Return the picture at a path or URL in RGB; a pipe, for example `/dev/stdin`, is read to its end.

    Raises:
        ValueError: it cannot be read as a picture, or the pipe gives more than `MAX_PIPE_BYTES`.
    """
    from ..image_processing_visualrwkv import open_picture

    path = Path(source)
    if is_url(source) or not os.path.exists(source) or path.is_file():
        return open_picture(source)
    with path.open("rb") as pipe:
        content = pipe.read(MAX_PIPE_BYTES + 1)
    if len(content) > MAX_PIPE_BYTES:
        raise ValueError(f"{source} gives more than {MAX_PIPE_BYTES} bytes, which no picture here may have.")
    with tempfile.TemporaryDirectory() as scratch:
        copy = os.path.join(scratch, "picture")
        Path(copy).write_bytes(content)
        try:
            return open_picture(copy)
        except ValueError as error:
            raise ValueError(str(error).replace(copy, source)) from error


def is_film(source: str) -> bool:
    """Return whether a file is a film by its first bytes, or a URL by its ending."""
    if is_url(source):
        return os.path.splitext(urlsplit(source).path)[1].lower() in FILM_SUFFIXES
    try:
        return Path(source).is_file() and is_film_file(source)
    except OSError:  # opening it as a picture says why it cannot be read
        return False


def content_parts(
    source: str, num_frames: int | None = None, fps: float | None = None, as_film: bool = False
) -> list[dict[str, Any]]:
    """Return what a message contains for a picture or for the frames of a film.

    Args:
        source: a path, a URL or a pipe.
        num_frames: see [`FrameSampling`].
        fps: likewise.
        as_film: whether an animation is a film. Otherwise it is one only if one of the options before is given, and
            is the picture that it begins with if not.

    Raises:
        ValueError, ImportError: it cannot be read.
    """
    if num_frames is None and fps is None and not as_film and not is_film(source):
        return [{"type": "image", "image": open_named_picture(source)}]
    from ..films import FrameSampling, film_frames

    frames = film_frames(source, FrameSampling(num_frames=num_frames, fps=fps))
    return [{"type": "image", "image": frame} for frame in frames]


__all__ = ["content_parts", "open_named_picture", "refuse_missing_picture"]
