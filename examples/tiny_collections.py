"""The tasks of `train_tiny.py` whose pictures come from packages: easy-VQA, digits and emoji.

easy-VQA (PyPI `easy-vqa`, MIT): one coloured shape a picture, with its official split. scikit-learn's digits: 1,797
scans of 8 x 8 pixels. Emoji (npm): pictures with names and categories, see `tiny_packages`.
"""

import io
import json
import tarfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from tiny_data import SIDE, WHAT, Exam, Lesson, Question, Task, on_paper, shade, warped
from tiny_packages import EMOJI, lot, sha256_of

SPLIT_SEED = 0
HELD_OUT_DIGITS, HELD_OUT_EMOJI = 0.2, 0.15
VALIDATION = 0.1
"""Share of the training pictures that a task uses for validation if `validation=True`."""

DIGIT_QUESTIONS = ("what digit is this?", "which number is in the image?", "what number is shown?")
KIND_QUESTIONS = ("what kind of emoji is this?", "which category is this?", "what kind of thing is this?")
DETAIL_QUESTION = "which kind exactly?"
YES_WEIGHT = 4
"""How often a question with the answer yes is repeated among a picture's questions that differ in one word."""

EMOJI_SIDE = 64
PEOPLE = {"1F466", "1F467", "1F468", "1F469", "1F474", "1F475", "1F476", "1F9D1", "1F9D2", "1F9D3"}
MARKS = {"200D", "FE0F", "2640", "2642", "27A1"} | {f"1F3F{tone}" for tone in "BCDEF"}
"""Code points that make a variant of an emoji: joiners, gender, direction, skin tones."""


def collected_task(
    name: str,
    source: str,
    sha256: str,
    subjects: Sequence[Lesson],
    test: Sequence[Exam],
    vary: Callable[[Image.Image, Random], Image.Image],
) -> Task:
    """Return a task with a given number of subjects, each with several pictures of which a lesson shows one, varied."""

    def lesson(random: Random) -> Lesson:
        subject = random.choice(subjects)
        picture = vary(random.choice(subject.pictures), random)
        return Lesson([picture], subject.main, subject.others)

    wording = {question for subject in subjects for question in (*subject.main, *subject.others)}
    wording |= {exam.question for exam in test}
    return Task(name, source, lesson, test, sorted(wording), sha256, subjects)


# easy-VQA.


def easy_vqa_task(validation: bool = False) -> Task:
    """Return easy-VQA in its official split; pictures are mirrored while training, which no answer depends on."""
    import easy_vqa

    train, test = (_by_picture(q) for q in (easy_vqa.get_train_questions(), easy_vqa.get_test_questions()))
    train_files, test_files = easy_vqa.get_train_image_paths(), easy_vqa.get_test_image_paths()
    asked, asked_files, kept = test, test_files, set(train)
    if validation:
        kept -= set(Random(SPLIT_SEED).sample(sorted(train), round(VALIDATION * len(train))))
        asked, asked_files = {i: train[i] for i in sorted(train.keys() - kept)}, train_files
    subjects = [
        Lesson([_opened(train_files[i])], *_shape_questions(questions))
        for i, questions in train.items()
        if i in kept
    ]
    exams = [
        Exam([_opened(asked_files[i])], question) for i, questions in asked.items() for question in questions
    ]
    files = [*(train_files[i] for i in sorted(train)), *(test_files[i] for i in sorted(test))]
    questions_text = json.dumps([train, test])
    digest = sha256_of([*(Path(file).read_bytes() for file in files), questions_text.encode()])
    source = "PyPI easy-vqa 1.0 (MIT), official split"
    return collected_task("easy-VQA", source, digest, subjects, exams, mirrored)


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
    """Return the picture or one of its mirror images."""
    turn = random.choice((None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM))
    return picture if turn is None else picture.transpose(turn)


# Digits.


