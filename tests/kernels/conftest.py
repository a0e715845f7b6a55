"""Fixtures that tests of the CPU ops share."""

import pytest

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
