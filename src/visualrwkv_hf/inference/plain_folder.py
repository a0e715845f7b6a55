"""Read a model folder in the form in which this package writes it, without torch and transformers.

Nothing is refused here: of any other form the functions return None, and the classes that load it decide.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, get_args

from ..image_tokens import ClassToken, ImagePosition, PictureNumbers, Pooling, Projector, Reduction
from .checks import MAX_LAYERS, MAX_TEXT_FILE_BYTES, refuse_strange_size
from .loading import INDEX_FILE, TEXT_MODEL, VISION_MODEL, model_folder, model_type_of, read_json

FOLDS = {"clip": 1, "dinov2": 1, "siglip": 1, "sam": 2, "resnet": 1}
"""Encoder -> how many of its patches, per direction, become one. It is a column of `encoders.ENCODERS`, which imports
torch; a test compares this table and the others here."""

NUMBERS = ("image_size", "patch_size", "num_hidden_layers")
"""Fields of an encoder's configuration that are read here, all positive integers. A ResNet has others."""

SCANS = ("unidirectional", "bidirectional", "multidirectional", "snake", "spiral", "zigzag")
"""The names of `scan_orders.SCANS`."""

SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "head_dim",
    "attention_size",
    "intermediate_size",
)
VERSIONS = (5, 6, 7)
"""The keys of `generations.GENERATIONS`."""


class StoredDtype(NamedTuple):
    """A dtype as torch names it, and the bytes of a number."""

    name: str
    itemsize: int

    def __str__(self) -> str:
        return self.name


DTYPES = {
    "F64": StoredDtype("float64", 8),
    "F32": StoredDtype("float32", 4),
    "F16": StoredDtype("float16", 2),
    "BF16": StoredDtype("bfloat16", 2),
    "I64": StoredDtype("int64", 8),
    "I32": StoredDtype("int32", 4),
    "I16": StoredDtype("int16", 2),
    "I8": StoredDtype("int8", 1),
    "U8": StoredDtype("uint8", 1),
    "BOOL": StoredDtype("bool", 1),
}
"""safetensors' names of dtypes."""


class StoredTensor(NamedTuple):
    """What the header of a safetensors file says of a tensor."""

    dtype: StoredDtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class PlainText(SimpleNamespace):
    """The fields of a `VisualRWKVTextConfig` that describe a language model."""

    model_type = TEXT_MODEL

    @property
    def num_attention_heads(self) -> int:
        return self.attention_size // self.head_dim

    def get_text_config(self, decoder: bool = True) -> "PlainText":
        return self


class PlainVision(SimpleNamespace):
    """Likewise of a `VisualRWKVVisionConfig`; `encoders` are fields of the encoders that there are, by name."""

    @property
    def image_sizes(self) -> dict[str, int]:
        return {name: fields["image_size"] for name, fields in self.encoders.items()}

    @property
    def grid_size(self) -> int:
        return _grid_size(*next(iter(self.encoders.items())))


class PlainConfig(PictureNumbers, SimpleNamespace):
    """Likewise of a `VisualRWKVConfig`."""

    model_type = VISION_MODEL

    def get_text_config(self, decoder: bool = True) -> PlainText:
        return self.text_config


def plain_config(folder: Path) -> PlainConfig | PlainText | None:
    """Return what describes the model in `folder`, or None if `config.json` has another form than we write.

    Raises:
        ValueError: the folder is not a model folder of ours, a file is too large, or the files cannot hold so many
            parameters.
    """
    model_folder(str(folder))
    fields = read_json(folder / "config.json")
    is_text = model_type_of(folder) == TEXT_MODEL
    text = _text(fields if is_text else fields.get("text_config"))
    config = text if is_text or text is None else _config(fields, text)
    if config is None:
        return None
    config.conversion = fields.get("conversion") if isinstance(fields.get("conversion"), dict) else {}
    refuse_strange_size(config, folder, quick=True)
    return config


def _text(fields: Any) -> PlainText | None:
    if not isinstance(fields, dict) or fields.get("rwkv_version") not in VERSIONS:
        return None
    sizes: dict[str, Any] = {name: fields.get(name) for name in SIZES}
    ranks = [value for name, value in fields.items() if name.endswith("_low_rank_dim")]
    if not all(map(_is_count, sizes.values())) or not all(x is None or _is_count(x) for x in ranks):
        return None
    is_plain = (
        sizes["attention_size"] == sizes["hidden_size"]
        and sizes["attention_size"] % sizes["head_dim"] == 0
        and sizes["num_hidden_layers"] <= MAX_LAYERS
    )
    return PlainText(rwkv_version=fields["rwkv_version"], **sizes) if is_plain else None


