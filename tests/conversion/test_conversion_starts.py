"""Vision towers named apart, new VLMs from a language model and a tower, and wrapped checkpoints."""

import json
import os
from collections import OrderedDict

import huggingface_hub
import pytest
import torch
from paths import GOLDEN
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SamVisionConfig,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from visualrwkv_hf import VisualRWKVForConditionalGeneration, VisualRWKVVisionConfig
from visualrwkv_hf.conversion import ConversionError, assemble_vlm, to_hf, to_original
from visualrwkv_hf.conversion.checkpoint import read_checkpoint
from visualrwkv_hf.conversion.infer_config import infer_config
from visualrwkv_hf.conversion.key_map import vision_rows
from visualrwkv_hf.conversion.towers import read_tower

CLIP = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96}
CLIP |= {"image_size": 56, "patch_size": 14}
SIGLIP = CLIP | {"image_size": 256, "patch_size": 16}
TEXT = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 48}
TEXT |= {"vocab_size": 50}
TIMM_HEADS = {
    "dinov2_config": {"num_attention_heads": 4},
    "siglip_config": {"num_attention_heads": 4},
}


def golden_tensors(*names):
    tensors = {}
    for name in names:
        tensors |= load_file(GOLDEN / "weights" / f"{name}.safetensors")
    return tensors


def with_whole_vocabulary(tensors):
    for key in ("rwkv.emb.weight", "rwkv.head.weight"):
        whole = torch.zeros(65536, tensors[key].shape[1], dtype=tensors[key].dtype)
        whole[: len(tensors[key])] = tensors[key]
        tensors[key] = whole
    return tensors


@pytest.fixture
def world(tmp_path):
    """A function that writes the language model of a generation as RWKV-World names it."""

    def write(version):
        tensors = with_whole_vocabulary(golden_tensors(f"rwkv{version}_rwkv"))
        path = tmp_path / f"world{version}.pth"
        torch.save({name.removeprefix("rwkv."): tensor for name, tensor in tensors.items()}, path)
        return path

    return write


TOWERS = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**CLIP, hidden_act="quick_gelu")),
    "clip with text": lambda: CLIPModel(CLIPConfig(text_config=TEXT, vision_config=CLIP)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SIGLIP)),
    "siglip with text": lambda: SiglipModel(SiglipConfig(text_config=TEXT, vision_config=SIGLIP)),
}


def stock_tower(name, folder):
    torch.manual_seed(1)
    tower = TOWERS[name]().eval()
    tower.save_pretrained(folder)
    return getattr(tower, "vision_model", tower)


def raw_files(folder, sam_side=64):
    """The three encoders' files as they are published: timm, open_clip, segment-anything with a smaller map."""
    dino, siglip, encoder = map(golden_tensors, ("timm_dino_tiny", "timm_siglip_tiny", "sam_tiny64"))
    encoder["pos_embed"] = encoder["pos_embed"][:, :sam_side, :sam_side].clone()
    for name in [name for name in encoder if "rel_pos" in name and len(encoder[name]) == 2 * 64 - 1]:
        encoder[name] = encoder[name][: 2 * sam_side - 1].clone()
    siglip = {f"visual.trunk.{name}": t for name, t in siglip.items()}
    encoder = {f"image_encoder.{name}": t for name, t in encoder.items()}
    decoder = {
        "mask_decoder.iou_token.weight": torch.ones(1),
        "prompt_encoder.no_mask_embed.weight": torch.ones(1),
    }
    folder.mkdir()
    torch.save(dino, folder / "dino.bin")
    save_file(
        siglip | {"text.token.weight": torch.ones(1), "logit_scale": torch.ones(1)},
        folder / "clip.safetensors",
    )
    torch.save(encoder | decoder, folder / "sam.pth")
    return {"dinov2": folder / "dino.bin", "siglip": folder / "clip.safetensors", "sam": folder / "sam.pth"}


def loaded(folder, **kwargs):
    model, info = VisualRWKVForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, **kwargs
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def nothing_but(folder, *names):
    return sorted(os.listdir(folder)) == sorted(names)


# A training checkpoint without vision weights


