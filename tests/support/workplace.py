"""A folder with what the documentation names: pictures, models, data, checkpoints, and a Hub of its own.

What a text names is made, small and random, before the text is executed:

    with Workplace(tmp_path) as place:
        place.prepare('visualrwkv ask --model visualrwkv-6-1b6 cat.png "What is it?"')
        subprocess.run(..., cwd=place.folder, env=place.environment())
"""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import tiny_training
import torch
from hub_client import hub_environment
from hub_server import Hub
from paths import ROOT
from PIL import Image, ImageDraw
from tiny import awake, text_config
from tiny_checkpoint import write_checkpoint
from transformers import AutoModelForImageTextToText, SiglipVisionConfig, SiglipVisionModel

from visualrwkv_hf import TunedState, VisualRWKVForCausalLM, bundled_model
from visualrwkv_hf.conversion import restore_state_dict

TOKEN, USER = "hf_me", "me"
"""The user whose models may be pushed."""

MODELS = {
    "visualrwkv-5-1b5": dict(version=5, scan="unidirectional", image_position="first"),
    "visualrwkv-6-1b6": dict(version=6),
    "visualrwkv-7-0b1": dict(version=7, scan="unidirectional", image_position="first"),
}


def save_model(path: Path) -> None:
    tiny_training.save_tiny_model(path, **MODELS[path.name])


def save_picture(path: Path) -> None:
    """A square on a ground, of colours that the name gives."""
    seed = sum(path.stem.encode())
    picture = Image.new("RGB", (96, 72), (seed % 256, 200, 90))
    picture.paste((90, 40, seed % 199), (24, 18, 60, 54))
    picture.save(path)


def save_circle(path: Path) -> None:
    """A red circle on white, of a kind that the model in the package knows."""
    picture = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(picture).ellipse((70, 60, 190, 180), fill="red")
    picture.save(path)


def save_tuned_state(path: Path) -> None:
    """A tuned state for the model in the package, which begins as that model does."""
    model = AutoModelForImageTextToText.from_pretrained(bundled_model())
    TunedState.attach(model).save_pretrained(path)


def save_film(path: Path) -> None:
    """A second in which a square moves to the right."""
    import imageio.v3 as imageio
    import numpy as np

    frames = np.zeros((10, 64, 96, 3), np.uint8)
    for number, frame in enumerate(frames):
        frame[20:44, 8 * number : 8 * number + 24] = (220, 40, 60)
    imageio.imwrite(path, frames, plugin="pyav", codec="libx264", fps=10)


def save_rows(path: Path) -> None:
    """LLaVA samples, and their pictures in the folder `pictures` beside them."""
    rows = tiny_training.rows_with_pictures(path.parent / "pictures")
    tiny_training.write_data(path.parent, rows, path.name)


def save_questions(path: Path) -> None:
    """Two questions about a picture, one with its answer."""
    save_picture(path.with_name("cat.png"))
    rows = [{"image": "cat.png", "question": "What is it?", "answer": "a square"}]
    rows += [{"image": "cat.png", "question": "Which colour is it?"}]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")


def save_checkpoint(path: Path) -> None:
    """A released checkpoint's like; of a split pair, both files."""
    stem = re.sub(r"_(rwkv|visual)$", "", path.stem)
    write_checkpoint(path.with_name(f"{stem}.pth"), split=stem != path.stem)


def save_world(path: Path) -> None:
    """An RWKV-7 language model as RWKV-World names it."""
    config = text_config(7, vocab_size=65536, head_dim=64)
    tensors = restore_state_dict(awake(VisualRWKVForCausalLM(config)).state_dict(), config)
    torch.save({name.removeprefix("rwkv."): tensor.clone() for name, tensor in tensors.items()}, path)


def save_tower(path: Path) -> None:
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    config = SiglipVisionConfig(**sizes, image_size=256, patch_size=16)
    SiglipVisionModel(config).save_pretrained(path)


MADE: list[tuple[str, Callable[[Path], None]]] = [
    (r"(cat|dog|page|first|second|third)\.(png|jpg)", save_picture),
    (r"circle\.png", save_circle),
    (r"film\.mp4", save_film),
    ("tuned-shapes", save_tuned_state),
    ("|".join(MODELS), save_model),
    (r"(train|val)\.json", save_rows),
    (r"questions\.jsonl", save_questions),
    ("pictures", lambda path: save_rows(path.with_name("train.json"))),
    (r"(VisualRWKV-v0\d|rwkv\db).*\.pth", save_checkpoint),
    (r"RWKV-x070.*\.pth", save_world),
]
"""A name's pattern, and what makes it in the folder."""

ON_HUB: list[tuple[str, Callable[[Path], None]]] = [
    (r"hf://(?P<repo>[\w.-]+/[\w.-]+)/(?P<file>[\w.-]+\.pth)", save_checkpoint),
    (r"(?P<repo>google/siglip2-base-patch16-256)(?P<file>)", save_tower),
]
"""An address's pattern, and what makes the file, or the folder, that the Hub has there."""

CONVERSION = re.compile(r"visualrwkv convert (?!.*--to-original)")
"""A command that makes the model that it names last."""


class Workplace:
    """A folder to execute texts in.

    Args:
        folder: an empty one.
        hub: what is downloaded from and pushed to.
    """

    def __init__(self, folder: Path, hub: Hub):
        self.folder, self.hub = folder, hub
        for name in ("docs", "examples"):
            (folder / name).symlink_to(ROOT / name)

    def prepare(self, text: str) -> None:
        """Makes what `text` names and is not there."""
        for line in text.splitlines():
            self._prepare_hub(line)
            for word in re.findall(r"(?<![\w./:])[\w.-]+", line):
                path = self.folder / word
                maker = next((make for pattern, make in MADE if re.fullmatch(pattern, word)), None)
                if maker and not path.exists() and not (maker is save_model and CONVERSION.match(line)):
                    maker(path)

    def _prepare_hub(self, line: str) -> None:
        for pattern, make in ON_HUB:
            for address in re.finditer(pattern, line):
                if address["repo"] not in self.hub.repos:
                    self.hub.add(address["repo"], made_files(make, address["file"]))

    def environment(self) -> dict[str, str]:
        """Variables for commands: this Python's own come first, and downloads come from the Hub here."""
        variables = hub_environment(self.hub.url, self.folder / ".cache", TOKEN)
        variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), variables["PATH"]])
        return variables | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def made_files(make: Callable[[Path], None], name: str) -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        make(Path(folder) / name)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
