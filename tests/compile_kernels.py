"""Compile what the Triton ops launch, for GPUs that are not there, and read what the machine code needs.

    python tests/compile_kernels.py --targets sm_90 --ops wkv7 --dtypes bf16 --head-sizes 64

The ops themselves are called, on CPU tensors. Each launch is recorded where Triton would compile it, with the
specialization that Triton chose, and every distinct one is compiled. The exit status is 1 if a kernel does not compile,
spills more registers than `MAY_SPILL` says, wants more shared memory than a block may have, has a tl.dot that
misses the matrix units, or has more instructions or barriers than `LIMITS` allows. To use another Triton, install it
beside (`pip install --no-deps --target FOLDER triton==3.6.0`) and set PYTHONPATH=FOLDER.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from visualrwkv_hf.triton_kernels import launches
from visualrwkv_hf.triton_kernels.decode import rwkv6_decode, rwkv7_decode, rwkv7_decode_low_rank
from visualrwkv_hf.triton_kernels.low_rank import low_rank
from visualrwkv_hf.triton_kernels.norm_shift import norm_shift
from visualrwkv_hf.triton_kernels.products import products
from visualrwkv_hf.triton_kernels.token_shift import token_shift
from visualrwkv_hf.triton_kernels.wkv6 import wkv6
from visualrwkv_hf.triton_kernels.wkv7 import wkv7

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEAD_SIZES = (32, 64, 128)


class Target(NamedTuple):
    """A GPU.

    Attributes:
        gpu: as Triton names it.
        shared: bytes of shared memory that one block may have.
        shared_total: bytes of shared memory of a processor.
        warps: the most warps that a processor holds.
    """

    gpu: GPUTarget
    shared: int
    shared_total: int
    warps: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024, 164 * 1024, 64),
    "sm_86": Target(GPUTarget("cuda", 86, 32), 99 * 1024, 100 * 1024, 48),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 99 * 1024, 100 * 1024, 48),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024, 228 * 1024, 64),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024, 228 * 1024, 64),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99 * 1024, 100 * 1024, 48),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024, 64 * 1024, 32),
}
QUICK_TARGETS = ("sm_80", "sm_90", "gfx942")
"""What `--quick` compiles for: two generations of NVIDIA and one of AMD."""
QUICK_ELSEWHERE = (("sm_86", "128"), ("sm_100", "64"), ("sm_120", "64"), ("sm_120", "128"))
"""(target, head size) for which `--quick` compiles only wkv7's training in bfloat16: what needs the most registers and
shared memory."""


class Limit(NamedTuple):
    """The most instructions and barriers that a kernel's code may have."""

    instructions: int
    barriers: int


LIMITS = {
    "wkv7_fwd_prepare_kernel": Limit(2050, 88),
    "wkv7_fwd_scan_kernel": Limit(800, 14),
    "wkv7_bwd_scan_kernel": Limit(620, 14),
    "wkv7_bwd_values_kernel": Limit(650, 25),
    "wkv7_bwd_keys_kernel": Limit(2500, 56),
    "wkv6_fwd_prepare_kernel": Limit(1900, 50),
    "wkv6_bwd_gradients_kernel": Limit(3100, 62),
}
"""For the models' own shapes: sm_90, bfloat16, heads of 64, bounded decays in wkv7, Triton 3.9. A GPU issues about one
instruction per scheduler and clock, and these kernels are limited by that; so more of them is slower."""

LIMITS_OF_64_TOKENS = {
    "wkv7_fwd_prepare_kernel": Limit(3400, 94),
    "wkv7_fwd_scan_kernel": Limit(560, 8),
}
"""Likewise where a chunk has 64 tokens, not 32."""


