"""The page of attacks names every file of attacks, with as many tests as pytest collects there."""

import re
import subprocess
import sys
from collections import Counter

import pytest
from paths import ROOT

ROW = re.compile(r"^\| .* \| (\d+) \| `(tests/[\w/.]+(?:::\w+)?)` \|$", re.MULTILINE)
PAGE = (ROOT / "docs/security.md").read_text()
ROWS = {place: int(count) for count, place in ROW.findall(PAGE)}
NEEDED = {"tests/attacks/test_server_web_demo.py": "gradio", "tests/attacks/test_server_fetch.py": "httpx"}
"""Files that are skipped as a whole without a package."""


@pytest.fixture(scope="module")
def collected():
    """How many tests pytest collects in each file, and of each function with parameters."""
    files = sorted({place.partition("::")[0] for place in ROWS})
    options = ["--collect-only", "-q", "-m", "", "-p", "no:cacheprovider"]
    # As pytest's own command does it: without the current folder on the path.
    start = "import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", start, *options, *files]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    counts: Counter[str] = Counter()
    for file, function in re.findall(r"^(tests/[\w/.]+)::(\w+)", run.stdout, re.MULTILINE):
        counts[file] += 1
        counts[f"{file}::{function}"] += 1
    return counts


@pytest.mark.parametrize("place", ROWS)
def test_the_page_has_the_numbers_of_the_tests(place, collected):
    if package := NEEDED.get(place):
        pytest.importorskip(package, reason=f"{place} is not collected without it")
    assert ROWS[place] == collected[place]


def test_no_file_of_attacks_is_left_out():
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests/attacks").glob("test_*.py")}
    assert files <= ROWS.keys()
