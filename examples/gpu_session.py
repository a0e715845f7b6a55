"""Everything that only a GPU can tell, by one command in nine minutes, on a machine without a network.

    python examples/gpu_session.py --pack                # here: build what is carried, .gpu/, below 60 MiB
    python examples/gpu_session.py --out results         # there: run all stages
    python examples/gpu_session.py --dry-run             # anywhere: the same stages, tiny, in Triton's interpreter

The machine needs Python 3.12 with torch, Triton, transformers and pytest; the rest is in .gpu/. Each stage is a process
of its own with a time limit, and its rows are written as they come, so a stage that fails costs only itself. See
docs/gpu.md.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from benchmarking import markdown_table

ROOT = Path(__file__).resolve().parents[1]
CARRIED = ROOT / ".gpu"
"""What `--pack` makes: wheels/*.whl and cache.tar.xz."""
SECONDS = 540
"""For all stages together."""
MARK = "row: "
"""Begins a line of a stage's output that is a row; see `gpu_stages.emit`."""


class Stage(NamedTuple):
    """A function of gpu_stages.py, what it shows, and the seconds that it may take."""

    name: str
    title: str
    seconds: int


STAGES = (
    Stage("machine", "Versions, and what the machine can do at best", 25),
    Stage("compile", "Kernels that the carried cache does not have", 75),
    Stage("tests", "The tests that need a GPU", 90),
    Stage("sanitizer", "compute-sanitizer on one small call each", 45),
    Stage("wkv", "The recurrences beside flash-linear-attention", 130),
    Stage("profile", "What ncu counts in the main kernels", 55),
    Stage("launches", "Warps and block sizes", 60),
    Stage("decode", "7B in bfloat16: generate()", 120),
)
"""Their limits add up to more than `SECONDS`: most stages end before theirs, and the last ones get what is left."""


class Record:
    """Keeps what was found so far in `results.json`, `summary.md` and `log.txt`, and writes them with each row.

    Stages of an earlier run in the same folder stay until they run again.

    Raises:
        ValueError: the folder holds results of a dry run and this is a real one, or the other way round.
    """

    def __init__(self, folder: Path, dry_run: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, earlier = folder, folder / "results.json"
        self.stages: dict[str, dict[str, Any]] = (
            json.loads(earlier.read_text("utf-8")) if earlier.exists() else {}
        )
        self.dry_run = dry_run
        if any(stage.get("dry_run", False) != dry_run for stage in self.stages.values()):
            kind = "a real run" if dry_run else "a dry run"
            raise ValueError(f"{folder} holds the results of {kind}: name another folder with --out.")
        self.log = (folder / "log.txt").open("a", encoding="utf-8")

    def begin(self, stage: Stage) -> None:
        self.stages[stage.name] = {"title": stage.title, "rows": [], "ended": "running", "seconds": None}
        if self.dry_run:
            self.stages[stage.name]["dry_run"] = True
        self.say(f"\n=== {stage.name}: {stage.title}")
        self.write()

    def add(self, stage: Stage, row: Mapping[str, Any]) -> None:
        self.stages[stage.name]["rows"].append(row)
        self.write()

    def end(self, stage: Stage, how: str, seconds: float) -> None:
        self.stages[stage.name] |= {"ended": how, "seconds": round(seconds, 1)}
        self.say(f"=== {stage.name}: {how} after {seconds:.1f} s")
        self.write()

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.log.write(line + "\n")
        self.log.flush()

    def write(self) -> None:
        _replace(self.folder / "results.json", json.dumps(self.stages, indent=1) + "\n")
        _replace(self.folder / "summary.md", summary(self.stages))


def _replace(path: Path, text: str) -> None:
    """Write a file in one step, so that whoever reads it, or ends this program, finds a whole one."""
    part = path.with_name(f".{path.name}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def summary(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the rows of all stages as Markdown tables, one for each set of columns."""
    parts = ["# What the GPU said\n"]
    for name, stage in stages.items():
        took = "" if stage["seconds"] is None else f" after {stage['seconds']} s"
        parts.append(f"## {name}: {stage['title']}\n\n{stage['ended']}{took}\n")
        tables: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
        for row in stage["rows"]:
            tables.setdefault(tuple(row), []).append(row)
        parts += [markdown_table([_readable(row) for row in rows]) + "\n" for rows in tables.values()]
    return "\n".join(parts)


def _readable(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")
        for key, value in row.items()
    }


def lines_of(process: subprocess.Popen, deadline: float) -> Iterator[str]:
    """Yield the lines that a process prints until it ends, or until `deadline` by the monotonic clock.

    Raises:
        TimeoutError: the deadline came first.
    """
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line.rstrip("\n"))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=max(deadline - time.monotonic(), 0.001))
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            return
        yield line


def run_stage(
    stage: Stage, record: Record, command: list[str], environment: Mapping[str, str], limit: float
) -> None:
    """Run a stage in a process of its own, keep each row as it comes, and end the process at its limit."""
    record.begin(stage)
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that its own processes end with it
    )
    try:
        for line in lines_of(process, start + limit):
            if line.startswith(MARK):
                with contextlib.suppress(ValueError):  # another line came into it; it is in the log
                    record.add(stage, json.loads(line.removeprefix(MARK)))
            record.say(line)
        code = process.wait(10)
        how = "done" if code == 0 else f"failed with exit status {code} (see log.txt)"
    except (TimeoutError, subprocess.TimeoutExpired):
        how = f"stopped at its limit of {limit:.0f} s"
    finally:
        end_group(process)
    record.end(stage, how, time.monotonic() - start)


def end_group(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def prepared(scratch: Path, dry_run: bool) -> dict[str, str]:
    """Unpack what was carried into `scratch`; return the environment of the stages."""
    environment = dict(os.environ, PYTHONUNBUFFERED="1", PYTHONDONTWRITEBYTECODE="1")
    environment["TRITON_INTERPRET"] = "1" if dry_run else "0"
    environment["TRITON_CACHE_DIR"] = str(scratch / "cache")
    environment["FLA_CACHE_RESULTS"] = "1"
    if dry_run:
        return environment
    wheels = [str(wheel) for wheel in sorted((CARRIED / "wheels").glob("*.whl"))]
    if wheels:
        target = str(scratch / "site")
        install = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--no-compile",
        ]
        subprocess.run([*install, "--target", target, *wheels], check=True)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (target, os.environ.get("PYTHONPATH"))))
    if (CARRIED / "cache.tar.xz").exists():
        with tarfile.open(CARRIED / "cache.tar.xz") as archive:
            archive.extractall(scratch / "cache", filter="data")
    return environment


def run_all(
    out: Path, dry_run: bool, chosen: list[str], seconds: float, stages: tuple[Stage, ...] = STAGES
) -> Record:
    """Run the stages in order, none of them beyond what is left of `seconds`."""
    start = time.monotonic()
    record = Record(out, dry_run)
    with tempfile.TemporaryDirectory() as scratch:
        environment = prepared(Path(scratch), dry_run)
        for stage in stages:
            if chosen and stage.name not in chosen:
                continue
            limit = min(600 if dry_run else stage.seconds, seconds - (time.monotonic() - start))
            if limit < 5:
                record.begin(stage)
                record.end(stage, "left out, for no time was left", 0)
                continue
            command = [sys.executable, str(Path(__file__).with_name("gpu_stages.py")), stage.name]
            variables = environment | ({"TRITON_INTERPRET": "0"} if stage.name == "compile" else {})
            run_stage(stage, record, [*command, *(["--dry-run"] if dry_run else [])], variables, limit)
    return record


def main(
    out: Annotated[Path, typer.Option(help="Folder for results.json, summary.md and log.txt.")] = Path(
        "gpu-results"
    ),
    stage: Annotated[
        list[str] | None, typer.Option(help=f"Only these: {', '.join(s.name for s in STAGES)}.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="For all stages together.")] = SECONDS,
    dry_run: Annotated[
        bool, typer.Option(help="Tiny, in Triton's interpreter: shows that all of it runs.")
    ] = False,
    pack: Annotated[bool, typer.Option(help="Build .gpu/, what is carried to the machine, and end.")] = False,
    python: Annotated[
        str,
        typer.Option(
            help="With --pack: a Python of the machine's version, for whose Triton kernels are compiled."
        ),
    ] = "python3.12",
) -> None:
    """Measure what only a GPU can tell, stage by stage."""
    names = [each.name for each in STAGES]
    if unknown := set(stage or []) - set(names):
        raise typer.BadParameter(
            f"There is no stage {', '.join(sorted(unknown))}: choose from {', '.join(names)}."
        )
    if pack:
        from gpu_pack import build  # what it needs is not on the machine

        build(CARRIED, python)
        return
    try:
        record = run_all(out, dry_run, stage or [], 3600 if dry_run else seconds)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    print(f"\n{(out / 'summary.md').read_text('utf-8')}")
    if any(record.stages[name]["ended"] != "done" for name in stage or names):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
