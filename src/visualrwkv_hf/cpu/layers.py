"""A model's layers on a CPU, with the ops of native.py: int8 weights, products for few rows, a token's whole layer.

    from visualrwkv_hf import accelerate_on_cpu

    model = accelerate_on_cpu(model)             # or accelerate_on_cpu(model, int8=True)

Letters: B batch, T time, H heads, K size of a head, A = H K, C hidden size.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import PreTrainedModel

from ..cache_visualrwkv import CHANNEL_MIX_SHIFT, TIME_MIX_SHIFT, VisualRWKVCacheLayer
from ..dispatch import chosen_backend
from ..modeling_rwkv import CHANNEL_MIX, DECAY_SCALE, TIME_MIX, RwkvBlock
from ..token_order import Reading
from .ops import MAX_ROWS, build_native_ops, call, linear, pointers, unsupported

DTYPES = (torch.float32, torch.bfloat16)
"""Of models that have native ops."""

ROWS_AT_ONCE = 4
"""Of a low-rank map in ops.c."""

CACHE_LINE = 64
"""Bytes."""

# --- linear layers ----------------------------------------------------------------------------------------


def is_plain(weight: Tensor) -> bool:
    """Whether a weight lies in memory as ops.c reads it: not quantised, on a disk or on another device."""
    return type(weight) in (nn.Parameter, Tensor) and weight.is_cpu and weight.is_contiguous()


def _serves(x: Tensor) -> bool:
    """Whether `linear` computes x W^T: it has few rows."""
    return (
        chosen_backend() in ("auto", "native")
        and x.numel() <= MAX_ROWS * x.shape[-1]
        and not unsupported("linear", x, gradient=torch.is_grad_enabled())
    )


class NativeLinear(nn.Linear):
    """A linear layer that reads its weight as fast as memory gives it, if it has few rows to multiply."""

    def tensors(self) -> tuple[Tensor, None]:
        """As those of an `Int8Linear`."""
        return self._parameters["weight"], None

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if self.bias is None and _serves(input) and is_plain(weight) and weight.dtype in DTYPES:
            return linear(input, weight)
        return super().forward(input)


class Int8Linear(nn.Module):
    """A linear layer of int8 weights, one scale per output: W = diag(scale) Q, Q = round(W / scale) in -127 ... 127.

    The products are not rounded: only the weight is.

    Args:
        linear: the layer whose weight [out, in] is rounded; it must have no bias.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127  # [out]
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Weight [out, in] and scale [out]."""
        return self._buffers["weight"], self._buffers["scale"]

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if _serves(input):
            return linear(input, self.weight, self.scale)
        # int8 is exact in bfloat16, so that only the scale is rounded.
        return F.linear(input, self.weight.to(input.dtype)) * self.scale.to(input.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


# --- a token's whole layer --------------------------------------------------------------------------------

_VECTORS = (
    # in ops.c  RWKV-5         RWKV-6        RWKV-7
    ("SHIFT_X", "", "time_maa_x", ""),
    ("SHIFT + TO_R", "time_mix_r", "time_maa_r", "x_r"),
    ("SHIFT + TO_K", "time_mix_k", "time_maa_k", "x_k"),
    ("SHIFT + TO_V", "time_mix_v", "time_maa_v", "x_v"),
    ("SHIFT + TO_G", "time_mix_g", "time_maa_g", "x_g"),
    ("SHIFT + TO_W", "", "time_maa_w", "x_w"),
    ("SHIFT + TO_A", "", "", "x_a"),
    ("W0", "time_decay", "time_decay", "w0"),
    ("A0", "", "", "a0"),
    ("V0", "", "", "v0"),
    ("K_K", "", "", "k_k"),
    ("K_A", "", "", "k_a"),
    ("R_K", "", "", "r_k"),
    ("U", "time_faaaa", "time_faaaa", ""),
)
_LOW_RANK = (
    ("LOW_SHIFT", "", "time_maa_w", ""),
    ("LOW_W", "", "time_decay_w", "w"),
    ("LOW_A", "", "", "a"),
    ("LOW_V", "", "", "v"),
    ("LOW_G", "", "", "g"),
)
"""Parameters of a time mix in the order of ops.c's `Weights`, vectors and maps; empty: the version lacks it."""


class _Names(NamedTuple):
    version: int
    vectors: tuple[str, ...]
    low_rank: tuple[str, ...]  # both halves of each map


