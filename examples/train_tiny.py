"""Train the model inside the package from scratch, on pictures that come from package registries.

    pip install easy-vqa scikit-learn      # npm is needed too: it downloads the emoji
    torchrun --nproc-per-node 2 examples/train_tiny.py --output-dir tiny

The model is an RWKV-7 with the sandwich prompt and a bidirectional scan; optimizer and stages are the recipe's.
Nothing is pretrained, so the first stage, in three parts, trains everything including the vision tower. The last stage
is the paper's second one: the tower is frozen, language model and projector are trained. Then the model answers all
held-out questions, and again with the pictures shuffled among the questions, and the model card is written. On one
machine a seed determines the model. Two processes with half of each batch use two cores better than one process with
two threads; plain `python` starts one process.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tiny_data import (
    WHAT,
    Exam,
    Lessons,
    Question,
    Task,
    all_questions,
    conversation,
    digits_task,
    easy_vqa_task,
    emoji_archive,
    emoji_task,
)
from tqdm import tqdm
from transformers import GenerationConfig, TrainerCallback, set_seed

from visualrwkv_hf import (
    TunedState,
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
from visualrwkv_hf.training import PROMPT_FORMATS, TRAINABLE_PARTS, encode_turns, exit_together

CARD, ABLATION = (Path(__file__).with_name(name) for name in ("tiny_card.md", "tiny_ablation.md"))
BATCH = 32
EMBEDDING_STD, OUTPUT_STD, POSITION_AMPLITUDE = 0.3, 0.05, 0.5
"""Layers whose initial weights are not the usual ones; see [`open_up`]."""

POOLED_GRID = 4
"""Side of the grid of a picture's tokens."""

TARGETS = {"easy-VQA": 0.97, "digits": 0.95, "emoji": 0.55}


class Stage(NamedTuple):
    """A part of the training: a short warm-up, then a cosine from one learning rate to the other."""

    steps: int
    learning_rate: float
    final_learning_rate: float
    trained: tuple[str, ...]  # names in `TRAINABLE_PARTS`
    turns: int  # questions about a picture in a sample
    shares: dict[str, float]  # of the samples, by task


ALL_PARTS, ALL_BUT_TOWER = tuple(TRAINABLE_PARTS), ("projector", "embeddings", "language_model")

STAGES = (
    Stage(5200, 8e-4, 5e-5, ALL_PARTS, 1, {"easy-VQA": 0.4, "digits": 0.2, "emoji": 0.4}),
    Stage(1600, 3e-4, 3e-5, ALL_PARTS, 1, {"easy-VQA": 0.4, "digits": 0.1, "emoji": 0.5}),
    Stage(1000, 3e-4, 2e-5, ALL_PARTS, 1, {"easy-VQA": 0.6, "digits": 0.1, "emoji": 0.3}),
    Stage(1100, 5e-4, 1e-5, ALL_BUT_TOWER, 4, {"easy-VQA": 0.6, "digits": 0.15, "emoji": 0.25}),
)
"""The first three teach to see, with open questions alone: their answers are names and tell most about a picture. The
second and third are for what is not learned well by then, emoji and then shapes. The last teaches to answer all kinds
of questions, several about one picture, with the vision tower frozen as in the paper."""

WARM_UP = 100
WEIGHT_DECAY = 0.05
"""Weight decay of the matrices. The original has none, but trains no vision tower on a few thousand pictures."""

TOWER = dict(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=64,
    patch_size=8,
)
LANGUAGE_MODEL = dict(
    rwkv_version=7,
    hidden_size=128,
    num_hidden_layers=3,
    head_dim=64,
    decay_low_rank_dim=32,
    a_low_rank_dim=32,
    v_low_rank_dim=32,
    gate_low_rank_dim=32,
)


# The model.


def cut_vocabulary(questions: Iterable[Question]) -> dict[bytes, int]:
    """The tokens of the World vocabulary that training samples are made of, and all single bytes, ids from 1 on.

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
    """Training text as the chat template writes it: the sandwich repeats the turn's own question."""
    return replace(PROMPT_FORMATS["v7.00"], image_position=image_position, sandwich="turn")


