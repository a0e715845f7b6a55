"""The engines that benchmark_prefill.py and benchmark_decode.py compare: ways to run one RWKV-7 with random weights."""

import contextlib
import copy
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typer
from benchmarking import Timing, captured, copy_bandwidth, interleaved, machine, markdown_table, readable
from llama_cpp_engine import reader, write_gguf
from transformers.initialization import no_init_weights

from visualrwkv_hf import VisualRWKVForCausalLM, VisualRWKVTextConfig, accelerate_on_cpu, kernel_backend
from visualrwkv_hf.conversion import restore_state_dict

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"num_hidden_layers": 2, "hidden_size": 128, "vocab_size": 320},
    "0.1B": {"num_hidden_layers": 12, "hidden_size": 768},
    "1.5B": {"num_hidden_layers": 24, "hidden_size": 2048},
    "7B": {"num_hidden_layers": 32, "hidden_size": 4096},
}
PEER = "PyPI rwkv"
OURS = "visualrwkv-hf"
STEPS = 4
"""Number of tokens read one by one after the prompt when an engine is checked."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "int8": 5e-2, "int4": 0.5}
"""Limits on the relative norm error of the logits. Rounding all weights to 8 bits costs about 1e-2 in twelve layers, to
4 bits some sixteen times as much: random weights have no redundancy."""

ROUNDED = ("int8", "int4")
"""Precisions of weights that `accelerate_on_cpu` rounds."""

LLAMA_CPP = "llama.cpp"
"""On a CPU, engines are compared with it in the same precision, where it is installed."""

SIMD = (
    "avx2",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "i8mm",
)
"""Flags of a CPU that the times depend on."""


class Engine(NamedTuple):
    """`read(tokens [T], state)` gives the last token's logits [vocab_size] and the state; None starts a text.

    A state may be written in place. With `is_graph` what is timed is recorded as a CUDA graph first.
    """

    name: str
    precision: str
    read: Callable[[torch.Tensor, Any], tuple[torch.Tensor, Any]]
    weight_bytes: int
    is_graph: bool = False


def random_model(
    shape: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> VisualRWKVForCausalLM:
    """Random weights everywhere (freshly initialised, half of the model adds nothing), made where they stay."""
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"), no_init_weights():
        model = VisualRWKVForCausalLM(VisualRWKVTextConfig(rwkv_version=7, **SHAPES[shape])).to(dtype)
    model.to_empty(device=device)
    for name, weight in model.named_parameters():
        weight.requires_grad_(False)
        if weight.ndim == 1:  # of a norm
            weight.fill_(name.endswith("weight"))
        elif name.endswith("embed_tokens.weight"):
            weight.normal_(generator=generator)
        elif name.endswith("w0"):
            weight.uniform_(-6, -1, generator=generator)
        elif weight.ndim == 3:  # of a token shift and the like, [1, 1, C]
            weight.uniform_(0, 1, generator=generator)
        else:
            weight.normal_(std=0.5 * max(weight.shape) ** -0.5, generator=generator)
    return model.eval()


def ours(name: str, precision: str, model: VisualRWKVForCausalLM, backend: str = "auto") -> Engine:
    def read(tokens: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        with kernel_backend(backend):
            out = model(tokens[None], past_key_values=state, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1], out.past_key_values

    return Engine(f"{OURS}, {name}" if name else OURS, precision, read, weight_bytes(model))


def weight_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of weights that one token reads: all but the embedding table."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(x.nbytes for x in tensors) - model.get_input_embeddings().weight.nbytes


def our_engines(model: VisualRWKVForCausalLM, device: str, precisions: Sequence[str]) -> Iterator[Engine]:
    """This package's ways. The first is the plain one in float32, by which all are judged."""
    yield ours("plain torch", "float32", model.float(), "torch")
    for precision in precisions:
        weights = precision if precision in ROUNDED else None
        dtype = torch.float32 if weights else getattr(torch, precision)
        if device == "cpu":
            if precision == "bfloat16":
                yield ours("plain torch", precision, copy.deepcopy(model).to(dtype), "torch")
            native = accelerate_on_cpu(copy.deepcopy(model).to(dtype), weights=weights)
            yield ours("native", precision, native)
        else:
            on_device = model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)
            yield ours("plain torch", precision, on_device, "torch")
            # "auto" would time plain torch in Triton's name where its kernels cannot be used.
            yield ours("Triton", precision, on_device, "triton")
            yield ours("Triton, graph", precision, on_device, "triton")._replace(is_graph=True)


