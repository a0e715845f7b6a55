"""Models whose files hold weights of few bits, loaded by transformers with the library compressed-tensors.

The library leaves the weights as they are stored until the first forward pass, and then wraps the forward of every
module in one that turns named tuples into plain ones, which the blocks cannot read. So the layers are decompressed
here, those of a module before its first forward pass, and become layers as any other.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from threading import Lock
from typing import Any

from torch import nn
from transformers.quantizers import auto

PACKED = "weight_packed"
"""The name of a layer's stored weight."""


LIBRARY = "compressed-tensors"


_swapping = Lock()
_loading = 0
"""How many threads are loading a model, for which the library's quantizer is replaced."""


@contextlib.contextmanager
def towers_convert_alone() -> Iterator[None]:
    """Keep the library's quantizer away from the conversions of a tower's older names while the body loads a model.

    transformers would let it decompress what each of them renames, also where it splits one tensor into two as DINOv2's
    does, and that it refuses. Towers are not packed.
    """
    quantizer = auto.AUTO_QUANTIZER_MAPPING.get(LIBRARY)
    if quantizer is None or not hasattr(quantizer, "update_weight_conversions"):
        yield
        return

    global _loading
    with _swapping:
        _loading += 1
        if _loading == 1:
            auto.AUTO_QUANTIZER_MAPPING[LIBRARY] = _of_weights_alone(quantizer)
    try:
        yield
    finally:
        with _swapping:
            _loading -= 1
            if not _loading:
                auto.AUTO_QUANTIZER_MAPPING[LIBRARY] = auto.AUTO_QUANTIZER_MAPPING[LIBRARY].__base__


def _of_weights_alone(quantizer: type) -> type:
    class Quantizer(quantizer):  # type: ignore[misc, valid-type]
        def update_weight_conversions(self, weight_conversions: list, *model: nn.Module) -> list:
            # transformers 5.19 gives no model
            return [*weight_conversions, *self.get_weight_conversions()]

    return Quantizer


def decompress_when_used(model: nn.Module) -> None:
    """Let the modules of a model decompress their layers before they compute, in place of the library's own hook."""
    hook = model.__dict__.pop("ct_decompress_hook", None)
    if hook is None:
        return
    hook.remove()
    model._num_packed = _count_packed(model)  # type: ignore[assignment]
    for module in model.modules():
        if any(hasattr(child, PACKED) for child in module.children()):
            module.register_forward_pre_hook(_decompress_children)


def _decompress_children(module: nn.Module, args: Any) -> None:
    decompress = importlib.import_module("compressed_tensors.compressors.base").decompress_module
    for child in module.children():
        if hasattr(child, PACKED):
            decompress(child, leave_decompressed=False)
    forget_decompression(module)


def forget_decompression(module: nn.Module) -> None:
    """Remove the hook of `decompress_when_used` from a module."""
    hooks = module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _decompress_children]:
        del hooks[key]


def decompress_the_rest(model: Any) -> None:
    """Decompress all layers of a model if some are, so that it can be saved as a dense one."""
    packed = _count_packed(model)
    if packed == getattr(model, "_num_packed", packed):
        return
    for module in list(model.modules()):
        if _decompress_children in module._forward_pre_hooks.values():
            _decompress_children(module, ())
    del model._num_packed
    model.hf_quantizer.remove_quantization_config(model)


def _count_packed(model: nn.Module) -> int:
    return sum(hasattr(module, PACKED) for module in model.modules())
