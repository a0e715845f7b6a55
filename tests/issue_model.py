"""How long wkv7's kernels need at least, if a GPU issued one instruction per scheduler and clock without ever waiting.

    python tests/issue_model.py

The kernels are compiled for sm_90 (bfloat16, heads of 64, bounded decays) and their instructions counted. This is
arithmetic on counts, not a measurement: no GPU reaches it. A scan's code counts whole for each of its steps, although
what stands before and after its loop runs once.
"""

import sys
import warnings
from typing import NamedTuple

import compile_kernels as ck
import triton

WARP_INSTRUCTIONS = 132 * 4 * 1.75e9
"""Per second: the processors of an H100 (SXM), four schedulers each, at its usual clock under load."""

K = 64  # size of a head


class Call(NamedTuple):
    """A call of wkv7: B sequences of T tokens in H heads, and the options of `compile_kernels` that launch the same."""

    name: str
    B: int
    H: int
    T: int
    options: str


CALLS = (
    Call("training, forward and backward, B 8, H 64, T 4,096", 8, 64, 4096, "training, many"),
    Call("training, B 8, H 32, T 4,096", 8, 32, 4096, "training, many"),
    Call("one picture, B 1, H 64, T 1,088", 1, 64, 1088, "picture"),
    Call("one picture, B 1, H 32, T 1,088", 1, 32, 1088, "picture"),
    Call("one picture, B 1, H 12, T 1,088", 1, 12, 1088, "picture"),
)


def microseconds(call: Call) -> dict[str, float]:
    """Return the time of each kernel of a call."""
    with ck.recorded("sm_90") as found:
        ck.OPS["wkv7"].call(ck.DTYPES["bf16"], K, **ck.OPS["wkv7"].options[call.options])
    times = {}
    for one in found:
        launch = ck.Launch("wkv7", "bf16", K, call.options, "sm_90", **one)
        row = ck.compile_launch(launch)
        constants = dict(part.split("=") for part in launch.blocks.split())
        chunks = call.B * -(-call.T // int(constants["BT"]))
        name = "BV" if "scan" in row["kernel"] else "BK" if "keys" in row["kernel"] else ""
        programs = chunks * call.H * (K // int(constants[name]) if name else 1)
        issued = programs * row["warps"] * row["instructions"]
        times[row["kernel"].removesuffix("_kernel")] = 1e6 * issued / WARP_INSTRUCTIONS
    return times


def main() -> int:
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: Triton would interpret, not compile.")
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    print(f"Triton {triton.__version__}, sm_90, microseconds at one instruction per scheduler and clock:\n")
    print("| call | kernels | sum |\n|---|---|---|")
    for call in CALLS:
        times = microseconds(call)
        kernels = ", ".join(f"{name.removeprefix('wkv7_')} {time:,.1f}" for name, time in times.items())
        print(f"| {call.name} | {kernels} | {sum(times.values()):,.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
