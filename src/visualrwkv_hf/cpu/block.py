"""One token through a whole block in one call of C: which parameter fills which slot, and when that is possible.

Letters: B batch, H heads, K key and value size of a head, A = H K, C hidden size, F width of the channel mix.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..configuration_visualrwkv import VisualRWKVTextConfig
from ..generations import GENERATIONS
from ..layer_state import CHANNEL_MIX_SHIFT, TIME_MIX_SHIFT, WKV, LayerState
from ..modeling_rwkv import RwkvBlock
from ..rwkv7_time_mix import DECAY_SCALE
from ..time_mix import norms_each_head
from ..token_order import TokenOrder
from .formats import FLOAT_DTYPES, FORMAT_OF, FORMATS
from .layers import NATIVE_LINEARS, serves
from .memory import is_plain
from .ops import library


class Slot(NamedTuple):
    """A place in ops.c's `Weights`, and what fills it in each generation, as a path from the block. Empty: nothing."""

    name: str
    v5: str
    v6: str
    v7: str


def _in_all(name: str, path: str) -> Slot:
    return Slot(name, path, path, path)


VECTORS_OF_C = (
    _in_all("LN1_WEIGHT", "ln1.weight"),
    _in_all("LN1_BIAS", "ln1.bias"),
    _in_all("LN2_WEIGHT", "ln2.weight"),
    _in_all("LN2_BIAS", "ln2.bias"),
    Slot("FFN_SHIFT_K", v5="ffn.time_mix_k", v6="ffn.time_maa_k", v7="ffn.x_k"),
    Slot("FFN_SHIFT_R", v5="ffn.time_mix_r", v6="ffn.time_maa_r", v7=""),
    Slot("SHIFT_X", v5="", v6="att.time_maa_x", v7=""),
    Slot("SHIFT_R", v5="att.time_mix_r", v6="att.time_maa_r", v7="att.x_r"),
    Slot("SHIFT_K", v5="att.time_mix_k", v6="att.time_maa_k", v7="att.x_k"),
    Slot("SHIFT_V", v5="att.time_mix_v", v6="att.time_maa_v", v7="att.x_v"),
    Slot("SHIFT_G", v5="att.time_mix_g", v6="att.time_maa_g", v7="att.x_g"),
    Slot("SHIFT_W", v5="", v6="att.time_maa_w", v7="att.x_w"),
    Slot("SHIFT_A", v5="", v6="", v7="att.x_a"),
)
VECTORS_OF_A = (
    Slot("W0", v5="att.time_decay", v6="att.time_decay", v7="att.w0"),
    Slot("A0", v5="", v6="", v7="att.a0"),
    Slot("V0", v5="", v6="", v7="att.v0"),
    Slot("K_K", v5="", v6="", v7="att.k_k"),
    Slot("K_A", v5="", v6="", v7="att.k_a"),
    Slot("R_K", v5="", v6="", v7="att.r_k"),
    Slot("U", v5="att.time_faaaa", v6="att.time_faaaa", v7=""),
    _in_all("NORM_WEIGHT", "att.ln_x.weight"),
    _in_all("NORM_BIAS", "att.ln_x.bias"),
)
LOW_RANKS = (  # each path stands for two parameters: path + "1" is `down`, path + "2" is `up`
    Slot("LOW_SHIFT", v5="", v6="att.time_maa_w", v7=""),
    Slot("LOW_W", v5="", v6="att.time_decay_w", v7="att.w"),
    Slot("LOW_A", v5="", v6="", v7="att.a"),
    Slot("LOW_V", v5="", v6="", v7="att.v"),
    Slot("LOW_G", v5="", v6="", v7="att.g"),
)
LINEARS = (
    _in_all("RECEPTANCE", "att.receptance"),
    _in_all("KEY", "att.key"),
    _in_all("VALUE", "att.value"),
    Slot("GATE", v5="att.gate", v6="att.gate", v7=""),
    _in_all("OUTPUT", "att.output"),
    _in_all("FFN_KEY", "ffn.key"),
    _in_all("FFN_VALUE", "ffn.value"),
    Slot("FFN_RECEPTANCE", v5="ffn.receptance", v6="ffn.receptance", v7=""),
)
SLOTS = {
    "VECTORS_OF_C": VECTORS_OF_C,
    "VECTORS_OF_A": VECTORS_OF_A,
    "LOW_RANKS": LOW_RANKS,
    "LINEARS": LINEARS,
}
"""Lists of ops.c -> their slots, in the same order: a test compares them."""


