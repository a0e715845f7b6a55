"""One token of a whole language model in one call of C: from its id to the next one.

Python takes longer for the parts around the blocks than C takes for a small model. So the model is looked at once, and
then each token is a call with the same addresses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layer_state import LayerState
from ..rwkv7_time_mix import DECAY_SCALE
from .block import States, has_native_parts, has_shape, is_stored_well
from .blocks import has_hooks, ready_blocks
from .formats import FORMAT_OF
from .layers import NATIVE_LINEARS, serves
from .library import FLOAT
from .memory import is_plain
from .ops import library


class TokenStep:
    """Reads a token of each row after what its states have read, and returns the likeliest next ones.

    It holds on to all weights and states, so that their addresses stay theirs.

    Args:
        arguments: the first ones of `visualrwkv_token`.
        held: what they have the addresses of.
        rows: B.
        vocab_size: rows of the head.
    """

    def __init__(self, arguments: Sequence[Any], held: object, rows: int, vocab_size: int):
        self._arguments, self._held = arguments, held
        self._logits = torch.empty(rows, vocab_size, **FLOAT)

    def __call__(self, ids: Tensor, keep_logits: bool) -> tuple[Tensor, Tensor]:
        """Return the ids [B] of the largest logits after `ids`, int64 [B], and the logits, float32 [B, vocab_size].

        They are rounded as the model's head rounds them. Without `keep_logits` the next call overwrites them.
        """
        logits = torch.empty_like(self._logits) if keep_logits else self._logits
        likeliest = torch.empty_like(ids)
        library().call("token", *self._arguments, ids, logits, likeliest)
        return likeliest, logits


def token_decode(model: Any, head: nn.Module, states: Sequence[LayerState], rows: int) -> TokenStep | None:
    """Return what computes one token of a language model, or None where C cannot do all of it.

    Args:
        model: a `VisualRWKVTextModel`.
        head: its `lm_head`.
        states: what each block has read before, of as many rows, which each call updates in place.
        rows: B.
    """
    embedding, norms = model.embed_tokens, (model.embed_norm, model.norm)
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        return None
    if any(type(norm) is not nn.LayerNorm for norm in norms) or type(head) not in NATIVE_LINEARS:
        return None
    if head._parameters.get("bias") is not None:
        return None
    if any(map(has_hooks, (model, model.layers, embedding, *norms, head))) or not all(
        map(has_native_parts, model.layers)
    ):
        return None
    dtype = embedding.weight.dtype
    hidden_states = torch.empty(rows, 1, embedding.embedding_dim, dtype=dtype, device="cpu")
    blocks = ready_blocks(model.layers, hidden_states) if serves(hidden_states) else None
    if blocks is None or blocks.number != len(states):
        return None
    found = States.of(blocks.first.sizes, states, dtype)
    vectors = [x for norm in norms for x in (norm.weight, norm.bias)]
    weight, scale = head.tensors()  # type: ignore[operator]
    held = [embedding.weight, *vectors, weight, *([] if scale is None else [scale])]
    if found is None or found.slots is not None or not all(map(is_plain, held)):
        return None
    if any(x.dtype != dtype for x in held[:5]) or not is_stored_well(weight, scale, dtype):
        return None
    if any(x.numel() != embedding.embedding_dim for x in vectors):
        return None
    if not has_shape(weight, head.out_features, embedding.embedding_dim):  # type: ignore[arg-type]
        return None
    vocab_size = len(weight)
    ends = [len(embedding.weight), vocab_size, *(x.data_ptr() for x in held[:6])]
    ends += [0 if scale is None else scale.data_ptr(), FORMAT_OF[weight.dtype]]
    arguments = (
        *(blocks.number, *blocks.first.eps, DECAY_SCALE, blocks.sizes, blocks.weights),
        (ctypes.c_int64 * len(found.words))(*found.words),
        *(norms[0].eps, norms[1].eps, (ctypes.c_int64 * len(ends))(*ends)),
    )
    # The memory at these addresses must live as long as the step, even if a weight gets other data meanwhile.
    kept = [x.detach() for x in (*held, *model.layers.parameters(), *model.layers.buffers())]
    return TokenStep(arguments, (kept, list(states)), rows, vocab_size)
