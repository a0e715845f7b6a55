"""The table of slow cases names tests that exist, and never all cases of a test file."""

import re
import subprocess
import sys

import pytest
from paths import ROOT
from slow_tests import SLOW


def collected(marker: str, *files: str) -> list[str]:
    """Return the ids of the tests that `-m marker` chooses."""
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-P", "-c", code, "--collect-only", "-q", "-m", marker, *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.slow
def test_every_pattern_finds_tests_and_leaves_some():
    files = sorted({f"tests/{re.split('::', pattern)[0]}" for pattern in SLOW})
    paths = [
        str(path)
        for f in files
        for path in sorted((ROOT / "tests").glob("*/*.py"))
        if re.search(f[6:], str(path))
    ]
    slow, quick = collected("slow", *paths), collected("not slow", *paths)
    for pattern in SLOW:
        assert any(re.search(pattern, test) for test in slow), pattern
        assert not any(re.search(pattern, test) for test in quick), pattern
    assert {test.split("::")[0] for test in slow} == {test.split("::")[0] for test in quick}