MAY_SPILL = {
    ("wkv7_fwd_prepare_kernel", "bf16", 128): 8,
    ("wkv7_fwd_prepare_kernel", "fp16", 32): 8,
    ("wkv7_fwd_prepare_kernel", "fp16", 128): 8,
    ("wkv7_fwd_prepare_kernel", "fp32", 32): 8,
    ("wkv7_fwd_prepare_kernel", "fp32", 128): 32,
    ("wkv7_bwd_keys_kernel", "bf16", 64): 24,
    ("wkv7_bwd_keys_kernel", "bf16", 128): 24,
    ("wkv7_bwd_keys_kernel", "fp16", 32): 8,
    ("wkv7_bwd_keys_kernel", "fp16", 64): 8,
    ("wkv7_bwd_keys_kernel", "fp16", 128): 8,
    ("wkv7_bwd_keys_kernel", "fp32", 32): 80,
    ("wkv7_bwd_keys_kernel", "fp32", 64): 80,
    ("wkv7_bwd_keys_kernel", "fp32", 128): 80,
    ("rwkv7_decode_low_rank_fwd_kernel", "bf16", 128): 8,
    ("rwkv7_decode_low_rank_fwd_kernel", "fp16", 128): 8,
    ("rwkv7_decode_low_rank_fwd_kernel", "fp32", 128): 64,
}
"""Bytes of registers of a thread that a launch spills, by (kernel, dtype, head size): the most measured with Triton 3.6
and 3.9 over the launches of `--quick`. All others spill none.

The decoding kernel spills 8 bytes with Triton 3.6, and 64 in float32 with a pool of states, which `--quick` does not
compile; the second gradients kernel spills only where decays are not bounded. In bfloat16 nothing spills with Triton
3.9.
"""

MAY_SPILL_ON = {
    ("sm_100", "rwkv7_decode_low_rank_fwd_kernel", "bf16", 128): 16,
    ("sm_120", "rwkv7_decode_low_rank_fwd_kernel", "bf16", 128): 48,
    ("sm_120", "products_fwd_kernel", "bf16", 64): 8,
    ("sm_120", "wkv6_bwd_gradients_kernel", "bf16", 32): 8,
    ("sm_120", "wkv6_bwd_gradients_kernel", "bf16", 64): 24,
    ("sm_120", "wkv6_bwd_gradients_kernel", "bf16", 128): 8,
    ("sm_100", "wkv7_bwd_keys_kernel", "bf16", 32): 8,
}
"""The same by (target, kernel, dtype, head size), of targets for which the table of launches was not made."""


# --- what is called -----------------------------------------------------------------------------------


def backward(outputs: tuple[Tensor, ...]) -> None:
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])


def call_wkv(
    op: Callable[..., tuple[Tensor, Tensor]],
    dtype: torch.dtype,
    K: int,
    T: int = 100,
    sequences: int = 1,
    training: bool = True,
    order: bool = False,
    packed: bool = False,
    state: bool = False,
    **options: float,
) -> None:
    """wkv6 or wkv7 of 12 heads; w is float32, as in the model."""
    H, B = 12, 1 if packed else sequences
    x = torch.zeros(B, T, H, K, dtype=dtype, requires_grad=training)
    w = torch.zeros(B, T, H, K, requires_grad=training)
    S = torch.zeros(sequences, H, K, K, requires_grad=training)
    more = (torch.zeros(H, K, dtype=dtype, requires_grad=training),) if op is wkv6 else (x, x)
    outputs = op(
        *(x, w, x, x, *more),
        initial_state=S if state else None,
        order=torch.arange(T).repeat(B, 1) if order else None,
        cu_seqlens=torch.linspace(0, T, sequences + 1).int() if packed else None,
        **options,
    )
    if training:
        backward(outputs)


def call_token_shift(
    dtype: torch.dtype, K: int, T: int = 100, M: int = 6, order: bool = False, dynamic: bool = False
) -> None:
    B, C = 2, 12 * K
    x = torch.zeros(B, T, C, dtype=dtype, requires_grad=True)
    mixed = token_shift(
        x,
        torch.zeros(B, C, dtype=dtype, requires_grad=True),
        [torch.zeros(C, dtype=dtype, requires_grad=True) for _ in range(M)],
        previous=torch.arange(T).expand(B, T) if order else None,
        dynamic=torch.zeros(M, B, T, C, dtype=dtype, requires_grad=True) if dynamic else None,
    )
    if T > 1:
        backward(mixed)


def call_low_rank(dtype: torch.dtype, K: int, M: int = 4, C: int = 4096) -> None:
    x, ranks = torch.zeros(2, C, dtype=dtype), (128, 128, 480, 96)[:M]
    down = [torch.zeros(C, D, dtype=dtype) for D in ranks]
    up = [torch.zeros(D, C, dtype=dtype) for D in ranks]
    low_rank([x] * M, down, up, ("tanh", "identity", "sigmoid", "identity")[:M])


