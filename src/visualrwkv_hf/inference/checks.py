"""Refuse a model folder that would hang, fill the memory or contradict itself, before it does.

A folder may come from a stranger. Each check names what is wrong and its limit; the limits are far above every release.
"""

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..chat_template import release_chat_template

MAX_TEXT_FILE_BYTES = 64 * 2**20
"""Largest JSON or template file that is read. The tokenizer of the releases takes 4 MB."""

MAX_TEMPLATE_CHARACTERS = 200_000
MAX_LAYERS = 512
"""Largest number of layers of the language model, of an encoder or of the compressor. Releases have at most 61."""

MAX_SIDE = 8192
"""Largest side of a picture, in pixels, that an image processor may ask for. Releases have at most 1024."""

MAX_TILE_GRID = 32
MAX_PROMPT_MULTIPLE = 4096
MAX_BEAMS = 64

SPARE_PARAMETERS = 10_000_000
MAX_PARAMETERS_PER_BYTE = 4
"""A configuration may describe this many parameters per byte of the weights' files: two bits each, and some spare."""

TEXT_SUFFIXES = (".json", ".jinja")


def refuse_strange_files(folder: Path) -> None:
    """Raise `ValueError` if a text file of the folder is larger than any should be, or is no regular file."""
    for path in sorted(folder.iterdir()):
        if path.suffix not in TEXT_SUFFIXES:
            continue
        if not path.is_file():
            raise ValueError(f"{path} is not a file.")
        size = path.stat().st_size
        if size > MAX_TEXT_FILE_BYTES:
            raise ValueError(f"{path} has {size} bytes, at most {MAX_TEXT_FILE_BYTES} are read.")


def refuse_strange_index(index: Mapping[str, Any], path: Path) -> None:
    """Raise `ValueError` if an index of shards names a file outside its folder.

    Args:
        index: the content of `model.safetensors.index.json`.
        path: that file.
    """
    names = index.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"weight_map in {path} must be an object of file names.")
    for name in sorted(set(names.values())):
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ValueError(
                f"weight_map in {path} names {name!r}, which is no safetensors file of this folder."
            )


def refuse_strange_layers(config: Any, folder: Path) -> None:
    """Raise `ValueError` for layers without end in a `VisualRWKVConfig` or `VisualRWKVTextConfig` of `folder`."""
    for where, number in _layers_of(config.to_dict()):
        if number > MAX_LAYERS:
            raise ValueError(
                f"{where} in {folder / 'config.json'} must be at most {MAX_LAYERS}, got {number}."
            )


def refuse_strange_size(config: Any, folder: Path, quick: bool = False) -> None:
    """Raise `ValueError` for a configuration with more parameters than the files in `folder` can hold.

    Args:
        config: a `VisualRWKVConfig` or `VisualRWKVTextConfig`.
        folder: holds the weights.
        quick: count the largest matrices of the language model alone, for which no class is imported.
    """
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    described = least_parameters(config) if quick else count_parameters(config)
    if num_bytes and described > SPARE_PARAMETERS + MAX_PARAMETERS_PER_BYTE * num_bytes:
        raise ValueError(
            f"{folder / 'config.json'} describes a model of {described:,} parameters{' or more' if quick else ''}, but "
            f"the weights in {folder} take only {num_bytes:,} bytes."
        )


def _layers_of(fields: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, int]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _layers_of(value, f"{where}{name}.")
        elif name in ("num_hidden_layers", "compressor_num_layers") and isinstance(value, int):
            yield where + name, value
        elif name == "depths" and isinstance(value, list):  # a ResNet's, by stage
            yield f"the sum of {where}{name}", sum(depth for depth in value if isinstance(depth, int))


def count_parameters(config: Any) -> int:
    """Return the number of parameters of the model that a configuration describes, without memory for it."""
    import torch

    from visualrwkv_hf.conversion import expected_shapes

    return sum(torch.Size(shape).numel() for shape in expected_shapes(config).values())


def least_parameters(config: Any) -> int:
    """Return the number of parameters of the language model's embedding and channel mixes."""
    text = config.get_text_config(decoder=True)
    matrices = text.vocab_size + 2 * text.num_hidden_layers * text.intermediate_size
    return matrices * text.hidden_size


