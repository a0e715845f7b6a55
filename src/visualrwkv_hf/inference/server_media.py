"""The pictures and films of a request, opened within the limits, and put into its messages."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from ..films import FrameSampling
from ..pictures import open_picture
from .film_process import read_film
from .server_limits import Limits, Refusal, sentence_of
from .server_messages import Medium

PICTURES_IN_FULL = 4
"""How many pictures of the largest size a request may hold; smaller ones may be more."""


def open_media(
    media: Sequence[Medium], sampling: FrameSampling, limits: Limits, is_left: Callable[[], bool]
) -> list[list[Image.Image]]:
    """Return for each medium of a request its picture, or the frames of the film.

    Args:
        media: with their bytes.
        sampling: which frames of films are taken.
        limits: on pixels, on pictures and frames together, and on the seconds that a film takes.
        is_left: whether nobody waits for them any more; it ends the decoding of a film.

    Raises:
        Refusal: one cannot be read, or exceeds a limit; it says which one.
        Left: `is_left` said so.
    """
    opened: list[list[Image.Image]] = []
    pixels, number = PICTURES_IN_FULL * limits.picture_pixels, limits.pictures
    sampling = dataclasses.replace(sampling, max_pixels=limits.picture_pixels)
    for index, medium in enumerate(media):
        assert isinstance(medium.content, bytes)
        others = len(media) - index - 1  # each of them has one picture at least
        try:
            if medium.is_film:
                pictures = read_film(
                    medium.content,
                    sampling,
                    max_frames=number - others,
                    max_total_pixels=pixels,
                    seconds=limits.film_seconds,
                    is_left=is_left,
                )
            else:
                pictures = [open_picture(medium.content, max_pixels=min(limits.picture_pixels, pixels))]
        except ValueError as error:
            reason = sentence_of(error)
            if reason.startswith("bytes "):
                reason = f"it {reason.removeprefix('bytes ')}"
            raise Refusal(f"{medium.name}: {reason}") from error
        except ImportError as error:
            raise Refusal(f"{medium.name}: this server cannot read it. {error}", 501) from error
        pixels -= sum(picture.width * picture.height for picture in pictures)
        number -= len(pictures)
        opened.append(pictures)
    return opened


def refuse_many_tiles(pictures: Sequence[Image.Image], processor: Any, limits: Limits) -> None:
    """Refuse pictures of which the processor would make too many tokens or tiles, before it makes one.

    Raises:
        Refusal: they have more tokens than a prompt may have, or their tiles more pixels than pictures may have.
        ValueError: one cannot be cut.
    """
    if not pictures:
        return
    sizes = [(picture.height, picture.width) for picture in pictures]
    # Enlarging a large picture of a usual shape makes less than twice as many pixels of it.
    most = 2 * PICTURES_IN_FULL * limits.picture_pixels
    resized = getattr(processor.image_processor, "get_resized_pixels", lambda height, width: height * width)
    if (pixels := sum(resized(*size) for size in sizes)) > most:
        raise Refusal(f"The pictures' tiles have {pixels:,} pixels, they can have {most:,}.")
    length = sum(processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens)
    if length > limits.prompt_tokens:
        raise Refusal(f"The pictures have {length} tokens, a prompt can have {limits.prompt_tokens}.")


def with_pictures(
    messages: Sequence[Mapping[str, Any]], opened: Sequence[Sequence[Image.Image]]
) -> list[dict[str, Any]]:
    """Return messages whose media are pictures: a film becomes its frames.

    Args:
        messages: as [`read_messages`] returns them.
        opened: the pictures of each medium.
    """

    def parts_of(part: dict[str, Any]) -> list[dict[str, Any]]:
        if part["type"] == "text":
            return [part]
        return [{"type": "image", "image": picture} for picture in opened[part[part["type"]]]]

    return [
        {**message, "content": [new for part in message["content"] for new in parts_of(part)]}
        if isinstance(message["content"], list)
        else dict(message)
        for message in messages
    ]


__all__ = ["open_media", "refuse_many_tiles", "with_pictures"]
