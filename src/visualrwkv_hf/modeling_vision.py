"""Vision: stock encoders with a common forward that returns [N, L, D], pooling, and projectors.

Letters: N pictures, V views of a picture (the whole and its tiles), L patches, D channels, C hidden size of
the language model.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_visualrwkv import VisualRWKVConfig, VisualRWKVVisionConfig
from .encoders import ENCODERS, map_as_patches
from .image_tokens import class_token_places, num_views


def _build_encoder(name: str, config: VisualRWKVVisionConfig) -> PreTrainedModel:
    """Return the stock model without the modules that no feature comes from."""
    encoder, encoder_config = ENCODERS[name], config.encoders[name]
    if encoder.attention and encoder_config._attn_implementation not in (None, *encoder.attention):
        encoder_config._attn_implementation = encoder.attention[-1]
    model = encoder.model_class()(encoder_config)
    encoder.cut(model, config.feature_layer)
    return model


# Maps: pure functions on patches in row-major order.


def _side(length: int) -> int:
    side = math.isqrt(length)
    if side * side != length:
        raise ValueError(f"{length} patches do not make a square grid.")
    return side


def _as_map(patches: torch.Tensor) -> torch.Tensor:
    """[N, h w, D] -> [N, D, h, w], h = w."""
    side = _side(patches.shape[1])
    return patches.transpose(1, 2).unflatten(2, (side, side))


def stitch_tiles(tiles: torch.Tensor, tile_grid: int) -> torch.Tensor:
    """Average the maps of n x n tiles down by n and put them together to one map (UHD, arXiv 2410.11665).

    Args:
        tiles: [N, n * n, L, D], row by row.
        tile_grid: n.

    Returns:
        [N, L, D].

    Raises:
        ValueError: if L is not the square of a multiple of n, or the number of tiles is not n * n.
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
    """Concatenate the features of several encoders: clip | dinov2 | siglip | sam of the whole, then of the tiles.

    Args:
        features: of each encoder, [V N, L, D_encoder]; views of a picture are adjacent, the whole first, then its
            tiles row by row.
        tile_grid: n; V = 1 for n = 1, else 1 + n * n.

    Returns:
        [N, L, D], D the sum of all widths, twice that with tiles.

    Raises:
        ValueError: if encoders disagree in pictures or patches, or the views are not V for each picture.
    """
    shapes = {name: tuple(features[name].shape[:2]) for name in ENCODERS if name in features}
    first, *others = shapes.values()
    if any(shape != first for shape in others):
        raise ValueError(
            f"All encoders must give the same pictures and patches, got (views, patches) {shapes}."
        )
    views = num_views(tile_grid)
    if first[0] % views:
        raise ValueError(f"{first[0]} views are not a multiple of the {views} that a picture has.")
    split = [features[name].unflatten(0, (-1, views)) for name in shapes]  # [N, V, L, D_encoder] each
    parts = [feature[:, 0] for feature in split]
    if tile_grid > 1:
        parts += [stitch_tiles(feature[:, 1:], tile_grid) for feature in split]
    return torch.cat(parts, dim=-1)


RECORDED = ("hidden_states", "attentions")
"""Outputs that an encoder gives on request, with `output_hidden_states=True` and `output_attentions=True`."""


