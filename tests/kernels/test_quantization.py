"""int8 weights by other people's libraries, as transformers or they themselves take them, on a CPU."""

import importlib.util
import json

import add_examples  # noqa: F401
import pytest
import torch
from tiny import pixels, prompt, text_config, tiny_vlm
from tiny_training import save_tiny_model
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, QuantoConfig, TorchAoConfig
from triton_interpreter import NEEDS_INTERPRETER, launches

from visualrwkv_hf import kernel_backend


def torchao_config():
    return TorchAoConfig(importlib.import_module("torchao.quantization").Int8WeightOnlyConfig())


def torchao_float8_config():
    return TorchAoConfig(importlib.import_module("torchao.quantization").Float8WeightOnlyConfig())


def torchao_int4_config():
    """The rounding of `Int4WeightOnlyConfig`, whose packing needs a GPU, in numbers that a CPU can multiply."""
    quantization = importlib.import_module("torchao.quantization")
    return TorchAoConfig(quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(16)))


def bitsandbytes_config():
    return BitsAndBytesConfig(load_in_8bit=True)


def quanto_config():
    return QuantoConfig(weights="int8")


def needs(module: str):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


# Each weight is off by up to 1/254 of its row's largest: measured 0.02 to 0.04. bitsandbytes rounds the products'
# other factor too, in rows as well, and to float16 before: measured 0.025 to 0.04.
LARGEST_ERROR = 0.1
LIBRARIES = {
    "torchao": (torchao_config, needs("torchao")),
    "bitsandbytes": (bitsandbytes_config, needs("bitsandbytes")),
    "quanto": (
        quanto_config,
        needs("optimum.quanto") if importlib.util.find_spec("optimum") else needs("optimum"),
    ),
}
SAVED_BY_TRANSFORMERS = [name for name in LIBRARIES if name != "quanto"]
VERSIONS = [5, 6, 7]


def cases(names, versions=VERSIONS):
    return [
        pytest.param(version, LIBRARIES[name][0], marks=LIBRARIES[name][1], id=f"{name}-{version}")
        for name in names
        for version in versions
    ]


def inputs_for(model) -> dict[str, torch.Tensor]:
    return dict(input_ids=prompt(model, before=3, after=8), pixel_values=pixels(1))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (actual - expected).norm() / expected.norm()


def assert_answers(model, inputs: dict[str, torch.Tensor]) -> None:
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize("version, config", cases(LIBRARIES))
@torch.no_grad()
def test_int8_weights_load_and_answer(tmp_path, version, config):
    model = tiny_vlm(version=version)
    model.save_pretrained(tmp_path)
    quantised = AutoModelForImageTextToText.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=config()
    )
    block = quantised.model.language_model.layers[0]
    for layer in (block.att.receptance, block.att.output, block.ffn.key, block.ffn.value):
        is_rounded = layer.weight.dtype == torch.int8 or type(layer.weight.detach()) is not torch.Tensor
        assert is_rounded
    inputs = inputs_for(model)
    assert 0 < relative_error(quantised(**inputs).logits, model(**inputs).logits) < LARGEST_ERROR
    assert_answers(quantised, inputs)


@needs("torchao")
@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_float8_weights_load_and_answer(tmp_path, version):
    """On a CPU they are widened before each product; a GPU of compute capability 8.9 has products of them."""
    model = tiny_vlm(version=version)
    model.save_pretrained(tmp_path)
    quantised = AutoModelForImageTextToText.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=torchao_float8_config()
    )
    block = quantised.model.language_model.layers[0]
    for layer in (block.att.receptance, block.att.output, block.ffn.key, block.ffn.value):
        assert layer.weight.qdata.dtype == torch.float8_e4m3fn
    inputs = inputs_for(model)
    expected = model.bfloat16()(**inputs).logits.float()
    # A weight of 3 bits after the point is off by up to 1/16, and so are the logits, more or less.
    assert 0 < relative_error(quantised(**inputs).logits.float(), expected) < 0.2
    assert_answers(quantised, inputs)


@needs("torchao")
@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_int4_weights_load_and_answer(tmp_path, version):
    model = tiny_vlm(version=version)
    model.save_pretrained(tmp_path)
    quantised = AutoModelForImageTextToText.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=torchao_int4_config()
    )
    block = quantised.model.language_model.layers[0]
    for layer in (block.att.receptance, block.att.output, block.ffn.key, block.ffn.value):
        assert layer.weight.qdata.min() >= -8 and layer.weight.qdata.max() <= 7
    dense = dict(model.named_parameters())
    for name, weight in quantised.named_parameters():
        if type(weight) is not torch.nn.Parameter:
            # A weight is off by up to 1/15 of the largest of its 16.
            assert 0 < relative_error(weight.dequantize(), dense[name]) < 0.15
            dense[name].copy_(weight.dequantize())
    inputs = inputs_for(model)
    assert relative_error(quantised(**inputs).logits, model(**inputs).logits) < 1e-4
    assert_answers(quantised, inputs)


