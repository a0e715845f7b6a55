"""Vision towers, pooling, projectors: against the original's numbers, the stock models, and plain loops."""

import copy
import itertools
import re

import pytest
import torch
from golden_cases import Case, read_weights
from torch import nn
from transformers import CLIPVisionModel, Dinov2WithRegistersModel, SamVisionConfig, SiglipVisionModel
from transformers.models.sam.modeling_sam import SamVisionAttention, SamVisionEncoder, SamVisionLayer

from visualrwkv_hf import VisualRWKVConfig, VisualRWKVVisionConfig, VisualRWKVVisionModel
from visualrwkv_hf.encoders import unshuffle_map
from visualrwkv_hf.image_processing_visualrwkv import image_processor_for
from visualrwkv_hf.modeling_vision import (
    PROJECTORS,
    fuse_features,
    pool_patches,
    resample_position_embedding,
    stitch_tiles,
)

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
VIT = dict(**SMALL, image_size=56, patch_size=14)
CLIP = {"clip_config": dict(**VIT, intermediate_size=48)}
DINOV2 = {"dinov2_config": dict(**VIT, mlp_ratio=2)}
SIGLIP = {"siglip_config": dict(**VIT, intermediate_size=48)}
SAM = {
    "sam_config": dict(
        **SMALL, image_size=64, patch_size=8, output_channels=6, global_attn_indexes=[1], window_size=3
    )
}
THREE = dict(**DINOV2, **SIGLIP, **SAM)
STOCK = {
    "clip": CLIPVisionModel,
    "dinov2": Dinov2WithRegistersModel,
    "siglip": SiglipVisionModel,
    "sam": SamVisionEncoder,
}
TOWERS = {
    "clip": CLIP,
    "clip-2": dict(**CLIP, feature_layer=-2),
    "clip-last": dict(**CLIP, class_token="last"),
    "dinov2": DINOV2,
    "siglip": SIGLIP,
    "siglip-2": dict(**SIGLIP, feature_layer=-2),
    "sam": SAM,
    "three": dict(**THREE, feature_layer=-2),
    "uhd": dict(**THREE, feature_layer=-2, tile_grid=2),
}


def awake_tower(seed: int = 0, **fields) -> VisualRWKVVisionModel:
    """Random weights everywhere: a fresh SAM adds nothing (its weights are 1e-10)."""
    torch.manual_seed(seed)
    tower = VisualRWKVVisionModel(VisualRWKVVisionConfig(**copy.deepcopy(fields))).eval()
    for name, weight in tower.named_parameters():
        if "norm" not in name and "lambda" not in name:
            nn.init.normal_(weight, std=0.2)
    return tower


