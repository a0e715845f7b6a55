"""The configuration of an original checkpoint, from the names and shapes of its tensors.

What shapes do not tell comes from two tables: `RELEASES`, how a release reads its pictures, and `HEAD_DIMS`, the
heads of vision encoders. Both can be overridden field by field.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visualrwkv_hf.configuration_visualrwkv import (
    VisualRWKVConfig,
    VisualRWKVTextConfig,
    VisualRWKVVisionConfig,
)
from visualrwkv_hf.encoders import ENCODERS

from .errors import ConversionError
from .generations import ORIGINAL_GENERATIONS
from .key_map import canonical_name
from .releases import RELEASES, THREE_ENCODERS

Shapes = Mapping[str, Sequence[int]]


HEAD_DIMS = {1152: 72}
"""Size of a vision encoder's head by its width: 72 in the so400m shape, else 64."""

VISION_MARKS = {
    "clip": "vit.vision_model.embeddings.class_embedding",
    "dinov2": "vit.dino_featurizer.pos_embed",
    "sam": "vit.sam_featurizer.pos_embed",
    "siglip": "vit.siglip_featurizer.pos_embed",
}
HF_SIGLIP_MARK = "vit.vision_model.embeddings.patch_embedding.bias"
"""SigLIP's patch embedding has a bias, CLIP's has none."""


def _shape(shapes: Shapes, name: str) -> list[int]:
    if name not in shapes:
        raise ConversionError(f"Missing tensor {name}: the configuration cannot be told without it.")
    return list(shapes[name])


def _depth(shapes: Shapes, prefix: str) -> int:
    """Return the number of blocks below `prefix`, which is followed by the block's index."""
    found = {int(m[1]) for name in shapes if (m := re.match(rf"{re.escape(prefix)}(\d+)\.", name))}
    if not found:
        raise ConversionError(f"Missing tensors {prefix}0.*: there is no block.")
    return max(found) + 1


def _side(num_positions: int, name: str) -> int:
    side = math.isqrt(num_positions)
    if side**2 != num_positions:
        raise ConversionError(f"{name} has {num_positions} positions of patches, which is not a square.")
    return side


def _heads(width: int, given: Mapping[str, Any], field: str) -> int:
    if "num_attention_heads" in given:
        return given["num_attention_heads"]
    head_dim = HEAD_DIMS.get(width, 64)
    if width % head_dim:
        raise ConversionError(
            f"The number of heads of an encoder of width {width} is not in its shapes: "
            f"give vision_config.{field}.num_attention_heads."
        )
    return width // head_dim


def infer_rwkv_version(shapes: Shapes) -> int:
    """Return the generation. Raises `ConversionError` for none, or for several at once."""
    found = [
        version
        for version, generation in ORIGINAL_GENERATIONS.items()
        if any(name.endswith(f".{generation.mark}") for name in shapes)
    ]
    if len(found) > 1:
        generations = " and ".join(f"RWKV-{version}" for version in found)
        raise ConversionError(f"The checkpoint mixes generations: it has blocks of {generations}.")
    if not found and any(name.startswith(("vit.", "proj.")) for name in shapes):
        raise ConversionError(
            "There is no language model in the checkpoint: give the _rwkv file that belongs to it as well."
        )
    if not found:
        *others, newest = (f"RWKV-{version}" for version in ORIGINAL_GENERATIONS)
        known = f"{', '.join(others)} or {newest}"
        raise ConversionError(f"No tensor is named like one of {known}: not a VisualRWKV checkpoint.")
    return found[0]


def text_fields(shapes: Shapes) -> dict[str, Any]:
    """Return fields of `VisualRWKVTextConfig` from the tensors below `rwkv.`."""
    version = infer_rwkv_version(shapes)
    generation = ORIGINAL_GENERATIONS[version]
    num_layers = _depth(shapes, "rwkv.blocks.")
    vocab_size, hidden_size = _shape(shapes, "rwkv.emb.weight")
    num_heads, head_dim = _shape(shapes, f"rwkv.blocks.0.{generation.heads}")
    last = f"rwkv.blocks.{num_layers - 1}."
    ranks = {
        field: _shape(shapes, last + source.tensor)[source.dim]
        for field, source in generation.ranks.items()
        if num_layers > 1 or not source.after_first
    }
    return {
        "rwkv_version": version,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "head_dim": head_dim,
        "attention_size": num_heads * head_dim,
        "intermediate_size": _shape(shapes, "rwkv.blocks.0.ffn.key.weight")[0],
        **ranks,
    }