_NAMES = {
    time_mix: _Names(
        version,
        tuple(row[version - 4] for row in _VECTORS),
        tuple(row[version - 4] and row[version - 4] + half for row in _LOW_RANK for half in "12"),
    )
    for version, time_mix in TIME_MIX.items()
}
_LINEAR_OF_TIME_MIX = ("receptance", "key", "value", "gate", "output")
_LINEAR_OF_CHANNEL_MIX = ("key", "value", "receptance")


def decode_block(
    block: RwkvBlock,
    hidden_states: Tensor,
    v_first: Tensor | None,
    state: VisualRWKVCacheLayer,
    reading: Reading,
) -> tuple[Tensor, Tensor | None] | None:
    """Compute `RwkvBlock.forward` of one token in one call, in float32 whatever the dtype of the weights.

    Args:
        block: the block.
        hidden_states: x, [B, 1, C].
        v_first: layer 0's values [B, 1, A] (RWKV-7), None in layer 0.
        state: what the block has read before, which is written in place.
        reading: its `order` [B, 1] is negative at pads.

    Returns:
        What the block returns, or None where its parts have to compute it one by one: they have been replaced (LoRA)
        or are watched by hooks, there are too many rows, or a weight or a state is not as ops.c reads it.
    """
    if not _serves(hidden_states) or not _has_native_parts(block):
        return None
    weights = _Weights.of(block)
    states = (
        *(state.conv_states[which] for which in (TIME_MIX_SHIFT, CHANNEL_MIX_SHIFT)),
        state.wkv_state(),
    )
    if not weights.suit(hidden_states, states):
        return None
    mask = None if reading.order is None else reading.order >= 0
    return _read(block, weights, hidden_states, v_first, states, mask)


def _has_native_parts(block: RwkvBlock) -> bool:
    """Whether calling the parts one by one would do nothing but compute what `rwkv_layer` does."""
    parts = (*block._modules.values(), *block.att._modules.values(), *block.ffn._modules.values())
    return all(
        type(part) in _NATIVE_PARTS
        and not (part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__)
        for part in parts
    )


_NATIVE_PARTS = {
    nn.LayerNorm,
    nn.GroupNorm,
    NativeLinear,
    Int8Linear,
    *TIME_MIX.values(),
    *CHANNEL_MIX.values(),
}


