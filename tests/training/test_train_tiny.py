"""examples/train_tiny.py: its data, its prompts, and a training of seconds on made pictures."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from random import Random

import pytest
import torch
from paths import SUPPORT
from patience import PATIENCE
from PIL import Image, ImageDraw
from two_colors import colored_square, tiny_data, train_tiny, trained_on, two_colors, vocabulary_of


@pytest.fixture(scope="module")
def task():
    return two_colors()


@pytest.fixture(scope="module")
def vocabulary(task):
    return vocabulary_of(task)


@pytest.fixture(scope="module")
def trained(task, tmp_path_factory):
    """A model that has learned the two colours, saved as the script saves it."""
    folder = tmp_path_factory.mktemp("tiny")
    model, processor = trained_on(task, folder)
    train_tiny.save(model, processor, folder, without_code=False)
    return model.float(), processor, folder


def test_it_learns_and_shuffled_pictures_take_it_away(trained, task):
    model, processor, _ = trained
    assert train_tiny.accuracy(model, processor, task.test) == 1
    swapped = [
        tiny_data.Exam(colored_square("blue" if e.question.answer == "red" else "red"), e.question)
        for e in task.test
    ]
    assert train_tiny.accuracy(model, processor, swapped) == 0


@pytest.mark.slow
def test_two_processes_share_batches_and_questions(trained, tmp_path):
    """Weights are the same in both, and those of one process but for rounding, which 33 steps of AdamW spread."""
    script = SUPPORT / "two_colors.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, script, tmp_path], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "processes: 2, right: 1.0" in done.stdout and done.stdout.count("right:") == 1
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone = trained[0].state_dict()
    moved = max((first[name] - alone[name]).abs().max().item() for name in first)
    assert 0 < moved < 0.02


def test_the_saved_folder_answers_on_the_command_line(trained, tmp_path):
    _, _, folder = trained
    colored_square("red", side=200).save(tmp_path / "square.png")
    command = [sys.executable, "-m", "visualrwkv_hf.cli", "ask", "--model", str(folder)]
    command += [str(tmp_path / "square.png"), "what color is it?"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "red"


def test_without_code_the_folder_still_loads(trained, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor, _ = trained
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    train_tiny.remove_code(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert "auto_map" not in "".join(file.read_text() for file in tmp_path.glob("*.json"))
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    assert AutoProcessor.from_pretrained(tmp_path).image_token_id == model.config.image_token_id


def test_training_reads_what_the_chat_template_asks(trained, task):
    _, processor, _ = trained
    question = task.test[0].question
    collator = train_tiny.VisualRWKVDataCollator(processor, train_tiny.prompt_format("middle"))
    row = {"conversations": tiny_data.conversation([question]), "images": [task.test[0].picture]}
    trained_on = collator([row])
    text = train_tiny.prompt(processor, question.text)
    asked = processor(text=text, images=task.test[0].picture, return_tensors="pt")
    length = asked["input_ids"].shape[1]
    assert trained_on["input_ids"][0, :length].tolist() == asked["input_ids"][0].tolist()
    assert processor.decode(trained_on["input_ids"][0, length:]) == f" {question.answer}\n\n"
    torch.testing.assert_close(trained_on["pixel_values"], asked["pixel_values"], atol=0, rtol=0)


def test_a_cut_vocabulary_cuts_text_as_the_whole_one(vocabulary):
    from visualrwkv_hf.conversion.world_tokenizer import build_world_tokenizer

    cut, whole = build_world_tokenizer(vocabulary, len(vocabulary) + 2), build_world_tokenizer()
    for text in ("what color is it?", "User: what color is it?\n", "Assistant: red\n\n"):
        assert cut.convert_ids_to_tokens(cut.encode(text)) == whole.convert_ids_to_tokens(whole.encode(text))
    assert cut.decode(cut.encode("Überraschung 猫")) == "Überraschung 猫"


def test_the_report_sets_accuracy_beside_its_controls(trained, task):
    model, processor, _ = trained
    table = train_tiny.report(model, processor, [task], seed=0)
    assert "| easy-VQA | 8 | 100.0 % |" in table
    assert train_tiny.questions_alone(task) == (0.5, 0.5)
    stages = [train_tiny.Stage(1, 1e-3, 1e-4, ("projector",), 1, {})]
    card = train_tiny.model_card(model, [task], stages, table, "the command", seed=0, minutes=3)
    assert table in card and "the command" in card and "{" not in card


def test_lessons_depend_on_seed_and_row_alone(task):
    whole = tiny_data.Lessons([task], [1.0], range(10), 2, seed=1)
    part = tiny_data.Lessons([task], [1.0], range(5, 10), 2, seed=1)
    other = tiny_data.Lessons([task], [1.0], range(10), 2, seed=2)
    assert [part[i]["conversations"] for i in range(5)] == [whole[i]["conversations"] for i in range(5, 10)]
    assert [whole[i]["conversations"] for i in range(10)] != [other[i]["conversations"] for i in range(10)]


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
    task = tiny_data.emoji_task(archive)
    assert len(task.train) + len(task.test) == 80  # the skin tone is no emoji
    assert 4 <= len(task.test) <= 24
    assert {exam.question.answer for exam in task.test} <= {"Objects", "Flags"}
    assert task.test[0].picture.getpixel((0, 0)) == (255, 255, 255)
    assert task.vary(task.train[0].pictures[0], Random(0)).size == (64, 64)


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
    assert tiny_data.variant_group(variant) == tiny_data.variant_group("1F3C3")
    assert tiny_data.variant_group("1F468-200D-1F469-200D-1F467") == tiny_data.variant_group("1F9D1")


def test_another_emoji_package_is_refused(tmp_path):
    (tmp_path / tiny_data.EMOJI_FILE).write_bytes(b"not it")
    with pytest.raises(ValueError, match="has sha256"):
        tiny_data.emoji_archive(tmp_path)


def test_an_emoji_of_the_test_is_never_trained_on(archive):
    final, choice = (tiny_data.emoji_task(archive, validation) for validation in (False, True))
    tested = {exam.picture.tobytes() for exam in final.test}
    assert not tested & drawings(choice) and not tested & {exam.picture.tobytes() for exam in choice.test}
    assert {exam.picture.tobytes() for exam in choice.test} <= drawings(final)


def drawings(task) -> set[bytes]:
    pictures = (tiny_data.on_paper(picture) for subject in task.train for picture in subject.pictures)
    return {picture.tobytes() for picture in pictures}


def test_digits_are_held_out_by_a_fifth():
    task, choice = tiny_data.digits_task(), tiny_data.digits_task(validation=True)
    assert (len(task.train), len(task.test)) == (1438, 359)
    assert (len(choice.train), len(choice.test)) == (1258, 180)
    assert task.test[0].picture.size == (8, 8)


@pytest.fixture(scope="module")
def easy_vqa():
    return tiny_data.easy_vqa_task()


def test_easy_vqa_keeps_its_official_split(easy_vqa):
    assert (len(easy_vqa.train), len(easy_vqa.test)) == (4000, 9673)
    captions = sum(question.text == tiny_data.WHAT for subject in easy_vqa.train for question in subject.main)
    assert sum(len(subject.main) + len(subject.others) for subject in easy_vqa.train) - captions == 38575
    assert len(tiny_data.easy_vqa_task(validation=True).train) == 3600


def test_open_questions_have_names_for_answers(easy_vqa):
    task = train_tiny.open_questions(easy_vqa)
    asked = [question for subject in task.train for question in subject.main]
    asked += [exam.question for exam in task.test]
    assert not {question.answer for question in asked} & {"yes", "no"}
    assert tiny_data.WHAT not in {question.text for question in asked}
    assert all(subject.main and not subject.others for subject in task.train)


@pytest.fixture(scope="module")
def bundled():
    """The model inside the package and its processor."""
    from visualrwkv_hf import VisualRWKVForConditionalGeneration, VisualRWKVProcessor, bundled_model

    model = VisualRWKVForConditionalGeneration.from_pretrained(bundled_model(), dtype="auto")
    return model, VisualRWKVProcessor.from_pretrained(bundled_model())


def test_the_bundled_model_is_small(bundled):
    from visualrwkv_hf import bundled_model

    assert sum(file.stat().st_size for file in bundled_model().iterdir()) <= 12e6
    assert bundled[0].dtype == torch.bfloat16
    assert (bundled[0].config.text_config.rwkv_version, bundled[0].config.scan) == (7, "bidirectional")


def held_out_emoji() -> list:
    """The test's, sorted by category, in one picture (Noto Emoji, Apache-2.0)."""
    tests = Path(__file__).parent
    told = json.loads((tests / "held_out_emoji.json").read_text(encoding="utf-8"))
    exams = []
    with Image.open(tests / "held_out_emoji.png") as sheet:
        for i, category in enumerate(told["categories"]):
            left, upper = i % told["columns"] * 64, i // told["columns"] * 64
            question = tiny_data.Question(tiny_data.KIND_QUESTIONS[0], category)
            exams.append(tiny_data.Exam(sheet.crop((left, upper, left + 64, upper + 64)), question))
    return exams