class _Paths(NamedTuple):
    """A generation's column of the slots, each path as the module's and the parameter's name."""

    vectors: tuple[tuple[str, str], ...]
    low_rank: tuple[tuple[str, str], ...]  # down and up of each map
    linear: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, version: int) -> _Paths:
        def column(*tables: Sequence[Slot]) -> list[str]:
            return [getattr(slot, f"v{version}") for table in tables for slot in table]

        def split(paths: Sequence[str]) -> tuple[tuple[str, str], ...]:
            return tuple((module, name) for module, _, name in (path.rpartition(".") for path in paths))

        halves = [path and path + half for path in column(LOW_RANKS) for half in "12"]
        return cls(split(column(VECTORS_OF_C, VECTORS_OF_A)), split(halves), split(column(LINEARS)))


VERSIONS = tuple(int(field.removeprefix("v")) for field in Slot._fields[1:])
"""Generations that ops.c knows."""

_PATHS = {version: _Paths.of(version) for version in VERSIONS}


def _versions_with(name: str) -> frozenset[int]:
    """Return the generations that have the low-rank map `name`."""
    slot = next(slot for slot in LOW_RANKS if slot.name == name)
    return frozenset(version for version in VERSIONS if getattr(slot, f"v{version}"))


MIXES_BY_MAP = _versions_with("LOW_SHIFT")
"""Generations whose token shift has a low-rank map: one for all five targets, of five times the rank."""


NOT_IN_LAYER_0 = (("att", "v0"), ("att", "v1"), ("att", "v2"))
"""Layer 0 of RWKV-7 lacks these paths: they gate between a layer's own values and those of layer 0."""


