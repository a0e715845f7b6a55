"""Teach the model in the package a new task with a tuned state, and for comparison with LoRA.

    python examples/state_tuning.py                 # some minutes on two cores; needs easy-vqa and peft
    python examples/state_tuning.py --steps 100     # a first look

The task: a small shape lies somewhere in the picture, and the question is in which quarter. The model has not been
asked that before. A tuned state learns it while every weight stays as it is; LoRA learns it in adapters.
Both are examined on new pictures, and on easy-VQA's test questions, which the model could answer before. The state is
then given to half of the rows of a batch, so that one batch asks about both kinds of pictures.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from benchmarking import markdown_table
from evaluate_tiny import answers
from PIL import Image, ImageDraw
from tiny_collections import easy_vqa_task
from tiny_data import SIDE, Exam, Question, conversation
from torch.utils.data import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

from visualrwkv_hf import (
    TunedState,
    VisualRWKVDataCollator,
    VisualRWKVTrainer,
    VisualRWKVTrainingArguments,
    accelerate_on_cpu,
    bundled_model,
    lora_config,
)

QUESTION = "in which quarter is the shape?"
COLORS = ("red", "green", "blue", "black", "brown", "gray")
BATCH = 32


def small_shape(random: Random) -> Exam:
    """A small shape on light paper, and the number of the quarter in which it lies, counted as one reads."""
    paper = tuple(random.randint(200, 255) for _ in "rgb")
    picture = Image.new("RGB", (SIDE, SIDE), paper)
    quarter, radius, half = random.randrange(4), random.randint(SIDE // 13, SIDE // 7), SIDE // 2
    row, column = divmod(quarter, 2)
    x, y = (half * part + random.randint(radius + 1, half - radius - 1) for part in (column, row))
    draw, color, box = (
        ImageDraw.Draw(picture),
        random.choice(COLORS),
        (x - radius, y - radius, x + radius, y + radius),
    )
    kind = random.choice(("circle", "rectangle", "triangle"))
    if kind == "circle":
        draw.ellipse(box, color)
    elif kind == "rectangle":
        draw.rectangle(box, color)
    else:
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], color)
    return Exam([picture], Question(QUESTION, str(quarter + 1)))


class Lessons(Dataset):
    """Rows for the collator; row i depends on i alone."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        pictures, question = small_shape(Random(f"lesson {index}"))
        return {"conversations": conversation([question]), "images": list(pictures)}


def right(said: Sequence[str], exams: Sequence[Exam]) -> float:
    return sum(text == exam.question.answer for text, exam in zip(said, exams)) / len(exams)


def train(model, processor, steps: int, learning_rate: float) -> float:
    """Train what is not frozen; return the seconds that it took."""
    with TemporaryDirectory() as folder:
        arguments = VisualRWKVTrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=learning_rate,
            learning_rate_final=learning_rate / 10,
            warmup_steps=10,
            logging_steps=max(1, steps // 10),
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        )
        collator = VisualRWKVDataCollator(processor)
        start = time.perf_counter()
        trainer = VisualRWKVTrainer(
            model, arguments, train_dataset=Lessons(steps * BATCH), data_collator=collator
        )
        trainer.train()
    return time.perf_counter() - start


def fresh_model():
    set_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(bundled_model(), dtype="float32")
    accelerate_on_cpu(model)
    return model


def file_bytes(saved, pattern: str) -> int:
    with TemporaryDirectory() as folder:
        saved.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob(pattern))


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps of each training, of 32 pictures.")] = 600,
    layer: Annotated[int, typer.Option(help="The layer whose state is tuned.")] = 0,
    state_rate: Annotated[float, typer.Option(help="Learning rate of the state.")] = 1.0,
    lora_rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 2,
    lora_rate: Annotated[float, typer.Option(help="Learning rate of the adapters.")] = 2e-3,
    exams: Annotated[int, typer.Option(min=1, help="Pictures of each kind that are asked about.")] = 400,
    save: Annotated[Path | None, typer.Option(help="Keep the tuned state in this folder.")] = None,
) -> None:
    from peft import get_peft_model

    processor = AutoProcessor.from_pretrained(bundled_model())
    new = [small_shape(Random(f"exam {number}")) for number in range(exams)]
    old = Random(0).sample(easy_vqa_task().test, exams)
    rows = []

    def examine(name: str, model, trained: int, size: int | None, seconds: float | None, state=None) -> None:
        total = sum(weight.numel() for weight in model.parameters()) - trained if trained else 1
        rows.append(
            {
                "": name,
                "parameters": f"{trained:,} ({trained / total:.2%})" if trained else "0",
                "file, bytes": f"{size:,}" if size else "",
                "training": f"{seconds:.0f} s" if seconds else "",
                "new pictures": f"{right(answers(model, processor, new, initial_state=state), new):.1%}",
                "easy-VQA": f"{right(answers(model, processor, old, initial_state=state), old):.1%}",
            }
        )

    model = fresh_model()
    examine("before", model, 0, None, None)
    state = TunedState.attach(model, layers=[layer])
    trained = sum(weight.numel() for weight in state.parameters())
    seconds = train(model, processor, steps, state_rate)
    examine("tuned state", model, trained, file_bytes(state, "*.safetensors"), seconds)
    state.detach(model)
    if save:
        state.save_pretrained(save)
    both = [exam for pair in zip(new, old) for exam in pair]
    said = answers(model, processor, both, initial_state=[state, None] * exams)
    mixed = {"": "tuned state, for the rows with new pictures alone"} | dict.fromkeys(list(rows[0])[1:], "")
    mixed |= {"new pictures": f"{right(said[::2], new):.1%}", "easy-VQA": f"{right(said[1::2], old):.1%}"}
    rows.append(mixed)

    model = get_peft_model(
        fresh_model(), lora_config(train_projector=False, r=lora_rank, lora_alpha=2 * lora_rank)
    )
    trained = model.get_nb_trainable_parameters()[0]
    seconds = train(model, processor, steps, lora_rate)
    examine(f"LoRA, rank {lora_rank}", model, trained, file_bytes(model, "*.safetensors"), seconds)
    print(markdown_table(rows))


if __name__ == "__main__":
    typer.run(main)
