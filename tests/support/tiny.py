"""Build tiny models whose weights are all random, and their inputs, for tests of what surrounds the equations."""

import numpy as np
import torch
from PIL import Image

from visualrwkv_hf import (
    VisualRWKVConfig,
    VisualRWKVForConditionalGeneration,
    VisualRWKVImageProcessor,
    VisualRWKVTextConfig,
)
from visualrwkv_hf.encoders import HALF

IMAGE_TOKEN_ID = 319
RANKS = dict(
    mix_low_rank_dim=8, decay_low_rank_dim=8, a_low_rank_dim=8, v_low_rank_dim=8, gate_low_rank_dim=8
)
VIT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14)
THREE_ENCODERS = {
    "dinov2_config": dict(VIT, mlp_ratio=2),
    "siglip_config": dict(VIT, intermediate_size=48),
    "sam_config": dict(
        VIT, image_size=64, patch_size=8, output_channels=8, global_attn_indexes=[1], window_size=3
    ),
    "feature_layer": -2,
}
"""A vision configuration with the three encoders of the high-definition releases, two layers of each."""


def text_config(version: int, **fields) -> VisualRWKVTextConfig:
    sizes = dict(vocab_size=320, hidden_size=64, head_dim=16, num_hidden_layers=3)
    return VisualRWKVTextConfig(rwkv_version=version, **{**sizes, **RANKS, **fields})


def vlm_config(
    version: int = 6, scan: str = "bidirectional", vocab_size: int = 320, **fields
) -> VisualRWKVConfig:
    """Return a configuration with a CLIP tower of a 4 x 4 grid and the class token last: 17 tokens per picture."""
    clip = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
        projection_dim=16,
    )
    defaults = dict(
        text_config=text_config(version, vocab_size=vocab_size).to_dict(),
        vision_config={"clip_config": clip, "class_token": "last"},
        image_token_id=IMAGE_TOKEN_ID if vocab_size == 320 else 65535,
        scan=scan,
        image_position="middle",
        projector="linear",
    )
    return VisualRWKVConfig(**{**defaults, **fields})


def awake(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give all weights random values, in place: as they are initialised, half of the model adds nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "ln" in name or "norm" in name:
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
        elif "time_decay" in name and not name.endswith(("_w1", "_w2")):
            weight.data.uniform_(-6, 0.5, generator=generator)
        elif "embed_tokens" in name:
            weight.data.normal_(generator=generator)
        else:
            weight.data.normal_(
                std=weight.shape[-1] ** -0.5 if weight.ndim == 2 else 0.3, generator=generator
            )
    return model.eval()


def tiny_vlm(**fields) -> VisualRWKVForConditionalGeneration:
    torch.manual_seed(0)
    return awake(VisualRWKVForConditionalGeneration(vlm_config(**fields)))


def prompt(
    model: VisualRWKVForConditionalGeneration, before: int = 3, after: int = 6, seed: int = 0
) -> torch.Tensor:
    """Return ids [1, T] with one picture between words."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, 300, (before + after,), generator=generator)
    image_tokens = torch.full((model.config.num_image_tokens,), model.config.image_token_id)
    return torch.cat([words[:before], image_tokens, words[before:]])[None]


def pixels(count: int = 1, seed: int = 0, size: int = 56) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """Return a picture of random pixels."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def one_encoder(size: int = 16, **fields) -> VisualRWKVImageProcessor:
    """Return an image processor for SigLIP alone, which reads pictures of `size` x `size` pixels."""
    return VisualRWKVImageProcessor(encoders={"siglip": {"size": size, **HALF}}, **fields)
