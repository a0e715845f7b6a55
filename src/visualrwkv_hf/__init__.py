"""VisualRWKV, a visual language model over a linear RNN, for Hugging Face transformers.

Importing this package makes transformers' Auto classes and pipelines know its models.
"""

import contextlib
from pathlib import Path

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .cache_visualrwkv import VisualRWKVCache, VisualRWKVStaticCache
from .configuration_visualrwkv import VisualRWKVConfig, VisualRWKVTextConfig, VisualRWKVVisionConfig
from .image_processing_visualrwkv import VisualRWKVImageProcessor
from .modeling_rwkv import VisualRWKVForCausalLM, VisualRWKVTextModel
from .modeling_vision import VisualRWKVVisionModel
from .modeling_visualrwkv import VisualRWKVForConditionalGeneration, VisualRWKVModel
from .processing_visualrwkv import VisualRWKVProcessor
from .scan_orders import SCANS
from .wkv import wkv6, wkv7, wkv_backend

__version__ = "0.1.0"


def register() -> None:
    """Makes transformers' Auto classes know this package. Runs at import; calling it again changes nothing."""
    for config_class in (VisualRWKVConfig, VisualRWKVTextConfig, VisualRWKVVisionConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(VisualRWKVConfig, VisualRWKVModel, exist_ok=True)
    AutoModel.register(VisualRWKVTextConfig, VisualRWKVTextModel, exist_ok=True)
    AutoModel.register(VisualRWKVVisionConfig, VisualRWKVVisionModel, exist_ok=True)
    AutoModelForImageTextToText.register(VisualRWKVConfig, VisualRWKVForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(VisualRWKVConfig, VisualRWKVForConditionalGeneration, exist_ok=True)
    AutoModelForCausalLM.register(VisualRWKVTextConfig, VisualRWKVForCausalLM, exist_ok=True)
    AutoProcessor.register(VisualRWKVConfig, VisualRWKVProcessor, exist_ok=True)
    with contextlib.suppress(ImportError):  # older transformers keep this class behind torchvision
        AutoImageProcessor.register(
            VisualRWKVConfig, image_processor_classes={"pil": VisualRWKVImageProcessor}, exist_ok=True
        )


def bundled_model() -> Path:
    """The folder of the small model inside this package.

    Raises:
        FileNotFoundError: if this version of the package has none.
    """
    folder = Path(__file__).parent / "bundled"
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"visualrwkv-hf {__version__} has no model inside: name one (a folder or a Hub id), for example one "
            "that you converted."
        )
    return folder


register()

__all__ = [
    "SCANS",
    "VisualRWKVCache",
    "VisualRWKVConfig",
    "VisualRWKVForCausalLM",
    "VisualRWKVForConditionalGeneration",
    "VisualRWKVImageProcessor",
    "VisualRWKVModel",
    "VisualRWKVProcessor",
    "VisualRWKVStaticCache",
    "VisualRWKVTextConfig",
    "VisualRWKVTextModel",
    "VisualRWKVVisionConfig",
    "VisualRWKVVisionModel",
    "bundled_model",
    "register",
    "wkv6",
    "wkv7",
    "wkv_backend",
]
