"""Read golden cases from a folder of the original's numbers, and make models of its weights.

A folder holds `index.json`, `weights/` and `<kind>/<case>/` with `case.json`, `inputs.safetensors`,
`expected.safetensors` and, for cases about text or pictures, other files. Weights have the original's names and go
through the real converter.
"""

import functools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from visualrwkv_hf.conversion import load_original

STOP_TOKEN = 261
IMAGE_ID = -200
"""The original's placeholder up to UHD; v7 uses the last id of its vocabulary instead."""

FAMILY_OF = {
    "v50": "v5.0",
    "v51": "v5.1",
    "v60": "v6.0",
    "v601": "v6.01",
    "hd": "hd",
    "uhd": "uhd",
    "v700": "v7.00",
    "v701": "v7.01",
    "v703": "v7.03",
    "v704": "v7.04",
}
"""Maps the first word of a case's name to the release that the case is about."""


@dataclass(eq=False)
class Case:
    """Reads one case. Inputs and weights stored in bfloat16 become float32; expected tensors keep their type."""

    folder: Path
    path: str
    files_read: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        return self.path.split("/")[-1]

    @property
    def family(self) -> str:
        return FAMILY_OF[self.name.split("_")[0]]

    @functools.cached_property
    def info(self) -> dict[str, Any]:
        return json.loads((self.folder / self.path / "case.json").read_text("utf-8"))

    @property
    def config(self) -> dict[str, Any]:
        return self.info["config"]

    @functools.cached_property
    def inputs(self) -> dict[str, Tensor]:
        return upcast(self._tensors("inputs.safetensors"))

    @functools.cached_property
    def expected(self) -> dict[str, Tensor]:
        return self._tensors("expected.safetensors")

    def _tensors(self, name: str) -> dict[str, Tensor]:
        path = self.folder / self.path / name
        return load_file(path) if path.exists() else {}

    def file(self, name: str) -> Path:
        self.files_read.add(name)
        return self.folder / self.path / name

    def json(self, name: str) -> Any:
        return json.loads(self.file(name).read_text("utf-8"))

    def rows(self, name: str) -> list[dict]:
        return [json.loads(line) for line in self.file(name).read_text("utf-8").splitlines()]

    def picture(self, name: str) -> Image.Image:
        return Image.open(self.file(name))

    def variants(self, quantity: str) -> list[str]:
        """Return `["grid-1", "grid0"]` if the expected tensors are `quantity.grid-1` and `quantity.grid0`."""
        return sorted(name.split(".", 1)[1] for name in self.expected if name.startswith(f"{quantity}."))

    def is_float_in_bfloat16(self, name: str) -> bool:
        return self.expected[name].dtype == torch.bfloat16

    @property
    def image_token_id(self) -> int:
        """Return the placeholder for our model: the original's for v7, else the largest id that no text here uses."""
        vocab_size = self.config["vocab_size"]
        if self.family.startswith("v7"):
            return vocab_size - 1
        used = {int(i) for name, ids in self.inputs.items() if "input_ids" in name for i in ids.unique()}
        return max(set(range(vocab_size)) - used)

    def weights(self) -> dict[str, Tensor]:
        self.files_read |= {
            name.rsplit("/", 1)[-1] for name in self.info["weights"] if name.startswith(self.path)
        }
        return read_weights(self.folder, tuple(self.info["weights"]))

    def model(self, side: int | None = None, **overrides: Any) -> torch.nn.Module:
        """Return the converted model; `side` is that of the towers' grid if the case gives features in their place."""
        fields = {"family": self.family, "image_token_id": self.image_token_id, **overrides}
        fields["vision_config"] = self.vision_fields(side)
        self.weights()
        return converted(self.folder, tuple(self.info["weights"]), json.dumps(fields, sort_keys=True))

    def vision_fields(self, side: int | None) -> dict[str, Any]:
        """Return the fields that the tower's weights do not tell: the heads, or all fields if there are no weights."""
        if "towers" in self.config:
            heads = {
                OUR_TOWERS[tower]: fields["num_heads"] for tower, fields in self.config["towers"].items()
            }
            return {f"{name}_config": {"num_attention_heads": n} for name, n in heads.items()}
        vit = self.config.get("vit", {})
        if "hidden_size" in vit:
            encoder = "clip_config" if "projection_dim" in vit else "siglip_config"
            return {encoder: {"num_attention_heads": vit["num_attention_heads"]}}
        fields = three_encoders(self.tower_widths, side or 1)
        if self.family == "uhd":  # the whole picture and its tiles: [B, 1 + tiles, L, D]
            views = next(x.shape[1] for name, x in self.inputs.items() if name.startswith("images.dino"))
            fields["tile_grid"] = math.isqrt(views - 1)
        return fields

    @property
    def tower_widths(self) -> dict[str, int]:
        """Return the widths of the towers' features: those of the case's features, else any that have the right sum."""
        given = {
            name.split(".")[1]: tensor.shape[-1]
            for name, tensor in self.inputs.items()
            if name.startswith("images.") and name.split(".")[1] in OUR_TOWERS
        }
        if given:
            return given
        weights = self.weights()
        width = next(weights[name] for name in PROJECTOR_INPUTS if name in weights).shape[1]
        return {"dino": width - 8, "siglip": 4, "sam": 4}  # pictures are never read


