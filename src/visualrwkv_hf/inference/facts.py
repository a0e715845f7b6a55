"""What a model folder holds, from its configuration and the headers of its weights: no weight is read.

A folder as this package writes them is described without torch and transformers, which take seconds to import. Any
other is read by the classes that load it, which say what is wrong with it.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .loading import VISION_MODEL, load_config, may_be_on_hub, model_type_of, read_json
from .plain_folder import StoredTensor, plain_config, stored_tensors

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
"""Prefix of a tensor's name -> the part it belongs to; the first match counts. Text models have no `language_model`."""

TILINGS_OF_FIXED_LENGTH = ("none", "views")
"""Tilings of the image processor with which every picture takes the same number of tokens."""

PACKED, SCALE, SHAPE, WORD_BITS = "weight_packed", "weight_scale", "weight_shape", 32
"""The tensors of a layer of few bits, and the bits of a word, as `cpu.packed` knows them, which imports torch."""

STATE_ITEM_BYTES = 4
"""Size of a number in the recurrent state, which is float32 in every model."""


def facts_of(source: str | Path) -> dict[str, Any]:
    """Return what `visualrwkv info` tells of a model.

    Args:
        source: a folder or a Hub id. Of a model on the Hub the configuration is fetched, and of weights that are not in
            the cache only the headers.

    Raises:
        ValueError: it is not there, holds another model, or files are missing or damaged.
    """
    if may_be_on_hub(str(source)):
        return _facts_of_hub(str(source))
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    return _facts_from(folder, lambda: _tensors_in(folder))


def _tensors_in(folder: Path) -> Mapping[str, "TensorInfo | StoredTensor"]:
    stored = stored_tensors(folder)
    if stored is not None:
        return stored
    from visualrwkv_hf.conversion.folders import open_folder

    return open_folder(folder).infos


