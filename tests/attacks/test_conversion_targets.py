"""Where a conversion writes: links, other conversions, other people's files, kills."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import write_checkpoint

from visualrwkv_hf.conversion import ConversionError, quantize, to_hf, to_original
from visualrwkv_hf.conversion.folders import locked
from visualrwkv_hf.conversion.towers import read_tower

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
    (tmp_path / "disk" / "model" / "LICENSE").touch()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model")
    with pytest.raises(ConversionError, match="is not empty"):
        to_hf(checkpoint, tmp_path / "link")
    to_hf(checkpoint, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "link" / "config.json").exists()
    assert not (tmp_path / "disk" / "model" / "LICENSE").exists()
    assert names_in(tmp_path) == {"disk", "link"} and names_in(tmp_path / "disk") == {"model"}


@pytest.mark.parametrize(
    "content", ['{"name": "project"}', '{"model_type": "llama"}', "[]", "no json", "\xff"]
)
def test_a_folder_with_another_programs_configuration_is_kept(content, checkpoint, tmp_path):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.json").write_text(content, "latin-1")
    with pytest.raises(ConversionError, match="project is not a model folder of VisualRWKV"):
        to_hf(checkpoint, tmp_path / "project", overwrite=True)
    assert names_in(tmp_path / "project") == {"config.json"}


@pytest.mark.parametrize(
    "name", ["data.csv", "train.py", "notes/1.txt", ".env", "optimizer.pt", ".cache/pip/x"]
)
def test_a_model_folder_with_other_peoples_files_is_kept(name, checkpoint, tmp_path):
    folder = to_hf(checkpoint, tmp_path / "model")
    (folder / name).parent.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text("import modeling_visualrwkv")
    first = name.partition("/")[0]
    with pytest.raises(ConversionError, match=f"model holds (the folder )?{first} beside the model"):
        to_hf(checkpoint, folder, overwrite=True)
    assert (folder / name).exists()


def test_what_belongs_to_a_model_folder_is_replaced(checkpoint, tmp_path):
    """Also what downloading leaves, more shards, and code that an older version shipped."""
    folder = to_hf(checkpoint, tmp_path / "model", max_shard_size="9MB")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / "older_part.py").touch()
    with open(folder / "modeling_visualrwkv.py", "a") as older:
        older.write("from .older_part import x")
    for name in (".gitattributes", "LICENSE.txt", "special_tokens_map.json", "modeling_visualrwkv.py.old"):
        (folder / name).touch()
    to_hf(checkpoint, folder, overwrite=True)
    assert names_in(folder) == names_in(to_hf(checkpoint, tmp_path / "fresh"))


def test_a_quantization_after_a_kill_between_two_renames_is_refused_at_once(checkpoint, tmp_path):
    source, old = (to_hf(checkpoint, tmp_path / name) for name in ("source", "model"))
    old.rename(tmp_path / ".model.unfinished-abc.old")
    reads = []
    with pytest.raises(ConversionError, match="is not empty"):
        quantize(source, old, weights="int8", progress=lambda *args: reads.append(args))
    assert not reads and names_in(tmp_path) == {"source", "model"}


@pytest.mark.parametrize(
    "weight_map", [{"x": "{elsewhere}"}, {"x": "../private.safetensors"}, {"x": 1}, [], None]
)
def test_an_index_names_files_beside_it_only(weight_map, checkpoint, tmp_path):
    """Otherwise `quantize` would copy tensors of this machine into a folder that may be pushed."""
    folder = to_hf(checkpoint, tmp_path / "model")
    elsewhere = tmp_path / "private.safetensors"
    save_file(load_file(folder / "model.safetensors"), elsewhere)
    (folder / "model.safetensors").unlink()
    index = {} if weight_map is None else {"weight_map": weight_map}
    text = json.dumps(index).replace("{elsewhere}", str(elsewhere))
    (folder / "model.safetensors.index.json").write_text(text)
    for read in (
        lambda: quantize(folder, tmp_path / "small", weights="int8"),
        lambda: to_original(folder, tmp_path / "back.pth"),
        lambda: read_tower(folder, torch.float32),
    ):
        with pytest.raises(ConversionError, match=r"no file of weights beside it|has no weight_map"):
            read()
    assert names_in(tmp_path) == {"model", "private.safetensors"}


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
