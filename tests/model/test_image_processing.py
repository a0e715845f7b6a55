"""Pictures to pixels: bit-equal to the original's, every kind of picture, and refusals."""

import hashlib
import itertools
import multiprocessing
import resource

import numpy as np
import pytest
import torch
from golden_cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import one_encoder, picture
from tiny_training import tiny_model, tiny_processor
from transformers import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from visualrwkv_hf import (
    VisualRWKVConfig,
    VisualRWKVImageProcessor,
    VisualRWKVVisionModel,
    thin_pictures,
)
from visualrwkv_hf.encoders import HALF
from visualrwkv_hf.image_processing_visualrwkv import (
    TILINGS,
    grid_700,
    grid_boxes,
    image_processor_for,
    region_grid,
    squash,
)
from visualrwkv_hf.pictures import to_rgb
from visualrwkv_hf.thin_pictures import middle_of_thin

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"rwkv_version": 7, "hidden_size": 64, "num_hidden_layers": 1}
DINOV2 = {"dinov2_config": {**SMALL, "image_size": 28, "patch_size": 14}}
SIGLIP = {"siglip_config": {**SMALL, "image_size": 28, "patch_size": 14, "intermediate_size": 32}}
SAM = {
    "sam_config": {
        **SMALL,
        "image_size": 32,
        "patch_size": 8,
        "output_channels": 4,
        "global_attn_indexes": [0],
    }
}
CLIP = {"clip_config": {**SMALL, "image_size": 28, "patch_size": 14}}
THREE = {**DINOV2, **SIGLIP, **SAM}
SIZES = st.integers(1, 3000)
PICTURES = ("rgba", "tall", "wide")


def model_config(**vision) -> VisualRWKVConfig:
    return VisualRWKVConfig(
        text_config=dict(TEXT),
        vision_config={k: dict(v) if isinstance(v, dict) else v for k, v in vision.items()},
    )


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


# --- golden ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PICTURES)
def test_three_encoders_get_the_originals_bits(golden_folder, name):
    """sha256 of all pixels; the stored excerpts tell how far off, should a new Pillow resize otherwise."""
    case = Case(golden_folder, "j_preproc/v700_transforms")
    pixels = VisualRWKVImageProcessor()(case.picture(f"{name}.png"))
    keys = {"dino": "pixel_values", "siglip": "pixel_values_siglip", "sam": "pixel_values_sam"}
    for encoder, key in keys.items():
        ours, step = pixels[key][0], 16 if encoder == "sam" else 8
        golden = case.expected[f"{name}.{encoder}.every{step}"].numpy()
        assert np.array_equal(ours[:, ::step, ::step][tuple(slice(n) for n in golden.shape)], golden)
        assert ours.dtype == np.float32
        assert digest(ours) == case.json("sha256.json")[f"{name}.{encoder}"]["float32_sha256"]


@pytest.mark.parametrize(("name", "size"), list(itertools.product(PICTURES, (56, 224, 336))))
def test_stock_clip_gives_the_originals_bits(golden_folder, name, size):
    case = Case(golden_folder, "j_preproc/clip_image_processor")
    config = model_config(clip_config={**SMALL, "image_size": size, "patch_size": 14})
    processor = image_processor_for(config)
    assert type(processor) is CLIPImageProcessorPil
    ours = np.stack(processor(to_rgb(case.picture(f"{name}.png")))["pixel_values"])
    key, step = (f"{name}.{size}", 1) if size == 56 else (f"{name}.{size}.every8", 8)
    golden = case.expected[key].numpy()
    assert np.array_equal(ours[..., ::step, ::step][tuple(slice(n) for n in golden.shape)], golden)
    assert digest(ours) == case.json("sha256.json")[f"{name}.{size}"]["float32_sha256"]


