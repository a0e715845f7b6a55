"""The way from an original checkpoint to an answer, with a checkpoint small enough to lie in this repository.

    python examples/first_answer.py

It joins the tiny v6.0 test checkpoint (random weights, the whole vocabulary of 65,536 words) into one file under the
original's names, converts that to a Hub folder and asks it about a picture with the `visualrwkv` command. The words
mean nothing, but they are, one by one, the words that the original code gives.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from visualrwkv_hf.conversion import to_hf

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
CASE = GOLDEN / "k_e2e" / "v60_full_vocab"


def original_checkpoint(path: Path) -> Path:
    """Writes the checkpoint as the original saves it: one flat state dict with rwkv.*, vit.* and proj.*."""
    tensors: dict[str, torch.Tensor] = {}
    for name in json.loads((CASE / "case.json").read_text())["weights"]:
        if name.endswith(".npz"):
            tensors |= {
                key: torch.from_numpy(array).bfloat16() for key, array in np.load(GOLDEN / name).items()
            }
        else:
            tensors |= load_file(GOLDEN / name)
    save_file(tensors, path)
    return path


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = original_checkpoint(Path(scratch) / "VisualRWKV-tiny.safetensors")
        # Sizes are read from the tensors; the number of attention heads of a tower of this size cannot be.
        model = to_hf(
            checkpoint,
            Path(scratch) / "model",
            vision_config={"clip_config": {"num_attention_heads": 4}},
            image_position="first",
            dtype="float32",
        )
        picture, question = CASE / "b.png", "What is this?"
        print(f"> visualrwkv ask --model {model} {picture.name} {question!r}\n")
        command = [sys.executable, "-m", "visualrwkv_hf.cli", "ask", "--model", str(model)]
        subprocess.run([*command, "--max-new-tokens", "12", str(picture), question], check=True)
    expected = json.loads((CASE / "generation.json").read_text())["final_text"]
    print(f"The original's text: {expected}")


if __name__ == "__main__":
    main()
