"""Build batches as the original does: it puts text and pictures into one sequence, with all its quirks.

Letters: B batch, T time, D directions of a scan, C hidden size, L tokens of a picture.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from golden_cases import IMAGE_ID, STOP_TOKEN
from torch import Tensor
from torch.nn import functional as F

from visualrwkv_hf.scan_orders import grid_permutation, num_directions

IGNORE = -100
V7_MULTIPLE = 16
"""v7 prepends copies of token 261 until the length is a multiple of this number."""


class Batch(NamedTuple):
    """Holds a batch as it enters the language model, before ln0."""

    inputs_embeds: Tensor  # [B, T, C]
    labels: Tensor  # [B, T]
    start: int = 0  # where the original assumes every sample's patches to begin

    @property
    def length(self) -> int:
        return self.inputs_embeds.shape[1]


def image_index(ids: Tensor) -> int | None:
    """Return the position of the placeholder in `ids` [T], or None if there is none."""
    found = (ids == IMAGE_ID).nonzero().flatten().tolist()
    assert len(found) <= 1
    return found[0] if found else None


def largest_index(input_ids: Tensor) -> int:
    return max((image_index(ids) or 0 for ids in input_ids), default=0)


def v50_batch(embed: Callable, input_ids: Tensor, features: Tensor, labels: Tensor) -> Batch:
    """Return v5.0's batch: a sample begins with its text, and one without a picture is its text alone."""
    rows = []
    for ids, tokens, targets in zip(input_ids, features, labels):
        at = image_index(ids)
        rows.append(_sample(embed, ids, tokens[:0] if at is None else tokens, targets, at, left=0))
    return _padded(rows, start=0)


def v6_batch(
    embed: Callable,
    input_ids: Tensor,
    features: Tensor,
    labels: Tensor | None = None,
    ctx_len: int | None = None,
) -> Batch:
    """Return the batch of v5.1 to UHD, in which all pictures begin where the latest of them does.

    Embeddings of token 0 at the front move the other pictures there. A sample without a picture gets zero vectors
    in its place. A sample longer than `ctx_len` keeps its first `ctx_len` positions if one of them has a label, else
    its last. `Batch.start` ignores this cut, as the original does.

    Args:
        embed: maps ids to embeddings.
        input_ids: [B, T] with at most one placeholder per row.
        features: [B, L, C], the projected pictures.
        labels: [B, T]; with None, no position has a label.
        ctx_len: the length to which longer samples are cut; None: they are not cut.
    """
    labels = torch.full_like(input_ids, IGNORE) if labels is None else labels
    start = largest_index(input_ids)
    rows = []
    for ids, tokens, targets in zip(input_ids, features, labels):
        at = image_index(ids)
        tokens = torch.zeros_like(tokens) if at is None else tokens
        row = _sample(embed, ids, tokens, targets, at, start - (at or 0))
        rows.append(_truncated(*row, ctx_len))
    return _padded(rows, start)


def _sample(
    embed: Callable, ids: Tensor, tokens: Tensor, targets: Tensor, at: int | None, left: int
) -> tuple[Tensor, Tensor]:
    """Return a sample and its labels: [`left` x token 0, text before the picture, the picture, text after it]."""
    before, behind = (0, 0) if at is None else (at, at + 1)
    pads = ids.new_zeros(left)
    embeds = torch.cat([embed(torch.cat([pads, ids[:before]])), tokens, embed(ids[behind:])])
    hidden = targets.new_full((left,), IGNORE), targets.new_full((len(tokens),), IGNORE)
    return embeds, torch.cat([hidden[0], targets[:before], hidden[1], targets[behind:]])


def _truncated(embeds: Tensor, targets: Tensor, ctx_len: int | None) -> tuple[Tensor, Tensor]:
    if ctx_len is None or len(embeds) <= ctx_len:
        return embeds, targets
    has_label = bool((targets[:ctx_len] != IGNORE).any())
    kept = slice(ctx_len) if has_label else slice(-ctx_len, None)
    return embeds[kept], targets[kept]


def _padded(rows: list[tuple[Tensor, Tensor]], start: int) -> Batch:
    """Return the batch of these samples; zero vectors follow the shorter ones."""
    length = max(len(embeds) for embeds, _ in rows)
    embeds = [F.pad(embeds, (0, 0, 0, length - len(embeds))) for embeds, _ in rows]
    labels = [F.pad(targets, (0, length - len(targets)), value=IGNORE) for _, targets in rows]
    return Batch(torch.stack(embeds), torch.stack(labels), start)


def original_orders(scan: str, height: int, width: int, start: int, length: int, batch: int) -> Tensor:
    """Return the scan orders [B, D, T]: every sample's patches are read in the directions of `scan`, the rest in order.

    The patches are at [start, start + height * width), or up to the end of the sequence if that is earlier: the
    original's slices end there, too.
    """
    orders = torch.arange(length).repeat(num_directions(scan), 1)  # [D, T]
    for direction, order in enumerate(orders):
        patches = grid_permutation(scan, direction, height, width) if height else order[:0]
        patches = patches[patches < length - start]
        order[start : start + len(patches)] = start + patches
    return orders.expand(batch, -1, -1)


def expanded_ids(input_ids: Tensor, placeholder: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return the ids and mask, both [B, T], from which the package itself builds the sequences of `v6_batch`.

    Every sample must have a picture, and each of its tokens gets a placeholder. Tokens 0 at the front are not masked;
    padding at the end is.
    """
    start, rows = largest_index(input_ids), []
    for ids in input_ids:
        at = image_index(ids)
        places = ids.new_full((num_tokens,), placeholder)
        rows.append(torch.cat([ids.new_zeros(start - at), ids[:at], places, ids[at + 1 :]]))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad([torch.ones_like(row) for row in rows], batch_first=True)


def v7_left(length: int) -> int:
    return -length % V7_MULTIPLE


def v7_ids(input_ids: Tensor) -> Tensor:
    """Prepend tokens 261, [B, T] -> [B, pads + T]; they are not masked, so the model reads them like all others."""
    return F.pad(input_ids, (v7_left(input_ids.shape[1]), 0), value=STOP_TOKEN)


def v7_embeds(embed: Callable, input_ids: Tensor, tokens: Tensor, placeholder: int) -> Tensor:
    """Return the embeddings [B, pads + T, C] of `v7_ids`.

    The projected pictures `tokens` [sum of L, C] replace the placeholders row by row; surplus tokens are not used.
    """
    ids = v7_ids(input_ids)
    mask = ids == placeholder
    return embed(ids).masked_scatter(mask[..., None], tokens[: int(mask.sum())])
