"""Rows become the original's batches: golden ids and labels, whole pictures, bad samples never in silence."""

import base64
import json
import logging
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from golden_rows import arguments, speaks_in_capitals, with_package_ids
from paths import GOLDEN
from PIL import Image
from tiny_training import (
    TEXT_SAMPLE,
    conversation,
    rows_with_pictures,
    tiny_model,
    tiny_processor,
    write_data,
)
from torch.utils.data import DataLoader

from visualrwkv_hf import VisualRWKVDataCollator, VisualRWKVProcessor, load_conversations
from visualrwkv_hf.conversion.world_tokenizer import build_world_tokenizer
from visualrwkv_hf.training.collator import messages_to_conversation
from visualrwkv_hf.training.conversations import PROMPT_FORMATS, conversation_to_messages

IMAGE_ID = 1023


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def processor(model):
    return tiny_processor(model)


@pytest.fixture(scope="module")
def world(processor):
    """A processor with the whole vocabulary, as the golden rows; a picture is one token."""
    return VisualRWKVProcessor(processor.image_processor, build_world_tokenizer(), num_tile_tokens=1)


@pytest.fixture
def rows(tmp_path):
    write_data(tmp_path, [*rows_with_pictures(tmp_path, 3), TEXT_SAMPLE])
    return list(load_conversations(tmp_path / "train.json"))


def golden(case: str) -> list:
    lines = (GOLDEN / "f_data" / case / "rows.jsonl").read_text().splitlines()
    names = ("variant", "name", "image_position")
    rows = [json.loads(line) for line in lines]
    return [pytest.param(row, id="-".join(str(row[k]) for k in names if k in row)) for row in rows]


def unpadded(batch: dict, row: int = 0) -> dict:
    kept = batch["attention_mask"][row].bool()
    return {name: batch[name][row][kept].tolist() for name in ("input_ids", "labels")}


# The original's ids and labels.


def expected_sample(row):
    """Return ids and labels of a row. The original learns a turn from "Human" as a whole; here it is a human turn."""
    expected = with_package_ids(row)
    if speaks_in_capitals(row):
        answer = expected["input_ids"].index(5585) + 3  # "Assistant:" is three tokens
        expected["labels"] = [-100] * answer + expected["input_ids"][answer:]
    return expected


@pytest.mark.parametrize(("case", "release"), [("v60_format", "v6.0"), ("hd_uhd_format", "hd")])
def test_golden_rows_of_one_picture(case, release, world):
    for row in (parameter.values[0] for parameter in golden(case)):
        conversations, prompt_format, _, num_images = arguments(row, PROMPT_FORMATS[release])
        count = 0 if num_images == 0 else row["input_text"].count("<image>")
        pictures = [Image.new("RGB", (8, 8))] * count
        collator = VisualRWKVDataCollator(world, prompt_format)
        batch = collator([{"conversations": conversations, "images": pictures}])
        assert unpadded(batch) == expected_sample(row), row["name"]
        assert len(batch.get("pixel_values", [])) == count


def rwkv7_rows() -> list:
    """Rows with one tile a picture and as many pictures as placeholders. tests/training/test_data.py has the others."""
    rows = golden("v700_format") + golden("v701_v702_format")

    def is_simple(row: dict) -> bool:
        if "raises" in row or row.get("num_regions", 1) > 1:
            return False
        added = int(row.get("variant") == "v7.01" and not row["num_images"])
        return row["input_text"].count("<image>") == row["num_images"] + added

    return [parameter for parameter in rows if is_simple(parameter.values[0])]


@pytest.mark.parametrize("row", rwkv7_rows())
def test_golden_rows_of_rwkv7(row, world):
    """v7.01 gives a text an empty picture."""
    release = row.get("variant", "v7.00")
    pictures = [Image.new("RGB", (8, 8), "red")] * row["num_images"]
    collator = VisualRWKVDataCollator(with_tokens(world, row["num_token_per_image"]), release)
    batch = collator([{"conversations": row["conversations"], "image": pictures or None}])
    assert unpadded(batch) == {"input_ids": row["input_ids"], "labels": row["labels"]}
    if pictures or release == "v7.01":
        assert batch["pixel_values"].any() == bool(pictures)
    else:
        assert "pixel_values" not in batch


