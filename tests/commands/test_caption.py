"""`visualrwkv caption`: every picture once, whatever happens on the way."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc

import pytest
import torch
from filelock import FileLock
from patience import PATIENCE, wait_until
from PIL import Image
from tiny_training import save_tiny_model
from transformers import BatchFeature
from typer.testing import CliRunner

from visualrwkv_hf import VisualRWKVForConditionalGeneration, VisualRWKVProcessor
from visualrwkv_hf.cli.app import app
from visualrwkv_hf.inference import Captioning, chat_inputs
from visualrwkv_hf.inference.captioning import as_line, finished_names, one_ahead, pictures_in

PROMPT = "What is this?"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def draw(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40 + number % 7, 50), (number * 5 % 256, number * 31 % 256, 90)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Nine pictures in three folders, and what is none."""
    folder = tmp_path / "pictures"
    for number in range(9):
        draw(
            folder / ["", "b", "b/c"][number % 3] / f"{number}.{['png', 'JPG', 'webp'][number // 3]}", number
        )
    (folder / "notes.txt").write_text("not meant as a picture")
    return folder


def arguments(folder, output, model, *more):
    settings = [
        "--prompt",
        PROMPT,
        "--output",
        output,
        "--model",
        model,
        "--max-new-tokens",
        6,
        "--device",
        "cpu",
    ]
    return [str(argument) for argument in ["caption", folder, *settings, *more]]


@pytest.fixture
def caption(folder, model_folder, tmp_path):
    def run(*more, output=tmp_path / "out.jsonl"):
        return CliRunner().invoke(app, arguments(folder, output, model_folder, "--batch-size", 4, *more))

    return run


def lines_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_every_picture_is_answered_as_by_generate_in_order(caption, folder, model_folder, tmp_path):
    result = caption()
    assert result.exit_code == 0, result.stderr
    assert "9 of 9 pictures are in" in result.stderr and result.stdout == ""
    lines = lines_of(tmp_path / "out.jsonl")
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*") if p.suffix != ".txt")
    assert [line["picture"] for line in lines] == names
    model = VisualRWKVForConditionalGeneration.from_pretrained(model_folder)
    processor = VisualRWKVProcessor.from_pretrained(model_folder)
    for line in lines[::4]:
        content = [
            {"type": "image", "image": str(folder / line["picture"])},
            {"type": "text", "text": PROMPT},
        ]
        inputs = chat_inputs(processor, [{"role": "user", "content": content}])
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        (text,) = processor.post_process_image_text_to_text(
            output, prompt_length=inputs["input_ids"].shape[1]
        )
        assert line["text"] == text


def test_bad_files_are_told_at_the_end_and_tried_again(caption, folder, tmp_path):
    whole = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(whole[:30])
    (folder / "b" / "text.png").write_text("hello")
    (folder / "b" / "empty.jpg").touch()
    result = caption()
    assert result.exit_code == 3
    bad = ["0.png", "b/empty.jpg", "b/text.png"]
    assert [line.split(":")[0] for line in result.stderr.splitlines() if "cannot be read as" in line] == bad
    assert "8 of 11 pictures are in" in result.stderr and "3 cannot be read" in result.stderr
    summary = json.loads((tmp_path / "out.jsonl.summary.json").read_text())
    assert [entry["picture"] for entry in summary["bad"]] == bad
    assert (summary["pictures"], summary["answered"]) == (11, 8)
    assert summary["settings"]["prompt"] == PROMPT

    (folder / "0.png").write_bytes(whole)  # repaired
    for name in bad[1:]:
        (folder / name).unlink()
    assert caption().exit_code == 0
    names = [line["picture"] for line in lines_of(tmp_path / "out.jsonl")]
    assert sorted(names) == pictures_in(folder)
    assert json.loads((tmp_path / "out.jsonl.summary.json").read_text())["bad"] == []


def test_a_picture_that_the_processor_refuses_spoils_no_batch(folder, model_folder, tmp_path, monkeypatch):
    refused = sorted(pictures_in(folder))[1]
    processor = VisualRWKVProcessor.from_pretrained(model_folder)
    apply = processor.apply_chat_template
    size = Image.open(folder / refused).size

    def picky(chats, **kwargs):
        if any(chat[0]["content"][0]["image"].getpixel((0, 0)) == bad for chat in chats):
            raise ValueError(f"too odd: {size}")
        return apply(chats, **kwargs)

    bad = Image.open(folder / refused).convert("RGB").getpixel((0, 0))
    monkeypatch.setattr(processor, "apply_chat_template", picky)
    settings = dict(prompt=PROMPT, max_new_tokens=2, image_position=None)
    work = Captioning(folder, tmp_path / "out.jsonl", settings)
    for _ in work.run(VisualRWKVForConditionalGeneration.from_pretrained(model_folder), processor, 4):
        pass
    assert list(work.bad) == [refused] and "too odd" in work.bad[refused]
    assert len(lines_of(tmp_path / "out.jsonl")) == 8


