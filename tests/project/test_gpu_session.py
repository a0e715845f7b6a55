"""examples/gpu_session.py: a stage that fails or hangs costs only itself, and all of it runs without a GPU."""

import json
import os
import subprocess
import sys

import psutil
import pytest
import torch
import typer
from paths import EXAMPLES
from patience import wait_until


@pytest.fixture
def ran(example, tmp_path):
    """Run some Python as one stage."""
    session = example("gpu_session")

    def run(code: str, limit: float = 60, name: str = "one", record=None):
        record = record or session.Record(tmp_path / "out")
        command = [sys.executable, "-u", "-c", code]
        session.run_stage(session.Stage(name, "Title", 1), record, command, dict(os.environ), limit)
        return record

    return run


def test_rows_of_a_stage_that_fails_are_kept(ran, tmp_path):
    record = ran("print('row: {\"a\": 1}'); print('other'); raise SystemExit(3)")
    ran("print('row: {\"b\": 2.5}')", name="two", record=record)
    read = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert read["one"]["rows"] == [{"a": 1}]
    assert read["one"]["ended"].startswith("failed with exit status 3")
    assert read["two"]["rows"] == [{"b": 2.5}] and read["two"]["ended"] == "done"
    summary = (tmp_path / "out" / "summary.md").read_text("utf-8")
    assert "| a |\n| --- |\n| 1 |" in summary and "| b |\n| --- |\n| 2.5 |" in summary
    assert "other" in (tmp_path / "out" / "log.txt").read_text("utf-8")


SHORT = 15
"""Seconds in which two Pythons that import little begin, on any machine."""


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_stage_that_hangs_ends_with_all_that_it_started(ran, tmp_path):
    pid = tmp_path / "pid"
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid))\n"
        "print('row: {\"a\": 1}')\ntime.sleep(600)"
    )
    record = ran(code, limit=SHORT)
    assert record.stages["one"]["ended"] == f"stopped at its limit of {SHORT} s"
    assert record.stages["one"]["rows"] == [{"a": 1}]
    wait_until(lambda: has_ended(int(pid.read_text())), "the end of its child")


def test_a_stage_that_runs_again_leaves_the_others_as_they_were(example, ran, tmp_path):
    ran("print('row: {\"a\": 1}')", name="one")
    ran("print('row: {\"b\": 2}')", name="two")
    record = ran("print('row: {\"b\": 3}')", name="two")
    read = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert read["one"]["rows"] == [{"a": 1}] and read["two"]["rows"] == [{"b": 3}] and record.stages == read
    assert '{"a": 1}' in (tmp_path / "out" / "log.txt").read_text("utf-8")
    with pytest.raises(ValueError, match="holds the results of a real run"):
        example("gpu_session").Record(tmp_path / "out", dry_run=True)


def test_a_row_into_which_another_line_came_ends_nothing(ran):
    record = ran("print('row: {\"a\": warning'); print('row: {\"a\": 1}')")
    assert record.stages["one"]["ended"] == "done" and record.stages["one"]["rows"] == [{"a": 1}]


def test_results_are_written_while_a_stage_runs(example, tmp_path, monkeypatch):
    session = example("gpu_session")
    record, stage, seen = session.Record(tmp_path), session.Stage("one", "Title", 60), []
    add = record.add

    def adds(of, row):
        add(of, row)
        seen.append(json.loads((tmp_path / "results.json").read_text("utf-8"))["one"])

    monkeypatch.setattr(record, "add", adds)
    code = "print('row: {\"a\": 1}'); print('row: {\"a\": 2}')"
    session.run_stage(stage, record, [sys.executable, "-c", code], dict(os.environ), 60)
    assert [len(one["rows"]) for one in seen] == [1, 2]
    assert {one["ended"] for one in seen} == {"running"}


def test_without_time_a_stage_is_left_out(example, tmp_path):
    session = example("gpu_session")
    record = session.run_all(tmp_path, True, ["machine"], seconds=1)
    assert record.stages["machine"]["ended"] == "left out, for no time was left"


def test_refuses_an_unknown_stage(example):
    with pytest.raises(typer.BadParameter, match="no stage dance: choose from machine, compile"):
        example("gpu_session").main(stage=["dance"])


def test_every_stage_has_work(example):
    work = example("gpu_stages").WORK
    assert [stage.name for stage in example("gpu_session").STAGES] == [
        name for name in work if name != "call"
    ]


def test_ncu_page_is_read(example):
    """Its header, units and numbers as ncu writes them with --csv --page raw."""
    text = (
        "==PROF== Connected\n"
        '"ID","Kernel Name","gpu__time_duration.sum","smsp__inst_executed.sum",'
        '"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",'
        '"smsp__average_warps_issue_stalled_math_pipe_throttle_per_issue_active.ratio"\n'
        '"","","us","inst","inst","inst"\n'
        '"0","wkv7_fwd_prepare_kernel","12.5","1,000","0.25","1.50"\n'
    )
    (row,) = example("gpu_stages").counted(text)
    assert row == {
        "kernel": "wkv7_fwd_prepare_kernel",
        "time": "12.5 us",
        "instructions": "1,000 inst",
        "longest stalls, cycles per issue": "math_pipe_throttle 1.50, barrier 0.25",
    }
    assert list(example("gpu_stages").counted("nothing\n")) == []


def test_tuning_is_limited_to_the_nearest_configurations(example, monkeypatch):
    triton = pytest.importorskip("triton")
    from triton.runtime.autotuner import Autotuner

    seen = []
    monkeypatch.setattr(Autotuner, "__init__", lambda self, fn, names, configs, *a, **k: seen.extend(configs))
    example("gpu_stages").limit_autotuning(2)
    configs = [triton.Config({}, num_warps=w, num_stages=s) for w, s in ((8, 2), (4, 4), (4, 2), (1, 1))]
    Autotuner(None, [], configs)
    assert [(config.num_warps, config.num_stages) for config in seen] == [(4, 2), (4, 4)]


def test_another_launch_ends_with_its_block(example):
    pytest.importorskip("triton")
    launches = example("gpu_stages").from_tests("gpu_launches")
    table, before = launches.launches.WKV7, launches.launches.WKV7[launches.MODEL]
    with launches.launched_with("prepare", 16, 2):
        assert table[launches.MODEL] == before._replace(prepare=launches.launches.Launch(16, 2))
    assert table[launches.MODEL] == before


def test_benchmark_model_is_made_where_it_stays(example):
    model = example("engines").random_model("tiny", "cpu", torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert all(weight.isfinite().all() for weight in model.parameters())
    logits = model(torch.arange(1, 20)[None]).logits.float()
    assert logits.isfinite().all() and logits.std() > 0.1


@pytest.mark.slow
def test_dry_run_goes_through_every_stage(tmp_path):
    pytest.importorskip("triton")
    command = [sys.executable, EXAMPLES / "gpu_session.py", "--dry-run", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    read = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert {name: stage["ended"] for name, stage in read.items()} == dict.fromkeys(read, "done")
    assert all(stage["rows"] for stage in read.values())
    assert not [row for stage in read.values() for row in stage["rows"] if "failed" in row]
