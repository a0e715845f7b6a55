"""Size, speed and agreement of a model with its weights rounded, by every library that does it on a CPU.

    pip install -e ".[quantization]"
    python examples/benchmark_quantization.py                       # the model inside the package
    python examples/benchmark_quantization.py --model visualrwkv-6-1b6 --pictures 4

All answer the same questions about the same drawn pictures, greedily; an answer agrees if it is the one in float32,
word for word. A library that is not installed has a row that says so.
"""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from benchmarking import interleaved, machine, markdown_table, readable, readable_bytes, report
from PIL import Image, ImageDraw
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    QuantoConfig,
    TorchAoConfig,
)

from visualrwkv_hf import VisualRWKVCache, accelerate_on_cpu, bundled_model

QUESTIONS = ("what is in the picture?", "what color is the shape?", "what shape is present?")
COLORS = ("red", "green", "blue", "yellow", "black", "gray", "brown", "teal")
SHAPES: dict[str, Callable[[ImageDraw.ImageDraw, tuple[int, ...], str], None]] = {
    "circle": lambda draw, box, color: draw.ellipse(box, color),
    "rectangle": lambda draw, box, color: draw.rectangle(box, color),
    "triangle": lambda draw, box, color: draw.regular_polygon((32, 32, 22), 3, fill=color),
}


def load(source: str, dtype: torch.dtype = torch.float32, config: Any = None) -> torch.nn.Module:
    quantised = {} if config is None else {"quantization_config": config}
    return AutoModelForImageTextToText.from_pretrained(
        source, dtype=dtype, trust_remote_code=False, **quantised
    ).eval()


def torchao_int8(source: str) -> torch.nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig

    return load(source, config=TorchAoConfig(Int8WeightOnlyConfig()))


ENGINES: dict[str, tuple[str | None, Callable[[str], torch.nn.Module]]] = {
    "float32": (None, load),
    "bfloat16": (None, lambda source: load(source, torch.bfloat16)),
    "native float32": (None, lambda source: accelerate_on_cpu(load(source))),
    "native bfloat16": (None, lambda source: accelerate_on_cpu(load(source, torch.bfloat16))),
    "native int8": (None, lambda source: accelerate_on_cpu(load(source), int8=True)),
    "torchao int8": ("torchao", torchao_int8),
    "bitsandbytes int8": (
        "bitsandbytes",
        lambda source: load(source, config=BitsAndBytesConfig(load_in_8bit=True)),
    ),
    "quanto int8": ("optimum.quanto", lambda source: load(source, config=QuantoConfig(weights="int8"))),
}
"""Name -> the module that it needs, and how a model is loaded."""


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it is in
        return False


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all weights, scales included."""
    return sum(plain.nbytes for tensor in model.state_dict().values() for plain in plain_tensors(tensor))


def plain_tensors(tensor: Any) -> Iterator[torch.Tensor]:
    """Return the tensors that make up a quantised tensor."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, name))
    elif isinstance(tensor, torch.Tensor):
        yield tensor


def drawings(count: int) -> list[Image.Image]:
    """Shapes of one colour each, 64 x 64."""
    pictures = []
    for number in range(count):
        picture = Image.new("RGB", (64, 64), "white")
        shape = list(SHAPES.values())[number % len(SHAPES)]
        shape(ImageDraw.Draw(picture), (14, 18, 50, 46), COLORS[number % len(COLORS)])
        pictures.append(picture)
    return pictures


def prompts(processor: Any, count: int) -> list[Any]:
    """The inputs of every question about every picture."""
    chats = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}],
            }
        ]
        for picture in drawings(count)
        for question in QUESTIONS
    ]
    options = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    return [processor.apply_chat_template(chat, **options) for chat in chats]


def answers(model: torch.nn.Module, inputs: list[Any]) -> list[list[int]]:
    """The new ids of each greedy answer."""
    return [
        model.generate(**x.to(dtype=model.dtype), max_new_tokens=12, do_sample=False)[
            0, x["input_ids"].shape[1] :
        ].tolist()
        for x in inputs
    ]


def stepping(model: torch.nn.Module, inputs: Any) -> Callable[[], object]:
    """Read one token after the prompt, and one more at each further call."""
    cache = VisualRWKVCache(model.config)
    model(**inputs.to(dtype=model.dtype), past_key_values=cache, use_cache=True)
    token = inputs["input_ids"][:, -1:]
    return lambda: model(input_ids=token, past_key_values=cache, use_cache=True)


def agreement(found: list[list[int]], expected: list[list[int]]) -> str:
    return f"{sum(map(list.__eq__, found, expected))} of {len(expected)}"


@torch.inference_mode()
def main(
    model: Annotated[
        str | None, typer.Option(help="A folder or a Hub id; the model inside if not given.")
    ] = None,
    pictures: Annotated[int, typer.Option(min=1, help=f"Each is asked {len(QUESTIONS)} questions.")] = 24,
    seconds: Annotated[float, typer.Option(help="To measure each.")] = 3.0,
    threads: Annotated[int | None, typer.Option(help="Of the CPU.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the numbers to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the table to this file.")] = None,
) -> None:
    """Size, speed and agreement of rounded weights."""
    if threads:
        torch.set_num_threads(threads)
    source = model or str(bundled_model())
    inputs = prompts(AutoProcessor.from_pretrained(source, trust_remote_code=False), pictures)
    missing = [name for name, (module, _) in ENGINES.items() if module and not is_installed(module)]
    models = {name: engine(source) for name, (_, engine) in ENGINES.items() if name not in missing}
    times = interleaved({name: stepping(vlm, inputs[0]) for name, vlm in models.items()}, seconds=seconds)
    expected = answers(models["float32"], inputs)
    rows = [
        {
            "weights": name,
            "bytes": readable_bytes(weight_bytes(models[name])),
            "a token": readable(times[name].median),
            "answers as in float32": agreement(answers(models[name], inputs), expected),
        }
        if name in models
        else {"weights": name, "bytes": None, "a token": None, "answers as in float32": "not installed"}
        for name in ENGINES
    ]
    here = ", ".join(f"{key} {value}" for key, value in machine().items())
    source_name = "The model inside the package" if model is None else source
    report(f"{source_name}; {here}.\n\n{markdown_table(rows)}", rows, markdown, json)


if __name__ == "__main__":
    typer.run(main)
