"""Shared by the benchmarks: fair timing, the limits of the machine, and tables."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

L2_FLUSH = 256 * 2**20
"""Bytes, more than any GPU's last cache holds."""


class Timing(NamedTuple):
    """Seconds: the median, and between which a fifth is faster and a fifth slower; how many were taken."""

    median: float
    low: float
    high: float
    count: int


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    device: str | torch.device = "cpu",
    seconds: float = 1.0,
    least: int = 5,
) -> dict[str, Timing]:
    """Times functions in turn, so that what disturbs the machine disturbs all of them.

    A GPU is timed by events, with a cold L2 cache; a CPU by the clock. Each function runs twice before.

    Args:
        functions: name -> what to time; its result is dropped.
        device: where the functions compute.
        seconds: how long to go on for each of them.
        least: rounds that are made however long they take.
    """
    is_cuda = torch.device(device).type == "cuda"
    measure = _cuda_milliseconds if is_cuda else _cpu_milliseconds
    flush = torch.empty(L2_FLUSH, dtype=torch.int8, device=device) if is_cuda else None
    for function in functions.values():
        function()
        measure(function, flush)
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds * len(functions)
    while time.perf_counter() < end or len(next(iter(times.values()))) < least:
        for name, function in functions.items():
            times[name].append(measure(function, flush) / 1e3)
    return {name: _timing(taken) for name, taken in times.items()}


def _timing(taken: list[float]) -> Timing:
    fifths = statistics.quantiles(taken, n=5, method="inclusive") if len(taken) > 1 else taken * 4
    return Timing(statistics.median(taken), fifths[0], fifths[3], len(taken))


def _cpu_milliseconds(function: Callable[[], object], flush: None) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def _cuda_milliseconds(function: Callable[[], object], flush: torch.Tensor) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def captured(function: Callable[[], object]) -> Callable[[], object]:
    """`function` as a CUDA graph: what the GPU needs, without what Python takes to launch it.

    Raises:
        RuntimeError: if it waits for the GPU on its way, or allocates what cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and allocates what is needed only once
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def chosen_device(device: str | None, threads: int | None) -> str:
    """The device asked for, or the GPU if there is one; a CPU computes with so many threads from now on."""
    if threads:
        torch.set_num_threads(threads)
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def copy_bandwidth(device: str | torch.device = "cpu", size: int = 2**30) -> float:
    """Bytes read and written in a second by the copy of a large tensor of `size` random bytes.

    A GPU may compress what is in its memory, so zeros would be copied faster than anything else.
    """
    source = torch.randint(-128, 128, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, device, seconds=0.5)["copy"]
    return 2 * size / timing.median


def matmul_rate(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16, size: int = 0
) -> float:
    """Operations in a second of a square matrix product, one multiplication and one addition as two.

    Args:
        device: where it is computed.
        dtype: of both factors. float32 is exact here, without TF32.
        size: rows; 0 takes 8,192 on a GPU and 1,024 on a CPU.
    """
    size = size or (8192 if torch.device(device).type == "cuda" else 1024)
    left, right = torch.randn(2, size, size, device=device).to(dtype).unbind()
    timing = interleaved({"matmul": lambda: left @ right}, device, seconds=0.5)["matmul"]
    return 2 * size**3 / timing.median


def machine(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Describe what the numbers depend on, for the head of a table."""
    is_cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device)
        if is_cuda
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def readable(seconds: float) -> str:
    """0.00123 -> "1.23 ms"."""
    unit, scale = next(((u, x) for u, x in (("s", 1), ("ms", 1e3)) if seconds * x >= 1), ("µs", 1e6))
    return f"{seconds * scale:.3g} {unit}" if seconds * scale < 1000 else f"{seconds * scale:,.0f} {unit}"


def readable_bytes(count: float) -> str:
    """1230000 -> "1.23 MB"."""
    unit, scale = next(((u, x) for u, x in (("GB", 1e9), ("MB", 1e6)) if count >= x), ("kB", 1e3))
    return f"{count / scale:.3g} {unit}"


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with one line for each row; the columns are the keys of the first. None is an empty cell."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [["" if row[key] is None else str(row[key]) for key in rows[0]] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def report(text: str, data: Any, markdown: Path | None = None, json_file: Path | None = None) -> None:
    """Prints `text`, and writes it to the file `markdown` and `data` to `json_file` where these are given."""
    print(text)
    if markdown:
        markdown.write_text(text + "\n", encoding="utf-8")
    if json_file:
        json_file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
