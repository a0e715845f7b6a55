"""Measure what closed questions about one picture cost: one, and twenty that are scored from one reading.

    python examples/benchmark_scores.py                   # 0.1B shapes on a CPU; random weights, nothing is downloaded
    python examples/benchmark_scores.py --size tiny

Each question has the answers "yes", "no" and "unsure". Twenty questions are scored after a state that has read the
picture, one after the other or all in one batch; reading the picture is part of each time. Before any time is printed,
both ways must give the same log-probabilities, and for some of the questions those of a reading from the beginning. The
last line says whether all questions in a batch cost at most 1.5 times one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from benchmark_state import SHAPES, TOLERANCE
from benchmark_vs_transformer import Size, build, rwkv_config
from benchmarking import interleaved, machine, markdown_table, readable, report
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from visualrwkv_hf import VisualRWKVForConditionalGeneration, VisualRWKVProcessor
from visualrwkv_hf.conversion.world_tokenizer import build_world_tokenizer, load_world_vocabulary
from visualrwkv_hf.image_processing_visualrwkv import image_processor_for

ANSWERS = ["yes", "no", "unsure"]
THINGS = ("cat", "dog", "car", "tree", "house", "boat", "lamp", "chair", "table", "cup", "book", "phone")
CHECKED = 3
"""How many questions are also read from the beginning, which takes longest."""
MOST = 1.5
"""How many times as much as one question all of them may cost."""
ONE, SEPARATE, BATCH = "1 question", "{} questions, one after the other", "{} questions, one batch"


class Questions:
    """Closed questions about one picture, and ways to score their answers: log-probabilities [Q, A]."""

    def __init__(self, model: VisualRWKVForConditionalGeneration, processor: VisualRWKVProcessor, count: int):
        self.model, self.processor = model, processor
        self.picture = Image.effect_noise((448, 448), 80).convert("RGB")
        texts = [f"Is there a {THINGS[i % len(THINGS)]} in the picture?" for i in range(count)]
        self.chats = [
            [{"role": "user", "content": [*self.content, {"type": "text", "text": t}]}] for t in texts
        ]
        self.inputs = [self.prepared(chat) for chat in self.chats]
        self.batch = self.prepared(self.chats, padding=True)

    @property
    def content(self) -> list[dict[str, Any]]:
        return [{"type": "image", "image": self.picture}]

    def prepared(self, chats: list, **options: Any) -> BatchFeature:
        inputs = self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=options,
        )
        return inputs.to(self.model.device, dtype=self.model.dtype)

    def score(self, inputs: BatchFeature, state: Any = None) -> Tensor:
        return self.model.score(inputs, ANSWERS, tokenizer=self.processor, past_key_values=state).log_probs

    def read(self) -> Any:
        return self.model.read(self.processor, [{"role": "user", "content": self.content}])

    def one(self) -> Tensor:
        return self.score(self.inputs[0])

    def from_start(self, count: int) -> Tensor:
        return torch.cat([self.score(inputs) for inputs in self.inputs[:count]])

    def separate(self) -> Tensor:
        state = self.read()
        return torch.cat([self.score(inputs, state) for inputs in self.inputs])

    def in_a_batch(self) -> Tensor:
        return self.score(self.batch, self.read())


def questions(size: Size, version: int, count: int, device: str, dtype: torch.dtype) -> Questions:
    config = rwkv_config(size, version)
    config.scan = "unidirectional"
    vocab_size = config.text_config.vocab_size
    words = {token: i for token, i in load_world_vocabulary().items() if i < vocab_size - 1}
    tokenizer = build_world_tokenizer(words, vocab_size=vocab_size)
    processor = VisualRWKVProcessor.from_config(config, image_processor_for(config), tokenizer)
    return Questions(build(config, device, dtype), processor, count)


def check(asked: Questions, tolerance: float) -> float:
    """Return the largest difference of log-probabilities: between the ways, and from a reading from the beginning.

    Raises:
        ArithmeticError: it is too large.
    """
    separate, batch, expected = asked.separate(), asked.in_a_batch(), asked.from_start(CHECKED)
    pairs = ((separate, batch), (separate[:CHECKED], expected))
    error = max(float((found - wanted).abs().max()) for found, wanted in pairs)
    if not error <= tolerance:
        raise ArithmeticError(f"The scores from a state are off by {error:.1e}, allowed {tolerance:.0e}.")
    return error


@torch.no_grad()
def main(
    size: Annotated[Literal["tiny", "0.1B", "7B"], typer.Option(help="Shapes of the model.")] = "0.1B",
    rwkv_version: Annotated[int, typer.Option(min=5, max=7)] = 7,
    count: Annotated[int, typer.Option(min=1, help="Number of questions.")] = 20,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option()] = "float32",
    seconds: Annotated[float, typer.Option(help="How long each way is timed, five rounds at least.")] = 3.0,
    json: Annotated[Path | None, typer.Option(help="Also write the numbers to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the text to this file.")] = None,
) -> None:
    asked = questions(SHAPES[size], rwkv_version, count, device, getattr(torch, dtype))
    try:
        error = check(asked, 10 * TOLERANCE[dtype])
    except ArithmeticError as failure:
        typer.secho(str(failure), err=True, fg="red")
        raise typer.Exit(1) from failure
    ways: dict[str, Callable[[], Tensor]] = {
        ONE: asked.one,
        SEPARATE.format(count): asked.separate,
        BATCH.format(count): asked.in_a_batch,
    }
    timings = interleaved(ways, device, seconds)
    first = timings[ONE].median
    rows = [
        {"way": way, "seconds": timing.median, "times_one": timing.median / first}
        for way, timing in timings.items()
    ]
    about = machine(device) | {
        "dtype": dtype,
        "picture_tokens": asked.model.config.num_image_tokens,
        "error": error,
    }
    head = (
        f"A picture of {about['picture_tokens']:,} tokens, {len(ANSWERS)} answers to each question; "
        f"RWKV-{rwkv_version}, {dtype}, random weights; {about['device']}, {about['threads']} threads, "
        f"torch {about['torch']}; "
        f"log-probabilities differ by {error:.0e} at most\n\n"
    )
    table: list[dict[str, str]] = [
        {
            "scored": row["way"],
            "time": readable(row["seconds"]),
            "times one question": f"{row['times_one']:.2f}",
        }
        for row in rows
    ]
    ratio = rows[-1]["times_one"]
    verdict = "at most" if ratio <= MOST else "more than"
    last = f"\n\n{count} questions in a batch cost {ratio:.2f} times one, {verdict} {MOST}."
    report(head + markdown_table(table) + last, {"about": about, "rows": rows}, markdown, json)


if __name__ == "__main__":
    typer.run(main)