def fresh_model(
    vocabulary: dict[bytes, int], tower: dict, language_model: dict, **fields: Any
) -> tuple[VisualRWKVForConditionalGeneration, VisualRWKVProcessor]:
    """An untrained model and its processor; `fields` of [`VisualRWKVConfig`]."""
    vocab_size = len(vocabulary) + 2  # the end of text comes first, the picture last
    config = VisualRWKVConfig(
        text_config={**language_model, "vocab_size": vocab_size},
        vision_config={"siglip_config": tower},
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
    """Let gradients reach the tower from the first step on, and let the tower see positions.

    RWKV's initialisation is made for long trainings. Its embeddings of 1e-4 in front of a norm have 300 times the
    gradient of all else, and clipping leaves the rest next to nothing; what its blocks add is zero, so that a picture's
    tokens have no gradient at first. SigLIP's positions are random and a tenth of what its patches weigh.
    """
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=EMBEDDING_STD)
    for block in model.model.language_model.layers:
        for matrix in (block.att.output, block.ffn.value):
            torch.nn.init.normal_(matrix.weight, std=OUTPUT_STD)
    position = model.model.vision_tower.siglip.embeddings.position_embedding.weight
    position.copy_(POSITION_AMPLITUDE * waves(math.isqrt(len(position)), position.shape[1]))


