"""The original's training recipe on transformers' Trainer: what is trained, how fast, and whole checkpoints."""

import math
import os
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import PartialState
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from .conversations import sample_order

if TYPE_CHECKING:
    from peft import LoraConfig

TRAINABLE_PARTS = {
    "vision_tower": ("model.vision_tower.",),
    "projector": ("model.multi_modal_projector.", "model.compressor."),
    "embeddings": ("model.language_model.embed_tokens.",),
    "language_model": ("model.language_model.", "lm_head."),
}
"""Part of a model -> how its parameters' names begin; the first that fits counts. Stage 1 of the original trains
"projector", stage 2 "projector" and "language_model"; embeddings are never trained there."""

LORA_TARGETS = r".*language_model\.layers\.\d+\..*\.(receptance|key|value|gate|output)"
"""The matrices of the time mix and of the channel mix."""

WARM_UP_START = 0.1
"""Share of the learning rate at which the original's warm-up starts."""

UNFINISHED = "_unfinished"
"""Where a checkpoint stands while it is written. What begins with "_" is not pushed to the Hub."""


def part_of(name: str) -> str:
    """The part that a parameter belongs to, by its name in [`VisualRWKVForConditionalGeneration`]."""
    return next(part for part, starts in TRAINABLE_PARTS.items() if name.startswith(starts))


