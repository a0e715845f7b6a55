"""A chat: its answers are those of `generate`, it reads only what is new, and its terminal outlives every mistake."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from patience import PATIENCE
from PIL import Image
from tiny_training import save_tiny_model, tiny_model, tiny_processor
from typer.testing import CliRunner

from visualrwkv_hf import Chat, TunedState, VisualRWKVForConditionalGeneration, VisualRWKVProcessor
from visualrwkv_hf.cli.app import app
from visualrwkv_hf.cli.chat_terminal import COMMANDS, paths_in
from visualrwkv_hf.cli.options import answering_source
from visualrwkv_hf.inference import chat_inputs, stream_answer

GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(folder):
    """A new one for each test: its store is empty."""
    return VisualRWKVForConditionalGeneration.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(folder):
    return VisualRWKVProcessor.from_pretrained(folder)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.radial_gradient("L").convert("RGB").save(path)
    return path


@pytest.fixture
def chat(model, processor, picture):
    """One that has a picture and has answered one question."""
    chat = Chat(model, processor, **GREEDY)
    chat.add_picture(picture)
    answer(chat, "What is this?")
    return chat


def answer(chat, question):
    return "".join(chat.ask(question))


def by_hand(folder, processor, messages):
    """The answer of a model that has no store."""
    model = VisualRWKVForConditionalGeneration.from_pretrained(folder)
    inputs = chat_inputs(processor, messages)
    output = model.generate(**inputs, **GREEDY)
    return processor.post_process_image_text_to_text(output, prompt_length=inputs["input_ids"].shape[1])[0]


class Reading:
    """Counts what a model reads: tokens of the language model, pictures of the tower."""

    def __init__(self, model):
        self.tokens = self.pictures = 0
        model.model.language_model.register_forward_pre_hook(self.count_tokens, with_kwargs=True)
        model.model.vision_tower.register_forward_pre_hook(self.count_pictures)

    def count_tokens(self, module, args, kwargs):
        self.tokens += kwargs["inputs_embeds"].shape[1]

    def count_pictures(self, module, args):
        self.pictures += len(args[0])


# Answers.


def test_every_turn_is_answered_as_by_generate(folder, chat, processor):
    for question in ("What is this?", "And why?", "Are you sure?")[1:]:
        asked = [*chat.messages, {"role": "user", "content": [{"type": "text", "text": question}]}]
        assert answer(chat, question) == by_hand(folder, processor, asked)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 3


def test_a_follow_up_reads_only_its_own_words(model, chat, processor):
    reading, question = Reading(model), "And why?"
    said = chat.messages[1]["content"]
    answer(chat, question)
    # Random weights say what a tokenizer would cut otherwise: then the last answer is read with the question.
    new = len(processor.tokenizer.encode(f" {said}\n\nUser: {question}\n\nAssistant:"))
    assert reading.tokens <= new + GREEDY["max_new_tokens"]
    assert reading.pictures == 0


def test_pictures_go_before_the_next_question_only(chat, picture):
    chat.add_picture(picture)
    chat.add_picture(Image.new("RGB", (30, 20), "red"))
    answer(chat, "And these?")
    answer(chat, "All of them?")
    kinds = [[part["type"] for part in message["content"]] for message in chat.messages[::2]]
    assert kinds == [["image", "text"], ["image", "image", "text"], ["text"]]


def test_a_consumer_that_stops_keeps_what_was_said(model, processor):
    chat, threads = Chat(model, processor, max_new_tokens=10_000, do_sample=False), threading.active_count()
    pieces = chat.ask("Talk.")
    said = next(pieces) + next(pieces)
    steps = []
    with_steps = chat.model.register_forward_pre_hook(lambda *_: steps.append(1))
    pieces.close()
    with_steps.remove()
    assert len(steps) < 1_000  # of 10,000 words
    assert chat.messages[1] == {"role": "assistant", "content": said}
    assert threading.active_count() == threads


def test_an_error_in_generate_reaches_the_consumer_and_leaves_the_chat(chat, monkeypatch, picture):
    def out_of_memory(**kwargs):
        raise RuntimeError("out of memory")

    before = list(chat.messages)
    chat.add_picture(picture)
    monkeypatch.setattr(chat.model, "generate", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        answer(chat, "And now?")
    assert chat.messages == before and len(chat.pictures) == 1
    monkeypatch.undo()
    assert answer(chat, "And now?")


def test_stream_answer_gives_the_text_of_generate(folder, model, processor):
    messages = [{"role": "user", "content": "Say something."}]
    inputs = chat_inputs(processor, messages)
    pieces = list(stream_answer(model, processor.tokenizer, inputs, **GREEDY))
    assert "".join(pieces) == by_hand(folder, processor, messages) and len(pieces) > 1


def test_a_prompt_that_is_left_is_not_read_to_its_end(chat):
    before, stopped, left, pieces = list(chat.messages), threading.Event(), threading.Event(), []

    def hold(*_):
        pieces.append(1)
        stopped.set()
        assert left.wait(PATIENCE)

    with chat.model.model.language_model.register_forward_hook(hold):
        assert list(chat.ask("ab " * 4000, stopped.is_set)) == []
        left.set()
        chat.wait()
    assert len(pieces) == 1 and chat.messages == before
    assert "".join(chat.ask("What is it?"))


def test_an_answer_can_be_left_while_its_prompt_is_read(chat, monkeypatch):
    """At once, although `generate` is still busy; the next question waits until the model is free."""
    busy, free = threading.Event(), threading.Event()
    generate = chat.model.generate

    def slow(**kwargs):
        busy.set()
        assert free.wait(PATIENCE)
        return generate(**kwargs)

    before = list(chat.messages)
    monkeypatch.setattr(chat.model, "generate", slow)
    assert list(chat.ask("And now?", busy.is_set)) == []
    assert chat.is_busy and chat.messages == before
    monkeypatch.undo()
    threading.Timer(0.2, free.set).start()
    said = []
    assert "".join(chat.ask("And now?", report=said.append))
    assert said[0] == "finishing what was stopped" and not chat.is_busy
    assert len(chat.messages) == len(before) + 2


def test_what_is_done_before_the_first_word_is_reported(model, processor, picture):
    chat, said = Chat(model, processor, **GREEDY), []
    chat.add_picture(picture)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    "".join(chat.ask("What is this?", report=said.append))
    assert any("encoding the picture with clip" in words for words in said)
    length = chat_inputs(processor, chat.messages[:1])["input_ids"].shape[1]
    assert any(words.startswith("reading the prompt: 0 of") for words in said)
    assert all(f"of {length} tokens" in words for words in said if words.startswith("reading"))
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks  # generating has none
    speed = chat.last.speed
    assert speed.prompt_tokens == length and 0 < speed.tokens <= GREEDY["max_new_tokens"]
    assert speed.first_seconds > 0 and "tokens/s" in speed.reading


# Branches and files.


def test_branches_do_not_see_one_another(folder, chat, processor):
    begun = list(chat.messages)
    assert chat.start_branch("other")
    there = answer(chat, "Is it round?")
    assert not chat.start_branch("main")
    assert chat.messages == begun
    answer(chat, "What colour?")
    chat.start_branch("other")
    assert [m["content"] for m in chat.messages[3:]] == [there]
    chat.reset()
    assert chat.messages == [] and len(chat.branches["main"]) == 4


def test_a_saved_chat_goes_on_without_reading_its_picture_again(folder, chat, processor, tmp_path):
    chat.start_branch("other")
    answer(chat, "Is it round?")
    chat.add_picture(Image.new("RGB", (9, 9), "blue"))
    chat.save(tmp_path / "kept")
    loaded = Chat(VisualRWKVForConditionalGeneration.from_pretrained(folder), processor, **GREEDY)
    assert loaded.load(tmp_path / "kept") == []
    assert loaded.branch == "other" and [p.getpixel((0, 0)) for p in loaded.pictures] == [(0, 0, 255)]
    loaded.pictures, chat.pictures = [], []
    reading = Reading(loaded.model)
    for branch in ("other", "main"):
        loaded.start_branch(branch)
        chat.start_branch(branch)
        assert answer(loaded, "And then?") == answer(chat, "And then?")
    assert reading.pictures == 0
    assert zipfile.ZipFile(tmp_path / "kept").namelist().count("pictures/1.png") == 1


def test_a_chat_with_another_model_is_read_again_and_says_so(chat, tmp_path):
    chat.save(tmp_path / "kept")
    other = tiny_model()
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    loaded = Chat(other, tiny_processor(other), **GREEDY)
    (refusal,) = loaded.load(tmp_path / "kept")
    assert "another model" in refusal and "weights" in refusal
    reading = Reading(other)
    answer(loaded, "And then?")
    assert reading.pictures == 1 and len(loaded.messages) == 4


def test_a_chat_that_began_with_another_tuned_state_is_read_again_and_says_so(folder, processor, tmp_path):
    def begun(seed):
        model = VisualRWKVForConditionalGeneration.from_pretrained(folder)
        if seed is not None:
            state = TunedState.attach(model)
            generator = torch.Generator().manual_seed(seed)
            for weight in state.parameters():
                weight.data.normal_(std=1e3, generator=generator)
        return Chat(model, processor, **GREEDY)

    for seed in (None, 1):
        chat = begun(seed)
        answer(chat, "What is this?")
        chat.save(tmp_path / "kept")
        for other in (None, 1, 2):
            loaded = begun(other)
            refusals = loaded.load(tmp_path / "kept")
            assert len(refusals) == (other != seed)
            reading, read_all = Reading(loaded.model), chat_inputs(processor, chat.messages)["input_ids"]
            again = begun(other)
            again.branches = {name: list(messages) for name, messages in loaded.branches.items()}
            assert answer(loaded, "And why?") == answer(again, "And why?")
            assert (reading.tokens > read_all.shape[1]) == bool(refusals)
            assert all("did not begin as this model does" in refusal for refusal in refusals)


def test_a_file_is_written_whole_or_not_at_all(chat, tmp_path, monkeypatch):
    kept = tmp_path / "folder" / "kept"
    kept.parent.mkdir()
    chat.save(kept)
    before = kept.read_bytes()
    monkeypatch.setattr("visualrwkv_hf.inference.chat.ChatWriter.finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        chat.save(kept)
    assert kept.read_bytes() == before and list(kept.parent.iterdir()) == [kept]


def test_other_files_are_refused_and_leave_the_chat(chat, tmp_path):
    chat.save(tmp_path / "kept")
    content = (tmp_path / "kept").read_bytes()
    (tmp_path / "cut").write_bytes(content[: len(content) // 2])
    (tmp_path / "text").write_text("hello")
    with zipfile.ZipFile(tmp_path / "empty", "w"):
        pass
    with zipfile.ZipFile(tmp_path / "other", "w") as file:
        file.writestr("chat.json", '{"format": "a chat of another kind"}')
    with zipfile.ZipFile(tmp_path / "list", "w") as file:
        file.writestr("chat.json", "[]")
    before = list(chat.messages)
    for name in ("cut", "text", "empty", "other", "list"):
        with pytest.raises(ValueError, match=f"{name} is not a saved chat"):
            chat.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        chat.load(tmp_path / "missing")
    assert chat.messages == before


# The terminal: lines of a pipe.


def run_chat(folder, lines, *arguments):
    arguments = [
        "chat",
        *map(str, arguments),
        "--model",
        str(folder),
        "--max-new-tokens",
        "8",
        "--device",
        "cpu",
    ]
    return CliRunner().invoke(app, arguments, input="".join(f"{line}\n" for line in lines))


def errors_of(result):
    return [line for line in result.stderr.splitlines() if line.startswith("Error: ")]


def test_questions_of_a_pipe_are_answered_line_by_line(folder, processor, picture):
    result = run_chat(folder, ["What is this?", "", "And why?"], picture)
    assert result.exit_code == 0, result.stderr
    content = [{"type": "image", "image": str(picture)}, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": content}]
    first = by_hand(folder, processor, messages)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "And why?"}]
    assert result.stdout == f"{first}\n{by_hand(folder, processor, messages)}\n"


MISTAKES = {
    "/what": "There is no command /what. /help lists the commands.",
    "/image none.png": "There is no picture none.png.",
    "/image": "/image needs an argument: /image PATH...",
    '/image "none.png': "No closing quotation",
    "/image {text}": "{text}' cannot be read as a picture",
    "/reset all": "/reset takes no argument, got 'all'.",
    "/load none": "No such file or directory: 'none'",
    "/load {text}": "is not a saved chat",
    "/save a b": "Give one file, got 2",
    "/save none/kept": "No such file or directory",
    "What is <image>?": "contains '<image>', which is reserved",
}


def test_a_mistake_is_one_line_and_the_chat_goes_on(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("hello")
    text = str(tmp_path / "text")
    result = run_chat(folder, [*(line.replace("{text}", text) for line in MISTAKES), "Still there?"])
    assert result.exit_code == 1  # a program that pipes is to know
    assert result.stdout.strip() and result.stdout.count("\n") == 1
    for error, wanted in zip(errors_of(result), MISTAKES.values(), strict=True):
        assert wanted.replace("{text}", text) in error


def test_of_several_pictures_all_are_put_before_the_question_or_none(folder, processor, picture, tmp_path):
    (tmp_path / "text.png").write_text("hello")
    for bad in (tmp_path / "none.png", tmp_path / "text.png"):
        result = run_chat(folder, [f"/image {picture} {bad}", "What is this?"])
        assert len(errors_of(result)) == 1
        alone = [{"role": "user", "content": "What is this?"}]
        assert result.stdout == f"{by_hand(folder, processor, alone)}\n"


def test_verbose_tells_speed_memory_and_backend(folder, picture):
    result = run_chat(folder, ["What is this?"], picture, "--verbose")
    for words in (
        " tokens read at ",
        "first word after ",
        " tokens written at ",
        "peak memory ",
        "float32 on cpu",
    ):
        assert words in result.stderr
    quiet = run_chat(folder, ["What is this?"])
    assert quiet.stderr == "" and quiet.stdout  # no terminal: nothing but the answer


def test_commands_branch_keep_and_forget(folder, picture, tmp_path):
    kept = tmp_path / "a chat"
    lines = ["What is this?", "/branch other", "Is it round?", "/branch", "/branch main", f"/save '{kept}'"]
    lines += ["/reset", "/branch", f"/load {kept}", "/branch other", "/help", "/quit", "Not read."]
    result = run_chat(folder, lines, picture)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 2
    notes = result.stderr
    assert re.search(r"  main: 1 questions\n\* other: 2 questions\n", notes)
    assert re.search(r"\* main: 0 questions\n  other: 2 questions\n", notes)
    assert "Branch main, 1 questions so far.\n> [picture] What is this?\n" in notes
    assert "Branch other, 2 questions so far.\n> Is it round?\n" in notes
    assert all(name in notes for name in COMMANDS)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["none.png"], "There is no picture none.png."),
        (["--device", "nowhere"], "There is no device 'nowhere' here."),
        (["--dtype", "float8"], "dtype must be one of"),
        (["--top-p", "0.5"], "--top-p has no effect without a --temperature above 0."),
        (["--image-position", "behind"], "image_position must be 'first', 'middle' or 'last', got 'behind'."),
    ],
)
def test_what_cannot_begin_is_refused_in_one_sentence(folder, arguments, sentence):
    result = CliRunner().invoke(app, ["chat", "--model", str(folder), *arguments], input="Hello\n")
    (line,) = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.exit_code == 1 and result.stdout == ""
    assert line.startswith("Error: ") and sentence in line


def test_sampling_is_the_seeds(folder):
    def sampled(*options):
        return run_chat(folder, ["Talk."], *options).stdout

    hot = ["--temperature", "5"]
    assert sampled(*hot, "--seed", "1") == sampled(*hot, "--seed", "1")
    assert len({sampled(*hot, "--seed", str(seed)) for seed in range(3)}) == 3
    assert sampled(*hot, "--seed", "1", "--top-p", "0.001") == sampled()


def test_paths_are_taken_as_a_shell_takes_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a b.png").touch()
    assert paths_in("a b.png") == ["a b.png"]
    assert paths_in("'a b.png' c.png") == ["a b.png", "c.png"]
    assert paths_in("~/d.png http://host/e.png?a~b") == [str(tmp_path / "d.png"), "http://host/e.png?a~b"]


class TerminalText(io.StringIO):
    """Standard error that is a terminal."""

    def isatty(self):
        return True


def test_the_model_inside_says_once_what_it_is(folder, monkeypatch, tmp_path):
    monkeypatch.setattr("visualrwkv_hf.bundled.bundled_model", lambda: Path(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shown = TerminalText()
    monkeypatch.setattr(sys, "stderr", shown)
    for _ in range(2):
        assert answering_source(None) == str(folder)
    assert shown.getvalue().count("visualrwkv models lists") == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(sys, "stderr", quiet := io.StringIO())
    answering_source(None)
    assert quiet.getvalue() == ""  # a log or a pipe is told nothing


# The terminal: a person at one.


def as_at_a_terminal():
    """Ctrl-C is for who has the terminal, and is not ignored, as it is by what a shell runs in the background."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Person:
    """Types at a terminal and reads what stands there."""

    def __init__(self, *arguments):
        self.terminal, theirs = pty.openpty()
        command = [sys.executable, "-m", "visualrwkv_hf.cli", "chat", *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "120"}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
            preexec_fn=as_at_a_terminal,
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""

    def type(self, text):
        os.write(self.terminal, text.encode())

    def types_until(self, keys, wanted):
        """Types `keys` each second until `wanted` is seen: readline misses a Ctrl-C that comes just as it prompts."""
        for _ in range(120):
            self.type(keys)
            with contextlib.suppress(AssertionError):
                return self.sees(wanted, seconds=1)
        return self.sees(wanted)

    def sees(self, wanted, seconds=PATIENCE):
        """Reads on until `wanted` stands there, and gives what stands before it."""
        end = time.monotonic() + seconds
        while wanted not in self.seen:
            ready, _, _ = select.select([self.terminal], [], [], max(0, end - time.monotonic()))
            assert ready, f"{wanted!r} never came: {self.seen[-500:]!r}"
            self.seen += os.read(self.terminal, 4096).decode(errors="replace")
        before, _, self.seen = self.seen.partition(wanted)
        return before


