"""Fine-tune a VisualRWKV on pictures and conversations, with transformers' Trainer and the original's recipe.

    python examples/finetune.py --model MODEL --data train.json --image-folder pictures --output-dir out --preset stage2

MODEL is a folder or a Hub id. train.json holds LLaVA conversations or chat messages, as JSON or JSON lines. A preset is
a YAML file of options: a name from `examples/presets` or a path. Options on the command line override the preset.
Every field of transformers' TrainingArguments is an option, for example:

    --eval-data val.json --eval-strategy steps --eval-steps 200     evaluate the loss on other data during training
    --resume-from-checkpoint last                                   continue from the newest checkpoint, if there is one
    --bf16 --activation-checkpointing                               compute in bfloat16 and save memory, on a GPU
    --push-to-hub --hub-model-id me/my-model                        upload, with a card that says how it was trained

On several GPUs: `accelerate launch --config_file examples/accelerate/ddp.yaml examples/finetune.py ...`.
"""

import argparse
import hashlib
import shlex
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser, set_seed
from transformers.integrations import is_tensorboard_available
from transformers.trainer_utils import HubStrategy, get_last_checkpoint

from visualrwkv_hf import (
    TunedState,
    VisualRWKVDataCollator,
    VisualRWKVTrainer,
    VisualRWKVTrainingArguments,
    load_conversations,
    lora_config,
    train_only,
)
from visualrwkv_hf.training import exit_together, training_card

PRESETS = Path(__file__).parent / "presets"


