"""What weights in int8 and int4 cost a model, measured on your own questions.

    python examples/quantization_quality.py --model visualrwkv-6-1b6 --questions questions.jsonl
    python examples/quantization_quality.py                      # the model in the package, on its whole test sets
    python examples/quantization_quality.py --random 6 2048 8    # RWKV-6 of width 2048, 8 layers, random weights
    python examples/quantization_quality.py --tensors --limit 50 # what each kind of layer costs, alone in int4

Each line of questions.jsonl is an object: {"image": "cat.png", "question": "What is this?", "answer": "a cat"}. Paths
are relative to the file. Without answers, those of the first format are taken as the right ones.

The first format is what the others are compared with. All of them answer greedily; then each reads the reference
answers token by token, which gives the share of tokens that it would have chosen as the first format does ("same next
token"), the error of its logits, relative in norm, and the perplexity of the reference answers. The pip packages
easy-vqa and scikit-learn hold two test sets of the model in the package; all its tasks about one picture are asked if
--data names the folder in which examples/train_tiny.py keeps fonts, words and emoji.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from benchmarking import machine, markdown_table, report
from PIL import Image
from torch import Tensor

from visualrwkv_hf import VisualRWKVForCausalLM, VisualRWKVTextConfig, accelerate_on_cpu, bundled_model
from visualrwkv_hf.inference import load_model, load_processor

FORMATS: dict[str, dict[str, Any]] = {
    "float32": dict(dtype="float32"),
    "bfloat16": dict(dtype="bfloat16"),
    "int8": dict(dtype="float32", weights="int8"),
    "int4": dict(dtype="float32", weights="int4"),
}
"""Name -> arguments of `load_model`. What is not rounded is float32, so that the weights alone make the difference."""

KEPT_LOGITS = 64
"""So many questions' logits are kept to be compared: those of all would not fit into memory."""


class Exam(NamedTuple):
    """A question about a picture, and its answer if it is known."""

    picture: Image.Image
    question: str
    answer: str | None


class Reading(NamedTuple):
    """What a model makes of reference answers, read after their questions.

    Attributes:
        ids: the most probable next token at each token of each answer.
        logits: of the first `KEPT_LOGITS` answers, each [tokens, vocabulary].
        log_likelihood: the sum over all tokens, in nats.
        tokens: how many there are.
    """

    ids: list[list[int]]
    logits: list[Tensor]
    log_likelihood: float
    tokens: int


def main(
    model: Annotated[str | None, typer.Option(help="Model folder, Hub id or release.")] = None,
    questions: Annotated[Path | None, typer.Option(help="JSON Lines file; see above.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with fonts, words and emoji of train_tiny.py: ask all of its tasks."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Ask only so many questions of each set.")] = None,
    formats: Annotated[str, typer.Option(help="Separated by commas; the first is the reference.")] = ",".join(
        FORMATS
    ),
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 32,
    batch: Annotated[int, typer.Option(help="Questions that are asked at a time.")] = 32,
    random: Annotated[
        tuple[int, int, int] | None,
        typer.Option(help="Generation, width and layers of a model of random weights."),
    ] = None,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="Round one kind of layer at a time, in groups of 32 and of 64.")
    ] = False,
    markdown: Annotated[Path | None, typer.Option(help="Write the table to this file as well.")] = None,
) -> None:
    """Print a table of what each format of the weights costs."""
    names = formats.split(",")
    if unknown := [name for name in names if name not in FORMATS]:
        raise typer.BadParameter(f"{unknown[0]} is none of {', '.join(FORMATS)}.")
    if random is not None:
        rows = list(random_rows(names, *random))
    else:
        source = model or str(bundled_model())
        sets = {"": read_questions(questions)} if questions else own_test_sets(data)
        compare = compared_tensors if tensors else compared
        rows = [
            row
            for name, exams in sets.items()
            for row in compare(source, names, name, exams[:limit], batch, max_new_tokens)
        ]
    report(markdown_table(rows), {"machine": machine(), "rows": rows}, markdown)


def read_questions(path: Path) -> list[Exam]:
    """Return the questions of a JSON Lines file."""
    exams = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            picture = Image.open(path.parent / fields["image"]).convert("RGB")
            exams.append(Exam(picture, fields["question"], fields.get("answer")))
        except (KeyError, ValueError, OSError) as error:
            raise typer.BadParameter(f"Line {number} of {path}: {error}.") from error
    return exams


