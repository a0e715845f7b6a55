"""Measure what a model's embeddings tell about pictures: a linear classifier on them, beside one on raw pixels.

    python examples/linear_probe.py                        # the model in the package; needs easy-vqa and scikit-learn
    python examples/linear_probe.py --model MODEL --train 500

Four things are asked about small pictures: colour and shape of easy-VQA's drawings, scikit-learn's digits, and printed
small letters, which the model in the package was never trained on: its signs have capitals. The same ridge regression
classifies every kind of vector; its strength is chosen on the training pictures. No weight of the model is changed.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from benchmarking import markdown_table
from PIL import Image, ImageDraw, ImageFont
from tiny_collections import digits_task, easy_vqa_task, scribbled
from tiny_data import SIDE, Task
from transformers import AutoModelForImageTextToText, AutoProcessor

from visualrwkv_hf import bundled_model

BATCH = 100
LETTERS = "abcdefghijklmnopqrstuvwxyz"
QUESTION = "what is in the picture?"


class Problem(NamedTuple):
    """Pictures with one label each."""

    name: str
    train: Sequence[tuple[Image.Image, str]]
    test: Sequence[tuple[Image.Image, str]]


def letter(random: Random) -> tuple[Image.Image, str]:
    """A printed small letter, turned and moved like the digits that the model in the package was trained on."""
    name = random.choice(LETTERS)
    picture = Image.new("L", (SIDE, SIDE))
    font = ImageFont.load_default(random.randint(36, 56))
    ImageDraw.Draw(picture).text((SIDE / 2, SIDE / 2), name, 255, font, anchor="mm")
    return scribbled(picture, random), name


def letters(train: int, test: int) -> Problem:
    drawn = [letter(Random(f"letter {number}")) for number in range(train + test)]
    return Problem("small letters (never seen)", drawn[:train], drawn[train:])


def open_questions(name: str, task: Task, word: str, other: str, train: int, test: int) -> Problem:
    """The pictures of a task that have an open question with `word` in it and without `other`."""

    def is_asked(text: str, answer: str) -> bool:
        return word in text and other not in text and answer not in ("yes", "no")

    known = [(s.pictures[0], q.answer) for s in task.subjects for q in s.main if is_asked(*q)]
    asked = [(e.picture, e.question.answer) for e in task.test if is_asked(*e.question)]
    random = Random(0)
    known = random.sample(known, min(train, len(known)))
    pairs = random.sample(asked, min(test, len(asked)))
    return Problem(name, [(p.convert("RGB"), a) for p, a in known], [(p.convert("RGB"), a) for p, a in pairs])


def problems(train: int, test: int) -> Iterator[Problem]:
    shapes, digits = easy_vqa_task(), digits_task()
    yield open_questions("colour", shapes, "color", "shape?!", train, test)
    yield open_questions("shape", shapes, "shape", "color", train, test)
    yield open_questions("digits", digits, "digit", "?!", train, test)
    yield letters(train, test)


class Embedder:
    """Ways to make vectors [N, D] of pictures."""

    def __init__(self, model, processor):
        self.model, self.processor = model, processor

    def pixels(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        return torch.stack(
            [torch.tensor(np.asarray(p.resize((32, 32))), dtype=torch.float32).flatten() for p in pictures]
        )

    def tower(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """The mean of what the vision tower makes of a picture, before the language model."""
        pixels = self.processor.image_processor(pictures, return_tensors="pt")
        return self.model.model.vision_tower(**pixels.to(self.model.dtype)).last_hidden_state.float().mean(1)

    def alone(self, pictures: Sequence[Image.Image], **options) -> torch.Tensor:
        """The embedding of a picture without any words."""
        texts = [self.processor.image_token] * len(pictures)
        return self.model.embed(self.processor(images=pictures, text=texts, return_tensors="pt"), **options)

    def asked(self, pictures: Sequence[Image.Image], **options) -> torch.Tensor:
        """The embedding of a picture and a question about it: the state in which the model begins to answer."""
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": p}, {"type": "text", "text": QUESTION}]}]
            for p in pictures
        ]
        inputs = self.processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        return self.model.embed(inputs, **options)

    def ways(self) -> dict[str, Callable[[Sequence[Image.Image]], torch.Tensor]]:
        return {
            "pixels, 32 x 32": self.pixels,
            "vision tower, mean": self.tower,
            'picture, `pooling="last"`': self.alone,
            'picture, `pooling="mean"`': lambda pictures: self.alone(pictures, pooling="mean"),
            'picture, `pooling="state"`': lambda pictures: self.alone(pictures, pooling="state"),
            'picture and question, `pooling="last"`': self.asked,
        }


def accuracy(way: Callable[[Sequence[Image.Image]], torch.Tensor], problem: Problem) -> tuple[float, int]:
    """Return which share of the held-out pictures is classified right, and the size of the vectors."""
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    vectors, labels = [], []
    for pairs in (problem.train, problem.test):
        parts = [
            way([picture for picture, _ in pairs[start : start + BATCH]])
            for start in range(0, len(pairs), BATCH)
        ]
        vectors.append(torch.cat(parts).numpy())
        labels.append([label for _, label in pairs])
    classifier = make_pipeline(StandardScaler(), RidgeClassifierCV(np.logspace(0, 6, 7)))
    classifier.fit(vectors[0], labels[0])
    return float(classifier.score(vectors[1], labels[1])), vectors[0].shape[1]


@torch.no_grad()
def main(
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub id. Default: the model in the package.")
    ] = None,
    train: Annotated[
        int, typer.Option(min=1, help="Pictures of each kind that the classifier learns from.")
    ] = 400,
    test: Annotated[int, typer.Option(min=1, help="Pictures that it is tested on.")] = 300,
    markdown: Annotated[Path | None, typer.Option(help="Also write the table to this file.")] = None,
) -> None:
    source = model or bundled_model()
    loaded = AutoModelForImageTextToText.from_pretrained(source, dtype="float32").eval()
    embedder = Embedder(loaded, AutoProcessor.from_pretrained(source))
    asked = list(problems(train, test))
    rows = []
    for name, way in embedder.ways().items():
        scores = {problem.name: accuracy(way, problem) for problem in asked}
        size = next(iter(scores.values()))[1]
        rows.append(
            {"vectors": name, "size": f"{size:,}"} | {key: f"{s:.1%}" for key, (s, _) in scores.items()}
        )
    rows.append(
        {"vectors": "chance", "size": ""} | {p.name: f"{1 / len({a for _, a in p.train}):.1%}" for p in asked}
    )
    table = markdown_table(rows)
    print(table)
    if markdown:
        markdown.write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
