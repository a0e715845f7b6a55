"""State dicts in memory: from the original's names to ours and back, and the model of one."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from visualrwkv_hf.configuration_visualrwkv import VisualRWKVTextConfig

from . import infer_config as inference
from .errors import ConversionError
from .folders import Config
from .key_map import Row, canonical_name, check_names, check_shapes, key_rows, rows_to_original, rows_to_ours


def model_class(config: Config) -> type:
    """Return the class that computes a converted checkpoint."""
    if isinstance(config, VisualRWKVTextConfig):
        from visualrwkv_hf.modeling_rwkv import VisualRWKVForCausalLM

        return VisualRWKVForCausalLM
    from visualrwkv_hf.modeling_visualrwkv import VisualRWKVForConditionalGeneration

    return VisualRWKVForConditionalGeneration


def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the model's state dict, without taking memory for it."""
    with torch.device("meta"):
        model = model_class(config)(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def infer_from(tensors: Mapping[str, Tensor], **overrides: Any) -> inference.Inferred:
    """Call `infer` for tensors at hand: what only their values tell is read as well, where it is needed."""
    infos = getattr(tensors, "infos", tensors)
    shapes = {name: tuple(info.shape) for name, info in infos.items()}
    gate = next((name for name in shapes if name.endswith("proj.gate.weight")), None)
    untrained = None
    if gate is not None and not getattr(tensors[gate], "is_meta", False):
        untrained = partial(inference.gate_is_untrained, tensors[gate])
    return inference.infer(shapes, gate_is_untrained=untrained, **overrides)


def checked_rows(shapes: Mapping[str, Sequence[int]], config: Config) -> list[Row]:
    """Return the rows between a checkpoint and the model of `config`.

    Args:
        shapes: canonical original name -> shape. Without any `vit.` tensor the vision tower is left out.
        config: of the model.

    Raises:
        ConversionError: naming a missing, an unknown or a misshapen tensor.
    """
    rows = key_rows(config, with_vision=any(name.startswith("vit.") for name in shapes))
    check_names(shapes, rows)
    check_shapes(shapes, rows, expected_shapes(config))
    return rows


def convert_state_dict(original: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Return an original state dict under our names, in memory; views where the layout allows.

    Raises:
        ConversionError: naming a missing, an unknown or a misshapen tensor.
    """
    original = canonical_tensors(original)
    return dict(rows_to_ours(original, checked_rows(_shapes(original), config)))


def restore_state_dict(
    ours: Mapping[str, Tensor], config: Config, unused: Mapping[str, Tensor] = {}
) -> dict[str, Tensor]:
    """Return our state dict under the original's names, with the original's `unused` tensors if given."""
    rows = key_rows(config, with_vision=any(name.startswith("model.vision_tower.") for name in ours))
    return dict(rows_to_original(ours, rows, unused))


def unused_tensors(original: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Return the tensors of an original state dict that our model does not hold."""
    original = canonical_tensors(original)
    return {
        row.original: original[row.original]
        for row in key_rows(config)
        if row.is_unused and row.original in original
    }


def load_original(original: Mapping[str, Tensor], **overrides: Any) -> torch.nn.Module:
    """Return the model of an original state dict, in memory, in the dtype of the language model's tensors.

    Args:
        original: names as in the original's checkpoints. If there is no vision tower, `vision_config`
            describes one, whose weights stay as initialised.
        **overrides: see `infer`.
    """
    config = infer_from(original, **overrides).config
    ours = convert_state_dict(original, config)
    model = model_class(config)(config)
    missing, unexpected = model.load_state_dict(ours, strict=False)
    missing = [name for name in missing if not name.startswith("model.vision_tower.") or holds_vision(ours)]
    if missing or unexpected:
        raise ConversionError(f"The model lacks {missing} and does not know {unexpected}.")
    return model.to(ours["lm_head.weight"].dtype).eval()


def canonical_tensors(original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict under canonical names; see `canonical_name`."""
    return {canonical_name(name): tensor for name, tensor in original.items()}


def holds_vision(names: Iterable[str]) -> bool:
    return any(name.startswith("model.vision_tower.") for name in names)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


__all__ = ["convert_state_dict", "load_original", "restore_state_dict"]
