"""Full-size models with random weights for benchmark_laptop.py, in the folders that a released checkpoint would give.

Nothing is downloaded: an original checkpoint of the release's names and shapes is written tensor by tensor, and the
package's own conversion makes the folder, so that memory stays small.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from visualrwkv_hf import VisualRWKVConfig
from visualrwkv_hf.conversion import expected_shapes, quantize, restore_state_dict, to_hf

BLOCK = 2**24
"""Random numbers that are drawn once and repeated: a model of 7B is written at the speed of the disk."""


class Model(NamedTuple):
    """A release of which the shape is measured.

    Attributes:
        family: of `conversion`'s table of releases.
        text: fields of [`VisualRWKVTextConfig`].
        vision: fields of [`VisualRWKVVisionConfig`].
        projector: the release's.
    """

    family: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    projector: str

    @property
    def is_large(self) -> bool:
        """Whether a laptop has room for it in int4 only."""
        return self.text["hidden_size"] >= 4096


CLIP_LARGE = {
    "clip_config": dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    ),
    "class_token": "last",
}
THREE_ENCODERS = {
    "dinov2_config": dict(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=448, patch_size=14
    ),
    "siglip_config": dict(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=448,
        patch_size=14,
    ),
    "sam_config": {},
    "feature_layer": -2,
}
SMALL_TOWER = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=1,
    image_size=56,
    patch_size=14,
)
SMALL_CLIP = {
    "clip_config": SMALL_TOWER,
    "class_token": "last",
}
SMALL_SIGLIP = {"siglip_config": SMALL_TOWER}

MODELS = {
    "v6-1.6b": Model(
        "v6.0", dict(rwkv_version=6, num_hidden_layers=24, hidden_size=2048), CLIP_LARGE, "linear"
    ),
    "v7-0.1b": Model(
        "v7.00",
        dict(rwkv_version=7, num_hidden_layers=12, hidden_size=768, gate_low_rank_dim=128),
        THREE_ENCODERS,
        "gated_norm",
    ),
    "v6-7b": Model(
        "v6.0", dict(rwkv_version=6, num_hidden_layers=32, hidden_size=4096), CLIP_LARGE, "linear"
    ),
}
"""Short name of a release -> its shape."""

QUICK_MODELS = {
    "v6-tiny": Model(
        "v6.0", dict(rwkv_version=6, num_hidden_layers=2, hidden_size=128), SMALL_CLIP, "linear"
    ),
    "v7-tiny": Model(
        "v7.01", dict(rwkv_version=7, num_hidden_layers=2, hidden_size=128), SMALL_SIGLIP, "gated_norm"
    ),
}
"""What `--quick` measures: no release, but small enough for a test."""


def config_of(model: Model) -> VisualRWKVConfig:
    """Return the configuration of a shape."""
    return VisualRWKVConfig(
        text_config=dict(model.text), vision_config=dict(model.vision), projector=model.projector
    )


def model_folder(name: str, model: Model, folder: Path, weights: str | None = None) -> Path:
    """Return the folder of a model, made first if it is not there yet.

    Args:
        name: the model's.
        model: its shape.
        folder: where the model folders are.
        weights: "int8" or "int4" for a folder that is rounded from the one in bfloat16; None for the latter.

    Returns:
        Path: `folder / name`, with "-int8" or "-int4" after the name. Of a large model in few bits there is no folder
        in bfloat16: the checkpoint is rounded while it is converted, so that the disk holds it once.
    """
    target = folder / (f"{name}-{weights}" if weights else name)
    if (target / "config.json").exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    if weights and not model.is_large:
        return quantize(model_folder(name, model, folder), target, weights=weights, verify=False)
    original = folder / f"{name}.safetensors"
    try:
        write_original(original, original_shapes(config_of(model)))
        # Numbers that shapes do not tell, such as the heads of a small tower, come from the model's own description.
        options = dict(vision_config=described(model.vision), verify=False, weights=weights)
        to_hf(original, target, family=model.family, **options)
    finally:
        original.unlink(missing_ok=True)
    return target


def original_shapes(config: VisualRWKVConfig) -> dict[str, tuple[int, ...]]:
    """Return original name -> shape of a checkpoint with this configuration."""
    ours = {name: torch.empty(shape, device="meta") for name, shape in expected_shapes(config).items()}
    return {name: tuple(tensor.shape) for name, tensor in restore_state_dict(ours, config).items()}


def described(vision: Mapping[str, Any]) -> dict[str, Any]:
    """Return the encoders of a description."""
    return {name: dict(value) for name, value in vision.items() if name.endswith("_config") and value}


def write_original(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write a checkpoint of random bfloat16 weights as safetensors, without holding more than one of them.

    Args:
        path: the file to write.
        shapes: original name -> shape.
    """
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    normal = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for piece in random_pieces(name, shape, normal):
                file.write(piece.bfloat16().view(torch.int16).numpy().tobytes())


class RandomWeights(Mapping[str, torch.Tensor]):
    """The tensors of `write_original`, each made when it is asked for: a file of 7B is written without the memory."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self.shapes = shapes
        self.normal = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        return torch.cat([piece.bfloat16() for piece in random_pieces(name, shape, self.normal)]).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def random_pieces(name: str, shape: tuple[int, ...], normal: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the values of a tensor, float32 [n] each, of a size with which no layer's output grows or vanishes.

    Args:
        name: the tensor's original name: norms are about 1, and decays are those of a fresh model's middle.
        shape: the tensor's.
        normal: normal numbers [BLOCK], repeated where a tensor has more.
    """
    is_norm = ("ln" in name or "norm" in name) and name.endswith("weight")
    mean, spread = (1.0, 0.1) if is_norm else (0.0, 0.02)
    if name.endswith(("time_decay", "att.w0")):
        mean, spread = -3.0, 1.0
    elif "emb." in name:
        spread = 1.0
    elif len(shape) == 2 and min(shape) > 64:
        spread = shape[-1] ** -0.5
    left = math.prod(shape)
    while left:
        piece = normal[: min(left, BLOCK)]
        left -= len(piece)
        yield mean + spread * piece
