"""The benchmarks in examples/ with the smallest shapes: that they run, check before they time, and count rightly."""

import json
import math
import subprocess
import sys

import pytest
import torch
import typer
from paths import EXAMPLES

from visualrwkv_hf import VisualRWKVCache, wkv7


@pytest.fixture(autouse=True)
def native_ops(monkeypatch, tmp_path):
    """The compiled library goes with the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# --- benchmark_wkv.py ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_wkv_runs_as_a_script(tmp_path):
    command = "--device cpu --threads 1 --shapes 1x20x2 --shapes 2x1x2 --seconds 0.01 --json wkv.json --markdown wkv.md"
    done = subprocess.run(
        [sys.executable, EXAMPLES / "benchmark_wkv.py", *command.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "wkv.md").read_text("utf-8") in done.stdout

    read = json.loads((tmp_path / "wkv.json").read_text("utf-8"))
    rows = read["rows"]
    assert {(row["op"], row["T"]) for row in rows} == {("wkv6", 20), ("wkv6", 1), ("wkv7", 20), ("wkv7", 1)}
    assert {row["mode"] for row in rows if row["T"] == 1} == {"forward"}
    assert {row["mode"] for row in rows if row["T"] == 20} == {"forward", "backward", "forward + backward"}
    assert all(row["seconds"] > 0 and row["error"] < 1e-5 for row in rows)
    assert read["about"]["copy_bytes_per_second"] > 0


def test_wkv_prints_no_time_for_a_wrong_result(example, monkeypatch, capsys):
    def wrong_by_a_percent(r, *args, **kwargs):
        out, state = wkv7(r, *args, **kwargs)
        return (out if r.dtype == torch.float64 else 1.01 * out), state

    benchmark = example("benchmark_wkv")
    monkeypatch.setattr(benchmark, "wkv7", wrong_by_a_percent)
    with pytest.raises(typer.Exit) as left:
        benchmark.main(shapes=["1x20x2"], op="wkv7", device="cpu", seconds=0.01)
    said = capsys.readouterr()
    assert left.value.exit_code == 1
    assert not said.out
    assert "wkv7 1x20x2" in said.err and "1.0e-02" in said.err


@pytest.mark.parametrize("op", ["wkv6", "wkv7"])
@pytest.mark.parametrize("T", [1, 19])
def test_wkv_peer_computes_the_same(example, op, T):
    benchmark = example("benchmark_wkv")
    inputs = benchmark.random_inputs(benchmark.Case(op, 2, T, 3), "cpu", torch.float32)
    assert ("initial_state" in inputs) == (T == 1)
    for peer in benchmark.peers(op, "cpu").values():
        error, of = benchmark.worst_error(peer, benchmark.plain(op), inputs, with_gradients=T > 1)
        assert error < 1e-5, of


def test_wkv_goes_on_without_a_peer_that_breaks(example, monkeypatch, tmp_path, capsys):
    (tmp_path / "fla").mkdir()
    (tmp_path / "fla" / "__init__.py").write_text("raise RuntimeError('wants another Triton')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [
        name for name in sys.modules if name.split(".")[0] == "fla"
    ]:  # another test may have imported it
        monkeypatch.delitem(sys.modules, name)
    assert example("benchmark_wkv").flash_linear_attention("wkv7") == {}
    assert "wants another Triton" in capsys.readouterr().err


@pytest.mark.parametrize(("op", "tensors"), [("wkv6", 4), ("wkv7", 6)])
def test_wkv_roofline_counts_every_tensor_once(example, op, tensors):
    """1 u is one tensor [B, T, H, 64]; read r, w, k, v (a, b), write y; the backward reads y's gradient as well.

    The log decay is float32 beside bfloat16, as in a model, so it is 2 u.
    """
    benchmark = example("benchmark_wkv")
    case = benchmark.Case(op, 2, 128, 3)
    inputs = benchmark.random_inputs(case, "cpu", torch.bfloat16)
    unit, state = inputs["v"].nbytes, 4 * 2 * 3 * 64 * 64
    bonus = inputs["u"].nbytes if op == "wkv6" else 0
    forward = benchmark.least_seconds(case, benchmark.FORWARD, inputs, bandwidth=1.0, rate=math.inf)
    backward = benchmark.least_seconds(case, benchmark.BACKWARD, inputs, bandwidth=1.0, rate=math.inf)
    assert forward == (tensors + 2) * unit + bonus + state
    assert backward == (2 * (tensors + 1) + 1) * unit + 2 * bonus
    both = benchmark.least_seconds(case, benchmark.BOTH, inputs, bandwidth=1.0, rate=math.inf)
    assert both == forward + backward


def test_wkv_targets(example):
    benchmark = example("benchmark_wkv")
    training = benchmark.Case("wkv7", 8, 4096, 64)
    said = benchmark.verdict(training, benchmark.BOTH, "cuda", 4e-3, 5e-3)
    assert said == "<= 4.5 ms: met; >= 1.5 x fastest peer: 1.25 x, missed"
    assert not benchmark.verdict(training, benchmark.BOTH, "cpu", 4e-3, 5e-3)
    assert not benchmark.verdict(training._replace(T=4095), benchmark.BOTH, "cuda", 4e-3, 5e-3)


@pytest.mark.parametrize("shape", ["8x4096", "0x1x1", "axbxc", "1x2x3x4"])
def test_wkv_refuses_a_shape(example, shape):
    with pytest.raises(typer.BadParameter, match=f"BxTxH.*got {shape}"):
        example("benchmark_wkv").parse_shapes(["1x2x3", shape], "cpu")


# --- benchmark_vs_transformer.py ----------------------------------------------------------------------


@pytest.mark.parametrize("version", [6, 7])
def test_vs_transformer_runs(example, version, tmp_path, capsys):
    benchmark = example("benchmark_vs_transformer")
    benchmark.main(
        size="tiny",
        rwkv_version=version,
        cache="both",
        device="cpu",
        json=tmp_path / "vs.json",
        markdown=tmp_path / "vs.md",
    )
    assert (tmp_path / "vs.md").read_text("utf-8") in capsys.readouterr().out
    read = json.loads((tmp_path / "vs.json").read_text("utf-8"))
    assert [line["context"] for line in read["compared"]] == [32, 64]
    held = {(row["cache"], row["context"]): row["cache_bytes"] for row in read["rows"]}
    assert held["state", 32] == held["state", 64]
    # Keys and values of two layers for the context and the tokens behind it.
    assert held["dynamic", 64] == 2 * 2 * 4 * 64 * (64 + benchmark.STEPS)
    assert held["static", 64] >= held["dynamic", 64]
    assert all(row["seconds_per_token"] > 0 and row["cache_error"] < 1e-5 for row in read["rows"])


def test_vs_transformer_prints_no_time_for_a_wrong_result(example, monkeypatch, capsys):
    class Forgetful(VisualRWKVCache):
        def advance(self, num_tokens: int) -> None:
            super().advance(num_tokens)
            self.reset()

    benchmark = example("benchmark_vs_transformer")
    monkeypatch.setattr(benchmark, "VisualRWKVCache", Forgetful)
    with pytest.raises(typer.Exit) as left:
        benchmark.main(size="tiny", device="cpu", context=[40])
    said = capsys.readouterr()
    assert left.value.exit_code == 1
    assert not said.out
    assert "VisualRWKV, state cache" in said.err


def test_vs_transformer_refuses_a_context_without_room(example):
    with pytest.raises(typer.BadParameter, match="16 tokens, got 16"):
        example("benchmark_vs_transformer").main(size="tiny", device="cpu", context=[16])


def test_vs_transformer_sizes(example):
    """7B is LLaVA-1.5's 7.06 B parameters, and 576 tokens a picture in both models."""
    benchmark = example("benchmark_vs_transformer")
    size = benchmark.SIZES["7B"]
    assert size.picture_tokens == 576
    assert benchmark.rwkv_config(size, 7).num_image_tokens == 576
    with torch.device("meta"):
        model = benchmark.AutoModelForImageTextToText.from_config(benchmark.llava_config(size))
    assert 7.0e9 < model.num_parameters() < 7.1e9


# --- benchmarking.py ----------------------------------------------------------------------------------


def test_interleaved_runs_in_turn(example):
    ran: list[str] = []
    functions = {name: lambda name=name: ran.append(name) for name in "ab"}
    timings = example("benchmarking").interleaved(functions, seconds=0, least=3)
    assert ran == [*"aabb", *"ab" * 3]
    assert all(t.count == 3 and t.low <= t.median <= t.high for t in timings.values())


def test_readable_numbers(example):
    benchmarking = example("benchmarking")
    assert [benchmarking.readable(s) for s in (2.0, 1.23e-3, 4.56e-5)] == ["2 s", "1.23 ms", "45.6 µs"]
    assert benchmarking.readable_bytes(14.2e9) == "14.2 GB"
    assert benchmarking.markdown_table([{"a": 1, "b": None}]) == "| a | b |\n| --- | --- |\n| 1 |  |"
