"""Write a kept state to a file and read it back: safetensors with what was read, and of which model it is.

A file may come from a stranger. Everything in it is checked before it is used, and every fault is a `ValueError`.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from .generations import GENERATIONS
from .prompt_identity import PromptIdentity, picture_number

FORMAT = "visualrwkv_hf.state"
VERSION = "2"
"""Version 1 had `contents.{row}` instead of `read_ids.{row}`, and no full hashes of pictures."""
ID_NAMES = {"1": "contents", "2": "read_ids"}

MAX_BYTES = 4 << 30
"""The largest file that is read unless the caller allows more: 64 states of a model of 14 billion parameters."""
MAX_FINGERPRINT = 1 << 16
"""The most characters that a fingerprint may take; ours take about a thousand."""
MAX_HEADER = 1 << 23
"""The most bytes that the names, dtypes and shapes in a file may take; ours take about 100 for each tensor."""
HASH_BYTES = 32

MODEL_FIELDS = ("scan", "image_token_id", "pooling", "pooled_grid_size", "projector", "compressor_num_layers",
                "compressor_num_tokens", "compressor_per_tile", "compressor_reduction")  # fmt: skip
TEXT_FIELDS = ("rwkv_version", "hidden_size", "num_hidden_layers", "head_dim", "vocab_size")
"""Fields of the configuration that are named when they differ; differences in all others show in the weights."""
SAMPLES = 16
"""How many values of every weight are hashed."""
BOOKKEEPING = ("auto_map", "image_processor_type", "processor_class")
"""Settings of an image processor that do not change what it does to a picture."""
PROBE = "User: 0 Aé漢\n\nAssistant:"
"""A text that tokenizers with different vocabularies encode differently."""

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Dtypes of tokens that a layer remembers and of pixels, by their names in safetensors. Other states are float32."""
PIXEL_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
LAYER_NAME = re.compile(r"layers\.(0|[1-9]\d{0,4})\.([a-z][a-z0-9_]{0,40})")
ROW_NAME = re.compile(r"(contents|read_ids|picture_ends|picture_hashes)\.(0|[1-9]\d{0,5})")


class SavedState(NamedTuple):
    """What a file holds: see [`KeptState`] for the fields."""

    layers: Sequence[Mapping[str, Tensor]]
    prompts: Sequence[PromptIdentity]
    pixel_dtype: torch.dtype
    fingerprint: Mapping[str, Mapping[str, Any]]


def write_state(path: str | os.PathLike, state: SavedState) -> None:
    """Write a state to a new file beside `path` and then rename it to `path`.

    The new file is on the disk before it gets its name, so that a killed process or a power cut leaves the old file or
    the new one, whole.
    """
    tensors = {
        f"layers.{i}.{name}": tensor for i, layer in enumerate(state.layers) for name, tensor in layer.items()
    }
    version = "2" if all(prompt.has_hashes for prompt in state.prompts) else "1"
    for row, prompt in enumerate(state.prompts):
        tensors[f"{ID_NAMES[version]}.{row}"] = prompt.ids
        if version != "1" and prompt.picture_ends:
            tensors[f"picture_ends.{row}"] = torch.tensor(prompt.picture_ends)
            hashes = torch.frombuffer(bytearray(b"".join(prompt.picture_hashes)), dtype=torch.uint8)
            tensors[f"picture_hashes.{row}"] = hashes.view(-1, HASH_BYTES)
    metadata = {
        "format": FORMAT,
        "version": version,
        "pixel_dtype": str(state.pixel_dtype).removeprefix("torch."),
        "fingerprint": json.dumps(state.fingerprint),
    }
    # Clones, since safetensors refuses tensors that share memory, as the samples of a stacked state may.
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    data = save(tensors, metadata)
    replace_file(Path(path), data)


