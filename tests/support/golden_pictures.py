"""Compute the golden cases about pixels: resizing, cutting, normalising, and the way from two PNG files to logits."""

import hashlib
import re
from collections.abc import Callable
from typing import Any

import torch
from golden_cases import Case, Result
from golden_models import pooling_to, v7_public, v7_run
from torch import Tensor

from visualrwkv_hf import VisualRWKVConfig, VisualRWKVImageProcessor
from visualrwkv_hf.image_processing_visualrwkv import (
    TILINGS,
    grid_700,
    grid_boxes,
    image_processor_for,
    region_grid,
)
from visualrwkv_hf.modeling_vision import pool_patches
from visualrwkv_hf.pictures import to_rgb

ENCODER_OF = {"dino": "dinov2", "siglip": "siglip", "sam": "sam"}
PIXELS_OF = {"dino": "pixel_values", "siglip": "pixel_values_siglip", "sam": "pixel_values_sam"}
"""Map the original's names of the towers to ours, and to the names of their pixels in the processor's output."""


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def one_encoder_processor(encoder: str, size: int, patch_size: int) -> Any:
    """Return the image processor for a tower of one stock encoder."""
    vision = {f"{encoder}_config": {"image_size": size, "patch_size": patch_size}}
    return image_processor_for(VisualRWKVConfig(vision_config=vision))


def every(name: str) -> int:
    """Return the n of a tensor whose name ends with ".every<n>": 8 for "wide.224.every8", else 1."""
    last = name.split(".")[-1]
    return int(last.removeprefix("every")) if last.startswith("every") else 1


def pixels_of_png(case: Case, encoder: str, patch_size: int) -> Result:
    """Compute pixels; the tensor <picture>.<size>.every<n> holds every n-th row and column, <picture>.<size> all."""
    result = Result()
    for name in case.expected:
        picture, size, step = name.split(".")[0], int(name.split(".")[1]), every(name)
        processor = one_encoder_processor(encoder, size, patch_size)
        # VisualRWKVProcessor opens pictures in this way for the stock processors, which drops transparency.
        image = to_rgb(case.picture(f"{picture}.png"))
        pixels = processor(images=image, return_tensors="pt")["pixel_values"]
        result.add(**{name: pixels[..., ::step, ::step]})
        if "sha256.json" in case.info["files"]:
            add_hashes(result, case, f"{picture}.{size}", pixels, processor)
    return result


def add_hashes(result: Result, case: Case, name: str, pixels: Tensor, processor: Any) -> None:
    """Compare the resized and cropped picture to the bit, and the mean and deviation of its normalised values.

    These two are rounded to 5 decimals, because normalised values agree up to float32 noise only.
    """
    golden = case.json("sha256.json")[name]
    mean, std = (torch.tensor(getattr(processor, key))[:, None, None] for key in ("image_mean", "image_std"))
    cropped = ((pixels[0] * std + mean) * 255).round().to(torch.uint8)  # [3, S, S]
    result.facts[f"{name} uint8"] = sha256(cropped), golden["resized_cropped_uint8_chw_sha256"]
    for key, found in {"mean": pixels.double().mean(), "std": pixels.double().std()}.items():
        result.facts[f"{name} {key}"] = round(float(found), 5), round(golden[key], 5)


def v700_transforms(case: Case) -> Result:
    """Compare the float32 pixels for v7.00's three towers with the original's to the bit."""
    result, hashes = Result(), case.json("sha256.json")
    processor = VisualRWKVImageProcessor()
    for picture in sorted({name.split(".")[0] for name in case.expected}):
        outputs = processor(images=case.picture(f"{picture}.png"), return_tensors="pt")
        for tower, key in PIXELS_OF.items():
            pixels, name = outputs[key][0], f"{picture}.{tower}"  # [3, S, S]
            golden, fields = hashes[name], processor.encoders[ENCODER_OF[tower]]
            mean, std = (torch.tensor(fields[f"image_{k}"])[:, None, None] for k in ("mean", "std"))
            resized = ((pixels * std + mean) * 255).round().to(torch.uint8).permute(1, 2, 0)
            result.facts[f"{name} float32"] = sha256(pixels), golden["float32_sha256"]
            result.facts[f"{name} uint8"] = sha256(resized), golden["resized_uint8_hwc_sha256"]
            for expected in case.expected:
                if expected.startswith(f"{name}."):
                    result.add(**{expected: pixels[..., :: every(expected), :: every(expected)]})
    return result


