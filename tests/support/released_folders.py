"""Write a model folder for any release: its row of `RELEASES` with tiny parts, random weights and all World tokens."""

from pathlib import Path

import torch
from tiny import RANKS, awake
from transformers import GenerationConfig

from visualrwkv_hf import (
    VisualRWKVConfig,
    VisualRWKVForCausalLM,
    VisualRWKVForConditionalGeneration,
    VisualRWKVTextConfig,
)
from visualrwkv_hf.conversion.original_to_hf import processor_of
from visualrwkv_hf.conversion.releases import RELEASES
from visualrwkv_hf.generations import GENERATIONS

ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ENCODERS = {
    "clip": {**ENCODER, "image_size": 56, "patch_size": 14, "intermediate_size": 48, "projection_dim": 16},
    "dinov2": {**ENCODER, "image_size": 56, "patch_size": 14, "mlp_ratio": 2},
    "siglip": {**ENCODER, "image_size": 56, "patch_size": 14, "intermediate_size": 48},
    "sam": {
        **ENCODER,
        "image_size": 128,
        "patch_size": 16,
        "output_channels": 8,
        "mlp_dim": 48,
        "window_size": 0,
        "global_attn_indexes": [0, 1],
    },
}
"""Tiny encoders. All give a grid of 4 x 4, SAM after its 8 x 8 patches are folded 2 x 2 into channels."""
TEXT = {"vocab_size": 65536, "hidden_size": 64, "head_dim": 16, "num_hidden_layers": 3, **RANKS}


def released_config(name: str) -> VisualRWKVConfig:
    row = RELEASES[name]
    text = TEXT | {"rwkv_version": row.rwkv_version}
    vision = {f"{encoder}_config": ENCODERS[encoder] for encoder in row.encoders} | dict(row.vision)
    fields = {key: value for key, value in row.config_fields.items() if key != "text_config"}
    if row.has_compressor:
        fields |= {"compressor_num_layers": 2, "compressor_num_tokens": 4 if name == "v7.04" else 8}
    if row.projector:
        fields["projector"] = row.projector
    elif row.rwkv_version < 7:
        fields["projector"] = "linear"
    return VisualRWKVConfig(text_config=text, vision_config=vision, **fields)


def write_release(folder: Path, name: str) -> Path:
    """Write a model of a release, in float32, and its processor."""
    config = released_config(name)
    torch.manual_seed(0)
    with_memory(awake(VisualRWKVForConditionalGeneration(config))).save_pretrained(folder)
    return with_companions(folder, processor_of(config, RELEASES[name].tiling))


def write_text_model(folder: Path, version: int) -> Path:
    """Write a text model of a generation, in float32, and its tokenizer."""
    assert version in GENERATIONS
    config = VisualRWKVTextConfig(**TEXT, rwkv_version=version)
    torch.manual_seed(0)
    with_memory(awake(VisualRWKVForCausalLM(config))).save_pretrained(folder)
    return with_companions(folder, processor_of(config))


def with_companions(folder: Path, processor) -> Path:
    """Write the files beside a model's weights: the processor or tokenizer, and the ids at which answers end."""
    processor.save_pretrained(folder)
    GenerationConfig(bos_token_id=0, eos_token_id=[0, 261], pad_token_id=0).save_pretrained(folder)
    return folder


def with_memory(model: torch.nn.Module) -> torch.nn.Module:
    """Let RWKV-7 forget slowly: else the last words of a prompt, which are always the same, decide the answer."""
    for name, weight in model.named_parameters():
        if name.endswith("att.w0"):
            weight.data -= 6
    return model