class _Weights(NamedTuple):
    """What fills ops.c's `Weights`; None where the block has nothing."""

    vectors: list[Tensor | None]
    low_rank: list[Tensor | None]  # down and up of each map
    linear: list[tuple[Tensor, Tensor | None] | None]  # weight and scale of each layer

    def lacks(self, version: int) -> bool:
        """Return whether a tensor is missing that every block of the generation has, such as a norm's bias."""
        paths = _PATHS[version]
        pairs = zip((*paths.vectors, *paths.low_rank), (*self.vectors, *self.low_rank))
        return any(x is None and any(path) and path not in NOT_IN_LAYER_0 for path, x in pairs)

    @classmethod
    def of(cls, block: RwkvBlock, version: int) -> _Weights:
        # From the modules' dictionaries: an attribute of a module takes ten times as long, for each token.
        parts = block._modules
        att, ffn = parts["att"], parts["ffn"]
        parameters = {name: part._parameters for name, part in parts.items()}
        parameters |= {"att.ln_x": att._modules["ln_x"]._parameters, "": {}}
        layers = {"att": att._modules, "ffn": ffn._modules, "": {}}
        paths = _PATHS[version]
        linear = [layers[module].get(name) for module, name in paths.linear]
        return cls(
            [parameters[module].get(name) for module, name in paths.vectors],
            [parameters[module].get(name) for module, name in paths.low_rank],
            [layer and layer.tensors() for layer in linear],
        )

    @property
    def ranks(self) -> list[int]:
        """The columns of each map's `down`, 0 where there is no map."""
        return [0 if down is None else down.shape[1] for down in self.low_rank[::2]]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that are there."""
        linear = (x for pair in self.linear if pair for x in pair)
        return [x for x in (*self.vectors, *self.low_rank, *linear) if x is not None]

    def words(self) -> list[int | None]:
        """Return `Weights` of ops.c: addresses, and after those of each linear layer the tag of its format."""
        words: list[int | None] = [
            None if x is None else x.data_ptr() for x in (*self.vectors, *self.low_rank)
        ]
        for pair in self.linear:
            weight, scale = pair or (None, None)
            words += [None if x is None else x.data_ptr() for x in (weight, scale)]
            words.append(None if weight is None else FORMAT_OF[weight.dtype])
        return words


class Sizes(NamedTuple):
    """`Sizes` of ops.c, without the ranks; a test compares the names."""

    version: int
    B: int
    C: int
    A: int
    F: int
    H: int
    format: int


def decode_block(
    block: RwkvBlock,
    hidden_states: Tensor,
    v_first: Tensor | None,
    state: LayerState,
    token_order: TokenOrder,
) -> tuple[Tensor, Tensor | None] | None:
    """Compute `RwkvBlock.forward` of one token in one call, in float32 whatever the format of the weights.

    Args:
        block: the block.
        hidden_states: x, [B, 1, C].
        v_first: layer 0's values [B, 1, A] (RWKV-7), None in layer 0.
        state: what the block has read before, which is updated in place.
        token_order: its `order` [B, 1] is negative at padding.

    Returns:
        The hidden states [B, 1, C] and `v_first`, or None where the block's parts have to compute it one by one:
        because they have been replaced (LoRA) or have hooks, because there are too many rows, or because a weight or a
        state is not as ops.c reads it.
    """
    if not serves(hidden_states) or not has_native_parts(block):
        return None
    ready = ReadyBlock.of(block, hidden_states)
    if ready is None or lacks_values(ready, block, v_first):
        return None
    states = States.of(ready.sizes, [state], hidden_states.dtype)
    if states is None:
        return None
    return call_blocks(PackedBlocks.of([ready]), states, hidden_states, v_first, token_order.mask())


def lacks_values(ready: ReadyBlock, block: Any, v_first: Tensor | None) -> bool:
    """Return whether a block mixes the values of layer 0 with its own, and they are not given."""
    return v_first is None and GENERATIONS[ready.version].hands_on_values and block.layer_idx != 0


class ReadyBlock(NamedTuple):
    """A block whose weights are as ops.c reads them.

    Attributes:
        version: generation.
        eps: of the layer norms, and of the norm of each head.
        sizes: what `Sizes` of ops.c begins with.
        words: `Sizes` and `Weights` of ops.c.
        tensors: what `words` has the addresses of.
    """

    version: int
    eps: tuple[float, float]
    sizes: Sizes
    words: tuple[list[int], list[int | None]]
    tensors: list[Tensor]

    @classmethod
    def of(cls, block: RwkvBlock, hidden_states: Tensor) -> ReadyBlock | None:
        """Return the block for hidden states [B, 1, C]; None if ops.c cannot read a weight of it."""
        att: Any = block.att
        version = att.config.rwkv_version
        weights = _Weights.of(block, version)
        if (
            weights.lacks(version)
            or block.ln1.eps != block.ln2.eps
            or not norms_each_head(att.ln_x, att.config)
        ):
            return None
        sizes = _sizes(att.config, weights, hidden_states)
        if not _suits(sizes, weights, hidden_states.dtype):
            return None
        eps = (block.ln1.eps, att.ln_x.eps)
        return cls(version, eps, sizes, ([*sizes, *weights.ranks], weights.words()), weights.tensors)


class States(NamedTuple):
    """The states of some blocks as ops.c reads and writes them.

    Attributes:
        words: `LayerState` of ops.c for each block.
        slots: int64 [B], where in their pools the states of the sequences lie; None: they are rows.
    """

    words: list[int]
    slots: Tensor | None

    @classmethod
    def of(cls, sizes: Sizes, states: Sequence[LayerState], dtype: torch.dtype) -> States | None:
        """Return the states of blocks of the same sizes; None if one is not as ops.c reads it, or has other slots.

        Those are the previous tokens of both token shifts, [B or N, C] each in `dtype`, and the matrices
        [B or N, H, K, K] in float32. Between those of two sequences other numbers may lie.
        """
        words: list[int] = []
        slots = states[0].indices
        for state in states:
            found = _state_words(sizes, state, dtype)
            if found is None or not _are_the_same(state.indices, slots):
                return None
            words += found
        if slots is not None and (slots.dtype != torch.int64 or not is_plain(slots) or len(slots) != sizes.B):
            return None
        return cls(words, slots)


def _are_the_same(x: Tensor | None, y: Tensor | None) -> bool:
    if x is None or y is None:
        return x is y
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape


def _state_words(sizes: Sizes, state: LayerState, dtype: torch.dtype) -> list[int] | None:
    """Return `LayerState` of ops.c; None if the states are not as it reads them."""
    if state.record_past or not state.tensors:
        return None
    _, B, C, A, _, H, _ = sizes
    wkv = state.tensors[WKV]
    count = len(wkv)
    words: list[int] = []
    if state.indices is None and count != B:
        return None
    for tensor, shape, kind in (
        (state.tensors[TIME_MIX_SHIFT], (C,), dtype),
        (state.tensors[CHANNEL_MIX_SHIFT], (C,), dtype),
        (wkv, (H, A // H, A // H), torch.float32),
    ):
        size = math.prod(shape)
        stride = tensor.stride(0) if count > 1 else size
        if tensor.shape != (count, *shape) or tensor.dtype != kind or stride < size:
            return None
        if not (
            is_plain(tensor) or (state.indices is not None and tensor.is_cpu and tensor[:1].is_contiguous())
        ):
            return None
        words += [tensor.data_ptr(), stride]
    return [*words, count]


class PackedBlocks(NamedTuple):
    """Some blocks, one after the other, as ops.c takes them: of one generation, with the same B, C, A and eps."""

    first: ReadyBlock
    number: int
    sizes: ctypes.Array
    weights: ctypes.Array

    def with_rows(self, B: int) -> PackedBlocks:
        """Return the same blocks for hidden states of B rows."""
        first = self.first.sizes
        if first.B == B:
            return self
        numbers, fields = list(self.sizes), len(self.sizes) // self.number
        numbers[first._fields.index("B") :: fields] = [B] * self.number
        sizes = (ctypes.c_int64 * len(numbers))(*numbers)
        return self._replace(first=self.first._replace(sizes=first._replace(B=B)), sizes=sizes)

    @classmethod
    def of(cls, blocks: Sequence[ReadyBlock]) -> PackedBlocks:
        numbers = [number for block in blocks for number in block.words[0]]
        words = [word for block in blocks for word in block.words[1]]
        sizes = (ctypes.c_int64 * len(numbers))(*numbers)
        return cls(blocks[0], len(blocks), sizes, (ctypes.c_void_p * len(words))(*words))


def call_blocks(
    blocks: PackedBlocks,
    states: States,
    hidden_states: Tensor,
    v_first: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Compute one token of some blocks, one after the other; see `decode_block`.

    Args:
        blocks: the blocks.
        states: theirs.
        hidden_states: x, [B, 1, C].
        v_first: as the blocks before them returned it; None if the first of the model is among them.
        mask: bool [B, 1], False at padding; None if there is none.
    """
    first = blocks.first
    x = hidden_states.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    v_first = (
        x.new_empty(first.sizes.B, 1, first.sizes.A) if v_first is None else v_first.float().contiguous()
    )
    library().call(
        "blocks",
        *(blocks.number, *first.eps, DECAY_SCALE),
        *(blocks.sizes, blocks.weights, (ctypes.c_int64 * len(states.words))(*states.words)),
        *(states.slots, mask, v_first, x),
    )
    dtype = hidden_states.dtype
    return x.to(dtype), v_first.to(dtype) if GENERATIONS[first.version].hands_on_values else None


