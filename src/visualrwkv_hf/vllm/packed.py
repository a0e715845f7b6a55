"""Folders whose weights have few bits: the engine computes with the weights that these stand for."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ..cpu.packed import SCALE, SHAPE, packed_layers, refuse_strange_layer, unpacked
from ..decompression import PACKED


def dense_weights(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of a folder with the packed ones as dense weights [out, in], in the dtype of their scales.

    Raises:
        ValueError: the tensors of a packed layer do not fit together.
    """
    tensors = dict(weights)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for layer in packed_layers(shapes):
        words = tensors.pop(f"{layer}.{PACKED}")
        rows, columns = tensors.pop(f"{layer}.{SHAPE}").tolist()
        refuse_strange_layer(layer, shapes, rows, columns, "The folder")
        scale = tensors.pop(f"{layer}.{SCALE}")
        tensors[f"{layer}.weight"] = unpacked(words, scale, columns).widened().to(scale.dtype)
    return tensors
