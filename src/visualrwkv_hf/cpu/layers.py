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
from .ops import MAX_ROWS, linear, unsupported, unusable
from .products import compute_dtype, may_use_panels, multiply_panels

# --- linear layers ----------------------------------------------------------------------------------------


def serves(x: Tensor) -> bool:
    """Return whether the native `linear` multiplies x: it has few rows, and no other backend was asked for."""
    return (
        chosen_backend() in ("auto", "native")
        and x.numel() <= MAX_ROWS * x.shape[-1]
        and not unsupported("linear", x, gradient=torch.is_grad_enabled())
    )


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
                return multiply_panels(input, weight, bias=self.bias)
        return super().forward(input)  # torch refuses to multiply two dtypes


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
        if may_use_panels(input):
            return multiply_panels(input, self.weight, self.scale)
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
    """Let a model compute with native ops on a CPU: the language model's blocks and all linear layers.

    The linear layers of vision towers and projectors are among them: where the CPU has no unit for the weights' dtype,
    such as bfloat16 without AVX512-BF16 and AMX, they multiply in float32, which is several times faster, and keep
    their weights as they are stored.

    Only this model changes, in place. `kernel_backend("torch")` has it compute with plain torch again; the layers
    themselves are not changed back.

    Args:
        model: a `VisualRWKVForConditionalGeneration` or `VisualRWKVForCausalLM`.
        int8: whether to round the weights of the blocks' linear layers and of the head to int8, which takes a quarter
            of float32's bytes and is not for training. The embedding, the low-rank maps, the vision tower and the
            projector keep their weights.

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
        _accelerate_linears(block, int8)
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        head = accelerated_linear(head, int8)
        model.set_output_embeddings(head)
    _accelerate_linears(model, int8=False)  # of the towers and the projector
    move_to_huge_pages(nn.ModuleList([*blocks, *([] if head is None else [head])]))
    return model


def _accelerate_linears(module: nn.Module, int8: bool) -> None:
    """Replace all layers in a module that are nn.Linear, and no class derived from it."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, accelerated_linear(child, int8))


def accelerated_linear(linear: nn.Linear, int8: bool) -> nn.Module:
    """Return the layer with native ops, or the same layer where it has hooks or they cannot read its weight."""
    is_watched = linear._forward_hooks or linear._forward_pre_hooks or "forward" in linear.__dict__
    if not is_plain(linear.weight) or is_watched:
        return linear
    if int8 and linear.bias is None:
        rounded = Int8Linear(linear)
        unmap(linear.weight, mapped_files())
        return rounded
    native = NativeLinear(linear.in_features, linear.out_features, bias=False, device="meta")
    native.weight, native.bias = linear.weight, linear.bias
    return native.train(linear.training)


__all__ = ["Int8Linear", "NativeLinear", "accelerate_on_cpu"]
