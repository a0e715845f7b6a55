"""VisualRWKV, a visual language model over a linear RNN, for Hugging Face transformers.

Importing this package makes transformers' Auto classes and pipelines know its models. Everything else is imported when
it is first used. The public names are listed in one place, `__init__.pyi`, which type checkers read as well; each wing
(`visualrwkv_hf.inference`, `visualrwkv_hf.training`, `visualrwkv_hf.cpu`) has a list of its own.
"""

import importlib
import warnings
from typing import Any

import lazy_loader

from .auto_classes import register

__version__ = "0.1.0"

_public_name, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

_MOVED = {
    "Captioning": "inference",
    "PROMPT_FORMATS": "training",
    "SCANS": "scan_orders",
    "TRAINABLE_PARTS": "training",
    "TURN_END": "processing_visualrwkv",
    "build_native_ops": "cpu",
    "chat_inputs": "inference",
    "encode_turns": "training",
    "exit_together": "training",
    "image_processor_for": "image_processing_visualrwkv",
    "learning_rate_at": "training",
    "messages_to_conversation": "training",
    "pictures_in": "inference",
    "reading_figure": "inference",
    "save_figure": "inference",
    "sliced_loss": "loss_visualrwkv",
    "stream_answer": "inference",
    "training_card": "training",
    "visualrwkv_loss": "loss_visualrwkv",
    "wkv_backend": "dispatch",
}
"""Names that version 0.1 had here -> the module that has them now."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used.

    Raises:
        AttributeError: if there is no such name.
    """
    if name not in _MOVED:
        return _public_name(name)
    module = f"{__name__}.{_MOVED[name]}"
    warnings.warn(
        f"{__name__}.{name} has moved: import it from {module}. The old name goes with the next release.",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(importlib.import_module(module), name)


register()
