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
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .key_map import ConversionError, canonical_name

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
"""What else comes under a checkpoint's name, by its first bytes."""

NESTED_UNDER = ("state_dict", "module", "model")
"""Names under which training frameworks put the tensors into a dict with other things."""

RELEASE_EVERY = 1 << 29
"""Bytes read from a mapped file before its pages are given back."""

WRITE_BYTES = 1 << 20
"""Bytes written at once: from a mapped file, larger pieces were two to four times as slow."""


class TensorInfo(NamedTuple):
    """What is known of a tensor without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint(Mapping[str, Tensor]):
    """Tensors of one or several files, mapped into memory and read when asked for.

    Reading returns a view of the mapped file. Pages that were read count as resident memory, so the mapping
    is renewed again and again; a tensor in use keeps its own.

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
        self.infos = {ours: self._files[index].info(name) for ours, (index, name) in self._where.items()}

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
        return TensorInfo(SAFETENSORS_DTYPES[entry.get_dtype()], tuple(entry.get_shape()))

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
        return TensorInfo(self._tensors[name].dtype, tuple(self._tensors[name].shape))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].detach()


def tensors_in(loaded: object, path: Path) -> dict[str, Tensor]:
    """The dict of tensors in what `torch.load` gave, also from under a training framework's name."""
    while isinstance(loaded, Mapping) and (key := next((k for k in NESTED_UNDER if k in loaded), None)):
        loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded:
        raise ConversionError(
            f"{path.name} is not a checkpoint: it holds a {type(loaded).__name__}, not named tensors."
        )
    strange = [
        name for name, value in loaded.items() if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if strange:
        raise ConversionError(f"{path.name} is not a checkpoint: {strange[0]!r} is no tensor.")
    return dict(loaded)


def open_tensors(path: Path) -> SafetensorsFile | TorchFile:
    """Opens a file of named tensors. Raises `ConversionError`, in a sentence, for anything else."""
    start = _first_bytes(path)
    for mark, reason in NOT_CHECKPOINTS.items():
        if start.lstrip().startswith(mark):
            raise ConversionError(f"{path.name} {reason}.")
    try:
        if start[8:9] == b"{":  # safetensors: the header's length in 8 bytes, then the header in JSON
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
            f"{path.name} is not a checkpoint, or damaged ({_first_line(error)})."
        ) from error


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
        return f"{path.name} holds code ({found[1]}) beside tensors: it was not read, for that would run it."
    return f"{path.name} is not a checkpoint, or damaged ({_first_line(error)})."


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def read_checkpoint(*paths: str | Path) -> Checkpoint:
    """The tensors of an original checkpoint under canonical names, from one file or a split pair.

    Raises:
        ConversionError: if a file is missing, truncated, no checkpoint, or holds code.
    """
    return Checkpoint(paths)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def hashed_meanwhile(paths: Sequence[Path]) -> Iterator[Callable[[], list[str]]]:
    """Reads the sha256 of files in a thread beside the body; calling what is given waits for them."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        digests = pool.submit(lambda: [sha256_of(path, stop) for path in paths])
        try:
            yield digests.result
        finally:
            stop.set()  # a body that failed waits for nothing


def sha256_of(path: Path, stop: threading.Event | None = None) -> str:
    """sha256 of a file in hexadecimal; of its beginning only if `stop` is set meanwhile."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while (block := file.read(1 << 22)) and not (stop and stop.is_set()):
            digest.update(block)
    return digest.hexdigest()


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, in one pass without a copy."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal in dtype, shape and every bit, NaN and the sign of zero included."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    a, b = as_bytes(a), as_bytes(b)
    end = len(a) // 8 * 8
    if a.storage_offset() % 8 or b.storage_offset() % 8:  # torch views bytes as words from a multiple on
        end = 0
    words = a[:end].view(torch.int64), b[:end].view(torch.int64)  # compared five times as fast as bytes
    return torch.equal(*words) and torch.equal(a[end:], b[end:])


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor in reading order, without a copy if it lies so."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def shards_of(infos: Mapping[str, TensorInfo], max_bytes: int) -> list[list[str]]:
    """Names in order, cut where the next tensor would pass `max_bytes`; a larger tensor stands alone."""
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
    """Writes a safetensors file without holding more than one tensor.

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
