"""A fixture that tests of the scripts in examples/ share."""

import importlib

import add_examples  # noqa: F401
import pytest


@pytest.fixture
def example():
    """Import a script of examples/ by its name, in a test rather than at a file's top: libraries may be missing."""
    return importlib.import_module
