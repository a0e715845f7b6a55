"""Model folders and the file system: names, options of writing, refusals, and writing whole or not at all."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from visualrwkv_hf.configuration_visualrwkv import VisualRWKVConfig, VisualRWKVTextConfig
from visualrwkv_hf.cpu.rounding import WEIGHTS

from .checkpoint import Checkpoint, TensorInfo, files_of_index, is_finite, read_json, same_bits
from .errors import ConversionError

Config = VisualRWKVConfig | VisualRWKVTextConfig
Progress = Callable[[str, int], None]

EXTRAS_FILE = "original_extras.safetensors"
"""Tensors of the original that no computation reads, for the way back. transformers does not look at it."""

INDEX_FILE = "model.safetensors.index.json"
HUB_FOLDER = ".cache"
"""`hf download --local-dir` notes in this folder what it has fetched, below `huggingface`."""

CONFIGS = {cls.model_type: cls for cls in (VisualRWKVConfig, VisualRWKVTextConfig)}
"""`model_type` of a model folder -> its configuration."""

MODEL_FILES = re.compile(
    r"(|generation_|processor_|preprocessor_|tokenizer_)config\.json"
    r"|(tokenizer|special_tokens_map|added_tokens|chat_template)\.json|chat_template\.jinja"
    r"|(model(-\d{5}-of-\d{5})?|original_extras)\.safetensors|model\.safetensors\.index\.json"
    r"|README\.md|(LICENSE|NOTICE)(\.\w+)?|\.gitattributes"
)
"""Names of the files that a model folder may hold beside its code; a folder with others is not overwritten."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNITS = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1}
SPARE_BYTES = 64 * 2**20
"""Room for everything beside the shards."""

VERIFYING = "verifying"
"""The name that `progress` is given in place of a file's while the files are read back."""

UNFINISHED = "unfinished-"
"""Part of the name of a folder that is being written, `.{target}.unfinished-*`, beside its target."""

OLD = ".old"
"""Ending of what an unfinished folder is replacing, for the moment between two renames."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """How a model folder is written.

    Attributes:
        dtype: float32, bfloat16 or float16; None keeps every tensor's own.
        max_shard_size: of one safetensors file, in bytes or as in "5GB" (decimal units, as transformers counts).
        overwrite: whether a model folder that is already there may be replaced.
        keep_unused: whether to keep the tensors that our model does not hold, for the way back (`EXTRAS_FILE`).
        verify: whether to read everything that was written once more and compare it bit for bit.
        weights: "int8" or "int4" rounds the weights of the blocks' linear layers, and the head's to int8; None
            rounds nothing. See `quantize`.
        tiling: how the image processor cuts pictures into tiles; None: as the checkpoint's family does.
        progress: called with a file's name and the bytes written since the last call, and then with `VERIFYING` and the
            bytes compared.
        expect: called once with the bytes that will be written, before the first of them.
    """

    dtype: str | torch.dtype | None = None
    max_shard_size: str | int = "5GB"
    overwrite: bool = False
    keep_unused: bool = True
    verify: bool = True
    weights: str | None = None
    tiling: str | None = None
    progress: Progress | None = None
    expect: Callable[[int], None] | None = None

    def __post_init__(self):
        self.torch_dtype, self.max_bytes  # noqa: B018  (refuses what is not one)
        if self.weights not in (None, *WEIGHTS):
            raise ConversionError(f"weights must be {' or '.join(WEIGHTS)}, got {self.weights!r}.")

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return parse_dtype(self.dtype)

    @property
    def max_bytes(self) -> int:
        return parse_size(self.max_shard_size)

    @classmethod
    def taken_from(cls, given: Mapping[str, Any]) -> tuple["WriteOptions", dict[str, Any]]:
        """Return the options among keyword arguments, and the other arguments."""
        names = {field.name for field in dataclasses.fields(cls)}
        options = {name: value for name, value in given.items() if name in names}
        return cls(**options), {name: value for name, value in given.items() if name not in names}


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the dtype of a name. Raises `ConversionError` for one that weights are not stored in."""
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype in DTYPES.values()):
        return dtype
    if dtype not in DTYPES:
        raise ConversionError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    return DTYPES[dtype]


