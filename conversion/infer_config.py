"""The configuration of an original checkpoint, from the names and shapes of its tensors.

What shapes do not tell comes from two tables: `RELEASES`, how a release reads its pictures, and `HEAD_DIMS`, the
heads of vision encoders. Both can be overridden field by field.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visualrwkv_hf.configuration_visualrwkv import (
    VisualRWKVConfig,
    VisualRWKVTextConfig,
    VisualRWKVVisionConfig,
)
from visualrwkv_hf.encoders import ENCODERS

from .encoders import ORIGINAL_ENCODERS, encoders_alone, encoders_together
from .errors import ConversionError
from .generations import ORIGINAL_GENERATIONS
from .key_map import canonical_name
from .releases import RELEASES
from .shapes import Shapes, num_blocks, shape_of


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
    num_layers = num_blocks(shapes, "rwkv.blocks.")
    vocab_size, hidden_size = shape_of(shapes, "rwkv.emb.weight", 2)
    num_heads, head_dim = shape_of(shapes, f"rwkv.blocks.0.{generation.heads}", 2)
    last = f"rwkv.blocks.{num_layers - 1}."
    ranks = {
        field: shape_of(shapes, last + source.tensor, source.dims)[source.dim]
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
        "intermediate_size": shape_of(shapes, "rwkv.blocks.0.ffn.key.weight", 2)[0],
        **ranks,
    }


def encoders_in(shapes: Shapes) -> tuple[str, ...]:
    """Return the vision encoders that the checkpoint holds, in channel order."""
    alone = {name for name, table in encoders_alone().items() if table.is_in(shapes)}
    together = {name for name, table in encoders_together().items() if table.is_in(shapes)}
    if together and not alone and together != set(encoders_together()):
        raise ConversionError(
            f"The vision tower has {' + '.join(sorted(together))} of its own code alone: such towers come "
            f"as the three of {', '.join(encoders_together())}."
        )
    found = alone | together
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
            return shape_of(shapes, name, 2)[1]
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
        fields[config] = ORIGINAL_ENCODERS[name].fields(shapes, given.get(config, {}))
    return merged(fields, given)


def tower_width(vision: Mapping[str, Any]) -> int:
    """Return the channels of one view of the tower."""
    return VisualRWKVVisionConfig(**(dict(vision) | {"tile_grid": 1, "class_token": "none"})).hidden_size


def _projector_of(shapes: Shapes, family: str, gate_is_untrained: Callable[[], bool] | bool | None) -> str:
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
    untrained = gate_is_untrained() if callable(gate_is_untrained) else gate_is_untrained
    return "relu" if untrained else "gated"


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
    gate_is_untrained: Callable[[], bool] | bool | None = None,
    **overrides: Any,
) -> Inferred:
    """Return the family of an original checkpoint and the configuration of a model that holds its tensors.

    Args:
        shapes: tensor name -> shape, names as in the file.
        vision_config: fields of the vision tower: all of them if the checkpoint holds none, else those to
            override, as in `{"clip_config": {"num_attention_heads": 4}}`.
        family: a name of `RELEASES`, for those that share their tensors' names and shapes.
        gate_is_untrained: what `gate_is_untrained` says of `proj.gate.weight`, or a function that returns it, which
            is called only if it is needed; UHD needs it, or `projector`.
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
        "compressor_num_layers": num_blocks(shapes, "vtc.blocks.") if RELEASES[family].has_compressor else 0,
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
