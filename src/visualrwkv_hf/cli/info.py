"""`visualrwkv info`: what a model folder holds, from its headers alone."""

import contextlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..inference.loading import model_source
from .options import errors_in_a_sentence

if TYPE_CHECKING:
    from visualrwkv_hf.conversion.checkpoint import TensorInfo

    from ..configuration_visualrwkv import VisualRWKVConfig, VisualRWKVTextConfig

PARTS = {
    "model.vision_tower.": "vision tower",
    "model.multi_modal_projector.": "projector",
    "model.compressor.": "compressor",
    "model.language_model.embed_tokens.": "embedding",
    "model.language_model.": "blocks",
    "model.embed_tokens.": "embedding",
    "model.": "blocks",
    "lm_head.": "head",
}
"""Beginning of a tensor's name -> the part it belongs to; the first that fits. Text models have no `language_model`."""

POSITIONS = {
    "first": "first: picture, question",
    "middle": "middle (the sandwich): question, picture, question",
    "last": "last: question, picture",
}

WHOLE = ("none", "views")
"""Tilings of an image processor that give every picture as many tokens."""

STATE_BYTES = 4
"""Of a number of the recurrence's state, which is float32 in any model."""


def info(
    folder: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="A folder or a Hub id. Without it the model inside the package."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Shows what a model is: release, sizes, parameters, tokens of a picture, bytes of a conversation."""
    with errors_in_a_sentence():
        source = model_source(folder)
        facts = facts_of_hub(source) if may_be_on_hub(source) else facts_of(Path(source))
        if as_json:
            typer.echo(json.dumps(facts, indent=2))
        else:
            show_facts(facts)


def may_be_on_hub(source: str) -> bool:
    """Whether `source` is no folder, and reads `user/name` or `name`."""
    parts = source.split("/")
    return not Path(source).is_dir() and len(parts) <= 2 and all(part.strip(".") for part in parts)


def facts_of(folder: Path) -> dict[str, Any]:
    """What `visualrwkv info` tells of a folder. No weight is read.

    Raises:
        ValueError: the folder is none, holds another model, or files are missing or damaged.
    """
    from visualrwkv_hf.conversion.convert import open_folder

    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    return facts_from(folder, lambda: open_folder(folder).infos)


def facts_of_hub(name: str) -> dict[str, Any]:
    """As [`facts_of`] of a model on the Hub: of weights that are not in the cache only the headers are fetched.

    Raises:
        ValueError: it is not there or not reached, holds another model, or files are missing or damaged.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    from visualrwkv_hf.conversion.checkpoint import read_json
    from visualrwkv_hf.conversion.convert import open_folder
    from visualrwkv_hf.conversion.hub_files import HubFile, download, hub_sentences

    folder = download(HubFile(name, "config.json", None)).parent
    if read_json(folder / "config.json").get("model_type") == "visualrwkv":
        with hub_sentences(name), contextlib.suppress(RemoteEntryNotFoundError):
            hf_hub_download(name, "processor_config.json")

    def tensors() -> Mapping[str, "TensorInfo"]:
        try:
            return open_folder(folder).infos
        except ValueError:  # not all of them are in the cache
            return headers_on_hub(name)

    return facts_from(folder, tensors)


def headers_on_hub(name: str) -> dict[str, "TensorInfo"]:
    """The tensors of a model on the Hub, without their contents.

    Raises:
        ValueError: it has no safetensors, or is not reached.
    """
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError

    from visualrwkv_hf.conversion.checkpoint import SAFETENSORS_DTYPES, TensorInfo
    from visualrwkv_hf.conversion.hub_files import hub_sentences
    from visualrwkv_hf.conversion.key_map import ConversionError

    with hub_sentences(name, "model.safetensors"):
        try:
            files = get_safetensors_metadata(name).files_metadata.values()
        except NotASafetensorsRepoError as error:
            raise ConversionError(f"{name} has no file model.safetensors, whole or in parts.") from error
    return {
        tensor: TensorInfo(SAFETENSORS_DTYPES[entry.dtype], tuple(entry.shape))
        for file in files
        for tensor, entry in file.tensors.items()
    }


def facts_from(folder: Path, read_tensors: Callable[[], Mapping[str, "TensorInfo"]]) -> dict[str, Any]:
    """What is told of a model whose configuration lies in `folder`."""
    from visualrwkv_hf.conversion.convert import read_config

    try:
        config = read_config(folder)
        tensors = read_tensors()
    except json.JSONDecodeError as error:
        raise ValueError(f"A file of {folder} is no JSON, or damaged: {error}.") from error
    text = config.get_text_config(decoder=True)
    facts = {
        "model": title_of(config),
        "language_model": f"RWKV-{text.rwkv_version}",
        "layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "heads": text.num_attention_heads,
        "head_dim": text.head_dim,
        "vocab_size": text.vocab_size,
        "parameters": parameters_by_part(tensors),
        "num_parameters": sum(math.prod(tensor.shape) for tensor in tensors.values()),
        "num_bytes": sum(tensor.num_bytes for tensor in tensors.values()),
        "dtypes": dtypes_of(tensors),
        "state_bytes": state_bytes(text, tensors),
    }
    return facts if config.model_type == "visualrwkv_text" else facts | picture_facts(config, folder)


def title_of(config: "VisualRWKVConfig | VisualRWKVTextConfig") -> str:
    """A released model's name where one has this shape, and the family that the converter has noted."""
    from visualrwkv_hf.conversion.model_card import published_scores

    scores = published_scores(config)
    kind = "RWKV" if config.model_type == "visualrwkv_text" else "VisualRWKV"
    version = config.get_text_config(decoder=True).rwkv_version
    title = f"shaped like {scores.title}" if scores else f"{kind}-{version}, of no released shape"
    family = getattr(config, "conversion", {}).get("family")
    return f"{title}, converted from {family}" if family else title


def parameters_by_part(tensors: Mapping[str, "TensorInfo"]) -> dict[str, int]:
    """Numbers in the tensors of each part, in the order of `PARTS`."""
    counts: Counter[str] = Counter()
    for name, tensor in tensors.items():
        part = next((part for start, part in PARTS.items() if name.startswith(start)), "other")
        counts[part] += math.prod(tensor.shape)
    return {part: counts[part] for part in dict.fromkeys([*PARTS.values(), "other"]) if part in counts}


def dtypes_of(tensors: Mapping[str, "TensorInfo"]) -> dict[str, int]:
    """Number of tensors of each dtype, the most frequent first."""
    return dict(
        Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()).most_common()
    )


