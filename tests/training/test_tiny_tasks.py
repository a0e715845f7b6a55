"""The drawn tasks of examples/train_tiny.py: their answers are right, by what the pictures show."""

import json
import math
import subprocess
import tarfile
from io import BytesIO
from itertools import combinations
from pathlib import Path
from random import Random

import add_examples  # noqa: F401
import numpy as np
import pytest
import tiny_charts
import tiny_packages
import tiny_posters
import tiny_scenes
import tiny_signs
from matplotlib import get_data_path
from scipy import ndimage
from tiny_charts import TOP, charts_task
from tiny_data import SIDE, WHAT, DrawnExams, Exam, Question, without_what
from tiny_posters import OF_ALL, poster, posters_task
from tiny_scenes import (
    COLORS,
    DIRECTIONS,
    SHAPES,
    Thing,
    changed,
    compared_things,
    comparing_task,
    comparisons,
    counting_task,
    different,
    frames_task,
    free_places,
    moving,
    outline,
    turned_task,
)
from tiny_signs import (
    LONGEST_WORD,
    READ_QUESTIONS,
    WHOLE,
    Box,
    reading_task,
    reading_words,
    training_text,
    turning_room,
)
from tiny_tasks import TARGETS
from tiny_unknown import MISMATCHES, UNKNOWN, refusals_task, unknown_task
from train_tiny import cut_vocabulary


@pytest.fixture(scope="module")
def fonts() -> tiny_packages.Fonts:
    """matplotlib's, in place of those that npm has."""
    files = [Path(get_data_path(), "fonts", "ttf", f"DejaVuS{kind}.ttf") for kind in ("ans", "erif")]
    return tiny_packages.Fonts(*([file.read_bytes()] for file in files))


WORDS = tiny_packages.Words(["LAMP", "FIVE", "SPARROW"], ["TRAIN", "CLOUD"])


@pytest.fixture
def plain(monkeypatch):
    """Draw in exact colours, without noise, so that a test can measure what a picture shows."""
    for room in (tiny_scenes, tiny_charts):
        monkeypatch.setattr(room, "near", lambda color, random: color)
    for room in (tiny_scenes, tiny_charts, tiny_posters):
        monkeypatch.setattr(room, "noisy", lambda picture, random: picture)


def pixels_of(picture, color: str) -> np.ndarray:
    """Return where a picture has a colour, bool [SIDE, SIDE]."""
    return (np.asarray(picture) == COLORS[color]).all(-1)


# Reading.


def test_a_sign_shows_what_the_answer_says(fonts):
    """The same text in the same place leaves other pixels than a text that differs in one letter."""
    from tiny_signs import sign

    def drawn(text: str) -> np.ndarray:
        return np.asarray(sign([text], fonts.train[0], Random(4)), dtype=int)

    assert np.array_equal(drawn("LAMP"), drawn("LAMP"))
    assert (np.abs(drawn("LAMP") - drawn("LAMB")) > 40).any()


def test_reading_is_asked_with_words_and_fonts_of_its_test(fonts):
    task = reading_task(fonts, WORDS)
    said = {task.test[i].question for i in range(80)}
    texts = {question.answer.split()[-1].rstrip(".") for question in said}
    assert {text for text in texts if not text.isdigit()} == set(WORDS.test)
    assert all(1 <= len(text) <= 5 for text in texts if text.isdigit())
    assert all(question.text in READ_QUESTIONS for question in said)


def test_no_lesson_shows_a_word_that_is_held_out(monkeypatch):
    """Not as a part of another word either, nor as random letters."""
    monkeypatch.setattr(tiny_signs, "is_test_word", lambda text: text in ("LAMP", "AMPS"))
    shown = {training_text(Random(i), ["LAMPSY"], 4) for i in range(300)}
    assert "MPSY" in shown and not shown & {"LAMP", "AMPS"}


