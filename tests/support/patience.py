"""How long a test waits for what must happen. Only what hangs takes so long: no result depends on a machine's speed."""

import time
from collections.abc import Callable

PATIENCE = 600
"""Seconds, for processes, requests, threads and conditions."""


def wait_until(is_so: Callable[[], object], what: str, seconds: float = 0.02) -> None:
    """Return as soon as `is_so()` holds, which is asked every few milliseconds.

    Args:
        is_so: the condition.
        what: says in an error what was waited for.
        seconds: between two questions.

    Raises:
        AssertionError: It did not hold in time.
    """
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < deadline, f"{what} has not happened in {PATIENCE} s"
        time.sleep(seconds)
