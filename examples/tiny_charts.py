"""The charts of `train_tiny.py`: small bar charts with coloured bars, with or without numbers on their axis."""

from collections.abc import Sequence
from random import Random

from PIL import Image, ImageDraw
from tiny_data import (
    SIDE,
    WHAT,
    DrawnExams,
    Exam,
    Lesson,
    Question,
    Task,
    near,
    noisy,
    shade,
    without_what,
)
from tiny_packages import Fonts
from tiny_scenes import COLORS
from tiny_signs import Box, sized_font

MOST_BARS, TOP = 4, 10
TESTED = 1000


def charts_task(fonts: Fonts) -> Task:
    """Return bar charts of two to four bars of different colours with values from 1 to 10."""

    def drawn(random: Random, files: Sequence[bytes]) -> tuple[Image.Image, list[Question]]:
        colors, values = random_bars(random, MOST_BARS)
        picture = Image.new("RGB", (SIDE, SIDE), shade(random, 235, 255))
        margin = [random.randint(1, 4) for _ in range(4)]
        box = Box(margin[0], margin[1] + 4, SIDE - margin[2], SIDE - margin[3])
        draw_chart(picture, colors, values, random, box, random.choice(files))
        picture = noisy(picture, random) if random.random() < 0.3 else picture
        return picture, [*value_questions(colors, values), *bar_questions(colors, values)]

    def lesson(random: Random) -> Lesson:
        picture, questions = drawn(random, fonts.train)
        return Lesson([picture], questions)

    def exam(random: Random) -> Exam:
        picture, questions = drawn(random, fonts.test)
        return Exam([picture], random.choice(without_what(questions)))

    colors, values = sorted(COLORS), [*range(1, TOP + 1)] * 2
    wording = [*value_questions(colors, values), *bar_questions(colors, values)]
    wording += [Question("", f"the {color} bar") for color in colors]
    return Task("charts", "drawn", lesson, DrawnExams("charts", TESTED, exam), wording)


def random_bars(random: Random, most: int) -> tuple[list[str], list[int]]:
    """Return colours and values of two to `most` bars; no two are equal."""
    colors = random.sample(sorted(COLORS), random.randint(2, most))
    return colors, random.sample(range(1, TOP + 1), len(colors))


def value_questions(colors: Sequence[str], values: Sequence[int]) -> list[Question]:
    """Return the questions whose answers are read off the axis."""
    return [
        Question(f"what is the value of the {color} bar?", str(value)) for color, value in zip(colors, values)
    ]


def bar_questions(colors: Sequence[str], values: Sequence[int]) -> list[Question]:
    """Return the questions that need no axis."""
    by_value = [color for _, color in sorted(zip(values, colors))]
    return [
        Question("which bar is the tallest?", f"the {by_value[-1]} bar"),
        Question("which bar is the shortest?", f"the {by_value[0]} bar"),
        Question("how many bars are there?", str(len(colors))),
        Question(WHAT, f"{len(colors)} bars"),
    ]


def draw_chart(
    picture: Image.Image,
    colors: Sequence[str],
    values: Sequence[int],
    random: Random,
    box: Box,
    font_file: bytes | None,
) -> None:
    """Draw a bar chart into a box. With a font its axis has a line and a number at every other value."""
    draw = ImageDraw.Draw(picture)
    left, top, right, bottom = box
    if font_file:
        left, bottom = left + 13, bottom - 5
    height = (bottom - top) / TOP
    if font_file:
        font = sized_font(font_file, 10)
        for tick in range(0, TOP + 1, 2):
            y = bottom - tick * height
            draw.line((left, y, right, y), fill=(205, 205, 205))
            draw.text((left - 2, y), str(tick), fill=(60, 60, 60), font=font, anchor="rm")
    step = (right - left) / len(colors)
    width = step * random.uniform(0.5, 0.8)
    for number, (color, value) in enumerate(zip(colors, values)):
        middle = left + (number + 0.5) * step
        bar = (middle - width / 2, bottom - value * height, middle + width / 2, bottom)
        draw.rectangle(bar, fill=near(COLORS[color], random))
    draw.line((left, top, left, bottom), fill=(60, 60, 60))
    draw.line((left, bottom, right, bottom), fill=(60, 60, 60))
