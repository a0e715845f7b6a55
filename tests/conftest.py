"""Shared by all tests: Triton's interpreter, threads, signals, and options that name folders of test data."""

import os
from pathlib import Path

# Before any kernel is decorated: without a GPU, Triton kernels run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
import transformers_tests
import triton_interpreter
from default_signals import restore_signals
from slow_tests import mark_slow

triton_interpreter.install()

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        default=GOLDEN,
        metavar="FOLDER",
        help="judge by the golden data of another folder",
    )
    parser.addoption(
        "--soak-requests",
        type=int,
        default=1000,
        metavar="COUNT",
        help="how many requests the soak of the server sends",
    )
    parser.addoption(
        "--transformers-tests",
        type=Path,
        metavar="FOLDER",
        help="also run transformers' own common tests, from the folder tests/ of its unpacked sdist",
    )


def pytest_configure(config: pytest.Config) -> None:
    restore_signals()
    # The tests' tensors are small: further threads wait for one another, and for those of other workers.
    torch.set_num_threads(1)
    if folder := config.getoption("transformers_tests"):
        transformers_tests.install(folder.resolve())
        for marker in transformers_tests.markers(folder):
            config.addinivalue_line("markers", f"{marker}: transformers' own")


@pytest.fixture(scope="session")
def golden_folder(pytestconfig: pytest.Config) -> Path:
    return pytestconfig.getoption("golden").resolve()


@pytest.hookimpl(tryfirst=True)  # before -m chooses among the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_slow(items)
