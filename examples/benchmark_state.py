"""Measure the gain from a stored picture: a second question about it with and without its state, and the state's bytes.

    python examples/benchmark_state.py                    # 0.1B shapes on a CPU; random weights, nothing is downloaded
    python examples/benchmark_state.py --size tiny

A picture of 1,024 tokens and a question are read; then another question about the same picture is asked, up to the
first word of its answer: from the beginning, and from what is kept of the picture. For this model that is a state in a
`StateStore`, for LLaVA, a Llama-shaped model of the same size, a copy of its cache of keys and values. Before any time
is printed, both ways must give the same logits.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import typer
from benchmark_vs_transformer import (
    LLAVA,
    OURS,
    SIZES,
    Size,
    build,
    clip,
    held_bytes,
    llava_config,
    rwkv_config,
)
from benchmarking import interleaved, machine, markdown_table, readable, readable_bytes, report
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from visualrwkv_hf import StateStore

SHAPES = {
    "tiny": SIZES["tiny"],
    # 448 pixels make 32 x 32 patches, what three releases have
    "0.1B": SIZES["small"]._replace(clip=clip(256, 4, 4, 448)),
    "7B": SIZES["7B"]._replace(clip=clip(1024, 24, 16, 448)),
}
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Limit on the relative norm error of logits: a prompt in two pieces is summed in a different order than as a whole."""


class Contender(NamedTuple):
    """A model, and two ways to a question's first word, [vocab_size]; what is kept of the picture, in bytes."""

    name: str
    model: PreTrainedModel
    from_start: Callable[[], Tensor]
    from_kept: Callable[[], Tensor]
    kept_bytes: int


def prompts(model: PreTrainedModel, size: Size, question: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return two prompts [1, T] with one picture and different questions of `question` tokens, and its pixels."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, 260, (2, 4 + question), generator=generator)
    words[1, :4] = words[0, :4]
    placeholders = torch.full((2, size.picture_tokens), model.config.image_token_id)
    ids = torch.cat([words[:, :4], placeholders, words[:, 4:]], 1).to(model.device)
    side = size.clip["image_size"]
    pixels = torch.randn(1, 3, side, side, generator=generator).to(model.device, model.dtype)
    return ids[:1], ids[1:], pixels


def first_word(model: PreTrainedModel, ids: Tensor, pixels: Tensor, **options: Any) -> Tensor:
    """The logits of the first word that `generate` answers, [vocab_size]."""
    output = model.generate(
        input_ids=ids,
        pixel_values=pixels,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=1,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return output.logits[0][0]


def visualrwkv(size: Size, version: int, device: str, dtype: torch.dtype, question: int) -> Contender:
    model = build(rwkv_config(size, version), device, dtype)
    first, second, pixels = prompts(model, size, question)
    store = StateStore()

    def ask(store: StateStore | None, ids: Tensor) -> Tensor:
        model.state_store = store
        return first_word(model, ids, pixels)

    ask(store, first)
    kept_bytes = store.nbytes // len(store)
    return Contender(OURS, model, lambda: ask(None, second), lambda: ask(store, second), kept_bytes)


def llava(size: Size, device: str, dtype: torch.dtype, question: int) -> Contender:
    model = build(llava_config(size), device, dtype)
    first, second, pixels = prompts(model, size, question)
    picture = first[:, : 4 + size.picture_tokens]
    cache = DynamicCache(config=model.config.text_config)
    model(input_ids=picture, pixel_values=pixels, past_key_values=cache, logits_to_keep=1)

    def from_kept() -> Tensor:
        return model(
            input_ids=second[:, picture.shape[1] :], past_key_values=copy.deepcopy(cache), logits_to_keep=1
        ).logits[0, -1].float()  # fmt: skip

    return Contender(LLAVA, model, lambda: first_word(model, second, pixels), from_kept, held_bytes(cache))


def check(contender: Contender, tolerance: float) -> float:
    """The relative norm error of the logits from what is kept.

    Raises:
        ArithmeticError: they are others than from the beginning.
    """
    expected, actual = contender.from_start().double(), contender.from_kept().double()
    error = float((actual - expected).norm() / expected.norm())
    if not error <= tolerance:
        raise ArithmeticError(
            f"{contender.name}: the logits from what is kept are off by {error:.1e}, allowed {tolerance:.0e}."
        )
    return error


def measure(contender: Contender, device: str, seconds: float, tolerance: float) -> dict[str, Any]:
    error = check(contender, tolerance)
    ways = {"start": contender.from_start, "kept": contender.from_kept}
    timings = interleaved(ways, device, seconds)
    return {
        "model": contender.name,
        "parameters": contender.model.num_parameters(),
        "kept_bytes": contender.kept_bytes,
        "from_start_seconds": timings["start"].median,
        "from_kept_seconds": timings["kept"].median,
        "times_faster": timings["start"].median / timings["kept"].median,
        "error": error,
    }


def readable_row(row: dict[str, Any]) -> dict[str, str]:
    return {
        "model": f"{row['model']}, {row['parameters'] / 1e6:,.1f} M",
        "a stored picture": readable_bytes(row["kept_bytes"]),
        "first word, from the beginning": readable(row["from_start_seconds"]),
        "first word, picture stored": readable(row["from_kept_seconds"]),
        "times faster": f"{row['times_faster']:.1f}",
        "error of its logits": f"{row['error']:.0e}",
    }


@torch.no_grad()
def main(
    size: Annotated[Literal["tiny", "0.1B", "7B"], typer.Option(help="Shapes of both models.")] = "0.1B",
    rwkv_version: Annotated[int, typer.Option(min=5, max=7)] = 7,
    question: Annotated[int, typer.Option(min=1, help="Tokens of a question.")] = 16,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option()] = "float32",
    seconds: Annotated[float, typer.Option(help="How long each way is timed.")] = 10.0,
    json: Annotated[Path | None, typer.Option(help="Also write the numbers to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the text to this file.")] = None,
) -> None:
    shape, torch_dtype = SHAPES[size], getattr(torch, dtype)
    rows = []
    try:
        for contender in (
            lambda: visualrwkv(shape, rwkv_version, device, torch_dtype, question),
            lambda: llava(shape, device, torch_dtype, question),
        ):  # one after the other, so that only one takes memory
            rows.append(measure(contender(), device, seconds, TOLERANCE[dtype]))
    except ArithmeticError as error:
        typer.secho(str(error), err=True, fg="red")
        raise typer.Exit(1) from error
    about = machine(device) | {"dtype": dtype, "picture_tokens": shape.picture_tokens, "question": question}
    head = (
        f"A picture of {shape.picture_tokens:,} tokens, a second question of {question}; RWKV-{rwkv_version}, {dtype}, "
        f"random weights; {about['device']}, {about['threads']} threads, torch {about['torch']}\n\n"
    )
    report(
        head + markdown_table([readable_row(row) for row in rows]),
        {"about": about, "rows": rows},
        markdown,
        json,
    )


if __name__ == "__main__":
    typer.run(main)
