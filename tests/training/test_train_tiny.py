"""examples/train_tiny.py and evaluate_tiny.py: a training of seconds on made pictures, its prompts, its examination."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import add_examples  # noqa: F401
import pytest
import tiny_card
import tiny_stages
import torch
from matplotlib import get_data_path
from paths import SUPPORT
from patience import PATIENCE
from PIL import Image
from tiny_collections import KIND_QUESTIONS, digits_task
from tiny_packages import Fonts, Words, is_test_word
from tiny_scenes import comparing_task, counting_task, frames_task, turned_task
from tiny_signs import reading_task
from tiny_unknown import unknown_task
from two_colors import (
    colored_square,
    evaluate_tiny,
    tiny_data,
    train_tiny,
    trained_on,
    two_colors,
    vocabulary_of,
)


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
    model, processor = trained_on(task, folder / "stages")
    train_tiny.save(model, processor, folder, without_code=False)
    return model.float(), processor, folder


def test_it_learns_and_shuffled_pictures_take_it_away(trained, task):
    model, processor, _ = trained
    assert evaluate_tiny.accuracy(model, processor, task.test) == 1
    swapped = [
        tiny_data.Exam([colored_square("blue" if e.question.answer == "red" else "red")], e.question)
        for e in task.test
    ]
    assert evaluate_tiny.accuracy(model, processor, swapped) == 0


@pytest.mark.slow
def test_two_processes_share_batches_and_questions(task, tmp_path):
    """Weights are the same in both, also the next time, and those of one process but for rounding, which Muon spreads.

    After 33 steps they differ by 0.0012 on average, and by 0.0046 from those of other samples.
    The tower is not trained: its batch norms would see half a batch in each of two processes.
    """
    script = SUPPORT / "two_colors.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for time in ("first", "next"):
        (tmp_path / time).mkdir()
        done = subprocess.run(
            [*launch, script, tmp_path / time],
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "processes: 2, right: 1.0" in done.stdout and done.stdout.count("right:") == 1
    files = [tmp_path / time / f"{rank}.pt" for time in ("first", "next") for rank in (0, 1)]
    first, *others = map(torch.load, files)
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)
    alone = trained_on(task, tmp_path / "alone", tiny_stages.ALL_BUT_TOWER)[0].state_dict()
    apart = sum((first[name] - alone[name]).abs().sum() for name in first)
    assert 0 < apart / sum(weight.numel() for weight in first.values()) < 0.0025


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
    assert [file.name for file in tmp_path.glob("*.json") if "auto_map" in file.read_text()] == [
        "config.json"
    ]
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    assert AutoProcessor.from_pretrained(tmp_path).image_token_id == model.config.image_token_id


def test_training_reads_what_the_chat_template_asks(trained, task):
    _, processor, _ = trained
    question = task.test[0].question
    collator = train_tiny.VisualRWKVDataCollator(processor, train_tiny.prompt_format("middle"))
    row = {"conversations": tiny_data.conversation([question]), "images": [task.test[0].picture]}
    trained_on = collator([row])
    text = evaluate_tiny.prompt(processor, question.text)
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


def test_the_table_sets_accuracy_beside_its_controls(trained, task):
    model, processor, _ = trained
    row, refused = evaluate_tiny.scores(model, processor, [task], 6, seed=0)
    assert refused["held out"].startswith("known things") and refused["accuracy"] == "0.0 %"
    assert (row["held out"], row["questions"], row["accuracy"]) == ("easy-VQA", "6", "100.0 %")
    assert row["best guess per question"] == row["most frequent answer"] == "50.0 %"
    stages = [tiny_stages.Stage(1, 1e-3, 1e-4, ("projector",), 1, 0, {"easy-VQA": 2, "other": 1})]
    card = tiny_card.model_card(model, [task], stages, "the table", "the command", seed=0, minutes=3)
    assert "the table" in card and "the command" in card and "{" not in card
    assert "easy-VQA 67, other 33" in card


def test_a_training_that_was_stopped_goes_on_where_it_was(trained, task, tmp_path):
    """Stages that are done are not run again; the weights are those of a training that was not stopped."""
    done = trained[2] / "stages"
    (tmp_path / "stage-1").mkdir()
    (tmp_path / "stage-1" / "weights.pt").write_bytes((done / "stage-1" / "weights.pt").read_bytes())
    model, _ = trained_on(task, tmp_path)
    assert not list((tmp_path / "stage-1").glob("checkpoint-*"))
    whole = torch.load(done / "stage-2" / "weights.pt")
    assert all(torch.equal(whole[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.slow
def test_a_training_that_was_stopped_within_a_stage_goes_on_there(trained, task, tmp_path, monkeypatch):
    monkeypatch.setattr(train_tiny, "CHECKPOINT_STEPS", 10)

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 15:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_tiny.Progress, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            trained_on(task, tmp_path)
    assert [folder.name for folder in (tmp_path / "stage-1").glob("checkpoint-*")] == ["checkpoint-10"]
    model, _ = trained_on(task, tmp_path)
    whole = torch.load(trained[2] / "stages" / "stage-2" / "weights.pt")
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, whole[name], atol=1e-4, rtol=1e-3)


def test_a_folder_of_another_training_is_refused(tmp_path):
    train_tiny.refuse_other_settings(tmp_path / "work", {"seed": 0, "processes": 1})
    train_tiny.refuse_other_settings(tmp_path / "work", {"seed": 0, "processes": 1})
    with pytest.raises(
        SystemExit, match=r"holds a training with \{'seed': 0, .* not with \{'seed': 1, .*--work-dir"
    ):
        train_tiny.refuse_other_settings(tmp_path / "work", {"seed": 1, "processes": 1})


def test_the_clock_goes_on_after_a_stop(tmp_path):
    first = train_tiny.Clock(tmp_path / "seconds")
    first.begin -= 100
    first.on_save(None, SimpleNamespace(is_world_process_zero=True), None)
    assert 100 <= train_tiny.Clock(tmp_path / "seconds").seconds <= first.seconds + 1
    (tmp_path / "other").mkdir()
    train_tiny.Clock(tmp_path / "other" / "seconds").on_save(
        None, SimpleNamespace(is_world_process_zero=False), None
    )
    assert not list((tmp_path / "other").iterdir())


def test_shuffling_keeps_the_number_of_pictures():
    pictures = [Image.new("L", (1, 1), i) for i in range(7)]
    exams = [tiny_data.Exam(pictures[i : i + 1 + i % 2], tiny_data.Question(str(i), "")) for i in range(6)]
    mixed = evaluate_tiny.shuffled(exams, seed=0)
    assert [len(exam.pictures) for exam in mixed] == [1, 2] * 3
    assert [exam.question for exam in mixed] == [exam.question for exam in exams]
    assert sorted(id(exam.pictures) for exam in mixed) == sorted(id(exam.pictures) for exam in exams)
    assert [exam.pictures for exam in mixed] != [exam.pictures for exam in exams]


@pytest.mark.parametrize(
    ("said", "right", "share"),
    [
        ("LANTERN", "LANTERN", 1),
        ("LANTRN", "LANTERN", 6 / 7),
        ("LANTERNS", "LANTERN", 7 / 8),
        ("", "LAMP", 0),
        ("PMAL", "LAMP", 1 / 4),
    ],
)
def test_letters_count_in_their_order(said, right, share):
    pairs = [(f"The word is {said}.", f"The word is {right}.")]
    assert evaluate_tiny.letters_right(pairs) == pytest.approx(share)


def test_lessons_depend_on_seed_and_row_alone(task):
    whole = tiny_data.Lessons([task], [1.0], range(10), 1, 1, seed=1)
    part = tiny_data.Lessons([task], [1.0], range(5, 10), 1, 1, seed=1)
    other = tiny_data.Lessons([task], [1.0], range(10), 1, 1, seed=2)
    assert [part[i]["conversations"] for i in range(5)] == [whole[i]["conversations"] for i in range(5, 10)]
    assert [whole[i]["conversations"] for i in range(10)] != [other[i]["conversations"] for i in range(10)]


def test_a_sample_asks_no_open_question_whose_answer_it_has_already():
    picture = Image.new("RGB", (8, 8))
    main = [tiny_data.Question(text, answer) for text, answer in (("a?", "1"), ("b?", "1"), ("c?", "2"))]
    others = [tiny_data.Question("d?", "yes")]
    task = tiny_data.Task("made", "", lambda random: tiny_data.Lesson([picture], main, others), [], main)
    for row in range(20):
        sample = tiny_data.Lessons([task], [1.0], range(row, row + 1), 3, 1, seed=0)[0]
        assert sorted(turn["value"] for turn in sample["conversations"][1::2]) == ["1", "2", "yes"]


@pytest.mark.parametrize(("pictures", "questions"), [(1, 5), (2, 3), (3, 2), (4, 2)])
def test_a_sample_of_several_pictures_has_fewer_questions(pictures, questions):
    main = [tiny_data.Question(f"{number}?", str(number)) for number in range(3)]
    shown = [Image.new("RGB", (8, 8))] * pictures
    task = tiny_data.Task("made", "", lambda random: tiny_data.Lesson(shown, main, main), [], main)
    sample = tiny_data.Lessons([task], [1.0], range(1), 3, 2, seed=0)[0]
    said = [turn["value"] for turn in sample["conversations"]]
    assert len(said) == 2 * questions
    assert said[0].count("<image>") == len(sample["images"]) == pictures
    assert "<image>" not in "".join(said[1:])


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
    assert (bundled[0].config.text_config.rwkv_version, bundled[0].config.scan) == (7, "multidirectional")


def held_out_emoji() -> list[tiny_data.Exam]:
    """The test's, sorted by category, in one picture (Noto Emoji, Apache-2.0)."""
    folder = Path(__file__).parent
    told = json.loads((folder / "held_out_emoji.json").read_text(encoding="utf-8"))
    exams = []
    with Image.open(folder / "held_out_emoji.png") as sheet:
        for i, category in enumerate(told["categories"]):
            left, upper = i % told["columns"] * 64, i // told["columns"] * 64
            question = tiny_data.Question(KIND_QUESTIONS[0], category)
            exams.append(tiny_data.Exam([sheet.crop((left, upper, left + 64, upper + 64))], question))
    return exams


