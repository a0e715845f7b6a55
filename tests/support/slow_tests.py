"""List the cases of parametrised tests that are slow and seldom fail alone, so that only `-m slow` runs them.

A test that is slow as a whole carries `@pytest.mark.slow` itself.
"""

import re

import pytest

SLOW = {
    r"kernels/test_triton_wkv[67]\.py::.*torch\.float16": "bfloat16 and float32 run the same kernels",
    r"kernels/test_triton_wkv7\.py::test_head_sizes\[128-.*": "heads of 64 run the same kernels",
    r"serving/test_fuzz\.py::.*\[6\]": "the server is the same for every generation; 7 stays",
    r"judges/test_evaluate\.py::test_(two_processes_give|after_a_kill_it_goes_on)": "they start processes",
}
"""Maps a pattern of test ids, without `tests/`, to the reason why these tests need not run at each change."""


def mark_slow(items: list[pytest.Item]) -> None:
    """Add the marker `slow` to the tests of `SLOW`."""
    for item in items:
        if any(re.search(pattern, item.nodeid) for pattern in SLOW):
            item.add_marker("slow")
