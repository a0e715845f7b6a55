"""Original checkpoints onto the Hub format and back: names, shapes, files and refusals."""

import importlib
import json
import math
import os
import shutil
import zipfile

import pytest
import torch
from paths import GOLDEN
from released_shapes import RELEASES
from safetensors.torch import load_file, save_file

from visualrwkv_hf import VisualRWKVForCausalLM, VisualRWKVForConditionalGeneration, VisualRWKVTextConfig
from visualrwkv_hf.conversion import (
    ConversionError,
    convert_state_dict,
    expected_shapes,
    load_original,
    quantize,
    restore_state_dict,
    to_hf,
    to_original,
)
from visualrwkv_hf.conversion.checkpoint import TensorInfo, read_checkpoint, shard_names, shards_of
from visualrwkv_hf.conversion.folders import parse_size
from visualrwkv_hf.conversion.infer_config import gate_is_untrained, infer_config
from visualrwkv_hf.conversion.key_map import check_names, key_rows
from visualrwkv_hf.conversion.state_dicts import infer_from, unused_tensors

WEIGHTS = GOLDEN / "weights"

IMAGE_ID = {"image_token_id": 319}
CLIP_HEADS = {"vision_config": {"clip_config": {"num_attention_heads": 4}}, **IMAGE_ID}
SIGLIP_HEADS = {"vision_config": {"siglip_config": {"num_attention_heads": 4}}, **IMAGE_ID}
TIMM_HEADS = {
    "vision_config": {
        "dinov2_config": {"num_attention_heads": 3},
        "siglip_config": {"num_attention_heads": 2},
    },
    **IMAGE_ID,
}
GIVEN_TOWER = {  # the original's pictures came in as features of these widths: 24, 20 and 16 channels
    "vision_config": {
        "dinov2_config": {"hidden_size": 24, "num_attention_heads": 3, "image_size": 56, "patch_size": 14},
        "siglip_config": {"hidden_size": 20, "num_attention_heads": 2, "image_size": 56, "patch_size": 14},
        "sam_config": {"hidden_size": 16, "num_attention_heads": 2, "output_channels": 4, "image_size": 128},
    },
    **IMAGE_ID,
}

GOLDEN_SETS = {
    "v5.0": (["rwkv5_rwkv", "rwkv5_vit", "rwkv5_proj"], CLIP_HEADS),
    "v5.1": (["rwkv5_rwkv", "rwkv5_vit", "rwkv5_proj"], CLIP_HEADS | {"family": "v5.1"}),
    "v6.0": (["rwkv6_rwkv", "rwkv6_vit", "rwkv6_v60_proj"], CLIP_HEADS),
    "v6.01": (["rwkv6_rwkv", "rwkv6_vit", "rwkv6_v601_proj"], CLIP_HEADS),
    "hd linear": (["rwkv6_rwkv", "hd_linear_proj"], GIVEN_TOWER),
    "hd": (["rwkv6_rwkv", "hd_mlp_proj"], GIVEN_TOWER),
    "uhd linear": (["rwkv6_rwkv", "uhd_linear_proj"], GIVEN_TOWER),
    "uhd": (["rwkv6_rwkv", "uhd_mlp_proj"], GIVEN_TOWER | {"projector": "relu"}),
    "v7.00 linear": (["rwkv7_rwkv", "rwkv7_v700_linear_proj"], GIVEN_TOWER),
    "v7.00": (["rwkv7_rwkv", "rwkv7_v700_mlp_proj"], GIVEN_TOWER),
    "v7.00 with towers": (["rwkv7_rwkv", "v700_full_vit", "v700_full_proj"], TIMM_HEADS),
    "v7.01": (["rwkv7_rwkv", "rwkv7_siglip_vit", "rwkv7_siglip_proj"], SIGLIP_HEADS),
    "v7.03": (
        ["rwkv7_rwkv", "rwkv7_siglip_vit", "rwkv7_siglip_proj", "rwkv7_vtc"],
        SIGLIP_HEADS | {"compressor_num_tokens": 5},
    ),
    "v7.04": (
        ["rwkv7_rwkv", "rwkv7_siglip_vit", "rwkv7_siglip_proj", "rwkv7_vtc"],
        SIGLIP_HEADS | {"compressor_num_tokens": 5, "family": "v7.04"},
    ),
    "RWKV-5": (["rwkv5_rwkv"], {}),
    "RWKV-6": (["rwkv6_rwkv"], {}),
    "RWKV-7": (["rwkv7_rwkv"], {}),
}


