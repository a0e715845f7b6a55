"""The layers that let a model compute with native ops on a CPU.

from visualrwkv_hf import accelerate_on_cpu

model = accelerate_on_cpu(model)             # or accelerate_on_cpu(model, weights="int8")
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import PreTrainedModel

from ..decompression import forget_decompression
from ..dispatch import chosen_backend
from ..modeling_rwkv import RwkvBlock
from ..modeling_vision import VisualRWKVVisionModel
from .attention import use_native_attention
from .formats import FLOAT_DTYPES
from .memory import give_back, is_plain, mapped_files, move_to_huge_pages, unmap, unmap_after_use
from .ops import MAX_ROWS, linear, linear_bf16, linear_int8, unsupported, unusable
from .packed import (
    INTEGER_DTYPES,
    PACKED,
    SCALE,
    SHAPE,
    WORD_BITS,
    packed_tensors,
    quantization_config,
    unpacked,
)
from .products import compute_dtype, has_tiles, may_use_panels, multiply_panels
from .rounding import ROUNDINGS, Rounded, rounded, rounding_of

MANY_ROWS = 64
"""From this many rows on `linear_bf16` has brought a weight into its order for little of its time."""

# --- linear layers ----------------------------------------------------------------------------------------


def serves(x: Tensor, most: int = MAX_ROWS) -> bool:
    """Return whether the native `linear` multiplies x: it has few rows, and no other backend was asked for."""
    return (
        chosen_backend() in ("auto", "native")
        and x.numel() <= most * x.shape[-1]
        and not unsupported("linear", x, gradient=torch.is_grad_enabled())
    )


def multiplies_in_int8(x: Tensor) -> bool:
    """Return whether `linear_int8` multiplies the many rows of x: the CPU is fast at it, and nobody asks for torch."""
    return x.dtype in FLOAT_DTYPES and may_use_panels(x) and not unsupported("linear_int8", x, gradient=False)


def multiplies_in_bf16(x: Tensor, weight: Tensor) -> bool:
    """Return whether `linear_bf16` multiplies the many rows of x: it is faster than torch where there is no AMX."""
    return (
        x.dtype == weight.dtype == torch.bfloat16 == compute_dtype(torch.bfloat16)
        and x.numel() >= MANY_ROWS * x.shape[-1]
        and may_use_panels(x)
        and not has_tiles()
        and not unsupported("linear_bf16", x, gradient=False)
    )


class NativeLinear(nn.Linear):
    """A linear layer that multiplies few rows as fast as memory gives it the weight.

    More rows are multiplied in bfloat16 where the CPU has instructions for it, by torch where it is fast in their
    dtype, and panel by panel in float32 elsewhere.
    """

    def tensors(self) -> tuple[Tensor, None]:
        """Return the weight [out, in] and None: there is no scale."""
        return self._parameters["weight"], None

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        weight = self.weight
        if weight.dtype == input.dtype and weight.dtype in FLOAT_DTYPES and is_plain(weight):
            if self.bias is None and serves(input):
                return linear(input, weight)
            if multiplies_in_bf16(input, weight) and _is_like(self.bias, weight):
                return linear_bf16(input, weight, self.bias)
            if compute_dtype(weight.dtype) != weight.dtype and may_use_panels(input):
                return multiply_panels(input, len(weight), weight.__getitem__, bias=self.bias)
        return super().forward(input)  # torch refuses to multiply two dtypes


def _is_like(bias: Tensor | None, weight: Tensor) -> bool:
    """Return whether C can add the bias, if there is one: it reads it in the weight's dtype."""
    return bias is None or (is_plain(bias) and bias.dtype == weight.dtype)


class NativeConv2d(nn.Conv2d):
    """A convolution, such as of a picture's patches, in float32 where the CPU has no unit for the weight's dtype.

    torch's convolution in bfloat16 there is many times slower. The weight is widened for each picture: it is small.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[N, in, height, width] -> [N, out, height, width]."""
        weight, bias = self.weight, self.bias
        dtype = compute_dtype(weight.dtype)
        if dtype == weight.dtype or not (weight.dtype == input.dtype and may_use_panels(input)):
            return super().forward(input)
        bias = None if bias is None else bias.to(dtype)
        return self._conv_forward(input.to(dtype), weight.to(dtype), bias).to(input.dtype)