# --- cutting ----------------------------------------------------------------------------------------


def crops(layout: Any, is_whole_first: bool = False) -> dict[str, Any]:
    """Return a layout in the form in which the original's calls were recorded; the whole picture is no crop there."""
    return {
        "crops": [list(box) for box in layout.boxes[is_whole_first:]],
        "num_images": len(layout.boxes),
        "resize": [] if layout.resize is None else [list(layout.resize)],
    }


def uhd_tiles(size: tuple[int, int], count: int) -> dict[str, Any]:
    boxes = [list(box) for box in grid_boxes(size, count, count)]
    return {"crops": boxes, "num_images": len(boxes), "resize": []}


def canvas(grid: tuple[int, int], side: int) -> list[int]:
    return [grid[0] * side, grid[1] * side]


V700_SIDE = 448

CUTS: dict[str, Callable[[tuple[int, int], int], Any]] = {
    "uhd_split_image_into_tiles": uhd_tiles,
    "v700_best_resolution": lambda size, _: canvas(grid_700(size, V700_SIDE), V700_SIDE),
    "v700_single_image_to_multi_image_strategy": lambda size, _: crops(
        TILINGS["whole_and_tiles"].lay_out(size, V700_SIDE, 1), is_whole_first=True
    ),
    "v702_best_resolution": lambda size, side: canvas(region_grid(size, side, closest=False), side),
    "v702_image_to_regions": lambda size, side: crops(TILINGS["smallest"].lay_out(size, side, 1)),
    "v703_v704_best_resolution": lambda size, side: canvas(region_grid(size, side, closest=True), side),
    "v703_v704_image_to_regions": lambda size, side: crops(TILINGS["closest"].lay_out(size, side, 1)),
}
"""Maps a function of the original to what we do for a picture's size and the number at the end of a recorded name,
such as 256 in "v702_best_resolution_256"; without one it is 0."""


def tiling(case: Case) -> Result:
    result = Result()
    for row in case.json("tiling.json"):
        size = tuple(row.pop("size"))
        for name, golden in row.items():
            function, number = re.fullmatch(r"(.+?)(?:_(\d+))?", name).groups()
            found = CUTS[function](size, int(number or 0)) if function in CUTS else None
            result.facts[f"{function} {number} {size}"] = found, golden
    return result


# --- from PNG to logits -----------------------------------------------------------------------------


def v700_full_pipeline(case: Case) -> Result:
    result, model = Result(), case.model(**pooling_to(case))
    pictures = [case.picture(name) for name in sorted(case.info["files"]) if name.endswith(".png")]
    pixels = dict(image_processor_for(model.config)(images=pictures, return_tensors="pt"))
    tower = model.model.vision_tower
    features = tower.encode({ENCODER_OF[name]: pixels[key] for name, key in PIXELS_OF.items()})
    for name in case.expected:
        step = every(name)
        if name.startswith("pixels."):
            result.add(**{name: pixels[PIXELS_OF[name.split(".")[1]]][..., ::step, ::step]})
        elif (encoder := ENCODER_OF.get(name.split("_")[0])) is not None:
            result.add(**{name: features[encoder][:, ::step]})
    fused = tower.fuse(features)
    tokens, ids = model.model.project(fused), case.inputs["input_ids"]
    result.add(
        **{n: fused[:, :: every(n)] for n in case.expected if n.startswith("concat_features")},
        pooled=pool_patches(fused, model.config),
        image_features=tokens,
        logits=v7_run(model, ids, tokens.flatten(0, 1))[0],
    )
    result.add(logits=v7_public(model, ids, **pixels))
    return result


RUNNERS: dict[str, Callable[[Case], Result]] = {
    "clip_image_processor": lambda case: pixels_of_png(case, "clip", patch_size=14),
    "siglip_image_processor": lambda case: pixels_of_png(case, "siglip", patch_size=16),
    "v700_transforms": v700_transforms,
    "tiling": tiling,
    "v700_full_pipeline": v700_full_pipeline,
}