def call_norm_shift(
    dtype: torch.dtype,
    K: int,
    M: int = 6,
    C: int = 4096,
    mask: bool = False,
    pool: bool = False,
    **options: bool,
) -> None:
    B, row = 2, torch.zeros(C, dtype=dtype)
    norm_shift(
        *(torch.zeros(B, C, dtype=dtype), row, row, 1e-5, torch.zeros(B, C, dtype=dtype), [row] * M),
        mask=torch.ones(B, dtype=torch.bool) if mask else None,
        state_indices=torch.arange(B) if pool else None,
        **options,
    )


def call_products(dtype: torch.dtype, K: int, B: int = 1, C: int = 4096, last: bool = False) -> None:
    """The first products of RWKV-7's time mix; the last of a gated channel mix."""
    x = torch.zeros(B, C, dtype=dtype)
    if last:
        products([x], [torch.zeros(C, C, dtype=dtype)], ["squared_relu"], [True], residual=x, gate=x)
        return
    down = [torch.zeros(C, D, dtype=dtype) for D in (128, 128, 480, 96)]
    functions = [*["identity"] * 3, "tanh", "identity", "sigmoid", "identity"]
    products([x] * 7, [torch.zeros(C, C, dtype=dtype)] * 3 + down, functions, [True] * 3 + [False] * 4)


def call_rwkv7_decode_low_rank(
    dtype: torch.dtype, K: int, B: int = 2, first_layer: bool = False, mask: bool = False, pool: bool = False
) -> None:
    H, ranks = 2, (128, 128, 480) if first_layer else (128, 128, 480, 96)
    token, weight = torch.zeros(B, H * K, dtype=dtype), torch.zeros(H * K, dtype=dtype)
    rwkv7_decode_low_rank(
        *(token, token, token, None if first_layer else token),
        [torch.zeros(B, D, dtype=dtype) for D in ranks],
        [torch.zeros(D, H * K, dtype=dtype) for D in ranks],
        *(weight, weight, None if first_layer else weight, *[weight] * 5),
        torch.zeros(B, H, K, K),
        torch.ones(B, dtype=torch.bool) if mask else None,
        torch.arange(B) if pool else None,
        64e-5,
    )


def call_rwkv7_decode(
    dtype: torch.dtype, K: int, first_layer: bool = False, mask: bool = False, pool: bool = False
) -> None:
    B, H = 2, 2
    token, weight = torch.zeros(B, H * K, dtype=dtype), torch.zeros(H * K, dtype=dtype)
    rwkv7_decode(
        *[token] * 6,
        torch.zeros(B, H, K, K),
        *[weight] * 7,
        eps=64e-5,
        **{} if first_layer else dict(value_gate=token, v_first=token, v0=weight),
        mask=torch.ones(B, dtype=torch.bool) if mask else None,
        state_indices=torch.arange(B) if pool else None,
    )


def call_rwkv6_decode(
    dtype: torch.dtype, K: int, constant: bool = False, mask: bool = False, pool: bool = False
) -> None:
    B, H = 2, 2
    token, weight = torch.zeros(B, H * K, dtype=dtype), torch.zeros(H * K, dtype=dtype)
    rwkv6_decode(
        token,
        None if constant else token,
        *[token] * 3,
        torch.zeros(B, H, K, K),
        *[weight] * 4,
        eps=64e-5,
        mask=torch.ones(B, dtype=torch.bool) if mask else None,
        state_indices=torch.arange(B) if pool else None,
    )


EVERYTHING = dict(order=True, packed=True, state=True)
MANY = 22  # sequences of 12 heads: from 256 in all on, the launchers share the work out otherwise
WKV_OPTIONS = {
    "training": {},
    "training, order": dict(order=True),
    "training, packed": dict(packed=True, sequences=2),
    "training, state": dict(state=True),
    "training, everything": dict(sequences=2, **EVERYTHING),
    "training, many": dict(sequences=MANY),
    "training, many, everything": dict(sequences=MANY, **EVERYTHING),
    "prompt": dict(training=False),
    "prompt, everything": dict(training=False, sequences=2, **EVERYTHING),
    "prompt, many": dict(training=False, sequences=MANY),
    "token": dict(training=False, T=1, state=True),
    "tokens, everything": dict(training=False, T=5, sequences=2, **EVERYTHING),
}
"""Everything: order, packed sequences and an initial state."""
WKV7_OPTIONS = WKV_OPTIONS | {
    "picture": dict(training=False, T=1088),
    "picture, many, everything": dict(training=False, T=1088 * MANY, sequences=MANY, **EVERYTHING),
}
"""Long sequences may have longer chunks in wkv7; in wkv6 they launch what a prompt launches."""
QUICK = (
    "training",
    "training, many, everything",
    "training, any decay",
    "picture",
    "token",
    "order, dynamic",
    "",
    "64 rows",
    "last",
)
BOUNDED = dict(min_log_decay=-0.6065306597126334)  # -e^(-1/2), what RWKV-7 passes


