"""Model folders back to original checkpoints."""

import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from visualrwkv_hf.configuration_visualrwkv import VisualRWKVTextConfig

from .checkpoint import Checkpoint
from .errors import ConversionError
from .folders import (
    EXTRAS_FILE,
    Config,
    friendly_errors,
    in_dtype,
    open_folder,
    parse_dtype,
    read_config,
    real_target,
    refuse_without_space,
)
from .key_map import Row, key_rows, rows_to_original
from .quantize import refuse_quantized
from .state_dicts import holds_vision
from .towers import Assembled, assembled, renamed

logger = logging.getLogger(__name__)


def to_original(
    folder: str | Path,
    out_path: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Turn a model folder into one checkpoint file with the original's names.

    Args:
        folder: with `config.json` and safetensors, as `to_hf` or `save_pretrained` write it.
        out_path: of the `.pth` file. A language model alone is written without the prefix `rwkv.`.
        dtype: float32, bfloat16 or float16; None keeps every tensor's own, and then a tensor is read only when it
            is written.
        overwrite: whether a file that is already there may be replaced.

    Raises:
        ConversionError: in one sentence, with nothing written.
    """
    folder, out_path, dtype = Path(folder), Path(out_path), parse_dtype(dtype)
    if out_path.exists() and not overwrite:
        raise ConversionError(f"{out_path} exists already (overwrite).")
    target = real_target(out_path)
    if not target.parent.is_dir():
        raise ConversionError(f"There is no folder {target.parent} to write into.")
    config = read_config(folder)
    refuse_quantized(config, folder)
    saved = open_folder(folder)
    rows = key_rows(config, with_vision=holds_vision(saved))
    ours: Checkpoint | Assembled = saved
    if config.tie_word_embeddings and "lm_head.weight" not in saved:
        (embedding,) = next(row.ours for row in rows if row.original == "rwkv.emb.weight")
        ours = assembled(saved, renamed(saved, {"lm_head.weight": embedding}))  # the original ties nothing
    _check_ours(ours, rows)
    extras = _extras(folder, config)
    infos = [*ours.infos.values(), *(extras.infos.values() if extras else [])]
    refuse_without_space(target.parent, [in_dtype(info, dtype) for info in infos])
    prefix = "rwkv." if isinstance(config, VisualRWKVTextConfig) else ""
    original = {
        name.removeprefix(prefix): tensor.to(dtype) if dtype and tensor.is_floating_point() else _own(tensor)
        for name, tensor in rows_to_original(ours, rows, extras or {})
    }
    with friendly_errors(out_path):
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(handle)
        try:
            torch.save(original, temporary)
            os.chmod(temporary, 0o644)  # mkstemp's is for the owner alone
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    return out_path


def _own(tensor: Tensor) -> Tensor:
    """Return the tensor in a storage that holds nothing else: torch.save writes whole storages."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    return tensor if whole and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


def _check_ours(ours: Mapping[str, Tensor], rows: Iterable[Row]) -> None:
    known = {name for row in rows for name in row.ours}
    if missing := sorted(known - set(ours)):
        raise ConversionError(f"The folder lacks {missing[0]}, which its configuration asks for.")
    if unknown := sorted(set(ours) - known):
        raise ConversionError(f"The folder holds {unknown[0]}, which its configuration does not know.")


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


__all__ = ["to_original"]
