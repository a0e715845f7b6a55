"""A model as ONNX graphs, with all that `onnx_chat.py` needs to chat with it without torch.

pip install -e ".[onnx]"
python examples/export_onnx.py visualrwkv-6-1b6 onnx
python examples/onnx_chat.py onnx cat.png "What is this?"
"""

from pathlib import Path
from typing import Annotated

import typer

from visualrwkv_hf import export_onnx
from visualrwkv_hf.inference import load_model, load_processor


def main(
    model: Annotated[str, typer.Argument(help="A folder or a Hub id.")],
    output: Annotated[Path, typer.Argument(help="The folder to make.")],
) -> None:
    """Writes vision.onnx, read.onnx, step.onnx and what belongs to them."""
    vlm = load_model(model, "cpu", "float32")
    folder = export_onnx(vlm, load_processor(model), output)
    for file in sorted(folder.iterdir()):
        typer.echo(f"{file}  {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    typer.run(main)
