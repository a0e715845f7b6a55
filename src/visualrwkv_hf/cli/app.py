"""The `visualrwkv` command: one file for each command, each quick to import."""

from typing import Annotated

import typer

from .ask import ask
from .caption import caption
from .chat import chat
from .convert import convert
from .info import info
from .models import models
from .quantize import quantize
from .serve import serve
from .show import show

HELP = "VisualRWKV: ask about pictures, chat, caption, serve and inspect models, and convert checkpoints."

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for command in (ask, chat, caption, serve, convert, quantize, info, show):
    app.command()(command)
app.add_typer(models, name="models")


def print_version(wanted: bool) -> None:
    """Print the version and end the program, if asked to."""
    if wanted:
        from .. import __version__

        typer.echo(f"visualrwkv-hf {__version__}")
        raise typer.Exit


@app.callback(help=HELP)
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Take the options that come before a command."""
