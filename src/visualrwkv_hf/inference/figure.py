"""Draw what the model does with a picture: its patches, the order in which layers read them, and the prompt.

It needs matplotlib (the extra "show"). No weights are read: the configuration and the processor are enough.
"""

import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..image_processing_visualrwkv import open_picture
from ..scan_orders import directions_of, grid_permutation
from .chat import chat_inputs
from .loading import load_config, load_processor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_LAYERS = 4
"""Layers that are drawn. No scan has more directions."""

RAMP = "plasma"
"""Colour map from the patch that is read first to the last one."""

INK, PAPER = "#22303c", "#ffffff"
BEFORE, AFTER, PICTURE = "#dbe9f6", "#fde8cd", "#e4d7f1"
"""Colours of the prompt before the picture, of the prompt after it, and of the picture."""

PAGE_WIDTH = 850.0
MARGIN = 28.0
SIDE, GAP, TITLE = 396.0, 18.0, 32.0
"""Side of the large panel; space between panels; space above each for its title."""
ROW_HEIGHT, FONT_SIZE, LETTER_WIDTH = 27.0, 10.0, 6.02
"""In points, as are all sizes here. A letter of the monospaced font is 0.602 of its size wide."""

PLACES = {
    "first": "comes before the question",
    "middle": "comes between the question and the question again: the sandwich",
    "last": "comes after the question",
}

MARKS = str.maketrans({"\n": "\u21b5", " ": "\u00b7", "\t": "\u2192"})
"""White space -> a visible character."""


class Seen(NamedTuple):
    """What the model is given for one picture.

    Attributes:
        tiles: pixels from 0 to 1 as the first encoder reads them, float32 [pieces, S, S, 3].
        tokens: the ids of the prompt, those of the picture included.
        patch_grid: rows and columns of patches in a piece.
        token_grid: rows and columns of tokens after pooling; (0, 0) if tokens have no position in the picture.
    """

    tiles: np.ndarray
    tokens: list[int]
    patch_grid: tuple[int, int]
    token_grid: tuple[int, int]


class Item(NamedTuple):
    """A box of the prompt: one token, or the picture with all its tokens."""

    text: str
    colour: str
    is_picture: bool = False

    @property
    def width(self) -> float:
        return len(self.text) * LETTER_WIDTH + 7 + (ROW_HEIGHT if self.is_picture else 0)


def reading_figure(
    picture, question: str, source: str, scan: str | None = None, image_position: str | None = None
) -> "Figure":
    """Draw what a model does with a picture and a question about it.

    Args:
        picture: see `open_picture`.
        question: what is asked.
        source: the model's folder or Hub id.
        scan: draw this scan in place of the model's.
        image_position: put the picture here in the prompt, not where the model has it.

    Raises:
        ImportError: without matplotlib.
        ValueError: the picture cannot be read, the scan is unknown, or the model reads no pictures.
        jinja2.TemplateError: a question or a position that the chat template refuses.
    """
    figure_class = _figure_class()
    processor, config = load_processor(source), load_config(source)
    scan = scan or config.scan
    directions = directions_of(scan)
    seen = what_is_seen(picture, question, config, processor, image_position)
    items = list(prompt_items(seen.tokens, processor))
    rows = list(wrapped(items, PAGE_WIDTH - 2 * MARGIN))

    prompt_height = len(rows) * ROW_HEIGHT
    base = prompt_height + 2.6 * MARGIN
    height = base + SIDE + TITLE + 0.4 * MARGIN
    figure = figure_class(figsize=(PAGE_WIDTH / 72, height / 72), facecolor=PAPER)

    def place(left: float, bottom: float, width: float, tall: float) -> "Axes":
        return figure.add_axes((left / PAGE_WIDTH, bottom / height, width / PAGE_WIDTH, tall / height))

    draw_patches(place(MARGIN, base, SIDE, SIDE), seen)
    panel = (SIDE - TITLE) / 2
    left = PAGE_WIDTH - MARGIN - 2 * panel - GAP
    for layer in range(min(NUM_LAYERS, config.text_config.num_hidden_layers)):
        row, column = divmod(layer, 2)
        axes = place(left + column * (panel + GAP), base + (1 - row) * (panel + TITLE), panel, panel)
        draw_order(axes, seen, scan, layer, first_sentence(directions[layer % len(directions)]))
    draw_ramp(place(left, base - 16, 2 * panel + GAP, 6))
    prompt = place(MARGIN, 0.6 * MARGIN, PAGE_WIDTH - 2 * MARGIN, prompt_height)
    draw_prompt(prompt, rows, seen, config.image_token_id, image_position or processor.image_position)
    return figure


