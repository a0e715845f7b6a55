"""`visualrwkv show`: a figure of what the model does with a picture."""

from pathlib import Path
from typing import Annotated

import typer

from ..inference.loading import model_source, refuse_missing_picture
from .options import ImagePositionOption, ModelOption, errors_in_a_sentence


def show(
    picture: Annotated[str, typer.Argument(help="A picture: a file or a URL.")],
    output: Annotated[Path, typer.Option(help="The figure: .png, .svg or .pdf.")],
    question: Annotated[str, typer.Option(help="What is asked about it.")] = "What is in the picture?",
    model: ModelOption = None,
    scan: Annotated[
        str | None, typer.Option(help="Another scan than the model's, to see what it does.")
    ] = None,
    image_position: ImagePositionOption = None,
) -> None:
    """Draws the patch grid, the order in which the first four layers read it, and the prompt around it."""
    from jinja2 import TemplateError

    with errors_in_a_sentence(TemplateError):
        refuse_missing_picture(picture)
        source = model_source(model)

        from ..inference.figure import reading_figure, save_figure

        save_figure(
            reading_figure(picture, question, source, scan=scan, image_position=image_position), output
        )
        typer.echo(output)
