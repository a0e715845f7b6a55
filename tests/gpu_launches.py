"""Which kernels examples/gpu_session.py launches on a GPU, and how they are compiled ahead, with or without one.

The ops are called on small CPU tensors while launches are recorded (see `recorded` in tests/compile_kernels.py), so
that each kernel is compiled with the specialization that Triton will ask its cache for.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from visualrwkv_hf import VisualRWKVForCausalLM, VisualRWKVTextConfig, wkv6, wkv7
from visualrwkv_hf.generations import GENERATIONS
from visualrwkv_hf.layer_state import LayerState, empty_pool
from visualrwkv_hf.low_rank import low_rank as model_low_rank  # noqa: F401, for benchmark_launch.py
from visualrwkv_hf.modeling_rwkv import RwkvBlock
from visualrwkv_hf.token_order import token_shift as model_token_shift  # noqa: F401
from visualrwkv_hf.triton_kernels import launches

TESTS = Path(__file__).parent
MIN_LOG_DECAY = -0.6065306597126334
MODEL = (64, torch.bfloat16, True)
"""The row of `launches.WKV7` that RWKV-7 models in bfloat16 use."""
KERNELS = {"prepare": (16, 32, 64), "gradients": (16, 32, 64), "keys": (16, 32, 64)}
"""Fields of `launches.Config` that are varied, and their block sizes."""
WARPS = (2, 4, 8)
MANY_TOKENS = launches.LONG
"""They launch the same kernels as the 1,088 or 4,096 tokens that the session times."""


@contextlib.contextmanager
def launched_with(field: str, block: int, warps: int) -> Iterator[None]:
    """Launch one of wkv7's kernels otherwise inside a `with` block."""
    table, before = launches.WKV7, launches.WKV7[MODEL]
    table[MODEL] = before._replace(**{field: launches.Launch(block, warps)})
    try:
        yield
    finally:
        table[MODEL] = before


def variants() -> list[tuple[str, int, int]]:
    """Return (field, block, warps) of all ways to launch wkv7's kernels that are timed."""
    return [(field, block, warps) for field, blocks in KERNELS.items() for block in blocks for warps in WARPS]


# --- what is called -----------------------------------------------------------------------------------


def call_wkv(op: str, B: int, T: int, H: int, training: bool, device: str = "cpu") -> None:
    """Call wkv6 or wkv7 in bfloat16 with heads of 64 as benchmark_wkv.py does: without gradients, and with them."""
    generator = torch.Generator(device).manual_seed(0)
    x = 0.1 * torch.randn(B, T, H, 64, generator=generator, device=device)
    r = x.bfloat16().requires_grad_(training)
    w = (-0.5 * torch.ones_like(x)).requires_grad_(training)
    state = torch.zeros(B, H, 64, 64, device=device) if T == 1 else None

    def called() -> torch.Tensor:
        if op == "wkv6":
            return wkv6(r, w, r, r, torch.zeros(H, 64, dtype=r.dtype, device=device), state)[0]
        return wkv7(r, w, r, r, r, r, state, min_log_decay=MIN_LOG_DECAY)[0]

    with torch.no_grad():
        called()
    if training:
        y = called()
        torch.autograd.grad(y, [r, w], torch.ones_like(y))


def decoding_layer(
    H: int, ranks: tuple[int, ...], B: int, version: int = 7, layer: int = 1
) -> Callable[[], object]:
    """Return a function that computes one token of B sequences in one layer, in bfloat16 and without gradients."""
    generation, names = GENERATIONS[version], ("decay", "a", "gate", "v")
    config = VisualRWKVTextConfig(
        rwkv_version=version,
        **dict(vocab_size=8, hidden_size=H * 64, head_dim=64, num_hidden_layers=2),
        **{f"{name}_low_rank_dim": rank for name, rank in zip(names, ranks)},
    )
    with torch.device("meta"):
        block = RwkvBlock(config, layer).bfloat16().eval()
    # Memory that nobody writes to costs nothing.
    block = block.to_empty(device="cpu").requires_grad_(False)
    state = LayerState(empty_pool(generation.states, config, B, torch.bfloat16, "cpu"))
    token = torch.zeros(B, 1, H * 64, dtype=torch.bfloat16)
    return torch.no_grad()(lambda: block(token, token if layer and version == 7 else None, state))


def call_decoding(H: int = 64, ranks: tuple[int, ...] = (128, 128, 480, 96)) -> None:
    """Compute one token of 1, 8 and 64 sequences in the layers of a 7B model, of which the first differs."""
    for B in (1, 8, 64):
        for layer in (0, 1):
            decoding_layer(H, ranks, B, layer=layer)()


