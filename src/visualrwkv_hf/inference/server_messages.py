"""The messages of a request: OpenAI's roles and parts become a chat for the processor, and a list of media.

Nothing in them makes this machine read a file; pictures and films are URLs, which are fetched later, or bytes.
"""

import base64
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .server_limits import Limits, Refusal, shown

_EMPTY = ("refusal", "annotations", "audio", "function_call", "tool_calls", "reasoning_content", "reasoning")
"""Keys that clients send along in an assistant's message, without a value."""
_MESSAGE_KEYS = {"role", "content", "name", "type", "id", "status", *_EMPTY}
TEXTS, PICTURES, FILMS = ("text", "input_text", "output_text"), ("image_url", "input_image"), ("video_url",)
"""Types of content: OpenAI's, and the one that vLLM and transformers take for films."""
_PART_KEYS = {"type", "text", "image_url", "detail", "file_id", "annotations", "logprobs"}
_FILM_KEYS = {"type", "video_url"}


class Medium(NamedTuple):
    """A picture or a film of a request.

    Args:
        name: what errors call it, for example "Picture 1".
        content: its URL or its bytes.
        is_film: whether it is a film.
    """

    name: str
    content: str | bytes
    is_film: bool = False

    @property
    def kind(self) -> str:
        """What it is, in a word of errors."""
        return "film" if self.is_film else "picture"


def read_messages(
    given: Any, instructions: str | None, source: str, limits: Limits
) -> tuple[list[dict[str, Any]], list[Medium]]:
    """Return the messages for the processor, and their pictures and films.

    Args:
        given: `messages` of a chat or `input` of a response, as JSON has them.
        instructions: a system message to put before them.
        source: the name of the field, for errors.
        limits: on messages, pictures and text.

    Returns:
        Messages in which `{"type": "image", "image": n}`, or `{"type": "video", "video": n}`, is medium n, and the
        media.

    Raises:
        Refusal: They cannot be read, or are too many or too long.
    """
    if source == "input":
        given = _listed_input(given)
    if not isinstance(given, list) or not given:
        raise Refusal(f"{source} must be a list of at least one message.")
    if len(given) > limits.prompt_tokens:
        raise Refusal(f"{source} holds {len(given)} messages, which is more than a prompt can take.")
    media: list[Medium] = []
    messages = [_read_message(message, f"{source}[{n}]", media, limits) for n, message in enumerate(given)]
    if instructions is not None:
        messages.insert(0, {"role": "system", "content": instructions})
    messages = _joined_system(messages)
    refuse_long_text(list(_texts_of(messages)), limits)
    return messages, media


