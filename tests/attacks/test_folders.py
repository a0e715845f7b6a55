"""A model folder of a stranger: no code runs, nothing hangs, and every refusal is one sentence and exit code 1."""

import signal
from pathlib import Path

import pytest
from hostile_folders import HOSTILE, MARKER, make_hostile
from patience import PATIENCE
from PIL import Image
from tiny_training import save_tiny_model
from transformers import GenerationConfig
from typer.testing import CliRunner

from visualrwkv_hf.cli.app import app
from visualrwkv_hf.inference.checks import refuse_strange_generation
from visualrwkv_hf.inference.loading import model_source


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("whole") / "tiny")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    Image.new("RGB", (30, 20), "red").save(folder / "red.png")
    return folder


@pytest.fixture
def commands(pictures, tmp_path, monkeypatch):
    """Command -> its arguments for a model folder. The server does not wait for requests."""
    no_server = type("Server", (), {"run": lambda self, sockets: None})
    monkeypatch.setattr("visualrwkv_hf.inference.server.make_server", lambda *_: no_server())
    picture = str(pictures / "red.png")
    few = ["--max-new-tokens", "2", "--device", "cpu"]
    caption = [
        "caption",
        str(pictures),
        "--prompt",
        "What is it?",
        "--output",
        str(tmp_path / "out.jsonl"),
        *few,
    ]
    return {
        "ask": lambda folder: ["ask", "--model", folder, *few, picture, "What is it?"],
        "chat": lambda folder: ["chat", "--model", folder, *few, picture],
        "caption": lambda folder: [*caption, "--model", folder],
        "show": lambda folder: ["show", picture, "--output", str(tmp_path / "figure.svg"), "--model", folder],
        "serve": lambda folder: ["serve", folder, "--port", "0", "--device", "cpu"],
        "info": lambda folder: ["info", folder],
    }


@pytest.fixture(autouse=True)
def nothing_hangs():
    def hangs(number, frame):
        raise TimeoutError(f"nothing came in {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(PATIENCE)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def run(arguments):
    return CliRunner().invoke(app, arguments, input="y\n" * 9)


def test_the_undamaged_folder_is_taken_by_every_command(whole, commands):
    for command, arguments in commands.items():
        result = run(arguments(str(whole)))
        assert result.exit_code == 0, (command, result.output, result.stderr)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_is_refused_in_one_sentence(name, whole, commands, tmp_path):
    folder = make_hostile(name, whole, tmp_path / "sent")
    for command, arguments in commands.items():
        result = run(arguments(str(folder)))
        said = result.stderr.strip()
        assert result.exception is None or isinstance(result.exception, SystemExit), (
            command,
            result.exception,
        )
        assert not Path(tmp_path / MARKER).exists(), command
        assert "Traceback" not in said, (command, said)
        if command in HOSTILE[name].refused_by:
            assert result.exit_code == 1, (command, result.exit_code, result.output)
        if result.exit_code:
            errors = [line for line in said.splitlines() if line.startswith("Error: ")]
            assert result.exit_code == 1 and len(errors) == 1 and said.endswith(errors[0]), (command, said)


def test_hostile_folders_are_refused_before_torch_is_needed(whole, tmp_path, monkeypatch):
    """By name, without loading anything."""
    folder = make_hostile("code-of-another-type", whole, tmp_path / "sent")
    with pytest.raises(ValueError, match="holds a model of type 'stranger', not visualrwkv"):
        model_source(str(folder))


@pytest.mark.parametrize(
    "option, value",
    [
        ("penalty_alpha", 0.6),
        ("dola_layers", "low"),
        ("constraints", [[1]]),
        ("force_words_ids", [[1]]),
        ("num_beam_groups", 2),
    ],
)
def test_ways_to_generate_whose_code_is_on_the_hub_are_refused(option, value, tmp_path):
    config = GenerationConfig()
    setattr(config, option, value)
    with pytest.raises(
        ValueError, match=f"{option} in .* asks for a way to generate whose code is on the Hub"
    ):
        refuse_strange_generation(config, tmp_path)
