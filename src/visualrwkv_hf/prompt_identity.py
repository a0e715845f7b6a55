"""What a state has read, as numbers that can be compared: the ids of words, and for pictures what their pixels make.

Letters: B batch, T time of one row without its pads, N pictures.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig


def pixel_inputs_of(config: PreTrainedConfig) -> tuple[str, ...]:
    """Return the model's inputs that have a row for every view of a picture; a text model has none."""
    vision = getattr(config, "vision_config", None)
    return () if vision is None else tuple(vision.pixel_inputs.values())


def picture_inputs_of(config: PreTrainedConfig) -> tuple[str, ...]:
    """Return the model's inputs that describe pictures."""
    return (*pixel_inputs_of(config), "num_tiles")


class Pictures(NamedTuple):
    """The pictures of inputs.

    `tensors`: those of the model's picture inputs that were given. `tiles`: how many tiles with tokens of their own
    each picture has, [N]. `num_views`: how many rows of the pixels a tile has.
    """

    tensors: dict[str, Tensor]
    tiles: list[int]
    num_views: int

    @classmethod
    def of(cls, inputs: Mapping[str, Any], config: PreTrainedConfig) -> "Pictures":
        """Those of `inputs` for a model of `config`.

        Raises:
            ValueError: pixels that are not of whole pictures.
        """
        tensors = {
            name: inputs[name] for name in picture_inputs_of(config) if isinstance(inputs.get(name), Tensor)
        }
        counts = {name: len(tensors[name]) for name in pixel_inputs_of(config) if name in tensors}
        if len(set(counts.values())) > 1:
            raise ValueError(f"All encoders must see the same views, got {counts}.")
        count = next(iter(counts.values()), 0)
        num_views = config.vision_config.num_views if hasattr(config, "vision_config") else 1
        tiles = tensors["num_tiles"].tolist() if "num_tiles" in tensors else [1] * (count // num_views)
        if sum(tiles) * num_views != count:
            raise ValueError(
                f"pixel_values holds {count} views, {num_views} for each of {sum(tiles)} tiles make "
                f"{sum(tiles) * num_views}: is num_tiles right?"
            )
        return cls(tensors, tiles, num_views)

    def chosen(self, chosen: Sequence[bool]) -> dict[str, Tensor]:
        """The tensors of the `chosen` pictures, [N]; an empty dictionary if that is none."""
        if not any(chosen):
            return {}
        picture = torch.tensor(chosen)
        view = picture.repeat_interleave(self.num_views * torch.tensor(self.tiles))
        return {
            name: tensor[(picture if name == "num_tiles" else view).to(tensor.device)]
            for name, tensor in self.tensors.items()
        }

    def numbers(self, pixel_dtype: torch.dtype) -> list[int]:
        """A negative number for each picture, [N]: 63 bits of the SHA-256 of its pixels in `pixel_dtype`."""
        hashes = [hashlib.sha256() for _ in self.tiles]
        for name in [name for name in self.tensors if name != "num_tiles"]:
            pixels = self.tensors[name].detach().to("cpu", pixel_dtype)
            for digest, of_picture in zip(
                hashes, pixels.split([self.num_views * tiles for tiles in self.tiles])
            ):
                digest.update(f"{name}{tuple(of_picture.shape)}{pixel_dtype}".encode())
                digest.update(of_picture.contiguous().view(torch.uint8).numpy())
        return [~(int.from_bytes(digest.digest()[:8], "little") >> 1) for digest in hashes]


class Prompt(NamedTuple):
    """Inputs without pads.

    `contents`: B times int64 [T] on the CPU, ids of words, and at all tokens of a picture one negative number that
    its pixels make. `picture_ends`: for each row, how many tokens there are up to the end of each of its pictures.
    """

    contents: list[Tensor]
    picture_ends: list[list[int]]


def read_prompt(
    config: PreTrainedConfig,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    pictures: Pictures,
    pixel_dtype: torch.dtype,
) -> Prompt:
    """What inputs hold.

    Args:
        config: the model's.
        input_ids: [B, T].
        attention_mask: [B, T], 0 at pads.
        pictures: of all rows.
        pixel_dtype: in which pixels are compared.

    Raises:
        ValueError: if pictures and placeholders do not match.
    """
    input_ids = input_ids.cpu()
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.cpu()
    rows = [ids[real] for ids, real in zip(input_ids.long(), mask.bool())]
    placeholder = getattr(config, "image_token_id", None)
    if placeholder is None:
        return Prompt(rows, [[] for _ in rows])
    numbers = pictures.numbers(pixel_dtype)
    lengths = [config.num_image_tokens_of(tiles) for tiles in pictures.tiles]
    places = [(ids == placeholder).nonzero()[:, 0] for ids in rows]
    if (found := sum(map(len, places))) != sum(lengths):
        raise ValueError(
            f"The text has {found} image placeholders, but "
            + (f"the pictures give {sum(lengths)} tokens." if lengths else "no pixel_values were given.")
        )
    ends: list[list[int]] = [[] for _ in rows]
    picture = 0
    for ids, place, row_ends in zip(rows, places, ends):
        taken = 0
        while taken < len(place):
            of_picture = place[taken : taken + lengths[picture]]
            if len(of_picture) != lengths[picture]:
                raise ValueError(
                    f"Picture {picture + 1} takes {lengths[picture]} tokens, its row has {len(of_picture)} left."
                )
            ids[of_picture] = numbers[picture]
            row_ends.append(int(of_picture[-1]) + 1)
            taken, picture = taken + lengths[picture], picture + 1
    return Prompt(rows, ends)


def refuse_other_beginning(read: Tensor, prompt: Tensor, row: int = 0) -> None:
    """Raises `ValueError` naming the first token or picture of `prompt` [T] that is not what was `read` [T']."""
    length = min(len(read), len(prompt))
    differing = (read[:length] != prompt[:length]).nonzero()
    if len(differing):
        place = int(differing[0])
        was, now = int(read[place]), int(prompt[place])
        if was < 0 and now < 0:
            number = len(prompt[: place + 1][prompt[: place + 1] < 0].unique_consecutive())
            what = f"picture {number} is another one"
        else:
            what = f"token {place} is {_named(now)}, the state has read {_named(was)} there"
        raise ValueError(
            f"The inputs do not begin with what the state has read: {what} (row {row}). They must be the whole chat "
            "from its start, rendered as for the state (chat template, image_position)."
        )
    if len(prompt) <= len(read):
        raise ValueError(
            f"The state has read {len(read)} tokens, the inputs have {len(prompt)} (row {row}): nothing is left to "
            "read. They must be the whole chat and at least one token more, as add_generation_prompt=True gives it."
        )


def _named(number: int) -> str:
    return "a picture's" if number < 0 else str(number)


def piece_ends(contents: Tensor, turn_ends: Collection[int], image_token_id: int | None) -> list[int]:
    """Where a prompt [T] is cut, so that a state which ends there goes on with the same arithmetic, to the bit.

    Behind each run of pictures, and in front of the last user's turn: behind the last but one of `turn_ends`, for
    the last one ends the question. A product of matrices may round otherwise with another number of rows.
    """
    is_picture = contents < 0
    if image_token_id is not None:
        is_picture |= contents == image_token_id
    ends = set(((is_picture[:-1] & ~is_picture[1:]).nonzero()[:, 0] + 1).tolist())
    turns = torch.isin(contents, torch.tensor(list(turn_ends), dtype=torch.long)).nonzero()[:, 0].tolist()
    return sorted(ends | {place + 1 for place in turns[-2:-1]})


def stable_length(processor, messages: list[dict], length: int, **template_variables) -> int:
    """How many of the `length` tokens of a chat stay as they are whatever is said next, in it or behind it.

    Raises:
        ValueError: if that would leave out a picture.
    """
    if isinstance(messages[0], list | tuple):
        raise ValueError("read() takes one chat; VisualRWKVCache.stack() makes a batch of several states.")
    tokenizer = getattr(processor, "tokenizer", processor)

    def encoded(chat: list[dict]) -> list[int]:
        text = processor.apply_chat_template(chat, tokenize=False, **template_variables)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ids = encoded(messages)
    common = min(_common_length(ids, encoded(longer)) for longer in _continuations(messages))
    image_token_id = getattr(tokenizer, "image_token_id", None)
    if image_token_id in ids[common:]:
        raise ValueError(
            "What is said next would stand before a picture of this chat, so the picture cannot be read yet: with "
            "image_position 'middle' and 'last' the question stands in front of it. Give the picture together with "
            "its question, or read and ask with image_position='first'; sandwich_history=True puts even later "
            "questions in front, and cannot be used."
        )
    return length - (len(ids) - common)


def _continuations(messages: list[dict]) -> list[list[dict]]:
    """Chats that begin with `messages`: one with turns behind it, and one with a text for pictures that have none."""
    user, assistant = ({"role": role, "content": "x"} for role in ("user", "assistant"))
    last, text = messages[-1], {"type": "text", "text": "x"}
    if last["role"] != "user":
        return [[*messages, user, assistant]]
    chats = [[*messages, assistant, user]]
    if not isinstance(last["content"], str) and all(part["type"] == "image" for part in last["content"]):
        chats.append([*messages[:-1], last | {"content": [*last["content"], text]}])
    return chats


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