@pytest.mark.parametrize(("name", "size"), list(itertools.product(PICTURES, (64, 256))))
def test_stock_siglip_gives_the_originals_bits(golden_folder, name, size):
    case = Case(golden_folder, "j_preproc/siglip_image_processor")
    config = model_config(siglip_config={**SMALL, "image_size": size, "patch_size": 16})
    processor = image_processor_for(config)
    assert type(processor) is SiglipImageProcessorPil
    ours = np.stack(processor(to_rgb(case.picture(f"{name}.png")))["pixel_values"])
    key, step = (f"{name}.64", 1) if size == 64 else (f"{name}.256.every8", 8)
    golden = case.expected[key].numpy()
    assert np.array_equal(ours[..., ::step, ::step][tuple(slice(n) for n in golden.shape)], golden)


DEAD_OPTIONS = {"gpt4v_crop", *(f"crop_{n}_squares_{side}" for n in (3, 4, 6) for side in (224, 336))}
"""v6.0's `detail=high`: all pictures but the first are thrown away, so the package has no such
option."""


def test_tiling_is_the_originals(golden_folder):
    for row in Case(golden_folder, "j_preproc/tiling").json("tiling.json"):
        size = tuple(row.pop("size"))
        cut = {
            "views": row.pop("uhd_split_image_into_tiles_2"),
            "whole_and_tiles": row.pop("v700_single_image_to_multi_image_strategy"),
        }
        for tiling, golden in cut.items():
            layout = TILINGS[tiling].lay_out(size, 448, 2)
            whole, *tiles = map(list, layout.boxes)
            assert whole == [0, 0, *size] and tiles == golden["crops"] and layout.resize is None, (
                size,
                tiling,
            )
        assert [448 * n for n in grid_700(size, 448)] == row.pop("v700_best_resolution")
        for (release, tiling), side in itertools.product(
            (("v702", "smallest"), ("v703_v704", "closest")), (256, 384)
        ):
            layout = TILINGS[tiling].lay_out(size, side, 1)
            golden = row.pop(f"{release}_image_to_regions_{side}")
            assert [list(layout.resize)] == golden["resize"] and list(map(list, layout.boxes)) == golden[
                "crops"
            ]
            assert len(layout.boxes) == golden["num_images"]
            assert list(layout.resize) == row.pop(f"{release}_best_resolution_{side}")
        assert row.keys() == DEAD_OPTIONS


# --- tiles ----------------------------------------------------------------------------------------


def test_views_are_the_whole_and_its_quarters_in_reading_order():
    processor = VisualRWKVImageProcessor(
        tiling="views", tile_grid=2, encoders={"siglip": {"size": 8, **HALF}}
    )
    image = picture(41, 31)  # the odd column and row are dropped
    pixels = processor([image, picture(seed=1)])["pixel_values"]
    assert pixels.shape == (10, 3, 8, 8)
    quarters = [image.crop((x, y, x + 20, y + 15)) for y in (0, 15) for x in (0, 20)]
    expected = np.stack([squash(part, 8, **HALF) for part in (image, *quarters)])
    assert np.array_equal(pixels[:5], expected)


@pytest.mark.parametrize("tiling", ["smallest", "closest"])
def test_regions_put_side_by_side_are_the_resized_picture(tiling):
    side, image = 16, picture(70, 40)
    batch = one_encoder(side, tiling=tiling)([image, picture(10, 10)], return_tensors="pt")
    columns, rows = region_grid(image.size, side, closest=tiling == "closest")
    assert batch["num_tiles"].tolist() == [columns * rows, 1] and batch["num_tiles"].dtype == torch.int64
    tiles = batch["pixel_values"][:-1].reshape(rows, columns, 3, side, side)
    together = tiles.permute(2, 0, 3, 1, 4).reshape(3, rows * side, columns * side)
    resized = np.array(image.resize((columns * side, rows * side), Image.Resampling.LANCZOS))
    expected = (torch.from_numpy(resized).permute(2, 0, 1) / 255 - 0.5) / 0.5
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-6)  # float32, another order of operations


