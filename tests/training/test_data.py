"""Conversations become the original's text, ids and labels, in the original's order."""

import json

import pytest
from golden_rows import (
    IMAGE_ID,
    arguments,
    check_hd_or_uhd_row,
    check_v5_row,
    check_v60_row,
    check_v700_row,
    check_v701_or_v702_row,
    with_package_ids,
)
from paths import GOLDEN

from visualrwkv_hf.conversion.world_tokenizer import build_world_tokenizer
from visualrwkv_hf.training.conversations import (
    PROMPT_FORMATS,
    collapse,
    conversation_to_messages,
    encode_conversation,
    format_conversation,
    magic_prime,
    pad_or_truncate,
    sample_order,
)

GOLDEN_CASES = GOLDEN / "f_data"


def read_rows(case):
    return [json.loads(line) for line in (GOLDEN_CASES / case / "rows.jsonl").read_text().splitlines()]


def by_name(rows):
    return [pytest.param(row, id="-".join(str(row[k]) for k in LABELS if k in row)) for row in rows]


LABELS = ("variant", "name", "image_position", "num_regions", "num_token_per_image")
V5, V60, HD = read_rows("v5_format"), read_rows("v60_format"), read_rows("hd_uhd_format")
V700, V701 = read_rows("v700_format"), read_rows("v701_v702_format")


@pytest.fixture(scope="module")
def tokenizer():
    return build_world_tokenizer()


@pytest.mark.parametrize("row", by_name(V60))
def test_v60_rows(row, tokenizer):
    check_v60_row(row, tokenizer)


@pytest.mark.parametrize("row", by_name(HD))
def test_hd_and_uhd_rows(row, tokenizer):
    check_hd_or_uhd_row(row, tokenizer)


@pytest.mark.parametrize("row", by_name(V5))
def test_v5_rows_up_to_the_drift_of_the_originals_label_mask(row, tokenizer):
    check_v5_row(row, tokenizer)


def test_v5_labels_do_not_drift(tokenizer):
    row = next(row for row in V5 if row["name"] == "multi_turn" and row["image_position"] == "first")
    conversations, prompt_format, length, num_images = arguments(row, PROMPT_FORMATS["v5"])
    sample = encode_conversation(tokenizer, conversations, prompt_format, length, num_images)
    labels = [i for i in sample["labels"] if i != -100]
    answers = "".join(f"Assistant: {turn['value']}\n\n" for turn in conversations[1::2])
    assert tokenizer.decode(labels) == answers
    assert with_package_ids(row)["labels"] != sample["labels"]


@pytest.mark.parametrize("row", by_name(V700))
def test_v700_rows(row, tokenizer):
    check_v700_row(row, tokenizer)


@pytest.mark.parametrize("row", by_name(V701))
def test_v701_and_v702_rows(row, tokenizer):
    check_v701_or_v702_row(row, tokenizer)


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
    for size, prime in json.loads(
        (GOLDEN_CASES / "sampling_order" / "magic_primes.json").read_text()
    ).items():
        assert magic_prime(int(size)) == prime
    with pytest.raises(ValueError, match="At least 3 samples are needed, got 2"):
        magic_prime(2)


ORDERS = json.loads((GOLDEN_CASES / "sampling_order" / "order.json").read_text())


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
