"""What the commands share: options, errors in one sentence, the model that they ask. Light to import."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

DTYPES = ("auto", "float32", "bfloat16", "float16")

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


def model_source(model: str | None) -> str:
    """A folder or a Hub id: the one asked for, or the model inside the package.

    Raises:
        FileNotFoundError: none was asked for, and there is none inside.
        ValueError: it is a folder without a model.
    """
    if model is None:
        from . import bundled_model

        return str(bundled_model())
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise ValueError(f"{model} is not a model folder: it has no config.json.")
    return model


def answering_source(model: str | None) -> str:
    """As `model_source`; of the model inside the package standard error tells what it knows."""
    source = model_source(model)
    if model is None:
        typer.secho(INSIDE, err=True, dim=True)
    return source


def refuse_missing_picture(picture: str) -> None:
    """Raises `ValueError` if `picture` is neither a file nor a URL."""
    if not picture.startswith(("http://", "https://")) and not Path(picture).is_file():
        raise ValueError(f"There is no picture {picture}.")


def refuse_unknown_dtype(dtype: str) -> None:
    """Raises `ValueError` for a dtype that no model here has."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")


def load_model(source: str, device: str, dtype: str, accelerate: bool = False) -> Any:
    """The model of `source`, ready to answer.

    Raises:
        ValueError: a device or dtype that is none here, or native ops elsewhere than on a CPU.
    """
    from transformers import AutoModelForImageTextToText

    refuse_unknown_dtype(dtype)
    device = usable_device(device)
    if accelerate and device != "cpu":
        raise ValueError(
            f"--accelerate is for a CPU, the device is {device}: give --device cpu, or leave it out."
        )
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype).to(device).eval()
    if accelerate:
        from .native_layers import accelerate_on_cpu

        try:
            accelerate_on_cpu(model)
        except RuntimeError as error:  # no compiler
            raise ValueError(f"--accelerate: {error}") from error
    return model


def usable_device(name: str) -> str:
    """`name`, or what "auto" stands for: the accelerator if there is one.

    Raises:
        ValueError: if nothing can be put there.
    """
    import torch

    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator.type if accelerator else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:  # which one depends on how torch was built
        raise ValueError(f"There is no device {name!r} here.") from error
    return name
