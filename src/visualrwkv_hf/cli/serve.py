"""`visualrwkv serve`: the OpenAI-compatible server of transformers with our models in it."""

from typing import Annotated

import typer

from ..inference.loading import refuse_unknown_dtype
from .options import DeviceOption, DtypeOption, answering_source, errors_in_a_sentence


def serve(
    folder: Annotated[
        str | None,
        typer.Argument(metavar="[DIR]", help="A model's folder. Without it the model inside the package."),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on.")] = 8000,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Serves a model to OpenAI clients: chat with pictures, streamed."""
    with errors_in_a_sentence():
        refuse_unknown_dtype(dtype)
        source = answering_source(folder)

        from ..inference.server import serve as run_server

        run_server(source, host=host, port=port, device=device, dtype=dtype)
