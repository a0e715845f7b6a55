"""Train the model inside the package from scratch, on pictures that are drawn or come from package registries.

    pip install easy-vqa scikit-learn scikit-image matplotlib      # and npm, which downloads fonts, words and emoji
    torchrun --nproc-per-node 2 examples/train_tiny.py --output-dir tiny

The model is an RWKV-7 with the sandwich prompt and a ResNet as its vision tower; optimizer and stages are the
recipe's. Nothing is pretrained, so the first stages train everything including the vision tower: first letters, then
words, then all tasks. The last stage is the paper's second one: the tower is frozen, language model and projector are
trained. Run the same command again to resume a training that was stopped. Then the model is examined as by
`evaluate_tiny.py`, and its card is written. On one machine a seed and a number of processes determine the model: batch
norms see the half of a batch that their process has. Two processes use two cores better than one process with two
threads; plain `python` starts one process. Batches are packed, so their sizes vary, and the C library of Linux then
spends time on finding memory: with LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libtcmalloc.so.4 (Debian:
libgoogle-perftools4) a step took 0.80 s in place of 1.24 s.
"""

import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer
from accelerate import PartialState
from benchmarking import markdown_table
from evaluate_tiny import accuracy, scores
from tiny_card import model_card
from tiny_data import Exam, Lessons, Question, Task, all_wording, conversation
from tiny_optimizer import MuonAndAdamW
from tiny_packages import fonts, words
from tiny_signs import LONGEST_WORD, reading_task
from tiny_stages import (
    BATCH,
    MUON_FACTOR,
    POSTERS_REFUSED,
    READING_LEVELS,
    STAGES,
    WARM_UP,
    WEIGHT_DECAY,
    Stage,
    computes_in_bfloat16,
    shares_of,
)
from tiny_tasks import all_tasks, of_one_kind
from tiny_unknown import refusals_task
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import GenerationConfig, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from visualrwkv_hf import (
    VisualRWKVConfig,
    VisualRWKVDataCollator,
    VisualRWKVForConditionalGeneration,
    VisualRWKVProcessor,
    VisualRWKVTrainer,
    VisualRWKVTrainingArguments,
    kernel_backend,
    train_only,
)
from visualrwkv_hf.conversion.world_tokenizer import build_world_tokenizer, load_world_vocabulary
from visualrwkv_hf.cpu import build_native_ops
from visualrwkv_hf.image_processing_visualrwkv import image_processor_for
from visualrwkv_hf.processing_visualrwkv import TURN_END
from visualrwkv_hf.training import PROMPT_FORMATS, encode_turns, exit_together

EMBEDDING_STD, OUTPUT_STD = 0.3, 0.05
"""Initial standard deviations that replace RWKV's; see [`open_up`]."""

CHECKPOINT_STEPS, REHEARSAL_STEPS = 500, 2000
SCAN = "multidirectional"
IMAGE_SIZE = 128
TOWER = dict(
    embedding_size=32,
    hidden_sizes=[32, 80, 160],
    depths=[1, 2, 2],
    layer_type="basic",
    image_size=IMAGE_SIZE,
)
"""A ResNet whose map has 8 x 8 patches. Trained from scratch, a vision transformer does not learn letters in this time:
what it learns of a letter in one place it does not know in another."""

LANGUAGE_MODEL = dict(
    rwkv_version=7,
    hidden_size=128,
    num_hidden_layers=3,
    head_dim=32,
    decay_low_rank_dim=32,
    a_low_rank_dim=32,
    v_low_rank_dim=32,
    gate_low_rank_dim=32,
)


# The model.


def cut_vocabulary(questions: Iterable[Question]) -> dict[bytes, int]:
    """Return the tokens of the World vocabulary that training samples are made of, and all single bytes, ids from 1 on.

    Text is cut as the whole vocabulary cuts it: what is the longest match there is the longest here.
    """
    whole, tokenizer = load_world_vocabulary(), build_world_tokenizer()
    wanted = {number for token, number in whole.items() if len(token) == 1}
    for question in questions:
        turns = encode_turns(tokenizer, conversation([question]), prompt_format("middle"), 1)
        wanted.update(number for _, ids in turns for number in ids)
    kept = sorted((number, token) for token, number in whole.items() if number in wanted)
    return {token: position + 1 for position, (_, token) in enumerate(kept)}


def prompt_format(image_position: str):
    """Return how training text is written: as the chat template does, with the turn's own question in the sandwich."""
    return replace(PROMPT_FORMATS["v7.00"], image_position=image_position, sandwich="turn")