def with_tokens(processor: VisualRWKVProcessor, count: int) -> VisualRWKVProcessor:
    return VisualRWKVProcessor(processor.image_processor, processor.tokenizer, num_tile_tokens=count)


def test_the_default_format_is_what_the_chat_template_writes(processor, rows):
    """So that a model is asked as it was trained."""
    chat = conversation("red") + [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    picture = Image.new("RGB", (8, 8))
    batch = VisualRWKVDataCollator(processor)([{"conversations": chat, "image": picture}])
    asked = processor.apply_chat_template(
        conversation_to_messages(chat), sandwich_history=True, tokenize=False
    )
    inputs = processor(images=[picture], text=[asked])
    assert unpadded(batch)["input_ids"] == inputs["input_ids"][0]


# Rows.


def test_messages_are_the_same_samples_as_conversations(processor):
    picture = Image.new("RGB", (8, 8), "blue")
    chat = conversation("blue") + [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]
    beside = conversation_to_messages(chat)
    within = conversation_to_messages(chat)
    within[0]["content"][0]["image"] = picture
    plain = [
        {"role": message["role"], "content": message["content"][-1]["text"].strip()} for message in beside
    ]
    rows = [
        {"conversations": chat, "image": picture},
        {"messages": beside, "images": [picture]},
        {"messages": within},
        {"messages": plain, "images": [picture]},
    ]
    collator = VisualRWKVDataCollator(processor)
    batches = [collator([row]) for row in rows]
    for batch in batches[1:]:
        assert all(torch.equal(batch[name], batches[0][name]) for name in batches[0])


def test_parts_with_none_keys_are_what_the_processor_reads(processor):
    """Rows of a data set have all columns in all parts; both leave out those that are None."""
    picture = {"type": "image", "image": Image.new("RGB", (30, 20), "red"), "text": None, "url": None}
    question = {"type": "text", "text": "What?", "image": None, "path": None}
    answer = {"type": "text", "text": "A dot.", "image": None}
    messages = [
        {"role": "user", "content": [picture, question]},
        {"role": "assistant", "content": [answer]},
    ]
    batch = VisualRWKVDataCollator(processor)([{"messages": messages}])
    expected = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    for name in ("input_ids", "pixel_values"):
        assert torch.equal(batch[name], expected[name])


def test_a_system_message_stands_in_front_of_the_first_question():
    turns, images = messages_to_conversation(
        [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What?"}],
            },
            {"role": "assistant", "content": "A."},
        ]
    )
    assert turns[0] == {"from": "human", "value": "<image>\nBe brief.\nWhat?"}
    assert images == ["a.png"]


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "tool", "content": "x"}, "role 'tool'"),
        ({"role": "assistant", "content": [{"type": "image"}]}, "role 'assistant' with 1 pictures"),
        ({"role": "user", "content": "see <image>"}, "texts without <image>"),
        ({"role": "user", "content": [{"type": "video"}]}, "video"),
    ],
)
def test_messages_that_the_template_would_not_take_are_refused(message, error):
    with pytest.raises(ValueError, match=error):
        messages_to_conversation([message])


def test_files_of_one_several_and_no_pictures(tmp_path):
    rows = [
        {"id": 7, "image": "a.png", "conversations": conversation("red")},
        {"image": ["a.png", "/b.png", "http://h/c.png"], "conversations": conversation("red")},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = load_conversations(tmp_path / "data.jsonl", image_folder="pictures")
    assert dataset["id"][:] == ["7", "1", "2"]
    assert dataset["images"][:] == [["pictures/a.png"], ["pictures/a.png", "/b.png", "http://h/c.png"], []]
    assert dataset[2]["conversations"][1] == {"from": "gpt", "value": "y"}
    write_data(tmp_path, rows)
    assert load_conversations(tmp_path / "train.json")[0]["images"] == [str(tmp_path / "a.png")]


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"id": "x", "image": "a.png"}, r"Sample 1 \(x\): a sample needs conversations or messages"),
        ({"conversations": [{"from": "human"}]}, r"Sample 1 \(without id\): 'value'"),
        ({**TEXT_SAMPLE, "image": 3}, "must be a path or a URL, got 3"),
        ({"conversations": []}, r"Sample 1 \(without id\): a conversation needs turns"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "its text must be texts, got None"),
        ({"conversations": [{"from": 1, "value": "x"}]}, "its text must be texts, got 1"),
        ("text", "Sample 1 must be an object, got 'text'"),
    ],
)
def test_malformed_files_are_refused_by_number(row, error, tmp_path):
    path = write_data(tmp_path, [TEXT_SAMPLE, row])
    with pytest.raises(ValueError, match=error):
        load_conversations(path)


