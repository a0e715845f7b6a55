"""The WKV recurrences against their peers and against what the machine can do at best. One run, one table.

    python examples/benchmark_wkv.py                                       # a GPU if there is one, else the CPU
    python examples/benchmark_wkv.py --op wkv7 --shapes 8x4096x64 --json wkv.json

Peers are, on a GPU, flash-linear-attention where it is installed; on a CPU, where this package computes with its native
ops if there is a C compiler, the loop over tokens, under autograd. This package's plain torch functions are timed as
well. Everything is compared to the plain functions in float64 first: outputs, states
and gradients. If this package is wrong no time is printed and the exit status is 1.

"roofline" is the time that the machine needs at least: every input read once and every result written once at the
rate of a copy, or the operations of the recurrence at that of a matrix product, whichever is longer; both rates are
measured in the same run. Letters: B batch, T time, H heads.
"""

import math
import re
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import typer
from benchmarking import (
    Timing,
    captured,
    chosen_device,
    copy_bandwidth,
    interleaved,
    machine,
    markdown_table,
    matmul_rate,
    readable,
    report,
)
from torch import Tensor

from visualrwkv_hf import kernel_backend, wkv6, wkv7
from visualrwkv_hf.cpu import build_native_ops

HEAD_SIZE = 64
MIN_LOG_DECAY = -0.6065306597126334
"""-e^(-1/2), the lowest log decay of RWKV-7."""

HEADS = {"0.1B": 12, "1.5B": 32, "7B": 64}
GPU_SHAPES = [(B, T, H) for H in HEADS.values() for B, T in ((1, 640), (1, 1088), (8, 4096), (64, 1))]
"""One small picture, one large one, training, and a token for each of 64 conversations."""
CPU_SHAPES = [(1, 640, 12), (16, 128, 12), (64, 1, 12)]

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Limits on the relative error of a tensor. Half precision rounds results by 2^-9 or 2^-12, and intermediates too."""
PEER_SLACK = 10
"""A peer whose error is larger than so many tolerances is no peer."""

OURS, PLAIN = "visualrwkv-hf", "plain torch"
FLA_LAYER = "fla chunk, as its layer"
FORWARD, GRAPH, BACKWARD, BOTH = "forward", "forward, CUDA graph", "backward", "forward + backward"

Inputs = dict[str, Tensor]


class Op(NamedTuple):
    """A way to compute a recurrence. `adapt` makes of the inputs those that `run` takes, and is not timed."""

    run: Callable[[Inputs], tuple[Tensor, Tensor]]
    adapt: Callable[[Inputs], Inputs] = dict
    has_backward: bool = True

    def __call__(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        return self.run(self.adapt(inputs))


class Case(NamedTuple):
    op: str
    B: int
    T: int
    H: int

    @property
    def shape(self) -> str:
        return f"{self.B}x{self.T}x{self.H}"


class Target(NamedTuple):
    """The least ratio that an op ("" is both) must reach at a shape, in which -1 matches any number."""

    op: str
    shape: tuple[int, int, int]
    mode: str
    device: str
    seconds: float = math.inf
    times_faster: float = 0.0

    def fits(self, case: Case, mode: str, device: str) -> bool:
        same_shape = all(want in (-1, have) for want, have in zip(self.shape, case[1:]))
        return self.op in ("", case.op) and same_shape and (self.mode, self.device) == (mode, device)


TARGETS = (
    Target("wkv7", (8, 4096, 64), BOTH, "cuda", seconds=4.5e-3),
    Target("", (8, 4096, -1), BOTH, "cuda", times_faster=1.5),
    Target("", (1, 1088, -1), FORWARD, "cuda", times_faster=3.0),
    Target("", (1, 1088, -1), GRAPH, "cuda", seconds=40e-6, times_faster=3.0),
    Target("", (16, 128, -1), BOTH, "cpu", times_faster=10.0),
)


# --- the recurrences and their inputs -----------------------------------------------------------------


def random_inputs(case: Case, device: str, dtype: torch.dtype) -> Inputs:
    """Inputs as a model makes them: keys of RWKV-7 normalised, decays from nearly 1 to strong."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    shape = (case.B, case.T, case.H, HEAD_SIZE)
    inputs = {name: normal(*shape) for name in ("r", "k", "v")}
    if case.op == "wkv6":
        inputs |= {"w": -torch.exp(normal(*shape) - 1), "u": normal(case.H, HEAD_SIZE)}
    else:
        removed = torch.nn.functional.normalize(normal(*shape), dim=-1)
        inputs["w"] = MIN_LOG_DECAY * torch.sigmoid(normal(*shape))
        inputs |= {"a": -removed, "b": removed * torch.sigmoid(normal(*shape))}
    # A model computes log decays in float32, whatever its dtype.
    inputs = {name: x if name == "w" else x.to(dtype) for name, x in inputs.items()}
    if case.T == 1:
        inputs["initial_state"] = normal(case.B, case.H, HEAD_SIZE, HEAD_SIZE)
    return inputs


