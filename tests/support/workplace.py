"""Create the files that the documentation's examples name, so that tests can execute these examples.

Pictures, models, data and checkpoints are made in a folder, repositories on a local Hub. All are small and random, and
they are made before a text is executed:

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
"""The token of a user who may push models, and the user's name."""

MODELS = {
    "visualrwkv-5-1b5": dict(version=5, scan="unidirectional", image_position="first"),
    "visualrwkv-6-1b6": dict(version=6),
    "visualrwkv-7-0b1": dict(version=7, scan="unidirectional", image_position="first"),
}


def save_model(path: Path) -> None:
    tiny_training.save_tiny_model(path, **MODELS[path.name])


def save_picture(path: Path) -> None:
    """Write a picture of a square on a background, in colours that depend on the file's name."""
    seed = sum(path.stem.encode())
    picture = Image.new("RGB", (96, 72), (seed % 256, 200, 90))
    picture.paste((90, 40, seed % 199), (24, 18, 60, 54))
    picture.save(path)


def save_circle(path: Path) -> None:
    """Write a picture of a red circle on white, which the model in the package can recognise."""
    picture = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(picture).ellipse((70, 60, 190, 180), fill="red")
    picture.save(path)


def save_tuned_state(path: Path) -> None:
    """Write an untrained tuned state for the model in the package: zeros, with which the model begins anyway."""
    model = AutoModelForImageTextToText.from_pretrained(bundled_model())
    TunedState.attach(model).save_pretrained(path)


def save_film(path: Path) -> None:
    """Write a film of one second in which a square moves to the right."""
    import imageio.v3 as imageio
    import numpy as np

    frames = np.zeros((10, 64, 96, 3), np.uint8)
    for number, frame in enumerate(frames):
        frame[20:44, 8 * number : 8 * number + 24] = (220, 40, 60)
    imageio.imwrite(path, frames, plugin="pyav", codec="libx264", fps=10)


def save_rows(path: Path) -> None:
    """Write LLaVA samples, and their pictures into the folder `pictures` beside them."""
    rows = tiny_training.rows_with_pictures(path.parent / "pictures")
    tiny_training.write_data(path.parent, rows, path.name)


def save_questions(path: Path) -> None:
    """Write two questions about a picture, one of them with its answer, and the picture."""
    save_picture(path.with_name("cat.png"))
    rows = [{"image": "cat.png", "question": "What is it?", "answer": "a square"}]
    rows += [{"image": "cat.png", "question": "Which colour is it?"}]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")


def save_checkpoint(path: Path) -> None:
    """Write a small checkpoint in the form of a released one; for one file of a split pair, write both files."""
    stem = re.sub(r"_(rwkv|visual)$", "", path.stem)
    write_checkpoint(path.with_name(f"{stem}.pth"), split=stem != path.stem)


def save_world(path: Path) -> None:
    """Write a tiny RWKV-7 language model under the tensor names of RWKV-World."""
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
"""Pairs the pattern of a file's or folder's name with the function that makes it."""

ON_HUB: list[tuple[str, Callable[[Path], None]]] = [
    (r"hf://(?P<repo>[\w.-]+/[\w.-]+)/(?P<file>[\w.-]+\.pth)", save_checkpoint),
    (r"(?P<repo>google/siglip2-base-patch16-256)(?P<file>)", save_tower),
]
"""Pairs the pattern of an address with the function that makes the file, or all files, that the Hub has there."""

CONVERSION = re.compile(r"visualrwkv convert (?!.*--to-original)")
"""Matches a command that writes the model that it names, so that `prepare` must not make it."""


class Workplace:
    """Prepares a folder in which texts of the documentation can be executed.

    Args:
        folder: an empty folder.
        hub: the Hub from which commands download and to which they push.
    """

    def __init__(self, folder: Path, hub: Hub):
        self.folder, self.hub = folder, hub
        for name in ("docs", "examples"):
            (folder / name).symlink_to(ROOT / name)

    def prepare(self, text: str) -> None:
        """Make the files, folders and repositories that `text` names and that do not exist yet."""
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
        """Return environment variables for commands: this Python's scripts come first in PATH, and the Hub is `hub`."""
        variables = hub_environment(self.hub.url, self.folder / ".cache", TOKEN)
        variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), variables["PATH"]])
        return variables | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def made_files(make: Callable[[Path], None], name: str) -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        make(Path(folder) / name)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
