"""These tests need transformers' sdist: without `--transformers-tests FOLDER` they are not collected."""

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return None if config.getoption("transformers_tests") else True
