"""Examine the model in the package, or a model of the same kind, on the tasks of `train_tiny.py`.

    python examples/evaluate_tiny.py                 # some minutes; npm is needed, for fonts, words and emoji
    python examples/evaluate_tiny.py --weights int4 --tasks reading,charts
    python examples/evaluate_tiny.py --model tiny --questions 200

Every question is asked by itself, about pictures, fonts and words that were never trained on, and once more with the
pictures shuffled among the questions: a model that looks answers about the wrong picture then. An answer counts if it
is exact; of signs, the letters count too. Needs easy-vqa, scikit-learn, scikit-image, matplotlib.
"""

import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from random import Random
from typing import Annotated, Literal

import torch
import typer
from accelerate import PartialState
from accelerate.utils import gather_object
from benchmarking import markdown_table
from tiny_data import Exam, Task
from tiny_scenes import DIRECTIONS, PLACES
from tiny_tasks import TARGETS, all_tasks
from tiny_unknown import UNKNOWN
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from visualrwkv_hf import TunedState, VisualRWKVProcessor, accelerate_on_cpu, bundled_model

COLUMNS = (
    "accuracy",
    "pictures shuffled",
    "another picture's answer",
    "best guess per question",
    "most frequent answer",
    "target",
)
LETTERS_TARGET = 0.95
REFUSED_AT_MOST = 0.03

PARTS: dict[str, dict[str, Callable[[str], bool]]] = {
    "reading": {
        "words": lambda answer: answer.startswith("The word"),
        "numbers": lambda answer: answer.startswith("The number"),
    },
    "charts": {"values and numbers of bars": str.isdigit, "which bar": lambda answer: answer.endswith("bar")},
    "frames": {
        "which way": lambda answer: answer in DIRECTIONS,
        "which differs": lambda answer: answer in PLACES,
        "how many changed": str.isdigit,
    },
    "triangles": {"triangles alone": lambda answer: answer == "triangle"},
}
"""A task -> its parts, told apart by the right answer; each has a row of its own."""

LONGEST_ANSWER = 24
"""Tokens; a sign of eight letters takes fourteen."""


@torch.no_grad()
def answers(
    model,
    processor: VisualRWKVProcessor,
    exams: Sequence[Exam],
    batch: int = 64,
    initial_state: TunedState | Sequence[TunedState | None] | None = None,
) -> list[str]:
    """Return the model's greedy answers, each question asked by itself; `initial_state` is for all or for each."""
    model.eval()
    texts = [prompt(processor, exam.question.text, len(exam.pictures)) for exam in exams]
    order = sorted(range(len(exams)), key=lambda i: (len(exams[i].pictures), len(texts[i])))
    found = [""] * len(exams)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = processor(
            text=[texts[i] for i in chosen],
            images=[list(exams[i].pictures) for i in chosen],
            padding=True,
            return_tensors="pt",
        )
        states = [initial_state[i] for i in chosen] if isinstance(initial_state, Sequence) else initial_state
        output = model.generate(
            **inputs.to(model.device, dtype=model.dtype),
            max_new_tokens=LONGEST_ANSWER,
            do_sample=False,
            initial_state=states,
        )
        decoded = processor.post_process_image_text_to_text(
            output, prompt_length=inputs["input_ids"].shape[1]
        )
        for i, text in zip(chosen, decoded):
            found[i] = text
    return found


def prompt(processor: VisualRWKVProcessor, question: str, pictures: int = 1) -> str:
    content = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def gathered_answers(model, processor: VisualRWKVProcessor, exams: Sequence[Exam]) -> list[tuple[str, str]]:
    """Return answers and right answers; every process asks some of the questions, and has all of them in the end."""
    state = PartialState(cpu=True)
    mine = exams[state.process_index :: state.num_processes]
    pairs = zip(answers(model, processor, mine), (exam.question.answer for exam in mine))
    return gather_object(list(pairs))


def accuracy(model, processor: VisualRWKVProcessor, exams: Sequence[Exam]) -> float:
    """Return the share of exact answers."""
    pairs = gathered_answers(model, processor, exams)
    return statistics.fmean(said == right for said, right in pairs)


def letters_right(pairs: Sequence[tuple[str, str]]) -> float:
    """Return the share of letters that the answers have in the right order, of the longer of answer and sign."""
    texts = [(text_of(said), text_of(right)) for said, right in pairs]
    found = sum(
        block.size
        for said, right in texts
        for block in SequenceMatcher(None, said, right, autojunk=False).get_matching_blocks()
    )
    return found / sum(max(len(said), len(right)) for said, right in texts)


def text_of(answer: str) -> str:
    """Return what a sign says, from an answer such as "The word is LANTERN."."""
    return answer.removesuffix(".").rsplit(" ", 1)[-1]


