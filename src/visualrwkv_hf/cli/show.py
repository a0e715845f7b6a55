"""`visualrwkv show`: a figure of what the model does with a picture."""

from pathlib import Path
from typing import Annotated

import typer

from ..inference.pictures import refuse_missing_picture
from .options import ImagePositionOption, ModelOption, errors_in_a_sentence, fetched


def show(
    picture: Annotated[str, typer.Argument(help="Picture: a file or a URL.")],
    output: Annotated[Path, typer.Option(help="File to write: .png, .svg or .pdf.")],
    question: Annotated[str, typer.Option(help="Question about the picture.")] = "What is in the picture?",
    model: ModelOption = None,
    scan: Annotated[str | None, typer.Option(help="Draw another scan in place of the model's.")] = None,
    image_position: ImagePositionOption = None,
) -> None:
    """Draw the patch grid, the order in which the first four layers read it, and the prompt around it."""
    with errors_in_a_sentence():
        refuse_missing_picture(picture)
        source = fetched(model)

        from ..inference.figure import reading_figure, save_figure

        figure = reading_figure(picture, question, source, scan=scan, image_position=image_position)
        save_figure(figure, output)
        typer.echo(output)
