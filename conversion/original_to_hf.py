"""Original checkpoints to model folders, tensor by tensor."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from visualrwkv_hf.configuration_visualrwkv import VisualRWKVTextConfig

from . import infer_config as inference
from .checkpoint import (
    Checkpoint,
    TensorInfo,
    hashed_meanwhile,
    read_checkpoint,
    write_safetensors,
)
from .errors import ConversionError
from .folders import (
    EXTRAS_FILE,
    Config,
    WriteOptions,
    cast,
    in_dtype,
    locked,
    real_target,
    refuse_target,
    refuse_without_space,
    refusing_non_finite,
    verify_model,
    whole_or_nothing,
)
from .key_map import Row, rows_to_ours
from .model_card import model_card, quantization_section
from .quantize import (
    RoundingErrors,
    quantization_of,
    rounded_layers,
    stored_infos,
    stored_tensors,
    write_shards,
)
from .releases import RELEASES
from .state_dicts import checked_rows, infer_from, model_class
from .towers import Assembled, TowerSource, assembled, read_tower

logger = logging.getLogger(__name__)

SourceTensors = Checkpoint | Assembled
"""Tensors under canonical original names, with the `infos` and `paths` of their files."""

CONVERTER_VERSION = 1


def to_hf(
    sources: str | Path | Sequence[str | Path],
    output_dir: str | Path,
    *,
    vision_tower: TowerSource | None = None,
    **options: Any,
) -> Path:
    """Turn an original checkpoint into a folder for `from_pretrained`, streaming, whole or not at all.

    Args:
        sources: the checkpoint, or the two files of a split one.
        output_dir: the folder to make. A link is followed.
        vision_tower: where the vision weights are that the checkpoint lacks; see `read_tower`. They take the
            language model's dtype.
        **options: fields of [`WriteOptions`]: `dtype`, `max_shard_size`, `overwrite`, `keep_unused`, `verify`,
            `weights`, `tiling`, `progress`, `expect`; all others go to `infer`: `family`, `vision_config`, and fields
            of [`VisualRWKVConfig`] to override.

    Returns:
        Path: the folder.

    Raises:
        ConversionError: in one sentence, with nothing written; also if another process writes to `output_dir`.
    """
    write, overrides = WriteOptions.taken_from(options)
    paths = [Path(path) for path in ([sources] if isinstance(sources, str | Path) else sources)]
    refuse_target(Path(output_dir), paths, write.overwrite)
    with locked(Path(output_dir)):
        checkpoint: SourceTensors = read_checkpoint(*paths)
        if vision_tower is not None:
            checkpoint, overrides = with_tower(checkpoint, vision_tower, write.torch_dtype, overrides)
        refuse_without_vision(checkpoint)
        return write_folder(checkpoint, infer_from(checkpoint, **overrides), output_dir, write)


def write_folder(
    checkpoint: SourceTensors,
    inferred: inference.Inferred,
    output_dir: str | Path,
    options: WriteOptions,
    *,
    is_trained: bool = True,
) -> Path:
    """Write the model folder of tensors under the original's names, for the one that holds the target's lock.

    A card of a model that is not trained says so, and has no scores.
    """
    output_dir = Path(output_dir).absolute()
    refuse_target(output_dir, checkpoint.paths, options.overwrite)
    family, config = inferred
    processor = processor_of(config, options.tiling or (RELEASES[family].tiling if family else "none"))
    rows = _rows_of_files(checkpoint, config)
    dtype = options.torch_dtype
    dense = {name: info for row in rows for name, info in _infos(row, checkpoint.infos, dtype)}
    layers = rounded_layers(dense, config, options.weights)
    infos, errors = stored_infos(dense, layers), RoundingErrors()
    unused = [row.original for row in rows if row.is_unused and row.original in checkpoint]
    extras = {name: checkpoint.infos[name] for name in unused} if options.keep_unused else {}
    written = [*infos.values(), *extras.values()]
    refuse_without_space(real_target(output_dir).parent, written)
    if options.expect is not None:
        options.expect(sum(info.num_bytes for info in written))
    with (
        whole_or_nothing(output_dir, options.overwrite) as folder,
        hashed_meanwhile(checkpoint.paths) as digests,
    ):
        originals = {name: row.original for row in rows for name in row.ours}
        tensors = refusing_non_finite(cast(rows_to_ours(checkpoint, rows), dtype), originals)
        write_shards(folder, infos, stored_tensors(tensors, layers, errors), options)
        if extras:
            tensors = ((name, checkpoint[name]) for name in extras)
            write_safetensors(folder / EXTRAS_FILE, extras, tensors, options.progress)
        if options.verify:
            tensors = cast(rows_to_ours(checkpoint, rows), dtype)
            verify_model(folder, stored_tensors(tensors, layers), options.progress)
        describe(config, family, dense, dict(zip(checkpoint.paths, digests())), list(extras))
        if layers:
            config.quantization_config = quantization_of(layers, dense)
        card = model_card(config, is_trained=is_trained, has_tokenizer=processor is not None)
        if layers and options.weights:
            card += "\n" + quantization_section(options.weights, errors.relative())
        write_companions(folder, config, processor, card)
    return output_dir


def with_tower(
    checkpoint: SourceTensors, source: TowerSource, dtype: torch.dtype | None, overrides: Mapping[str, Any]
) -> tuple[Assembled, dict[str, Any]]:
    """Return the checkpoint with the tensors of a separate vision tower, and `overrides` with its configuration.

    Raises:
        ConversionError: if the checkpoint has a tower itself, or needs none.
    """
    groups = {name.split(".")[0] for name in checkpoint}
    if "vit" in groups:
        raise ConversionError("The checkpoint has a vision tower: vision_tower has no use.")
    if "proj" not in groups:
        raise ConversionError(
            "The checkpoint has no projector: use assemble_vlm for a new model with a fresh one."
        )
    tower = read_tower(source, dtype or language_dtype(checkpoint))
    fields = inference.merged(tower.fields, inference.as_fields(overrides.get("vision_config")))
    return assembled(checkpoint, tower.tensors), {**overrides, "vision_config": fields}


def language_dtype(checkpoint: SourceTensors) -> torch.dtype:
    """Return the dtype of the language model's head, which is taken for that of the whole."""
    if "rwkv.head.weight" not in checkpoint:
        raise ConversionError("Missing tensor rwkv.head.weight: there is no whole language model.")
    return checkpoint.infos["rwkv.head.weight"].dtype


