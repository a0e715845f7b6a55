"""examples/benchmark_serving.py with the smallest models: every server answers, and the table has a row for each."""

import json
import os
import subprocess
import sys

from paths import EXAMPLES
from patience import PATIENCE

SERVERS = ("visualrwkv", "vllm", "llava")


def test_a_missing_folder_is_named_and_not_made(tmp_path):
    command = [sys.executable, EXAMPLES / "benchmark_serving.py", "--model", tmp_path / "mistyped"]
    command += ["--server", "visualrwkv", "--clients", "1", "--seconds", "0.1", "--tokens", "1"]
    environment = os.environ | {"COLUMNS": "1000"}  # typer's messages have a frame of this width
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 2 and f"there is no folder {tmp_path / 'mistyped'}" in done.stderr, done.stderr
    assert not (tmp_path / "mistyped").exists()


def test_every_server_is_measured(tmp_path):
    command = [sys.executable, EXAMPLES / "benchmark_serving.py", "--shape", "tiny", "--tokens", "3"]
    command += ["--clients", "1", "--clients", "3", "--seconds", "0.5"]
    command += [part for server in SERVERS for part in ("--server", server)]
    command += ["--json", tmp_path / "rates.json", "--markdown", tmp_path / "rates.md"]
    # conftest.py keeps engines in this process; a server's is its own
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "rates.md").read_text("utf-8") in done.stdout
    rows = json.loads((tmp_path / "rates.json").read_text("utf-8"))["rows"]
    expected = [(server, clients) for server in SERVERS for clients in (1, 3)]
    assert [(row["server"], row["clients"]) for row in rows] == expected
    assert all(0 < row["requests"] <= row["tokens"] <= 3 * row["requests"] * 1.001 for row in rows)
