"""Measure a whole answer on a laptop: load, tower, prompt, first word, each token, memory, as one table of one run.

    pip install llama-cpp-python gguf        # the peer, which is left out if it is not installed
    python examples/benchmark_laptop.py models                           # makes full-size models in the folder `models`
    python examples/benchmark_laptop.py models --model v6-1.6b --rounds 1
    python examples/benchmark_laptop.py models --quick                   # small shapes, to see that it runs

Nothing is downloaded: the models have the shapes of releases and random weights. int8 and int4 are folders that
`visualrwkv quantize` would write, loaded as `ask` loads them. Every row is measured in a process of its own, so its
peak memory is its own, and the rows take turns for `--rounds` rounds, so that what disturbs the machine disturbs all
of them. Each row is printed as soon as it is measured; one that fails is left out, with the reason. Ratios are medians
over the rounds. Before any time is printed, a small model of each generation is compared with llama.cpp: if the logits
differ the exit status is 1.
"""

import importlib.util
import json as json_module
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from benchmarking import markdown_table, readable_bytes, report
from laptop_models import MODELS, QUICK_MODELS, Model, config_of, model_folder
from laptop_peers import disagreement, gguf_file

from visualrwkv_hf.cpu import build_native_ops

PRECISIONS = ("float32", "bfloat16", "int8", "int4")
OURS, PLAIN, LLAMA, ENCODERS = (
    "visualrwkv-hf",
    "visualrwkv-hf --no-accelerate",
    "llama.cpp, text only",
    "transformers' encoders",
)
MEASURES = Path(__file__).with_name("laptop_measures.py")
USUAL_PROMPT = 597
"""Tokens that llama.cpp reads where ours was not measured: one picture and a question with v6-1.6b."""
TOLERANCE = 1e-4
"""Limit on the relative difference from llama.cpp's logits in float32."""
SIMD = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512", "amx", "asimd", "sve", "bf16", "i8mm")
"""Beginnings of the CPU flags that matter here."""


class Case(NamedTuple):
    """A row of the table: an engine with a model's weights in a precision."""

    model: str
    precision: str
    engine: str


class Target(NamedTuple):
    """A target: whether `value` must be at most or at least `limit`."""

    text: str
    value: float
    limit: float
    is_at_most: bool

    @property
    def is_reached(self) -> bool:
        return self.value <= self.limit if self.is_at_most else self.value >= self.limit


def main(
    folder: Annotated[Path, typer.Argument(help="Where the models are made, once: up to 40 GB with the 7B.")],
    model: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(MODELS)}. Default: all.")] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(PRECISIONS)}. Default: all but float32.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each row is measured.")] = 3,
    new_tokens: Annotated[int, typer.Option(min=3, help="Length of the answers.")] = 20,
    plain: Annotated[bool, typer.Option(help="Also measure bfloat16 without native ops.")] = True,
    peers: Annotated[
        bool, typer.Option(help="Also measure llama.cpp and transformers' own encoders.")
    ] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU. Default: as torch chooses.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small shapes: the times mean nothing.")] = False,
    json: Annotated[Path | None, typer.Option(help="Also write the numbers to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the tables to this file.")] = None,
) -> None:
    """Measure whole answers on a CPU."""
    models = QUICK_MODELS if quick else MODELS
    chosen = {name: models[name] for name in model or models}
    precisions = precision or PRECISIONS[1:]
    has_llama = peers and all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf"))
    if peers and not has_llama:
        typer.secho("Without the peer llama.cpp: it is not installed.", err=True, fg="yellow")
    if has_llama:
        refuse_disagreement({each.text["rwkv_version"] for each in chosen.values()}, folder)
    build_native_ops()  # once on a computer, so not in the first row
    threads = threads or torch.get_num_threads()
    cases = list(cases_of(chosen, precisions, plain=plain, peers=peers, has_llama=has_llama))
    taken: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
    for number in range(rounds):
        for case in [case for case in cases if case in taken]:
            begun = f"round {number + 1} of {rounds}: {', '.join(case)}"
            try:
                arguments = arguments_of(
                    case, chosen[case.model], folder, new_tokens, prompt_length(taken, case)
                )
                taken[case].append(measured(case, arguments | {"threads": threads}))
            except Exception as error:  # of which the other rows know nothing
                del taken[case]  # also its earlier rounds: ratios are of rows of the same round
                typer.secho(f"{begun} is left out. {error}", err=True, fg="red")
                continue
            typer.echo(f"{begun}: {in_a_line(row_of(case, taken[case][-1:]))}", err=True)
    text = "\n\n".join(
        [
            machine_line(threads, rounds),
            rows_table(taken),
            targets_table(list(targets_of(taken, chosen))),
        ]
    )
    data = [case._asdict() | {"rounds": numbers} for case, numbers in taken.items()]
    report(text, {"machine": machine_line(threads, rounds), "rows": data}, markdown, json)