@pytest.mark.parametrize("tower", ["siglip", "siglip with text"])
def test_tower_of_transformers_completes_a_training_checkpoint(tower, tmp_path):
    stock = stock_tower(tower, tmp_path / "tower")
    original = with_whole_vocabulary(golden_tensors("rwkv7_rwkv", "rwkv7_siglip_proj"))
    original["proj.gate.weight"] = torch.zeros(64, 64)
    original["proj.o_proj.weight"] = torch.zeros(128, 64)
    torch.save(original, tmp_path / "x.pth")
    folder = to_hf(tmp_path / "x.pth", tmp_path / "model", vision_tower=tmp_path / "tower", dtype="float32")
    model = loaded(folder, dtype=torch.float32)
    pixels = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        features = model.model.vision_tower(pixels).last_hidden_state
        wanted = stock(pixels).last_hidden_state
    torch.testing.assert_close(features, wanted, rtol=1e-5, atol=1e-5)  # float32: the same operations
    sources = json.loads((folder / "config.json").read_text())["conversion"]["sources"]
    assert [source["name"] for source in sources] == ["x.pth", "model.safetensors"]
    back = torch.load(to_original(folder, tmp_path / "back.pth"))
    assert "vit.vision_model.post_layernorm.weight" in back and original.keys() <= back.keys()


def test_tower_takes_the_language_models_dtype(tmp_path, world):
    stock = stock_tower("clip", tmp_path / "tower")
    folder = assemble_vlm(world(6), tmp_path / "tower", tmp_path / "model")
    written = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    weight = stock.encoder.layers[1].mlp.fc1.weight
    assert torch.equal(written["model.vision_tower.clip.encoder.layers.1.mlp.fc1.weight"], weight.bfloat16())


# A new VLM

STARTS = {
    # generation, tower, what is asked: family, projector, place of the picture, tokens of a picture
    (5, "clip", None): ("v5.0", "linear", "first", 17),
    (6, "clip with text", None): ("v6.0", "linear", "middle", 17),
    (6, "clip", "v6.01"): ("v6.01", "linear_flip", "middle", 17),
    (7, "siglip", None): ("v7.01", "gated_norm", "first", 256),
    (7, "siglip with text", "v7.03"): ("v7.03", "gated_norm", "first", 1024),
}


@pytest.mark.parametrize("start", STARTS, ids=str)
def test_start_of_a_new_model_loads_and_has_its_generations_habits(start, tmp_path, world):
    version, tower, family = start
    stock_tower(tower, tmp_path / "tower")
    folder = assemble_vlm(world(version), tmp_path / "tower", tmp_path / "model", family=family)
    model = loaded(folder)
    config = model.config
    found = config.conversion["family"], config.projector, config.image_position, config.num_image_tokens
    assert found == STARTS[start] and config.text_config.rwkv_version == version
    assert torch.equal(model.lm_head.weight, torch.load(tmp_path / f"world{version}.pth")["head.weight"])


def test_projector_is_drawn_from_the_seed_as_the_model_draws_it(tmp_path, world):
    stock_tower("siglip", tmp_path / "tower")
    projectors = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        state = torch.random.get_rng_state()
        folder = assemble_vlm(world(7), tmp_path / "tower", tmp_path / name, seed=seed, dtype="float32")
        assert torch.equal(torch.random.get_rng_state(), state)
        projectors.append(loaded(folder).model.multi_modal_projector)
    a, b, c = projectors
    assert torch.equal(a.gate.weight, b.gate.weight) and not torch.equal(a.gate.weight, c.gate.weight)
    bound = 64**-0.5  # nn.Linear: uniform within 1/sqrt(inputs)
    assert 0.98 * bound < a.gate.weight.abs().max() <= bound and abs(a.gate.weight.mean()) < 0.01 * bound * 10
    assert torch.equal(a.ln_v.weight, torch.ones(128)) and not a.ln_v.bias.any()


def test_fresh_compressor_is_a_copy_of_the_first_blocks(tmp_path, world):
    stock_tower("siglip", tmp_path / "tower")
    folder = assemble_vlm(world(7), tmp_path / "tower", tmp_path / "model", family="v7.04")
    model = loaded(folder).model
    for name, tensor in model.compressor.layers.state_dict().items():
        assert torch.equal(tensor, model.language_model.layers.state_dict()[name]), name
    assert torch.equal(model.compressor.norm.weight, model.language_model.norm.weight)


# timm, open_clip and segment-anything