def shuffled(exams: Sequence[Exam], seed: int) -> list[Exam]:
    """Return each question with the pictures of another, drawn at random from those with as many pictures."""
    found = list(exams)
    groups = defaultdict(list)
    for i, exam in enumerate(found):
        groups[len(exam.pictures)].append(i)
    for places in groups.values():
        sources = Random(seed).sample(places, len(places))
        for i, source in zip(places, sources):
            found[i] = Exam(exams[source].pictures, exams[i].question)
    return found


def sample_of(exams: Sequence[Exam], most: int) -> list[Exam]:
    """Return at most `most` of the exams, the same ones each time."""
    chosen = sorted(Random(0).sample(range(len(exams)), min(most, len(exams))))
    return [exams[i] for i in chosen]


def most_frequent(exams: Sequence[Exam]) -> float:
    """Return the accuracy of the one answer that is right most often."""
    counts = Counter(exam.question.answer for exam in exams)
    return max(counts.values()) / len(exams)


def questions_alone(exams: Sequence[Exam]) -> tuple[float, float]:
    """Score answers that ignore the picture: the best guess for each question, and the answer of another picture."""
    by_text = defaultdict(Counter)
    for exam in exams:
        by_text[exam.question.text][exam.question.answer] += 1
    best = sum(max(counts.values()) for counts in by_text.values())
    drawn = sum(sum(n * n for n in counts.values()) / counts.total() for counts in by_text.values())
    return best / len(exams), drawn / len(exams)


def scores(
    model, processor: VisualRWKVProcessor, tasks: Sequence[Task], most: int, seed: int
) -> list[dict[str, str]]:
    """Ask at most so many questions of each task, with their pictures and with shuffled ones; return a table's rows.

    The last row is the share of questions about known things that are answered by not knowing.
    """
    rows, refused = [], []
    for task in tqdm(tasks, desc="examination", disable=None if PartialState().is_main_process else True):
        exams = sample_of(task.test, most)
        found = gathered_answers(model, processor, exams)
        looking = statistics.fmean(said == right for said, right in found)
        control = accuracy(model, processor, shuffled(exams, seed))
        guess, other = questions_alone(exams)
        shares = (looking, control, other, guess, most_frequent(exams), TARGETS[task.name])
        row = {"held out": task.name, "questions": f"{len(exams):,}"}
        rows.append(row | {name: f"{100 * share:.1f} %" for name, share in zip(COLUMNS, shares)})
        for name, is_part in PARTS.get(task.name, {}).items():
            part = [pair for pair in found if is_part(pair[1])]
            if part:
                share = statistics.fmean(said == right for said, right in part)
                rows.append(part_row(f"{task.name}, {name}", len(part), share))
        if task.name == "reading":
            rows.append(part_row("reading, letters", len(found), letters_right(found), LETTERS_TARGET))
        if task.name != "unknown":
            refused += [said == UNKNOWN for said, _ in found]
    if refused:
        share = statistics.fmean(refused)
        rows.append(part_row(f"known things, answered by {UNKNOWN!r}", len(refused), share, REFUSED_AT_MOST))
    return rows


def part_row(name: str, questions: int, share: float, target: float | None = None) -> dict[str, str]:
    """Return a table's row without controls."""
    row = {"held out": name, "questions": f"{questions:,}", **dict.fromkeys(COLUMNS, "")}
    row[COLUMNS[0]] = f"{100 * share:.1f} %"
    row[COLUMNS[-1]] = "" if target is None else f"{100 * target:.1f} %"
    return row


def main(
    model: Annotated[Path | None, typer.Option(help="Folder. Default: the model in the package.")] = None,
    data_dir: Annotated[Path, typer.Option(help="Folder for downloaded fonts, words and emoji.")] = Path(
        "tiny-data"
    ),
    weights: Annotated[
        Literal["float32", "bfloat16", "int8", "int4"], typer.Option(help="Format of the weights.")
    ] = "bfloat16",
    tasks: Annotated[
        str | None, typer.Option(help="Names of tasks, separated by commas. Default: all.")
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="Questions of each task at most.")] = 10_000,
    validation: Annotated[
        bool, typer.Option(help="Ask about a tenth of the training pictures instead.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed for shuffling the pictures.")] = 0,
) -> None:
    folder = model or bundled_model()
    known = all_tasks(data_dir, validation)
    names = tasks.split(",") if tasks else list(known)
    if unknown := sorted(set(names) - known.keys()):
        sys.exit(f"There is no task {unknown[0]!r}; there are {', '.join(known)}.")
    loaded = AutoModelForImageTextToText.from_pretrained(
        folder, dtype="bfloat16" if weights == "bfloat16" else "float32"
    )
    accelerate_on_cpu(loaded, **({"weights": weights} if weights in ("int8", "int4") else {}))
    processor = AutoProcessor.from_pretrained(folder)
    chosen = [known[name] for name in names]
    print(markdown_table(scores(loaded, processor, chosen, questions, seed)))


if __name__ == "__main__":
    typer.run(main)
