"""Build a tiny model of every kind of release and its inputs, for tests of weights that are rounded to few bits."""

import copy
from typing import Any

import torch
from tiny import THREE_ENCODERS, prompt, tiny_vlm

from visualrwkv_hf import VisualRWKVForConditionalGeneration
from visualrwkv_hf.encoders import pixel_inputs

RELEASES: dict[str, dict[str, Any]] = {
    "v5": dict(version=5, scan="unidirectional"),
    "v6": dict(version=6),
    "HD": dict(version=6, vision_config=THREE_ENCODERS, projector="gated"),
    "UHD": dict(version=6, vision_config=dict(**THREE_ENCODERS, tile_grid=2), projector="gated"),
    "v7": dict(version=7, vision_config=THREE_ENCODERS, projector="gated_norm"),
}
"""Maps a kind of release to the arguments of `tiny.tiny_vlm` that make a tiny model of it."""


def release(kind: str) -> VisualRWKVForConditionalGeneration:
    """Return a tiny model of this kind: its language model is 64 wide, and all its weights are random."""
    return tiny_vlm(**copy.deepcopy(RELEASES[kind]))


def inputs_of(model: VisualRWKVForConditionalGeneration, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return a batch of two prompts: the first has one picture and is padded on the left, the second has two.

    The pixels for each encoder, [3 * num_views, 3, S, S], are random and have the type `dtype`.
    """
    one, two = prompt(model), torch.cat([prompt(model, seed=1), prompt(model, seed=2)], 1)
    num_pad = two.shape[1] - one.shape[1]
    ids = torch.cat([torch.nn.functional.pad(one, (num_pad, 0)), two])
    mask = torch.ones_like(ids)
    mask[0, :num_pad] = 0
    generator = torch.Generator().manual_seed(0)
    config = model.config.vision_config
    pixels = {
        name: torch.randn(3 * config.num_views, 3, size, size, generator=generator).to(dtype)
        for name, size in zip(pixel_inputs(config.image_sizes).values(), config.image_sizes.values())
    }
    return dict(input_ids=ids, attention_mask=mask, **pixels)
