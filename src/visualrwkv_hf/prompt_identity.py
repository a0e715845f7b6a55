"""Tell whether two prompts are the same: token ids, and for pictures the SHA-256 of their pixels.

Letters: B batch, T tokens of one row without its padding, N pictures.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig


def pixel_inputs_of(config: PreTrainedConfig) -> tuple[str, ...]:
    """Return the model's inputs that have a row for every view of a picture; a text model has none."""
    vision = getattr(config, "vision_config", None)
    return () if vision is None else tuple(vision.pixel_inputs.values())


def picture_inputs_of(config: PreTrainedConfig) -> tuple[str, ...]:
    """Return the model's inputs that describe pictures; a text model has none."""
    pixels = pixel_inputs_of(config)
    return (*pixels, "num_tiles") if pixels else ()


class Pictures(NamedTuple):
    """The pictures of one call of the model.

    Attributes:
        tensors: those of the model's picture inputs that were given.
        tiles: [N], how many tiles each picture has; every tile has tokens of its own.
        num_views: how many rows of the pixel tensors belong to one tile.
    """

    tensors: dict[str, Tensor]
    tiles: list[int]
    num_views: int

    @classmethod
    def of(cls, inputs: Mapping[str, Any], config: PreTrainedConfig) -> "Pictures":
        """Return the pictures among `inputs`, for a model with this `config`.

        Raises:
            ValueError: the encoders are given different numbers of views, or the views do not add up to whole pictures.
        """
        names = picture_inputs_of(config)
        tensors = {name: inputs[name] for name in names if isinstance(inputs.get(name), Tensor)}
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

    def chosen(self, chosen: Sequence[bool]) -> "Pictures":
        """Return only the pictures for which `chosen` [N] is true."""
        picture = torch.tensor(chosen, dtype=torch.bool)
        view = picture.repeat_interleave(self.num_views * torch.tensor(self.tiles, dtype=torch.long))
        tensors = {
            name: tensor[(picture if name == "num_tiles" else view).to(tensor.device)]
            for name, tensor in self.tensors.items()
        }
        return Pictures(tensors, [tiles for tiles, keep in zip(self.tiles, chosen) if keep], self.num_views)

    def one_by_one(self) -> Iterator["Pictures"]:
        """Yield each picture alone."""
        for number in range(len(self.tiles)):
            yield self.chosen([other == number for other in range(len(self.tiles))])

    def hashes(self, pixel_dtype: torch.dtype) -> list[bytes]:
        """Return the SHA-256 of each picture's pixels in `pixel_dtype`, N times 32 bytes."""
        hashes = [hashlib.sha256() for _ in self.tiles]
        for name in [name for name in self.tensors if name != "num_tiles"]:
            pixels = self.tensors[name].detach().to("cpu", pixel_dtype)
            for digest, of_picture in zip(
                hashes, pixels.split([self.num_views * tiles for tiles in self.tiles])
            ):
                digest.update(f"{name}{tuple(of_picture.shape)}{pixel_dtype}".encode())
                digest.update(of_picture.contiguous().view(torch.uint8).numpy())
        return [digest.digest() for digest in hashes]


def picture_number(picture_hash: bytes) -> int:
    """Return the negative int64 that represents a picture among token ids: 63 bits of its hash."""
    return ~(int.from_bytes(picture_hash[:8], "little") >> 1)


