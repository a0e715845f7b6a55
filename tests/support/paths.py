"""Define the paths of the project's folders."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS, EXAMPLES = ROOT / "tests", ROOT / "examples"
GOLDEN = TESTS / "golden"
SUPPORT = TESTS / "support"
