"""Register our models with transformers' Auto classes without importing either.

transformers keeps its own models as names, `model_type -> class name`, in one table per Auto class, and imports
`transformers.models.<model_type>` when a model is requested. We add our names to the same tables; if the module of a
table is not imported yet, we add them as soon as it is. (The `register` method of an Auto class needs the class itself.
Importing our classes takes longer than importing transformers, and would happen in the middle of another import.)
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
    """An entry of one Auto class: `classes`, by model_type, go into the dictionary `name` of that `module`."""

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
    """Make the Auto classes of transformers know this package. Runs at import; a second call changes nothing."""
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
    """Add our names to a transformers module right after it is imported."""

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
    """Add our names to the tables of a transformers module that is imported."""
    for table in TABLES.values():
        if table.module == module.__name__:
            getattr(module, table.name).update(table.classes)


def register_classes(module: ModuleType) -> None:
    """Register our classes with the Auto classes of a module that was imported before this package.

    Such a module has already read the names of all configurations.
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