def test_links_are_followed_and_those_that_lead_nowhere_are_told(caption, folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    draw(elsewhere / "far.png", 1)
    (folder / "linked").symlink_to(elsewhere)
    (folder / "b" / "round").symlink_to(folder)  # its pictures are there already
    (folder / "alias.png").symlink_to(elsewhere / "far.png")
    (folder / "nowhere.png").symlink_to(tmp_path / "none.png")
    os.mkfifo(folder / "pipe.png")  # opening it would wait for ever
    (folder / "drawer.png").mkdir()
    assert set(pictures_in(folder)) >= {"linked/far.png", "alias.png", "nowhere.png", "pipe.png"}
    assert not any("round" in name for name in pictures_in(folder))
    result = caption()
    assert result.exit_code == 3, result.stderr
    assert "nowhere.png: cannot be read as a picture: the link leads nowhere" in result.stderr
    assert "pipe.png: cannot be read as a picture: it is not a file" in result.stderr
    assert "11 of 13 pictures are in" in result.stderr


def test_hidden_files_and_folders_are_skipped(folder):
    before = pictures_in(folder)
    draw(folder / ".thumbnails" / "small.png", 1)
    (folder / "._0.png").write_bytes(b"resource fork")
    (folder / "b" / ".hidden.png").touch()
    assert pictures_in(folder) == before


def test_a_picture_in_a_linked_folder_has_its_name_without_the_link(folder):
    (folder / "a link").symlink_to(folder / "b")  # sorted before what it leads to
    assert not any(name.startswith("a link") for name in pictures_in(folder))


def test_reasons_are_kept_without_paths(caption, folder, tmp_path):
    """Else a folder of 100,000 broken files would take as many long texts."""
    for number in range(20):
        (folder / f"broken {number}.png").touch()
    assert caption().exit_code == 3
    summary = json.loads((tmp_path / "out.jsonl.summary.json").read_text())
    reasons = {entry["error"] for entry in summary["bad"]}
    assert len(summary["bad"]) == 20 and len(reasons) == 1 and str(folder) not in reasons.pop()


def test_half_a_line_is_cut_off_and_written_again(caption, tmp_path):
    caption()
    output = tmp_path / "out.jsonl"
    whole = output.read_bytes()
    for cut in (1, 7, len(whole) // 2, len(whole) - 3):
        output.write_bytes(whole[:cut])
        assert caption().exit_code == 0
        # Batches begin elsewhere now, but a picture's answer depends on none beside it.
        assert lines_of(output) == [json.loads(line) for line in whole.splitlines()]


def test_nothing_to_do_loads_no_model(caption, monkeypatch):
    assert caption().exit_code == 0
    monkeypatch.setattr("visualrwkv_hf.cli.caption.load_model", None)
    assert caption().exit_code == 0


def test_other_work_is_not_mixed_in(caption, tmp_path):
    caption()
    before = (tmp_path / "out.jsonl").read_bytes()
    result = caption("--prompt", "Where?")
    assert result.exit_code == 1
    assert f"was begun with prompt '{PROMPT}', not 'Where?'" in result.stderr
    assert "begun with max_new_tokens 6, not 7" in caption("--max-new-tokens", 7).stderr
    assert (tmp_path / "out.jsonl").read_bytes() == before
    (tmp_path / "other.jsonl").write_text("{}\n")
    assert (
        "other.jsonl.summary.json does not, so it is not continued"
        in caption(output=tmp_path / "other.jsonl").stderr
    )
    (tmp_path / "out.jsonl").write_text('{"a": 1}\n')
    assert "holds a line that is no answer about a picture" in caption().stderr


def test_two_processes_do_not_write_one_file(caption, tmp_path):
    with FileLock(tmp_path / "out.jsonl.lock"):
        result = caption()
    assert result.exit_code == 1 and "Another process is writing" in result.stderr
    assert caption().exit_code == 0


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--prompt", "What is <image>?"], "contains '<image>', which is reserved"),
        (["--image-position", "behind"], "image_position must be 'first', 'middle' or 'last'"),
        (["--device", "nowhere"], "There is no device 'nowhere' here."),
        (["--num-frames", "4"], "--num-frames has no effect without --films."),
        (["--fps", "1"], "--fps has no effect without --films."),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(caption, more, sentence, tmp_path):
    result = caption(*more)
    assert result.exit_code == 1 and sentence in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_a_folder_without_pictures_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="There is no folder"):
        Captioning(folder / "none", tmp_path / "out", {})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="There is no picture in"):
        Captioning(tmp_path / "empty", tmp_path / "out", {})


