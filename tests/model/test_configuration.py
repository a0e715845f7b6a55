"""The configuration: every release as numbers, round trips, and what it refuses."""

import json
import math
import re

import pytest
from huggingface_hub.errors import StrictDataclassError
from released_shapes import RELEASES, VOCAB_SIZE
from tiny import vlm_config
from transformers import AutoConfig, CLIPVisionConfig, GenerationConfig

from visualrwkv_hf import VisualRWKVConfig, VisualRWKVTextConfig, VisualRWKVVisionConfig
from visualrwkv_hf.configuration_visualrwkv import RANKS

CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
DINOV2_L = {"hidden_size": 1024, "num_hidden_layers": 24, "image_size": 448, "patch_size": 14}
SIGLIP_SO400M = {"hidden_size": 1152, "num_hidden_layers": 27, "image_size": 448, "patch_size": 14}
SIGLIP_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "image_size": 256, "patch_size": 16}

CLIP = {"clip_config": CLIP_L, "feature_layer": -2}
CLIP_FIRST = CLIP | {"class_token": "first"}
CLIP_LAST = CLIP | {"class_token": "last"}
THREE = {"dinov2_config": DINOV2_L, "siglip_config": SIGLIP_SO400M, "sam_config": {}, "feature_layer": -2}
UHD = THREE | {"tile_grid": 2}
SIGLIP = {"siglip_config": SIGLIP_BASE}

# release: version, layers, C, F, tower, D, tokens of a picture; a name of `RELEASES` is judged by its shapes, too.
RELEASE_NUMBERS = {
    "v5.0 1B5": (5, 24, 2048, 7168, CLIP_FIRST, 1024, 577),
    "v5.0 3B": (5, 32, 2560, 8960, CLIP_FIRST, 1024, 577),
    "v5.1 7B": (5, 32, 4096, 14336, CLIP_LAST, 1024, 577),
    "v6.0 1B6": (6, 24, 2048, 7168, CLIP_LAST, 1024, 577),
    "v6.0 3B": (6, 32, 2560, 8960, CLIP_LAST, 1024, 577),
    "v6.0 7B": (6, 32, 4096, 14336, CLIP_LAST, 1024, 577),
    "HD 1B6": (6, 24, 2048, 7168, THREE, 3200, 1024),
    "UHD 1B6": (6, 24, 2048, 7168, UHD, 6400, 1024),
    "v7.00 0B1": (7, 12, 768, 3072, THREE, 3200, 1024),
    "v7.00 0B4": (7, 24, 1024, 4096, THREE, 3200, 1024),
    "v7.00 1B5": (7, 24, 2048, 8192, THREE, 3200, 1024),
    "v7.01 0B1": (7, 12, 768, 3072, SIGLIP, 768, 256),
}

EXPLICIT_RANKS = {"v7.00 0B4": {"gate_low_rank_dim": 128}}
"""World 0.4B and the release made of it are older than the rule, which gives 160."""


def release_config(name: str) -> VisualRWKVConfig:
    """F and the ranks are left to their defaults."""
    version, layers, hidden_size, _, tower, _, _ = RELEASE_NUMBERS[name]
    text = {"rwkv_version": version, "num_hidden_layers": layers, "hidden_size": hidden_size}
    return VisualRWKVConfig(text_config=text | EXPLICIT_RANKS.get(name, {}), vision_config=tower)


@pytest.mark.parametrize("name", RELEASE_NUMBERS)
def test_release_has_its_sizes(name):
    _, layers, hidden_size, intermediate_size, _, channels, tokens = RELEASE_NUMBERS[name]
    config = release_config(name)
    text, vision = config.text_config, config.vision_config
    assert (text.intermediate_size, text.attention_size) == (intermediate_size, hidden_size)
    assert text.num_attention_heads * 64 == hidden_size
    assert text.layer_types == ["linear_attention"] * layers
    assert text.vocab_size == VOCAB_SIZE
    assert vision.hidden_size == channels
    assert config.num_image_tokens == tokens
    assert vision.num_views == (5 if name.startswith("UHD") else 1)


def test_every_released_file_is_among_the_releases():
    assert RELEASES.keys() <= RELEASE_NUMBERS.keys()


# Default rank -> a tensor of block 1 that has it, and in which dimension.
RANK_SHAPES = {
    6: {"mix_low_rank_dim": ("time_maa_w2", 1), "decay_low_rank_dim": ("time_decay_w1", 1)},
    7: {
        "decay_low_rank_dim": ("w1", 1),
        "a_low_rank_dim": ("a1", 1),
        "v_low_rank_dim": ("v1", 1),
        "gate_low_rank_dim": ("g1", 1),
    },
}