def ours(op: str) -> Op:
    if op == "wkv6":
        return Op(lambda inputs: wkv6(**inputs))
    return Op(lambda inputs: wkv7(**inputs, min_log_decay=MIN_LOG_DECAY))


def plain(op: str) -> Op:
    def run(inputs: Inputs) -> tuple[Tensor, Tensor]:
        with kernel_backend("torch"):
            return ours(op)(inputs)

    return Op(run)


def loop(op: str) -> Op:
    """The recurrence as the papers print it, one token after the other."""

    def run(inputs: Inputs) -> tuple[Tensor, Tensor]:
        x = {name: tensor.float() for name, tensor in inputs.items()}
        B, T, H, K = x["r"].shape
        S = x.get("initial_state", torch.zeros(B, H, K, K, device=x["r"].device))  # [B, H, K, V]
        out = []
        for t in range(T):
            r, w, k, v = (x[name][:, t, :, :, None] for name in "rwkv")
            written = k @ v.mT
            if op == "wkv6":
                out.append((r.mT @ (S + x["u"][..., None] * written)).squeeze(-2))
                S = w.exp() * S + written
            else:
                a, b = (x[name][:, t, :, :, None] for name in "ab")
                S = w.exp() * S + b @ (a.mT @ S) + written
                out.append((r.mT @ S).squeeze(-2))
        return torch.stack(out, 1).to(inputs["r"].dtype), S

    return Op(run)


def peers(op: str, device: str) -> dict[str, Op]:
    """Name -> another way to compute the same: of this package, or a peer."""
    if device == "cpu":
        return {PLAIN: plain(op), "loop over tokens": loop(op)}
    return {PLAIN: plain(op)} | flash_linear_attention(op)


def flash_linear_attention(op: str) -> dict[str, Op]:
    """Its ops, with the state [B, H, K, V] as here and without its scale. Its layers use a chunk of 64 for RWKV-7.

    They get log decays in the model's dtype, as from its layers.
    """
    try:
        from fla.ops.rwkv6 import chunk_rwkv6, fused_recurrent_rwkv6
        from fla.ops.rwkv7 import chunk_rwkv7, fused_mul_recurrent_rwkv7
    except Exception as error:  # not there, or not for this torch or Triton
        typer.secho(f"Without the peer flash-linear-attention: {first_line(error)}.", err=True, fg="yellow")
        return {}
    fixed = dict(scale=1.0, output_final_state=True)

    def in_dtype(inputs: Inputs) -> Inputs:
        return inputs | {"w": inputs["w"].to(inputs["r"].dtype)}

    if op == "wkv6":
        return {
            "fla chunk": Op(lambda inputs: chunk_rwkv6(**inputs, **fixed), in_dtype),
            "fla recurrent": Op(lambda inputs: fused_recurrent_rwkv6(**inputs, **fixed), in_dtype),
        }

    def with_key_and_rate(inputs: Inputs) -> Inputs:
        others = {name: x for name, x in in_dtype(inputs).items() if name not in "ab"}
        return others | {"kk": -inputs["a"], "a": (-inputs["b"] / inputs["a"]).nan_to_num()}

    layer = dict(safe_gate=True, lower_bound=MIN_LOG_DECAY, chunk_size=64)
    return {
        FLA_LAYER: Op(lambda inputs: chunk_rwkv7(**inputs, **fixed, **layer), in_dtype),
        "fla chunk": Op(lambda inputs: chunk_rwkv7(**inputs, **fixed), in_dtype),
        "fla recurrent": Op(
            lambda inputs: fused_mul_recurrent_rwkv7(**inputs, **fixed), with_key_and_rate, has_backward=False
        ),
    }


