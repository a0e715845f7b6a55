"""Original checkpoints onto the Hub format and back, tensor by tensor."""

import contextlib
import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visualrwkv_hf.configuration_visualrwkv import VisualRWKVConfig, VisualRWKVTextConfig

from . import infer_config as inference
from .checkpoint import (
    Checkpoint,
    TensorInfo,
    hashed_meanwhile,
    is_finite,
    read_checkpoint,
    read_json,
    same_bits,
    shard_names,
    shards_of,
    write_safetensors,
)
from .key_map import (
    ConversionError,
    Row,
    check_names,
    check_shapes,
    key_rows,
    to_ours,
)
from .key_map import to_original as rows_to_original
from .towers import Assembled, TowerSource, assembled, read_tower

logger = logging.getLogger(__name__)

Config = VisualRWKVConfig | VisualRWKVTextConfig
Progress = Callable[[str, int], None]
SourceTensors = Checkpoint | Assembled
"""Tensors under canonical original names, with the `infos` and `paths` of their files."""

CONVERTER_VERSION = 1
STOP_TOKENS = [0, 261]
"""Generation ends at the end of the text (0) and at the end of a turn, two line feeds (261)."""

EXTRAS_FILE = "original_extras.safetensors"
"""Tensors of the original that no computation reads, for the way back. transformers does not look at it."""

INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNITS = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1}
SPARE_BYTES = 64 * 2**20
"""Room for everything beside the shards."""


def model_class(config: Config) -> type:
    """The class that computes a converted checkpoint."""
    if isinstance(config, VisualRWKVTextConfig):
        from visualrwkv_hf.modeling_rwkv import VisualRWKVForCausalLM

        return VisualRWKVForCausalLM
    from visualrwkv_hf.modeling_visualrwkv import VisualRWKVForConditionalGeneration

    return VisualRWKVForConditionalGeneration