@given(SIZES, SIZES, st.integers(1, 5), st.integers(1, 5))
def test_boxes_have_one_size_and_lie_inside_the_picture(width, height, columns, rows):
    boxes = grid_boxes((width, height), columns, rows)
    assert len(boxes) == columns * rows
    assert {(r - l, b - t) for l, t, r, b in boxes} == {(max(1, width // columns), max(1, height // rows))}
    assert all(0 <= l < r <= width and 0 <= t < b <= height for l, t, r, b in boxes)
    if width >= columns and height >= rows:
        assert len(set(boxes)) == len(boxes)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.sampled_from(["none", "whole_and_tiles", "smallest", "closest"]),
)
def test_tiles_are_counted_without_pixels(width, height, tiling):
    processor = one_encoder(16, tiling=tiling)
    batch = processor(picture(width, height))
    count = processor.get_number_of_image_patches(height, width)
    assert len(batch["pixel_values"]) == count
    assert batch.get("num_tiles", [1]) == [count]


@pytest.mark.parametrize("tiling", ["smallest", "closest"])
def test_a_picture_that_would_become_large_is_refused(tiling):
    """20,000,000 x 1 pixels would become 320 million of them."""
    processor, row = one_encoder(16, tiling=tiling), Image.new("RGB", (20_000_000, 1))
    sentence = (
        "Its 20000000 x 1 pixels would be resized to 20000000 x 16; at most 178,956,970 are cut into tiles."
    )
    with pytest.raises(ValueError, match=f"^Picture 2: {sentence}"):
        processor([picture(), row])
    with pytest.raises(ValueError, match=sentence):
        processor.get_number_of_image_patches(1, 20_000_000)
    assert processor.get_resized_pixels(30, 40) == 16 * 16 * processor.get_number_of_image_patches(30, 40)
    assert one_encoder(16, tiling="none").get_resized_pixels(30, 40) == 30 * 40


def test_a_call_may_choose_another_tiling():
    processor = one_encoder(16)
    assert processor(picture(), tiling="closest")["num_tiles"] == [
        processor.get_number_of_image_patches(30, 40, {"tiling": "closest"})
    ]
    assert "num_tiles" not in processor(picture())


@pytest.mark.parametrize("size", [(1, 1), (20000, 3), (3, 20000), (1, 50)])
@pytest.mark.parametrize("tiling", TILINGS)
def test_extreme_shapes_give_finite_pixels(size, tiling):
    processor = one_encoder(16, tiling=tiling, tile_grid=2 if tiling == "views" else 1)
    pixels = processor(Image.new("RGB", size, (255, 0, 0)))["pixel_values"]
    assert np.isfinite(pixels).all()
    assert np.array_equal(np.unique(pixels[:, 0]), [1.0]) and np.array_equal(np.unique(pixels[:, 1]), [-1.0])


def test_a_picture_in_a_batch_is_the_picture_alone():
    processor = VisualRWKVImageProcessor(tiling="views", tile_grid=2)
    pictures = [picture(seed=i, width=20 + i) for i in range(2)]
    together = processor(pictures)
    for name, pixels in together.items():
        alone = np.concatenate([processor(one)[name] for one in pictures])
        assert np.array_equal(pixels, alone), name


# --- many pictures --------------------------------------------------------------------------------


def test_a_tower_sees_one_picture_at_a_time():
    """However many a prompt or a batch has: what a tower holds in between is many times a picture's pixels."""
    model = tiny_model()
    processor = tiny_processor(model)
    batches: list[int] = []
    model.model.vision_tower.clip.register_forward_pre_hook(
        lambda module, arguments: batches.append(len(arguments[0]))
    )
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": picture(seed=seed)} for seed in seeds]}]
        for seeds in ((0, 1, 2), (3,))
    ]
    options = dict(tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
    for asked, count in ((chats, 4), (chats[0], 3)):
        inputs = processor.apply_chat_template(asked, **options, padding=True)
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        assert batches == [1] * count
        batches.clear()
    model.read(processor, chats[0], image_position="first")
    assert batches == [1] * 3


# --- what a model needs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "vision",
    [
        CLIP,
        SIGLIP,
        DINOV2,
        {**DINOV2, **SIGLIP},
        THREE,
        {**THREE, "tile_grid": 2},
        {**THREE, "feature_layer": -2},
    ],
    ids=["clip", "siglip", "dinov2", "two", "three", "uhd", "hd"],
)
@torch.no_grad()
def test_tower_takes_what_its_image_processor_gives(vision):
    config = model_config(**vision)
    batch = image_processor_for(config)([picture(), picture(50, 20)], return_tensors="pt")
    features = VisualRWKVVisionModel(config.vision_config)(**batch).last_hidden_state
    assert features.shape == (2, 4, config.vision_config.hidden_size)


def test_tiling_is_chosen_by_the_caller_or_the_tower():
    assert image_processor_for(model_config(**SIGLIP), "closest").tiling == "closest"
    processor = image_processor_for(model_config(**THREE, tile_grid=2))
    assert (processor.tiling, processor.tile_grid) == ("views", 2)
    assert processor.model_input_names == ["pixel_values", "pixel_values_siglip", "pixel_values_sam"]
    assert one_encoder(tiling="closest").model_input_names == ["pixel_values", "num_tiles"]
    with pytest.raises(ValueError, match="tile_grid 2 makes its views itself: no tiling 'closest'"):
        image_processor_for(model_config(**THREE, tile_grid=2), "closest")


def test_saved_processor_is_itself_again(tmp_path):
    processor = VisualRWKVImageProcessor(
        tiling="views", tile_grid=2, encoders={"sam": {"size": 8, **HALF}, "siglip": {"size": 12, **HALF}}
    )
    processor.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(again) is VisualRWKVImageProcessor and again.to_dict() == processor.to_dict()
    one, two = processor(picture()), again(picture())
    assert one.keys() == two.keys() == {"pixel_values", "pixel_values_sam"}  # files sort encoders by name
    assert all(np.array_equal(one[name], two[name]) for name in one)


# --- thin pictures ----------------------------------------------------------------------------------


def clip_processor(size: int):
    return image_processor_for(model_config(clip_config={**SMALL, "image_size": size, "patch_size": 14}))


def resized_and_cut(image: Image.Image, size: int) -> np.ndarray:
    """What CLIP's image processor sees: uint8 [S, S, 3]."""
    seen = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        do_rescale=False,
        do_normalize=False,
    )(image)["pixel_values"][0]
    return np.moveaxis(seen, 0, -1)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([14, 28, 42, 98]),
    st.integers(1, 30),
    st.integers(2, 900),
    st.booleans(),
    st.sampled_from([(0, 256), (0, 2), (254, 256)]),
)
def test_middle_of_a_thin_picture_is_what_would_be_cut_out(size, short, long, is_tall, values):
    rng = np.random.default_rng(long)
    pixels = rng.integers(*values, (long, short, 3), dtype=np.uint8)
    pixels = pixels * (1 if values[1] > 2 else 255)  # black and white: where cubics overshoot most
    image = Image.fromarray(pixels if is_tall else np.ascontiguousarray(pixels.swapaxes(0, 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thin_pictures, "LARGEST_BETWEEN", 0)
        middle = middle_of_thin(image, clip_processor(size))
    assert middle.size == (size, size) if min(short, long) < size else middle is image
    assert np.array_equal(resized_and_cut(middle, size), resized_and_cut(image, size))


def largest_memory_of(function, *arguments) -> int:
    """Bytes that a call holds at most in a process of its own, beyond what the process held before."""

    def measure(sender):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        function(*arguments)
        sender.send(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))

    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=measure, args=(sender,))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (20000, 1), (1, 20000), (3, 100_000)])
