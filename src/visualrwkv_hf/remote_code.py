"""What a saved folder needs to load where this package is not installed (`trust_remote_code=True`)."""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

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
    """Copy the code that the model in `folder` needs into it, and name its classes in `config.json`."""
    config_file = Path(folder) / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    write_auto_map(config_file, MODEL_CODE[config["model_type"]])


def push_saved(
    model: Any,
    folder: str | Path,
    repo_id: str,
    before: dict[str, float],
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    tags: list[str] | None = None,
    **commit: Any,
) -> None:
    """Upload a folder that a model was saved to, as `push_to_hub` does, without saving the model a second time.

    Args:
        model: a `PushToHubMixin`.
        folder: with the saved model. It gets a model card if it has none.
        repo_id: of the repository, which is made if there is none.
        before: when the folder's files were last written before the model was saved; files that are unchanged since
            then are not uploaded.
        token: see `push_to_hub`.
        private: likewise.
        tags: likewise.
        **commit: `commit_message`, `commit_description`, `revision` and `create_pr` of `push_to_hub`.
    """
    from huggingface_hub import HfApi
    from transformers.utils.hub import create_and_tag_model_card

    repo_id = HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id
    card = Path(folder) / "README.md"
    if not card.exists():
        create_and_tag_model_card(repo_id, tags, token=token).save(card)
    model._upload_modified_files(str(folder), repo_id, before, token=token, **commit)


def write_auto_map(config_file: Path, auto_map: dict[str, str]) -> None:
    """Name in `config_file` the classes that load it, and copy the files that they are in.

    transformers caches the code of a model without the files that the model does not import. Those of its processor
    may thus be missing here; they are left out, and are written when the processor is saved.
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
    """Copy into `folder` the files that the classes of `auto_map` are in, and those that these import.

    Nothing is lost: a link is replaced, never written through, and a file with other contents is kept as `*.py.old`,
    which is logged as a warning.
    """
    here, replaced = Path(__file__).parent, []
    for module in sorted(needed_modules({module_of(target) for target in auto_map.values()})):
        source, target = here / f"{module}.py", Path(folder) / f"{module}.py"
        content = source.read_bytes()
        if target.exists() and (target.samefile(source) or _is_file_of(target, content)):
            continue
        if target.is_file() and not target.is_symlink():
            os.replace(target, target.with_name(f"{target.name}.old"))
            replaced.append(target.name)
        target.unlink(missing_ok=True)
        target.write_bytes(content)
    if replaced:
        logger.warning(
            "%s: %s had other contents than this version's code. They were replaced, and kept as *.py.old.",
            folder,
            ", ".join(replaced),
        )


def _is_file_of(path: Path, content: bytes) -> bool:
    """Return whether `path` is a file, not a link, with this content."""
    return path.is_file() and not path.is_symlink() and path.read_bytes() == content


def module_of(target: str) -> str:
    """Return the module of a class as an `auto_map` names it: `"module.Class"`."""
    return target.split(".")[0]


def needed_modules(modules: set[str]) -> set[str]:
    """Return `modules` and those that they import. Only `from .name import` is seen, as by transformers."""
    here = Path(__file__).parent
    found: set[str] = set()
    todo = set(modules)
    while todo:
        module = todo.pop()
        found.add(module)
        source = (here / f"{module}.py").read_text(encoding="utf-8")
        todo |= set(re.findall(r"^\s*from \.(\w+) import", source, flags=re.MULTILINE)) - found
    return found