def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's state dict, without memory for it."""
    with torch.device("meta"):
        model = model_class(config)(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def infer_from(tensors: Mapping[str, Tensor], **overrides: Any) -> inference.Inferred:
    """`infer` for tensors at hand: what only values tell is read as well."""
    infos = getattr(tensors, "infos", tensors)
    shapes = {name: tuple(info.shape) for name, info in infos.items()}
    gate = next((name for name in shapes if name.endswith("proj.gate.weight")), None)
    untrained = None
    if gate is not None and not getattr(tensors[gate], "is_meta", False):
        untrained = inference.gate_is_untrained(tensors[gate])
    return inference.infer(shapes, gate_is_untrained=untrained, **overrides)


def checked_rows(shapes: Mapping[str, Sequence[int]], config: Config) -> list[Row]:
    """The rows between a checkpoint and the model of `config`.

    Args:
        shapes: canonical original name -> shape. Without any `vit.` tensor the vision tower is left out.
        config: of the model.

    Raises:
        ConversionError: naming a missing, an unknown or a misshapen tensor.
    """
    rows = key_rows(config, with_vision=any(name.startswith("vit.") for name in shapes))
    check_names(shapes, rows)
    check_shapes(shapes, rows, expected_shapes(config))
    return rows


def convert_state_dict(original: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """An original state dict under our names, in memory; views where the layout allows.

    Raises:
        ConversionError: naming a missing, an unknown or a misshapen tensor.
    """
    original = canonical_tensors(original)
    return dict(to_ours(original, checked_rows(_shapes(original), config)))


def restore_state_dict(
    ours: Mapping[str, Tensor], config: Config, unused: Mapping[str, Tensor] = {}
) -> dict[str, Tensor]:
    """Our state dict under the original's names, with the original's `unused` tensors if given."""
    rows = key_rows(config, with_vision=any(name.startswith("model.vision_tower.") for name in ours))
    return dict(rows_to_original(ours, rows, unused))


def unused_tensors(original: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Those tensors of an original state dict that our model does not hold."""
    original = canonical_tensors(original)
    return {
        row.original: original[row.original]
        for row in key_rows(config)
        if row.is_unused and row.original in original
    }


def load_original(original: Mapping[str, Tensor], **overrides: Any) -> torch.nn.Module:
    """The model of an original state dict, in memory, in the state dict's dtype of the language model.

    Args:
        original: names as in the original's checkpoints. If there is no vision tower, `vision_config`
            describes one, which stays as initialised.
        **overrides: see `infer`.
    """
    config = infer_from(original, **overrides).config
    ours = convert_state_dict(original, config)
    model = model_class(config)(config)
    missing, unexpected = model.load_state_dict(ours, strict=False)
    missing = [name for name in missing if not name.startswith("model.vision_tower.") or _holds_vision(ours)]
    if missing or unexpected:
        raise ConversionError(f"The model lacks {missing} and does not know {unexpected}.")
    return model.to(ours["lm_head.weight"].dtype).eval()


def canonical_tensors(original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {inference.canonical_name(name): tensor for name, tensor in original.items()}


def _holds_vision(names: Iterable[str]) -> bool:
    return any(name.startswith("model.vision_tower.") for name in names)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def to_hf(
    sources: str | Path | Sequence[str | Path],
    output_dir: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    keep_unused: bool = True,
    verify: bool = True,
    tiling: str | None = None,
    progress: Progress | None = None,
    vision_tower: TowerSource | None = None,
    **overrides: Any,
) -> Path:
    """Turns an original checkpoint into a folder for `from_pretrained`, streaming, whole or not at all.

    Args:
        sources: the checkpoint, or the two files of a split one.
        output_dir: the folder to make.
        dtype: float32, bfloat16 or float16; None keeps every tensor's own.
        max_shard_size: of one safetensors file, in bytes or as in "5GB".
        overwrite: whether a model folder that is already there may be replaced.
        keep_unused: whether to keep what our model does not hold, for the way back (`EXTRAS_FILE`).
        verify: whether to read everything that was written once more and compare it to the bit.
        tiling: how the image processor cuts pictures into tiles; None: as the checkpoint's family does.
        progress: called with a file's name and the bytes written since the last call.
        vision_tower: where the vision weights are that the checkpoint has not; see `read_tower`. They take
            the language model's dtype.
        **overrides: see `infer`.

    Returns:
        Path: the folder.

    Raises:
        ConversionError: in one sentence, with nothing written.
    """
    paths = [Path(path) for path in ([sources] if isinstance(sources, str | Path) else sources)]
    dtype, max_shard_size = parse_dtype(dtype), parse_size(max_shard_size)
    refuse_target(Path(output_dir), paths, overwrite)
    checkpoint: SourceTensors = read_checkpoint(*paths)
    if vision_tower is not None:
        checkpoint, overrides = with_tower(checkpoint, vision_tower, dtype, overrides)
    refuse_without_vision(checkpoint)
    return write_folder(
        checkpoint,
        infer_from(checkpoint, **overrides),
        output_dir,
        dtype=dtype,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        keep_unused=keep_unused,
        verify=verify,
        tiling=tiling,
        progress=progress,
    )


def write_folder(
    checkpoint: SourceTensors,
    inferred: inference.Inferred,
    output_dir: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    keep_unused: bool = True,
    verify: bool = True,
    tiling: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """The model folder of tensors under the original's names; arguments as of `to_hf`."""
    output_dir = Path(output_dir).absolute()
    dtype, max_bytes = parse_dtype(dtype), parse_size(max_shard_size)
    refuse_target(output_dir, checkpoint.paths, overwrite)
    family, config = inferred
    processor = processor_of(config, tiling or (inference.FAMILIES[family].tiling if family else "none"))
    rows = _rows_of_files(checkpoint, config)
    infos = {name: info for row in rows for name, info in _infos(row, checkpoint.infos, dtype)}
    unused = (
        [row.original for row in rows if row.is_unused and row.original in checkpoint] if keep_unused else []
    )
    refuse_without_space(output_dir.parent, [*infos.values(), *(checkpoint.infos[name] for name in unused)])
    with whole_or_nothing(output_dir, overwrite) as folder, hashed_meanwhile(checkpoint.paths) as digests:
        write_model(folder, checkpoint, rows, infos, dtype, max_bytes, progress)
        if unused:
            extras = {name: checkpoint.infos[name] for name in unused}
            write_safetensors(
                folder / EXTRAS_FILE, extras, ((name, checkpoint[name]) for name in unused), progress
            )
        if verify:
            verify_model(folder, checkpoint, rows, dtype)
        describe(config, family, infos, dict(zip(checkpoint.paths, digests())), unused)
        write_companions(folder, config, processor)
    return output_dir


def with_tower(
    checkpoint: SourceTensors, source: TowerSource, dtype: torch.dtype | None, overrides: Mapping[str, Any]
) -> tuple[Assembled, dict[str, Any]]:
    """The checkpoint with the tensors of a vision tower named apart, and `overrides` with its configuration.

    Raises:
        ConversionError: if the checkpoint has a tower itself, or needs none.
    """
    groups = {name.split(".")[0] for name in checkpoint}
    if "vit" in groups:
        raise ConversionError("The checkpoint has a vision tower: vision_tower has no use.")
    if "proj" not in groups:
        raise ConversionError(
            "The checkpoint has no projector: use start_vlm for a new model with a fresh one."
        )
    tower = read_tower(source, dtype or language_dtype(checkpoint))
    fields = inference.merged(tower.fields, inference.as_fields(overrides.get("vision_config")))
    return assembled(checkpoint, tower.tensors), {**overrides, "vision_config": fields}


def language_dtype(checkpoint: SourceTensors) -> torch.dtype:
    """The dtype of the language model's head, which stands for all."""
    if "rwkv.head.weight" not in checkpoint:
        raise ConversionError("Missing tensor rwkv.head.weight: there is no whole language model.")
    return checkpoint.infos["rwkv.head.weight"].dtype


def refuse_without_vision(names: Iterable[str]) -> None:
    """Raises `ConversionError` for a projector without a vision tower: a model folder needs both."""
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
    """What the tensors of `row` will be in our files."""
    if row.is_unused:
        return
    info = infos[row.original]
    kept = dtype if dtype is not None and info.dtype.is_floating_point else info.dtype
    parts = row.transform.to_ours(torch.empty(info.shape, device="meta"))
    for name, part in zip(row.ours, parts):
        yield name, TensorInfo(kept, tuple(part.shape))


def converted(
    original: Mapping[str, Tensor], rows: Iterable[Row], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Our tensors one by one, in their dtype."""
    for name, tensor in to_ours(original, rows):
        yield name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def refusing_non_finite(
    tensors: Iterable[tuple[str, Tensor]], rows: Iterable[Row]
) -> Iterator[tuple[str, Tensor]]:
    """The same tensors. Raises `ConversionError`, with the original's name, at one that is not finite."""
    originals = {name: row.original for row in rows for name in row.ours}
    for name, tensor in tensors:
        if not is_finite(tensor):
            raise ConversionError(f"Tensor {originals[name]} holds NaN or infinite values in {tensor.dtype}.")
        yield name, tensor


def write_model(
    folder: Path,
    original: Mapping[str, Tensor],
    rows: Sequence[Row],
    infos: Mapping[str, TensorInfo],
    dtype: torch.dtype | None,
    max_bytes: int,
    progress: Progress | None,
) -> None:
    """Safetensors shards and their index."""
    shards = shards_of(infos, max_bytes)
    files = shard_names(len(shards))
    tensors = refusing_non_finite(converted(original, rows, dtype), rows)
    for file, names in zip(files, shards):
        part = (next(tensors) for _ in names)
        write_safetensors(folder / file, {name: infos[name] for name in names}, part, progress)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(info.num_bytes for info in infos.values())},
            "weight_map": {name: file for file, names in zip(files, shards) for name in names},
        }
        write_json(folder / INDEX_FILE, index)


def verify_model(
    folder: Path, original: Mapping[str, Tensor], rows: Sequence[Row], dtype: torch.dtype | None
) -> None:
    """Reads what was written and compares every tensor to the bit with the source's."""
    written = open_folder(folder)
    for name, tensor in converted(original, rows, dtype):
        if name not in written or not same_bits(written[name], tensor):
            raise ConversionError(f"Tensor {name} was not written as it was read: is the disk in order?")


def open_folder(folder: Path) -> Checkpoint:
    """The tensors of a model folder under our names."""
    index = folder / INDEX_FILE
    files = [folder / "model.safetensors"]
    if index.exists() and not files[0].exists():  # transformers leaves an old index behind
        files = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    return Checkpoint(files, rename=str)


def describe(
    config: Config,
    family: str | None,
    infos: Mapping[str, TensorInfo],
    digests: Mapping[Path, str],
    unused: Sequence[str],
) -> None:
    """Writes into the configuration which class it is for, in which dtype, and from which files it came."""
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
    """The processor of a model, or the tokenizer of a language model alone."""
    from .world_tokenizer import build_world_tokenizer

    tokenizer = build_world_tokenizer()
    if isinstance(config, VisualRWKVTextConfig):
        return tokenizer
    from visualrwkv_hf.image_processing_visualrwkv import image_processor_for
    from visualrwkv_hf.processing_visualrwkv import VisualRWKVProcessor

    return VisualRWKVProcessor.from_config(config, image_processor_for(config, tiling), tokenizer)


def write_companions(folder: Path, config: Config, processor: Any) -> None:
    """Everything beside the tensors: configurations, processor or tokenizer, model card and code."""
    from transformers import GenerationConfig

    from visualrwkv_hf.remote_code import ship_remote_code

    from .model_card import model_card

    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=0, eos_token_id=STOP_TOKENS, pad_token_id=0).save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "README.md").write_text(model_card(config), encoding="utf-8")
    ship_remote_code(folder)


