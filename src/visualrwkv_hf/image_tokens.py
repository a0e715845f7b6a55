"""How many tokens a picture takes, and where its class token is: plain arithmetic on numbers of a configuration."""

import math
from typing import Any, Literal, NamedTuple

ClassToken = Literal["first", "last", "none"]
ImagePosition = Literal["first", "middle", "last"]
Pooling = Literal["none", "average", "adaptive", "mean", "class_token"]
Projector = Literal["linear", "linear_flip", "gated", "relu", "gated_norm"]
Reduction = Literal["pool", "step"]
"""Values of fields of `VisualRWKVConfig` and `VisualRWKVVisionConfig`, whose docstrings say what they mean."""


def class_token_places(position: str) -> tuple[int, int]:
    """Return how many places before and after the patches a class token takes.

    Args:
        position: "first", "last" or "none".
    """
    return int(position == "first"), int(position == "last")


def num_views(tile_grid: int) -> int:
    """Return how many pictures the encoders read for one picture: the whole, and n x n tiles if n > 1."""
    return 1 if tile_grid == 1 else 1 + tile_grid**2


class ImageTokens(NamedTuple):
    """What decides how many tokens a picture takes.

    `tokens_per_tile`: before the compressor. `kept`: tokens that the compressor leaves, of a picture or `per_tile`;
    None: there is no compressor. `reduction`: "pool" averages over the sequence, "step" takes every n-th token.
    """

    tokens_per_tile: int
    kept: int | None
    per_tile: bool
    reduction: str

    def count(self, num_tiles: int) -> int:
        """Return the tokens of a picture that was cut into `num_tiles` tiles."""
        if self.kept is None:
            return self.tokens_per_tile * num_tiles
        if self.reduction == "pool":
            return self.kept * (num_tiles if self.per_tile else 1)
        return len(self.positions(num_tiles))

    def positions(self, num_tiles: int) -> range:
        """Return the tokens, of all tiles in a row, that the reduction "step" keeps."""
        assert self.kept is not None
        length = self.tokens_per_tile * num_tiles
        if self.per_tile:
            return range(0, length, self.tokens_per_tile // self.kept)
        step = max(1, length // self.kept)
        count = math.ceil(length / step)
        return range(0, length, step)[max(0, count - self.kept) :]


class PictureNumbers:
    """What follows from the fields of a `VisualRWKVConfig` for the tokens of a picture."""

    vision_config: Any
    pooling: Any
    pooled_grid_size: Any
    compressor_num_layers: int
    compressor_num_tokens: Any
    compressor_per_tile: bool
    compressor_reduction: Any

    @property
    def pooled_grid(self) -> tuple[int, int]:
        """Height and width of the grid of patch tokens after the pooling; (0, 0) where none is left."""
        side = self.vision_config.grid_size
        if self.pooling == "average":
            window = side // self.pooled_grid_size
            side = (side - window) // window + 1
        elif self.pooling == "adaptive":
            side = self.pooled_grid_size
        elif self.pooling == "mean":
            side = 1
        elif self.pooling == "class_token":
            side = 0
        return side, side

    @property
    def class_token(self) -> str:
        """Where the class token is after the pooling: "first", "last" or "none"."""
        return "none" if self.pooling == "mean" else self.vision_config.class_token

    @property
    def num_tile_tokens(self) -> int:
        """Tokens of one tile before the compressor."""
        height, width = self.pooled_grid
        return height * width + sum(class_token_places(self.class_token))

    @property
    def num_image_tokens(self) -> int:
        """Tokens of a picture that is read as one tile."""
        return self.num_image_tokens_of(1)

    @property
    def image_tokens(self) -> ImageTokens:
        """What decides how many tokens a picture takes."""
        return ImageTokens(
            tokens_per_tile=self.num_tile_tokens,
            kept=self.compressor_num_tokens if self.compressor_num_layers else None,
            per_tile=self.compressor_per_tile,
            reduction=self.compressor_reduction,
        )

    def num_image_tokens_of(self, num_tiles: int) -> int:
        """Tokens of a picture that the image processor cut into `num_tiles` tiles."""
        return self.image_tokens.count(num_tiles)