def parse_size(size: str | int) -> int:
    """Return the bytes of a size: `"5GB"` is 5 000 000 000, in decimal units as transformers counts."""
    if isinstance(size, int):
        return size
    for unit, factor in UNITS.items():
        number = size.upper().removesuffix(unit)
        if number != size.upper() and number.strip().replace(".", "", 1).isdigit():
            return int(float(number) * factor)
    raise ConversionError(f"max_shard_size must be a number with one of {', '.join(UNITS)}, got {size!r}.")


# Reading.


def open_folder(folder: Path) -> Checkpoint:
    """Return the tensors of a model folder under our names."""
    index = folder / INDEX_FILE
    files = [folder / "model.safetensors"]
    if index.exists() and not files[0].exists():  # transformers leaves an old index in the folder
        files = files_of_index(index)
    return Checkpoint(files, rename=str)


def read_config(folder: Path) -> Config:
    """Return the configuration of a model folder. Raises `ConversionError` if it holds another model or none."""
    path = folder / "config.json"
    if not path.exists():
        raise ConversionError(f"{folder} is not a model folder: it has no config.json.")
    model_type = read_json(path).get("model_type")
    if model_type not in CONFIGS:
        raise ConversionError(f"{folder} holds a model of type {model_type!r}, not {' or '.join(CONFIGS)}.")
    return CONFIGS[model_type].from_pretrained(folder)


# Writing.


def refuse_target(output_dir: Path, sources: Sequence[Path], overwrite: bool) -> None:
    """Raise `ConversionError` if writing to `output_dir` would lose something or cannot work."""
    if output_dir.exists() and not output_dir.is_dir():
        raise ConversionError(f"{output_dir} is a file.")
    parent = real_target(output_dir).parent
    if not parent.is_dir():
        raise ConversionError(f"There is no folder {parent} to write into.")
    if not os.access(parent, os.W_OK):
        raise ConversionError(f"No permission to write into {parent}.")
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return
    if not overwrite:
        raise ConversionError(f"{output_dir} is not empty (overwrite).")
    if _model_type(output_dir) not in CONFIGS:
        raise ConversionError(f"{output_dir} is not a model folder of VisualRWKV, and is not overwritten.")
    inside = [path for path in sources if output_dir.resolve() in path.resolve().parents]
    if inside:
        raise ConversionError(f"{inside[0]} is in {output_dir}, which would be overwritten.")
    code = _code_of(output_dir)
    if others := [path for path in sorted(output_dir.iterdir()) if not _is_of_a_model(path, code)]:
        what = "the folder " if others[0].is_dir() else ""
        raise ConversionError(
            f"{output_dir} holds {what}{others[0].name} beside the model, and is not overwritten: remove it first."
        )


def _model_type(folder: Path) -> str | None:
    """Return what `config.json` of a folder names as its model, None if it names nothing."""
    try:
        fields = read_json(folder / "config.json")
    except (OSError, ValueError):
        return None
    return str(fields.get("model_type")) if isinstance(fields, dict) else None


def _code_of(folder: Path) -> set[str]:
    """Return the modules that the configurations of a folder, or its modules, name: also those of older versions."""
    text = "\n".join(
        path.read_text("utf-8", errors="replace")
        for path in folder.iterdir()
        if path.is_file() and path.name.endswith(("config.json", ".py"))
    )
    return {
        "".join(names) for names in re.findall(r'"(\w+)\.VisualRWKV\w+"|^\s*from \.(\w+) import', text, re.M)
    }


def _is_of_a_model(path: Path, code: set[str]) -> bool:
    """Return whether a path in a model folder belongs to it; `code`: the modules that it names."""
    if path.is_dir():
        return path.name == HUB_FOLDER and {inner.name for inner in path.iterdir()} <= {"huggingface"}
    module = path.name.removesuffix(".old").removesuffix(".py")  # `copy_code` keeps replaced code as *.py.old
    return bool(MODEL_FILES.fullmatch(path.name)) or (module != path.name and module in code)


