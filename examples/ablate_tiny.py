"""Compare scans, prompts and generations on reading, comparing and charts, where order and question-first can matter.

    python examples/ablate_tiny.py --minutes 110                     # as many runs as begin within the time
    python examples/ablate_tiny.py --table-only --markdown docs/benchmarks/ablation.md

A small model of each variant is trained from scratch with each of five seeds and asked about pictures, fonts and
words of the test. Each run's scores are written when it ends, and a run that has scores is not repeated, so that the
whole can be done in pieces, and by several processes at once: one for each core is best. All runs take some
hours of two cores. Needs what `train_tiny.py` needs.
"""

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from benchmarking import markdown_table
from evaluate_tiny import accuracy, questions_alone, sample_of
from filelock import FileLock, Timeout
from tiny_charts import charts_task
from tiny_data import Task, all_wording
from tiny_packages import SHORTEST_TEST_WORD, Fonts, fonts, words
from tiny_scenes import comparing_task
from tiny_signs import reading_task
from tiny_stages import ALL_PARTS, Stage
from train_tiny import cut_vocabulary, fresh_model, lessons, train_stage
from transformers import set_seed

from visualrwkv_hf import kernel_backend
from visualrwkv_hf.cpu import build_native_ops

PAGE = Path(__file__).with_name("tiny_ablation.md")
LONGEST = SHORTEST_TEST_WORD
"""Letters of a sign at most: longer ones take longer to learn than a run lasts, and shorter words are not held out."""

EVERY_FONT = 5
"""Every fifth of the training's fonts is used: with all of them letters take longer to learn than a run lasts."""

VARIANTS: dict[str, dict[str, Any]] = {
    "RWKV-7, sandwich, bidirectional": {},
    "scan: unidirectional": {"scan": "unidirectional"},
    "scan: multidirectional": {"scan": "multidirectional"},
    "scan: snake": {"scan": "snake"},
    "prompt: picture first": {"image_position": "first"},
    "prompt: picture last": {"image_position": "last"},
    "generation: RWKV-6": {"rwkv_version": 6},
    "generation: RWKV-5": {"rwkv_version": 5},
}
"""The changes to the first row, one at a time."""

TOWER = dict(
    embedding_size=24, hidden_sizes=[24, 48, 96], depths=[1, 1, 1], layer_type="basic", image_size=96
)
LANGUAGE_MODEL = dict(hidden_size=96, num_hidden_layers=4, head_dim=32, mix_low_rank_dim=16) | {
    f"{name}_low_rank_dim": 16 for name in ("decay", "a", "v", "gate")
}
"""Four layers: each direction of the multidirectional scan is read by one."""

BATCH = 16
"""Smaller than in `train_tiny`: so short a training gains more from steps than from samples in a step."""

STEPS = (300, 350, 550)


def few_fonts(data_dir: Path) -> Fonts:
    files = fonts(data_dir)
    return files._replace(train=files.train[::EVERY_FONT])


def ablation_tasks(data_dir: Path) -> dict[str, Task]:
    """Return reading of short words, comparing and charts."""
    files = few_fonts(data_dir)
    return {
        "reading": reading_task(files, words(data_dir, LONGEST), LONGEST, 1),
        "comparing": comparing_task(),
        "charts": charts_task(files),
    }


def stages(steps: Sequence[int]) -> list[tuple[Stage, int]]:
    """Return the stages of a run, each with the letters of a sign at most: as in `train_tiny`, letters come first."""
    shares = {"reading": 0.4, "comparing": 0.3, "charts": 0.3}
    first, second, third = steps
    return [
        (Stage(first, 1.5e-3, 1.4e-3, ALL_PARTS, 1, 0, {"reading": 1.0}), 1),
        (Stage(second, 1.5e-3, 1.2e-3, ALL_PARTS, 2, 0, shares), 2),
        (Stage(third, 1.2e-3, 2e-5, ALL_PARTS, 3, 1, shares), LONGEST),
    ]