def test_a_thin_picture_takes_little_memory(size):
    """1 x 5000 at 336 would be 564 million pixels, 2.3 GB, in between."""
    model = tiny_model()
    processor = tiny_processor(model)
    processor.image_processor = clip_processor(336)
    image = Image.new("RGB", size, (255, 0, 0))
    assert largest_memory_of(lambda: processor(images=image, text="<image>")) < 100 * 2**20
    (pixels,) = processor(images=image, text="<image>")["pixel_values"]
    (plain,) = processor(images=Image.new("RGB", (9, 9), (255, 0, 0)), text="<image>")["pixel_values"]
    assert np.array_equal(pixels, plain)


def test_only_what_would_be_large_in_between_is_cut_before():
    processor = clip_processor(336)
    assert middle_of_thin(ordinary := picture(20, 2900), processor) is ordinary
    assert middle_of_thin(picture(20, 3000), processor).size == (336, 336)
    for other in (one_encoder(), image_processor_for(model_config(**SIGLIP)), VisualRWKVImageProcessor()):
        assert middle_of_thin(thin := picture(1, 3000), other) is thin
    for field, value in {"do_center_crop": False, "crop_size": {"height": 224, "width": 224}}.items():
        other = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
        other = type(other)(**{**other.to_dict(), field: value})
        assert middle_of_thin(thin, other) is thin