class PromptIdentity(NamedTuple):
    """What one row of a prompt consists of.

    Attributes:
        ids: int64 [T] on the CPU. Token ids; at all tokens of a picture the picture's negative number.
        picture_ends: for each picture, how many tokens there are up to its end.
        picture_hashes: the SHA-256 of each picture. Empty for a state from a file of an earlier version, which kept
            only the pictures' numbers.
    """

    ids: Tensor
    picture_ends: tuple[int, ...] = ()
    picture_hashes: tuple[bytes, ...] = ()

    @property
    def length(self) -> int:
        """The number of tokens T."""
        return len(self.ids)

    @property
    def has_hashes(self) -> bool:
        """Whether the hash of every picture is known."""
        return bool(self.picture_hashes) or not bool((self.ids < 0).any())

    def beginning(self, length: int) -> "PromptIdentity":
        """Return the identity of the first `length` tokens."""
        count = sum(end <= length for end in self.picture_ends)
        return PromptIdentity(self.ids[:length], self.picture_ends[:count], self.picture_hashes[:count])

    def continued(self, ids: Tensor) -> "PromptIdentity":
        """Return the identity of this prompt with more text `ids` [T'] after it."""
        return self._replace(ids=torch.cat([self.ids, ids.to(self.ids)]))

    def digests(self, lengths: Collection[int]) -> dict[int, bytes]:
        """Return a SHA-256 of the beginning of each of these `lengths` that the prompt has.

        Two beginnings have one digest only if all their token ids and the full hashes of all their pictures agree.
        """
        hashes = dict(zip(self.picture_ends, self.picture_hashes))
        wanted = {length for length in lengths if length <= self.length}
        digest, start, digests = hashlib.sha256(), 0, {}
        for end in sorted(wanted | {end for end in hashes if end <= max(wanted, default=0)}):
            digest.update(self.ids[start:end].contiguous().numpy().tobytes())
            digest.update(hashes.get(end, b""))
            start = end
            if end in wanted:
                digests[end] = digest.digest()
        return digests


def identify_prompt(
    config: PreTrainedConfig,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    pictures: Pictures,
    pixel_dtype: torch.dtype,
) -> list[PromptIdentity]:
    """Return the identity of each row of a prompt, B entries.

    Args:
        config: the model's configuration.
        input_ids: int64 [B, T].
        attention_mask: [B, T], 0 at padding; None if there is no padding.
        pictures: the pictures of all rows, in the order of their placeholders.
        pixel_dtype: the dtype in which pixels are compared.

    Raises:
        ValueError: pictures and placeholders do not match.
    """
    input_ids = input_ids.cpu()
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.cpu()
    rows = [ids[real] for ids, real in zip(input_ids.long(), mask.bool())]
    placeholder = getattr(config, "image_token_id", None)
    if placeholder is None:
        return [PromptIdentity(ids) for ids in rows]
    lengths = [config.num_image_tokens_of(tiles) for tiles in pictures.tiles]
    places = [(ids == placeholder).nonzero()[:, 0] for ids in rows]
    if (found := sum(map(len, places))) != sum(lengths):
        raise ValueError(
            f"The text has {found} image placeholders, but "
            + (f"the pictures give {sum(lengths)} tokens." if lengths else "no pixel_values were given.")
        )
    left = list(zip(lengths, pictures.hashes(pixel_dtype)))
    return [_with_pictures(ids, place, left, len(lengths)) for ids, place in zip(rows, places)]


def _with_pictures(ids: Tensor, places: Tensor, left: list[tuple[int, bytes]], count: int) -> PromptIdentity:
    """Number the placeholders at `places` of one row, and take its pictures from `left`: tokens and hash of each."""
    ends, hashes = [], []
    while len(places):
        length, picture_hash = left.pop(0)
        if len(places) < length:
            raise ValueError(
                f"Picture {count - len(left)} takes {length} tokens, its row has {len(places)} left."
            )
        ids[places[:length]] = picture_number(picture_hash)
        ends.append(int(places[length - 1]) + 1)
        hashes.append(picture_hash)
        places = places[length:]
    return PromptIdentity(ids, tuple(ends), tuple(hashes))


