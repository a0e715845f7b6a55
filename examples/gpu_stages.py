"""The stages of gpu_session.py, each run as `python gpu_stages.py NAME [--dry-run]` in a process of its own.

A stage prints each result as a row as soon as it has it. With `--dry-run` it does the same on a CPU with tiny shapes:
kernels run in Triton's interpreter, and a tool that is missing (ncu, compute-sanitizer) is left out.
"""

import csv
import importlib
import json
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
DRY_RUN = "--dry-run" in sys.argv
DEVICE = "cpu" if DRY_RUN else "cuda"
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "visualrwkv-hf",
    "flash-linear-attention",
    "torchao",
    "pytest-xdist",
)
FLA_CONFIGS = 2
"""How many configurations of each of flash-linear-attention's kernels are tried; tuning all takes half an hour."""


def emit(**row: Any) -> None:
    """Print a row of the stage's table."""
    sys.stdout.write(f"row: {json.dumps(row)}\n")  # at once, with its end: print() writes that by itself
    sys.stdout.flush()


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def from_tests(name: str) -> Any:
    """Import a helper of the tests, which come with the repository and not with the package."""
    for folder in (ROOT / "tests", ROOT / "tests" / "support"):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return importlib.import_module(name)


# --- machine ------------------------------------------------------------------------------------------


def machine() -> None:
    """Show versions, and the rates of a copy of random bytes and of a product of random matrices."""
    from benchmarking import copy_bandwidth, matmul_rate

    emit(what="python", found=platform.python_version())
    for package in PACKAGES:
        try:
            emit(what=package, found=version(package))
        except PackageNotFoundError:
            emit(what=package, found="not installed")
    emit(what="CUDA", found=str(torch.version.cuda))
    if not DRY_RUN:
        properties = torch.cuda.get_device_properties(0)
        emit(what="device", found=f"{properties.name}, {properties.multi_processor_count} processors")
        emit(what="memory", found=f"{properties.total_memory / 2**30:.0f} GiB")
        asked = "clocks.current.sm,clocks.max.sm,clocks.current.memory,power.limit,driver_version"
        said = subprocess.run(["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"], **_TEXT)
        emit(what=asked, found=said.stdout.strip())
    emit(what="copy of random bytes, GB/s", found=copy_bandwidth(DEVICE, 2**20 if DRY_RUN else 2**32) / 1e9)
    rate = matmul_rate(DEVICE, torch.bfloat16, 64 if DRY_RUN else 8192)
    emit(what="bfloat16 product of random matrices, TFLOP/s", found=rate / 1e12)


_TEXT: dict[str, Any] = {"capture_output": True, "text": True}


# --- compile ------------------------------------------------------------------------------------------


def compile_kernels() -> None:
    """Compile what the carried cache does not have, in as many processes as there are CPU cores."""
    gpu_launches = from_tests("gpu_launches")
    start, called = time.perf_counter(), gpu_launches.calls()
    if DRY_RUN:
        called = {"decoding": lambda: gpu_launches.call_decoding(2, (16, 16, 16, 16))}
    found = gpu_launches.launches_of(called)
    emit(what="distinct launches", found=len(found))
    found = found[:1] if DRY_RUN else found
    cache = Path(os.environ["TRITON_CACHE_DIR"])
    before = set(cache.glob("*/*.cubin"))
    gpu_launches._launches[:] = found
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        for problem in pool.map(gpu_launches.compile_number, range(len(found))):
            if problem:
                emit(what="does not compile", found=problem)
    emit(
        what="compiled here, not in the cache that was carried",
        found=len(set(cache.glob("*/*.cubin")) - before),
    )
    emit(what="seconds", found=time.perf_counter() - start)


# --- tests --------------------------------------------------------------------------------------------


def tests() -> None:
    """Run the tests that need a GPU in 12 processes."""
    try:
        processes = ["-n", "12"] if version("pytest-xdist") and not DRY_RUN else []
    except PackageNotFoundError:
        processes = []
    pytest = [
        sys.executable,
        "-c",
        "import sys, pytest; sys.exit(pytest.main())",
    ]  # -m: the root would be importable
    command = [
        *pytest,
        "-q",
        "-m",
        "gpu",
        "-rfE",
        "-p",
        "no:cacheprovider",
        *processes,
        "tests/kernels/test_gpu.py",
    ]
    environment = dict(os.environ, PYTHONSAFEPATH="1")
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        assert run.stdout is not None
        for line in run.stdout:
            print(line, end="", flush=True)
            if re.match(r"(FAILED|ERROR) ", line) or re.search(r"\d+ (passed|failed|skipped|error)", line):
                emit(pytest=line.strip().strip("= "))
    if run.returncode:
        raise SystemExit(f"pytest ended with status {run.returncode}.")