class Op(NamedTuple):
    """How it is called with (dtype, head size) and each set of options, and with which head sizes it differs."""

    call: Callable[..., None]
    options: dict[str, dict[str, Any]]
    head_sizes: tuple[int, ...] = HEAD_SIZES


OPS = {
    "wkv6": Op(partial(call_wkv, wkv6), WKV_OPTIONS),
    "wkv7": Op(
        partial(call_wkv, wkv7),
        {name: options | BOUNDED for name, options in WKV7_OPTIONS.items()}
        | {f"{name}, any decay": WKV_OPTIONS[name] for name in ("training", "training, everything")},
    ),
    "token_shift": Op(
        call_token_shift,
        {
            "": {},
            "order": dict(order=True),
            "dynamic": dict(M=5, dynamic=True),
            "order, dynamic": dict(M=5, order=True, dynamic=True),
            "channel mix": dict(M=1),
            "token": dict(T=1),
            "token, dynamic": dict(T=1, M=5, dynamic=True),
        },
        head_sizes=(64,),  # it knows of channels only
    ),
    "low_rank": Op(
        call_low_rank,
        {"": {}, "first layer": dict(M=3), "RWKV-6": dict(M=1), "0.1B": dict(C=768)},
        head_sizes=(64,),
    ),
    "norm_shift": Op(
        call_norm_shift,
        {
            "": {},
            "channel mix": dict(M=1),
            "0.1B": dict(C=768),
            "mask, pool": dict(mask=True, pool=True),
            "RWKV-5": dict(M=4, of_current=True),
            "RWKV-6": dict(M=1, ends=True),
        },
        head_sizes=(64,),
    ),
    "products": Op(
        call_products,
        {
            "": {},
            "64 rows": dict(B=64),
            "0.1B": dict(C=768),
            "0.1B, 20 rows": dict(B=20, C=768),
            "last": dict(last=True),
            "last, 64 rows": dict(B=64, last=True),
        },
        head_sizes=(64,),
    ),
    "rwkv7_decode_low_rank": Op(
        call_rwkv7_decode_low_rank,
        {
            "": {},
            "64 rows": dict(B=64),
            "first layer": dict(first_layer=True),
            "mask, pool": dict(mask=True, pool=True),
        },
    ),
    "rwkv7_decode": Op(
        call_rwkv7_decode,
        {"": {}, "first layer": dict(first_layer=True), "mask": dict(mask=True), "pool": dict(pool=True)},
    ),
    "rwkv6_decode": Op(
        call_rwkv6_decode,
        {"": {}, "RWKV-5": dict(constant=True), "mask": dict(mask=True), "pool": dict(pool=True)},
    ),
}


# --- what that launches -------------------------------------------------------------------------------


@dataclass
class Launch:
    """A kernel as Triton would compile it, and the call that first launched it."""

    op: str
    dtype: str
    head_size: int
    options: str
    target: str
    kernel: JITFunction
    signature: dict[str, Any]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    settings: Any

    @property
    def key(self) -> str:
        parts = self.signature, self.constexprs, self.attrs, self.settings
        return " ".join(map(str, (self.target, self.kernel.__name__, *parts)))

    @property
    def blocks(self) -> str:
        """Its constants that are no pointers left out: `BT=32 K=64`."""
        names = ((self.kernel.arg_names[path[0]], value) for path, value in self.constexprs.items())
        values = {name: value for name, value in names if name.isupper() and value is not None}
        return " ".join(f"{name}={value}" for name, value in values.items())