def refuse_without_vision(names: Iterable[str]) -> None:
    """Raise `ConversionError` for a projector without a vision tower: a model folder needs both."""
    groups = {name.split(".")[0] for name in names}
    if "proj" in groups and "vit" not in groups:
        raise ConversionError("The checkpoint has a projector and no vision tower: name one (vision_tower).")


def _rows_of_files(checkpoint: SourceTensors, config: Config) -> list[Row]:
    try:
        return checked_rows({name: info.shape for name, info in checkpoint.infos.items()}, config)
    except ConversionError as error:
        if len(checkpoint.paths) == 1:
            raise
        names = " and ".join(path.name for path in checkpoint.paths)
        raise ConversionError(f"{names} do not belong together: {error}") from error


def _infos(
    row: Row, infos: Mapping[str, TensorInfo], dtype: torch.dtype | None
) -> Iterator[tuple[str, TensorInfo]]:
    """Yield what the tensors of `row` will be in our files."""
    if row.is_unused:
        return
    info = in_dtype(infos[row.original], dtype)
    parts = row.transform.to_ours(torch.empty(info.shape, device="meta"))
    for name, part in zip(row.ours, parts):
        yield name, info._replace(shape=tuple(part.shape))


def describe(
    config: Config,
    family: str | None,
    infos: Mapping[str, TensorInfo],
    digests: Mapping[Path, str],
    unused: Sequence[str],
) -> None:
    """Note in the configuration which class it is for, in which dtype, and from which files it came."""
    config.architectures = [model_class(config).__name__]
    config.dtype = infos["lm_head.weight"].dtype
    config.conversion = {
        "converter_version": CONVERTER_VERSION,
        "family": family,
        "sources": [
            {"name": path.name, "size": path.stat().st_size, "sha256": digest}
            for path, digest in digests.items()
        ],
        "unused_tensors": len(unused),
    }


def processor_of(config: Config, tiling: str = "none") -> Any:
    """Return the processor of a model, or the tokenizer of a language model alone.

    Fewer rows than RWKV World's tokenizer has ids are another vocabulary, of which nothing is known here: a language
    model alone has no tokenizer then, None, and a warning says so.

    Raises:
        ConversionError: if a model with a vision tower has another vocabulary.
    """
    from .world_tokenizer import VOCAB_SIZE, build_world_tokenizer

    rows, is_text = config.get_text_config(decoder=True).vocab_size, isinstance(config, VisualRWKVTextConfig)
    if rows < VOCAB_SIZE:
        told = f"The vocabulary has {rows:,} tokens and is not RWKV World's, which needs {VOCAB_SIZE:,}"
        if not is_text:
            raise ConversionError(f"{told}: there is no tokenizer for it.")
        logger.warning("%s: no tokenizer is written. Put the model's own into its folder.", told)
        return None
    tokenizer = build_world_tokenizer()
    if is_text:
        return tokenizer
    from visualrwkv_hf.image_processing_visualrwkv import image_processor_for
    from visualrwkv_hf.processing_visualrwkv import VisualRWKVProcessor

    return VisualRWKVProcessor.from_config(config, image_processor_for(config, tiling), tokenizer)


def write_companions(folder: Path, config: Config, processor: Any, card: str) -> None:
    """Write everything beside the tensors: configurations, processor or tokenizer if any, model card and code."""
    from transformers import GenerationConfig

    from visualrwkv_hf.remote_code import ship_remote_code

    config.save_pretrained(folder)
    text = config.get_text_config(decoder=True)
    tokens = {name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**tokens).save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    ship_remote_code(folder)


__all__ = ["to_hf"]
