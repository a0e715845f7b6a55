"""The model card that `train_tiny.py` writes, from the template `tiny_card.md`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from benchmarking import markdown_table
from tiny_data import Task
from tiny_packages import EMOJI, FONTS, WORDS
from tiny_stages import BATCH, MUON_FACTOR, WEIGHT_DECAY, Stage, computes_in_bfloat16, shares_of

CARD = Path(__file__).with_name("tiny_card.md")


def model_card(
    model,
    tasks: Sequence[Task],
    stages: Sequence[Stage],
    examination: str,
    command: str,
    seed: int,
    minutes: float,
) -> str:
    """Return the card, from the template; `minutes` is how long the training took in all."""
    parameters = sum(weight.numel() for weight in model.parameters())
    data = [
        {
            "data": task.name,
            "source": task.source,
            "training pictures": f"{len(task.subjects):,}" if task.subjects else "drawn anew each time",
            "sha256": f"`{task.sha256}`" if task.sha256 else "",
        }
        for task in tasks
    ]
    recipe = [
        {
            "stage": number,
            "steps": stage.steps,
            "batch": BATCH,
            "learning rate": f"{stage.learning_rate:g} to {stage.final_learning_rate:g}",
            "share of the samples, %": shares_of(stage),
            "questions a sample, open + others": f"{stage.main} + {stage.others}",
            "trained": ", ".join(stage.trained),
        }
        for number, stage in enumerate(stages, 1)
    ]
    packages = [
        {"package": f"`{package.name}@{package.version}`", "sha256": f"`{package.sha256}`"}
        for package in (*FONTS, WORDS, EMOJI)
    ]
    return CARD.read_text(encoding="utf-8").format(
        packages=markdown_table(packages),
        parameters=f"{parameters:,}",
        megabytes=f"{2 * parameters / 1e6:.1f}",
        scores=examination,
        data=markdown_table(data),
        recipe=markdown_table(recipe),
        command=command,
        muon_factor=MUON_FACTOR,
        weight_decay=WEIGHT_DECAY,
        seed=seed,
        minutes=f"{minutes:.0f}",
        processes=PartialState().num_processes,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        dtype="bfloat16 products" if computes_in_bfloat16() else "float32",
    )