def peer_engines(model: VisualRWKVForCausalLM, device: str, precisions: Sequence[str]) -> Iterator[Engine]:
    """Others that read the same weights, as far as they are installed; the first is the one to be compared with."""
    yield from rwkv_engines(model, device, precisions)
    if device == "cpu":
        yield from llama_cpp_engines(model, precisions)


def llama_cpp_engines(model: VisualRWKVForCausalLM, precisions: Sequence[str]) -> Iterator[Engine]:
    """llama.cpp, one file of weights for each precision."""
    try:
        import gguf  # noqa: F401
        import llama_cpp  # noqa: F401
    except ImportError as error:
        typer.secho(f"Without the peer llama.cpp: {error}.", err=True, fg="yellow")
        return
    weights = original_weights(model)
    for precision in precisions:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "model.gguf"
            write_gguf(path, weights, model.config, precision)
            yield Engine(LLAMA_CPP, precision, reader(path, model.config.vocab_size), 0)


def original_weights(model: VisualRWKVForCausalLM) -> dict[str, torch.Tensor]:
    """Under the original's names for a language model alone."""
    original = restore_state_dict(model.state_dict(), model.config)
    return {name.removeprefix("rwkv."): weight.clone() for name, weight in original.items()}


def rwkv_engines(model: VisualRWKVForCausalLM, device: str, precisions: Sequence[str]) -> Iterator[Engine]:
    """The package `rwkv` by the author of RWKV."""
    # It looks there when it is imported. Its CUDA kernels need a compiler.
    has_nvcc = device == "cuda" and shutil.which("nvcc") is not None
    os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "1" if has_nvcc else "0"}
    with contextlib.redirect_stdout(sys.stderr):
        try:
            import rwkv.model as peer
        except ImportError as error:
            typer.secho(f"Without the peer {PEER}: {error}.", err=True, fg="yellow")
            return
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "model"
            torch.save(original_weights(model), f"{path}.pth")
            for precision, strategy in (("float32", "fp32"), ("bfloat16", "bf16")):
                if precision in precisions:
                    loaded = peer.RWKV(model=str(path), strategy=f"{device} {strategy}")
                    yield Engine(PEER, precision, _peer_reader(peer, loaded), 0)