@pytest.mark.parametrize(("longest", "lines"), [(1, 1), (3, 2), (LONGEST_WORD, 4)])
def test_lessons_of_reading_are_as_long_as_they_may_be(fonts, longest, lines):
    task = reading_task(fonts, WORDS, longest, lines)
    lengths, numbers = set(), set()
    for i in range(200):
        lesson = task.lesson(Random(i))
        answers = [question.answer for question in lesson.main]
        texts = [answer.rstrip(".").split("is ")[-1] for answer in answers]
        texts = texts if len(texts) > 1 else texts[0].split(", ")
        lengths |= {len(text) for text in texts}
        numbers.add(len(texts))
    assert max(lengths) == longest and numbers == set(range(1, lines + 1))


def test_no_letter_leaves_the_sign(fonts):
    """A box may be turned as far as none of its corners leaves the picture."""
    for box in (Box(1, 1, 95, 20), Box(30, 40, 60, 52), WHOLE):
        limit = turning_room(box, (SIDE, SIDE), 15)
        x, y = (box.left + box.right) / 2, (box.top + box.bottom) / 2
        c, s = math.cos(math.radians(limit)), math.sin(math.radians(limit))
        for corner in ((box.left, box.top), (box.right, box.top)):
            dx, dy = corner[0] - x, corner[1] - y
            for turned in ((c * dx - s * dy, s * dx + c * dy), (c * dx + s * dy, c * dy - s * dx)):
                assert limit == 0 or all(0 <= p + q <= SIDE for p, q in zip((x, y), turned))
    assert turning_room(Box(40, 40, 60, 50), (SIDE, SIDE), 15) == 15


def test_letters_are_tokens_of_their_own():
    vocabulary = cut_vocabulary(reading_words())
    assert not [token for token in vocabulary if len(token) > 1 and token.strip().isupper()]
    assert not [token for token in vocabulary if len(token) > 1 and token.strip().isdigit()]


# Scenes.


def test_a_thing_has_its_corners():
    for shape, corners in (("triangle", 3), ("rectangle", 4), ("star", 10), ("circle", 40)):
        points = outline(Thing(shape, "red", 48, 48, 30, 77))
        assert len(points) == corners
        radii = [math.dist(point, (48, 48)) for point in points]
        assert max(radii) == pytest.approx(15 * (0.85 if shape == "circle" else 1))
        middle = np.mean(points, axis=0)
        assert middle == pytest.approx([48, 48])


def things_in(picture, color: str) -> int:
    """Return how many separate areas have a colour."""
    return ndimage.label(pixels_of(picture, color), np.ones((3, 3)))[1]


def test_as_many_things_are_counted_as_there_are(plain):
    task, found = counting_task(), set()
    for i in range(60):
        lesson = task.lesson(Random(i))
        counts = {color: things_in(lesson.pictures[0], color) for color in COLORS}
        total, *others = lesson.main
        assert sum(counts.values()) == int(total.answer)
        for question in others:
            if question.text != WHAT:
                assert counts[question.text.split()[2]] == int(question.answer)
        found.add(int(total.answer))
    assert found == set(range(1, 10))


def test_things_that_need_too_much_room_become_smaller():
    random = Random(0)
    box = Box(0, 0, 60, 40)
    for _ in range(20):
        places, sizes = free_places(random, [30] * 4, box)
        assert max(sizes) < 30
        things = [Thing("circle", "red", x, y, size, 0) for (x, y), size in zip(places, sizes)]
        assert all(
            a.size / 2 + b.size / 2 < math.dist((a.x, a.y), (b.x, b.y)) for a, b in combinations(things, 2)
        )
        assert all(
            t.x - t.size / 2 >= 0 and t.x + t.size / 2 <= 60 and t.y + t.size / 2 <= 40 for t in things
        )


def extent(picture, color: str) -> tuple[float, float, float]:
    """Return the middle (x, y) and the largest distance from it of a colour's pixels."""
    rows, columns = np.nonzero(pixels_of(picture, color))
    x, y = columns.mean(), rows.mean()
    return x, y, np.hypot(columns - x, rows - y).max()


