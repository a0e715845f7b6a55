"""What the server allows: the limits of a request and of a connection, who may ask, and how a request is refused."""

import re
import reprlib
from collections import Counter
from dataclasses import dataclass, field, fields
from ipaddress import ip_address
from typing import Any, TypeVar


class Refusal(ValueError):
    """A request that is not answered: an HTTP status and one sentence that says why."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


def sentence_of(error: Exception) -> str:
    """Return what an error says as one sentence of at most 500 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) > 500:
        return f"{text[:500]}..."
    return text if text.endswith((".", "!", "?")) else f"{text}."


def shown(value: Any) -> str:
    """Return a value as an error may quote it: short, and nothing of a picture."""
    return _DATA.sub("data:...", _SHORT.repr(value))


_DATA = re.compile(r"data:[^'\"]+", re.IGNORECASE)
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, 60, 60, 40


Number = TypeVar("Number", int, float)


def _limit(default: Number, help: str) -> Number:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Limits:
    """The most that one request, one answer and one connection may take.

    Raises:
        ValueError: a limit that is not a positive number.
    """

    body_bytes: int = _limit(32 * 2**20, "The largest body of a request, in bytes.")
    picture_bytes: int = _limit(20 * 2**20, "The largest picture, in bytes, counted after decompression.")
    picture_pixels: int = _limit(
        25_000_000, "The most pixels of a picture, or of a frame; four times as many in a request."
    )
    pictures: int = _limit(16, "The most pictures in a request, the frames of its films included.")
    film_bytes: int = _limit(32 * 2**20, "The largest film, in bytes, counted after decompression.")
    film_seconds: float = _limit(30.0, "How long it may take to decode a film, in seconds.")
    prompt_tokens: int = _limit(16_384, "The longest prompt, in tokens, those of pictures included.")
    new_tokens: int = _limit(4096, "The longest answer, in tokens.")
    stops: int = _limit(16, "The most stop strings in a request.")
    stop_characters: int = _limit(256, "The longest stop string, in characters.")
    answer_seconds: float = _limit(300.0, "The longest time that the model works on one answer, in seconds.")
    fetch_seconds: float = _limit(30.0, "The longest time to fetch a picture or a film, in seconds.")
    head_seconds: float = _limit(10.0, "How long a client may take to send a request's head, in seconds.")
    body_seconds: float = _limit(60.0, "How long a client may take to send a request's body, in seconds.")
    write_seconds: float = _limit(
        30.0, "How long a client may leave what it was sent unread, in seconds; then it is disconnected."
    )
    connections: int = _limit(
        512,
        "The most connections at the same time, half of them of one address; further ones are answered 503.",
    )
    waiting: int = _limit(
        128, "The most requests that wait for the model, half of them of one client; further ones get 503."
    )

    def __post_init__(self):
        for limit in fields(self):
            value = getattr(self, limit.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"{limit.name} must be a number above 0, got {value!r}.")

    @property
    def prompt_characters(self) -> int:
        """The most characters of text in a request, so that longer ones are refused before they are tokenized.

        A token of ordinary text has 3 to 5 characters.
        """
        return 16 * self.prompt_tokens

    @property
    def json_marks(self) -> int:
        """The most commas, colons and opening brackets of a body: each may become an object of a hundred bytes."""
        return 2**18 + 2 * self.prompt_characters

    @property
    def bytes_in_flight(self) -> int:
        """The most bytes that the bodies and fetched pictures and films of all requests may take together."""
        return 8 * self.body_bytes


@dataclass(frozen=True)
class Access:
    """Who may ask, and what the server asks for them.

    Args:
        api_keys: if there are any, a request to `/v1/...` must carry one of them as its bearer token.
        allowed_hosts: names that the Host header may hold beside IP addresses and `localhost`; "*" allows all.
        allow_private_urls: whether pictures and films may be fetched from addresses that are not public.
        media_domains: if there are any, the only hosts from which pictures and films are fetched.
        trusted_proxies: addresses of proxies whose `X-Forwarded-For` names the client.
        share_states: whether clients go on from one another's states, which lets each find out by the time of an
            answer what others have sent.
    """

    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allow_private_urls: bool = False
    media_domains: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = ()
    share_states: bool = False

    def __post_init__(self):
        if not all(key and key.isascii() and key.isprintable() and " " not in key for key in self.api_keys):
            raise ValueError("An API key must be of printable ASCII characters without spaces.")

    def allows_host(self, header: str) -> bool:
        """Return whether a Host header names this server.

        A page of another site can make its visitor's browser ask this server under a name of that site (DNS
        rebinding), but never under an IP address.
        """
        host, allowed = host_of(header), {name.lower() for name in self.allowed_hosts}
        return "*" in allowed or host == "localhost" or is_address(host) or host in allowed


def host_of(header: str) -> str:
    """Return the host of a Host header in lower case, without port, and without the brackets of an IPv6 address."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower().rstrip(".")


def is_address(host: str) -> bool:
    """Return whether `host` is an IP address."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


class Budget:
    """How many bytes are left to all requests together. One client can have half of them.

    Args:
        total: bytes.
    """

    def __init__(self, total: int):
        self.left, self.most_of_a_client = total, total // 2
        self.taken: Counter[str] = Counter()

    def take(self, count: int, client: str) -> int:
        """Take `count` bytes for a client and return them.

        Raises:
            Refusal: 503 if there are not so many, or the client would have more than its half.
        """
        if self.taken[client] + count > self.most_of_a_client:
            raise Refusal("Your other requests are large. Send this one when they are answered.", 503)
        if count > self.left:
            raise Refusal("The server is busy with other large requests. Try again later.", 503)
        self.left -= count
        self.taken[client] += count
        return count

    def give_back(self, count: int, client: str) -> None:
        """Return `count` bytes that were taken for a client."""
        self.left += count
        self.taken[client] -= count
        if not self.taken[client]:
            del self.taken[client]


__all__ = ["Access", "Budget", "Limits", "Refusal", "sentence_of", "shown"]
