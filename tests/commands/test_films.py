"""Films in the terminal: asked about, talked about, captioned."""

import json

import pytest
from PIL import Image
from tiny_training import save_tiny_model
from typer.testing import CliRunner
from workplace import save_film

from visualrwkv_hf.cli.app import app
from visualrwkv_hf.inference import pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), version=7, image_position="first")


@pytest.fixture
def film(tmp_path):
    save_film(path := tmp_path / "film.mp4")
    return path


def run(*arguments, input=None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)


def ask(folder, *arguments):
    return run("ask", "--model", folder, "--max-new-tokens", "3", "--no-accelerate", *arguments)


def test_a_film_is_asked_about(folder, film, monkeypatch):
    asked = []
    real = pictures.content_parts
    monkeypatch.setattr(
        "visualrwkv_hf.cli.ask.content_parts",
        lambda *args, **options: asked.append(real(*args, **options)) or asked[-1],
    )
    for options in ([], ["--num-frames", 2], ["--fps", 5]):
        result = ask(folder, film, "What moves?", *options)
        assert result.exit_code == 0, result.output
    assert [len(parts) for parts in asked] == [8, 2, 5]


def test_an_animation_is_a_film_only_if_frames_are_asked_for(tmp_path):
    frames = [Image.new("RGB", (8, 8), (40 * number, 0, 0)) for number in range(6)]
    frames[0].save(path := tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert len(pictures.content_parts(str(path))) == 1
    assert len(pictures.content_parts(str(path), num_frames=3)) == 3
    assert len(pictures.content_parts(str(path), as_film=True)) == 6


def test_refusals(folder, film, tmp_path):
    result = ask(folder, film, "What?", "--num-frames", 2, "--fps", 2)
    assert result.exit_code == 1 and "Error: Give either num_frames or fps" in result.output
    film.write_bytes(film.read_bytes()[:60])
    result = ask(folder, film, "What?")
    assert result.exit_code == 1 and "cannot be read as a film: " in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_a_film_in_a_chat(folder, film):
    chat = ("chat", "--model", folder, "--max-new-tokens", "3", "--no-accelerate")
    result = run(*chat, input=f"/video {film}\nWhat moves?\n")
    assert result.exit_code == 0, result.output
    assert "8 frames of 96 x 64 pixels: they go with your next question." in result.output
    assert "8 frames" in run(*chat, film, input="What moves?\n").output


def test_films_in_a_folder_are_captioned_if_asked_for(folder, film, tmp_path):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    (tmp_path / "broken.mkv").write_bytes(b"no film")
    output = tmp_path / "out.jsonl"
    command = (
        "caption",
        tmp_path,
        "--prompt",
        "What?",
        "--model",
        folder,
        "--max-new-tokens",
        "3",
        "--no-accelerate",
    )
    assert run(*command, "--output", output).exit_code == 0
    assert [json.loads(line)["picture"] for line in output.read_text().splitlines()] == ["red.png"]

    output = tmp_path / "films.jsonl"
    result = run(*command, "--output", output, "--films", "--num-frames", 2)
    assert result.exit_code == 3 and "broken.mkv: cannot be read as a film" in result.output
    assert [json.loads(line)["picture"] for line in output.read_text().splitlines()] == [
        "film.mp4",
        "red.png",
    ]
    result = run(*command, "--output", output, "--films", "--num-frames", 3)
    assert result.exit_code == 1 and "was begun with num_frames 2, not 3" in result.output