def train_only(model: nn.Module, parts: Collection[str]) -> int:
    """Freezes all but these parts of a [`VisualRWKVForConditionalGeneration`].

    A head that is tied to the embedding is a part of the embedding.

    Args:
        model: the model.
        parts: names in `TRAINABLE_PARTS`.

    Returns:
        How many parameters are trained.

    Raises:
        ValueError: a part is unknown, or none is given.
    """
    if not parts or not set(parts) <= set(TRAINABLE_PARTS):
        raise ValueError(
            f"The parts to train must be some of {', '.join(TRAINABLE_PARTS)}, got {list(parts)}."
        )
    for name, weight in model.named_parameters():
        weight.requires_grad_(part_of(name) in parts)
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def lora_config(train_projector: bool = True, **kwargs: Any) -> "LoraConfig":
    """PEFT's configuration for the language model's matrices.

    Args:
        train_projector: whether the projector is trained too, as a whole.
        kwargs: fields of `peft.LoraConfig`, e.g. `r`, `lora_alpha`, `lora_dropout`; `target_modules` replaces ours.
    """
    from peft import LoraConfig

    defaults = {
        "target_modules": LORA_TARGETS,
        "modules_to_save": ["multi_modal_projector"] if train_projector else None,
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
    r"""The original's learning rate of an optimizer step.

    $lr = final + (initial - final) \cdot \frac{1 + \cos \pi p}{2}$ with $p = \frac{s - w + 1/a}{t - w}$ in [0, 1];
    the original counts micro-batches, hence 1/a. During warm-up times $0.1 + 0.9 s / w$.

    Args:
        step: s, from 0.
        initial: at the start.
        final: at the end.
        total_steps: t.
        warmup_steps: w.
        accumulation: a, micro-batches of a step.
    """
    progress = (step - warmup_steps + 1 / accumulation) / max(1, total_steps - warmup_steps)
    progress = min(1.0, max(0.0, progress))
    rate = final + (initial - final) * (1 + math.cos(math.pi * progress)) / 2
    if step < warmup_steps:
        rate *= WARM_UP_START + (1 - WARM_UP_START) * step / warmup_steps
    return rate


class OriginalOrder(Sampler):
    """The original's order of the samples: cubes modulo a prime, counted on from epoch to epoch.

    An optimizer step reads the samples of the original's step, whatever share of them each process takes.

    Args:
        num_samples: in the data, at least 3.
        batch_size: samples of an optimizer step over all processes. An epoch is whole steps: the rest of the data
            has its turn in the next one.
        repeat: how the data is read again, see [`sample_order`].
    """

    def __init__(self, num_samples: int, batch_size: int, repeat: Literal["reversed", "permuted"]):
        self.num_samples, self.repeat, self.epoch = num_samples, repeat, 0
        self.length = max(1, num_samples // batch_size) * batch_size

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(sample_order(self.num_samples, self.epoch, self.length, 1, repeat=self.repeat))

    def set_epoch(self, epoch: int) -> None:
        """Trainer says which epoch begins."""
        self.epoch = epoch


ORIGINAL_ORDERS: dict[str, Literal["reversed", "permuted"]] = {
    "original": "reversed",
    "original_v7.01": "permuted",
}
"""Sampling strategy -> how the data is read again."""

SAMPLING_STRATEGIES = ["random", "sequential", "group_by_length", "batch_rebalance", *ORIGINAL_ORDERS]


@dataclass
class VisualRWKVTrainingArguments(TrainingArguments):
    """Trainer's arguments with the original's betas, and its schedule where `learning_rate_final` is given.

    The defaults that differ: `adam_beta2` 0.99; no column of a row is removed (the collator reads them); evaluation
    keeps the loss and no logits; a loss that is NaN is no longer hidden from the log, for it stops the training.
    """

    learning_rate_final: float | None = field(
        default=None,
        metadata={
            "help": "Where the original's cosine ends; the same as learning_rate: constant. None: the schedule "
            "is lr_scheduler_type's."
        },
    )
    train_sampling_strategy: str = field(
        default="random",
        metadata={
            "help": "Order of the samples: Trainer's random, sequential, group_by_length or batch_rebalance; original "
            "(v6.0, v7.00) or original_v7.01 (v7.01 to v7.04): cubes modulo a prime.",
            "choices": SAMPLING_STRATEGIES,
        },
    )
    adam_beta2: float = field(default=0.99, metadata={"help": "The beta2 of AdamW."})
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Whether to remove the columns that the model does not read."}
    )
    prediction_loss_only: bool = field(
        default=True, metadata={"help": "Whether evaluation keeps the loss alone."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Whether to leave NaN and infinite losses out of the log."}
    )


class VisualRWKVTrainer(Trainer):
    """Trainer with the original's schedule and weight-decay groups.

    A folder `checkpoint-*` is a whole one: it is written under another name and renamed. So a full disk or a kill
    leaves the checkpoint before, and `train(resume_from_checkpoint=True)` goes on from there. A loss that is NaN or
    infinite ends the training with the step's number.

    card:
        Text of the model card that `create_model_card` and `push_to_hub` write; None: Trainer's own.
    """

    card: str | None = None
    lr_scheduler: Any
    _writing_checkpoint = False

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        """Trainer's, or the original's order."""
        repeat = ORIGINAL_ORDERS.get(self.args.train_sampling_strategy)
        if repeat is None:
            return super()._get_train_sampler(train_dataset)
        arguments, data = self.args, self.train_dataset if train_dataset is None else train_dataset
        batch_size = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        return OriginalOrder(len(data), batch_size, repeat)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The matrices: parameters of two or more dimensions, those of size 1 not counted."""
        shapes = {name: weight.shape for name, weight in model.named_parameters()}
        return [name for name, shape in shapes.items() if sum(size > 1 for size in shape) >= 2]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """See `learning_rate_at`; every group follows it (the original forgets those with weight decay)."""
        arguments = self.args
        if arguments.learning_rate_final is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:

            def factor(step: int) -> float:
                rate = learning_rate_at(
                    step,
                    initial=arguments.learning_rate,
                    final=arguments.learning_rate_final,
                    total_steps=num_training_steps,
                    warmup_steps=arguments.get_warmup_steps(num_training_steps),
                    accumulation=arguments.gradient_accumulation_steps,
                )
                return rate / arguments.learning_rate

            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        """As Trainer's.

        Raises:
            FloatingPointError: the loss is NaN or infinite.
        """
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss.item()} in step {self.state.global_step + 1} (learning rate "
                f"{self._get_learning_rate():g}). The weights are those of step {self.state.global_step}; the last "
                f"checkpoint stands in {self.args.output_dir}."
            )
        return loss

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._writing_checkpoint else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not before the checkpoint has its name: the upload goes on behind the training's back."""
        if not self._writing_checkpoint:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        folder = Path(self._get_output_dir(trial))
        unfinished, name = folder / UNFINISHED, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._remove(unfinished)
        self.accelerator.wait_for_everyone()
        self._writing_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:
            self._remove(unfinished)  # a full disk needs the room
            raise
        finally:
            self._writing_checkpoint = False
        self.accelerator.wait_for_everyone()  # each process has written its own random state
        if self.args.should_save:
            self._name_best_checkpoint(folder)
            self.state.save_to_json(str(unfinished / name / "trainer_state.json"))
            shutil.rmtree(folder / name, ignore_errors=True)  # of an earlier training in this folder
            (unfinished / name).rename(folder / name)
            unfinished.rmdir()
            rotate_checkpoints(
                str(folder), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))

    def _remove(self, folder: Path) -> None:
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)

    def _name_best_checkpoint(self, folder: Path) -> None:
        """Trainer looked for the best checkpoint among the unfinished."""
        if step := self.state.best_global_step:
            best = folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            if best.exists() or step == self.state.global_step:
                self.state.best_model_checkpoint = str(best)

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes `card` as README.md of the output folder, if there is one; else as Trainer."""
        if self.card is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
            Path(self.args.output_dir, "README.md").write_text(self.card, encoding="utf-8")


def training_card(
    title: str, facts: Mapping[str, Any], base_model: str | None = None, is_adapter: bool = False
) -> str:
    """README.md of a fine-tuned model.

    Args:
        title: its first line.
        facts: what it was trained on and how: the rows of a table.
        base_model: id of the model that it started from, if that is on the Hub.
        is_adapter: whether the folder holds an adapter of PEFT and not the whole model.
    """
    library = "peft" if is_adapter else "transformers"
    metadata = [
        f"library_name: {library}",
        "pipeline_tag: image-text-to-text",
        "tags:",
        "- rwkv",
        "- visualrwkv",
    ]
    if base_model:
        metadata.append(f"base_model: {base_model}")
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return "\n".join(
        [
            "---",
            *metadata,
            "---",
            "",
            f"# {title}",
            "",
            "Fine-tuned with `visualrwkv-hf`.",
            "",
            "## Training",
            "",
        ]
        + ["| | |", "|---|---|", rows, ""]
    )


def exit_together() -> None:
    """Ends this process when all of a distributed run are here; does nothing where there is one.

    A process that ends while another still talks to it may make that one abort. And the interpreter's own way out may
    wait forever with gloo: it frees the process group while it holds its lock, and waits for a thread that may need
    the lock to free the tensors of the last collective. So this is the last call of a script: what is registered with
    `atexit` does not run.
    """
    state = PartialState()
    if state.num_processes == 1:
        return
    state.wait_for_everyone()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


__all__ = [
    "TRAINABLE_PARTS",
    "VisualRWKVTrainer",
    "VisualRWKVTrainingArguments",
    "exit_together",
    "learning_rate_at",
    "lora_config",
    "train_only",
    "training_card",
]
