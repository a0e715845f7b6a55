"""Weights of few bits in files: the format `pack-quantized` of compressed-tensors, which transformers reads.

A layer's weight [out, in] is three tensors: `weight_packed` int32 [out, in bits / 32], whose words hold 32 / bits
neighbours of a row, the first in the lowest bits, each as 2^(bits - 1) more than the integer that it is;
`weight_scale` [out, in / group], or [out, 1] where a whole row shares a scale; and `weight_shape`, out and in.
A folder's `config.json` says in `quantization_config` which layers are stored so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..decompression import PACKED
from .rounding import ROUNDINGS, Rounded

METHOD, LAYOUT = "compressed-tensors", "pack-quantized"
SCALE, SHAPE = "weight_scale", "weight_shape"
INTEGER_DTYPES = {PACKED: torch.int32, SHAPE: torch.int64}
"""Tensor of a layer -> its dtype; the scale has the dtype of the model."""
WORD_BITS = 32
GROUP = ROUNDINGS["int4"].group
"""Neighbours that share a scale in the native ops: groups of files must be multiples of it."""


# --- tensors --------------------------------------------------------------------------------------------------


def packed_tensors(weight: Rounded) -> dict[str, Tensor]:
    """Return what a file holds of a weight, by the last part of its name."""
    shape = torch.tensor(weight.integers.shape)
    return {PACKED: pack(weight.integers, weight.bits), SCALE: weight.scale.contiguous(), SHAPE: shape}


def packed_shapes(rows: int, columns: int, bits: int, groups: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a weight's tensors in a file."""
    return {PACKED: (rows, columns * bits // WORD_BITS), SCALE: (rows, groups), SHAPE: (2,)}


def pack(integers: Tensor, bits: int) -> Tensor:
    """Return int8 integers [out, in] as words, int32 [out, in bits / 32]."""
    if bits == 8:
        return (integers.contiguous().view(torch.uint8) ^ 0x80).view(torch.int32)
    halves = (integers + 8).view(torch.uint8)  # two neighbours are the lower and the upper half of a byte
    return (halves[:, ::2] | halves[:, 1::2] << 4).contiguous().view(torch.int32)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Return the integers of words, int8 [out, in]. The inverse of `pack`."""
    packed = words.contiguous().view(torch.uint8)
    if bits == 8:
        return (packed ^ 0x80).view(torch.int8)
    return torch.stack([packed & 15, packed >> 4], 2).flatten(1).view(torch.int8) - 8


def unpacked(words: Tensor, scale: Tensor, columns: int) -> Rounded:
    """Return the weight of `columns` columns whose words and scales a file holds."""
    bits = words.shape[1] * WORD_BITS // columns
    return Rounded(unpack(words, bits), scale, bits)


# --- names ----------------------------------------------------------------------------------------------------


def packed_layers(names: Iterable[str]) -> list[str]:
    """Return the layers of which a file holds words, from its tensors' names."""
    return sorted(name.removesuffix(f".{PACKED}") for name in names if name.endswith(f".{PACKED}"))


def refuse_strange_layer(
    layer: str, shapes: Mapping[str, tuple[int, ...]], rows: int, columns: int, where: object
) -> tuple[int, int]:
    """Return how many bits and how many groups a layer's weight [rows, columns] has in a file.

    Args:
        layer: its name.
        shapes: of all tensors of the files.
        rows: of its weight in the model.
        columns: likewise.
        where: names the files in an error.

    Raises:
        ValueError: if one of its tensors is missing, or they do not fit together or the native ops' formats.
    """
    for name in (SCALE, SHAPE):
        if f"{layer}.{name}" not in shapes:
            raise ValueError(f"{where} has {layer}.{PACKED} but no {layer}.{name}.")
    words, scale = (tuple(shapes[f"{layer}.{name}"]) for name in (PACKED, SCALE))
    bits = words[1] * WORD_BITS // columns if len(words) == 2 else 0
    kinds = [rounding.bits for rounding in ROUNDINGS.values()]
    if bits not in kinds or words != (rows, columns * bits // WORD_BITS) or columns * bits % WORD_BITS:
        raise ValueError(
            f"{layer}.{PACKED} in {where} has the shape {list(words)}, which is no weight of {rows} x {columns} in "
            f"{' or '.join(str(kind) for kind in kinds)} bits."
        )
    groups = scale[1] if len(scale) == 2 else 0
    is_whole = groups and columns % groups == 0
    if not is_whole or scale[0] != rows or (groups > 1 and (bits == 8 or columns // groups % GROUP)):
        expected = f"[{rows}, 1]" if bits == 8 else f"[{rows}, {columns // GROUP}]"
        raise ValueError(f"{layer}.{SCALE} in {where} has the shape {list(scale)}, {expected} can be read.")
    return bits, groups


# --- config.json ----------------------------------------------------------------------------------------------


def quantization_config(layers: Mapping[str, str], others: Iterable[str] = ()) -> dict[str, Any]:
    """Return the entry `quantization_config` of a configuration.

    Args:
        layers: which layers are rounded -> a name in `ROUNDINGS`.
        others: linear layers that are not.
    """
    groups: dict[str, Any] = {}
    for name, rounding in ROUNDINGS.items():
        if targets := _targets(layers, name):
            groups[f"group_{len(groups)}"] = {
                "targets": targets,
                "weights": {
                    "num_bits": rounding.bits,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group" if rounding.group else "channel",
                    "group_size": rounding.group or None,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
    return {
        "quant_method": METHOD,
        "format": LAYOUT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _parts_without(layers, others),
    }


def _targets(layers: Mapping[str, str], kind: str) -> list[str]:
    """Return the names of the layers of one kind, as regular expressions that fit whatever is before `layers.0`.

    Such an expression stands for the layers of all numbers; layers that would fit those of two kinds are named.
    """
    kinds: dict[str, set[str]] = {}
    for layer, found in layers.items():
        kinds.setdefault(_pattern(layer), set()).add(found)
    mine = [layer for layer, found in layers.items() if found == kind]
    return sorted({_pattern(layer) if len(kinds[_pattern(layer)]) == 1 else layer for layer in mine})


def _pattern(layer: str) -> str:
    parts = layer.split(".")
    start = parts.index("layers") if "layers" in parts else len(parts) - 1
    return "re:.*" + r"\.".join(r"\d+" if part.isdigit() else part for part in parts[start:]) + "$"


def _parts_without(layers: Mapping[str, str], others: Iterable[str]) -> list[str]:
    """Return the parts of a model, such as `vision_tower`, that hold linear layers and none that is rounded."""
    part_of = lambda layer: next((part for part in layer.split(".")[:-1] if part != "model"), layer)  # noqa: E731
    with_rounded = {part_of(layer) for layer in layers}
    found = sorted({part_of(layer) for layer in others})
    return [rf"re:.*{part}\..*" for part in found if part not in with_rounded]


def refuse_strange_quantization(fields: Any, where: object) -> None:
    """Raise `ValueError` for a `quantization_config` whose files are not those that this module reads.

    Args:
        fields: the entry of `config.json`.
        where: names the file in an error.
    """
    if not isinstance(fields, Mapping) or fields.get("quant_method") != METHOD:
        method = fields.get("quant_method") if isinstance(fields, Mapping) else fields
        raise ValueError(f"{where} asks for weights quantised by {method!r}: only {METHOD} can be read.")
    groups = fields.get("config_groups")
    if fields.get("format") != LAYOUT or not isinstance(groups, Mapping) or not groups:
        raise ValueError(
            f"{where} asks for the format {fields.get('format')!r} of {METHOD}: only {LAYOUT} can be read."
        )
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise ValueError(f"config_groups.{name}.weights in {where} must be an object, got {weights!r}.")
        if group.get("input_activations") or group.get("output_activations"):
            raise ValueError(
                f"config_groups.{name} in {where} rounds activations: only weights may be rounded."
            )
        wanted = {"type": "int", "symmetric": True, "dynamic": False, "actorder": None}
        for key, value in wanted.items():
            if weights.get(key, value) not in (value, False if key == "actorder" else value):
                raise ValueError(
                    f"config_groups.{name}.weights.{key} in {where} must be {value}, got {weights[key]!r}."
                )
        group_size = weights.get("group_size")
        if group_size not in (None, -1) and not (isinstance(group_size, int) and group_size > 0):
            raise ValueError(
                f"config_groups.{name}.weights.group_size in {where} must be positive, got {group_size!r}."
            )