HELD_OUT = {
    "easy-VQA": lambda easy_vqa: easy_vqa.test,
    "digits": lambda easy_vqa: tiny_data.digits_task().test,
    "emoji": lambda easy_vqa: held_out_emoji(),
}


@pytest.mark.parametrize(
    "name", [name if name == "digits" else pytest.param(name, marks=pytest.mark.slow) for name in HELD_OUT]
)
def test_the_bundled_model_looks_at_what_it_is_shown(name, bundled, easy_vqa):
    task = tiny_data.Task(name, "", "", [], HELD_OUT[name](easy_vqa), None)
    exams = train_tiny.sample_of(task.test, 300)
    accuracy = train_tiny.accuracy(*bundled, exams)
    assert accuracy >= train_tiny.TARGETS[name]
    _, other_pictures_answer = train_tiny.questions_alone(task)
    control = train_tiny.accuracy(*bundled, train_tiny.shuffled(exams, seed=0))
    noise = 3 * (other_pictures_answer * (1 - other_pictures_answer) / len(exams)) ** 0.5
    assert control <= other_pictures_answer + noise < accuracy


@pytest.mark.slow
def test_an_ablation_run_trains_each_variant(task, vocabulary, tmp_path):
    for changed in ({}, {"scan": "snake"}, {"image_position": "first"}, {"rwkv_version": 5}):
        (score,) = train_tiny.small_run([task], [task.test], vocabulary, changed, 0, 1, tmp_path)
        assert 0 <= score <= 1


def test_the_ablation_table_gives_mean_and_deviation_over_seeds(task):
    table = train_tiny.ablation_table([task], {"one": [[0.5], [0.7]], "other": [[1.0]]})
    assert table.splitlines()[2:] == [
        "| one | 60.0 ± 14.1 |",
        "| other | 100.0 ± 0.0 |",
        "| best guess per question | 50.0 |",
    ]
