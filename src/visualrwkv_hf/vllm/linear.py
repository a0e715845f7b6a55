"""Linear layers in vLLM's engine on a CPU: its matrix products, from weights that are packed once.

Letters: I inputs, O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn
from transformers import PreTrainedModel
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from ..cpu.layers import NativeLinear, accelerate_on_cpu
from ..cpu.ops import unusable
from ..modeling_rwkv import RwkvBlock


class PackedLinear(nn.Module):
    """A linear layer whose weight is kept only as vLLM's op for a CPU has packed it.

    For the few dozen rows of a step that is two to three times as fast as torch's product.

    Args:
        linear: the layer whose place it takes, with a weight [O, I] on a CPU. It loses its weight.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.cpu_linear: Callable[..., Tensor]
        dispatch_cpu_unquantized_gemm(self, remove_weight=True)  # sets cpu_linear
        linear.weight = self.weight

    def forward(self, x: Tensor) -> Tensor:
        """Compute x W^T + b, [..., I] -> [..., O]."""
        return self.cpu_linear(x, self.weight, self.bias)


def use_fast_ops_of_cpu(model: PreTrainedModel, whole_blocks: bool = True) -> None:
    """Have a model compute with native ops on a CPU, in place: its blocks with ours, other linear layers with vLLM's.

    Blocks read one token of each request in one call of C, and need their weights as they are. Where these ops cannot
    be built, or a block is not whole, the linear layers of the blocks are vLLM's as well.

    Args:
        model: on a CPU, with its weights.
        whole_blocks: whether this process computes all heads of a block.
    """
    blocks = {
        module for block in model.modules() if isinstance(block, RwkvBlock) for module in block.modules()
    }
    _pack(module for module in list(model.modules()) if module not in blocks)
    if whole_blocks:
        accelerate_on_cpu(model)
    if not whole_blocks or unusable():
        _pack(blocks)


def _pack(parents: Iterable[nn.Module]) -> None:
    """Replace the linear layers directly below these modules, but for layers with ops of their own."""
    for parent in parents:
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and type(child) in (nn.Linear, NativeLinear):
                setattr(parent, name, PackedLinear(child))
