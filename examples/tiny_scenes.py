"""The drawn scenes of `train_tiny.py`: shapes at any angle, things to count and to compare, and several frames."""

import math
from collections.abc import Sequence
from itertools import combinations
from random import Random
from typing import NamedTuple

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
from tiny_signs import WHOLE, Box

TESTED = 1000

COLORS = {
    "red": (216, 40, 40),
    "green": (34, 150, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 205, 40),
    "orange": (245, 130, 30),
    "purple": (140, 60, 180),
    "black": (25, 25, 25),
    "brown": (125, 80, 45),
}
"""Name of a colour -> its middle, from which each drawing differs a little."""

SHAPES = ("circle", "rectangle", "triangle", "star")
MOST = 9
"""The largest number of things to count."""

SIZE_RATIO = 1.4
"""How many times as wide each thing is as the next smaller one, where sizes are compared."""


class Thing(NamedTuple):
    """A drawn shape. `x` and `y` are its middle, `size` is the diameter of a circle around it, in pixels."""

    shape: str
    color: str
    x: float
    y: float
    size: float
    angle: float
    """In degrees."""
    aspect: float = 0.6
    """Of a rectangle: 1 is a square, and less is more slender."""

    @property
    def name(self) -> str:
        return f"the {self.color} {self.shape}"


# Drawing.


def scene(things: Sequence[Thing], random: Random) -> Image.Image:
    """Return a picture of things on a light ground."""
    picture = Image.new("RGB", (SIDE, SIDE), shade(random, 205, 255))
    draw_things(picture, things, random)
    return noisy(picture, random) if random.random() < 0.3 else picture


def draw_things(picture: Image.Image, things: Sequence[Thing], random: Random) -> None:
    """Draw things with smooth edges."""
    scale = 3
    for thing in things:
        points = [(scale * x, scale * y) for x, y in outline(thing)]
        mask = Image.new("L", (scale * SIDE, scale * SIDE))
        ImageDraw.Draw(mask).polygon(points, fill=255)
        picture.paste(near(COLORS[thing.color], random), mask=mask.reduce(scale))


def outline(thing: Thing) -> list[tuple[float, float]]:
    """Return the corners of a thing, (x, y) in pixels."""
    radius, turn = thing.size / 2, math.radians(thing.angle)
    if thing.shape == "rectangle":
        half = math.pi / 4 * thing.aspect
        angles, radii = [half, math.pi - half, math.pi + half, -half], [radius] * 4
    elif thing.shape == "star":
        angles, radii = [math.pi * i / 5 for i in range(10)], [radius, 0.42 * radius] * 5
    else:
        corners = {"circle": 40, "triangle": 3}[thing.shape]
        angles = [2 * math.pi * i / corners for i in range(corners)]
        radii = [radius * (0.85 if thing.shape == "circle" else 1)] * corners
    return [
        (thing.x + r * math.cos(a + turn), thing.y + r * math.sin(a + turn)) for a, r in zip(angles, radii)
    ]


def random_thing(random: Random, shape: str, color: str, x: float, y: float, size: float) -> Thing:
    return Thing(shape, color, x, y, size, random.uniform(0, 360), random.uniform(0.6, 1))


def free_places(
    random: Random, sizes: Sequence[float], box: Box = WHOLE
) -> tuple[list[tuple[float, float]], Sequence[float]]:
    """Return a middle (x, y) for each size, such that no two things touch and none leaves the box, and the sizes.

    Sizes that leave no such places are made smaller, all alike.
    """
    while True:
        for _ in range(20):
            places: list[tuple[float, float]] = []
            for size in sizes:
                place = _place(random, size, places, sizes, box)
                if place is None:
                    break
                places.append(place)
            else:
                return places, sizes
        sizes = [0.95 * size for size in sizes]


def _place(
    random: Random,
    size: float,
    places: Sequence[tuple[float, float]],
    sizes: Sequence[float],
    box: Box,
) -> tuple[float, float] | None:
    for _ in range(40):
        x = random.uniform(box.left + 0.5 * size, box.right - 0.5 * size)
        y = random.uniform(box.top + 0.5 * size, box.bottom - 0.5 * size)
        if all(_are_separate((x, y), size, other, s) for other, s in zip(places, sizes)):
            return x, y
    return None


