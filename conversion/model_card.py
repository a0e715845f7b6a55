"""The model card of a converted checkpoint."""

from typing import Any, NamedTuple

from visualrwkv_hf.configuration_visualrwkv import VisualRWKVConfig, VisualRWKVTextConfig

METRICS = ("VQAv2", "ScienceQA", "TextVQA", "GQA", "VizWiz", "POPE", "MME", "MMBench", "MMBench-CN")


class Scores(NamedTuple):
    """What a paper reports for a release, and where."""

    title: str
    values: dict[str, float]
    source: str


def _scores(title: str, source: str, **values: float) -> Scores:
    return Scores(title, {name.replace("_", "-"): value for name, value in values.items()}, source)


V6_PAPER = "arXiv 2406.13362, table 2"
HD_PAPER = "arXiv 2410.11665, table 3"
EAGLE_PAPER = "arXiv 2404.05892, table 6"
ORIGINAL_README = "the original repository's README"

PUBLISHED = {
    (5, "clip", 1, 2048): _scores(
        "VisualRWKV-5 1B5", EAGLE_PAPER, GQA=48.5, ScienceQA=46.2, TextVQA=37.8, POPE=81.8
    ),
    (5, "clip", 1, 2560): _scores(
        "VisualRWKV-5 3B", EAGLE_PAPER, GQA=49.7, ScienceQA=58.3, TextVQA=46.4, POPE=81.4
    ),
    (6, "clip", 1, 2048): _scores(
        "VisualRWKV-6 1B6",
        V6_PAPER,
        VQAv2=69.4,
        GQA=55.2,
        ScienceQA=59.1,
        TextVQA=43.6,
        POPE=83.2,
        MME=1204.9,
        MMBench=55.8,
        MMBench_CN=53.2,
    ),
    (6, "clip", 1, 2560): _scores(
        "VisualRWKV-6 3B",
        V6_PAPER,
        VQAv2=71.5,
        GQA=59.6,
        ScienceQA=65.3,
        TextVQA=48.7,
        POPE=83.1,
        MME=1369.2,
        MMBench=59.5,
        MMBench_CN=56.3,
    ),
    (6, "clip", 1, 4096): _scores(
        "VisualRWKV-6 7B",
        V6_PAPER,
        VQAv2=75.8,
        GQA=64.3,
        ScienceQA=68.2,
        TextVQA=51.0,
        POPE=84.7,
        MME=1387.8,
        MMBench=65.8,
        MMBench_CN=63.7,
    ),
    (6, "dinov2", 1, 2048): _scores(
        "VisualRWKV-HD 1B6",
        HD_PAPER,
        ScienceQA=54.39,
        TextVQA=54.71,
        GQA=60.84,
        VizWiz=54.97,
        POPE=86.0,
        MME=1378.62,
        MMBench=60.31,
        MMBench_CN=55.41,
    ),
    (6, "dinov2", 2, 2048): _scores(
        "VisualRWKV-UHD 1B6",
        HD_PAPER,
        ScienceQA=56.97,
        TextVQA=56.31,
        GQA=59.52,
        VizWiz=49.88,
        POPE=85.3,
        MME=1321.33,
        MMBench=58.42,
        MMBench_CN=52.84,
    ),
    (7, "dinov2", 1, 768): _scores(
        "VisualRWKV-7 0B1", ORIGINAL_README, VQAv2=75.22, ScienceQA=50.62, TextVQA=37.90, GQA=59.92
    ),
    (7, "dinov2", 1, 1024): _scores(
        "VisualRWKV-7 0B4", ORIGINAL_README, VQAv2=77.85, ScienceQA=54.98, TextVQA=41.05, GQA=62.30
    ),
    (7, "dinov2", 1, 2048): _scores(
        "VisualRWKV-7 1B5", ORIGINAL_README, VQAv2=79.84, ScienceQA=59.74, TextVQA=49.49, GQA=63.20
    ),
}
"""Scores by generation, first encoder, tile grid and width: a fine-tune of the same shape has others."""

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


def published_scores(config: VisualRWKVConfig | VisualRWKVTextConfig) -> Scores | None:
    """What the papers report for a release of this shape."""
    if isinstance(config, VisualRWKVTextConfig):
        return None
    text, vision = config.text_config, config.vision_config
    return PUBLISHED.get((text.rwkv_version, next(iter(vision.encoders)), vision.tile_grid, text.hidden_size))


def model_card(config: VisualRWKVConfig | VisualRWKVTextConfig) -> str:
    """README.md with its metadata, from the configuration that the converter has written."""
    is_text = isinstance(config, VisualRWKVTextConfig)
    scores = published_scores(config)
    version = config.rwkv_version if is_text else config.text_config.rwkv_version
    title = scores.title if scores else f"{'RWKV' if is_text else 'VisualRWKV'}-{version}"
    parts = [
        _front_matter("text-generation" if is_text else "image-text-to-text"),
        f"# {title}",
        "Converted to Hugging Face transformers by `visualrwkv-hf`; the folder holds the code that loads it.",
        TEXT_USAGE if is_text else IMAGE_USAGE,
    ]
    if scores:
        parts.append(_score_table(scores))
    parts.append(_source_table(config.conversion))
    return "\n\n".join(parts) + "\n"


def _front_matter(task: str) -> str:
    lines = ["license: apache-2.0", "library_name: transformers", f"pipeline_tag: {task}", "tags:", "- rwkv"]
    return "\n".join(["---", *lines, "---"])


def _score_table(scores: Scores) -> str:
    found = [name for name in METRICS if name in scores.values]
    rows = "\n".join(f"| {name} | {scores.values[name]} |" for name in found)
    return (
        f"## Published scores\n\nReported for {scores.title} in {scores.source}; a fine-tune has others.\n\n"
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
