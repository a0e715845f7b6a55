"""Separate vision towers, under the names of the original's checkpoints.

A tower is a folder of transformers (CLIP, SigLIP), a name on the Hub, or the files of the encoders of the three-encoder
tower: timm's DINOv2, timm's or open_clip's SigLIP, segment-anything's image encoder.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visualrwkv_hf.modeling_vision import resample_position_embedding

from .checkpoint import Checkpoint, TensorInfo, files_of_index, read_json
from .encoders import ORIGINAL_ENCODERS, encoders_alone, encoders_together
from .errors import ConversionError
from .hub_errors import hub_sentences
from .key_map import unwrapped_name
from .shapes import shape_of

TowerSource = str | Path | Sequence[str | Path] | Mapping[str, str | Path]


class Layout(NamedTuple):
    """How one kind of file names an encoder's tensors."""

    encoder: str
    mark: str
    """A tensor that tells the kind."""
    prefix: str
    """In front of the encoder's names in the file."""
    original: str
    """The same in the original's checkpoints."""
    beside: tuple[str, ...] = ()
    """Beginnings of names that belong to no encoder of pictures."""


REST_OF_MODEL = ("rwkv.", "proj.", "vtc.")

TOLD_BY_CONFIG = ("num_attention_heads", "hidden_act", "layer_norm_eps")
"""Fields that cannot be inferred from the shapes of a stock encoder."""

STOCK_PREFIXES = ("vit.vision_model.", "vit.")
"""Prefixes of an encoder of transformers in the original's checkpoints."""

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pth", "*.pt")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


class Entry(NamedTuple):
    """A tensor of another mapping that is renamed, and changed when it is read."""

    tensors: Mapping[str, Tensor]
    name: str
    info: TensorInfo
    change: Callable[[Tensor], Tensor]


class Assembled(Mapping[str, Tensor]):
    """Tensors from several mappings, read when asked for.

    Args:
        entries: by the name here.
        paths: of the files that they come from.
    """

    def __init__(self, entries: Mapping[str, Entry], paths: Sequence[Path]):
        self._entries, self.paths = dict(entries), list(paths)
        self.infos = {name: entry.info for name, entry in self._entries.items()}

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        return entry.change(entry.tensors[entry.name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class Tower(NamedTuple):
    """A vision tower's tensors under the original's names, and fields that their shapes do not tell."""

    tensors: Assembled
    fields: dict[str, Any]


def assembled(*parts: Mapping[str, Tensor]) -> Assembled:
    """Return all tensors of checkpoints, of other assemblies and of dicts, as one checkpoint."""
    entries: dict[str, Entry] = {}
    paths: list[Path] = []
    for part in parts:
        infos = getattr(part, "infos", None) or {
            name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in part.items()
        }
        entries |= {name: Entry(part, name, info, _same) for name, info in infos.items()}
        paths += getattr(part, "paths", [])
    return Assembled(entries, paths)


def renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Assembled:
    """Return some tensors of a checkpoint under other names, given as new name -> old name."""
    return Assembled(
        {new: Entry(checkpoint, old, checkpoint.infos[old], _same) for new, old in names.items()}, []
    )


def _same(tensor: Tensor) -> Tensor:
    return tensor


def read_tower(source: TowerSource, dtype: torch.dtype) -> Tower:
    """Return a vision tower as the original's checkpoints hold it.

    The position embeddings of DINOv2 and SigLIP beside SAM are resampled to SAM's patch grid, as timm does.

    Args:
        source: a folder or a file, a name on the Hub, several of them, or one for each encoder by its name.
        dtype: of the tensors; integers keep theirs.

    Raises:
        ConversionError: if a file cannot be had, holds no known encoder, or encoders are missing or twice.
    """
    named: list[tuple[str | None, str | Path]]
    if isinstance(source, Mapping):
        named = list(source.items())
    else:
        named = [(None, one) for one in ([source] if isinstance(source, str | Path) else source)]
    parts: dict[str, tuple[Layout, Checkpoint]] = {}
    fields: dict[str, Any] = {}
    for asked, one in named:
        path = local_path(one)
        for checkpoint in _checkpoints(path):
            layout = _layout_of(checkpoint)
            _refuse_misplaced(layout, checkpoint, asked, parts)
            parts[layout.encoder] = layout, checkpoint
            fields |= _config_fields(path, layout.encoder)
    _refuse_incomplete(parts)
    return Tower(_tensors_of(parts, dtype), fields)


def local_path(source: str | Path) -> Path:
    """Return the file or folder itself, or the folder of a Hub repository of this name, downloaded."""
    path = Path(source)
    if path.exists():
        return path
    if not isinstance(source, str) or not HUB_NAME.fullmatch(source):
        raise ConversionError(f"There is no file or folder {source}.")
    for patterns in (["*.json", "*.safetensors"], ["*.json", *WEIGHT_PATTERNS[1:]]):
        folder = _download(source, patterns)
        if any(folder.glob("*.json")) and _has_weights(folder):
            return folder
    raise ConversionError(f"{source} on the Hub holds no {', '.join(WEIGHT_PATTERNS)}.")


def _has_weights(folder: Path) -> bool:
    return any(file for pattern in WEIGHT_PATTERNS for file in folder.glob(pattern))


def _download(name: str, patterns: list[str]) -> Path:
    import huggingface_hub

    with hub_sentences(name):
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))


