"""The data of `train_tiny.py`: small pictures that install from package registries, and questions about them.

easy-VQA (PyPI `easy-vqa`, MIT): one coloured shape a picture, with its official split. scikit-learn's digits: 1,797
scans of 8 x 8 pixels. Emoji (npm `emoji-datasource-google`, MIT; drawings of Noto Emoji, Apache-2.0): pictures with
names and categories. Whatever is drawn at random is drawn from a `random.Random` that is given.
"""

import hashlib
import json
import subprocess
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from torch.utils.data import Dataset

SIDE = 64
"""Pixels of a side, of easy-VQA's pictures and of the emoji; digits are enlarged to it."""

SPLIT_SEED = 0
HELD_OUT_DIGITS, HELD_OUT_EMOJI = 0.2, 0.15
VALIDATION = 0.1
"""Share of the training pictures that a task uses for validation if `validation=True`."""

WHAT = "what is in the picture?"
DIGIT_QUESTIONS = ("what digit is this?", "which number is in the image?", "what number is shown?")
KIND_QUESTIONS = ("what kind of emoji is this?", "which category is this?", "what kind of thing is this?")
DETAIL_QUESTION = "which kind exactly?"
YES_WEIGHT = 4
"""How often a question with the answer yes is repeated among a picture's questions that differ in one word."""

EMOJI_PACKAGE, EMOJI_FILE = "emoji-datasource-google@16.0.0", "emoji-datasource-google-16.0.0.tgz"
EMOJI_SHA256 = "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"

PEOPLE = {"1F466", "1F467", "1F468", "1F469", "1F474", "1F475", "1F476", "1F9D1", "1F9D2", "1F9D3"}
MARKS = {"200D", "FE0F", "2640", "2642", "27A1"} | {f"1F3F{tone}" for tone in "BCDEF"}
"""Code points that make a variant of an emoji: joiners, gender, direction, skin tones."""


class Question(NamedTuple):
    """A question and its right answer."""

    text: str
    answer: str


class Subject(NamedTuple):
    """Choose the training questions about one thing: one of `main`, if there are any, and some of `others`.

    The answer to a main question is a name: such an answer tells most about the picture, and so teaches most.
    """

    pictures: Sequence[Image.Image]  # of which one is shown
    main: Sequence[Question]
    others: Sequence[Question]


class Exam(NamedTuple):
    """A question about a picture that no training saw."""

    picture: Image.Image
    question: Question


@dataclass(frozen=True)
class Task:
    """A data set: what is trained on, what is asked in the end, and how a picture is varied while training."""

    name: str
    source: str
    sha256: str
    train: Sequence[Subject]
    test: Sequence[Exam]
    vary: Callable[[Image.Image, Random], Image.Image]


# easy-VQA.


def easy_vqa_task(validation: bool = False) -> Task:
    """easy-VQA in its official split; pictures are mirrored while training, which no answer depends on."""
    import easy_vqa

    train, test = (_by_picture(q) for q in (easy_vqa.get_train_questions(), easy_vqa.get_test_questions()))
    train_files, test_files = easy_vqa.get_train_image_paths(), easy_vqa.get_test_image_paths()
    asked, asked_files, kept = test, test_files, set(train)
    if validation:
        kept -= set(Random(SPLIT_SEED).sample(sorted(train), round(VALIDATION * len(train))))
        asked, asked_files = {i: train[i] for i in sorted(train.keys() - kept)}, train_files
    subjects = [
        Subject([_opened(train_files[i])], *_shape_questions(questions))
        for i, questions in train.items()
        if i in kept
    ]
    exams = [
        Exam(_opened(asked_files[i]), question) for i, questions in asked.items() for question in questions
    ]
    files = [*(train_files[i] for i in sorted(train)), *(test_files[i] for i in sorted(test))]
    questions_text = json.dumps([train, test])
    digest = _sha256([*(Path(file).read_bytes() for file in files), questions_text.encode()])
    return Task("easy-VQA", "PyPI easy-vqa 1.0 (MIT), official split", digest, subjects, exams, mirrored)


def _by_picture(columns: tuple[list[str], list[str], list[int]]) -> dict[int, list[Question]]:
    questions = defaultdict(list)
    for text, answer, picture in zip(*columns):
        questions[picture].append(Question(text, answer))
    return dict(sorted(questions.items()))


