"""Folders whose weights have few bits: an engine computes with the weights that these stand for."""

import json

import pytest
import torch
from released_folders import write_release
from transformers import AutoProcessor
from vllm_engines import answers, generated, mixed_chats, requests

from visualrwkv_hf import VisualRWKVForConditionalGeneration
from visualrwkv_hf.conversion import quantize
from visualrwkv_hf.cpu.layers import dequantize


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_an_engine_writes_what_the_dequantised_model_writes(weights, tmp_path, start_engine):
    """With int4 the blocks have it, and the head has int8."""
    whole, folder = write_release(tmp_path / "model", "v7.00"), tmp_path / "packed"
    processor = AutoProcessor.from_pretrained(whole)
    exact = VisualRWKVForConditionalGeneration.from_pretrained(whole).lm_head.weight
    quantize(whole, folder, weights=weights)
    assert "quantization_config" in json.loads((folder / "config.json").read_text())
    model = dequantize(VisualRWKVForConditionalGeneration.from_pretrained(folder)).eval()
    assert not torch.equal(model.lm_head.weight, exact), "rounding changes nothing"
    expected = [generated(model, processor, chat) for chat in mixed_chats(9)]
    engine = start_engine(folder)
    assert answers(engine, requests(processor, mixed_chats(9))) == expected


def test_other_packed_weights_are_refused(tmp_path, start_engine):
    folder = write_release(tmp_path / "model", "v7.00")
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"quantization='fp8'.*visualrwkv quantize"):
        start_engine(folder)
