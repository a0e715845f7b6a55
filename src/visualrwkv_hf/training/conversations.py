"""Turn conversations into text, ids and labels as the original does, and order samples as it does.

A conversation is LLaVA's list of turns `{"from": "human" | "gpt", "value": text}`, where the text holds a
literal `<image>` for every picture. Releases differ in their `PromptFormat`.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from ..chat_template import TURN_END, collapse
from ..processing_visualrwkv import SHORT_ANSWER

IMAGE = "<image>"
SPEAKERS = {"human": "User:", "gpt": "Assistant:"}
IGNORE_INDEX = -100

PERMUTATION_SEED = 222


@dataclass(frozen=True)
class PromptFormat:
    r"""How a release writes a conversation.

    image_position:
        Where the pictures of a turn with text v are placed. "first": `<image>\n{v}`; "last": `{v}\n<image>`;
        "middle", the sandwich: `{H}\n<image>\n{v}`; "inline": where the text has them.
    sandwich:
        H of "middle". "turn": v repeated. "conversation": all human turns, one per line; turns with a picture lose
        their request for a short answer, the others are unchanged, blank lines included.
    pictures_in_answers:
        Whether to keep a picture in a gpt turn instead of removing it.
    merge_pictures:
        Whether several `<image>` in a turn stand for one picture.
    one_picture:
        Whether a conversation with pictures must have exactly one.
    without_pictures:
        What to do with `<image>` in a conversation without pictures. "keep": leave it as plain text. "remove": delete
        it. "dummy": delete it and add a placeholder for an empty picture to the first turn.
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
"""Formats of the releases. Up to HD `image_position` was an option: change it with `dataclasses.replace`."""


class Turn(NamedTuple):
    """A turn as the model reads it: the speaker ("human" or "gpt") and the text, with `<image>` for each picture."""

    speaker: str
    text: str


def format_conversation(
    conversations: list[dict], prompt_format: PromptFormat, num_images: int | None = None
) -> list[Turn]:
    r"""Format the turns of a conversation; `"".join(turn.text for turn in turns)` is its text.

    A turn becomes `User: {text}\n\n` or `Assistant: {text}\n\n`, and an empty one `User:` or `Assistant:`.

    Args:
        conversations: The turns, in the form that the module's docstring describes.
        prompt_format: The release's format.
        num_images: The number of pictures, which must equal the number of placeholders; None skips this check. With 0
            the conversation is formatted as one without pictures.

    Raises:
        ValueError: If a speaker is unknown, the numbers of placeholders and pictures differ, or there is more than
            one `<image>` where the format allows only one.
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
    """Return a human turn as the first half of the sandwich repeats it."""
    if IMAGE not in value:
        return value.strip()
    return collapse(value.replace(IMAGE, "").replace(SHORT_ANSWER, ""))


def _with_pictures(speaker: str, value: str, history: str, prompt_format: PromptFormat) -> str:
    """Return the text of a turn with its placeholders where the format puts them."""
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
    """Return the turns with their ids. Each turn, and the text on either side of a picture, is tokenized separately.

    Args:
        tokenizer: The World tokenizer.
        conversations: See [`format_conversation`].
        prompt_format: See [`format_conversation`].
        num_image_tokens: How often `tokenizer.image_token_id` is repeated for a picture: one number, or one for each
            picture in the order of the text.
        num_images: See [`format_conversation`].

    Raises:
        ValueError: As [`format_conversation`], or if `num_image_tokens` does not have one number for each picture.
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
    """Return the ids of the texts, with the placeholders of a picture between two; `lengths` yields their numbers."""
    ids = []
    for position, text in enumerate(texts):
        if position:
            ids += [tokenizer.image_token_id] * next(lengths)
        # split_special_tokens: data is text, even where it contains the name of a special token
        ids += tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return ids


def encode_conversation(
    tokenizer,
    conversations: list[dict],
    prompt_format: PromptFormat,
    num_image_tokens: int | list[int],
    num_images: int | None = None,
) -> dict[str, list[int]]:
    """Return `input_ids` and `labels` of a training sample, both without padding.

    The answers and the ends of their turns are labels. Everything else is -100: human turns, pictures, and
    "Assistant:" unless the format trains on it. Arguments and errors are those of [`encode_turns`].
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
    """Cut a sample to `length` ids and labels, or append pads and -100 until it has that length.

    Raises:
        ValueError: If this would cut a picture.
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
    """Convert a conversation to chat messages, with the pictures of a human turn before its text.

    Pictures of gpt turns are left out, as in the original from HD on. With `sandwich_history=True` the chat template
    formats these messages as the original formatted its training data.

    Raises:
        ValueError: If a speaker is unknown.
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
    """Return the largest prime p = 3 n + 2 below `num_samples`. Modulo such a prime, cubing is a permutation.

    Raises:
        ValueError: If `num_samples` is below 3, where there is no such prime.
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
    """Return the samples that one process reads in an epoch of `epoch_steps` batches, in the original's order.

    Step s reads sample s^3 mod p with p = `magic_prime(num_samples)`, where s counts over all epochs and processes.
    So the first p steps never read the samples from p on. After every p steps the list is reordered: "reversed"
    (v6.0, v7.00) or "permuted" again each time (from v7.01 on).

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
    """Return the order of the list in each round of p steps; round 0 leaves it as it is."""
    in_order = range(num_samples)
    if repeat == "reversed":
        return [in_order] + [in_order[::-1]] * rounds
    generator = np.random.RandomState(PERMUTATION_SEED)
    # The original draws a permutation for round 0 too, though that round does not use it.
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