def has_native_parts(block: RwkvBlock) -> bool:
    """Return whether calling the block's parts one by one would compute what ops.c does, and nothing besides."""
    return not _has_any_global_hook() and all(map(_is_native, parts_of(block)))


def parts_of(block: RwkvBlock) -> list[nn.Module]:
    """Return the modules that ops.c stands for, but for the block itself."""
    return [*block._modules.values(), *block.att._modules.values(), *block.ffn._modules.values()]


def _is_native(part: nn.Module) -> bool:
    return (
        type(part) in _NATIVE_PARTS
        and not (part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__)
        and (type(part) not in NATIVE_LINEARS or part._parameters.get("bias") is None)
    )


_NATIVE_PARTS = {
    nn.LayerNorm,
    nn.GroupNorm,
    *NATIVE_LINEARS,
    *(GENERATIONS[version].time_mix for version in VERSIONS),
    *(GENERATIONS[version].channel_mix for version in VERSIONS),
}


def _sizes(config: VisualRWKVTextConfig, weights: _Weights, hidden_states: Tensor) -> Sizes:
    B, _, C = hidden_states.shape
    A, F = (weights.linear[_INDEX[name]][0].shape[0] for name in ("RECEPTANCE", "FFN_KEY"))
    tag = FORMAT_OF.get(hidden_states.dtype, -1)
    return Sizes(config.rwkv_version, B, C, A, F, config.num_attention_heads, tag)


