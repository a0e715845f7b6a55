"""Write a page with pictures that the model in the package is asked about: questions, answers and what is right.

    python examples/tiny_page.py --page docs/bundled-model.md
    python examples/tiny_page.py --poster docs/poster.png              # the README's picture

Two test questions of each task are chosen by their numbers before the model answers, so that good and bad answers are
shown alike.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Annotated

import typer
from evaluate_tiny import answers
from PIL import Image
from tiny_data import SIDE, Exam, Question
from tiny_packages import fonts, words
from tiny_posters import drawn_for_test
from tiny_signs import LONGEST_WORD
from tiny_tasks import all_tasks
from transformers import AutoModelForImageTextToText, AutoProcessor

from visualrwkv_hf import bundled_model

NUMBERS = (0, 12)
"""Which exams of each task are shown: the first two whose questions differ in each task."""

POSTER = 1
"""Number of the README's picture among those that `poster_of` draws."""

GAP = 4


def strip(exam: Exam) -> Image.Image:
    """Return an exam's pictures side by side."""
    sheet = Image.new("RGB", (len(exam.pictures) * (SIDE + GAP) - GAP, SIDE), "white")
    for number, picture in enumerate(exam.pictures):
        sheet.paste(picture.convert("RGB").resize((SIDE, SIDE)), (number * (SIDE + GAP), 0))
    return sheet


def page_rows(exams: Sequence[Exam], said: Sequence[str], folder: Path) -> list[str]:
    """Save the pictures and return the rows of a table, in Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["| picture | question | answer | right would be |", "|---|---|---|---|"]
    for number, (exam, answer) in enumerate(zip(exams, said)):
        file = folder / f"{number:02}.png"
        strip(exam).save(file, optimize=True)
        right = "" if answer == exam.question.answer else exam.question.answer
        rows.append(
            f"| ![picture {number}]({folder.name}/{file.name}) | {exam.question.text} | {answer} | {right} |"
        )
    return rows


def poster_of(number: int, data_dir: Path) -> tuple[Image.Image, list[Question]]:
    """Return a poster with a word, things and a chart, drawn as those of the test, and all questions about it."""
    files, known_words = fonts(data_dir), words(data_dir, LONGEST_WORD)
    random = Random(f"poster {number}")
    while True:
        picture, questions = drawn_for_test(files, known_words, random)
        asked = " ".join(question.text + question.answer for question in questions)
        if "The word is" in asked and "bar is the tallest" in asked and "which is larger" in asked:
            return picture, questions


def main(
    page: Annotated[
        Path | None, typer.Option(help="Page whose table of pictures, between two comments, is replaced.")
    ] = None,
    poster: Annotated[Path | None, typer.Option(help="File for the README's picture.")] = None,
    data_dir: Annotated[Path, typer.Option(help="Folder for fonts, words and emoji.")] = Path("tiny-data"),
    model: Annotated[Path | None, typer.Option(help="Folder. Default: the model in the package.")] = None,
) -> None:
    if poster:
        picture, questions = poster_of(POSTER, data_dir)
        picture.save(poster, optimize=True)
        print(*(f"{question.text} {question.answer}" for question in questions), sep="\n")
    if page is None:
        return
    folder = model or bundled_model()
    exams = [task.test[number] for task in all_tasks(data_dir).values() for number in NUMBERS]
    loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    said = answers(loaded, AutoProcessor.from_pretrained(folder), exams)
    rows = page_rows(exams, said, page.with_suffix(""))
    before, mark, rest = page.read_text(encoding="utf-8").partition("<!-- pictures -->\n")
    if not mark:
        sys.exit(f"{page} has no line <!-- pictures -->.")
    _, _, after = rest.partition("<!-- end of pictures -->\n")
    table = "\n".join(rows)
    page.write_text(
        f"{before}<!-- pictures -->\n{table}\n<!-- end of pictures -->\n{after}", encoding="utf-8"
    )


if __name__ == "__main__":
    typer.run(main)
