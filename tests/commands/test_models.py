"""`--model` with an original checkpoint or a release: converted into the cache once, whole or not at all."""

import dataclasses
import os
import re
import shutil

import pytest
from PIL import Image
from tiny_checkpoint import write_checkpoint
from typer.testing import CliRunner

from visualrwkv_hf.cli.app import app
from visualrwkv_hf.conversion import checkpoint, releases
from visualrwkv_hf.inference import model_cache
from visualrwkv_hf.inference.loading import model_source
from visualrwkv_hf.inference.model_cache import cached_model, cached_models, models_folder, short_name


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "visualrwkv_hf" / "models"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A whole one and a split one."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_checkpoint(folder / "whole.pth")
    write_checkpoint(folder / "split.pth", split=True)
    return folder


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    return str(tmp_path / "red.png")


@pytest.fixture
def no_second_conversion(monkeypatch):
    def forbid():
        monkeypatch.setattr("visualrwkv_hf.conversion.hub_files.local_file", None)

    return forbid


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ask(model, picture):
    return run("ask", "--model", model, "--device", "cpu", "--max-new-tokens", 2, picture, "What is it?")


@pytest.mark.parametrize("name", ["whole.pth", "split_rwkv.pth", "split_visual.pth"])
def test_an_original_checkpoint_answers_and_is_converted_once(
    name, checkpoints, cache, picture, no_second_conversion
):
    first = ask(checkpoints / name, picture)
    assert first.exit_code == 0, first.stderr
    (folder,) = [path for path in cache.iterdir() if path.is_dir()]
    assert folder.name.startswith(name.removesuffix("visual.pth").removesuffix(".pth"))
    no_second_conversion()
    again = ask(checkpoints / name, picture)
    assert again.exit_code == 0 and again.stdout == first.stdout


def test_a_changed_checkpoint_is_another_one(checkpoints, cache, tmp_path):
    shutil.copy(checkpoints / "whole.pth", tmp_path / "model.pth")
    first = cached_model(str(tmp_path / "model.pth"))
    write_checkpoint(tmp_path / "model.pth")
    assert cached_model(str(tmp_path / "model.pth")) != first


RELEASE = releases.RELEASES["v6.0"]


def release(sha256=None):
    model = dataclasses.replace(RELEASE.models[0], files=("whole.pth",), sha256=(sha256,))
    return {"v6.0": dataclasses.replace(RELEASE, models=(model,))}


@pytest.fixture
def released(checkpoints, monkeypatch):
    """The release v6-1.6b is small, and where it is fetched from."""
    monkeypatch.setattr(releases, "RELEASES", release())
    fetched = []

    def download(file):
        fetched.append(str(file))
        return checkpoints / file.path

    monkeypatch.setattr("visualrwkv_hf.conversion.hub_files.download", download)
    return fetched


def test_a_release_has_a_short_name(released, picture, cache):
    assert ask("v6-1.6b", picture).exit_code == 0
    assert ask("v6-1.6b", picture).exit_code == 0
    assert released == ["hf://howard-hou/visualrwkv-6/whole.pth"]
    assert run("info", "v6-1.6b").exit_code == 0
    listed = run("models")
    assert re.match(r"v6-1\.6b +[\d.]+ [kM]B", listed.stdout), listed.stdout
    cached = models_folder() / "v6-1.6b"
    shutil.copytree(cached, cached.with_name(".v6-1.6b.removed"))  # an earlier removal was interrupted
    assert run("models", "rm", "v6-1.6b").exit_code == 0
    assert cached_models() == {} and run("models").stdout == ""
    assert not [*cached.parent.glob(".*.removed")]
    assert "v6-1.6b" in run("models").stderr  # can be fetched


def test_a_model_is_pulled_ahead(released, cache):
    result = run("models", "pull", "v6-1.6b")
    assert result.exit_code == 0 and result.stdout.strip() == str(cache / "v6-1.6b")
    assert "visualrwkv ask --model v6-1.6b" in result.stderr


def test_another_file_than_the_released_one_is_refused_and_nothing_is_kept(
    released, checkpoints, monkeypatch, cache, picture
):
    monkeypatch.setattr(releases, "RELEASES", release("0" * 64))
    result = ask("v6-1.6b", picture)
    assert result.exit_code == 1 and "is not the released file: its sha256 is" in result.stderr
    assert cached_models() == {} and not (cache / "v6-1.6b").exists()
    digest = checkpoint.sha256_of(checkpoints / "whole.pth")
    monkeypatch.setattr(releases, "RELEASES", release(digest))
    assert ask("v6-1.6b", picture).exit_code == 0


def test_a_conversion_that_fails_leaves_nothing(checkpoints, cache):
    def stop(file, num_bytes):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        cached_model(str(checkpoints / "whole.pth"), progress=stop)
    assert cached_models() == {} and not [path for path in cache.iterdir() if path.is_dir()]


def test_every_release_has_its_own_short_name():
    names = [short_name(model.title) for row in releases.RELEASES.values() for model in row.models]
    assert len(set(names)) == len(names)
    assert {"v6-1.6b", "v7-0.1b", "v5-3b", "uhd-1.6b"} <= set(names)
    assert all(model_cache.SHORT_NAME.fullmatch(name) for name in names)
    with pytest.raises(ValueError, match="is no title of a release"):
        short_name("Other 1B6")


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("v9-1.6b", "There is no release v9-1.6b: the releases are v5-1.5b"),
        ("none.pth", "There is no checkpoint none.pth"),
        ("hf://owner/repo", "is not of the form hf://owner/repo/file"),
        ("{folder}/tony", "There is no folder {folder}/tony; did you mean {folder}/tiny?"),
        ("{folder}/other", "There is no folder {folder}/other."),
        ("tinny", "There is no folder tinny."),
        ("{folder}/notes.txt", "is a file, but not a .pth checkpoint"),
    ],
)
def test_what_cannot_be_a_model_is_refused_without_the_network(
    name, sentence, tmp_path, picture, monkeypatch
):
    def connect(*arguments, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", connect)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").touch()
    (tmp_path / "notes.txt").touch()
    result = ask(name.replace("{folder}", str(tmp_path)), picture)
    assert result.exit_code == 1 and sentence.replace("{folder}", str(tmp_path)) in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_cache_is_made_for_its_user_alone(checkpoints, cache):
    """The folder also holds compiled code, which is refused where others may write."""
    before = os.umask(0o002)
    try:
        cached_model(str(checkpoints / "whole.pth"))
    finally:
        os.umask(before)
    assert cache.parent.stat().st_mode & 0o777 == 0o700


def test_a_name_from_outside_the_cache_is_not_removed(cache, tmp_path):
    (tmp_path / "cache" / "visualrwkv_hf" / "models").mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "config.json").touch()
    for name in ("../../../outside", str(outside), "", ".", ".."):
        assert run("models", "rm", name).exit_code == 1
    assert (outside / "config.json").exists()


def test_a_hub_id_is_no_path():
    assert model_source("ann/tiny") == "ann/tiny"
