"""VisualRWKV, a visual language model over a linear RNN, for Hugging Face transformers.

Importing this package makes transformers' Auto classes and pipelines know its models. Nothing else is imported
before it is used.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .auto_classes import register

if TYPE_CHECKING:
    from .cache_visualrwkv import VisualRWKVCache, VisualRWKVStaticCache
    from .caption_visualrwkv import Captioning, pictures_in
    from .chat_visualrwkv import Chat, chat_inputs, stream_answer
    from .collator_visualrwkv import VisualRWKVDataCollator, load_conversations, messages_to_conversation
    from .configuration_visualrwkv import VisualRWKVConfig, VisualRWKVTextConfig, VisualRWKVVisionConfig
    from .data_visualrwkv import PROMPT_FORMATS, TURN_END, encode_turns
    from .export_visualrwkv import export_onnx
    from .image_processing_visualrwkv import VisualRWKVImageProcessor, image_processor_for
    from .kernels import wkv_backend
    from .loss_visualrwkv import sliced_loss, visualrwkv_loss
    from .modeling_rwkv import VisualRWKVForCausalLM, VisualRWKVTextModel
    from .modeling_vision import VisualRWKVVisionModel
    from .modeling_visualrwkv import VisualRWKVForConditionalGeneration, VisualRWKVModel
    from .native import build_native_ops
    from .native_layers import accelerate_on_cpu
    from .processing_visualrwkv import VisualRWKVProcessor
    from .scan_orders import SCANS
    from .serve_visualrwkv import serve
    from .show_visualrwkv import reading_figure, save_figure
    from .state_store import StateStore
    from .training_visualrwkv import (
        TRAINABLE_PARTS,
        VisualRWKVTrainer,
        VisualRWKVTrainingArguments,
        exit_together,
        learning_rate_at,
        lora_config,
        train_only,
        training_card,
    )
    from .wkv import wkv6, wkv7

__version__ = "0.1.0"

MODULE_OF = {
    "Captioning": "caption_visualrwkv",
    "Chat": "chat_visualrwkv",
    "PROMPT_FORMATS": "data_visualrwkv",
    "SCANS": "scan_orders",
    "StateStore": "state_store",
    "TRAINABLE_PARTS": "training_visualrwkv",
    "TURN_END": "data_visualrwkv",
    "VisualRWKVCache": "cache_visualrwkv",
    "VisualRWKVConfig": "configuration_visualrwkv",
    "VisualRWKVDataCollator": "collator_visualrwkv",
    "VisualRWKVForCausalLM": "modeling_rwkv",
    "VisualRWKVForConditionalGeneration": "modeling_visualrwkv",
    "VisualRWKVImageProcessor": "image_processing_visualrwkv",
    "VisualRWKVModel": "modeling_visualrwkv",
    "VisualRWKVProcessor": "processing_visualrwkv",
    "VisualRWKVStaticCache": "cache_visualrwkv",
    "VisualRWKVTextConfig": "configuration_visualrwkv",
    "VisualRWKVTextModel": "modeling_rwkv",
    "VisualRWKVTrainer": "training_visualrwkv",
    "VisualRWKVTrainingArguments": "training_visualrwkv",
    "VisualRWKVVisionConfig": "configuration_visualrwkv",
    "VisualRWKVVisionModel": "modeling_vision",
    "accelerate_on_cpu": "native_layers",
    "build_native_ops": "native",
    "chat_inputs": "chat_visualrwkv",
    "encode_turns": "data_visualrwkv",
    "exit_together": "training_visualrwkv",
    "export_onnx": "export_visualrwkv",
    "image_processor_for": "image_processing_visualrwkv",
    "learning_rate_at": "training_visualrwkv",
    "load_conversations": "collator_visualrwkv",
    "lora_config": "training_visualrwkv",
    "messages_to_conversation": "collator_visualrwkv",
    "pictures_in": "caption_visualrwkv",
    "reading_figure": "show_visualrwkv",
    "save_figure": "show_visualrwkv",
    "serve": "serve_visualrwkv",
    "sliced_loss": "loss_visualrwkv",
    "stream_answer": "chat_visualrwkv",
    "train_only": "training_visualrwkv",
    "training_card": "training_visualrwkv",
    "visualrwkv_loss": "loss_visualrwkv",
    "wkv6": "wkv",
    "wkv7": "wkv",
    "wkv_backend": "kernels",
}
"""Public name -> the file beside this one that is imported when the name is first used."""

__all__ = [
    "PROMPT_FORMATS",
    "SCANS",
    "TRAINABLE_PARTS",
    "TURN_END",
    "Captioning",
    "Chat",
    "StateStore",
    "VisualRWKVCache",
    "VisualRWKVConfig",
    "VisualRWKVDataCollator",
    "VisualRWKVForCausalLM",
    "VisualRWKVForConditionalGeneration",
    "VisualRWKVImageProcessor",
    "VisualRWKVModel",
    "VisualRWKVProcessor",
    "VisualRWKVStaticCache",
    "VisualRWKVTextConfig",
    "VisualRWKVTextModel",
    "VisualRWKVTrainer",
    "VisualRWKVTrainingArguments",
    "VisualRWKVVisionConfig",
    "VisualRWKVVisionModel",
    "accelerate_on_cpu",
    "build_native_ops",
    "bundled_model",
    "chat_inputs",
    "encode_turns",
    "exit_together",
    "export_onnx",
    "image_processor_for",
    "learning_rate_at",
    "load_conversations",
    "lora_config",
    "messages_to_conversation",
    "pictures_in",
    "reading_figure",
    "register",
    "save_figure",
    "serve",
    "sliced_loss",
    "stream_answer",
    "train_only",
    "training_card",
    "visualrwkv_loss",
    "wkv6",
    "wkv7",
    "wkv_backend",
]


def __getattr__(name: str) -> Any:
    if name not in MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *MODULE_OF})


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
