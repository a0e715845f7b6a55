"""examples/benchmark_state.py with the smallest shapes: that it checks before it times, and counts rightly."""

import json

import pytest
import typer


@pytest.fixture
def benchmark(example):
    return example("benchmark_state")


def test_it_runs(benchmark, tmp_path, capsys):
    benchmark.main(
        size="tiny", question=5, seconds=0.01, json=tmp_path / "state.json", markdown=tmp_path / "state.md"
    )
    assert (tmp_path / "state.md").read_text("utf-8") in capsys.readouterr().out
    ours, llava = json.loads((tmp_path / "state.json").read_text("utf-8"))["rows"]
    # Two layers: two shifts of 64 values and four heads' 16 x 16 matrices, in float32.
    assert ours["kept_bytes"] == 2 * 4 * (2 * 64 + 4 * 16 * 16)
    # Two layers' keys and values of 64 values for four words and the picture's 16 tokens.
    assert llava["kept_bytes"] == 2 * 2 * 4 * 64 * (4 + 16)
    for row in (ours, llava):
        assert row["error"] < 1e-5
        assert row["times_faster"] == row["from_start_seconds"] / row["from_kept_seconds"] > 0


def test_it_prints_no_time_for_a_wrong_result(benchmark, monkeypatch, capsys):
    visualrwkv = benchmark.visualrwkv

    def off_by_a_percent(*args):
        contender = visualrwkv(*args)
        return contender._replace(from_kept=lambda: 1.01 * contender.from_kept())

    monkeypatch.setattr(benchmark, "visualrwkv", off_by_a_percent)
    with pytest.raises(typer.Exit):
        benchmark.main(size="tiny", seconds=0.01)
    said = capsys.readouterr()
    assert not said.out
    assert "VisualRWKV: the logits from what is kept are off by 1.0e-02, allowed 1e-04" in said.err


def test_a_picture_takes_1024_tokens(benchmark):
    size = benchmark.SHAPES["0.1B"]
    assert size.picture_tokens == benchmark.rwkv_config(size, 7).num_image_tokens == 1024