@pytest.mark.parametrize("name", [name for name in RELEASES if not name.startswith("v5")])
def test_default_ranks_are_those_of_the_released_file(name):
    shapes, text = RELEASES[name](), release_config(name).text_config
    for field, (tensor, dim) in RANK_SHAPES[text.rwkv_version].items():
        assert getattr(text, field) == shapes[f"rwkv.blocks.1.att.{tensor}"][dim], field


@pytest.mark.parametrize(
    ("hidden_size", "ranks"),
    [
        (64, (32, 32, 32, 32)),
        (768, (64, 64, 32, 128)),
        (1024, (64, 64, 32, 160)),  # not the 128 of World 0.4B
        (2048, (96, 96, 64, 256)),
        (2560, (96, 96, 64, 320)),
        (4096, (128, 128, 96, 480)),
    ],
)
def test_rwkv7_rank_rule(hidden_size, ranks):
    config = VisualRWKVTextConfig(hidden_size=hidden_size)
    assert config.mix_low_rank_dim is None
    assert tuple(getattr(config, name) for name in RANKS[1:]) == ranks


@pytest.mark.parametrize(
    ("hidden_size", "mix", "decay"), [(2048, 32, 64), (2560, 32, 64), (4096, 64, 128), (4032, 32, 64)]
)
def test_rwkv6_rank_rule(hidden_size, mix, decay):
    config = VisualRWKVTextConfig(rwkv_version=6, hidden_size=hidden_size)
    assert [getattr(config, name) for name in RANKS] == [mix, decay, None, None, None]


def test_rwkv5_has_no_ranks():
    assert {getattr(VisualRWKVTextConfig(rwkv_version=5), name) for name in RANKS} == {None}


# The paper's table 9 on 24 x 24 patches and the class token, and what v5.0 and v5.1 made of grid_size 1 and 0.
POOLED_TOKENS = [
    ("none", None, 577),
    ("average", 24, 577),
    ("average", 12, 145),
    ("average", 8, 65),
    ("average", 6, 37),
    ("average", 4, 17),
    ("average", 3, 10),
    ("average", 2, 5),
    ("average", 1, 2),
    ("average", 5, 37),  # windows of 24 // 5 = 4 patches: 6 x 6 of them
    ("adaptive", 5, 26),
    ("mean", None, 1),
    ("class_token", None, 1),
]


@pytest.mark.parametrize("tower", [CLIP_FIRST, CLIP_LAST], ids=["first", "last"])
@pytest.mark.parametrize(("pooling", "grid", "tokens"), POOLED_TOKENS)
def test_pooled_picture_has_the_papers_number_of_tokens(tower, pooling, grid, tokens):
    config = VisualRWKVConfig(
        vision_config=tower, pooling=pooling, pooled_grid_size=grid, scan="bidirectional"
    )
    assert config.num_image_tokens == tokens
    assert math.prod(config.pooled_grid) + (config.class_token != "none") == tokens


@pytest.mark.parametrize(
    ("fields", "tokens_of_tiles"),
    [
        ({}, {1: 256, 5: 1280}),
        (dict(compressor_num_tokens=64), {1: 64, 5: 64}),
        (dict(compressor_num_tokens=64, compressor_per_tile=True), {1: 64, 5: 320}),
        # every (length // 100)-th token, of which at most 100 from the end stay
        (dict(compressor_num_tokens=100, compressor_reduction="step"), {1: 100, 5: 100}),
        # every (256 // 100)-th token, all of them kept
        (
            dict(compressor_num_tokens=100, compressor_per_tile=True, compressor_reduction="step"),
            {1: 128, 5: 640},
        ),
    ],
)
def test_tiles_and_compressor_have_their_number_of_tokens(fields, tokens_of_tiles):
    config = VisualRWKVConfig(vision_config=SIGLIP, compressor_num_layers=2 if fields else 0, **fields)
    assert {n: config.num_image_tokens_of(n) for n in tokens_of_tiles} == tokens_of_tiles


@pytest.mark.parametrize("name", RELEASE_NUMBERS)
def test_dict_and_back(name):
    config = release_config(name)
    again = VisualRWKVConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert type(again.text_config) is VisualRWKVTextConfig
    assert type(again.vision_config) is VisualRWKVVisionConfig
    assert list(again.vision_config.encoders) == list(config.vision_config.encoders)