class RoundedLinear(nn.Linear):
    """A linear layer whose weight is stored in few bits.

    A few rows are multiplied as they are. Many rows, such as a prompt's, are rounded to 8 bits and multiplied in
    integers where the CPU is fast at that; `kernel_backend("torch")` multiplies them as they are.

    `state_dict()`, so `save_pretrained()` as well, holds the weight as packed.py describes it. A state dict with the
    weight in a float dtype is rounded when it is loaded. The weight has no gradient, so adapters can be trained on the
    layer, and the layer itself cannot.

    Args:
        linear: the layer whose weight [out, in] is rounded; it must have no bias.
    """

    weight: Tensor  # type: ignore[assignment]
    scale: Tensor
    kind: str
    """A name in `rounding.ROUNDINGS`."""

    def __init__(self, linear: nn.Linear):
        self._hold(rounded(linear.weight, self.kind))

    @classmethod
    def of(cls, weight: Rounded) -> RoundedLinear:
        """Return a layer of a weight that is rounded already."""
        layer = cls.__new__(cls)
        layer._hold(weight)
        return layer

    def _hold(self, weight: Rounded) -> None:
        rows, columns = weight.integers.shape
        self._hold_stored(self.as_stored(weight), (rows, columns), weight.scale.dtype)

    @classmethod
    def of_packed(cls, words: Tensor, scale: Tensor, columns: int) -> RoundedLinear:
        """Return a layer of a weight as a file holds it, words and scales of packed.py, with so many columns."""
        return cls.of(unpacked(words, scale, columns))

    def _hold_stored(
        self, stored_and_scale: tuple[Tensor, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.original_dtype = dtype
        # A view would keep what it is a view of in memory when its data moves to huge pages.
        stored, scale = (x if x._base is None else x.clone() for x in stored_and_scale)
        self.bias = None
        self.register_buffer("scale", scale)
        self.register_buffer("weight", stored)

    @staticmethod
    def as_stored(weight: Rounded) -> tuple[Tensor, Tensor]:
        """Return a weight and its scales as the native ops read them."""
        raise NotImplementedError

    def integers(self, rows: slice = slice(None)) -> Tensor:
        """Return some rows of the integers that the scales multiply, int8 [rows, in]."""
        raise NotImplementedError

    def multiplied(self, input: Tensor) -> Tensor:
        """Compute x W^T for many rows in torch, [..., in] -> [..., out]."""
        raise NotImplementedError

    def rounded(self) -> Rounded:
        """Return the weight as integers and scales. The scales have the weight's first dtype if it can hold them."""
        scale = self.scale.reshape(self.out_features, -1)
        narrow = scale.to(self.original_dtype)
        scale = narrow if torch.equal(narrow.to(scale.dtype), scale) else scale
        return Rounded(self.integers(), scale, ROUNDINGS[self.kind].bits)

    def widened(self, rows: slice = slice(None)) -> Tensor:
        """Return some rows of the weight in float32, [rows, in]."""
        scale = self.scale.reshape(self.out_features, -1)[rows]
        return Rounded(self.integers(rows), scale, ROUNDINGS[self.kind].bits).widened()

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return the stored weight and its scales."""
        return self._buffers["weight"], self._buffers["scale"]

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if serves(input):
            return linear(input, self.weight, self.scale)
        if multiplies_in_int8(input):
            return linear_int8(input, self.weight, self.scale)
        return self.multiplied(input)

    def _apply(self, fn: Any, recurse: bool = True) -> RoundedLinear:
        """Move the layer, but keep the dtype of its scales, which is part of the format."""
        before = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != before.dtype:
            self.original_dtype = self.scale.dtype
            self._buffers["scale"] = before.to(self.scale.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, value in packed_tensors(self.rounded()).items():
            destination[prefix + name] = value

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = [prefix + name for name in (PACKED, SCALE, SHAPE)]
        if f"{prefix}weight" in state_dict:
            given = rounded(state_dict[f"{prefix}weight"], self.kind)
        elif all(name in state_dict for name in names):
            given = unpacked(state_dict[names[0]], state_dict[names[1]], self.in_features)
        else:
            args[2].extend(name for name in names if name not in state_dict)  # missing keys
            return
        shapes = [tuple(x.shape) for x in given[:2]]
        if shapes != [tuple(x.shape) for x in self.rounded()[:2]]:
            args[4].append(
                f"The weight {prefix}weight has the shape {list(shapes[0])} and scales {list(shapes[1])}."
            )
            return
        for name, value in zip(("weight", "scale"), self.as_stored(given)):
            self._buffers[name].copy_(value)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Int8Linear(RoundedLinear):
    """A linear layer of int8 weights, one scale per output: W = diag(scale) Q, Q = round(W / scale) in -127 ... 127."""

    kind = "int8"

    @staticmethod
    def as_stored(weight: Rounded) -> tuple[Tensor, Tensor]:
        return weight.integers, weight.scale.float().flatten()  # [out, in], [out]

    def integers(self, rows: slice = slice(None)) -> Tensor:
        return self.weight[rows]

    def multiplied(self, input: Tensor) -> Tensor:
        # int8 is exact in bfloat16, so that only the scale is rounded.
        if may_use_panels(input):
            return multiply_panels(input, self.out_features, self.weight.__getitem__, self.scale)
        return F.linear(input, self.weight.to(input.dtype)) * self.scale.to(input.dtype)


class Int4Linear(RoundedLinear):
    """A linear layer of int4 weights in groups of 32 neighbours of a row, which share a scale in bfloat16.

    W = scale (Q - 8), with Q in 0 ... 15. The scale, which may be negative, makes Q = 0 of a group's largest weight.
    Two weights lie in a byte: registers.h says which. `in_features` must be a multiple of 32.
    """

    kind = "int4"
    group = ROUNDINGS["int4"].group

    @staticmethod
    def as_stored(weight: Rounded) -> tuple[Tensor, Tensor]:
        quotients = (weight.integers + 8).view(torch.uint8).unflatten(1, (-1, Int4Linear.group))
        lower, upper = (half.flatten(1) for half in quotients.split(Int4Linear.group // 2, 2))
        scale = Int4Linear._scales(weight.scale, quotients.shape[1])
        return lower | upper << 4, scale  # [out, in / 2], [out, in / 32]

    @staticmethod
    def _scales(scale: Tensor, groups: int) -> Tensor:
        """Return the scales of so many groups; a file may have larger ones."""
        return scale.to(torch.bfloat16).repeat_interleave(groups // scale.shape[1], 1)

    @classmethod
    def of_packed(cls, words: Tensor, scale: Tensor, columns: int) -> Int4Linear:
        """Return a layer of packed words, whose halves of bytes are put where C reads them without more memory.

        Byte j of a group of a file holds the weights 2 j and 2 j + 1, and byte i here holds i and i + 16.
        """
        packed = words.contiguous().view(torch.uint8).unflatten(1, (-1, cls.group // 2))
        first, second = packed.split(cls.group // 4, 2)
        even = (first & 15) | (second << 4)
        stored = torch.stack([even, (first >> 4) | (second & 0xF0)], 3).flatten(1)  # [out, in / 2]
        layer = cls.__new__(cls)
        layer._hold_stored(
            (stored, cls._scales(scale, columns // cls.group)), (len(words), columns), scale.dtype
        )
        return layer

    def integers(self, rows: slice = slice(None)) -> Tensor:
        stored = self.weight[rows].unflatten(1, (-1, self.group // 2))
        return torch.cat([stored & 15, stored >> 4], 2).flatten(1).view(torch.int8) - 8

    def multiplied(self, input: Tensor) -> Tensor:
        if may_use_panels(input):
            return multiply_panels(input, self.out_features, self.widened)
        return F.linear(input, self.widened().to(input.dtype))


ROUNDED_LINEARS = {"int8": Int8Linear, "int4": Int4Linear}
"""Names of stored weights that `accelerate_on_cpu` takes -> the layer that holds them."""

NATIVE_LINEARS = (NativeLinear, Int8Linear, Int4Linear)

# --- a model ----------------------------------------------------------------------------------------------


def accelerate_on_cpu(
    model: PreTrainedModel, int8: bool = False, weights: str | None = None, huge_pages: bool = True
) -> PreTrainedModel:
    """Let a model compute with native ops on a CPU: the language model's blocks and all linear layers.

    The linear layers of vision towers and projectors are among them: where the CPU has no unit for the weights' dtype,
    such as bfloat16 without AVX512-BF16 and AMX, they multiply in float32, which is several times faster, and keep
    their weights as they are stored.

    Only this model changes, in place. `kernel_backend("torch")` has it compute with plain torch again; the layers
    themselves are not changed back.

    Args:
        model: a `VisualRWKVForConditionalGeneration` or `VisualRWKVForCausalLM`.
        int8: the same as `weights="int8"`.
        weights: "int8" rounds the weights of the blocks' linear layers and of the head to int8, with a scale per row:
            8 bits a weight. "int4" rounds those of the blocks to int4 in groups of 32, 4.5 bits a weight, and the head
            to int8. None rounds nothing. Rounded models are not for training. The embedding, the low-rank maps, the
            vision tower and the projector keep their weights.
        huge_pages: whether to move the weights of the blocks and of the head to pages of 2 MB, if the system has them.
            A token then takes some 10 % less time, but each weight is copied first: a short answer ends later. If
            False, the vision tower's pages leave the memory after each picture, and the next picture maps them again.

    Returns:
        The model. Where native ops cannot be built, such as without a C compiler, a `RuntimeWarning` says why and the
        model computes with plain torch.

    Raises:
        ValueError: if the model has no RWKV block, or there is no such kind of weights.
    """
    weights = "int8" if int8 else weights
    if weights not in (None, *ROUNDED_LINEARS):
        raise ValueError(f"weights must be None, {' or '.join(ROUNDED_LINEARS)}, got {weights!r}.")
    blocks = [module for module in model.modules() if isinstance(module, RwkvBlock)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no RWKV block to accelerate.")
    if reason := unusable():
        warnings.warn(f"The model computes with plain torch. {reason}", RuntimeWarning, stacklevel=2)
    for block in blocks:
        block.accelerated = not reason
    round_linears(model, weights)
    replace_linears(model, lambda name, child: native_linear(child))
    replace_convolutions(model)
    for module in model.modules():
        if isinstance(module, VisualRWKVVisionModel):
            use_native_attention(module)
            if not huge_pages:
                unmap_after_use(module)
    if huge_pages:
        head = model.get_output_embeddings()
        move_to_huge_pages(nn.ModuleList([*blocks, *([] if head is None else [head])]))
    return model


def round_linears(model: PreTrainedModel, weights: str | None) -> None:
    """Give the linear layers whose weights are packed, or are to be rounded, their weights of few bits, in place.

    One weight at a time is in memory twice: pages of a mapped file leave it as soon as they are read.

    Args:
        model: see `accelerate_on_cpu`.
        weights: a name in `ROUNDED_LINEARS`; None only unpacks what is packed.

    Raises:
        ValueError: if a weight or a scale is NaN or infinite.
    """
    _forget_packing(model)
    files = mapped_files()

    def replacement(name: str, child: Any) -> nn.Module:
        try:
            if is_packed(child):
                layer = unpacked_linear(child, files)
                give_back()  # its integers in int8, which were made on the way
                return layer
            kind = rounding_of(name.removesuffix(".base_layer"), child.in_features, weights)
            if kind is None or child.bias is not None or not may_replace(child) or has_any_hook(child):
                return child
            layer = ROUNDED_LINEARS[kind](child)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        unmap(child.weight, files)
        give_back()
        return layer

    replace_linears(model, replacement)
    note_quantization(model)


def replace_linears(model: nn.Module, replacement: Callable[[str, Any], nn.Module]) -> None:
    """Put `replacement(name, layer)` in the place of each linear layer that is dense or packed, one after the other."""
    for path, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear or is_packed(child):
                new = replacement(f"{path}.{name}" if path else name, child)
                if new is not child:
                    setattr(parent, name, new)


def replace_convolutions(model: nn.Module) -> None:
    """Let the convolutions of a model, and no class derived from them, compute in a dtype with units in the CPU."""
    modules: list[Any] = [*model.modules()]
    for module in modules:
        if type(module) is nn.Conv2d and is_plain(module.weight) and "forward" not in module.__dict__:
            module.__class__ = NativeConv2d  # the same layer, with its weights and hooks


def may_replace(linear: Any) -> bool:
    """Return whether nothing but its class says what a layer computes, and native ops can read its weight."""
    is_watched = linear._forward_hooks or linear._forward_pre_hooks or "forward" in linear.__dict__
    return is_plain(linear.weight) and not is_watched


def has_any_hook(layer: nn.Module) -> bool:
    """Return whether a layer has hooks, which another layer in its place would not have."""
    return any(held for name, held in layer.__dict__.items() if name.endswith("_hooks"))


def native_linear(linear: nn.Linear) -> nn.Module:
    """Let the layer compute with native ops unless it has hooks or they cannot read its weight, and return it."""
    if not may_replace(linear):
        return linear
    linear.__class__ = NativeLinear  # the same layer, with its weights and hooks
    return linear


# --- layers as files hold them ----------------------------------------------------------------------------


class PackedLinear(nn.Module):
    """A linear layer as a file holds it, between loading and `unpacked_linear`. It computes nothing.

    Args:
        linear: the layer of the model whose place it takes.
        shapes: those of its tensors; see packed.py.
        dtype: of the scales.
    """

    def __init__(self, linear: nn.Linear, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        for name, shape in shapes.items():
            kind = INTEGER_DTYPES.get(name, dtype)
            empty = torch.empty(shape, dtype=kind, device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))


def is_packed(layer: nn.Module) -> bool:
    """Return whether a layer's weight is what packed.py describes: in a `PackedLinear` or compressed-tensors' layer."""
    return isinstance(getattr(layer, PACKED, None), Tensor)


def unpacked_linear(layer: Any, files: Sequence[tuple[int, int]] = ()) -> nn.Module:
    """Return the layer of few bits whose tensors are packed, or a dense one where there is a bias.

    Args:
        layer: a layer for which `is_packed` is true.
        files: address ranges of mapped files, see `mapped_files`, whose pages leave the memory when they are read.

    Raises:
        ValueError: if `weight_shape` is not the layer's, or a scale is not finite.
    """
    words, scale, shape = (getattr(layer, name).detach() for name in (PACKED, SCALE, SHAPE))
    rows, columns = layer.out_features, layer.in_features
    if shape.tolist() != [rows, columns]:
        raise ValueError(f"A weight of {rows} x {columns} is stored with the shape {shape.tolist()}.")
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(f"The scales of a weight of {rows} x {columns} are NaN or infinite.")
    if layer.bias is not None:
        return dense_linear(unpacked(words, scale, columns), layer.bias)
    bits = words.shape[1] * WORD_BITS // columns
    kind = next(name for name, row in ROUNDINGS.items() if row.bits == bits)
    native = ROUNDED_LINEARS[kind].of_packed(words, scale, columns)
    for x in (words, scale):  # the layer holds copies
        unmap(x, files)
    return native


def dense_linear(weight: Rounded, bias: nn.Parameter | None = None) -> nn.Linear:
    """Return a layer of the same weight in the dtype of its scales, for whoever does not read few bits."""
    rows, columns = weight.integers.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.widened().to(weight.scale.dtype))
    linear.bias = bias
    return linear


def dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """Give all layers of few bits their weights in the model's dtype, in place, and return the model.

    The weights are those that the integers and scales stand for: what rounding has lost does not come back.
    """
    _forget_packing(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if is_packed(child):
                child = unpacked_linear(child)
                setattr(parent, name, child)
            if isinstance(child, RoundedLinear):
                setattr(parent, name, dense_linear(child.rounded()))
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def note_quantization(model: PreTrainedModel) -> None:
    """Say in the model's configuration which layers are of few bits, for `save_pretrained`."""
    layers = {name: x.kind for name, x in model.named_modules() if isinstance(x, RoundedLinear)}
    layers = {name.removesuffix(".base_layer"): kind for name, kind in layers.items()}
    others = [name for name, x in model.named_modules() if isinstance(x, nn.Linear) and name not in layers]
    if layers:
        model.config.quantization_config = quantization_config(layers, others)
        if any(name.split(".")[-1] == "lm_head" for name in layers):  # no longer the embedding's weight
            model.config.tie_word_embeddings = False


def _forget_packing(model: PreTrainedModel) -> None:
    """Take back what transformers' quantizer of compressed-tensors left on a model, whose layers become ours."""
    if not any(map(is_packed, model.modules())):
        return
    for module in model.modules():
        forget_decompression(module)
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)


__all__ = ["Int4Linear", "Int8Linear", "NativeLinear", "accelerate_on_cpu", "dequantize"]
