"""Fixtures that tests of kernels share: of Triton's, and of the CPU ops."""

import pytest
import torch

from visualrwkv_hf.cpu import ops as native


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def built(cache, monkeypatch):
    """The library in a folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(native, "_failure", "")
    native.build_native_ops()


@pytest.fixture
def poison(monkeypatch):
    """Fill every new tensor of floats with NaN, so that an element that a kernel does not write is seen."""

    def poisoned(empty):
        def fill(*args, **kwargs):
            tensor = empty(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return fill

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
