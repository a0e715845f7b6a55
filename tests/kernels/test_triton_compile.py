"""What the Triton ops launch compiles for GPUs that are not there: no spills, shared memory that fits, matrix units."""

import json
import os
import re
import subprocess
import sys

import pytest
from paths import ROOT, TESTS

pytest.importorskip("triton")

SCRIPT = TESTS / "compile_kernels.py"
KERNELS = ROOT / "triton_kernels"
TARGETS = ("sm_80", "sm_90", "gfx942")
IN_TWO = {"wkv7_bwd_values_kernel", "wkv7_bwd_keys_kernel"}
NEVER = {"sm_80": IN_TWO, "sm_90": IN_TWO, "gfx942": {"wkv7_bwd_gradients_kernel"}}
"""In bfloat16 with heads of 64: RWKV-7's gradients in one launch on NVIDIA, in two on AMD."""


def compile_kernels(*arguments):
    """Runs the script where Triton compiles: this process has it interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=900
    )


@pytest.mark.parametrize(
    "target", [TARGETS[0], *(pytest.param(target, marks=pytest.mark.slow) for target in TARGETS[1:])]
)
def test_kernels_compile(target, tmp_path):
    rows = tmp_path / "rows.json"
    run = compile_kernels(
        *("--quick", "--jobs", "1", "--targets", target, "--dtypes", "bf16"),
        *("--head-sizes", "64", "--json", rows),
    )
    assert not run.returncode, run.stdout[-6000:] + run.stderr[-3000:]
    compiled = {row["kernel"]: row for row in json.loads(rows.read_text())}
    written = "".join(path.read_text() for path in KERNELS.glob("*.py"))
    every = set(re.findall(r"^def (\w+_kernel)\(", written, re.MULTILINE))
    assert set(compiled) == every - NEVER[target]
    assert all(row["registers"] > 0 for row in compiled.values())
