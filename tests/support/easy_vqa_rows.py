"""Provide real rows of easy-VQA for external evaluation harnesses, and a tiny model that has memorised half of them."""

import json
import shutil
from pathlib import Path

import easy_vqa
from PIL import Image
from tiny_training import tiny_model, tiny_processor

from visualrwkv_hf import VisualRWKVDataCollator, VisualRWKVTrainer, VisualRWKVTrainingArguments, train_only

ROWS = 24
STRIDE = 101
"""The distance between two rows in the list of questions, large enough that each row is about another picture."""


def rows() -> list[dict]:
    """Return `ROWS` test questions: `question`, `answer`, and `image`, the path of a picture of 64 x 64 pixels."""
    pictures = easy_vqa.get_test_image_paths()
    chosen = list(zip(*easy_vqa.get_test_questions()))[: ROWS * STRIDE : STRIDE]
    return [{"question": q, "answer": answer, "image": pictures[number]} for q, answer, number in chosen]


def save_rows(folder: Path) -> None:
    """Write the rows as the split "test" of a data set for `imagefolder`."""
    (folder / "test").mkdir(parents=True)
    with (folder / "test" / "metadata.jsonl").open("w") as file:
        for number, row in enumerate(rows()):
            shutil.copy(row["image"], folder / "test" / f"{number}.png")
            record = {"file_name": f"{number}.png", "question": row["question"], "answer": row["answer"]}
            file.write(json.dumps(record) + "\n")


def picture(row: dict) -> Image.Image:
    return Image.open(row["image"]).convert("RGB")


def messages(row: dict) -> list[dict]:
    content = [{"type": "image", "image": picture(row)}, {"type": "text", "text": row["question"]}]
    return [{"role": "user", "content": content}]


def save_model_that_knows_half(folder: Path) -> Path:
    """Train a tiny model on every other row, save it with its processor in `folder`, and return `folder`.

    It answers these rows correctly and can only guess the others, so that its score is neither 0 nor 1.
    """
    model = tiny_model(7, image_position="first")
    train_only(model, ["projector", "language_model"])
    options = dict(
        max_steps=60, per_device_train_batch_size=ROWS // 2, learning_rate=1e-2, learning_rate_final=1e-3
    )
    quiet = dict(use_cpu=True, save_strategy="no", disable_tqdm=True, report_to="none", logging_steps=1000)
    data = [
        {
            "image": row["image"],
            "conversations": [
                {"from": "human", "value": f"<image>\n{row['question']}"},
                {"from": "gpt", "value": row["answer"]},
            ],
        }
        for row in rows()[::2]
    ]
    processor = tiny_processor(model)
    arguments = VisualRWKVTrainingArguments(str(folder), **options, **quiet)
    VisualRWKVTrainer(
        model, arguments, train_dataset=data, data_collator=VisualRWKVDataCollator(processor)
    ).train()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def own_answers(model, processor, texts: list[str]) -> list[str]:
    """Return the answers that `generate` alone gives to `texts`, the prompts of the rows, one at a time."""
    answers = []
    for row, text in zip(rows(), texts, strict=True):
        inputs = processor(images=picture(row), text=text, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answers += processor.post_process_image_text_to_text(
            output, prompt_length=inputs["input_ids"].shape[1]
        )
    return answers


def exact_matches(answers: list[str]) -> int:
    return sum(answer == row["answer"] for answer, row in zip(answers, rows(), strict=True))