def save_figure(figure: "Figure", path: str | os.PathLike) -> None:
    """Write a figure in the format of the file extension.

    Raises:
        ValueError: matplotlib knows no such format.
        OSError: it cannot be written.
    """
    figure.savefig(path, dpi=120)


def _figure_class() -> type["Figure"]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'The figure is drawn by matplotlib, which is not installed: pip install "visualrwkv-hf[show]".'
        ) from error
    return Figure


# What the model is given.


def what_is_seen(picture, question: str, config, processor, image_position: str | None) -> Seen:
    """Return what the processor makes of a picture and a question."""
    content = [{"type": "image", "image": open_picture(picture)}, {"type": "text", "text": question}]
    inputs = chat_inputs(processor, [{"role": "user", "content": content}], image_position)
    grid = config.vision_config.grid_size
    token_grid = (0, 0) if config.compressor_num_layers else config.pooled_grid
    tiles = as_seen(inputs["pixel_values"].numpy(), processor.image_processor)
    return Seen(tiles, inputs["input_ids"][0].tolist(), (grid, grid), token_grid)


def as_seen(pixel_values: np.ndarray, image_processor) -> np.ndarray:
    """Undo the normalisation of pixels [N, 3, S, S]; return colours from 0 to 1, [N, S, S, 3]."""
    fields = next(iter(getattr(image_processor, "encoders", {}).values()), None) or vars(image_processor)
    mean, std = (np.asarray(fields[name], dtype=np.float32) for name in ("image_mean", "image_std"))
    return (np.moveaxis(pixel_values, 1, -1) * std + mean).clip(0, 1)


def prompt_items(tokens: Sequence[int], processor) -> Iterator[Item]:
    """Yield the boxes of the prompt: one for each token, and one for the picture."""
    colour = BEFORE
    for is_picture, run in groupby(tokens, key=lambda token: token == processor.image_token_id):
        if is_picture:
            yield Item(f"{len(list(run)):,} tokens", PICTURE, is_picture=True)
            colour = AFTER
        else:
            for token in run:
                yield Item(processor.tokenizer.decode([token]).translate(MARKS), colour)
    yield Item("answer \u2026", PAPER)


def wrapped(items: Sequence[Item], width: float, gap: float = 3) -> Iterator[list[tuple[float, Item]]]:
    """Yield rows of items with their left edges. No row is wider than `width` unless it is a single item."""
    row: list[tuple[float, Item]] = []
    left = 0.0
    for item in items:
        if row and left + item.width > width:
            yield row
            row, left = [], 0.0
        row.append((left, item))
        left += item.width + gap
    yield row


def first_sentence(direction: Callable) -> str:
    """Return what a direction of a scan does, from its docstring."""
    return (direction.__doc__ or direction.__name__).split("\n")[0].partition(":")[0].rstrip(".")


# How it is drawn.