def test_things_are_compared_as_the_picture_shows_them(plain):
    """Size, side and height are measured in the picture, without what drew it."""
    task = comparing_task()
    for i in range(40):
        lesson = task.lesson(Random(i))
        picture = lesson.pictures[0]
        for question in [*lesson.main, *lesson.others]:
            words = question.text.rstrip("?").replace(",", "").split()
            pair = [word for word in words if word in COLORS]
            if len(pair) != 2:
                continue
            (ax, ay, a), (bx, by, b) = (extent(picture, color) for color in pair)
            holds = next(
                value
                for word, value in (
                    ("larger", a > b),
                    ("left", ax < bx),
                    ("higher", ay < by),
                    ("above", ay < by),
                )
                if word in words
            )
            if question.answer in ("yes", "no"):
                assert question.answer == ("yes" if holds else "no"), question
            else:
                assert question.answer.split()[1] == pair[0 if holds else 1], question


def test_compared_things_differ_in_all_that_is_asked():
    for i in range(50):
        things = compared_things(Random(i))
        for a, b in combinations(things, 2):
            assert a.shape != b.shape and a.color != b.color
            for key in ("x", "y"):  # middles and edges are in the same order
                (first, second) = sorted((a, b), key=lambda thing: getattr(thing, key))
                assert all(
                    getattr(first, key) + side * first.size / 2
                    < getattr(second, key) + side * second.size / 2
                    for side in (-1, 0, 1)
                )
            assert max(a.size, b.size) / min(a.size, b.size) > 1.39
        answers = [question.answer for question in without_what(comparisons(things))]
        assert all(answer in {t.name for t in things} | {*COLORS, *SHAPES} for answer in answers)


def test_half_of_the_turned_shapes_are_triangles():
    task = turned_task()
    asked = [exam.question for exam in task.test]
    assert {question.text for question in asked} == {"what shape is in the image?"}
    assert {question.answer for question in asked} == set(SHAPES)
    assert 0.4 < sum(question.answer == "triangle" for question in asked) / len(asked) < 0.6
    assert {task.lesson(Random(i)).main[0].answer for i in range(60)} == set(SHAPES)


# Charts.


def test_bars_are_as_high_as_their_values(fonts, plain):
    task = charts_task(fonts)
    for i in range(20):
        lesson = task.lesson(Random(i))
        values = {
            question.text.split()[-2]: int(question.answer)
            for question in lesson.main
            if "value" in question.text
        }
        heights = {color: pixels_of(lesson.pictures[0], color).any(1).sum() for color in values}
        most = max(values, key=values.__getitem__)
        for color, value in values.items():
            assert heights[color] / heights[most] == pytest.approx(value / values[most], abs=0.3 / TOP)
        assert Question("which bar is the tallest?", f"the {most} bar") in lesson.main
        assert Question("how many bars are there?", str(len(values))) in lesson.main


# Frames.


def color_of_thing(picture) -> str:
    return max(COLORS, key=lambda color: pixels_of(picture, color).sum())


def test_a_thing_moves_where_the_answer_says(plain):
    for i in range(60):
        number = 1 + i % 3
        drawn = moving(Random(i), number)
        assert len(drawn.main) == number
        shapes = [question.text.split()[4] for question in drawn.main]
        answers = {question.text: question.answer for question in drawn.others}
        for shape, question in zip(shapes, drawn.main):
            color = answers[f"what color is the {shape}?"]
            path = np.array([extent(frame, color)[:2] for frame in drawn.pictures])
            way = np.diff(path, axis=0) @ np.array(DIRECTIONS[question.answer])
            assert (way > 0.08 * SIDE).all(), question


def test_one_picture_differs(plain):
    places = set()
    for i in range(30):
        pictures, (question, *others), pairs, _ = different(Random(i))
        place = ("the first", "the second", "the third").index(question.answer)
        colors = [color_of_thing(picture) for picture in pictures]
        rest = [color for number, color in enumerate(colors) if number != place]
        assert rest[0] == rest[1]
        assert [other.answer.split()[1] for other in others] == colors
        names = ("first", "second", "third")
        for pair in pairs:
            assert (pair.answer == "no") == (names[place] in pair.text), pair
        places.add(place)
    assert places == {0, 1, 2}


def test_as_many_things_change_as_the_answer_says(plain):
    for i in range(30):
        (before, after), (question, *others), _, _ = changed(Random(i))
        old = color_of_thing(before)
        assert things_in(before, old) - things_in(after, old) == int(question.answer) > 0
        assert others
        for other in others:
            assert things_in(after, other.text.split()[2]) == int(other.answer)


