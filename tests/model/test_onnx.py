"""The ONNX graphs of every family in onnxruntime: the model's numbers, and its text without torch."""

import importlib.util
import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from paths import EXAMPLES
from PIL import Image
from tiny import awake, text_config
from tiny_training import tiny_model, tiny_processor

from visualrwkv_hf import VisualRWKVConfig, VisualRWKVForConditionalGeneration, VisualRWKVProcessor
from visualrwkv_hf.conversion.releases import RELEASES
from visualrwkv_hf.image_processing_visualrwkv import TILINGS, image_processor_for
from visualrwkv_hf.inference.onnx_export import (
    GRAPHS,
    WEIGHTS,
    cutting_recipe,
    pixel_names,
    pixel_recipes,
    save_graphs,
    span_orders,
    window_means,
)
from visualrwkv_hf.scan_orders import sequence_orders

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

QUESTIONS = ("What is it?", "Which colour?\n\nAnswer the question using a single word or phrase.")
# Sums of up to some hundred products in another order, recurrences token by token where torch takes chunks:
# relative to the largest number, measured 1e-6; float32 rounds by 6e-8.
TOLERANCE = 2e-5

VIT = dict(hidden_size=16, num_attention_heads=2, patch_size=7)
SAM = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4)
ENCODERS = {
    "clip": dict(**VIT, image_size=28, intermediate_size=24),
    "dinov2": dict(**VIT, image_size=28, mlp_ratio=2),
    "siglip": dict(**VIT, image_size=28, intermediate_size=24),
    "sam": dict(**SAM, output_channels=2, global_attn_indexes=[1], window_size=3),
}
"""Of 4 x 4 patches; SigLIP alone of 3 x 3, so that the compressor fills up its 9 tokens a tile to 16."""

PROJECTORS = {5: "linear", 6: "linear", "v6.01": "linear_flip", "hd": "gated", "uhd": "relu", 7: "gated_norm"}
FEWER_TOKENS = {"v7.03": {"compressor_num_tokens": 20}, "v7.04": {"compressor_num_tokens": 4}}
LAYERS = {"v6.01": 3}  # the third reads columns
MULTIPLE = {"v7.00": 16, "v7.04": 16}


def family_config(name: str) -> VisualRWKVConfig:
    family = RELEASES[name]
    fields = {**family.fields, **FEWER_TOKENS.get(name, {})}
    text = dict(vocab_size=1024, hidden_size=32, num_hidden_layers=LAYERS.get(name, 2))
    text |= fields.pop("text_config", {})
    depth = {"num_hidden_layers": -family.vision.get("feature_layer", -1)}  # one block is left
    encoders = {f"{encoder}_config": depth | ENCODERS[encoder] for encoder in family.encoders}
    if family.encoders == ("siglip",):
        encoders["siglip_config"]["image_size"] = 21
    return VisualRWKVConfig(
        text_config=text_config(family.rwkv_version, **text).to_dict(),
        vision_config=encoders | family.vision,
        image_token_id=1023,
        projector=PROJECTORS.get(name, PROJECTORS[family.rwkv_version]),
        compressor_num_layers=2 * family.has_compressor,
        **fields,
    )


def family_model(name: str) -> VisualRWKVForConditionalGeneration:
    """Its weights are random part by part, so that families share a language model."""
    torch.manual_seed(0)
    model = VisualRWKVForConditionalGeneration(family_config(name))
    for part in (*model.model.children(), model.lm_head):
        awake(part)
    model.generation_config.eos_token_id = [0, 261]  # as a converted one
    return model


def family_processor(name: str, model: VisualRWKVForConditionalGeneration) -> VisualRWKVProcessor:
    processor = tiny_processor(model)
    processor.image_processor = image_processor_for(model.config, RELEASES[name].tiling)
    processor.pad_prompt_to_multiple_of = MULTIPLE.get(name)
    return processor


