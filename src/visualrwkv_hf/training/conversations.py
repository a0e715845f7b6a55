"""The original's training data: conversations -> text, ids and labels, and the order of the samples.

A conversation is LLaVA's list of turns `{"from": "human" | "gpt", "value": text}`, where the text holds a
literal `<image>` for every picture. A release differs from another by its `PromptFormat`.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from ..processing_visualrwkv import SHORT_ANSWER, TURN_END

IMAGE = "<image>"
SPEAKERS = {"human": "User:", "gpt": "Assistant:"}
IGNORE_INDEX = -100

PERMUTATION_SEED = 222


@dataclass(frozen=True)
class PromptFormat:
    r"""How a release writes a conversation.

    image_position:
        Where the pictures of a turn with text v stand. "first": `<image>\n{v}`; "last": `{v}\n<image>`;
        "middle", the sandwich: `{H}\n<image>\n{v}`; "inline": where the text has them.
    sandwich:
        H of "middle". "turn": v again. "conversation": all human turns, one a line; those with a picture
        without the request for a short answer, the others as they are, blank lines included.
    pictures_in_answers:
        Whether a picture of a gpt turn stays; else it is removed.
    merge_pictures:
        Whether several `<image>` of a turn stand for one picture.
    one_picture:
        Whether a conversation with pictures must have exactly one.
    without_pictures:
        What becomes of a conversation without pictures. "keep": an `<image>` in it is plain text; "remove":
        it is removed; "dummy": so it is, and the first turn gets a placeholder, for an empty picture.
    train_on_prefix:
        Whether the ids of "Assistant:" are labels.
    """

    image_position: Literal["first", "middle", "last", "inline"] = "first"
    sandwich: Literal["turn", "conversation"] = "conversation"
    pictures_in_answers: bool = False
    merge_pictures: bool = False
    one_picture: bool = False
    without_pictures: Literal["keep", "remove", "dummy"] = "remove"
    train_on_prefix: bool = False


_SINGLE: dict[str, Any] = {"merge_pictures": True, "without_pictures": "keep"}

PROMPT_FORMATS = {
    "v5": PromptFormat(**_SINGLE, sandwich="turn", pictures_in_answers=True, train_on_prefix=True),
    "v6.0": PromptFormat(**_SINGLE, pictures_in_answers=True),
    "hd": PromptFormat(**_SINGLE),
    "v7.00": PromptFormat(),
    "v7.01": PromptFormat(one_picture=True, without_pictures="dummy"),
    "v7.02": PromptFormat(one_picture=True, image_position="inline"),
}
"""Formats of the releases. Up to HD `image_position` was an option: `dataclasses.replace` it."""


class Turn(NamedTuple):
    """A turn as the model reads it: the speaker ("human" or "gpt") and the text with its `<image>`."""

    speaker: str
    text: str


def collapse(text: str) -> str:
    """Strips the text and makes one newline of every run of blank lines."""
    return re.sub(r"\n(\s*\n)+", "\n", text.strip())


def format_conversation(
    conversations: list[dict], prompt_format: PromptFormat, num_images: int | None = None
) -> list[Turn]:
    r"""The text of a conversation: `"".join(turn.text for turn in turns)`.

    A turn is `User: {text}\n\n` or `Assistant: {text}\n\n`, an empty one `User:` or `Assistant:`.

    Args:
        conversations: the turns, as the module's docstring says.
        prompt_format: the release's format.
        num_images: the sample's pictures, to be checked against the placeholders of the text, or None.
            With 0 the conversation is read as one without pictures.

    Raises:
        ValueError: a speaker is unknown, there are more or less placeholders than pictures, or more than the
            one `<image>` that the format allows.
    """
    turns = [(_speaker(turn), turn["value"]) for turn in conversations]
    count = sum(value.count(IMAGE) for _, value in turns)
    if num_images == 0 or count == 0:
        return _text_turns(turns, prompt_format, num_images)
    if prompt_format.one_picture and count != 1:
        raise ValueError(f"This format takes exactly one {IMAGE} in a conversation, got {count}.")
    history = "\n".join(_history(value) for speaker, value in turns if speaker == "human")
    formatted = [
        Turn(speaker, _spoken(speaker, _with_pictures(speaker, value, history, prompt_format)))
        for speaker, value in turns
    ]
    _check_count(formatted, num_images)
    return formatted


def _text_turns(
    turns: list[tuple[str, str]], prompt_format: PromptFormat, num_images: int | None
) -> list[Turn]:
    if num_images:
        raise ValueError(f"Found 0 {IMAGE} in the conversation, but {num_images} pictures.")
    if prompt_format.without_pictures != "keep":
        turns = [(speaker, value.replace(IMAGE, "")) for speaker, value in turns]
    texts = [collapse(value) for _, value in turns]
    if prompt_format.without_pictures == "dummy":
        texts[0] = f"{IMAGE}\n{texts[0]}".strip()
    return [Turn(speaker, _spoken(speaker, text)) for (speaker, _), text in zip(turns, texts)]


def _speaker(turn: dict) -> str:
    speaker = turn["from"].lower()
    if speaker not in SPEAKERS:
        raise ValueError(f"A turn must be from {' or '.join(SPEAKERS)}, got {turn['from']!r}.")
    return speaker


def _spoken(speaker: str, text: str) -> str:
    return f"{SPEAKERS[speaker]} {text}{TURN_END}" if text else SPEAKERS[speaker]


def _history(value: str) -> str:
    """A human turn as it stands in the first half of the sandwich."""
    if IMAGE not in value:
        return value.strip()
    return collapse(value.replace(IMAGE, "").replace(SHORT_ANSWER, ""))


def _with_pictures(speaker: str, value: str, history: str, prompt_format: PromptFormat) -> str:
    """The text of a turn with its placeholders where the format wants them."""
    count = value.count(IMAGE) if speaker == "human" or prompt_format.pictures_in_answers else 0
    if prompt_format.image_position == "inline" and count:
        return collapse(value)
    text = collapse(value.replace(IMAGE, ""))
    if not count:
        return text
    images = "\n".join([IMAGE] * (1 if prompt_format.merge_pictures else count))
    before = text if prompt_format.sandwich == "turn" else history
    parts = {"first": [images, text], "middle": [before, images, text], "last": [text, images]}
    return "\n".join(parts[prompt_format.image_position]).strip()


def _check_count(turns: list[Turn], num_images: int | None) -> None:
    count = sum(turn.text.count(IMAGE) for turn in turns)
    if num_images is not None and num_images != count:
        raise ValueError(f"Found {count} {IMAGE} in the formatted conversation, but {num_images} pictures.")


def encode_turns(
    tokenizer,
    conversations: list[dict],
    prompt_format: PromptFormat,
    num_image_tokens: int | list[int],
    num_images: int | None = None,
) -> list[tuple[Turn, list[int]]]:
    """The turns and their ids: every turn, and the text around a picture, is tokenized by itself.

    Args:
        tokenizer: the World tokenizer.
        conversations: as `format_conversation`.
        prompt_format: as `format_conversation`.
        num_image_tokens: how many times `tokenizer.image_token_id` stands for a picture: one number, or one
            for every picture in the order of the text.
        num_images: as `format_conversation`.

    Raises:
        ValueError: as `format_conversation`, or if `num_image_tokens` has not one number for every picture.
    """
    turns = format_conversation(conversations, prompt_format, num_images)
    as_text = prompt_format.without_pictures == "keep" and num_images == 0
    pieces = [[turn.text] if as_text else turn.text.split(IMAGE) for turn in turns]
    count = sum(len(texts) - 1 for texts in pieces)
    spans = [num_image_tokens] * count if isinstance(num_image_tokens, int) else list(num_image_tokens)
    if len(spans) != count:
        raise ValueError(f"num_image_tokens has {len(spans)} numbers for {count} pictures.")
    lengths = iter(spans)
    return [(turn, _encode_pieces(tokenizer, texts, lengths)) for turn, texts in zip(turns, pieces)]


def _encode_pieces(tokenizer, texts: list[str], lengths) -> list[int]:
    """Ids of the texts with a picture's placeholders between each two; the next length is the picture's."""
    ids = []
    for position, text in enumerate(texts):
        if position:
            ids += [tokenizer.image_token_id] * next(lengths)
        # split_special_tokens: what data says is text, be it the name of a special token
        ids += tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return ids


def encode_conversation(
    tokenizer,
    conversations: list[dict],
    prompt_format: PromptFormat,
    num_image_tokens: int | list[int],
    num_images: int | None = None,
) -> dict[str, list[int]]:
    """`input_ids` and `labels` of a training sample, both without padding.

    Labels are the answers with the end of their turn; everything else is -100: human turns, pictures, and
    "Assistant:" unless the format trains on it. Arguments and errors as `encode_turns`.
    """
    input_ids, labels = [], []
    for turn, ids in encode_turns(tokenizer, conversations, prompt_format, num_image_tokens, num_images):
        input_ids += ids
        labels += _labels(tokenizer, turn.speaker, ids, prompt_format)
    return {"input_ids": input_ids, "labels": labels}


def _labels(tokenizer, speaker: str, ids: list[int], prompt_format: PromptFormat) -> list[int]:
    if speaker == "human":
        return [IGNORE_INDEX] * len(ids)
    prefix = 0 if prompt_format.train_on_prefix else len(tokenizer.encode(SPEAKERS["gpt"]))
    return [
        IGNORE_INDEX if position < prefix or token == tokenizer.image_token_id else token
        for position, token in enumerate(ids)
    ]


def pad_or_truncate(
    sample: dict[str, list[int]], length: int, pad_token_id: int, image_token_id: int
) -> dict[str, list[int]]:
    """The first `length` ids and labels of a sample, or the sample with pads and -100 behind it.

    Raises:
        ValueError: a picture would be cut: it counts `length` against its last token.
    """
    input_ids, labels = sample["input_ids"], sample["labels"]
    if image_token_id in input_ids[length:]:
        last = len(input_ids) - input_ids[::-1].index(image_token_id)
        raise ValueError(f"A length of {length} would cut a picture that ends at token {last}.")
    missing = max(0, length - len(input_ids))
    return {
        "input_ids": input_ids[:length] + [pad_token_id] * missing,
        "labels": labels[:length] + [IGNORE_INDEX] * missing,
    }


def conversation_to_messages(conversations: list[dict]) -> list[dict]:
    """A conversation as chat messages: the pictures of a human turn first, then its text.

    Pictures of gpt turns are left out, as the original does from HD on. With `sandwich_history=True` the
    chat template writes the messages as the original wrote its training data.

    Raises:
        ValueError: a speaker is unknown.
    """
    roles = {"human": "user", "gpt": "assistant"}
    messages = []
    for turn in conversations:
        speaker, value = _speaker(turn), turn["value"]
        images = [{"type": "image"}] * (value.count(IMAGE) if speaker == "human" else 0)
        text = {"type": "text", "text": value.replace(IMAGE, "")}
        messages.append({"role": roles[speaker], "content": [*images, text]})
    return messages


def magic_prime(num_samples: int) -> int:
    """The largest prime p = 3 n + 2 below `num_samples`: modulo such a prime, cubing is a permutation.

    Raises:
        ValueError: there is none, with fewer than 3 samples.
    """
    for candidate in range(num_samples - 1, 1, -1):
        if candidate % 3 == 2 and all(candidate % d for d in range(2, int(candidate**0.5) + 1)):
            return candidate
    raise ValueError(f"At least 3 samples are needed, got {num_samples}.")


def sample_order(
    num_samples: int,
    epoch: int,
    epoch_steps: int,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    repeat: Literal["reversed", "permuted"] = "reversed",
) -> list[int]:
    """The samples that one process reads in one epoch of `epoch_steps` batches, in the original's order.

    step^3 mod p with p = `magic_prime(num_samples)` and a step counted over all epochs and processes; samples
    from p on are not read in the first p steps. Later steps read the list in another order: "reversed"
    (v6.0, v7.00) or, from v7.01 on, "permuted", anew after every p steps.

    Returns:
        `epoch_steps * micro_batch_size` indices below `num_samples`.
    """
    prime = magic_prime(num_samples)
    length = epoch_steps * micro_batch_size
    start = epoch * length * world_size + rank
    steps = range(start, start + length * world_size, world_size)
    orders = _reread_orders(num_samples, steps[-1] // prime if length else 0, repeat)
    return [orders[step // prime][pow(step, 3, prime)] for step in steps]


def _reread_orders(num_samples: int, rounds: int, repeat: str) -> list:
    """The list's order in each round of p steps: as it is in round 0."""
    in_order = range(num_samples)
    if repeat == "reversed":
        return [in_order] + [in_order[::-1]] * rounds
    generator = np.random.RandomState(PERMUTATION_SEED)
    # One permutation is drawn for round 0 too, though that round does not use it.
    permutations = [generator.permutation(num_samples).tolist() for _ in range(rounds + 1)]
    return [in_order] + permutations[1:]


__all__ = [
    "PROMPT_FORMATS",
    "PromptFormat",
    "collapse",
    "conversation_to_messages",
    "encode_conversation",
    "encode_turns",
    "format_conversation",
    "magic_prime",
    "pad_or_truncate",
    "sample_order",
]
