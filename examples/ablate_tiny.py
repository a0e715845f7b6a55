"""Compare scans, prompts and generations on reading, comparing and charts, where order and question-first can matter.

    python examples/ablate_tiny.py --minutes 110                     # as many runs as begin within the time
    python examples/ablate_tiny.py --table-only --markdown docs/benchmarks/ablation.md

A small language model of each variant is trained with each of five seeds and asked about pictures, fonts and words of
the test. As in the paper, all see through the same vision tower, which is trained already and frozen: that of the model
in the package. Each run's scores are written when it ends, and a run that has scores is not repeated, so that the whole
can be done in pieces, and by several processes at once: one for each core is best. A process draws a seed's pictures
once for all its variants, and lets the tower see each once. All 35 runs take some two hours of two cores. Needs what
`train_tiny.py` needs, and profits from the same allocator.
"""

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import torch
import typer
from benchmarking import markdown_table
from evaluate_tiny import accuracy, questions_alone, sample_of
from filelock import FileLock, Timeout
from tiny_charts import charts_task
from tiny_data import Task, all_wording
from tiny_packages import fonts, sha256_of, words
from tiny_scenes import comparing_task
from tiny_signs import LONGEST_WORD, reading_task
from tiny_stages import ALL_BUT_TOWER, BATCH, Stage
from torch import Tensor, nn
from torch.utils.data import Dataset
from train_tiny import TOWER, cut_vocabulary, fresh_model, lessons, refuse_other_settings, train_stage
from transformers import AutoModelForImageTextToText, set_seed
from transformers.modeling_outputs import BaseModelOutput

from visualrwkv_hf import bundled_model, kernel_backend
from visualrwkv_hf.cpu import build_native_ops

PAGE = Path(__file__).with_name("tiny_ablation.md")
VARIANTS: dict[str, dict[str, Any]] = {
    "RWKV-7, sandwich, bidirectional": {},
    "scan: unidirectional": {"scan": "unidirectional"},
    "scan: multidirectional": {"scan": "multidirectional"},
    "prompt: picture first": {"image_position": "first"},
    "prompt: picture last": {"image_position": "last"},
    "generation: RWKV-6": {"rwkv_version": 6},
    "generation: RWKV-5": {"rwkv_version": 5},
}
"""The changes to the first row, one at a time."""

LANGUAGE_MODEL = dict(hidden_size=96, num_hidden_layers=4, head_dim=32, mix_low_rank_dim=16) | {
    f"{name}_low_rank_dim": 16 for name in ("decay", "a", "v", "gate")
}
"""Four layers: each direction of the multidirectional scan is read by one."""

STEPS = 500
SHARES = {"reading": 0.4, "comparing": 0.3, "charts": 0.3}


def ablation_tasks(data_dir: Path) -> dict[str, Task]:
    """Return reading, comparing and charts."""
    files = fonts(data_dir)
    reading = reading_task(files, words(data_dir, LONGEST_WORD))
    return {"reading": reading, "comparing": comparing_task(), "charts": charts_task(files)}


