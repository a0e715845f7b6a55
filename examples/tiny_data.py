"""Tasks that train and test `train_tiny.py`'s model: questions about small pictures.

A task makes lessons, each from a `random.Random` that is given, and has a test, whose pictures no lesson shows. Some
tasks take their pictures from packages (`tiny_collections`), the others draw them (`tiny_signs`, `tiny_scenes`,
`tiny_charts`, `tiny_unknown`). `tiny_tasks` has all of them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

SIDE = 96
"""Pixels of a picture's side, for the model. Pictures of packages are smaller and are enlarged by the processor."""

WHAT = "what is in the picture?"


class Question(NamedTuple):
    """A question and its right answer."""

    text: str
    answer: str


class Lesson(NamedTuple):
    """Pictures that are shown together, and questions about them.

    The answers to `main` are names: such an answer tells most about the picture, and so teaches most. `others` are the
    rest, most of them answered by yes or no. Of main questions with the same answer one is asked, since the others
    could be copied, unless `repeats`: where each answer is one of two or three names, copying does not help.
    """

    pictures: Sequence[Image.Image]
    main: Sequence[Question]
    others: Sequence[Question] = ()
    repeats: bool = False


class Exam(NamedTuple):
    """A question about pictures that no lesson shows."""

    pictures: Sequence[Image.Image]
    question: Question

    @property
    def picture(self) -> Image.Image:
        """The only picture, or the first."""
        return self.pictures[0]


@dataclass(frozen=True)
class Task:
    """A kind of pictures with questions."""

    name: str
    source: str
    """Where the pictures come from, with licences."""
    lesson: Callable[[Random], Lesson]
    test: Sequence[Exam]
    wording: Sequence[Question]
    """Questions and answers that show every word of the task, for the vocabulary."""
    sha256: str = ""
    """SHA-256 of the package's files."""
    subjects: Sequence[Lesson] = ()
    """The training pictures before augmentation, if their number is fixed."""


class DrawnExams(Sequence[Exam]):
    """Draws a test anew whenever it is read. Exam i depends on the task's name and on i alone."""

    def __init__(self, name: str, count: int, draw: Callable[[Random], Exam]):
        self.name, self.count, self.draw = name, count, draw

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.count))]
        if not -self.count <= index < self.count:
            raise IndexError(f"Exam {index} of {self.count}.")
        return self.draw(Random(f"test of {self.name}, {index % self.count}"))

    def __iter__(self) -> Iterator[Exam]:
        return (self[i] for i in range(self.count))


class Lessons(Dataset):
    """Rows for the collator, `conversations` and `images`; row i depends on the seed and on i alone.

    A row has one lesson's pictures with several questions: the first in the sandwich, so that its answer comes about as
    it does when a single question is asked, the others as further turns.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        shares: Sequence[float],
        rows: range,
        main: int,
        others: int,
        seed: int,
    ):
        """A row has at most `main` and `others` questions of these kinds; one with n pictures has at most the n-th part
        of both together, rounded up. `shares` weigh the tasks."""
        self.tasks, self.shares, self.rows = tasks, shares, rows
        self.main, self.others, self.seed = main, others, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        random = Random(f"{self.seed} {self.rows[index]}")
        (task,) = random.choices(self.tasks, self.shares)
        lesson = task.lesson(random)
        main = random.sample(lesson.main, len(lesson.main))
        if not lesson.repeats:
            main = list({question.answer: question for question in main}.values())
        room = -(-(self.main + self.others) // len(lesson.pictures))  # pictures take long to read
        questions = main[: min(self.main, room)]
        # Of some pictures easy-VQA asks nothing open.
        others = min(self.others, room - len(questions)) if questions else max(1, self.others)
        questions += random.sample(lesson.others, min(others, len(lesson.others)))
        random.shuffle(questions)
        return {"conversations": conversation(questions, len(lesson.pictures)), "images": [*lesson.pictures]}


def conversation(questions: Iterable[Question], pictures: int = 1) -> list[dict]:
    """Return LLaVA's turns, with the pictures in the first."""
    turns = []
    for question in questions:
        text = question.text if turns else "<image>\n" * pictures + question.text
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": question.answer}]
    return turns


def without_what(questions: Iterable[Question]) -> list[Question]:
    """Return the questions but the one after the whole picture, which asks for more than what a test is about."""
    return [question for question in questions if question.text != WHAT]


def all_wording(tasks: Iterable[Task]) -> list[Question]:
    """Return questions and answers that show every word of the tasks."""
    return sorted({question for task in tasks for question in task.wording})


# Pictures.


def on_paper(drawing: Image.Image, paper="white") -> Image.Image:
    """Return a drawing with transparency on a background of one colour, in RGB."""
    picture = Image.new("RGB", drawing.size, paper)
    picture.paste(drawing, mask=drawing.getchannel("A"))
    return picture


def warped(picture: Image.Image, random: Random, turn: float, zoom: float, shift: float) -> Image.Image:
    """Turn by up to `turn` degrees, scale each side by 1 +- `zoom`, shear, and move by up to `shift` pixels."""
    angle = np.deg2rad(random.uniform(-turn, turn))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shear = np.array([[1, random.uniform(-0.15, 0.15)], [0, 1]])
    scale = np.diag([1 / random.uniform(1 - zoom, 1 + zoom) for _ in "xy"])
    matrix = rotation @ shear @ scale  # from a pixel of the result to one of the picture
    center = np.array(picture.size) / 2
    offset = center - matrix @ (center + [random.uniform(-shift, shift) for _ in "xy"])
    rows = np.hstack([matrix, offset[:, None]]).flatten()
    return picture.transform(
        picture.size, Image.Transform.AFFINE, rows.tolist(), resample=Image.Resampling.BILINEAR
    )


def noisy(picture: Image.Image, random: Random) -> Image.Image:
    """Return a picture with grain and a shadow across it."""
    noise = np.random.default_rng(random.getrandbits(32))
    pixels = np.asarray(picture, dtype=np.float32)
    angle, depth = random.uniform(0, 2 * np.pi), random.uniform(0, 30)
    height, width = pixels.shape[:2]
    rows, columns = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None]
    shadow = depth * (np.cos(angle) * rows + np.sin(angle) * columns)
    grain = random.uniform(2, 14) * noise.standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray((pixels + shadow[..., None] + grain).clip(0, 255).astype(np.uint8))


def shade(random: Random, low: int, high: int) -> tuple[int, int, int]:
    """Return a random colour whose parts lie from `low` to `high`."""
    red, green, blue = (random.randint(low, high) for _ in "rgb")
    return red, green, blue


def near(color: Sequence[int], random: Random) -> tuple[int, int, int]:
    """Return a colour that differs a little."""
    red, green, blue = (min(max(part + random.randint(-18, 18), 0), 255) for part in color)
    return red, green, blue
