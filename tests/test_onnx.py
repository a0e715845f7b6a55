"""The ONNX graphs in onnxruntime: the model's numbers, and its text without torch."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_training import save_tiny_model, tiny_model, tiny_processor

from visualrwkv_hf import VisualRWKVForConditionalGeneration, VisualRWKVProcessor

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

EXAMPLES = Path(__file__).parents[1] / "examples"
QUESTIONS = ("What is it?", "Which colour?\n\nAnswer the question using a single word or phrase.")
# Sums of up to some hundred products in another order, recurrences token by token where torch takes chunks:
# relative to the largest number, measured 1e-6; float32 rounds by 6e-8.
TOLERANCE = 2e-5

FIELDS = {
    5: dict(scan="unidirectional", image_position="first"),
    6: dict(scan="bidirectional"),
    7: dict(scan="multidirectional", image_position="last", projector="gated_norm"),
}


class Exported:
    """A tiny model, its folder of graphs, and the graphs in onnxruntime."""

    def __init__(self, version: int, folder: Path):
        source = save_tiny_model(folder / "model", version=version, **FIELDS[version])
        self.model = VisualRWKVForConditionalGeneration.from_pretrained(source)
        self.processor = VisualRWKVProcessor.from_pretrained(source)
        self.weights = source / "model.safetensors"
        self.folder = folder / "onnx"
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


def example_module(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=FIELDS)
def exported(request, tmp_path_factory) -> Exported:
    return Exported(request.param, tmp_path_factory.mktemp(f"version{request.param}"))


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
    pixels = torch.randn(count, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    expected = exported.model.get_image_features(pixels, return_dict=True).pooler_output
    assert_close(exported.run("vision", pixel_values=pixels)["image_features"], torch.cat(list(expected)))


def zero_state(exported: Exported, batch: int = 1) -> dict[str, torch.Tensor]:
    inputs = [x for x in exported.sessions["step"].get_inputs() if x.name.startswith("past.")]
    return {x.name: torch.zeros(batch, *x.shape[1:]) for x in inputs}


def as_past(outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.replace("present.", "past."): x for key, x in outputs.items() if key.startswith("present.")}


def state_of(cache) -> dict[str, torch.Tensor]:
    """A cache by the names of the graphs' outputs."""
    state = {}
    for number, layer in enumerate(cache.layers):
        state[f"present.{number}.time_mix_shift"] = layer.token_shift(0)
        state[f"present.{number}.channel_mix_shift"] = layer.token_shift(1)
        state[f"present.{number}.wkv"] = layer.wkv_state()
    return state


@torch.no_grad()
def test_reading_and_stepping_give_the_models_logits_and_state(exported):
    inputs = question_inputs(exported)
    expected = exported.model(**inputs, use_cache=True)
    features = exported.run("vision", pixel_values=inputs["pixel_values"])["image_features"]
    orders = inputs["scan_orders"]
    actual = exported.run(
        "read",
        input_ids=inputs["input_ids"],
        image_features=features,
        scan_orders=orders,
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


WITHOUT_TORCH = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
unwanted = {"torch", "transformers", "visualrwkv_hf"} & set(sys.modules)
assert not unwanted, unwanted
"""


def test_chat_through_onnxruntime_alone_says_what_generate_says(exported, tmp_path):
    expected = answers(exported, max_new_tokens=12)
    picture().save(tmp_path / "picture.png")
    script = [EXAMPLES / "onnx_chat.py", "--max-new-tokens", "12", exported.folder, tmp_path / "picture.png"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *map(str, script), *QUESTIONS],
        capture_output=True,
    )
    assert not done.returncode, done.stderr.decode()
    assert done.stdout.decode() == "".join(text + "\n" for text in expected)


@pytest.mark.parametrize("size", [(90, 60), (60, 91), (56, 56), (3, 200), (1, 1)])
def test_chat_makes_the_pixels_of_the_image_processor(exported, size):
    chat = example_module("onnx_chat").Chat(exported.folder)
    image = picture().resize(size)
    expected = exported.processor.image_processor(image, return_tensors="pt")["pixel_values"]
    # The same resized bytes; float32 arithmetic in another order.
    torch.testing.assert_close(torch.tensor(chat.pixels(image)["pixel_values"]), expected, rtol=0, atol=1e-6)


def test_chat_refuses_reserved_text(exported):
    chat = example_module("onnx_chat").Chat(exported.folder)
    with pytest.raises(ValueError, match="'<image>', which is reserved"):
        next(chat.ask("What is <image>?"))


def test_what_has_no_graph_is_refused(tmp_path):
    from visualrwkv_hf import export_onnx

    model = tiny_model()
    processor = tiny_processor(model)
    with pytest.raises(ValueError, match=r"dtype=torch.float32 for ONNX, got torch.bfloat16"):
        export_onnx(model.bfloat16(), processor, tmp_path)
    model.float()
    processor.pad_prompt_to_multiple_of = 16
    with pytest.raises(ValueError, match="multiple of 16 are not exported"):
        export_onnx(model, processor, tmp_path)
    assert not list(tmp_path.iterdir())