OUR_TOWERS = {"dino": "dinov2", "siglip": "siglip", "sam": "sam"}
"""Maps the original's names of the three towers to ours."""

PROJECTOR_INPUTS = ("proj.proj.weight", "proj.weight", "proj.gate.weight")
"""Weights of projectors; the second size of the first that a projector has is the width of the features."""

COLUMNS = 128
"""How many columns of the vocabulary `logits128` holds."""


class Public(NamedTuple):
    """Holds the logits of some samples of a batch from a call as users make it, without the original's layout."""

    rows: Tensor  # [R] which samples
    logits: Tensor  # [R, T, vocab_size]
    mask: Tensor  # [R, T], which positions are tokens


@dataclass
class Result:
    """Holds what a case's runner computed, under the names of the expected tensors."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    public: dict[str, Public] = field(default_factory=dict)
    facts: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Results that are not tensors: name -> (found, expected)."""

    def add(self, variant: str = "", **tensors: Tensor | Public) -> None:
        for name, tensor in tensors.items():
            name = f"{name}.{variant}" if variant else name
            if isinstance(tensor, Public):
                self.public[name] = tensor
            else:
                self.tensors[name] = tensor[..., :COLUMNS] if name.startswith("logits128") else tensor


def upcast(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.float() if t.dtype == torch.bfloat16 else t for name, t in tensors.items()}


def read_cases(folder: Path) -> list[str]:
    """Return the paths of all cases of a folder: those in its index and those that it contains."""
    indexed = {row["path"] for row in json.loads((folder / "index.json").read_text("utf-8"))}
    found = {path.parent.relative_to(folder).as_posix() for path in folder.glob("*/*/case.json")}
    return sorted(indexed | found)


@functools.lru_cache(maxsize=4)
def read_weights(folder: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the union of the files' tensors; of two with the same name the later file's counts."""
    tensors: dict[str, Tensor] = {}
    for name in names:
        if name.endswith(".npz"):
            with np.load(folder / name) as arrays:
                tensors |= {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        else:
            tensors |= load_file(folder / name)
    return upcast(tensors)


@functools.lru_cache(maxsize=8)
def converted(folder: Path, weights: tuple[str, ...], fields: str) -> torch.nn.Module:
    torch.manual_seed(0)  # for vision towers that have no weights here
    return load_original(read_weights(folder, weights), **json.loads(fields))


def three_encoders(widths: dict[str, int], side: int) -> dict[str, Any]:
    """Return minimal encoders of the given widths over side x side patches: only the widths are used."""
    small = {"num_hidden_layers": 1, "num_attention_heads": 1, "image_size": side, "patch_size": 1}
    sam = {"output_channels": widths["sam"] // 4, "hidden_size": 4, "mlp_dim": 4, "window_size": 0}
    return {
        "dinov2_config": {**small, "hidden_size": widths["dino"], "mlp_ratio": 1},
        "siglip_config": {**small, "hidden_size": widths["siglip"], "intermediate_size": 4},
        "sam_config": {**small, **sam, "image_size": 2 * side, "global_attn_indexes": [0]},
    }


def grid_side(num_patches: int) -> int:
    side = math.isqrt(num_patches)
    assert side**2 == num_patches, num_patches
    return side