def test_raw_files_give_the_features_of_their_own_code(tmp_path, world):
    """Golden features: the encoders' own code on the same files (float32; tolerances beside the data)."""
    for case, encoder, side in (
        ("timm_dino_tiny", "dinov2", 8),  # SAM's map of 8 x 8: patches of 4 x 4, as in the golden pictures
        ("timm_siglip_tiny", "siglip", 8),
        ("sam_tiny_64x64", "sam", 64),
    ):
        files = raw_files(tmp_path / f"raw {case}", sam_side=side)
        folder = assemble_vlm(
            world(7), files, tmp_path / case, dtype="float32", vision_config=TIMM_HEADS, max_shard_size="40MB"
        )
        tower = loaded(folder, dtype=torch.float32).model.vision_tower
        inputs, expected = (
            load_file(GOLDEN / "e_vision" / case / f"{kind}.safetensors") for kind in ("inputs", "expected")
        )
        with torch.no_grad():
            features = tower.encode({encoder: inputs["x"].float()})[encoder]
        wanted = expected.get("features")
        wanted = expected["out"].flatten(2).transpose(1, 2) if wanted is None else wanted
        corner = features[:, : wanted.shape[1], : wanted.shape[2]]
        tolerances = json.loads((GOLDEN / "e_vision" / case / "case.json").read_text())["tensors"]
        name = "expected:features" if "expected:features" in tolerances else "expected:out"
        torch.testing.assert_close(corner, wanted, rtol=0, atol=tolerances[name]["recommended_atol"])


RESAMPLED = {
    # side of SAM's map: DINOv2's golden tensors, SigLIP's
    64: [(f"pos.{n}to32_dim6_prefix0", f"resampled.{n}to32_dim6_prefix0") for n in (37, 27)],
    8: [(f"filter_in.{name}.pos_embed", f"filter_out.{name}.pos_embed") for name in ("dino", "siglip")],
}


@pytest.mark.parametrize("sam_side", RESAMPLED)
def test_position_embeddings_are_resampled_to_sams_grid(sam_side, tmp_path):
    files = raw_files(tmp_path / "raw", sam_side=sam_side)
    given, wanted = zip(*RESAMPLED[sam_side])
    golden = GOLDEN / "e_vision" / "timm_pos_embed_resample"
    inputs, expected = load_file(golden / "inputs.safetensors"), load_file(golden / "expected.safetensors")
    dino, siglip = torch.load(files["dinov2"]), load_file(files["siglip"])
    torch.save(dino | {"pos_embed": inputs[given[0]]}, files["dinov2"])
    save_file(siglip | {"visual.trunk.pos_embed": inputs[given[1]]}, files["siglip"])
    tower = read_tower(files, torch.float32).tensors
    for name, key in zip(wanted, ("vit.dino_featurizer.pos_embed", "vit.siglip_featurizer.pos_embed")):
        found = tower[key]
        assert tuple(found.shape) == tower.infos[key].shape
        corner = found[tuple(slice(n) for n in expected[name].shape)]
        torch.testing.assert_close(corner, expected[name], rtol=0, atol=2e-5)  # float32 beside float32


def test_three_files_are_known_in_any_form_of_naming_them(tmp_path):
    files = raw_files(tmp_path / "raw")
    by_name = read_tower(files, torch.float32).tensors
    for source in ([str(path) for path in reversed(files.values())], tmp_path / "raw"):
        tower = read_tower(source, torch.float32).tensors
        assert tower.keys() == by_name.keys()
        assert all(torch.equal(tower[name], by_name[name]) for name in tower)
    assert not any("decoder" in name or "text" in name for name in by_name)


def test_raw_files_complete_a_training_checkpoint_and_go_back(tmp_path):
    original = with_whole_vocabulary(golden_tensors("rwkv7_rwkv"))
    width = 32 + 32 + 4 * 4
    original |= {"proj.gate.weight": torch.zeros(width, width), "proj.o_proj.weight": torch.zeros(128, width)}
    original |= {"proj.ln_v.weight": torch.ones(128), "proj.ln_v.bias": torch.zeros(128)}
    torch.save(original, tmp_path / "x.pth")
    files = raw_files(tmp_path / "raw")
    folder = to_hf(tmp_path / "x.pth", tmp_path / "model", vision_tower=files, vision_config=TIMM_HEADS)
    model = loaded(folder)
    assert list(model.config.vision_config.encoders) == ["dinov2", "siglip", "sam"]
    assert model.config.num_image_tokens == 1024
    back = torch.load(to_original(folder, tmp_path / "back.pth"))
    assert torch.equal(
        back["vit.sam_featurizer.neck.2.weight"], torch.load(files["sam"])["image_encoder.neck.2.weight"]
    )
    assert tuple(back["vit.dino_featurizer.pos_embed"].shape) == (1, 1024, 32)


