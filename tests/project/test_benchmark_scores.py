"""examples/benchmark_scores.py with the smallest shapes: that it checks before it times."""

import json

import pytest
import typer


@pytest.fixture
def benchmark(example):
    return example("benchmark_scores")


def test_it_runs(benchmark, tmp_path, capsys):
    files = dict(json=tmp_path / "scores.json", markdown=tmp_path / "scores.md")
    benchmark.main(size="tiny", count=3, seconds=0.01, **files)
    assert files["markdown"].read_text("utf-8") in capsys.readouterr().out
    result = json.loads(files["json"].read_text("utf-8"))
    assert [row["way"] for row in result["rows"]] == [
        "1 question",
        "3 questions, one after the other",
        "3 questions, one batch",
    ]
    assert result["about"]["error"] < 1e-4
    for row in result["rows"]:
        assert row["times_one"] == row["seconds"] / result["rows"][0]["seconds"] > 0


def test_it_prints_no_time_for_a_wrong_result(benchmark, monkeypatch, capsys):
    one = benchmark.Questions.in_a_batch
    monkeypatch.setattr(benchmark.Questions, "in_a_batch", lambda self: one(self) + 0.1)
    with pytest.raises(typer.Exit):
        benchmark.main(size="tiny", count=2, seconds=0.01)
    said = capsys.readouterr()
    assert not said.out and "off by 1.0e-01, allowed 1e-03" in said.err
