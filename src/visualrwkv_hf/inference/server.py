"""`visualrwkv serve`: the OpenAI-compatible server of transformers, with one VisualRWKV model.

Routes, streaming and generation are those of `transformers serve`. Here stands what one model of ours needs: which
one it is, what its answers look like, that its states are kept, and that a bad request is refused with a sentence.
"""

import asyncio
import base64
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoProcessor
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import BaseHandler, GenerateManager, GenerationState
from transformers.utils.import_utils import is_serve_available

from ..image_processing_visualrwkv import open_picture
from ..state_store import StateStore
from .loading import load_model

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health")
"""Of the routes of `transformers serve`; the others load, unload or need other models."""

ANSWER = {
    "defaults": {"role": "assistant", "content": ""},
    "start_anchor": "Assistant:",
    "fields": {"content": {"open_pattern": r"\s*(?=\S)", "close_pattern": r"\s*(?:<\|endoftext\|>)?\Z"}},
}
"""The tokenizer's `response_template`: an answer is what stands between white space, without the end of the turn."""

RANGES = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "frequency_penalty": (-0.9, 2),
    "max_tokens": (1, float("inf")),
    "max_completion_tokens": (1, float("inf")),
    "max_output_tokens": (1, float("inf")),
}
"""What numbers in a request may be. Past them generation would fail when the answer has begun."""

ONLY = {"n": 1, "tools": [], "functions": [], "logprobs": False, "response_format": {"type": "text"}}
"""Fields that transformers ignores, or the model, and the one value with which that is right."""

PICTURES = ("image_url", "input_image")
CONTENT = ("text", "input_text", "output_text", *PICTURES)
"""Types of content in chat completions and responses."""

SECONDS_FOR_A_PICTURE = 30


def serve(
    source: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    dtype: str = "auto",
    name: str | None = None,
    max_states: int = 16,
) -> None:
    """Answers requests of OpenAI clients until it is interrupted.

    Args:
        source: the model, a folder or a Hub id.
        host: the address to listen at. There are no passwords: another one than the default is for networks that
            you trust.
        port: 0 takes a free one; it stands in the line that says where the server runs.
        device: cpu, cuda, mps or auto.
        dtype: float32, bfloat16, float16, or auto for the checkpoint's own.
        name: what clients call the model; by default the folder's name, or the Hub id.
        max_states: how many states are kept, so that the next turn of a chat reads its own words only.

    Raises:
        ImportError: without the packages of the extra `serve`.
        ValueError: a device or dtype that is none here.
    """
    app = build_app(source, device, dtype, name, max_states)
    import uvicorn

    uvicorn.run(app, host=host, port=port)


def build_app(
    source: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    name: str | None = None,
    max_states: int = 16,
):
    """The server of [`serve`] as an ASGI application (FastAPI); `app.state.model` is the model."""
    if not is_serve_available():
        raise ImportError(
            "The server needs packages that are not installed: pip install 'visualrwkv-hf[serve]'."
        )
    from fastapi import HTTPException
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler

    manager = OneModel(source, device, dtype, name, max_states)
    parts = (manager, OneThread())
    app = build_server(
        manager,
        careful(ChatCompletionHandler)(*parts),
        completion_handler=careful(CompletionHandler)(*parts),
        response_handler=careful(ResponseHandler)(*parts),
        transcription_handler=TranscriptionHandler(*parts),
        systemone_handler=SystemOneHandler(*parts),
        generation_state=parts[1],
    )
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]
    for error in (HTTPException, ValueError, TypeError, TemplateError):
        app.add_exception_handler(error, refusal)
    app.state.model = manager.loaded_models[manager.force_model].model
    return app


def careful(handler: type[BaseHandler]) -> type[BaseHandler]:
    """A handler of transformers' that first looks at the request."""
    return type(handler.__name__, (CarefulHandler, handler), {})


async def refusal(request: Any, error: Exception) -> Any:
    """A request that cannot be answered, as OpenAI's clients read it."""
    from fastapi.responses import JSONResponse

    status, message = getattr(error, "status_code", 400), getattr(error, "detail", None) or str(error)
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": body}, status_code=status)


class OneModel(ModelManager):
    """transformers' model manager, of one model under one name."""

    def __init__(self, source: str | Path, device: str, dtype: str, name: str | None, max_states: int):
        self.source, self.placement, self.max_states = str(source), (device, dtype), max_states
        name = name or (Path(source).resolve().name if Path(source).is_dir() else self.source)
        self.names = {name, self.source, str(Path(source).resolve())}
        self.created = int(time.time())
        super().__init__(force_model=name)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """As it is: transformers adds a revision."""
        return model_id

    def _load_processor(self, name: str, **_: Any) -> Any:
        processor = AutoProcessor.from_pretrained(self.source)
        processor.tokenizer.response_template = ANSWER
        return processor

    def _load_model(self, name: str, **_: Any) -> Any:
        model = load_model(self.source, *self.placement)
        model.state_store = StateStore(self.max_states)
        # In the next turn the answer stands in the prompt, where a placeholder would have no picture.
        config = model.generation_config
        config.suppress_tokens = [*(config.suppress_tokens or ()), model.config.image_token_id]
        return model

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """The list of models for clients; transformers' is that of the Hub's cache."""
        entry = {"id": self.force_model, "created": self.created, "owned_by": "visualrwkv-hf"}
        return [entry | {"object": "model"}]


