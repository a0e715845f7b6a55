"""Measure the cost of a training step's loss, with logits in slices and with all logits at once, in one table.

    python examples/benchmark_loss.py                               # a GPU if there is one, else the CPU
    python examples/benchmark_loss.py --shapes 8x2048 --hidden-size 2048 --device cuda --markdown loss.md

A step is the head, the loss and the backward through both: hidden states [B, T, C] and the head's weight
[65536, C] in, their gradients out. Both ways are compared first, loss and gradients; if they differ no figure is
printed and the exit status is 1. Peak memory is what a step takes beyond the tensors that it is given; every way has a
process of its own for it.
"""

import re
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from benchmarking import (
    chosen_device,
    interleaved,
    machine,
    markdown_table,
    readable,
    readable_bytes,
    report,
)
from torch import Tensor

from visualrwkv_hf import VisualRWKVTextConfig
from visualrwkv_hf.loss_visualrwkv import sliced_loss, visualrwkv_loss

SHAPES = ["1x1088", "4x1088", "8x1088"]
"""A picture of 1,024 tokens and 64 words, alone and in batches."""
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
"""Limits on the relative error of a gradient: float32 sums in another order; bfloat16 rounds each slice's share of the
head's gradient by 2^-9."""
SLICED, WHOLE = "in slices", "at once"


class Case(NamedTuple):
    """B samples of T tokens of a model of width C."""

    B: int
    T: int
    C: int
    device: str
    dtype: str


def inputs_of(case: Case) -> tuple[Tensor, Tensor, Tensor, VisualRWKVTextConfig]:
    """Hidden states [B, T, C], the head [V, C] and labels [B, T], of which the first half is a picture's."""
    config = VisualRWKVTextConfig()  # of which the loss reads how it is reduced, and L2Wrap
    generator = torch.Generator(case.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=generator, device=case.device)
        return x.to(getattr(torch, case.dtype)).requires_grad_()

    hidden_states, head = normal(case.B, case.T, case.C), normal(config.vocab_size, case.C)
    labels = torch.randint(1, config.vocab_size, (case.B, case.T), generator=generator, device=case.device)
    labels[:, : case.T // 2] = -100
    return hidden_states, head, labels, config


def step_of(way: str, case: Case) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """A function that gives the loss and both gradients."""
    hidden_states, head, labels, config = inputs_of(case)

    def lm_head(x: Tensor) -> Tensor:
        return x @ head.T / case.C**0.5

    def step() -> tuple[Tensor, Tensor, Tensor]:
        if way == SLICED:
            loss = sliced_loss(hidden_states, lm_head, labels, config)
        else:
            loss = visualrwkv_loss(lm_head(hidden_states), labels, config)
        return loss.detach(), *torch.autograd.grad(loss, (hidden_states, head))

    return step


def worst_error(case: Case) -> float:
    """The largest relative norm error between both ways, of loss and gradients."""
    sliced, whole = step_of(SLICED, case)(), step_of(WHOLE, case)()
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(sliced, whole))


def peak_of_step(way: str, case: Case, threads: int) -> int:
    """Bytes beyond those of the inputs. To be called in a process that has done nothing else."""
    torch.set_num_threads(threads)
    step = step_of(way, case)
    if case.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes of this process: now ("VmRSS") or at most ("VmHWM"). Where Linux does not say, the most."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(rf"{field}:\s*(\d+)", status.read_text())[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def in_own_process(function: Callable, *arguments: object) -> int:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(case: Case, seconds: float, least: int) -> list[dict]:
    """Rows of the table.

    Raises:
        ArithmeticError: the two ways differ.
    """
    error = worst_error(case)
    if not error <= TOLERANCE[case.dtype]:
        raise ArithmeticError(f"{case.B} x {case.T}: error {error:.1e}, allowed {TOLERANCE[case.dtype]:.0e}.")
    peaks = {way: in_own_process(peak_of_step, way, case, torch.get_num_threads()) for way in (WHOLE, SLICED)}
    timings = interleaved({way: step_of(way, case) for way in peaks}, case.device, seconds, least)
    return [
        {
            "B x T": f"{case.B} x {case.T}",
            "logits": way,
            "peak memory": readable_bytes(peaks[way]),
            "times less": f"{peaks[WHOLE] / peaks[way]:.1f}",
            "seconds": readable(timings[way].median),
            "times as long": f"{timings[way].median / timings[WHOLE].median:.2f}",
            "error": f"{error:.0e}",
        }
        for way in peaks
    ]


def main(
    shapes: Annotated[list[str] | None, typer.Option(help="BxT, for example 4x1088; several.")] = None,
    hidden_size: Annotated[int, typer.Option(min=1, help="C, the model's width.")] = 768,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(TOLERANCE)}.")] = "float32",
    seconds: Annotated[float, typer.Option(help="To time each way.")] = 5.0,
    least: Annotated[int, typer.Option(min=1, help="Rounds, however long they take.")] = 3,
    threads: Annotated[int | None, typer.Option(help="Of the CPU.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the numbers to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the table to this file.")] = None,
) -> None:
    """Measure the cost of a training step's loss."""
    device = chosen_device(device, threads)
    if dtype not in TOLERANCE:
        raise typer.BadParameter(f"dtype must be one of {', '.join(TOLERANCE)}, got {dtype}.")
    wrong = [shape for shape in shapes or [] if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape)]
    if wrong:
        raise typer.BadParameter(f"A shape is BxT, for example 4x1088; got {', '.join(wrong)}.")
    cases = [Case(*map(int, shape.split("x")), hidden_size, device, dtype) for shape in shapes or SHAPES]
    try:
        rows = [row for case in cases for row in measure(case, seconds, least)]
    except ArithmeticError as error:
        typer.secho(f"Wrong, so no figures: {error}", err=True, fg="red")
        raise typer.Exit(1) from error
    about = machine(device)
    head = f"{about['device']}, {about['threads']} threads, torch {about['torch']}; width {hidden_size}, {dtype}\n\n"
    report(head + markdown_table(rows), {"about": about, "rows": rows}, markdown, json)


if __name__ == "__main__":
    typer.run(main)
