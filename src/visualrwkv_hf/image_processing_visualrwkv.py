"""Make pixels of pictures with Pillow, for towers that transformers' own image processors do not serve.

Sizes are (width, height), boxes (left, upper, right, lower), as in Pillow. Letters: N pictures, S pixels of a
side.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import ChannelDimension
from transformers.processing_utils import ImagesKwargs

from .configuration_visualrwkv import VisualRWKVConfig
from .encoders import ENCODERS, pixel_inputs
from .pictures import MAX_PIXELS, open_picture
from .remote_code import IMAGE_PROCESSOR_CODE, copy_code

Size = tuple[int, int]
Box = tuple[int, int, int, int]


def _flat(images) -> Iterator:
    """Yield the single pictures of a picture, a nested list, or a batch in one array."""
    if isinstance(images, list | tuple):
        for item in images:
            yield from _flat(item)
    elif isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4:
        yield from images
    else:
        yield images


def _of_each(items: Iterable, function: Callable) -> list:
    """Return what `function` gives for each picture; an error says which one it is about."""
    results = []
    for number, item in enumerate(items, start=1):
        try:
            results.append(function(item))
        except ValueError as error:
            raise ValueError(f"Picture {number}: {error}") from error
    if not results:
        raise ValueError("No pictures given.")
    return results


# Tiling: from the size of a picture to what is cut out of it.


class Layout(NamedTuple):
    """What the encoders see of a picture: `boxes` of it, after resizing it to `resize` if that is given."""

    resize: Size | None
    boxes: list[Box]


def grid_boxes(size: Size, columns: int, rows: int) -> list[Box]:
    """Return boxes of one size, row by row; a remainder is left out at the right and lower edge.

    A picture narrower than its columns gives boxes of one pixel, several of the same.
    """
    width, height = (max(1, length // count) for length, count in zip(size, (columns, rows)))
    corners = [
        (min(column * width, size[0] - width), min(row * height, size[1] - height))
        for row in range(rows)
        for column in range(columns)
    ]
    return [(left, upper, left + width, upper + height) for left, upper in corners]


def wasted_area(size: Size, canvas: Size) -> int:
    """Return the pixels of `canvas` that stay empty when a picture fills it as far as its aspect ratio allows."""
    width, height = size
    scale = min(canvas[0] / width, canvas[1] / height)
    return canvas[0] * canvas[1] - int(width * scale) * int(height * scale)


def region_grid(size: Size, side: int, closest: bool) -> Size:
    """Return columns and rows of regions of `side` pixels for a picture (v7.02; v7.03 and v7.04 with `closest`).

    The least wasted area among as many regions as cover the picture and one fewer, per direction; the first
    of equals, columns before rows. `closest` adds by how much the area differs from the picture's.
    """
    most = [-(-length // side) for length in size]
    candidates = [
        (columns, rows)
        for columns in range(max(1, most[0] - 1), most[0] + 1)
        for rows in range(max(1, most[1] - 1), most[1] + 1)
    ]

    def cost(grid: Size) -> int:
        canvas = (grid[0] * side, grid[1] * side)
        surplus = abs(canvas[0] * canvas[1] - size[0] * size[1])
        return wasted_area(size, canvas) + (surplus if closest else 0)

    return min(candidates, key=cost)


GRIDS_700 = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))
"""Columns and rows that v7.00 chooses from."""


def grid_700(size: Size, side: int) -> Size:
    """Return columns and rows for v7.00's tiles: the least wasted area, the first of equals."""
    return min(GRIDS_700, key=lambda grid: wasted_area(size, (grid[0] * side, grid[1] * side)))


def _whole(size: Size) -> Box:
    return (0, 0, *size)


def _lay_out_whole(size: Size, side: int, tile_grid: int) -> Layout:
    return Layout(None, [_whole(size)])


def _lay_out_views(size: Size, side: int, tile_grid: int) -> Layout:
    return Layout(None, [_whole(size), *grid_boxes(size, tile_grid, tile_grid)])


