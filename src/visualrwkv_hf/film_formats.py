"""What a film's first bytes tell: its format, without any library that decodes it."""

import os

SIGNATURE_BYTES = 16
TRANSPORT_STREAM = b"\x47"
"""MPEG transport streams begin so, and much else: it is looked for last."""
ANIMATIONS = (b"GIF8", b"\x89PNG", b"RIFF....WEBP")
"""First bytes of animations that Pillow decodes; a dot stands for any byte."""
DEMUXERS = {
    b"....ftyp": "mp4",
    b"....moov": "mp4",
    b"\x1aE\xdf\xa3": "matroska",
    b"RIFF....AVI ": "avi",
    b"OggS": "ogg",
    b"FLV\x01": "flv",
    b"\x00\x00\x01\xba": "mpeg",
}
"""First bytes of a film, and FFmpeg's name of the format (`matroska` is WebM as well)."""

FILM_SUFFIXES = frozenset(
    (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm")
)
"""File extensions, in lower case, of what is taken for a film where only a name is known."""


def first_bytes(path: str | os.PathLike) -> bytes:
    """Return the first bytes of a file, enough to tell its format. Raises `OSError` if it cannot be read."""
    with open(path, "rb") as file:
        return file.read(SIGNATURE_BYTES)


def is_animation(start: bytes) -> bool:
    """Return whether a file that begins so is an animation, or a picture, of a format that Pillow decodes."""
    return any(_begins(start, signature) for signature in ANIMATIONS)


def demuxer_of(start: bytes) -> str:
    """Return FFmpeg's name of the format of a film that begins so.

    Raises:
        ValueError: it is in none of the formats that are opened.
    """
    for signature, demuxer in DEMUXERS.items():
        if _begins(start, signature):
            return demuxer
    if start.startswith(TRANSPORT_STREAM):
        return "mpegts"
    raise ValueError("it is no MP4, MOV, WebM, Matroska, AVI, Ogg, FLV, MPEG, GIF, APNG or WebP file.")


def is_film_file(path: str | os.PathLike) -> bool:
    """Return whether a file is a film by its first bytes. An animation that is also a picture is none.

    Raises:
        OSError: it cannot be read.
    """
    start = first_bytes(path)
    return any(_begins(start, signature) for signature in DEMUXERS) or (
        start.startswith(TRANSPORT_STREAM) and os.path.splitext(path)[1].lower() == ".ts"
    )


def _begins(start: bytes, signature: bytes) -> bool:
    return len(start) >= len(signature) and all(
        wanted in (b"."[0], byte) for wanted, byte in zip(signature, start)
    )
