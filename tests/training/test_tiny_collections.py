"""examples/tiny_collections.py: what of easy-VQA, the digits and the emoji is trained on, and what is held out."""

import io
import json
import tarfile
from pathlib import Path
from random import Random

import add_examples  # noqa: F401
import pytest
from PIL import Image, ImageDraw
from tiny_collections import digits_task, easy_vqa_task, emoji_task, variant_group
from tiny_data import WHAT, on_paper


@pytest.fixture
def archive(tmp_path) -> Path:
    """A package as npm makes it, with drawings of our own."""
    rows = [
        {"unified": unified, "image": f"{number}.png", "category": category, "subcategory": "a-thing"}
        for number, (unified, category) in enumerate(
            [(f"1F{400 + i}", "Objects" if i % 2 else "Flags") for i in range(80)] + [("1F3FB", "Component")]
        )
    ]
    rows[0]["skin_variations"] = {"1F3FB": {"image": "1.png"}}
    files = {"package/emoji.json": json.dumps(rows).encode()}
    for number, row in enumerate(rows):
        drawing = Image.new("RGBA", (64, 64))
        ImageDraw.Draw(drawing).ellipse((8, 8, 56, 56), fill=(number, 0, 0, 255))
        content = io.BytesIO()
        drawing.save(content, "PNG")
        files[f"package/img/google/64/{row['image']}"] = content.getvalue()
    path = tmp_path / "emoji.tgz"
    with tarfile.open(path, "w:gz") as package:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))
    return path


def test_emoji_are_split_into_training_and_test(archive):
    task = emoji_task(archive)
    assert len(task.subjects) + len(task.test) == 80  # the skin tone is no emoji
    assert 4 <= len(task.test) <= 24
    assert {exam.question.answer for exam in task.test} <= {"Objects", "Flags"}
    assert task.test[0].picture.getpixel((0, 0)) == (255, 255, 255)
    assert task.lesson(Random(0)).pictures[0].size == (64, 64)


@pytest.mark.parametrize(
    "variant",
    [
        "1F3C3-200D-2640-FE0F",
        "1F3C3-200D-2642-FE0F-200D-27A1-FE0F",
        "1F3C3-1F3FD",
        "1F3C3-1F3FB-200D-2640-FE0F",
    ],
)
def test_variants_of_an_emoji_are_never_parted(variant):
    assert variant_group(variant) == variant_group("1F3C3")
    assert variant_group("1F468-200D-1F469-200D-1F467") == variant_group("1F9D1")


def test_an_emoji_of_the_test_is_never_trained_on(archive):
    final, choice = (emoji_task(archive, validation) for validation in (False, True))
    tested = {exam.picture.tobytes() for exam in final.test}
    assert not tested & drawings(choice) and not tested & {exam.picture.tobytes() for exam in choice.test}
    assert {exam.picture.tobytes() for exam in choice.test} <= drawings(final)


def drawings(task) -> set[bytes]:
    pictures = (on_paper(picture) for subject in task.subjects for picture in subject.pictures)
    return {picture.tobytes() for picture in pictures}


def test_digits_are_held_out_by_a_fifth():
    task, choice = digits_task(), digits_task(validation=True)
    assert (len(task.subjects), len(task.test)) == (1438, 359)
    assert (len(choice.subjects), len(choice.test)) == (1258, 180)
    assert task.test[0].picture.size == (8, 8)


@pytest.fixture(scope="module")
def easy_vqa():
    return easy_vqa_task()


def test_easy_vqa_keeps_its_official_split(easy_vqa):
    assert (len(easy_vqa.subjects), len(easy_vqa.test)) == (4000, 9673)
    captions = sum(question.text == WHAT for subject in easy_vqa.subjects for question in subject.main)
    assert sum(len(subject.main) + len(subject.others) for subject in easy_vqa.subjects) - captions == 38575
    assert len(easy_vqa_task(validation=True).subjects) == 3600
