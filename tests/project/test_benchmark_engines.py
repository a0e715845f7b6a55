"""benchmark_prefill.py and benchmark_decode.py with the smallest shape: they run, check before they time, and count."""

import json
import shutil

import pytest
import torch
import typer

from visualrwkv_hf import VisualRWKVForCausalLM

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="native ops need a C compiler")


@pytest.fixture(autouse=True)
def native_ops(monkeypatch, tmp_path):
    """The compiled library goes with the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("name, timed", [("benchmark_prefill", 20), ("benchmark_decode", 1)])
def test_runs(example, name, timed, tmp_path, capsys):
    files = dict(json=tmp_path / "table.json", markdown=tmp_path / "table.md")
    example(name).main(shape="tiny", device="cpu", tokens=20, seconds=0.01, **files)
    assert files["markdown"].read_text("utf-8") in capsys.readouterr().out
    read = json.loads(files["json"].read_text("utf-8"))
    rows = {(row["engine"], row["precision"]): row for row in read["rows"]}
    assert {"float32", "bfloat16"} <= {precision for _, precision in rows}
    assert ("visualrwkv-hf, native", "float32") in rows
    assert {("visualrwkv-hf, native", precision) for precision in ("int8", "int4")} <= rows.keys()
    for row in rows.values():
        assert row["seconds"] > 0
        assert row["tokens_per_second"] == pytest.approx(timed / row["seconds"])
    assert rows["visualrwkv-hf, native", "float32"]["error"] < 1e-5


@pytest.mark.parametrize("name", ["benchmark_prefill", "benchmark_decode"])
def test_no_time_for_a_wrong_result(example, name, monkeypatch, capsys):
    def wrong_by_a_percent(model, weights=None):
        model.lm_head.weight.data.mul_(1.01)
        return model

    benchmark = example(name)
    monkeypatch.setattr(example("engines"), "accelerate_on_cpu", wrong_by_a_percent)
    with pytest.raises(typer.Exit) as left:
        benchmark.main(shape="tiny", device="cpu", dtype=["float32"], tokens=20, seconds=0.01)
    said = capsys.readouterr()
    assert left.value.exit_code == 1
    assert not said.out
    assert "visualrwkv-hf, native, float32: error 1.0e-02" in said.err


def test_an_engine_is_compared_in_its_own_precision(example):
    engines = example("engines")
    every = [
        engines.Engine(name, precision, lambda tokens, state: None, 0)
        for name in ("ours", "PyPI rwkv", engines.LLAMA_CPP)
        for precision in ("float32", "bfloat16", "int8")
        if (name, precision) != ("PyPI rwkv", "int8")
    ]
    ours, rwkv, llama = every[:3], every[3:5], every[5:]
    assert [engines.peer_of(each, every, [*rwkv, *llama])[:2] for each in ours] == [
        each[:2] for each in llama
    ]
    without = [*ours, *rwkv]
    found = [engines.peer_of(each, without, rwkv)[:2] for each in ours]
    assert found == [rwkv[0][:2], rwkv[1][:2], rwkv[0][:2]]


def test_peer_that_is_wrong_is_left_out(example, capsys):
    engines = example("engines")
    right = engines.Engine("right", "float32", lambda tokens, state: (torch.ones(3), None), 0)
    wrong = right._replace(name="wrong", read=lambda tokens, state: (torch.full((3,), 1.1), None))
    kept, errors = engines.checked([right, wrong], torch.arange(6))
    assert kept == [right] and errors[wrong] == pytest.approx(0.1)
    assert "Left out, for it is wrong: wrong" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, prepare", [("benchmark_prefill", "reading"), ("benchmark_decode", "stepping")]
)
def test_what_is_called_a_graph_is_one(example, name, prepare, monkeypatch):
    engines, recorded = example("engines"), []

    def ways(model, device, precisions):
        yield (plain := engines.ours("plain torch", "float32", model, "torch"))
        yield plain._replace(name="graph", is_graph=True)

    def captured(function):
        recorded.append(function)
        return function

    monkeypatch.setattr(engines, "our_engines", ways)
    monkeypatch.setattr(engines, "peer_engines", lambda *arguments: ())
    monkeypatch.setattr(engines, "captured", captured)
    prepare = getattr(example(name), prepare)
    engines.compared("tiny", "cpu", ["float32"], 8, 0.01, prepare, 1)
    assert len(recorded) == 1


def test_token_by_token_reads_the_same(example):
    engines = example("engines")
    plain = engines.ours("", "float32", engines.random_model("tiny"), "torch")
    _, errors = engines.checked([plain, engines.token_by_token(plain)], torch.arange(1, 12))
    assert max(errors.values()) < 1e-5


def test_weights_are_counted_once_and_without_embeddings(example):
    engines = example("engines")
    model: VisualRWKVForCausalLM = engines.random_model("tiny")
    table = model.get_input_embeddings().weight
    assert engines.weight_bytes(model) == 4 * (model.num_parameters() - table.numel())
    assert engines.weight_bytes(model.bfloat16()) == 2 * (model.num_parameters() - table.numel())


def test_gguf_holds_the_original_weights(example, tmp_path):
    """Under llama.cpp's names and in its shapes; numpy's order of a file's dimensions is the reverse of ggml's."""
    gguf = pytest.importorskip("gguf")
    engines, llama_cpp = example("engines"), example("llama_cpp_engine")
    model = engines.random_model("tiny")
    original = engines.original_weights(model)
    llama_cpp.write_gguf(tmp_path / "model.gguf", original, model.config, "float32")
    found = {
        tensor.name: torch.from_numpy(tensor.data.copy())
        for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors
    }
    same = {
        "token_embd.weight": original["emb.weight"],
        "output.weight": original["head.weight"],
        "blk.1.time_mix_w1.weight": original["blocks.1.att.w1"].T,
        "blk.1.time_mix_r_k.weight": original["blocks.1.att.r_k"].flatten(),
        "blk.1.channel_mix_key.weight": original["blocks.1.ffn.key.weight"],
    }
    for name, weight in same.items():
        torch.testing.assert_close(found[name], weight, atol=0, rtol=0)
    fused = found["blk.0.time_mix_lerp_fused.weight"].flatten(1)
    lerps = [original[f"blocks.0.att.x_{which}"].flatten() for which in "rwkvag"]
    torch.testing.assert_close(fused, torch.stack(lerps), atol=0, rtol=0)
    values = sum(weight.numel() for weight in original.values())
    unread = sum(found[f"blk.0.time_mix_v{number}.weight"].numel() for number in range(3))
    assert sum(weight.numel() for weight in found.values()) == values + unread