def described(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class FinetuneArguments:
    """Which model and parts are trained, and on which data."""

    model: str = field(metadata=described("Folder or Hub id of the model to start from."))
    data: str = field(metadata=described("File of LLaVA conversations or chat messages, .json or .jsonl."))
    image_folder: str | None = field(
        default=None,
        metadata=described("Folder that relative picture paths start from. Default: the folder of the data."),
    )
    eval_data: str | None = field(
        default=None,
        metadata=described("Data to evaluate on, once at the end unless --eval-strategy says otherwise."),
    )
    preset: str | None = field(
        default=None,
        metadata=described("stage1, stage2, lora, state, or the path of a YAML file of options."),
    )
    train: list[str] = field(
        default_factory=lambda: ["projector", "language_model"],
        metadata=described("Parts to train: projector, language_model, embeddings, vision_tower."),
    )
    prompt_format: str | None = field(
        default=None,
        metadata=described("Release whose prompt format to use, for example v6.0. Default: the model's."),
    )
    max_length: int | None = field(
        default=None,
        metadata=described("Maximum number of tokens in a sequence, pictures included. Longer text is cut."),
    )
    on_bad_sample: Literal["raise", "skip"] = field(
        default="raise",
        metadata=described(
            "Whether a sample that cannot be read ends the training or is skipped with a warning."
        ),
    )
    padding_free: bool = field(
        default=False,
        metadata=described(
            "Pack the samples of a batch into one row instead of padding them: the same gradients in less time."
        ),
    )
    loss_reduction: Literal["sample", "token"] | None = field(
        default=None,
        metadata=described(
            "Average the loss within each sample first, or over all tokens. Default: the model's setting."
        ),
    )
    dtype: str = field(
        default="float32",
        metadata=described(
            "Data type of the weights. Use --bf16 to compute in bfloat16 with float32 weights."
        ),
    )
    lora: bool = field(
        default=False, metadata=described("Train LoRA adapters in the language model (requires peft).")
    )
    lora_r: int = field(default=16, metadata=described("Rank of the adapters."))
    lora_alpha: int = field(
        default=32, metadata=described("Scale: the adapters' output is multiplied by alpha / r.")
    )
    lora_dropout: float = field(
        default=0.0, metadata=described("Dropout probability of the adapters' input.")
    )
    merge_lora: bool = field(
        default=False,
        metadata=described("Merge the adapters into the weights and save the whole model."),
    )
    tuned_state: bool = field(
        default=False,
        metadata=described("Train the state from which the model begins to read, and nothing else."),
    )
    tuned_layers: list[int] | None = field(
        default=None,
        metadata=described("Numbers of the layers whose states --tuned-state trains. Default: all."),
    )


def parse(arguments: list[str]) -> tuple[FinetuneArguments, VisualRWKVTrainingArguments]:
    """Parse the command line. An option that it does not give comes from the preset, or else is the default."""
    parser = HfArgumentParser((FinetuneArguments, VisualRWKVTrainingArguments), description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(report_to="tensorboard" if is_tensorboard_available() else "none")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    if preset := first.parse_known_args(arguments)[0].preset:
        options = read_preset(preset)
        if unknown := set(options) - {action.dest for action in parser._actions}:
            parser.error(f"{preset} has unknown options: {', '.join(sorted(unknown))}.")
        parser.set_defaults(**options)
        for action in parser._actions:
            action.required = action.required and action.dest not in options
    try:
        options, training = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    except ValueError as refusal:  # by the training arguments
        parser.error(str(refusal))
    if options.tuned_state and options.lora:
        parser.error("--tuned-state trains nothing else: leave --lora out.")
    if options.lora and not {"language_model"} <= set(options.train) <= {"language_model", "projector"}:
        parser.error(
            "--lora adapts the language_model and can train the projector: --train can name these alone."
        )
    if options.merge_lora and not options.lora:
        parser.error("--merge-lora merges adapters: it needs --lora, or a preset that has it.")
    adapter_options = ("lora_r", "lora_alpha", "lora_dropout")
    changed = [name for name in adapter_options if getattr(options, name) != getattr(FinetuneArguments, name)]
    if changed and not options.lora:
        option = f"--{changed[0].replace('_', '-')}"
        parser.error(f"{option} describes adapters: it needs --lora, or a preset that has it.")
    if options.tuned_layers is not None and not options.tuned_state:
        parser.error("--tuned-layers are those of --tuned-state: give both.")
    if options.merge_lora:  # what is pushed before the end would hold the adapter without the model
        training.hub_strategy = HubStrategy.END
    if options.tuned_state and options.padding_free:
        parser.error("Packed samples cannot begin with a tuned state: leave --padding-free out.")
    return options, training


def read_preset(name: str) -> dict:
    """Read the options of a preset. Older versions of transformers have the old name of activation checkpointing."""
    named = PRESETS / f"{name}.yaml"
    options = yaml.safe_load((named if named.exists() else Path(name)).read_text(encoding="utf-8"))
    known = {option.name for option in fields(VisualRWKVTrainingArguments)}
    if "activation_checkpointing" in options and "activation_checkpointing" not in known:
        options["gradient_checkpointing"] = options.pop("activation_checkpointing")
    return options


def load_model(options: FinetuneArguments) -> torch.nn.Module:
    """Load the model, freeze the parts that are not trained, and add adapters or a tuned state if asked to."""
    model = AutoModelForImageTextToText.from_pretrained(
        options.model, dtype=options.dtype, trust_remote_code=False
    )
    if options.loss_reduction:
        model.config.text_config.loss_reduction = options.loss_reduction
    train_only(model, options.train)
    if options.tuned_state:
        TunedState.attach(model, layers=options.tuned_layers)
    if options.lora:
        from peft import get_peft_model

        adapters = lora_config(
            train_projector="projector" in options.train,
            r=options.lora_r,
            lora_alpha=options.lora_alpha,
            lora_dropout=options.lora_dropout,
        )
        model = get_peft_model(model, adapters)
    return model


def card_of(options: FinetuneArguments, trainer: VisualRWKVTrainer) -> str:
    """Return the model card: what the model was trained on and how."""
    arguments, data = trainer.args, Path(options.data)
    facts = {
        "data": f"`{data.name}`, sha256 `{hashlib.sha256(data.read_bytes()).hexdigest()}`",
        "samples": len(trainer.train_dataset),
        "preset": options.preset or "none",
        "trained parts": trained_parts(options),
        "epochs": f"{trainer.state.epoch:.2f}",
        "steps": trainer.state.global_step,
        "batch": arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size,
        "learning rate": f"{arguments.learning_rate:g} to {arguments.learning_rate_final}",
        "seed": arguments.seed,
    }
    facts |= {name: f"{value:.4f}" for name, value in last_losses(trainer.state.log_history).items()}
    title = (arguments.hub_model_id or Path(arguments.output_dir).absolute().name).split("/")[-1]
    return training_card(
        title,
        facts,
        base_model=options.model,
        kind=kind_of_result(options),
    )


def kind_of_result(options: FinetuneArguments) -> Literal["model", "adapter", "tuned state"]:
    """Return what the output folder holds."""
    if options.tuned_state:
        return "tuned state"
    return "adapter" if options.lora and not options.merge_lora else "model"


def next_command(options: FinetuneArguments, output_dir: str) -> str:
    """Return what to type next."""
    kind, folder = kind_of_result(options), shlex.quote(output_dir)
    if kind == "adapter":
        return f"python {Path(__file__).with_name('merge_adapter.py')} {folder} {shlex.quote(output_dir + '-merged')}"
    if kind == "tuned state":
        folder = f"{shlex.quote(options.model)} --tuned-state {folder}"
    return f'visualrwkv ask --model {folder} PICTURE "What is in the picture?"'


def trained_parts(options: FinetuneArguments) -> str:
    """Return which parts were trained, as the model card names them."""
    if options.tuned_state:
        layers = "all layers" if options.tuned_layers is None else f"layers {options.tuned_layers}"
        return f"the initial state of {layers}"
    return ", ".join(options.train) + (f" (LoRA, rank {options.lora_r})" if options.lora else "")


def last_losses(log: list[dict]) -> dict[str, float]:
    names = {"loss": "last training loss", "eval_loss": "last evaluation loss"}
    return {names[key]: entry[key] for entry in log for key in names if key in entry}


def main(command_line: list[str]) -> None:
    options, arguments = parse(command_line)
    set_seed(arguments.seed)  # adapters are random
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=False)
    collator = VisualRWKVDataCollator(
        processor,
        prompt_format=options.prompt_format,
        max_length=options.max_length,
        on_bad_sample=options.on_bad_sample,
        picture_in_every_batch=True,
        padding_free=options.padding_free,
    )
    trainer = VisualRWKVTrainer(
        load_model(options),
        arguments,
        train_dataset=load_conversations(options.data, options.image_folder),
        eval_dataset=load_conversations(options.eval_data, options.image_folder)
        if options.eval_data
        else None,
        data_collator=collator,
        processing_class=processor,
    )
    resume = arguments.resume_from_checkpoint
    if resume == "last":
        folder = Path(arguments.output_dir)
        resume = get_last_checkpoint(str(folder)) if folder.exists() else None
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(_internal_call=True)  # before the evaluation, which may fail; nothing is pushed yet
    if options.eval_data and arguments.eval_strategy == "no":
        trainer.log_metrics("eval", trainer.evaluate())
    if options.merge_lora and options.lora:
        trainer.model = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        trainer.save_model(_internal_call=True)
    trainer.card = card_of(options, trainer)
    trainer.save_state()
    if arguments.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card()
        if trainer.is_world_process_zero():
            print(f"Next: {next_command(options, arguments.output_dir)}", file=sys.stderr)
    exit_together()


if __name__ == "__main__":
    main(sys.argv[1:])
