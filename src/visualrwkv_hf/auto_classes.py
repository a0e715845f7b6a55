"""Makes transformers' Auto classes know this package without importing either.

transformers holds its own models as names, `model_type -> class name`, in one table for each Auto class, and imports
`transformers.models.<model_type>` when one is asked for. Ours are added to the same tables: to one that is not
imported yet, as soon as it is. (The `register` of an Auto class takes the class itself; with its imports that is
longer than the import of transformers, and would come amid that of whoever needs an Auto class first.)
"""

import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

CONFIGS = {
    "visualrwkv": "VisualRWKVConfig",
    "visualrwkv_text": "VisualRWKVTextConfig",
    "visualrwkv_vision": "VisualRWKVVisionConfig",
}


class Table(NamedTuple):
    """What an Auto class shall know: `classes`, by model_type, in the dictionary `name` of transformers' `module`."""

    module: str
    name: str
    classes: Mapping[str, Any]


MODELS = "transformers.models.auto.modeling_auto"
GENERATING = {"visualrwkv": "VisualRWKVForConditionalGeneration"}
TABLES = {
    "AutoConfig": Table("transformers.models.auto.configuration_auto", "CONFIG_MAPPING_NAMES", CONFIGS),
    "AutoModel": Table(
        MODELS,
        "MODEL_MAPPING_NAMES",
        {
            "visualrwkv": "VisualRWKVModel",
            "visualrwkv_text": "VisualRWKVTextModel",
            "visualrwkv_vision": "VisualRWKVVisionModel",
        },
    ),
    "AutoModelForImageTextToText": Table(MODELS, "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", GENERATING),
    "AutoModelForMultimodalLM": Table(MODELS, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", GENERATING),
    "AutoModelForCausalLM": Table(
        MODELS, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", {"visualrwkv_text": "VisualRWKVForCausalLM"} | GENERATING
    ),
    "AutoProcessor": Table(
        "transformers.models.auto.processing_auto",
        "PROCESSOR_MAPPING_NAMES",
        {"visualrwkv": "VisualRWKVProcessor"},
    ),
    "AutoImageProcessor": Table(
        "transformers.models.auto.image_processing_auto",
        "IMAGE_PROCESSOR_MAPPING_NAMES",
        {"visualrwkv": {"pil": "VisualRWKVImageProcessor"}},
    ),
}


def register() -> None:
    """Makes transformers' Auto classes know this package. Runs at import; calling it again changes nothing."""
    if any(isinstance(finder, AfterImport) for finder in sys.meta_path):
        return
    package = sys.modules[__package__]
    for model_type in CONFIGS:
        sys.modules[f"transformers.models.{model_type}"] = package
    sys.meta_path.insert(0, AfterImport())
    for module in dict.fromkeys(table.module for table in TABLES.values()):
        if module in sys.modules:
            add_names(sys.modules[module])
            register_classes(sys.modules[module])


class AfterImport(MetaPathFinder):
    """Adds our names to a module of transformers' right after it was imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not any(fullname == table.module for table in TABLES.values()):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                add_names(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def add_names(module: ModuleType) -> None:
    """Adds our names to the tables of an imported module of transformers'."""
    for table in TABLES.values():
        if table.module == module.__name__:
            getattr(module, table.name).update(table.classes)


def register_classes(module: ModuleType) -> None:
    """Registers our classes with the Auto classes of a module that was imported before our names were known.

    It has read the names of all configurations by then.
    """
    package = sys.modules[__package__]
    for auto_class, table in TABLES.items():
        if table.module != module.__name__ or auto_class == "AutoConfig":
            continue
        register_class = getattr(module, auto_class).register
        for model_type, value in table.classes.items():
            config_class = getattr(package, CONFIGS[model_type])
            if isinstance(value, str):
                register_class(config_class, getattr(package, value), exist_ok=True)
            else:
                classes = {backend: getattr(package, name) for backend, name in value.items()}
                register_class(config_class, image_processor_classes=classes, exist_ok=True)