@pytest.mark.parametrize("name", RELEASE_NUMBERS)
def test_saved_and_loaded(name, tmp_path):
    config = release_config(name)
    config.save_pretrained(tmp_path)
    for load in (VisualRWKVConfig.from_pretrained, AutoConfig.from_pretrained):
        again = load(tmp_path)
        assert type(again) is VisualRWKVConfig
        assert again.to_dict() | {"_name_or_path": ""} == config.to_dict()
        assert again.num_image_tokens == config.num_image_tokens


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_part_saved_and_loaded_alone(part, tmp_path):
    config = getattr(release_config("HD 1B6"), part)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is type(config)
    assert again.to_diff_dict() == config.to_diff_dict()


def test_part_of_a_saved_model_is_found(tmp_path):
    vlm_config().save_pretrained(tmp_path)
    text = VisualRWKVTextConfig.from_pretrained(tmp_path)
    assert (text.rwkv_version, text.vocab_size) == (6, 320)


def test_parts_may_be_configurations():
    config = release_config("v6.0 1B6")
    again = VisualRWKVConfig(text_config=config.text_config, vision_config=config.vision_config)
    assert again.text_config is config.text_config
    assert again.num_image_tokens == 577


def test_no_arguments_give_a_model_that_fits_together():
    config = VisualRWKVConfig()
    assert list(config.vision_config.encoders) == ["siglip"]
    assert (config.num_image_tokens, config.text_config.rwkv_version) == (256, 7)


SMALL_CLIP = {"image_size": 56, "patch_size": 14, "num_hidden_layers": 2}
SMALL_SIGLIP = {"image_size": 64, "patch_size": 16, "num_hidden_layers": 2}
COMPRESSED = {"compressor_num_layers": 1, "compressor_num_tokens": 4}

TEXT, VISION, WHOLE = VisualRWKVTextConfig, VisualRWKVVisionConfig, VisualRWKVConfig
REFUSED = [
    (TEXT, {"rwkv_version": 4}, "rwkv_version must be one of 5, 6, 7, got 4."),
    (TEXT, {"rwkv_version": "7"}, "'rwkv_version' expected int, got str (value: '7')"),
    (TEXT, {"layer_norm_eps": 1}, "'layer_norm_eps' expected float, got int (value: 1)"),
    (TEXT, {"l2_wrap": 0}, "'l2_wrap' expected float, got int (value: 0)"),
    (TEXT, {"hidden_size": 64.0}, "'hidden_size' expected int, got float (value: 64.0)"),
    (TEXT, {"loss_reduction": "sum"}, "'loss_reduction' expected one of ('sample', 'token'), got sum"),
    *[
        (TEXT, {"rwkv_version": 6, name: 0}, f"{name} must be at least 1, got 0.")
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "head_dim",
            "attention_size",
            "intermediate_size",
            *RANKS,
        )
    ],
    (TEXT, {"hidden_size": -64}, "hidden_size must be at least 1, got -64."),
    (TEXT, {"hidden_size": 100}, "attention_size (100) must be a multiple of head_dim (64)."),
    (TEXT, {"attention_size": 128}, "RWKV-7 needs attention_size (128) equal to hidden_size (768)."),
    (VISION, {"feature_layer": -3}, "'feature_layer' expected one of (-1, -2), got -3"),
    (
        VISION,
        {"class_token": "middle"},
        "'class_token' expected one of ('first', 'last', 'none'), got middle",
    ),
    (VISION, {"siglip_config": 5}, "siglip_config must be a dict or a configuration, got int."),
    (
        VISION,
        {"siglip_config": CLIPVisionConfig()},
        "siglip_config must have model_type 'siglip_vision_model', got 'clip_vision_model'.",
    ),
    (
        VISION,
        {"clip_config": {"model_type": "siglip_vision_model"}},
        "clip_config must have model_type 'clip_vision_model', got 'siglip_vision_model'.",
    ),
    (
        VISION,
        {"clip_config": SMALL_CLIP, "siglip_config": SMALL_SIGLIP | {"image_size": 80}},
        "the same patch grid, got sides {'clip': 4, 'siglip': 5}.",
    ),
    (
        VISION,
        {"clip_config": SMALL_CLIP | {"image_size": 8}},
        "The patch grid is empty: image sizes {'clip': 8}, grid sides {'clip': 0}.",
    ),
    (
        VISION,
        {"siglip_config": SMALL_SIGLIP, "class_token": "first"},
        "class_token='first' needs clip as the only encoder, got ['siglip'].",
    ),
    (
        VISION,
        {"clip_config": SMALL_CLIP, "siglip_config": SMALL_SIGLIP, "class_token": "last"},
        "class_token='last' needs clip as the only encoder, got ['clip', 'siglip'].",
    ),
    (VISION, {"tile_grid": 0}, "tile_grid must be at least 1, got 0."),
    (
        VISION,
        {"clip_config": SMALL_CLIP, "tile_grid": 2, "class_token": "last"},
        "no one class token with tile_grid 2: class_token must be 'none', got 'last'.",
    ),
    (
        VISION,
        {"siglip_config": SMALL_SIGLIP, "tile_grid": 3},
        "The patch grid's side (4) must be a multiple of tile_grid (3).",
    ),
    (
        VISION,
        {
            "clip_config": SMALL_CLIP,
            "siglip_config": SMALL_SIGLIP | {"num_hidden_layers": 0},
            "feature_layer": -2,
        },
        "feature_layer=-2 needs encoders with a block, got {'clip': 2, 'siglip': 0}.",
    ),
    (WHOLE, {"text_config": 5}, "'text_config' with value 5 doesn't match any type"),
    (WHOLE, {"text_config": {"hidden_size": 100}}, "attention_size (100) must be a multiple"),
    (WHOLE, {"scan": "rotation"}, "scan must be one of unidirectional, bidirectional, "),
    (WHOLE, {"image_position": "inline"}, "'image_position' expected one of ('first', 'middle', 'last')"),
    (WHOLE, {"projector": "mlp"}, "'projector' expected one of ('linear', "),
    (WHOLE, {"image_token_id": -200}, "image_token_id (-200) must be below vocab_size (65536)."),
    (WHOLE, {"image_token_id": 65536}, "image_token_id (65536) must be below vocab_size (65536)."),
    (WHOLE, {"pooling": "average"}, "from 1 to the patch grid's side (16), got None."),
    (WHOLE, {"pooling": "average", "pooled_grid_size": 17}, "from 1 to the patch grid's side (16), got 17."),
    (WHOLE, {"pooling": "adaptive", "pooled_grid_size": 0}, "from 1 to the patch grid's side (16), got 0."),
    (WHOLE, {"pooled_grid_size": 3}, "pooled_grid_size (3) has no use with pooling='none'."),
    (WHOLE, {"pooling": "class_token"}, "needs a tower with a class token, this one has none."),
    (WHOLE, {"compressor_num_layers": -1}, "compressor_num_layers must be at least 0, got -1."),
    (WHOLE, {"compressor_num_layers": 1}, "compressor_num_tokens of at least 1, got None."),
    (WHOLE, COMPRESSED | {"compressor_num_tokens": 0}, "compressor_num_tokens of at least 1, got 0."),
    (WHOLE, COMPRESSED | {"text_config": {"rwkv_version": 6}}, "RWKV-7 blocks, got rwkv_version 6."),
    (
        WHOLE,
        COMPRESSED | {"compressor_num_tokens": 257, "compressor_per_tile": True},
        "compressor_num_tokens (257) is more than a tile has (256).",
    ),
    (WHOLE, COMPRESSED | {"scan": "snake"}, "scan must be 'unidirectional', got 'snake'."),
]


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    REFUSED,
    ids=["-".join([c.__name__[10:], *map(str, fields)]) for c, fields, _ in REFUSED],
)
def test_refused(config_class, fields, message):
    with pytest.raises((StrictDataclassError, ValueError), match=re.escape(message)):
        config_class(**fields)


