"""Write and delete folders so that a killed process leaves each of them whole or absent."""

import os
import shutil
from pathlib import Path

UNFINISHED = "_unfinished"
"""Subfolder for what is being written or deleted. Names that begin with "_" are not pushed to the Hub."""

WRITTEN_LAST = ("config.json", "adapter_config.json")
"""Files that make a folder loadable. They are moved after everything else."""

WEIGHT_FILES = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "adapter_config.json",
)
"""Files that say which weights a folder holds: with `adapter_config.json` it is an adapter for transformers."""


def move_into(source: Path, target: Path) -> None:
    """Move every file of `source` into `target`, replacing files of the same name one at a time.

    `WEIGHT_FILES` in `target` that `source` does not have are deleted first: an old `model.safetensors` would be loaded
    in place of new shards, an old adapter on top of a merged model. The empty `source` is removed.
    """
    files = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    for pattern in WEIGHT_FILES:
        for old in target.glob(pattern):
            if old.relative_to(target) not in files:
                old.unlink()
    for file in sorted(files, key=lambda file: (file.name in WRITTEN_LAST, file)):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / file, target / file)
    shutil.rmtree(source, ignore_errors=True)


def discard(folder: Path) -> None:
    """Delete a folder: rename it first, so that nobody finds half of it under its old name."""
    if not folder.exists():
        return
    unfinished = folder.parent / UNFINISHED / f"discarded-{folder.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.parent.mkdir(exist_ok=True)
    folder.rename(unfinished)
    shutil.rmtree(unfinished, ignore_errors=True)


def checkpoints_to_discard(checkpoints: list[str], limit: int | None, best: str | None) -> list[Path]:
    """Return the checkpoints to delete so that `limit` remain, the newest and the best one among them.

    Args:
        checkpoints: Paths of all checkpoints, oldest first.
        limit: How many to keep; None or 0 keeps all.
        best: Path of the best checkpoint, if there is one.
    """
    if not limit or limit < 0:
        return []
    kept = {checkpoints[-1], best and str(Path(best))} if checkpoints else set()
    excess = len(checkpoints) - max(limit, len(kept - {None}))
    return [Path(folder) for folder in checkpoints if folder not in kept][: max(0, excess)]
