"""Define how long a test waits. Only what hangs takes so long, so that no result depends on a machine's speed."""

import time
from collections.abc import Callable

PATIENCE = 600
"""The longest wait for processes, requests, threads and conditions, in seconds."""


def wait_until(is_so: Callable[[], object], what: str, seconds: float = 0.02) -> None:
    """Return as soon as `is_so()` is true; it is called every few milliseconds.

    Args:
        is_so: the condition.
        what: the event that the test waits for, for the error message.
        seconds: the pause between two calls.

    Raises:
        AssertionError: `is_so()` was not true within `PATIENCE` seconds.
    """
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < deadline, f"{what} has not happened in {PATIENCE} s"
        time.sleep(seconds)