def _facts_of_hub(name: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    from visualrwkv_hf.conversion.folders import open_folder
    from visualrwkv_hf.conversion.hub_address import HubFile
    from visualrwkv_hf.conversion.hub_errors import hub_sentences
    from visualrwkv_hf.conversion.hub_files import download

    folder = download(HubFile(name, "config.json", None)).parent
    if model_type_of(folder) == VISION_MODEL:
        with hub_sentences(name), contextlib.suppress(RemoteEntryNotFoundError):
            hf_hub_download(name, "processor_config.json")

    def tensors() -> Mapping[str, "TensorInfo"]:
        try:
            return open_folder(folder).infos
        except ValueError:  # not all of them are in the cache
            return _headers_on_hub(name)

    return _facts_from(folder, tensors)


def _headers_on_hub(name: str) -> dict[str, "TensorInfo"]:
    """Return the tensors of a model on the Hub, without their contents.

    Raises:
        ValueError: it has no safetensors, or cannot be reached.
    """
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError

    from visualrwkv_hf.conversion import ConversionError
    from visualrwkv_hf.conversion.checkpoint import SAFETENSORS_DTYPES, TensorInfo
    from visualrwkv_hf.conversion.hub_errors import hub_sentences

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


def _facts_from(
    folder: Path, read_tensors: Callable[[], Mapping[str, "TensorInfo | StoredTensor"]]
) -> dict[str, Any]:
    """Return the facts of a model whose configuration is in `folder`."""
    config: Any = plain_config(folder) or load_config(str(folder), may_load=False)
    tensors = read_tensors()
    text = config.get_text_config(decoder=True)
    counts = parameter_counts(tensors, read_json(folder / "config.json").get("quantization_config"))
    facts = {
        "model": title_of(config),
        "language_model": f"RWKV-{text.rwkv_version}",
        "layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "heads": text.num_attention_heads,
        "head_dim": text.head_dim,
        "vocab_size": text.vocab_size,
        "parameters": parameters_by_part(counts),
        "num_parameters": sum(counts.values()),
        "num_bytes": sum(tensor.num_bytes for tensor in tensors.values()),
        "dtypes": dtypes_of(tensors),
        "state_bytes": state_bytes(text, tensors),
    }
    return facts | picture_facts(config, folder) if config.model_type == VISION_MODEL else facts


def title_of(config: "VisualRWKVConfig | VisualRWKVTextConfig") -> str:
    """Return the name of the release that has this shape, if there is one, and the family that the converter noted."""
    from visualrwkv_hf.conversion.releases import released_model

    released = released_model(config)
    kind = "VisualRWKV" if config.model_type == VISION_MODEL else "RWKV"
    version = config.get_text_config(decoder=True).rwkv_version
    title = f"shaped like {released.title}" if released else f"{kind}-{version}, the shape of no release"
    family = getattr(config, "conversion", {}).get("family")
    return f"{title}, converted from {family}" if family else title


def parameter_counts(
    tensors: Mapping[str, "TensorInfo | StoredTensor"], quantization: Any = None
) -> dict[str, int]:
    """Return the number of parameters of each tensor.

    Weights of few bits count as many as the words hold of them, and their scales and shapes not at all.

    Args:
        tensors: from the headers of the files.
        quantization: the entry `quantization_config` of `config.json`.
    """
    formats = _formats(quantization)
    packed = {name.removesuffix(PACKED) for name in tensors if name.endswith(f".{PACKED}")}
    beside = {f"{layer}{name}" for layer in packed for name in (SCALE, SHAPE)}
    counts = {name: math.prod(tensor.shape) for name, tensor in tensors.items() if name not in beside}
    for layer in packed:
        words, scale = (tensors.get(f"{layer}{name}") for name in (PACKED, SCALE))
        if words and scale and len(words.shape) == len(scale.shape) == 2:
            counts[f"{layer}{PACKED}"] *= _numbers_per_word(words.shape[1], scale.shape[1], formats)
    return counts


def _formats(quantization: Any) -> list[tuple[int, int]]:
    """Return bits of a weight and neighbours that share a scale, 0 for a whole row, of each kind of layers."""
    groups = quantization.get("config_groups") if isinstance(quantization, dict) else None
    found = []
    for group in groups.values() if isinstance(groups, dict) else ():
        match group:  # a stranger's file may hold anything
            case {"weights": {"num_bits": int(bits), **fields}} if bits in (4, 8):
                size = fields.get("group_size")
                found.append((bits, size if isinstance(size, int) and size > 0 else 0))
    return sorted(found, key=lambda bits_and_group: not bits_and_group[1])


def _numbers_per_word(words: int, scales: int, formats: Iterable[tuple[int, int]]) -> int:
    """Return how many weights a word of a row holds: of the format in which so many words have so many scales."""
    for bits, group in formats:
        columns = words * WORD_BITS // bits
        if scales == (columns // group if group else 1):
            return WORD_BITS // bits
    return 1


def parameters_by_part(counts: Mapping[str, int]) -> dict[str, int]:
    """Return the number of parameters of each part, in the order of `PARTS`."""
    found: Counter[str] = Counter()
    for name, count in counts.items():
        part = next((part for prefix, part in PARTS.items() if name.startswith(prefix)), "other")
        found[part] += count
    return {part: found[part] for part in dict.fromkeys([*PARTS.values(), "other"]) if part in found}


def dtypes_of(tensors: Mapping[str, "TensorInfo | StoredTensor"]) -> dict[str, int]:
    """Return the number of tensors of each dtype, the most frequent first."""
    return dict(
        Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()).most_common()
    )


def state_bytes(text: "VisualRWKVTextConfig", tensors: Mapping[str, "TensorInfo | StoredTensor"]) -> int:
    """Return the size of a conversation's state.

    For each layer it is two token shifts [C] in the model's dtype and the WKV state [H, K, V] in float32.

    Raises:
        ValueError: there is no embedding, whose dtype is the model's.
    """
    embedding = next((tensor for name, tensor in tensors.items() if "embed_tokens" in name), None)
    if embedding is None:
        raise ValueError("The weights have no token embedding, so they are no language model.")
    shifts = 2 * text.hidden_size * embedding.dtype.itemsize
    recurrence = text.num_attention_heads * text.head_dim**2 * STATE_ITEM_BYTES
    return text.num_hidden_layers * (shifts + recurrence)


def picture_facts(config: "VisualRWKVConfig", folder: Path) -> dict[str, Any]:
    """Return how a picture is encoded and read, and where it goes in the prompt."""
    saved = folder / "processor_config.json"
    image_processor = read_json(saved).get("image_processor", {}) if saved.exists() else {}
    if not isinstance(image_processor, dict):
        raise ValueError(
            f"image_processor in {saved} must be an object, got {type(image_processor).__name__}."
        )
    tiling = image_processor.get("tiling", "none")
    return {
        "encoders": config.vision_config.image_sizes,
        "tiling": tiling,
        "patch_grid": [config.vision_config.grid_size] * 2,
        "token_grid": list(config.pooled_grid),
        "tokens_of_a_picture": config.num_image_tokens,
        "tokens_depend_on_size": config.num_image_tokens_of(2) != config.num_image_tokens
        and tiling not in TILINGS_OF_FIXED_LENGTH,
        "projector": config.projector,
        "scan": config.scan,
        "image_position": config.image_position,
    }


__all__ = ["facts_of"]
