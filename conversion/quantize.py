"""Model folders whose weights are rounded to few bits, tensor by tensor, in files that transformers reads too."""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visualrwkv_hf.cpu.packed import INTEGER_DTYPES, packed_shapes, packed_tensors, quantization_config
from visualrwkv_hf.cpu.rounding import ROUNDINGS, WEIGHTS, Rounded, rounded, rounding_of, scale_dtype
from visualrwkv_hf.remote_code import IMAGE_PROCESSOR_CODE, copy_code, ship_remote_code

from .checkpoint import (
    Checkpoint,
    TensorInfo,
    read_json,
    shard_names,
    shards_of,
    write_safetensors,
)
from .errors import ConversionError
from .folders import (
    INDEX_FILE,
    MODEL_FILES,
    Config,
    WriteOptions,
    cast,
    in_dtype,
    locked,
    open_folder,
    read_config,
    real_target,
    refuse_target,
    refuse_without_space,
    refusing_non_finite,
    verify_model,
    whole_or_nothing,
    write_json,
)
from .model_card import quantization_section


def quantize(folder: str | Path, output_dir: str | Path, *, weights: str, **options: Any) -> Path:
    """Write a model folder whose linear layers of blocks, and head, have weights of few bits; whole or not at all.

    The embedding, the low-rank maps, the norms, the vision tower and the projector keep their weights. The files are
    those of compressed-tensors' format `pack-quantized`.

    Args:
        folder: the model, with safetensors.
        output_dir: the folder to make. A link is followed.
        weights: "int8", or "int4" with the head in int8.
        **options: fields of [`WriteOptions`]: `dtype` of all other tensors, `max_shard_size`, `overwrite`, `verify`,
            `progress`, `expect`.

    Returns:
        Path: the folder.

    Raises:
        ConversionError: in one sentence, with nothing written; also if another process writes to `output_dir`.
    """
    folder, output_dir = Path(folder), Path(output_dir)
    write = WriteOptions(weights=weights, **options)
    if weights is None:
        raise ConversionError(f"weights must be {' or '.join(WEIGHTS)}, got None.")
    config = read_config(folder)
    refuse_quantized(config, folder)
    if output_dir.absolute() == folder.absolute() or output_dir.resolve() == folder.resolve():
        raise ConversionError(f"{folder} cannot be written into itself: name another folder.")
    refuse_target(output_dir, [folder], write.overwrite)
    with locked(output_dir):
        refuse_target(output_dir, [folder], write.overwrite)  # the lock may have brought an older folder back
        source = open_folder(folder)
        _refuse_misfit(source, config, folder, weights)
        dense = {name: in_dtype(info, write.torch_dtype) for name, info in source.infos.items()}
        layers = rounded_layers(dense, config, weights)
        infos = stored_infos(dense, layers)
        refuse_without_space(real_target(output_dir).parent, infos.values())
        if write.expect is not None:
            write.expect(sum(info.num_bytes for info in infos.values()))
        errors = RoundingErrors()
        with whole_or_nothing(output_dir, write.overwrite) as unfinished:
            tensors = refusing_non_finite(cast(source.items(), write.torch_dtype))
            write_shards(unfinished, infos, stored_tensors(tensors, layers, errors), write)
            if write.verify:
                tensors = cast(source.items(), write.torch_dtype)
                verify_model(unfinished, stored_tensors(tensors, layers), write.progress)
            _write_companions(folder, unfinished, layers, dense, weights, errors, write.torch_dtype)
    return output_dir


# --- what is rounded ------------------------------------------------------------------------------------------


def refuse_quantized(config: Config, folder: Path) -> None:
    """Raise `ConversionError` for a folder whose weights have been rounded before."""
    fields = getattr(config, "quantization_config", None)
    if fields is not None:
        raise ConversionError(
            f"The weights in {folder} are of few bits already: what rounding has lost cannot be restored. Start from "
            "the folder that it was made of."
        )


def rounded_layers(infos: Mapping[str, TensorInfo], config: Config, weights: str | None) -> dict[str, str]:
    """Return the linear layers whose weights are rounded -> a name in `ROUNDINGS`, from the dense tensors."""
    found = {}
    for name, info in infos.items():
        layer = name.removesuffix(".weight")
        if layer == name or len(info.shape) != 2 or not info.dtype.is_floating_point:
            continue
        kind = rounding_of(layer, info.shape[1], weights)
        if kind is not None and not (layer == "lm_head" and config.tie_word_embeddings):
            found[layer] = kind
    return found


