"""Loading with weights of few bits: from files that hold them, or rounded while a dense checkpoint is read.

transformers calls a quantizer before it reads a checkpoint and when it has read it. Ours puts a `PackedLinear` where
the files hold packed weights, and at the end hands the model to `accelerate_on_cpu` or `dequantize`. By then nobody has
read the weights, which are pages of the mapped files: one weight at a time is in memory twice. It needs no library.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..modeling_base import refuse_non_finite
from .layers import PackedLinear, RoundedLinear, accelerate_on_cpu, dequantize, round_linears
from .memory import cast, mapped_files, unmap
from .packed import INTEGER_DTYPES, PACKED, SCALE, SHAPE, packed_layers, refuse_strange_layer

METHOD = "visualrwkv-while-loading"


class StoredTensor(NamedTuple):
    """The dtype and shape of a tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class WhileLoading(QuantizationConfigMixin):
    """The argument `quantization_config` of `from_pretrained` that loads without a second copy.

    Args:
        native: whether native ops will compute: see `accelerate_on_cpu`. Without them all weights become dense.
        weights: "int8" or "int4" rounds the weights for native ops; None keeps them as they are stored.
        tensors: what the checkpoint's files hold, by name.
        where: names the files in an error.
        huge_pages: whether native ops read the weights from pages of 2 MB: see `accelerate_on_cpu`.
    """

    def __init__(
        self,
        native: bool,
        weights: str | None,
        tensors: Mapping[str, StoredTensor],
        where: object,
        huge_pages: bool = True,
    ):
        self.quant_method = METHOD  # type: ignore[assignment]
        self.native, self.weights, self.tensors, self.where = native, weights, tensors, where
        self.huge_pages = huge_pages


@register_quantizer(METHOD)
class WhileLoadingQuantizer(HfQuantizer):
    """See the module."""

    quantization_config: WhileLoading  # type: ignore[assignment]
    dtype: torch.dtype | None = None

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Remember which dtype was asked for: the tensors are brought to it when they have been read."""
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        tensors, where = self.quantization_config.tensors, self.quantization_config.where
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        linears = {name: x for name, x in model.named_modules() if type(x) is nn.Linear}
        for layer in packed_layers(tensors):
            if layer not in linears:
                raise ValueError(f"{where} has {layer}.{PACKED}, but the model has no such linear layer.")
            linear = linears[layer]
            refuse_strange_layer(layer, shapes, linear.out_features, linear.in_features, where)
            _refuse_strange_dtypes(layer, tensors, where)
            own = {name: shapes[f"{layer}.{name}"] for name in (PACKED, SCALE, SHAPE)}
            model.set_submodule(layer, PackedLinear(linear, own, tensors[f"{layer}.{SCALE}"].dtype))
        for name, weight in model.named_parameters():
            if name in tensors and tensors[name].dtype.is_floating_point and weight.is_floating_point():
                weight.data = weight.data.to(tensors[name].dtype)  # so that it is read without a copy

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        self.remove_quantization_config(model)
        refuse_non_finite_pages(model, config.where)
        if config.native:
            round_linears(model, config.weights)
        else:
            dequantize(model)
        if self.dtype is not None:
            cast_all(model, self.dtype)
        if config.native:
            accelerate_on_cpu(model, huge_pages=config.huge_pages)

    def is_serializable(self) -> bool:
        """Return whether the model can be saved: it can, and this quantizer has left it by then."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the weights of few bits can be trained."""
        return False


def refuse_non_finite_pages(model: Any, where: object) -> None:
    """Check weights as `from_pretrained` does, which then does not, and let each leave the memory again.

    An answer may never read some of them, such as most rows of the embedding.

    Raises:
        ValueError: some are NaN or infinite.
    """
    files = mapped_files()
    refuse_non_finite(model, where, done=lambda weight: unmap(weight, files))
    model.is_checked = True


def cast_all(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Bring a model to a dtype in place. Scales of weights of few bits keep theirs, which is part of the format."""
    cast(model, dtype, without=RoundedLinear)
    for module in model.modules():
        if isinstance(module, RoundedLinear):
            module.original_dtype = dtype
    model.config.dtype = dtype


def _refuse_strange_dtypes(layer: str, tensors: Mapping[str, StoredTensor], where: object) -> None:
    floats = (torch.float32, torch.bfloat16, torch.float16)
    for name in (PACKED, SCALE, SHAPE):
        wanted = floats if name == SCALE else (INTEGER_DTYPES[name],)
        found = tensors[f"{layer}.{name}"].dtype
        if found not in wanted:
            raise ValueError(
                f"{layer}.{name} in {where} has the dtype {found}, {' or '.join(map(str, wanted))} can be read."
            )


__all__ = ["WhileLoading"]
