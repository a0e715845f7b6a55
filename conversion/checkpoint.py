"""Files: original checkpoints read tensor by tensor, safetensors shards written tensor by tensor."""

import contextlib
import hashlib
import json
import math
import pickle
import re
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import ConversionError, first_line
from .key_map import canonical_name

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

NOT_CHECKPOINTS = {
    b"<": "is a web page: the download went wrong",
    b"version https://git-lfs": "is a Git LFS pointer: the file itself was not downloaded",
    b"{": "is a JSON file",
}
"""What is sometimes found under a checkpoint's name, by its first bytes."""

NESTED_UNDER = ("state_dict", "module", "model")
"""Names under which training frameworks put the tensors into a dict with other things."""

DEEPEST = 8
"""How many such dicts may be nested."""

SHARD = re.compile(r"[\w.-]+\.(safetensors|bin)")
"""A file that an index may name: one beside it, as in `inference.checks.refuse_strange_index`."""

RELEASE_EVERY = 1 << 29
"""Bytes read from a mapped file before its pages are given back."""

WRITE_BYTES = 1 << 20
"""Bytes written at once; from a mapped file, larger pieces took two to four times as long."""


class TensorInfo(NamedTuple):
    """What is known of a tensor without reading it; `dtype` is the format's own name where it is not one of ours."""

    dtype: Any
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint(Mapping[str, Tensor]):
    """Tensors of one or several files, mapped into memory and read when asked for.

    Reading returns a view of the mapped file. Pages that were read count as resident memory, so the file is mapped
    again after every `RELEASE_EVERY` bytes; a tensor in use keeps its own mapping.

    Args:
        paths: of the files; no tensor may be in two of them.
        rename: from the name in a file to the name here.
    """

    def __init__(self, paths: Sequence[str | Path], rename: Callable[[str], str] = canonical_name):
        self.paths = [Path(path) for path in paths]
        self._files = [open_tensors(path) for path in self.paths]
        self._where: dict[str, tuple[int, str]] = {}
        self._bytes_read = 0
        for index, file in enumerate(self._files):
            for name in file:
                ours = rename(name)
                if ours in self._where:
                    raise ConversionError(self._twice(ours, index))
                self._where[ours] = index, name
        self.infos = {ours: self._info(index, name) for ours, (index, name) in self._where.items()}

    def _info(self, index: int, name: str) -> "TensorInfo":
        info = self._files[index].info(name)
        if info.dtype not in DTYPE_NAMES:
            raise ConversionError(
                f"{self.paths[index].name}: tensor {name} is stored as {info.dtype}. Tensors can be stored as "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPE_NAMES)}."
            )
        if 0 in info.shape:
            raise ConversionError(
                f"{self.paths[index].name}: tensor {name} is empty. DeepSpeed's ZeRO-3 writes such files: run its "
                "zero_to_fp32.py, which puts the weights together, and give what that writes."
            )
        return info

    def _twice(self, name: str, index: int) -> str:
        first = self.paths[self._where[name][0]].name
        if self._where[name][0] == index:
            return f"{first} holds tensor {name} twice, under two prefixes."
        return (
            f"Both {first} and {self.paths[index].name} hold tensor {name}: "
            "a pair is one _rwkv file and the _visual file that belongs to it."
        )

    def __getitem__(self, name: str) -> Tensor:
        index, original = self._where[name]
        self._bytes_read += self.infos[name].num_bytes
        if self._bytes_read > RELEASE_EVERY:
            self._files = [file.renewed() for file in self._files]
            self._bytes_read = 0
        return self._files[index][original]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


class SafetensorsFile:
    """Tensors of a safetensors file."""

    def __init__(self, path: Path):
        self.path = path
        self._file = safe_open(path, framework="pt")
        self._names = list(self._file.keys())

    def renewed(self) -> "SafetensorsFile":
        return SafetensorsFile(self.path)

    def info(self, name: str) -> TensorInfo:
        entry = self._file.get_slice(name)
        dtype = entry.get_dtype()
        return TensorInfo(SAFETENSORS_DTYPES.get(dtype, dtype), tuple(entry.get_shape()))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)