def _peer_reader(peer: Any, loaded: Any) -> Callable[[torch.Tensor, Any], tuple[torch.Tensor, Any]]:
    dtype = loaded.z["emb.weight"].dtype

    def read(tokens: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        peer.DTYPE = dtype  # of the states that it makes: that of the model loaded last, if not said
        return loaded.forward(tokens.tolist(), state)

    return read


def token_by_token(engine: Engine) -> Engine:
    """As an engine reads that knows no chunks: for want of another peer."""

    def read(tokens: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        for token in tokens.split(1):
            logits, state = engine.read(token, state)
        return logits, state

    return engine._replace(name="one token at a time", read=read)


def checked(engines: Sequence[Engine], tokens: torch.Tensor) -> tuple[list[Engine], dict[Engine, float]]:
    """The engines that compute what the first one does, and the relative error of each one's logits.

    They are compared after the prompt, and again after each of the first tokens, which are read one by one.

    Raises:
        ArithmeticError: this package's are wrong. A peer that is wrong is left out.
    """
    reference = _logits(engines[0], tokens)
    errors = {
        each: ((_logits(each, tokens) - reference).norm() / reference.norm()).item() for each in engines
    }
    for engine, error in errors.items():
        if not error <= TOLERANCE[engine.precision]:
            said = f"{engine.name}, {engine.precision}: error {error:.1e} > {TOLERANCE[engine.precision]:.0e}"
            if engine.name.startswith(OURS):
                raise ArithmeticError(said)
            typer.secho(f"Left out, for it is wrong: {said}", err=True, fg="yellow")
    return [each for each in engines if errors[each] <= TOLERANCE[each.precision]], errors


def _logits(engine: Engine, tokens: torch.Tensor) -> torch.Tensor:
    logits, state = engine.read(tokens, None)
    read = [logits.double()]
    for token in tokens[:STEPS].split(1):
        logits, state = engine.read(token, state)
        read.append(logits.double())
    return torch.cat(read)


def compared(
    shape: str,
    device: str,
    precisions: Sequence[str],
    tokens: int,
    seconds: float,
    prepare: Callable[[Engine, torch.Tensor], Callable[[], object]],
    tokens_timed: int,
) -> tuple[str, dict[str, Any]]:
    """The whole of a benchmark: engines built, checked, timed in turn -> the table's text, and its numbers.

    Args:
        shape: of `SHAPES`.
        device: cpu or cuda.
        precisions: of `TOLERANCE`, what is asked for beside the reference.
        tokens: length of the prompt.
        seconds: to time each engine.
        prepare: (engine, prompt [T]) -> what is timed.
        tokens_timed: how many tokens that reads.

    Raises:
        ArithmeticError: see [`checked`].
    """
    model = random_model(shape, device)
    prompt = torch.randint(1, model.config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0))
    prompt = prompt.to(device)
    engines = list(our_engines(model, device, precisions))
    peers = list(peer_engines(model, device, precisions)) or [token_by_token(engines[0])]
    engines, errors = checked([*engines, *peers], prompt)
    functions = {each: prepare(each, prompt) for each in engines}
    functions |= {each: captured(function) for each, function in functions.items() if each.is_graph}
    timings = interleaved(functions, device, seconds, least=5)
    bandwidth = copy_bandwidth(device, 2**20 if shape == "tiny" else 2**28)
    rows = [
        row(each, timings[each], peer, timings.get(peer), errors[each], tokens_timed, bandwidth)
        for each in engines
        for peer in [peer_of(each, engines, peers)]
    ]
    about = machine(device) | {
        "shape": shape,
        "parameters": model.num_parameters(),
        "prompt": tokens,
        "rwkv": _version("rwkv"),
        "load": os.getloadavg()[0],
        "copy_bytes_per_second": bandwidth,
    }
    head = (
        f"RWKV-7 {shape}, {about['parameters'] / 1e6:,.0f} M parameters, random weights; {about['device']}, "
        f"{about['threads']} threads, torch {about['torch']}, rwkv {about['rwkv']}, "
        f"llama-cpp-python {_version('llama-cpp-python')}; flags {' '.join(simd_flags(device)) or 'unknown'}; "
        f"a copy {bandwidth / 1e9:,.0f} GB/s; load {about['load']:.1f}\n\n"
    )
    return head + markdown_table([readable_row(each) for each in rows]), {"about": about, "rows": rows}


def peer_of(engine: Engine, engines: Sequence[Engine], peers: Sequence[Engine]) -> Engine | None:
    """Return what an engine is compared with: llama.cpp in its precision, else another peer in it, else the first."""
    names = [LLAMA_CPP, *(peer.name for peer in peers)]
    same = [each for name in names for each in engines if each[:2] == (name, engine.precision)]
    return next(iter([*same, *(each for each in engines if each.name == peers[0].name)]), None)


def simd_flags(device: str) -> list[str]:
    """Return which of `SIMD` this CPU has; none for a GPU, or where the system does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    if device != "cpu" or not cpuinfo.exists():
        return []
    lines = (line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features")))
    return [flag for flag in next(lines, "").split() if flag in SIMD]


def row(
    engine: Engine,
    timing: Timing,
    peer: Engine | None,
    peer_timing: Timing | None,
    error: float,
    tokens: int,
    bandwidth: float,
) -> dict[str, Any]:
    return {
        "engine": engine.name,
        "precision": engine.precision,
        "seconds": timing.median,
        "low": timing.low,
        "high": timing.high,
        "count": timing.count,
        "tokens_per_second": tokens / timing.median,
        "times_peer": peer_timing and peer_timing.median / timing.median,
        "peer": peer and f"{peer.name}, {peer.precision}",
        # A copy reads and writes; weights are read only.
        "streaming_seconds": engine.weight_bytes / bandwidth if engine.weight_bytes and tokens == 1 else None,
        "error": error,
    }


def readable_row(row: Mapping[str, Any]) -> dict[str, str | None]:
    limit = row["streaming_seconds"]
    return {
        "engine": row["engine"],
        "weights": row["precision"],
        "median": readable(row["seconds"]),
        "fifths": f"{readable(row['low'])} to {readable(row['high'])}",
        "tokens/s": f"{row['tokens_per_second']:,.0f}",
        "times the peer's speed": f"{row['times_peer']:.2f}" if row["times_peer"] else None,
        "peer": row["peer"],
        "weights at the rate of a copy": readable(limit) if limit else None,
        "error": f"{row['error']:.1e}",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
