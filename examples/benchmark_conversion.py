"""Measure the cost of a conversion: its time, compared with copying the file and hashing the copy, and its memory.

    python examples/benchmark_conversion.py                 # a file like VisualRWKV-6 7B: 15.9 GB, and as much again
    python examples/benchmark_conversion.py --gigabytes 2   # the same widths with fewer layers

It writes a checkpoint with the names, shapes and dtype of the released one, copies it, hashes the copy, converts it,
and removes all of it. Every step runs in its own process, so that its peak memory is its own.
"""

import argparse
import math
import mmap
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from visualrwkv_hf import VisualRWKVConfig
from visualrwkv_hf.conversion import expected_shapes, restore_state_dict, to_hf
from visualrwkv_hf.conversion.checkpoint import Checkpoint, sha256_of

CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
SIZES = {"1B6": (2048, 24), "3B": (2560, 32), "7B": (4096, 32)}
"""Width and layers of VisualRWKV-6."""


class Cost(NamedTuple):
    """The cost of a step, in seconds and bytes."""

    wall: float
    cpu: float
    memory: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="7B")
    parser.add_argument(
        "--gigabytes", type=float, help="fewer layers, so that the file has at most this size"
    )
    parser.add_argument(
        "--folder", type=Path, help="where to write; without it the system's temporary folder"
    )
    asked = parser.parse_args()
    try:
        config = fitting_config(asked.size, asked.gigabytes)
    except ValueError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory(dir=asked.folder) as scratch:
        original, copy = Path(scratch) / "original.pth", Path(scratch) / "copy.pth"
        in_own_process(write_checkpoint, original, config)
        copied = in_own_process(copy_and_hash, original, copy)
        copy.unlink()
        converted = in_own_process(to_hf, original, Path(scratch) / "model")
        largest = max(info.num_bytes for info in Checkpoint([original]).infos.values())
        print_table(config, original.stat().st_size, largest, copied, converted)


def fitting_config(size: str, gigabytes: float | None) -> VisualRWKVConfig:
    """VisualRWKV-6 of this size, with as many layers as `gigabytes` hold.

    Raises:
        ValueError: if they do not hold one.
    """
    width, num_layers = SIZES[size]
    if gigabytes is None:
        return config_of(width, num_layers)
    none, one = (num_bytes(config_of(width, layers)) for layers in (1, 2))
    num_layers = min(num_layers, 1 + math.floor((gigabytes * 1e9 - none) / (one - none)))
    if num_layers < 1:
        raise ValueError(
            f"{gigabytes} GB are too few: one layer and its vocabulary have {none / 1e9:.2f} GB."
        )
    return config_of(width, num_layers)


def config_of(width: int, num_layers: int) -> VisualRWKVConfig:
    is_wide = width >= 4096
    text = {
        "rwkv_version": 6,
        "hidden_size": width,
        "num_hidden_layers": num_layers,
        "mix_low_rank_dim": 64 if is_wide else 32,
        "decay_low_rank_dim": 128 if is_wide else 64,
    }
    vision = {"clip_config": CLIP_LARGE, "class_token": "last"}
    return VisualRWKVConfig(
        text_config=text,
        vision_config=vision,
        scan="bidirectional",
        image_position="middle",
        projector="linear",
    )


def num_bytes(config: VisualRWKVConfig) -> int:
    return 2 * sum(math.prod(shape) for shape in expected_shapes(config).values())


def write_checkpoint(path: Path, config: VisualRWKVConfig) -> None:
    """Random numbers under the original's names: first the file without its numbers, then these, in the mapped file."""
    with FakeTensorMode():
        ours = {
            name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in expected_shapes(config).items()
        }
        original = {name: tensor.contiguous() for name, tensor in restore_state_dict(ours, config).items()}
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(original, path)
    torch.serialization.set_default_mmap_options(mmap.MAP_SHARED)
    numbers = torch.randn(1 << 24).mul(0.02).bfloat16()
    for tensor in torch.load(path, mmap=True, weights_only=True).values():
        for part in tensor.view(-1).split(len(numbers)):
            part.copy_(numbers[: len(part)])


def copy_and_hash(original: Path, copy: Path) -> None:
    shutil.copyfile(original, copy)
    sha256_of(copy)


def in_own_process(step: Callable[..., Any], *arguments: Any) -> Cost:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measured, step, arguments).result()


def measured(step: Callable[..., Any], arguments: tuple) -> Cost:
    wall, cpu = time.perf_counter(), time.process_time()
    step(*arguments)
    return Cost(time.perf_counter() - wall, time.process_time() - cpu, peak_memory())


def peak_memory() -> int:
    """The most bytes that were resident. Elsewhere than on Linux it may be the parent's, if that had more."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def print_table(config: VisualRWKVConfig, size: int, largest: int, copied: Cost, converted: Cost) -> None:
    text = config.text_config
    print(
        f"A file of {size / 1e9:.2f} GB ({text.num_hidden_layers} layers of width {text.hidden_size}); "
        f"its largest tensor has {largest / 1e9:.2f} GB.\n"
    )
    print("| step | seconds | processor seconds | peak memory, GB |\n|---|---|---|---|")
    for name, cost in (("copy and hash", copied), ("convert", converted)):
        print(f"| {name} | {cost.wall:.1f} | {cost.cpu:.1f} | {cost.memory / 1e9:.2f} |")
    print(f"| ratio | {converted.wall / copied.wall:.2f} | {converted.cpu / copied.cpu:.2f} | |")


if __name__ == "__main__":
    main()