def refuse_strange_processor(processor: Any, config: Any, folder: Path) -> None:
    """Raise `ValueError` for a processor that does not fit the model, or asks for pictures or prompts without end."""
    from ..processing_visualrwkv import CONFIG_FIELDS

    path = folder / "processor_config.json"
    for name in CONFIG_FIELDS:
        ours, models = _plain(getattr(processor, name)), _plain(getattr(config, name))
        if name != "image_position" and ours != models:  # chats may place pictures elsewhere
            raise ValueError(f"{name} in {path} is {ours!r}, but the model has {models!r}.")
    if processor.image_token_id != config.image_token_id:
        raise ValueError(
            f"The tokenizer in {folder} has <image> at {processor.image_token_id}, the model has it at "
            f"{config.image_token_id}."
        )
    for name, number in _sides_of(processor.image_processor.to_dict()):
        if not isinstance(number, int) or not 0 < number <= MAX_SIDE:
            raise ValueError(f"{name} in {path} must be from 1 to {MAX_SIDE}, got {number!r}.")
    tile_grid = getattr(processor.image_processor, "tile_grid", 1)
    if tile_grid > MAX_TILE_GRID:
        raise ValueError(f"tile_grid in {path} must be at most {MAX_TILE_GRID}, got {tile_grid}.")
    multiple = processor.pad_prompt_to_multiple_of
    if multiple is not None and not (isinstance(multiple, int) and 0 < multiple <= MAX_PROMPT_MULTIPLE):
        raise ValueError(
            f"pad_prompt_to_multiple_of in {path} must be from 1 to {MAX_PROMPT_MULTIPLE}, got {multiple!r}."
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _sides_of(fields: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the sizes of pictures in an image processor's fields, with their names."""
    for name, value in fields.items():
        if name in ("size", "crop_size"):
            for key, side in value.items() if isinstance(value, dict) else [("", value)]:
                if side is not None:
                    yield f"{where}{name}" + (f".{key}" if key else ""), side
        elif isinstance(value, dict):
            yield from _sides_of(value, f"{where}{name}.")


OPTIONS_OF_HUB_CODE = ("penalty_alpha", "dola_layers", "constraints", "force_words_ids", "num_beam_groups")
"""Options with which `generate` loads code from the Hub, or asks whether it may."""

TOKEN_OPTIONS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
)


def refuse_strange_generation(config: Any, folder: Path) -> None:
    """Raise `ValueError` for default options of `generate` that multiply the work, need code, or are no token ids."""
    path = folder / "generation_config.json"
    for name in OPTIONS_OF_HUB_CODE:
        if getattr(config, name, None) not in (None, 1, False):
            raise ValueError(f"{name} in {path} asks for a way to generate whose code is on the Hub.")
    for name in ("num_beams", "num_return_sequences"):
        number = getattr(config, name, None)
        if number is not None and not (isinstance(number, int) and 1 <= number <= MAX_BEAMS):
            raise ValueError(f"{name} in {path} must be from 1 to {MAX_BEAMS}, got {number!r}.")
    for name in TOKEN_OPTIONS:
        value = getattr(config, name, None)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise ValueError(f"{name} in {path} must be the numbers of tokens, got {value!r}.")


# Chat templates.

PROBE_SECONDS, PROBE_BYTES, PROBE_CHARACTERS = 5, 2**30, 1_000_000
"""What a template may take for a short chat: processor time, memory, length of the prompt."""

PROBE_WAIT_SECONDS = 120
"""The processor time above is what counts; this is for systems that cannot limit it."""

PROBE = f"""
import json, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, ({PROBE_SECONDS}, {PROBE_SECONDS}))
    resource.setrlimit(resource.RLIMIT_AS, ({PROBE_BYTES}, {PROBE_BYTES}))
except (ImportError, ValueError, OSError):
    pass
import jinja2, jinja2.ext, jinja2.sandbox

class Generation(jinja2.ext.Extension):
    tags = {{"generation"}}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)

def refuse(text):
    raise jinja2.TemplateError(text)

extensions = [Generation, jinja2.ext.loopcontrols]
environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=extensions
)
environment.filters["tojson"] = lambda value, **options: json.dumps(value)
environment.globals.update(raise_exception=refuse, strftime_now=lambda form: form)
question = {{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What is it?"}}]}}
chats = [[question], [question, {{"role": "assistant", "content": "A cat."}}, question]]
longest = 0
try:
    template = environment.from_string(sys.stdin.buffer.read().decode())
    for messages in chats:
        longest = max(longest, len(template.render(messages=messages, add_generation_prompt=True)))
except MemoryError:
    sys.exit(3)
except Exception:
    sys.exit(0)
sys.exit(4 if longest > {PROBE_CHARACTERS} else 0)
"""
"""Renders the template on standard input in a process whose time and memory are limited.

What else is wrong with it is not judged here: transformers says so when it renders the template itself."""


def refuse_strange_template(template: Any, folder: Path) -> None:
    """Raise `ValueError` for a chat template that takes too long, too much memory, or makes an endless prompt.

    The package's own template is known. Another one is rendered once in a process of its own, since nothing can
    interrupt a template from inside.
    """
    if not isinstance(template, str):
        raise ValueError(f"The chat template in {folder} must be one text, got {type(template).__name__}.")
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise ValueError(
            f"The chat template in {folder} has {len(template)} characters, at most {MAX_TEMPLATE_CHARACTERS} are read."
        )
    if is_known_template(template):
        return
    code = _probe(template)
    if code == 4:
        raise ValueError(
            f"The chat template in {folder} makes a prompt of more than {PROBE_CHARACTERS:,} characters."
        )
    if code:
        raise ValueError(
            f"The chat template in {folder} takes more than {PROBE_SECONDS} s or {PROBE_BYTES >> 20} MB for a short "
            "chat."
        )


def is_known_template(template: str) -> bool:
    """Return whether a template is the package's own, for any position of the picture."""
    return template.strip() in {release_chat_template(place).strip() for place in ("first", "middle", "last")}


def _probe(template: str) -> int:
    """Return the exit code of `PROBE`: 0 if the template is harmless."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        command = [sys.executable, "-c", PROBE]
        done = subprocess.run(
            command,
            input=template.encode("utf-8", "replace"),
            capture_output=True,
            timeout=PROBE_WAIT_SECONDS,
        )
        return done.returncode
    return 1


def refuse_unusable_template(processor: Any, folder: Path) -> None:
    """Raise `ValueError` for a chat template that fails for the simplest question about a picture."""
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    try:
        prompt = processor.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    except Exception as error:
        reason = json.dumps(str(error))[1:-1][:300] or type(error).__name__
        raise ValueError(f"The chat template in {folder} fails for a plain question: {reason}.") from error
    if prompt.count(processor.image_token) != 1:
        raise ValueError(
            f"The chat template in {folder} does not put one {processor.image_token} for one picture."
        )
