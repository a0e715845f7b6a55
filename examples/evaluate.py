"""Answer a benchmark's question file, and write the file that the benchmark's official scorer reads.

    pip install -e ".[eval]"
    python examples/evaluate.py textvqa --model MODEL --questions llava_textvqa_val_v051_ocr.jsonl \
        --image-folder train_images --annotations TextVQA_0.5.1_val.json --output-dir out/textvqa
    accelerate launch --multi_gpu --num_processes 8 examples/evaluate.py mmbench --questions mmbench_dev.tsv ...

benchmarks_vqa.py has the table of benchmarks with their files, prompts and metrics. Decoding is greedy, as in the
original. OUTPUT_DIR receives `answers.jsonl` (LLaVA's format, in the order of the questions), the file for the official
scorer if it differs, `scores.json` if the metric needs no server, and `parts/` with the answers in the order in which
they were given. A run that was killed continues when it is started again with the same options, even with another
number of processes. On a CPU, launch processes in the same way with this script's --cpu (accelerate's own --cpu would
start only one).
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from accelerate import PartialState
from accelerate.utils import tqdm
from benchmarks_vqa import BENCHMARKS, Answer, Benchmark, Question
from jinja2 import TemplateError
from torch.utils.data import DataLoader

from visualrwkv_hf.inference import load_config, load_model, load_processor
from visualrwkv_hf.training import exit_together

WAIT = timedelta(weeks=1)
"""How long a process waits for the slowest one. With the default, a difference of half an hour would end the run."""


@dataclass(frozen=True)
class Settings:
    """The options that the answers depend on. A resumed run must have the same."""

    benchmark: str
    model: str
    questions_sha256: str
    image_folder: str
    max_new_tokens: int
    dtype: str
    image_position: str | None
    weights: list[list] | None = None
    """Name, size and time of the model's files of weights; None for one that is not a folder."""


class How(NamedTuple):
    """The options that the answers do not depend on."""

    batch_size: int
    workers: int
    skip_bad_rows: bool
    device: torch.device


def weights_of(folder: Path) -> list[list] | None:
    """Return what tells a trained model from the one that was in its folder before."""
    files = [(path.name, path.stat()) for path in sorted(folder.glob("*.safetensors"))]
    return [[name, found.st_size, found.st_mtime_ns] for name, found in files] or None


# --- Answers on the disk ----------------------------------------------------------------------------------------------