def run(
    tasks: dict[str, Task],
    data_dir: Path,
    changed: dict[str, Any],
    seed: int,
    steps: Sequence[int],
    questions: int,
) -> dict[str, float]:
    """Train one variant from nothing; return its accuracy in each task."""
    set_seed(seed)
    fields = {"scan": "bidirectional", "image_position": "middle", "rwkv_version": 7, **changed}
    language_model = LANGUAGE_MODEL | {"rwkv_version": fields.pop("rwkv_version")}
    vocabulary = cut_vocabulary(all_wording(tasks.values()))
    model, processor = fresh_model(vocabulary, TOWER, language_model, **fields)
    first = 0
    for stage, longest in stages(steps):
        level = tasks | {"reading": reading_task(few_fonts(data_dir), words(data_dir, LONGEST), longest, 1)}
        rows = range(first, first + stage.steps * BATCH)
        first = rows.stop
        with TemporaryDirectory() as folder:
            data = lessons(level, stage, rows, seed)
            options = dict(disable_tqdm=True, logging_steps=stage.steps, save_strategy="no")
            train_stage(
                model,
                processor,
                stage,
                data,
                seed,
                Path(folder),
                per_device_train_batch_size=BATCH,
                **options,
            )
    return {name: accuracy(model, processor, sample_of(task.test, questions)) for name, task in tasks.items()}


def unfinished(folder: Path, seeds: int) -> Iterator[tuple[str, int, Path]]:
    """Yield the runs that have no scores and that no other process is making, each locked until the next one."""
    for seed in range(seeds):
        for number, name in enumerate(VARIANTS):
            result = folder / f"{number}-{seed}.json"
            try:
                with FileLock(result.with_suffix(".lock"), blocking=False):
                    if not result.exists():
                        yield name, seed, result
            except Timeout:
                continue


def table(folder: Path, tasks: dict[str, Task]) -> str:
    """Return mean and standard deviation over the seeds that have run, in percent, in Markdown."""
    rows = []
    for number, variant in enumerate(VARIANTS):
        files = sorted(folder.glob(f"{number}-*.json"))
        scores = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        cells = {name: mean_and_spread([score[name] for score in scores]) for name in tasks}
        rows.append({"model": variant, "seeds": len(scores)} | cells)
    alone = {name: f"{100 * questions_alone(task.test)[0]:.1f}" for name, task in tasks.items()}
    return markdown_table([*rows, {"model": "best guess per question", "seeds": ""} | alone])


def mean_and_spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "".join(f"{100 * value:.1f}" for value in values)
    return f"{100 * statistics.fmean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def main(
    data_dir: Annotated[Path, typer.Option(help="Folder for fonts and words.")] = Path("tiny-data"),
    results: Annotated[Path, typer.Option(help="Folder for the scores of the runs.")] = Path("tiny-ablation"),
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds per variant.")] = 5,
    questions: Annotated[int, typer.Option(min=1, help="Questions of each task at most.")] = 1000,
    steps: Annotated[tuple[int, int, int], typer.Option(help="Steps of a run's three stages.")] = STEPS,
    minutes: Annotated[float, typer.Option(help="Start no new run after so many minutes.")] = 110,
    table_only: Annotated[bool, typer.Option(help="Print the table of what has run.")] = False,
    markdown: Annotated[Path | None, typer.Option(help="Write the page with the table to this file.")] = None,
) -> None:
    begin = time.monotonic()
    results.mkdir(parents=True, exist_ok=True)
    tasks = ablation_tasks(data_dir)
    if not table_only:
        build_native_ops()
        with kernel_backend("native"):
            for name, seed, result in unfinished(results, seeds):
                scores = run(tasks, data_dir, VARIANTS[name], seed, steps, questions)
                result.write_text(json.dumps(scores), encoding="utf-8")
                print(name, seed, scores, flush=True)
                if time.monotonic() - begin > 60 * minutes:
                    break
    found = table(results, tasks)
    print(found)
    if markdown:
        page = PAGE.read_text(encoding="utf-8")
        samples = sum(steps) * BATCH
        markdown.write_text(
            page.format(table=found, steps=sum(steps), samples=samples, questions=questions), encoding="utf-8"
        )


if __name__ == "__main__":
    typer.run(main)