# --- is it right? -------------------------------------------------------------------------------------


def results(op: Op, inputs: Inputs, gradient: Tensor | None) -> Inputs:
    """The output, the final state and, if the output's gradient is given, the gradients of all inputs."""
    if gradient is None:
        with torch.no_grad():
            out, state = op(inputs)
        return {"y": out, "state": state}
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out, state = op(leaves)
    gradients = torch.autograd.grad(out, list(leaves.values()), gradient)
    return {"y": out.detach(), "state": state.detach()} | dict(
        zip((f"d{name}" for name in leaves), gradients)
    )


def last_heads(results: Inputs, count: int) -> Inputs:
    """Take the last heads of y and its gradients [B, T, H, K], of states [B, H, K, V] and of u [H, K]."""
    heads = {"state": 1, "initial_state": 1, "dinitial_state": 1, "u": 0, "du": 0}
    return {
        name: x.narrow(heads.get(name, 2), x.shape[heads.get(name, 2)] - count, count)
        for name, x in results.items()
    }


def worst_error(op: Op, reference: Op, inputs: Inputs, with_gradients: bool) -> tuple[float, str]:
    """The largest relative norm error, and of what. Heads are independent: float64 computes the last two."""
    gradient = torch.randn_like(inputs["v"]) if with_gradients else None
    count = min(2, inputs["r"].shape[2])
    found = last_heads(results(op, inputs, gradient), count)
    exact_inputs = {name: x.double() for name, x in last_heads(inputs, count).items()}
    exact_gradient = None if gradient is None else last_heads({"y": gradient.double()}, count)["y"]
    exact = results(reference, exact_inputs, exact_gradient)
    errors = {name: float((found[name].double() - exact[name]).norm() / exact[name].norm()) for name in exact}
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return errors[worst], worst


# --- how fast? ----------------------------------------------------------------------------------------


def modes_of(case: Case, device: str) -> list[str]:
    modes = [FORWARD, GRAPH] if device == "cuda" else [FORWARD]
    return modes if case.T == 1 else [*modes, BACKWARD, BOTH]


def prepared(mode: str, op: Op, inputs: Inputs) -> Callable[[], object]:
    """Return the function that is timed."""
    if mode in (FORWARD, GRAPH):
        adapted = op.adapt(inputs)

        def forward() -> object:
            with torch.no_grad():
                return op.run(adapted)

        return captured(forward) if mode == GRAPH else forward
    leaves = {name: x.detach().requires_grad_() for name, x in op.adapt(inputs).items()}
    gradient = torch.randn_like(inputs["v"])

    def both() -> object:
        return torch.autograd.grad(op.run(leaves)[0], list(leaves.values()), gradient)

    if mode == BOTH:
        return both
    out, _ = op.run(leaves)
    return lambda: torch.autograd.grad(out, list(leaves.values()), gradient, retain_graph=True)