def test_a_line_that_is_no_json_is_refused_by_file_and_number(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(f'{json.dumps(TEXT_SAMPLE)}\n\n{{"id": 1,\n')
    with pytest.raises(
        ValueError, match=r"data\.jsonl cannot be read as JSON: line 3, column \d+: Expecting"
    ):
        load_conversations(path)
    (path := tmp_path / "data.json").write_text("[\n}")
    with pytest.raises(ValueError, match=r"data\.json cannot be read as JSON: .*line 2 column 1"):
        load_conversations(path)


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_data(name, tmp_path):
    text = json.dumps(TEXT_SAMPLE if name.endswith("l") else [TEXT_SAMPLE])
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert load_conversations(tmp_path / name)["id"][:] == ["text"]


def test_a_file_without_samples_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"train\.json must hold a list of samples"):
        load_conversations(write_data(tmp_path, []))


# Batches.


def test_texts_stand_among_pictures(processor, rows):
    batch = VisualRWKVDataCollator(processor)(rows)
    assert batch["pixel_values"].shape == (3, 3, 56, 56)
    placeholders = (batch["input_ids"] == IMAGE_ID).sum(1).tolist()
    assert placeholders == [17, 17, 17, 0]
    assert not (batch["labels"] == IMAGE_ID).any()
    red = VisualRWKVDataCollator(processor)(rows[:1])
    assert torch.equal(batch["pixel_values"][:1], red["pixel_values"])


def test_several_pictures_of_a_sample_stand_in_the_order_of_the_text(processor):
    colours = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    turns = [{"from": "human", "value": "<image><image>\nBoth?"}, {"from": "gpt", "value": "Yes."}]
    batch = VisualRWKVDataCollator(processor)([{"conversations": turns, "images": colours}])
    single = processor.image_processor(colours, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], single)
    assert (batch["input_ids"] == IMAGE_ID).sum() == 34


@pytest.mark.parametrize("side", ["left", "right"])
def test_pads(side, processor, rows):
    batch = VisualRWKVDataCollator(processor, padding_side=side, pad_to_multiple_of=16)(rows)
    assert batch["input_ids"].shape[1] % 16 == 0
    pads = batch["attention_mask"] == 0
    assert pads[:, 0 if side == "left" else -1].any()
    assert (batch["input_ids"][pads] == 0).all() and (batch["labels"][pads] == -100).all()


def test_workers_make_the_same_batches(processor, tmp_path):
    write_data(tmp_path, [*rows_with_pictures(tmp_path, 3), TEXT_SAMPLE])
    dataset = load_conversations(tmp_path / "train.json")
    collator = VisualRWKVDataCollator(processor)
    (alone, by_workers) = (
        list(DataLoader(dataset, batch_size=2, collate_fn=collator, num_workers=count)) for count in (0, 2)
    )
    assert len(alone) == len(by_workers) == 2
    for expected, found in zip(alone, by_workers):
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_without_padding_samples_stand_one_after_the_other(processor, rows):
    padded = VisualRWKVDataCollator(processor)(rows)
    batch = VisualRWKVDataCollator(processor, padding_free=True)(rows)
    assert set(batch) == {"input_ids", "labels", "cu_seq_lens_q", "pixel_values"}
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    bounds = batch["cu_seq_lens_q"].tolist()
    assert bounds[0] == 0 and len(bounds) == len(rows) + 1
    for number, ends in enumerate(pairwise(bounds)):
        found = {name: batch[name][0, slice(*ends)].tolist() for name in ("input_ids", "labels")}
        assert found == unpadded(padded, number)
    assert torch.equal(batch["pixel_values"], padded["pixel_values"])


