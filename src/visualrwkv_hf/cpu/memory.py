"""Where the weights of an accelerated model are in memory: on pages of 2 MB, and there only."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CACHE_LINE = 64
"""Bytes."""

TRIMMED_BYTES = 1 << 26
"""Freed memory is given back in parts of about this size."""

MADV_DONTNEED = 4
"""Linux's advice to unmap pages now. Pages of a file stay in the system's cache, and reading maps them again.
What was written to a private mapping would be lost, so this is only for mappings that nobody has written to."""


def is_plain(weight: Tensor) -> bool:
    """Return whether a weight is in this process's memory as C reads it: not quantised, on a disk or elsewhere."""
    return type(weight) in (nn.Parameter, Tensor) and weight.is_cpu and weight.is_contiguous()


def move_to_huge_pages(module: nn.Module) -> None:
    """Move the weights of a module on the CPU to pages of 2 MB, which are read faster, if the system has them.

    The parameters and buffers stay the same objects. A checkpoint's file that they were mapped from leaves the memory
    as they are copied, so that there is never a second copy.
    """
    weights = [x for x in (*module.parameters(), *module.buffers()) if is_plain(x) and x.numel()]
    room = [-(-x.nbytes // CACHE_LINE) * CACHE_LINE for x in weights]
    if not weights or not hasattr(mmap, "MADV_HUGEPAGE"):  # only Linux has it
        return
    pages = mmap.mmap(-1, sum(room), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return
    files, freed = mapped_files(), 0
    for weight, offset in zip(weights, accumulate(room, initial=0)):
        moved = torch.frombuffer(pages, dtype=weight.dtype, count=weight.numel(), offset=offset)
        moved = moved.view(weight.shape).copy_(weight.data)
        unmap(weight, files)
        weight.data = moved
        freed += weight.nbytes
        if freed > TRIMMED_BYTES:
            give_back()
            freed = 0
    give_back()


def give_back() -> None:
    """Give memory that was freed back to the system. C's library keeps it where other memory lies between."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has this function
        ctypes.CDLL(None).malloc_trim(0)


def cast(module: nn.Module, dtype: torch.dtype, without: type[nn.Module]) -> None:
    """Bring the floating-point weights of a module to a dtype, one after the other, and unmap those of files.

    Args:
        module: the weights of all its parts are cast, in place.
        dtype: of the result.
        without: the class of the parts that are left as they are.
    """
    files = mapped_files()
    parts = [part for part in module.modules() if not isinstance(part, without)]
    weights = [x for part in parts for x in (*part.parameters(False), *part.buffers(False))]
    for weight in {id(x): x for x in weights}.values():
        if weight.is_floating_point() and weight.dtype != dtype and is_plain(weight):
            new = weight.data.to(dtype)
            unmap(weight, files)
            weight.data = new


def mapped_files() -> list[tuple[int, int]]:
    """Return the address ranges that are private mappings of files, none of whose pages this process has written to.

    There are none where the system has no /proc, as on macOS. Pages that were written to count as anonymous, and once
    they are in swap count there alone.
    """
    try:
        lines = Path("/proc/self/smaps").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    ranges: list[tuple[int, int]] = []
    current, clean = None, {"Anonymous:", "Swap:"}
    for line in lines:
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ...p \S+ \S+ (\d+)", line):
            current = (int(found[1], 16), int(found[2], 16)) if found[3] != "0" else None
            untouched = set[str]()
        elif current and line.startswith(tuple(clean)) and line.endswith(" 0 kB"):
            untouched.add(line.split()[0])
            if untouched == clean:
                ranges.append(current)
    return ranges


def unmap_after_use(module: nn.Module) -> None:
    """Let the weights that a module reads from a mapped file leave the memory after each of its calls.

    A vision tower is needed once for a picture. When it is called again, the system maps its pages again, from its
    cache where they are still there.
    """
    module.register_forward_hook(_unmap_weights)


def _unmap_weights(module: nn.Module, args: Any, output: Any) -> None:
    files = mapped_files()
    for weight in (*module.parameters(), *module.buffers()):
        if is_plain(weight):
            unmap(weight, files)


def unmap(weight: Tensor, files: Sequence[tuple[int, int]]) -> None:
    """Let a tensor's pages leave the memory if they are in a range of `mapped_files()`. Reading maps them again."""
    start, end = weight.data_ptr(), weight.data_ptr() + weight.nbytes
    if not any(low <= start and end <= high for low, high in files):
        return
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:  # a refusal changes nothing but the memory that is used
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_DONTNEED)
