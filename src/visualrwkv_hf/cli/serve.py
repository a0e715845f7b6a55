"""`visualrwkv serve`: a model for clients of OpenAI's API."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Annotated, Any

import typer

from ..inference.libraries import import_libraries
from ..inference.loading import refuse_unknown_dtype, refuse_weights
from ..inference.server_limits import Access, Limits
from .options import (
    AccelerateOption,
    DeviceOption,
    DtypeOption,
    TunedStateOption,
    WeightsOption,
    answering_source,
    errors_in_a_sentence,
)


def with_limits(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, in place of its parameter `limits`, one option `--max-...` for each field of [`Limits`]."""
    signature = inspect.signature(command)
    options = [
        inspect.Parameter(
            limit.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=limit.default,
            annotation=Annotated[
                limit.type,
                typer.Option(f"--max-{limit.name.replace('_', '-')}", help=limit.metadata["help"]),
            ],
        )
        for limit in fields(Limits)
    ]

    @wraps(command)
    def run(**given: Any) -> None:
        with errors_in_a_sentence():
            limits = Limits(**{limit.name: given.pop(limit.name) for limit in fields(Limits)})
        command(**given, limits=limits)

    own = [parameter for parameter in signature.parameters.values() if parameter.name != "limits"]
    own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    run.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return run


@with_limits
def serve(
    folder: Annotated[
        str | None,
        typer.Argument(metavar="[DIR]", help="A model's folder. Without it the model inside the package."),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on.")] = 8000,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    accelerate: AccelerateOption = True,
    weights: WeightsOption = None,
    tuned_state: TunedStateOption = None,
    max_states: Annotated[
        int,
        typer.Option(min=0, help="How many states of earlier prompts are kept; 0 keeps none."),
    ] = 16,
    share_states: Annotated[
        bool,
        typer.Option(
            "--share-states",
            help="Let clients continue from one another's states. Each can then tell by the time of an answer what "
            "others have sent.",
        ),
    ] = False,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="VISUALRWKV_API_KEY",
            help="A key that clients must send as their bearer token. Repeat it for several clients.",
        ),
    ] = None,
    allowed_hosts: Annotated[
        str,
        typer.Option(
            help="Names of this server that clients may use, beside IP addresses and localhost; separated by commas. "
            "* allows all."
        ),
    ] = "",
    media_domains: Annotated[
        str,
        typer.Option(help="The only hosts from which pictures and films are fetched, separated by commas."),
    ] = "",
    allow_private_urls: Annotated[
        bool,
        typer.Option(
            "--allow-private-urls",
            help="Fetch pictures and films also from addresses that are not public, such as your network's.",
        ),
    ] = False,
    trusted_proxies: Annotated[
        str,
        typer.Option(
            help="Addresses of proxies whose X-Forwarded-For header names the client, separated by commas."
        ),
    ] = "",
    limits: Limits = Limits(),  # noqa: B008
) -> None:
    """Serve a model to clients of OpenAI's API: chat with pictures, streamed."""
    with errors_in_a_sentence():
        refuse_unknown_dtype(dtype)
        refuse_weights(weights, "cpu", accelerate)
        access = Access(
            api_keys=tuple(api_key or ()),
            allowed_hosts=_listed(allowed_hosts),
            allow_private_urls=allow_private_urls,
            media_domains=_listed(media_domains),
            trusted_proxies=_listed(trusted_proxies),
            share_states=share_states,
        )
        source = answering_source(folder, weights)

        import_libraries()
        from ..inference.server import serve as run_server

        run_server(
            source,
            host=host,
            port=port,
            device=device,
            dtype=dtype,
            max_states=max_states,
            limits=limits,
            access=access,
            accelerate=accelerate,
            weights=weights,
            tuned_state=tuned_state,
        )


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip().lower() for part in text.split(",") if part.strip())
