"""A training of seconds with examples/train_tiny.py, on made pictures of two colours; in two processes,

torchrun --nproc-per-node 2 tests/support/two_colors.py FOLDER
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from paths import EXAMPLES
from PIL import Image, ImageDraw


def load(name: str):
    """A module of examples/, under its own name: train_tiny imports tiny_data."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


tiny_data = load("tiny_data")
train_tiny = load("train_tiny")

TOWER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2) | dict(
    image_size=64, patch_size=16
)
LANGUAGE_MODEL = dict(rwkv_version=7, hidden_size=32, num_hidden_layers=2, head_dim=16)
COLORS = ("red", "blue")


def colored_square(color: str, side: int = 64) -> Image.Image:
    picture = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(picture).rectangle((8, 8, side - 8, side - 8), fill=color)
    return picture


def two_colors() -> Any:
    """The task: which of two colours it is."""
    questions = {color: tiny_data.Question("what color is it?", color) for color in COLORS}
    others = [tiny_data.Question("is there a shape?", "yes")]
    subjects = [
        tiny_data.Subject([colored_square(c)], [question], others) for c, question in questions.items()
    ]
    exams = [tiny_data.Exam(colored_square(c), question) for c, question in questions.items()]
    return tiny_data.Task("easy-VQA", "made", "0", subjects, exams * 4, tiny_data.mirrored)


def vocabulary_of(task) -> dict[bytes, int]:
    return train_tiny.cut_vocabulary(tiny_data.all_questions([task]))


def trained_on(task, folder: Path) -> tuple:
    """A model that has learned the task, and its processor."""
    torch.manual_seed(0)
    fields = dict(scan="bidirectional", image_position="middle")
    model, processor = train_tiny.fresh_model(vocabulary_of(task), TOWER, LANGUAGE_MODEL, **fields)
    shares = {task.name: 1.0}
    stages = [train_tiny.Stage(30, 5e-3, 1e-3, tuple(train_tiny.TRAINABLE_PARTS), 1, shares)]
    stages.append(train_tiny.Stage(3, 1e-3, 1e-4, ("projector", "language_model"), 2, shares))
    train_tiny.train(model, processor, [task], stages, 0, folder)
    return model, processor


def main(folder: Path) -> None:
    """Saves each process's weights; the first one's folder also says how much is right."""
    from accelerate import PartialState

    state, task = PartialState(cpu=True), two_colors()
    model, processor = trained_on(task, folder)
    right = train_tiny.accuracy(model, processor, task.test)
    state.print(f"processes: {state.num_processes}, right: {right}")
    torch.save(model.state_dict(), folder / f"{state.process_index}.pt")
    train_tiny.exit_together()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