def to_original(
    folder: str | Path,
    out_path: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Turns a model folder into one checkpoint file with the original's names.

    Args:
        folder: with `config.json` and safetensors, as `to_hf` or `save_pretrained` write it.
        out_path: of the `.pth` file. A language model alone is written without the prefix `rwkv.`.
        dtype: float32, bfloat16 or float16; None keeps every tensor's own, and reads the language model only
            while it is written.
        overwrite: whether a file that is already there may be replaced.

    Raises:
        ConversionError: in one sentence, with nothing written.
    """
    folder, out_path, dtype = Path(folder), Path(out_path), parse_dtype(dtype)
    if out_path.exists() and not overwrite:
        raise ConversionError(f"{out_path} exists already (overwrite).")
    config = read_config(folder)
    ours = open_folder(folder)
    rows = key_rows(config, with_vision=_holds_vision(ours))
    _check_ours(ours, rows)
    extras = _extras(folder, config)
    refuse_without_space(out_path.parent, [*ours.infos.values(), *(extras.infos.values() if extras else [])])
    prefix = "rwkv." if isinstance(config, VisualRWKVTextConfig) else ""
    original = {
        name.removeprefix(prefix): tensor.to(dtype) if dtype and tensor.is_floating_point() else _own(tensor)
        for name, tensor in rows_to_original(ours, rows, extras or {})
    }
    with friendly_errors(out_path):
        handle, temporary = tempfile.mkstemp(prefix=f".{out_path.name}.", dir=out_path.parent)
        os.close(handle)
        try:
            torch.save(original, temporary)
            os.replace(temporary, out_path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    return out_path


def _own(tensor: Tensor) -> Tensor:
    """A tensor whose storage holds nothing else: torch.save writes whole storages."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    return tensor if whole and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


def _check_ours(ours: Mapping[str, Tensor], rows: Iterable[Row]) -> None:
    known = {name for row in rows for name in row.ours}
    for kind, names in (("lacks", known - set(ours)), ("does not know", set(ours) - known)):
        if names:
            raise ConversionError(
                f"The folder does not fit its configuration, which {kind} {sorted(names)[0]}."
            )


def _extras(folder: Path, config: Config) -> Checkpoint | None:
    if (folder / EXTRAS_FILE).exists():
        return Checkpoint([folder / EXTRAS_FILE], rename=str)
    count = (getattr(config, "conversion", None) or {}).get("unused_tensors", 0)
    if count:
        logger.warning(
            "%s tensors that nothing computes with are missing from the result: copy %s from the folder that "
            "the fine-tune started from, if the original code is to load it strictly.",
            count,
            EXTRAS_FILE,
        )
    return None


def read_config(folder: Path) -> Config:
    path = folder / "config.json"
    if not path.exists():
        raise ConversionError(f"{folder} is not a model folder: it has no config.json.")
    model_type = read_json(path).get("model_type")
    classes = {cls.model_type: cls for cls in (VisualRWKVConfig, VisualRWKVTextConfig)}
    if model_type not in classes:
        raise ConversionError(f"{folder} holds a model of type {model_type!r}, not {' or '.join(classes)}.")
    return classes[model_type].from_pretrained(folder)


# Where things are written.


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype in DTYPES.values()):
        return dtype
    if dtype not in DTYPES:
        raise ConversionError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    return DTYPES[dtype]


