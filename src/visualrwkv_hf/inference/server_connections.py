"""Connections that cannot hold the server: uvicorn with limits on their number, on silence, and on stopping."""

import os
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from .server_limits import Access, Limits

GRACE_SECONDS = 2
"""How long open answers may go on after a signal to stop."""
STOP_SECONDS = 4.5
"""After this time the process ends whatever still runs in it, such as a piece of a prompt on a slow machine."""
CHECK_SECONDS = 0.5
"""How often a connection is checked for silence."""
MOST_EARLY_BYTES = 2**16
"""What a client may send of its next request before it has the answer to this one."""

BUSY_BODY = b'{"error": {"message": "Too many connections. Try again later.", "type": "server_error"}}'
BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n"
    b"connection: close\r\ncontent-length: " + str(len(BUSY_BODY)).encode() + b"\r\n\r\n" + BUSY_BODY
)


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address. It does not listen yet: nobody connects before the model is there.

    Raises:
        ValueError: a port that is none.
        OSError: the address is in use, or is none of this machine.
    """
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
        raise ValueError(f"port must be an integer from 0 to 65535, got {port!r}.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        if os.name == "posix":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise cannot_listen(f"{host} port {port}", error) from error
    return bound


def cannot_listen(where: str, error: OSError) -> OSError:
    """Return the error that says where the server cannot listen, and why."""
    return OSError(f"Cannot listen on {where}: {error.strerror or error}.")


def addresses_of(sockets: list[socket.socket] | None) -> str:
    """Return the addresses of sockets as text."""
    names = [listener.getsockname() for listener in sockets or []]
    return ", ".join(f"{name[0]} port {name[1]}" for name in names)


def make_server(app: Any, limits: Limits, access: Access, on_start: Callable[[], None] = lambda: None) -> Any:
    """Return the uvicorn server of an ASGI application; `server.run(sockets=[...])` runs it.

    Args:
        app: the application; a signal to stop closes its `state.line`.
        limits: on connections.
        access: which proxies are trusted.
        on_start: called as soon as requests are accepted.
    """
    import uvicorn

    class Server(uvicorn.Server):
        fence: threading.Timer | None = None

        def run(self, sockets: list[socket.socket] | None = None) -> None:
            """Answer requests until a signal comes, and return when nothing runs any more."""
            try:
                super().run(sockets)
            except KeyboardInterrupt:  # uvicorn raises the signal again when it has stopped
                pass
            finally:
                app.state.line.close()  # not closed yet if the start has failed
                app.state.line.thread.join()
                if self.fence is not None:
                    self.fence.cancel()

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            try:
                await super().startup(sockets=sockets)
            except OSError as error:  # another program has bound the address as well, and listens by now
                raise cannot_listen(addresses_of(sockets), error) from error
            on_start()

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.fence is None:
                self.fence = threading.Timer(STOP_SECONDS, os._exit, [128 + sig])
                self.fence.daemon = True
                self.fence.start()
            super().handle_exit(sig, frame)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            app.state.line.close()
            await super().shutdown(sockets=sockets)

    return Server(
        uvicorn.Config(
            app,
            http=_protocol(limits, access),
            ws="none",
            log_level="warning",
            server_header=False,
            proxy_headers=bool(access.trusted_proxies),
            forwarded_allow_ips=list(access.trusted_proxies),
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
    )


def _protocol(limits: Limits, access: Access) -> type:
    """Return uvicorn's HTTP protocol with limits that it does not have."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    def most_of(address: str | None) -> int:
        """Return how many connections an address can have; behind a trusted proxy are many clients."""
        is_proxy = address in access.trusted_proxies or "*" in access.trusted_proxies
        return limits.connections if is_proxy else max(limits.connections // 2, 1)

    def address_of(protocol: Any) -> str | None:
        return protocol.client[0] if protocol.client else None

    class Protocol(H11Protocol):
        """Closes connections that are too many, that send no head, or that do not read what they are sent."""

        is_surplus = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.quiet_since = self.read_since = self.loop.time()
            self.unread = 0
            self.early = b""
            own = address_of(self)
            others: list[Any] = [other for other in self.connections if other is not self]
            kept = [other for other in others if not other.is_surplus]
            own_count = sum(address_of(other) == own for other in kept)
            self.is_surplus = len(kept) >= limits.connections or own_count >= most_of(own)
            if self.is_surplus:
                transport.write(BUSY)
                transport.close()
            self.check = self.loop.call_later(CHECK_SECONDS, self.check_progress)

        def data_received(self, data: bytes) -> None:
            if self.is_surplus:
                return
            if self.cycle is None or self.cycle.more_body or self.cycle.response_complete:
                super().data_received(data)
                return
            # h11 would stop reading here, and the end of a connection whose client has left would not be seen.
            self.early += data
            if len(self.early) > MOST_EARLY_BYTES:
                self.transport.abort()

        def on_response_complete(self) -> None:
            self.quiet_since = self.loop.time()
            super().on_response_complete()
            if self.early and not self.transport.is_closing():
                early, self.early = self.early, b""
                self.data_received(early)

        def connection_lost(self, exc: Exception | None) -> None:
            self.check.cancel()
            super().connection_lost(exc)

        def check_progress(self) -> None:
            """Abort the connection if its client has made no progress for too long."""
            now, unread = self.loop.time(), self.transport.get_write_buffer_size()
            if not unread or unread < self.unread:
                self.read_since = now
            self.unread = unread
            if self.cycle is not None and not self.cycle.response_complete:
                self.quiet_since = now  # it is the server's turn
            is_silent = now - self.quiet_since > limits.head_seconds
            if is_silent or now - self.read_since > limits.write_seconds:
                self.transport.abort()
            else:
                self.check = self.loop.call_later(CHECK_SECONDS, self.check_progress)

    return Protocol


__all__ = ["bound_socket", "make_server"]
