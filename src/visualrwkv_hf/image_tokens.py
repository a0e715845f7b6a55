"""How many tokens a picture takes, and where its class token is: plain arithmetic on numbers of a configuration."""

import math
from typing import NamedTuple


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
