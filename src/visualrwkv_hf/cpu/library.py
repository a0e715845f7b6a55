"""Compile the C ops for the CPU at hand, keep the library in the user's cache folder, and load it from there.

A cached library is code. So it is loaded only from a folder that nobody else can write to, and only if its contents
have the SHA-256 that its name gives.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = (Path(__file__).with_name("ops.c"), *sorted(Path(__file__).parent.glob("*.h")))
"""The file that is compiled, and the headers that it includes."""
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-std=gnu11", "-fno-math-errno", "-pthread", "-shared", "-fPIC")
FOR_THIS_CPU = (
    ("-march=native", "-fopenmp"),
    ("-march=native",),  # Apple's compiler has no OpenMP
    ("-mcpu=native",),
    ("-fopenmp",),  # compilers that do not know this CPU
    (),
)
"""Flags that are tried in turn until the compiler accepts them."""

_ADDRESS, _NUMBER, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
ARGUMENTS = {
    "wkv": [_INT, *[_NUMBER] * 5, *[_ADDRESS] * 11],
    "wkv_backward": [_INT, *[_NUMBER] * 5, *[_ADDRESS] * 19],
    "token_shift": [_INT, *[_NUMBER] * 4, *[_ADDRESS] * 6],
    "token_shift_backward": [_INT, *[_NUMBER] * 4, *[_ADDRESS] * 10],
    "linear": [_INT, *[_NUMBER] * 4, *[_ADDRESS] * 4],
    "linear_int8": [_INT, *[_NUMBER] * 4, *[_ADDRESS] * 2, _NUMBER, *[_ADDRESS] * 2],
    "linear_bf16": [_INT, *[_NUMBER] * 3, *[_ADDRESS] * 4],
    "attention_bf16": [_INT, *[_NUMBER] * 6, _FLOAT, *[_ADDRESS] * 6],
    "decode": [_INT, *[_NUMBER] * 6, *[_FLOAT] * 2, *[_ADDRESS] * 21],
    "blocks": [_INT, _NUMBER, *[_FLOAT] * 3, *[_ADDRESS] * 7],
    "token": [_INT, _NUMBER, *[_FLOAT] * 3, *[_ADDRESS] * 3, *[_FLOAT] * 2, *[_ADDRESS] * 4],
}
"""Types of the arguments of the functions visualrwkv_... in ops.c, the number of threads first."""


FLOAT: dict[str, Any] = dict(dtype=torch.float32, device="cpu")
"""Options for tensors that C writes to: torch's own defaults can be changed by anyone."""


class Library:
    """The compiled ops.

    Args:
        path: the shared library.

    Attributes:
        contract: constants (int) and orders of names (tuple of str) that ops.c defines, by name.

    Raises:
        OSError: if the system cannot load it, such as from a file system that forbids execution.
    """

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path))
        for name, arguments in ARGUMENTS.items():
            function = getattr(self._library, f"visualrwkv_{name}")
            function.argtypes, function.restype = arguments, _INT
        self._library.visualrwkv_contract.restype = ctypes.c_char_p
        self.contract = _parse(self._library.visualrwkv_contract().decode())
        _compute_after_a_fork()

    def call(self, name: str, *arguments: Tensor | ctypes.Array | float | None) -> None:
        """Call a function of ops.c. A tensor is passed by address, None as a null pointer.

        Raises:
            RuntimeError: if the function refuses its arguments, or a tensor is not on the CPU.
        """
        addresses = map(_as_argument, arguments)
        if error := getattr(self._library, f"visualrwkv_{name}")(torch.get_num_threads(), *addresses):
            raise RuntimeError(
                f"The native op {name} refused its arguments: {self.contract['ERRORS'][error]}."
            )


def _as_argument(value: Any) -> Any:
    """Return a tensor's address, and anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    if not value.is_cpu:
        raise RuntimeError(f"Native ops read tensors on the CPU, got one on {value.device}.")
    return value.data_ptr()


@functools.cache
def _compute_after_a_fork() -> None:
    """Have forked children compute with one thread, as DataLoader's workers do.

    OpenMP's threads do not survive a fork, and torch's ops as well as ours would wait for them for ever.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def _parse(contract: str) -> dict[str, Any]:
    rows = (line.split() for line in contract.splitlines())
    return {name: int(words[0]) if words[0].isdigit() else tuple(words) for name, *words in rows}


# --- the cache --------------------------------------------------------------------------------------------


