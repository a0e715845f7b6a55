"""What the commands share: options, and errors in one sentence. Quick to import."""

import contextlib
from collections.abc import Iterator
from typing import Annotated

import typer

from ..inference.loading import model_source

ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="A folder or a Hub id. Without it the model inside the package answers."),
]
MaxNewTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="The longest answer, in tokens.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, mps or auto.")]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="float32, bfloat16, float16, or auto for the checkpoint's own.")
]
ImagePositionOption = Annotated[
    str | None,
    typer.Option(
        "--image-position",
        help="first, middle (the sandwich) or last. Without it as the model was trained.",
    ),
]
AccelerateOption = Annotated[
    bool, typer.Option("--accelerate", help="On a CPU: native ops, which a C compiler builds.")
]

INSIDE = """\
The model inside the package answers. It is tiny. It knows one coloured shape ("what shape is in the image?",
"what color is the shape?"), a handwritten digit ("what digit is this?") and an emoji ("what kind of emoji is
this?"). For photographs convert a released model (visualrwkv convert --list) and name it: --model FOLDER."""
"""What to expect of the bundled model, in the words that it was trained on."""


@contextlib.contextmanager
def errors_in_a_sentence(*others: type[Exception]) -> Iterator[None]:
    """What a person can have caused becomes one line on standard error and exit code 1.

    Args:
        others: exceptions that count too, beside `ValueError`, `OSError` and `ImportError`.
    """
    expected: tuple[type[Exception], ...] = (ValueError, OSError, ImportError, *others)
    try:
        yield
    except expected as error:
        typer.secho(f"Error: {sentence(error)}", err=True, fg="red")
        raise typer.Exit(1) from error


def sentence(error: BaseException) -> str:
    """What an exception says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def answering_source(model: str | None) -> str:
    """As `model_source`; of the model inside the package standard error tells what it knows."""
    source = model_source(model)
    if model is None:
        typer.secho(INSIDE, err=True, dim=True)
    return source
