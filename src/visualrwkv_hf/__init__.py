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
    from .configuration_visualrwkv import VisualRWKVConfig, VisualRWKVTextConfig, VisualRWKVVisionConfig
    from .cpu.layers import accelerate_on_cpu
    from .cpu.ops import build_native_ops
    from .dispatch import kernel_backend, wkv_backend
    from .image_processing_visualrwkv import VisualRWKVImageProcessor, image_processor_for
    from .inference.captioning import Captioning, pictures_in
    from .inference.chat import Chat, chat_inputs
    from .inference.figure import reading_figure, save_figure
    from .inference.onnx_export import export_onnx
    from .inference.server import serve
    from .inference.streaming import stream_answer
    from .kept_state import KeptState
    from .loss_visualrwkv import sliced_loss, visualrwkv_loss
    from .modeling_rwkv import VisualRWKVForCausalLM, VisualRWKVTextModel
    from .modeling_vision import VisualRWKVVisionModel
    from .modeling_visualrwkv import VisualRWKVForConditionalGeneration, VisualRWKVModel
    from .processing_visualrwkv import TURN_END, VisualRWKVProcessor
    from .scan_orders import SCANS
    from .state_store import StateStore
    from .training.collator import VisualRWKVDataCollator, load_conversations, messages_to_conversation
    from .training.conversations import PROMPT_FORMATS, encode_turns
    from .training.trainer import (
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
    "Captioning": "inference.captioning",
    "Chat": "inference.chat",
    "KeptState": "kept_state",
    "PROMPT_FORMATS": "training.conversations",
    "SCANS": "scan_orders",
    "StateStore": "state_store",
    "TRAINABLE_PARTS": "training.trainer",
    "TURN_END": "processing_visualrwkv",
    "VisualRWKVCache": "cache_visualrwkv",
    "VisualRWKVConfig": "configuration_visualrwkv",
    "VisualRWKVDataCollator": "training.collator",
    "VisualRWKVForCausalLM": "modeling_rwkv",
    "VisualRWKVForConditionalGeneration": "modeling_visualrwkv",
    "VisualRWKVImageProcessor": "image_processing_visualrwkv",
    "VisualRWKVModel": "modeling_visualrwkv",
    "VisualRWKVProcessor": "processing_visualrwkv",
    "VisualRWKVStaticCache": "cache_visualrwkv",
    "VisualRWKVTextConfig": "configuration_visualrwkv",
    "VisualRWKVTextModel": "modeling_rwkv",
    "VisualRWKVTrainer": "training.trainer",
    "VisualRWKVTrainingArguments": "training.trainer",
    "VisualRWKVVisionConfig": "configuration_visualrwkv",
    "VisualRWKVVisionModel": "modeling_vision",
    "accelerate_on_cpu": "cpu.layers",
    "build_native_ops": "cpu.ops",
    "chat_inputs": "inference.chat",
    "encode_turns": "training.conversations",
    "exit_together": "training.trainer",
    "export_onnx": "inference.onnx_export",
    "image_processor_for": "image_processing_visualrwkv",
    "kernel_backend": "dispatch",
    "learning_rate_at": "training.trainer",
    "load_conversations": "training.collator",
    "lora_config": "training.trainer",
    "messages_to_conversation": "training.collator",
    "pictures_in": "inference.captioning",
    "reading_figure": "inference.figure",
    "save_figure": "inference.figure",
    "serve": "inference.server",
    "sliced_loss": "loss_visualrwkv",
    "stream_answer": "inference.streaming",
    "train_only": "training.trainer",
    "training_card": "training.trainer",
    "visualrwkv_loss": "loss_visualrwkv",
    "wkv6": "wkv",
    "wkv7": "wkv",
    "wkv_backend": "dispatch",
}
"""Public name -> the module that is imported when the name is first used."""

__all__ = [
    "PROMPT_FORMATS",
    "SCANS",
    "TRAINABLE_PARTS",
    "TURN_END",
    "Captioning",
    "Chat",
    "KeptState",
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
    "kernel_backend",
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