def call_tests() -> None:
    """Call the ops as tests/kernels/test_gpu.py does."""
    sys.path[:0] = [str(TESTS / "kernels"), str(TESTS / "support")]
    import test_gpu
    from tiny import awake, text_config

    test_gpu.DEVICE = "cpu"
    for op in (wkv6, wkv7):
        for shape in test_gpu.SHAPES.values():
            for dtype in test_gpu.TOLERANCE:
                order = torch.arange(shape[1]).repeat(shape[0], 1)
                test_gpu.run(op, test_gpu.inputs_of(op, *shape, dtype), "triton", order)
    for version in (5, 6, 7):
        for dtype in (torch.float32, torch.bfloat16):
            config = text_config(version, head_dim=64, hidden_size=256)
            model = awake(VisualRWKVForCausalLM(config)).to(dtype)
            test_gpu.logits_and_gradients(model, torch.ones(2, 200, dtype=torch.long), "triton")


def calls(with_tests: bool = True) -> Mapping[str, Callable[[], None]]:
    """Return what is called, by name."""
    found: dict[str, Callable[[], None]] = {}
    for op in ("wkv7", "wkv6"):
        for B, T, H, training in (
            (3, MANY_TOKENS, 64, True),
            (1, MANY_TOKENS, 64, False),
            (64, 1, 64, False),
        ):
            heads = 32 if op == "wkv6" else H
            batch = 8 if (op, B) == ("wkv6", 3) else B
            found[f"{op} {batch}x{T}x{heads}"] = lambda op=op, B=batch, T=T, H=heads, t=training: call_wkv(
                op, B, T, H, t
            )
    for H in (12, 32, 64):
        found[f"wkv7 picture, {H} heads"] = lambda H=H: call_wkv("wkv7", 1, MANY_TOKENS, H, True)
    found["decoding, 7B"] = call_decoding
    for field, block, warps in variants():

        def varied(field: str = field, block: int = block, warps: int = warps) -> None:
            with launched_with(field, block, warps):
                call_wkv("wkv7", 3, MANY_TOKENS, 64, True)

        found[f"{field} {block} {warps}"] = varied
    if with_tests:
        found["tests"] = call_tests
    return found


# --- compiled -----------------------------------------------------------------------------------------


def launches_of(called: Mapping[str, Callable[[], None]], target: str = "sm_90") -> list[dict[str, Any]]:
    """Return every distinct launch of these calls, as Triton would compile it."""
    sys.path.insert(0, str(TESTS))
    import compile_kernels

    from visualrwkv_hf import kernel_backend

    found: dict[str, dict[str, Any]] = {}
    for call in called.values():
        with compile_kernels.recorded(target) as recorded, kernel_backend("triton"):
            call()
        for one in recorded:
            parts = (
                one["kernel"].__name__,
                one["signature"],
                one["constexprs"],
                one["attrs"],
                one["settings"],
            )
            found.setdefault(" ".join(map(str, parts)), one)
    return list(found.values())


def compile_one(launch: Mapping[str, Any], target: str = "sm_90") -> str:
    """Compile a launch into Triton's cache, if it is not there; return what went wrong, empty if nothing."""
    import compile_kernels
    import triton
    from triton.compiler import ASTSource

    source = ASTSource(launch["kernel"], launch["signature"], launch["constexprs"], launch["attrs"])
    options = dataclasses.asdict(launch["settings"])
    try:
        triton.compile(source, target=compile_kernels.TARGETS[target].gpu, options=options)
    except Exception as error:  # of many kinds; a variant may want more shared memory than there is
        return f"{launch['kernel'].__name__}: {type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return ""


_launches: list[dict[str, Any]] = []
"""Handed to worker processes by forking: what Triton knows of a kernel cannot be pickled."""


def compile_number(number: int) -> str:
    return compile_one(_launches[number])


def compile_under(key: str) -> None:
    """Compile all launches of the session under this key of Triton's cache: that of the machine's Triton."""
    import multiprocessing
    import os
    from concurrent.futures import ProcessPoolExecutor

    import triton
    from triton.runtime import cache

    cache.triton_key = lambda: key
    _launches[:] = launches_of(calls())
    print(f"Compiling {len(_launches)} launches with Triton {triton.__version__}.", flush=True)
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        for problem in pool.map(compile_number, range(len(_launches))):
            if problem:
                print(problem, flush=True)


if __name__ == "__main__":
    compile_under(sys.argv[1])