@contextmanager
def recorded(target: str) -> Iterator[list[dict[str, Any]]]:
    """Inside, kernels are noted down for a GPU of that kind, where Triton would compile and launch them."""
    found: list[dict[str, Any]] = []

    def note(kernel, key, signature, device, constexprs, options, attrs, warmup):
        found.append(
            dict(kernel=kernel, signature=signature, constexprs=constexprs, attrs=attrs, settings=options)
        )  # and None is returned: nothing to launch

    gpu = TARGETS[target].gpu
    driver = SimpleNamespace(
        get_current_target=lambda: gpu,
        get_current_device=lambda: target,
        get_current_stream=lambda device: 0,
    )
    with (
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(JITFunction, "_do_compile", note),
        # What the launchers look at: is it an AMD GPU, which one of NVIDIA's, may Triton serve tensors on the CPU?
        mock.patch.object(torch.version, "hip", "6.0" if gpu.backend == "hip" else None),
        mock.patch.object(launches, "architecture", lambda r: 9 if gpu.backend == "hip" else gpu.arch // 10),
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),
    ):
        yield found


def launches_of(ops, dtypes, head_sizes, targets, only: tuple[str, ...] = ()) -> list[Launch]:
    """Every distinct launch of these ops, or those of the options with the names in `only`."""
    distinct: dict[str, Launch] = {}
    for name, dtype, head_size, target in itertools.product(ops, dtypes, head_sizes, targets):
        if head_size not in OPS[name].head_sizes:
            continue
        for options, arguments in OPS[name].options.items():
            if only and options not in only:
                continue
            with recorded(target) as found:
                OPS[name].call(DTYPES[dtype], head_size, **arguments)
            if not found:
                raise RuntimeError(f"{name} ({dtype}, head size {head_size}, {options}) launched no kernel.")
            for one in found:
                launch = Launch(name, dtype, head_size, options, target, **one)
                distinct.setdefault(launch.key, launch)
    return list(distinct.values())


# --- what becomes of it -------------------------------------------------------------------------------


class Code(NamedTuple):
    """What a compiled kernel needs, and which instructions its machine code has, each counted once.

    A loop's instructions count once too, however often it runs. All counts are per warp.
    """

    registers: int  # of a thread
    spilled: int  # bytes of a thread's registers that are spilled to memory
    spills: int  # instructions that do so
    shared: int  # bytes of a block
    instructions: int
    matrix: int  # on matrix units
    wgmma: int  # those of them that a whole warp group issues (sm_90)
    shuffles: int
    shared_ops: int  # loads from and stores to shared memory
    barriers: int
    fma: int  # multiply-adds outside the matrix units


def count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.MULTILINE))


def read_cubin(compiled) -> Code:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([*command, file.name], check=True, capture_output=True, text=True).stdout
            for command in ([tools / "cuobjdump", "--dump-resource-usage"], [tools / "nvdisasm", "-c"])
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return Code(
        registers,
        stack,
        count(r"\b(LDL|STL)\b", code),
        compiled.metadata.shared,
        count(r"^\s+/\*[0-9a-f]{4,6}\*/", code),
        count(r"\b(HMMA|HGMMA|UTCHMMA)\b", code),
        count(r"\bHGMMA\b", code),
        count(r"\bSHFL\b", code),
        count(r"\b(LDS|LDSM|STS|STSM)\b", code),
        count(r"\bBAR\b", code),
        count(r"\bFFMA\b", code),
    )


def read_amdgcn(compiled) -> Code:
    code = compiled.asm["amdgcn"]
    facts = {name: int(number) for name, number in re.findall(r"\.(\w+):\s+(\d+)\n", code)}
    return Code(
        facts["vgpr_count"],
        facts["private_segment_fixed_size"],
        facts["vgpr_spill_count"],
        compiled.metadata.shared,
        count(r"^\t[a-z]+_\w+", code),
        count(r"\bv_mfma_", code),
        0,
        count(r"\b(ds_bpermute|ds_permute|ds_swizzle)\w*|\bv_\w+_dpp\b", code),
        count(r"\bds_(?:read|write|load|store)\w*", code),
        count(r"\bs_barrier\b", code),
        count(r"\bv_(?:pk_)?(?:fma|fmac)_f32", code),
    )


