"""How each kernel is launched: one table per op, and what the host asks about a device before a launch.

Every entry was chosen from compiled code (registers, spills, shared memory, instructions); `tests/compile_kernels.py`
prints these. Nothing is tuned at first use.
"""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

NAMESPACE = "visualrwkv"
"""Of the ops in `torch.ops`. A copy of these files for the Hub's `kernels` library has one of its own."""

HEAD_SIZES = (32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Launch(NamedTuple):
    """How a kernel is launched.

    Attributes:
        block: columns of a head (or keys, where the kernel's docstring says so) per program or per turn of its loop.
        num_warps: warps of a program.
        num_stages: how many turns of a loop have their loads in flight at once.
    """

    block: int
    num_warps: int
    num_stages: int = 1


class Precision(NamedTuple):
    """How products of inputs of some dtype are computed. Their sums are always float32.

    Attributes:
        dtype: of a product's operands, and of the buffers that one kernel writes for another.
        dots: `input_precision` of tl.dot where operands are float32.
    """

    dtype: torch.dtype
    dots: str


def precision_of(r: Tensor) -> Precision:
    """Return the precision of products for inputs of the dtype of r.

    bfloat16 inputs stay bfloat16. float16 inputs are multiplied as tf32, which has as many mantissa bits and a wider
    exponent, so that nothing overflows. float32 inputs use tf32x3 (three tf32 products), which recovers the accuracy of
    float32.
    """
    if r.dtype == torch.bfloat16:
        return Precision(torch.bfloat16, "ieee" if torch.version.hip else "tf32")
    dots = "tf32" if r.dtype == torch.float16 else "tf32x3"
    return Precision(torch.float32, "ieee" if torch.version.hip else dots)


def product_precision(x: Tensor) -> str:
    """Return `input_precision` of a plain matrix product of x, which float32 inputs must not round to tf32."""
    return "tf32x3" if x.dtype == torch.float32 and not torch.version.hip else "ieee"


# --- devices ------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def interpreted() -> bool:
    """Return whether Triton interprets kernels on the CPU in place of compiling them."""
    return bool(triton.knobs.runtime.interpret)


def has_matrix_units(r: Tensor) -> bool:
    """Return whether the device of r has fast (or any) matrix units for bfloat16 and tf32."""
    if r.device.type != "cuda" or torch.version.hip:
        return True
    return torch.cuda.get_device_capability(r.device) >= (8, 0)


def architecture(r: Tensor) -> int:
    """Return the major compute capability of the device of r; 9 where there is no such number."""
    if r.device.type != "cuda" or torch.version.hip:
        return 9
    return torch.cuda.get_device_capability(r.device)[0]


def needs_gradient(*inputs: Tensor | None) -> bool:
    """Return whether autograd records what is computed from these inputs."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def has_rows_apart(x: Tensor) -> bool:
    """Return whether every x[i] is contiguous and shares no memory with another, so that a kernel may write them."""
    return x[:1].is_contiguous() and (x.shape[0] <= 1 or x.stride(0) * x.shape[0] >= x.numel())


def call(op: Any, *arguments: Any, **named: Any) -> Any:
    """Call a custom op, past torch's dispatcher where possible, because that takes longer than a launch.

    Its function is called directly unless something must see the call: torch.compile, a function transform, or a
    dispatch mode such as fake tensors. A tensor subclass is not detected. The caller makes sure that no gradient is
    needed. As the dispatcher does, this counts a new version of each tensor that the op writes, so that a backward
    that has saved it raises an error.
    """
    must_be_seen = (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
    if must_be_seen:
        return op(*arguments, **named)
    result = op._init_fn(*arguments, **named)
    for place, name in _written_arguments(op):
        written = arguments[place] if place < len(arguments) else named[name]
        if not written.is_inference():  # which has no version
            torch.autograd.graph.increment_version(written)
    return result


@functools.cache
def _written_arguments(op: Any) -> tuple[tuple[int, str], ...]:
    """Return the places and names of the arguments that a custom op writes (its `mutates_args`)."""
    arguments = op._opoverload._schema.arguments
    return tuple((i, a.name) for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write)


def serial() -> dict[str, int]:
    """Return the launch options of a kernel that loops over chunks or tokens.

    Such a kernel has few programs, so ptxas must not spill registers in order to fit more of them on a processor.
    """
    return {} if torch.version.hip else {"maxnreg": 255}  # AMD's compiler does not know this option


def on_device_of(r: Tensor) -> AbstractContextManager:
    """Make the device of r current, because Triton launches on the current one, wherever its arguments are."""
    return torch.cuda.device(r.device) if r.device.type == "cuda" else nullcontext()


# --- wkv6 and wkv7 ------------------------------------------------------------------------------------

MAX_STEPS = 16
"""Up to this many tokens, stepping token by token is faster than filling a chunk."""

LONG = 512
"""From this many tokens per sequence on, a chunk may be longer (`Config.long`). A longer chunk takes longer to prepare,
which pays where enough steps of the scan are left out for it."""

FEW = 128
"""Up to this many sequences times heads, the scans take `few`: fewer columns per program, so more programs."""


class Config(NamedTuple):
    """The launches of the chunked kernels of `wkv6` or `wkv7` for one head size and dtype.

    Attributes:
        BT: tokens of a chunk.
        prepare: values per turn of its loop; in wkv7 columns of P per turn of another, too.
        few: the scans where sequences times heads are few (`FEW`); columns per program.
        many: the scans elsewhere.
        gradients: values per turn of its loop. In wkv7 two kernels, the first of which this launches.
        keys: wkv7's second gradients kernel; keys per program.
        turn: values per turn of that kernel's loops. 0 is all at once.
        part: keys per turn of a product over all K, where all at once would spill registers: in wkv6's gradients and in
            wkv7's scans. 0 is all at once.
        prepare_part: wkv7's keys per turn of `prepare`, in the same case.
        values_part: wkv7's keys per turn of the first gradients kernel, in the same case.
        long: tokens of a chunk in place of BT where sequences are long (`LONG`) and no backward follows, whose kernels
            would spill registers. The scan makes half as many steps. 0 keeps BT.
    """

    BT: int
    prepare: Launch
    few: Launch
    many: Launch
    gradients: Launch
    keys: Launch = Launch(32, 4)
    turn: int = 0
    part: int = 0
    prepare_part: int = 0
    values_part: int = 0
    long: int = 0

    def scan(self, programs: int) -> Launch:
        """Return the launch of a scan over so many sequences times heads."""
        launch = self.few if programs <= FEW else self.many
        # AMD's blocks have 64 KiB of shared memory, too little to load a large head's chunks ahead of time.
        return launch if torch.version.hip is None else launch._replace(num_stages=1)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

WKV6 = {
    (32, BF16): Config(32, Launch(32, 4), Launch(16, 4, 2), Launch(32, 4, 3), Launch(16, 4)),
    (64, BF16): Config(32, Launch(64, 4), Launch(16, 4, 2), Launch(32, 4, 2), Launch(16, 4)),
    (128, BF16): Config(32, Launch(64, 8), Launch(16, 8, 2), Launch(32, 4, 2), Launch(16, 8)),
    (32, FP16): Config(16, Launch(16, 4), Launch(16, 4, 2), Launch(32, 4, 2), Launch(16, 8)),
    (64, FP16): Config(16, Launch(64, 4), Launch(16, 4, 2), Launch(32, 4, 2), Launch(16, 8)),
    (128, FP16): Config(16, Launch(32, 8), Launch(16, 4, 2), Launch(32, 8, 2), Launch(16, 8)),
    (32, FP32): Config(16, Launch(16, 4), Launch(16, 4, 2), Launch(32, 4, 2), Launch(16, 8), part=16),
    (64, FP32): Config(16, Launch(64, 4), Launch(16, 4, 2), Launch(32, 4, 2), Launch(16, 8), part=16),
    (128, FP32): Config(16, Launch(32, 8), Launch(16, 4, 2), Launch(32, 8, 2), Launch(16, 8), part=16),
}
"""By (K, dtype of r): the fewest warps that spill no register, where that is possible."""

WKV6_STEPS = {32: Launch(32, 1), 64: Launch(32, 2), 128: Launch(16, 4)}
"""The kernel that goes token by token, by K."""

_NARROW, _WIDE = Launch(16, 4, 3), Launch(32, 4, 2)

WKV7 = {
    (32, BF16, True): Config(16, Launch(32, 4), _NARROW, _WIDE, Launch(32, 4)),
    (64, BF16, True): Config(32, Launch(64, 4), _NARROW, _WIDE, Launch(64, 4), Launch(64, 4), long=64),
    (128, BF16, True): Config(
        16, Launch(64, 4), _NARROW, _WIDE, Launch(64, 4), Launch(64, 4), turn=64, part=64, prepare_part=32
    ),
    (32, BF16, False): Config(16, Launch(16, 4), _NARROW, _WIDE, Launch(32, 4), turn=16),
    (64, BF16, False): Config(16, Launch(64, 8), _NARROW, _WIDE, Launch(32, 4), Launch(64, 4), turn=32),
    (128, BF16, False): Config(
        16, Launch(64, 8), _NARROW, _WIDE, Launch(64, 4), Launch(64, 4), turn=64, part=64
    ),
    (32, FP16, True): Config(16, Launch(32, 4), _NARROW, _NARROW, Launch(16, 4), values_part=16),
    (64, FP16, True): Config(
        16, Launch(32, 8), _NARROW, _NARROW, Launch(16, 4), Launch(64, 4), turn=32, values_part=32
    ),
    (128, FP16, True): Config(
        16, Launch(64, 8), Launch(16, 8), Launch(16, 8), Launch(16, 4), Launch(64, 4), turn=32, prepare_part=32,
        values_part=32,
    ),
    (32, FP16, False): Config(
        16, Launch(16, 4), _NARROW, _NARROW, Launch(16, 4), Launch(16, 8), turn=16, values_part=16
    ),
    (64, FP16, False): Config(
        16, Launch(32, 4), _NARROW, _NARROW, Launch(16, 4), Launch(16, 8), turn=16, values_part=32
    ),
    (128, FP16, False): Config(
        16, Launch(32, 8), Launch(16, 8), Launch(16, 8), Launch(16, 4), Launch(16, 8), turn=16, prepare_part=32,
        values_part=32,
    ),
    (32, FP32, True): Config(16, Launch(16, 4), _NARROW, _NARROW, Launch(16, 4), turn=16),
    (64, FP32, True): Config(
        16, Launch(64, 4), Launch(16, 4, 2), Launch(16, 4, 2), Launch(64, 4), turn=16, prepare_part=32, values_part=16
    ),
    (128, FP32, True): Config(
        16, Launch(16, 8), Launch(16, 8), Launch(16, 8), Launch(32, 8), Launch(16, 4), turn=16, part=32,
        prepare_part=32, values_part=16,
    ),
    (32, FP32, False): Config(16, Launch(16, 4), _NARROW, _NARROW, Launch(16, 4), Launch(16, 8), turn=16),
    (64, FP32, False): Config(
        16, Launch(64, 8), Launch(16, 4, 2), Launch(16, 4, 2), Launch(64, 4), Launch(16, 8), turn=16,
        prepare_part=32, values_part=16,
    ),
    (128, FP32, False): Config(
        16, Launch(32, 8), Launch(16, 8), Launch(16, 8), Launch(32, 8), Launch(16, 8), turn=16, part=32,
        prepare_part=16, values_part=16,
    ),
}  # fmt: skip
"""By (K, dtype of r, whether log decays are bounded). The model's own case is (64, bfloat16, True)."""

WKV7_OTHER_GPUS: dict[tuple[int, torch.dtype, bool], dict[str, Any]] = {
    (64, BF16, True): dict(turn=32, prepare_part=16, long=0),
    (128, BF16, False): dict(prepare_part=32),
}
"""What differs from `WKV7` where the GPU's architecture is not 9 (H100, H200), for registers would spill there."""

WKV7_STEPS = {32: Launch(16, 1), 64: Launch(16, 1), 128: Launch(16, 2)}
"""The kernel that goes token by token, by K."""

# --- single tokens and the token shift ----------------------------------------------------------------

DECODE_WARPS = {32: 2, 64: 4, 128: 8}
"""By head size: a head's state takes 16, 32 or 64 registers of each thread."""

DECODE_GROUPS = 8
"""Programs per head of the decoding step that has the low-rank maps in it: more sequences share the maps' weights."""
DECODE_RANKS, DECODE_STAGES = 32, 4
"""Ranks per product of a low-rank map there, and how many such products have their loads in flight."""


class Tiles(NamedTuple):
    """Tokens and channels of a program of the token shift, and its warps."""

    BT: int
    BC: int
    num_warps: int


SHIFT_FORWARD = Tiles(BT=8, BC=128, num_warps=4)
SHIFT_ONE_TOKEN = Tiles(BT=1, BC=128, num_warps=1)
SHIFT_BACKWARD = {2: Tiles(BT=64, BC=64, num_warps=8), 4: Tiles(BT=32, BC=32, num_warps=8)}
"""By bytes of an element. Each tile writes M float32 rows of the gradient of mix; long tiles keep these few."""

NORM_CHANNELS, NORM_WARPS = 512, 4
"""Channels of a program of the fused norm and token shift; each reads its whole row once more for the norm."""


def product_tiles(x: Tensor, widest: int) -> dict[str, int]:
    """Return the launch of matrix products of the rows of x [..., C], the widest of which has so many outputs.

    A program reads BN rows of a weight in pieces of BC columns, so that 4 stages have 16 to 32 KB of them on the way.
    """
    B, size = x.numel() // x.shape[-1], x.element_size()
    BN = 32 if widest >= 4096 or B > 16 else 16
    BC = (256 if B <= 16 else 128) // size
    return {"BB": max(16, triton.next_power_of_2(B)), "BN": BN, "BC": BC, "num_warps": 4, "num_stages": 4}


LOW_RANK_SPLIT = 512
"""Channels of C that one program of a low-rank map sums: of a 7B model, 8 programs for each 32 ranks, some 200 in all,
where a large GPU has 132 processors."""
LOW_RANK_DOWN = {"BC": 256, "BD": 32}
LOW_RANK_UP = {"BD": 64, "BA": 64}
LOW_RANK_WARPS = 4