def digits_task(validation: bool = False) -> Task:
    """Return scikit-learn's digits, white on black; a random fifth is held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = list(range(len(digits.target)))
    Random(SPLIT_SEED).shuffle(order)
    test, rest = np.split(order, [round(HELD_OUT_DIGITS * len(order))])
    asked, trained = np.split(rest, [round(VALIDATION * len(order))]) if validation else (test, rest)
    scans = [Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8)) for scan in digits.images]
    subjects = [
        Lesson([scans[i].resize((SIDE, SIDE), Image.Resampling.BICUBIC)], *_digit_questions(digits.target[i]))
        for i in trained
    ]
    exams = [
        Exam([scans[i].convert("RGB")], Question(DIGIT_QUESTIONS[0], str(digits.target[i]))) for i in asked
    ]
    digest = sha256_of([digits.images.tobytes(), digits.target.tobytes()])
    source = "scikit-learn load_digits() (UCI, CC BY 4.0)"
    return collected_task("digits", source, digest, subjects, exams, scribbled)


def _digit_questions(digit: int) -> tuple[list[Question], list[Question]]:
    main = [Question(text, str(digit)) for text in DIGIT_QUESTIONS] + [Question(WHAT, f"the digit {digit}")]
    others = []
    for other in range(10):
        yes = other == digit
        others += [Question(f"is this a {other}?", "yes" if yes else "no")] * (YES_WEIGHT if yes else 1)
    return main, others


def scribbled(scan: Image.Image, random: Random) -> Image.Image:
    """Return a grey scan, warped; at times in a random colour on a random other."""
    scan = warped(scan, random, turn=8, zoom=0.1, shift=scan.width / 20)
    if random.random() < 0.7:
        return scan.convert("RGB")
    dark, light = shade(random, 0, 110), shade(random, 150, 255)
    paper, ink = random.choice(((dark, light), (light, dark)))
    return ImageOps.colorize(scan, black=paper, white=ink)


# Emoji.


def emoji_task(archive: Path, validation: bool = False) -> Task:
    """Return emoji of nine categories. Variants of one (skin, gender) are held out together, or none of them."""
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
        drawings, drawn = pictures(row), lot(variant_group(row["unified"]))
        if drawings and asked[0] <= drawn < asked[1]:
            exams.append(Exam([on_paper(drawings[0])], Question(KIND_QUESTIONS[0], row["category"])))
        elif drawings and drawn >= asked[1]:
            subjects.append(Lesson(drawings, *_emoji_questions(row, categories)))
    source = f"npm {EMOJI.name}@{EMOJI.version} (MIT), drawings of Noto Emoji (Apache-2.0)"
    return collected_task("emoji", source, sha256_of([archive.read_bytes()]), subjects, exams, pasted)


def _is_wanted(member: tarfile.TarInfo) -> bool:
    return member.name == "package/emoji.json" or member.name.startswith("package/img/google/64/")


def variant_group(unified: str) -> str:
    """Return an emoji's code points without those for people, skin and gender."""
    kept = [point for point in unified.split("-") if point not in PEOPLE | MARKS]
    return "-".join(sorted(kept)) or "people"


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
    """Return a drawing, warped, mirrored, recoloured, on white, black or a random colour; often partly covered."""
    if random.random() < 0.5:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    drawing = warped(drawing, random, turn=15, zoom=0.2, shift=6)
    paper = random.choice(("white", "white", "black", shade(random, 0, 255)))
    picture = on_paper(drawing, paper)
    for enhance in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
        picture = enhance(picture).enhance(random.uniform(0.6, 1.4))
    if random.random() < 0.5:
        width, height = random.randint(8, 28), random.randint(8, 28)
        corner = random.randint(0, EMOJI_SIDE - width), random.randint(0, EMOJI_SIDE - height)
        picture.paste(shade(random, 0, 255), (*corner, corner[0] + width, corner[1] + height))
    return picture


def _opened(path: str | Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def _opened_rgba(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content)) as picture:
        return picture.convert("RGBA")
