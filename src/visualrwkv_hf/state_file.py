"""A state in a file: safetensors with what was read and whose it is, written whole or not at all."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

FORMAT = "visualrwkv_hf.state"
VERSION = "1"

MODEL_FIELDS = ("scan", "image_token_id", "pooling", "pooled_grid_size", "projector", "compressor_num_layers",
                "compressor_num_tokens", "compressor_per_tile", "compressor_reduction")  # fmt: skip
TEXT_FIELDS = ("rwkv_version", "hidden_size", "num_hidden_layers", "head_dim", "vocab_size")
"""Fields of the configuration that are named when they differ; all others show in the weights."""
SAMPLES = 16
"""Values looked at in every weight."""
BOOKKEEPING = ("auto_map", "image_processor_type", "processor_class")
"""Settings of an image processor that change nothing about a picture."""
PROBE = "User: 0 Aé漢\n\nAssistant:"
"""A text that tokenizers of other vocabularies encode otherwise."""


class SavedState(NamedTuple):
    """`layers`: the states of each layer by name; `contents`: what each sample has read, int64 [T]."""

    layers: list[dict[str, Tensor]]
    contents: Sequence[Tensor]
    pixel_dtype: torch.dtype
    fingerprint: dict[str, dict[str, Any]]


def write_state(path: str | os.PathLike, state: SavedState) -> None:
    """Writes the file under another name and renames it then."""
    tensors = {
        f"layers.{i}.{name}": tensor for i, layer in enumerate(state.layers) for name, tensor in layer.items()
    }
    tensors |= {f"contents.{row}": contents for row, contents in enumerate(state.contents)}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "pixel_dtype": str(state.pixel_dtype).removeprefix("torch."),
        "fingerprint": json.dumps(state.fingerprint),
    }
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        unfinished.write_bytes(data)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_state(path: str | os.PathLike) -> SavedState:
    """What `write_state` wrote.

    Raises:
        ValueError: the file is something else, of another version, or not whole.
        OSError: it cannot be read.
    """
    with open(path, "rb"):  # safetensors has errors of its own for a file that is missing
        pass
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} is a safetensors file, but no state of VisualRWKV.")
            if metadata["version"] != VERSION:
                raise ValueError(
                    f"{path} is a state of version {metadata['version']}, this package reads version {VERSION}."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        layers: dict[int, dict[str, Tensor]] = {}
        for name in [name for name in tensors if name.startswith("layers.")]:
            _, index, state = name.split(".")
            layers.setdefault(int(index), {})[state] = tensors[name]
        return SavedState(
            [layers[i] for i in range(len(layers))],
            [tensors[f"contents.{row}"] for row in range(len(tensors) - sum(map(len, layers.values())))],
            getattr(torch, metadata["pixel_dtype"]),
            json.loads(metadata["fingerprint"]),
        )
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is not a whole state of VisualRWKV: {error}") from error


def model_fingerprint(model: nn.Module) -> dict[str, Any]:
    """What tells a model: fields of its configuration, and a hash over a few values of every weight.

    The values are rounded to bfloat16, so that one checkpoint has one fingerprint in every dtype.
    """
    text = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    fields = {name: getattr(text, name) for name in TEXT_FIELDS}
    fields |= {name: getattr(model.config, name) for name in MODEL_FIELDS if hasattr(model.config, name)}
    return fields | {"weights": _weights_hash(model)}


@torch.no_grad()
def _weights_hash(model: nn.Module) -> str:
    digest, samples = hashlib.sha256(), []
    for name, weight in model.named_parameters():
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        if type(weight.detach()) is Tensor and not weight.is_meta and weight.numel():
            flat = weight.detach().reshape(-1)
            samples.append(flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].to("cpu", torch.bfloat16))
    digest.update(torch.cat(samples).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def processor_fingerprint(processor) -> dict[str, Any]:
    """What tells a processor: hashes of its parts, and where it places pictures."""
    tokenizer = getattr(processor, "tokenizer", processor)
    image_processor = getattr(processor, "image_processor", None)
    settings = {} if image_processor is None else image_processor.to_dict()
    settings = {name: value for name, value in settings.items() if name not in BOOKKEEPING}
    return {
        "chat_template": _hash(processor.chat_template),
        "image_position": getattr(processor, "image_position", None),
        "tokenizer": _hash([len(tokenizer), tokenizer(PROBE)["input_ids"]]),
        "image_processor": _hash(settings),
    }


def _hash(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def refuse_other(name: str, theirs: dict[str, Any], ours: dict[str, Any], kind: str) -> None:
    """Raises `ValueError` naming every field of two fingerprints that differs."""
    fields = [field for field in {**theirs, **ours} if theirs.get(field) != ours.get(field)]
    if fields:
        differing = "; ".join(
            f"{field} {theirs.get(field)} there, {ours.get(field)} here" for field in fields
        )
        raise ValueError(f"{name} was read by another {kind}: {differing}.")
