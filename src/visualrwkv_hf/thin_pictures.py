"""The part of a very thin picture that CLIP's image processor looks at, computed without the rest."""

import numpy as np
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor

LARGEST_BETWEEN = 2**24
"""Most pixels that a picture may have after it is resized and before it is cut; at S = 336, sides of 1 to 148."""

CUTTING_FIELDS = ("do_resize", "size", "resample", "do_center_crop", "crop_size")
"""Fields of an image processor that say what of a picture it resizes and cuts."""


def middle_of_thin(picture: Image.Image, image_processor: BaseImageProcessor) -> Image.Image:
    """Return the middle of a thin picture, bit for bit what CLIP's image processor makes of it; others unchanged.

    That processor resizes the shorter edge to S and then keeps only the middle square: 1 x 5000 pixels become S x
    5000 S in between, which takes gigabytes. It leaves unchanged what is returned here.

    Args:
        picture: RGB.
        image_processor: any. Only one that resizes and cuts so makes something large in between.

    Returns:
        S x S pixels for a picture that would have more than `LARGEST_BETWEEN` in between.
    """
    side = _side_of_middle(image_processor)
    short, long = sorted(picture.size)
    if side is None or short >= side or side * side * long // short <= LARGEST_BETWEEN:
        return picture
    resized = int(side * long / short)  # as transformers rounds it
    first = (resized - side) // 2
    start = max(0, first * long // resized - BICUBIC_REACH)
    stop = min(long, -(-(first + side) * long // resized) + BICUBIC_REACH)
    # Pillow resizes rows first, and rounds what is between to bytes.
    if picture.size[1] == long:
        band = picture.crop((0, start, short, stop)).resize((side, stop - start), Image.Resampling.BICUBIC)
        return Image.fromarray(_enlarged_lines(np.asarray(band), start, long, resized, first, side))
    columns = np.asarray(picture.crop((start, 0, stop, short))).swapaxes(0, 1)  # uint8 [columns, short, 3]
    band = _enlarged_lines(columns, start, long, resized, first, side).swapaxes(0, 1)
    return Image.fromarray(np.ascontiguousarray(band)).resize((side, side), Image.Resampling.BICUBIC)


def _side_of_middle(image_processor: BaseImageProcessor) -> int | None:
    """Return S for an image processor that resizes the shorter edge to S, bicubic, and cuts S x S; else None."""
    do_resize, size, resample, do_cut, cut = (getattr(image_processor, name, None) for name in CUTTING_FIELDS)
    if not (do_resize and do_cut and size and cut) or resample != Image.Resampling.BICUBIC:
        return None
    side = size.get("shortest_edge")
    is_middle = not size.get("longest_edge") and (cut.get("height"), cut.get("width")) == (side, side)
    return side if is_middle else None


BICUBIC_REACH = 2
"""How far, in pixels of the smaller picture, a pixel of an enlarged one looks to each side."""


def _enlarged_lines(
    lines: np.ndarray, start: int, length: int, resized: int, first: int, count: int
) -> np.ndarray:
    """Return lines `first` to `first + count` of a picture that is enlarged from `length` lines to `resized`.

    As Pillow does: Keys' cubic with a = -1/2 (IEEE Trans. ASSP 29.6, 1981), around the middles of pixels, cut off at
    the edges and normalised to a sum of 1; weights are fixed-point numbers with 22 fractional bits.

    Args:
        lines: uint8 [n, m, 3], those of the picture that are looked at.
        start: which line of the picture the first of them is.
        length: of the picture.
        resized: the length that it is enlarged to.
        first: of the lines that are returned.
        count: of the lines that are returned.

    Returns:
        uint8 [count, m, 3].
    """
    centers = (first + np.arange(count) + 0.5) * (length / resized)
    nearest = np.maximum((centers - BICUBIC_REACH + 0.5).astype(np.int64), 0)
    seen = nearest[:, None] + np.arange(2 * BICUBIC_REACH + 1)  # [count, 5]
    end = np.minimum((centers + BICUBIC_REACH + 0.5).astype(np.int64), length)[:, None]
    x = np.abs(seen - centers[:, None] + 0.5)
    inner, outer = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weights = np.where(seen < end, np.where(x < 1, inner, np.where(x < 2, outer, 0)), 0)
    weights /= weights.sum(1, keepdims=True)
    fixed = np.trunc(weights * 2**22 + np.copysign(0.5, weights)).astype(np.int64)
    values = lines[np.minimum(seen - start, len(lines) - 1)].astype(np.int64)  # [count, 5, m, 3]
    total = np.einsum("nk,nkmc->nmc", fixed, values)
    return np.clip((total + 2**21) >> 22, 0, 255).astype(np.uint8)