def golden(name):
    files, overrides = GOLDEN_SETS[name]
    tensors = {}
    for file in files:
        tensors |= load_file(WEIGHTS / f"{file}.safetensors")
    return tensors, dict(overrides)


def golden_file(name):
    """The same with the whole vocabulary, as the processor needs it: its placeholder is the last id."""
    tensors, overrides = golden(name)
    for key in ("rwkv.emb.weight", "rwkv.head.weight"):
        whole = torch.zeros(65536, tensors[key].shape[1], dtype=tensors[key].dtype)
        whole[: len(tensors[key])] = tensors[key]
        tensors[key] = whole
    return tensors, {field: value for field, value in overrides.items() if field != "image_token_id"}


def shapes_of(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def same_tensors(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# Tensors in memory


@pytest.mark.parametrize("name", GOLDEN_SETS)
def test_every_tensor_of_the_model_comes_from_the_original_and_goes_back(name):
    original, overrides = golden(name)
    config = infer_config(shapes_of(original), **overrides)
    ours = convert_state_dict(original, config)
    expected = expected_shapes(config)
    if not any(key.startswith("vit.") for key in original):
        expected = {key: shape for key, shape in expected.items() if "vision_tower" not in key}
    assert shapes_of(ours) == expected
    assert same_tensors(restore_state_dict(ours, config, unused_tensors(original, config)), original)


def test_layouts_that_differ_are_rearranged_not_just_renamed():
    original, overrides = golden("v7.00 with towers")
    ours = convert_state_dict(original, infer_config(shapes_of(original), **overrides))
    qkv = original["vit.dino_featurizer.blocks.1.attn.qkv.weight"]  # [3 x 24, 24]
    key = ours["model.vision_tower.dinov2.encoder.layer.1.attention.k_proj.weight"]
    assert torch.equal(key, qkv[24:48])
    positions = ours["model.vision_tower.dinov2.embeddings.position_embeddings"]
    assert not positions[:, 0].any() and torch.equal(
        positions[:, 1:], original["vit.dino_featurizer.pos_embed"]
    )
    neck = ours["model.vision_tower.sam.neck.layer_norm2.bias"]
    assert torch.equal(neck, original["vit.sam_featurizer.neck.3.bias"])


def test_load_original_is_the_checkpoint_in_its_dtype():
    original, overrides = golden("v6.0")
    model = load_original(original, **overrides)
    assert isinstance(model, VisualRWKVForConditionalGeneration) and model.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, original["rwkv.head.weight"])
    assert isinstance(load_original(golden("RWKV-6")[0]), VisualRWKVForCausalLM)


def test_tower_named_apart_stays_as_initialised():
    original, overrides = golden("hd")
    model = load_original(original, **overrides)
    assert torch.equal(model.model.multi_modal_projector.gate.weight, original["proj.gate.weight"])
    assert model.config.vision_config.hidden_size == 24 + 20 + 16


@pytest.mark.parametrize("prefix", ["module.", "_forward_module.module.", "model."])
def test_wrapper_prefixes_make_no_difference(prefix):
    original, overrides = golden("v6.0")
    wrapped = {prefix + name: tensor for name, tensor in original.items()}
    config = infer_config(shapes_of(wrapped), **overrides)
    assert same_tensors(convert_state_dict(wrapped, config), convert_state_dict(original, config))


def test_vision_names_of_transformers_5_are_understood():
    original, overrides = golden("v7.01")
    flat = {name.replace("vit.vision_model.", "vit."): tensor for name, tensor in original.items()}
    config = infer_config(shapes_of(flat), **overrides)
    assert same_tensors(convert_state_dict(flat, config), convert_state_dict(original, config))


# Released checkpoints, by shape

EXPECTED = {
    # name: generation, scan, image position, class token, projector, tokens of a picture, head of C and F
    "v5.0 1B5": (5, "unidirectional", "first", "first", "linear", 577),
    "v5.0 3B": (5, "unidirectional", "first", "first", "linear", 577),
    "v6.0 1B6": (6, "bidirectional", "middle", "last", "linear", 577),
    "v6.0 3B": (6, "bidirectional", "middle", "last", "linear", 577),
    "v6.0 7B": (6, "bidirectional", "middle", "last", "linear", 577),
    "HD 1B6": (6, "bidirectional", "middle", "none", "gated", 1024),
    "UHD 1B6": (6, "bidirectional", "middle", "none", "relu", 1024),
    "v7.00 0B1": (7, "unidirectional", "first", "none", "gated_norm", 1024),
    "v7.00 0B4": (7, "unidirectional", "first", "none", "gated_norm", 1024),
    "v7.00 1B5": (7, "unidirectional", "first", "none", "gated_norm", 1024),
}

CLIP_SIZE, THREE_SIZE = 303_507_456, 822_253_760
PARAMETERS = {
    "v5.0 1B5": 3_155_509_248 // 2 + CLIP_SIZE + 1024 * 2048,
    "v5.0 3B": 6_125_998_080 // 2 + CLIP_SIZE + 1024 * 2560,
    "v6.0 1B6": 1_599_873_024 + CLIP_SIZE + 1024 * 2048,
    "v6.0 3B": 3_099_863_040 + CLIP_SIZE + 1024 * 2560,
    "v6.0 7B": 7_635_746_816 + CLIP_SIZE + 1024 * 4096,
    "HD 1B6": 1_599_873_024 + THREE_SIZE + 3200 * 2048 + 2 * 2048**2,
    "UHD 1B6": 1_599_873_024 + THREE_SIZE + 6400 * 2048 + 2 * 2048**2,
    "v7.00 0B1": 191_034_624 + THREE_SIZE + 3200**2 + 3200 * 768 + 2 * 768,
    "v7.00 0B4": 450_767_872 + THREE_SIZE + 3200**2 + 3200 * 1024 + 2 * 1024,
    "v7.00 1B5": 1_527_404_544 + THREE_SIZE + 3200**2 + 3200 * 2048 + 2 * 2048,
}
"""What the released files' sizes tell, at 2 bytes each."""


def release(name):
    shapes = RELEASES[name]()
    untrained = True if name.startswith("UHD") else None
    return shapes, infer_config(shapes, gate_is_untrained=untrained)


@pytest.mark.parametrize("name", RELEASES)
def test_release_is_recognised_and_fits_its_model(name):
    shapes, config = release(name)
    found = (
        config.text_config.rwkv_version,
        config.scan,
        config.image_position,
        config.class_token,
        config.projector,
        config.num_image_tokens,
    )
    assert found == EXPECTED[name]
    assert sum(map(math.prod, shapes.values())) == PARAMETERS[name]

    original = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    ours = convert_state_dict(original, config)
    expected = expected_shapes(config)
    assert shapes_of(ours) == expected
    unused = sum(tensor.numel() for tensor in unused_tensors(original, config).values())
    added = (
        1024 if "dinov2" in config.vision_config.encoders else 0
    )  # DINOv2's zero position of the class token
    assert sum(map(math.prod, expected.values())) == PARAMETERS[name] - unused + added


def test_ranks_come_from_shapes_not_from_the_rule():
    _, config = release("v7.00 0B4")
    assert config.text_config.gate_low_rank_dim == 128
    assert VisualRWKVTextConfig(hidden_size=1024).gate_low_rank_dim == 160


def test_three_encoders_are_read_from_their_shapes():
    vision = release("UHD 1B6")[1].vision_config
    assert vision.image_sizes == {"dinov2": 448, "siglip": 448, "sam": 1024}
    assert (vision.tile_grid, vision.hidden_size, vision.feature_layer) == (2, 6400, -2)
    assert [vision.encoders[n].num_attention_heads for n in ("dinov2", "siglip", "sam")] == [16, 16, 12]
    assert vision.siglip_config.hidden_act == vision.dinov2_config.hidden_act == "gelu"
    assert (vision.sam_config.window_size, list(vision.sam_config.global_attn_indexes)) == (14, [2, 5, 8, 11])


def test_compressor_is_counted_per_picture_unless_asked():
    original, overrides = golden("v7.03")
    del overrides["compressor_num_tokens"]
    config = infer_config(shapes_of(original), **overrides)
    assert (config.compressor_num_layers, config.compressor_num_tokens) == (2, 1024)
    assert not config.compressor_per_tile


def test_untouched_gate_is_flat():
    torch.manual_seed(0)
    gate = torch.nn.Linear(512, 512, bias=False).weight.detach()
    trained = gate + 0.3 * gate.std() * torch.randn_like(gate)
    assert gate_is_untrained(gate) and gate_is_untrained(gate.bfloat16()) and gate_is_untrained(0.9 * gate)
    assert not gate_is_untrained(trained)
    assert not gate_is_untrained(gate.abs().max() * torch.randn(512, 512).clamp(-1, 1) / 2)
    assert not gate_is_untrained(torch.zeros(8, 8))


@pytest.mark.parametrize(("flat", "projector"), [(True, "relu"), (False, "gated")])
def test_values_of_the_gate_decide_how_uhd_reads_it(flat, projector):
    original, overrides = golden("uhd")
    del overrides["projector"]
    if flat:
        original["proj.gate.weight"] = torch.nn.Linear(128, 128, bias=False).weight.detach()
    assert infer_from(original, **overrides).config.projector == projector


@pytest.mark.parametrize(
    ("name", "given"), [("hd", {}), ("v7.00 with towers", {}), ("uhd", {"projector": "relu"})]
)
def test_values_of_the_gate_are_read_only_where_they_decide(name, given, monkeypatch):
    original, overrides = golden(name)
    monkeypatch.setattr("visualrwkv_hf.conversion.infer_config.gate_is_untrained", pytest.fail)
    assert infer_from(original, **overrides | given).family


# Files


@pytest.fixture
def checkpoint(tmp_path):
    """v7.00 with its three encoders, as the original saves it."""
    original, overrides = golden_file("v7.00 with towers")
    original["rwkv.blocks.0.att.v0"] = torch.ones(1, 1, 128, dtype=torch.bfloat16)  # dead in the first block
    torch.save(original, tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth", original, overrides


def no_leftovers(folder, *expected):
    return sorted(os.listdir(folder)) == sorted(expected)


def test_there_and_back_through_files_is_equal_to_the_bit(checkpoint, tmp_path):
    path, original, overrides = checkpoint
    folder = to_hf(path, tmp_path / "model", max_shard_size="500KB", **overrides)
    assert (folder / "model.safetensors.index.json").exists()
    model, info = VisualRWKVForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16 and model.generation_config.eos_token_id == [0, 261]
    assert torch.equal(model.lm_head.weight, original["rwkv.head.weight"])

    to_original(folder, tmp_path / "back.pth")
    assert same_tensors(torch.load(tmp_path / "back.pth"), original)
    assert no_leftovers(tmp_path, "checkpoint.pth", "model", "back.pth")


def test_folder_says_where_it_came_from(checkpoint, tmp_path):
    path, _, overrides = checkpoint
    folder = to_hf(path, tmp_path / "model", **overrides)
    source = json.loads((folder / "config.json").read_text())["conversion"]["sources"][0]
    assert source["name"] == "checkpoint.pth" and source["size"] == path.stat().st_size
    assert source["sha256"] in (folder / "README.md").read_text()
    for file in ("tokenizer.json", "processor_config.json", "chat_template.jinja", "modeling_visualrwkv.py"):
        assert (folder / file).exists()


def test_split_pair_is_one_model_in_any_order(tmp_path):
    original, overrides = golden_file("v5.0")
    half = {name: tensor.half() for name, tensor in original.items()}
    language = {name.removeprefix("rwkv."): t for name, t in half.items() if name.startswith("rwkv.")}
    visual = {name: t for name, t in half.items() if not name.startswith("rwkv.")}
    visual["vit.vision_model.embeddings.position_ids"] = torch.arange(17)[None].half()
    torch.save(language, tmp_path / "x_rwkv.pth")
    torch.save(visual, tmp_path / "x_visual.pth")
    folder = to_hf([tmp_path / "x_visual.pth", tmp_path / "x_rwkv.pth"], tmp_path / "model", **overrides)
    model = VisualRWKVForConditionalGeneration.from_pretrained(folder)
    assert model.dtype == torch.float16 and torch.equal(model.lm_head.weight, half["rwkv.head.weight"])


@pytest.mark.parametrize(
    ("name", "overrides", "tiling"),
    [("v7.01", {}, None), ("v7.01", {"family": "v7.02"}, "smallest"), ("v7.03", {}, "closest")],
)
def test_family_tells_how_pictures_are_tiled(name, overrides, tiling, tmp_path):
    original, heads = golden_file(name)
    torch.save(original, tmp_path / "x.pth")
    folder = to_hf(tmp_path / "x.pth", tmp_path / "model", **heads, **overrides)
    processor = json.loads((folder / "processor_config.json").read_text())
    assert processor["image_processor"].get("tiling") == tiling


def test_language_model_alone_goes_back_under_its_own_names(tmp_path):
    world = {name.removeprefix("rwkv."): tensor for name, tensor in golden("RWKV-7")[0].items()}
    torch.save(world, tmp_path / "world.pth")
    folder = to_hf(tmp_path / "world.pth", tmp_path / "model")
    assert VisualRWKVForCausalLM.from_pretrained(folder).config.rwkv_version == 7
    to_original(folder, tmp_path / "back.pth")
    assert same_tensors(torch.load(tmp_path / "back.pth"), world)


@pytest.mark.parametrize("rows", [50304, 65536])
def test_another_vocabulary_gets_no_tokenizer_of_rwkv_world(rows, tmp_path, caplog):
    """RWKV-x070-Pile has 50,304 rows: World's tokenizer would give it wrong ids, and ids that it does not have."""
    original, _ = golden("RWKV-7")
    for name in ("rwkv.emb.weight", "rwkv.head.weight"):
        original[name] = torch.zeros(rows, original[name].shape[1])
    torch.save(original, tmp_path / "x.pth")
    folder = to_hf(tmp_path / "x.pth", tmp_path / "model")
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    is_world = rows == 65536
    assert (folder / "tokenizer.json").exists() == (folder / "tokenizer_config.json").exists() == is_world
    assert stops == ([0, 261] if is_world else 0)
    assert ("The folder holds no tokenizer" in (folder / "README.md").read_text()) != is_world
    assert ("The vocabulary has 50,304 tokens" in caplog.text) != is_world


def test_a_vision_model_of_another_vocabulary_is_refused(tmp_path):
    original, overrides = golden("v6.0")
    torch.save(original, tmp_path / "x.pth")
    with pytest.raises(
        ConversionError, match="The vocabulary has 320 tokens and is not RWKV World's, which needs"
    ):
        to_hf(tmp_path / "x.pth", tmp_path / "model", **overrides)
    assert no_leftovers(tmp_path, "x.pth")


@pytest.mark.parametrize("name", ["RWKV-6", "v6.0"])
def test_a_tied_head_goes_back_as_the_embedding(name, tmp_path):
    original, overrides = golden_file(name) if name == "v6.0" else golden(name)
    original["rwkv.head.weight"] = original["rwkv.emb.weight"].clone()
    torch.save(original, tmp_path / "x.pth")
    folder = to_hf(tmp_path / "x.pth", tmp_path / "model", **overrides)
    load = VisualRWKVForConditionalGeneration if name == "v6.0" else VisualRWKVForCausalLM
    load.from_pretrained(folder, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    back = torch.load(to_original(tmp_path / "tied", tmp_path / "back.pth"))
    prefix = "" if name == "RWKV-6" else "rwkv."
    assert torch.equal(back[f"{prefix}head.weight"], back[f"{prefix}emb.weight"])
    back = {name if prefix else f"rwkv.{name}": tensor for name, tensor in back.items()}
    assert same_tensors(back, {name: original[name] for name in back})


def test_the_way_back_names_what_the_folder_lacks_or_holds(tmp_path):
    torch.save(golden("RWKV-7")[0], tmp_path / "x.pth")
    folder = to_hf(tmp_path / "x.pth", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    for changed, sentence in (
        (tensors, r"The folder lacks lm_head\.weight, which its configuration asks for\."),
        (
            tensors | {"lm_head.weight": head, "model.more": head.clone()},
            r"The folder holds model\.more, which its configuration does not know\.",
        ),
    ):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConversionError, match=sentence):
            to_original(folder, tmp_path / "back.pth")


def test_fine_tune_without_the_unused_tensors_goes_back_with_a_word(checkpoint, tmp_path, caplog):
    path, original, overrides = checkpoint
    folder = to_hf(path, tmp_path / "model", **overrides)
    VisualRWKVForConditionalGeneration.from_pretrained(folder).save_pretrained(tmp_path / "tuned")
    to_original(tmp_path / "tuned", tmp_path / "back.pth")
    assert "original_extras.safetensors" in caplog.text
    back = torch.load(tmp_path / "back.pth")
    assert same_tensors(back, {name: original[name] for name in back}) and len(back) < len(original)


@pytest.mark.parametrize("kind", ["safetensors", "legacy", "nested"])
def test_other_containers_of_the_same_tensors(kind, tmp_path):
    original, _ = golden("RWKV-7")
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.pth")
    if kind == "safetensors":
        save_file(original, path)
    elif kind == "legacy":
        torch.save(original, path, _use_new_zipfile_serialization=False)
    else:
        torch.save({"state_dict": original, "epoch": 3}, path)
    assert same_tensors(dict(read_checkpoint(path)), original)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_that_of_every_floating_tensor(dtype, tmp_path):
    original, _ = golden("RWKV-7")
    torch.save(original, tmp_path / "x.pth")
    folder = to_hf(tmp_path / "x.pth", tmp_path / "model", dtype=dtype)
    written = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {getattr(torch, dtype)}
    assert torch.equal(written["lm_head.weight"], original["rwkv.head.weight"].to(getattr(torch, dtype)))


def test_shards_hold_at_most_what_was_asked():
    original, _ = golden("RWKV-7")
    infos = {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in original.items()}
    shards = shards_of(infos, 100_000)
    assert [name for shard in shards for name in shard] == list(infos)
    sizes = [sum(infos[name].num_bytes for name in shard) for shard in shards]
    assert all(size <= 100_000 or len(shard) == 1 for size, shard in zip(sizes, shards))
    assert shard_names(2) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(("size", "wanted"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("7B", 7), (12, 12)])
def test_sizes_are_decimal(size, wanted):
    assert parse_size(size) == wanted


def test_progress_counts_every_byte(tmp_path):
    original, _ = golden("RWKV-7")
    torch.save(original, tmp_path / "x.pth")
    seen = []
    to_hf(tmp_path / "x.pth", tmp_path / "model", progress=lambda file, count: seen.append((file, count)))
    assert list(dict.fromkeys(file for file, _ in seen)) == ["model.safetensors", "verifying"]
    for step in ("model.safetensors", "verifying"):
        counted = sum(count for file, count in seen if file == step)
        assert counted == sum(tensor.nbytes for tensor in original.values())


# Refusals: one sentence, nothing written


class Code:
    def __reduce__(self):
        return os.system, ("touch executed",)


def spoil_html(path, original):
    path.write_text("<!doctype html><html><body>Not found</body></html>")


def spoil_text(path, original):
    path.write_bytes(b"these are no tensors at all\n" * 10)


def spoil_empty(path, original):
    path.write_bytes(b"")


def spoil_truncated(path, original):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil_truncated_safetensors(path, original):
    save_file(original, path)
    spoil_truncated(path, original)


def spoil_other_zip(path, original):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "no tensors")


def spoil_code(path, original):
    torch.save(original | {"code": Code()}, path)


def spoil_not_a_dict(path, original):
    torch.save(list(original.values()), path)


def spoil_missing(path, original):
    del original["rwkv.blocks.1.att.w1"]
    torch.save(original, path)


def spoil_extra(path, original):
    torch.save(original | {"rwkv.blocks.1.att.keey.weight": torch.ones(2)}, path)


def spoil_shape(path, original):
    torch.save(original | {"rwkv.blocks.1.ln2.bias": torch.ones(100)}, path)


def spoil_nan(path, original):
    original["rwkv.blocks.1.ln2.bias"][3] = float("nan")
    torch.save(original, path)


def spoil_inf(path, original):
    original["vit.sam_featurizer.neck.1.bias"][0] = float("-inf")
    torch.save(original, path)


def spoil_zero3(path, original):
    """DeepSpeed's ZeRO-3 without gathering: every parameter is empty in `mp_rank_00_model_states.pt`."""
    torch.save({"module": {name: torch.empty(0) for name in original}, "dp_world_size": 8}, path)


def spoil_dims(path, original):
    torch.save(original | {"rwkv.emb.weight": torch.ones(8)}, path)


def spoil_generations(path, original):
    other, _ = golden("RWKV-6")
    name = "rwkv.blocks.1.att.time_maa_x"
    torch.save(original | {name: other[name]}, path)


def spoil_no_vision(path, original):
    torch.save({name: t for name, t in original.items() if not name.startswith("vit.")}, path)


def spoil_no_language(path, original):
    torch.save({name: t for name, t in original.items() if not name.startswith("rwkv.")}, path)


REFUSALS = {
    spoil_html: "is a web page",
    spoil_text: "is not a checkpoint",
    spoil_empty: "is empty",
    spoil_truncated: "is truncated",
    spoil_truncated_safetensors: "is truncated",
    spoil_other_zip: "is not a checkpoint",
    spoil_code: "holds code",
    spoil_not_a_dict: "holds a list, not named tensors",
    spoil_missing: r"Missing tensor rwkv\.blocks\.1\.att\.w1: \d+ of \d+ are there",
    spoil_extra: r"Unknown tensor rwkv\.blocks\.1\.att\.keey\.weight: .* rwkv\.blocks\.1\.att\.key\.weight",
    spoil_shape: r"rwkv\.blocks\.1\.ln2\.bias has shape \[100\], .* asks for \[128\]",
    spoil_nan: r"Tensor rwkv\.blocks\.1\.ln2\.bias holds NaN",
    spoil_inf: r"Tensor vit\.sam_featurizer\.neck\.1\.bias holds NaN or inf",
    spoil_zero3: r"checkpoint\.pth: tensor \S+ is empty\. DeepSpeed's ZeRO-3 .* zero_to_fp32\.py",
    spoil_dims: r"rwkv\.emb\.weight has shape \[8\]: it must have 2 dimensions",
    spoil_generations: "mixes generations: it has blocks of RWKV-6 and RWKV-7",
    spoil_no_vision: "no vision tower",
    spoil_no_language: "no language model",
}


@pytest.mark.parametrize("spoil", REFUSALS, ids=lambda spoil: spoil.__name__)
def test_spoiled_checkpoint_is_refused_and_nothing_is_written(spoil, checkpoint, tmp_path, monkeypatch):
    path, original, overrides = checkpoint
    monkeypatch.chdir(tmp_path)
    spoil(path, original)
    with pytest.raises(ConversionError, match=REFUSALS[spoil]) as refusal:
        to_hf(path, tmp_path / "model", **overrides)
    assert "\n" not in str(refusal.value)
    assert no_leftovers(tmp_path, "checkpoint.pth")


def test_second_file_of_another_model_is_named(tmp_path):
    original, overrides = golden_file("v5.0")
    language = {name: t for name, t in original.items() if name.startswith("rwkv.")}
    visual = {name: t for name, t in original.items() if not name.startswith("rwkv.")}
    visual["proj.weight"] = torch.ones(160, 48)
    torch.save(language, tmp_path / "a_rwkv.pth")
    torch.save(visual, tmp_path / "b_visual.pth")
    pair = [tmp_path / "a_rwkv.pth", tmp_path / "b_visual.pth"]
    with pytest.raises(
        ConversionError, match=r"a_rwkv.pth and b_visual.pth do not belong together: .*\[160, 48\]"
    ):
        to_hf(pair, tmp_path / "model", **overrides)
    with pytest.raises(ConversionError, match="a pair is one _rwkv file and the _visual file"):
        to_hf([pair[0], pair[0]], tmp_path / "model", **overrides)


def test_family_that_the_tensors_contradict_is_refused(checkpoint):
    _, original, overrides = checkpoint
    with pytest.raises(ConversionError, match=r"has RWKV-7, dinov2 .* which is v7\.00, and not v6\.0"):
        infer_config(shapes_of(original), family="v6.0", **overrides)
    with pytest.raises(ConversionError, match="Unknown family 'v9'"):
        infer_config(shapes_of(original), family="v9", **overrides)
    with pytest.raises(ConversionError, match="a language model alone"):
        infer_config(shapes_of(golden("RWKV-6")[0]), family="v6.0")


def test_number_of_heads_that_no_shape_tells_is_asked_for():
    original, _ = golden("v6.0")
    with pytest.raises(ConversionError, match=r"give vision_config\.clip_config\.num_attention_heads"):
        infer_config(shapes_of(original), **IMAGE_ID)


def test_uhd_gate_needs_values_or_a_word():
    shapes = RELEASES["UHD 1B6"]()
    with pytest.raises(ConversionError, match="projector='relu' or 'gated'"):
        infer_config(shapes)
    assert infer_config(shapes, projector="gated").projector == "gated"


def test_trained_class_position_cannot_go_back():
    original, overrides = golden("v7.00 with towers")
    config = infer_config(shapes_of(original), **overrides)
    ours = convert_state_dict(original, config)
    ours["model.vision_tower.dinov2.embeddings.position_embeddings"][0, 0, 0] = 1
    with pytest.raises(ConversionError, match="class token is not zero"):
        restore_state_dict(ours, config)


def test_target_with_something_in_it_is_kept(checkpoint, tmp_path):
    path, _, overrides = checkpoint
    target = tmp_path / "model"
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(ConversionError, match="is not empty"):
        to_hf(path, target, **overrides)
    with pytest.raises(ConversionError, match="is not a model folder of VisualRWKV, and is not overwritten"):
        to_hf(path, target, overwrite=True, **overrides)
    (target / "config.json").write_text('{"model_type": "visualrwkv"}')
    with pytest.raises(ConversionError, match=r"holds thesis\.tex beside the model, and is not overwritten"):
        to_hf(path, target, overwrite=True, **overrides)
    (target / "thesis.tex").rename(tmp_path / "thesis.tex")
    inside = shutil.copy(path, target / "checkpoint.pth")
    with pytest.raises(ConversionError, match="which would be overwritten"):
        to_hf(inside, target, overwrite=True, **overrides)
    (target / "checkpoint.pth").unlink()
    (target / "checkpoint-500").mkdir()
    with pytest.raises(ConversionError, match="holds the folder checkpoint-500 beside the model"):
        to_hf(path, target, overwrite=True, **overrides)
    (target / "checkpoint-500").rmdir()
    assert no_leftovers(target, "config.json")
    to_hf(path, target, overwrite=True, **overrides)
    assert (target / "model.safetensors").exists()
    assert no_leftovers(tmp_path, "checkpoint.pth", "model", "thesis.tex")


def test_full_disk_is_told_before_it_starts(checkpoint, tmp_path, monkeypatch):
    path, _, overrides = checkpoint
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(
        ConversionError, match=r"Not enough space in .*: [\d,]+ bytes are needed, 1,000 are free"
    ):
        to_hf(path, tmp_path / "model", **overrides)
    assert no_leftovers(tmp_path, "checkpoint.pth")


def test_space_is_counted_on_the_disk_that_a_link_leads_to(checkpoint, tmp_path, monkeypatch):
    path, _, overrides = checkpoint
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model")
    usage, asked = shutil.disk_usage(tmp_path), []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: asked.append(folder) or usage)
    folder = to_hf(path, tmp_path / "link", **overrides)
    quantize(folder, tmp_path / "small", weights="int8")
    (tmp_path / "other").symlink_to(tmp_path / "disk" / "small")
    quantize(folder, tmp_path / "other", weights="int8")
    assert asked == [tmp_path / "disk", tmp_path, tmp_path / "disk"]


SHARD_WRITER = importlib.import_module(
    "visualrwkv_hf.conversion.quantize"
)  # the package has a function of this name


@pytest.mark.parametrize("number", ["ENOSPC", "EACCES"])
def test_failure_while_writing_leaves_nothing(number, checkpoint, tmp_path, monkeypatch):
    import errno

    path, _, overrides = checkpoint

    def fail(file, infos, tensors, progress=None):
        file.write_bytes(b"half")
        raise OSError(getattr(errno, number), "failed", str(file))

    monkeypatch.setattr(SHARD_WRITER, "write_safetensors", fail)
    with pytest.raises(
        ConversionError, match={"ENOSPC": "disk filled up", "EACCES": "No permission"}[number]
    ):
        to_hf(path, tmp_path / "model", **overrides)
    assert no_leftovers(tmp_path, "checkpoint.pth")


def test_interrupted_run_leaves_nothing(checkpoint, tmp_path):
    path, _, overrides = checkpoint

    def interrupt(file, count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_hf(path, tmp_path / "model", progress=interrupt, **overrides)
    assert no_leftovers(tmp_path, "checkpoint.pth")


def test_tensor_that_was_written_wrong_is_found(checkpoint, tmp_path, monkeypatch):
    path, _, overrides = checkpoint
    write = SHARD_WRITER.write_safetensors

    def write_and_flip_a_bit(file, *args):
        write(file, *args)
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)

    monkeypatch.setattr(SHARD_WRITER, "write_safetensors", write_and_flip_a_bit)
    with pytest.raises(ConversionError, match="was not written as it was read"):
        to_hf(path, tmp_path / "model", **overrides)
    assert no_leftovers(tmp_path, "checkpoint.pth")


def test_value_that_the_dtype_cannot_hold_is_refused(tmp_path):
    original, _ = golden("RWKV-7")
    original["rwkv.ln_out.bias"][0] = 1e6
    torch.save(original, tmp_path / "x.pth")
    with pytest.raises(
        ConversionError, match=r"rwkv\.ln_out\.bias holds NaN or infinite values in torch\.float16"
    ):
        to_hf(tmp_path / "x.pth", tmp_path / "model", dtype="float16")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"max_shard_size": "big"}, "max_shard_size must be a number with one of TB, GB"),
    ],
)
def test_wrong_arguments_are_named(arguments, sentence, checkpoint, tmp_path):
    with pytest.raises(ConversionError, match=sentence):
        to_hf(checkpoint[0], tmp_path / "model", **arguments)


def test_missing_places_are_named(checkpoint, tmp_path):
    with pytest.raises(ConversionError, match="There is no file"):
        to_hf(tmp_path / "none.pth", tmp_path / "model")
    with pytest.raises(ConversionError, match="There is no folder"):
        to_hf(checkpoint[0], tmp_path / "no" / "where")
    with pytest.raises(ConversionError, match=r"has no config\.json"):
        to_original(tmp_path, tmp_path / "back.pth")
    with pytest.raises(ConversionError, match="exists already"):
        to_original(tmp_path, checkpoint[0])
    with pytest.raises(ConversionError, match="There is no folder"):
        to_original(tmp_path, tmp_path / "no" / "where.pth")


def test_unknown_name_is_told_with_its_neighbour():
    rows = key_rows(VisualRWKVTextConfig(num_hidden_layers=1))
    names = {row.original for row in rows if row.ours}
    check_names(names, rows)
    with pytest.raises(ConversionError, match=r"nearest known name is rwkv\.ln_out\.weight"):
        check_names(names | {"rwkv.ln_oot.weight"}, rows)