def own_test_sets(data: Path | None) -> dict[str, list[Exam]]:
    """Return the questions that the model in the package was not trained on."""
    from tiny_collections import digits_task, easy_vqa_task
    from tiny_tasks import all_tasks

    tasks = list(all_tasks(data).values()) if data else [easy_vqa_task(), digits_task()]
    return {
        task.name: [Exam(exam.picture, exam.question.text, exam.question.answer) for exam in task.test]
        for task in tasks
        if task.name != "frames"
    }


def compared(
    source: str, formats: Sequence[str], name: str, exams: Sequence[Exam], batch: int, max_new_tokens: int
) -> Iterator[dict[str, Any]]:
    """Yield a row for each format."""
    processor = load_processor(source)
    truths = [exam.answer for exam in exams]
    first: list[str] = []
    reference: Reading | None = None
    for each in formats:
        model = load_model(source, "cpu", **FORMATS[each])
        found = answers(model, processor, exams, batch, max_new_tokens)
        first = first or found
        right = [truth if truth is not None else text for truth, text in zip(truths, first)]
        reading = read_answers(model, processor, exams, right, batch)
        reference = reference or reading
        row: dict[str, Any] = {"questions": f"{len(exams)} {name}".strip(), "weights": each}
        if None not in truths:
            row["right answers"] = percent(sum(map(is_right, found, right)), len(found))
        row["same answer"] = percent(sum(map(is_right, found, first)), len(found))
        row |= reading_row(reading, reference)
        typer.echo(", ".join(f"{key} {value}" for key, value in row.items()), err=True)  # others take minutes
        yield row
        del model


def is_right(found: str, truth: str) -> bool:
    """Return whether two answers are equal but for case and space around them."""
    return found.strip().lower() == truth.strip().lower()


def reading_row(reading: Reading, reference: Reading) -> dict[str, Any]:
    """Return the columns of a table for what a model makes of the reference answers."""
    pairs = [(a, b) for x, y in zip(reading.ids, reference.ids) for a, b in zip(x, y)]
    changes = [float((x - y).norm() / y.norm()) for x, y in zip(reading.logits, reference.logits)]
    return {
        "same next token": percent(sum(a == b for a, b in pairs), len(pairs)),
        "error of logits": f"{sum(changes) / len(changes):.2e}",
        "perplexity": f"{math.exp(-reading.log_likelihood / reading.tokens):.4f}",
    }


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


@torch.no_grad()
def answers(model: Any, processor: Any, exams: Sequence[Exam], batch: int, max_new_tokens: int) -> list[str]:
    """Return a model's greedy answers."""
    found: list[str] = []
    for some, inputs in batches(model, processor, exams, batch):
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        found += processor.post_process_image_text_to_text(output, prompt_length=inputs["input_ids"].shape[1])
        assert len(found) == some.stop
    return found


@torch.no_grad()
def read_answers(
    model: Any, processor: Any, exams: Sequence[Exam], texts: Sequence[str], batch: int
) -> Reading:
    """Let a model read answers after their questions."""
    ids, kept, log_likelihood, tokens = [], [], 0.0, 0
    for some, inputs in batches(model, processor, exams, batch):
        of_answers = [processor.tokenizer(f" {text.strip()}")["input_ids"] for text in texts[some]]
        longest = max(map(len, of_answers))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in of_answers])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in of_answers])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], padded], 1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], mask], 1)
        logits = model(**inputs, logits_to_keep=longest + 1).logits[:, :-1].float()
        for row, (wanted, of_row) in enumerate(zip(of_answers, logits)):
            of_row = of_row[: len(wanted)]  # [tokens, vocabulary]
            ids.append(of_row.argmax(1).tolist())
            log_likelihood += float(of_row.log_softmax(1).gather(1, padded[row, : len(wanted), None]).sum())
            tokens += len(wanted)
            if len(kept) < KEPT_LOGITS:
                kept.append(of_row.clone())
    return Reading(ids, kept, log_likelihood, tokens)


