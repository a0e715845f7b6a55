"""Models that are fetched and converted once into the user's cache: releases by a short name, original checkpoints.

Quick to import: torch comes with the first conversion.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HUB_SCHEME = "hf://"
ORIGINAL_SUFFIX = ".pth"
SHORT_NAME = re.compile(r"(v\d+|hd|uhd)-\d+(\.\d+)?b")
"""What the short name of a release looks like, for example `v6-1.6b`."""

RELEASE_TITLE = re.compile(r"VisualRWKV-(\w+) (\d+)B(\d*)")
NOTICE = "bundled-model-notice-shown"

WEIGHTS = ("int8", "int4")
"""Weights of few bits that a model can be kept in; the same as `cpu.rounding.WEIGHTS`, which needs torch."""

Progress = Callable[[str, int], None]
"""Takes a file's name and the bytes written since the last call."""


def cache_folder() -> Path:
    """Return the folder for what can be made or fetched again. It may not exist yet.

    A relative or empty `XDG_CACHE_HOME` is ignored, as the XDG specification asks for.
    """
    named = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(named) if os.path.isabs(named) else Path.home() / ".cache"
    return base / "visualrwkv_hf"


def is_first_notice() -> bool:
    """Return whether the notice about the bundled model was never shown to this user, and remember that it now is."""
    marker = cache_folder() / NOTICE
    if marker.exists():
        return False
    with contextlib.suppress(OSError):  # without a cache it is shown again
        from ..cpu.library import make_cache_folder

        make_cache_folder()
        marker.touch()
    return True


# Which models these are.


def is_original(source: str) -> bool:
    """Return whether `source` names a release, an `hf://` address or an original checkpoint: all are converted."""
    is_name = SHORT_NAME.fullmatch(source) is not None
    return is_name or source.startswith(HUB_SCHEME) or source.endswith(ORIGINAL_SUFFIX)


def short_name(title: str) -> str:
    """Return the short name of a release: `VisualRWKV-6 1B6` -> `v6-1.6b`, `VisualRWKV-HD 1B6` -> `hd-1.6b`.

    Raises:
        ValueError: it is no title of a release.
    """
    found = RELEASE_TITLE.fullmatch(title)
    if found is None:
        raise ValueError(f"{title!r} is no title of a release.")
    kind, whole, tenths = found.groups()
    return f"{'v' if kind.isdigit() else ''}{kind.lower()}-{whole}{f'.{tenths}' if tenths else ''}b"


def releases() -> dict[str, Any]:
    """Return the released checkpoints by their short names."""
    from visualrwkv_hf.conversion.releases import RELEASES

    models = [model for release in RELEASES.values() for model in release.models]
    return {short_name(model.title): model for model in models}


class Original(NamedTuple):
    """An original checkpoint that a model is made of.

    Attributes:
        name: of its folder in the cache.
        addresses: one file, or the two of a split checkpoint: paths or `hf://` addresses.
    """

    name: str
    addresses: Sequence[str]


def original_of(source: str) -> Original:
    """Return which checkpoint `source` names.

    Raises:
        ValueError: there is no such release, file, or form of address.
    """
    if source.startswith(HUB_SCHEME):
        from visualrwkv_hf.conversion.hub_address import parse_address

        parse_address(source)
        return Original(re.sub(r"[^\w.-]+", "--", source.removeprefix(HUB_SCHEME)), [source])
    if source.endswith(ORIGINAL_SUFFIX):
        paths = _parts_of(Path(source).expanduser())
        stamps = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        digest = hashlib.sha256(repr(stamps).encode()).hexdigest()[:12]
        return Original(f"{paths[0].stem}-{digest}", [str(path) for path in paths])
    known = releases()
    if source not in known:
        raise ValueError(f"There is no release {source}: the releases are {', '.join(known)}.")
    return Original(source, known[source].addresses)


def _parts_of(path: Path) -> list[Path]:
    """Return a checkpoint's file, or both files of a split one, whichever of them was named."""
    if not path.is_file():
        raise ValueError(f"There is no checkpoint {path}.")
    stem = re.sub(r"_(rwkv|visual)$", "", path.stem)
    pair = [path.with_name(f"{stem}_{part}{path.suffix}") for part in ("rwkv", "visual")]
    return pair if path in pair and all(part.is_file() for part in pair) else [path]


# Making them.


def models_folder() -> Path:
    """Return where converted models are kept."""
    return cache_folder() / "models"


def cached_model(
    source: str,
    weights: str | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Return the folder of a converted model; it is fetched, checked and converted first if it is not there.

    A model in few bits is made of the converted one if that is in the cache, and of the original otherwise.

    Args:
        source: see `is_original`.
        weights: "int8" or "int4" keeps the model in such weights, beside the one in the original's dtype.
        progress: called while the folder is written.
        say: takes a sentence about each step that takes long.

    Raises:
        ValueError: there is no such checkpoint, it cannot be fetched, or is not what was released. Nothing is kept.
        OSError: the cache cannot be written.
    """
    original = original_of(source)
    name = f"{original.name}-{weights}" if weights else original.name
    folder, whole = models_folder() / name, models_folder() / original.name
    if is_whole(folder):
        return folder
    from filelock import FileLock

    from ..cpu.library import make_cache_folder

    make_cache_folder()
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.parent / f".{name}.lock"):
        if is_whole(folder):  # another process has made it meanwhile
            return folder
        from visualrwkv_hf.conversion import quantize, to_hf
        from visualrwkv_hf.conversion.hub_files import local_file

        if weights and is_whole(whole):
            say(f"Rounding the weights of {whole} to {weights} (once).")
            return quantize(whole, folder, weights=weights, progress=progress)
        files = []
        for address in original.addresses:
            if address.startswith(HUB_SCHEME):
                say(f"Fetching {address} (once).")
            files.append(local_file(address, say))
        say(f"Converting into {folder} (once).")
        return to_hf(files, folder, progress=progress, weights=weights)


def is_whole(folder: Path) -> bool:
    """Return whether a model lies in `folder`: conversion puts it there whole or not at all."""
    return (folder / "config.json").is_file()


# What is there.


def cached_models() -> dict[str, int]:
    """Return the converted models in the cache and the bytes that they take."""
    if not models_folder().is_dir():
        return {}
    folders = sorted(path for path in models_folder().iterdir() if is_whole(path) and path.name[0] != ".")
    return {path.name: sum(file.stat().st_size for file in path.iterdir()) for path in folders}


def weights_format(folder: Path) -> str:
    """Return in which form the weights of a model folder are, such as "int4" or "bfloat16", from its config.json."""
    try:
        fields = json.loads((folder / "config.json").read_text("utf-8"))
        groups = (fields.get("quantization_config") or {}).get("config_groups") or {}
        bits = [group["weights"]["num_bits"] for group in groups.values()]
        return f"int{min(bits)}" if bits else str(fields.get("dtype") or "unknown")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "unknown"


def remove_model(name: str) -> int:
    """Delete a converted model from the cache. Return the bytes that it took.

    Raises:
        ValueError: it is not there.
    """
    there = cached_models()
    if name not in there:
        raise ValueError(f"There is no model {name} in the cache: it has {', '.join(there) or 'none'}.")
    folder = models_folder() / name
    for left in models_folder().glob(".*.removed"):  # by a removal that was interrupted
        shutil.rmtree(left, ignore_errors=True)
    going = folder.with_name(f".{name}.removed")
    folder.replace(going)  # at once, so that nobody finds half a model
    shutil.rmtree(going)
    return there[name]
