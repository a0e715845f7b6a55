"""The layers that let a model compute with native ops on a CPU.

from visualrwkv_hf import accelerate_on_cpu

model = accelerate_on_cpu(model)             # or accelerate_on_cpu(model, int8=True)
"""

from __future__ import annotations

import mmap
import warnings
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import PreTrainedModel

from ..dispatch import chosen_backend
from ..modeling_rwkv import RwkvBlock
from .formats import FLOAT_DTYPES
from .ops import MAX_ROWS, linear, unsupported, unusable

CACHE_LINE = 64
"""Bytes."""

# --- linear layers ----------------------------------------------------------------------------------------


def is_plain(weight: Tensor) -> bool:
    """Return whether a weight is in this process's memory as C reads it: not quantised, on a disk or elsewhere."""
    return type(weight) in (nn.Parameter, Tensor) and weight.is_cpu and weight.is_contiguous()


def serves(x: Tensor) -> bool:
    """Return whether the native `linear` multiplies x: it has few rows, and no other backend was asked for."""
    return (
        chosen_backend() in ("auto", "native")
        and x.numel() <= MAX_ROWS * x.shape[-1]
        and not unsupported("linear", x, gradient=torch.is_grad_enabled())
    )


class NativeLinear(nn.Linear):
    """A linear layer that multiplies few rows as fast as memory gives it the weight. More rows are torch's."""

    def tensors(self) -> tuple[Tensor, None]:
        """Return the weight [out, in] and None: there is no scale."""
        return self._parameters["weight"], None

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        weight = self.weight
        is_float = weight.dtype == input.dtype and weight.dtype in FLOAT_DTYPES  # torch refuses a mixture
        if is_float and self.bias is None and serves(input) and is_plain(weight):
            return linear(input, weight)
        return super().forward(input)


class Int8Linear(nn.Module):
    """A linear layer of int8 weights, one scale per output: W = diag(scale) Q, Q = round(W / scale) in -127 ... 127.

    Only the weight is rounded, not the products. `state_dict()`, so `save_pretrained()` as well, holds the rounded
    weight in the dtype of the original one, which any linear layer loads; loading such a state dict rounds again.

    Args:
        linear: the layer whose weight [out, in] is rounded; it must have no bias.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.original_dtype = linear.weight.dtype
        weight, scale = _rounded(linear.weight.detach())
        self.register_buffer("scale", scale)
        self.register_buffer("weight", weight)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return weight [out, in] and scale [out]."""
        return self._buffers["weight"], self._buffers["scale"]

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if serves(input):
            return linear(input, self.weight, self.scale)
        # int8 is exact in bfloat16, so that only the scale is rounded.
        return F.linear(input, self.weight.to(input.dtype)) * self.scale.to(input.dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        weight = self.weight.float() * self.scale.float()[:, None]
        destination[f"{prefix}weight"] = weight.to(self.original_dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = f"{prefix}weight"
        if key not in state_dict:
            args[2].append(key)  # missing keys
            return
        weight, scale = _rounded(state_dict[key])
        self.weight.copy_(weight)
        self.scale.copy_(scale)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 [out, in] and float32 scales [out] whose product is nearest to `weight`."""
    weight = weight.float()
    scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127  # [out]
    return (weight / scale[:, None]).round().to(torch.int8), scale


NATIVE_LINEARS = (NativeLinear, Int8Linear)

# --- a model ----------------------------------------------------------------------------------------------


def accelerate_on_cpu(model: PreTrainedModel, int8: bool = False) -> PreTrainedModel:
    """Let a model compute with native ops on a CPU: the language model's blocks and the head.

    Only this model changes, in place. `kernel_backend("torch")` has it compute with plain torch again; the layers
    themselves are not changed back.

    Args:
        model: a `VisualRWKVForConditionalGeneration` or `VisualRWKVForCausalLM`.
        int8: whether to round the weights of the linear layers to int8, which takes a quarter of float32's bytes and
            is not for training. The embedding, the low-rank maps and the vision tower keep their weights.

    Returns:
        The model. Where native ops cannot be built, such as without a C compiler, a `RuntimeWarning` says why and the
        model computes with plain torch.

    Raises:
        ValueError: if the model has no RWKV block.
    """
    blocks = [module for module in model.modules() if isinstance(module, RwkvBlock)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no RWKV block to accelerate.")
    if reason := unusable():
        warnings.warn(f"The model computes with plain torch. {reason}", RuntimeWarning, stacklevel=2)
    for block in blocks:
        block.accelerated = not reason
        for part in (block.att, block.ffn):
            for name, module in part.named_children():
                if type(module) is nn.Linear:
                    setattr(part, name, accelerated_linear(module, int8))
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        head = accelerated_linear(head, int8)
        model.set_output_embeddings(head)
    move_to_huge_pages(nn.ModuleList([*blocks, *([] if head is None else [head])]))
    return model


def accelerated_linear(linear: nn.Linear, int8: bool) -> nn.Module:
    """Return the layer with native ops, or the same layer where they cannot read its weight."""
    if linear.bias is not None or not is_plain(linear.weight):
        return linear
    if int8:
        return Int8Linear(linear)
    native = NativeLinear(linear.in_features, linear.out_features, bias=False, device="meta")
    native.weight = linear.weight
    return native.train(linear.training)


def move_to_huge_pages(module: nn.Module) -> None:
    """Move the weights of a module on the CPU to pages of 2 MB, which are read faster, if the system has them.

    The parameters and buffers stay the same objects.
    """
    weights = [x for x in (*module.parameters(), *module.buffers()) if is_plain(x) and x.numel()]
    room = [-(-x.nbytes // CACHE_LINE) * CACHE_LINE for x in weights]
    if not weights or not hasattr(mmap, "MADV_HUGEPAGE"):  # only Linux has it
        return
    pages = mmap.mmap(-1, sum(room), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return
    for weight, offset in zip(weights, accumulate(room, initial=0)):
        moved = torch.frombuffer(pages, dtype=weight.dtype, count=weight.numel(), offset=offset)
        weight.data = moved.view(weight.shape).copy_(weight.data)


__all__ = ["Int8Linear", "NativeLinear", "accelerate_on_cpu"]
