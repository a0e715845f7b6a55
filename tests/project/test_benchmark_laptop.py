"""benchmark_laptop.py with small shapes: it makes its models, measures each row in a process of its own, and judges."""

import json
import math

import pytest
import torch
import typer
from safetensors import safe_open

from visualrwkv_hf import VisualRWKVConfig


@pytest.fixture(autouse=True)
def native_ops(monkeypatch, tmp_path):
    """The compiled library goes with the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_quick_run(example, tmp_path, capsys):
    """Two rows, from the checkpoint to the table, and one that fails: it is left out, and the others go on."""
    (tmp_path / "models" / "v6-tiny-int4").mkdir(parents=True)
    (tmp_path / "models" / "v6-tiny-int4" / "config.json").write_text("{}")
    files = dict(json=tmp_path / "table.json", markdown=tmp_path / "table.md")
    example("benchmark_laptop").main(
        tmp_path / "models",
        model=["v6-tiny"],
        precision=["bfloat16", "int4", "int8"],
        rounds=1,
        new_tokens=4,
        plain=False,
        peers=False,
        threads=1,
        quick=True,
        **files,
    )
    said = capsys.readouterr()
    assert files["markdown"].read_text("utf-8") in said.out
    row, in_int8 = json.loads(files["json"].read_text("utf-8"))["rows"]
    assert "v6-tiny, bfloat16, visualrwkv-hf: load " in said.err
    assert "v6-tiny, int4, visualrwkv-hf is left out. " in said.err
    assert [row["precision"], in_int8["precision"]] == ["bfloat16", "int8"]
    fields = json.loads((tmp_path / "models" / "v6-tiny-int8" / "config.json").read_text())
    assert fields["quantization_config"]["format"] == "pack-quantized"
    assert in_int8["rounds"][0]["weight_bytes"] < 0.8 * row["rounds"][0]["weight_bytes"]
    (numbers,) = row["rounds"]
    config = VisualRWKVConfig.from_pretrained(tmp_path / "models" / "v6-tiny")
    assert numbers["picture_tokens"] == config.num_image_tokens == 17
    assert 0 < numbers["tower"] + numbers["prefill"] <= numbers["first"]
    assert numbers["token"] > 0 and numbers["load"] > 0 and numbers["processor"] > numbers["imports"] > 0
    assert numbers["peak"] > numbers["weight_bytes"] > 65536 * 128 * 2 * 2  # embedding and head in bfloat16


@pytest.mark.parametrize("name", ["v6-1.6b", "v7-0.1b", "v6-7b"])
def test_full_sizes_are_those_of_the_releases(example, name):
    """Tensors that nothing reads, such as CLIP's last norm, are in the release and not here."""
    models = example("laptop_models")
    released = {"v6-1.6b": 1_905_477_632, "v7-0.1b": 1_025_987_520, "v6-7b": 7_943_448_576}[name]
    shapes = models.original_shapes(models.config_of(models.MODELS[name]))
    count = sum(math.prod(shape) for shape in shapes.values())
    assert 0.95 * released < count <= released


def test_a_checkpoint_is_written_as_described(example, tmp_path):
    models = example("laptop_models")
    shapes = {"rwkv.emb.weight": (5, 7), "rwkv.blocks.0.ln1.weight": (64,), "rwkv.head.weight": (128, 256)}
    models.write_original(tmp_path / "model.safetensors", shapes)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    again = models.RandomWeights(shapes)
    assert list(again) == list(shapes) and all(
        torch.equal(again[name], tensor) for name, tensor in tensors.items()
    )
    assert tensors["rwkv.head.weight"].float().std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert tensors["rwkv.blocks.0.ln1.weight"].float().mean().item() == pytest.approx(1, abs=0.1)


