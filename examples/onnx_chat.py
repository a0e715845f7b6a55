"""Chats about a picture through onnxruntime alone: no torch, no transformers, nothing of this package.

    pip install onnxruntime tokenizers pillow numpy
    python examples/onnx_chat.py onnx cat.png "What is this?" "Which colour is it?"

FOLDER is what `export_onnx.py` makes. Every further question continues from the state after the previous answer, so
that only its own words are read.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer

State = dict[str, np.ndarray]


class Chat:
    """The graphs of a folder, and the state after what they have read, by name of the inputs of `step.onnx`."""

    def __init__(self, folder: Path):
        self.config = json.loads((folder / "chat.json").read_text("utf-8"))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.vision, self.read, self.step = (
            onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
            for name in ("vision", "read", "step")
        )
        shapes = {x.name: x.shape[1:] for x in self.step.get_inputs() if x.name.startswith("past.")}
        self.state: State = {name: np.zeros((1, *shape), np.float32) for name, shape in shapes.items()}
        self.unread: list[int] = []  # what ends the last answer's turn
        self.multiple = self.config["first_prompt_multiple"]

    def ask(
        self, question: str, picture: Image.Image | None = None, max_new_tokens: int = 256
    ) -> Iterator[str]:
        """The answer's text, piece by piece."""
        logits = self.read_prompt(question, picture)
        tokens: list[int] = []
        written = 0
        for _ in range(max_new_tokens):
            token = int(logits[0].argmax())
            if token in self.config["eos_token_id"]:
                break
            tokens.append(token)
            text = self.tokenizer.decode(tokens)
            if not text.endswith("\ufffd"):  # else the rest of a character may be still to come
                yield text[written:]
                written = len(text)
            logits = self.run(self.step, {"input_ids": np.array([[token]])})
        yield self.tokenizer.decode(tokens)[written:]
        self.unread = self.config["turn_end_ids"]

    def read_prompt(self, question: str, picture: Image.Image | None) -> np.ndarray:
        """Return the logits [1, vocab_size] after the prompt of a question."""
        prompt = self.prompt(question, picture is not None)
        features = np.zeros((1, self.feature_size), np.float32)
        if picture is not None:
            features = self.vision.run(None, pixels_of(picture, self.config))[0]
            prompt = prompt.replace(self.config["image_token"], self.config["image_token"] * len(features))
        words = [*self.unread, *self.tokenizer.encode(prompt, add_special_tokens=False).ids]
        filler = self.config["turn_end_ids"] * (-len(words) % self.multiple)
        self.multiple = 1  # only the chat's beginning is filled up: what has been read stays as it is
        ids = np.array([[*filler, *words]])
        inputs = {"input_ids": ids, "image_features": features, "scan_orders": self.scan_orders(ids)}
        return self.run(self.read, inputs)

    @property
    def feature_size(self) -> int:
        return next(x.shape[1] for x in self.read.get_inputs() if x.name == "image_features")

    def run(self, session: onnxruntime.InferenceSession, inputs: State) -> np.ndarray:
        """Return the logits after a token, and advance the state."""
        logits, *state = session.run(None, inputs | self.state)
        self.state = dict(zip(self.state, state))
        return logits

    def prompt(self, text: str, with_picture: bool) -> str:
        """The model's prompt for a question, without blank lines: they end a turn."""
        for token in self.config["reserved"]:
            if token in text:
                raise ValueError(f"The question contains {token!r}, which is reserved.")
        question = text.replace(self.config["request_for_short_answer"], "")
        words = {"question": without_blank_lines(question), "text": without_blank_lines(text)}
        prompt = self.config["prompt_with_picture" if with_picture else "prompt"]
        # At once: a question may have {text} in it.
        return re.sub(r"\{(question|text)\}", lambda place: words[place[1]], prompt)

    def scan_orders(self, ids: np.ndarray) -> np.ndarray:
        """In which order each direction of the scan reads `ids` [1, T]: [1, D, T]. Only a picture's tokens move."""
        span = np.array(self.config["scan_orders"])  # [D, L] of one tile
        orders = np.tile(np.arange(ids.shape[1]), (len(span), 1))
        places = np.flatnonzero(ids[0] == self.config["image_token_id"]).reshape(
            -1, span.shape[1]
        )  # [tiles, L]
        orders[:, places] = places[:, span].transpose(1, 0, 2)
        return orders[None]