def _vision(fields: Any) -> PlainVision | None:
    if not isinstance(fields, dict) or fields.get("class_token") not in get_args(ClassToken):
        return None
    given: dict[str, Any] = {name: fields.get(f"{name}_config") for name in FOLDS}
    encoders = {name: encoder for name, encoder in given.items() if encoder is not None}
    if not encoders or not all(_is_plain_encoder(name, encoder) for name, encoder in encoders.items()):
        return None
    sides = {_grid_size(name, encoder) for name, encoder in encoders.items()}
    tile_grid = fields.get("tile_grid", 1)
    if len(sides) > 1 or not _is_count(tile_grid) or not min(sides) or min(sides) % tile_grid:
        return None
    return PlainVision(encoders=encoders, class_token=fields["class_token"], tile_grid=tile_grid)


def _is_plain_encoder(name: str, fields: Any) -> bool:
    """Return whether an encoder's fields have a form from which `_grid_size` follows."""
    if not isinstance(fields, dict):
        return False
    if name != "resnet":
        return all(_is_count(fields.get(number)) for number in NUMBERS) and (
            fields["num_hidden_layers"] <= MAX_LAYERS
        )
    depths, sizes = fields.get("depths"), fields.get("hidden_sizes")
    if not isinstance(depths, list) or not isinstance(sizes, list) or not 0 < len(depths) == len(sizes):
        return False
    return (
        all(map(_is_count, depths))
        and sum(depths) <= MAX_LAYERS
        and _is_count(fields.get("image_size"))
        and type(fields.get("downsample_in_first_stage")) is bool
    )


def _grid_size(name: str, fields: Mapping[str, Any]) -> int:
    """Return the side of an encoder's patch grid, as `encoders.ENCODERS` has it."""
    if name == "resnet":
        halvings = len(fields["depths"]) + 1 + fields["downsample_in_first_stage"]
        return math.ceil(fields["image_size"] / 2**halvings)
    return fields["image_size"] // fields["patch_size"] // FOLDS[name]


def _config(fields: Mapping[str, Any], text: PlainText) -> PlainConfig | None:
    vision = _vision(fields.get("vision_config"))
    choices = {
        "scan": SCANS,
        "image_position": get_args(ImagePosition),
        "pooling": get_args(Pooling),
        "projector": get_args(Projector),
        "compressor_reduction": get_args(Reduction),
    }
    if vision is None or any(fields.get(name) not in known for name, known in choices.items()):
        return None
    if not (type(token := fields.get("image_token_id")) is int and 0 <= token < text.vocab_size):
        return None
    pooled, kept = fields.get("pooled_grid_size"), fields.get("compressor_num_tokens")
    needs_grid = fields["pooling"] in ("average", "adaptive")
    if needs_grid != (pooled is not None) or (needs_grid and not _is_count(pooled, vision.grid_size)):
        return None
    if fields["pooling"] == "class_token" and vision.class_token == "none":
        return None
    layers, per_tile = fields.get("compressor_num_layers"), fields.get("compressor_per_tile")
    if type(layers) is not int or not 0 <= layers <= MAX_LAYERS or type(per_tile) is not bool:
        return None
    config = PlainConfig(
        **{name: fields[name] for name in choices},
        text_config=text,
        vision_config=vision,
        pooled_grid_size=pooled,
        compressor_num_layers=layers,
        compressor_num_tokens=kept,
        compressor_per_tile=per_tile,
    )
    most = config.num_tile_tokens if per_tile else None
    if layers and not (text.rwkv_version == 7 and config.scan == "unidirectional" and _is_count(kept, most)):
        return None
    return config


def _is_count(value: Any, most: int | None = None) -> bool:
    return type(value) is int and value >= 1 and (most is None or value <= most)


def stored_tensors(folder: Path) -> dict[str, StoredTensor] | None:
    """Return the tensors of a folder by name, or None if its files are not as safetensors writes them."""
    files = [folder / "model.safetensors"]
    if not files[0].exists() and (folder / INDEX_FILE).is_file():
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        if not names or not all(re.fullmatch(r"[\w.-]+\.safetensors", str(name)) for name in names):
            return None
        files = [folder / name for name in sorted(names)]
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            found = _header(file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        if found is None or tensors.keys() & found.keys():
            return None
        tensors |= found
    return tensors


def _header(file: Path) -> dict[str, StoredTensor] | None:
    """Return what the header of a safetensors file says; None if its tensors do not fill the file.

    Raises:
        KeyError, TypeError, AttributeError, ValueError, RecursionError: it is not such a header.
    """
    if not file.is_file():
        return None
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 2 <= length <= MAX_TEXT_FILE_BYTES:
            return None
        entries = json.loads(opened.read(length))
    entries.pop("__metadata__", None)
    tensors, places = {}, []
    for name, entry in entries.items():
        tensors[name] = StoredTensor(DTYPES[entry["dtype"]], tuple(entry["shape"]))
        start, end = entry["data_offsets"]
        if end - start != tensors[name].num_bytes:
            return None
        places.append((start, end))
    places.sort()
    is_whole = all(end == start for (_, end), (start, _) in zip([(0, 0), *places], places))
    return tensors if places and is_whole and file.stat().st_size == 8 + length + places[-1][1] else None