def _lay_out_700(size: Size, side: int, tile_grid: int) -> Layout:
    columns, rows = grid_700(size, side)
    is_small = (columns, rows) == (2, 2) and size[0] * size[1] <= (2 * side) ** 2
    return Layout(None, [_whole(size), *([] if is_small else grid_boxes(size, columns, rows))])


def _lay_out_regions(size: Size, side: int, closest: bool) -> Layout:
    columns, rows = region_grid(size, side, closest)
    canvas = (columns * side, rows * side)
    if canvas[0] * canvas[1] > MAX_PIXELS:
        raise ValueError(
            f"Its {size[0]} x {size[1]} pixels would be resized to {canvas[0]} x {canvas[1]}; at most {MAX_PIXELS:,} "
            "are cut into tiles."
        )
    return Layout(canvas, grid_boxes(canvas, columns, rows))


def _lay_out_smallest(size: Size, side: int, tile_grid: int) -> Layout:
    return _lay_out_regions(size, side, closest=False)


def _lay_out_closest(size: Size, side: int, tile_grid: int) -> Layout:
    return _lay_out_regions(size, side, closest=True)


class Tiling(NamedTuple):
    """A way to cut a picture, from its size, S of the first encoder and `tile_grid`.

    `has_tokens`: whether each piece is a tile with tokens of its own, so that `num_tiles` counts them; else
    the tower makes one picture's tokens of all pieces.
    """

    lay_out: Callable[[Size, int, int], Layout]
    has_tokens: bool


TILINGS = {
    "none": Tiling(_lay_out_whole, has_tokens=False),
    "views": Tiling(_lay_out_views, has_tokens=False),
    "whole_and_tiles": Tiling(_lay_out_700, has_tokens=True),
    "smallest": Tiling(_lay_out_smallest, has_tokens=True),
    "closest": Tiling(_lay_out_closest, has_tokens=True),
}

# Pixels.


def squash(image: Image.Image, size: int, image_mean: list[float], image_std: list[float]) -> np.ndarray:
    """Return a picture as an encoder reads it: resized (bicubic) to a square; (x / 255 - mean) / std.

    Returns:
        float32 [3, S, S], bit-equal to the original's.
    """
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))  # uint8 [S, S, 3]
    scaled = pixels.astype(np.float32) / np.float32(255)
    normalized = (scaled - np.asarray(image_mean, dtype=np.float32)) / np.asarray(image_std, dtype=np.float32)
    return np.ascontiguousarray(np.moveaxis(normalized, -1, 0))


class VisualRWKVImageProcessorKwargs(TypedDict, total=False):
    """Options of a call."""

    encoders: dict[str, dict]
    tiling: str
    tile_grid: int
    input_data_format: str | ChannelDimension | None
    return_tensors: str | None
    device: str | torch.device | None