# What is measured.


def cases_of(
    chosen: Mapping[str, Model], precisions: Sequence[str], *, plain: bool, peers: bool, has_llama: bool
) -> Iterator[Case]:
    """Yield the rows. What is compared stands side by side."""
    for name, model in chosen.items():
        for precision in precisions:
            if model.is_large and precision != "int4":
                continue  # a laptop has no room for it
            yield Case(name, precision, OURS)
            if plain and precision == "bfloat16":
                yield Case(name, precision, PLAIN)
            if has_llama:
                yield Case(name, precision, LLAMA)
            if peers and precision in ("float32", "bfloat16"):
                yield Case(name, precision, ENCODERS)


def arguments_of(
    case: Case, model: Model, folder: Path, new_tokens: int, prompt_tokens: int
) -> dict[str, Any]:
    """Return the arguments of a measure of laptop_measures.py, and make the files that it needs."""
    if case.engine == ENCODERS:
        configs = {field: dict(value) for field, value in model.vision.items() if field.endswith("_config")}
        return {"configs": configs, "dtype": case.precision}
    if case.engine == LLAMA:
        path = gguf_file(model, folder / f"{case.model}-{case.precision}.gguf", case.precision)
        vocab_size = config_of(model).text_config.vocab_size
        return dict(path=str(path), vocab_size=vocab_size, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    weights = case.precision if case.precision.startswith("int") else None
    return dict(
        folder=str(model_folder(case.model, model, folder, weights)),
        dtype="bfloat16" if weights else case.precision,
        accelerate=case.engine == OURS,
        new_tokens=new_tokens,
    )


def prompt_length(taken: Mapping[Case, Sequence[Mapping[str, Any]]], case: Case) -> int:
    """Return how many tokens our model of this case has read for the picture and the question."""
    ours = taken.get(case._replace(engine=OURS))
    return ours[-1]["prompt_tokens"] if ours else USUAL_PROMPT


def measured(case: Case, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Measure a row in a process of its own.

    Raises:
        RuntimeError: the process failed; its last words are in the message.
    """
    name = {OURS: "ours", PLAIN: "ours", LLAMA: "llama.cpp", ENCODERS: "transformers encoders"}[case.engine]
    command = [sys.executable, str(MEASURES), name, json_module.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{', '.join(case)} failed:\n{done.stderr[-2000:]}")
    return json_module.loads(done.stdout)


def refuse_disagreement(generations: set[int], folder: Path) -> None:
    """End the program if llama.cpp computes something else than this package with the same weights."""
    for generation in sorted(generations):
        error = disagreement(generation, folder)
        if not error <= TOLERANCE:
            typer.secho(f"Wrong, so no times: RWKV-{generation} differs by {error:.1e}.", err=True, fg="red")
            raise typer.Exit(1)


# What is said about it.


def machine_line(threads: int, rounds: int) -> str:
    """Return what the numbers depend on: the processor with its flags, threads, versions."""
    name, flags = platform.processor() or platform.machine(), ""
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        fields = dict(
            (part.strip() for part in line.split(":", 1))
            for line in cpuinfo.read_text().splitlines()
            if ":" in line
        )
        name = fields.get("model name", name)
        flags = fields.get("flags", fields.get("Features", ""))
    known = " ".join(flag for flag in flags.split() if flag.startswith(SIMD))
    return (
        f"{name}, {threads} threads, torch {torch.__version__}, random weights, median of {rounds}. "
        f"Flags: {known or 'unknown'}."
    )


def rows_table(taken: Mapping[Case, Sequence[Mapping[str, Any]]]) -> str:
    """Return the medians of all rows as a table."""
    return markdown_table([row_of(case, numbers) for case, numbers in taken.items() if numbers])


def row_of(case: Case, numbers: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
    """Return the medians of a row's rounds, in words."""
    middle = {key: statistics.median(each[key] for each in numbers) for key in numbers[0]}
    return {
        "model": case.model,
        "weights": case.precision,
        "engine": case.engine,
        "load": in_seconds(middle.get("load")),
        "tower": in_seconds(middle.get("tower")),
        "prompt": in_seconds(middle.get("prefill")),
        "first word": in_seconds(middle.get("first")),
        "per token": f"{1e3 * middle['token']:.1f} ms" if "token" in middle else None,
        "peak memory": readable_bytes(middle["peak"]),
        "imports": in_seconds(middle.get("imports")),
        "processor": in_seconds(middle["processor"]),
    }


def in_a_line(row: Mapping[str, str | None]) -> str:
    """Return what was measured of a row, without its names."""
    return ", ".join(f"{name} {value}" for name, value in list(row.items())[3:] if value)


def in_seconds(value: float | None) -> str | None:
    """Return seconds as text."""
    return None if value is None else f"{value:.2f} s"


def ratio(
    taken: Mapping[Case, Sequence[Mapping[str, Any]]], over: Case, under: Case, key: str
) -> float | None:
    """Return the median over the rounds of one row's number divided by another's; None if one is not measured."""
    if not taken.get(over) or not taken.get(under):
        return None
    return statistics.median(a[key] / b[key] for a, b in zip(taken[over], taken[under]))


def targets_of(
    taken: Mapping[Case, Sequence[Mapping[str, Any]]], chosen: Mapping[str, Model]
) -> Iterator[Target]:
    """Yield what is to be reached, as far as it was measured."""
    for case, numbers in taken.items():
        if case.engine != OURS or not numbers:
            continue
        name, precision, _ = case
        for key, words, limit in (("prefill", "prompt", 1.2), ("token", "token", 1.1)):
            times = ratio(taken, case._replace(engine=LLAMA), case, key)
            if times is not None:
                yield Target(f"{name} {precision}: a {words}, times llama.cpp's speed", times, limit, False)
        if (part := ratio(taken, case, case._replace(engine=PLAIN), "processor")) is not None:
            yield Target(f"{name} {precision}: processor time, parts of --no-accelerate", part, 0.25, True)
        if precision == "int8":
            part = ratio(taken, case, case._replace(precision="bfloat16"), "first")
            if part is not None:
                yield Target(f"{name} int8: first word, parts of bfloat16's", part, 0.5, True)
        yield from towers_targets(taken, case)
        peak = statistics.median(each["peak"] for each in numbers)
        held = statistics.median(each["weight_bytes"] for each in numbers)
        limit = 6e9 if chosen[name].is_large else 1.1 * held + 1e9
        yield Target(f"{name} {precision}: peak memory in GB", peak / 1e9, limit / 1e9, True)


def towers_targets(taken: Mapping[Case, Sequence[Mapping[str, Any]]], case: Case) -> Iterator[Target]:
    """Yield the speed of the tower and of each encoder beside transformers' own in the same dtype."""
    theirs = case._replace(engine=ENCODERS)
    for key in taken[theirs][-1] if taken.get(theirs) else ():
        if key.startswith("tower") and (times := ratio(taken, theirs, case, key)) is not None:
            words = f"{case.model} {case.precision}: {key}, times transformers' speed"
            yield Target(words, times, 1.5, False)


def targets_table(targets: Sequence[Target]) -> str:
    """Return which targets are reached, as a table."""
    return markdown_table(
        [
            {
                "target": each.text,
                "measured": f"{each.value:.2f}",
                "wanted": f"{'at most' if each.is_at_most else 'at least'} {each.limit:.2f}",
                "": "reached" if each.is_reached else "missed",
            }
            for each in targets
        ]
    )


if __name__ == "__main__":
    typer.run(main)
