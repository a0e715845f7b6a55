"""The layers that let a model compute with native ops on a CPU.

from visualrwkv_hf import accelerate_on_cpu

model = accelerate_on_cpu(model)             # or accelerate_on_cpu(model, int8=True)
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import PreTrainedModel

from ..dispatch import chosen_backend
from ..modeling_rwkv import RwkvBlock
from .formats import FLOAT_DTYPES
from .memory import is_plain, mapped_files, move_to_huge_pages, unmap
from .ops import MAX_ROWS, linear, linear_int8, unsupported, unusable
from .products import compute_dtype, may_use_panels, multiply_panels

# --- linear layers ----------------------------------------------------------------------------------------


def serves(x: Tensor) -> bool:
    """Return whether the native `linear` multiplies x: it has few rows, and no other backend was asked for."""
    return (
        chosen_backend() in ("auto", "native")
        and x.numel() <= MAX_ROWS * x.shape[-1]
        and not unsupported("linear", x, gradient=torch.is_grad_enabled())
    )


def multiplies_in_int8(x: Tensor) -> bool:
    """Return whether `linear_int8` multiplies the many rows of x: the CPU is fast at it, and nobody asks for torch."""
    return x.dtype in FLOAT_DTYPES and may_use_panels(x) and not unsupported("linear_int8", x, gradient=False)


class NativeLinear(nn.Linear):
    """A linear layer that multiplies few rows as fast as memory gives it the weight.

    More rows are torch's where the CPU multiplies the weight's dtype fast, and go panel by panel in float32 elsewhere.
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
            if compute_dtype(weight.dtype) != weight.dtype and may_use_panels(input):
                return multiply_panels(input, len(weight), weight.__getitem__, bias=self.bias)
        return super().forward(input)  # torch refuses to multiply two dtypes


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


class RoundedLinear(nn.Module):
    """A linear layer whose weight is stored in few bits.

    A few rows are multiplied as they are. Many rows, such as a prompt's, are rounded to 8 bits and multiplied in
    integers where the CPU is fast at that; `kernel_backend("torch")` multiplies them as they are.

    `state_dict()`, so `save_pretrained()` as well, holds the rounded weight in the dtype of the original one, which any
    linear layer loads; loading such a state dict rounds again.

    Args:
        linear: the layer whose weight [out, in] is rounded; it must have no bias.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.original_dtype = linear.weight.dtype
        weight, scale = self.rounded(linear.weight.detach().float())
        self.register_buffer("scale", scale)
        self.register_buffer("weight", weight)

    @staticmethod
    def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the stored weight and its scales, from a weight [out, in] in float32."""
        raise NotImplementedError

    def multiplied(self, input: Tensor) -> Tensor:
        """Compute x W^T for many rows in torch, [..., in] -> [..., out]."""
        raise NotImplementedError

    def widened(self, rows: slice = slice(None)) -> Tensor:
        """Return some rows of the weight in float32, [rows, in]."""
        raise NotImplementedError

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

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.widened().to(self.original_dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = f"{prefix}weight"
        if key not in state_dict:
            args[2].append(key)  # missing keys
            return
        for name, value in zip(("weight", "scale"), self.rounded(state_dict[key].float())):
            self._buffers[name].copy_(value)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Int8Linear(RoundedLinear):
    """A linear layer of int8 weights, one scale per output: W = diag(scale) Q, Q = round(W / scale) in -127 ... 127."""

    @staticmethod
    def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127  # [out]
        return (weight / scale[:, None]).round().to(torch.int8), scale

    def widened(self, rows: slice = slice(None)) -> Tensor:
        return self.weight[rows].float() * self.scale[rows, None].float()

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

    group = 32

    @classmethod
    def can_store(cls, linear: nn.Linear) -> bool:
        """Return whether groups fill the rows of a layer's weight."""
        return linear.in_features % cls.group == 0

    @staticmethod
    def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
        groups = weight.unflatten(1, (-1, Int4Linear.group))  # [out, in / 32, 32]
        largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
        scale = (largest / -8).to(torch.bfloat16)  # [out, in / 32, 1]
        divisor = torch.where(scale == 0, 1, scale).float()
        quotients = (groups / divisor + 8).round().clamp(0, 15).to(torch.uint8)
        lower, upper = quotients.split(Int4Linear.group // 2, 2)
        return (lower | upper << 4).flatten(1), scale.squeeze(2)

    def widened(self, rows: slice = slice(None)) -> Tensor:
        stored = self.weight[rows].unflatten(1, (-1, self.group // 2))
        quotients = torch.cat([stored & 15, stored >> 4], 2).float()
        return ((quotients - 8) * self.scale[rows, :, None].float()).flatten(1)

    def multiplied(self, input: Tensor) -> Tensor:
        if may_use_panels(input):
            return multiply_panels(input, self.out_features, self.widened)
        return F.linear(input, self.widened().to(input.dtype))


ROUNDED_LINEARS = {"int8": Int8Linear, "int4": Int4Linear}
"""Names of stored weights that `accelerate_on_cpu` takes -> the layer that holds them."""

NATIVE_LINEARS = (NativeLinear, Int8Linear, Int4Linear)

# --- a model ----------------------------------------------------------------------------------------------


def accelerate_on_cpu(
    model: PreTrainedModel, int8: bool = False, weights: str | None = None
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
        _accelerate_layers(block, weights)
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        head = accelerated_linear(head, weights and "int8")
        model.set_output_embeddings(head)
    _accelerate_layers(model, None)  # of the towers and the projector
    move_to_huge_pages(nn.ModuleList([*blocks, *([] if head is None else [head])]))
    return model


def _accelerate_layers(module: nn.Module, weights: str | None) -> None:
    """Replace all layers in a module that are nn.Linear or nn.Conv2d, and no class derived from them."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, accelerated_linear(child, weights))
            elif type(child) is nn.Conv2d and is_plain(child.weight) and "forward" not in child.__dict__:
                child.__class__ = NativeConv2d  # the same layer, with its weights and hooks


def accelerated_linear(linear: nn.Linear, weights: str | None) -> nn.Module:
    """Return the layer with native ops, or the same layer where it has hooks or they cannot read its weight."""
    is_watched = linear._forward_hooks or linear._forward_pre_hooks or "forward" in linear.__dict__
    if not is_plain(linear.weight) or is_watched:
        return linear
    if weights and linear.bias is None:
        is_int4 = weights == "int4" and Int4Linear.can_store(linear)
        rounded = (Int4Linear if is_int4 else Int8Linear)(linear)
        unmap(linear.weight, mapped_files())
        return rounded
    native = NativeLinear(linear.in_features, linear.out_features, bias=False, device="meta")
    native.weight, native.bias = linear.weight, linear.bias
    return native.train(linear.training)


__all__ = ["Int4Linear", "Int8Linear", "NativeLinear", "accelerate_on_cpu"]