# --- sanitizer ----------------------------------------------------------------------------------------


def sanitizer() -> None:
    """Look for bad memory accesses and races in one small call of each op."""
    wrong = False
    for op in ("wkv7", "wkv6", "decode"):
        for tool in ("memcheck", "racecheck"):
            said, code = _under("compute-sanitizer", ["--tool", tool, "--error-exitcode", "9"], op)
            last = [
                line for line in said.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line
            ]
            emit(tool=tool, call=op, exit_status=code, said=last[-1].strip("= ") if last else said[-200:])
            wrong |= code != 0
    if wrong:
        raise SystemExit("compute-sanitizer found errors.")


def _under(tool: str, options: list[str], op: str) -> tuple[str, int]:
    """Run a small call of `op` under a tool of CUDA's; without the tool where it is missing and this is a dry run."""
    call = [sys.executable, str(Path(__file__)), "call", op, *(["--dry-run"] if DRY_RUN else [])]
    found = shutil.which(tool) or shutil.which(
        tool, path=os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"
    )
    if found is None and not DRY_RUN:
        return f"{tool} is not installed", 127
    done = subprocess.run([*([found, *options] if found else []), *call], **_TEXT)
    said = f"{tool} is not installed" if found is None and not done.returncode else done.stdout + done.stderr
    return said, done.returncode


def call() -> None:
    """Call one op once: what a tool looks at. `wkv7-large` is the shape of training."""
    from visualrwkv_hf import kernel_backend

    op, call_wkv = sys.argv[2], from_tests("gpu_launches").call_wkv
    with kernel_backend("triton"):
        if op == "decode":
            from engines import random_model

            model = random_model("tiny", DEVICE, torch.bfloat16)
            with torch.no_grad():
                state = model(
                    torch.ones(1, 3, dtype=torch.long, device=DEVICE), use_cache=True
                ).past_key_values
                model(torch.ones(1, 1, dtype=torch.long, device=DEVICE), past_key_values=state)
        elif op.endswith("-large") and not DRY_RUN:
            call_wkv(op.removesuffix("-large"), 8, 4096, 64 if op.startswith("wkv7") else 32, True, DEVICE)
        else:
            call_wkv(op.removesuffix("-large"), 1, 65 if not DRY_RUN else 33, 1, True, DEVICE)
    if not DRY_RUN:
        torch.cuda.synchronize()


# --- wkv ----------------------------------------------------------------------------------------------

WKV_CASES = (
    ("wkv7", 8, 4096, 64),
    ("wkv7", 1, 1088, 64),
    ("wkv7", 1, 1088, 32),
    ("wkv7", 1, 1088, 12),
    ("wkv6", 8, 4096, 32),
    ("wkv7", 64, 1, 64),
)


def limit_autotuning(count: int) -> None:
    """Let Triton's tuner try only `count` configurations of a kernel: those nearest to 4 warps and 2 stages.

    The results of the kernels stay the same; a peer may be somewhat slower than after its own tuning.
    """
    from triton.runtime.autotuner import Autotuner

    original = Autotuner.__init__

    def limited(self: Any, fn: Any, arg_names: Any, configs: Any, *args: Any, **kwargs: Any) -> None:
        nearest = sorted(configs or [], key=lambda c: (abs(c.num_warps - 4), abs(c.num_stages - 2)))
        original(self, fn, arg_names, nearest[:count], *args, **kwargs)

    Autotuner.__init__ = limited  # type: ignore[method-assign]


