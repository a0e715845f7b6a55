"""One token through all blocks of a model in one call of C.

Looking at each weight takes Python longer than C takes to read the small ones. So what was found at one token is kept,
and at the next one it is only compared: the same modules in the same places, without hooks, with the same tensors at
the same addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..layer_state import LayerState
from ..modeling_rwkv import RwkvBlock
from ..token_order import TokenOrder
from .block import PackedBlocks, ReadyBlock, States, call_blocks, has_native_parts, lacks_values, parts_of
from .formats import FORMAT_OF
from .layers import serves
from .ops import MAX_ROWS

MAX_ROWS_OF_BLOCKS = 64
"""Up to this many rows whose states lie in pools the blocks are computed here: a server has them at every token. torch
would also have to launch some hundred ops for each block, and to gather and scatter the states."""


def decode_blocks(
    layers: nn.ModuleList,
    hidden_states: Tensor,
    v_first: Tensor | None,
    states: Sequence[LayerState],
    token_order: TokenOrder,
) -> tuple[Tensor, Tensor | None] | None:
    """Compute one token of some blocks, one after the other: the same as `decode_block` of each.

    Args:
        layers: all blocks of a model, or those of a stage of a pipeline.
        hidden_states: x, [B, 1, C].
        v_first: layer 0's values [B, 1, A] (RWKV-7); None if layer 0 is among these.
        states: what each block has read before, which is updated in place.
        token_order: of all blocks; its `order` [B, 1] is negative at padding.

    Returns:
        The hidden states [B, 1, C] after the last block and `v_first`, or None where `decode_block` would not compute
        one of them.
    """
    in_pools = bool(states) and states[0].indices is not None
    if not serves(hidden_states, MAX_ROWS_OF_BLOCKS if in_pools else MAX_ROWS) or _has_any_global_hook():
        return None
    blocks = ready_blocks(layers, hidden_states)
    if blocks is None or len(states) != blocks.number or lacks_values(blocks.first, layers[0], v_first):
        return None
    found = States.of(blocks.first.sizes, states, hidden_states.dtype)
    return None if found is None else call_blocks(blocks, found, hidden_states, v_first, token_order.mask())


class _Found(NamedTuple):
    """What was found at an earlier token.

    Attributes:
        blocks: the blocks as ops.c takes them.
        modules: the blocks and their parts.
        kinds: the class of each.
        held: the dictionaries in which each module and each tensor is kept.
        names: its key there.
        kept: what was there.
        tensors: all weights.
        memory: their addresses, their bytes, and whether they are contiguous.
    """

    blocks: PackedBlocks
    modules: list[nn.Module]
    kinds: list[type]
    held: list[dict[str, Any]]
    names: list[str]
    kept: list[Any]
    tensors: list[Tensor]
    memory: tuple[list[int], list[int], list[bool]]

    @classmethod
    def at(cls, layers: nn.ModuleList, hidden_states: Tensor) -> _Found | None:
        """Look at all blocks; None if one of them is not for ops.c."""
        blocks: list[ReadyBlock] = []
        modules: list[nn.Module] = []
        for block in layers:
            if type(block) is not RwkvBlock or has_hooks(block) or not has_native_parts(block):
                return None
            ready = ReadyBlock.of(block, hidden_states)
            if ready is None or ready[:2] != (blocks or [ready])[0][:2]:
                return None
            blocks.append(ready)
            modules += [block, *parts_of(block)]
        if not blocks or any(block.sizes._replace(F=0) != blocks[0].sizes._replace(F=0) for block in blocks):
            return None
        kept_in: list[dict[str, Any]] = [layers._modules]
        for module in modules:
            kept_in += [module._modules, module._parameters, module._buffers]
        places = [(held, name) for held in kept_in for name in held]
        tensors = [x for block in blocks for x in block.tensors]
        return cls(
            PackedBlocks.of(blocks),
            modules,
            list(map(type, modules)),
            [held for held, _ in places],
            [name for _, name in places],
            [held[name] for held, name in places],
            tensors,
            _memory_of(tensors),
        )

    def holds(self, layers: nn.ModuleList, hidden_states: Tensor) -> bool:
        """Return whether looking again would find the same."""
        sizes = self.blocks.first.sizes
        return (
            len(layers) == self.blocks.number
            and hidden_states.shape[1:] == (1, sizes.C)
            and FORMAT_OF.get(hidden_states.dtype) == sizes.format
            and list(map(type, self.modules)) == self.kinds
            and not any(map(has_hooks, self.modules))
            and all(map(is_, map(dict.get, self.held, self.names), self.kept))
            and _memory_of(self.tensors) == self.memory
        )


def has_hooks(module: nn.Module) -> bool:
    """Return whether calling a module does more, or something else, than its class says."""
    held = module.__dict__
    return bool(held["_forward_hooks"] or held["_forward_pre_hooks"] or "forward" in held)


def _memory_of(tensors: Sequence[Tensor]) -> tuple[list[int], list[int], list[bool]]:
    # map() and not a loop: hundreds of tensors are looked at for each token.
    pointers, contiguous = map(Tensor.data_ptr, tensors), map(Tensor.is_contiguous, tensors)
    return list(pointers), list(map(attrgetter("nbytes"), tensors)), list(contiguous)


_found: WeakKeyDictionary[nn.ModuleList, _Found] = WeakKeyDictionary()


def ready_blocks(layers: nn.ModuleList, hidden_states: Tensor) -> PackedBlocks | None:
    """Return all blocks as ops.c takes them for hidden states [B, 1, C]; None if one of them is not for it."""
    found = _found.get(layers)
    if found is None or not found.holds(layers, hidden_states):
        found = _Found.at(layers, hidden_states)
        if found is None:
            _found.pop(layers, None)
            return None
        _found[layers] = found
    return found.blocks.with_rows(len(hidden_states))
