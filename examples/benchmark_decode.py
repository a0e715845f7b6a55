"""How fast one token follows another, beside llama.cpp and the package `rwkv` on the same weights. One run, one table.

    pip install rwkv llama-cpp-python gguf
    python examples/benchmark_decode.py                      # RWKV-7 0.1B; the GPU if there is one
    python examples/benchmark_decode.py --shape 7B --device cuda --dtype bfloat16

Every engine's logits are compared to plain torch in float32 first. If this package's are wrong no time is printed and
the exit status is 1. "native" are the ops of `accelerate_on_cpu`; "graph" is a step recorded as a CUDA graph, without
what Python takes to launch it. "weights at the rate of a copy" is the time that reading the weights once would take.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from benchmarking import chosen_device, report
from engines import ROUNDED, SHAPES, Engine, compared


def stepping(engine: Engine, prompt: torch.Tensor) -> Callable[[], object]:
    """Read one token after the prompt, and one more at each further call."""
    token = prompt[:1]
    _, state = engine.read(prompt, None)

    def step() -> None:
        nonlocal state
        _, state = engine.read(token, state)

    return step


@torch.inference_mode()
def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "0.1B",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU if there is one.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16 and, on a CPU, int8 and int4 if not given.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of the prompt.")] = 64,
    seconds: Annotated[float, typer.Option(help="To measure each engine.")] = 5.0,
    threads: Annotated[int | None, typer.Option(help="Of the CPU.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the numbers to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the table to this file.")] = None,
) -> None:
    """How fast one token follows another."""
    device = chosen_device(device, threads)
    precisions = dtype or ["float32", "bfloat16", *(ROUNDED if device == "cpu" else [])]
    try:
        text, numbers = compared(shape, device, precisions, tokens, seconds, stepping, 1)
    except ArithmeticError as error:
        typer.secho(f"Wrong, so no times: {error}", err=True, fg="red")
        raise typer.Exit(1) from error
    report(f"One token after {tokens} others. {text}", numbers, markdown, json)


if __name__ == "__main__":
    typer.run(main)
