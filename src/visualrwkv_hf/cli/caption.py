"""`visualrwkv caption`: the same question about every picture in a folder."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..inference.libraries import import_libraries
from ..inference.loading import load_model, load_processor, refuse_unknown_dtype, refuse_weights
from ..inference.printable import one_line, printable
from .options import (
    AccelerateOption,
    DeviceOption,
    DtypeOption,
    FpsOption,
    GrammarOption,
    ImagePositionOption,
    JsonSchemaOption,
    MaxNewTokensOption,
    ModelOption,
    NumFramesOption,
    RegexOption,
    TunedStateOption,
    VerboseOption,
    WeightsOption,
    answering_source,
    errors_in_a_sentence,
    form_of,
    refuse_without_effect,
    structured,
)
from .steps import say_backend

BAD_FILES, INTERRUPTED = 3, 130
"""Exit codes: some files cannot be read as pictures; Ctrl-C, as shells count it."""

LONGEST_CAPTION = 200
"""Characters of a caption that are shown above the progress bar."""

MAX_BAD_SHOWN = 50
"""Unreadable files that are named one by one at the end. All of them are in the summary file."""


def caption(
    folder: Annotated[Path, typer.Argument(help="Folder of pictures; its subfolders are searched too.")],
    prompt: Annotated[str, typer.Option(help="Question about every picture.")],
    output: Annotated[Path, typer.Option(help="JSON Lines file to write. An unfinished one is continued.")],
    model: ModelOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of pictures per batch.")] = 8,
    max_new_tokens: MaxNewTokensOption = 128,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    image_position: ImagePositionOption = None,
    films: Annotated[bool, typer.Option("--films", help="Ask about films in the folder as well.")] = False,
    num_frames: NumFramesOption = None,
    fps: FpsOption = None,
    json_schema: JsonSchemaOption = None,
    regex: RegexOption = None,
    grammar: GrammarOption = None,
    accelerate: AccelerateOption = True,
    weights: WeightsOption = None,
    tuned_state: TunedStateOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Ask the same question about every picture in a folder. If it is stopped, the same command continues.

    OUTPUT.summary.json records the settings, the progress and the files that cannot be read. If there are such files,
    the exit code is 3.
    """
    with errors_in_a_sentence(verbose):
        refuse_unknown_dtype(dtype)
        refuse_weights(weights, "cpu", accelerate)
        if not films:
            sampling = {"--num-frames": num_frames is not None, "--fps": fps is not None}
            refuse_without_effect(sampling, because="without --films")
        form = form_of(json_schema, regex, grammar)
        source = answering_source(model, weights)

        from ..inference.captioning import Captioning

        settings: dict[str, Any] = dict(
            model=source, prompt=prompt, max_new_tokens=max_new_tokens, image_position=image_position
        )
        if films:
            settings |= dict(films=True, num_frames=num_frames, fps=fps)
        settings |= form
        if weights:
            settings["weights"] = weights
        if tuned_state is not None:
            settings["tuned_state"] = tuned_state
        work = Captioning(folder, output, settings)
        with work.locked():
            if work.todo():
                import_libraries()
                processor = asked_processor(source, prompt, image_position)
                structured(processor, form)  # refuses a wrong schema before the weights are read
                vlm = load_model(source, device, dtype, accelerate, weights=weights, tuned_state=tuned_state)
                say_backend(vlm)
                caption_all(work, vlm, processor, batch_size)
            report(work)
    if work.bad:
        raise typer.Exit(BAD_FILES)


def asked_processor(source: str, prompt: str, image_position: str | None) -> Any:
    """Return the processor of `source`. Raise before the weights are read for a prompt that cannot be asked."""
    from ..inference.chat import chat_inputs

    processor = load_processor(source)
    chat_inputs(processor, [{"role": "user", "content": prompt}], image_position)
    return processor


def caption_all(work: Any, model: Any, processor: Any, batch_size: int) -> None:
    """Answer what is left to do, with captions and a bar at a terminal. Ctrl-C keeps what is written."""
    try:
        with progress_bar(len(work.names), len(work.names) - len(work.todo())) as advance:
            for captions in work.run(model, processor, batch_size):
                advance(captions)
    except KeyboardInterrupt:
        again = f"Stopped. Run the same command again to continue {work.output}."
        typer.echo(one_line(again), err=True)
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def progress_bar(total: int, done: int) -> Iterator[Any]:
    """Show pictures and their captions on standard error while the body runs; nothing if it is not a terminal.

    Yields:
        Callable: takes the captions of a batch, picture -> text.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("pictures"), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=total, completed=done)

        def advance(captions: dict[str, str]) -> None:
            progress.advance(bar, len(captions))
            if console.is_terminal:
                for name, text in captions.items():
                    line = one_line(f"{name}: {text}")[:LONGEST_CAPTION]
                    console.print(line, markup=False, highlight=False)

        yield advance


def report(work: Any) -> None:
    """Say how many pictures are answered, and name files that cannot be read."""
    colour = "yellow" if sys.stderr.isatty() else None
    for name, error in sorted(work.bad.items())[:MAX_BAD_SHOWN]:
        typer.secho(one_line(f"{name}: {error}"), err=True, fg=colour)
    if len(work.bad) > MAX_BAD_SHOWN:
        more = f"... and {len(work.bad) - MAX_BAD_SHOWN:,} more, all of them in {work.summary}"
        typer.secho(printable(more), err=True, fg=colour)
    bad = f"; {len(work.bad):,} cannot be read" if work.bad else ""
    done = f"{len(work.names) - len(work.bad):,} of {len(work.names):,} pictures are in {work.output}{bad}."
    typer.echo(one_line(done), err=True)