def least_seconds(case: Case, mode: str, inputs: Inputs, bandwidth: float, rate: float) -> float:
    """The roofline. Every product of the forward has two in the backward."""
    given = sum(x.nbytes for x in inputs.values())
    out = inputs["v"].nbytes
    state = 4 * case.B * case.H * HEAD_SIZE**2
    per_element = (
        5 if case.op == "wkv6" else 9
    )  # read the state, decay it, write to it; RWKV-7: remove as well
    operations = per_element * case.B * case.T * case.H * HEAD_SIZE**2
    forward = max((given + out + state) / bandwidth, operations / rate)
    backward = max((2 * given + out) / bandwidth, 2 * operations / rate)
    return {BACKWARD: backward, BOTH: forward + backward}.get(mode, forward)


def verdict(case: Case, mode: str, device: str, seconds: float, fastest_peer: float) -> str:
    said = []
    for target in TARGETS:
        if not target.fits(case, mode, device):
            continue
        if target.seconds < math.inf:
            word = "met" if seconds <= target.seconds else "missed"
            said.append(f"<= {readable(target.seconds)}: {word}")
        if target.times_faster and fastest_peer < math.inf:
            times = fastest_peer / seconds
            word = "met" if times >= target.times_faster else "missed"
            said.append(f">= {target.times_faster:g} x fastest peer: {times:.2f} x, {word}")
    return "; ".join(said)


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def parse_shapes(shapes: list[str], device: str) -> list[tuple[int, int, int]]:
    if not shapes:
        return GPU_SHAPES if device == "cuda" else CPU_SHAPES
    wrong = [shape for shape in shapes if not re.fullmatch(r"([1-9]\d*x){2}[1-9]\d*", shape)]
    if wrong:
        raise typer.BadParameter(f"A shape is BxTxH, for example 8x4096x64; got {', '.join(wrong)}.")
    return [(B, T, H) for B, T, H in (map(int, shape.split("x")) for shape in shapes)]


def measure(
    case: Case,
    device: str,
    dtype: torch.dtype,
    seconds: float,
    rates: tuple[float, float],
    others: Mapping[str, Op] | None = None,
) -> list[dict]:
    """Rows of the table for a case, beside `others`; None is all `peers`.

    Raises:
        ArithmeticError: this package's result is wrong.
    """
    inputs = random_inputs(case, device, dtype)
    reference, tolerance, with_gradients = plain(case.op), TOLERANCE[dtype], case.T > 1
    error, of = worst_error(ours(case.op), reference, inputs, with_gradients)
    if not error <= tolerance:
        raise ArithmeticError(f"{case.op} {case.shape}: {of} has error {error:.1e}, allowed {tolerance:.0e}.")
    ops, errors, rows = {OURS: ours(case.op)}, {OURS: error}, []
    for name, op in (peers(case.op, device) if others is None else others).items():
        try:
            errors[name], _ = worst_error(op, reference, inputs, with_gradients and op.has_backward)
        except Exception as failure:  # another package's: whatever it is, it is no reason to stop
            rows.append(row(case, "", name, note=first_line(failure)))
            continue
        if errors[name] <= PEER_SLACK * tolerance:
            ops[name] = op
        else:
            rows.append(row(case, "", name, error=errors[name], note="wrong: not timed"))
    for mode in modes_of(case, device):
        functions = {}
        for name, op in ops.items():
            if mode in (BACKWARD, BOTH) and not op.has_backward:
                continue
            try:
                functions[name] = prepared(mode, op, inputs)
                functions[name]()
            except Exception as failure:
                if name == OURS:
                    raise
                functions.pop(name, None)
                rows.append(row(case, mode, name, note=first_line(failure)))
        timings = interleaved(functions, device, seconds)
        mine = timings[OURS].median
        fastest = min(
            (t.median for name, t in timings.items() if name not in (OURS, PLAIN)), default=math.inf
        )
        least = least_seconds(case, mode, inputs, *rates)
        for name, timing in timings.items():
            note = verdict(case, mode, device, mine, fastest) if name == OURS else ""
            rows.append(row(case, mode, name, timing, mine, least, errors[name], note))
    return rows