class Exported:
    """A tiny model of a family, its folder of graphs, and the graphs in onnxruntime."""

    def __init__(self, family: str, folder: Path):
        source = folder / "model"
        model = family_model(family)
        model.save_pretrained(source)
        family_processor(family, model).save_pretrained(source)
        self.model = VisualRWKVForConditionalGeneration.from_pretrained(source)
        self.processor = VisualRWKVProcessor.from_pretrained(source)
        self.weights = source / "model.safetensors"
        self.folder = folder / "onnx"
        with patch.dict(GRAPHS, {name: as_before(name, trace) for name, trace in GRAPHS.items()}):
            example_module("export_onnx").main(str(source), self.folder)
        self.sessions = {
            name: onnxruntime.InferenceSession(self.folder / f"{name}.onnx")
            for name in ("vision", "read", "step")
        }

    def run(self, name: str, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """A graph's outputs by their names; dots of inputs' names may be given as double underscores."""
        session = self.sessions[name]
        feed = {key.replace("__", "."): value.numpy() for key, value in inputs.items()}
        outputs = session.run(None, feed)
        return {output.name: torch.tensor(x) for output, x in zip(session.get_outputs(), outputs)}

    @property
    def chat_json(self) -> dict:
        return json.loads((self.folder / "chat.json").read_text("utf-8"))


TRACED: dict[tuple, object] = {}


def as_before(name: str, trace):
    """`trace`, once for the families that share a language model or all that `vision.onnx` holds: half as long."""

    def traced(model: VisualRWKVForConditionalGeneration):
        config, text = model.config, model.config.text_config
        language_model = (text.rwkv_version, text.num_hidden_layers, config.scan)
        key = (name, config.to_json_string() if name == "vision" else language_model)
        if key not in TRACED:
            TRACED[key] = trace(model)
        return TRACED[key]

    return traced


@cache
def example_module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=RELEASES)
def exported(request, tmp_path_factory) -> Exported:
    return Exported(request.param, tmp_path_factory.mktemp("family"))


def picture() -> Image.Image:
    return Image.radial_gradient("L").resize((90, 60)).convert("RGB")


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


def question_inputs(exported: Exported, question: str = QUESTIONS[0]) -> dict[str, torch.Tensor]:
    content = [{"type": "image", "image": picture()}, {"type": "text", "text": question}]
    return exported.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"return_scan_orders": True},
    )


@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_vision_graph_gives_the_models_picture_tokens(exported, count):
    """Of several pictures; of one picture of several tiles, where they are compressed."""
    config, generator = exported.model.config, torch.Generator().manual_seed(0)
    pieces = count * config.vision_config.num_views
    pixels = {
        name: torch.randn(pieces, 3, size, size, generator=generator)
        for name, size in zip(pixel_names(config), config.vision_config.image_sizes.values())
    }
    tiles = {"num_tiles": torch.tensor([count])} if config.compressor_num_layers else {}
    expected = exported.model.get_image_features(**pixels, **tiles, return_dict=True).pooler_output
    assert_close(exported.run("vision", **pixels)["image_features"], torch.cat(list(expected)))


