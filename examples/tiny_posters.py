"""The posters of `train_tiny.py`: a sign, things and a small bar chart together in one picture."""

from collections.abc import Sequence
from random import Random

from PIL import Image, ImageDraw
from tiny_charts import bar_questions, draw_chart, random_bars
from tiny_data import SIDE, DrawnExams, Exam, Lesson, Question, Task, noisy, shade, without_what
from tiny_packages import Fonts, Words
from tiny_scenes import (
    ALL_KINDS,
    SHAPES,
    Kinds,
    compared_things,
    comparisons,
    counted_things,
    draw_things,
    yes_no,
)
from tiny_signs import LONGEST_NUMBER, Box, random_number, read_questions, training_text, write

TESTED = 1000
SIGN_HEIGHT = 0.3
"""Share of a poster that its sign takes."""

LONGEST = 7
"""Letters of a poster's sign at most."""

PLACES = ("largest", "smallest", "furthest left", "furthest right", "highest", "lowest")
OF_ALL = {"how many things are there?", *(f"which is {place}?" for place in PLACES)} | {
    f"which is the {place}?" for place in PLACES
}
"""Questions that a poster does not answer if it has things and bars: it is not said of which they ask."""


def posters_task(fonts: Fonts, words: Words) -> Task:
    """Return posters: a sign above or below things or a chart, or things beside a chart below a sign."""

    def lesson(random: Random) -> Lesson:
        text = training_text(random, words.train, LONGEST)
        picture, main, others = poster(text, random.choice(fonts.train), random)
        return Lesson([picture], main, others, repeats=True)

    def exam(random: Random) -> Exam:
        picture, questions = drawn_for_test(fonts, words, random)
        return Exam([picture], random.choice(questions))

    return Task(
        "posters", "drawn, with fonts and words as reading", lesson, DrawnExams("posters", TESTED, exam), ()
    )


def drawn_for_test(fonts: Fonts, words: Words, random: Random) -> tuple[Image.Image, list[Question]]:
    """Return a poster in a font and with a word that no lesson has, and all questions about it."""
    known = [word for word in words.test if len(word) <= LONGEST]
    text = random.choice(known) if random.random() < 0.7 else random_number(random, LONGEST_NUMBER)
    picture, main, others = poster(text, random.choice(fonts.test), random)
    return picture, [*main, *others]


def poster(text: str, font_file: bytes, random: Random) -> tuple[Image.Image, list[Question], list[Question]]:
    """Return a poster, the open questions about it, and those answered by yes or no."""
    paper = shade(random, 210, 255)
    picture = Image.new("RGB", (SIDE, SIDE), paper)
    strip = round(SIGN_HEIGHT * SIDE)
    above = random.random() < 0.5
    board = Box(0, 0, SIDE, strip) if above else Box(0, SIDE - strip, SIDE, SIDE)
    rest = Box(2, strip + 2, SIDE - 2, SIDE - 2) if above else Box(2, 2, SIDE - 2, SIDE - strip - 2)
    dark, light = shade(random, 0, 100), shade(random, 190, 255)
    ground, ink = (light, dark) if random.random() < 0.6 else (dark, light)
    ImageDraw.Draw(picture).rectangle(board, fill=ground)
    inner = Box(board.left + 2, board.top + 2, board.right - 2, board.bottom - 2)
    write(picture, [text], font_file, ink, random, inner, turn=4)
    main, others = list(read_questions([text], random)), []
    middle = (rest.left + rest.right) / 2
    kind = random.choice(("things", "chart", "both"))
    colors, values = random_bars(random, 3)
    if kind != "chart":
        box, kinds = rest, ALL_KINDS
        if kind == "both":  # nothing that is said of a thing is true of a bar
            box = Box(middle + 2, *rest[1:])
            kinds = Kinds(
                [s for s in SHAPES if s != "rectangle"], [c for c in kinds.colors if c not in colors]
            )
        found, denied = add_things(picture, random, box, kinds)
        main, others = main + found, others + denied
    if kind != "things":
        box = rest if kind == "chart" else Box(rest.left, rest.top, middle - 2, rest.bottom)
        draw_chart(picture, colors, values, random, box, None)
        main += bar_questions(colors, values)
    if kind == "both":
        main = [question for question in main if question.text not in OF_ALL]
    return noisy(picture, random) if random.random() < 0.3 else picture, without_what(main), others


def add_things(
    picture: Image.Image, random: Random, box: Box, kinds: Kinds
) -> tuple[Sequence[Question], Sequence[Question]]:
    """Draw things to count or to compare into a box; return the questions, open ones and those of yes or no."""
    if random.random() < 0.5:
        things, questions = counted_things(random, 5, box, kinds)
        draw_things(picture, things, random)
        return questions, []
    things = compared_things(random, box, most=2, kinds=kinds)
    draw_things(picture, things, random)
    return comparisons(things), yes_no(things)
