"""Find and load the model that a person named. Every command and the server load through this file.

A model may come from a stranger, so nothing in its folder runs: code beside the weights is never imported, weights
are safetensors, and the choice of an attention kernel in `config.json` is ignored. Quick to import: torch and
transformers come when they are needed.
"""

import difflib
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from .checks import (
    MAX_TEXT_FILE_BYTES,
    refuse_strange_files,
    refuse_strange_generation,
    refuse_strange_index,
    refuse_strange_layers,
    refuse_strange_processor,
    refuse_strange_size,
    refuse_strange_template,
    refuse_unusable_template,
)
from .model_cache import WEIGHTS, cached_model, is_original, original_of, weights_format
from .progress import loading_reported

DTYPES = ("auto", "float32", "bfloat16", "float16")

VISION_MODEL, TEXT_MODEL = "visualrwkv", "visualrwkv_text"
"""The values of `model_type` that this package can load."""

IGNORED_KEYS = frozenset(
    (
        "auto_map",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "_experts_implementation",
        "_experts_implementation_internal",
        "experts_implementation",
    )
)
"""Keys of `config.json` that name code to import or kernels to fetch. Neither is wanted from a stranger's folder."""

INDEX_FILE = "model.safetensors.index.json"

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    INDEX_FILE,
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "README.md",
)
"""What is fetched of a model on the Hub: data and the card, no code, and no tensors that only the way back needs."""

Result = TypeVar("Result")


# Naming a model.


def model_source(model: str | None) -> str:
    """Return the folder, Hub id or original checkpoint that a person asked for, or the model inside the package.

    It touches no network, so that a mistyped name is refused at once.

    Raises:
        FileNotFoundError: there is no such folder, or no model inside the package.
        ValueError: the folder holds no model of ours, or the name can be neither a folder nor a Hub id.
    """
    if model is None:
        from ..bundled import bundled_model

        return str(bundled_model())
    path = Path(model).expanduser()
    if path.is_dir():
        model_type_of(path)
        return str(path)
    if is_original(model):
        original_of(model)
        return model
    if path.exists():
        raise ValueError(f"{model} is a file, but not a .pth checkpoint: name a model folder.")
    if not may_be_on_hub(model):
        raise FileNotFoundError(f"There is no folder {model}{suggestion(model)}")
    return model


def may_be_on_hub(source: str) -> bool:
    """Return whether `source` reads like `user/name` and is not meant as a path.

    It is meant as a path if it exists, or if a folder `user` does, in which `name` is then a slip of the finger.
    """
    parts = source.split("/")
    return (
        len(parts) == 2
        and all(part.strip(".") and part == part.strip() for part in parts)
        and not source.startswith("~")
        and not Path(source).exists()
        and not Path(parts[0]).is_dir()
    )


def suggestion(model: str) -> str:
    """Return "; did you mean NAME?" with the model folder whose name is closest to `model`, or "." without one."""
    path = Path(model).expanduser()
    try:
        beside = [entry.name for entry in path.parent.iterdir() if (entry / "config.json").is_file()]
    except OSError:
        return "."
    close = difflib.get_close_matches(path.name, beside, n=1)
    return f"; did you mean {path.with_name(close[0])}?" if close else "."


# What a folder holds.


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ValueError: it is missing, too large, no JSON, or not an object.
    """
    try:
        if path.stat().st_size > MAX_TEXT_FILE_BYTES:
            raise ValueError(f"it is larger than {MAX_TEXT_FILE_BYTES} bytes")
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path} cannot be read as JSON: {reason}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    return content


def model_type_of(folder: Path) -> str:
    """Return the `model_type` of the configuration in `folder`.

    Raises:
        ValueError: there is no configuration, or it is of a model that is not ours. Such a model would need code of
            other people, which is never run.
    """
    path = folder / "config.json"
    if not path.is_file():
        adapter = (folder / "adapter_config.json").is_file()
        what = (
            "it holds an adapter, which examples/merge_adapter.py merges into its base model"
            if adapter
            else ""
        )
        raise ValueError(f"{folder} is not a model folder: {what or 'it has no config.json'}.")
    model_type = read_json(path).get("model_type")
    if model_type not in (VISION_MODEL, TEXT_MODEL):
        raise ValueError(
            f"{folder} holds a model of type {model_type!r}, not {VISION_MODEL} or {TEXT_MODEL}: it is not loaded."
        )
    return model_type


def model_folder(source: str, weights: str | None = None) -> Path:
    """Return the folder of a model on this machine.

    Of a Hub id its data files are fetched first, and no code; an original checkpoint is converted into the cache.

    Args:
        source: a folder, a Hub id, or an original checkpoint.
        weights: "int8" or "int4" if an original checkpoint is to be kept in such weights.

    Raises:
        ValueError: the model is not ours, not on the Hub, or the Hub cannot be reached.
    """
    if Path(source).is_dir():
        model_type_of(Path(source))
        refuse_strange_files(Path(source))
        return Path(source)
    if not may_be_on_hub(source) and not is_original(source):
        raise FileNotFoundError(f"There is no folder {source}{suggestion(source)}")
    return cached_model(source, weights) if is_original(source) else fetched_folder(source)


@cache
def fetched_folder(source: str) -> Path:
    """Return the folder in the Hub's cache with the data files of a model. The Hub is asked once in a process."""
    from huggingface_hub import snapshot_download

    from visualrwkv_hf.conversion.hub_address import HubFile
    from visualrwkv_hf.conversion.hub_errors import hub_sentences
    from visualrwkv_hf.conversion.hub_files import download

    model_type_of(download(HubFile(source, "config.json", None)).parent)
    with hub_sentences(source):
        return Path(snapshot_download(source, allow_patterns=[*MODEL_FILES]))


