"""Write a tiny model and a few pictures with questions, for tests of training."""

import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from paths import EXAMPLES
from PIL import Image
from tiny import awake, text_config, vlm_config

from visualrwkv_hf import VisualRWKVForConditionalGeneration, VisualRWKVProcessor
from visualrwkv_hf.conversion.world_tokenizer import build_world_tokenizer, load_world_vocabulary
from visualrwkv_hf.image_processing_visualrwkv import image_processor_for

SCRIPT = EXAMPLES / "finetune.py"
COLOURS = ["red", "green", "blue", "yellow", "black", "white", "orange", "purple"]
TEXT_SAMPLE = {
    "id": "text",
    "conversations": [{"from": "human", "value": "Say yes."}, {"from": "gpt", "value": "Yes."}],
}
QUIET = {
    "use_cpu": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
}
"""Training arguments with which a trainer logs every step to its own history, and shows and saves nothing."""


def tiny_model(version: int = 6, vocab_size: int = 1024, **fields) -> VisualRWKVForConditionalGeneration:
    """Return a tiny model that knows the first tokens of the World vocabulary: single bytes and pairs.

    Embeddings of the whole vocabulary would make up most of it.
    """
    text = text_config(version, vocab_size=vocab_size, hidden_size=32, num_hidden_layers=2)
    config = vlm_config(version, text_config=text.to_dict(), image_token_id=vocab_size - 1, **fields)
    torch.manual_seed(0)
    model = awake(VisualRWKVForConditionalGeneration(config))
    model.generation_config.eos_token_id = [0, 261]  # as a converted model has
    return model


world_vocabulary = cache(load_world_vocabulary)


def tiny_processor(model: VisualRWKVForConditionalGeneration) -> VisualRWKVProcessor:
    size = model.config.text_config.vocab_size
    vocabulary = {token: i for token, i in world_vocabulary().items() if i < size - 1}
    tokenizer = build_world_tokenizer(vocabulary, vocab_size=size)
    return VisualRWKVProcessor.from_config(model.config, image_processor_for(model.config), tokenizer)


def save_tiny_model(folder: Path, **fields) -> Path:
    model = tiny_model(**fields)
    model.save_pretrained(folder)
    tiny_processor(model).save_pretrained(folder)
    return folder


def conversation(colour: str) -> list[dict]:
    return [
        {"from": "human", "value": "<image>\nWhich colour?"},
        {"from": "gpt", "value": f"It is {colour}."},
    ]


def rows_with_pictures(folder: Path, count: int = 8) -> list[dict]:
    """Write pictures of one colour each to `folder`, and return a LLaVA sample about each."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for colour in COLOURS[:count]:
        Image.new("RGB", (60, 56), colour).save(folder / f"{colour}.png")
        rows.append({"id": colour, "image": f"{colour}.png", "conversations": conversation(colour)})
    return rows


def write_data(folder: Path, rows: list[dict] | None = None, name: str = "train.json") -> Path:
    rows = rows_with_pictures(folder) if rows is None else rows
    (folder / name).write_text(json.dumps(rows))
    return folder / name


def finetune_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finetune", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["finetune"] = module  # its dataclasses look up their module there
    spec.loader.exec_module(module)
    return module


def lora_command(model: Path, data: Path) -> list[object]:
    """Return the options of `examples/finetune.py` with which it trains adapters of a model on a CPU."""
    return ["--model", model, "--data", data, "--preset", "lora", "--use-cpu", "--report-to", "none"]


def finetune(*arguments: object) -> None:
    """Run `python examples/finetune.py ...` in this process."""
    finetune_module().main([str(argument) for argument in arguments])


def trainer_of(model, folder: Path, rows: list[dict], *, stock: bool = False, given=None, **options):
    """Return a trainer of `rows`, on which it is also evaluated.

    Args:
        model: a model.
        folder: the folder into which it writes.
        rows: LLaVA samples.
        stock: return transformers' own trainer rather than `VisualRWKVTrainer`.
        given: further arguments of the trainer.
        options: fields of the training arguments, beside `QUIET`.
    """
    # Imported late: most tests that need a tiny model train nothing.
    from transformers import Trainer, TrainingArguments

    from visualrwkv_hf import VisualRWKVDataCollator, VisualRWKVTrainer, VisualRWKVTrainingArguments

    kind, arguments = (
        (Trainer, TrainingArguments) if stock else (VisualRWKVTrainer, VisualRWKVTrainingArguments)
    )
    if stock:
        options = {"remove_unused_columns": False, **options}
    return kind(
        model,
        arguments(str(folder), **{**QUIET, **options}),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=VisualRWKVDataCollator(tiny_processor(model)),
        **(given or {}),
    )