class Parts:
    """The answers as they come: in each file one process's of one start, one JSON object a line.

    Every process must read what earlier starts left (that is, make its object) before any of them writes.

    Args:
        folder: the run's own; made if it is not there.
        settings: of this run.
        rank: of this process.

    Raises:
        ValueError: the folder holds answers of other settings, or two answers to one question.
    """

    def __init__(self, folder: Path, settings: Settings, rank: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.settings = folder, settings
        self._refuse_other_settings()
        starts = [int(path.name.split("-")[0]) for path in self._files()]
        self.path = folder / f"{max(starts, default=0) + 1:04}-{rank}.jsonl"
        self.answered = self.read()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*-*.jsonl"))

    def _refuse_other_settings(self) -> None:
        path = self.folder / "settings.json"
        if not path.exists():
            return
        before = json.loads(path.read_text(encoding="utf-8"))
        now = asdict(self.settings)
        changed = [f"{k} was {before.get(k)!r}, now {v!r}" for k, v in now.items() if before.get(k) != v]
        if changed:
            raise ValueError(
                f"{self.folder} holds answers of other settings ({'; '.join(changed)}): take another --output-dir, "
                "or remove the folder."
            )

    def write_settings(self) -> None:
        text = json.dumps(asdict(self.settings), indent=1)
        (self.folder / "settings.json").write_text(text + "\n", encoding="utf-8")

    def read(self) -> dict[int, str]:
        """Row number -> answer, of all files. Rows that could not be asked are not in it."""
        texts: dict[int, str] = {}
        for record in self._records():
            if "error" in record:
                continue
            if record["row"] in texts:
                raise ValueError(
                    f"{self.folder} has two answers to row {record['row']}: do two runs write there at once?"
                )
            texts[record["row"]] = record["text"]
        return texts

    def errors(self) -> dict[int, str]:
        """Row number -> why it could not be asked, of this start's rows."""
        start = self.path.name.split("-")[0]
        return {r["row"]: r["error"] for r in self._records(f"{start}-*.jsonl") if "error" in r}

    def _records(self, pattern: str = "*-*.jsonl") -> Iterator[dict]:
        for path in sorted(self.folder.glob(pattern)):
            # After the last newline there may be part of a line, if the run was killed.
            *lines, _ = path.read_bytes().split(b"\n")
            yield from map(json.loads, lines)

    def append(self, records: Sequence[dict]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


# --- Asking -----------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Row numbers and the model's inputs for them, and why the other rows cannot be asked."""

    rows: list[int]
    inputs: Any
    errors: dict[int, str]


def messages_of(question: Question, image_folder: str) -> list[dict]:
    content: list[dict] = [{"type": "text", "text": question.text}]
    if question.image is not None:
        place = (
            {"base64": question.image}
            if question.is_base64
            else {"path": str(Path(image_folder, question.image))}
        )
        content.insert(0, {"type": "image", **place})
    return [{"role": "user", "content": content}]


def prepare(rows: list[int], questions: list[Question], processor, settings: Settings) -> Batch:
    """The inputs of a batch. If they cannot be made, those of the rows that can be asked alone."""
    placement = {"image_position": settings.image_position} if settings.image_position else {}

    def inputs_of(some: list[int]):
        return processor.apply_chat_template(
            [messages_of(questions[row], settings.image_folder) for row in some],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
            **placement,
        )

    try:
        return Batch(rows, inputs_of(rows), {})
    except (ValueError, OSError, TemplateError):
        errors = {}
    for row in rows:
        try:
            inputs_of([row])
        except (ValueError, OSError, TemplateError) as error:
            errors[row] = f"question {questions[row].key}: {error}"
    asked = [row for row in rows if row not in errors]
    return Batch(asked, inputs_of(asked) if asked else None, errors)


@torch.inference_mode()
def texts_of(model, processor, inputs, max_new_tokens: int) -> list[str]:
    """The answers to a batch, each up to the end of its turn."""
    inputs = inputs.to(model.device, dtype=model.dtype)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.post_process_image_text_to_text(output, prompt_length=inputs["input_ids"].shape[1])


def answer_rows(rows: list[int], questions: list[Question], parts: Parts, how: How) -> None:
    """Answers the rows with these numbers.

    Raises:
        ValueError: one of them cannot be asked, unless such rows are to be skipped.
    """
    settings = parts.settings
    processor = load_processor(settings.model)
    model = load_model(settings.model, str(how.device), settings.dtype)
    inputs_of = partial(prepare, questions=questions, processor=processor, settings=settings)
    batches = DataLoader(rows, how.batch_size, collate_fn=inputs_of, num_workers=how.workers)
    with tqdm(total=len(rows), unit="row") as bar:
        for asked, inputs, errors in batches:
            if errors and not how.skip_bad_rows:
                raise ValueError(f"{min(errors.items())[1]} With --skip-bad-rows it counts as wrong.")
            texts = texts_of(model, processor, inputs, settings.max_new_tokens) if asked else []
            parts.append([{"row": row, "text": text} for row, text in zip(asked, texts)])
            parts.append([{"row": row, "error": error} for row, error in errors.items()])
            bar.update(len(asked) + len(errors))


def answer_all(state: PartialState, questions: list[Question], parts: Parts, how: How) -> None:
    """Answers what has no answer yet; of n processes, each takes every n-th row of that.

    Raises:
        ValueError: a picture is not there, or as `answer_rows`.
    """
    if not how.skip_bad_rows:
        refuse_missing_pictures(questions, parts.settings.image_folder)
    state.wait_for_everyone()  # all have read the parts: from here on they write
    if state.is_main_process:
        parts.write_settings()
    todo = [row for row in range(len(questions)) if row not in parts.answered]
    if mine := todo[state.process_index :: state.num_processes]:
        answer_rows(mine, questions, parts, how)
    state.wait_for_everyone()


def refuse_missing_pictures(questions: list[Question], image_folder: str) -> None:
    names = [q.image for q in questions if q.image is not None and not q.is_base64]
    if missing := [name for name in names if not Path(image_folder, name).is_file()]:
        raise ValueError(
            f"{len(missing)} of {len(names)} pictures are not in {image_folder}, the first is {missing[0]!r}. "
            "With --skip-bad-rows they count as wrong."
        )


# --- The whole --------------------------------------------------------------------------------------------------------


def read_benchmark(name: str, questions: Path, model: str) -> tuple[Benchmark, list[Question]]:
    """The table's row and the questions, as the original asks a model of this generation.

    Raises:
        ValueError: there is no such benchmark, or its file is malformed.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"The benchmark must be one of {', '.join(BENCHMARKS)}, got {name!r}.")
    benchmark = BENCHMARKS[name]
    version = load_config(model).text_config.rwkv_version
    return benchmark, benchmark.read(questions, benchmark.rwkv7_suffix if version == 7 else "")


def write_results(
    benchmark: Benchmark, questions: list[Question], parts: Parts, folder: Path, truth: Path | None
) -> list[str]:
    """Writes the answer file, the official scorer's and the scores; gives the lines to print."""
    texts, errors = parts.read(), parts.errors()
    assert set(range(len(questions))) == {*texts, *errors}
    answers = [Answer(question, texts.get(row, ""), row in texts) for row, question in enumerate(questions)]
    write_answers(answers, errors, Path(parts.settings.model).name, folder / "answers.jsonl")
    lines = [f"{len(answers)} answers: {folder / 'answers.jsonl'}"]
    if errors:
        lines.append(f"{len(errors)} rows could not be asked and count as wrong:")
        lines += [f"  {error}" for _, error in sorted(errors.items())]
    if official := benchmark.write and benchmark.write(answers, folder, truth):
        lines.append(f"for the official scorer: {official}")
    if scores := answers and benchmark.score and benchmark.score(answers, truth):
        (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
        lines += [f"{name}: {value:.4g}" for name, value in scores.items()]
    if benchmark.annotations and not truth:
        lines.append(f"There is more with --annotations: {benchmark.annotations}.")
    return lines


def write_answers(answers: Sequence[Answer], errors: dict[int, str], model_id: str, path: Path) -> None:
    """LLaVA's answer file."""
    with path.open("w", encoding="utf-8") as file:
        for row, (question, text, _) in enumerate(answers):
            record = {
                "question_id": question.key,
                "prompt": question.prompt,
                "text": text,
                "answer_id": str(row),
                "model_id": model_id,
                "metadata": {"error": errors[row]} if row in errors else {},
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def main(
    benchmark: Annotated[str, typer.Argument(help=f"One of {', '.join(BENCHMARKS)}.")],
    model: Annotated[str, typer.Option(help="Folder or Hub id of the model.")],
    questions: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="The benchmark's question file.")
    ],
    output_dir: Annotated[
        Path,
        typer.Option(
            help="Output folder; created if it does not exist. A run that was killed continues in it."
        ),
    ],
    image_folder: Annotated[
        Path | None,
        typer.Option(help="Folder that picture paths start from. Default: that of the questions."),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(
            exists=True, help="File with the right answers, if the question file does not have them."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per batch, in each process.")] = 8,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum tokens of an answer. Default: the original's.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, or auto for the checkpoint's.")
    ] = "auto",
    image_position: Annotated[
        str | None, typer.Option(help="first, middle or last. Default: as the model was trained.")
    ] = None,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Count a row that cannot be read as wrong, and continue.")
    ] = False,
    workers: Annotated[int, typer.Option(min=0, help="Data loader processes for each model process.")] = 0,
    cpu: Annotated[bool, typer.Option("--cpu", help="Run on the CPU even if there is a GPU.")] = False,
) -> None:
    """Answers a benchmark's question file, and writes what its official scorer takes."""
    state = PartialState(cpu=cpu, timeout=WAIT)
    try:
        row, asked = read_benchmark(benchmark, questions, model)
        settings = Settings(
            benchmark,
            model,
            hashlib.sha256(questions.read_bytes()).hexdigest(),
            str(image_folder or questions.parent),
            max_new_tokens or row.max_new_tokens,
            dtype,
            image_position,
            weights_of(Path(model)),
        )
        parts = Parts(output_dir / "parts", settings, state.process_index)
        answer_all(state, asked, parts, How(batch_size, workers, skip_bad_rows, state.device))
        if state.is_main_process:
            print("\n".join(write_results(row, asked, parts, output_dir, annotations)))
    except (ValueError, OSError) as error:
        typer.secho(f"Error: {error}", err=True, fg="red")
        raise typer.Exit(1) from error
    exit_together()


if __name__ == "__main__":
    typer.run(main)
