"""Open pictures: whatever a caller may give as a picture becomes a decoded Pillow picture in RGB.

A picture may come from a stranger, so only the usual formats are decoded, the number of pixels is checked before
anything is decoded, and errors never quote the contents of a picture. torch and transformers are not imported here:
processes that only decode start in a fraction of a second.
"""

import binascii
import os
import re
import sys
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    from transformers.image_utils import ChannelDimension

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
"""Formats that are opened, by Pillow's names. AVIF and HEIF need a Pillow, or a plugin of it, that reads them."""

MAX_PIXELS = 178_956_970
"""Default limit on width times height: where Pillow too refuses a file as a decompression bomb (537 MB in RGB)."""

MAX_DOWNLOAD_BYTES = 100 * 2**20
"""Limit on the size of a picture that is downloaded, after its transfer encoding was undone."""

DOWNLOAD_SECONDS = 30
"""How long a server may stay silent while a picture is downloaded."""

LONGEST_NAME = 200
"""Characters of a path or URL that an error message quotes."""

DATA_URL = re.compile(r"data:[^,]{0,200},", flags=re.IGNORECASE)
BASE64_TEXT = re.compile(r"[A-Za-z0-9+/=\s]{65,}")
"""Longer texts of these characters alone are taken for base64 when an error message is written."""
ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>")
"""How Python prints an object without a representation of its own, such as `<_io.BytesIO object at 0x7f…>`."""

MOST_SCANS, MOST_EXIF_PARTS = 32, 64
"""How many scans a JPEG can have, each of which is as much work as the whole picture, and how many pieces its EXIF data
can come in, which Pillow joins one after the other. A usual one has ten scans at most, and one piece."""
JPEG_MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd8\xff])")
"""What begins a part of a JPEG that has a length. Between the parts, anything else is skipped."""
END_OF_IMAGE, START_OF_SCAN = 0xD9, 0xDA

TIFF_TILE = (322, 323)
"""TIFF's tags for the width and the height of a tile."""
MOST_TILE_PIXELS = 2**24
"""Pixels of a TIFF's tile; usual ones have 256 x 256."""

SIXTEEN_BIT_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
"""Pillow's modes of grey pictures with 65536 levels (Pillow reads such a PGM as "I")."""


