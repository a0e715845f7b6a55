"""Films: their frames, sampled by time, as pictures.

A film may come from a stranger. Its format is recognised by its first bytes and only that one demuxer of FFmpeg is
opened, so that no playlist makes the decoder fetch another file; frames are decoded one at a time, and only those that
are wanted are kept.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageSequence

from .film_formats import SIGNATURE_BYTES, demuxer_of, first_bytes, is_animation
from .pictures import MAX_PIXELS, array_to_rgb, file_of, is_tensor, name_of, open_picture, to_rgb

DEFAULT_FRAMES = 8
"""Frames of a film where neither their number nor their rate is given."""

ALL_FRAMES = sys.maxsize
"""As a number of frames: all of a film, however many there are."""

CLOCK_DIGITS, CLOCK_ERROR = 6, 1e-6
"""Times in seconds are fractions of a film's clock, and rounded."""

SECONDS_OF_A_FRAME = 0.1
"""How long a frame of an animation is shown if its file does not say."""

UPRIGHT = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
"""How a frame is turned for display, by the signs of a, b, c, d in a film's display matrix [[a, b, u], [c, d, v],
[x, y, w]], which shows the pixel (p, q) at (a p + c q + x, b p + d q + y). EXIF turns pictures in these seven ways."""


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a film are taken.

    Args:
        num_frames: so many, evenly over the film's time: the frames that are shown at i / num_frames of its duration.
            A film of fewer frames gives all of them; `ALL_FRAMES` asks for all without counting them first.
        fps: so many a second, from the first frame on. At most one of the two may be given; without either,
            `DEFAULT_FRAMES` are taken.
        max_pixels: largest width times height of a frame.

    Raises:
        ValueError: both are given, or one of them is not positive.
    """

    num_frames: int | None = None
    fps: float | None = None
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.num_frames is not None and self.fps is not None:
            raise ValueError("Give either num_frames or fps: a film's frames are sampled by one of them.")
        if self.num_frames is not None and (type(self.num_frames) is not int or self.num_frames < 1):
            raise ValueError(f"num_frames must be a positive integer, got {self.num_frames!r}.")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise ValueError(f"fps must be a positive number, got {self.fps!r}.")

    @property
    def needs_times(self) -> bool:
        """Whether the times of all frames must be known before the first one is taken."""
        return self.fps is None and self.num_frames != ALL_FRAMES

    def choose(self, frames: Iterable["TimedFrame"], times: Sequence[float] | None) -> Iterator[Image.Image]:
        """Yield the wanted frames as pictures.

        Args:
            frames: the frames in order. Only one of them is held at a time.
            times: the times of all frames in seconds, in order, where `needs_times`.
        """
        if self.fps is not None:
            yield from _at_rate(frames, self.fps)
            return
        if not self.needs_times:
            yield from (frame.picture() for frame in frames)
            return
        assert times is not None
        number = DEFAULT_FRAMES if self.num_frames is None else self.num_frames
        wanted = {round(times[index], CLOCK_DIGITS) for index in _evenly(times, number)}
        last = max(wanted)
        for frame in frames:
            time = round(frame.time, CLOCK_DIGITS)
            if time in wanted:
                yield frame.picture()
            if time >= last:
                return


class TimedFrame(NamedTuple):
    """A frame that became current: when it is shown, in seconds, and what makes a picture of it while it is current."""

    time: float
    picture: Callable[[], Image.Image]


def _at_rate(frames: Iterable[TimedFrame], fps: float) -> Iterator[Image.Image]:
    """Yield the first frame that is shown at or after each k / fps seconds from the start of the film."""
    start, taken = None, 0
    for frame in frames:
        start = frame.time if start is None else start
        if frame.time - start >= taken / fps - CLOCK_ERROR:
            yield frame.picture()
            taken = int((frame.time - start) * fps + CLOCK_ERROR) + 1


def _evenly(times: Sequence[float], number: int) -> list[int]:
    """Return the indices of the frames on show at `number` evenly spaced moments, each at most once."""
    if number >= len(times):
        return list(range(len(times)))
    start = times[0]
    duration = (times[-1] - start) * len(times) / max(len(times) - 1, 1)  # the last frame is shown as well
    moments = [start + index * duration / number for index in range(number)]
    return sorted({max(int(np.searchsorted(times, moment + CLOCK_ERROR)) - 1, 0) for moment in moments})


def film_frames(source, sampling: FrameSampling = FrameSampling()) -> list[Image.Image]:
    """Return the frames of a film that are sampled, as pictures in RGB.

    A film is turned upright as its display matrix says, as a picture's file is by its EXIF data.

    Args:
        source: a path, a http(s) URL, a file's contents as bytes or as base64 text with or without its prefix
            `data:video/...;base64,`; a list of pictures, or an array or tensor [N, H, W, 3] or [N, 3, H, W]; a single
            picture, likewise as an array or tensor, is a film of one frame. MP4, MOV,
            WebM, Matroska, AVI, Ogg, FLV and MPEG need the package `av`; GIF, APNG and WebP do not. The pictures of a
            list are its frames, and are all taken unless `num_frames` is given. They have no times, so `fps` is
            refused.
        sampling: which frames.

    Raises:
        ValueError: it cannot be read as a film, or a frame is too large.
        ImportError: `av` is needed and is not installed.
    """
    if isinstance(source, Image.Image) or getattr(source, "ndim", None) == 3:  # a film of one frame
        source = [source]
    if isinstance(source, list | tuple | np.ndarray) or is_tensor(source):
        return _listed(source, sampling)
    frames = [*iterate_film(source, sampling)]
    if not frames:
        raise ValueError(f"{name_of(source)} cannot be read as a film: it has no frames.")
    return frames


def iterate_film(source, sampling: FrameSampling) -> Iterator[Image.Image]:
    """Yield the sampled frames of a film one at a time, so that a film of any length takes no memory.

    The arguments are those of [`film_frames`], without lists and arrays. Raises the same errors.
    """
    try:
        file = source if isinstance(source, bytes) else file_of(_with_path(source))
        file = BytesIO(file) if isinstance(file, bytes) else file
        start = _first_bytes(file)
        if is_animation(start):
            yield from _animation(file, sampling)
            return
        yield from _decoded(file, demuxer_of(start), sampling)
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # decoders raise what they like
        raise ValueError(f"{name_of(source)} cannot be read as a film: {_reason(error)}") from error


def _listed(frames, sampling: FrameSampling) -> list[Image.Image]:
    if not len(frames):
        raise ValueError("A film needs at least one frame, got none.")
    if sampling.fps is not None:
        raise ValueError("fps needs a film with times; a list of frames has none. Give num_frames.")
    wanted = [*range(len(frames))]
    if sampling.num_frames is not None:
        wanted = _evenly([float(index) for index in range(len(frames))], sampling.num_frames)
    is_array = isinstance(frames, np.ndarray) or is_tensor(frames)
    if is_array and frames.ndim != 4:
        raise ValueError(f"A film must be [N, H, W, 3] or [N, 3, H, W], got shape {tuple(frames.shape)}.")
    return [_opened(frames[index], index + 1, sampling.max_pixels) for index in wanted]


def _opened(frame, number: int, max_pixels: int) -> Image.Image:
    if isinstance(frame, np.ndarray):
        return array_to_rgb(frame)
    try:
        return open_picture(frame, max_pixels=max_pixels)
    except ValueError as error:
        raise ValueError(f"Frame {number} of a film: {error}") from error


def _with_path(source) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    raise ValueError("it must be a path, a URL, base64 text, a file's bytes, or frames.")


def _first_bytes(file: str | BytesIO) -> bytes:
    return file.getvalue()[:SIGNATURE_BYTES] if isinstance(file, BytesIO) else first_bytes(file)


# --- decoders -----------------------------------------------------------------------------------------


def _animation(file: str | BytesIO, sampling: FrameSampling) -> Iterator[Image.Image]:
    with Image.open(file, formats=("GIF", "PNG", "WEBP")) as animation:
        _refuse_size(animation.width, animation.height, sampling.max_pixels)
        times, time = [], 0.0
        if sampling.needs_times:
            for frame in ImageSequence.Iterator(animation):
                times.append(time)
                time += _shown_for(frame)
            animation.seek(0)
        yield from sampling.choose(_timed(animation), times)


def _timed(animation: Image.Image) -> Iterator[TimedFrame]:
    time = 0.0
    for frame in ImageSequence.Iterator(animation):
        yield TimedFrame(time, partial(_copied, frame))
        time += _shown_for(frame)


def _copied(frame: Image.Image) -> Image.Image:
    return to_rgb(frame).copy()


def _shown_for(frame: Image.Image) -> float:
    """Return for how many seconds the current frame of an animation is shown."""
    if frame.format == "WEBP":  # its decoder tells a frame's duration together with its pixels
        frame.load()
    return float(frame.info.get("duration") or 0) / 1000 or SECONDS_OF_A_FRAME


def _decoded(file: str | BytesIO, demuxer: str, sampling: FrameSampling) -> Iterator[Image.Image]:
    try:
        import av
    except ImportError as error:
        raise ImportError("Films need the package av: pip install 'visualrwkv-hf[video]'.") from error
    times = None
    if sampling.needs_times:
        with av.open(file, format=demuxer) as container:
            times = _packet_times(container)
    if isinstance(file, BytesIO):
        file.seek(0)
    with av.open(file, format=demuxer) as container:
        yield from sampling.choose(_container_frames(container, sampling.max_pixels), times)


def _packet_times(container) -> list[float]:
    """Return the times of all frames in seconds, in order, without decoding a frame."""
    stream = _stream_of(container)
    # MP4 marks packets to discard that its edit list hides: what was before a cut is decoded and not shown.
    times = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
    if not times:
        raise ValueError("it has no frames.")
    if any(time is None for time in times):  # no clock: frames are shown equally long
        return [float(index) for index in range(len(times))]
    return sorted(float(time * stream.time_base) for time in times)


def _container_frames(container, max_pixels: int) -> Iterator[TimedFrame]:
    stream = _stream_of(container)
    _refuse_size(stream.codec_context.width, stream.codec_context.height, max_pixels)
    for index, frame in enumerate(container.decode(stream)):
        _refuse_size(frame.width, frame.height, max_pixels)
        yield TimedFrame(float(index if frame.time is None else frame.time), partial(_upright, frame))


def _upright(frame) -> Image.Image:
    """Return a decoded frame as a picture, turned or mirrored as its display matrix says."""
    picture = frame.to_image()
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return picture
    a, b, _, c, d, *_ = np.sign(np.frombuffer(matrix, np.int32)).tolist()
    method = UPRIGHT.get((a, b, c, d))
    return picture if method is None else picture.transpose(method)


def _stream_of(container):
    if not container.streams.video:
        raise ValueError("it holds no pictures.")
    return container.streams.video[0]


def _refuse_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ValueError(
            f"its frames are too large: {width} x {height}; at most {max_pixels:,} pixels are decoded."
        )


def _reason(error: Exception) -> str:
    system = getattr(error, "strerror", None)  # of FFmpeg and of the operating system, without the path
    text = system or (str(error) if isinstance(error, ValueError) else "it is damaged")
    return f"{text.rstrip('.')}."


__all__ = ["ALL_FRAMES", "DEFAULT_FRAMES", "FrameSampling", "film_frames", "iterate_film"]
