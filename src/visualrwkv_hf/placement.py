"""Where the parts of a model compute: its weights may lie on several devices, or outside of the memory."""

from typing import Any

import torch
from torch import nn


def text_model_of(model: Any) -> Any:
    """Return the part of a model that has the blocks: the model without its head, its tower and PEFT's wrapper."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    base = getattr(model, "base_model", model)
    return getattr(base, "language_model", base)


def compute_device(module: Any) -> torch.device:
    """Return the device on which a model or a module of it computes.

    That is where its first weight is. A weight that lies elsewhere meanwhile (accelerate's `device_map` with "disk", or
    with "cpu" beside a GPU) is on the meta device, and the hook that fetches it knows where it is needed.
    """
    device = next(module.parameters()).device
    return device if device.type != "meta" else _device_of_hooks(module) or device


def _device_of_hooks(module: nn.Module) -> torch.device | None:
    for part in module.modules():
        hook: Any = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            if (device := getattr(one, "execution_device", None)) is not None:
                return torch.device(device)
    return None


def block_devices(model: Any) -> list[torch.device]:
    """Return where each block of a model's language model computes, and so where its states have to be."""
    return [compute_device(block) for block in text_model_of(model).layers]
