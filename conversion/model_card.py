"""The model card of a converted checkpoint."""

from collections.abc import Mapping
from typing import Any

from visualrwkv_hf.configuration_visualrwkv import VisualRWKVConfig, VisualRWKVTextConfig

from .releases import METRICS, RELEASES, ReleasedModel, released_model

IMAGE_USAGE = """\
```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "path/or/name"
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
messages = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]}
]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=text, images=Image.open("picture.jpg"), return_tensors="pt")
generated = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""

TEXT_USAGE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/or/name"
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("User: Hello!\\n\\nAssistant:", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```"""


UNTRAINED = (
    "The projector is untrained: train the model before you ask it. The language model and the vision tower are those "
    "of the files below."
)

OTHER_TOKENIZER = (
    "The folder holds no tokenizer, since the vocabulary is not RWKV World's: put the model's own into it."
)


def model_card(
    config: VisualRWKVConfig | VisualRWKVTextConfig, *, is_trained: bool = True, has_tokenizer: bool = True
) -> str:
    """Return README.md with its metadata, from the configuration that the converter has written.

    Args:
        config: of the model.
        is_trained: whether its projector is, in a model with a vision tower.
        has_tokenizer: whether a tokenizer is in the folder.
    """
    is_text = isinstance(config, VisualRWKVTextConfig)
    released = released_model(config)
    parts = [
        _front_matter("text-generation" if is_text else "image-text-to-text"),
        f"# {_title(config, released)}{'' if is_trained else ', untrained'}",
        "Converted to Hugging Face transformers by `visualrwkv-hf`; the folder holds the code that loads it.",
    ]
    if not is_trained:
        parts.append(UNTRAINED)
    if not has_tokenizer:
        parts.append(OTHER_TOKENIZER)
    parts.append(TEXT_USAGE if is_text else IMAGE_USAGE)
    if is_trained and released and released.scores and _is_family_of(config, released):
        parts.append(_score_table(released))
    parts.append(_source_table(config.conversion))
    return "\n\n".join(parts) + "\n"


def _title(config: VisualRWKVConfig | VisualRWKVTextConfig, released: ReleasedModel | None) -> str:
    """Return a release's name if its files were converted, and what a model of the same shape is like otherwise."""
    if released is None:
        kind = "RWKV" if isinstance(config, VisualRWKVTextConfig) else "VisualRWKV"
        return f"{kind}-{config.get_text_config(decoder=True).rwkv_version}"
    files = sorted(source["name"] for source in config.conversion["sources"])
    is_release = _is_family_of(config, released) and files == sorted(released.files)
    return released.title if is_release else f"Shaped like {released.title}"


def _is_family_of(config: VisualRWKVConfig | VisualRWKVTextConfig, released: ReleasedModel) -> bool:
    """Return whether the converter has noted the release's family; others may have the same shape."""
    family = RELEASES.get(config.conversion["family"])
    return family is not None and released in family.models


def _front_matter(task: str) -> str:
    lines = ["license: apache-2.0", "library_name: transformers", f"pipeline_tag: {task}", "tags:", "- rwkv"]
    return "\n".join(["---", *lines, "---"])


def _score_table(released: ReleasedModel) -> str:
    found = [name for name in METRICS if name in released.scores]
    found += sorted(released.scores.keys() - set(METRICS))
    rows = "\n".join(f"| {name} | {released.scores[name]} |" for name in found)
    return (
        f"## Published scores\n\nReported for {released.title} in {released.source}; any other training of this shape "
        f"has others.\n\n"
        f"| benchmark | score |\n|---|---|\n{rows}"
    )


def _source_table(conversion: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| `{source['name']}` | {source['size']} | `{source['sha256']}` |"
        for source in conversion["sources"]
    )
    return (
        f"## Source\n\nConverter version {conversion['converter_version']}.\n\n"
        f"| file | bytes | sha256 |\n|---|---|---|\n{rows}"
    )


def quantization_section(weights: str, errors: Mapping[str, float]) -> str:
    """Return what a card says about weights of few bits.

    Args:
        weights: "int8" or "int4".
        errors: kind of rounding -> by how much it changed the weights, relative to their size.
    """
    rows = "\n".join(f"| {kind} | {100 * error:.2f} % |" for kind, error in errors.items())
    groups = (
        ", those of the blocks in groups of 32 with a scale each, the head's as int8"
        if weights == "int4"
        else ""
    )
    return (
        f"## Weights in {weights}\n\nThe weights of the blocks' linear layers and of the head are rounded to {weights} "
        f"by `visualrwkv quantize`{groups}; int8 has a scale for each row. All other tensors are as before. The files "
        "are in compressed-tensors' format `pack-quantized`: visualrwkv-hf reads them on a CPU as they are, and "
        "transformers reads them everywhere with `pip install compressed-tensors`.\n\n"
        "What rounding changed, as the root of the sum of squares relative to the weights':\n\n"
        f"| weights | change |\n|---|---|\n{rows}\n\n"
        "`examples/quantization_quality.py` of visualrwkv-hf measures on your own questions what that costs; its page "
        "docs/quantization.md has the figures of the small model inside it.\n"
    )
