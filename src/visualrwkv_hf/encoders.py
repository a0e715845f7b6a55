"""The vision encoders: one row each, for everything that depends on which encoder it is.

A new encoder is a new row. How checkpoints name its tensors is a row of the same name in
`visualrwkv_hf.conversion.encoders.ORIGINAL_ENCODERS`.

Letters: N pictures, L patches, D channels, S pixels of a picture's side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers.image_processing_utils import BaseImageProcessor
    from transformers.modeling_utils import PreTrainedModel

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}

SAM_UNSHUFFLE = 2
"""SAM's feature map is folded 2 x 2 into channels, without loss, to the grid of the other encoders."""


class Encoder(NamedTuple):
    """How a stock encoder of transformers serves as a vision tower."""

    model_type: str
    """Of its configuration in transformers."""
    model_class: Callable[[], type[PreTrainedModel]]
    """Imports and returns its class: a configuration alone needs no model code."""
    statistics: dict[str, list[float]]
    """`image_mean` and `image_std` of the pictures that it was trained on, three numbers each."""
    cut: Callable[[Any, int], None]
    """Removes from a model what is not computed for a `feature_layer` of -1 or -2 (see the configuration)."""
    read: Callable[[Tensor, Any, str], Tensor]
    """Makes patches [V N, L, D] of the last hidden state, the encoder's configuration and `class_token`."""
    width: Callable[[Any], int] = lambda config: config.hidden_size
    """D, from the encoder's configuration."""
    grid_size: Callable[[Any], int] = lambda config: config.image_size // config.patch_size
    """Side of its patch grid, before `fold`, from the encoder's configuration."""
    fold: int = 1
    """How many patches of the encoder, per direction, become one."""
    embedding: Callable[[Any], nn.Module] = lambda model: model.get_input_embeddings()
    """The module of a model that reads pixels."""
    defaults: dict[str, Any] = {}
    """Fields that are added to transformers' configuration, with their values if none are given."""
    problem: Callable[[Any], str] = lambda config: ""
    """What is wrong with its configuration in a way that transformers lets pass; empty if nothing is."""
    has_class_token: bool = False
    """Whether `read` can keep a class token."""
    has_feature_layer: bool = True
    """Whether `feature_layer` says which block's output is taken."""
    attention: tuple[str, ...] | None = None
    """Attention implementations that it can use; None: any."""
    image_processor: Callable[[int], BaseImageProcessor] | None = None
    """Makes transformers' own image processor of pictures of side S, for a tower of this encoder alone."""


def _clip_class() -> type[PreTrainedModel]:
    from transformers import CLIPVisionModel

    return CLIPVisionModel


def _cut_clip(model: Any, feature_layer: int) -> None:
    del model.encoder.layers[len(model.encoder.layers) + feature_layer + 1 :]
    model.post_layernorm = nn.Identity()  # only the pooled output, which nobody reads, passes this norm


def _read_clip(hidden: Tensor, config: Any, class_token: str) -> Tensor:
    class_feature, patches = hidden[:, :1], hidden[:, 1:]
    if class_token == "none":
        return patches
    parts = (class_feature, patches) if class_token == "first" else (patches, class_feature)
    return torch.cat(parts, dim=1)


def _clip_processor(size: int) -> BaseImageProcessor:
    """Return CLIP's: it resizes the shorter edge and crops the centre."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **CLIP
    )


def _dinov2_class() -> type[PreTrainedModel]:
    from transformers import Dinov2WithRegistersModel

    return Dinov2WithRegistersModel


def _cut_dinov2(model: Any, feature_layer: int) -> None:
    del model.encoder.layer[len(model.encoder.layer) + feature_layer + 1 :]
    if feature_layer == -2:
        model.layernorm = nn.Identity()
    # The mask token is used in masked pretraining only. The model's initialisation looks for it by name, so it
    # stays, but not as a weight.
    mask_token = torch.zeros_like(model.embeddings.mask_token)
    del model.embeddings.mask_token
    model.embeddings.register_buffer("mask_token", mask_token, persistent=False)


def _read_dinov2(hidden: Tensor, config: Any, class_token: str) -> Tensor:
    return hidden[:, 1 + config.num_register_tokens :]


def _siglip_class() -> type[PreTrainedModel]:
    from transformers import SiglipVisionModel

    return SiglipVisionModel


def _cut_siglip(model: Any, feature_layer: int) -> None:
    del model.encoder.layers[len(model.encoder.layers) + feature_layer + 1 :]
    if feature_layer == -2:
        model.post_layernorm = nn.Identity()
    if model.use_head:
        del model.head
        model.use_head = False


def _read_siglip(hidden: Tensor, config: Any, class_token: str) -> Tensor:
    return hidden


def _square_processor(size: int, statistics: dict[str, list[float]]) -> BaseImageProcessor:
    """Return SigLIP's image processor, which resizes to a square, with the statistics that are given."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    return SiglipImageProcessorPil(size={"height": size, "width": size}, **statistics)