def refuse_other_beginning(read: PromptIdentity, prompt: PromptIdentity, row: int = 0) -> None:
    """Raise `ValueError`, naming the first token or picture of `prompt` that differs from what was `read`."""
    length = min(read.length, prompt.length)
    places = (read.ids[:length] != prompt.ids[:length]).nonzero()[:1, 0].tolist()
    # Pictures are also compared by their full hashes: their numbers among the ids have 63 bits only.
    places += [
        end - 1
        for end, one, other in zip(read.picture_ends, read.picture_hashes, prompt.picture_hashes)
        if one != other
    ]
    if places:
        place = min(places)
        was, now = int(read.ids[place]), int(prompt.ids[place])
        if was < 0 and now < 0:
            number = sum(end <= place for end in prompt.picture_ends) + 1
            what = f"picture {number} is another one"
        else:
            what = f"token {place} is {_named(now)}, the state has read {_named(was)} there"
        raise ValueError(
            f"The inputs do not begin with what the state has read: {what} (row {row}). They must be the whole chat "
            "from its start, rendered as for the state (chat template, image_position)."
        )
    if prompt.length <= read.length:
        raise ValueError(
            f"The state has read {read.length} tokens, the inputs have {prompt.length} (row {row}): nothing is left "
            "to read. They must be the whole chat and at least one token more, as add_generation_prompt=True gives it."
        )


def _named(number: int) -> str:
    return "a picture's" if number < 0 else str(number)


def longest_piece(device: torch.device) -> int:
    """Return how many tokens of text are read at once at most: after each piece the reading can be given up.

    Pieces of this length compute about as fast as whole prompts.
    """
    return 512 if device.type == "cpu" else 4096


def piece_ends(
    ids: Tensor, turn_ends: Collection[int], image_token_id: int | None, longest: int
) -> list[int]:
    """Return the lengths at which the prompt `ids` [T] is cut into pieces that are read one after the other.

    The cuts are after each run of pictures, before the last user's turn (after the last but one of `turn_ends`; the
    last one ends the question), and at the multiples of `longest` that are not inside a run of pictures. A kept state
    may end at the first two. Continuing from it is then the same arithmetic as reading the whole prompt, bit for bit:
    a matrix product may round differently for another number of rows.
    """
    is_picture = ids < 0
    if image_token_id is not None:
        is_picture |= ids == image_token_id
    ends = set(((is_picture[:-1] & ~is_picture[1:]).nonzero()[:, 0] + 1).tolist())
    turns = torch.isin(ids, torch.tensor(list(turn_ends), dtype=torch.long)).nonzero()[:, 0].tolist()
    within = is_picture[:-1] & is_picture[1:]  # a cut after token t would be inside a run, [T - 1]
    parts = {length for length in range(longest, len(ids), longest) if not within[length - 1]}
    return sorted(ends | parts | {place + 1 for place in turns[-2:-1]})


def stable_length(processor, messages: list[dict], length: int, **template_variables) -> int:
    """Return how many of a chat's `length` tokens stay the same, whatever its last turn or the next turns say.

    Raises:
        ValueError: a picture is not among these tokens, or several chats are given.
    """
    if isinstance(messages[0], list | tuple):
        raise ValueError("read() takes one chat; KeptState.stack() makes a batch of several states.")
    tokenizer = getattr(processor, "tokenizer", processor)

    def encoded(chat: list[dict]) -> list[int]:
        text = processor.apply_chat_template(chat, tokenize=False, **template_variables)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ids = encoded(messages)
    common = min(_common_length(ids, encoded(longer)) for longer in _continuations(messages))
    image_token_id = getattr(tokenizer, "image_token_id", None)
    if image_token_id in ids[common:]:
        raise ValueError(
            "A later question would be placed before a picture of this chat, so the picture cannot be read yet: with "
            "image_position 'middle' and 'last' the question comes before its picture. Give the picture together with "
            "its question, or read and ask with image_position='first'. sandwich_history=True puts even later "
            "questions before the first picture and cannot be used."
        )
    return length - (len(ids) - common)


def _continuations(messages: list[dict]) -> list[list[dict]]:
    """Return chats that begin with `messages`: one with further turns, and one with a text for pictures without one."""
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