def stored_infos(dense: Mapping[str, TensorInfo], layers: Mapping[str, str]) -> dict[str, TensorInfo]:
    """Return what the files will hold: three tensors for the weight of each layer that is rounded."""
    infos = {}
    for name, info in dense.items():
        layer = name.removesuffix(".weight")
        if layer == name or layer not in layers:
            infos[name] = info
            continue
        rounding, (rows, columns) = ROUNDINGS[layers[layer]], info.shape
        shapes = packed_shapes(rows, columns, rounding.bits, columns // (rounding.group or columns))
        for last, shape in shapes.items():
            infos[f"{layer}.{last}"] = TensorInfo(INTEGER_DTYPES.get(last, scale_dtype(info.dtype)), shape)
    return infos


def stored_tensors(
    tensors: Iterable[tuple[str, Tensor]], layers: Mapping[str, str], errors: "RoundingErrors | None" = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield what the files will hold, one tensor after the other.

    Args:
        tensors: the dense ones, in the order of their `infos`.
        layers: which of them are rounded, and how.
        errors: takes how much rounding changes the weights.
    """
    for name, tensor in tensors:
        layer = name.removesuffix(".weight")
        if layer == name or layer not in layers:
            yield name, tensor
            continue
        weight = rounded(tensor, layers[layer])
        if errors is not None:
            errors.add(layers[layer], tensor, weight)
        for last, packed in packed_tensors(weight).items():
            yield f"{layer}.{last}", packed


class RoundingErrors:
    """How much rounding changed the weights, by the kind of rounding: sqrt(sum (W - W')^2 / sum W^2)."""

    def __init__(self) -> None:
        self._squares: dict[str, list[float]] = {}

    def add(self, kind: str, weight: Tensor, to: Rounded) -> None:
        """Count a weight and what it was rounded to."""
        change, all_ = self._squares.setdefault(kind, [0.0, 0.0])
        step = max(1, (1 << 22) // weight.shape[1])
        for start in range(0, len(weight), step):
            some = slice(start, start + step)
            exact = weight[some].float()
            near = Rounded(to.integers[some], to.scale[some], to.bits).widened()
            change += float((near - exact).square().sum())
            all_ += float(exact.square().sum())
        self._squares[kind] = [change, all_]

    def relative(self) -> dict[str, float]:
        """Return the relative error of each kind."""
        return {
            kind: (change / all_) ** 0.5 if all_ else 0.0 for kind, (change, all_) in self._squares.items()
        }


# --- writing --------------------------------------------------------------------------------------------------


def write_shards(
    folder: Path,
    infos: Mapping[str, TensorInfo],
    tensors: Iterator[tuple[str, Tensor]],
    options: WriteOptions,
) -> None:
    """Write safetensors shards and their index; the tensors come in the order of `infos`."""
    shards = shards_of(infos, options.max_bytes)
    files = shard_names(len(shards))
    for file, names in zip(files, shards):
        part = (next(tensors) for _ in names)
        write_safetensors(folder / file, {name: infos[name] for name in names}, part, options.progress)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(info.num_bytes for info in infos.values())},
            "weight_map": {name: file for file, names in zip(files, shards) for name in names},
        }
        write_json(folder / INDEX_FILE, index)


def quantization_of(layers: Mapping[str, str], names: Iterable[str]) -> dict[str, Any] | None:
    """Return the entry `quantization_config` of a configuration, None if no layer is rounded."""
    weights = [
        name.removesuffix(".weight") for name in names if name.endswith(".weight") and "embed" not in name
    ]
    return quantization_config(layers, [name for name in weights if name not in layers]) if layers else None


def _write_companions(
    folder: Path,
    target: Path,
    layers: Mapping[str, str],
    names: Iterable[str],
    weights: str,
    errors: RoundingErrors,
    dtype: torch.dtype | None,
) -> None:
    """Copy a model's files beside the weights, and say in configuration and card how the weights are stored.

    The code is this version's: an older one may not read such weights.
    """
    for path in sorted(folder.iterdir()):
        is_weights = path.suffix == ".safetensors" or path.name == INDEX_FILE
        if path.is_file() and MODEL_FILES.fullmatch(path.name) and not is_weights:
            shutil.copyfile(path, target / path.name)
    fields = read_json(folder / "config.json")
    fields["quantization_config"] = quantization_of(layers, names)
    if dtype is not None:
        _set_dtype(fields, str(dtype).removeprefix("torch."))
    write_json(target / "config.json", fields)
    ship_remote_code(target)
    processor = target / "processor_config.json"
    if processor.is_file() and IMAGE_PROCESSOR_CODE["AutoImageProcessor"] in processor.read_text("utf-8"):
        copy_code(target, IMAGE_PROCESSOR_CODE)
    card = folder / "README.md"
    text = card.read_text("utf-8").rstrip() + "\n\n" if card.is_file() else ""
    (target / "README.md").write_text(text + quantization_section(weights, errors.relative()), "utf-8")


def _set_dtype(fields: dict[str, Any], dtype: str) -> None:
    """Name a dtype in a configuration and in those inside it that name one."""
    fields["dtype"] = dtype
    for inner in fields.values():
        if isinstance(inner, dict) and "dtype" in inner:
            _set_dtype(inner, dtype)


def _refuse_misfit(source: Checkpoint, config: Config, folder: Path, weights: str) -> None:
    """Raise `ConversionError` if a weight that is to be rounded is not as the configuration says.

    Other tensors may bear names of transformers' older towers, which it renames when it loads them.
    """
    from .state_dicts import expected_shapes

    for name, shape in expected_shapes(config).items():
        if len(shape) != 2 or not rounding_of(name.removesuffix(".weight"), shape[1], weights):
            continue
        found = source.infos[name].shape if name in source.infos else None
        if found != tuple(shape) and not (name == "lm_head.weight" and config.tie_word_embeddings):
            what = "is missing" if found is None else f"has the shape {list(found)}, not {list(shape)}"
            raise ConversionError(f"Tensor {name} in {folder} {what}: the weights do not fit config.json.")


__all__ = ["quantize"]
