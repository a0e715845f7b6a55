"""`visualrwkv quantize`, `--weights` of other commands, and the cache that keeps models so."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_checkpoint import write_checkpoint
from tiny_training import save_tiny_model
from typer.testing import CliRunner

from visualrwkv_hf.cli.app import app
from visualrwkv_hf.conversion import quantize


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "visualrwkv_hf" / "models"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "whole.pth")[0]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ask(picture, *arguments):
    done = run("ask", "--device", "cpu", "--max-new-tokens", 2, *arguments, picture, "What is it?")
    assert done.exit_code == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_quantised_folder_answers_as_weights_rounded_while_loading(weights, dense, picture, tmp_path):
    made = run("quantize", dense, tmp_path / "small", "--weights", weights)
    assert (made.exit_code, made.stdout) == (0, f"{tmp_path / 'small'}\n"), made.stderr
    expected = ask(picture, "--model", dense, "--weights", weights)
    assert ask(picture, "--model", tmp_path / "small") == expected
    assert ask(picture, "--model", tmp_path / "small", "--no-accelerate")
    info = run("info", tmp_path / "small")
    assert info.exit_code == 0 and "int32" in info.stdout


def test_converting_quantises_as_quantize_does(checkpoint, tmp_path):
    assert run("convert", checkpoint, tmp_path / "dense").exit_code == 0
    assert run("convert", checkpoint, tmp_path / "one", "--weights", "int4").exit_code == 0
    assert run("quantize", tmp_path / "dense", tmp_path / "two", "--weights", "int4").exit_code == 0
    one, two = (tmp_path / name for name in ("one", "two"))
    tensors = [load_file(folder / "model.safetensors") for folder in (one, two)]
    assert set(tensors[0]) == set(tensors[1])
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    fields = [json.loads((folder / "config.json").read_text()) for folder in (one, two)]
    assert fields[0]["quantization_config"] == fields[1]["quantization_config"]
    assert "## Weights in int4" in (one / "README.md").read_text()
    size = sum(path.stat().st_size for path in one.glob("*.safetensors"))
    assert size < sum(path.stat().st_size for path in (tmp_path / "dense").glob("*.safetensors"))
    refused = run("convert", "--to-original", one, tmp_path / "back.pth")
    assert refused.exit_code == 1 and "cannot be restored" in refused.stderr
    assert not (tmp_path / "back.pth").exists()


def test_the_cache_keeps_a_model_in_few_bits_once(checkpoint, cache, picture, monkeypatch):
    first = ask(picture, "--model", checkpoint, "--weights", "int4")
    (folder,) = [path for path in cache.iterdir() if path.is_dir()]
    assert folder.name.endswith("-int4")
    monkeypatch.setattr("visualrwkv_hf.conversion.hub_files.local_file", None)  # nothing is converted again
    assert ask(picture, "--model", checkpoint, "--weights", "int4") == first
    listed = run("models").stdout
    assert folder.name in listed and "int4" in listed.replace(folder.name, "")


def test_the_cache_makes_few_bits_of_the_model_that_is_there(checkpoint, cache, picture, monkeypatch):
    ask(picture, "--model", checkpoint)
    monkeypatch.setattr("visualrwkv_hf.conversion.hub_files.local_file", None)
    ask(picture, "--model", checkpoint, "--weights", "int8")
    names = sorted(path.name for path in cache.iterdir() if path.is_dir())
    assert names == [names[0], f"{names[0]}-int8"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "{dense}", "{out}", "--weights", "int3"], "weights must be int8 or int4, got 'int3'"),
        (["quantize", "{dense}", "{dense}", "--weights", "int8"], "cannot be written into itself"),
        (["quantize", "{out}", "{out}"], "There is no folder"),
        (["quantize", "{dense}", "{out}", "--private"], "--private has no effect"),
        (
            ["ask", "--model", "{dense}", "--weights", "int3", "{picture}", "?"],
            "weights must be int8 or int4",
        ),
        (
            ["ask", "--model", "{dense}", "--weights", "int8", "--no-accelerate", "{picture}", "?"],
            "plain torch",
        ),
    ],
)
def test_refusals_are_one_sentence(arguments, message, dense, picture, tmp_path):
    places = dict(dense=dense, out=tmp_path / "out", picture=picture)
    done = run(*[argument.format(**places) for argument in arguments])
    assert done.exit_code == 1 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()


KILLED = """
import os, signal, sys
from visualrwkv_hf.conversion import quantize
quantize(sys.argv[1], sys.argv[2], weights="int4", progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_killed_quantize_leaves_no_folder_and_the_next_one_cleans_up(dense, tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(dense), str(tmp_path / "out")])
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    assert [path for path in tmp_path.iterdir() if "unfinished" in path.name]
    quantize(dense, tmp_path / "out", weights="int4")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_stopped_quantize_leaves_nothing(dense, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(dense, tmp_path / "out", weights="int4", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_the_bars_end_at_their_totals(dense, tmp_path):
    counts = Counter()
    quantize(
        dense,
        tmp_path / "out",
        weights="int4",
        progress=lambda file, n: counts.update({file: n}),
        expect=lambda n: counts.update(expected=n),
    )
    assert counts["model.safetensors"] == counts["verifying"] == counts["expected"] > 0


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weights_of_float64_are_rounded_to_scales_that_can_be_read(weights, checkpoint, picture, tmp_path):
    doubles = {name: tensor.double() for name, tensor in torch.load(checkpoint).items()}
    torch.save(doubles, tmp_path / "doubles.pth")
    assert run("convert", tmp_path / "doubles.pth", tmp_path / "small", "--weights", weights).exit_code == 0
    scales = {t.dtype for n, t in load_file(tmp_path / "small" / "model.safetensors").items() if "scale" in n}
    assert scales == {torch.float32}
    assert ask(picture, "--model", tmp_path / "small")
