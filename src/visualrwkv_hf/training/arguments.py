"""Training arguments: the original's defaults, and refusals of options that would compute a wrong loss."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .recipe import ORIGINAL_ORDERS

SAMPLING_STRATEGIES = ["random", "sequential", "group_by_length", "batch_rebalance", *ORIGINAL_ORDERS]


@dataclass
class VisualRWKVTrainingArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] with the original's AdamW betas and learning-rate schedule.

    The schedule is used if `learning_rate_final` is given. These defaults differ from transformers': `adam_beta2` is
    0.99; no column is removed from a row, because the collator reads them; a NaN loss stays in the log, because it
    ends the training.

    Raises:
        ValueError: If an option would compute the loss in a way that is wrong for this model.
    """

    learning_rate_final: float | None = field(
        default=None,
        metadata={
            "help": "Final learning rate of the original's cosine schedule. The same value as learning_rate keeps "
            "the rate constant. If not given, lr_scheduler_type decides."
        },
    )
    train_sampling_strategy: str = field(
        default="random",
        metadata={
            "help": "Order of the samples. random, sequential, group_by_length and batch_rebalance are the "
            "Trainer's; original (v6.0, v7.00) and original_v7.01 (v7.01 to v7.04) repeat the order in which the "
            "original read its data.",
            "choices": SAMPLING_STRATEGIES,
        },
    )
    adam_beta2: float = field(default=0.99, metadata={"help": "The beta2 of AdamW."})
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Whether to remove the columns that the model does not read."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Whether to leave NaN and infinite losses out of the log."}
    )

    def __post_init__(self):
        if not 0 <= self.label_smoothing_factor < 1:
            raise ValueError(
                f"label_smoothing_factor ({self.label_smoothing_factor}) must be at least 0 and below 1."
            )
        if self.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel: the Liger kernels do not support VisualRWKV. Leave the option out: a step whose "
                "logits would take more than 256 MiB is computed in slices without it."
            )
        super().__post_init__()
        sizes = {
            name: getattr(self.parallelism_config, f"{name}_size", None) or 1 for name in ("cp", "sp", "tp")
        }
        if split := [f"{name}_size={size}" for name, size in sizes.items() if size > 1]:
            raise ValueError(
                f"parallelism_config: {', '.join(split)} would split a sequence or a matrix over several devices, but "
                "an RNN reads a sequence from its start and this model has no tensor-parallel plan. Use data "
                "parallelism (DDP, FSDP or DeepSpeed ZeRO)."
            )


__all__ = ["SAMPLING_STRATEGIES", "VisualRWKVTrainingArguments"]