class Kept(Dataset):
    """Makes each row of a data set once."""

    def __init__(self, rows: Dataset):
        self.rows, self.known = rows, {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        if index not in self.known:
            self.known[index] = self.rows[index]
        return self.known[index]


class Sight(nn.Module):
    """Takes the place of a frozen vision tower, and lets it see each picture once."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower, self.known = tower, {}

    def forward(self, pixel_values: Tensor, **options: Any) -> BaseModelOutput:
        names = [hash(picture.numpy().tobytes()) for picture in pixel_values]
        if new := [i for i, name in enumerate(names) if name not in self.known]:
            features = self.tower(pixel_values[new], **options).last_hidden_state
            self.known |= zip([names[i] for i in new], features)
        return BaseModelOutput(last_hidden_state=torch.stack([self.known[name] for name in names]))


class Shared(NamedTuple):
    """Holds what all variants of a seed have in common: their samples, and what the tower sees in them."""

    data: Kept
    sight: Sight

    @classmethod
    def of(cls, tasks: dict[str, Task], seed: int, steps: int) -> "Shared":
        bundled = AutoModelForImageTextToText.from_pretrained(bundled_model(), dtype="float32")
        tower = bundled.model.vision_tower.eval().requires_grad_(False)
        return cls(Kept(lessons(tasks, stage_of(steps), range(steps * BATCH), seed)), Sight(tower))


def stage_of(steps: int) -> Stage:
    return Stage(steps, 1.5e-3, 2e-5, ALL_BUT_TOWER, 6, 2, SHARES)


def run(
    tasks: dict[str, Task], shared: Shared, changed: dict[str, Any], seed: int, steps: int, questions: int
) -> dict[str, float]:
    """Train one variant on what the bundled model's vision tower sees; return its accuracy in each task."""
    set_seed(seed)
    fields = {"scan": "bidirectional", "image_position": "middle", "rwkv_version": 7, **changed}
    language_model = LANGUAGE_MODEL | {"rwkv_version": fields.pop("rwkv_version")}
    vocabulary = cut_vocabulary(all_wording(tasks.values()))
    model, processor = fresh_model(vocabulary, TOWER, language_model, **fields)
    model.model.vision_tower = shared.sight
    with TemporaryDirectory() as folder:
        options = dict(disable_tqdm=True, logging_steps=steps, save_strategy="no")
        train_stage(model, processor, stage_of(steps), shared.data, seed, Path(folder), **options)
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


def scores_of(folder: Path, number: int) -> dict[str, dict[str, float]]:
    """Return the scores of a variant, by number, for each seed that has run."""
    files = sorted(folder.glob(f"{number}-*.json"))
    return {file.stem.split("-")[1]: json.loads(file.read_text(encoding="utf-8")) for file in files}


def table(folder: Path, tasks: dict[str, Task]) -> str:
    """Return mean and standard deviation over the seeds that have run, in percent, in Markdown."""
    rows = []
    for number, variant in enumerate(VARIANTS):
        scores = scores_of(folder, number).values()
        cells = {name: mean_and_spread([score[name] for score in scores]) for name in tasks}
        rows.append({"model": variant, "seeds": len(scores)} | cells)
    alone = {name: f"{100 * questions_alone(task.test)[0]:.1f}" for name, task in tasks.items()}
    return markdown_table([*rows, {"model": "best guess per question", "seeds": ""} | alone])


def differences(folder: Path, tasks: dict[str, Task]) -> str:
    """Return by how much each variant is better than the first, in points, in Markdown.

    Runs of one seed have the same samples in the same order, so they are compared in pairs: mean and standard error.
    """
    first, rows = scores_of(folder, 0), []
    for number, variant in enumerate(list(VARIANTS)[1:], start=1):
        scores = scores_of(folder, number)
        seeds = first.keys() & scores.keys()
        cells = {
            name: mean_and_error([scores[seed][name] - first[seed][name] for seed in sorted(seeds)])
            for name in tasks
        }
        rows.append({"model": variant, "pairs": len(seeds)} | cells)
    return markdown_table(rows)


def mean_and_error(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "".join(f"{100 * value:+.1f}" for value in values)
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{100 * statistics.fmean(values):+.1f} ± {100 * error:.1f}"


def mean_and_spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "".join(f"{100 * value:.1f}" for value in values)
    return f"{100 * statistics.fmean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def main(
    data_dir: Annotated[Path, typer.Option(help="Folder for fonts and words.")] = Path("tiny-data"),
    results: Annotated[Path, typer.Option(help="Folder for the scores of the runs.")] = Path("tiny-ablation"),
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds per variant.")] = 5,
    questions: Annotated[int, typer.Option(min=1, help="Questions of each task at most.")] = 1000,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a run.")] = STEPS,
    minutes: Annotated[float, typer.Option(help="Start no new run after so many minutes.")] = 110,
    table_only: Annotated[bool, typer.Option(help="Print the table of what has run.")] = False,
    markdown: Annotated[Path | None, typer.Option(help="Write the page with the table to this file.")] = None,
) -> None:
    begin = time.monotonic()
    digest = sha256_of([(Path(bundled_model()) / "model.safetensors").read_bytes()])
    refuse_other_settings(results, {"model": digest, "steps": steps, "questions": questions}, "--results")
    tasks = ablation_tasks(data_dir)
    if not table_only:
        build_native_ops()
        with kernel_backend("native"):
            shared = {}
            for name, seed, result in unfinished(results, seeds):
                if seed not in shared:
                    shared = {seed: Shared.of(tasks, seed, steps)}
                scores = run(tasks, shared[seed], VARIANTS[name], seed, steps, questions)
                result.write_text(json.dumps(scores), encoding="utf-8")
                print(name, seed, scores, flush=True)
                if time.monotonic() - begin > 60 * minutes:
                    break
    found, apart = table(results, tasks), differences(results, tasks)
    print(found, apart, sep="\n\n")
    if markdown:
        page = PAGE.read_text(encoding="utf-8")
        samples = f"{steps * BATCH:,}"
        markdown.write_text(
            page.format(table=found, differences=apart, steps=steps, samples=samples, questions=questions),
            encoding="utf-8",
        )


if __name__ == "__main__":
    typer.run(main)