class _Weights(NamedTuple):
    """`Weights` of ops.c, in its order; None is what the version lacks."""

    parameters: list[Tensor | None]
    linear: list[Tensor | None]  # weight and scale of each
    ranks: list[int]  # columns of the first half of each low-rank map

    @classmethod
    def of(cls, block: RwkvBlock) -> _Weights:
        # By their dictionaries: an attribute of a module takes ten times as long.
        parts = block._modules
        att, ffn, names = parts["att"], parts["ffn"], _NAMES[type(parts["att"])]
        norms = (x._parameters for x in (parts["ln1"], parts["ln2"], att._modules["ln_x"]))
        ln1, ln2, ln_x = ((x["weight"], x["bias"]) for x in norms)
        shifts = [*map(ffn._parameters.get, ffn.mix_names), None][:2]
        vectors, low_rank = ([*map(att._parameters.get, x)] for x in (names.vectors, names.low_rank))
        linear = [
            *map(att._modules.get, _LINEAR_OF_TIME_MIX),
            *map(ffn._modules.get, _LINEAR_OF_CHANNEL_MIX),
        ]
        return cls(
            [*ln1, *ln2, *shifts, *vectors, *ln_x, *low_rank],
            [x for layer in linear for x in (layer.tensors() if layer else (None, None))],
            [0 if down is None else down.shape[1] for down in low_rank[::2]],
        )

    def suit(self, hidden_states: Tensor, states: Sequence[Tensor]) -> bool:
        """Whether they and `states`, twice [B, C, 1] and [B, H, K, K], lie as ops.c reads them for [B, 1, C]."""
        (B, _, C), (*shifts, wkv_state) = hidden_states.shape, states
        K = wkv_state.shape[-1]
        weights, scales = ({x.dtype for x in self.linear[i::2] if x is not None} for i in (0, 1))
        of_dtype = [x for x in (*self.parameters, *shifts) if x is not None]
        every = [*of_dtype, wkv_state, *(x for x in self.linear if x is not None)]
        return (
            hidden_states.dtype in DTYPES
            and {x.dtype for x in of_dtype} == {hidden_states.dtype}
            and len(weights) == 1
            and scales <= {torch.float32}
            and not any(rank % ROWS_AT_ONCE for rank in self.ranks)
            and all(x.shape == (B, C, 1) for x in shifts)
            and wkv_state.shape == (B, len(self.linear[0]) // K, K, K)
            and all(map(is_plain, every))
        )


def _read(
    block: RwkvBlock,
    weights: _Weights,
    hidden_states: Tensor,
    v_first: Tensor | None,
    states: Sequence[Tensor],
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """`RwkvBlock.forward` of `hidden_states` [B, 1, C]; `states`, twice [B, C, 1] and [B, H, K, K], are written."""
    att, inner, dtype = block.att, block.ffn.key.out_features, hidden_states.dtype
    (B, _, C), (_, H, K, _), version = hidden_states.shape, states[-1].shape, _NAMES[type(att)].version
    size, linear_size = states[0].element_size(), weights.linear[0].element_size()
    sizes = (version, B, C, H * K, inner, H, size, linear_size, *weights.ranks)
    x = hidden_states.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    v_first = x.new_empty(B, 1, H * K) if v_first is None else v_first.float().contiguous()
    scratch = x.new_empty(16 * (B + 1) * (H * K + C) + B * (inner + sum(weights.ranks)))
    call(
        "rwkv_layer",
        *(block.ln1.eps, att.ln_x.eps, DECAY_SCALE),
        (ctypes.c_int64 * len(sizes))(*sizes),
        pointers(*weights.parameters, *weights.linear),
        *(*states, mask, v_first, x, scratch),
    )
    return x.to(dtype), v_first.to(dtype) if version == 7 else None


# --- a model ----------------------------------------------------------------------------------------------


def accelerate_on_cpu(model: PreTrainedModel, int8: bool = False) -> PreTrainedModel:
    """Lets a model compute with native ops on a CPU: the language model's blocks and the head.

    Args:
        model: a `VisualRWKVForConditionalGeneration` or `VisualRWKVForCausalLM`, changed in place.
        int8: whether the weights of their linear layers are rounded to int8 (a quarter of float32's bytes; not for
            training or saving). What stays as it is: the embedding, the low-rank maps and the vision tower.

    Returns:
        The model.

    Raises:
        RuntimeError: see [`build_native_ops`].
        ValueError: the model has no block of RWKV.
    """
    build_native_ops()
    blocks = [module for module in model.modules() if isinstance(module, RwkvBlock)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no RWKV block to accelerate.")
    for block in blocks:
        block.accelerated = True
        for part in (block.att, block.ffn):
            for name, module in part.named_children():
                if type(module) is nn.Linear:
                    setattr(part, name, _accelerated(module, int8))
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        head = _accelerated(head, int8)
        model.set_output_embeddings(head)
    move_to_huge_pages(nn.ModuleList([*blocks, *([] if head is None else [head])]))
    return model


def move_to_huge_pages(module: nn.Module) -> None:
    """Moves the weights of a module on the CPU to pages of 2 MB, if the system has such: it reads them faster.

    The parameters and buffers stay the same objects.
    """
    weights = [x for x in (*module.parameters(), *module.buffers()) if is_plain(x) and x.numel()]
    room = [-(-x.nbytes // CACHE_LINE) * CACHE_LINE for x in weights]
    if not weights or not hasattr(mmap, "MADV_HUGEPAGE"):  # Linux has it
        return
    pages = mmap.mmap(-1, sum(room), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return
    for weight, offset in zip(weights, accumulate(room, initial=0)):
        moved = torch.frombuffer(pages, dtype=weight.dtype, count=weight.numel(), offset=offset)
        weight.data = moved.view(weight.shape).copy_(weight.data)


def _accelerated(linear: nn.Linear, int8: bool) -> nn.Module:
    """The layer with native ops, or itself where it does not suit them."""
    if linear.in_features % 16 or linear.bias is not None or not is_plain(linear.weight):
        return linear
    if int8:
        return Int8Linear(linear)
    native = NativeLinear(linear.in_features, linear.out_features, bias=False, device="meta")
    native.weight = linear.weight
    return native.train(linear.training)


__all__ = ["Int8Linear", "NativeLinear", "accelerate_on_cpu"]