def replace_file(path: Path, data: bytes) -> None:
    """Replace the file `path` by one with these contents, in one step."""
    unfinished = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with open(unfinished, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    if os.name == "posix":  # the new name itself is on the disk only when its folder is
        folder = os.open(path.absolute().parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_state(path: str | os.PathLike, max_bytes: int = MAX_BYTES) -> SavedState:
    """Read what `write_state` wrote.

    Raises:
        ValueError: the file is something else, of another version, larger than `max_bytes`, or damaged.
        OSError: it cannot be read.
    """
    size = os.stat(path)
    if not stat.S_ISREG(size.st_mode) and not stat.S_ISDIR(size.st_mode):
        raise ValueError(f"{path} is not a regular file.")
    with open(path, "rb") as file:  # for a folder or a missing permission: safetensors has errors of its own
        header_size = int.from_bytes(file.read(8), "little")
    if header_size > MAX_HEADER:
        raise ValueError(
            f"{path} is not a whole state of VisualRWKV: it begins with {header_size:,} bytes of names."
        )
    if size.st_size > max_bytes:
        raise ValueError(
            f"{path} has {size.st_size:,} bytes, more than max_bytes ({max_bytes:,}): it is not read."
        )
    try:
        with safe_open(path, "pt") as file:
            return _checked(str(path), file)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole state of VisualRWKV: {_shown(error, 200)}") from error


def _checked(path: str, file) -> SavedState:
    """Return the contents of an open file; names, dtypes and shapes are checked before any tensor is read."""
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file, but no state of VisualRWKV.")
    if (version := metadata.get("version")) not in ID_NAMES:
        raise ValueError(
            f"{path} is a state of version {_shown(version)}, this package reads versions {', '.join(ID_NAMES)}."
        )

    def refuse(what: str) -> NoReturn:
        raise ValueError(f"{path} is not a whole state of VisualRWKV: {what}.")

    pixel_dtype = PIXEL_DTYPES.get(metadata.get("pixel_dtype", ""))
    if pixel_dtype is None:
        refuse(f"its pixel_dtype is {_shown(metadata.get('pixel_dtype'))}")
    fingerprint = _parsed_fingerprint(metadata.get("fingerprint", ""))
    if fingerprint is None:
        refuse("its fingerprint cannot be read")
    names = set(file.keys())
    if unknown := [n for n in sorted(names) if not LAYER_NAME.fullmatch(n) and not ROW_NAME.fullmatch(n)]:
        refuse(f"it has a tensor named {_shown(unknown[0])}")
    slices = {name: file.get_slice(name) for name in names}
    kinds = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}

    num_rows = sum(name.startswith(f"{ID_NAMES[version]}.") for name in names)
    of_layers = _by_layer(kinds)
    faults = _fault_of_layers(of_layers, num_rows) or _fault_of_prompts(kinds, num_rows, version)
    if fault := faults or _fault_of_beginnings(fingerprint, num_rows):
        refuse(fault)

    # Clones: the tensors themselves are a view of the file, which may change.
    tensors = {name: file.get_tensor(name).clone() for name in sorted(names)}
    layers = [{name: tensors[f"layers.{i}.{name}"] for name in of_layers[i]} for i in range(len(of_layers))]
    for i, layer in enumerate(layers):
        for name, tensor in layer.items():
            if not bool(torch.isfinite(tensor).all()):
                refuse(f"layers.{i}.{name} holds NaN or infinite values")
    prompts = [_read_prompt(tensors, row, ID_NAMES[version]) for row in range(num_rows)]
    for row, prompt in enumerate(prompts):
        if fault := _fault_of_pictures(prompt, version):
            refuse(f"{fault} (row {row})")
    return SavedState(layers, tuple(prompts), pixel_dtype, fingerprint)


def _parsed_fingerprint(text: str) -> dict[str, dict[str, Any]] | None:
    """Return the fingerprint of this JSON; None if it is none."""
    try:
        fingerprint = json.loads(text) if len(text) <= MAX_FINGERPRINT else None
    except (ValueError, RecursionError):
        return None
    parts = {"model", "processor"}
    if not isinstance(fingerprint, dict) or not parts <= set(fingerprint) <= parts | {"tuned_state"}:
        return None
    return fingerprint if all(isinstance(part, dict) for part in fingerprint.values()) else None


def _fault_of_beginnings(fingerprint: Mapping[str, Mapping[str, Any]], num_rows: int) -> str | None:
    """Return what is wrong with the tuned states that a fingerprint names; None if nothing is."""
    found = fingerprint.get("tuned_state", {"identities": [None] * num_rows}).get("identities")
    identities = found if isinstance(found, list) else []
    if len(identities) != num_rows or not all(one is None or isinstance(one, str) for one in identities):
        return f"it does not say with which tuned state each of {num_rows} samples began"
    return None


Kinds = Mapping[str, tuple[str, tuple[int, ...]]]
"""Dtype, as safetensors names it, and shape of each tensor of a file."""


def _by_layer(kinds: Kinds) -> Mapping[int, Kinds]:
    """Return the states of each layer by their names, without the layer's number."""
    layers: dict[int, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for name in sorted(kinds):
        if match := LAYER_NAME.fullmatch(name):
            layers.setdefault(int(match[1]), {})[match[2]] = kinds[name]
    return layers


def _fault_of_layers(layers: Mapping[int, Kinds], num_rows: int) -> str | None:
    """Return what is wrong with names, dtypes or shapes of the layers' states; None if nothing is."""
    if not layers or not num_rows:
        return "it has no layers" if not layers else "it does not say what it has read"
    if missing := set(range(len(layers))) - set(layers):
        return f"layer {min(missing)} is missing"
    for i in range(len(layers)):
        if differing := sorted(layers[0].keys() ^ layers[i].keys()):
            return f"layers 0 and {i} do not have the same states: {differing[0]}"
        for state, (dtype, shape) in layers[i].items():
            name = f"layers.{i}.{state}"
            if len(shape) < 2 or shape != layers[0][state][1] or 0 in shape:
                return f"{name} has shape {list(shape)}"
            if dtype not in (DTYPES if len(shape) == 2 else ("F32",)):
                return f"{name} has dtype {dtype}"
            if shape[0] != num_rows:
                return f"{name} is of {shape[0]} samples, the file says what {num_rows} have read"
    return None


def _fault_of_prompts(kinds: Kinds, num_rows: int, version: str) -> str | None:
    """Return what is wrong with names, dtypes or shapes of what was read; None if nothing is."""
    allowed = {f"{ID_NAMES[version]}.{row}" for row in range(num_rows)}
    for name in sorted(allowed):
        if name not in kinds:
            return f"{name} is missing"
        dtype, shape = kinds[name]
        if dtype != "I64" or len(shape) != 1 or not shape[0]:
            return f"{name} has dtype {dtype} and shape {list(shape)}"
    if version != "1":
        for row in range(num_rows):
            ends, hashes = kinds.get(f"picture_ends.{row}"), kinds.get(f"picture_hashes.{row}")
            if ends is None and hashes is None:
                continue
            count = ends[1][0] if ends and len(ends[1]) == 1 else 0
            if not count or ends != ("I64", (count,)) or hashes != ("U8", (count, HASH_BYTES)):
                return f"picture_ends.{row} and picture_hashes.{row} do not fit each other"
            allowed |= {f"picture_ends.{row}", f"picture_hashes.{row}"}
    others = sorted(name for name in kinds if not name.startswith("layers.") and name not in allowed)
    return f"it has a tensor named {_shown(others[0])}" if others else None


def _read_prompt(tensors: Mapping[str, Tensor], row: int, id_name: str) -> PromptIdentity:
    ends = tensors.get(f"picture_ends.{row}", torch.empty(0, dtype=torch.long)).tolist()
    hashes = tensors.get(f"picture_hashes.{row}", torch.empty(0, HASH_BYTES, dtype=torch.uint8))
    return PromptIdentity(
        tensors[f"{id_name}.{row}"], tuple(ends), tuple(bytes(hash_.tolist()) for hash_ in hashes)
    )


def _fault_of_pictures(prompt: PromptIdentity, version: str) -> str | None:
    """Return what is wrong with the pictures of a row; None if nothing is."""
    if version == "1":
        return None
    start = 0
    for end, picture_hash in zip(prompt.picture_ends, prompt.picture_hashes):
        if not start < end <= prompt.length:
            return f"picture_ends holds {end} after {start}, of {prompt.length} tokens"
        if int(prompt.ids[end - 1]) != picture_number(picture_hash):
            return f"the picture that ends at token {end} has another hash"
        start = end
    known = {picture_number(picture_hash) for picture_hash in prompt.picture_hashes}
    numbers = set(prompt.ids[prompt.ids < 0].unique().tolist())
    return "it has tokens of pictures without hashes" if numbers - known else None


def model_fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return what identifies a model: fields of its configuration, and a hash of a few values of every weight.

    The values are rounded to bfloat16, so that a checkpoint has the same fingerprint in every dtype. Of a model whose
    weights are not all in memory there is no hash.
    """
    text = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    fields = {name: getattr(text, name) for name in TEXT_FIELDS}
    fields |= {name: getattr(model.config, name) for name in MODEL_FIELDS if hasattr(model.config, name)}
    is_whole = not any(weight.is_meta for weight in model.parameters())
    return fields | ({"weights": _weights_hash(model)} if is_whole else {})


@torch.no_grad()
def _weights_hash(model: nn.Module) -> str:
    digest, samples = hashlib.sha256(), []
    for name, weight in model.named_parameters():
        if ".tuned_state." in f".{name}":  # is trained, and no weight of the model
            continue
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        if type(weight.detach()) is Tensor and weight.numel():
            flat = weight.detach().reshape(-1)
            samples.append(flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].to("cpu", torch.bfloat16))
    digest.update(torch.cat(samples).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def processor_fingerprint(processor) -> dict[str, Any]:
    """Return what identifies a processor: hashes of its parts, and where it places pictures."""
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


def refuse_other(
    name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any], kind: str, relation: str = "was read by"
) -> None:
    """Raise `ValueError` that names every field in which two fingerprints differ; a missing hash is not compared."""
    unknown = {"weights"} - (theirs.keys() & ours.keys())
    fields = [
        field for field in {**theirs, **ours} if field not in unknown and theirs.get(field) != ours.get(field)
    ]
    if fields:
        differing = "; ".join(
            f"{_shown(field)} {_shown(theirs.get(field))} there, {_shown(ours.get(field))} here"
            for field in fields[:20]
        )
        raise ValueError(f"{name} {relation} another {kind}: {differing}.")


def refuse_other_shapes(name: str, layers: Sequence[Mapping[str, Tensor]], config: PreTrainedConfig) -> None:
    """Raise `ValueError` if states do not have the shapes of a model's, whatever their fingerprint says."""
    text = config.get_text_config(decoder=True)
    wanted = {state.name: state.shape(text) for state in GENERATIONS[text.rwkv_version].states}
    if len(layers) != text.num_hidden_layers:
        raise ValueError(f"{name} has {len(layers)} layers, the model has {text.num_hidden_layers}.")
    for i, layer in enumerate(layers):
        if layer.keys() != wanted.keys():
            raise ValueError(
                f"{name} has the states {_shown(sorted(layer))} in layer {i}, the model has {sorted(wanted)}."
            )
        for state, tensor in layer.items():
            if tuple(tensor.shape[1:]) != wanted[state]:
                raise ValueError(
                    f"{name} has a {state} of shape {list(tensor.shape[1:])} in layer {i}, the model's is of "
                    f"{list(wanted[state])}."
                )


def _shown(value: object, most: int = 60) -> str:
    """Return a text for a message: short, on one line, and without characters that a terminal would obey."""
    text = str(value)[: most + 1]
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    return text if len(text) <= most else f"{text[:most]}..."