def test_sizes_of_a_call_are_transformers_own():
    """The thin picture is then cut by transformers, as it was told."""
    processor = tiny_processor(tiny_model())
    image, small = picture(2, 900), {"shortest_edge": 28}
    cut = {"height": 28, "width": 28}
    expected = clip_processor(28)(image)["pixel_values"][0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thin_pictures, "LARGEST_BETWEEN", 1)
        for options in (
            {"size": small, "crop_size": cut},
            {"images_kwargs": {"size": small, "crop_size": cut}},
        ):
            (pixels,) = processor(images=image, text="<image>", **options)["pixel_values"]
            assert np.array_equal(pixels, expected)


# --- refusals ---------------------------------------------------------------------------------------


ENCODER = {"size": 16, **HALF}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"tiling": "tiles"},
            "tiling must be one of none, views, whole_and_tiles, smallest, closest, got 'tiles'",
        ),
        (
            {"tiling": "views"},
            "tile_grid must be above 1 with tiling='views' and 1 otherwise, got 1 with 'views'",
        ),
        ({"tile_grid": 2}, "got 2 with 'none'"),
        ({"tiling": "closest"}, r"got 3: \['dinov2', 'siglip', 'sam'\]"),
        ({"encoders": {"vit": ENCODER}}, r"clip, dinov2, siglip, sam, resnet, got \['vit'\]"),
        ({"encoders": {}}, "got none"),
        ({"encoders": {"sam": {"size": 4}}}, r"encoders\['sam'\] needs size, image_mean and image_std"),
        ({"encoders": {"sam": {**ENCODER, "size": 0}}}, "whole number of pixels from 1, got 0"),
        ({"encoders": {"sam": {**ENCODER, "image_mean": [0.5]}}}, r"three numbers, got \[0.5\]"),
        ({"encoders": {"sam": {**ENCODER, "image_std": [1, 0, 1]}}}, r"above 0, got \[1, 0, 1\]"),
        ({"size": 224}, "has no option size; it has encoders, tiling"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        VisualRWKVImageProcessor(**fields)
    with pytest.raises(ValueError, match=message):
        VisualRWKVImageProcessor()(picture(), **fields)


def test_no_pictures_and_unknown_options_are_refused():
    with pytest.raises(ValueError, match="No pictures given"):
        one_encoder()([])
    with pytest.raises(ValueError, match="no option do_resize, sise"):
        one_encoder()(picture(), do_resize=False, sise=3)


def test_options_that_do_not_exist_are_refused_when_loading_too(tmp_path):
    one_encoder().save_pretrained(tmp_path)
    loaded = VisualRWKVImageProcessor.from_pretrained(tmp_path, tiling="closest")
    assert loaded.tiling == "closest"
    for load in (VisualRWKVImageProcessor.from_pretrained, AutoImageProcessor.from_pretrained):
        with pytest.raises(ValueError, match="has no option do_rescale, size; it has encoders, tiling"):
            load(tmp_path, do_rescale=False, size=32)