@needs("torchao")
@needs("triton")
@NEEDS_INTERPRETER
@pytest.mark.parametrize("config", [torchao_config, torchao_int4_config])
@torch.no_grad()
def test_kernels_of_a_token_leave_quantized_products_to_torchao(tmp_path, config):
    """They read plain weights only: a quantized layer is computed part by part."""
    text = dict(text_config=text_config(7, head_dim=32).to_dict())
    tiny_vlm(version=7, **text).save_pretrained(tmp_path)
    outputs, seen = {}, {}
    for quantization_config in (None, config()):
        model = AutoModelForImageTextToText.from_pretrained(
            tmp_path, dtype=torch.float32, quantization_config=quantization_config
        )
        inputs = inputs_for(model)
        for backend in ("torch", "triton"):
            with kernel_backend(backend), launches() as found:
                state = model(**inputs, use_cache=True).past_key_values
                token = torch.ones(1, 1, dtype=torch.long)
                outputs[backend] = model(token, past_key_values=state, use_cache=True).logits
            seen[backend] = {launch.kernel for launch in found}
        assert ("products_fwd_kernel" in seen["triton"]) == (quantization_config is None)
        assert "wkv7_fwd_scan_kernel" in seen["triton"] and not seen["torch"]
        torch.testing.assert_close(outputs["triton"], outputs["torch"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("version, config", cases(SAVED_BY_TRANSFORMERS))
@torch.no_grad()
def test_int8_weights_are_saved(tmp_path, version, config):
    model = tiny_vlm(version=version)
    model.save_pretrained(tmp_path / "whole")
    quantised = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "whole", dtype=torch.float32, quantization_config=config()
    )
    quantised.save_pretrained(tmp_path / "int8")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "int8")
    inputs = inputs_for(model)
    assert torch.equal(again(**inputs).logits, quantised(**inputs).logits)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "int8")]
    assert sizes[1] < 0.7 * sizes[0]  # embedding, head, low-rank maps and the scales stay


@needs("optimum")
@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_int8_weights_of_quanto_are_saved_by_quanto(tmp_path, version):
    """transformers refuses to save quanto's weights; quanto has its own way, for any Auto class."""
    quanto = pytest.importorskip("optimum.quanto")

    class QuantizedVLM(quanto.models.QuantizedTransformersModel):
        auto_class = AutoModelForImageTextToText

    model = tiny_vlm(version=version)
    inputs = inputs_for(model)
    expected = model(**inputs).logits
    quantised = QuantizedVLM.quantize(model, weights=quanto.qint8, exclude="lm_head")
    actual = quantised(**inputs).logits
    assert 0 < relative_error(actual, expected) < LARGEST_ERROR
    quantised.save_pretrained(tmp_path)
    again = QuantizedVLM.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).logits, actual)


# --- examples/benchmark_quantization.py -----------------------------------------------------------------


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return importlib.import_module("benchmark_quantization")


def test_the_benchmark_has_a_row_for_every_engine(benchmark, tmp_path, capsys):
    folder = save_tiny_model(tmp_path / "model")
    files = dict(json=tmp_path / "int8.json", markdown=tmp_path / "int8.md")
    benchmark.main(model=str(folder), pictures=1, seconds=0.01, **files)
    assert files["markdown"].read_text("utf-8") in capsys.readouterr().out
    rows = {row["weights"]: row for row in json.loads(files["json"].read_text("utf-8"))}
    assert list(rows) == list(benchmark.ENGINES)
    assert rows["float32"]["answers as in float32"] == "3 of 3"
    for name, (module, _) in benchmark.ENGINES.items():
        is_there = module is None or benchmark.is_installed(module)
        assert (rows[name]["answers as in float32"] != "not installed") == is_there
        assert (rows[name]["bytes"] is not None and rows[name]["a token"] is not None) == is_there


@pytest.mark.parametrize(
    "name",
    [
        *("float32", "bfloat16"),
        *(
            pytest.param(f"{library} int8", marks=LIBRARIES[library][1])
            for library in ("torchao", "bitsandbytes", "quanto")
        ),
    ],
)
def test_the_benchmark_counts_bytes_with_the_scales(benchmark, tmp_path, name):
    folder = save_tiny_model(tmp_path / "model")
    whole = (folder / "model.safetensors").stat().st_size
    share = benchmark.weight_bytes(benchmark.ENGINES[name][1](str(folder))) / whole
    low, high = {"float32": (0.9, 1), "bfloat16": (0.45, 0.5)}.get(name, (0.25, 0.95))
    assert low < share < high


def test_the_benchmark_counts_answers_that_agree(benchmark):
    assert benchmark.agreement([[1, 2], [3], []], [[1, 2], [4], []]) == "2 of 3"


def test_the_benchmark_asks_different_pictures(benchmark):
    pictures = {picture.tobytes() for picture in benchmark.drawings(24)}
    assert len(pictures) == 24