class VisualRWKVVisionModel(PreTrainedModel):
    """Run one or several stock encoders on the same pictures, in one forward.

    Modules that no feature comes from are left out: a checkpoint of the stock model has more tensors. Every encoder
    is initialised as the stock model is, since `PreTrainedModel` leaves that to its sub-models.
    """

    config_class = VisualRWKVVisionConfig
    base_model_prefix = "vision_tower"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
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
        first = next(iter(self.config.encoders))
        return ENCODERS[first].embedding(self.get_submodule(first))

    def train(self, mode: bool = True) -> "VisualRWKVVisionModel":
        """Set training mode, but keep the statistics of batch norms whose weights are frozen."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and not any(w.requires_grad for w in module.parameters()):
                module.eval()
        return self

    @can_return_tuple
    def forward(
        self, pixel_values: torch.FloatTensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutput:
        """Compute the features of pictures.

        Args:
            pixel_values: [V N, 3, S, S] for the first encoder in channel order; views of a picture are adjacent, the
                whole first, then its tiles row by row.
            kwargs: `pixel_values_{name}`, the same views for every further encoder, each at its own size (see
                `config.pixel_inputs`); `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `last_hidden_state` [N, L, D], with CLIP's class token where the configuration puts it. On request
            `hidden_states` and `attentions` of the encoders' blocks as the stock models give them, encoder after
            encoder in channel order.

        Raises:
            ValueError: if an encoder's pictures are missing, superfluous, of another size or number, or if attention
                weights are asked for that the attention implementation does not compute.
        """
        pixels = self._pixels_of_encoders({"pixel_values": pixel_values, **kwargs})
        recorded = {name for name in RECORDED if self._is_asked_for(name, kwargs)}
        outputs = self._outputs_of_encoders(pixels, recorded)
        features = {name: self._features(name, output.last_hidden_state) for name, output in outputs.items()}
        return BaseModelOutput(
            last_hidden_state=self.fuse(features),
            **{kind: _chained(kind, outputs) for kind in recorded},
        )

    def encode(self, pixels: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return features by encoder, [V N, L, D_encoder], of pictures by encoder, [V N, 3, S, S]."""
        outputs = self._outputs_of_encoders(pixels, ())
        return {name: self._features(name, output.last_hidden_state) for name, output in outputs.items()}

    def fuse(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Apply [`fuse_features`] with the configuration's tiles."""
        return fuse_features(features, self.config.tile_grid)

    def _outputs_of_encoders(
        self, pixels: Mapping[str, torch.Tensor], recorded: Collection[str]
    ) -> dict[str, BaseModelOutput]:
        options = {f"output_{kind}": True for kind in recorded}
        return {
            name: self.get_submodule(name)(pictures.to(self.dtype), **options)
            for name, pictures in pixels.items()
        }

    def _features(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        """Return the patches in an encoder's last hidden state, [V N, L, D_encoder]."""
        return ENCODERS[name].read(hidden, self.config.encoders[name], self.config.class_token)

    def _is_asked_for(self, kind: str, kwargs: Mapping[str, Any]) -> bool:
        asked = kwargs.get(f"output_{kind}")
        return bool(getattr(self.config, f"output_{kind}", False) if asked is None else asked)

    def _pixels_of_encoders(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the pictures of each encoder, checked, from inputs by their names."""
        names = self.config.pixel_inputs
        given = {
            name: value
            for name, value in inputs.items()
            if name.startswith("pixel_values") and value is not None
        }
        if superfluous := sorted(given.keys() - names.values()):
            raise ValueError(
                f"{superfluous[0]} has no use: the tower has {', '.join(names)}, and reads "
                f"{', '.join(names.values())}."
            )
        pixels: dict[str, torch.Tensor] = {}
        for encoder, config in self.config.encoders.items():
            if names[encoder] not in given:
                raise ValueError(f"The tower has {', '.join(names)}: {names[encoder]} is missing.")
            pixels[encoder] = given[names[encoder]]
            self._check_pictures(names[encoder], pixels[encoder], config)
        # shape[0] and no set: torch.export leaves the number open, which len() and a hash would fix.
        counts = {names[encoder]: pictures.shape[0] for encoder, pictures in pixels.items()}
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


def _chained(kind: str, outputs: Mapping[str, BaseModelOutput]) -> tuple[torch.Tensor, ...]:
    """Return the recorded tensors of all encoders. Raises `ValueError` naming one that recorded nothing."""
    chained: list[torch.Tensor] = []
    for name, output in outputs.items():
        recorded = output.get(kind)
        if not recorded or any(tensor is None for tensor in recorded):
            is_fused = kind == "attentions" and ENCODERS[name].attention != ("eager",)
            hint = "; load the model with attn_implementation='eager'" if is_fused else ""
            raise ValueError(f"output_{kind}=True: the encoder {name} gives no {kind}{hint}.")
        chained += recorded
    return tuple(chained)


def resample_position_embedding(
    position: torch.Tensor, new_grid: tuple[int, int], num_prefix_tokens: int = 0
) -> torch.Tensor:
    """Resample an absolute position embedding to another grid: bicubic, antialiased, in float32 (as timm does).

    Args:
        position: [1, P + h * h, D], of P prefix tokens, which are kept as they are, and a square grid.
        new_grid: height and width.
        num_prefix_tokens: P.

    Returns:
        [1, P + height * width, D] in the dtype of `position`.
    """
    prefix, patches = position[:, :num_prefix_tokens], position[:, num_prefix_tokens:]
    resized = F.interpolate(_as_map(patches.float()), size=new_grid, mode="bicubic", antialias=True)
    return torch.cat((prefix, map_as_patches(resized).to(position.dtype)), dim=1)


# Pooling: patches [N, h w, D] to fewer patches.


def _pool_average(patches: torch.Tensor, grid_size: int) -> torch.Tensor:
    """Average windows of h // g, with that stride; where g does not divide h, there may be more than g * g."""
    feature_map = _as_map(patches)
    return map_as_patches(F.avg_pool2d(feature_map, feature_map.shape[-1] // grid_size))


def _pool_adaptive(patches: torch.Tensor, grid_size: int) -> torch.Tensor:
    """Average exactly g x g windows; window i spans floor(i h / g) to ceil((i + 1) h / g)."""
    return map_as_patches(F.adaptive_avg_pool2d(_as_map(patches), grid_size))


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
"""How the patches are pooled; the class token is left alone. ("mean" is not here: it averages over both.)"""


def pool_patches(features: torch.Tensor, config: VisualRWKVConfig) -> torch.Tensor:
    """Reduce the tokens of a picture: [N, L, D] -> [N, config.num_tile_tokens, D] (arXiv 2406.13362, table 9).

    The class token stays where it is.

    Raises:
        ValueError: if L without the class token is not a square.
    """
    if config.pooling == "mean":
        return features.mean(dim=1, keepdim=True)
    leading, trailing = class_token_places(config.vision_config.class_token)
    first, patches, last = features.split((leading, features.shape[1] - leading - trailing, trailing), dim=1)
    return torch.cat((first, POOLINGS[config.pooling](patches, config.pooled_grid_size), last), dim=1)


# Projectors: [N, L, D] -> [N, L, C], without biases, with the original's names, initialised as torch's Linear is.


class LinearProjector(nn.Module):
    """Compute W x."""

    def __init__(self, in_features: int, out_features: int, layer_norm_eps: float = 1e-5):
        super().__init__()
        self.proj = nn.Linear(in_features, out_features, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.proj(features)


class LinearFlipProjector(nn.Module):
    """Compute W [x_i, x_{L-1-i}]: each token is concatenated with its mirror image in the sequence (v6.01)."""

    def __init__(self, in_features: int, out_features: int, layer_norm_eps: float = 1e-5):
        super().__init__()
        self.proj = nn.Linear(2 * in_features, out_features, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.proj(torch.cat((features, features.flip(1)), dim=-1))


class GatedProjector(nn.Module):
    """Compute W_o (h * sigmoid(W_g h)) with h = W x (HD, arXiv 2410.11665)."""

    def __init__(self, in_features: int, out_features: int, layer_norm_eps: float = 1e-5):
        super().__init__()
        self.proj = nn.Linear(in_features, out_features, bias=False)
        self.gate = nn.Linear(out_features, out_features, bias=False)
        self.o_proj = nn.Linear(out_features, out_features, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.proj(features)
        return self.o_proj(hidden * torch.sigmoid(self.gate(hidden)))


class ReluProjector(nn.Module):
    """Compute W_o relu(W x) (UHD as its released code runs: nothing reads the checkpoint's `gate`)."""

    def __init__(self, in_features: int, out_features: int, layer_norm_eps: float = 1e-5):
        super().__init__()
        self.proj = nn.Linear(in_features, out_features, bias=False)
        self.o_proj = nn.Linear(out_features, out_features, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.o_proj(F.relu(self.proj(features)))


class GatedNormProjector(nn.Module):
    """Compute LayerNorm(W_o (x * sigmoid(W_g x))): the gate reads the features themselves (v7)."""

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
