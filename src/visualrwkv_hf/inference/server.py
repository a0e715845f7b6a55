"""`visualrwkv serve`: one VisualRWKV model for clients of OpenAI's API.

The parts: `server_limits` says what is allowed, `server_connections` holds uvicorn to it, `server_requests` and
`server_messages` read what is asked, `server_fetch` and `server_media` get pictures and films, `server_generation`
answers, and `server_replies` words the answer. Here they come together as an ASGI application.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ..state_store import StateStore
from .loading import load_model, load_processor
from .printable import printable
from .progress import backend_of
from .server_connections import bound_socket, make_server
from .server_decisions import decision_config
from .server_generation import Answerer, Line
from .server_limits import Access, Limits
from .server_requests import Rules, template_variables


def serve(
    source: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    dtype: str = "auto",
    name: str | None = None,
    max_states: int = 16,
    limits: Limits | None = None,
    access: Access | None = None,
    accelerate: bool = True,
    weights: str | None = None,
    tuned_state: str | None = None,
) -> None:
    """Answer requests of OpenAI clients until SIGINT or SIGTERM comes.

    Args:
        source: the model, a folder or a Hub id.
        host: the address to listen on.
        port: from 0 to 65535; 0 takes a free one, which the line at the start names.
        device: cpu, cuda, mps or auto.
        dtype: float32, bfloat16, float16, or auto for the checkpoint's own.
        name: what clients call the model; by default the folder's name, or the Hub id.
        max_states: how many states are kept, so that the next turn of a chat reads its own words only; 0 keeps none.
        limits: the most that a request may take.
        access: who may ask, and from where pictures are fetched.
        accelerate: whether a CPU computes with native ops.
        weights: "int8" or "int4" rounds the weights on a CPU; see `load_model`.
        tuned_state: a folder or a Hub id with a [`TunedState`], with which whatever the model reads begins.

    Raises:
        ImportError: without the packages of the extra `serve`.
        ValueError: a device, dtype, port or limit that is none, or a tuned state for another model.
        OSError: the address is in use, or is none of this machine; or there is no tuned state.
    """
    limits, access = limits or Limits(), access or Access()
    with bound_socket(host, port) as listener:
        app = build_app(
            source, device, dtype, name, max_states, limits, access, accelerate, weights, tuned_state
        )

        def announce() -> None:
            print(_announcement(app, host, listener.getsockname()[1], bool(access.api_keys)), flush=True)

        make_server(app, limits, access, announce).run([listener])


def _announcement(app: Any, host: str, port: int, needs_key: bool) -> str:
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    model = app.state.model
    kind = f"{model.num_parameters() / 1e6:,.1f} million parameters, {backend_of(model)}"
    if app.state.tuned_state is not None:
        kind += f", begins with {printable(app.state.tuned_state)}"
    key = " -H 'Authorization: Bearer YOUR-KEY'" if needs_key else ""
    name = printable(app.state.name)
    return (
        f"{name} ({kind}) answers at {url}\nTry it:\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n"
        """    -d '{"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 50}'"""
    )


def build_app(
    source: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    name: str | None = None,
    max_states: int = 16,
    limits: Limits | None = None,
    access: Access | None = None,
    accelerate: bool = True,
    weights: str | None = None,
    tuned_state: str | None = None,
) -> Any:
    """Return the server of [`serve`] as an ASGI application (Starlette); `app.state.model` is the model.

    Limits on connections and stopping hold only where `serve` runs it.

    Raises:
        ImportError, ValueError, OSError: as `serve`.
    """
    try:
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
    except ImportError as error:
        raise ImportError(
            "The server needs packages that are not installed: pip install 'visualrwkv-hf[serve]'."
        ) from error
    from .server_routes import EXCEPTION_HANDLERS, Gate, Service

    limits, access = limits or Limits(), access or Access()
    model = load_model(str(source), device, dtype, accelerate, weights=weights, tuned_state=tuned_state)
    processor = load_processor(str(source))
    # An answer becomes part of the next prompt, in which a placeholder would have no picture.
    config = model.generation_config
    config.suppress_tokens = [*(config.suppress_tokens or ()), model.config.image_token_id]
    if max_states:
        model.state_store = StateStore(max_states)
    folder = Path(source).resolve()
    rules = Rules(
        limits,
        name or (folder.name if folder.is_dir() else str(source)),
        frozenset({str(source), str(folder)}),
        model.config.text_config.vocab_size,
        template_variables(processor.chat_template),
        decision_config(source),
    )
    line = Line(Answerer(model, processor, limits, access, rules.decisions), limits.waiting)

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        try:
            yield
        finally:
            line.close()

    app = Starlette(
        routes=Service(line, rules, limits, access).routes(),
        middleware=[Middleware(Gate, access=access)],
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=lifespan,
    )
    app.state.model, app.state.line, app.state.name = model, line, rules.name
    app.state.tuned_state = tuned_state
    return app


__all__ = ["Access", "Limits", "build_app", "serve"]
