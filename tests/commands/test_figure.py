"""`visualrwkv show`: the figure shows what the model is given, in the order in which it reads it."""

import sys

import numpy as np
import pytest
from PIL import Image
from tiny import text_config, vlm_config
from tiny_training import save_tiny_model, tiny_model, tiny_processor
from transformers import AutoConfig
from typer.testing import CliRunner

from visualrwkv_hf import VisualRWKVForCausalLM, VisualRWKVImageProcessor, VisualRWKVProcessor
from visualrwkv_hf.cli.app import app
from visualrwkv_hf.image_processing_visualrwkv import image_processor_for
from visualrwkv_hf.inference import reading_figure
from visualrwkv_hf.inference.figure import Item, as_seen, prompt_items, what_is_seen, wrapped
from visualrwkv_hf.scan_orders import SCANS, grid_permutation

QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.radial_gradient("L").convert("RGB").resize((80, 60)).save(path)
    return path


def run_show(*arguments):
    return CliRunner().invoke(app, ["show", *map(str, arguments)])


@pytest.mark.parametrize("suffix, mark", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_a_figure_is_written_in_the_format_of_its_name(suffix, mark, folder, picture, tmp_path):
    figure = tmp_path / f"figure.{suffix}"
    result = run_show(picture, "--model", folder, "--output", figure)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == str(figure)
    assert figure.read_bytes().startswith(mark) and figure.stat().st_size > 20_000


@pytest.mark.parametrize("scan", SCANS)
def test_the_way_is_drawn_in_the_order_of_the_scan(scan, folder, picture):
    figure = reading_figure(picture, QUESTION, str(folder), scan=scan)
    panels = [axes for axes in figure.axes if axes.get_title(loc="left").startswith("Layer")]
    assert len(panels) == 2  # the tiny model has no more layers
    for layer, axes in enumerate(panels):
        order = grid_permutation(scan, layer, 4, 4)
        drawn = axes.images[1].get_array()  # the ramp over the picture
        assert np.argsort(np.asarray(drawn).ravel()).tolist() == order.tolist()
        steps = sum(len(lines.get_segments()) for lines in axes.collections[:2])
        assert steps == 15


def test_the_picture_is_drawn_as_the_encoder_reads_it(folder, picture):
    figure = reading_figure(picture, QUESTION, str(folder))
    drawn = np.asarray(figure.axes[0].images[0].get_array())
    # CLIP's processor: the shorter edge to 56, the centre cut out.
    expected = Image.open(picture).resize((74, 56), Image.Resampling.BICUBIC).crop((9, 0, 65, 56))
    assert np.abs(drawn - np.asarray(expected) / 255).max() < 0.02  # 8 bits, and where a centre is rounded to
    assert "56 x 56 pixels in 4 x 4 patches" in figure.axes[0].get_title(loc="left")


@pytest.mark.parametrize("position", ["first", "middle", "last"])
def test_the_prompt_is_what_the_model_reads(position, folder, picture):
    processor = VisualRWKVProcessor.from_pretrained(folder)
    seen = what_is_seen(picture, QUESTION, AutoConfig.from_pretrained(folder), processor, position)
    *items, answer = prompt_items(seen.tokens, processor)
    texts = ["<image>" if item.is_picture else item.text for item in items]
    wanted = {
        "first": f"User: <image>\n{QUESTION}",
        "middle": f"User: {QUESTION}\n<image>\n{QUESTION}",
        "last": f"User: {QUESTION}\n<image>",
    }[position] + "\n\nAssistant:"
    assert "".join(texts).replace("\u21b5", "\n").replace("\u00b7", " ") == wanted
    assert [item.text for item in items if item.is_picture] == ["17 tokens"]
    assert answer.text.startswith("answer")
    figure = reading_figure(picture, QUESTION, str(folder), image_position=position)
    drawn = [text.get_text() for text in figure.axes[-1].texts]
    assert drawn == [item.text for item in (*items, answer)]


def test_no_box_is_left_out_or_stands_beyond_the_edge():
    items = [Item("x" * n, "") for n in (1, 30, 5, 200, 1, 1)]
    rows = list(wrapped(items, 300))
    assert [item for row in rows for _, item in row] == items
    assert all(left + item.width <= 300 or left == 0 for row in rows for left, item in row)
    assert [len(row) for row in rows] == [3, 1, 2]


SIGLIP = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=56,
    patch_size=14,
)
DINOV2 = SIGLIP | {"mlp_ratio": 2}
VARIANTS = {
    "two encoders and views": dict(vision_config=dict(siglip_config=SIGLIP, dinov2_config=DINOV2, tile_grid=2)),
    "pooled": dict(pooling="adaptive", pooled_grid_size=2),
    "one token": dict(pooling="mean"),
    "class token only": dict(pooling="class_token"),
    "compressed": dict(
        version=7, scan="unidirectional", compressor_num_layers=1, compressor_num_tokens=4,
        vision_config=dict(siglip_config=SIGLIP),
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_model_is_drawn(variant, picture, tmp_path):
    model = tiny_model(**VARIANTS[variant])
    model.save_pretrained(tmp_path)
    tiny_processor(model).save_pretrained(tmp_path)
    result = run_show(picture, "--model", tmp_path, "--output", tmp_path / "figure.png")
    assert result.exit_code == 0, result.stderr


def test_tiles_stand_side_by_side(tmp_path):
    model = tiny_model(vision_config=dict(siglip_config=SIGLIP))
    processor = tiny_processor(model)
    processor.image_processor = image_processor_for(model.config, "closest")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    wide = Image.new("RGB", (168, 56), "red")
    figure = reading_figure(wide, QUESTION, str(tmp_path))
    assert "3 pieces, each 56 x 56 pixels" in figure.axes[0].get_title(loc="left")
    assert "48 of them" in figure.axes[-1].get_title(loc="left")
    assert figure.axes[0].images[0].get_array().shape == (112, 112, 3)


def test_pixels_come_back_as_colours():
    noise = np.random.default_rng(0).normal((200, 60, 120), 20, (56, 56, 3))
    picture = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
    for processor in (image_processor_for(vlm_config()), VisualRWKVImageProcessor()):
        values = processor(picture, return_tensors="np")["pixel_values"]
        colours = as_seen(np.asarray(values), processor)
        assert colours.min() >= 0 and colours.max() <= 1
        means = [part.mean((0, 1)) for part in (colours[0], np.asarray(picture) / 255)]
        assert np.abs(means[0] - means[1]).max() < 0.01  # resized, so not to the bit


# Refusals: one sentence, nothing written.


def refused(*arguments):
    result = run_show(*arguments)
    assert result.exit_code == 1 and result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.strip()]
    assert line.startswith("Error: ")
    return line


def test_what_cannot_be_drawn_is_refused_in_one_sentence(folder, picture, tmp_path):
    to = ["--model", folder, "--output", tmp_path / "figure.png"]
    (tmp_path / "text.png").write_text("hello")
    assert "There is no picture none.png" in refused("none.png", *to)
    assert "cannot be read as a picture" in refused(tmp_path / "text.png", *to)
    assert "Unknown scan 'round'" in refused(picture, "--scan", "round", *to)
    assert "image_position must be" in refused(picture, "--image-position", "behind", *to)
    assert "contains '<image>'" in refused(picture, "--question", "<image>", *to)
    assert "xyz" in refused(picture, "--model", folder, "--output", tmp_path / "figure.xyz")
    assert "No such file" in refused(picture, "--model", folder, "--output", tmp_path / "none" / "figure.png")
    assert not (tmp_path / "figure.png").exists()


def test_a_language_model_sees_nothing(folder, picture, tmp_path):
    VisualRWKVForCausalLM(text_config(7)).save_pretrained(tmp_path)
    tiny_processor(tiny_model()).save_pretrained(tmp_path)
    line = refused(picture, "--model", tmp_path, "--output", tmp_path / "figure.png")
    assert "holds a language model, which reads no pictures" in line


def test_without_matplotlib_it_says_how_to_get_it(folder, picture, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    line = refused(picture, "--model", folder, "--output", tmp_path / "figure.png")
    assert 'pip install "visualrwkv-hf[show]"' in line