def clip_fields(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    return _hf_vit_fields(shapes, given, "clip_config", num_class_positions=1)


def siglip_fields(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of SigLIP under transformers' names or under timm's, whose activation is the exact GELU."""
    if VISION_MARKS["siglip"] not in shapes:
        fields = _hf_vit_fields(shapes, given, "siglip_config", num_class_positions=0)
        return fields | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "vision_use_head": False}
    fields = _timm_fields(shapes, given, "vit.siglip_featurizer.", "siglip_config")
    return fields | {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "vision_use_head": False}


def dinov2_fields(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    fields = _timm_fields(shapes, given, "vit.dino_featurizer.", "dinov2_config")
    width, intermediate_size = fields["hidden_size"], fields.pop("intermediate_size")
    if intermediate_size % width:
        raise ConversionError(
            f"DINOv2's MLP width ({intermediate_size}) must be a multiple of its width ({width})."
        )
    num_registers = _shape(shapes, "vit.dino_featurizer.reg_token")[1]
    return fields | {
        "mlp_ratio": intermediate_size // width,
        "num_register_tokens": num_registers,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    }


def sam_fields(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of SAM's encoder: blocks with relative positions over the whole map are global."""
    prefix = "vit.sam_featurizer."
    _, side, _, width = _shape(shapes, f"{prefix}pos_embed")
    patch_size = _shape(shapes, f"{prefix}patch_embed.proj.weight")[-1]
    depth = _depth(shapes, f"{prefix}blocks.")
    mlp_dim = _shape(shapes, f"{prefix}blocks.0.mlp.lin1.weight")[0]
    positions = [_shape(shapes, f"{prefix}blocks.{layer}.attn.rel_pos_h") for layer in range(depth)]
    reach = [(length + 1) // 2 for length, _ in positions]  # 2 n - 1 differences between n rows
    windows = {n for n in reach if n != side}
    if len(windows) > 1:
        raise ConversionError(
            f"SAM's blocks must share one window, their relative positions tell {sorted(windows)}."
        )
    return {
        "hidden_size": width,
        "image_size": side * patch_size,
        "patch_size": patch_size,
        "num_hidden_layers": depth,
        "num_attention_heads": width // positions[0][1],
        "mlp_dim": mlp_dim,
        "mlp_ratio": mlp_dim / width,
        "output_channels": _shape(shapes, f"{prefix}neck.0.weight")[0],
        "window_size": next(iter(windows), 0),
        "global_attn_indexes": [layer for layer, n in enumerate(reach) if n == side],
    }


def _hf_vit_fields(
    shapes: Shapes, given: Mapping[str, Any], field: str, num_class_positions: int
) -> dict[str, Any]:
    prefix = "vit.vision_model."
    width, _, patch_size, _ = _shape(shapes, f"{prefix}embeddings.patch_embedding.weight")
    position = f"{prefix}embeddings.position_embedding.weight"
    return {
        "hidden_size": width,
        "image_size": _side(_shape(shapes, position)[0] - num_class_positions, position) * patch_size,
        "patch_size": patch_size,
        "num_hidden_layers": _depth(shapes, f"{prefix}encoder.layers."),
        "num_attention_heads": _heads(width, given, field),
        "intermediate_size": _shape(shapes, f"{prefix}encoder.layers.0.mlp.fc1.weight")[0],
    }


def _timm_fields(shapes: Shapes, given: Mapping[str, Any], prefix: str, field: str) -> dict[str, Any]:
    width, _, patch_size, _ = _shape(shapes, f"{prefix}patch_embed.proj.weight")
    position = f"{prefix}pos_embed"
    return {
        "hidden_size": width,
        "image_size": _side(_shape(shapes, position)[1], position) * patch_size,
        "patch_size": patch_size,
        "num_hidden_layers": _depth(shapes, f"{prefix}blocks."),
        "num_attention_heads": _heads(width, given, field),
        "intermediate_size": _shape(shapes, f"{prefix}blocks.0.mlp.fc1.weight")[0],
    }


ENCODER_FIELDS = {"clip": clip_fields, "dinov2": dinov2_fields, "siglip": siglip_fields, "sam": sam_fields}


def encoders_in(shapes: Shapes) -> tuple[str, ...]:
    """Return the vision encoders that the checkpoint holds, in channel order."""
    found = {name for name, mark in VISION_MARKS.items() if mark in shapes}
    if found and "clip" not in found and not found >= set(THREE_ENCODERS):
        raise ConversionError(
            f"The vision tower has {' + '.join(sorted(found))} of its own code alone: such towers come "
            f"as the three of {', '.join(THREE_ENCODERS)}."
        )
    if HF_SIGLIP_MARK in shapes:
        found.add("siglip")
    return tuple(name for name in ENCODERS if name in found)


def as_fields(config: VisualRWKVVisionConfig | Mapping[str, Any] | None) -> dict[str, Any]:
    return config.to_dict() if isinstance(config, VisualRWKVVisionConfig) else dict(config or {})


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the fields of `over`; sub-configurations are merged field by field."""
    result = dict(base)
    for key, value in over.items():
        nested = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if nested else value
    return result


def projector_input_width(shapes: Shapes) -> int:
    for name in ("proj.weight", "proj.proj.weight", "proj.gate.weight"):
        if name in shapes:
            return _shape(shapes, name)[1]
    raise ConversionError("There is no projector in the checkpoint: no tensor is named proj.*.")


def family_to_start(version: int, vision: Mapping[str, Any], asked: str | None = None) -> str:
    """Return the family of a new model: the first with this generation and encoders, or the one asked for."""
    encoders = _encoders_of(vision)
    fitting = [name for name, release in RELEASES.items() if release.start == (version, encoders)]
    _refuse_family(asked, fitting, f"The new model has RWKV-{version} and {' + '.join(encoders)}")
    return asked or fitting[0]


def _encoders_of(vision: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(name for name in ENCODERS if vision.get(f"{name}_config") is not None)


def _refuse_family(asked: str | None, fitting: Sequence[str], told: str) -> None:
    if asked is not None and asked not in RELEASES:
        raise ConversionError(f"Unknown family {asked!r}: choose from {', '.join(RELEASES)}.")
    if asked is not None and asked not in fitting:
        raise ConversionError(f"{told}, which is {' or '.join(fitting) or 'no family'}, and not {asked}.")
    if not fitting:
        raise ConversionError(f"{told}, which is no family.")


def _family_of(shapes: Shapes, vision: Mapping[str, Any], version: int, asked: str | None) -> str:
    encoders = _encoders_of(vision)
    width, tower = projector_input_width(shapes), tower_width(vision)
    if width % tower:
        raise ConversionError(
            f"The projector reads {width} channels, which is no multiple of the tower's {tower}."
        )
    has_compressor = any(name.startswith("vtc.") for name in shapes)
    signature = (version, encoders, width // tower, has_compressor)
    fitting = [name for name, release in RELEASES.items() if release.signature == signature]
    told = f"RWKV-{version}, {' + '.join(encoders)}, a projector over {width} channels" + (
        " and a compressor" if has_compressor else ""
    )
    _refuse_family(asked, fitting, f"The checkpoint has {told}")
    return asked or fitting[0]


def vision_fields(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of `VisualRWKVVisionConfig` from the tensors below `vit.`, overridden by `given`."""
    fields = {}
    for name in encoders_in(shapes):
        config = f"{name}_config"
        fields[config] = ENCODER_FIELDS[name](shapes, given.get(config, {}))
    return merged(fields, given)


def tower_width(vision: Mapping[str, Any]) -> int:
    """Return the channels of one view of the tower."""
    return VisualRWKVVisionConfig(**(dict(vision) | {"tile_grid": 1, "class_token": "none"})).hidden_size


def _projector_of(shapes: Shapes, family: str, gate_is_untrained: bool | None) -> str:
    usual = RELEASES[family].usual_projector
    if "proj.weight" in shapes:
        return usual if usual == "linear_flip" else "linear"
    if "proj.ln_v.weight" in shapes:
        return "gated_norm"
    if usual != "relu":
        return "gated"
    if gate_is_untrained is None:
        raise ConversionError(
            f"Only its values tell whether the projector of {family} uses its gate: give projector='relu' or 'gated'."
        )
    return "relu" if gate_is_untrained else "gated"


def gate_is_untrained(gate: Tensor, tolerance: float = 0.01) -> bool:
    """Return whether a projector's gate is distributed as `nn.Linear` initialises it: uniformly over ±1/√n, n inputs.

    UHD's code used the gate only before 2024-09-14; later files hold it untrained. Rounding to bfloat16 and weight
    decay keep the distribution uniform, training does not.

    Args:
        gate: `proj.gate.weight` [C, C], any floating dtype.
        tolerance: largest distance of the cumulative distribution from the uniform one, beyond 3/√n for chance.
    """
    values = gate.detach().float().flatten().sort().values
    bound = float(values.abs().max())
    if bound == 0 or bound > (1 + 2**-7) / math.sqrt(gate.shape[1]):
        return False
    flat = torch.linspace(-bound, bound, len(values))
    distance = float((values - flat).abs().max()) / (2 * bound)
    return distance < tolerance + 3 / math.sqrt(len(values))


class Inferred(NamedTuple):
    """What can be inferred from the tensors of a checkpoint."""

    family: str | None
    """A name of `RELEASES`; None for a language model alone."""
    config: VisualRWKVConfig | VisualRWKVTextConfig


def infer(
    shapes: Shapes,
    *,
    vision_config: VisualRWKVVisionConfig | Mapping[str, Any] | None = None,
    family: str | None = None,
    gate_is_untrained: bool | None = None,
    **overrides: Any,
) -> Inferred:
    """Return the family of an original checkpoint and the configuration of a model that holds its tensors.

    Args:
        shapes: tensor name -> shape, names as in the file.
        vision_config: fields of the vision tower: all of them if the checkpoint holds none, else those to
            override, as in `{"clip_config": {"num_attention_heads": 4}}`.
        family: a name of `RELEASES`, for those that share their tensors' names and shapes.
        gate_is_untrained: what `gate_is_untrained` says of `proj.gate.weight`; UHD needs it, or `projector`.
        **overrides: fields of [`VisualRWKVConfig`] to override, or of [`VisualRWKVTextConfig`] for a language
            model alone.

    Raises:
        ConversionError: if the tensors belong to no family, to several generations, or do not tell something.
    """
    shapes = {canonical_name(name): tuple(shape) for name, shape in shapes.items()}
    text = text_fields(shapes)
    is_text = all(name.startswith("rwkv.") for name in shapes)
    _refuse_unknown_options(overrides, VisualRWKVTextConfig if is_text else VisualRWKVConfig)
    if is_text:
        if family is not None or vision_config is not None:
            raise ConversionError(
                "The checkpoint is a language model alone: it has no family and no vision tower."
            )
        return Inferred(None, VisualRWKVTextConfig(**merged(text, overrides)))
    given = as_fields(vision_config)
    if not given and not encoders_in(shapes):
        raise ConversionError("The checkpoint holds no vision tower: name one (vision_config).")
    vision = vision_fields(shapes, given)
    family = _family_of(shapes, vision, text["rwkv_version"], family)
    found = {
        "text_config": text,
        "vision_config": merged(RELEASES[family].vision, vision),
        "projector": overrides.get("projector") or _projector_of(shapes, family, gate_is_untrained),
        "compressor_num_layers": _depth(shapes, "vtc.blocks.") if RELEASES[family].has_compressor else 0,
    }
    return Inferred(
        family, VisualRWKVConfig(**merged(merged(found, RELEASES[family].config_fields), overrides))
    )


def _refuse_unknown_options(overrides: Mapping[str, Any], config_class: type) -> None:
    """Raise `ConversionError` for what is no field of a configuration, which would take it without a word."""
    if unknown := sorted(overrides.keys() - {field.name for field in dataclasses.fields(config_class)}):
        raise ConversionError(
            f"There is no option {unknown[0]}: it is no option of the conversion and no field of "
            f"{config_class.__name__}."
        )


def infer_config(shapes: Shapes, **given: Any) -> VisualRWKVConfig | VisualRWKVTextConfig:
    """Return the configuration alone; see `infer`."""
    return infer(shapes, **given).config


__all__ = ["Inferred", "gate_is_untrained", "infer", "infer_config"]