def _checkpoints(path: Path) -> list[Checkpoint]:
    """Return the files of one model as one checkpoint, the files of several encoders as one each."""
    return [Checkpoint(files, rename=unwrapped_name) for files in _file_groups(path)]


def _file_groups(path: Path) -> list[list[Path]]:
    if path.is_file():
        return [[path]]
    for index in INDEX_FILES:
        if (path / index).exists():
            return [files_of_index(path / index)]
    found = [sorted(path.glob(pattern)) for pattern in WEIGHT_PATTERNS]
    if not any(found):
        raise ConversionError(f"{path} holds no {', '.join(WEIGHT_PATTERNS)}.")
    if (path / "config.json").exists():  # the same weights may lie there in several formats
        return [next(files for files in found if files)]
    return [[file] for files in found for file in files]


def layouts() -> Iterator[Layout]:
    """Yield every kind of file with an encoder. The first whose mark is in a file is the file's.

    The last are original checkpoints whose tower, one encoder of transformers, can be taken.
    """
    for name, table in encoders_together().items():
        for kind in ORIGINAL_ENCODERS[name].files_together:
            yield Layout(name, kind.mark, kind.prefix, table.prefix, kind.beside)
    for name, table in encoders_alone().items():
        for kind in ORIGINAL_ENCODERS[name].files_alone:
            yield Layout(name, kind.mark, kind.prefix, table.prefix, kind.beside)
    for name, table in encoders_alone().items():
        yield Layout(name, table.prefix + table.mark, "vit.", "vit.", REST_OF_MODEL)


def _layout_of(checkpoint: Checkpoint) -> Layout:
    for layout in layouts():
        if layout.mark in checkpoint:
            return layout
    raise ConversionError(
        f"{checkpoint.paths[0].name} holds no vision encoder that is known here: CLIP or SigLIP of "
        "transformers, DINOv2 with registers or SigLIP of timm, SigLIP of open_clip, SAM of segment-anything."
    )


def _refuse_misplaced(
    layout: Layout, checkpoint: Checkpoint, asked: str | None, parts: Mapping[str, tuple[Layout, Checkpoint]]
) -> None:
    file = checkpoint.paths[0].name
    if asked is not None and asked != layout.encoder:
        raise ConversionError(f"{file} was named as {asked}, but holds {layout.encoder}.")
    if layout.encoder in parts:
        other = parts[layout.encoder][1].paths[0].name
        raise ConversionError(f"Both {other} and {file} hold {layout.encoder}: a tower has it once.")


