"""Pictures to pixels: bit-equal to the original's, every kind of picture, and refusals."""

import base64
import hashlib
import io
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
from tiny_training import tiny_model, tiny_processor
from transformers import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from visualrwkv_hf import (
    VisualRWKVConfig,
    VisualRWKVImageProcessor,
    VisualRWKVVisionModel,
    image_processing_visualrwkv,
)
from visualrwkv_hf.image_processing_visualrwkv import (
    HALF,
    TILINGS,
    grid_700,
    grid_boxes,
    image_processor_for,
    middle_of_thin,
    open_picture,
    region_grid,
    squash,
    to_rgb,
)

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


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def one_encoder(size: int = 16, **fields) -> VisualRWKVImageProcessor:
    return VisualRWKVImageProcessor(encoders={"siglip": {"size": size, **HALF}}, **fields)


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
        patch.setattr(image_processing_visualrwkv, "LARGEST_BETWEEN", 0)
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
        patch.setattr(image_processing_visualrwkv, "LARGEST_BETWEEN", 1)
        for options in (
            {"size": small, "crop_size": cut},
            {"images_kwargs": {"size": small, "crop_size": cut}},
        ):
            (pixels,) = processor(images=image, text="<image>", **options)["pixel_values"]
            assert np.array_equal(pixels, expected)


# --- kinds of pictures ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_mode_is_converted_as_pillow_does(mode):
    image = picture().convert("L").convert(mode) if mode == "PA" else picture().convert(mode)
    assert to_rgb(image).mode == "RGB"
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image.convert("RGB")))


def test_transparency_is_dropped_not_blended():
    image = picture().convert("RGBA")
    image.putalpha(0)
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(picture()))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_grey_of_16_bits_is_scaled_not_clipped(mode):
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    image = Image.frombytes(mode, (16, 16), values.astype(dtype).tobytes())
    assert np.array_equal(np.asarray(to_rgb(image)), np.repeat(np.arange(256).reshape(16, 16, 1), 3, axis=-1))


