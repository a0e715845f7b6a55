"""`visualrwkv chat`: a conversation in the terminal, or questions from a pipe."""

import contextlib
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ..inference.loading import load_model, refuse_missing_picture, refuse_unknown_dtype
from .options import (
    AccelerateOption,
    DeviceOption,
    DtypeOption,
    ImagePositionOption,
    MaxNewTokensOption,
    ModelOption,
    answering_source,
    errors_in_a_sentence,
    sentence,
)

if TYPE_CHECKING:
    from ..inference.chat import Chat

PROMPT = "> "


def chat(
    pictures: Annotated[
        list[str] | None, typer.Argument(metavar="[PICTURE]...", help="Files or URLs to begin with.")
    ] = None,
    model: ModelOption = None,
    max_new_tokens: MaxNewTokensOption = 256,
    temperature: Annotated[
        float, typer.Option(min=0, help="0: always the likeliest word. 1: as likely as the model has it.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Of the likeliest words, those that are so likely together.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same words again, above temperature 0.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    image_position: ImagePositionOption = None,
    accelerate: AccelerateOption = False,
) -> None:
    """Talks about pictures. /help shows what else you can type; questions may come from a pipe, one a line."""
    from jinja2 import TemplateError

    with errors_in_a_sentence(TemplateError):
        for picture in pictures or []:
            refuse_missing_picture(picture)
        refuse_unknown_dtype(dtype)
        sampling: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            sampling |= {"temperature": temperature, "top_p": top_p}
        session = start_chat(
            answering_source(model),
            device,
            dtype,
            accelerate,
            seed,
            image_position=image_position,
            max_new_tokens=max_new_tokens,
            **sampling,
        )
        terminal = Terminal(session)
        for picture in pictures or []:
            terminal.add_picture(picture)
        if not terminal.run():
            raise typer.Exit(1)


def start_chat(
    source: str, device: str, dtype: str, accelerate: bool, seed: int | None, **options: Any
) -> "Chat":
    """The model of `source` in a [`Chat`]. The heavy imports are here, so that `visualrwkv --help` is quick."""
    from transformers import AutoProcessor, set_seed

    from ..inference.chat import Chat, chat_inputs

    processor = AutoProcessor.from_pretrained(source)
    # What the template refuses shows before the weights are read.
    chat_inputs(processor, [{"role": "user", "content": "?"}], options["image_position"])
    vlm = load_model(source, device, dtype, accelerate)
    if seed is not None:
        set_seed(seed)
    return Chat(vlm, processor, **options)


class Command(NamedTuple):
    """What one may type in the place of a question."""

    run: Callable[["Terminal", str], None]
    argument: str
    help: str


class Terminal:
    """Lines in, answers out: questions and commands until there are no more.

    Answers go to standard output, all else to standard error, so that `... | visualrwkv chat > answers.txt` holds
    answers alone.

    Args:
        chat: what is talked to.
    """

    def __init__(self, chat: "Chat"):
        from rich.console import Console

        self.chat = chat
        self.out, self.notes = Console(), Console(stderr=True)
        self.is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.has_ended = False

    def run(self) -> bool:
        """Answers all lines. Returns whether each could be; a person at a terminal has seen which could not."""
        if self.is_interactive:
            self.note("Ask something, /help shows the commands, Ctrl-C stops an answer, Ctrl-D ends.")
        all_answered = True
        for line in self.lines():
            all_answered &= self.answered(line.strip())
            if self.has_ended:
                break
        return all_answered or self.is_interactive

    def lines(self) -> Iterator[str]:
        if not self.is_interactive:
            yield from sys.stdin
            return
        remember_lines()
        while True:
            try:
                yield input(PROMPT)
            except EOFError:
                self.out.print()
                return
            except KeyboardInterrupt:
                self.note("\nCtrl-D or /quit ends the chat.")

    def answered(self, line: str) -> bool:
        """Does what a line asks for. An error is one line, and the chat goes on."""
        from jinja2 import TemplateError

        try:
            if line.startswith("/"):
                self.command(line)
            elif line:
                self.ask(line)
        except BrokenPipeError:  # nobody reads the answers
            raise
        except KeyboardInterrupt:
            if not self.is_interactive:
                raise
            self.note("(stopped)")
        except (ValueError, OSError, RuntimeError, TemplateError) as error:
            self.notes.print(f"Error: {sentence(error)}", style="red", **PLAIN)
            return False
        return True

    def command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        if name not in COMMANDS:
            raise ValueError(f"There is no command {name}: /help shows them.")
        command, argument = COMMANDS[name], argument.strip()
        if bool(argument) and not command.argument:
            raise ValueError(f"{name} takes nothing behind it, got {argument!r}.")
        if not argument and command.argument and not command.argument.startswith("["):
            raise ValueError(f"{name} needs something behind it: {name} {command.argument}.")
        command.run(self, argument)

    def ask(self, question: str) -> None:
        """Streams an answer. Ctrl-C stops it; in a pipe it stops everything."""
        started, pieces = time.perf_counter(), self.chat.ask(question)
        with contextlib.closing(pieces), self.interruptible() as is_stopped:
            with self.notes.status("reading"):
                piece = next(pieces, None)
            waited = time.perf_counter() - started
            if piece is None:
                self.note("(no answer)")
            while piece is not None:
                self.out.print(piece, end="", **PLAIN)
                piece = None if is_stopped() else next(pieces, None)
            self.out.print()
            if is_stopped():
                self.note("(stopped)")
            elif self.is_interactive:
                self.note(f"first word after {waited:.2f} s")

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[Callable[[], bool]]:
        """Yields what tells whether Ctrl-C was pressed, if a person is there; else Ctrl-C ends the program.

        It is noted, not raised: an exception that comes while Python frees an object is lost.
        """
        pressed: list[int] = []
        if not self.is_interactive:
            yield lambda: False
            return
        before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
        try:
            yield lambda: bool(pressed)
        finally:
            signal.signal(signal.SIGINT, before)

    def note(self, text: str) -> None:
        self.notes.print(text, style="dim", **PLAIN)

    # What stands behind the commands.

    def add_pictures(self, argument: str) -> None:
        for path in paths_in(argument):
            self.add_picture(path)

    def add_picture(self, path: str) -> None:
        refuse_missing_picture(path)
        width, height = self.chat.add_picture(path).size
        self.note(f"{path}, {width} x {height} pixels: your next question is about it.")

    def save(self, argument: str) -> None:
        path = one_path(argument)
        self.chat.save(path)
        self.note(f"Saved in {path}: /load {path} goes on.")

    def load(self, argument: str) -> None:
        path = one_path(argument)
        for refusal in self.chat.load(path):
            self.note(f"A state could not be taken, the next question reads all again: {refusal}")
        self.show_place()

    def go_to_branch(self, name: str) -> None:
        if not name:
            for branch, messages in self.chat.branches.items():
                mark = "*" if branch == self.chat.branch else " "
                self.note(f"{mark} {branch}: {len(messages) // 2} questions")
        elif self.chat.start_branch(name):
            self.note(f"Branch {name} starts here; /branch NAME goes back to another one.")
        else:
            self.show_place()

    def show_place(self) -> None:
        """Where the chat is: its branch, and its last question and answer."""
        messages = self.chat.messages
        self.note(f"Branch {self.chat.branch}, {len(messages) // 2} questions so far.")
        for message, mark in zip(messages[-2:], (PROMPT, "")):
            self.note(mark + text_of(message))

    def reset(self, argument: str) -> None:
        self.chat.reset()
        self.note("Forgotten: words and pictures of this branch.")

    def help(self, argument: str) -> None:
        for name, command in COMMANDS.items():
            self.note(f"{f'{name} {command.argument}':16} {command.help}")

    def quit(self, argument: str) -> None:
        self.has_ended = True


PLAIN: dict[str, Any] = dict(markup=False, highlight=False, soft_wrap=True)
"""What a model or a person wrote is printed as it is."""

COMMANDS = {
    "/image": Command(
        Terminal.add_pictures, "PATH...", "puts pictures (files or URLs) before your next question"
    ),
    "/branch": Command(
        Terminal.go_to_branch, "[NAME]", "starts a branch here, or goes to that one; alone, shows all"
    ),
    "/save": Command(Terminal.save, "FILE", "keeps all branches with their pictures and states"),
    "/load": Command(Terminal.load, "FILE", "goes on with what /save kept, in the place of this chat"),
    "/reset": Command(Terminal.reset, "", "forgets words and pictures of this branch"),
    "/help": Command(Terminal.help, "", "shows this"),
    "/quit": Command(Terminal.quit, "", "ends the chat"),
}


def remember_lines() -> None:
    """Gives `input` a history, and the names of files at the tab key. Windows has neither."""
    with contextlib.suppress(ImportError):
        import readline

        readline.set_completer_delims(" \t\n'\"")  # a path is one word
        readline.parse_and_bind("tab: complete")


def paths_in(argument: str) -> Sequence[str]:
    """The paths in what was typed, as a shell would take them; a file's own name may hold spaces.

    Raises:
        ValueError: a quotation mark without its other one.
    """
    if Path(argument).exists():
        return [argument]
    return [str(Path(path).expanduser()) if "://" not in path else path for path in shlex.split(argument)]


def one_path(argument: str) -> str:
    """Raises `ValueError` for several."""
    paths = paths_in(argument)
    if len(paths) != 1:
        raise ValueError(
            f"One file is needed, got {len(paths)}: {' '.join(paths)}. Quote a name with spaces."
        )
    return paths[0]


def text_of(message: dict[str, Any]) -> str:
    """A message in a line, with its pictures as a word."""
    if isinstance(message["content"], str):
        return message["content"]
    return " ".join("[picture]" if part["type"] == "image" else part["text"] for part in message["content"])