_INDEX = {slot.name: index for index, slot in enumerate(LINEARS)}


def _suits(sizes: Sizes, weights: _Weights, dtype: torch.dtype) -> bool:
    """Return whether all weights that ops.c will read are what `sizes` says.

    All but the linear layers must have the dtype of the hidden states. A linear layer's weight must have it too, for
    torch would refuse to multiply the two, or be of few bits with its scales.
    """
    return (
        dtype in FLOAT_DTYPES
        and all(x.dtype == dtype for x in (*weights.vectors, *weights.low_rank) if x is not None)
        and _have_their_sizes(sizes, weights)
        and all(is_stored_well(*pair, dtype) for pair in weights.linear if pair)
        and all(map(is_plain, weights.tensors))
    )


def _have_their_sizes(sizes: Sizes, weights: _Weights) -> bool:
    """Return whether ops.c takes such sizes, and whether every weight has as many elements as it will read."""
    version, _, C, A, F, H, _ = sizes
    contract, of_C = library().contract, len(VECTORS_OF_C)
    widths = [C if slot.name == "LOW_SHIFT" else A for slot in LOW_RANKS]  # columns of each `up`
    maps = zip(weights.low_rank[::2], weights.low_rank[1::2], widths)
    ranks = [weights.ranks[0] // 5, *weights.ranks] if version in MIXES_BY_MAP else weights.ranks
    others = {"OUTPUT": (C, A), "FFN_KEY": (F, C), "FFN_VALUE": (C, F), "FFN_RECEPTANCE": (C, C)}
    return (
        A % H == 0
        and contract["MAX_KEYS"] >= A // H
        and not any(size % contract["COLUMN_MULTIPLE"] for size in (C, A, F))
        and not any(rank % contract["LOW_RANK_MULTIPLE"] for rank in ranks)
        and all(x is None or x.numel() == C for x in weights.vectors[:of_C])
        and all(x is None or x.numel() == A for x in weights.vectors[of_C:])
        and all(
            down is None or (down.shape[0] == C and up.numel() == down.shape[1] * width)
            for down, up, width in maps
        )
        and all(
            pair is None or has_shape(pair[0], *others.get(slot.name, (A, C)))
            for slot, pair in zip(LINEARS, weights.linear)
        )
    )


def is_stored_well(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> bool:
    """Return whether a linear layer's weight and scale are of a format that multiplies inputs of `dtype`."""
    if scale is None:
        return weight.dtype == dtype
    return weight.dtype in FORMAT_OF and FORMATS[FORMAT_OF[weight.dtype]].scale_dtype == scale.dtype


def has_shape(weight: Tensor, rows: int, columns: int) -> bool:
    """Return whether a tensor holds [rows, columns] weights of the format of its dtype."""
    is_format = weight.dtype in FORMAT_OF
    return is_format and weight.shape == (rows, FORMATS[FORMAT_OF[weight.dtype]].columns(columns))
