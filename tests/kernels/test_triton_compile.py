"""The Triton kernels compile for GPUs that are not there, within the limits of `compile_kernels.py`."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from paths import ROOT, TESTS
from patience import PATIENCE
from triton_interpreter import NEEDS_INTERPRETER

pytest.importorskip("triton")

SCRIPT = TESTS / "compile_kernels.py"
KERNELS = ROOT / "triton_kernels"
TARGETS = ("sm_80", "sm_90", "gfx942")


def compile_kernels(*arguments):
    """Runs the script where Triton compiles: this process has it interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
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
    assert set(compiled) == every
    assert all(row["registers"] > 0 for row in compiled.values())


@NEEDS_INTERPRETER
def test_ops_go_past_the_dispatcher_only_where_nobody_looks():
    """A mode sees every op; without one the op's own function is called, and gives the same."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from visualrwkv_hf.triton_kernels import wkv7

    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    x = torch.randn(1, 20, 1, 32, generator=torch.Generator().manual_seed(0))
    inputs = x, -0.5 * x.abs(), x, x, -0.1 * x, 0.1 * x
    with torch.no_grad(), Seen() as seen:
        looked_at = wkv7(*inputs)
    assert "visualrwkv.wkv7.default" in seen.names
    with torch.no_grad(), torch.profiler.profile() as profile:
        directly = wkv7(*inputs)
    assert "visualrwkv::wkv7" not in {event.name for event in profile.events()}
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(directly, looked_at))