def real_target(output: Path) -> Path:
    """Return where a path leads: a link stays, and what it points to is written or replaced."""
    return output.resolve() if output.is_symlink() else output.absolute()


def in_dtype(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    """Return the entry that a tensor has once it is cast to `dtype`. Integers are not cast, and None casts nothing."""
    return info._replace(dtype=dtype) if dtype is not None and info.dtype.is_floating_point else info


def cast(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Yield the same tensors in the dtype that they are written in; see `in_dtype`."""
    for name, tensor in tensors:
        yield name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def refusing_non_finite(
    tensors: Iterable[tuple[str, Tensor]], known_as: Mapping[str, str] = MappingProxyType({})
) -> Iterator[tuple[str, Tensor]]:
    """Yield the same tensors; raise `ConversionError` at one that is not finite, with its name in `known_as`."""
    for name, tensor in tensors:
        if not is_finite(tensor):
            name = known_as.get(name, name)
            raise ConversionError(f"Tensor {name} holds NaN or infinite values in {tensor.dtype}.")
        yield name, tensor


def verify_model(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], progress: Progress | None = None
) -> None:
    """Read what was written and compare every tensor with what it was made of, bit for bit.

    `progress` is called with `VERIFYING` in place of a file's name, and the bytes that are found to be right.
    """
    written = open_folder(folder)
    for name, tensor in tensors:
        if name not in written or not same_bits(written[name], tensor):
            raise ConversionError(f"Tensor {name} was not written as it was read: is the disk in order?")
        if progress is not None:
            progress(VERIFYING, tensor.nbytes)


def refuse_without_space(parent: Path, infos: Iterable[TensorInfo]) -> None:
    """Raise `ConversionError` if the tensors do not fit on the disk of `parent`."""
    needed = sum(info.num_bytes for info in infos) + SPARE_BYTES
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ConversionError(
            f"Not enough space in {parent}: {needed:,} bytes are needed, {free:,} are free."
        )


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keep other conversions away from a target, and clean up after one that was killed.

    Raises:
        ConversionError: if another process is writing to this target.
    """
    target = real_target(output)
    path = target.with_name(f".{target.name}.convert.lock")
    lock = FileLock(path)
    try:
        with friendly_errors(output):
            lock.acquire(timeout=0)
    except Timeout:
        raise ConversionError(f"Another conversion is writing to {output}: wait until it is done.") from None
    try:
        clean_up(target)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held, so that nobody waits for a lock without a file
        lock.release()


def clean_up(target: Path) -> None:
    """Remove what killed conversions left beside `target`; to be called by the one that holds its lock.

    If one was killed between the two renames that replace a folder, the old folder gets its name back.
    """
    beginning = f".{target.name}.{UNFINISHED}"
    for left in [path for path in target.parent.iterdir() if path.name.startswith(beginning)]:
        if left.name.endswith(OLD) and not target.exists():
            left.replace(target)
        else:
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def whole_or_nothing(output_dir: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a folder beside `output_dir` that takes its name at the end, or vanishes if anything goes wrong."""
    target = real_target(output_dir)
    with friendly_errors(output_dir):
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.{UNFINISHED}", dir=target.parent))
        try:
            yield folder
            folder.chmod(0o755)  # mkdtemp's is for the owner alone
            if overwrite and target.exists():
                _replace(folder, target)
            else:
                folder.replace(target)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _replace(folder: Path, target: Path) -> None:
    old = folder.with_name(folder.name + OLD)
    target.replace(old)
    try:
        folder.replace(target)
    except OSError:
        old.replace(target)
        raise
    shutil.rmtree(old)


@contextlib.contextmanager
def friendly_errors(target: Path) -> Iterator[None]:
    """Raise failures of the file system as sentences."""
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
