"""`visualrwkv caption`: an answer about every picture of a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..inference.loading import load_model, refuse_unknown_dtype
from .options import (
    AccelerateOption,
    DeviceOption,
    DtypeOption,
    ImagePositionOption,
    MaxNewTokensOption,
    ModelOption,
    answering_source,
    errors_in_a_sentence,
)

BAD_FILES, INTERRUPTED = 3, 130
"""Exit codes: files that are no pictures; Ctrl-C, as shells count it."""


def caption(
    folder: Annotated[Path, typer.Argument(help="Pictures, in folders below it as well.")],
    prompt: Annotated[str, typer.Option(help="What to ask about every picture.")],
    output: Annotated[Path, typer.Option(help="A file of JSON lines. An unfinished one is gone on with.")],
    model: ModelOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures that are read at once.")] = 8,
    max_new_tokens: MaxNewTokensOption = 128,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    image_position: ImagePositionOption = None,
    accelerate: AccelerateOption = False,
) -> None:
    """Asks the same about every picture of a folder; stopped and started again, it goes on where it was.

    OUTPUT.summary.json beside the output says what was asked and which files are no pictures. With such files the exit
    code is 3.
    """
    from jinja2 import TemplateError

    with errors_in_a_sentence(TemplateError):
        refuse_unknown_dtype(dtype)
        source = answering_source(model)

        from ..inference.captioning import Captioning

        settings = dict(
            model=source, prompt=prompt, max_new_tokens=max_new_tokens, image_position=image_position
        )
        work = Captioning(folder, output, settings)
        with work.locked():
            if work.todo():
                processor = asked_processor(source, prompt, image_position)
                caption_all(work, load_model(source, device, dtype, accelerate), processor, batch_size)
            report(work)
    if work.bad:
        raise typer.Exit(BAD_FILES)


def asked_processor(source: str, prompt: str, image_position: str | None) -> Any:
    """The processor of `source`. Raises `jinja2.TemplateError`, before weights are read, for what it cannot ask."""
    from transformers import AutoProcessor

    from ..inference.chat import chat_inputs

    processor = AutoProcessor.from_pretrained(source)
    chat_inputs(processor, [{"role": "user", "content": prompt}], image_position)
    return processor


def caption_all(work: Any, model: Any, processor: Any, batch_size: int) -> None:
    """Does what is to do, with a bar. Ctrl-C leaves what is written and says so."""
    done = len(work.names) - len(work.todo())
    try:
        with progress_bar(len(work.names), done) as advance:
            for names in work.run(model, processor, batch_size):
                advance(len(names))
    except KeyboardInterrupt:
        typer.echo(f"Stopped. The same command goes on with {work.output}.", err=True)
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def progress_bar(total: int, done: int) -> Iterator[Any]:
    """Pictures on the terminal; nothing where standard error is none. Yields what takes the number of new ones."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("pictures"), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=total, completed=done)
        yield lambda count: progress.advance(bar, count)


def report(work: Any) -> None:
    """Says what there is, and which files are no pictures."""
    for name, error in sorted(work.bad.items()):
        typer.secho(f"{name}: {error}", err=True, fg="yellow")
    answered = len(work.names) - len(work.bad)
    bad = f", {len(work.bad)} cannot be read" if work.bad else ""
    typer.echo(f"{answered} of {len(work.names)} pictures are in {work.output}{bad}.", err=True)