def test_16_bit_png_is_scaled(tmp_path):
    Image.fromarray(np.full((4, 4), 32896, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(open_picture(tmp_path / "deep.png")).tolist() == [[[128] * 3] * 4] * 4


def test_values_outside_a_modes_range_are_refused():
    with pytest.raises(ValueError, match="from 0 to 65535, got -1 to 70000"):
        to_rgb(Image.fromarray(np.array([[-1, 70000]], dtype=np.int32)))
    with pytest.raises(ValueError, match=r"from 0 to 255, got 0 to 256\.5"):
        to_rgb(Image.fromarray(np.array([[0, 256.5]], dtype=np.float32)))


def test_arrays_and_tensors_are_the_picture():
    image = picture()
    pixels = np.asarray(image)
    same = {
        "channels last": pixels,
        "channels first": np.moveaxis(pixels, -1, 0),
        "tensor": torch.from_numpy(pixels.copy()),
        "float": pixels / 255,
        "float16": (pixels / 255).astype(np.float16),
        "float tensor": torch.from_numpy(pixels / 255).permute(2, 0, 1),
        "int64": pixels.astype(np.int64),
        "uint16": pixels.astype(np.uint16) * 257,
        "alpha": np.dstack([pixels, np.zeros((30, 40), dtype=np.uint8)]),
    }
    for name, array in same.items():
        assert np.array_equal(np.asarray(open_picture(array)), pixels), name
    grey = pixels[..., 0]
    for array in (grey, grey[..., None], grey[None], grey / 255):
        assert np.array_equal(np.asarray(open_picture(array)), np.dstack([grey] * 3))
    assert np.asarray(open_picture(np.array([[True, False]]))).tolist() == [[[255] * 3, [0] * 3]]
    batch = one_encoder()(np.stack([pixels, pixels]))["pixel_values"]
    assert np.array_equal(batch[0], batch[1]) and len(batch) == 2


def test_an_array_means_the_same_to_every_tower():
    """transformers' own processors would take True for 1 of 255, and 0.5 for 0.5 of 255."""
    processor = tiny_processor(tiny_model())
    pixels = np.asarray(picture(60, 60))

    def seen(images, **options) -> np.ndarray:
        return np.stack(processor(images=images, text="<image>", **options)["pixel_values"])

    expected = seen(Image.fromarray(pixels))
    first = np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
    for array in (
        pixels,
        first,
        pixels / 255,
        torch.from_numpy(first),
        pixels[None],
        pixels.astype(np.int64),
    ):
        assert np.array_equal(seen(array), expected)
    assert np.array_equal(seen(first, input_data_format="channels_first"), expected)
    assert np.array_equal(seen(pixels / 255, do_rescale=False), seen(first / 255, do_rescale=False))
    white = seen(Image.new("RGB", (60, 60), "white"))
    assert np.array_equal(seen(np.full((60, 60), True)), white)
    for strange in (np.full((9, 9), 1j), np.full((9, 9, 3), "x"), np.full((9, 9, 3), None)):
        with pytest.raises(ValueError, match=r"Picture 0: .* must hold bool, integers or floats, got"):
            seen(strange)


def test_three_by_three_array_asks_for_its_layout():
    pixels = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    last = open_picture(pixels, "channels_last")
    first = open_picture(pixels, "channels_first")
    assert np.array_equal(np.asarray(last), pixels)
    assert np.array_equal(np.asarray(first), np.moveaxis(pixels, 0, -1))


def test_files_paths_and_base64_are_the_picture(tmp_path):
    image, path = picture(), tmp_path / "a.png"
    image.save(path)
    text = base64.b64encode(path.read_bytes()).decode()
    for source in (path, str(path), text, f"data:image/png;base64,{text}", image):
        assert np.array_equal(np.asarray(open_picture(source)), np.asarray(image))
    nested = one_encoder()([[str(path)], [image, path]])["pixel_values"]
    assert len(nested) == 3 and np.array_equal(nested[0], nested[2])


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_picture(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


def test_a_file_is_turned_upright_and_an_opened_picture_is_not(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture(40, 30).save(tmp_path / "turned.png", exif=exif)
    assert open_picture(tmp_path / "turned.png").size == (30, 40)
    assert open_picture(Image.open(tmp_path / "turned.png")).size == (40, 30)


# --- refusals -------------------------------------------------------------------------------------


def truncated_png() -> bytes:
    buffer = io.BytesIO()
    picture(100, 100).save(buffer, "PNG")
    return buffer.getvalue()[:4000]


@pytest.mark.parametrize("content", [b"", b"no picture", truncated_png()], ids=["empty", "text", "truncated"])
def test_file_that_is_no_picture_is_named(tmp_path, content):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"Picture 1: '.*broken\.png' cannot be read as a picture"):
        one_encoder()([picture(), path])


def test_enormous_picture_is_refused_in_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    picture(40, 30).save(tmp_path / "big.png")
    with pytest.raises(ValueError, match=r"big\.png.*1200 pixels.*200 pixels"):
        open_picture(tmp_path / "big.png")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "NoneType cannot be read as a picture: it must be a Pillow picture"),
        ("/no/such/file.png", "'/no/such/file.png' cannot be read"),
        (b"bytes", "bytes cannot be read"),
        (Image.new("RGB", (0, 5)), "it has no pixels: its size is 0 x 5"),
        (np.zeros((0, 4, 3), dtype=np.uint8), r"without pixels: shape \(0, 4, 3\)"),
        (np.zeros((5, 4, 2), dtype=np.uint8), "channel"),
        (np.zeros(4), r"got shape \(4,\)"),
        (np.full((4, 4), 7.5), "dtype float64 must have values from 0 to 1, got 7.5 to 7.5"),
        (np.full((4, 4), np.nan), "got nan to nan"),
        (np.full((4, 4), 1j), "must hold bool, integers or floats, got complex128"),
        (np.full((4, 4, 3), 1, dtype=np.complex64), "got complex64"),
        (np.full((4, 4), "x"), "got <U1"),
        (np.full((4, 4), b"x"), r"got \|S1"),
        (np.full((4, 4), None), "got object"),
        (np.zeros((4, 4), dtype="datetime64[s]"), r"got datetime64\[s\]"),
        (np.zeros((4, 4), dtype=[("r", "u1"), ("g", "u1")]), "floats, got"),
        (torch.zeros(4, 4, dtype=torch.complex64), "got complex64"),
        (np.full((4, 4), 300), "dtype int64 must have values from 0 to 255, got 300 to 300"),
    ],
)
def test_what_is_no_picture_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        open_picture(source)


def test_long_base64_text_is_not_quoted_in_full():
    with pytest.raises(ValueError) as caught:
        open_picture("!" * 100_000)
    assert len(str(caught.value)) < 1000


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
        ({"encoders": {"vit": ENCODER}}, r"clip, dinov2, siglip, sam, got \['vit'\]"),
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
