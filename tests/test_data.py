"""Conversations become the original's text, ids and labels, in the original's order."""

import dataclasses
import json
from pathlib import Path

import pytest

from visualrwkv_hf.conversion.world_tokenizer import build_world_tokenizer
from visualrwkv_hf.data_visualrwkv import (
    PROMPT_FORMATS,
    collapse,
    conversation_to_messages,
    encode_conversation,
    encode_turns,
    format_conversation,
    magic_prime,
    pad_or_truncate,
    sample_order,
)

GOLDEN = Path(__file__).parent / "golden" / "f_data"
IMAGE_ID = 65535


def read_rows(case):
    return [json.loads(line) for line in (GOLDEN / case / "rows.jsonl").read_text().splitlines()]


def by_name(rows):
    return [pytest.param(row, id="-".join(str(row[k]) for k in LABELS if k in row)) for row in rows]


LABELS = ("variant", "name", "image_position", "num_regions", "num_token_per_image")
V5, V60, HD = read_rows("v5_format"), read_rows("v60_format"), read_rows("hd_uhd_format")
V700, V701 = read_rows("v700_format"), read_rows("v701_v702_format")


@pytest.fixture(scope="module")
def tokenizer():
    return build_world_tokenizer()


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


@pytest.mark.parametrize("row", by_name(V60))
def test_v60_rows(row, tokenizer):
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


@pytest.mark.parametrize("row", by_name(HD))
def test_hd_and_uhd_rows(row, tokenizer):
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


@pytest.mark.parametrize("row", by_name(V5))
def test_v5_rows_up_to_the_drift_of_the_originals_label_mask(row, tokenizer):
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


def test_v5_labels_do_not_drift(tokenizer):
    row = next(row for row in V5 if row["name"] == "multi_turn" and row["image_position"] == "first")
    conversations, prompt_format, length, num_images = arguments(row, PROMPT_FORMATS["v5"])
    sample = encode_conversation(tokenizer, conversations, prompt_format, length, num_images)
    labels = [i for i in sample["labels"] if i != -100]
    answers = "".join(f"Assistant: {turn['value']}\n\n" for turn in conversations[1::2])
    assert tokenizer.decode(labels) == answers
    assert with_package_ids(row)["labels"] != sample["labels"]


# LOST_PICTURE: the original accepts more pictures than placeholders and loses one; here that is refused.


@pytest.mark.parametrize("row", by_name(V700))
def test_v700_rows(row, tokenizer):
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


@pytest.mark.parametrize("row", by_name(V701))
def test_v701_and_v702_rows(row, tokenizer):
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


def test_pictures_may_take_different_numbers_of_tokens(tokenizer):
    conversations = [{"from": "human", "value": "<image>\n<image>\nx"}, {"from": "gpt", "value": "y"}]
    sample = encode_conversation(tokenizer, conversations, PROMPT_FORMATS["v7.00"], [2, 3], num_images=2)
    i = IMAGE_ID
    assert sample["input_ids"][3:10] == [i, i, 11, i, i, i, 11]
    with pytest.raises(ValueError, match="3 numbers for 2 pictures"):
        encode_conversation(tokenizer, conversations, PROMPT_FORMATS["v7.00"], [2, 3, 4])


def test_names_of_special_tokens_in_data_are_text(tokenizer):
    conversations = [{"from": "human", "value": "what is <|endoftext|>?"}, {"from": "gpt", "value": "an end"}]
    ids = encode_conversation(tokenizer, conversations, PROMPT_FORMATS["v7.00"], 1)["input_ids"]
    assert 0 not in ids
    assert tokenizer.decode(ids) == "User: what is <|endoftext|>?\n\nAssistant: an end\n\n"


def test_unknown_speakers_and_missing_placeholders_are_refused():
    with pytest.raises(ValueError, match="human or gpt, got 'system'"):
        format_conversation([{"from": "system", "value": "x"}], PROMPT_FORMATS["hd"])
    with pytest.raises(ValueError, match="Found 0 <image> in the conversation, but 2 pictures"):
        format_conversation([{"from": "human", "value": "x"}], PROMPT_FORMATS["v7.01"], num_images=2)


def test_truncation_keeps_pictures_whole_and_drops_text_only():
    sample = {"input_ids": [1, IMAGE_ID, IMAGE_ID, 2, 3], "labels": [-100, -100, -100, 2, 3]}
    assert pad_or_truncate(sample, 3, 0, IMAGE_ID)["input_ids"] == [1, IMAGE_ID, IMAGE_ID]
    with pytest.raises(ValueError, match="length of 2 would cut a picture that ends at token 3"):
        pad_or_truncate(sample, 2, 0, IMAGE_ID)


def test_messages_hold_the_pictures_of_human_turns_only():
    conversations = [
        {"from": "human", "value": "a <image>\nb<image>"},
        {"from": "gpt", "value": "c <image>"},
    ]
    image = {"type": "image"}
    assert conversation_to_messages(conversations) == [
        {"role": "user", "content": [image, image, {"type": "text", "text": "a \nb"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "c "}]},
    ]


def test_collapse_leaves_neither_blank_lines_nor_outer_space():
    assert collapse(" \n a\n\n\u3000\n b \n\x85\nc\u2028\n ") == "a\n b \nc"


def test_magic_primes():
    for size, prime in json.loads((GOLDEN / "sampling_order" / "magic_primes.json").read_text()).items():
        assert magic_prime(int(size)) == prime
    with pytest.raises(ValueError, match="At least 3 samples are needed, got 2"):
        magic_prime(2)


ORDERS = json.loads((GOLDEN / "sampling_order" / "order.json").read_text())


@pytest.mark.parametrize("case", ORDERS, ids=lambda case: f"{case['variant']}-{case['data_size']}")
def test_sample_order(case):
    repeat = {"v6.0": "reversed", "v7.00": "reversed", "v7.01": "permuted"}[case["variant"]]
    assert magic_prime(case["data_size"]) == case["magic_prime"]
    for part in case["order"]:
        order = sample_order(
            case["data_size"],
            epoch=part["epoch"],
            epoch_steps=case["epoch_steps"],
            micro_batch_size=case["micro_bsz"],
            rank=part["rank"],
            world_size=case["world_size"],
            repeat=repeat,
        )
        assert order == part["sample_indices"]


def test_processes_share_the_samples_of_the_first_round():
    orders = [sample_order(90, 0, 11, 4, rank=rank, world_size=2) for rank in range(2)]
    read = [sample for order in orders for sample in order]
    assert len(read) == 88 == len(set(read))
