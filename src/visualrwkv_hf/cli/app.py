"""The `visualrwkv` command: one file for each command, each quick to import."""

import typer

from .ask import ask
from .caption import caption
from .chat import chat
from .convert import convert
from .info import info
from .serve import serve
from .show import show

HELP = "VisualRWKV: talk about pictures, caption and serve them, convert a checkpoint, look inside."

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (ask, chat, caption, serve, convert, info, show):
    app.command()(command)