def compile_launch(launch: Launch) -> dict[str, Any]:
    """A row of the table: the launch, its `Code`, and what is wrong with it, "" if nothing."""
    row = {
        **{
            name: getattr(launch, name)
            for name in ("op", "dtype", "head_size", "options", "target", "blocks")
        },
        "kernel": launch.kernel.__name__,
        "warps": launch.settings.num_warps,
        "stages": launch.settings.num_stages,
    }
    target = TARGETS[launch.target]
    source = ASTSource(launch.kernel, launch.signature, launch.constexprs, launch.attrs)
    try:
        compiled = triton.compile(source, target=target.gpu, options=launch.settings.__dict__)
    except Exception as error:  # whatever the compiler raises is the finding
        while error.__cause__:  # Triton wraps an error once for each function that it is inside of
            error = error.__cause__
        return row | {"problem": f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"}
    code = read_cubin(compiled) if target.gpu.backend == "cuda" else read_amdgcn(compiled)
    limit = limit_of(launch)
    problems = {
        f"spills {code.spilled} bytes": code.spilled > may_spill(launch),
        f"wants {code.shared} bytes of shared memory, of {target.shared}": code.shared > target.shared,
        "tl.dot without matrix units": "tt.dot" in compiled.asm["ttir"] and not code.matrix,
        f"has {code.instructions} instructions": bool(limit) and code.instructions > limit.instructions,
        f"has {code.barriers} barriers": bool(limit) and code.barriers > limit.barriers,
    }
    return (
        row
        | code._asdict()
        | {"programs": programs_of(code, row["warps"], target)}
        | {"problem": "; ".join(text for text, is_so in problems.items() if is_so)}
    )


def may_spill(launch: Launch) -> int:
    """Return how many bytes of a thread's registers a launch may spill."""
    place = (launch.kernel.__name__, launch.dtype, launch.head_size)
    return max(MAY_SPILL.get(place, 0), MAY_SPILL_ON.get((launch.target, *place), 0))


def limit_of(launch: Launch) -> Limit | None:
    """Return the limit that holds for a launch: of the models' own shapes only."""
    own = (launch.target, launch.dtype, launch.head_size) == ("sm_90", "bf16", 64)
    if not own or "any decay" in launch.options or not triton.__version__.startswith("3.9."):
        return None
    limits = LIMITS_OF_64_TOKENS if "BT=64" in launch.blocks else LIMITS
    return limits.get(launch.kernel.__name__)


def programs_of(code: Code, warps: int, target: Target) -> int:
    """Return how many programs fit on a processor at once; 0 where this is not worked out (AMD)."""
    if target.gpu.backend != "cuda":
        return 0
    registers = -(-code.registers // 8) * 8 * 32 * warps
    shared = -(-code.shared // 128) * 128 + 1024
    return min(65536 // registers, target.shared_total // shared, target.warps // warps, 32)


_launches: list[Launch] = []
"""Handed to the worker processes by forking: what Triton knows of a kernel cannot be pickled."""


def compile_number(number: int) -> dict[str, Any]:
    return compile_launch(_launches[number])


def compile_all(launches: list[Launch], jobs: int) -> list[dict[str, Any]]:
    _launches[:] = launches
    rows = []
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        for row in pool.map(compile_number, range(len(launches))):
            rows.append(row)
            if sys.stderr.isatty() or row["problem"]:
                print(
                    f"{len(rows)}/{len(launches)} {title(row)} {row['problem']}", file=sys.stderr, flush=True
                )
    return rows


# --- the table ----------------------------------------------------------------------------------------


def title(row: dict[str, Any]) -> str:
    return f"{row['target']} {row['kernel']} {row['dtype']} {row['blocks']} [{row['options']}]"


COLUMNS = {
    "kernel": "kernel",
    "dtype": "dtype",
    "head_size": "head",
    "options": "first launched by",
    "blocks": "constants",
    "warps": "warps",
    "stages": "stages",
    "registers": "registers",
    "spilled": "spilled, bytes",
    "shared": "shared memory, bytes",
    "programs": "programs per processor",
    "instructions": "instructions",
    "matrix": "on matrix units",
    "wgmma": "of these wgmma",
    "shuffles": "shuffles",
    "shared_ops": "shared memory",
    "barriers": "barriers",
    "fma": "other FMAs",
}


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Kernels, compiled",
        "",
        f"`python tests/compile_kernels.py`, Triton {triton.__version__}, no GPU: every distinct launch of the ops.",
        "Registers of a thread; instructions as they stand in the code, whatever loops they are in.",
    ]
    for target in dict.fromkeys(row["target"] for row in rows):
        lines += ["", f"## {target}", "", table_row(COLUMNS.values()), "|" + "---|" * len(COLUMNS)]
        lines += [
            table_row(row.get(name, "-") for name in COLUMNS) for row in rows if row["target"] == target
        ]
    problems = [f"- {title(row)}: {row['problem']}" for row in rows if row["problem"]]
    if problems:
        lines += ["", "## Problems", "", *problems]
    return "\n".join([*lines, ""])


def summary(rows: list[dict[str, Any]], command: str) -> str:
    """Return one line per kernel, dtype and head size: the most that any of its launches needs of each target."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    names = ("registers", "spilled", "shared", "instructions", "shuffles", "barriers")
    most: dict[tuple, dict[str, list[int]]] = {}
    fewest: dict[tuple, int] = {}
    for row in rows:
        kernel = (row["kernel"], row["dtype"], row["head_size"], row["warps"])
        needs = [row[name] for name in names]
        cells = most.setdefault(kernel, {})
        cells[row["target"]] = [max(pair) for pair in zip(needs, cells.get(row["target"], needs))]
        place = (kernel, row["target"])
        fewest[place] = min(row["programs"], fewest.get(place, row["programs"]))
    lines = [
        "# Kernels, compiled",
        "",
        f"`{command}`, Triton {triton.__version__}, no GPU.",
        "Over all distinct launches of the ops, the most registers of a thread / bytes that spill / bytes of shared",
        "memory of a block / instructions of a warp, loops counted once / shuffles / barriers, and the fewest programs",
        "that fit on a processor. The models' own case is bf16 with heads of 64.",
        "",
        table_row(["kernel", "dtype", "head", "warps", *targets]),
        "|" + "---|" * (4 + len(targets)),
    ]
    for kernel, cells in most.items():
        name, dtype, head_size, warps = kernel
        needs = (
            " / ".join(f"{n:,}" for n in cells[target]) + f", {fewest[kernel, target]} programs"
            if target in cells
            else "-"
            for target in targets
        )
        lines.append(table_row([name.removesuffix("_kernel"), dtype, head_size, warps, *needs]))
    return "\n".join([*lines, ""])


def table_row(cells: Iterable[int | str]) -> str:
    return "| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else cell for cell in cells) + " |"


def listed(choices) -> Callable[[str], list[str]]:
    """An argument type: a comma-separated list out of choices."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in choices]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(choices)}")
        return names

    return parse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, choices in (("targets", TARGETS), ("ops", OPS), ("dtypes", DTYPES)):
        parser.add_argument(f"--{name}", type=listed(choices), metavar="NAME,NAME")
    sizes = list(map(str, HEAD_SIZES))
    parser.add_argument("--head-sizes", type=listed(sizes), default=sizes, metavar="K,K")
    parser.add_argument("--quick", action="store_true", help="a few of each op's options, for a few targets")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the table there, not to the terminal"
    )
    parser.add_argument("--summary", type=Path, metavar="FILE", help="write a shorter table there as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    arguments = parser.parse_args()
    targets = arguments.targets or (QUICK_TARGETS if arguments.quick else list(TARGETS))
    ops, dtypes = arguments.ops or list(OPS), arguments.dtypes or list(DTYPES)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: Triton would interpret, not compile.")
    # Triton 3.9 speaks of its own default, once per process.
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    torch.set_num_threads(1)
    only = QUICK if arguments.quick else ()
    launches = launches_of(ops, dtypes, list(map(int, arguments.head_sizes)), targets, only)
    if arguments.quick and not arguments.targets and "wkv7" in ops and "bf16" in dtypes:
        for target, head_size in QUICK_ELSEWHERE:
            if head_size in arguments.head_sizes:
                launches += launches_of(["wkv7"], ["bf16"], [int(head_size)], [target], ("training",))
    rows = compile_all(launches, arguments.jobs)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    if arguments.summary:
        command = " ".join(["python", "tests/compile_kernels.py", *sys.argv[1:]])
        arguments.summary.write_text(summary(rows, command))
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows))
    else:
        print(markdown(rows))
    return any(row["problem"] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
