"""Pictures and films at URLs: fetched from public addresses only, in bounded time and memory, without telling more.

A client that names a URL makes the server connect to it. So the name is resolved first, every address must be public,
and the connection goes to the very address that was checked; a redirect is a new URL. Whatever fails, the client reads
the same sentence: otherwise it could find out what answers inside the server's network.
"""

import asyncio
import socket
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any
from weakref import WeakValueDictionary

from .server_limits import Access, Limits, Refusal
from .server_messages import Medium

MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
MAX_FETCHES = 16
"""Pictures and films that are fetched at the same time."""
MAX_FETCHES_OF_A_CLIENT = 4
"""Of them, those of one client: whose pictures come slowly, or never, leaves the other places to the others."""

GLOBAL_UNICAST = IPv6Network("2000::/3")
"""RFC 4291: what the public internet uses of IPv6. Python counts more as global, for example site-local addresses."""

NOT_PUBLIC = (
    IPv4Network("192.0.0.0/24"),  # protocol assignments, RFC 6890
    IPv4Network("192.88.99.0/24"),  # 6to4 relays, RFC 7526
    IPv6Network("3fff::/20"),  # documentation, RFC 9637
)
"""Networks that the public internet does not use, and that an older Python counts as global."""

IPV4_IN_IPV6 = {
    IPv6Network("::/96"): 0,  # IPv4-compatible, RFC 4291
    IPv6Network("::ffff:0:0/96"): 0,  # IPv4-mapped, RFC 4291
    IPv6Network("::ffff:0:0:0/96"): 0,  # IPv4-translated, RFC 2765
    IPv6Network("64:ff9b::/96"): 0,  # NAT64, RFC 6052
    IPv6Network("2002::/16"): 80,  # 6to4, RFC 3056
}
"""Networks whose addresses hold an IPv4 address -> how many bits stand after it."""


class Unfetchable(Exception):
    """A URL that gives no picture or film, and why: for the server's own log, never for the client."""


def is_public(address: str) -> bool:
    """Return whether an IP address, and the IPv4 address in it if there is one, belongs to the public internet."""
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    if ip.is_multicast or ip.is_unspecified or not ip.is_global:
        return False
    if any(ip in network for network in NOT_PUBLIC):
        return False
    if isinstance(ip, IPv6Address):
        if ip.scope_id is not None or ip.teredo is not None:
            return False
        for network, shift in IPV4_IN_IPV6.items():
            if ip in network:
                return is_public(str(IPv4Address(int(ip) >> shift & 0xFFFFFFFF)))
        return ip in GLOBAL_UNICAST
    return True