def load_library(folder: str | Path | None = None) -> tuple[Library, Path]:
    """Load the library from a folder, and compile it first if it is not there or damaged.

    Args:
        folder: where the library is kept; None is `visualrwkv_hf` in the user's cache folder, which is
            `$XDG_CACHE_HOME` if that is an absolute path, otherwise `~/.cache`.

    Raises:
        RuntimeError: if there is no C compiler, it fails, the folder cannot be written to or belongs to somebody else,
            or the system cannot load what is in it.
    """
    try:
        folder = _safe_folder(Path(folder) if folder else make_cache_folder())
        path = _find(folder) or _compile(folder)
        return Library(path), path
    except OSError as error:
        raise RuntimeError(f"Native ops cannot be built or loaded: {error}.") from error


def is_compiled() -> bool:
    """Return whether the library for these sources and this CPU is in the user's cache folder."""
    return any(cache_folder().glob(f"native-{_fingerprint()}-*.so"))


def cache_folder() -> Path:
    """Return the folder of compiled libraries. The specification of XDG has relative paths ignored."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "visualrwkv_hf"


def make_cache_folder() -> Path:
    """Return the cache folder, created with mode 0700 if it is missing: it holds compiled code.

    Earlier versions could leave it with mode 0775 under umask 002, and native ops then refused it. From such a folder
    the group's write permission is removed, if the folder is this user's and no link. Other modes are left as they are.

    Raises:
        OSError: it cannot be created or changed.
    """
    folder = cache_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    is_own = hasattr(os, "getuid") and found.st_uid == os.getuid()  # Windows has access lists instead
    if is_own and stat.S_ISDIR(found.st_mode) and found.st_mode & 0o777 == 0o775:
        folder.chmod(stat.S_IMODE(found.st_mode) & ~stat.S_IWGRP)
    return folder


def _safe_folder(folder: Path) -> Path:
    """Return the folder, created with mode 0700 if it is missing.

    Raises:
        RuntimeError: if somebody else owns it or may write to it, so could exchange the library.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_ours_alone(folder.stat()):
        raise RuntimeError(
            f"Native ops are not loaded from {folder}: another user owns it or may write to it. Change that with "
            f"chmod 700, or remove it."
        )
    return folder


def _is_ours_alone(found: os.stat_result) -> bool:
    """Return whether this user owns a file or folder and nobody else may write to it."""
    if not hasattr(os, "getuid"):  # Windows, where the user's folders have access lists
        return True
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _find(folder: Path) -> Path | None:
    """Return the library for these sources and this CPU if its contents are whole; remove damaged ones."""
    for path in folder.glob(f"native-{_fingerprint()}-*.so"):
        try:
            found = path.lstat()
            is_safe = stat.S_ISREG(found.st_mode) and _is_ours_alone(found)
            if is_safe and path.name == _name_of(path.read_bytes()):
                return path
        except FileNotFoundError:  # another process has removed it
            continue
        path.unlink(missing_ok=True)
    return None


def _name_of(contents: bytes) -> str:
    return f"native-{_fingerprint()}-{hashlib.sha256(contents).hexdigest()}.so"


def _fingerprint() -> str:
    """Return a hash of the sources, the flags, the CPU and the C library.

    Several machines may share a home folder, and so may containers on one of them.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        cpu = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        cpu = platform.processor()
    try:
        libc = os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, ValueError, OSError):
        libc = None
    sources = b"".join(path.read_bytes() for path in SOURCES)
    system = f"{FLAGS}{FOR_THIS_CPU}{platform.machine()}{cpu}{libc}"
    return hashlib.sha256(sources + system.encode()).hexdigest()[:16]


def _compile(folder: Path) -> Path:
    """Compile the library and put it into `folder` whole or not at all: other processes may do the same at once."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise RuntimeError(f"Native ops need a C compiler ({', '.join(COMPILERS)}), and none was found.")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        library = Path(scratch) / "native.so"
        for for_this_cpu in FOR_THIS_CPU:
            command = [compiler, *FLAGS, *for_this_cpu, str(SOURCES[0]), "-o", str(library), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                return _publish(library, folder)
    raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")


def _publish(library: Path, folder: Path) -> Path:
    """Move a finished library to the name of its contents, after both are on the disk."""
    library.chmod(0o700)
    target = folder / _name_of(library.read_bytes())
    _sync(library)
    library.replace(target)
    _sync(folder)
    return target


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