def wkv() -> None:
    """Time this package's recurrences beside flash-linear-attention's, compared with float64 first."""
    import benchmark_wkv as benchmark
    from benchmarking import copy_bandwidth, matmul_rate

    from visualrwkv_hf import kernel_backend

    limit_autotuning(FLA_CONFIGS)
    size, matrix = (2**20, 64) if DRY_RUN else (2**30, 0)
    rates = copy_bandwidth(DEVICE, size), matmul_rate(DEVICE, torch.bfloat16, matrix)
    wrong = []
    for op, B, T, H in [("wkv7", 1, 20, 1), ("wkv6", 1, 1, 1)] if DRY_RUN else WKV_CASES:
        case = benchmark.Case(op, B, T, H)
        found = {} if DRY_RUN else benchmark.flash_linear_attention(op)
        names = ("fla recurrent",) if T == 1 else (benchmark.FLA_LAYER, "fla chunk")
        peer = next(({name: found[name]} for name in names if name in found), {})
        try:
            with kernel_backend("triton"):  # refuses where the kernels cannot be used
                rows = benchmark.measure(case, DEVICE, torch.bfloat16, 0.01 if DRY_RUN else 0.5, rates, peer)
        except Exception as error:
            wrong.append(case.shape)
            emit(op=op, shape=case.shape, failed=first_line(error))
            continue
        for row in rows:
            emit(**benchmark.readable_row(row))
    if wrong:
        raise SystemExit(f"No times for {', '.join(wrong)}.")


# --- profile ------------------------------------------------------------------------------------------

METRICS = {
    "gpu__time_duration.sum": "time",
    "smsp__inst_executed.sum": "instructions",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "issue slots used, %",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "scheduler issues, %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy, %",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "matrix units, %",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "launch__registers_per_thread": "registers",
}
STALL = re.compile(r"smsp__average_warps?_issue_stalled_(\w+?)_per_issue_active\.ratio")
PROFILED = (
    "regex:wkv7_(fwd_prepare|fwd_scan|bwd_values|bwd_keys)_kernel|wkv6_(fwd_prepare|bwd_gradients)_kernel"
)


def profile() -> None:
    """Count what ncu can count in one launch of each main kernel; the clocks are left alone."""
    options = [
        "--clock-control",
        "none",
        "--csv",
        "--page",
        "raw",
        "--kernel-name",
        PROFILED,
        "--launch-count",
        "6",
    ]
    options += ["--section", "WarpStateStats", "--metrics", ",".join(METRICS)]
    for op in ("wkv7-large", "wkv6-large"):
        said, code = _under("ncu", options, op)
        kernels = list(counted(said))
        for kernel in kernels:
            emit(**kernel)
        if code or not kernels:
            emit(ncu=op, exit_status=code, said=said[-300:])


def counted(text: str) -> Iterable[dict[str, Any]]:
    """Yield the row of each kernel in ncu's raw CSV page: the metrics by our names, and the longest three stalls."""
    lines = text.splitlines()
    start = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return
    table = list(csv.reader(lines[start:]))
    header, units = table[0], table[1]
    for cells in table[2:]:
        if len(cells) != len(header):
            continue
        row = {"kernel": cells[header.index("Kernel Name")]}
        for metric, name in METRICS.items():
            if metric in header:
                column = header.index(metric)
                row[name] = f"{cells[column]} {units[column]}".strip()
        stalls = {m[1]: _number(x) for x, name in zip(cells, header) if (m := STALL.fullmatch(name))}
        longest = sorted(stalls, key=lambda name: -stalls[name])[:3]
        row["longest stalls, cycles per issue"] = ", ".join(f"{name} {stalls[name]:.2f}" for name in longest)
        yield row


def _number(text: str) -> float:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return 0.0


# --- launches -----------------------------------------------------------------------------------------


def launches() -> None:
    """Time wkv7 with other warps and block sizes of one kernel at a time; each gives the same result."""
    import benchmark_wkv as benchmark
    from benchmarking import interleaved

    from visualrwkv_hf import kernel_backend

    gpu_launches = from_tests("gpu_launches")
    launched_with, variants = gpu_launches.launched_with, gpu_launches.variants
    case = benchmark.Case("wkv7", *((1, 20, 1) if DRY_RUN else (8, 4096, 64)))
    inputs = benchmark.random_inputs(case, DEVICE, torch.bfloat16)
    gradient = torch.ones_like(inputs["v"])
    with kernel_backend("triton"):
        expected = benchmark.results(benchmark.ours("wkv7"), inputs, gradient)
        ways: list[tuple[str, int, int] | None] = [None, *(variants()[:1] if DRY_RUN else variants())]
        for way in ways:
            named = "as it is" if way is None else f"{way[0]}: block {way[1]}, {way[2]} warps"
            try:
                row = _timed(benchmark, interleaved, launched_with, way, inputs, gradient, expected)
            except Exception as error:  # a variant that wants too much shared memory, say
                emit(launch=named, failed=first_line(error))
                continue
            emit(launch=named, **row)