class TorchFile:
    """Tensors of a file of `torch.save`. Nothing in it is run; the format before torch 1.6 is not mapped."""

    def __init__(self, path: Path, is_zip: bool):
        self.path, self.is_zip = path, is_zip
        self._tensors = tensors_in(torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip), path)

    def renewed(self) -> "TorchFile":
        return TorchFile(self.path, self.is_zip) if self.is_zip else self

    def info(self, name: str) -> TensorInfo:
        tensor = self._tensors[name]
        is_plain = tensor.layout == torch.strided and not tensor.is_quantized
        return TensorInfo(tensor.dtype if is_plain else _kind_of(tensor), tuple(tensor.shape))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].detach()


def _kind_of(tensor: Tensor) -> str:
    return "a quantized tensor" if tensor.is_quantized else f"a tensor of layout {tensor.layout}"


def tensors_in(loaded: Any, path: Path) -> dict[str, Tensor]:
    """Return the dict of tensors in what `torch.load` gave, also from under a training framework's name."""
    for _ in range(DEEPEST):
        key = next((k for k in NESTED_UNDER if k in loaded), None) if isinstance(loaded, Mapping) else None
        if key is None:
            break
        loaded = loaded[key]
    else:
        raise ConversionError(
            f"{path.name} is not a checkpoint: its dicts are nested more than {DEEPEST} deep, or hold themselves."
        )
    if not isinstance(loaded, Mapping) or not loaded:
        raise ConversionError(
            f"{path.name} is not a checkpoint: it holds a {type(loaded).__name__}, not named tensors."
        )
    strange = [
        name for name, value in loaded.items() if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if strange:
        raise ConversionError(f"{path.name} is not a checkpoint: {strange[0]!r} is not a tensor.")
    return dict(loaded)


def open_tensors(path: Path) -> SafetensorsFile | TorchFile:
    """Open a file of named tensors; raise `ConversionError`, in a sentence, for anything else."""
    start = _first_bytes(path)
    is_safetensors = _looks_like_safetensors(start, path)
    for mark, reason in NOT_CHECKPOINTS.items():
        if not is_safetensors and start.lstrip().startswith(mark):
            raise ConversionError(f"{path.name} {reason}.")
    try:
        if is_safetensors:
            return SafetensorsFile(path)
        is_zip = start.startswith(b"PK")
        if is_zip and not zipfile.is_zipfile(path):
            raise ConversionError(f"{path.name} is truncated: its table of contents at the end is missing.")
        return TorchFile(path, is_zip)
    except SafetensorError as error:
        raise ConversionError(f"{path.name} is truncated or damaged ({error}).") from error
    except pickle.UnpicklingError as error:
        raise ConversionError(_unpickling_sentence(path, error)) from error
    except (ConversionError, MemoryError):
        raise
    except Exception as error:  # what an unpickler makes of bytes that were never pickled can be anything
        raise ConversionError(
            f"{path.name} is not a checkpoint, or damaged ({first_line(error)})."
        ) from error


def _looks_like_safetensors(start: bytes, path: Path) -> bool:
    """Return whether a file begins with the length of a header, in 8 bytes, and a header in JSON.

    The length's bytes may be those of `<` or `{`. The bytes of a text make a number that is larger than any file.
    """
    length = int.from_bytes(start[:8], "little")
    return start[8:9] == b"{" and (length <= path.stat().st_size - 8 or not start[:8].isascii())


def _first_bytes(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except FileNotFoundError:
        raise ConversionError(f"There is no file {path}.") from None
    except IsADirectoryError:
        raise ConversionError(f"{path} is a folder, not a checkpoint.") from None
    except PermissionError:
        raise ConversionError(f"No permission to read {path}.") from None
    if not start:
        raise ConversionError(f"{path.name} is empty.")
    return start


def _unpickling_sentence(path: Path, error: Exception) -> str:
    if found := re.search(r"(?:GLOBAL|global) (\S+)", str(error)):
        return (
            f"{path.name} holds code ({found[1]}) beside tensors, which reading would run: it was not read."
        )
    return f"{path.name} is not a checkpoint, or damaged ({first_line(error)})."


def read_checkpoint(*paths: str | Path) -> Checkpoint:
    """Return the tensors of an original checkpoint under canonical names, from one file or a split pair.

    Raises:
        ConversionError: if a file is missing, truncated, no checkpoint, or holds code.
    """
    return Checkpoint(paths)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def files_of_index(index: Path) -> list[Path]:
    """Return the files of shards that an index names. Raises `ConversionError` for any outside its folder."""
    fields = read_json(index)
    weight_map = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index} has no weight_map that names files.")
    for name in weight_map.values():
        if not (isinstance(name, str) and SHARD.fullmatch(name)):
            raise ConversionError(
                f"weight_map in {index} names {name!r}, which is no file of weights beside it."
            )
    return [index.with_name(name) for name in sorted(set(weight_map.values()))]


@contextlib.contextmanager
def hashed_meanwhile(paths: Sequence[Path]) -> Iterator[Callable[[], list[str]]]:
    """Compute the sha256 of files in a thread beside the body; calling what is yielded waits for them."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        digests = pool.submit(lambda: [sha256_of(path, stop) for path in paths])
        try:
            yield digests.result
        finally:
            stop.set()  # a body that failed waits for nothing


def sha256_of(path: Path, stop: threading.Event | None = None) -> str:
    """Return the sha256 of a file in hexadecimal; of its beginning only if `stop` is set meanwhile."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while (block := file.read(1 << 22)) and not (stop and stop.is_set()):
            digest.update(block)
    return digest.hexdigest()


def is_finite(tensor: Tensor) -> bool:
    """Return whether no value is NaN or infinite, in one pass without a copy."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal in dtype, shape and every bit, NaN and the sign of zero included."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    a, b = as_bytes(a), as_bytes(b)
    if (
        a.storage_offset() % 8 or b.storage_offset() % 8
    ):  # torch views bytes as words from a multiple of 8 on only
        return torch.equal(a, b)
    end = len(a) // 8 * 8
    words = a[:end].view(torch.int64), b[:end].view(torch.int64)  # compared five times as fast as bytes
    return torch.equal(*words) and torch.equal(a[end:], b[end:])


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor in row-major order, without a copy if it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def shards_of(infos: Mapping[str, TensorInfo], max_bytes: int) -> list[list[str]]:
    """Return the names in order, cut where the next tensor would pass `max_bytes`; a larger tensor is alone."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, info in infos.items():
        if shards[-1] and size + info.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += info.num_bytes
    return shards


def shard_names(count: int, stem: str = "model") -> list[str]:
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def write_safetensors(
    path: Path,
    infos: Mapping[str, TensorInfo],
    tensors: Iterable[tuple[str, Tensor]],
    progress: Callable[[str, int], None] | None = None,
) -> None:
    """Write a safetensors file without holding more than one tensor.

    Args:
        path: of the file.
        infos: dtype and shape of every tensor, in the order in which they come.
        tensors: names and tensors in that order.
        progress: called with the file's name and the bytes written since the last call.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in infos.items():
        end = offset + info.num_bytes
        header[name] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for (name, tensor), expected in zip(tensors, infos, strict=True):
            assert name == expected and (tensor.dtype, tuple(tensor.shape)) == infos[name], (name, expected)
            data = as_bytes(tensor).numpy().data
            for start in range(0, len(data), WRITE_BYTES):
                file.write(data[start : start + WRITE_BYTES])
            if progress is not None:
                progress(path.name, len(data))
