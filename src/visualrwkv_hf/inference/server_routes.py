"""The routes of the server: from an HTTP request to its answer, and away with both as soon as the client has gone."""

import asyncio
import hmac
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from .server_fetch import Fetcher
from .server_generation import Finished, Job, Line
from .server_limits import Access, Budget, Limits, Refusal
from .server_replies import REPLIES, Reply, dumps, error_body
from .server_requests import Asked, Rules, parse_json, read_request

PATHS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completion",
    "/v1/responses": "response",
    "/v1/systemone": "decision",
}
"""Path -> the kind of request that it takes."""

HEADERS = {401: {"www-authenticate": "Bearer"}, 408: {"connection": "close"}, 503: {"retry-after": "1"}}
"""Status -> headers of a refusal."""

T = TypeVar("T")


class Gone(Exception):
    """The client has gone: nobody is left to answer."""


class Gate:
    """An ASGI middleware that looks at who asks, before anything else does.

    Args:
        app: what a request is passed on to.
        access: who may ask.
    """

    def __init__(self, app: ASGIApp, access: Access):
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        app: ASGIApp = self.app if refusal is None else error_response(refusal)
        await app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if not self.access.allows_host(headers.get(b"host", "")):
            return Refusal(
                "The Host header names another server. If it is a name of this one, start it with --allowed-hosts.",
                403,
            )
        if sum(name == b"authorization" for name, _ in scope["headers"]) > 1:
            return Refusal("A request can have one Authorization header.", 400)
        kind, _, key = headers.get(b"authorization", "").partition(" ")
        if self.access.api_keys and scope["path"] != "/health":
            # All are compared, each in constant time: how long it takes says nothing about any of them.
            same = [hmac.compare_digest(key.encode("latin-1"), own.encode()) for own in self.access.api_keys]
            if kind.lower() != "bearer" or not any(same):
                return Refusal("This server needs an API key: send it as Authorization: Bearer KEY.", 401)
        return None


class Service:
    """The routes of one model.

    Args:
        line: those who wait for the model.
        rules: by which requests are read.
        limits: on requests.
        access: from where pictures are fetched, and whose states are shared.
    """

    def __init__(self, line: Line, rules: Rules, limits: Limits, access: Access):
        self.line, self.rules, self.limits, self.access = line, rules, limits, access
        self.budget = Budget(limits.bytes_in_flight)
        self.fetcher = Fetcher(limits, access)
        self.started = int(time.time())

    def routes(self) -> list[Route]:
        """Return the routes for Starlette."""
        answers = [Route(path, Answering(self, kind), methods=["POST"]) for path, kind in PATHS.items()]
        return [
            *answers,
            Route("/v1/models", self.list_models),
            Route("/v1/models/{model:path}", self.describe_model),
            Route("/health", self.report_health),
        ]

    async def report_health(self, request: Request) -> Response:
        """Say whether the model can still answer."""
        if not self.line.thread.is_alive():
            raise Refusal("The thread of the model has ended.", 503)
        return json_response({"status": "ok"})

    async def list_models(self, request: Request) -> Response:
        """List the one model."""
        return json_response({"object": "list", "data": [self._entry()]})

    async def describe_model(self, request: Request) -> Response:
        """Describe the one model."""
        if request.path_params["model"] not in {self.rules.name, *self.rules.aliases}:
            raise Refusal(f"There is no such model here: the model is {self.rules.name!r}.", 404)
        return json_response(self._entry())

    def _entry(self) -> dict[str, Any]:
        return {
            "id": self.rules.name,
            "object": "model",
            "created": self.started,
            "owned_by": "visualrwkv-hf",
        }

    def client_of(self, request: Request) -> str:
        """Return who asks: the API key if there are keys, and else the address."""
        if self.access.api_keys:
            return f"key {request.headers['authorization'].partition(' ')[2]}"
        return f"address {request.client.host if request.client else None}"

    @contextmanager
    def spending(self, client: str) -> Iterator[Callable[[int], None]]:
        """Give a function that takes bytes of a client out of the budget of all, to which they return in the end."""
        taken = 0

        def spend(count: int) -> None:
            nonlocal taken
            taken += self.budget.take(count, client)

        try:
            yield spend
        finally:
            self.budget.give_back(taken, client)


