"""transformers' Trainer with the original's recipe, whole checkpoints and losses that the model itself computes."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from ..modeling_base import make_base_paths_absolute
from ..tuned_state import TunedState, attached
from .arguments import VisualRWKVTrainingArguments
from .card import training_card
from .files import UNFINISHED, checkpoints_to_discard, discard, move_into
from .recipe import (
    ORIGINAL_ORDERS,
    TRAINABLE_PARTS,
    OriginalOrder,
    is_matrix,
    learning_rate_at,
    lora_config,
    train_only,
)


class VisualRWKVTrainer(Trainer):
    """Trainer with the original's learning-rate schedule, weight-decay groups and sample order.

    Folders are written under another name and then renamed or moved, so that after a kill or with a full disk every
    `checkpoint-*` is complete and `train(resume_from_checkpoint=True)` continues from the last one. A loss that is
    NaN or infinite ends the training with an error that names the step.

    `label_smoothing_factor` is applied inside the model's loss, where each position is compared with the next token.
    transformers' own Trainer shifts the labels only for classes whose names it knows, and would compare each
    position with itself.

    Attributes:
        card: Text of the model card that `create_model_card` and `push_to_hub` write; None writes Trainer's own.

    Raises:
        TypeError: If the arguments are not [`VisualRWKVTrainingArguments`].
        ValueError: If this process sees several GPUs, if both `compute_loss_func` and `label_smoothing_factor` are
            given, or if the training is in fp16 and the model has L2Wrap.
    """

    card: str | None = None
    args: VisualRWKVTrainingArguments
    lr_scheduler: Any
    _writing_checkpoint = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, VisualRWKVTrainingArguments):
            raise TypeError(
                f"args must be VisualRWKVTrainingArguments, got {type(self.args).__name__}: the schedule and the "
                "order of the samples are read from it."
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"This process sees {self.args.n_gpu} GPUs, and torch's DataParallel would split a batch's pictures "
                "without its texts: start the training with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one of "
                "them."
            )
        if self.args.label_smoothing_factor and self.compute_loss_func is not None:
            raise ValueError(
                f"label_smoothing_factor ({self.args.label_smoothing_factor}) has no effect with compute_loss_func: "
                "smooth the labels in that function, or leave one of the two out."
            )
        self._refuse_l2_wrap_in_fp16()
        self.label_smoother = None  # the model's loss smooths
        make_base_paths_absolute(self.model)
        for theirs, ours in ((PrinterCallback, NumberPrinter), (ProgressCallback, NumberProgress)):
            if any(type(callback) is theirs for callback in self.callback_handler.callbacks):
                self.pop_callback(theirs)
                self.add_callback(ours)

    def _refuse_l2_wrap_in_fp16(self) -> None:
        """Refuse to scale a loss whose L2Wrap adds a gradient of fixed size: unscaling would divide that to nothing."""
        pull = getattr(self.model.config.get_text_config(), "l2_wrap", 0)
        if pull and self.compute_loss_func is None and self.accelerator.mixed_precision == "fp16":
            raise ValueError(
                f"fp16 scales the loss, and L2Wrap ({pull:g}) would have no effect: use bf16, or set "
                "`model.config.get_text_config().l2_wrap = 0`."
            )

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss as Trainer does, with smoothed labels if `label_smoothing_factor` is set."""
        if self.args.label_smoothing_factor and "labels" in inputs:
            inputs = {**inputs, "label_smoothing": self.args.label_smoothing_factor}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, Any]:
        """Evaluate one batch as Trainer does; if only its loss is asked for, compute that in slices.

        The logits are still computed whole if `compute_loss_func` reads them, or if the model's attribute `skip_logits`
        is False.
        """
        reads_logits = self.compute_loss_func is not None or getattr(self.model, "skip_logits", None) is False
        if prediction_loss_only and inputs.get("labels") is not None and not reads_logits:
            inputs = {**inputs, "skip_logits": True}
        return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)

    def _run_epoch(self, *, epoch: int, train_dataloader: Any, **kwargs: Any) -> None:
        """Tell the sampler its epoch, then run the epoch.

        After a resumption in several processes three samplers of batches are nested: one skips what was read, one
        takes this process's share, and the innermost has the sampler, which Trainer and accelerate do not reach there.
        """
        batches: Any = getattr(train_dataloader, "batch_sampler", None)
        while (inner := getattr(batches, "batch_sampler", None)) is not None:
            batches = inner
        samplers: list[Any] = [batches, getattr(batches, "sampler", None)]
        for sampler in samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        super()._run_epoch(epoch=epoch, train_dataloader=train_dataloader, **kwargs)

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        """Return a sampler in the original's order if the arguments ask for it, otherwise Trainer's."""
        repeat = ORIGINAL_ORDERS.get(self.args.train_sampling_strategy)
        if repeat is None:
            return super()._get_train_sampler(train_dataset)
        arguments, data = self.args, self.train_dataset if train_dataset is None else train_dataset
        batch_size = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        return OriginalOrder(len(data), batch_size, repeat)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of the matrices."""
        return [name for name, weight in model.named_parameters() if is_matrix(weight)]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Create the schedule of `learning_rate_at` for all parameter groups, or Trainer's schedule.

        The original forgets to schedule the group with weight decay; here it follows the schedule too.
        """
        arguments = self.args
        final = arguments.learning_rate_final
        if final is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:

            def factor(step: int) -> float:
                rate = learning_rate_at(
                    step,
                    initial=arguments.learning_rate,
                    final=final,
                    total_steps=num_training_steps,
                    warmup_steps=arguments.get_warmup_steps(num_training_steps),
                    accumulation=arguments.gradient_accumulation_steps,
                )
                return rate / arguments.learning_rate

            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        """Run one training step as Trainer does.

        Raises:
            FloatingPointError: If the loss is NaN or infinite.
        """
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss.item()} in step {self.state.global_step + 1} (learning rate "
                f"{self._get_learning_rate():g}). The weights are those of step {self.state.global_step}; the last "
                f"checkpoint is in {self.args.output_dir}."
            )
        return loss

    # Checkpoints and the final model.

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._writing_checkpoint else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push only a checkpoint that has its final name, because the upload runs in the background."""
        if not self._writing_checkpoint:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """Write a checkpoint into `UNFINISHED` and rename it when it is complete."""
        folder = Path(self._get_output_dir(trial))
        unfinished, name = folder / UNFINISHED, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._remove(unfinished)
        self.accelerator.wait_for_everyone()
        self._writing_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:
            self._remove(unfinished)  # if the disk is full, the space is needed
            raise
        finally:
            self._writing_checkpoint = False
        self.accelerator.wait_for_everyone()  # every process has now written its own random state
        if self.args.should_save:
            self._name_best_checkpoint(folder)
            self.state.save_to_json(str(unfinished / name / "trainer_state.json"))
            discard(folder / name)  # left by an earlier training in this folder
            (unfinished / name).rename(folder / name)
            self._discard_beyond_limit(folder)
            self._remove(unfinished)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))

    def _remove(self, folder: Path) -> None:
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)

    def _name_best_checkpoint(self, folder: Path) -> None:
        """Correct the path of the best checkpoint: Trainer looked for it in the folder of unfinished ones."""
        if step := self.state.best_global_step:
            best = folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            if best.exists() or step == self.state.global_step:
                self.state.best_model_checkpoint = str(best)

    def _discard_beyond_limit(self, folder: Path) -> None:
        checkpoints = sort_checkpoints(str(folder), use_mtime=True)
        best = self.state.best_model_checkpoint
        for checkpoint in checkpoints_to_discard(checkpoints, self.args.save_total_limit, best):
            discard(checkpoint)

    def _load_best_model(self) -> None:
        """Load the best checkpoint and, with `save_total_limit=1`, discard the others.

        Trainer would delete them next, file by file, and a kill would leave half of the newest one. Without FSDP and
        DeepSpeed it also looks for a whole model, which is not there with a tuned state or `model.add_adapter`.
        """
        holds_part = attached(self.model) is not None or _has_own_adapters(self.model)
        if holds_part and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()
        if self.args.should_save and self.args.save_total_limit == 1:
            best = Path(self.state.best_model_checkpoint)
            for checkpoint in map(Path, sort_checkpoints(self.args.output_dir)):
                if checkpoint.resolve() != best.resolve():
                    discard(checkpoint)
            self._remove(best.parent / UNFINISHED)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save model and processor; outside of a checkpoint, write all files before the first one is replaced."""
        if self._writing_checkpoint or not self.args.should_save:
            return super()._save(output_dir, state_dict)
        target = Path(output_dir or self.args.output_dir)
        unfinished = target / UNFINISHED
        shutil.rmtree(unfinished, ignore_errors=True)
        super()._save(str(unfinished), state_dict)
        move_into(unfinished, target)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load a checkpoint; Trainer itself loads no tuned state, and no adapters of `model.add_adapter`."""
        loaded = self.model if model is None else model
        if (tuned := attached(loaded)) is not None:
            tuned.load_state_dict(TunedState.from_pretrained(resume_from_checkpoint, loaded).state_dict())
            return
        if not _has_own_adapters(loaded):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        from peft import set_peft_model_state_dict
        from peft.utils import load_peft_weights

        weights = load_peft_weights(resume_from_checkpoint, device="cpu")
        set_peft_model_state_dict(loaded, weights, adapter_name=loaded.active_adapters()[0])  # type: ignore[operator]

    def create_model_card(self, *args, **kwargs) -> None:
        """Write `card` as README.md of the output folder if it is set, otherwise Trainer's card."""
        if self.card is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
            Path(self.args.output_dir, "README.md").write_text(self.card, encoding="utf-8")


def _has_own_adapters(model: nn.Module) -> bool:
    """Return whether adapters were added by `model.add_adapter` or `load_adapter` and not by `get_peft_model`."""
    return bool(getattr(model, "_hf_peft_config_loaded", False)) and hasattr(model, "active_adapters")


def _rounded(logs: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of a log with four significant digits, as numbers."""
    return {
        name: float(f"{value:.4g}") if isinstance(value, float) else value
        for name, value in logs.items()
        if name != "total_flos"
    }


class NumberPrinter(PrinterCallback):
    """Print logs as numbers, where transformers' callback prints strings."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_local_process_zero and logs:
            print(_rounded(logs))


class NumberProgress(ProgressCallback):
    """Show progress bars and write logs above them as numbers, where transformers' callback writes strings."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and logs:
            self.training_bar.write(str(_rounded(logs)))


def exit_together() -> None:
    """End this process once all processes of a distributed run have arrived; do nothing in a run of one process.

    A process that ends while another still communicates with it can make that one abort. The interpreter's normal exit
    can hang with gloo: it frees the process group while it holds the interpreter lock, and waits for a thread that
    may need the lock to free the tensors of the last collective. So call this last in a script: functions registered
    with `atexit` do not run.
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