def open_picture(
    source, input_data_format: "str | ChannelDimension | None" = None, *, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Return a picture, decoded and in RGB.

    JPEGs are decoded in full, not at the reduced size that Pillow's `draft` offers: resizing from there would give
    other pixels than the original's preprocessing.

    Args:
        source: a Pillow picture; an array or tensor [H, W], [H, W, c] or [c, H, W] with c = 1, 3 or 4, of floats
            from 0 to 1, bool, uint16 or integers from 0 to 255; a path; a http(s) URL; a file's contents, as bytes
            or as base64 text, with or without the prefix `data:image/...;base64,`. The first frame of an animation
            is taken. A file is turned upright as its EXIF data says, as transformers does (the original does not look);
            a Pillow picture is taken as it is.
        input_data_format: "channels_first" or "channels_last", for an array whose shape fits both.
        max_pixels: largest width times height that is decoded.

    Raises:
        ValueError: if this is no picture in one of `FORMATS`, cannot be decoded, is empty or too large. The message
            names a path or a URL, and quotes neither the contents of a picture nor addresses in memory.
    """
    try:
        return _opened(source, input_data_format, max_pixels)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise what they like
        raise ValueError(f"{name_of(source)} cannot be read as a picture: {_reason(error)}") from error


def _opened(source, input_data_format: "str | ChannelDimension | None", max_pixels: int) -> Image.Image:
    if is_tensor(source):
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy()
    if isinstance(source, np.ndarray):
        return array_to_rgb(source, input_data_format)
    if isinstance(source, Image.Image):
        return _decoded(source, max_pixels)
    if isinstance(source, str | os.PathLike):
        file = file_of(os.fspath(source))
    elif isinstance(source, bytes | bytearray | memoryview):
        _refuse_slow_jpeg(bytes(source))
        file = BytesIO(source)
    else:
        raise ValueError(
            "it must be a Pillow picture, an array, a tensor, a path, a URL, base64 text or a file's bytes."
        )
    with Image.open(file, formats=_readable_formats()) as picture:
        _refuse_size(picture.size[0] * picture.size[1], max_pixels, _size_of(picture))
        _refuse_large_tiles(picture)
        ImageOps.exif_transpose(picture, in_place=True)
        rgb = _decoded(picture, max_pixels)
        rgb = rgb.copy() if rgb is picture else rgb  # the copy knows of no file
        rgb.info = {}  # a PNG's texts can be larger than the picture
        return rgb


def _refuse_slow_jpeg(content: bytes) -> None:
    """Refuse a JPEG of so many parts that decoding it would take minutes, whatever its size."""
    if not content.startswith(b"\xff\xd8"):
        return
    scans, position = 0, 2
    while scans <= MOST_SCANS and (marker := JPEG_MARKER.search(content, position)):
        kind, position = marker[1][0], marker.end()
        if kind == END_OF_IMAGE:
            break
        scans += kind == START_OF_SCAN
        position += max(int.from_bytes(content[position : position + 2], "big"), 2)
    if scans > MOST_SCANS or content.count(b"Exif\x00\x00") > MOST_EXIF_PARTS:
        raise ValueError(
            f"it is a JPEG of more than {MOST_SCANS} scans or of more than {MOST_EXIF_PARTS} pieces of EXIF data."
        )


def _refuse_large_tiles(picture: Image.Image) -> None:
    """Refuse a TIFF whose tiles are huge, each of which is decoded in full however small the picture is."""
    tags = getattr(picture, "tag_v2", {})
    width, height = (tags.get(tag, 0) for tag in TIFF_TILE)
    if width * height > MOST_TILE_PIXELS:
        raise ValueError(f"it is a TIFF with tiles of {width} x {height} pixels.")


def is_tensor(value: Any) -> bool:
    """Return whether a value is a tensor of torch. torch need not be imported: whoever has a tensor has imported it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _decoded(picture: Image.Image, max_pixels: int) -> Image.Image:
    if 0 in picture.size:
        raise ValueError(f"it has no pixels: {_size_of(picture)}.")
    _refuse_size(picture.size[0] * picture.size[1], max_pixels, _size_of(picture))
    picture.load()  # a truncated file fails here
    return to_rgb(picture)


def _size_of(picture: Image.Image) -> str:
    return f"its size is {picture.size[0]} x {picture.size[1]}"


def _refuse_size(pixels: int, max_pixels: int, size: str) -> None:
    if pixels > max_pixels:
        raise ValueError(f"it is too large: {size}, and at most {max_pixels:,} pixels are decoded.")


def _readable_formats() -> list[str]:
    """Return those of `FORMATS` that this Pillow can read; it raises `KeyError` for any other."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def file_of(text: str) -> str | BytesIO:
    """Return the path of a file, or the contents that a URL or base64 text leads to."""
    if text.startswith(("http://", "https://")):
        return BytesIO(_downloaded(text))
    is_data = DATA_URL.match(text)
    if not is_data and os.path.isfile(text):
        return text
    try:
        return BytesIO(binascii.a2b_base64(text[is_data.end() :] if is_data else text))
    except ValueError:
        if is_data:
            raise ValueError("it is not base64.") from None
        raise ValueError("there is no such file, and it is no URL and no base64 text.") from None


def _downloaded(url: str) -> bytes:
    """Return what a URL leads to. Raises `ValueError` if that has more than `MAX_DOWNLOAD_BYTES`."""
    import httpx

    content = bytearray()
    with httpx.stream("GET", url, follow_redirects=True, timeout=DOWNLOAD_SECONDS) as response:
        response.raise_for_status()
        for block in response.iter_bytes():
            content += block
            if len(content) > MAX_DOWNLOAD_BYTES:
                raise ValueError(f"the download is larger than {MAX_DOWNLOAD_BYTES:,} bytes.")
    return bytes(content)


def name_of(source) -> str:
    """Return how an error message calls a source: a path or URL by itself, everything else by its kind."""
    if not isinstance(source, str | os.PathLike):
        return type(source).__name__
    text = os.fspath(source)
    if not isinstance(text, str):
        text = os.fsdecode(text)
    if DATA_URL.match(text) or BASE64_TEXT.fullmatch(text):
        return "Base64 text"
    if len(text) > LONGEST_NAME:
        return f"A text of {len(text):,} characters"
    return repr(text)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"it is not a file in one of the formats {', '.join(_readable_formats())}, or it is damaged."
    if isinstance(error, Image.DecompressionBombError):
        return f"it is too large: {pillows_limit()}."
    return ADDRESS.sub("it", str(error))[:300] or f"{type(error).__name__}."


def pillows_limit() -> str:
    """Return what Pillow's `DecompressionBombError` says, in plain words."""
    return f"at most {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels are decoded"


# Values.


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a picture of any mode in RGB, as Pillow's `convert("RGB")` does but without clipping.

    Transparency is dropped, not blended (the colour below it shows), palettes are looked up, and grey of 16 bits is
    scaled down by 257.

    Raises:
        ValueError: if values lie outside the mode's range, or Pillow knows no such conversion.
    """
    if image.mode in SIXTEEN_BIT_MODES:
        return _gray(np.asarray(image), 65535, image.mode)
    if image.mode == "F":
        return _gray(np.asarray(image), 255, image.mode)
    return image if image.mode == "RGB" else image.convert("RGB")


def _gray(values: np.ndarray, white: int, mode: str) -> Image.Image:
    return Image.fromarray(_to_bytes(values, white, f"A picture of mode {mode!r}")).convert("RGB")


def _to_bytes(values: np.ndarray, white: int, what: str) -> np.ndarray:
    """Return values from 0 to `white` as uint8 of the same shape, rounded."""
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= white):  # NaN fails too
        raise ValueError(f"{what} must have values from 0 to {white}, got {low:g} to {high:g}.")
    if values.dtype.kind == "f":
        return _rounded(values.astype(np.float64), white)
    return _rounded(np.arange(white + 1, dtype=np.float64), white)[
        values.astype(np.uint16)
    ]  # by table: small


def _rounded(values: np.ndarray, white: int) -> np.ndarray:
    return np.round(values * (255 / white)).astype(np.uint8)


WHITE = {"bool": 1, "uint16": 65535}
"""The largest value of an array's dtype where it is neither 1 (floats) nor 255 (all other integers)."""


def array_to_rgb(array: np.ndarray, input_data_format: "str | ChannelDimension | None" = None) -> Image.Image:
    """Return an array [H, W], [H, W, c] or [c, H, W] as a picture; see [`open_picture`] for its values."""
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim == 3:
        from transformers.image_utils import ChannelDimension, infer_channel_dimension_format

        axis = input_data_format or infer_channel_dimension_format(array, num_channels=(1, 3, 4))
        array = np.moveaxis(array, 0, -1) if axis == ChannelDimension.FIRST else array
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
        raise ValueError(f"An array must be [H, W] or have 1, 3 or 4 channels, got shape {array.shape}.")
    if 0 in array.shape:
        raise ValueError(f"An array without pixels: shape {array.shape}.")
    if array.dtype.kind not in "buif":
        raise ValueError(f"An array must hold bool, integers or floats, got {array.dtype}.")
    if array.dtype != np.uint8:
        white = 1 if np.issubdtype(array.dtype, np.floating) else WHITE.get(array.dtype.name, 255)
        array = _to_bytes(array, white, f"An array of dtype {array.dtype}")
    if array.shape[-1] == 1:
        array = np.repeat(array, 3, axis=-1)
    return Image.fromarray(np.ascontiguousarray(array[..., :3]))


__all__ = ["open_picture"]