def test_lines_that_are_pasted_at_once_are_one_question(folder, tmp_path):
    person = Person("--model", folder, "--device", "cpu", "--max-new-tokens", 2)
    try:
        person.sees("> ")
        person.type("\x1b[200~What is it?\rWhich colour?\rHow many?\x1b[201~")
        person.sees("How many?")
        person.type("\r")
        person.sees("first word after")
        person.sees("> ")
        person.type("/branch\r")
        person.sees("* main: 1 questions")
        person.type(f"/save {tmp_path / 'kept'}\r")
        person.sees("Saved.")
        person.sees("> ")
        person.type("\x04")
        assert person.process.wait(PATIENCE) == 0
    finally:
        person.process.poll() is None and person.process.send_signal(signal.SIGKILL)
        os.close(person.terminal)
    with zipfile.ZipFile(tmp_path / "kept") as file:
        (question, _) = json.loads(file.read("chat.json"))["branches"]["main"]
    assert question["content"] == [{"type": "text", "text": "What is it?\nWhich colour?\nHow many?"}]


def test_control_c_stops_an_answer_and_the_chat_goes_on(folder, picture):
    person = Person(picture, "--model", folder, "--device", "cpu", "--max-new-tokens", 1_000_000)
    try:
        person.sees("Ctrl-D ends the chat.")
        person.sees("> ")
        person.type("Talk.\r")
        person.sees("Talk.\r\n")
        person.sees("reading")
        person.type("\x03")  # at once: the answer may be short
        person.sees("(stopped)")
        person.sees("> ")
        person.types_until("\x03", "Ctrl-D or /quit ends the chat.")
        person.sees("> ")
        person.type("/branch\r")
        person.sees("* main: ")
        person.sees("> ")
        person.type("\x04")
        assert person.process.wait(PATIENCE) == 0
    finally:
        person.process.poll() is None and person.process.send_signal(signal.SIGKILL)
        os.close(person.terminal)