@pytest.mark.parametrize("length", [9, 16, 20, 45, 64])
@pytest.mark.parametrize("count", [1, 16, 20])
def test_window_means_are_torchs_adaptive_average(length, count):
    tokens = torch.randn(2, length, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.adaptive_avg_pool1d(tokens.transpose(1, 2), count).transpose(1, 2)
    # A weight such as 1/3 is a float32 before it is a float64.
    torch.testing.assert_close(window_means(tokens, count), expected, rtol=0, atol=1e-6)


def zero_state(exported: Exported, batch: int = 1) -> dict[str, torch.Tensor]:
    inputs = [x for x in exported.sessions["step"].get_inputs() if x.name.startswith("past.")]
    return {x.name: torch.zeros(batch, *x.shape[1:]) for x in inputs}


def as_past(outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.replace("present.", "past."): x for key, x in outputs.items() if key.startswith("present.")}


def state_of(cache) -> dict[str, torch.Tensor]:
    """A cache by the names of the graphs' outputs."""
    state = {}
    for number, layer in enumerate(cache.layers):
        tensors = layer.tensors()
        state[f"present.{number}.time_mix_shift"] = tensors["token_shift0"]
        state[f"present.{number}.channel_mix_shift"] = tensors["token_shift1"]
        state[f"present.{number}.wkv"] = tensors["wkv"]
    return state


@torch.no_grad()
def test_reading_and_stepping_give_the_models_logits_and_state(exported):
    inputs = question_inputs(exported)
    expected = exported.model(**inputs, use_cache=True)
    pixels = {name: inputs[name] for name in pixel_names(exported.model.config)}
    actual = exported.run(
        "read",
        input_ids=inputs["input_ids"],
        image_features=exported.run("vision", **pixels)["image_features"],
        scan_orders=inputs["scan_orders"],
        **zero_state(exported),
    )
    assert_close(actual["logits"], expected.logits[:, -1])
    for name, state in state_of(expected.past_key_values).items():
        assert_close(actual[name], state)

    token = torch.tensor([[65]])
    after = exported.model(input_ids=token, past_key_values=expected.past_key_values, use_cache=True)
    stepped = exported.run("step", input_ids=token, **as_past(actual))
    assert_close(stepped["logits"], after.logits[:, -1])
    for name, state in state_of(after.past_key_values).items():
        assert_close(stepped[name], state)


@torch.no_grad()
def test_a_step_takes_several_samples(exported):
    state = {name: torch.randn(3, *x.shape[1:]) for name, x in zero_state(exported).items()}
    tokens = torch.tensor([[65], [66], [67]])
    together = exported.run("step", input_ids=tokens, **state)
    for row in range(3):
        alone = exported.run(
            "step", input_ids=tokens[row : row + 1], **{name: x[row : row + 1] for name, x in state.items()}
        )
        assert_close(together["logits"][row : row + 1], alone["logits"])


def test_graphs_share_their_weights(exported):
    shared = (exported.folder / "weights.data").stat().st_size
    assert shared < 1.1 * exported.weights.stat().st_size


def answers(exported: Exported, max_new_tokens: int) -> list[str]:
    """What `generate()` says to one question, and to that, its own words and another question."""
    inputs = question_inputs(exported)
    del inputs["scan_orders"], inputs["attention_mask"]
    tokenizer, ids, texts = exported.processor.tokenizer, inputs.pop("input_ids"), []
    for follow_up in (QUESTIONS[1].replace("\n\n", "\n"), None):
        output = exported.model.generate(
            input_ids=ids, **inputs, max_new_tokens=max_new_tokens, do_sample=False
        )
        texts.append(tokenizer.decode(output[0, ids.shape[1] :]))
        ids = torch.cat(
            [output, tokenizer(f"\n\nUser: {follow_up}\n\nAssistant:", return_tensors="pt").input_ids], 1
        )
    return texts


def test_chat_says_what_generate_says(exported):
    chat = example_module("onnx_chat").Chat(exported.folder)
    said = ["".join(chat.ask(QUESTIONS[0], picture(), 12)), "".join(chat.ask(QUESTIONS[1], None, 12))]
    assert said == answers(exported, max_new_tokens=12)


WITHOUT_TORCH = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
unwanted = {"torch", "transformers", "visualrwkv_hf"} & set(sys.modules)
assert not unwanted, unwanted
"""


@pytest.mark.parametrize("exported", ["v7.04"], indirect=True)
def test_chat_needs_onnxruntime_alone(exported, tmp_path):
    picture().save(tmp_path / "picture.png")
    script = [EXAMPLES / "onnx_chat.py", "--max-new-tokens", "12", exported.folder, tmp_path / "picture.png"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *map(str, script), *QUESTIONS],
        capture_output=True,
    )
    assert not done.returncode, done.stderr.decode()
    assert done.stdout.decode() == "".join(text + "\n" for text in answers(exported, max_new_tokens=12))


def assert_same_pixels(image: Image.Image, description: dict, image_processor) -> None:
    actual = example_module("onnx_chat").pixels_of(image, description)
    expected = image_processor(image, return_tensors="pt")
    assert set(actual) == {name for name in expected if name.startswith("pixel_values")}
    for name, pixels in actual.items():
        # The same resized bytes; float32 arithmetic in another order.
        torch.testing.assert_close(torch.tensor(pixels), expected[name], rtol=0, atol=1e-6)


SIZES = [(90, 60), (60, 91), (56, 56), (21, 21), (3, 200), (1, 1), (57, 28)]


def test_chat_makes_the_pixels_of_the_image_processor(exported):
    for size in SIZES:
        assert_same_pixels(picture().resize(size), exported.chat_json, exported.processor.image_processor)


@pytest.mark.parametrize("tiling", TILINGS)
def test_chat_cuts_a_picture_as_the_image_processor_does(tiling):
    config = family_config("uhd" if tiling == "views" else "v7.01" if tiling != "none" else "hd")
    image_processor = image_processor_for(config, tiling)
    recipes = pixel_recipes(config, image_processor)
    pieces = cutting_recipe(image_processor, recipes["pixel_values"]["size"])
    description = json.loads(json.dumps({"pieces": pieces, "pixels": recipes}))
    sides = (1, 20, 21, 22, 33, 42, 63, 70, 115)
    for size in ((width, height) for width in sides for height in sides):
        assert_same_pixels(picture().resize(size), description, image_processor)


def test_chat_reads_every_tile_of_a_picture_in_the_models_orders():
    model = tiny_model(scan="multidirectional")  # 17 tokens a tile, the last of which stays
    ids = torch.tensor([[5, 6, *[model.config.image_token_id] * 34, 7]])
    description = {"scan_orders": span_orders(model), "image_token_id": model.config.image_token_id}
    chat = SimpleNamespace(config=description)
    actual = example_module("onnx_chat").Chat.scan_orders(chat, ids.numpy())
    expected = sequence_orders(ids == model.config.image_token_id, "multidirectional", 4, 4, trailing=1)
    assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize("exported", MULTIPLE, indirect=True)
def test_chat_fills_up_its_first_prompt_alone(exported):
    chat = example_module("onnx_chat").Chat(exported.folder)
    lengths = []
    chat.run = lambda session, inputs: lengths.append(inputs["input_ids"].shape[1])
    chat.read_prompt(QUESTIONS[0], picture())
    chat.read_prompt(QUESTIONS[1], None)
    first, second = lengths
    assert first == question_inputs(exported)["input_ids"].shape[1] and first % 16 == 0
    assert second == len(chat.tokenizer.encode(chat.prompt(QUESTIONS[1], False)).ids) and second % 16


@pytest.mark.parametrize("exported", ["v5.0"], indirect=True)
def test_chat_refuses_reserved_text(exported):
    chat = example_module("onnx_chat").Chat(exported.folder)
    with pytest.raises(ValueError, match="'<image>', which is reserved"):
        next(chat.ask("What is <image>?"))


@pytest.mark.parametrize("exported", ["v5.0"], indirect=True)
def test_an_export_is_replaced_and_nothing_else(exported, tmp_path):
    from visualrwkv_hf import export_onnx

    folder = tmp_path / "onnx"
    shutil.copytree(exported.folder, folder)
    model, names = tiny_model(), {path.name for path in folder.iterdir()}
    (folder / "chat.json").write_text("old")
    assert export_onnx(model, tiny_processor(model), folder) == folder
    assert {path.name for path in folder.iterdir()} == names and json.loads(
        (folder / "chat.json").read_text()
    )
    assert [*tmp_path.iterdir()] == [folder]
    (folder / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds thesis\.tex, which is no part of an export"):
        export_onnx(model, tiny_processor(model), folder)
    with pytest.raises(ValueError, match="is a file"):
        export_onnx(model, tiny_processor(model), folder / "thesis.tex")


def test_graphs_are_written_again_after_their_folder_has_moved(exported, tmp_path):
    folder, moved = tmp_path / "written", tmp_path / "moved"
    graphs = {name: graph for (name, _), graph in TRACED.items()}
    for again in (False, True):
        folder.mkdir()
        save_graphs(graphs, folder)
        if not again:
            folder.rename(moved)
    assert {path.name for path in folder.iterdir()} == {*(f"{name}.onnx" for name in graphs), WEIGHTS}
    assert all(path.read_bytes() == (moved / path.name).read_bytes() for path in folder.iterdir())


def test_another_dtype_is_refused(tmp_path):
    from visualrwkv_hf import export_onnx

    model = tiny_model()
    with pytest.raises(ValueError, match=r"dtype=torch.float32 for ONNX, got torch.bfloat16"):
        export_onnx(model.bfloat16(), tiny_processor(model), tmp_path)
    assert not list(tmp_path.iterdir())