def _are_separate(
    place: tuple[float, float], size: float, other: tuple[float, float], other_size: float
) -> bool:
    """Return whether two things with these middles do not touch and leave a little room."""
    return math.dist(place, other) > 0.53 * (size + other_size)


# One shape.


def turned_task() -> Task:
    """Return one large shape at any angle, asked about as easy-VQA asks; half of the test's are triangles."""

    def drawn(random: Random, shape: str) -> tuple[Image.Image, list[Question]]:
        color, size = random.choice(sorted(COLORS)), random.uniform(0.35, 0.85) * SIDE
        ((x, y),), _ = free_places(random, [size])
        return scene([random_thing(random, shape, color, x, y, size)], random), shape_questions(shape, color)

    def lesson(random: Random) -> Lesson:
        picture, questions = drawn(random, random.choice((*SHAPES, "triangle")))
        return Lesson([picture], questions)

    def exam(random: Random) -> Exam:
        others = [shape for shape in SHAPES if shape != "triangle"]
        picture, questions = drawn(random, random.choice(["triangle"] * len(others) + others))
        return Exam([picture], questions[0])

    wording = [question for shape in SHAPES for color in COLORS for question in shape_questions(shape, color)]
    return Task("triangles", "drawn", lesson, DrawnExams("triangles", 500, exam), wording)


def shape_questions(shape: str, color: str) -> list[Question]:
    """Return easy-VQA's open questions."""
    return [
        Question("what shape is in the image?", shape),
        Question("what color is the shape?", color),
        Question(WHAT, f"{article(color)} {color} {shape}"),
    ]


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


# Counting.


def counting_task() -> Task:
    """Return one to nine things of a kind, at times some of them of another colour."""

    def lesson(random: Random) -> Lesson:
        things, questions = counted_things(random)
        return Lesson([scene(things, random)], questions)

    def exam(random: Random) -> Exam:
        things, questions = counted_things(random)
        return Exam([scene(things, random)], random.choice(without_what(questions)))

    numbers = range(1, MOST + 1)
    wording = [Question(f"how many {color} things are there?", str(n)) for color in COLORS for n in numbers]
    wording += [Question(f"how many {shape}s are there?", "1") for shape in SHAPES]
    wording += [Question("how many things are there?", "1")]
    return Task("counting", "drawn", lesson, DrawnExams("counting", TESTED, exam), wording)


class Kinds(NamedTuple):
    """Which things there may be."""

    shapes: Sequence[str] = SHAPES
    colors: Sequence[str] = tuple(sorted(COLORS))


ALL_KINDS = Kinds()


def counted_things(
    random: Random, most: int = MOST, box: Box = WHOLE, kinds: Kinds = ALL_KINDS
) -> tuple[list[Thing], list[Question]]:
    """Return things of one shape and of one or two colours, and the questions how many there are."""
    shape = random.choice(kinds.shapes)
    color, other = random.sample(kinds.colors, 2)
    total = random.randint(1, most)
    counted = total if random.random() < 0.5 else random.randint(1, total)
    colors = [color] * counted + [other] * (total - counted)
    size = random.uniform(0.15, 0.22) * SIDE
    places, sizes = free_places(random, [size] * total, box)
    things = [
        random_thing(random, shape, c, x, y, size * random.uniform(0.85, 1))
        for c, (x, y), size in zip(colors, places, sizes)
    ]
    questions = [
        Question(random.choice((f"how many {shape}s are there?", "how many things are there?")), str(total)),
        Question(WHAT, f"{total} {shape}s" if total > 1 else f"{article(shape)} {shape}"),
    ]
    if counted < total:
        questions.append(Question(f"how many {color} things are there?", str(counted)))
        questions.append(Question(f"how many {other} things are there?", str(total - counted)))
    return things, questions


# Comparing.


