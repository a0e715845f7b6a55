"""Films in prompts: each becomes its frames, which are pictures on lines of their own."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .films import ALL_FRAMES, FrameSampling, film_frames

FILM_TOKEN = "<video>"
"""Where a film stands in a text that is given to the processor together with `videos`. It is no token of a model."""

FILM_KEYS = ("video", "url", "path", "base64")
"""Keys under which a message's content part may give its film; `frames` gives a list of pictures."""


SAMPLING_OPTIONS = ("num_frames", "fps", "do_sample_frames")
"""Options of transformers' video processors that say which frames are taken."""


def sampling_of(options: dict[str, Any]) -> FrameSampling:
    """Take the options of transformers' video processors out of `options`, and return the sampling they ask for.

    These are `num_frames`, `fps` and `do_sample_frames`, which takes all frames if it is False.

    Raises:
        ValueError: they contradict one another.
    """
    flat = {name: options.pop(name, None) for name in SAMPLING_OPTIONS}
    given = dict(options.pop("videos_kwargs", None) or {})
    given |= {name: value for name, value in flat.items() if value is not None}
    is_sampled = given.pop("do_sample_frames", None)
    unknown = given.keys() - {"num_frames", "fps"}
    if unknown:
        raise ValueError(f"Films have the options num_frames and fps, not {', '.join(sorted(unknown))}.")
    if is_sampled is False:
        return FrameSampling(num_frames=ALL_FRAMES)
    return FrameSampling(num_frames=given.get("num_frames"), fps=given.get("fps"))


def has_films(conversation: Sequence) -> bool:
    """Return whether a message of a chat, or of several chats, holds a film."""
    return any(part.get("type") == "video" for part in _parts(conversation))


def _parts(conversation: Sequence) -> Iterator[Mapping]:
    for item in conversation:
        if isinstance(item, list | tuple):
            yield from _parts(item)
        elif isinstance(item.get("content"), list | tuple):
            yield from item["content"]


def with_frames(conversation: Sequence, sampling: FrameSampling) -> list:
    """Return the chat or chats with the frames of each film, as pictures, in its place.

    Raises:
        ValueError: a film cannot be read.
    """

    def frames(part: Mapping) -> list[dict]:
        return [{"type": "image", "image": frame} for frame in film_frames(_film_of(part), sampling)]

    return _replaced(conversation, frames)


def as_placeholders(conversation: Sequence) -> tuple[list, list[bool]]:
    """Return the chat or chats with a picture in the place of each film, and for each picture whether it is a film."""
    is_film = [part["type"] == "video" for part in _parts(conversation) if part["type"] in ("image", "video")]
    return _replaced(conversation, lambda part: [{"type": "image"}]), is_film


def _replaced(conversation: Sequence, new_parts) -> list:
    replaced = []
    for item in conversation:
        if isinstance(item, list | tuple):
            item = _replaced(item, new_parts)
        elif isinstance(item.get("content"), list | tuple):
            content = [
                new
                for part in item["content"]
                for new in (new_parts(part) if part["type"] == "video" else [part])
            ]
            item = {**item, "content": content}
        replaced.append(item)
    return replaced


def _film_of(part: Mapping) -> Any:
    if (frames := part.get("frames")) is not None:
        return list(frames)
    found = [part[key] for key in FILM_KEYS if part.get(key) is not None]
    if len(found) != 1:
        raise ValueError(
            "A content part of type 'video' needs its film under one of the keys "
            f"{', '.join(FILM_KEYS)} or frames, got {len(found)} of them."
        )
    return found[0]


def films_marked(texts: str | list[str], is_film: list[bool], image_token: str) -> str | list[str]:
    """Return rendered prompts in which those `<image>` that stand for a film are `<video>`."""
    kinds = iter(is_film)

    def mark(found: re.Match) -> str:
        return FILM_TOKEN if next(kinds) else found.group()

    if isinstance(texts, str):
        return re.sub(re.escape(image_token), mark, texts)
    return [re.sub(re.escape(image_token), mark, text) for text in texts]


def films_as_pictures(
    texts: str | list[str], images: Any, videos: Any, sampling: FrameSampling, image_token: str
) -> tuple[list[str], list[list]]:
    """Return the texts with `<image>` for each frame of their films, and for each text its pictures.

    Args:
        texts: with one `<image>` for every picture and one `<video>` for every film.
        images: the pictures, as for the processor: one, a list in the order of the placeholders, or one list for every
            text.
        videos: the films, likewise. A list of pictures is one film in a list of films.
        sampling: which frames are taken.
        image_token: the placeholder of a picture.

    Raises:
        ValueError: placeholders and films or pictures do not match in number, or a film cannot be read.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    pictures, films = (
        _for_each(texts, image_token, images),
        _for_each(texts, FILM_TOKEN, videos),
    )
    new_texts, new_pictures = [], []
    for text, of_text, films_of_text in zip(texts, pictures, films):
        left, left_films, found = iter(of_text), iter(films_of_text), []
        pieces = re.split(f"({re.escape(image_token)}|{re.escape(FILM_TOKEN)})", text)
        for index, piece in enumerate(pieces):
            if piece == image_token:
                found.append(next(left))
            elif piece == FILM_TOKEN:
                frames = film_frames(next(left_films), sampling)
                found += frames
                pieces[index] = "\n".join([image_token] * len(frames))
        new_texts.append("".join(pieces))
        new_pictures.append(found)
    return new_texts, new_pictures


def _for_each(texts: list[str], token: str, given: Any) -> list[list]:
    """Return for each text what stands at its placeholders."""
    wanted = [text.count(token) for text in texts]
    items = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    lengths = [len(item) if isinstance(item, list | tuple) else None for item in items]
    if len(items) == len(texts) and lengths == wanted:
        return [list(item) for item in items]
    if len(items) != sum(wanted):
        what = "film" if token == FILM_TOKEN else "picture"
        raise ValueError(
            f"Every {token} needs one {what}: found {wanted} {token} in the texts and {len(items)} {what}s."
        )
    rest = iter(items)
    return [[next(rest) for _ in range(count)] for count in wanted]


def around_pictures(processor, question: str = "") -> tuple[str, str]:
    """Return the text before the first picture of a user message that begins with pictures, and that after the last."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        image_position="first",
        tokenize=False,
    )
    before, after = text.split(processor.image_token)
    return before, after


__all__ = ["FILM_TOKEN", "films_as_pictures", "with_frames"]