def _shape_questions(questions: Sequence[Question]) -> tuple[list[Question], list[Question]]:
    """Return the questions about colour and shape (and about both together, if known), and the yes-no questions."""
    main = [question for question in questions if question.answer not in ("yes", "no")]
    colors = [question.answer for question in main if "color" in question.text]
    shapes = [question.answer for question in main if "color" not in question.text]
    if colors and shapes:
        main = [*main, Question(WHAT, f"a {colors[0]} {shapes[0]}")]
    return main, [question for question in questions if question.answer in ("yes", "no")]


def mirrored(picture: Image.Image, random: Random) -> Image.Image:
    """The picture or one of its mirror images."""
    turn = random.choice((None, *(Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM)))
    return picture if turn is None else picture.transpose(turn)


# Digits.


def digits_task(validation: bool = False) -> Task:
    """scikit-learn's digits, white on black; a random fifth is held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = list(range(len(digits.target)))
    Random(SPLIT_SEED).shuffle(order)
    test, rest = np.split(order, [round(HELD_OUT_DIGITS * len(order))])
    asked, trained = np.split(rest, [round(VALIDATION * len(order))]) if validation else (test, rest)
    scans = [Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8)) for scan in digits.images]
    subjects = [
        Subject(
            [scans[i].resize((SIDE, SIDE), Image.Resampling.BICUBIC)], *_digit_questions(digits.target[i])
        )
        for i in trained
    ]
    exams = [
        Exam(scans[i].convert("RGB"), Question(DIGIT_QUESTIONS[0], str(digits.target[i]))) for i in asked
    ]
    digest = _sha256([digits.images.tobytes(), digits.target.tobytes()])
    return Task("digits", "scikit-learn load_digits() (UCI, CC BY 4.0)", digest, subjects, exams, scribbled)


def _digit_questions(digit: int) -> tuple[list[Question], list[Question]]:
    main = [Question(text, str(digit)) for text in DIGIT_QUESTIONS] + [Question(WHAT, f"the digit {digit}")]
    others = []
    for other in range(10):
        yes = other == digit
        others += [Question(f"is this a {other}?", "yes" if yes else "no")] * (YES_WEIGHT if yes else 1)
    return main, others


def scribbled(scan: Image.Image, random: Random) -> Image.Image:
    """A grey scan, warped; at times in a random colour on a random other."""
    scan = warped(scan, random, turn=8, zoom=0.1, shift=3)
    if random.random() < 0.7:
        return scan.convert("RGB")
    dark, light = _color(random, 0, 110), _color(random, 150, 255)
    paper, ink = random.choice(((dark, light), (light, dark)))
    return ImageOps.colorize(scan, black=paper, white=ink)


# Emoji.


def emoji_archive(folder: Path) -> Path:
    """The npm package with the emoji, packed into `folder` if it is not there.

    Raises:
        RuntimeError: npm is missing or fails.
        ValueError: the file is not the one that this was written for.
    """
    path = folder / EMOJI_FILE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", EMOJI_PACKAGE, "--silent", "--pack-destination", str(folder)]
        try:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(
                f"{' '.join(command)} failed: {error}. Put {EMOJI_FILE} into {folder}."
            ) from error
    digest = _sha256([path.read_bytes()])
    if digest != EMOJI_SHA256:
        raise ValueError(f"{path} has sha256 {digest}, expected {EMOJI_SHA256}.")
    return path


def emoji_task(archive: Path, validation: bool = False) -> Task:
    """Emoji of nine categories. Variants of one emoji (skin, gender) are held out together, or none of them."""
    with tarfile.open(archive) as package:
        files = {member.name: package.extractfile(member).read() for member in package if _is_wanted(member)}
    rows = [row for row in json.loads(files["package/emoji.json"]) if row["category"] != "Component"]

    def pictures(row: dict) -> list[Image.Image]:
        names = [row["image"], *(tone["image"] for tone in row.get("skin_variations", {}).values())]
        paths = [f"package/img/google/64/{name}" for name in names]
        return [_opened_rgba(files[path]) for path in paths if path in files]

    categories = sorted({row["category"] for row in rows})
    asked = (HELD_OUT_EMOJI, HELD_OUT_EMOJI + VALIDATION) if validation else (0.0, HELD_OUT_EMOJI)
    subjects, exams = [], []
    for row in sorted(rows, key=lambda row: row["unified"]):
        drawings, drawn = pictures(row), lot(row["unified"])
        if drawings and asked[0] <= drawn < asked[1]:
            exams.append(Exam(on_paper(drawings[0]), Question(KIND_QUESTIONS[0], row["category"])))
        elif drawings and drawn >= asked[1]:
            subjects.append(Subject(drawings, *_emoji_questions(row, categories)))
    source = f"npm {EMOJI_PACKAGE} (MIT), drawings of Noto Emoji (Apache-2.0)"
    return Task("emoji", source, _sha256([archive.read_bytes()]), subjects, exams, pasted)


def _is_wanted(member: tarfile.TarInfo) -> bool:
    return member.name == "package/emoji.json" or member.name.startswith("package/img/google/64/")


def variant_group(unified: str) -> str:
    """Return an emoji's code points without those for people, skin and gender."""
    kept = [point for point in unified.split("-") if point not in PEOPLE | MARKS]
    return "-".join(sorted(kept)) or "people"


