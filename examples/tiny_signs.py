"""The reading task of `train_tiny.py`: signs with words in capitals and numbers, in colours, turned, on noisy grounds.

Letters are learned, not words: a third of the training's texts are random letters. A sign of several lines teaches
more at the same cost; the test asks about signs of one line, in fonts of other families and with words that no lesson
has.
"""

import io
import string
from collections.abc import Sequence
from functools import cache
from math import cos, radians, sin
from random import Random
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont
from tiny_data import SIDE, WHAT, DrawnExams, Exam, Lesson, Question, Task, noisy, shade
from tiny_packages import Fonts, Words, is_test_word

LONGEST_WORD, LONGEST_NUMBER = 8, 5
MOST_LINES = 4
TURN = 15
"""Degrees by which a sign is turned at most."""

SMALLEST, LARGEST = 10, 34
"""Sizes of the letters, in pixels from ascender to descender."""

READ_QUESTIONS = ("what does the sign say?", "what is written here?", "read the sign.")
ORDINALS = ("first", "second", "third", "fourth")
TESTED = 1000


class Box(NamedTuple):
    """A part of a picture, in pixels."""

    left: float
    top: float
    right: float
    bottom: float


WHOLE = Box(1, 1, SIDE - 1, SIDE - 1)


def reading_task(
    fonts: Fonts, words: Words, longest: int = LONGEST_WORD, most_lines: int = MOST_LINES
) -> Task:
    """Return the task; lessons with texts of at most `longest` letters and signs of at most `most_lines` lines."""

    def lesson(random: Random) -> Lesson:
        lines = [training_text(random, words.train, longest) for _ in range(random.randint(1, most_lines))]
        picture = sign(lines, random.choice(fonts.train), random)
        others = [Question(WHAT, "a sign")] if random.random() < 0.2 else []
        return Lesson([picture], read_questions(lines, random), others)

    def exam(random: Random) -> Exam:
        text = random.choice(words.test) if random.random() < 0.7 else random_number(random, LONGEST_NUMBER)
        (question,) = read_questions([text], random)
        return Exam([sign([text], random.choice(fonts.test), random)], question)

    source = "drawn, with Google Fonts and SCOWL's words from npm"
    return Task("reading", source, lesson, DrawnExams("reading", TESTED, exam), reading_words())


def training_text(random: Random, words: Sequence[str], longest: int) -> str:
    """Return a word or a part of one, random letters, or a number, but no word that is held out."""
    while len(text := _any_text(random, words, longest)) > 1 and is_test_word(text):
        pass
    return text


def _any_text(random: Random, words: Sequence[str], longest: int) -> str:
    kind = random.random()
    if kind < 0.45:
        word = random.choice(words)
        start = random.randint(0, max(0, len(word) - longest))
        return word[start : start + longest]
    if kind < 0.75:
        return "".join(random.choices(string.ascii_uppercase, k=random.randint(1, longest)))
    return random_number(random, min(longest, LONGEST_NUMBER))


def random_number(random: Random, longest: int) -> str:
    digits = random.randint(1, longest)
    return str(random.randint(10 ** (digits - 1), 10**digits - 1))


def read_questions(lines: Sequence[str], random: Random) -> list[Question]:
    """Return a question about all of a sign, or one for each of its lines."""
    if len(lines) == 1:
        return [Question(random.choice(READ_QUESTIONS), sentence(lines[0]))]
    if random.random() < 0.6:
        return [Question(random.choice(READ_QUESTIONS), ", ".join(lines) + ".")]
    return [
        Question(f"what does the {ordinal} line say?", sentence(line))
        for ordinal, line in zip(ORDINALS, lines)
    ]


def sentence(text: str) -> str:
    return f"The {'number' if text.isdigit() else 'word'} is {text}."


def reading_words() -> list[Question]:
    """Return questions and answers without any text of a sign, which a model spells in single bytes.

    With texts the vocabulary would have tokens of several letters, and each letter twice, with and without a space.
    """
    asked = [*READ_QUESTIONS, *(f"what does the {ordinal} line say?" for ordinal in ORDINALS)]
    return [Question(text, f"The {kind} is") for text in asked for kind in ("word", "number")] + [
        Question(WHAT, "a sign")
    ]


# Drawing.


def sign(lines: Sequence[str], font_file: bytes, random: Random, box: Box = WHOLE) -> Image.Image:
    """Return a picture with lines of text somewhere in a box, in dark ink on light paper or the other way round."""
    dark, light = shade(random, 0, 100), shade(random, 165, 255)
    paper, ink = (light, dark) if random.random() < 0.7 else (dark, light)
    picture = Image.new("RGB", (SIDE, SIDE), paper)
    write(picture, lines, font_file, ink, random, box)
    return noisy(picture, random) if random.random() < 0.5 else picture


def write(
    picture: Image.Image,
    lines: Sequence[str],
    font_file: bytes,
    ink: tuple[int, int, int],
    random: Random,
    box: Box,
    turn: float = TURN,
) -> None:
    """Write lines into a box of a picture, turned by up to `turn` degrees; none of their ends leaves the picture."""
    size = letter_size(lines, font_file, box, random)
    font = sized_font(font_file, size)
    gap = random.uniform(1.0, 1.2) * size
    extents = [
        font.getbbox(line, anchor="ls") for line in lines
    ]  # (left, top, right, bottom) of the baseline's start
    width = max(right - left for left, _, right, _ in extents)
    rise = -min(top for _, top, _, _ in extents)
    height = rise + gap * (len(lines) - 1)
    layer = Image.new("L", picture.size)
    draw = ImageDraw.Draw(layer)
    left = box.left + random.random() * max(0, box.right - box.left - width)
    top = box.top + random.random() * max(0, box.bottom - box.top - height)
    centered = random.random() < 0.5
    for number, (line, extent) in enumerate(zip(lines, extents)):
        spare = (width - extent[2] + extent[0]) / 2 if centered else 0
        draw.text((left + spare - extent[0], top + rise + number * gap), line, 255, font, anchor="ls")
    middle = (left + width / 2, top + height / 2)
    limit = turning_room(Box(left, top, left + width, top + height), picture.size, turn)
    layer = layer.rotate(random.uniform(-limit, limit), Image.Resampling.BICUBIC, center=middle)
    picture.paste(ink, mask=layer)


def letter_size(lines: Sequence[str], font_file: bytes, box: Box, random: Random) -> int:
    """Return a size with which the lines fill most of a box's width, or its height, or are the largest there are."""
    widest = max(sized_font(font_file, 32).getlength(line) for line in lines) / 32
    width = random.uniform(0.65, 0.97) * (box.right - box.left) / widest
    height = (box.bottom - box.top) / (1.2 * len(lines))
    return round(max(SMALLEST, min(width, height, LARGEST)))


def turning_room(box: Box, size: tuple[int, int], turn: float) -> float:
    """Return by how many degrees, `turn` at most, a box may be turned about its middle within a picture."""
    half_width, half_height = (box.right - box.left) / 2, (box.bottom - box.top) / 2
    x, y = box.left + half_width, box.top + half_height
    room_x, room_y = min(x, size[0] - x), min(y, size[1] - y)
    while turn > 0:
        c, s = cos(radians(turn)), sin(radians(turn))
        if half_width * c + half_height * s <= room_x and half_width * s + half_height * c <= room_y:
            break
        turn -= 1
    return max(turn, 0)


@cache
def sized_font(font_file: bytes, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(io.BytesIO(font_file), size)