def _sam_class() -> type[PreTrainedModel]:
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    return SamVisionEncoder


def _cut_nothing(model: Any, feature_layer: int) -> None:
    """Keep all of the model: SAM's features are its neck's output."""


def _read_sam(hidden: Tensor, config: Any, class_token: str) -> Tensor:
    return unshuffle_map(hidden)


def unshuffle_map(feature_map: Tensor) -> Tensor:
    """Fold SAM's map 2 x 2 into channels, without loss (arXiv 2410.11665, "lossless downsampler").

    Args:
        feature_map: [N, D, 2 h, 2 w].

    Returns:
        [N, h w, 4 D]; channel 4 c + 2 dy + dx of patch (y, x) is the map's channel c at (2 y + dy, 2 x + dx).
    """
    return map_as_patches(F.pixel_unshuffle(feature_map, SAM_UNSHUFFLE))


def map_as_patches(feature_map: Tensor) -> Tensor:
    """Return the places of a map row by row, [N, D, h, w] -> [N, h w, D]."""
    return feature_map.flatten(2).transpose(1, 2)


def _resnet_class() -> type[PreTrainedModel]:
    from transformers import ResNetModel

    return ResNetModel


def _resnet_problem(config: Any) -> str:
    """Return what is wrong with the numbers of stages: transformers drops those that only one of two lists has."""
    if config.depths and len(config.depths) == len(config.hidden_sizes):
        return ""
    return f"depths {config.depths} and hidden_sizes {config.hidden_sizes} must have a number for each stage."


def _resnet_grid_size(config: Any) -> int:
    """Return the side of the last stage's map.

    The stem halves a picture's side, and so do the pooling after it and each stage, the first one only if
    `downsample_in_first_stage` is set.
    """
    halvings = len(config.depths) + 1 + config.downsample_in_first_stage
    return math.ceil(config.image_size / 2**halvings)


def _read_map(hidden: Tensor, config: Any, class_token: str) -> Tensor:
    return map_as_patches(hidden)


ENCODERS = {
    "clip": Encoder(
        model_type="clip_vision_model",
        model_class=_clip_class,
        statistics=CLIP,
        cut=_cut_clip,
        read=_read_clip,
        has_class_token=True,
        image_processor=_clip_processor,
    ),
    "dinov2": Encoder(
        model_type="dinov2_with_registers",
        model_class=_dinov2_class,
        statistics=IMAGENET,
        cut=_cut_dinov2,
        read=_read_dinov2,
    ),
    "siglip": Encoder(
        model_type="siglip_vision_model",
        model_class=_siglip_class,
        statistics=HALF,
        cut=_cut_siglip,
        read=_read_siglip,
        image_processor=lambda size: _square_processor(size, HALF),
    ),
    "sam": Encoder(
        model_type="sam_vision_model",
        model_class=_sam_class,
        statistics=IMAGENET,  # as in the original
        cut=_cut_nothing,
        read=_read_sam,
        width=lambda config: config.output_channels * SAM_UNSHUFFLE**2,
        fold=SAM_UNSHUFFLE,
        has_feature_layer=False,
        attention=("eager", "sdpa"),  # it adds relative positions inside the attention
    ),
    "resnet": Encoder(
        model_type="resnet",
        model_class=_resnet_class,
        statistics=IMAGENET,
        cut=_cut_nothing,
        read=_read_map,
        width=lambda config: config.hidden_sizes[-1],
        grid_size=_resnet_grid_size,
        embedding=lambda model: model.embedder,
        defaults={"image_size": 224},
        problem=_resnet_problem,
        has_feature_layer=False,
        attention=("eager",),  # it has none
        image_processor=lambda size: _square_processor(size, IMAGENET),
    ),
}
"""The encoders by name, in the order in which their features are concatenated along the channels."""


def pixel_inputs(encoders: Iterable[str]) -> dict[str, str]:
    """Return the name of each encoder's input, in channel order.

    The first encoder of a tower reads `pixel_values`, as every model of transformers does, and every other one
    `pixel_values_{name}`.
    """
    given = set(encoders)
    names = [name for name in ENCODERS if name in given]
    return {name: "pixel_values" if i == 0 else f"pixel_values_{name}" for i, name in enumerate(names)}