def lot(unified: str) -> float:
    """A number from 0 to 1 that parts test and training: drawn by an emoji's group alone, whatever others there are."""
    digest = hashlib.sha256(f"{SPLIT_SEED} {variant_group(unified)}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32


def _emoji_questions(row: dict, categories: Sequence[str]) -> tuple[list[Question], list[Question]]:
    category = row["category"]
    detail = row["subcategory"].replace("-", " ")
    main = [Question(text, category) for text in KIND_QUESTIONS]
    main += [Question(DETAIL_QUESTION, detail), Question(WHAT, f"{category}: {detail}")]
    others = []
    for other in categories:
        yes = other == category
        others += [Question(f"is this {other}?", "yes" if yes else "no")] * (YES_WEIGHT if yes else 1)
    return main, others


def pasted(drawing: Image.Image, random: Random) -> Image.Image:
    """A drawing, warped, mirrored, recoloured a little, on white, black or a random colour; often partly covered."""
    if random.random() < 0.5:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    drawing = warped(drawing, random, turn=15, zoom=0.2, shift=6)
    paper = random.choice(("white", "white", "black", _color(random, 0, 255)))
    picture = on_paper(drawing, paper)
    for enhance in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
        picture = enhance(picture).enhance(random.uniform(0.6, 1.4))
    if random.random() < 0.5:
        width, height = random.randint(8, 28), random.randint(8, 28)
        corner = random.randint(0, SIDE - width), random.randint(0, SIDE - height)
        picture.paste(_color(random, 0, 255), (*corner, corner[0] + width, corner[1] + height))
    return picture


# Pictures.


def on_paper(drawing: Image.Image, paper="white") -> Image.Image:
    """A drawing with transparency, on a background of one colour, in RGB."""
    picture = Image.new("RGB", drawing.size, paper)
    picture.paste(drawing, mask=drawing.getchannel("A"))
    return picture


def warped(picture: Image.Image, random: Random, turn: float, zoom: float, shift: float) -> Image.Image:
    """Turned by up to `turn` degrees, each side scaled by 1 +- `zoom`, sheared and moved by up to `shift` pixels."""
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


def _color(random: Random, low: int, high: int) -> tuple[int, int, int]:
    return tuple(random.randint(low, high) for _ in "rgb")


def _opened(path: str | Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def _opened_rgba(content: bytes) -> Image.Image:
    from io import BytesIO

    with Image.open(BytesIO(content)) as picture:
        return picture.convert("RGBA")


def _sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


# Training samples.


class Lessons(Dataset):
    """Rows for the collator, `conversations` and `images`; row i depends on the seed and on i alone.

    A row is one picture with several questions: the first in the sandwich, so that its answer comes about as it does
    when a single question is asked, the others as further turns.
    """

    def __init__(self, tasks: Sequence[Task], shares: Sequence[float], rows: range, turns: int, seed: int):
        self.tasks, self.shares, self.rows, self.turns, self.seed = tasks, shares, rows, turns, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        random = Random(f"{self.seed} {self.rows[index]}")
        (task,) = random.choices(self.tasks, self.shares)
        subject = random.choice(task.train)
        picture = task.vary(random.choice(subject.pictures), random)
        questions = [random.choice(subject.main)] if subject.main else []
        questions += random.sample(subject.others, min(self.turns - len(questions), len(subject.others)))
        random.shuffle(questions)
        return {"conversations": conversation(questions), "images": [picture]}


def conversation(questions: Iterable[Question]) -> list[dict]:
    """LLaVA's turns, with a picture in the first."""
    turns = []
    for question in questions:
        text = question.text if turns else f"<image>\n{question.text}"
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": question.answer}]
    return turns


def all_questions(tasks: Iterable[Task]) -> list[Question]:
    """Every question with every answer that training may show or the test asks."""
    found = {question for task in tasks for exam in task.test for question in [exam.question]}
    for task in tasks:
        for subject in task.train:
            found.update(subject.main, subject.others)
    return sorted(found)
