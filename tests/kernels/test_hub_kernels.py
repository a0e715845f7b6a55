"""The kernels as a repository of the Hub's `kernels` library, in a model that is not ours."""

import importlib
import os
import shutil
import subprocess
import sys

import add_examples  # noqa: F401
import pytest
import torch
from tiny import awake, text_config

pytest.importorskip("triton")
pytest.importorskip("kernels")
pytest.importorskip("rwkv7_hf")

import kernels
import rwkv7_hf
from judges import rwkv7_hf_model
from triton_interpreter import NEEDS_INTERPRETER, launches

from visualrwkv_hf import VisualRWKVForCausalLM

pytestmark = NEEDS_INTERPRETER

MIN_LOG_DECAY = -0.6065306597126334


@pytest.fixture(scope="module")
def export():
    return importlib.import_module("export_kernels").export


@pytest.fixture(scope="module")
def repository(tmp_path_factory, export):
    folder = tmp_path_factory.mktemp("hub") / "visualrwkv-kernels"
    export(folder)
    return folder


def recurrence_of(rwkv):
    """The only op that rwkv7-hf leaves to others, by the loaded kernel: its decay is exp(w), and pads are masked."""

    def rwkv7_recurrent(r, decay, k, v, a, b, initial_state, attention_mask=None):
        order = None
        if attention_mask is not None:
            token = torch.arange(r.shape[1]).expand(r.shape[:2])
            order = torch.where(attention_mask, token, ~token)
        return rwkv.wkv7(r, decay.log(), k, v, a, b, initial_state, order=order, min_log_decay=MIN_LOG_DECAY)

    return rwkv7_recurrent


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_model_of_others_computes_the_same_with_the_loaded_kernel(repository, monkeypatch, backend):
    rwkv = kernels.get_local_kernel(repository)
    model = rwkv7_hf_model(
        rwkv7_hf, awake(VisualRWKVForCausalLM(text_config(7, head_dim=32, hidden_size=64)))
    )
    ids = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, :9] = False

    def outputs():
        model.zero_grad()
        logits = model(ids, attention_mask=mask).logits
        logits[mask].square().mean().backward()
        return logits[mask].detach(), [x.grad for x in model.parameters() if x.grad is not None]

    expected, expected_gradients = outputs()
    modeling = importlib.import_module("rwkv7_hf.modeling_rwkv7")
    monkeypatch.setattr(modeling, "rwkv7_recurrent", recurrence_of(rwkv))
    with rwkv.kernel_backend(backend), launches() as seen:
        actual, gradients = outputs()
    forward = {"wkv7_fwd_prepare_kernel", "wkv7_fwd_scan_kernel"}
    assert forward <= {launch.kernel for launch in seen} if backend == "triton" else not seen
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)
    for x, y in zip(gradients, expected_gradients, strict=True):
        assert (x - y).norm() <= 1e-4 * y.norm() + 1e-7


def test_it_is_a_package_of_its_own(repository, tmp_path):
    """Beside the installed package, and beside another version of itself."""
    first = kernels.get_local_kernel(repository)
    other = tmp_path / "other"
    shutil.copytree(repository, other)
    build = other / "build" / "torch-universal"
    name = first.__name__
    for path in [build / "metadata.json", build / "triton_kernels" / "launches.py"]:
        path.write_text(path.read_text("utf-8").replace(name, f"{name}_2"), "utf-8")
    second = kernels.get_local_kernel(other)
    namespaces = [
        importlib.import_module(f"{module}.triton_kernels.launches").NAMESPACE
        for module in ("visualrwkv_hf", first.__name__, second.__name__)
    ]
    assert namespaces == ["visualrwkv", name, f"{name}_2"]
    assert all(hasattr(getattr(torch.ops, namespace), "wkv7") for namespace in namespaces)
    assert not [line for line in sources(repository) if "import" in line and "visualrwkv_hf" in line]


def sources(repository):
    return [
        line.strip() for path in repository.rglob("*.py") for line in path.read_text("utf-8").splitlines()
    ]


def test_its_files_are_those_that_it_names(repository):
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    build = repository / "build" / "torch-universal"
    stated = Metadata.read_from_file(build / "metadata.json").digest
    stated.validate(Digest.hash_variant(DigestAlgorithm.SHA256, build))


def test_a_folder_with_files_is_refused(tmp_path, export):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(ValueError, match="is not empty"):
        export(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_without_triton_it_is_plain_torch(repository):
    code = f"""
import sys
sys.modules["triton"] = None
from pathlib import Path
import torch
from kernels import get_local_kernel
rwkv = get_local_kernel(Path({str(repository)!r}))
x = torch.randn(1, 20, 2, 32, generator=torch.Generator().manual_seed(0))
y, state = rwkv.wkv7(x, -x.abs(), x, x, -0.1 * x, 0.1 * x)
assert y.isfinite().all() and state.shape == (1, 2, 32, 32)
try:
    with rwkv.kernel_backend("triton"):
        rwkv.wkv7(x, -x.abs(), x, x, -0.1 * x, 0.1 * x)
except RuntimeError as error:
    print(error)
sys.path.insert(0, {str(repository / "build" / "torch-universal")!r})
import visualrwkv_kernels as older
assert torch.equal(older.wkv7(x, -x.abs(), x, x, -0.1 * x, 0.1 * x)[0], y)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert "there is no wkv7 kernel" in done.stdout