def first_line(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}".splitlines()[0][:80]


def row(
    case: Case,
    mode: str,
    name: str,
    timing: Timing | None = None,
    mine: float = math.nan,
    least: float = math.nan,
    error: float | None = None,
    note: str = "",
) -> dict[str, Any]:
    return {
        **case._asdict(),
        "mode": mode,
        "implementation": name,
        "seconds": timing and timing.median,
        "low": timing and timing.low,
        "high": timing and timing.high,
        "count": timing and timing.count,
        "ratio": timing and timing.median / mine,
        "roofline_seconds": timing and least,
        "error": error,
        "note": note,
    }


def readable_row(row: dict[str, Any]) -> dict[str, str]:
    timed = row["seconds"] is not None
    return {
        "op": row["op"],
        "B x T x H": f"{row['B']} x {row['T']:,} x {row['H']}",
        "": row["mode"],
        "implementation": row["implementation"],
        "median": readable(row["seconds"]) if timed else "",
        "fifths": f"{readable(row['low'])} to {readable(row['high'])}" if timed else "",
        "time / ours": f"{row['ratio']:.2f}" if timed else "",
        "of the roofline": f"{row['roofline_seconds'] / row['seconds']:.1%}" if timed else "",
        "error": f"{row['error']:.1e}" if row["error"] is not None else "",
        "target": row["note"],
    }


def main(
    shapes: Annotated[list[str] | None, typer.Option(help="BxTxH; may be given several times.")] = None,
    op: Annotated[Literal["both", "wkv6", "wkv7"], typer.Option()] = "both",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 on a GPU, float32 on a CPU.")] = None,
    seconds: Annotated[float, typer.Option(help="To measure each implementation in each way.")] = 0.3,
    threads: Annotated[int | None, typer.Option(help="Of the CPU.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the numbers to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the table to this file.")] = None,
) -> None:
    """The WKV recurrences against their peers and against what the machine can do at best."""
    device = chosen_device(device, threads)
    chosen: torch.dtype = getattr(torch, dtype or ("bfloat16" if device == "cuda" else "float32"))
    backend = (
        "triton"  # refuses where its kernels cannot be used, so that nothing else is timed in their name
    )
    if device == "cpu":
        backend = "auto"
        try:
            build_native_ops()
            backend = "native"
        except RuntimeError as error:
            typer.secho(f"Without native ops: {error}", err=True, fg="yellow")
    cases = [
        Case(name, *shape)
        for name in (("wkv6", "wkv7") if op == "both" else (op,))
        for shape in parse_shapes(shapes or [], device)
    ]
    rates = copy_bandwidth(device, 2**30 if device == "cuda" else 2**26), matmul_rate(device, chosen)
    try:
        with kernel_backend(backend):
            rows = [row for case in cases for row in measure(case, device, chosen, seconds, rates)]
    except ArithmeticError as error:
        typer.secho(f"Wrong, so no times: {error}", err=True, fg="red")
        raise typer.Exit(1) from error
    about = {**machine(device), "dtype": str(chosen).removeprefix("torch.")}
    if device == "cuda":
        about["flash-linear-attention"] = version_of("flash-linear-attention")
    about |= {"copy_bytes_per_second": rates[0], "matmul_operations_per_second": rates[1]}
    head = (
        f"{about['device']}, {about['threads']} threads, torch {about['torch']}, {about['dtype']}; "
        f"a copy {rates[0] / 1e9:,.0f} GB/s, a matrix product {rates[1] / 1e12:,.2f} TFLOP/s\n\n"
    )
    if device == "cuda":
        head = f"flash-linear-attention {about['flash-linear-attention']}; {head}"
    text = head + markdown_table([readable_row(row) for row in rows])
    report(text, {"about": about, "rows": rows}, markdown, json)


if __name__ == "__main__":
    typer.run(main)