def batches(
    model: Any, processor: Any, exams: Sequence[Exam], batch: int
) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """Yield inputs for some questions after the other, and which ones these are."""
    for start in range(0, len(exams), batch):
        some = exams[start : start + batch]
        contents = [[{"type": "image"}, {"type": "text", "text": exam.question}] for exam in some]
        texts = [
            processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            for content in contents
        ]
        pictures = [[exam.picture] for exam in some]
        inputs = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
        yield slice(start, start + len(some)), dict(inputs.to(model.device, dtype=model.dtype))


# --- one kind of layer at a time ------------------------------------------------------------------------------


def compared_tensors(
    source: str, formats: Sequence[str], name: str, exams: Sequence[Exam], batch: int, max_new_tokens: int
) -> Iterator[dict[str, Any]]:
    """Yield a row for each kind of linear layer that is rounded alone, and for all of them.

    The rounded weights are multiplied in float32, so that they alone make the difference. `formats` is not used.
    """
    processor = load_processor(source)
    model = load_model(source, "cpu", "float32", accelerate=False)
    texts = [exam.answer or "" for exam in exams]
    if not all(texts):
        texts = answers(model, processor, exams, batch, max_new_tokens)
    reference = read_answers(model, processor, exams, texts, batch)
    layers = {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and re.search(r"language_model\.layers\.|lm_head", path)
    }
    kinds = dict.fromkeys(".".join(path.split(".")[-2:]) for path in layers)
    choices = [
        *((kind,) for kind in kinds),
        tuple(kind for kind in kinds if "head" not in kind),
        tuple(kinds),
    ]
    for chosen in choices:
        some = [layer for path, layer in layers.items() if path.endswith(chosen)]
        kept = [layer.weight.data for layer in some]
        row: dict[str, Any] = {"questions": f"{len(exams)} {name}".strip(), "in int4": " ".join(chosen)}
        for group in (32, 64):
            for layer, weight in zip(some, kept):
                layer.weight.data = in_4_bits(weight, group)
            found = reading_row(read_answers(model, processor, exams, texts, batch), reference)
            row |= {f"{key}, groups of {group}": value for key, value in found.items() if "same" not in key}
        for layer, weight in zip(some, kept):
            layer.weight.data = weight
        typer.echo(", ".join(f"{key} {value}" for key, value in row.items()), err=True)
        yield row


def in_4_bits(weight: Tensor, group: int) -> Tensor:
    """Return a weight [out, in] rounded to 4 bits with a scale for each `group` neighbours, as float32."""
    columns = weight.shape[1]
    short = weight if columns % group == 0 else torch.nn.functional.pad(weight, (0, group - columns % group))
    groups = short.reshape(-1, group)
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))  # [groups, 1]
    scale = (largest / -8).bfloat16().float()
    steps = (groups / torch.where(scale == 0, 1, scale)).round().clamp(-8, 7)
    return (steps * scale).reshape(short.shape)[:, :columns].contiguous()


# --- random weights ------------------------------------------------------------------------------------------


@torch.no_grad()
def random_rows(formats: Sequence[str], version: int, width: int, layers: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each format of a language model of random weights, which reads 64 random tokens."""
    config = VisualRWKVTextConfig(rwkv_version=version, hidden_size=width, num_hidden_layers=layers)
    ids = torch.randint(1, config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(1))
    reference: Reading | None = None
    for each in formats:
        model = random_model(config)
        if weights := FORMATS[each].get("weights"):
            accelerate_on_cpu(model, weights=weights)
        elif each == "bfloat16":
            model = model.bfloat16()
        logits = model(ids).logits[0].float()
        likely = logits[:-1].log_softmax(1).gather(1, ids[0, 1:, None]).sum()
        reading = Reading([logits.argmax(1).tolist()], [logits], float(likely), ids.shape[1] - 1)
        reference = reference or reading
        row = {"model": f"RWKV-{version}, {layers} x {width}, random", "weights": each}
        columns = reading_row(reading, reference)
        del columns["perplexity"], model
        yield row | columns


def random_model(config: VisualRWKVTextConfig) -> VisualRWKVForCausalLM:
    """Return a model in which every part takes part: a fresh one's outputs of layers are zero."""
    torch.manual_seed(0)
    model = VisualRWKVForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and name.endswith(".weight"):
            std = 1.0 if "embed_tokens" in name else weight.shape[1] ** -0.5
            weight.data.normal_(std=std, generator=generator)
    return model


if __name__ == "__main__":
    typer.run(main)
