"""benchmark_loss.py with the smallest shape: it runs, compares before it measures, and says what is smaller."""

import json

import pytest
import typer
from paths import EXAMPLES

from visualrwkv_hf.loss_visualrwkv import sliced_loss


@pytest.fixture
def benchmark(example, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES))  # for the processes that it starts
    return example("benchmark_loss")


SMALLEST = dict(shapes=["2x5"], hidden_size=8, device="cpu", seconds=0.0, least=1)


def test_both_ways_are_measured(benchmark, tmp_path, capsys):
    benchmark.main(**SMALLEST, json=tmp_path / "loss.json", markdown=tmp_path / "loss.md")
    assert (tmp_path / "loss.md").read_text() == capsys.readouterr().out
    rows = json.loads((tmp_path / "loss.json").read_text())["rows"]
    assert [row["logits"] for row in rows] == ["at once", "in slices"]
    assert {row["B x T"] for row in rows} == {"2 x 5"} and float(rows[0]["error"]) < 1e-5


def test_no_figure_for_a_wrong_loss(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "sliced_loss", lambda *args: 1.01 * sliced_loss(*args))
    with pytest.raises(typer.Exit):
        benchmark.main(**SMALLEST)
    said = capsys.readouterr()
    assert not said.out and "2 x 5: error 1.0e-02" in said.err


def test_a_step_takes_what_its_logits_take(benchmark):
    """4 MB of logits in float32, a few times over, beside gradients of 0.5 MB: not less, and not ten times more."""
    case = benchmark.Case(2, 8, 2, "cpu", "float32")
    peak = benchmark.in_own_process(benchmark.peak_of_step, benchmark.WHOLE, case, 1)
    assert 2 * 8 * 65536 * 4 < peak < 2**28


def test_a_shape_that_is_none_is_refused(benchmark):
    with pytest.raises(typer.BadParameter, match="got 2x"):
        benchmark.main(**SMALLEST | {"shapes": ["2x"]})
