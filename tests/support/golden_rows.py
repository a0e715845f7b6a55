"""Checks of rows of the golden training data: text, ids and labels of a sample, as the original made them."""

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
    """What these rows say about a sample: its format and whether it has a picture, of one token."""
    if row["image_position"] != "none":
        prompt_format = dataclasses.replace(prompt_format, image_position=row["image_position"])
    return row["conversations"], prompt_format, 1, None if row["has_image"] else 0


def text_of(conversations, prompt_format, num_images=None):
    return "".join(turn.text for turn in format_conversation(conversations, prompt_format, num_images))


def with_package_ids(sample):
    """The original's placeholder is -200, in labels too, where it never counts."""
    return {
        "input_ids": [IMAGE_ID if i == -200 else i for i in sample["input_ids"]],
        "labels": [-100 if i == -200 else i for i in sample["labels"]],
    }


def lower_case_speakers(conversations):
    return [turn | {"from": turn["from"].lower()} for turn in conversations]


def expected_sample(row):
    """The row's ids and labels. Turns from "Human" are labels in the original, which compares the case of
    speakers there, but not where it writes "User:". Here such turns are human turns like all others."""
    expected = with_package_ids(row)
    if row["name"] == "uppercase_speaker":
        assert row["labels"] == row["input_ids"]
        answer = expected["input_ids"].index(5585) + 3  # "Assistant:" is three tokens
        expected["labels"] = [-100] * answer + expected["input_ids"][answer:]
    return expected


def check_v60_row(row, tokenizer):
    conversations, prompt_format, length, num_images = arguments(row, PROMPT_FORMATS["v6.0"])
    assert text_of(conversations, prompt_format, num_images) == row["input_text"]
    sample = encode_conversation(tokenizer, conversations, prompt_format, length, num_images)
    assert sample == expected_sample(row)
    if IMAGE_ID in sample["input_ids"][40:]:  # the original drops the placeholder and keeps the picture
        assert (row["name"], row["image_position"]) == ("multi_turn_three_middle", "middle")
        with pytest.raises(ValueError, match="length of 40 would cut a picture that ends at token 48"):
            pad_or_truncate(sample, 40, 0, IMAGE_ID)
    elif row["name"] != "uppercase_speaker":
        assert pad_or_truncate(sample, 40, 0, IMAGE_ID) == with_package_ids(row["padded_ctx40"])


def check_hd_or_uhd_row(row, tokenizer):
    conversations, prompt_format, length, num_images = arguments(row, PROMPT_FORMATS["hd"])
    assert text_of(conversations, prompt_format, num_images) == row["input_text"]
    sample = encode_conversation(tokenizer, conversations, prompt_format, length, num_images)
    assert sample == expected_sample(row)


def drifted_labels(turns, labels_of_all):
    """The original's v5.1 takes l1 + ... + lk for the length lk of turn k: it masks a human turn k over that
    many tokens, from the sum of all such sums before it on."""
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
    if row["name"] == "uppercase_speaker":
        assert row["labels"] == row["input_ids"]
        return
    turns = encode_turns(tokenizer, conversations, prompt_format, length, num_images)
    unmasked = [-100 if i == IMAGE_ID else i for i in sample["input_ids"]]
    assert drifted_labels(turns, unmasked) == golden["labels"]
    if len(turns) <= 2:  # no drift: nothing but answers, prefix included, is a label
        assert sample["labels"] == golden["labels"]


# LOST_PICTURE: the original accepts more pictures than placeholders and loses one; here that is refused.


def check_v700_row(row, tokenizer):
    arguments = row["conversations"], PROMPT_FORMATS["v7.00"], row["num_token_per_image"]
    if "raises" in row or row["name"] == "gpt_has_image":
        with pytest.raises(ValueError, match=f"Found 1 <image> .* but {row['num_images']} pictures"):
            encode_conversation(tokenizer, *arguments, num_images=row["num_images"])
    if "raises" in row:
        return
    num_images = None if row["name"] == "gpt_has_image" else row["num_images"]  # LOST_PICTURE
    assert text_of(*arguments[:2], num_images) == row["input_text"]
    sample = encode_conversation(tokenizer, *arguments, num_images=num_images)
    assert sample == {"input_ids": row["input_ids"], "labels": row["labels"]}
    assert pad_or_truncate(sample, 72, 0, IMAGE_ID) == row["padded_ctx72"]


def check_v701_or_v702_row(row, tokenizer):
    prompt_format = PROMPT_FORMATS[row["variant"]]
    regions = row.get("num_regions", 1)
    arguments = row["conversations"], prompt_format, row["num_token_per_image"] * regions
    if "raises" in row:
        with pytest.raises(ValueError, match="exactly one <image>"):
            encode_conversation(tokenizer, *arguments, num_images=row["num_images"])
        return
    if row["num_images"] > 1:
        with pytest.raises(ValueError, match=r"Found 1 <image> .* but 2 pictures"):  # LOST_PICTURE
            encode_conversation(tokenizer, *arguments, num_images=row["num_images"])
    num_images = min(1, row["num_images"])
    # A region has a placeholder of its own in the original's text; here a picture has one.
    assert text_of(*arguments[:2], num_images).replace("<image>", "<image>" * regions) == row["input_text"]
    sample = encode_conversation(tokenizer, *arguments, num_images=num_images)
    assert sample == {"input_ids": row["input_ids"], "labels": row["labels"]}