def state_bytes(text: "VisualRWKVTextConfig", tensors: Mapping[str, "TensorInfo"]) -> int:
    """Bytes of a conversation's state: two token shifts [C] a layer in the model's dtype, [H, K, V] in float32."""
    embedding = next(tensor for name, tensor in tensors.items() if "embed_tokens" in name)
    shifts = 2 * text.hidden_size * embedding.dtype.itemsize
    recurrence = text.num_attention_heads * text.head_dim**2 * STATE_BYTES
    return text.num_hidden_layers * (shifts + recurrence)


def picture_facts(config: "VisualRWKVConfig", folder: Path) -> dict[str, Any]:
    """How a picture is seen and read, and where it stands in the prompt."""
    from visualrwkv_hf.conversion.checkpoint import read_json

    saved = folder / "processor_config.json"
    image_processor = read_json(saved).get("image_processor", {}) if saved.exists() else {}
    return {
        "encoders": config.vision_config.image_sizes,
        "tiling": image_processor.get("tiling", "none"),
        "patch_grid": [config.vision_config.grid_size] * 2,
        "token_grid": list(config.pooled_grid),
        "tokens_of_a_picture": config.num_image_tokens,
        "tokens_depend_on_size": config.num_image_tokens_of(2) != config.num_image_tokens
        and image_processor.get("tiling", "none") not in WHOLE,
        "projector": config.projector,
        "scan": config.scan,
        "image_position": config.image_position,
    }


def show_facts(facts: Mapping[str, Any]) -> None:
    """Prints the facts as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for name, value in rows_of(facts):
        table.add_row(name, value)
    Console(highlight=False, markup=False).print(table)


def rows_of(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The facts in words."""
    yield "model", facts["model"]
    yield (
        "language model",
        f"{facts['language_model']}: {facts['layers']} layers of width {facts['hidden_size']}, {facts['heads']} heads "
        f"of {facts['head_dim']}, {facts['vocab_size']:,} words",
    )
    dtypes = ", ".join(f"{dtype} ({count} tensors)" for dtype, count in facts["dtypes"].items())
    yield "parameters", f"{facts['num_parameters']:,} in {in_bytes(facts['num_bytes'])}, {dtypes}"
    for part, count in facts["parameters"].items():
        yield f"  {part}", f"{count:,} ({count / facts['num_parameters']:.1%})"
    if "encoders" in facts:
        encoders = ", ".join(f"{name} at {side} x {side} pixels" for name, side in facts["encoders"].items())
        yield "pictures", f"{encoders}; {by(facts['patch_grid'])} patches; tiling: {facts['tiling']}"
        each = "a tile, the more the larger the picture" if facts["tokens_depend_on_size"] else "a picture"
        yield "tokens", f"{facts['tokens_of_a_picture']:,} {each}; projector: {facts['projector']}"
        yield "scan", f"{facts['scan']}, over a grid of {by(facts['token_grid'])}"
        yield "prompt position", POSITIONS[facts["image_position"]]
    yield "state", f"{in_bytes(facts['state_bytes'])} a conversation, however long"


def by(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))


def in_bytes(count: float) -> str:
    """In decimal units, as file managers and transformers count."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
