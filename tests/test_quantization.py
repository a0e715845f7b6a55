"""int8 weights by torchao, as transformers takes them."""

import pytest
import torch
from tiny import pixels, prompt, tiny_vlm
from transformers import AutoModelForImageTextToText, TorchAoConfig

torchao = pytest.importorskip("torchao.quantization")


@pytest.mark.parametrize("version", [5, 6, 7])
@torch.no_grad()
def test_int8_weights_load_answer_and_save(tmp_path, version):
    model = tiny_vlm(version=version, scan="bidirectional").float()
    model.save_pretrained(tmp_path / "whole")
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    options = dict(dtype=torch.float32, quantization_config=config)
    quantised = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole", **options)
    assert type(quantised.model.language_model.layers[0].ffn.key.weight.detach()) is not torch.Tensor

    inputs = dict(input_ids=prompt(model, before=3, after=8), pixel_values=pixels(1))
    expected, actual = model(**inputs).logits, quantised(**inputs).logits
    error = (actual - expected).norm() / expected.norm()
    assert 0 < error < 0.1  # each weight is off by up to 1/254 of its row's largest; measured 0.02 to 0.04
    assert quantised.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3

    quantised.save_pretrained(tmp_path / "int8")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "int8")
    assert torch.equal(again(**inputs).logits, actual)