def signs() -> Sequence[tiny_data.Exam]:
    """Words that are held out, in matplotlib's font, which is too."""
    common = "APPLE BEACH CANDLE DESERT ENGINE FOREST GUITAR HAMMER ISLAND JACKET KETTLE LADDER MARKET NEEDLE ORANGE"
    more = "PLANET QUARTZ RIBBON SADDLE TEMPLE UMBRELLA VALLEY WINDOW YELLOW ZEBRA BUTTER CAMERA DANGER EAGLE FLOWER"
    held_out = [word for word in f"{common} {more}".split() if is_test_word(word)]
    font = Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf").read_bytes()
    return reading_task(Fonts([], [font]), Words([], held_out)).test


def refusals() -> Sequence[tiny_data.Exam]:
    pytest.importorskip("skimage")
    return unknown_task([counting_task(), comparing_task(), turned_task(), digits_task()]).test


HELD_OUT = {
    "digits": (lambda: digits_task().test, 0.86),
    "counting": (lambda: counting_task().test, 0.77),
    "comparing": (lambda: comparing_task().test, 0.78),
    "frames": (lambda: frames_task().test, 0.4),
    "triangles": (lambda: turned_task().test, 0.97),
    "reading": (signs, 0.7),
    "emoji": (held_out_emoji, 0.43),
    "unknown": (refusals, 0.9),
}
"""Task -> its test, and the least accuracy: what the card says, less what 200 questions may be off by chance."""


@pytest.mark.parametrize(
    "name", [name if name == "digits" else pytest.param(name, marks=pytest.mark.slow) for name in HELD_OUT]
)
def test_the_bundled_model_looks_at_what_it_is_shown(name, bundled):
    test, least = HELD_OUT[name]
    exams = evaluate_tiny.sample_of(test(), 200)
    accuracy = evaluate_tiny.accuracy(*bundled, exams)
    assert accuracy >= least
    _, other_pictures_answer = evaluate_tiny.questions_alone(exams)
    if name == "unknown":  # all answers are the same
        return
    control = evaluate_tiny.accuracy(*bundled, evaluate_tiny.shuffled(exams, seed=0))
    noise = 3 * (other_pictures_answer * (1 - other_pictures_answer) / len(exams)) ** 0.5
    assert control <= other_pictures_answer + noise < accuracy
