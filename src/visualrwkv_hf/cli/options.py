"""What the commands share: options, and errors in one sentence. Quick to import."""

import contextlib
import json
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ..inference.loading import may_be_on_hub, model_folder, model_source
from ..inference.model_cache import cached_model, is_first_notice, is_original
from ..inference.printable import one_line, printable

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Model folder, Hub id, release (v6-1.6b, see `visualrwkv models`), original .pth file or hf:// address. "
        "Default: the small model inside the package.",
    ),
]
MaxNewTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Maximum length of an answer, in tokens.")
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="cpu, cuda, mps, or auto for an accelerator if there is one.")
]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="float32, bfloat16, float16, or auto for the checkpoint's own dtype.")
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        help="int8 or int4 rounds the weights: a half or a quarter of the memory, and faster on a CPU. A release, .pth "
        "file or hf:// address is kept so in the cache. Default: as they are stored.",
    ),
]
TunedStateOption = Annotated[
    str | None,
    typer.Option(
        "--tuned-state",
        help="Folder or Hub id of a tuned state, from which the model begins to read.",
    ),
]
ImagePositionOption = Annotated[
    str | None,
    typer.Option(
        "--image-position",
        help="Where the picture goes in the prompt: first, middle (question, picture, question) or last. "
        "Default: as the model was trained.",
    ),
]
NumFramesOption = Annotated[
    int | None,
    typer.Option(
        "--num-frames", min=1, help="Frames that are taken of a film, evenly over its time. Default: 8."
    ),
]
FpsOption = Annotated[
    float | None,
    typer.Option("--fps", help="Frames a second that are taken of a film, instead of their number."),
]
JsonSchemaOption = Annotated[
    Path | None,
    typer.Option("--json-schema", help="File of a JSON schema: the answer is JSON that fits it."),
]
RegexOption = Annotated[
    str | None,
    typer.Option("--regex", help="Regular expression, in Rust's syntax, that the whole answer matches."),
]
GrammarOption = Annotated[
    Path | None,
    typer.Option(
        "--grammar", help="File of a grammar, in llguidance's variant of Lark, that the answer follows."
    ),
]
AccelerateOption = Annotated[
    bool,
    typer.Option(
        "--accelerate/--no-accelerate",
        help="On a CPU, compute with native ops, which a C compiler builds at first use, or with plain torch.",
    ),
]
MaxShardSizeOption = Annotated[
    str, typer.Option("--max-shard-size", help="Maximum size of one weights file.")
]
VerifyOption = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Read the result back and compare every bit.")
]
PushToHubOption = Annotated[
    str | None, typer.Option("--push-to-hub", metavar="USER/NAME", help="Upload the folder to the Hub, too.")
]
PrivateOption = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Branch to upload to.")]
VerboseOption = Annotated[
    bool,
    typer.Option(
        "--verbose", help="Report speed and memory on standard error, and a traceback for an error."
    ),
]

INSIDE = """\
The model inside the package answers. It is tiny: ask it "what does the sign say?", "how many stars are there?",
"which bar is the tallest?" or "what shape is in the image?". It does not understand photographs: for these, name a
released model (visualrwkv models lists them) with --model."""
"""What to expect of the bundled model, in the words that it was trained on."""

MAX_SENTENCE = 800
"""Longest error message, in characters: what a damaged file holds may be quoted in it."""


@contextlib.contextmanager
def errors_in_a_sentence(verbose: bool = False) -> Iterator[None]:
    """Print an exception as one line on standard error and exit with code 1.

    Every kind is caught, since a stranger's model folder makes the libraries raise anything. `verbose` prints the
    traceback as well.
    """
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):  # not errors of ours
        raise
    except Exception as error:
        if verbose:
            typer.echo(printable("".join(traceback.format_exception(error))), err=True)
        typer.secho(f"Error: {sentence(error)}", err=True, fg="red")
        raise typer.Exit(1) from error


def sentence(error: BaseException) -> str:
    """Return what an exception says in one line that is safe to print."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.strerror}: {str(error.filename)!r}"
    else:
        text = str(error)
    text = one_line(text) or type(error).__name__
    if not isinstance(error, EXPECTED) and not is_of_jinja(error):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= MAX_SENTENCE else text[:MAX_SENTENCE] + "…"


EXPECTED = (ValueError, OSError, ImportError, RuntimeError, MemoryError)
"""Exceptions whose message stands for itself. The type of any other is part of the sentence."""


def is_of_jinja(error: BaseException) -> bool:
    """Return whether a chat template refused the messages, without importing jinja2."""
    return any(cls.__name__ == "TemplateError" for cls in type(error).__mro__)


def refuse_without_effect(options: dict[str, Any], *, because: str) -> None:
    """Raise `ValueError` for the first of `options` that is given; none of them has an effect here."""
    for option, is_given in options.items():
        if is_given:
            raise ValueError(f"{option} has no effect {because}.")


def form_of(json_schema: Path | None, regex: str | None, grammar: Path | None) -> dict[str, str]:
    """Return what the answer must fit as an argument of `structured_output`, before anything slow is imported.

    Returns:
        dict: empty if nothing is asked for; files are read.

    Raises:
        ValueError, OSError: several are given, a file cannot be read, or a schema is no JSON.
    """
    given: dict[str, str | Path | None] = dict(json_schema=json_schema, regex=regex, grammar=grammar)
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in names)
        raise ValueError(f"{options} cannot be given together: an answer has one form.")
    form = {
        name: text_of(value) if isinstance(value, Path) else value
        for name, value in given.items()
        if value is not None
    }
    if "json_schema" in form:
        try:
            json.loads(form["json_schema"])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{json_schema} is no JSON: {error}.") from error
    return form


def text_of(path: Path) -> str:
    """Return the text of a small file.

    Raises:
        ValueError, OSError: it cannot be read, or is too large.
    """
    if path.stat().st_size > MAX_FORM_BYTES:
        raise ValueError(f"{path} has more than {MAX_FORM_BYTES} bytes.")
    try:
        return path.read_text("utf-8")
    except ValueError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}.") from error


MAX_FORM_BYTES = 2**20
"""The largest file of a schema or a grammar."""


def structured(processor: Any, form: dict[str, str]) -> list[Any]:
    """Return the logits processors that let only answers of a form pass: one, or none without a form."""
    if not form:
        return []
    from ..inference.structured import structured_output

    return [structured_output(processor, **form)]  # type: ignore[arg-type]


def show_answer(text: str, end: str = "") -> None:
    """Print a piece of an answer at once: to a terminal without what could steer it, to a pipe or a file as it is."""
    sys.stdout.write((printable(text) if sys.stdout.isatty() else text) + end)
    sys.stdout.flush()


def fetched(model: str | None, weights: str | None = None) -> str:
    """Return the folder or Hub id of a model, after what has to be fetched or converted first, with bars.

    Raises:
        ValueError, OSError: as `model_source`, or it cannot be fetched or converted.
    """
    source = model_source(model)
    if is_original(source):
        from .bars import bytes_bar
        from .steps import say

        with bytes_bar() as bar:
            return str(cached_model(source, weights, bar, say if sys.stderr.isatty() else lambda text: None))
    if may_be_on_hub(source):
        model_folder(source)
    return source


def answering_source(model: str | None, weights: str | None = None) -> str:
    """Return the model's folder or Hub id. At a terminal, say once what the model inside the package can do."""
    source = fetched(model, weights)
    if model is None and sys.stderr.isatty() and is_first_notice():
        typer.secho(INSIDE, err=True, dim=True)
    return source
