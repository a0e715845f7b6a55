"""What a saved folder needs to load where this package is not installed (`trust_remote_code=True`)."""

import json
import re
import shutil
from pathlib import Path

MODEL_CODE = {
    "visualrwkv": {
        "AutoConfig": "configuration_visualrwkv.VisualRWKVConfig",
        "AutoModel": "modeling_visualrwkv.VisualRWKVModel",
        "AutoModelForImageTextToText": "modeling_visualrwkv.VisualRWKVForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_visualrwkv.VisualRWKVForConditionalGeneration",
        "AutoProcessor": "processing_visualrwkv.VisualRWKVProcessor",
    },
    "visualrwkv_text": {
        "AutoConfig": "configuration_visualrwkv.VisualRWKVTextConfig",
        "AutoModel": "modeling_rwkv.VisualRWKVTextModel",
        "AutoModelForCausalLM": "modeling_rwkv.VisualRWKVForCausalLM",
    },
}
"""`auto_map` of a configuration, by `model_type`."""

PROCESSOR_CODE = {"AutoProcessor": "processing_visualrwkv.VisualRWKVProcessor"}
IMAGE_PROCESSOR_CODE = {"AutoImageProcessor": "image_processing_visualrwkv.VisualRWKVImageProcessor"}


def ship_remote_code(folder: str | Path) -> None:
    """Writes the code that the model in `folder` needs beside it, and names it in `config.json`."""
    config_file = Path(folder) / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    write_auto_map(config_file, MODEL_CODE[config["model_type"]])


def write_auto_map(config_file: Path, auto_map: dict[str, str]) -> None:
    """Names in `config_file` the classes that load it, and copies the files that they stand in.

    Code that came with a model is cached without what the model does not import, its processor: that is left
    out, and comes with the processor.
    """
    here = Path(__file__).parent
    known = {name: target for name, target in auto_map.items() if (here / f"{module_of(target)}.py").exists()}
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["auto_map"] = known
    config_file.write_text(
        json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    copy_code(config_file.parent, known)


def copy_code(folder: str | Path, auto_map: dict[str, str]) -> None:
    """Copies into `folder` the files that the classes of `auto_map` stand in, and those that these import."""
    here = Path(__file__).parent
    for module in needed_modules({module_of(target) for target in auto_map.values()}):
        target = Path(folder) / f"{module}.py"
        if not (target.exists() and target.samefile(here / f"{module}.py")):
            shutil.copyfile(here / f"{module}.py", target)


def module_of(target: str) -> str:
    """The module of a class as an `auto_map` names it: `"module.Class"`."""
    return target.split(".")[0]


def needed_modules(modules: set[str]) -> set[str]:
    """`modules` and all that they import from beside them. Only `from .name import` is seen, as by transformers."""
    here = Path(__file__).parent
    found: set[str] = set()
    todo = set(modules)
    while todo:
        module = todo.pop()
        found.add(module)
        source = (here / f"{module}.py").read_text(encoding="utf-8")
        todo |= set(re.findall(r"^\s*from \.(\w+) import", source, flags=re.MULTILINE)) - found
    return found