# Loading.


def load_config(source: str, may_load: bool = True) -> Any:
    """Return the configuration of a model without what could make transformers import or fetch code.

    Args:
        source: a folder or a Hub id.
        may_load: whether a model may be made from it. All its parameters are then counted, for it is refused if the
            files cannot hold them; that imports the model's classes, which takes seconds.

    Raises:
        ValueError: it is not ours, damaged, or does not fit together.
    """
    folder = model_folder(source)
    model_type = model_type_of(folder)
    fields = without_ignored(read_json(folder / "config.json"))
    from ..configuration_visualrwkv import VisualRWKVConfig, VisualRWKVTextConfig

    config_class = VisualRWKVTextConfig if model_type == TEXT_MODEL else VisualRWKVConfig

    def load() -> Any:
        config = config_class.from_dict(fields)
        refuse_strange_layers(config, folder)
        refuse_strange_size(config, folder, quick=not may_load)
        return config

    return in_a_sentence(f"The configuration in {folder}", load)


def load_processor(source: str) -> Any:
    """Return the processor of a model that reads pictures.

    Raises:
        ValueError: the model reads no pictures, or a file of its processor is missing or damaged.
    """
    folder = model_folder(source)
    refuse_text_model(folder)
    for name in ("processor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            read_json(folder / name)
    from ..processing_visualrwkv import VisualRWKVProcessor

    def load() -> Any:
        processor = VisualRWKVProcessor.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        refuse_strange_processor(processor, config, folder)
        refuse_strange_template(processor.chat_template, folder)
        refuse_unusable_template(processor, folder)
        return processor

    config = load_config(source)
    return in_a_sentence(f"The processor in {folder}", load)


def load_model(
    source: str,
    device: str = "auto",
    dtype: str = "auto",
    accelerate: bool = True,
    report: Callable[[str], None] | None = None,
    weights: str | None = None,
    tuned_state: str | None = None,
    huge_pages: bool = True,
) -> Any:
    """Return the model of `source`, in evaluation mode on its device.

    Args:
        source: a folder or a Hub id.
        device: as for torch, or "auto" for the accelerator if there is one.
        dtype: one of `DTYPES`; "auto" keeps the checkpoint's.
        accelerate: whether a CPU computes with native ops. Without a C compiler a warning says so, and plain torch
            computes. Other devices have kernels of their own.
        report: takes words on how much is loaded; without it nothing is shown.
        weights: "int8" or "int4" rounds the weights on a CPU as they are loaded, one at a time; see
            `accelerate_on_cpu`. None keeps them as they are stored, which may be in int8 or int4 as well.
        tuned_state: a folder or a Hub id with a [`TunedState`], with which the model begins every text.
        huge_pages: whether a CPU copies the weights to pages of 2 MB; see `accelerate_on_cpu`. A program that answers
            one question begins seconds earlier without.

    Raises:
        ValueError: the model is not ours or damaged, it reads no pictures, device and dtype do not exist here, or the
            tuned state is damaged or for another model.
        OSError: there is no tuned state.
    """
    refuse_unknown_dtype(dtype)
    device = usable_device(device)
    refuse_weights(weights, device, accelerate)
    folder = model_folder(source, weights)
    refuse_text_model(folder)
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds an adapter beside the model: merge it into the model first.")
    config = load_config(source)
    from ..modeling_visualrwkv import VisualRWKVForConditionalGeneration

    if (folder / "generation_config.json").is_file():
        read_json(folder / "generation_config.json")
    if (folder / INDEX_FILE).is_file():
        refuse_strange_index(read_json(folder / INDEX_FILE), folder / INDEX_FILE)
    options: dict[str, Any] = dict(config=config, dtype=dtype, trust_remote_code=False, use_safetensors=True)
    options |= weights_options(folder, config, accelerate and device == "cpu", weights, huge_pages)
    if device == "cpu" and accelerate:
        build_native_ops(report)
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    with loading_reported(report, num_bytes):
        model = in_a_sentence(
            f"The model in {folder}",
            lambda: VisualRWKVForConditionalGeneration.from_pretrained(
                folder, local_files_only=True, **options
            ),
        )
    refuse_strange_generation(model.generation_config, folder)
    model = model.to(device).eval()
    if tuned_state is not None:
        from ..tuned_state import TunedState

        TunedState.attach(model, TunedState.from_pretrained(tuned_state, model))
    return model


def build_native_ops(report: Callable[[str], None] | None) -> None:
    """Load the native ops, and say so where they have to be compiled first: that takes seconds, once."""
    from ..cpu.library import is_compiled
    from ..cpu.ops import unusable

    if report is not None and not is_compiled():
        report("compiling native ops, once on this computer")
    unusable()  # where there are none, `accelerate_on_cpu` says why


def weights_options(
    folder: Path, config: Any, on_cpu: bool, weights: str | None, huge_pages: bool
) -> dict[str, Any]:
    """Return what `from_pretrained` needs to read the weights once and leave them in the form that is computed with.

    Args:
        folder: the model's.
        config: its configuration, from which `quantization_config` is taken: no library for it is needed.
        on_cpu: whether native ops will compute.
        weights: as for `load_model`.
        huge_pages: as for `load_model`.

    Raises:
        ValueError: the weights are stored in a form that cannot be read, or in another one than `weights`.
    """
    from visualrwkv_hf.conversion.folders import open_folder

    from ..cpu.packed import refuse_strange_quantization
    from ..cpu.packed_loading import WhileLoading

    stored = config.__dict__.pop("quantization_config", None)
    if stored is not None:
        refuse_strange_quantization(stored, folder / "config.json")
        if weights not in (None, found := weights_format(folder)):
            raise ValueError(f"The weights in {folder} are in {found}: they cannot be loaded in {weights}.")
        weights = None
    if not on_cpu and stored is None:
        return {}
    infos: Any = open_folder(folder).infos
    return {"quantization_config": WhileLoading(on_cpu, weights, infos, folder, huge_pages)}


def in_a_sentence(what: str, load: Callable[[], Result]) -> Result:
    """Return `load()`, with any exception as a `ValueError` that begins with what could not be loaded.

    Every kind of exception is caught, since damaged files raise whatever the code happens to run into.
    """
    try:
        return load()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in the tokenizers' Rust code is not an `Exception`
        reason = str(error).strip().rstrip(".") or "it is damaged"
        kind = "" if isinstance(error, ValueError | OSError | ImportError) else f"{type(error).__name__}: "
        raise ValueError(f"{what} cannot be loaded: {kind}{reason}.") from error


def without_ignored(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration's fields without `IGNORED_KEYS`, at any depth."""
    return {
        name: without_ignored(value) if isinstance(value, dict) else value
        for name, value in fields.items()
        if name not in IGNORED_KEYS
    }


# Refusals that need no model.


def refuse_text_model(folder: Path) -> None:
    """Raise `ValueError` for a language model without a vision tower."""
    if model_type_of(folder) == TEXT_MODEL:
        raise ValueError(f"{folder} holds a language model, which reads no pictures.")


def refuse_unknown_dtype(dtype: str) -> None:
    """Raise `ValueError` for a dtype that no model here has."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")


def refuse_weights(weights: str | None, device: str, accelerate: bool = True) -> None:
    """Raise `ValueError` for weights of few bits that nothing computes with there."""
    if weights not in (None, *WEIGHTS):
        raise ValueError(f"weights must be {' or '.join(WEIGHTS)}, got {weights!r}.")
    if weights and (device != "cpu" or not accelerate):
        where = f"on {device}" if device != "cpu" else "with plain torch"
        raise ValueError(
            f"Weights in {weights} are for native ops on a CPU: nothing computes with them {where}."
        )


def usable_device(name: str) -> str:
    """Return `name`, or for "auto" the accelerator if there is one and the CPU otherwise.

    Raises:
        ValueError: no tensor can be put on such a device.
    """
    import torch

    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator.type if accelerator else "cpu"
    try:
        torch.zeros(1, device=name).item()  # the device "meta" has no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # which one depends on torch's build
        raise ValueError(f"There is no device {name!r} here.") from error
    return name


__all__ = ["load_config", "load_model", "load_processor", "model_source"]