class Answering:
    """An ASGI application that answers one kind of request.

    Args:
        service: what it belongs to.
        kind: "chat", "completion", "response" or "decision".
    """

    def __init__(self, service: Service, kind: str):
        self.service, self.kind = service, kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request.

        Raises:
            Refusal: it cannot be answered, and no part of an answer has been sent.
        """
        request = Request(scope, receive)
        client = self.service.client_of(request)
        with suppress(Gone), self.service.spending(client) as spend:
            asked = await self._read(request, spend)
            gone = asyncio.ensure_future(_leaving(receive))
            try:
                files = await _unless(gone, self.service.fetcher.fetch_all(asked.media, client, spend))
                asked.media.clear()
                job = Job(asked, files, client)
                del files
                await self._answer(job, gone, send)
            finally:
                gone.cancel()

    async def _read(self, request: Request, spend: Callable[[int], None]) -> Asked:
        """Read what is asked.

        Raises:
            Refusal, Gone: it cannot be answered, or nobody waits for an answer.
        """
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if (
            content_type != "application/json"
        ):  # a page of another site cannot send it without being allowed to
            raise Refusal("The content type of a request must be application/json.", 415)
        limits = self.service.limits
        try:
            body = await asyncio.wait_for(_read_body(request, limits.body_bytes, spend), limits.body_seconds)
        except asyncio.TimeoutError as error:
            raise Refusal(f"The request did not arrive within {limits.body_seconds:g} s.", 408) from error
        return read_request(self.kind, parse_json(body, limits), self.service.rules)

    async def _answer(self, job: Job, gone: "asyncio.Future[None]", send: Send) -> None:
        """Put a job in line and send its answer. It is given up when this ends, and when the client has gone."""
        line, service = self.service.line, self.service
        reply = REPLIES[self.kind](service.rules.name, uuid.uuid4().hex, job.asked)
        line.join(job)
        gone.add_done_callback(lambda _: line.leave(job))
        try:
            first = await job.events.get()
            if isinstance(first, Refusal):
                raise first
            if first is None:
                raise Gone
            await (_stream if job.asked.stream else _send_whole)(job, first, reply, send)
        finally:
            line.leave(job)


async def _read_body(request: Request, most: int, spend: Callable[[int], None]) -> bytes:
    """Return the body of a request of at most `most` bytes, whatever its head says about its length."""
    too_large = Refusal(f"The body of a request can have {most} bytes.", 413)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > most:
        raise too_large
    body = bytearray()
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Gone
        piece, more = message.get("body", b""), message.get("more_body", False)
        if len(body) + len(piece) > most:
            raise too_large
        spend(len(piece))
        body += piece
    return bytes(body)


async def _leaving(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _unless(gone: "asyncio.Future[None]", work: Awaitable[T]) -> T:
    """Return what `work` gives; it is cancelled when the client has gone.

    Raises:
        Gone: the client has.
    """
    task = asyncio.ensure_future(work)
    try:
        both: set[asyncio.Future] = {gone, task}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        task.cancel()


async def _send_whole(job: Job, first: str | Finished, reply: Reply, send: Send) -> None:
    texts: list[str] = []
    event: str | Finished | Refusal | None = first
    while isinstance(event, str):
        texts.append(event)
        event = await job.events.get()
    if isinstance(event, Refusal):
        raise event
    if event is not None:
        await _send(send, json_response(reply.whole("".join(texts), event)))


async def _send(send: Send, response: Response) -> None:
    await send(
        {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
    )
    await send({"type": "http.response.body", "body": response.body})


async def _stream(job: Job, first: str | Finished, reply: Reply, send: Send) -> None:
    """Send an answer as it comes. What came while the client was slow to read goes out as one piece."""
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    body = reply.start()
    event: str | Finished | Refusal | None = first
    while True:
        texts = []
        while isinstance(event, str):
            texts.append(event)
            event = job.events.get_nowait() if not job.events.empty() else ""
            if not event:
                break
        if texts:
            body += reply.piece("".join(texts))
        if isinstance(event, Finished):
            await send({"type": "http.response.body", "body": body + reply.end(event)})
            return
        if isinstance(event, Refusal):
            await send({"type": "http.response.body", "body": body + reply.failure(str(event))})
            return
        if event is None:
            return
        await send({"type": "http.response.body", "body": body, "more_body": True})
        body, event = b"", await job.events.get()


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response of JSON."""
    return Response(dumps(value), status, dict(headers or {}), "application/json")


def error_response(refusal: Refusal) -> Response:
    """Return a refusal as OpenAI's clients read it."""
    body = error_body(str(refusal), refusal.status)
    return json_response(body, refusal.status, HEADERS.get(refusal.status))


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    allowed = {405: f"It takes {(error.headers or {}).get('Allow', 'another method')}."}
    response = error_response(
        Refusal(f"{error.detail}. {allowed.get(error.status_code, '')}".strip(), error.status_code)
    )
    response.headers.update(error.headers or {})
    return response


async def _on_failure(request: Request, error: Exception) -> Response:
    return error_response(Refusal("The server failed. Its log says why.", 500))


EXCEPTION_HANDLERS: dict[Any, Callable] = {
    Refusal: _on_refusal,
    HTTPException: _on_http_exception,
    Exception: _on_failure,
}
"""For Starlette: exception -> what the client reads."""

__all__ = ["EXCEPTION_HANDLERS", "Gate", "Service"]