def _refuse_incomplete(parts: Mapping[str, tuple[Layout, Checkpoint]]) -> None:
    """Raise `ConversionError` unless it is one encoder of transformers, or the three together."""
    is_stock = {layout.prefix == "vit." or _is_alone(layout) for layout, _ in parts.values()}
    if is_stock == {True} and len(parts) == 1:
        return
    if is_stock != {False} or set(parts) != set(encoders_together()):
        raise ConversionError(
            f"The tower has {' + '.join(parts)}: it must be CLIP or SigLIP of transformers alone, or "
            "DINOv2 and SigLIP of timm and SAM of segment-anything together."
        )


def _is_alone(layout: Layout) -> bool:
    alone = encoders_alone().get(layout.encoder)
    return alone is not None and layout.original == alone.prefix


def _config_fields(path: Path, encoder: str) -> dict[str, Any]:
    """Return fields of `VisualRWKVVisionConfig` from a configuration of transformers beside the weights."""
    config_file = path / "config.json"
    if not path.is_dir() or not config_file.exists():
        return {}
    model_type = read_json(config_file).get("model_type")
    if model_type is None:  # timm's
        return {}
    if model_type not in ORIGINAL_ENCODERS[encoder].model_types:
        known = [name for row in ORIGINAL_ENCODERS.values() for name in row.model_types]
        raise ConversionError(
            f"{path} holds a model of type {model_type!r}: a tower is one of {', '.join(known)}."
        )
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    config = getattr(config, "vision_config", config)
    return {f"{encoder}_config": {field: getattr(config, field) for field in TOLD_BY_CONFIG}}


def _tensors_of(parts: Mapping[str, tuple[Layout, Checkpoint]], dtype: torch.dtype) -> Assembled:
    side = None
    if "sam" in parts:
        layout, checkpoint = parts["sam"]
        side = _sam_side(layout, checkpoint)
    entries: dict[str, Entry] = {}
    for layout, checkpoint in parts.values():
        entries |= _entries_of(layout, checkpoint, dtype, side)
    return Assembled(entries, [path for _, checkpoint in parts.values() for path in checkpoint.paths])


def _sam_side(layout: Layout, checkpoint: Checkpoint) -> int:
    """Return the side of the patch grid after SAM's 2 x 2 fold."""
    name = f"{layout.prefix}pos_embed"
    if name not in checkpoint:
        raise ConversionError(f"{checkpoint.paths[0].name} lacks {name}.")
    _, side, _, _ = shape_of({name: checkpoint.infos[name].shape}, name, 4)  # [1, 2 h, 2 h, D]
    return side // 2


def _entries_of(
    layout: Layout, checkpoint: Checkpoint, dtype: torch.dtype, side: int | None
) -> dict[str, Entry]:
    entries = {}
    for name, info in checkpoint.infos.items():
        if name.startswith(layout.beside):
            continue
        ours = layout.original + name.removeprefix(layout.prefix)
        kept = dtype if info.dtype.is_floating_point else info.dtype
        shape, change = info.shape, partial(_cast, dtype=kept)
        if side is not None and layout.encoder != "sam" and ours == f"{layout.original}pos_embed":
            shape, change = (1, side**2, shape[-1]), partial(_resampled, side=side, dtype=kept)
            _refuse_no_square(name, info.shape)
        entries[ours] = Entry(checkpoint, name, TensorInfo(kept, shape), change)
    return entries


def _refuse_no_square(name: str, shape: Sequence[int]) -> None:
    if len(shape) != 3 or round(shape[1] ** 0.5) ** 2 != shape[1]:
        raise ConversionError(f"{name} has shape {list(shape)}, which is not a square grid of patches.")


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype)


def _resampled(position: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    """Resample [1, h * h, D] to [1, side * side, D]; on the same grid nothing is changed, as in timm."""
    if position.shape[1] == side**2:
        return position.to(dtype)
    return resample_position_embedding(position.float(), (side, side)).to(dtype)


__all__ = ["Tower", "assembled", "read_tower"]
