"""An encoder that the package does not have converts by one row for the model and one for its checkpoints."""

import pytest
import torch
from mean_color import ROW, MeanColorConfig

from visualrwkv_hf import VisualRWKVConfig, VisualRWKVForConditionalGeneration
from visualrwkv_hf.conversion import load_original, restore_state_dict, to_hf, to_original
from visualrwkv_hf.conversion.encoders import ORIGINAL_ENCODERS, OriginalEncoder, VitTable
from visualrwkv_hf.conversion.releases import RELEASES, Release
from visualrwkv_hf.conversion.rows import renamed_rows
from visualrwkv_hf.conversion.shapes import shape_of
from visualrwkv_hf.encoders import ENCODERS


def mean_fields(shapes, given):
    width, num_channels = shape_of(shapes, "vit.mean.color.weight", 2)
    return {"model_type": MeanColorConfig.model_type, "width": width, "num_channels": num_channels}


KEYS = OriginalEncoder(
    fields=mean_fields,
    alone=VitTable(
        "vit.mean.", "color.weight", renamed_rows("color.{weight,bias}", "proj.{weight,bias}"), []
    ),
    model_types=(MeanColorConfig.model_type,),
)
RELEASE = Release(
    rwkv_version=7, encoders=("mean",), prompt_format="v7.00", projector="linear", scan="unidirectional"
)


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setitem(ENCODERS, "mean", ROW)
    monkeypatch.setitem(ORIGINAL_ENCODERS, "mean", KEYS)
    monkeypatch.setitem(RELEASES, "mean", RELEASE)
    torch.manual_seed(0)
    config = VisualRWKVConfig(
        text_config={"rwkv_version": 7, "hidden_size": 64, "num_hidden_layers": 2},
        vision_config={"mean_config": {"model_type": MeanColorConfig.model_type}},
        projector="linear",
        scan="unidirectional",
        image_position="first",
    )
    return VisualRWKVForConditionalGeneration(config).eval()


def test_a_new_encoder_converts_there_and_back_by_one_row(model, tmp_path):
    original = restore_state_dict(model.state_dict(), model.config)
    assert {"vit.mean.color.weight", "vit.mean.color.bias"} <= original.keys()
    torch.save(original, tmp_path / "original.pth")

    converted = load_original(original)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(converted.eval()(input_ids=ids).logits, model(input_ids=ids).logits)
    pixels = torch.rand(1, 3, 28, 28)
    towers = [found.get_image_features(pixels).pooler_output for found in (model, converted)]
    assert all(torch.equal(*pair) for pair in zip(*towers))

    folder = to_hf(tmp_path / "original.pth", tmp_path / "folder")
    back = torch.load(to_original(folder, tmp_path / "back.pth"))
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], original[name]) for name in original)
