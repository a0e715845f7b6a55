"""Merge a LoRA adapter into its base model: the result is a folder that every command reads.

    python examples/merge_adapter.py ADAPTER OUTPUT

ADAPTER is the folder that `finetune.py --preset lora` has written. It names its base model.
"""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from peft import PeftConfig, PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

import visualrwkv_hf  # noqa: F401  (makes transformers know the models)


def main(
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter.")],
    output: Annotated[Path, typer.Argument(help="Folder to write, which must not exist.")],
    base: Annotated[str | None, typer.Option(help="The base model. Default: what the adapter names.")] = None,
) -> None:
    """Merge an adapter into its base model."""
    if not (adapter / "adapter_config.json").is_file():
        raise typer.BadParameter(f"{adapter} holds no adapter: it has no adapter_config.json.")
    if output.exists():
        raise typer.BadParameter(f"{output} exists.")
    base = base or PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise typer.BadParameter(f"The base model, {base}, is not there: say with --base where it is.")
    model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto")
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
    AutoProcessor.from_pretrained(base).save_pretrained(output)
    named = shlex.quote(str(output))
    print(f'Next: visualrwkv ask --model {named} PICTURE "What is in the picture?"', file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
