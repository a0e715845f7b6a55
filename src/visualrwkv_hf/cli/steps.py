"""What is being done, in a line on standard error while that is a terminal, and nothing otherwise."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import typer

from ..inference.printable import one_line

Step = Callable[[str], None]


@contextlib.contextmanager
def steps(first: str = "") -> Iterator[Step]:
    """Show what is done and for how long, in a line that vanishes at the end.

    Args:
        first: the words to begin with.

    Yields:
        Callable: takes the words for what is done now, from any thread.
    """
    if not sys.stderr.isatty():
        yield lambda words: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=5) as progress:
        task = progress.add_task(first)
        yield lambda words: progress.update(task, description=one_line(words))


def speed_report(generation: Any, model: Any) -> str:
    """Return what `--verbose` says after an answer."""
    from ..inference.progress import backend_of, peak_memory

    speed = generation.speed
    return (
        f"{speed.prompt_tokens} tokens read at {speed.reading}, first word after {speed.first_seconds:.2f} s, "
        f"{speed.tokens} tokens written at {speed.writing}, peak memory {peak_memory(model)}, {backend_of(model)}"
    )


def say_backend(model: Any) -> None:
    """Say at a terminal with what a model computes."""
    from ..inference.progress import backend_of

    if sys.stderr.isatty():
        say(f"Computing: {backend_of(model)}.")


def leave_at_once(code: int) -> NoReturn:
    """End the program without waiting for a thread that is still computing."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def say(text: str) -> None:
    """Print a line on standard error that is safe to show."""
    typer.echo(one_line(text), err=True)
