"""Tensor parallelism: each device computes a part of the heads of every block, and of the channels of its channel mix.

The heads of a layer do not see each other until `output` adds them up, nor do the inner channels of a channel mix until
`value` does: these two layers compute part of a sum, which all devices then add. Each device has the token shifts, the
norms, the embeddings, the head and the vision tower as a whole.

Letters: P devices, A width of the time mix, H heads, F width of the channel mix.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_reduce

from ..configuration_visualrwkv import VisualRWKVTextConfig

TIME_MIX = {
    "receptance.weight": 0,  # [A, C]
    "key.weight": 0,
    "value.weight": 0,
    "gate.weight": 0,
    "output.weight": 1,  # [C, A]
    "ln_x.weight": 0,
    "ln_x.bias": 0,
    "time_faaaa": 0,  # [H, K]
    "time_decay": -1,  # [1, 1, A]; in RWKV-5 [H, K], see below
    "time_decay_w2": 1,  # [D, A]
    "r_k": 0,
    **dict.fromkeys(("w2", "a2", "v2", "g2"), 1),
    **dict.fromkeys(("w0", "a0", "v0", "k_k", "k_a"), 2),  # [1, 1, A]
}
"""A parameter of a time mix -> the dimension in which it is divided; all others are whole on every device."""
CHANNEL_MIX = {"key.weight": 0, "value.weight": 1}
"""Likewise of a channel mix: [F, C] and [C, F]."""


def refuse_uneven_parts(config: VisualRWKVTextConfig, parts: int) -> None:
    """Raise `ValueError` if a model cannot be divided among so many devices."""
    for name in ("num_attention_heads", "intermediate_size"):
        if (size := getattr(config, name)) % parts:
            raise ValueError(
                f"tensor_parallel_size={parts}: a model is divided by heads, and {name} ({size}) is no multiple of it."
            )


def keep_part(blocks: nn.ModuleList, part: int, parts: int) -> None:
    """Keep of the weights of each block, in place, what one of P devices computes with.

    Args:
        blocks: the blocks of a language model, with all their weights.
        part: the device, 0 to P - 1.
        parts: P.
    """
    block: Any
    for block in blocks:
        for module, dimensions in ((block.att, TIME_MIX), (block.ffn, CHANNEL_MIX)):
            for name, weight in module.named_parameters():
                if name in dimensions:
                    dimension = 0 if name == "time_decay" and weight.dim() == 2 else dimensions[name]
                    weight.data = weight.data.chunk(parts, dimension)[part].clone()
        block.att.ln_x.num_groups //= parts
        block.att.ln_x.num_channels //= parts
        for linear in block.modules():
            if isinstance(linear, nn.Linear):
                linear.out_features, linear.in_features = linear.weight.shape


class SummedLinear(nn.Module):
    """A linear layer that knows part of the inputs: its outputs are added up over all devices."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """Compute the sum of x W^T over the parts, [..., A / P] or [..., F / P] -> [..., C]."""
        return tensor_model_parallel_all_reduce(self.linear(x))


def add_up_parts(blocks: nn.ModuleList) -> None:
    """Have the two layers of each block that compute part of a sum add it up, in place."""
    block: Any
    for block in blocks:
        block.att.output = SummedLinear(block.att.output)
        block.ffn.value = SummedLinear(block.ffn.value)
