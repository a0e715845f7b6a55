"""What reaches a terminal is shown, not obeyed: control characters and bidirectional marks become escapes."""

import os
import pty
import subprocess
import sys

import pytest
from PIL import Image
from tiny_training import save_tiny_model
from typer.testing import CliRunner

from visualrwkv_hf.cli.app import app
from visualrwkv_hf.cli.options import sentence, show_answer
from visualrwkv_hf.inference.chat import Chat
from visualrwkv_hf.inference.printable import one_line, printable

EVIL = "\x1b]0;title\x07\x1b[2J\x9b1m\u202egnp.exe\u2066\ufeff\U000e0041\x00\x7f\r\udcff"


def test_what_steers_a_terminal_becomes_an_escape():
    shown = printable(EVIL)
    assert shown == (r"\x1b]0;title\x07\x1b[2J\x9b1m\u202egnp.exe\u2066\ufeff\U000e0041\x00\x7f\x0d\udcff")
    assert shown.isprintable() and printable(shown) == shown


@pytest.mark.parametrize(
    "text", ["A cat.", "两只猫。\n", "a\tb\nc", "שלום", "می‌خواهم", "👩‍👩‍👧", "e\u0301", "\u3000x\u00a0y"]
)
def test_ordinary_text_of_any_language_stays(text):
    assert printable(text) == text


def test_one_line_is_one_line():
    assert one_line(" a\n\n b\tc\x1b ") == r"a b c\x1b"


def test_errors_are_always_safe_and_short():
    assert sentence(ValueError("first line\n second\x1b[2J")) == r"first line second\x1b[2J"
    assert sentence(ValueError(EVIL)).isprintable()
    assert sentence(FileNotFoundError(2, "No such file", EVIL)).isprintable()
    assert len(sentence(ValueError("a" * 10**6))) < 1000
    assert sentence(KeyError("x")) == "KeyError: 'x'"
    assert sentence(ValueError()) == "ValueError"


def seen_at_a_terminal(code, *arguments):
    """What a Python program sends to a terminal."""
    terminal, theirs = pty.openpty()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "200"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            seen += os.read(terminal, 4096)
        except OSError:  # its other end is closed
            break
    process.wait()
    os.close(terminal)
    return seen


ANSWER = """
import sys
from visualrwkv_hf.cli.options import show_answer
show_answer(sys.argv[1])
"""


def test_an_answer_is_escaped_for_a_terminal_and_kept_for_a_pipe(capsysbinary):
    evil = EVIL.replace("\0", "").replace("\udcff", "")
    seen = seen_at_a_terminal(ANSWER, evil)
    assert seen.decode() == printable(evil)
    show_answer(evil)
    assert capsysbinary.readouterr().out.decode() == evil


def test_a_file_name_in_an_error_is_escaped(tmp_path):
    name = str(tmp_path / "\x1b[31m\u202egnp.exe")
    result = CliRunner().invoke(app, ["ask", name, "What is it?"])
    assert result.exit_code == 1 and "\x1b" not in result.stderr and "\u202e" not in result.stderr
    assert r"\x1b[31m\u202egnp.exe" in result.stderr


def test_a_saved_chat_and_captions_are_escaped(tmp_path):
    folder = save_tiny_model(tmp_path / "tiny")
    from visualrwkv_hf import VisualRWKVForConditionalGeneration, VisualRWKVProcessor

    model = VisualRWKVForConditionalGeneration.from_pretrained(folder)
    chat = Chat(model, VisualRWKVProcessor.from_pretrained(folder))
    chat.branches = {
        "main": [
            {"role": "user", "content": [{"type": "text", "text": "\x1b[2Jquestion"}]},
            {"role": "assistant", "content": "\u202eanswer"},
        ],
        "\x1b[31mred": [],
    }
    chat.save(tmp_path / "chat")
    few = ["--model", str(folder), "--device", "cpu", "--max-new-tokens", "2"]
    result = CliRunner().invoke(app, ["chat", *few], input=f"/load {tmp_path / 'chat'}\n/branch\n")
    assert result.exit_code == 0, result.stderr
    assert not {"\x1b", "\u202e"} & set(result.stderr)
    for shown in (r"\x1b[2Jquestion", r"\u202eanswer", r"\x1b[31mred"):
        assert shown in result.stderr

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "\x1b[31mbad.png").touch()
    Image.new("RGB", (9, 9)).save(pictures / "good.png")
    caption = ["caption", str(pictures), "--prompt", "?", "--output", str(tmp_path / "out.jsonl"), *few]
    result = CliRunner().invoke(app, caption)
    assert result.exit_code == 3 and "\x1b" not in result.stderr and r"\x1b[31mbad.png" in result.stderr
