"""The `visualrwkv` command: one file per door, `cli_*.py`, each light to import."""

import typer

from .cli_ask import ask
from .cli_caption import caption
from .cli_chat import chat
from .cli_convert import convert
from .cli_info import info
from .cli_serve import serve
from .cli_show import show

HELP = "VisualRWKV: talk about pictures, caption and serve them, convert a checkpoint, look inside."

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (ask, chat, caption, serve, convert, info, show):
    app.command()(command)


if __name__ == "__main__":
    app()
