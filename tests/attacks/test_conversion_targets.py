"""Where a conversion writes: links, other conversions, kills."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny_checkpoint import write_checkpoint

from visualrwkv_hf.conversion import ConversionError, to_hf, to_original
from visualrwkv_hf.conversion.folders import locked

CONVERT = """
import sys
from visualrwkv_hf.conversion import to_hf

def report(file, count):
    print(file, count, flush=True)

print("imported", flush=True)
to_hf(sys.argv[1], sys.argv[2], overwrite=True, progress=report)
print("done", flush=True)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    (path,) = write_checkpoint(tmp_path_factory.mktemp("source") / "tiny.pth")
    return path


def names_in(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_overwrite_through_a_link_replaces_what_it_points_to(checkpoint, tmp_path):
    (tmp_path / "disk").mkdir()
    to_hf(checkpoint, tmp_path / "disk" / "model")
    (tmp_path / "disk" / "model" / "old").touch()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model")
    with pytest.raises(ConversionError, match="is not empty"):
        to_hf(checkpoint, tmp_path / "link")
    to_hf(checkpoint, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "link" / "config.json").exists()
    assert not (tmp_path / "disk" / "model" / "old").exists()
    assert names_in(tmp_path) == {"disk", "link"} and names_in(tmp_path / "disk") == {"model"}


def test_a_misspelt_option_is_refused(checkpoint, tmp_path):
    with pytest.raises(
        ConversionError, match="There is no option overwrit: it is no option of the conversion"
    ):
        to_hf(checkpoint, tmp_path / "model", overwrit=True)
    assert not names_in(tmp_path)


def test_a_link_to_nothing_is_followed(checkpoint, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "model")
    to_hf(checkpoint, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "model" / "config.json").exists()


def test_the_way_back_goes_through_a_link(checkpoint, tmp_path):
    folder = to_hf(checkpoint, tmp_path / "model")
    (tmp_path / "old.pth").touch()
    (tmp_path / "link.pth").symlink_to(tmp_path / "old.pth")
    to_original(folder, tmp_path / "link.pth", overwrite=True)
    assert (tmp_path / "link.pth").is_symlink() and torch.load(tmp_path / "old.pth")


def test_a_second_conversion_to_one_target_is_refused_at_once(checkpoint, tmp_path):
    reads = []
    with locked(tmp_path / "model"):
        with pytest.raises(ConversionError, match=r"Another conversion is writing to .*model"):
            to_hf(checkpoint, tmp_path / "model", progress=lambda *args: reads.append(args))
        to_hf(checkpoint, tmp_path / "other")
    assert not reads and names_in(tmp_path) == {"other"}
    to_hf(checkpoint, tmp_path / "model")
    assert names_in(tmp_path) == {"other", "model"}


def test_what_a_killed_conversion_left_is_cleaned_up(checkpoint, tmp_path):
    (tmp_path / ".model.unfinished-abc").mkdir()
    (tmp_path / ".model.unfinished-abc" / "half").touch()
    (tmp_path / ".model.notes").mkdir()  # somebody's own
    to_hf(checkpoint, tmp_path / "model")
    assert names_in(tmp_path) == {"model", ".model.notes"}


def test_a_folder_set_aside_by_a_killed_conversion_comes_back(checkpoint, tmp_path):
    """Killed between two renames: the old folder is aside, the new one has not got its name."""
    to_hf(checkpoint, tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / ".model.unfinished-abc.old")
    with locked(tmp_path / "model"):
        assert names_in(tmp_path) == {"model", ".model.convert.lock"}
    assert (tmp_path / "model" / "config.json").exists()


def start(checkpoint, target) -> subprocess.Popen:
    command = [sys.executable, "-c", CONVERT, str(checkpoint), str(target)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "imported\n"
    return process


def kill_at(process: subprocess.Popen, seconds: float) -> bool:
    """Kill after some seconds of the conversion itself; returns whether it was still running."""
    time.sleep(seconds)
    was_running = process.poll() is None
    if was_running:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    return was_running


@pytest.mark.soak
def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new_one(checkpoint, tmp_path):
    """20 kills of the running phase, over an existing folder: what has the target's name is always a whole model."""
    target = tmp_path / "model"
    process = start(checkpoint, target)
    began = time.monotonic()
    assert process.wait() == 0
    process.stdout.close()
    seconds = time.monotonic() - began
    whole = names_in(target)
    chance, running = random.Random(0), 0
    for _ in range(40):
        running += kill_at(start(checkpoint, target), chance.uniform(0, seconds))
        if target.exists():
            assert names_in(target) == whole
            to_original(target, tmp_path / "back.pth", overwrite=True)
        else:
            assert any(path.name.endswith(".old") for path in tmp_path.iterdir())
        if running == 20:
            break
    assert running == 20
    to_hf(checkpoint, target, overwrite=True)
    assert names_in(tmp_path) == {"model", "back.pth"} and names_in(target) == whole