def test_targets(example):
    """Ratios are medians over the rounds, of rows of the same round."""
    benchmark = example("benchmark_laptop")
    case = benchmark.Case("v6-tiny", "int8", benchmark.OURS)
    fast = {
        "tower": 2.0,
        "tower clip": 0.5,
        "prefill": 1.0,
        "token": 1.0,
        "first": 2.0,
        "peak": 3e9,
        "weight_bytes": 2e9,
        "processor": 1.0,
    }
    slow = {"prefill": 1.3, "token": 1.05, "first": 3.9, "peak": 4e9, "weight_bytes": 2e9, "processor": 5.0}
    taken = {
        case: [
            fast,
            {key: 10 * value for key, value in fast.items()} | {"tower": 2.0, "tower clip": 0.5},
            fast,
        ],
        case._replace(precision="bfloat16"): [slow, {key: 10 * value for key, value in slow.items()}, slow],
        case._replace(engine=benchmark.ENCODERS): [
            {"tower": 3.0, "again": 2.0, "tower clip": 1.0, "peak": 1.0}
        ]
        * 3,
        case._replace(engine=benchmark.LLAMA): [slow, {key: 10 * value for key, value in slow.items()}, slow],
    }
    found = {each.text: each for each in benchmark.targets_of(taken, benchmark.QUICK_MODELS)}
    assert {text: (round(each.value, 3), each.is_reached) for text, each in found.items()} == {
        "v6-tiny int8: a prompt, times llama.cpp's speed": (1.3, True),
        "v6-tiny int8: a token, times llama.cpp's speed": (1.05, False),
        "v6-tiny int8: tower, times transformers' speed": (1.5, True),
        "v6-tiny int8: tower clip, times transformers' speed": (2.0, True),
        "v6-tiny int8: first word, parts of bfloat16's": (0.513, False),
        "v6-tiny int8: peak memory in GB": (3.0, True),
        "v6-tiny bfloat16: peak memory in GB": (4.0, False),
    }
    assert "| 1.05 | at least 1.10 | missed |" in benchmark.targets_table(list(found.values()))


def test_no_time_where_llama_cpp_disagrees(example, monkeypatch, tmp_path, capsys):
    benchmark = example("benchmark_laptop")
    monkeypatch.setattr(benchmark, "disagreement", lambda generation, folder: 0.01)
    with pytest.raises(typer.Exit):
        benchmark.refuse_disagreement({6}, tmp_path)
    assert "Wrong, so no times: RWKV-6 differs by 1.0e-02." in capsys.readouterr().err


def test_gguf_holds_rwkv6_in_llama_cpps_shapes(example, tmp_path):
    """numpy's order of a file's dimensions is the reverse of ggml's."""
    gguf = pytest.importorskip("gguf")
    from visualrwkv_hf import VisualRWKVForCausalLM, VisualRWKVTextConfig

    engine, engines = example("llama_cpp_engine"), example("engines")
    config = VisualRWKVTextConfig(rwkv_version=6, vocab_size=320, hidden_size=128, num_hidden_layers=2)
    original = engines.original_weights(VisualRWKVForCausalLM(config).float())
    for tensor in original.values():
        tensor.normal_()
    engine.write_gguf(tmp_path / "model.gguf", original, config, "float32")
    read = gguf.GGUFReader(tmp_path / "model.gguf").tensors
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in read}
    block = "blocks.1.att."
    same = {
        "blk.1.time_mix_w1.weight": original[f"{block}time_maa_w1"].T,
        "blk.1.time_mix_w2.weight": original[f"{block}time_maa_w2"].transpose(1, 2),
        "blk.1.time_mix_decay.weight": original[f"{block}time_decay"].flatten(),
        "blk.1.time_mix_first.weight": original[f"{block}time_faaaa"],
        "blk.1.time_mix_lerp_x.weight": original[f"{block}time_maa_x"].flatten(),
        "blk.1.time_mix_gate.weight": original[f"{block}gate.weight"],
    }
    for name, weight in same.items():
        torch.testing.assert_close(found[name].reshape(weight.shape), weight, atol=0, rtol=0)
        assert found[name].numel() == weight.numel()
    lerps = torch.stack([original[f"{block}time_maa_{letter}"].flatten() for letter in "wkvrg"])
    torch.testing.assert_close(
        found["blk.1.time_mix_lerp_fused.weight"].reshape(5, 128), lerps, atol=0, rtol=0
    )
    assert sum(tensor.numel() for tensor in found.values()) == sum(
        tensor.numel() for tensor in original.values()
    )