@pytest.mark.parametrize("padding_free", [False, True])
def test_a_blank_picture_gives_the_projector_a_gradient_of_zero_and_changes_nothing(padding_free, processor):
    model = tiny_model().train()
    model.config.text_config.l2_wrap = 0.0  # its pull is a share of all positions
    plain = VisualRWKVDataCollator(processor)([TEXT_SAMPLE])
    collator = VisualRWKVDataCollator(processor, picture_in_every_batch=True, padding_free=padding_free)
    batch = collator([TEXT_SAMPLE])
    assert "pixel_values" not in plain and len(batch["pixel_values"]) == 1
    loss = model(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss, model(**plain).loss, atol=1e-5, rtol=0)  # float32, another length
    assert not any(weight.grad.any() for weight in model.model.multi_modal_projector.parameters())
    assert model.lm_head.weight.grad.any()


# Bad samples.


def broken_samples(folder: Path) -> dict[str, dict]:
    """Name -> a sample that cannot be read."""
    whole = BytesIO()
    Image.effect_noise((64, 64), 60).save(whole, "png")
    (folder / "cut.png").write_bytes(whole.getvalue()[:600])
    (folder / "text.png").write_text("no picture")
    red = str(folder / "red.png")
    two = [{"from": "human", "value": "<image>\n<image>\nSame?"}, {"from": "gpt", "value": "No."}]
    return {
        "missing": {
            "id": "missing",
            "image": str(folder / "nowhere.png"),
            "conversations": conversation("red"),
        },
        "cut": {"id": "cut", "image": str(folder / "cut.png"), "conversations": conversation("red")},
        "no picture": {
            "id": "no picture",
            "image": str(folder / "text.png"),
            "conversations": conversation("red"),
        },
        "not given": {"id": "not given", "conversations": conversation("red")},
        "too few": {"id": "too few", "image": red, "conversations": two},
        "no speaker": {"id": "no speaker", "conversations": [{"from": "robot", "value": "x"}]},
        "no text": {"id": "no text", "conversations": [{"from": "human", "value": None}]},
        "no turns": {"id": "no turns", "conversations": []},
    }


BROKEN = ("missing", "cut", "no picture", "not given", "too few", "no speaker", "no text", "no turns")


@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_sample_is_refused_by_name(name, processor, tmp_path):
    rows_with_pictures(tmp_path, 1)
    with pytest.raises(ValueError, match=f"Sample '{name}': "):
        VisualRWKVDataCollator(processor)([TEXT_SAMPLE, broken_samples(tmp_path)[name]])