def _frame(axes: "Axes", title: str, size: float = 10) -> None:
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=size, color=INK, loc="left", pad=5)
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_patches(axes: "Axes", seen: Seen) -> None:
    """Draw the picture as the first encoder sees it, under the patch grid; tiles go side by side."""
    pieces, side = seen.tiles.shape[:2]
    columns = int(np.ceil(np.sqrt(pieces)))
    canvas = np.ones((-(-pieces // columns) * side, columns * side, 3), np.float32)
    for number, tile in enumerate(seen.tiles):
        row, column = divmod(number, columns)
        canvas[row * side : (row + 1) * side, column * side : (column + 1) * side] = tile
    axes.imshow(canvas, interpolation="nearest")
    rows, patches = seen.patch_grid
    for cells, line in (((rows, patches), 0.5), (seen.token_grid, 1.3)):
        if cells == (rows, patches) or cells[0] > 1:
            _draw_grid(axes, canvas.shape[0], canvas.shape[1], side, cells, line)
    cut = f"{pieces} pieces, each " if pieces > 1 else ""
    _frame(axes, f"What the model sees: {cut}{side} x {side} pixels in {rows} x {patches} patches")


def _draw_grid(axes: "Axes", height: int, width: int, side: int, cells: tuple[int, int], line: float) -> None:
    down = np.arange(0, height + 1, side / cells[0]) - 0.5
    across = np.arange(0, width + 1, side / cells[1]) - 0.5
    for colour, wide, alpha in ((INK, line + 0.8, 0.3), (PAPER, line, 0.8)):  # seen on any picture
        style: dict[str, Any] = dict(colors=colour, linewidths=wide, alpha=alpha)
        axes.hlines(down, -0.5, width - 0.5, **style)
        axes.vlines(across, -0.5, height - 0.5, **style)


def draw_order(axes: "Axes", seen: Seen, scan: str, layer: int, words: str) -> None:
    """Draw the order in which a layer reads the tokens: as colours over the picture, and as a line."""
    from matplotlib.collections import LineCollection

    height, width = seen.token_grid
    picture = seen.tiles[0]
    grey = picture.mean(-1)
    extent = (-0.5, max(width, 1) - 0.5, max(height, 1) - 0.5, -0.5)
    axes.imshow(0.55 + 0.45 * grey, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="lanczos")
    if not height:
        axes.text(
            0,
            0,
            "tokens without a place\nin the picture:\nread in their order",
            ha="center",
            va="center",
            color=INK,
        )
        _frame(axes, f"Layer {layer + 1}")
        return
    order = grid_permutation(scan, layer, height, width).numpy()
    rank = np.empty(height * width)
    rank[order] = np.linspace(0, 1, len(order))
    axes.imshow(rank.reshape(height, width), cmap=RAMP, vmin=0, vmax=1, alpha=0.5, extent=extent)
    points = np.stack([order % width, order // width], axis=-1).astype(float)  # [L, 2]
    steps = np.stack([points[:-1], points[1:]], axis=1)  # [L - 1, 2, 2]
    is_jump = np.abs(steps[:, 1] - steps[:, 0]).max(-1) > 1
    thick = float(np.clip(24 / max(height, width), 0.7, 2.2))
    axes.add_collection(LineCollection(steps[~is_jump], colors=PAPER, linewidths=thick, capstyle="round"))
    axes.add_collection(LineCollection(steps[is_jump], colors=PAPER, linewidths=0.5, alpha=0.5))
    _draw_arrows(axes, steps[~is_jump], thick)
    for point, mark, size in ((points[0], "o", 60), (points[-1], "s", 45)):
        axes.scatter(
            point[0], point[1], marker=mark, s=size, color=INK, edgecolors=PAPER, linewidths=1.2, zorder=4
        )
    _frame(axes, textwrap.fill(f"Layer {layer + 1}: {words[0].lower()}{words[1:]}", 45), size=8)


def _draw_arrows(axes: "Axes", steps: np.ndarray, thick: float, count: int = 9) -> None:
    """Draw `count` of the steps [n, 2, 2] as arrows, evenly spaced along the line."""
    for step in steps[np.unique(np.linspace(0, len(steps) - 1, min(count, len(steps))).astype(int))]:
        start, end = step
        axes.annotate(
            "",
            xy=start + 0.75 * (end - start),
            xytext=start,
            arrowprops=dict(arrowstyle="-|>", color=PAPER, lw=thick, mutation_scale=9, shrinkA=0, shrinkB=0),
        )


def draw_ramp(axes: "Axes") -> None:
    """Draw the legend of the colours."""
    axes.imshow(np.linspace(0, 1, 256)[None], cmap=RAMP, aspect="auto", alpha=0.7)
    _frame(axes, "")
    style: dict[str, Any] = dict(transform=axes.transAxes, fontsize=8, color=INK)
    axes.text(0, -0.35, "\u25cf read first", va="top", **style)
    axes.text(1, -0.35, "read last \u25a0", va="top", ha="right", **style)


def draw_prompt(
    axes: "Axes", rows: Sequence[list[tuple[float, Item]]], seen: Seen, image_token_id: int, position: str
) -> None:
    """Draw the prompt as the model reads it: one box for each token, and the picture in its position."""
    from matplotlib.patches import FancyBboxPatch

    axes.set(xlim=(0, PAGE_WIDTH - 2 * MARGIN), ylim=(len(rows) * ROW_HEIGHT, 0))
    for number, row in enumerate(rows):
        top = number * ROW_HEIGHT + 2
        for left, item in row:
            tall = ROW_HEIGHT - 5
            style = "--" if item.colour == PAPER else "-"
            box = FancyBboxPatch(
                (left + 1.5, top + 1.5),
                item.width - 3,
                tall - 3,
                boxstyle="round,pad=1.5",
                facecolor=item.colour,
                edgecolor=INK,
                linewidth=0.5,
                linestyle=style,
            )
            axes.add_patch(box)
            if item.is_picture:
                axes.imshow(
                    seen.tiles[0],
                    extent=(left + 2, left + tall, top + tall - 2, top + 2),
                    aspect="auto",
                    zorder=2,
                )
            axes.text(
                left + item.width - 3.5,
                top + tall / 2 + 0.5,
                item.text,
                family="monospace",
                fontsize=FONT_SIZE,
                color=INK,
                ha="right",
                va="center_baseline",
            )
    axes.set(xlim=(0, PAGE_WIDTH - 2 * MARGIN), ylim=(len(rows) * ROW_HEIGHT, 0))  # imshow moves them
    count = seen.tokens.count(image_token_id)
    _frame(
        axes, f"The prompt: {len(seen.tokens):,} tokens. The picture, {count:,} of them, {PLACES[position]}"
    )


__all__ = ["reading_figure", "save_figure"]
