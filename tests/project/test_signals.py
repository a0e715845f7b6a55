"""Tests behave alike whether their caller ignores signals (a background job of a shell) or not."""

import signal
import subprocess
import sys

from paths import ROOT

SUPPORT = ROOT / "tests" / "support"

INNER = """
import os, signal, subprocess, sys
def test_a_child_can_be_interrupted():
    code = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True\\n"
"""


def ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def test_children_of_tests_can_be_interrupted_though_the_caller_ignores_it(tmp_path):
    (tmp_path / "test_inner.py").write_text(INNER)
    code = f"""
import sys
sys.path.insert(0, {str(SUPPORT)!r})
from default_signals import restore_signals
restore_signals()
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", {str(tmp_path / "test_inner.py")!r}]))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, preexec_fn=ignore_interrupts, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