def pixels_for(config: VisualRWKVVisionConfig, pictures: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    views = pictures * config.num_views
    return {
        "pixel_values" if i == 0 else f"pixel_values_{name}": torch.randn(
            views, 3, size, size, generator=generator
        )
        for i, (name, size) in enumerate(config.image_sizes.items())
    }


# --- golden: the original's towers ----------------------------------------------------------------

TIMM_DINOV2_NAMES = {
    r"^(cls_token)": r"embeddings.\1",
    r"^reg_token": "embeddings.register_tokens",
    r"^pos_embed": "embeddings.position_embeddings",
    r"^patch_embed\.proj": "embeddings.patch_embeddings.projection",
    r"^blocks": "encoder.layer",
    r"attn\.(query|key|value)": r"attention.attention.\1",
    r"attn\.proj": "attention.output.dense",
    r"ls(\d)\.gamma": r"layer_scale\1.lambda1",
    r"^norm\.": "layernorm.",
}
TIMM_SIGLIP_NAMES = {
    r"^pos_embed": "embeddings.position_embedding.weight",
    r"^patch_embed\.proj": "embeddings.patch_embedding",
    r"^blocks": "encoder.layers",
    r"attn\.(q|k|v)(uery|ey|alue)": r"self_attn.\1_proj",
    r"attn\.proj": "self_attn.out_proj",
    r"\.norm(\d)": r".layer_norm\1",
    r"^norm\.": "post_layernorm.",
}
SAM_NAMES = {
    r"^patch_embed\.proj": "patch_embed.projection",
    r"^blocks": "layers",
    r"\.norm(\d)": r".layer_norm\1",
    r"^neck\.0": "neck.conv1",
    r"^neck\.1": "neck.layer_norm1",
    r"^neck\.2": "neck.conv2",
    r"^neck\.3": "neck.layer_norm2",
}


def renamed(weights: dict, names: dict[str, str], prefix: str) -> dict:
    """Original tensors under the names of transformers' checkpoints, written apart from `key_map`."""
    found = {}
    for name, tensor in weights.items():
        if "attn.qkv" in name and names is not SAM_NAMES:
            parts = {
                name.replace("qkv", part): t for part, t in zip(("query", "key", "value"), tensor.chunk(3))
            }
        else:
            parts = {name: tensor}
        for part, value in parts.items():
            for pattern, replacement in names.items():
                part = re.sub(pattern, replacement, part)
            found[prefix + part] = value
    if names is TIMM_DINOV2_NAMES:  # positions of patches only
        key = f"{prefix}embeddings.position_embeddings"
        found[key] = torch.cat((torch.zeros_like(found[key][:, :1]), found[key]), dim=1)
    if names is TIMM_SIGLIP_NAMES:
        found[f"{prefix}embeddings.position_embedding.weight"] = found[
            f"{prefix}embeddings.position_embedding.weight"
        ][0]
    return found


def loaded(config: VisualRWKVVisionConfig, weights: dict) -> VisualRWKVVisionModel:
    tower, info = VisualRWKVVisionModel.from_pretrained(
        None, config=config, state_dict=weights, output_loading_info=True
    )
    assert not info["missing_keys"]
    return tower.eval()


def sam_tower(case: Case) -> VisualRWKVVisionModel:
    c = case.config
    sam = {
        "hidden_size": c["embed_dim"],
        "num_hidden_layers": c["depth"],
        "num_attention_heads": c["num_heads"],
        "image_size": c["img_size"],
        "patch_size": c["patch_size"],
        "output_channels": c["out_chans"],
        "mlp_ratio": c["mlp_ratio"],
        "window_size": c["window_size"],
        "global_attn_indexes": c["global_attn_indexes"],
    }
    return loaded(VisualRWKVVisionConfig(sam_config=sam), renamed(case.weights(), SAM_NAMES, "sam."))


def outputs_of(modules: dict[str, nn.Module], run) -> dict[str, torch.Tensor]:
    """What the modules give while `run` runs."""
    outputs = {}

    def keep(name):
        def hook(module, arguments, output):
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    run()
    for handle in handles:
        handle.remove()
    return outputs


def sam_functions(case: Case) -> dict[str, torch.Tensor]:
    inputs = case.inputs
    config = SamVisionConfig(hidden_size=8, num_attention_heads=1, image_size=64, attn_implementation="eager")
    attention, layer = SamVisionAttention(config, 0), SamVisionLayer(config, 4)
    found = {"down_out": as_map(unshuffle_map(inputs["down_in"]))}
    for name, tensor in inputs.items():
        if match := re.fullmatch(r"rel_pos\.q(\d+)_k(\d+)_L\d+", name):
            found[f"get_{name}"] = attention.get_rel_pos(int(match[1]), int(match[2]), tensor)
        if match := re.fullmatch(r"win_in\.(b\d+_h(\d+)_w(\d+)_ws(\d+))", name):
            windows, padded = layer.window_partition(tensor, int(match[4]))
            found[f"windows.{match[1]}"] = windows
            back = layer.window_unpartition(windows, int(match[4]), padded, (int(match[2]), int(match[3])))
            assert torch.equal(back, tensor)
    rel = attention.get_decomposed_rel_pos(inputs["rel_q"], inputs["rel_h"], inputs["rel_w"], (4, 6), (4, 6))
    found["rel_attn_out"] = inputs["rel_attn"] + rel.reshape_as(inputs["rel_attn"])
    return found


def as_map(patches: torch.Tensor) -> torch.Tensor:
    """[N, h w, D] -> [N, D, h, w]."""
    side = round(patches.shape[1] ** 0.5)
    return patches.transpose(1, 2).reshape(len(patches), -1, side, side)


def sam_tiny(case: Case) -> dict[str, torch.Tensor]:
    tower = sam_tower(case)
    modules = {f"block{i}_out": layer for i, layer in enumerate(tower.sam.layers)} | {
        "neck_out": tower.sam.neck
    }
    found = outputs_of(modules | {"tower": tower}, lambda: tower(case.inputs["x"]))
    return found | {"out": as_map(found["tower"].last_hidden_state)}


def timm_fields(case: Case) -> dict:
    c = case.config
    return {
        "hidden_size": c["embed_dim"],
        "num_hidden_layers": c["depth"],
        "num_attention_heads": c["num_heads"],
        "image_size": c["img_size"],
        "patch_size": c["patch_size"],
    }


def timm_dino_tiny(case: Case) -> dict[str, torch.Tensor]:
    fields = {"dinov2_config": {**timm_fields(case), "mlp_ratio": 4}}
    return timm_tiny(case, fields, renamed(case.weights(), TIMM_DINOV2_NAMES, "dinov2."), "encoder.layer")


def timm_siglip_tiny(case: Case) -> dict[str, torch.Tensor]:
    c = case.config
    siglip = {
        **timm_fields(case),
        "hidden_act": "gelu",
        "intermediate_size": int(c["embed_dim"] * c["mlp_ratio"]),
    }
    weights = renamed(case.weights(), TIMM_SIGLIP_NAMES, "siglip.")
    return timm_tiny(case, {"siglip_config": siglip}, weights, "encoder.layers")


def timm_tiny(case: Case, fields: dict, weights: dict, layers: str) -> dict[str, torch.Tensor]:
    """The features from the cut tower; what lies in front and behind from the whole one."""
    whole = loaded(VisualRWKVVisionConfig(**copy.deepcopy(fields)), weights)
    cut = loaded(VisualRWKVVisionConfig(**fields, feature_layer=-2), weights)
    (name,) = fields
    encoder = whole.get_submodule(name.removesuffix("_config"))
    blocks = encoder.get_submodule(layers)
    modules = {"tokens_in": encoder.embeddings, "block0_patches": blocks[0], "last_block_patches": blocks[-1]}
    found = outputs_of(modules, lambda: whole(case.inputs["x"]))
    prefix = case.config["num_prefix_tokens"]
    found |= {name: found[name][:, prefix:] for name in ("block0_patches", "last_block_patches")}
    return found | {"features": cut(case.inputs["x"]).last_hidden_state}


def timm_pos_embed_resample(case: Case) -> dict[str, torch.Tensor]:
    found = {}
    for name, position in case.inputs.items():
        if match := re.fullmatch(r"pos\.(\d+to(\d+)_dim\d+_prefix(\d))", name):
            side = int(match[2])
            found[f"resampled.{match[1]}"] = resample_position_embedding(
                position, (side, side), int(match[3])
            )
        else:
            found[name.replace("filter_in", "filter_out")] = resample_position_embedding(position, (4, 4))
    return found


def v700_full_config(case: Case) -> VisualRWKVConfig:
    sizes = {
        name: {
            "hidden_size": tower["embed_dim"],
            "num_hidden_layers": tower["depth"],
            "num_attention_heads": tower["num_heads"],
        }
        for name, tower in case.config["towers"].items()
    }
    sam = case.config["towers"]["sam"]
    return VisualRWKVConfig(
        text_config={
            "rwkv_version": 7,
            "hidden_size": case.config["n_embd"],
            "num_hidden_layers": 1,
            "vocab_size": 320,
        },
        vision_config={
            "dinov2_config": {**sizes["dino"], "image_size": 448, "patch_size": 14},
            "siglip_config": {
                **sizes["siglip"],
                "image_size": 448,
                "patch_size": 14,
                "hidden_act": "gelu",
                "intermediate_size": 74,
            },
            "sam_config": {
                **sizes["sam"],
                "image_size": 1024,
                "patch_size": 16,
                "output_channels": sam["out_chans"],
                "global_attn_indexes": sam["global_attn_indexes"],
            },
            "feature_layer": -2,
        },
        image_token_id=319,
        pooling="adaptive",
        pooled_grid_size=4,
        projector="gated_norm",
    )


def v700_full_pipeline(case: Case) -> dict[str, torch.Tensor]:
    """Pictures to projected tokens; the logits are the language model's part, in test_golden.py."""
    config = v700_full_config(case)
    weights = read_weights(
        case.folder, tuple(name for name in case.info["weights"] if "rwkv7_rwkv" not in name)
    )
    tower = loaded(config.vision_config, v700_tower_weights(weights))
    projector = PROJECTORS[config.projector](config.vision_config.hidden_size, config.text_config.hidden_size)
    projector.load_state_dict(
        {n.removeprefix("proj."): t for n, t in weights.items() if n.startswith("proj.")}
    )

    pictures = [case.picture(name) for name in ("a.png", "b.png")]
    pixels = dict(image_processor_for(config)(pictures, return_tensors="pt"))
    names = {"dino": "pixel_values", "siglip": "pixel_values_siglip", "sam": "pixel_values_sam"}
    steps = {"dino": 8, "siglip": 8, "sam": 16}
    found = {f"pixels.{n}.every{s}": pixels[names[n]][..., ::s, ::s] for n, s in steps.items()}

    features = tower.encode(
        {name: pixels[names[name.replace("dinov2", "dino")]] for name in tower.config.encoders}
    )
    fused = tower.fuse(features)
    pooled = pool_patches(fused, config)
    found |= {f"{n.replace('dinov2', 'dino')}_features.every67": f[:, ::67] for n, f in features.items()}
    return found | {
        "concat_features.every67": fused[:, ::67],
        "pooled": pooled,
        "image_features": projector(pooled),
    }


def v700_tower_weights(weights: dict) -> dict:
    tables = {"dino": TIMM_DINOV2_NAMES, "siglip": TIMM_SIGLIP_NAMES, "sam": SAM_NAMES}
    found = {}
    for name, table in tables.items():
        prefix = f"vit.{name}_featurizer."
        own = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
        found |= renamed(own, table, {"dino": "dinov2."}.get(name, f"{name}."))
    return found


GOLDEN = {
    "sam_functions": sam_functions,
    "sam_tiny_64x64": sam_tiny,
    "sam_tiny_small_neck": sam_tiny,
    "timm_dino_tiny": timm_dino_tiny,
    "timm_pos_embed_resample": timm_pos_embed_resample,
    "timm_siglip_tiny": timm_siglip_tiny,
    "v700_full_pipeline": v700_full_pipeline,
}
LANGUAGE_MODEL = {"v700_full_pipeline": {"logits"}}


@pytest.mark.parametrize("name", GOLDEN)
@torch.no_grad()
def test_tower_gives_the_originals_numbers(golden_folder, name):
    """Every tensor within its own tolerance: float32 noise of the original times 30."""
    case = Case(golden_folder, f"e_vision/{name}")
    found = GOLDEN[name](case)
    assert case.expected
    for key in case.expected.keys() - LANGUAGE_MODEL.get(name, set()):
        golden, recorded = case.expected[key], case.info["tensors"][f"expected:{key}"]
        assert list(found[key].shape) == recorded["shape"], key
        ours = found[key][tuple(slice(n) for n in golden.shape)]  # the stored tensor may be the first part
        assert (ours - golden).abs().max() <= recorded["recommended_atol"], key
    assert case.files_read >= set(case.info["files"])


# --- towers against the stock models --------------------------------------------------------------


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("name", ["clip", "dinov2", "siglip"])
@torch.no_grad()
def test_features_are_the_stock_models(name, layer):
    """-1: its last hidden state; -2: what enters its last block."""
    tower = awake_tower(**TOWERS[name], feature_layer=layer)
    stock = STOCK[name](tower.config.encoders[name]).eval()
    stock.load_state_dict(tower.get_submodule(name).state_dict(), strict=False)
    layers = stock.encoder.layers if hasattr(stock.encoder, "layers") else stock.encoder.layer
    pixels = pixels_for(tower.config)["pixel_values"]
    hidden = outputs_of({"all": stock, "block": layers[-2]}, lambda: stock(pixels))
    expected = hidden["all"].last_hidden_state if layer == -1 else hidden["block"]
    expected = expected[:, expected.shape[1] - 16 :]  # class and register tokens stand in front
    torch.testing.assert_close(tower(pixels).last_hidden_state, expected, rtol=0, atol=0)


@torch.no_grad()
def test_class_token_stands_where_the_configuration_says():
    towers = {place: awake_tower(**CLIP, class_token=place) for place in ("first", "last", "none")}
    pixels = pixels_for(towers["none"].config)
    first, last, none = (tower(**pixels).last_hidden_state for tower in towers.values())
    assert none.shape == (2, 16, 32)
    assert torch.equal(first[:, 1:], none) and torch.equal(last[:, :-1], none)
    assert torch.equal(first[:, 0], last[:, -1])


@pytest.mark.parametrize("fields", TOWERS.values(), ids=TOWERS)
def test_every_parameter_is_used(fields):
    tower = awake_tower(**fields)
    tower(**pixels_for(tower.config)).last_hidden_state.square().sum().backward()
    unused = [name for name, p in tower.named_parameters() if p.grad is None or not p.grad.any()]
    assert not unused


@pytest.mark.parametrize("fields", TOWERS.values(), ids=TOWERS)
@torch.no_grad()
def test_output_has_the_configurations_shape_and_rows_do_not_mix(fields):
    tower = awake_tower(**fields)
    config = tower.config
    pixels = pixels_for(config, pictures=3)
    features = tower(**pixels).last_hidden_state
    assert features.shape == (3, config.grid_size**2 + config.num_class_tokens, config.hidden_size)
    views = config.num_views
    alone = tower(**{name: p[views : 2 * views] for name, p in pixels.items()}).last_hidden_state
    torch.testing.assert_close(features[1:2], alone, rtol=0, atol=1e-5)  # float32, another batch size


@torch.no_grad()
def test_encoders_stand_side_by_side_in_channel_order():
    tower = awake_tower(**TOWERS["three"])
    pixels = pixels_for(tower.config)
    names = {"dinov2": "pixel_values", "siglip": "pixel_values_siglip", "sam": "pixel_values_sam"}
    alone = tower.encode({encoder: pixels[name] for encoder, name in names.items()})
    together = tower(**pixels).last_hidden_state
    assert torch.equal(together, torch.cat([alone["dinov2"], alone["siglip"], alone["sam"]], dim=-1))
    assert torch.equal(fuse_features(dict(reversed(alone.items()))), together)


@torch.no_grad()
def test_first_half_of_a_tiled_picture_is_the_whole_view():
    tiled = awake_tower(**TOWERS["uhd"])
    plain = awake_tower(**TOWERS["three"])
    pixels = pixels_for(tiled.config)
    whole = plain(**{name: p[::5] for name, p in pixels.items()}).last_hidden_state
    torch.testing.assert_close(
        tiled(**pixels).last_hidden_state[..., : whole.shape[-1]], whole, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", STOCK)
def test_fresh_encoder_is_initialised_as_the_stock_one(name):
    torch.manual_seed(0)
    config = VisualRWKVVisionConfig(**copy.deepcopy(TOWERS[name]))
    ours = dict(VisualRWKVVisionModel(config).get_submodule(name).named_parameters())
    stock = dict(STOCK[name](config.encoders[name]).named_parameters())
    for key, weight in ours.items():
        if stock[key].std() == 0 or weight.numel() == 1:
            assert torch.equal(weight, stock[key]), key
        elif weight.numel() >= 1000:  # the standard deviation's own is below 3 %
            assert 0.85 < weight.std() / stock[key].std() < 1.15, key


@pytest.mark.parametrize("fields", TOWERS.values(), ids=TOWERS)
@torch.no_grad()
def test_saved_tower_loads_whole(tmp_path, fields):
    """Loading builds on the meta device: buffers that no file holds must come back too."""
    tower = awake_tower(**fields)
    tower.save_pretrained(tmp_path)
    again, info = VisualRWKVVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert tower.state_dict().keys() == dict(tower.named_parameters()).keys()  # no file holds a buffer
    assert dict(again.named_buffers()).keys() == dict(tower.named_buffers()).keys()
    for name, buffer in again.named_buffers():
        assert torch.equal(buffer, tower.get_buffer(name)), name
    pixels = pixels_for(tower.config)
    assert torch.equal(again.eval()(**pixels).last_hidden_state, tower(**pixels).last_hidden_state)


@pytest.mark.parametrize("fields", TOWERS.values(), ids=TOWERS)
def test_input_embeddings_are_the_first_encoders(fields):
    tower = awake_tower(**fields)
    name = next(iter(tower.config.encoders))
    assert tower.get_input_embeddings() is tower.get_submodule(f"{name}.{PATCH_EMBEDDINGS[name]}")


PATCH_EMBEDDINGS = {
    "clip": "embeddings.patch_embedding",
    "dinov2": "embeddings.patch_embeddings",
    "siglip": "embeddings.patch_embedding",
    "sam": "patch_embed",
}


@torch.no_grad()
def test_attention_backends_agree_and_sam_keeps_one_that_it_has():
    tower = awake_tower(**TOWERS["three"])
    pixels = pixels_for(tower.config)
    sdpa = tower(**pixels).last_hidden_state
    eager_tower = VisualRWKVVisionModel._from_config(tower.config, attn_implementation="eager").eval()
    eager_tower.load_state_dict(tower.state_dict())
    assert type(eager_tower.sam.layers[0].attn) is SamVisionAttention
    torch.testing.assert_close(
        eager_tower(**pixels).last_hidden_state, sdpa, rtol=0, atol=2e-4
    )  # float32, |x| to 30
    config = VisualRWKVVisionConfig(**copy.deepcopy(THREE))
    config.sam_config._attn_implementation = "flash_attention_2"
    assert type(VisualRWKVVisionModel(config).sam.layers[0].attn).__name__ == "SamVisionSdpaAttention"


def test_gradient_checkpointing_changes_no_gradient():
    plain = awake_tower(**TOWERS["three"]).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable()
    pixels = pixels_for(plain.config)
    for tower in (plain, checkpointed):
        tower(**pixels).last_hidden_state.square().mean().backward()
    for (name, one), two in zip(plain.named_parameters(), checkpointed.parameters()):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-5, msg=name)  # float32, recomputed


@torch.no_grad()
def test_bfloat16_tower_takes_float32_pixels():
    tower = awake_tower(**TOWERS["three"]).to(torch.bfloat16)
    features = tower(**pixels_for(tower.config)).last_hidden_state
    assert features.dtype == torch.bfloat16 and features.isfinite().all()


def without(pixels: dict, name: str) -> dict:
    return {key: value for key, value in pixels.items() if key != name}


@pytest.mark.parametrize(
    ("tower", "change", "message"),
    [
        ("three", lambda p: without(p, "pixel_values_sam"), "pixel_values_sam is missing"),
        ("three", lambda p: p | {"pixel_values": None}, "pixel_values is missing"),
        (
            "clip",
            lambda p: p | {"pixel_values_sam": torch.zeros(2, 3, 64, 64)},
            "pixel_values_sam has no use",
        ),
        ("three", lambda p: p | {"pixel_values_dinov2": p["pixel_values"]}, "pixel_values_dinov2 has no use"),
        (
            "siglip",
            lambda p: {"pixel_values": torch.zeros(2, 3, 64, 56)},
            r"\[N, 3, 56, 56\], got \[2, 3, 64, 56\]",
        ),
        (
            "dinov2",
            lambda p: {"pixel_values": torch.zeros(2, 3, 28, 28)},
            r"\[N, 3, 56, 56\], got \[2, 3, 28, 28\]",
        ),
        ("clip", lambda p: {"pixel_values": torch.zeros(1, 2, 3, 56, 56)}, r"got \[1, 2, 3, 56, 56\]"),
        ("three", lambda p: p | {"pixel_values_sam": p["pixel_values_sam"][:1]}, "'pixel_values_sam': 1"),
        ("uhd", lambda p: {name: v[:7] for name, v in p.items()}, "holds 7 views, a picture has 5"),
    ],
)
def test_wrong_pictures_are_refused(tower, change, message):
    tower = awake_tower(**TOWERS[tower])
    with pytest.raises(ValueError, match=message):
        tower(**change(pixels_for(tower.config)))


# --- maps against loops ---------------------------------------------------------------------------


def test_unshuffle_puts_each_pixel_where_the_docstring_says():
    feature_map = torch.arange(2 * 3 * 6 * 6.0).reshape(2, 3, 6, 6)
    patches = unshuffle_map(feature_map)
    assert patches.shape == (2, 9, 12)
    for n, c, y, x, dy, dx in itertools.product(range(2), range(3), range(3), range(3), range(2), range(2)):
        assert patches[n, 3 * y + x, 4 * c + 2 * dy + dx] == feature_map[n, c, 2 * y + dy, 2 * x + dx]


@pytest.mark.parametrize(("n", "side"), [(2, 2), (2, 6), (3, 3), (3, 6)])
def test_stitched_patch_is_the_mean_of_its_window(n, side):
    tiles = torch.randn(2, n * n, side * side, 5, dtype=torch.float64)
    stitched = stitch_tiles(tiles, n)
    for y, x in itertools.product(range(side), range(side)):
        tile = tiles[:, (y * n // side) * n + x * n // side].reshape(2, side, side, 5)
        top, left = y * n % side, x * n % side
        expected = tile[:, top : top + n, left : left + n].mean((1, 2))
        torch.testing.assert_close(stitched[:, y * side + x], expected)


@pytest.mark.parametrize(
    ("tiles", "n", "message"),
    [((1, 4, 9, 2), 2, "4 tiles of 3 x 3"), ((1, 3, 16, 2), 2, "3 tiles"), ((1, 4, 17, 2), 2, "17 patches")],
)
def test_tiles_that_cannot_be_stitched_are_refused(tiles, n, message):
    with pytest.raises(ValueError, match=message):
        stitch_tiles(torch.zeros(tiles), n)


def test_features_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"'dinov2': \(2, 16\), 'sam': \(2, 9\)"):
        fuse_features({"dinov2": torch.zeros(2, 16, 3), "sam": torch.zeros(2, 9, 3)})
    with pytest.raises(ValueError, match="6 views are not a multiple of the 5"):
        fuse_features({"dinov2": torch.zeros(6, 16, 3)}, tile_grid=2)


# --- pooling --------------------------------------------------------------------------------------


def vlm_config(side: int, class_token: str, pooling: str, g: int | None) -> VisualRWKVConfig:
    vision = {"clip_config": dict(SMALL, image_size=2 * side, patch_size=2), "class_token": class_token}
    return VisualRWKVConfig(
        text_config={"rwkv_version": 6, "hidden_size": 64, "num_hidden_layers": 1},
        vision_config=vision,
        pooling=pooling,
        pooled_grid_size=g,
    )


def windows(pooling: str, side: int, g: int) -> list[range]:
    """Rows (or columns) of each window, from the definitions."""
    if pooling == "adaptive":
        return [range(i * side // g, -(-(i + 1) * side // g)) for i in range(g)]
    size = side // g
    return [range(start, start + size) for start in range(0, side - size + 1, size)]


GRIDS = [
    ("average", 6, 1),
    ("average", 6, 3),
    ("average", 7, 3),
    ("average", 4, 3),
    ("adaptive", 7, 4),
    ("adaptive", 6, 6),
]


@pytest.mark.parametrize("class_token", ["first", "last", "none"])
@pytest.mark.parametrize(("pooling", "side", "g"), GRIDS)
def test_pooled_patch_is_the_mean_of_its_window(pooling, side, g, class_token):
    config = vlm_config(side, class_token, pooling, g)
    features = torch.randn(2, side**2 + config.vision_config.num_class_tokens, 3, dtype=torch.float64)
    pooled = pool_patches(features, config)
    start = int(class_token == "first")
    grid = features[:, start : start + side**2].reshape(2, side, side, 3)
    cells = [
        grid[:, r][:, :, c].mean((1, 2)) for r in windows(pooling, side, g) for c in windows(pooling, side, g)
    ]
    expected = {"first": [features[:, 0], *cells], "last": [*cells, features[:, -1]], "none": cells}[
        class_token
    ]
    torch.testing.assert_close(pooled, torch.stack(expected, dim=1))
    assert pooled.shape[1] == config.num_tile_tokens


@pytest.mark.parametrize("class_token", ["first", "last"])
def test_poolings_to_one_token(class_token):
    features = torch.randn(2, 17, 3)
    mean = pool_patches(features, vlm_config(4, class_token, "mean", None))
    assert torch.equal(mean, features.mean(1, keepdim=True))
    alone = pool_patches(features, vlm_config(4, class_token, "class_token", None))
    assert torch.equal(alone[:, 0], features[:, 0 if class_token == "first" else -1]) and alone.shape[1] == 1
    assert torch.equal(pool_patches(features, vlm_config(4, class_token, "none", None)), features)


def test_pooling_of_no_square_is_refused():
    with pytest.raises(ValueError, match="15 patches do not make a square grid"):
        pool_patches(torch.zeros(1, 15, 3), vlm_config(4, "none", "adaptive", 2))


# --- projectors -----------------------------------------------------------------------------------

FORMULAS = {
    "linear": lambda x, w: x @ w["proj"].T,
    "linear_flip": lambda x, w: x @ w["proj"][:, :6].T + x.flip(1) @ w["proj"][:, 6:].T,
    "gated": lambda x, w: (x @ w["proj"].T * (x @ w["proj"].T @ w["gate"].T).sigmoid()) @ w["o_proj"].T,
    "relu": lambda x, w: (x @ w["proj"].T).clamp(min=0) @ w["o_proj"].T,
    "gated_norm": lambda x, w: (
        normalized((x * (x @ w["gate"].T).sigmoid()) @ w["o_proj"].T) * w["ln_v"] + w["bias"]
    ),
}


def normalized(x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("name", PROJECTORS)
def test_projector_computes_its_equation(name):
    torch.manual_seed(0)
    projector = PROJECTORS[name](6, 10, 1e-5).double()
    for weight in projector.parameters():
        nn.init.normal_(weight)
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    weights = {
        key.removesuffix(".weight").replace("ln_v.bias", "bias"): t
        for key, t in projector.state_dict().items()
    }
    torch.testing.assert_close(projector(x), FORMULAS[name](x, weights))
    (gradients := projector(x).square().sum()).backward()
    assert gradients.isfinite() and all(p.grad.any() for p in projector.parameters())
