"""Check our text, ids and labels of training samples against those that the original made, in golden rows."""

import dataclasses

import pytest

from visualrwkv_hf.training.conversations import (
    PROMPT_FORMATS,
    encode_conversation,
    encode_turns,
    format_conversation,
    pad_or_truncate,
)

IMAGE_ID = 65535


def arguments(row, prompt_format):
    """Return what `encode_conversation` takes after the tokenizer; a sample has no picture, or one of one token."""
    if row["image_position"] != "none":
        prompt_format = dataclasses.replace(prompt_format, image_position=row["image_position"])
    return row["conversations"], prompt_format, 1, None if row["has_image"] else 0


def text_of(conversations, prompt_format, num_images=None):
    return "".join(turn.text for turn in format_conversation(conversations, prompt_format, num_images))


def with_package_ids(sample):
    """Replace the original's placeholder, -200, by ours, and by -100 in labels, where it is never learned."""
    return {
        "input_ids": [IMAGE_ID if i == -200 else i for i in sample["input_ids"]],
        "labels": [-100 if i == -200 else i for i in sample["labels"]],
    }


def speaks_in_capitals(row):
    """Return whether a speaker is written like "Human" in place of "human"."""
    return any(turn["from"] != turn["from"].lower() for turn in row["conversations"])


def original_labels(row, tokenizer, prompt_format, num_image_tokens, num_images):
    """Return the labels that the original makes of a row: a turn from "Human" is learned as a whole.

    The original compares the case of a speaker's name when it masks, but not when it writes "User:". Here such turns
    are human turns like all others.
    """
    labels = []
    turns = encode_turns(tokenizer, row["conversations"], prompt_format, num_image_tokens, num_images)
    for given, (_, ids) in zip(row["conversations"], turns):
        prefix = 0 if prompt_format.train_on_prefix else len(tokenizer.encode("Assistant:"))
        masked = {"human": len(ids), "gpt": prefix}.get(given["from"], 0)
        labels += [-100] * masked + [-100 if i == IMAGE_ID else i for i in ids[masked:]]
    return labels


def check_single_picture_row(row, tokenizer, prompt_format):
    """Check text, ids and labels of a row of v6.0 to UHD, and return our sample."""
    conversations, prompt_format, length, num_images = arguments(row, prompt_format)
    assert text_of(conversations, prompt_format, num_images) == row["input_text"]
    sample = encode_conversation(tokenizer, conversations, prompt_format, length, num_images)
    golden = with_package_ids(row)
    assert sample["input_ids"] == golden["input_ids"]
    if not speaks_in_capitals(row):
        assert sample["labels"] == golden["labels"]
        return sample
    assert original_labels(row, tokenizer, prompt_format, length, num_images) == golden["labels"]
    lower = [turn | {"from": turn["from"].lower()} for turn in conversations]
    assert sample == encode_conversation(tokenizer, lower, prompt_format, length, num_images)
    return sample


def context_length(row):
    """Return the key of the sample that the original padded or cut, and the length that the key names."""
    key = next(key for key in row if key.startswith("padded_ctx"))
    return key, int(key.removeprefix("padded_ctx"))


def check_v60_row(row, tokenizer):
    sample = check_single_picture_row(row, tokenizer, PROMPT_FORMATS["v6.0"])
    key, length = context_length(row)
    if IMAGE_ID in sample["input_ids"][length:]:  # the original drops the placeholder and keeps the picture
        with pytest.raises(ValueError, match=f"length of {length} would cut a picture that ends at token"):
            pad_or_truncate(sample, length, 0, IMAGE_ID)
        return
    found, golden = pad_or_truncate(sample, length, 0, IMAGE_ID), with_package_ids(row[key])
    assert found["input_ids"] == golden["input_ids"]
    assert speaks_in_capitals(row) or found["labels"] == golden["labels"]


def check_hd_or_uhd_row(row, tokenizer):
    check_single_picture_row(row, tokenizer, PROMPT_FORMATS["hd"])


def drifted_labels(turns, labels_of_all):
    """Return the labels that the original's v5.1 makes of `labels_of_all`, in which nothing is masked yet.

    It takes l1 + ... + lk for the length lk of turn k. So it masks a human turn k over that many tokens, beginning
    where all earlier turns, measured in the same way, end.
    """
    labels, start, cumulative = list(labels_of_all), 0, 0
    for turn, ids in turns:
        cumulative += len(ids)
        if turn.speaker == "human":
            for position in range(start, min(start + cumulative, len(labels))):
                labels[position] = -100
        start += cumulative
    return labels


def check_v5_row(row, tokenizer):
    conversations, prompt_format, length, num_images = arguments(row, PROMPT_FORMATS["v5"])
    assert text_of(conversations, prompt_format, num_images) == row["input_text"]
    sample = encode_conversation(tokenizer, conversations, prompt_format, length, num_images)
    golden = with_package_ids(row)
    assert sample["input_ids"] == golden["input_ids"]
    if speaks_in_capitals(row):
        assert original_labels(row, tokenizer, prompt_format, length, num_images) == golden["labels"]
        return
    turns = encode_turns(tokenizer, conversations, prompt_format, length, num_images)
    unmasked = [-100 if i == IMAGE_ID else i for i in sample["input_ids"]]
    assert drifted_labels(turns, unmasked) == golden["labels"]
    if len(turns) <= 2:  # no drift: only answers are labels, with their prefix
        assert sample["labels"] == golden["labels"]


# LOST_PICTURE: the original accepts more pictures than placeholders and loses one; here that is refused.


def check_v700_row(row, tokenizer):
    arguments = row["conversations"], PROMPT_FORMATS["v7.00"], row["num_token_per_image"]
    given, places = row["num_images"], text_of(*arguments[:2]).count("<image>")
    if given and given != places:
        with pytest.raises(ValueError, match=f"Found {places} <image> .* but {given} pictures"):
            encode_conversation(tokenizer, *arguments, num_images=given)
    if "raises" in row:
        return
    num_images = None if given != places and given else given  # LOST_PICTURE
    assert text_of(*arguments[:2], num_images) == row["input_text"]
    sample = encode_conversation(tokenizer, *arguments, num_images=num_images)
    assert sample == {"input_ids": row["input_ids"], "labels": row["labels"]}
    key, length = context_length(row)
    assert pad_or_truncate(sample, length, 0, IMAGE_ID) == row[key]


def check_v701_or_v702_row(row, tokenizer):
    prompt_format = PROMPT_FORMATS[row["variant"]]
    regions = row.get("num_regions", 1)
    arguments = row["conversations"], prompt_format, row["num_token_per_image"] * regions
    if "raises" in row:
        with pytest.raises(ValueError, match="exactly one <image>"):
            encode_conversation(tokenizer, *arguments, num_images=row["num_images"])
        return
    if row["num_images"] > 1:
        with pytest.raises(
            ValueError, match=f"Found 1 <image> .* but {row['num_images']} pictures"
        ):  # LOST_PICTURE
            encode_conversation(tokenizer, *arguments, num_images=row["num_images"])
    num_images = min(1, row["num_images"])
    # A region has a placeholder of its own in the original's text; here a picture has one.
    assert text_of(*arguments[:2], num_images).replace("<image>", "<image>" * regions) == row["input_text"]
    sample = encode_conversation(tokenizer, *arguments, num_images=num_images)
    assert sample == {"input_ids": row["input_ids"], "labels": row["labels"]}