@pytest.fixture
def warnings_of():
    """What the collator logs: transformers' loggers do not propagate to pytest's."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("visualrwkv_hf.training.collator")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def test_bad_samples_are_skipped_and_reported(processor, tmp_path, warnings_of):
    (good,) = rows_with_pictures(tmp_path, 1)
    good["image"] = str(tmp_path / good["image"])
    bad = broken_samples(tmp_path)
    batch = VisualRWKVDataCollator(processor, on_bad_sample="skip")([*bad.values(), good])
    alone = VisualRWKVDataCollator(processor)([good])
    assert all(torch.equal(batch[name], alone[name]) for name in alone)
    assert [line.split("'")[1] for line in warnings_of] == list(bad)
    assert all(line.startswith("Skipped. Sample ") for line in warnings_of)


def test_a_batch_of_bad_samples_trains_nothing_or_is_refused(processor, tmp_path):
    bad = list(broken_samples(tmp_path).values())
    with pytest.raises(ValueError, match="None of the 8 samples of a batch is readable"):
        VisualRWKVDataCollator(processor, on_bad_sample="skip")(bad)
    batch = VisualRWKVDataCollator(processor, on_bad_sample="skip", picture_in_every_batch=True)(bad)
    model = tiny_model().train()
    model.config.text_config.l2_wrap = 0.0
    loss = model(**batch).loss
    loss.backward()
    assert loss.item() == 0
    assert not any(w.grad.any() for w in model.parameters() if w.grad is not None)


def test_max_length_cuts_text_but_no_picture_and_not_all_labels(processor, tmp_path):
    rows_with_pictures(tmp_path, 1)
    row = {"id": "red", "image": str(tmp_path / "red.png"), "conversations": conversation("red")}
    whole = VisualRWKVDataCollator(processor)([row])
    length = whole["input_ids"].shape[1]
    shorter = VisualRWKVDataCollator(processor, max_length=length - 2)([row])
    assert torch.equal(shorter["input_ids"], whole["input_ids"][:, : length - 2])
    assert torch.equal(shorter["labels"], whole["labels"][:, : length - 2])
    picture_end = int((whole["input_ids"][0] == IMAGE_ID).nonzero()[-1]) + 1
    first_label = int((whole["labels"][0] != -100).nonzero()[0])
    with pytest.raises(
        ValueError, match=f"'red': A length of 20 would cut a picture that ends at token {picture_end}"
    ):
        VisualRWKVDataCollator(processor, max_length=20)([row])
    with pytest.raises(ValueError, match=f"max_length {first_label} leaves no label of {length} tokens"):
        VisualRWKVDataCollator(processor, max_length=first_label)([row])


def test_pictures_may_be_paths_objects_and_base64(processor, tmp_path):
    rows_with_pictures(tmp_path, 1)
    path = tmp_path / "red.png"
    sources = [str(path), path, Image.open(path), base64.b64encode(path.read_bytes()).decode()]
    rows = [{"conversations": conversation("red"), "image": source} for source in sources]
    pixels = VisualRWKVDataCollator(processor)(rows)["pixel_values"]
    assert all(torch.equal(pixels[0], other) for other in pixels[1:])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"prompt_format": "v9"}, "prompt_format must be one of v5, v6.0, .*, got 'v9'"),
        ({"on_bad_sample": "hide"}, "on_bad_sample must be raise or skip, got 'hide'"),
        ({"padding_side": "both"}, "padding_side must be right or left, got 'both'"),
        ({"padding_free": True, "pad_to_multiple_of": 8}, "pad_to_multiple_of must be None"),
    ],
)
def test_unknown_options_are_refused(options, error, processor):
    with pytest.raises(ValueError, match=error):
        VisualRWKVDataCollator(processor, **options)


# Loss and gradients do not depend on how samples are put together.


def loss_and_gradients(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize("reduction", ["sample", "token"])
@pytest.mark.parametrize("version", [5, 6, 7])
def test_padding_side_order_and_checkpointing_leave_loss_and_gradients(version, reduction, processor, rows):
    """Float32: sums over other lengths and orders differ by rounding; 1e-4 of the largest gradient is allowed."""
    model = tiny_model(version, scan="bidirectional").train()
    model.config.text_config.loss_reduction = reduction
    model.model.vision_tower.requires_grad_(False)  # as in training; the true gradient of its key biases is 0
    model.config.text_config.l2_wrap = 0.0  # its pull is a share of all positions, pads included
    loss, gradients = loss_and_gradients(model, VisualRWKVDataCollator(processor)(rows))
    batches = {
        "left": VisualRWKVDataCollator(processor, padding_side="left")(rows),
        "order": VisualRWKVDataCollator(processor)(rows[::-1]),
        "longer": VisualRWKVDataCollator(processor, pad_to_multiple_of=64)(rows),
        "packed": VisualRWKVDataCollator(processor, padding_free=True)(rows),
    }
    results = {name: loss_and_gradients(model, batch) for name, batch in batches.items()}
    model.gradient_checkpointing_enable()
    results["checkpointing"] = loss_and_gradients(model, VisualRWKVDataCollator(processor)(rows))
    for name, (other_loss, other_gradients) in results.items():
        torch.testing.assert_close(other_loss, loss, atol=1e-5, rtol=0, msg=name)
        for key, gradient in gradients.items():
            scale = float(gradient.abs().max()) or 1.0
            error = float((other_gradients[key] - gradient).abs().max()) / scale
            assert error < 1e-4, (name, key, error)
