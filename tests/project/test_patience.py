"""No test limits a process, a thread or a request by a time of its own: slow machines are not to fail."""

import re

from paths import TESTS

LIMITED = re.compile(
    r"\b(timeout=|settimeout\(|\.wait\(|\.result\(|\.join\(|monotonic\(\) \+ |wait_for\([^,\n]+, )[\d.]+"
)
SHORT = {"attacks/test_server_fetch.py", "serving/test_soak.py"}
"""These look whether something has not happened yet: on a slow machine they see less, and pass."""


def test_waiting_is_limited_by_patience_alone():
    files = {path.relative_to(TESTS).as_posix(): path.read_text() for path in TESTS.rglob("*.py")}
    found = {name: [hit[0] for hit in LIMITED.finditer(text)] for name, text in files.items()}
    assert {name for name, hits in found.items() if hits} == SHORT