def test_names_that_are_no_utf8_come_back(tmp_path):
    names = [os.fsdecode(b"\xff\xfe.png"), "\u56fe \u2028.png", 'quoted "\n.png']
    (tmp_path / "out").write_bytes(b"".join(as_line(name, "\u7ea2") for name in names))
    assert finished_names(tmp_path / "out") == set(names)
    assert "\u7ea2" in (tmp_path / "out").read_text("utf-8")


def test_the_next_item_is_made_while_one_is_in_use():
    made = []

    def items():
        for number in range(3):
            made.append(number)
            yield number
        raise KeyError("the end")

    ahead = one_ahead(items())
    assert next(ahead) == 0
    wait_until(lambda: len(made) > 1, "the making of the next item")
    time.sleep(0.3)
    assert made == [0, 1]
    with pytest.raises(KeyError, match="the end"):
        list(ahead)


class StubProcessor:
    """Makes inputs of the size of the tiny model's, quickly."""

    def apply_chat_template(self, chats, **kwargs):
        count = len(chats) if isinstance(chats[0], list) else 1
        return BatchFeature(
            {"input_ids": torch.zeros(count, 30).long(), "pixel_values": torch.zeros(count, 3, 56, 56)}
        )

    def post_process_image_text_to_text(self, output, prompt_length):
        return [f"A picture with {length} tokens." for length in output[:, 0].tolist()]


class StubModel:
    device, dtype = torch.device("cpu"), torch.float32

    def generate(self, input_ids, **kwargs):
        return input_ids + 7


def peak_of_captioning(folder, output):
    """The largest memory of Python objects while a folder is worked through, in bytes."""
    settings = {"prompt": "?", "max_new_tokens": 2, "image_position": None}
    tracemalloc.start()
    work = Captioning(folder, output, settings)
    answered = sum(len(captions) for captions in work.run(StubModel(), StubProcessor(), 8))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert answered + len(work.bad) == len(work.names)
    return peak


def test_memory_grows_by_the_names_alone(tmp_path):
    """Not by answers, pictures or reasons: 100,000 pictures are worked through in the memory of a few, and their names.

    Half of the files are empty. A name takes some 100 bytes in the list, in the set of finished ones, and in `bad`.
    """
    peaks = {}
    for count in (200, 200, 1200):  # the first fills caches
        folder = tmp_path / f"{count} {len(peaks)}"
        draw(folder / "0.png", 1)
        content = (folder / "0.png").read_bytes()
        for number in range(1, count):
            (folder / f"{number}.png").write_bytes(content if number % 2 else b"")
        peaks[count] = peak_of_captioning(folder, tmp_path / f"{folder.name}.jsonl")
    assert (peaks[1200] - peaks[200]) / 1000 < 1000


# Killed.

COMMAND = [sys.executable, "-m", "visualrwkv_hf.cli"]


def start(*command):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*COMMAND, *command],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell runs in the background ignores it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def lines_in(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def killed_after(command, output, lines: int) -> bool:
    """Run the command until it has written more than so many lines; return whether it was killed then."""
    process = start(*command)
    wait_until(lambda: lines_in(output) > lines or process.poll() is not None, "a further line", 0.001)
    if is_running := process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.communicate()
    return is_running


@pytest.mark.parametrize("rounds", [3, pytest.param(20, marks=pytest.mark.soak)])
def test_killed_at_any_moment_every_picture_is_written_once(rounds, folder, model_folder, tmp_path):
    """SIGKILL after a random number of lines, several times; then to the end."""
    count = 20 * rounds
    for number in range(9, count):
        draw(folder / f"more/{number}.png", number)
    output, chance = tmp_path / "out.jsonl", random.Random(0)
    command = arguments(folder, output, model_folder, "--batch-size", 1)
    kills = 0
    for _ in range(rounds):
        kills += killed_after(command, output, lines_in(output) + chance.randrange(12))
        whole = output.read_bytes().rpartition(b"\n")[0].split(b"\n")
        names = [json.loads(line)["picture"] for line in whole if line]
        assert len(names) == len(set(names))  # nothing twice, nothing half but the last line
    assert kills and len(finished_names(output)) < count
    last = start(*command)
    _, errors = last.communicate()
    assert last.returncode == 0, errors
    assert [line["picture"] for line in lines_of(output)] == pictures_in(folder)


def test_control_c_says_how_to_go_on(folder, model_folder, tmp_path):
    output = tmp_path / "out.jsonl"
    process = start(*arguments(folder, output, model_folder, "--batch-size", 1, "--max-new-tokens", 400))
    wait_until(lambda: size_of(output) or process.poll() is not None, "a line, or the end of the command")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert f"Stopped. Run the same command again to continue {output}." in errors