def without_blank_lines(text: str) -> str:
    return "\n".join(line for line in text.strip().split("\n") if line.strip())


def pixels_of(picture: Image.Image, config: dict) -> State:
    """Return the vision graph's inputs for one picture: [P, 3, S, S] of its P pieces, for each encoder."""
    pieces = pieces_of(picture, **config["pieces"])
    return {
        name: np.stack([as_pixels(piece, **recipe) for piece in pieces])
        for name, recipe in config["pixels"].items()
    }


def pieces_of(
    picture: Image.Image,
    side: int,
    whole: bool,
    grids: list[list[int]] | None,
    spared: list[list[int]],
    stretched: bool,
    surplus: bool,
) -> list[Image.Image]:
    """The picture where `whole` says so, and the tiles of that grid (columns, rows) which it fills best."""
    width, height = picture.size
    candidates = grids if grids is not None else grids_around(picture.size, side)
    columns, rows = min(candidates, key=lambda grid: misfit(picture.size, grid, side, surplus))
    canvas = (columns * side, rows * side)
    front = [picture] if whole else []
    if [columns, rows] in spared and width * height <= canvas[0] * canvas[1]:
        return front
    cut = picture.resize(canvas, Image.Resampling.LANCZOS) if stretched else picture
    return front + [cut.crop(box) for box in boxes(cut.size, columns, rows)]


def grids_around(size: tuple[int, int], side: int) -> list[list[int]]:
    """As many squares of `side` pixels as cover a picture, or one fewer, in each direction."""
    most_columns, most_rows = (-(-length // side) for length in size)
    return [
        [columns, rows]
        for columns in range(max(1, most_columns - 1), most_columns + 1)
        for rows in range(max(1, most_rows - 1), most_rows + 1)
    ]


def misfit(size: tuple[int, int], grid: list[int], side: int, surplus: bool) -> int:
    """Pixels of a grid's canvas that a picture leaves empty, and with `surplus` those by which their areas differ."""
    (width, height), canvas = size, [count * side for count in grid]
    area, scale = canvas[0] * canvas[1], min(canvas[0] / width, canvas[1] / height)
    empty = area - int(width * scale) * int(height * scale)
    return empty + (abs(area - width * height) if surplus else 0)


def boxes(size: tuple[int, int], columns: int, rows: int) -> list[tuple[int, int, int, int]]:
    """Tiles of one size, of at least a pixel, row by row; the remainder at the right and lower edge is left out."""
    width, height = max(1, size[0] // columns), max(1, size[1] // rows)
    lefts = [min(column * width, size[0] - width) for column in range(columns)]
    uppers = [min(row * height, size[1] - height) for row in range(rows)]
    return [(left, upper, left + width, upper + height) for upper in uppers for left in lefts]


def as_pixels(picture: Image.Image, size: int, crop: bool, mean: list[float], std: list[float]) -> np.ndarray:
    """(x / 255 - mean) / std of a square of the picture, [3, S, S]: squeezed, or its middle where `crop` says so."""
    width, height = picture.size
    if crop:
        wanted = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    else:
        wanted = (size, size)
    resized = picture.resize(wanted, Image.Resampling.BICUBIC)
    left, upper = (wanted[0] - size) // 2, (wanted[1] - size) // 2
    square = np.asarray(resized.crop((left, upper, left + size, upper + size)), dtype=np.float32)
    normalised = (square / 255 - np.array(mean, np.float32)) / np.array(std, np.float32)
    return normalised.transpose(2, 0, 1).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description="Chats about a picture through onnxruntime alone.")
    parser.add_argument("folder", type=Path, help="what export_onnx.py makes")
    parser.add_argument("picture", help="a file")
    parser.add_argument(
        "question", nargs="+", help="one or more questions, each asked after the previous answer"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256)
    arguments = parser.parse_args()
    chat = Chat(arguments.folder)
    picture = ImageOps.exif_transpose(Image.open(arguments.picture)).convert("RGB")
    for question in arguments.question:
        for piece in chat.ask(question, picture, arguments.max_new_tokens):
            print(piece, end="", flush=True)
        print()
        picture = None


if __name__ == "__main__":
    main()