@pytest.mark.parametrize(
    "vision",
    [
        {"sam_config": {"num_hidden_layers": 0}, "feature_layer": -2},  # SAM always gives its neck's output
        {"siglip_config": SMALL_SIGLIP | {"num_hidden_layers": 1}, "feature_layer": -2},
        {"siglip_config": SMALL_SIGLIP | {"num_hidden_layers": 0}, "feature_layer": -1},
        {"siglip_config": SMALL_SIGLIP, "feature_layer": -2},
        {"clip_config": SMALL_CLIP, "tile_grid": 2},
    ],
)
def test_neighbours_of_the_refused_are_accepted(vision):
    assert VisualRWKVVisionConfig(**vision).grid_size in (4, 32)


@pytest.mark.parametrize(
    ("vocab_size", "given", "expected"),
    [
        (65536, {}, [0, 261]),
        (65529, {}, [0, 261]),
        (320, {}, 0),
        (65536, {"eos_token_id": 7}, 7),
    ],
)
def test_an_answer_of_a_fresh_model_ends_with_its_turn(vocab_size, given, expected):
    """Token 261 of the World vocabulary is the blank line that ends a turn."""
    text = {"vocab_size": vocab_size, "hidden_size": 64, "num_hidden_layers": 1, **given}
    config = VisualRWKVConfig(text_config=text, image_token_id=vocab_size - 1)
    assert config.text_config.eos_token_id == expected
    assert GenerationConfig.from_model_config(config).eos_token_id == expected
    assert VisualRWKVTextConfig.from_dict(config.text_config.to_dict()).eos_token_id == expected