# Posters.


def test_nothing_that_is_asked_of_a_posters_things_is_true_of_its_bars(fonts, plain):
    kinds = set()
    for i in range(60):
        picture, main, others = poster("LAMP", fonts.train[0], Random(i))
        texts = {question.text for question in main}
        has_bars, has_things = "how many bars are there?" in texts, len(texts) > 4 or "bar" not in str(texts)
        kinds.add((has_bars, has_things))
        assert not (has_bars and has_things and texts & OF_ALL)
        for question in main:
            words = question.text.rstrip("?").split()
            if question.text.startswith("what shape is"):
                assert things_in(picture, words[-1]) == 1
            elif words[:2] == ["how", "many"] and words[2] in COLORS:
                assert things_in(picture, words[2]) == int(question.answer)
        assert not others or has_things
    assert kinds == {(True, True), (True, False), (False, True)}


# What is unknown.


def test_what_is_unknown_is_refused_in_the_same_words(fonts):
    known = [reading_task(fonts, WORDS), counting_task()]
    task = unknown_task(known)
    trained = {task.lesson(Random(i)).main[0] for i in range(60)}
    assert {question.answer for question in trained} == {UNKNOWN}
    assert task.test[0].question.answer == UNKNOWN and len(task.test) == 200
    assert MISMATCHES.keys() | {name for names in MISMATCHES.values() for name in names} <= TARGETS.keys()
    asked_about_photographs = {question.text for question in trained} & {
        q.text for k in known for q in k.wording
    }
    assert asked_about_photographs


def test_questions_of_random_words_are_refused(fonts):
    task = refusals_task([posters_task(fonts, WORDS)], WORDS.train)
    lessons = [task.lesson(Random(i)) for i in range(60)]
    assert {question.answer for lesson in lessons for question in lesson.main} == {UNKNOWN}
    texts = {lesson.main[0].text for lesson in lessons}
    assert any(word.lower() in text.split() for text in texts for word in WORDS.train)
    known = {q.text for k in (posters_task(fonts, WORDS), turned_task(), counting_task()) for q in k.wording}
    assert any("star" in text for text in texts) and not texts & known


# All of them.


@pytest.fixture(scope="module")
def drawn(fonts) -> list:
    return [
        reading_task(fonts, WORDS),
        counting_task(),
        comparing_task(),
        charts_task(fonts),
        frames_task(),
        turned_task(),
        posters_task(fonts, WORDS),
    ]


def test_the_vocabulary_has_every_word_of_the_tasks(drawn):
    """Letters and digits are bytes; all else is whole words, in questions and in answers."""
    from visualrwkv_hf.conversion.world_tokenizer import build_world_tokenizer

    vocabulary = cut_vocabulary([q for task in drawn for q in task.wording])
    cut, whole = build_world_tokenizer(vocabulary, len(vocabulary) + 2), build_world_tokenizer()
    for task in drawn:
        for i in range(40):
            lesson = task.lesson(Random(i))
            for question in (*lesson.main, *lesson.others, task.test[i].question):
                if any(text in question.text for text in (*READ_QUESTIONS, "line say", "value")):
                    continue
                for text in (f" {question.text}", f" {question.answer}"):
                    assert cut.tokenize(text) == whole.tokenize(text), text


def test_an_exam_depends_on_its_number_alone(drawn):
    for task in drawn:
        first, again = task.test[3], list(task.test[:4])[-1]
        assert first.question == again.question
        assert [p.tobytes() for p in first.pictures] == [p.tobytes() for p in again.pictures]
        assert all(picture.size == (SIDE, SIDE) and picture.mode == "RGB" for picture in first.pictures)
    exams = DrawnExams("made", 2, lambda random: Exam([], Question(str(random.random()), "")))
    assert len({exam.question for exam in exams}) == 2 and exams[-1] == exams[1]
    with pytest.raises(IndexError):
        exams[2]


# Packages.


