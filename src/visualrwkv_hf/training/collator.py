"""Load LLaVA conversations or chat messages with pictures, and collate them into training batches.

A row names its pictures; they are opened when a batch is made, in the data loader's workers. Text, ids and labels come
from `conversations.py`. Letters: N pictures, B batch, T time.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TextIO

import torch
from PIL import Image
from transformers.utils import logging

from ..image_processing_visualrwkv import open_picture
from .conversations import (
    IGNORE_INDEX,
    IMAGE,
    PROMPT_FORMATS,
    PromptFormat,
    encode_conversation,
    pad_or_truncate,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from ..processing_visualrwkv import VisualRWKVProcessor

logger = logging.get_logger(__name__)

SPEAKER_OF_ROLE = {"user": "human", "assistant": "gpt"}
PICTURE_SOURCES = ("image", "path", "url", "base64")
"""Keys under which a message part `{"type": "image", ...}` may hold its picture, as in transformers' chats."""


def load_conversations(path: str | os.PathLike, image_folder: str | os.PathLike | None = None) -> "Dataset":
    """Load a file of LLaVA conversations or chat messages as a `datasets.Dataset`, without opening any picture.

    Args:
        path: A JSON file with a list of samples, or JSON lines (`.jsonl`). A sample has `conversations` (LLaVA's turns)
            or `messages` (roles user and assistant, optionally a system message first). Its pictures are paths or
            URLs, one or a list, under `image` or `images` or in the parts of its messages. `id` is optional.
        image_folder: The folder that relative paths start from. Default: the folder of `path`.

    Returns:
        A data set with the columns `id` (text), `conversations` (turns `from`, `value`) and `images` (a list of texts).

    Raises:
        ValueError: If the file is no JSON or a sample is malformed. The message names the file and the line, or the
            sample.
    """
    from datasets import Dataset

    folder = Path(path).parent if image_folder is None else Path(image_folder)
    rows = _read_rows(Path(path))
    return Dataset.from_list([_checked_row(row, number, folder) for number, row in enumerate(rows)])


def _read_rows(path: Path) -> list[dict]:
    with path.open(encoding="utf-8-sig") as file:  # editors on Windows begin a file with a byte order mark
        try:
            rows = _read_lines(file) if path.suffix == ".jsonl" else json.load(file)
        except ValueError as error:
            raise ValueError(f"{path.name} cannot be read as JSON: {error}.") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path.name} must hold a list of samples, with at least one.")
    return rows


def _read_lines(file: TextIO) -> list[Any]:
    """Return the values of JSON lines; blank lines are skipped."""
    rows = []
    for number, line in enumerate(file, start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from error
    return rows


def _checked_row(row: dict, number: int, folder: Path) -> dict[str, Any]:
    """Return a row with the same columns as every other: an Arrow column cannot mix texts and lists."""
    if not isinstance(row, dict):
        raise ValueError(f"Sample {number} must be an object, got {row!r:.80}.")
    try:
        conversations, images = conversation_of(row)
        if strange := [image for image in images if not isinstance(image, str)]:
            raise ValueError(f"a picture in a file must be a path or a URL, got {strange[0]!r}.")
        turns = [{"from": turn["from"], "value": turn["value"]} for turn in conversations]
        if odd := [part for turn in turns for part in turn.values() if not isinstance(part, str)]:
            raise ValueError(f"a turn's speaker and its text must be texts, got {odd[0]!r}.")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"Sample {number} ({row.get('id', 'without id')}): {error}") from error
    paths = [image if "://" in image else str(folder / image) for image in images]
    return {"id": str(row.get("id", number)), "conversations": turns, "images": paths}


