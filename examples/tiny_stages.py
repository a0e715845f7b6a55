"""The recipe of `train_tiny.py`: its stages and what is common to them."""

from typing import NamedTuple

import torch
from tiny_signs import LONGEST_WORD

from visualrwkv_hf.training import TRAINABLE_PARTS

BATCH = 32
WEIGHT_DECAY = 0.05
"""Weight decay of the matrices. The original has none, but trains no vision tower on small data."""

MUON_FACTOR = 3.5
"""Muon's learning rate is so many times the stage's, with which AdamW trains all else."""


class Stage(NamedTuple):
    """A part of the training: a short warm-up, then a cosine from one learning rate to the other."""

    steps: int
    learning_rate: float
    final_learning_rate: float
    trained: tuple[str, ...]  # names in `TRAINABLE_PARTS`
    main: int  # open questions about a lesson's pictures in a sample, at most
    others: int  # further questions
    shares: dict[str, float]  # of the samples, by task


ALL_PARTS, ALL_BUT_TOWER = tuple(TRAINABLE_PARTS), ("projector", "embeddings", "language_model")

READING_LEVELS = {"letters": (1, 1), "pairs": (2, 1), "syllables": (4, 1), "words": (LONGEST_WORD, 1)}
"""Easier forms of the reading task, by name: letters of a text and lines of a sign, at most."""

FIRST = {"letters": 1.0}
SECOND = {"pairs": 0.35, "syllables": 0.35, "comparing": 0.15, "easy-VQA": 0.15}
ALL_TASKS = {
    "words": 0.1,
    "reading": 0.15,
    "posters": 0.15,
    "counting": 0.1,
    "comparing": 0.12,
    "charts": 0.08,
    "frames": 0.12,
    "emoji": 0.06,
    "easy-VQA": 0.05,
    "digits": 0.03,
    "triangles": 0.01,
    "unknown": 0.03,
}
LAST = ALL_TASKS | {"unknown": 0.06, "refusals": 0.2}
POSTERS_REFUSED = 8
"""In "refusals" so many posters are shown for each picture of any other task."""

STAGES = (
    Stage(350, 1.5e-3, 1.4e-3, ALL_PARTS, 1, 0, FIRST),
    Stage(800, 1.5e-3, 1.4e-3, ALL_PARTS, 2, 0, SECOND),
    Stage(5000, 1.5e-3, 2e-5, ALL_PARTS, 6, 2, ALL_TASKS),
    Stage(150, 4e-4, 1e-5, ALL_BUT_TOWER, 6, 2, LAST),
)
"""Reading is learned in steps. A model that is shown whole words from the start learns none of their letters in this
time."""

WARM_UP = 100


def shares_of(stage: Stage) -> str:
    """Return the tasks' shares of the samples, in percent."""
    total = sum(stage.shares.values())
    return ", ".join(f"{task} {100 * share / total:.0f}" for task, share in stage.shares.items())


def computes_in_bfloat16() -> bool:
    """Return whether the CPU multiplies bfloat16 faster than float32."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()
