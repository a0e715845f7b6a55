"""Define the marks of tests that compute with the CPU ops in C."""

import shutil

import pytest

from visualrwkv_hf.cpu import library

NEEDS_NATIVE_OPS = [
    pytest.mark.skipif(not any(map(shutil.which, library.COMPILERS)), reason="native ops need a C compiler"),
    pytest.mark.usefixtures("built"),
]
"""Skip tests without a compiler; build the library in a folder of its own (`built` in tests/kernels/conftest.py)."""