def comparing_task() -> Task:
    """Return two or three things that differ in shape, colour, size and place."""

    def drawn(random: Random) -> tuple[list[Thing], Image.Image]:
        things = compared_things(random)
        return things, scene(things, random)

    def lesson(random: Random) -> Lesson:
        things, picture = drawn(random)
        return Lesson([picture], comparisons(things), yes_no(things), repeats=True)

    def exam(random: Random) -> Exam:
        things, picture = drawn(random)
        return Exam([picture], random.choice(without_what(comparisons(things)) + yes_no(things)))

    wording = []
    for shape in SHAPES:
        for color in COLORS:
            things = [Thing(shape, color, 1, 2, 2, 0), Thing("star", "red", 2, 1, 1, 0)]
            wording += comparisons(things) + comparisons(things[::-1]) + yes_no(things) + yes_no(things[::-1])
    return Task("comparing", "drawn", lesson, DrawnExams("comparing", TESTED, exam), wording)


def compared_things(random: Random, box: Box = WHOLE, most: int = 3, kinds: Kinds = ALL_KINDS) -> list[Thing]:
    """Return two things, or up to `most`, whose sizes and places differ plainly."""
    number = random.randint(2, most)
    shapes, colors = random.sample(kinds.shapes, number), random.sample(kinds.colors, number)
    largest = random.uniform(0.38, 0.48) * min(box.right - box.left, 1.5 * (box.bottom - box.top))
    sizes = [largest / SIZE_RATIO**step for step in range(number)]
    random.shuffle(sizes)
    while True:
        places, drawn_sizes = free_places(random, sizes, box)
        things = [
            random_thing(random, shape, color, x, y, size)
            for shape, color, size, (x, y) in zip(shapes, colors, drawn_sizes, places)
        ]
        if all(are_plainly_apart(a, b) for a, b in combinations(things, 2)):
            return things


def are_plainly_apart(a: Thing, b: Thing) -> bool:
    """Return whether the middles of two things are in the same order as their edges, across and down."""
    needed = abs(a.size - b.size) / 2 + 3
    return min(abs(a.x - b.x), abs(a.y - b.y)) > needed


def comparisons(things: Sequence[Thing]) -> list[Question]:
    """Return the open questions about things, with one right answer each."""
    by_size, by_x, by_y = (
        sorted(things, key=lambda thing: getattr(thing, key)) for key in ("size", "x", "y")
    )
    questions = [Question(f"what color is the {thing.shape}?", thing.color) for thing in things]
    questions += [Question(f"what shape is {thing.color}?", thing.shape) for thing in things]
    questions += [
        Question("which is the largest?", by_size[-1].name),
        Question("which is the smallest?", by_size[0].name),
        Question("which is furthest left?", by_x[0].name),
        Question("which is furthest right?", by_x[-1].name),
        Question("which is highest?", by_y[0].name),
        Question("which is lowest?", by_y[-1].name),
        Question(WHAT, ", ".join(f"{article(thing.color)} {thing.color} {thing.shape}" for thing in by_x)),
    ]
    for a, b in combinations(things, 2):
        pair = f"{a.name} or {b.name}?"
        questions += [
            Question(f"which is larger, {pair}", (a if a.size > b.size else b).name),
            Question(f"which is further left, {pair}", (a if a.x < b.x else b).name),
            Question(f"which is higher, {pair}", (a if a.y < b.y else b).name),
        ]
    return questions


def yes_no(things: Sequence[Thing]) -> list[Question]:
    """Return the questions about two things that are answered by yes or no."""
    questions = []
    for a, b in combinations(things, 2):
        for word, holds in (
            ("above", a.y < b.y),
            ("left of", a.x < b.x),
            ("larger than", a.size > b.size),
        ):
            questions.append(Question(f"is {a.name} {word} {b.name}?", "yes" if holds else "no"))
    return questions


# Frames.

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PLACES = ("the first", "the second", "the third")


def frames_task() -> Task:
    """Return frames of moving things, pictures of which one differs, and pictures in which some things change."""
    kinds = (moving, different, changed)

    def lesson(random: Random) -> Lesson:
        kind = random.choice(kinds)
        return moving(random, random.randint(1, 3)) if kind is moving else kind(random)

    def exam(random: Random) -> Exam:
        drawn = random.choice(kinds)(random)
        return Exam(drawn.pictures, drawn.main[0])

    wording = [Question(f"which way does the {shape} move?", way) for shape in SHAPES for way in DIRECTIONS]
    wording += [Question("which picture is different?", place) for place in PLACES]
    wording += [Question("how many circles changed color?", str(n)) for n in range(1, 6)]
    wording += [what_is_in(place, "star", color) for place in PLACES for color in COLORS]
    wording += [count_in_second(color, 1) for color in COLORS]
    wording += [are_alike(*pair, same) for pair in combinations(PLACES, 2) for same in (True, False)]
    return Task("frames", "drawn", lesson, DrawnExams("frames", 600, exam), wording)