def fresh_model(
    vocabulary: dict[bytes, int], tower: dict, language_model: dict, **fields: Any
) -> tuple[VisualRWKVForConditionalGeneration, VisualRWKVProcessor]:
    """Return an untrained model and its processor; `fields` of [`VisualRWKVConfig`]."""
    vocab_size = len(vocabulary) + 2  # the end of text comes first, the picture last
    config = VisualRWKVConfig(
        text_config={**language_model, "vocab_size": vocab_size},
        vision_config={"resnet_config": tower},
        image_token_id=vocab_size - 1,
        **fields,
    )
    tokenizer = build_world_tokenizer(vocabulary, vocab_size)
    (turn_end,) = tokenizer.encode(TURN_END)
    model = VisualRWKVForConditionalGeneration(config)
    open_up(model)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=[0, turn_end], pad_token_id=0)
    return model, VisualRWKVProcessor.from_config(config, image_processor_for(config), tokenizer)


@torch.no_grad()
def open_up(model: VisualRWKVForConditionalGeneration) -> None:
    """Let gradients reach the tower from the first step on.

    RWKV's initialisation is made for long trainings. Its embeddings of 1e-4 in front of a norm have 300 times the
    gradient of all else, and clipping leaves the rest next to nothing; what its blocks add is zero, so that a picture's
    tokens have no gradient at first.
    """
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=EMBEDDING_STD)
    for block in model.model.language_model.layers:
        for matrix in (block.att.output, block.ffn.value):
            torch.nn.init.normal_(matrix.weight, std=OUTPUT_STD)


# Training.


class Progress(TrainerCallback):
    """Ask about a few pictures as they are trained on, and print how many answers are right."""

    def __init__(
        self, processor: VisualRWKVProcessor, tasks: Sequence[Task], every: int, questions: int = 100
    ):
        self.processor, self.every = processor, every
        self.exams = {task.name: rehearsal(task, questions) for task in tasks}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            scores = {name: accuracy(model, self.processor, exams) for name, exams in self.exams.items()}
            model.train()
            found = ", ".join(f"{name} {100 * score:.0f} %" for name, score in scores.items())
            if state.is_world_process_zero:
                tqdm.write(f"step {state.global_step}: {found}")


def rehearsal(task: Task, questions: int) -> list[Exam]:
    """Return open questions about pictures as the training has them, the same ones each time."""
    exams = []
    for number in range(questions):
        random = Random(f"rehearsal {number}")
        lesson = task.lesson(random)
        if lesson.main:
            exams.append(Exam(lesson.pictures, random.choice(lesson.main)))
    return exams


class Clock(TrainerCallback):
    """Stores the training time up to the last checkpoint, so that a resumed run adds to it."""

    def __init__(self, file: Path):
        self.file = file
        self.begin = time.monotonic() - (float(file.read_text()) if file.exists() else 0)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begin

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.file.write_text(f"{self.seconds:.0f}")