def _timed(
    benchmark: Any,
    interleaved: Callable,
    launched_with: Callable,
    way: tuple[str, int, int] | None,
    inputs: Mapping[str, torch.Tensor],
    gradient: torch.Tensor,
    expected: Mapping[str, torch.Tensor],
) -> dict[str, Any]:
    from contextlib import nullcontext

    with nullcontext() if way is None else launched_with(*way):
        op, found = benchmark.ours("wkv7"), benchmark.results(benchmark.ours("wkv7"), inputs, gradient)
        error = max(float((found[k] - expected[k]).norm() / expected[k].norm()) for k in expected)
        if not error <= benchmark.TOLERANCE[torch.bfloat16]:
            raise ArithmeticError(f"error {error:.1e}")
        modes = (benchmark.FORWARD, benchmark.BACKWARD)
        functions = {mode: benchmark.prepared(mode, op, inputs) for mode in modes}
        times = interleaved(functions, DEVICE, seconds=0.01 if DRY_RUN else 0.15)
    return {f"{mode}, ms": 1e3 * times[mode].median for mode in modes} | {"error": error}


# --- decode -------------------------------------------------------------------------------------------


def decode() -> None:
    """Time `model.generate()` as it stands, with a 7B model that is made on the GPU in bfloat16."""
    from engines import random_model, weight_bytes

    start = time.perf_counter()
    model = random_model("tiny" if DRY_RUN else "7B", DEVICE, torch.bfloat16)
    emit(what="weights that a token reads, GB", found=weight_bytes(model) / 1e9)
    emit(what="seconds to make the model", found=time.perf_counter() - start)
    few, many = (2, 4) if DRY_RUN else (16, 80)
    for B in (1, 2) if DRY_RUN else (1, 8, 64):
        prompt = torch.randint(1, model.config.vocab_size, (B, 16), device=DEVICE)
        answers = {}
        for way, options in {
            "as it stands": {},
            "dynamic state, no graph": {"cache_implementation": "dynamic"},
        }.items():
            try:
                answers[way] = _generated(model, prompt, many, options)  # captures and warms up
                seconds = [min(_seconds(model, prompt, n, options) for _ in range(3)) for n in (few, many)]
            except Exception as error:
                emit(B=B, generate=way, failed=first_line(error))
                continue
            each = (seconds[1] - seconds[0]) / (many - few)
            same = all(torch.equal(answer, answers[way]) for answer in answers.values())
            emit(B=B, generate=way, ms_per_token=1e3 * each, tokens_per_second=B / each, same_tokens=same)
        emit(B=B, kernels_per_token=_kernels_per_token(model, prompt))


def _generated(model: Any, prompt: torch.Tensor, count: int, options: Mapping[str, Any]) -> torch.Tensor:
    return model.generate(
        prompt, do_sample=False, min_new_tokens=count, max_new_tokens=count, pad_token_id=0, **options
    )


def _seconds(model: Any, prompt: torch.Tensor, count: int, options: Mapping[str, Any]) -> float:
    if not DRY_RUN:
        torch.cuda.synchronize()
    start = time.perf_counter()
    _generated(model, prompt, count, options)
    if not DRY_RUN:
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def _kernels_per_token(model: Any, prompt: torch.Tensor) -> int | None:
    """Return how many kernels a step of one token launches, without a graph; None on a CPU."""
    if DRY_RUN:
        return None
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    state = model(prompt, use_cache=True).past_key_values
    model(prompt[:, :1], past_key_values=state)
    with profiled(activities=[ProfilerActivity.CUDA]) as profiler:
        model(prompt[:, :1], past_key_values=state)
        torch.cuda.synchronize()
    return sum(1 for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA)


WORK: dict[str, Callable[[], None]] = {
    "machine": machine,
    "compile": compile_kernels,
    "tests": tests,
    "sanitizer": sanitizer,
    "wkv": wkv,
    "profile": profile,
    "launches": launches,
    "decode": decode,
    "call": call,
}


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":  # whose bfloat16 needs mending
        from_tests("triton_interpreter").install()
    WORK[sys.argv[1]]()


if __name__ == "__main__":
    main()
