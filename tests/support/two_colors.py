"""Train a model for a few seconds with examples/train_tiny.py, on generated pictures of two colours.

As a script, this trains in two processes:

    torchrun --nproc-per-node 2 tests/support/two_colors.py FOLDER
"""

import sys
from pathlib import Path
from typing import Any

import add_examples  # noqa: F401
import evaluate_tiny
import tiny_data
import tiny_stages
import torch
import train_tiny
from PIL import Image, ImageDraw

TOWER = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", image_size=32)
LANGUAGE_MODEL = dict(rwkv_version=7, hidden_size=32, num_hidden_layers=2, head_dim=16)
COLORS = ("red", "blue")


def colored_square(color: str, side: int = 64) -> Image.Image:
    picture = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(picture).rectangle((8, 8, side - 8, side - 8), fill=color)
    return picture


def two_colors() -> Any:
    """Return the task, which is to say which of two colours a square has."""
    questions = {color: tiny_data.Question("what color is it?", color) for color in COLORS}
    other = tiny_data.Question("is there a shape?", "yes")
    subjects = [
        tiny_data.Lesson([colored_square(c)], [question], [other]) for c, question in questions.items()
    ]
    exams = [tiny_data.Exam([colored_square(c)], question) for c, question in questions.items()]
    wording = [*questions.values(), other]
    return tiny_data.Task(
        "easy-VQA", "made", lambda random: random.choice(subjects), exams * 4, wording, "0", subjects
    )


def vocabulary_of(task) -> dict[bytes, int]:
    return train_tiny.cut_vocabulary(tiny_data.all_wording([task]))


def trained_on(task, folder: Path, trained: tuple[str, ...] = tiny_stages.ALL_PARTS) -> tuple:
    """Return a model that has learned the task, and its processor."""
    torch.manual_seed(0)
    fields = dict(scan="bidirectional", image_position="middle")
    model, processor = train_tiny.fresh_model(vocabulary_of(task), TOWER, LANGUAGE_MODEL, **fields)
    shares = {task.name: 1.0}
    stages = [tiny_stages.Stage(30, 5e-3, 1e-3, trained, 1, 0, shares)]
    stages.append(tiny_stages.Stage(3, 1e-3, 1e-4, ("projector", "language_model"), 1, 1, shares))
    train_tiny.train(model, processor, {task.name: task}, stages, 0, folder)
    return model, processor


def main(folder: Path) -> None:
    """Train, print the share of right answers in the first process, and save each process's weights as `RANK.pt`."""
    from accelerate import PartialState

    state, task = PartialState(cpu=True), two_colors()
    model, processor = trained_on(task, folder / "stages", tiny_stages.ALL_BUT_TOWER)
    right = evaluate_tiny.accuracy(model, processor, task.test)
    state.print(f"processes: {state.num_processes}, right: {right}")
    torch.save(model.state_dict(), folder / f"{state.process_index}.pt")
    train_tiny.exit_together()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