class Fetcher:
    """Fetches the pictures and films of requests.

    Args:
        limits: on bytes and seconds.
        access: from where they may be fetched.
    """

    def __init__(self, limits: Limits, access: Access):
        self.limits, self.access = limits, access
        self.domains = {domain.lower() for domain in access.media_domains}
        self.slots = asyncio.Semaphore(MAX_FETCHES)
        self.slots_of_clients: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    @cached_property
    def certificates(self) -> Any:
        """Who signs the certificates of hosts; reading them takes as long as a fetch."""
        import httpx

        return httpx.create_ssl_context(trust_env=False)

    async def fetch_all(
        self, media: Sequence[Medium], client: str = "", spend: Callable[[int], None] = lambda count: None
    ) -> list[Medium]:
        """Return all pictures and films of a request as bytes, those at URLs fetched.

        Args:
            media: as the request gives them.
            client: who asks, since a client can only have so many fetched at a time.
            spend: called with the number of bytes whenever some have been fetched.

        Raises:
            Refusal: one cannot be fetched, or they take more bytes than a request may; it says which one it is. Or
                what `spend` raises.
        """
        own = self.slots_of_clients.setdefault(client, asyncio.Semaphore(MAX_FETCHES_OF_A_CLIENT))
        left = self.limits.body_bytes

        def take(count: int) -> None:
            nonlocal left
            left -= count
            if left < 0:
                most = self.limits.body_bytes
                raise Refusal(f"The pictures and films of a request may take {most} bytes together.", 413)

        def fetched(count: int) -> None:
            take(count)
            spend(count)

        for medium in media:
            if isinstance(medium.content, bytes):
                take(len(medium.content))
        tasks = [asyncio.ensure_future(self._bytes_of(medium, own, fetched)) for medium in media]
        try:
            files = list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
        return [medium._replace(content=file) for medium, file in zip(media, files)]

    async def _bytes_of(
        self, medium: Medium, own: asyncio.Semaphore, fetched: Callable[[int], None]
    ) -> bytes:
        most = self.limits.film_bytes if medium.is_film else self.limits.picture_bytes
        if isinstance(medium.content, bytes):
            if len(medium.content) > most:
                raise Refusal(f"{medium.name}: it has more than {most} bytes.", 413)
            return medium.content
        accepted = "video/*, image/*" if medium.is_film else "image/*"
        async with _Place(own, self.slots) as place:  # the time begins when it is this one's turn
            try:
                return await asyncio.wait_for(
                    self._fetch(medium.content, accepted, most, fetched, place), self.limits.fetch_seconds
                )
            except (Unfetchable, asyncio.TimeoutError) as error:
                raise Refusal(
                    f"{medium.name}: there is no {medium.kind} that can be fetched at its URL."
                ) from error

    async def _fetch(
        self, url: str, accepted: str, most: int, fetched: Callable[[int], None], place: "_Place"
    ) -> bytes:
        import httpx

        # trust_env would take proxies from the environment, which connect to whatever they like, and passwords.
        options: dict[str, Any] = dict(trust_env=False, timeout=self.limits.fetch_seconds)
        async with httpx.AsyncClient(verify=self.certificates, **options) as client:
            try:
                for _ in range(MAX_REDIRECTS + 1):
                    async with await self._open(client, httpx.URL(url), accepted, place) as response:
                        if response.status_code not in REDIRECTS or "location" not in response.headers:
                            return await self._read(response, most, fetched)
                        url = str(response.url_as_named.join(response.headers["location"]))
                raise Unfetchable("too many redirects")
            except Refusal:
                raise
            except Exception as error:  # whatever it was, the client reads the one sentence
                raise Unfetchable(repr(error)) from error

    async def _open(self, client: Any, url: Any, accepted: str, place: "_Place") -> "_Response":
        """Send the request to the first address of the URL's host that answers."""
        import httpx

        if url.scheme not in ("http", "https") or not url.host or url.userinfo:
            raise Unfetchable("not a URL of http or https without a password")
        if self.domains and url.host.lower() not in self.domains:
            raise Unfetchable("not one of the media domains")
        error: Exception | None = None
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        for address in await self._addresses(url.host, port, place):
            request = client.build_request(
                "GET",
                url.copy_with(host=address),
                headers={"host": url.netloc.decode(), "accept-encoding": "identity", "accept": accepted},
                extensions={"sni_hostname": url.host},
            )
            try:
                return _Response(await client.send(request, stream=True), url)
            except httpx.ConnectError as failed:
                error = failed
        raise Unfetchable(repr(error))

    async def _addresses(self, host: str, port: int, place: "_Place") -> list[str]:
        """Return the addresses of a host, all of them public unless private ones are allowed."""

        def resolve() -> list:
            return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)

        try:
            found = await place.in_thread(resolve)
        except (OSError, UnicodeError) as error:
            raise Unfetchable(repr(error)) from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if not self.access.allow_private_urls and not all(map(is_public, addresses)):
            raise Unfetchable(f"{host} is not public")
        return addresses

    async def _read(self, response: "_Response", most: int, fetched: Callable[[int], None]) -> bytes:
        if response.status_code != 200:
            raise Unfetchable(f"status {response.status_code}")
        read = bytearray()
        async for piece in _decompressed(response, most + 1):
            read += piece
            if len(read) > most:
                raise Unfetchable("too large")
            fetched(len(piece))
        return bytes(read)


class _Place:
    """A fetch's turn: one of the places of its client and one of all.

    The thread of a resolver cannot be ended. While it runs it keeps the places, even if the fetch was given up:
    otherwise a client could start any number of threads. The threads end with the process.
    """

    def __init__(self, *places: asyncio.Semaphore):
        self.places = places
        self.users = 1  # the fetch, and the thread of its resolver

    async def __aenter__(self) -> "_Place":
        taken = []
        try:
            for place in self.places:
                await place.acquire()
                taken.append(place)
        except BaseException:
            for place in taken:
                place.release()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._leave()

    def _leave(self) -> None:
        self.users -= 1
        if not self.users:
            for place in self.places:
                place.release()

    async def in_thread(self, function: Callable[[], Any]) -> Any:
        """Return what a function returns that may take long, and that nothing can end."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future = loop.create_future()

        def finish(result: Any, error: Exception | None) -> None:
            self._leave()
            if done.cancelled():
                return
            if error is None:
                done.set_result(result)
            else:
                done.set_exception(error)

        def run() -> None:
            result, failed = None, None
            try:
                result = function()
            except Exception as error:
                failed = error
            with suppress(RuntimeError):  # the server has stopped
                loop.call_soon_threadsafe(finish, result, failed)

        self.users += 1
        threading.Thread(target=run, name="resolver", daemon=True).start()
        return await done


class _Response:
    """An open response, and the URL under which it was asked for: httpx knows it under its IP address."""

    def __init__(self, response: Any, url: Any):
        self.response, self.url_as_named = response, url
        self.status_code, self.headers = response.status_code, response.headers

    async def __aenter__(self) -> "_Response":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.response.aclose()


async def _decompressed(response: _Response, most: int) -> AsyncIterator[bytes]:
    """Yield a body in pieces of at most `most` bytes; httpx would decompress each piece that arrives in one go."""
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("identity", ""):
        async for piece in response.response.aiter_raw():
            yield piece
        return
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise Unfetchable(f"content encoding {encoding}")
    decompressor = zlib.decompressobj(zlib.MAX_WBITS | 32)  # with the head of gzip or of zlib
    async for piece in response.response.aiter_raw():
        while piece and not decompressor.eof:
            yield decompressor.decompress(piece, most)
            piece = decompressor.unconsumed_tail


__all__ = ["Fetcher", "Unfetchable", "is_public"]
