"""Measure how long Python takes to launch each op of a GPU, without one: Triton's launcher does nothing here.

    python examples/benchmark_launch.py --markdown ../docs/benchmarks/launch-cpu.md

Everything but the driver's own launch is counted: the choice of the kernel, the checks, what torch needs to call an op,
the outputs' allocation (on the CPU here), and Triton's work for each kernel. What is shown is the fastest of several
rounds, in processor time of one thread, so that a busy machine disturbs it little.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from benchmarking import machine, markdown_table, report
from gpu_stages import from_tests

from visualrwkv_hf import kernel_backend, wkv6, wkv7

MIN_LOG_DECAY = -0.6065306597126334
GOAL = 60
"""Microseconds that an op of a prompt may take."""


@contextlib.contextmanager
def null_launcher() -> Iterator[None]:
    """Inside, kernels are bound to their arguments as Triton does for an H100, and then not launched."""
    from triton.runtime.jit import JITFunction

    nothing = SimpleNamespace(
        run=lambda *arguments: None, function=0, packed_metadata=(), launch_metadata=lambda *arguments: None
    )

    def compiled(self: Any, key: str, signature: Any, device: Any, *more: Any) -> Any:
        self.device_caches[device][0][key] = nothing
        return nothing

    with (
        from_tests("compile_kernels").recorded("sm_90"),
        mock.patch.object(JITFunction, "_do_compile", compiled),
        mock.patch("visualrwkv_hf.wkv.refuse_tokens_out_of_range"),  # which only a CPU computes
    ):
        yield


def ops(H: int = 4, T: int = 64) -> dict[str, Callable[[], object]]:
    """Return the ops of a layer by name: for a prompt of T tokens, and for one token."""
    launches = from_tests("gpu_launches")
    token_shift, low_rank = launches.model_token_shift, launches.model_low_rank
    K, dtype = 64, torch.bfloat16
    C = H * K
    x, w = torch.zeros(1, T, H, K, dtype=dtype), torch.zeros(1, T, H, K)
    u = torch.zeros(H, K, dtype=dtype)
    tokens, weight, carried = (
        torch.zeros(1, T, C, dtype=dtype),
        torch.zeros(C, dtype=dtype),
        torch.zeros(1, C, dtype=dtype),
    )
    token, ranks = torch.zeros(1, 1, C, dtype=dtype), (32, 32, 64, 32)
    down, up = (
        [torch.zeros(shape, dtype=dtype) for shape in shapes]
        for shapes in ([(C, D) for D in ranks], [(D, C) for D in ranks])
    )
    functions = ("tanh", "identity", "sigmoid", "identity")
    order = torch.arange(T)[None]
    return {
        f"wkv7, {T} tokens": lambda: wkv7(x, w, x, x, x, x, min_log_decay=MIN_LOG_DECAY),
        f"wkv7, {T} tokens in an order": lambda: wkv7(
            x, w, x, x, x, x, order=order, min_log_decay=MIN_LOG_DECAY
        ),
        f"wkv6, {T} tokens": lambda: wkv6(x, w, x, x, u),
        f"token_shift, {T} tokens, 6 mixes": lambda: token_shift(tokens, carried, [weight] * 6),
        f"token_shift, {T} tokens, 1 mix": lambda: token_shift(tokens, carried, [weight]),
        "token_shift, 1 token, 6 mixes": lambda: token_shift(token, carried, [weight] * 6),
        "low_rank, 1 token, 4 maps": lambda: low_rank([token] * 4, down, up, functions),
        **{
            f"a layer of RWKV-{version}, 1 token": launches.decoding_layer(H, ranks, 1, version)
            for version in (5, 6, 7)
        },
    }


def microseconds(function: Callable[[], object], rounds: int = 12, calls: int = 20) -> float:
    """Return the processor time of a call: the fastest round's."""
    for _ in range(5):
        function()
    fastest = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(calls):
            function()
        fastest = min(fastest, (time.process_time() - start) / calls)
    return 1e6 * fastest


@torch.no_grad()
def main(
    rounds: Annotated[int, typer.Option(help="Of which the fastest counts.")] = 12,
    json: Annotated[Path | None, typer.Option(help="Also write the numbers to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the table to this file.")] = None,
) -> None:
    """Measure what Python takes to launch each op."""
    torch.set_num_threads(1)
    with null_launcher(), kernel_backend("triton"):
        rows = [
            {"op": name, "microseconds": round(microseconds(op, rounds), 1)} for name, op in ops().items()
        ]
    report(markdown_table(rows), {"about": machine(), "rows": rows}, markdown, json)


if __name__ == "__main__":
    typer.run(main)
