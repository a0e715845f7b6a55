"""Find and load the model that a person named. Quick to import: torch and transformers come when they are needed."""

from pathlib import Path
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16")


def model_source(model: str | None) -> str:
    """A folder or a Hub id: the one asked for, or the model inside the package.

    Raises:
        FileNotFoundError: none was asked for, and there is none inside.
        ValueError: it is a folder without a model.
    """
    if model is None:
        from .. import bundled_model

        return str(bundled_model())
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise ValueError(f"{model} is not a model folder: it has no config.json.")
    return model


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
        from ..cpu.layers import accelerate_on_cpu

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