def conversation_of(row: dict) -> tuple[list[dict], list]:
    """Return the turns and the pictures of a row that holds LLaVA `conversations` or chat `messages`.

    If the row has pictures but its messages have no image parts, the pictures belong to the first message, as in TRL.

    Raises:
        ValueError: If the row has neither, or no turn, or its messages do not fit the chat template.
    """
    given: Any = next((row[name] for name in ("images", "image") if row.get(name) is not None), [])
    images = list(given) if isinstance(given, list | tuple) else [given]
    is_llava = row.get("conversations") is not None
    turns = row["conversations"] if is_llava else row.get("messages")
    if turns is None:
        raise ValueError(f"a sample needs conversations or messages, got {', '.join(row) or 'nothing'}.")
    if not turns:
        raise ValueError("a conversation needs turns.")
    if is_llava:
        return turns, images
    conversations, own_images = messages_to_conversation(turns)
    if own_images and images:
        raise ValueError(f"{len(own_images)} pictures stand in the messages and {len(images)} beside them.")
    if images and conversations and not any(IMAGE in turn["value"] for turn in conversations):
        first = conversations[0]
        conversations[0] = {**first, "value": f"{IMAGE}\n" * len(images) + first["value"]}
    return conversations, own_images or images


def messages_to_conversation(messages: Sequence[dict]) -> tuple[list[dict], list]:
    """Convert chat messages to LLaVA's turns, and collect the pictures of their parts.

    As in the chat template, a message's pictures precede its text, its text parts become lines, and a system message
    is put before the first user message.

    Raises:
        ValueError: If a role or a part is unknown, or a text contains `<image>` in place of an image part.
    """
    system = ""
    turns: list[dict] = []
    images: list[Any] = []
    for position, message in enumerate(messages):
        parts = message["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        texts = [_text(part) for part in parts if part["type"] != "image"]
        pictures = [part for part in parts if part["type"] == "image"]
        images += [part[name] for part in pictures for name in PICTURE_SOURCES if part.get(name) is not None]
        text = "\n".join(texts)
        if message["role"] == "system" and position == 0 and not pictures:
            system = f"{text}\n"
            continue
        if message["role"] not in SPEAKER_OF_ROLE or (pictures and message["role"] != "user"):
            raise ValueError(f"message {position} of role {message['role']!r} with {len(pictures)} pictures.")
        value = f"{IMAGE}\n" * len(pictures) + (system if message["role"] == "user" else "") + text
        system = "" if message["role"] == "user" else system
        turns.append({"from": SPEAKER_OF_ROLE[message["role"]], "value": value})
    return turns, images


def _text(part: dict) -> str:
    if part["type"] != "text" or IMAGE in part["text"]:
        raise ValueError(f"a message's parts are pictures and texts without {IMAGE}, got {part}.")
    return part["text"]


class Sample(NamedTuple):
    """Ids, labels and attention mask of T tokens, and in `pixels` the image processor's output for the pictures."""

    input_ids: list[int]
    labels: list[int]
    attention_mask: list[int]
    pixels: dict[str, torch.Tensor]


NOTHING = Sample([], [], [], {})


@dataclass
class VisualRWKVDataCollator:
    """Collate rows with `conversations` or `messages` and their pictures into a batch for training.

    A Trainer needs `remove_unused_columns=False`, or it removes the columns that are read here.

    processor:
        The model's processor.
    prompt_format:
        How the text is written: a [`PromptFormat`] or the name of a release in `PROMPT_FORMATS`. The default is
        v7.00's format with the processor's image position, which is what the chat template writes with
        `sandwich_history=True`. An `<image>` without a picture is plain text in the formats up to HD, and makes a bad
        sample in the others.
    max_length:
        Maximum number of tokens, pictures included. Longer text is cut. A sample is bad if this would cut a picture
        or leave no label.
    on_bad_sample:
        "raise": a sample that cannot be read (a picture is missing or broken, there are too few or too many, ...) ends
        the training with an error that names it. "skip": it is left out of the batch, with a warning in the log.
    padding_side:
        The side on which shorter samples are padded; the model's result does not depend on it.
    pad_to_multiple_of:
        If given, T is padded to a multiple of it.
    padding_free:
        Instead of padding, write all samples one after the other into one row, with their bounds in `cu_seq_lens_q`.
        The model keeps them apart, so each has the logits and the gradient that it has by itself, and no time goes to
        pads.
    picture_in_every_batch:
        A batch without pictures gives the projector no gradient, but training the projector alone and distributed
        training need one. With True, such a batch gets a blank picture whose tokens are masked. The gradient is then
        zero, except for L2Wrap's part, which no mask removes.
    """

    processor: "VisualRWKVProcessor"
    prompt_format: PromptFormat | str | None = None
    max_length: int | None = None
    on_bad_sample: Literal["raise", "skip"] = "raise"
    padding_side: Literal["right", "left"] = "right"
    pad_to_multiple_of: int | None = None
    picture_in_every_batch: bool = False
    padding_free: bool = False

    def __post_init__(self):
        if self.padding_free and self.pad_to_multiple_of is not None:
            raise ValueError("padding_free leaves nothing to pad: pad_to_multiple_of must be None.")
        for name, known in (("on_bad_sample", ("raise", "skip")), ("padding_side", ("right", "left"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be {' or '.join(known)}, got {getattr(self, name)!r}.")
        if isinstance(self.prompt_format, str) and self.prompt_format not in PROMPT_FORMATS:
            raise ValueError(
                f"prompt_format must be one of {', '.join(PROMPT_FORMATS)}, got {self.prompt_format!r}."
            )

    @property
    def format(self) -> PromptFormat:
        if isinstance(self.prompt_format, PromptFormat):
            return self.prompt_format
        if self.prompt_format is not None:
            return PROMPT_FORMATS[self.prompt_format]
        position: Any = self.processor.image_position
        return replace(PROMPT_FORMATS["v7.00"], image_position=position)

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `labels`, `attention_mask` [B, T] and the pictures' pixels in the order of the text.

        If `padding_free`, `input_ids` and `labels` are [1, T] and `cu_seq_lens_q`, int32 [S + 1], says where the S
        samples begin and end; `attention_mask` is there only if it masks something.

        Raises:
            ValueError: If a sample is bad and `on_bad_sample` is "raise" (the message names the sample), or if all are
                bad and `picture_in_every_batch` is False.
        """
        samples = [sample for row in rows if (sample := self._readable(row)) is not None]
        if self.picture_in_every_batch and not any(sample.pixels for sample in samples):
            samples = [self._with_blank(samples[0] if samples else NOTHING), *samples[1:]]
        if not samples:
            raise ValueError(f"None of the {len(rows)} samples of a batch is readable.")
        batch = _packed(samples) if self.padding_free else self._padded(samples)
        return batch | _concatenated([sample.pixels for sample in samples if sample.pixels])

    def _readable(self, row: dict) -> Sample | None:
        """Return the sample, or None after logging why it was skipped."""
        try:
            return self.encode(row)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            message = f"{name_of(row)}: {error}"
            if self.on_bad_sample == "raise":
                raise ValueError(message) from error
            logger.warning(f"Skipped. {message}")
            return None

    def encode(self, row: dict) -> Sample:
        """Encode one row, without padding.

        Raises:
            ValueError: If the sample is bad.
        """
        conversations, images = conversation_of(row)
        if not images and self.format.without_pictures != "keep":
            _refuse_lost_pictures(conversations)
        pixels = self._pixels([open_picture(image) for image in images])
        blank = not images and self.format.without_pictures == "dummy"
        if blank:
            pixels = self._blank_pixels()
        sample = encode_conversation(
            self.processor.tokenizer,
            conversations,
            self.format,
            self._token_counts(pixels),
            num_images=len(images),
        )
        sample = self._cut(sample)
        return Sample(**sample, attention_mask=[1] * len(sample["input_ids"]), pixels=pixels)

    def _cut(self, sample: dict[str, list[int]]) -> dict[str, list[int]]:
        length = len(sample["input_ids"])
        if self.max_length is None or length <= self.max_length:
            return sample
        cut = pad_or_truncate(sample, self.max_length, 0, self.processor.image_token_id)
        if all(label == IGNORE_INDEX for label in cut["labels"]):
            raise ValueError(f"max_length {self.max_length} leaves no label of {length} tokens.")
        logger.warning_once(
            f"Samples are cut to max_length {self.max_length}; the first has {length} tokens."
        )
        return cut

    def _pixels(self, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        return dict(self.processor.image_processor(images, return_tensors="pt")) if images else {}

    def _blank_pixels(self) -> dict[str, torch.Tensor]:
        """Return the pixels of a picture of zeros, which the original's v7.01 adds to a text."""
        pixels = self._pixels([Image.new("RGB", (64, 64))])
        return {name: x.zero_() if x.is_floating_point() else x for name, x in pixels.items()}

    def _token_counts(self, pixels: dict[str, torch.Tensor]) -> list[int] | int:
        """Return the number of tokens of each picture, or a single number if all have the same."""
        tiles = pixels.get("num_tiles")
        number_of = self.processor.num_image_tokens_of
        return number_of(1) if tiles is None else [number_of(int(count)) for count in tiles]

    def _with_blank(self, sample: Sample) -> Sample:
        """Append a blank picture that is masked and has no labels."""
        pixels = self._blank_pixels()
        counts = self._token_counts(pixels)
        length = counts if isinstance(counts, int) else sum(counts)
        return Sample(
            sample.input_ids + [self.processor.image_token_id] * length,
            sample.labels + [IGNORE_INDEX] * length,
            sample.attention_mask + [0] * length,
            pixels,
        )

    def _padded(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        length = max(len(sample.input_ids) for sample in samples)
        length += -length % (self.pad_to_multiple_of or 1)
        pad_token_id = self.processor.tokenizer.pad_token_id
        pads = {"input_ids": pad_token_id, "labels": IGNORE_INDEX, "attention_mask": 0}

        def padded(values: list[int], pad: int) -> list[int]:
            missing = [pad] * (length - len(values))
            return values + missing if self.padding_side == "right" else missing + values

        return {
            name: torch.tensor([padded(getattr(sample, name), pad) for sample in samples])
            for name, pad in pads.items()
        }


def _packed(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Return the samples in one row. A sample's first token gets no label: the one before it is another sample's."""
    labels = [label for sample in samples for label in (IGNORE_INDEX, *sample.labels[1:])]
    mask = [kept for sample in samples for kept in sample.attention_mask]
    bounds = torch.tensor([0, *(len(sample.input_ids) for sample in samples)]).cumsum(0)
    batch = {
        "input_ids": torch.tensor([[token for sample in samples for token in sample.input_ids]]),
        "labels": torch.tensor([labels]),
        "cu_seq_lens_q": bounds.to(torch.int32),
    }
    return batch if all(mask) else batch | {"attention_mask": torch.tensor([mask])}


def name_of(row: dict) -> str:
    """Return how messages refer to a row: by its id, or else its pictures, or else its first words."""
    if row.get("id") is not None:
        return f"Sample {row['id']!r}"
    pictures = next((row[name] for name in ("images", "image") if row.get(name)), None)
    return f"The sample with {str(pictures or list(row.values()))[:200]}"


def _refuse_lost_pictures(conversations: list[dict]) -> None:
    """Refuse a sample that loses its picture. The original removes the `<image>` and trains on the bare question."""
    values = [turn["value"] for turn in conversations if turn["from"].lower() == "human"]
    if lost := sum(value.count(IMAGE) for value in values):
        raise ValueError(f"the text has {lost} {IMAGE}, but there is no picture.")


def _concatenated(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Concatenate the outputs of image processors; all have pictures in the first dimension."""
    return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}


__all__ = ["VisualRWKVDataCollator", "conversation_of", "load_conversations", "messages_to_conversation"]