class VisualRWKVImageProcessor(PilBackend):
    r"""Pictures for towers of several encoders (v6 HD and UHD, v7.00) and for tiles (UHD, v7.02 to v7.04).

    encoders (`dict[str, dict]`, defaults to DINOv2 at 448, SigLIP at 448 and SAM at 1024):
        For each encoder of the tower (`"clip"`, `"dinov2"`, `"siglip"`, `"sam"`, `"resnet"`): `size`, the side of its
        square picture in pixels, `image_mean` and `image_std`, three numbers each. The first, in this order,
        gives `pixel_values`, every other one `pixel_values_{name}`.
    tiling (`str`, defaults to `"none"`):
        `"none"`; `"views"` (UHD: the whole and `tile_grid` x `tile_grid` tiles, which the tower fuses); with
        tokens for every tile, counted by `num_tiles`: `"whole_and_tiles"` (v7.00's option), `"smallest"`
        (v7.02), `"closest"` (v7.03, v7.04).
    tile_grid (`int`, defaults to 1):
        n, for `"views"`.

    Raises `ValueError`, naming the numbers, if the fields do not fit together.
    """

    valid_kwargs = VisualRWKVImageProcessorKwargs
    encoders = {
        name: {"size": size, **ENCODERS[name].statistics}
        for name, size in (("dinov2", 448), ("siglip", 448), ("sam", 1024))
    }
    tiling = "none"
    tile_grid = 1

    def __init__(self, **kwargs):
        _refuse_options(kwargs.keys() & ImagesKwargs.__annotations__.keys())
        super().__init__(**kwargs)
        _check_fields(self.encoders, self.tiling, self.tile_grid)

    @classmethod
    def from_dict(cls, image_processor_dict: dict, **kwargs):
        """Make one of saved fields; refuses the options that the constructor refuses, as `from_pretrained` must."""
        _refuse_options(kwargs.keys() & ImagesKwargs.__annotations__.keys())
        return super().from_dict(image_processor_dict, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        names = list(pixel_inputs(self.encoders).values())
        return names + ["num_tiles"] * TILINGS[self.tiling].has_tokens

    def preprocess(self, images, **kwargs) -> BatchFeature:
        """Make pixels of pictures.

        Args:
            images: a picture, a list, nested or not, or a batch in one array; see [`open_picture`].
            kwargs: `encoders`, `tiling`, `tile_grid` in place of the processor's own, `return_tensors`,
                `input_data_format`; `device` has no meaning for Pillow.

        Returns:
            `pixel_values` and `pixel_values_{name}`, float32 [pieces of all pictures, 3, S, S], pieces of a
            picture adjacent: the whole first, then its tiles row by row. `num_tiles`, int64 [N], where tiles
            have tokens.

        Raises:
            ValueError: if a picture cannot be read or becomes too large (it says which one), or an option has no
                meaning here.
        """
        _refuse_options(kwargs)
        encoders, tiling, tile_grid = self._fields(kwargs)
        pictures = _of_each(_flat(images), lambda one: open_picture(one, kwargs.get("input_data_format")))
        layouts = _of_each(pictures, lambda one: _lay_out(one.size, encoders, tiling, tile_grid))
        pieces = [_cut(picture, layout) for picture, layout in zip(pictures, layouts)]
        data = {
            argument: np.stack([squash(piece, **encoders[name]) for cut in pieces for piece in cut])
            for name, argument in pixel_inputs(encoders).items()
        }
        if TILINGS[tiling].has_tokens:
            data["num_tiles"] = np.array([len(cut) for cut in pieces], dtype=np.int64)
        return BatchFeature(data, tensor_type=kwargs.get("return_tensors"))

    def to_dict(self) -> dict:
        """Return the fields, and where remote code finds the class."""
        return super().to_dict() | {"auto_map": dict(IMAGE_PROCESSOR_CODE)}

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Write the fields, and the code that reads them beside them, so that a push uploads both."""
        super().to_json_file(json_file_path)
        self.copy_code_to(Path(json_file_path).parent)

    def copy_code_to(self, folder: Path) -> None:
        """Copy the code of this class, and what it imports, into `folder`."""
        copy_code(folder, IMAGE_PROCESSOR_CODE)

    def get_number_of_image_patches(
        self, height: int, width: int, images_kwargs: Mapping | None = None
    ) -> int:
        """Return how many tiles with tokens of their own a picture of this size is cut into.

        Raises:
            ValueError: too many to be made.
        """
        encoders, tiling, tile_grid = self._fields(images_kwargs or {})
        boxes = _lay_out((width, height), encoders, tiling, tile_grid).boxes
        return len(boxes) if TILINGS[tiling].has_tokens else 1

    def get_resized_pixels(self, height: int, width: int) -> int:
        """Return how many pixels a picture of this size has after the resizing that comes before cutting, if any.

        Raises:
            ValueError: too many.
        """
        resized = _lay_out((width, height), *self._fields({})).resize or (width, height)
        return resized[0] * resized[1]

    def _fields(self, kwargs: Mapping) -> tuple[dict[str, dict], str, int]:
        """Return the processor's fields, or those of a call."""
        fields = [
            getattr(self, name) if kwargs.get(name) is None else kwargs[name]
            for name in ("encoders", "tiling", "tile_grid")
        ]
        _check_fields(*fields)
        return tuple(fields)


def _refuse_options(names: Iterable[str]) -> None:
    """Raise `ValueError` for options that do not exist: encoders were trained with one size and one mean."""
    options = VisualRWKVImageProcessorKwargs.__annotations__
    if unknown := sorted(set(names) - set(options)):
        raise ValueError(
            f"VisualRWKVImageProcessor has no option {', '.join(unknown)}; it has {', '.join(options)}."
        )


def _lay_out(size: Size, encoders: Mapping[str, dict], tiling: str, tile_grid: int) -> Layout:
    first = next(iter(pixel_inputs(encoders)))
    return TILINGS[tiling].lay_out(size, encoders[first]["size"], tile_grid)


def _cut(picture: Image.Image, layout: Layout) -> list[Image.Image]:
    if layout.resize is not None:
        picture = picture.resize(layout.resize, Image.Resampling.LANCZOS)
    return [picture.crop(box) for box in layout.boxes]


def _check_fields(encoders: Mapping[str, dict], tiling: str, tile_grid: int) -> None:
    if not encoders or (unknown := sorted(set(encoders) - set(ENCODERS))):
        raise ValueError(
            f"encoders must be some of {', '.join(ENCODERS)}, got {unknown if encoders else 'none'}."
        )
    for name, fields in encoders.items():
        _check_encoder(name, fields)
    if tiling not in TILINGS:
        raise ValueError(f"tiling must be one of {', '.join(TILINGS)}, got {tiling!r}.")
    if (tiling == "views") != (tile_grid > 1) or tile_grid < 1:
        raise ValueError(
            f"tile_grid must be above 1 with tiling='views' and 1 otherwise, got {tile_grid} with {tiling!r}."
        )
    if tiling in ("smallest", "closest") and len(encoders) > 1:
        raise ValueError(
            f"tiling={tiling!r} cuts to the size of one encoder, got {len(encoders)}: {list(encoders)}."
        )


def _check_encoder(name: str, fields: Mapping) -> None:
    if set(fields) != {"size", "image_mean", "image_std"}:
        raise ValueError(f"encoders[{name!r}] needs size, image_mean and image_std, got {sorted(fields)}.")
    size = fields["size"]
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"encoders[{name!r}]['size'] must be a whole number of pixels from 1, got {size!r}.")
    for key in ("image_mean", "image_std"):
        if len(fields[key]) != 3 or not all(isinstance(value, int | float) for value in fields[key]):
            raise ValueError(f"encoders[{name!r}][{key!r}] must be three numbers, got {fields[key]}.")
    if min(fields["image_std"]) <= 0:
        raise ValueError(f"encoders[{name!r}]['image_std'] must be above 0, got {fields['image_std']}.")


# Which image processor a model needs.


def image_processor_for(config: VisualRWKVConfig, tiling: str = "none") -> BaseImageProcessor:
    """Return the image processor that a model's tower was made for.

    Args:
        config: of the model. A tower with `tile_grid` > 1 gets its views.
        tiling: `"whole_and_tiles"`, `"smallest"` or `"closest"`, for models that read tiles.

    Raises:
        ValueError: if the tiling does not fit the tower.
    """
    vision = config.vision_config
    sizes = vision.image_sizes
    if vision.tile_grid > 1:
        if tiling not in ("none", "views"):
            raise ValueError(
                f"A tower with tile_grid {vision.tile_grid} makes its views itself: no tiling {tiling!r}."
            )
        tiling = "views"
    if tiling == "none" and len(sizes) == 1 and (stock := ENCODERS[next(iter(sizes))].image_processor):
        return stock(*sizes.values())
    encoders = {name: {"size": size, **ENCODERS[name].statistics} for name, size in sizes.items()}
    return VisualRWKVImageProcessor(encoders=encoders, tiling=tiling, tile_grid=vision.tile_grid)


__all__ = ["VisualRWKVImageProcessor"]