def parse_size(size: str | int) -> int:
    """`"5GB"` -> 5 000 000 000, in decimal units as transformers counts."""
    if isinstance(size, int):
        return size
    for unit, factor in UNITS.items():
        number = size.upper().removesuffix(unit)
        if number != size.upper() and number.strip().replace(".", "", 1).isdigit():
            return int(float(number) * factor)
    raise ConversionError(f"max_shard_size must be a number with one of {', '.join(UNITS)}, got {size!r}.")


def refuse_target(output_dir: Path, sources: Sequence[Path], overwrite: bool) -> None:
    """Raises `ConversionError` if writing to `output_dir` would lose something or cannot work."""
    if output_dir.exists() and not output_dir.is_dir():
        raise ConversionError(f"{output_dir} is a file.")
    parent = output_dir.absolute().parent
    if not parent.is_dir():
        raise ConversionError(f"There is no folder {parent} to write into.")
    if not os.access(parent, os.W_OK):
        raise ConversionError(f"No permission to write into {parent}.")
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return
    if not overwrite:
        raise ConversionError(f"{output_dir} is not empty (overwrite).")
    if not (output_dir / "config.json").exists():
        raise ConversionError(f"{output_dir} is no model folder, and is not overwritten.")
    inside = [path for path in sources if output_dir.resolve() in path.resolve().parents]
    if inside:
        raise ConversionError(f"{inside[0]} lies in {output_dir}, which would be overwritten.")


