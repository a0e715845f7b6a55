"""A new VLM: an RWKV-World language model, a trained vision tower and a fresh projector."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visualrwkv_hf.modeling_vision import PROJECTORS

from . import infer_config as inference
from .checkpoint import Checkpoint, read_checkpoint
from .errors import ConversionError
from .folders import WriteOptions, locked, refuse_target
from .key_map import projector_rows, rows_to_original
from .original_to_hf import SourceTensors, language_dtype, write_folder
from .releases import RELEASES
from .towers import Assembled, TowerSource, assembled, read_tower, renamed

COMPRESSOR_LAYERS = 3
"""Blocks of a fresh Visual Token Compressor (v7.03, v7.04)."""


def assemble_vlm(
    language_model: str | Path,
    vision_tower: TowerSource,
    output_dir: str | Path,
    *,
    seed: int = 0,
    family: str | None = None,
    projector: str | None = None,
    vision_config: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Make the folder of an untrained VLM: everything in it is trained but the projector, which is fresh.

    The family, and with it the scan, the place of the picture and the projector, is the first one with the language
    model's generation and the tower's encoders: RWKV-5 and RWKV-6 with CLIP have a linear projector, RWKV-7 with
    SigLIP a gated one, with one token for each patch and pictures first.

    Args:
        language_model: an RWKV-World checkpoint, `x052`, `x060` or `x070`.
        vision_tower: see `read_tower`. Its tensors take the language model's dtype.
        output_dir: the folder to make.
        seed: of the projector.
        family: the name of a family. One with a compressor starts it as its original does, as a copy of the
            language model's first blocks.
        projector: a name of `PROJECTORS`, if not the family's.
        vision_config: fields of the tower to override.
        **options: fields of [`WriteOptions`] as for `to_hf`; all others are fields of [`VisualRWKVConfig`] to
            override.

    Raises:
        ConversionError: in one sentence, with nothing written.
    """
    write, overrides = WriteOptions.taken_from(options)
    refuse_target(Path(output_dir).absolute(), [Path(language_model)], write.overwrite)
    with locked(Path(output_dir)):
        world = read_language_model(language_model)
        dtype = write.torch_dtype or language_dtype(world)
        tower = read_tower(vision_tower, dtype)
        given = inference.merged(tower.fields, inference.as_fields(vision_config))
        text = inference.text_fields(shapes_of(world))
        vision = inference.vision_fields(shapes_of(tower.tensors), given)
        family = inference.family_to_start(text["rwkv_version"], vision, family)
        projector = projector or RELEASES[family].usual_projector
        width = projector_width(family, vision)
        fresh = fresh_projector(projector, width, text["hidden_size"], seed, dtype)
        compressor = [fresh_compressor(world)] if RELEASES[family].has_compressor else []
        checkpoint = assembled(world, tower.tensors, fresh, *compressor)
        inferred = inference.infer(
            shapes_of(checkpoint), vision_config=given, family=family, projector=projector, **overrides
        )
        return write_folder(checkpoint, inferred, output_dir, write, is_trained=False)


def read_language_model(path: str | Path) -> Checkpoint:
    """Return a checkpoint that holds an RWKV language model and nothing else."""
    world = read_checkpoint(path)
    if strange := sorted(name for name in world if not name.startswith("rwkv.")):
        raise ConversionError(f"{Path(path).name} is not a language model alone: it holds {strange[0]}.")
    return world


def shapes_of(tensors: SourceTensors) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in tensors.infos.items()}


def projector_width(family: str, vision: Mapping[str, Any]) -> int:
    """Return the channels that the projector's module is made for: "linear_flip" doubles them itself."""
    release = RELEASES[family]
    views = 1 if release.usual_projector == "linear_flip" else release.views
    return views * inference.tower_width(vision)


def fresh_projector(
    projector: str, in_features: int, out_features: int, seed: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return a projector as the model initialises it, drawn in float32, under the original's names."""
    if projector not in PROJECTORS:
        raise ConversionError(f"projector must be one of {', '.join(PROJECTORS)}, got {projector!r}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = PROJECTORS[projector](in_features, out_features)  # draws as the model's own start does
    ours = {name: tensor.to(dtype) for name, tensor in module.state_dict().items()}
    return dict(rows_to_original(ours, projector_rows(projector, ours="")))


def fresh_compressor(world: Checkpoint) -> Assembled:
    """Return the language model's first blocks and its final norm, a second time below `vtc.`."""
    parts = tuple(f"rwkv.blocks.{layer}." for layer in range(COMPRESSOR_LAYERS)) + ("rwkv.ln_out.",)
    names = {f"vtc.{name.removeprefix('rwkv.')}": name for name in world if name.startswith(parts)}
    return renamed(world, names)


__all__ = ["assemble_vlm"]
