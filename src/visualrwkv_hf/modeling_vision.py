"""Pictures to features: stock vision encoders behind one forward -> [N, L, D], pooling, projectors.

Letters: N pictures, V views of a picture (the whole and its tiles), L patches, D channels, C hidden size of
the language model.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionModel, Dinov2WithRegistersModel, PreTrainedModel, SiglipVisionModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.sam.modeling_sam import SamVisionEncoder
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_visualrwkv import (
    ENCODER_NAMES,
    SAM_UNSHUFFLE,
    VisualRWKVConfig,
    VisualRWKVVisionConfig,
)

# Encoders: the stock model without what no feature comes from, and its features as [V N, L, D].


def _cut_clip(model: CLIPVisionModel, feature_layer: int) -> None:
    del model.encoder.layers[len(model.encoder.layers) + feature_layer + 1 :]
    model.post_layernorm = nn.Identity()  # only its pooled output passes here


def _cut_dinov2(model: Dinov2WithRegistersModel, feature_layer: int) -> None:
    del model.encoder.layer[len(model.encoder.layer) + feature_layer + 1 :]
    if feature_layer == -2:
        model.layernorm = nn.Identity()
    # For masked pretraining only. Its initialisation looks for it by name, so it stays, but as no weight.
    mask_token = torch.zeros_like(model.embeddings.mask_token)
    del model.embeddings.mask_token
    model.embeddings.register_buffer("mask_token", mask_token, persistent=False)


def _cut_siglip(model: SiglipVisionModel, feature_layer: int) -> None:
    del model.encoder.layers[len(model.encoder.layers) + feature_layer + 1 :]
    if feature_layer == -2:
        model.post_layernorm = nn.Identity()
    if model.use_head:
        del model.head
        model.use_head = False


def _cut_nothing(model: SamVisionEncoder, feature_layer: int) -> None:
    """SAM's features are its neck's output: all of it is used."""


def _read_clip(hidden: torch.Tensor, config: VisualRWKVVisionConfig) -> torch.Tensor:
    class_token, patches = hidden[:, :1], hidden[:, 1:]
    if config.class_token == "none":
        return patches
    return torch.cat(
        (class_token, patches) if config.class_token == "first" else (patches, class_token), dim=1
    )


def _read_dinov2(hidden: torch.Tensor, config: VisualRWKVVisionConfig) -> torch.Tensor:
    return hidden[:, 1 + config.dinov2_config.num_register_tokens :]


def _read_siglip(hidden: torch.Tensor, config: VisualRWKVVisionConfig) -> torch.Tensor:
    return hidden


def _read_sam(hidden: torch.Tensor, config: VisualRWKVVisionConfig) -> torch.Tensor:
    return unshuffle_map(hidden)


class Encoder(NamedTuple):
    """How a stock encoder serves: its class, what is cut off it, what is read of its last hidden state."""

    model_class: type[PreTrainedModel]
    cut: Callable[[PreTrainedModel, int], None]
    read: Callable[[torch.Tensor, VisualRWKVVisionConfig], torch.Tensor]


ENCODERS = {
    "clip": Encoder(CLIPVisionModel, _cut_clip, _read_clip),
    "dinov2": Encoder(Dinov2WithRegistersModel, _cut_dinov2, _read_dinov2),
    "siglip": Encoder(SiglipVisionModel, _cut_siglip, _read_siglip),
    "sam": Encoder(SamVisionEncoder, _cut_nothing, _read_sam),
}


def _build_encoder(name: str, config: VisualRWKVVisionConfig) -> PreTrainedModel:
    encoder, encoder_config = ENCODERS[name], config.encoders[name]
    if name == "sam" and encoder_config._attn_implementation not in (None, "eager", "sdpa"):
        # SAM adds relative positions inside the attention, which no other implementation can.
        encoder_config._attn_implementation = "sdpa"
    model = encoder.model_class(encoder_config)
    encoder.cut(model, config.feature_layer)
    return model


# Maps: pure functions on patches in row-major order.


def _side(length: int) -> int:
    side = math.isqrt(length)
    if side * side != length:
        raise ValueError(f"{length} patches are no square grid.")
    return side


def _as_map(patches: torch.Tensor) -> torch.Tensor:
    """[N, h w, D] -> [N, D, h, w], h = w."""
    side = _side(patches.shape[1])
    return patches.transpose(1, 2).unflatten(2, (side, side))


def _as_patches(feature_map: torch.Tensor) -> torch.Tensor:
    """[N, D, h, w] -> [N, h w, D], row by row."""
    return feature_map.flatten(2).transpose(1, 2)


def unshuffle_map(feature_map: torch.Tensor) -> torch.Tensor:
    """SAM's map, folded 2 x 2 into channels without loss (arXiv 2410.11665, "lossless downsampler").

    Args:
        feature_map: [N, D, 2 h, 2 w].

    Returns:
        [N, h w, 4 D]; channel 4 c + 2 dy + dx of patch (y, x) is the map's channel c at (2 y + dy, 2 x + dx).
    """
    return _as_patches(F.pixel_unshuffle(feature_map, SAM_UNSHUFFLE))


def stitch_tiles(tiles: torch.Tensor, tile_grid: int) -> torch.Tensor:
    """The maps of n x n tiles, averaged down by n and put together to one map (UHD, arXiv 2410.11665).

    Args:
        tiles: [N, n * n, L, D], row by row.
        tile_grid: n.

    Returns:
        [N, L, D].

    Raises:
        ValueError: if L is no square of a multiple of n, or the number of tiles is not n * n.
    """
    n = tile_grid
    pictures, count, length, width = tiles.shape
    side = _side(length)
    if count != n * n or side % n:
        raise ValueError(f"{count} tiles of {side} x {side} patches cannot be stitched {n} x {n}.")
    small = F.avg_pool2d(_as_map(tiles.flatten(0, 1)), n)  # [N n n, D, side / n, side / n]
    small = small.reshape(pictures, n, n, width, side // n, side // n)  # [N, row, column, D, y, x]
    return small.permute(0, 1, 4, 2, 5, 3).reshape(pictures, length, width)


def fuse_features(features: Mapping[str, torch.Tensor], tile_grid: int = 1) -> torch.Tensor:
    """Features of several encoders side by side: whole view's clip | dinov2 | siglip | sam, then the tiles'.

    Args:
        features: of each encoder, [V N, L, D_encoder], views of a picture adjacent: the whole, then its tiles
            row by row.
        tile_grid: n; V = 1 for n = 1, else 1 + n * n.

    Returns:
        [N, L, D], D the sum of all widths, twice that with tiles.

    Raises:
        ValueError: if encoders disagree in pictures or patches, or the views are not V for each picture.
    """
    shapes = {name: tuple(features[name].shape[:2]) for name in ENCODER_NAMES if name in features}
    first, *others = shapes.values()
    if any(shape != first for shape in others):
        raise ValueError(
            f"All encoders must give the same pictures and patches, got (views, patches) {shapes}."
        )
    views = 1 if tile_grid == 1 else 1 + tile_grid**2
    if first[0] % views:
        raise ValueError(f"{first[0]} views are not a multiple of the {views} that a picture has.")
    split = [features[name].unflatten(0, (-1, views)) for name in shapes]  # [N, V, L, D_encoder] each
    parts = [feature[:, 0] for feature in split]
    if tile_grid > 1:
        parts += [stitch_tiles(feature[:, 1:], tile_grid) for feature in split]
    return torch.cat(parts, dim=-1)


class VisualRWKVVisionModel(PreTrainedModel):
    """One or several stock encoders that look at the same pictures, behind one forward.

    Modules that no feature comes from are left out: a checkpoint of the stock model has more tensors. Every
    encoder initialises itself as the stock model does: `PreTrainedModel` leaves it to its sub-models.
    """

    config_class = VisualRWKVVisionConfig
    base_model_prefix = "vision_tower"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "CLIPVisionEmbeddings",
        "CLIPEncoderLayer",
        "Dinov2WithRegistersEmbeddings",
        "Dinov2WithRegistersLayer",
        "SiglipVisionEmbeddings",
        "SiglipEncoderLayer",
        "SamVisionLayer",
    ]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: VisualRWKVVisionConfig):
        super().__init__(config)
        for name in config.encoders:
            self.add_module(name, _build_encoder(name, config))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.get_submodule(next(iter(self.config.encoders))).get_input_embeddings()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        pixel_values_siglip: torch.FloatTensor | None = None,
        pixel_values_sam: torch.FloatTensor | None = None,
        pixel_values_dinov2: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """Pictures to features.

        Args:
            pixel_values: [V N, 3, S, S] for the first encoder in channel order; views of a picture adjacent,
                the whole first, then its tiles row by row.
            pixel_values_siglip: the same views for the further encoders, each at its own size.
            pixel_values_sam: likewise.
            pixel_values_dinov2: likewise.
            kwargs: `return_dict`.

        Returns:
            `last_hidden_state` [N, L, D], with CLIP's class token where the configuration puts it.

        Raises:
            ValueError: if an encoder's pictures are missing, superfluous, of another size or number.
        """
        given: dict[str, torch.Tensor | None]
        given = {"siglip": pixel_values_siglip, "sam": pixel_values_sam, "dinov2": pixel_values_dinov2}
        pixels = self._pixels_of_encoders(pixel_values, given)
        return BaseModelOutput(last_hidden_state=self.fuse(self.encode(pixels)))

    def encode(self, pixels: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Pictures by encoder, [V N, 3, S, S] -> features by encoder, [V N, L, D_encoder]."""
        features = {}
        for name, pictures in pixels.items():
            hidden = self.get_submodule(name)(pictures.to(self.dtype)).last_hidden_state
            features[name] = ENCODERS[name].read(hidden, self.config)
        return features

    def fuse(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[`fuse_features`] with the configuration's tiles."""
        return fuse_features(features, self.config.tile_grid)

    def _pixels_of_encoders(
        self, pixel_values: torch.Tensor | None, given: dict[str, torch.Tensor | None]
    ) -> dict[str, torch.Tensor]:
        """The pictures of each encoder, checked."""
        first, *further = self.config.encoders
        encoders = self.config.encoders
        arguments = {name: "pixel_values" if name == first else f"pixel_values_{name}" for name in encoders}
        pixels: dict[str, torch.Tensor] = {}
        for name, config in encoders.items():
            pictures = pixel_values if name == first else given[name]
            if pictures is None:
                raise ValueError(f"The tower has {', '.join(encoders)}: {arguments[name]} is missing.")
            self._check_pictures(arguments[name], pictures, config)
            pixels[name] = pictures
        if superfluous := [
            name for name, pictures in given.items() if pictures is not None and name not in further
        ]:
            raise ValueError(
                f"pixel_values_{superfluous[0]} has no use: the tower has {', '.join(pixels)}, "
                f"and {first} reads pixel_values."
            )
        # shape[0] and no set: torch.export leaves the number open, which len() and a hash would fix.
        counts = {arguments[name]: pictures.shape[0] for name, pictures in pixels.items()}
        if any(count != counts["pixel_values"] for count in counts.values()):
            raise ValueError(f"All encoders must see the same views, got {counts}.")
        if counts["pixel_values"] % self.config.num_views:
            raise ValueError(
                f"pixel_values holds {counts['pixel_values']} views, a picture has {self.config.num_views}: "
                f"the whole and {self.config.tile_grid} x {self.config.tile_grid} tiles."
            )
        return pixels

    @staticmethod
    def _check_pictures(argument: str, pictures: torch.Tensor, config) -> None:
        expected = (config.num_channels, config.image_size, config.image_size)
        if tuple(pictures.shape[1:]) != expected:
            raise ValueError(
                f"{argument} must be [N, {', '.join(map(str, expected))}], got {list(pictures.shape)}."
            )


def resample_position_embedding(
    position: torch.Tensor, new_grid: tuple[int, int], num_prefix_tokens: int = 0
) -> torch.Tensor:
    """An absolute position embedding for another grid: bicubic, antialiased, in float32 (as timm does).

    Args:
        position: [1, P + h * h, D], of P prefix tokens, kept as they are, and a square grid.
        new_grid: height and width.
        num_prefix_tokens: P.

    Returns:
        [1, P + height * width, D] in the dtype of `position`.
    """
    prefix, patches = position[:, :num_prefix_tokens], position[:, num_prefix_tokens:]
    resized = F.interpolate(_as_map(patches.float()), size=new_grid, mode="bicubic", antialias=True)
    return torch.cat((prefix, _as_patches(resized).to(position.dtype)), dim=1)


# Pooling: patches [N, h w, D] -> fewer.


def _pool_average(patches: torch.Tensor, grid_size: int) -> torch.Tensor:
    """Window and stride h // g; where g does not divide h, there may be more than g * g windows."""
    feature_map = _as_map(patches)
    return _as_patches(F.avg_pool2d(feature_map, feature_map.shape[-1] // grid_size))


def _pool_adaptive(patches: torch.Tensor, grid_size: int) -> torch.Tensor:
    """Exactly g x g; window i spans floor(i h / g) to ceil((i + 1) h / g)."""
    return _as_patches(F.adaptive_avg_pool2d(_as_map(patches), grid_size))


def _pool_none(patches: torch.Tensor, grid_size: None) -> torch.Tensor:
    return patches


def _pool_to_nothing(patches: torch.Tensor, grid_size: None) -> torch.Tensor:
    return patches[:, :0]


POOLINGS: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    "none": _pool_none,
    "average": _pool_average,
    "adaptive": _pool_adaptive,
    "class_token": _pool_to_nothing,
}
"""What becomes of the patches beside the class token. Only "mean" takes the class token in."""


def pool_patches(features: torch.Tensor, config: VisualRWKVConfig) -> torch.Tensor:
    """Fewer tokens of a picture: [N, L, D] -> [N, config.num_tile_tokens, D] (arXiv 2406.13362, table 9).

    The class token stays where it stands.

    Raises:
        ValueError: if L without the class token is no square.
    """
    if config.pooling == "mean":
        return features.mean(dim=1, keepdim=True)
    position = config.vision_config.class_token
    leading, trailing = int(position == "first"), int(position == "last")
    first, patches, last = features.split((leading, features.shape[1] - leading - trailing, trailing), dim=1)
    return torch.cat((first, POOLINGS[config.pooling](patches, config.pooled_grid_size), last), dim=1)


# Projectors: [N, L, D] -> [N, L, C]. No biases; names as in the original; initialised as torch does Linear.


class LinearProjector(nn.Module):
    """W x."""

    def __init__(self, in_features: int, out_features: int, layer_norm_eps: float = 1e-5):
        super().__init__()
        self.proj = nn.Linear(in_features, out_features, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.proj(features)


class LinearFlipProjector(nn.Module):
    """W [x_i, x_{L-1-i}]: a token beside the one that stands as far from the other end (v6.01)."""

    def __init__(self, in_features: int, out_features: int, layer_norm_eps: float = 1e-5):
        super().__init__()
        self.proj = nn.Linear(2 * in_features, out_features, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.proj(torch.cat((features, features.flip(1)), dim=-1))


class GatedProjector(nn.Module):
    """W_o (h * sigmoid(W_g h)), h = W x (HD, arXiv 2410.11665)."""

    def __init__(self, in_features: int, out_features: int, layer_norm_eps: float = 1e-5):
        super().__init__()
        self.proj = nn.Linear(in_features, out_features, bias=False)
        self.gate = nn.Linear(out_features, out_features, bias=False)
        self.o_proj = nn.Linear(out_features, out_features, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.proj(features)
        return self.o_proj(hidden * torch.sigmoid(self.gate(hidden)))


class ReluProjector(nn.Module):
    """W_o relu(W x) (UHD as its released code runs; the checkpoint's `gate` is read by nothing)."""

    def __init__(self, in_features: int, out_features: int, layer_norm_eps: float = 1e-5):
        super().__init__()
        self.proj = nn.Linear(in_features, out_features, bias=False)
        self.o_proj = nn.Linear(out_features, out_features, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.o_proj(F.relu(self.proj(features)))


class GatedNormProjector(nn.Module):
    """LayerNorm(W_o (x * sigmoid(W_g x))): the gate reads the features themselves (v7)."""

    def __init__(self, in_features: int, out_features: int, layer_norm_eps: float = 1e-5):
        super().__init__()
        self.gate = nn.Linear(in_features, in_features, bias=False)
        self.o_proj = nn.Linear(in_features, out_features, bias=False)
        self.ln_v = nn.LayerNorm(out_features, eps=layer_norm_eps)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.ln_v(self.o_proj(features * torch.sigmoid(self.gate(features))))


PROJECTORS = {
    "linear": LinearProjector,
    "linear_flip": LinearFlipProjector,
    "gated": GatedProjector,
    "relu": ReluProjector,
    "gated_norm": GatedNormProjector,
}


__all__ = ["VisualRWKVVisionModel"]