def refuse_without_space(parent: Path, infos: Iterable[TensorInfo]) -> None:
    needed = sum(info.num_bytes for info in infos) + SPARE_BYTES
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ConversionError(
            f"Not enough space in {parent}: {needed:,} bytes are needed, {free:,} are free."
        )


@contextlib.contextmanager
def whole_or_nothing(output_dir: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `output_dir` that takes its name at the end, or vanishes if anything goes wrong."""
    parent = output_dir.absolute().parent
    with friendly_errors(output_dir):
        folder = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}.", dir=parent))
        try:
            yield folder
            folder.chmod(0o755)  # mkdtemp's is for the owner alone
            if overwrite and output_dir.exists():
                _replace(folder, output_dir)
            else:
                folder.replace(output_dir)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _replace(folder: Path, output_dir: Path) -> None:
    old = folder.with_name(folder.name + ".old")
    output_dir.replace(old)
    try:
        folder.replace(output_dir)
    except OSError:
        old.replace(output_dir)
        raise
    shutil.rmtree(old)


@contextlib.contextmanager
def friendly_errors(target: Path) -> Iterator[None]:
    """Failures of the file system as sentences."""
    try:
        yield
    except PermissionError as error:
        raise ConversionError(f"No permission to write {error.filename or target}.") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ConversionError(f"The disk filled up while {target} was written.") from error
        raise


def write_json(path: Path, content: Mapping) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


__all__ = ["convert_state_dict", "load_original", "restore_state_dict", "to_hf", "to_original"]
