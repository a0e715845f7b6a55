"""Make model folders as a stranger may send them: damaged, contradictory, endless, or with code in them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

MARKER = "code-has-run"
"""The file that code in a hostile folder creates beside the folder if it is run."""

EVERY = frozenset(("ask", "chat", "caption", "show", "serve", "info"))
PROCESSOR = EVERY - {"info"}
"""Commands that load a processor."""
MODEL = EVERY - {"info", "show"}
"""Commands that load a model."""
NONE: frozenset[str] = frozenset()


class Hostile(NamedTuple):
    """Holds a way to damage a model folder, and the commands that must then refuse it.

    Others may refuse it. Every refusal is one sentence.
    """

    damage: Callable[[Path], None]
    refused_by: frozenset[str]


def changed(name: str, **fields: Any) -> Callable[[Path], None]:
    """Return a function that sets fields of a JSON file; `a__b` is the field b of a, and `...` deletes a field."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        for path, value in fields.items():
            *parents, last = path.split("__")
            place = content
            for parent in parents:
                place = place.setdefault(parent, {})
            if value is ...:
                del place[last]
            else:
                place[last] = value
        (folder / name).write_text(json.dumps(content))

    return damage


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Return a function that writes other content to a file."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def replaced(name: str, make: Callable[[Path], None]) -> Callable[[Path], None]:
    """Return a function that replaces a file by what `make` creates, for example a folder or a pipe."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def code_of(folder: Path) -> str:
    """Return Python code that creates `MARKER` when it is imported, and defines every class that may be asked for."""
    marker = folder.parent / MARKER
    return (
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin, PreTrainedTokenizerFast\n"
        "class Config(PreTrainedConfig):\n    model_type = 'stranger'\n"
        "class Model(PreTrainedModel):\n    config_class = Config\n"
        "class Processor(ProcessorMixin):\n    pass\n"
        "class Tokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )


AUTO_MAP = {
    "AutoConfig": "stranger.Config",
    "AutoModel": "stranger.Model",
    "AutoModelForImageTextToText": "stranger.Model",
    "AutoProcessor": "stranger.Processor",
    "AutoImageProcessor": "stranger.Processor",
    "AutoTokenizer": ["stranger.Tokenizer", "stranger.Tokenizer"],
}


def with_code(*names: str, model_type: str | None = None) -> Callable[[Path], None]:
    """Return a function that adds code to a folder and names it in the `auto_map` of each of these files.

    The code also replaces our own Python files there. With `model_type`, config.json gets that type.
    """

    def damage(folder: Path) -> None:
        for path in [*folder.glob("*.py"), folder / "stranger.py"]:
            path.write_text(code_of(folder))
        for name in names:
            changed(name, auto_map=AUTO_MAP)(folder)
        if model_type:
            changed("config.json", model_type=model_type)(folder)

    return damage


def strange_parts(folder: Path) -> None:
    """Add code, and ask for its tokenizer and processor by the names of their classes, too."""
    with_code("config.json", "processor_config.json", "tokenizer_config.json")(folder)
    changed("tokenizer_config.json", tokenizer_class="Tokenizer")(folder)
    changed("processor_config.json", processor_class="Processor", image_processor__auto_map=AUTO_MAP)(folder)


def pickled(folder: Path) -> None:
    """Replace the weights by a pickle that creates `MARKER` when it is loaded."""

    class Payload:
        def __reduce__(self):
            return (open, (str(folder.parent / MARKER), "w"))

    torch.save({"x": Payload()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def reshaped(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros(7, 3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def not_finite(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def cut_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def endless_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{" * 100)


def index_elsewhere(folder: Path) -> None:
    """Move the weights out of the folder, and let an index of shards refer to them there."""
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def large_file(name: str) -> Callable[[Path], None]:
    """Return a function that extends a file to 10 GB without taking space on the disk."""

    def damage(folder: Path) -> None:
        with open(folder / name, "r+b") as file:
            file.truncate(10**10)

    return damage


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "http://127.0.0.1:9/model", "r": 1})
    )


DEEP = "[" * 200_000
TEXT = "config.json"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"

HOSTILE = {
    # Code.
    "code-in-our-type": Hostile(
        with_code("config.json", "processor_config.json", "tokenizer_config.json"), NONE
    ),
    "code-in-parts": Hostile(strange_parts, NONE),
    "code-of-another-type": Hostile(with_code("config.json", model_type="stranger"), EVERY),
    "code-of-a-stock-type": Hostile(with_code("config.json", model_type="llama"), EVERY),
    "kernel-from-the-hub": Hostile(changed(TEXT, _attn_implementation="stranger/kernel"), NONE),
    "kernel-in-a-part": Hostile(
        changed(TEXT, vision_config__clip_config___attn_implementation="stranger/kernel"), NONE
    ),
    "pickle": Hostile(pickled, MODEL),
    "adapter-of-an-address": Hostile(adapter, MODEL),
    # config.json.
    "config-missing": Hostile(removed("config.json"), EVERY),
    "config-empty": Hostile(written("config.json", ""), EVERY),
    "config-no-json": Hostile(written("config.json", "{"), EVERY),
    "config-binary": Hostile(written("config.json", os.urandom(999)), EVERY),
    "config-list": Hostile(written("config.json", "[]"), EVERY),
    "config-deep": Hostile(written("config.json", DEEP), EVERY),
    "config-large": Hostile(large_file("config.json"), EVERY),
    "config-folder": Hostile(replaced("config.json", Path.mkdir), EVERY),
    "config-pipe": Hostile(replaced("config.json", lambda path: os.mkfifo(path)), EVERY),
    "config-endless": Hostile(replaced("config.json", lambda path: path.symlink_to("/dev/zero")), EVERY),
    "config-type-list": Hostile(changed(TEXT, model_type=["visualrwkv"]), EVERY),
    "config-without-type": Hostile(changed(TEXT, model_type=...), EVERY),
    "config-text-string": Hostile(changed(TEXT, text_config="big"), EVERY),
    "config-text-null-sizes": Hostile(changed(TEXT, text_config__hidden_size="32"), EVERY),
    "config-negative": Hostile(changed(TEXT, text_config__num_hidden_layers=-3), EVERY),
    "config-a-million-layers": Hostile(changed(TEXT, text_config__num_hidden_layers=10**6), EVERY),
    "config-a-million-encoder-layers": Hostile(
        changed(TEXT, vision_config__clip_config__num_hidden_layers=10**6), EVERY
    ),
    "config-huge-vocabulary": Hostile(changed(TEXT, text_config__vocab_size=2**40), EVERY),
    "config-huge-width": Hostile(changed(TEXT, text_config__intermediate_size=2**31), EVERY),
    "config-unknown-scan": Hostile(changed(TEXT, scan="stranger"), EVERY),
    "config-generation-99": Hostile(changed(TEXT, text_config__rwkv_version=99), EVERY),
    "config-other-image-token": Hostile(changed(TEXT, image_token_id=5), PROCESSOR),
    "config-strange-dtype": Hostile(changed(TEXT, dtype="float1"), MODEL),
    "config-strange-quantization": Hostile(
        changed(TEXT, quantization_config={"quant_method": "stranger"}), NONE
    ),
    # Weights.
    "weights-missing": Hostile(removed("model.safetensors"), MODEL | {"info"}),
    "weights-cut": Hostile(cut_weights, MODEL | {"info"}),
    "weights-endless-header": Hostile(endless_header, MODEL | {"info"}),
    "weights-text": Hostile(written("model.safetensors", "hello"), MODEL | {"info"}),
    "weights-reshaped": Hostile(reshaped, MODEL),
    "weights-nan": Hostile(not_finite, MODEL),
    "weights-index-elsewhere": Hostile(index_elsewhere, MODEL),
    # Processor and tokenizer.
    "processor-missing": Hostile(removed("processor_config.json"), PROCESSOR),
    "processor-list": Hostile(written("processor_config.json", "[1]"), PROCESSOR),
    "processor-deep": Hostile(written("processor_config.json", DEEP), PROCESSOR),
    "processor-huge-picture": Hostile(
        changed("processor_config.json", image_processor__size={"shortest_edge": 10**7}), PROCESSOR
    ),
    "processor-strange-size": Hostile(
        changed("processor_config.json", image_processor__size={"shortest_edge": "56"}), PROCESSOR
    ),
    "processor-endless-picture": Hostile(changed("processor_config.json", num_tile_tokens=10**10), PROCESSOR),
    "processor-endless-prompt": Hostile(
        changed("processor_config.json", pad_prompt_to_multiple_of=10**10), PROCESSOR
    ),
    "processor-unknown-class": Hostile(
        changed("processor_config.json", image_processor__image_processor_type="Stranger"), PROCESSOR
    ),
    "tokenizer-missing": Hostile(removed("tokenizer.json"), PROCESSOR),
    "tokenizer-no-json": Hostile(written("tokenizer.json", "{"), PROCESSOR),
    "tokenizer-other-json": Hostile(written("tokenizer.json", "{}"), PROCESSOR),
    "tokenizer-deep": Hostile(written("tokenizer.json", DEEP), PROCESSOR),
    "tokenizer-strange-padding": Hostile(changed("tokenizer_config.json", padding_side="up"), PROCESSOR),
    "tokenizer-config-list": Hostile(written("tokenizer_config.json", "[]"), PROCESSOR),
    "tokenizer-without-image": Hostile(changed("tokenizer_config.json", image_token="<x>"), PROCESSOR),
    # Chat templates.
    "template-syntax": Hostile(written("chat_template.jinja", "{% for %}"), PROCESSOR),
    "template-unknown-name": Hostile(written("chat_template.jinja", "{{ a.b.c }}"), PROCESSOR),
    "template-of-another-kind": Hostile(written("chat_template.jinja", "hello"), PROCESSOR),
    "template-loops": Hostile(written("chat_template.jinja", LOOPS), PROCESSOR),
    "template-memory": Hostile(written("chat_template.jinja", "{{ 'a' * 10 ** 10 }}"), PROCESSOR),
    "template-long": Hostile(written("chat_template.jinja", "{{ '<image>' ~ 'a' * 10 ** 7 }}"), PROCESSOR),
    "template-escape": Hostile(
        written("chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}"), PROCESSOR
    ),
    "template-recursion": Hostile(
        written("chat_template.jinja", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), PROCESSOR
    ),
    "template-binary": Hostile(written("chat_template.jinja", b"\xff\xfe\x00"), PROCESSOR),
    # Generation.
    "generation-no-json": Hostile(written("generation_config.json", "{"), MODEL),
    "generation-many-beams": Hostile(changed("generation_config.json", num_beams=10**6), MODEL),
    "generation-strange-end": Hostile(changed("generation_config.json", eos_token_id="stop"), MODEL),
    "generation-strange-suppressed": Hostile(changed("generation_config.json", suppress_tokens="abc"), MODEL),
    "generation-by-code-of-the-hub": Hostile(
        changed("generation_config.json", penalty_alpha=0.6, top_k=4, do_sample=False), MODEL
    ),
}


def make_hostile(name: str, whole: Path, folder: Path) -> Path:
    """Copy a good model to `folder`, and damage it."""
    shutil.copytree(whole, folder)
    HOSTILE[name].damage(folder)
    return folder