def test_words_are_held_out_by_the_word_alone(tmp_path, monkeypatch):
    """Short ones are not tested, since lessons show them by chance, nor are those that are a part of others."""
    lists = {
        10: ["the", "it's", "ales"],
        20: ["café", "lantern", "a"],
        35: ["lanterns", "street", "ale", "stone"],
    }
    with tarfile.open(tmp_path / "words.tgz", "w:gz") as archive:
        for size, known in lists.items():
            content = json.dumps(known).encode()
            member = tarfile.TarInfo(f"package/english-words-{size}.json")
            member.size = len(content)
            archive.addfile(member, BytesIO(content))
    package = tiny_packages.WORDS
    (tmp_path / "words.tgz").rename(tmp_path / package.file)
    digest = tiny_packages.sha256_of([(tmp_path / package.file).read_bytes()])
    monkeypatch.setattr(tiny_packages, "WORDS", package._replace(sha256=digest))
    monkeypatch.setattr(
        tiny_packages, "is_test_word", lambda word: word in ("ALE", "ALES", "LANTERN", "STREET")
    )
    found = tiny_packages.words(tmp_path, 8)
    assert found.train == ["LANTERNS", "STONE", "THE"]
    assert found.test == ["ALES", "STREET"]
    assert tiny_packages.words(tmp_path, 5) == (["STONE", "THE"], ["ALES"])
    monkeypatch.setattr(tiny_packages, "is_validation_word", lambda word: word in ("THE", "STONE"))
    assert tiny_packages.words(tmp_path, 8, validation=True) == (["LANTERNS"], ["STONE"])
    with pytest.raises(ValueError, match="have 4 letters or more, longest is 3"):
        tiny_packages.words(tmp_path, 3)


def test_fonts_of_the_test_are_left_out_where_settings_are_chosen(tmp_path, monkeypatch):
    chosen = ("courier-prime", tiny_packages.TEST_FAMILIES[0], tiny_packages.VALIDATION_FAMILIES[0])
    for family in chosen:
        with tarfile.open(tmp_path / family, "w:gz") as archive:
            member = tarfile.TarInfo("package/A_400Regular.ttf")
            member.size = len(family)
            archive.addfile(member, BytesIO(family.encode()))
    packages = [tiny_packages.Package(f"@expo-google-fonts/{family}", "1", "") for family in chosen]
    monkeypatch.setattr(tiny_packages, "FONTS", packages)
    monkeypatch.setattr(tiny_packages, "fetched", lambda package, folder: folder / package.name.split("/")[1])
    other, tested, validated = (family.encode() for family in chosen)
    assert tiny_packages.fonts(tmp_path) == ([other, validated], [tested])
    assert tiny_packages.fonts(tmp_path, validation=True) == ([other], [validated])


def test_about_a_tenth_of_the_words_is_held_out():
    words = [f"{a}{b}" for a in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" for b in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    assert 0.06 < sum(map(tiny_packages.is_test_word, words)) / len(words) < 0.14


def test_another_package_than_this_was_written_for_is_refused(tmp_path):
    package = tiny_packages.Package("made", "1.0", "0" * 64)
    (tmp_path / package.file).write_bytes(b"not it")
    with pytest.raises(ValueError, match=r"made-1\.0\.tgz has sha256 .*, expected 0000"):
        tiny_packages.fetched(package, tmp_path)


def test_npm_packs_a_package_once(tmp_path, monkeypatch):
    package = tiny_packages.Package("@made/fonts", "1.0", tiny_packages.sha256_of([b"content"]))
    commands = []

    def npm(command, **options):
        commands.append(command)
        Path(command[-1], "made-fonts-1.0.tgz").write_bytes(b"content")

    monkeypatch.setattr(subprocess, "run", npm)
    for _ in "ab":
        assert tiny_packages.fetched(package, tmp_path / "data").read_bytes() == b"content"
    assert [command[:3] for command in commands] == [["npm", "pack", "@made/fonts@1.0"]]


def test_a_missing_npm_is_named_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"npm pack made@1.0 .* failed: .*\. Put made-1.0.tgz into"):
        tiny_packages.fetched(tiny_packages.Package("made", "1.0", ""), tmp_path)
