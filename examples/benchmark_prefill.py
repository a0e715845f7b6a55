"""How fast a prompt is read, beside llama.cpp and the package `rwkv` on the same random weights. One run, one table.

    pip install rwkv llama-cpp-python gguf
    python examples/benchmark_prefill.py                     # RWKV-7 0.1B, 600 tokens; the GPU if there is one
    python examples/benchmark_prefill.py --shape 1.5B --device cuda --markdown prefill.md

First, every engine's logits for the prompt's last token and some tokens after it are compared with float32 torch.
If this package's are wrong no time is printed and the exit status is 1. "native" are the ops of `accelerate_on_cpu`;
"graph" is the whole prompt recorded as a CUDA graph, without what Python takes to launch it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from benchmarking import chosen_device, report
from engines import ROUNDED, SHAPES, Engine, compared


def reading(engine: Engine, prompt: torch.Tensor) -> Callable[[], object]:
    return lambda: engine.read(prompt, None)


@torch.inference_mode()
def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "0.1B",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU if there is one.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16 and, on a CPU, int8 and int4 if not given.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of the prompt.")] = 600,
    seconds: Annotated[float, typer.Option(help="To measure each engine.")] = 3.0,
    threads: Annotated[int | None, typer.Option(help="Of the CPU.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the numbers to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the table to this file.")] = None,
) -> None:
    """How fast a prompt is read."""
    device = chosen_device(device, threads)
    precisions = dtype or ["float32", "bfloat16", *(ROUNDED if device == "cpu" else [])]
    try:
        text, numbers = compared(shape, device, precisions, tokens, seconds, reading, tokens)
    except ArithmeticError as error:
        typer.secho(f"Wrong, so no times: {error}", err=True, fg="red")
        raise typer.Exit(1) from error
    report(f"{tokens} tokens of a prompt. {text}", numbers, markdown, json)


if __name__ == "__main__":
    typer.run(main)