def _listed_input(given: Any) -> Any:
    """Return the `input` of a response as messages: a text or a list of content is a user's message."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    first = given[0] if isinstance(given, list) and given else None
    if isinstance(first, dict) and "role" not in first and first.get("type") in (*TEXTS, *PICTURES, *FILMS):
        return [{"role": "user", "content": given}]
    return given


def _read_message(message: Any, where: str, media: list[Medium], limits: Limits) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise Refusal(f"{where} must be an object with role and content.")
    if unknown := sorted(message.keys() - _MESSAGE_KEYS):
        raise Refusal(f"{where} has unexpected fields: {', '.join(map(shown, unknown[:8]))}.")
    for name in _EMPTY:
        if message.get(name):
            raise Refusal(f"{where} has {name}, which this model cannot read.")
    if message.get("type", "message") != "message":
        raise Refusal(f"{where} is of type {shown(message['type'])}: it can only be a message.")
    role, content = message["role"], message.get("content")
    if role == "developer":  # OpenAI's newer name
        role = "system"
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, str):
        return {"role": role, "content": content}
    if not isinstance(content, list):
        raise Refusal(f"{where} must have a text or a list as its content, got {shown(content)}.")
    return {"role": role, "content": [_read_part(part, where, media, limits) for part in content]}


def _read_part(part: Any, where: str, media: list[Medium], limits: Limits) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else part
    if not isinstance(part, dict) or kind not in (*TEXTS, *PICTURES, *FILMS):
        raise Refusal(
            f"{where} has content of type {shown(kind)}: it can be {', '.join((*TEXTS, *PICTURES, *FILMS))}."
        )
    if unknown := sorted(part.keys() - (_FILM_KEYS if kind in FILMS else _PART_KEYS)):
        raise Refusal(f"{where} has content with unexpected fields: {', '.join(map(shown, unknown[:8]))}.")
    if kind in TEXTS:
        if not isinstance(part.get("text"), str):
            raise Refusal(f"{where} must have a text, got {shown(part.get('text'))}.")
        return {"type": "text", "text": part["text"]}
    if len(media) == limits.pictures:
        raise Refusal(f"A request can hold at most {limits.pictures} pictures.")
    media.append(_film(part, media) if kind in FILMS else _picture(part, media))
    kind = "video" if kind in FILMS else "image"
    return {"type": kind, kind: len(media) - 1}


def _picture(part: Mapping[str, Any], before: Sequence[Medium]) -> Medium:
    name = f"Picture {1 + sum(not medium.is_film for medium in before)}"
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, dict) else url
    if part.get("file_id") is not None:
        url = None
    return Medium(name, _content_of(url, name, "image"))


def _film(part: Mapping[str, Any], before: Sequence[Medium]) -> Medium:
    name = f"Film {1 + sum(medium.is_film for medium in before)}"
    url = part.get("video_url")
    if isinstance(url, dict):
        if unknown := sorted(url.keys() - {"url"}):  # such as a frame rate
            raise Refusal(
                f"{name}: video_url has the key url alone, not {', '.join(map(shown, unknown[:8]))}; "
                'media_io_kwargs says which frames are taken: {"video": {"num_frames": 4}}.'
            )
        url = url.get("url")
    return Medium(name, _content_of(url, name, "video"), is_film=True)


def _content_of(url: Any, name: str, kind: str) -> str | bytes:
    """Return a URL, or the bytes that a data URL of this kind holds. Neither is quoted in an error."""
    if not isinstance(url, str):
        raise Refusal(f"{name}: it must be given as a URL, or as data:{kind}/...;base64,...")
    start = url[:16].lower()
    if start.startswith(("http://", "https://")):
        return url
    head, comma, data = url.partition(",")
    kinds = f"(image|{kind})"  # an animation is a film, and of type image
    if not comma or not re.fullmatch(
        rf"data:{kinds}/[\w.+-]+(;[\w.+=-]+)*;base64", head[:200], re.IGNORECASE
    ):
        raise Refusal(f"{name}: it must be a URL of http or https, or data:{kind}/...;base64,...")
    try:
        return bytes_of_base64(data)
    except ValueError as error:
        raise Refusal(f"{name}: it is not valid base64.") from error


def bytes_of_base64(text: str) -> bytes:
    """Return what base64 says, in memory of a few times its length; spaces, and what a URL escapes, may be in it.

    Raises:
        ValueError: it is no base64.
    """
    coded = text.encode("ascii")
    if b"%" in coded:
        for character in b"+/= \r\n":
            for escape in {b"%%%02X" % character, b"%%%02x" % character}:
                coded = coded.replace(escape, bytes([character]))
    return base64.b64decode(coded.translate(None, string.whitespace.encode()), validate=True)


def _joined_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join several system messages at the start, such as a developer's instructions and a user's, into one."""
    count = next((n for n, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if count < 2:
        return messages
    texts = [text for message in messages[:count] for text in _texts_of([message])]
    if any(
        part["type"] != "text"
        for m in messages[:count]
        if isinstance(m["content"], list)
        for part in m["content"]
    ):
        raise Refusal("A system message must hold text alone.")
    return [{"role": "system", "content": "\n".join(texts)}, *messages[count:]]


def _texts_of(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for message in messages:
        if isinstance(message["content"], str):
            yield message["content"]
        else:
            yield from (part["text"] for part in message["content"] if part["type"] == "text")


def refuse_long_text(texts: Sequence[str], limits: Limits) -> None:
    """Raise `Refusal` for texts that would make too long a prompt, before they are tokenized."""
    count = sum(map(len, texts))
    if count > limits.prompt_characters:
        raise Refusal(
            f"The request holds {count} characters of text, at most {limits.prompt_characters} can be read: a prompt "
            f"can have {limits.prompt_tokens} tokens."
        )


__all__ = ["Medium", "read_messages", "refuse_long_text"]
