"""The original's recipe: which parts are trained, at which learning rate, and in which order samples are read."""

import math
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from torch.utils.data import Sampler

from .conversations import sample_order

if TYPE_CHECKING:
    from peft import LoraConfig

TRAINABLE_PARTS = {
    "vision_tower": ("model.vision_tower.",),
    "projector": ("model.multi_modal_projector.", "model.compressor."),
    "embeddings": ("model.language_model.embed_tokens.",),
    "language_model": ("model.language_model.", "lm_head."),
}
"""Part of a model -> prefixes of its parameters' names; the first part that matches wins. Stage 1 of the original
trains "projector", stage 2 "projector" and "language_model"; it never trains the embeddings."""

LORA_TARGETS = r".*language_model\.layers\.\d+\..*\.(receptance|key|value|gate|output)"
"""The weight matrices of time mix and channel mix."""

PROJECTOR_MODULES = ["multi_modal_projector", "compressor"]
"""The modules of the part "projector"; most models have the first alone."""

WARM_UP_START = 0.1
"""The original's warm-up starts at this fraction of the learning rate."""

ORIGINAL_ORDERS: dict[str, Literal["reversed", "permuted"]] = {
    "original": "reversed",
    "original_v7.01": "permuted",
}
"""Sampling strategy -> how the data set is reordered each time it is read again."""


def part_of(name: str) -> str:
    """Return the part that a parameter of [`VisualRWKVForConditionalGeneration`] belongs to."""
    return next(part for part, starts in TRAINABLE_PARTS.items() if name.startswith(starts))


def train_only(model: nn.Module, parts: Collection[str]) -> int:
    """Freeze everything except these parts of a [`VisualRWKVForConditionalGeneration`].

    A head that is tied to the embeddings belongs to "embeddings".

    Args:
        model: The model to change.
        parts: Keys of `TRAINABLE_PARTS`.

    Returns:
        The number of trainable parameters.

    Raises:
        ValueError: If `parts` is empty or names an unknown part.
    """
    if not parts or not set(parts) <= set(TRAINABLE_PARTS):
        raise ValueError(
            f"The parts to train must be some of {', '.join(TRAINABLE_PARTS)}, got {list(parts)}."
        )
    for name, weight in model.named_parameters():
        weight.requires_grad_(part_of(name) in parts)
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def lora_config(train_projector: bool = True, **kwargs: Any) -> "LoraConfig":
    """Return a PEFT configuration that adapts the matrices of the language model.

    Args:
        train_projector: Whether to train the whole projector as well, with the compressor of v7.03 and v7.04.
        kwargs: Fields of `peft.LoraConfig` such as `r`, `lora_alpha` or `lora_dropout`; `target_modules` replaces
            the default targets.
    """
    from peft import LoraConfig

    defaults = {
        "target_modules": LORA_TARGETS,
        "modules_to_save": PROJECTOR_MODULES if train_projector else None,
    }
    return LoraConfig(**{**defaults, **kwargs})


def learning_rate_at(
    step: int,
    *,
    initial: float,
    final: float,
    total_steps: int,
    warmup_steps: int = 0,
    accumulation: int = 1,
) -> float:
    r"""Return the original's learning rate for an optimizer step.

    $lr = final + (initial - final) \cdot \frac{1 + \cos \pi p}{2}$ with $p = \frac{s - w + 1/a}{t - w}$ clipped to
    [0, 1]. The 1/a is there because the original counts micro-batches. During warm-up the rate is multiplied by
    $0.1 + 0.9 s / w$.

    Args:
        step: s, the optimizer step, starting at 0.
        initial: The learning rate at the start of the cosine.
        final: The learning rate at its end.
        total_steps: t, the number of optimizer steps.
        warmup_steps: w, the number of warm-up steps.
        accumulation: a, the number of micro-batches per optimizer step.
    """
    progress = (step - warmup_steps + 1 / accumulation) / max(1, total_steps - warmup_steps)
    progress = min(1.0, max(0.0, progress))
    rate = final + (initial - final) * (1 + math.cos(math.pi * progress)) / 2
    if step < warmup_steps:
        rate *= WARM_UP_START + (1 - WARM_UP_START) * step / warmup_steps
    return rate


def is_matrix(weight: Tensor) -> bool:
    """Return whether weight decay applies to a parameter: at least two of its dimensions are larger than 1."""
    return sum(size > 1 for size in weight.shape) >= 2


class OriginalOrder(Sampler):
    """Sample in the original's order: cubes modulo a prime, with a count that continues from epoch to epoch.

    An optimizer step reads the same samples as the original's step, however they are split among processes.

    Args:
        num_samples: Size of the data set, at least 3.
        batch_size: Samples per optimizer step, summed over all processes. An epoch consists of whole steps; samples
            that do not fill a step are read in the next epoch.
        repeat: How the data set is reordered when it is read again, see [`sample_order`].
    """

    def __init__(self, num_samples: int, batch_size: int, repeat: Literal["reversed", "permuted"]):
        self.num_samples, self.repeat, self.epoch = num_samples, repeat, 0
        self.length = max(1, num_samples // batch_size) * batch_size

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(sample_order(self.num_samples, self.epoch, self.length, 1, repeat=self.repeat))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose samples the next iteration yields. The Trainer calls this."""
        self.epoch = epoch


__all__ = ["TRAINABLE_PARTS", "is_matrix", "learning_rate_at", "lora_config", "train_only"]
