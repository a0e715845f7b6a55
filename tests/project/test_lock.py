"""`requirements.lock` agrees with `constraints.txt` and names what a release needs, each file with its hash."""

import re
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:  # the lock file is for Python 3.11 and later
    pytest.skip("tomllib comes with Python 3.11", allow_module_level=True)

LOCK = (ROOT / "requirements.lock").read_text("utf-8")
PINNED_BY_TORCH = {"triton"}
NOT_LOCKED = {
    "quantization": "its libraries have files for some GPUs only",
    "onnx": "for an export, not for a model that runs",
    "vllm": "decides the versions of torch and transformers itself",
    "demo": "an example",
    "browser": "tests the example",
    "test": "a developer's",
    "docs": "a developer's",
    "lint": "a developer's",
}
"""Extra -> why its packages are not in the lock file."""


def locked() -> dict[str, str]:
    """Return package -> version for this Python and this machine."""
    lines = [line for line in LOCK.splitlines() if re.match(r"[\w.-]+==", line)]
    found = [Requirement(line.rstrip("\\ ")) for line in lines]
    found = [r for r in found if r.marker is None or r.marker.evaluate()]
    versions = {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in found}
    assert len(versions) == len(found) > 50
    return versions


def test_versions_are_those_of_the_constraints():
    lines = [
        line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    ]
    constraints = [Requirement(line) for line in lines if line]
    wanted = {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in constraints}
    lock = locked()
    both = wanted.keys() & lock.keys() - PINNED_BY_TORCH
    assert {"torch", "transformers", "safetensors", "peft"} <= both
    assert {name: lock[name] for name in both} == {name: wanted[name] for name in both}


def test_every_dependency_of_a_release_is_locked():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = re.findall(r"--extra (\w+)", LOCK)
    assert extras == sorted(extras)
    assert {*extras} == project["optional-dependencies"].keys() - NOT_LOCKED.keys()
    listed = [
        *project["dependencies"],
        *(name for e in extras for name in project["optional-dependencies"][e]),
    ]
    lock = locked()
    for requirement in map(Requirement, listed):
        name = canonicalize_name(requirement.name)
        assert name in lock, name
        assert requirement.specifier.contains(lock[name]), requirement


def test_every_package_has_hashes_and_no_host_is_named():
    blocks = re.split(r"(?m)^(?=[\w.-]+==)", LOCK)[1:]
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", block) for block in blocks)
    assert "://" not in LOCK and "--index-url" not in LOCK and "--find-links" not in LOCK