# The Hub


def test_name_on_the_hub_is_downloaded(tmp_path, world, monkeypatch):
    stock_tower("siglip", tmp_path / "tower")
    asked = []

    def download(name, *, allow_patterns):
        asked.append(name)
        return str(tmp_path / "tower")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder = assemble_vlm(world(7), "someone/siglip-base", tmp_path / "model")
    assert asked == ["someone/siglip-base"] and loaded(folder).config.num_image_tokens == 256


@pytest.mark.parametrize(
    "error",
    [ConnectionError("no route to host"), huggingface_hub.errors.LocalEntryNotFoundError("offline\nmore")],
    ids=lambda error: type(error).__name__,
)
def test_hub_that_cannot_be_reached_is_one_sentence(error, tmp_path, world, monkeypatch):
    def fail(name, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ConversionError, match=r"connection to the Hub at .* failed") as refusal:
        assemble_vlm(world(7), "someone/nothing", tmp_path / "model")
    assert "\n" not in str(refusal.value) and nothing_but(tmp_path, "world7.pth")


# Refusals: one sentence, nothing written


def no_tower(tmp_path):
    return tmp_path / "nowhere"


def unknown_tower(tmp_path):
    (tmp_path / "tower").mkdir()
    save_file({"blocks.0.weight": torch.ones(2)}, tmp_path / "tower" / "model.safetensors")
    return tmp_path / "tower"


def empty_tower(tmp_path):
    (tmp_path / "tower").mkdir()
    return tmp_path / "tower"


def other_model(tmp_path):
    stock_tower("siglip", tmp_path / "tower")
    config = json.loads((tmp_path / "tower" / "config.json").read_text())
    (tmp_path / "tower" / "config.json").write_text(
        json.dumps(config | {"model_type": "siglip2_vision_model"})
    )
    return tmp_path / "tower"


def two_of_three(tmp_path):
    files = raw_files(tmp_path / "tower")
    return [files["dinov2"], files["siglip"]]


def one_twice(tmp_path):
    files = raw_files(tmp_path / "tower")
    return [files["sam"], files["sam"]]


def misnamed(tmp_path):
    files = raw_files(tmp_path / "tower")
    return {"dinov2": files["siglip"], "siglip": files["dinov2"], "sam": files["sam"]}


def misshapen(tmp_path):
    stock_tower("siglip", tmp_path / "tower")
    file = tmp_path / "tower" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.fc1.bias"))
    save_file(tensors | {name: torch.ones(95)}, file)
    return tmp_path / "tower"


def lacking(tmp_path):
    stock_tower("siglip", tmp_path / "tower")
    file = tmp_path / "tower" / "model.safetensors"
    save_file(
        {name: t for name, t in load_file(file).items() if not name.endswith("post_layernorm.bias")}, file
    )
    return tmp_path / "tower"


def other_generations_tower(tmp_path):
    stock_tower("clip", tmp_path / "tower")
    return tmp_path / "tower"


REFUSALS = {
    no_tower: "There is no file or folder .*nowhere",
    unknown_tower: r"model\.safetensors holds no vision encoder that is known here: CLIP",
    empty_tower: r"tower holds no \*\.safetensors",
    other_model: "holds a model of type 'siglip2_vision_model'",
    two_of_three: r"The tower has dinov2 \+ siglip: it must be",
    one_twice: r"Both sam\.pth and sam\.pth hold sam",
    misnamed: r"clip\.safetensors was named as dinov2, but holds siglip",
    misshapen: r"layers\.1\.mlp\.fc1\.bias has shape \[95\], .* asks for \[96\]",
    lacking: r"Missing tensor vit\.vision_model\.post_layernorm\.bias",
    other_generations_tower: "The new model has RWKV-7 and clip, which is no family",
}