def train_stage(
    model: VisualRWKVForConditionalGeneration,
    processor: VisualRWKVProcessor,
    stage: Stage,
    data: Dataset,
    seed: int,
    output_dir: Path,
    callbacks: Sequence[TrainerCallback] = (),
    **options: Any,
) -> None:
    """Train the stage's parts, resuming from the last checkpoint in `output_dir` if there is one.

    `options` are of [`VisualRWKVTrainingArguments`].
    """
    train_only(model, stage.trained)
    processes = PartialState(cpu=True).num_processes
    arguments = VisualRWKVTrainingArguments(
        output_dir=str(output_dir),
        max_steps=stage.steps,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        learning_rate=stage.learning_rate,
        learning_rate_final=stage.final_learning_rate,
        warmup_steps=min(WARM_UP, stage.steps // 10),
        seed=seed,
        use_cpu=True,
        bf16=computes_in_bfloat16(),
        save_steps=CHECKPOINT_STEPS,
        save_total_limit=1,
        **{
            "per_device_train_batch_size": BATCH // processes,
            "logging_steps": 50,
            "report_to": "none",
            **options,
        },
    )
    rates = (stage.learning_rate, MUON_FACTOR * stage.learning_rate)
    trainer = VisualRWKVTrainer(
        model=model,
        args=arguments,
        optimizers=(MuonAndAdamW(model.named_parameters(), *rates, WEIGHT_DECAY), None),
        train_dataset=data,
        data_collator=VisualRWKVDataCollator(
            processor, prompt_format(model.config.image_position), padding_free=True
        ),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(output_dir) if output_dir.is_dir() else None)


def lessons(tasks: dict[str, Task], stage: Stage, rows: range, seed: int) -> Lessons:
    """Return the samples of a stage."""
    chosen = [tasks[name] for name in stage.shares]
    return Lessons(chosen, list(stage.shares.values()), rows, stage.main, stage.others, seed)


def train(
    model: VisualRWKVForConditionalGeneration,
    processor: VisualRWKVProcessor,
    tasks: dict[str, Task],
    stages: Sequence[Stage],
    seed: int,
    folder: Path,
) -> float:
    """Run all stages, each on samples of its own; those whose result is in `folder` already are not run again.

    Returns:
        The minutes that it took in all, from the first step on, whether it was stopped in between or not.
    """
    first, clock = 0, Clock(folder / "seconds")
    for number, stage in enumerate(stages, 1):
        rows = range(first, first + stage.steps * BATCH)
        first = rows.stop
        place = folder / f"stage-{number}"
        result = place / "weights.pt"
        if not result.exists():
            PartialState().print(f"Stage {number}: {stage.steps} steps; {shares_of(stage)}.", flush=True)
            progress = Progress(processor, [tasks[name] for name in stage.shares], every=REHEARSAL_STEPS)
            data = lessons(tasks, stage, rows, seed)
            train_stage(model, processor, stage, data, seed, place, [progress, clock])
            if PartialState().is_main_process:
                torch.save(model.state_dict(), result.with_suffix(".unfinished"))
                result.with_suffix(".unfinished").rename(result)
            PartialState().wait_for_everyone()
        model.load_state_dict(torch.load(result, weights_only=True))
    return clock.seconds / 60


# The command.


def main(
    output_dir: Annotated[Path, typer.Option(help="Folder for the model.")] = Path("tiny"),
    data_dir: Annotated[Path, typer.Option(help="Folder for fonts, words and emoji.")] = Path("tiny-data"),
    work_dir: Annotated[Path, typer.Option(help="Folder for what an interrupted training needs.")] = Path(
        "tiny-training"
    ),
    scale: Annotated[float, typer.Option(min=0.0, help="Share of each stage's steps.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed for the initial weights and the samples.")] = 0,
    validation: Annotated[
        bool,
        typer.Option(
            help="Hold out a part of the training's pictures, fonts and words, and examine on those, for choosing "
            "settings."
        ),
    ] = False,
    without_code: Annotated[bool, typer.Option(help="Do not save a copy of the package's code.")] = False,
) -> None:
    state = PartialState(cpu=True)
    settings = {"scale": scale, "seed": seed, "validation": validation, "processes": state.num_processes}
    refuse_other_settings(work_dir, settings)
    backend = "native"
    with state.main_process_first():
        try:
            build_native_ops()
        except RuntimeError as error:
            print(f"{error} Training uses plain torch, which is several times slower.", file=sys.stderr)
            backend = "torch"
        tasks = all_tasks(data_dir, validation)
        files, known_words = fonts(data_dir, validation), words(data_dir, LONGEST_WORD, validation)
    stages = [stage._replace(steps=max(1, round(scale * stage.steps))) for stage in STAGES]
    untested = {
        name: replace(reading_task(files, known_words, *level), name=name)
        for name, level in READING_LEVELS.items()
    }
    pictured = [*of_one_kind(tasks.values()), *[tasks["posters"]] * POSTERS_REFUSED]
    untested["refusals"] = refusals_task(pictured, known_words.train)
    with kernel_backend(backend):
        set_seed(seed)
        model, processor = fresh_model(
            cut_vocabulary(all_wording(tasks.values())),
            TOWER,
            LANGUAGE_MODEL,
            scan=SCAN,
            image_position="middle",
        )
        minutes = train(model, processor, tasks | untested, stages, seed, work_dir)
        with state.main_process_first():
            if state.is_main_process:
                save(model, processor, output_dir, without_code)
        shipped = VisualRWKVForConditionalGeneration.from_pretrained(output_dir, dtype="auto")
        examination = markdown_table(scores(shipped, processor, list(tasks.values()), 10_000, seed))
    if state.is_main_process:
        print(examination)
        command = " ".join([launcher(state.num_processes), "examples/train_tiny.py", *sys.argv[1:]])
        card = model_card(shipped, list(tasks.values()), stages, examination, command, seed, minutes)
        (output_dir / "README.md").write_text(card, encoding="utf-8")
    exit_together()


def refuse_other_settings(folder: Path, settings: dict[str, Any], option: str = "--work-dir") -> None:
    """Exit if a training with other settings was begun in the folder, whose results would be taken for this one's.

    `option` is the one that names the folder.
    """
    file = folder / "settings.json"
    with PartialState().main_process_first():
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(settings), encoding="utf-8")
    begun = json.loads(file.read_text(encoding="utf-8"))
    if begun != settings:
        sys.exit(f"{folder} holds a training with {begun}, not with {settings}. Choose another {option}.")


def launcher(processes: int) -> str:
    return "python" if processes == 1 else f"torchrun --nproc-per-node {processes}"


def save(model, processor: VisualRWKVProcessor, folder: Path, without_code: bool) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    if without_code:
        remove_code(folder)


def remove_code(folder: Path) -> None:
    """Leave out what a folder needs where the package is not installed; a model's classes are still named, for TRL."""
    for file in folder.glob("*.py"):
        file.unlink()
    for file in folder.glob("*.json"):
        fields = json.loads(file.read_text(encoding="utf-8"))
        if file.name != "config.json" and fields.pop("auto_map", None):
            file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