def what_is_in(place: str, shape: str, color: str) -> Question:
    return Question(f"what is in {place} picture?", f"{article(color)} {color} {shape}")


def count_in_second(color: str, number: int) -> Question:
    return Question(f"how many {color} things are in the second picture?", str(number))


def are_alike(place: str, other: str, same: bool) -> Question:
    return Question(f"do {place} and {other} picture show the same?", "yes" if same else "no")


def moving(random: Random, number: int = 1) -> Lesson:
    """Return three frames of moving things and ask which way each moves; then colours and shapes."""
    shapes, colors = random.sample(SHAPES, number), random.sample(sorted(COLORS), number)
    while True:
        paths = [_path(random, *kind) for kind in zip(shapes, colors)]
        frames = [[frame[i] for frame, _ in paths] for i in range(3)]
        pairs = [pair for things in frames for pair in combinations(things, 2)]
        if all(_are_separate((a.x, a.y), a.size, (b.x, b.y), b.size) for a, b in pairs):
            break
    seed = random.random()
    main = [Question(f"which way does the {shape} move?", way) for shape, (_, way) in zip(shapes, paths)]
    others = [Question(f"what color is the {shape}?", color) for shape, color in zip(shapes, colors)]
    others += [Question(f"what shape is {color}?", shape) for shape, color in zip(shapes, colors)]
    return Lesson([scene(things, Random(seed)) for things in frames], main, others, repeats=True)


def _path(random: Random, shape: str, color: str) -> tuple[list[Thing], str]:
    """Return a thing in three frames, and which way it moves."""
    size, step = random.uniform(0.2, 0.3) * SIDE, random.uniform(0.12, 0.22) * SIDE
    way, (dx, dy) = random.choice(sorted(DIRECTIONS.items()))
    room = [(0.5 * size + 2 * max(0, -d * step), SIDE - 0.5 * size - 2 * max(0, d * step)) for d in (dx, dy)]
    x, y = (random.uniform(*ends) for ends in room)
    thing = random_thing(random, shape, color, x, y, size)
    return [thing._replace(x=x + i * dx * step, y=y + i * dy * step) for i in range(3)], way


def different(random: Random) -> Lesson:
    """Return three pictures, two of one kind of thing and one of another, and the question which is different.

    After it come questions about each picture and about each two, which teach what is needed for it.
    """
    shape, other = random.sample(SHAPES, 2)
    color, wrong = random.sample(sorted(COLORS), 2)
    odd, place = random.choice(((other, color), (shape, wrong))), random.randrange(3)
    pictures, questions = [], [Question("which picture is different?", PLACES[place])]
    for number in range(3):
        kind = odd if number == place else (shape, color)
        questions.append(what_is_in(PLACES[number], *kind))
        size = random.uniform(0.35, 0.6) * SIDE
        ((x, y),), _ = free_places(random, [size])
        pictures.append(scene([random_thing(random, *kind, x, y, size)], random))
    pairs = [are_alike(*pair, PLACES[place] not in pair) for pair in combinations(PLACES, 2)]
    return Lesson(pictures, questions, pairs, repeats=True)


def changed(random: Random) -> Lesson:
    """Return two pictures of the same things, some of another colour in the second, and the question how many.

    After it come questions about the second picture alone.
    """
    before, after = random.sample(sorted(COLORS), 2)
    total = random.randint(1, 5)
    number = random.randint(1, total)
    size = 0.2 * SIDE
    places, sizes = free_places(random, [size] * total)
    things = [Thing("circle", before, x, y, size, 0) for (x, y), size in zip(places, sizes)]
    later = [thing._replace(color=after) if i < number else thing for i, thing in enumerate(things)]
    seed = random.random()
    questions = [
        Question("how many circles changed color?", str(number)),
        count_in_second(after, number),
    ]
    if number < total:
        questions.append(count_in_second(before, total - number))
    return Lesson([scene(each, Random(seed)) for each in (things, later)], questions)