@pytest.mark.parametrize("make", REFUSALS, ids=lambda make: make.__name__)
def test_tower_that_does_not_fit_is_refused_and_nothing_is_written(make, tmp_path, world):
    path, tower = world(7), make(tmp_path)
    before = os.listdir(tmp_path)
    with pytest.raises(ConversionError, match=REFUSALS[make]) as refusal:
        assemble_vlm(path, tower, tmp_path / "model")
    assert "\n" not in str(refusal.value) and nothing_but(tmp_path, *before)


def test_tower_without_use_is_refused(tmp_path, world):
    stock_tower("siglip", tmp_path / "tower")
    original = golden_tensors("rwkv7_rwkv", "rwkv7_siglip_vit", "rwkv7_siglip_proj")
    torch.save(original, tmp_path / "x.pth")
    with pytest.raises(ConversionError, match="has a vision tower: vision_tower has no use"):
        to_hf(tmp_path / "x.pth", tmp_path / "model", vision_tower=tmp_path / "tower")
    with pytest.raises(ConversionError, match="no projector: use assemble_vlm"):
        to_hf(world(7), tmp_path / "model", vision_tower=tmp_path / "tower")
    with pytest.raises(ConversionError, match=r"x\.pth is not a language model alone: it holds proj\."):
        assemble_vlm(tmp_path / "x.pth", tmp_path / "tower", tmp_path / "model")
    with pytest.raises(ConversionError, match=r"projector must be one of linear, .*, got 'big'"):
        assemble_vlm(tmp_path / "world7.pth", tmp_path / "tower", tmp_path / "model", projector="big")
    assert not (tmp_path / "model").exists()


def test_towers_that_no_original_has_are_refused():
    sam = SamVisionConfig(image_size=64, patch_size=2).to_dict()
    with pytest.raises(ConversionError, match="no tower of sam: its towers are clip, siglip, or dinov2"):
        list(vision_rows(VisualRWKVVisionConfig(sam_config=sam)))
    shapes = {name: tuple(t.shape) for name, t in golden_tensors("rwkv6_rwkv", "rwkv6_v60_proj").items()}
    for name, file in (("siglip", "timm_siglip_tiny"), ("sam", "sam_tiny64")):
        tower = {f"vit.{name}_featurizer.{key}": tuple(t.shape) for key, t in golden_tensors(file).items()}
        with pytest.raises(ConversionError, match=f"The vision tower has {name} of its own code alone"):
            infer_config(shapes | tower)


# Wrapped checkpoints

WRAPPINGS = {
    "module.": lambda t: {f"module.{n}": v for n, v in t.items()},
    "_forward_module.": lambda t: {f"_forward_module.{n}": v for n, v in t.items()},
    "model.": lambda t: {f"model.{n}": v for n, v in t.items()},
    "DeepSpeed": lambda t: {
        "module": OrderedDict(t),
        "global_steps": 7,
        "dp_world_size": 8,
        "optimizer": None,
    },
    "DeepSpeed over DDP": lambda t: {
        "module": {f"module.{n}": v for n, v in t.items()},
        "ds_version": "0.14",
    },
    "Lightning": lambda t: {"state_dict": t, "epoch": 1, "optimizer_states": [{"step": torch.ones(1)}]},
    "Lightning over DeepSpeed": lambda t: {"state_dict": {f"_forward_module.{n}": v for n, v in t.items()}},
    "model": lambda t: {"model": {f"module.{n}": v for n, v in t.items()}, "step": 3},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappings_of_training_frameworks_make_no_difference(wrapping, tmp_path):
    original = golden_tensors("rwkv7_rwkv", "rwkv7_siglip_vit", "rwkv7_siglip_proj")
    torch.save(WRAPPINGS[wrapping](original), tmp_path / "x.pth")
    found = read_checkpoint(tmp_path / "x.pth")
    assert found.keys() == original.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in original.items())


def test_tensor_under_two_prefixes_is_refused(tmp_path):
    original = golden_tensors("rwkv7_rwkv")
    torch.save(original | {"module.rwkv.ln_out.bias": torch.ones(128)}, tmp_path / "x.pth")
    with pytest.raises(ConversionError, match=r"holds tensor rwkv\.ln_out\.bias twice, under two prefixes"):
        read_checkpoint(tmp_path / "x.pth")