class OneThread(GenerationState):
    """One answer at a time, in one thread: continuous batching pages attention, of which there is none."""

    def __init__(self) -> None:
        super().__init__(continuous_batching=False)
        self.manager = TokenizerManager()

    def get_manager(self, model_id: str, use_cb: bool = False) -> GenerateManager:
        return self.manager


class TokenizerManager(GenerateManager):
    """Gives `generate()` the tokenizer, where transformers gives it the processor: for `stop` it needs a vocabulary."""

    def generate_streaming(self, model: Any, processor: Any, *args: Any, **kwargs: Any) -> Any:
        return super().generate_streaming(model, processor.tokenizer, *args, **kwargs)

    async def generate_non_streaming(self, model: Any, processor: Any, *args: Any, **kwargs: Any) -> Any:
        return await super().generate_non_streaming(model, processor.tokenizer, *args, **kwargs)


class CarefulHandler(BaseHandler):
    """What stands in front of a handler of transformers': a request is refused before anything is generated."""

    async def handle_request(self, body: dict, request_id: str) -> Any:
        self._validate_request(body)
        refuse_fields(body)
        body["model"] = self._known_model(body.get("model"))
        body.setdefault("stream", False)  # as OpenAI's; transformers streams responses unless told otherwise
        parts = list(picture_parts([body.get("messages"), body.get("input")]))
        pictures = await asyncio.gather(*(picture_of(part, number) for number, part in enumerate(parts)))
        for part, picture in zip(parts, pictures):
            part["image_url"] = {"url": picture}
        return await super().handle_request(body, request_id)

    def _known_model(self, name: Any) -> str:
        """The name of the model, whatever it was called.

        Raises:
            HTTPException: 404 if it is another one.
        """
        from fastapi import HTTPException

        if name is not None and name not in self.model_manager.names:
            raise HTTPException(
                404, f"There is no model {name!r} here: the model is {self.model_manager.force_model!r}."
            )
        return self.model_manager.force_model

    @staticmethod
    def get_processor_inputs_from_messages(messages: Any, modality: Any) -> list[dict]:
        refuse_messages(messages)
        return BaseHandler.get_processor_inputs_from_messages(messages, modality)

    def _build_generation_config(self, body: dict, model_generation_config: Any, use_cb: bool = False) -> Any:
        """A temperature asks for sampling, which transformers leaves as the model has it."""
        config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
        if body.get("temperature"):
            config.do_sample = True
        return config


def refuse_fields(body: Mapping[str, Any]) -> None:
    """Raises `ValueError` for a number out of its range, and for what would be ignored and must not be."""
    for name, (least, most) in RANGES.items():
        value = body.get(name)
        if value is not None and not (isinstance(value, int | float) and least <= value <= most):
            raise ValueError(f"{name} must be a number from {least} to {most}, got {value!r}.")
    for name, value in ONLY.items():
        if body.get(name) not in (None, value):
            raise ValueError(f"{name} can only be {value!r} here, got {body[name]!r}.")


def refuse_messages(messages: Any) -> None:
    """Raises `ValueError` for what is no list of chat messages, or holds what transformers would leave out."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list of at least one message.")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message:
            raise ValueError(f"messages[{number}] must be an object with role and content.")
        content = message.get("content")
        for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            if not isinstance(part, dict) or part.get("type") not in CONTENT:
                kind = part.get("type") if isinstance(part, dict) else part
                raise ValueError(
                    f"messages[{number}] has content of type {kind!r}: it can be {', '.join(CONTENT)}."
                )
            if part["type"] not in PICTURES and not isinstance(part.get("text"), str):
                raise ValueError(f"messages[{number}] must have a text, got {part.get('text')!r}.")


def picture_parts(node: Any) -> Iterator[dict]:
    """All content of a request that is a picture, in its order."""
    if isinstance(node, dict) and node.get("type") in PICTURES:
        yield node
    elif isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from picture_parts(child)


async def picture_of(part: Mapping[str, Any], number: int) -> Any:
    """The picture that a part of a request holds or names.

    Raises:
        ValueError: it is none, cannot be had, or is a file of this machine; it says which one it is.
    """
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, dict) else url
    try:
        if isinstance(url, str) and url.startswith(("http://", "https://")):
            url = await asyncio.wait_for(fetched(url), SECONDS_FOR_A_PICTURE)
        if not isinstance(url, str) or not url.startswith("data:image/"):
            raise ValueError(f"it must be a URL or data:image/...;base64,..., got {str(url)[:200]!r}.")
        return await asyncio.to_thread(open_picture, url)
    except asyncio.TimeoutError as error:
        raise ValueError(f"Picture {number}: {url} took longer than {SECONDS_FOR_A_PICTURE} s.") from error
    except ValueError as error:
        raise ValueError(f"Picture {number}: {error}") from error


async def fetched(url: str) -> str:
    """What stands at `url`, as data:image/...;base64,...

    Raises:
        ValueError: it cannot be had.
    """
    import httpx

    try:
        async with httpx.AsyncClient(follow_redirects=True, timeout=SECONDS_FOR_A_PICTURE) as client:
            response = await client.get(url)
        response.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(str(error) or type(error).__name__) from error
    return "data:image/any;base64," + base64.b64encode(response.content).decode()


__all__ = ["build_app", "serve"]