def waves(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of row and column, [side * side, width], wave lengths from 2 to 6 `side`."""
    frequencies = math.pi * (3 * side) ** -torch.linspace(0, 1, width // 4)
    angles = torch.arange(side)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    rows, columns = line[:, None].expand(-1, side, -1), line.expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


# Training.


class Progress(TrainerCallback):
    """Asks about a few of the pictures trained on, and prints how many answers are right."""

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
    """Open questions about varied pictures of the training, the same ones each time."""
    random = Random(0)
    subjects = random.choices([subject for subject in task.train if subject.main], k=questions)
    return [
        Exam(task.vary(random.choice(subject.pictures), random), random.choice(subject.main))
        for subject in subjects
    ]


def sample_of(exams: Sequence[Exam], most: int) -> list[Exam]:
    """At most `most` of the exams, the same ones each time."""
    return Random(0).sample(list(exams), min(most, len(exams)))


def train_stage(
    model: VisualRWKVForConditionalGeneration,
    processor: VisualRWKVProcessor,
    stage: Stage,
    data: Lessons,
    seed: int,
    output_dir: Path,
    callbacks: Sequence[TrainerCallback] = (),
    **options: Any,
) -> None:
    """Trains what the stage trains. `options` of [`VisualRWKVTrainingArguments`]."""
    train_only(model, stage.trained)
    processes = PartialState(cpu=True).num_processes
    arguments = VisualRWKVTrainingArguments(
        output_dir=str(output_dir),
        max_steps=stage.steps,
        per_device_train_batch_size=BATCH // processes,
        ddp_find_unused_parameters=False,
        learning_rate=stage.learning_rate,
        learning_rate_final=stage.final_learning_rate,
        warmup_steps=min(WARM_UP, stage.steps // 10),
        seed=seed,
        use_cpu=True,
        weight_decay=WEIGHT_DECAY,
        **{"logging_steps": 50, "report_to": "none", "save_strategy": "no", **options},
    )
    trainer = VisualRWKVTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=VisualRWKVDataCollator(processor, prompt_format(model.config.image_position)),
        callbacks=list(callbacks),
    )
    trainer.train()


# Examination.


@torch.no_grad()
def answers(
    model,
    processor: VisualRWKVProcessor,
    exams: Sequence[Exam],
    batch: int = 64,
    initial_state: TunedState | Sequence[TunedState | None] | None = None,
) -> list[str]:
    """Return the model's greedy answers, each question asked by itself; `initial_state` is for all or for each."""
    model.eval()
    texts = {exam.question.text: prompt(processor, exam.question.text) for exam in exams}
    order = sorted(range(len(exams)), key=lambda i: len(texts[exams[i].question.text]))
    found = [""] * len(exams)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = processor(
            text=[texts[exams[i].question.text] for i in chosen],
            images=[[exams[i].picture] for i in chosen],
            padding=True,
            return_tensors="pt",
        )
        states = [initial_state[i] for i in chosen] if isinstance(initial_state, Sequence) else initial_state
        output = model.generate(
            **inputs.to(model.device, dtype=model.dtype),
            max_new_tokens=12,
            do_sample=False,
            initial_state=states,
        )
        decoded = processor.post_process_image_text_to_text(
            output, prompt_length=inputs["input_ids"].shape[1]
        )
        for i, text in zip(chosen, decoded):
            found[i] = text
    return found


def prompt(processor: VisualRWKVProcessor, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def accuracy(model, processor: VisualRWKVProcessor, exams: Sequence[Exam]) -> float:
    """The share of exact answers; every process asks some of the questions."""
    state = PartialState(cpu=True)
    mine = exams[state.process_index :: state.num_processes]
    found = answers(model, processor, mine)
    right = [text == exam.question.answer for text, exam in zip(found, mine)]
    return statistics.fmean(gather_object(right))


def shuffled(exams: Sequence[Exam], seed: int) -> list[Exam]:
    """Each question with the picture of another, drawn at random."""
    pictures = [exam.picture for exam in exams]
    Random(seed).shuffle(pictures)
    return [Exam(picture, exam.question) for picture, exam in zip(pictures, exams)]


def most_frequent(task: Task) -> float:
    """The accuracy of the one answer that is right most often in the test."""
    counts = Counter(exam.question.answer for exam in task.test)
    return max(counts.values()) / len(task.test)


def questions_alone(task: Task) -> tuple[float, float]:
    """Score answers that ignore the picture: the best guess for each question, and the answer of another picture."""
    by_text = defaultdict(Counter)
    for exam in task.test:
        by_text[exam.question.text][exam.question.answer] += 1
    best = sum(max(counts.values()) for counts in by_text.values())
    drawn = sum(sum(n * n for n in counts.values()) / counts.total() for counts in by_text.values())
    return best / len(task.test), drawn / len(task.test)


def report(model, processor: VisualRWKVProcessor, tasks: Sequence[Task], seed: int) -> str:
    """All held-out questions, with their pictures and with shuffled ones, as a Markdown table."""
    rows = [
        "| held out | questions | accuracy | pictures shuffled | another picture's answer | best guess per question "
        "| most frequent answer | target |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task in tqdm(tasks, desc="examination", disable=None if PartialState().is_main_process else True):
        looking = accuracy(model, processor, task.test)
        control = accuracy(model, processor, shuffled(task.test, seed))
        guess, other = questions_alone(task)
        shares = (looking, control, other, guess, most_frequent(task), TARGETS[task.name])
        cells = " | ".join(f"{100 * share:.1f} %" for share in shares)
        rows.append(f"| {task.name} | {len(task.test)} | {cells} |")
    return "\n".join(rows)


def model_card(
    model,
    tasks: Sequence[Task],
    stages: Sequence[Stage],
    scores: str,
    command: str,
    seed: int,
    minutes: float,
) -> str:
    """The card, from the template beside this file; `minutes` is how long all of it took."""
    parameters = sum(weight.numel() for weight in model.parameters())
    data = "\n".join(
        f"| {task.name} | {task.source} | {len(task.train)} | `{task.sha256}` |" for task in tasks
    )
    recipe = "\n".join(
        f"| {number} | {stage.steps} | {BATCH} | {stage.learning_rate:g} to {stage.final_learning_rate:g} | "
        f"{shares_of(stage)} | {stage.turns} | {', '.join(stage.trained)} |"
        for number, stage in enumerate(stages, 1)
    )
    return CARD.read_text(encoding="utf-8").format(
        parameters=f"{parameters:,}",
        megabytes=f"{2 * parameters / 1e6:.1f}",
        scores=scores,
        data=data,
        recipe=recipe,
        command=command,
        weight_decay=WEIGHT_DECAY,
        seed=seed,
        minutes=f"{minutes:.0f}",
        processes=PartialState().num_processes,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )


def shares_of(stage: Stage) -> str:
    """The tasks' shares of the samples, in percent."""
    return ", ".join(f"{task} {100 * share:.0f}" for task, share in stage.shares.items())


# The ablation bench.

VARIANTS: dict[str, dict[str, Any]] = {
    "RWKV-7, sandwich, bidirectional": {},
    "scan: unidirectional": {"scan": "unidirectional"},
    "scan: multidirectional": {"scan": "multidirectional"},
    "scan: snake": {"scan": "snake"},
    "prompt: picture first": {"image_position": "first"},
    "prompt: picture last": {"image_position": "last"},
    "generation: RWKV-6": {"rwkv_version": 6},
    "generation: RWKV-5": {"rwkv_version": 5},
}
"""The changes to the first row, one at a time."""

SMALL_TOWER = dict(TOWER, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2)
SMALL_TOWER |= {"patch_size": 16}
"""So small that the language model has to bring its 16 patches together."""

SMALL_LANGUAGE_MODEL = dict(hidden_size=64, num_hidden_layers=4, head_dim=32, mix_low_rank_dim=16) | {
    f"{name}_low_rank_dim": 16 for name in ("decay", "a", "v", "gate")
}


Scores = dict[str, list[list[float]]]
"""Variant -> of each seed the accuracy in each task."""


def ablation(tasks: Sequence[Task], seeds: Sequence[int], steps: int, questions: int, folder: Path) -> Scores:
    """Trains a small model of each variant with each seed, and asks it at most so many questions of each task."""
    exams = [sample_of(task.test, questions) for task in tasks]
    vocabulary = cut_vocabulary(all_questions(tasks))
    scores: Scores = {name: [] for name in VARIANTS}
    runs = [(name, seed) for seed in seeds for name in VARIANTS]
    for name, seed in tqdm(runs, desc="ablation", disable=None):
        scores[name].append(small_run(tasks, exams, vocabulary, VARIANTS[name], seed, steps, folder))
    return scores


def ablation_table(tasks: Sequence[Task], scores: Scores) -> str:
    """Mean and standard deviation over the seeds, in percent, in Markdown."""
    rows = [" | ".join(["model", *(task.name for task in tasks)]), " | ".join(["---"] * (len(tasks) + 1))]
    for name, of_seeds in scores.items():
        cells = [f"{100 * statistics.fmean(s):.1f} ± {100 * spread(s):.1f}" for s in zip(*of_seeds)]
        rows.append(" | ".join([name, *cells]))
    alone = [f"{100 * questions_alone(task)[0]:.1f}" for task in tasks]
    rows.append(" | ".join(["best guess per question", *alone]))
    return "\n".join(f"| {row} |" for row in rows)


def spread(values: Sequence[float]) -> float:
    """The standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def open_questions(task: Task) -> Task:
    """The task without what is answered by yes or no, and without the question for all of a picture."""

    def is_open(question: Question) -> bool:
        return question.text != WHAT and question.answer not in ("yes", "no")

    subjects = [subject._replace(main=[*filter(is_open, subject.main)], others=()) for subject in task.train]
    return replace(
        task,
        train=[subject for subject in subjects if subject.main],
        test=[exam for exam in task.test if is_open(exam.question)],
    )


def small_run(
    tasks: Sequence[Task],
    exams: Sequence[Sequence[Exam]],
    vocabulary: dict[bytes, int],
    changed: dict[str, Any],
    seed: int,
    steps: int,
    folder: Path,
) -> list[float]:
    """One short training of one variant; its accuracy in each task."""
    set_seed(seed)
    fields: dict[str, Any] = {
        "scan": "bidirectional",
        "image_position": "middle",
        "rwkv_version": 7,
        **changed,
    }
    language_model = SMALL_LANGUAGE_MODEL | {"rwkv_version": fields.pop("rwkv_version")}
    model, processor = fresh_model(vocabulary, SMALL_TOWER, language_model, **fields)
    stage = Stage(steps, 1e-3, 5e-5, ALL_PARTS, 1, {task.name: 1.0 for task in tasks})
    data = lessons(tasks, stage, range(steps * BATCH), seed)
    train_stage(model, processor, stage, data, seed, folder, disable_tqdm=True, logging_steps=steps)
    return [accuracy(model, processor, asked) for asked in exams]


# The command.


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("tiny"), help="folder for the model")
    parser.add_argument(
        "--data-dir", type=Path, default=Path("tiny-data"), help="folder with the emoji package"
    )
    parser.add_argument(
        "--steps",
        type=int,
        nargs=len(STAGES),
        default=[stage.steps for stage in STAGES],
        help="number of steps in each stage",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--validation",
        action="store_true",
        help="evaluate on a held-out tenth of the training pictures instead of the test set (for choosing settings)",
    )
    parser.add_argument(
        "--without-code", action="store_true", help="do not save a copy of the package's code"
    )
    parser.add_argument(
        "--ablation",
        action="store_true",
        help="compare variants of a small model instead of training the model",
    )
    parser.add_argument("--ablation-steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds per variant in the ablation")
    parser.add_argument(
        "--questions",
        type=int,
        default=1000,
        help="maximum number of test questions per task in the ablation",
    )
    parser.add_argument("--markdown", type=Path, help="write the ablation's table to this file as well")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    options = parse_arguments(arguments)
    state = PartialState(cpu=True)
    backend = "native"
    with state.main_process_first():
        try:
            build_native_ops()
        except RuntimeError as error:
            print(f"{error} Training uses plain torch, which is several times slower.", file=sys.stderr)
            backend = "torch"
    with kernel_backend(backend):
        if options.ablation:
            run_ablation(options)
        else:
            command = [launcher(state.num_processes), "examples/train_tiny.py", *arguments]
            run_training(options, " ".join(command))
    exit_together()


def launcher(processes: int) -> str:
    if processes == 1:
        return "python"
    return f"torchrun --nproc-per-node {processes}"


def run_ablation(options: argparse.Namespace) -> None:
    tasks = [open_questions(easy_vqa_task()), open_questions(digits_task())]
    seeds = range(options.seeds)
    scores = ablation(tasks, seeds, options.ablation_steps, options.questions, options.output_dir)
    table = ablation_table(tasks, scores)
    PartialState().print(table)
    if options.markdown and PartialState().is_main_process:
        text = ABLATION.read_text(encoding="utf-8").format(
            table=table,
            seeds=options.seeds,
            steps=options.ablation_steps,
            samples=options.ablation_steps * BATCH,
            questions=options.questions,
        )
        options.markdown.write_text(text, encoding="utf-8")


def run_training(options: argparse.Namespace, command: str) -> None:
    begin, state = time.monotonic(), PartialState()
    with state.main_process_first():
        emoji = emoji_archive(options.data_dir)
    tasks = [
        easy_vqa_task(options.validation),
        digits_task(options.validation),
        emoji_task(emoji, options.validation),
    ]
    set_seed(options.seed)
    model, processor = fresh_model(
        cut_vocabulary(all_questions(tasks)),
        TOWER,
        LANGUAGE_MODEL,
        scan="bidirectional",
        image_position="middle",
        pooling="adaptive",
        pooled_grid_size=POOLED_GRID,
    )
    stages = [stage._replace(steps=count) for stage, count in zip(STAGES, options.steps)]
    train(model, processor, tasks, stages, options.seed, options.output_dir)
    with state.main_process_first():
        if state.is_main_process:
            save(model, processor, options.output_dir, options.without_code)
    shipped = VisualRWKVForConditionalGeneration.from_pretrained(options.output_dir, dtype="auto")
    scores = report(shipped, processor, tasks, options.seed)
    minutes = (time.monotonic() - begin) / 60
    if state.is_main_process:
        print(scores)
        card = model_card(shipped, tasks, stages, scores, command, options.seed, minutes)
        (options.output_dir / "README.md").write_text(card, encoding="utf-8")


def save(model, processor: VisualRWKVProcessor, folder: Path, without_code: bool) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    if without_code:
        remove_code(folder)


def lessons(tasks: Sequence[Task], stage: Stage, rows: range, seed: int) -> Lessons:
    """The samples of a stage."""
    return Lessons(tasks, [stage.shares[task.name] for task in tasks], rows, stage.turns, seed)


def train(
    model,
    processor: VisualRWKVProcessor,
    tasks: Sequence[Task],
    stages: Sequence[Stage],
    seed: int,
    folder: Path,
) -> None:
    """All stages, each on samples of its own."""
    first = 0
    for number, stage in enumerate(stages, 1):
        rows = range(first, first + stage.steps * BATCH)
        first = rows.stop
        PartialState().print(
            f"Stage {number}: {stage.steps} steps; trained: {', '.join(stage.trained)}.", flush=True
        )
        data = lessons(tasks, stage, rows, seed)
        train_stage(model, processor, stage, data, seed, folder, [Progress(processor, tasks, every=500)])


def remove_code(folder: Path) -> None:
    """Leaves out what a folder needs where the package is not installed."""
    for file in folder.glob("*.py"):
        file.unlink()
    for file in folder.glob("*.json"):
        fields = json.loads(file.read_text(encoding="utf-8"))
        if fields.pop("auto_map", None):
            file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
