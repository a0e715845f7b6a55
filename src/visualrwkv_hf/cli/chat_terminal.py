"""The lines of `visualrwkv chat`: questions and commands in, answers out, until there are no more."""

import contextlib
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from ..inference.pictures import content_parts, is_film, refuse_missing_picture
from ..inference.printable import one_line, printable
from .options import sentence, show_answer
from .steps import speed_report, steps

if TYPE_CHECKING:
    from ..inference.chat import Chat

PROMPT = "> "


class Command(NamedTuple):
    """What one may type in place of a question."""

    run: Callable[["Terminal", str], None]
    argument: str
    help: str


class Terminal:
    """Answer lines until there are no more.

    Answers go to standard output and everything else to standard error, so that `... | visualrwkv chat > answers.txt`
    writes answers only.

    Args:
        chat: the conversation.
        verbose: whether speed and memory are reported after each answer.
    """

    def __init__(self, chat: "Chat", verbose: bool = False):
        self.chat, self.verbose = chat, verbose
        self.is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.has_ended = False

    def run(self) -> bool:
        """Answer all lines. Return whether each could be answered; a person at a terminal has seen which could not."""
        if self.is_interactive:
            self.note(
                "Ask a question. /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends the chat."
            )
        all_answered = True
        for line in self.lines():
            all_answered &= self.answered(line.strip())
            if self.has_ended:
                break
        return all_answered or self.is_interactive

    def lines(self) -> Iterator[str]:
        """Yield what is typed, or the lines of a pipe. Several lines that are pasted at once are one question."""
        if not self.is_interactive:
            yield from sys.stdin
            return
        prepare_input()
        while True:
            try:
                yield input(PROMPT)
            except EOFError:
                typer.echo()
                return
            except KeyboardInterrupt:
                self.note("\nCtrl-D or /quit ends the chat.")

    def answered(self, line: str) -> bool:
        """Do what a line asks for. An error takes one line, and the chat goes on. Return whether there was none."""
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
        except Exception as error:
            typer.secho(f"Error: {sentence(error)}", err=True, fg="red")
            return False
        return True

    def command(self, line: str) -> None:
        """Run the command that a line names."""
        name, _, argument = line.partition(" ")
        if name not in COMMANDS:
            raise ValueError(f"There is no command {name}. /help lists the commands.")
        command, argument = COMMANDS[name], argument.strip()
        if bool(argument) and not command.argument:
            raise ValueError(f"{name} takes no argument, got {argument!r}.")
        if not argument and command.argument and not command.argument.startswith("["):
            raise ValueError(f"{name} needs an argument: {name} {command.argument}")
        command.run(self, argument)

    def ask(self, question: str) -> None:
        """Stream an answer. Ctrl-C stops it at once; in a pipe it ends the program."""
        with self.interruptible() as is_stopped:
            with steps("reading the prompt") as step:
                pieces = self.chat.ask(question, is_stopped, step)
                piece = next(pieces, None)
            with contextlib.closing(pieces):
                if piece is None and not is_stopped():
                    self.note("(no answer)")
                while piece is not None:
                    show_answer(piece)
                    piece = None if is_stopped() else next(pieces, None)
            typer.echo()
            if is_stopped():
                self.note("(stopped)")
            elif self.is_interactive or self.verbose:
                self.report_speed()

    def report_speed(self) -> None:
        """Say how long the first word took and how fast the others came."""
        last = self.chat.last
        if self.verbose:
            self.note(speed_report(last, self.chat.model))
        else:
            self.note(f"first word after {last.speed.first_seconds:.2f} s, then {last.speed.writing}")

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[Callable[[], bool]]:
        """Yield a function that tells whether Ctrl-C was pressed. In a pipe, Ctrl-C ends the program instead.

        Ctrl-C is noted, not raised: an exception that comes while Python frees an object is lost.
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
        """Print on standard error what is no answer."""
        typer.secho(printable(text), err=True, dim=sys.stderr.isatty() or None)

    # What the commands do.

    def add_pictures(self, paths: Sequence[str], as_film: bool = False) -> None:
        """Put pictures, and frames of films, before the next question: all of them, or none if one cannot be read."""
        for path in paths:
            refuse_missing_picture(path)
        opened = [[part["image"] for part in content_parts(path, as_film=as_film)] for path in paths]
        for path, pictures in zip(paths, opened, strict=True):
            self.chat.pictures += pictures
            size = f"{pictures[0].width} x {pictures[0].height} pixels"
            what = (
                f"{len(pictures)} frames of {size}: they go"
                if is_film(path) or as_film
                else f"{size}: it goes"
            )
            self.note(f"{path}, {what} with your next question.")

    def image(self, argument: str) -> None:
        self.add_pictures(paths_in(argument))

    def video(self, argument: str) -> None:
        self.add_pictures(paths_in(argument), as_film=True)

    def save(self, argument: str) -> None:
        path = one_path(argument)
        self.chat.save(path)
        self.note(f"Saved. /load {path} continues from here.")

    def load(self, argument: str) -> None:
        path = one_path(argument)
        for refusal in self.chat.load(path):
            self.note(f"A saved state cannot be used, so the next question reads the whole chat: {refusal}")
        self.show_place()

    def go_to_branch(self, name: str) -> None:
        if not name:
            for branch, messages in self.chat.branches.items():
                mark = "*" if branch == self.chat.branch else " "
                self.note(f"{mark} {one_line(branch)}: {len(messages) // 2} questions")
        elif self.chat.start_branch(name):
            self.note(f"Branch {name} starts here. /branch NAME goes to another branch.")
        else:
            self.show_place()

    def show_place(self) -> None:
        """Say which branch this is, with its last question and answer."""
        messages = self.chat.messages
        self.note(f"Branch {one_line(self.chat.branch)}, {len(messages) // 2} questions so far.")
        for message, mark in zip(messages[-2:], (PROMPT, "")):
            self.note(mark + text_of(message))

    def reset(self, argument: str) -> None:
        self.chat.reset()
        self.note("The messages and pictures of this branch are forgotten.")

    def help(self, argument: str) -> None:
        for name, command in COMMANDS.items():
            self.note(f"{f'{name} {command.argument}':16} {command.help}")

    def quit(self, argument: str) -> None:
        self.has_ended = True


COMMANDS = {
    "/image": Command(Terminal.image, "PATH...", "puts pictures (files or URLs) before your next question"),
    "/video": Command(
        Terminal.video, "PATH...", "puts frames of films or animations before your next question"
    ),
    "/branch": Command(
        Terminal.go_to_branch,
        "[NAME]",
        "starts a branch here, or goes to that branch; without NAME lists them",
    ),
    "/save": Command(Terminal.save, "FILE", "saves all branches with their pictures and states"),
    "/load": Command(Terminal.load, "FILE", "continues a saved chat in place of this one"),
    "/reset": Command(Terminal.reset, "", "forgets the messages and pictures of this branch"),
    "/help": Command(Terminal.help, "", "lists the commands"),
    "/quit": Command(Terminal.quit, "", "ends the chat"),
}


def prepare_input() -> None:
    """Give `input` a history, file names at the Tab key, and bracketed paste. Windows has no readline.

    With bracketed paste the terminal marks what is pasted, so that its line ends do not submit it: Python turns this
    off by default.
    """
    with contextlib.suppress(ImportError):
        import readline

        readline.set_completer_delims(" \t\n'\"")  # a path is one word
        readline.parse_and_bind("tab: complete")
        readline.parse_and_bind("set enable-bracketed-paste on")


def paths_in(argument: str) -> Sequence[str]:
    """Return the paths in what was typed, as a shell would split them; an existing file's name may hold spaces.

    Raises:
        ValueError: a quotation mark is not closed.
    """
    if Path(argument).exists():
        return [argument]
    return [str(Path(path).expanduser()) if "://" not in path else path for path in shlex.split(argument)]


def one_path(argument: str) -> str:
    """Return the path in what was typed. Raise `ValueError` if there are several."""
    paths = paths_in(argument)
    if len(paths) != 1:
        raise ValueError(f"Give one file, got {len(paths)}: {' '.join(paths)}. Quote a name that has spaces.")
    return paths[0]


def text_of(message: dict[str, Any]) -> str:
    """Return a message as text, with `[picture]` for each picture."""
    if isinstance(message["content"], str):
        return message["content"]
    return " ".join("[picture]" if part["type"] == "image" else part["text"] for part in message["content"])
