"""The time mix, the part of a block that remembers: what all generations share.

The equations of RWKV-5 and RWKV-6 are in `rwkv6_time_mix.py`, those of RWKV-7 in `rwkv7_time_mix.py`.

Letters: B batch, T time, S sequences, H heads, K = V size of a head, A = H K width of the time mix, C hidden size,
D rank of a low-rank map. Parameters carry the papers' names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .dispatch import kernel
from .layer_state import TIME_MIX_SHIFT, WKV, LayerState, StateUpdate
from .mixing import MixOutput, previous_token, store_last_token
from .token_order import IN_ORDER, TokenOrder, token_shift
from .wkv import take, tokens_of

if TYPE_CHECKING:
    from .configuration_visualrwkv import VisualRWKVTextConfig


class Recurrence(NamedTuple):
    """What the equations of a generation give for T tokens.

    Attributes:
        out: the input of `output`, [B, T, A].
        state: the WKV state after the last token, [S, H, K, V].
        run: the recurrence, `run(*inputs, state, order=...) -> (y, state)`.
        inputs: what it read, each [B, T, H, K]; with `run` enough to take tokens back.
    """

    out: Tensor
    state: Tensor
    run: Callable[..., tuple[Tensor, Tensor]]
    inputs: tuple[Tensor, ...]


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float32, or as it is in float64: decays are not computed in less, whatever the model's dtype."""
    return x if x.dtype == torch.float64 else x.float()


def norms_each_head(norm: Any, config: Any) -> bool:
    """Return whether a block's `ln_x` is what kernels compute: a norm of each head, with weight and bias."""
    is_whole = norm.weight is not None and norm.bias is not None
    return is_whole and getattr(norm, "num_groups", None) == config.num_attention_heads


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, T, A] -> [B, T, H, K]."""
    return x.unflatten(-1, (-1, head_dim))


def norm_of_heads(norm: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """Normalise each head of y [B, T, H, V] -> [B, T, A]; `norm` takes [N, A]."""
    return norm(y.flatten(0, 1).flatten(1)).view(*y.shape[:2], -1)


def wkv_state_after(
    recurrence: Recurrence, token_order: TokenOrder, length: int, before: Tensor | None
) -> Tensor:
    """Return the WKV state [B, H, K, V] after the first `length` positions: what cropping a cache goes back to."""
    inputs, order = recurrence.inputs, token_order.order
    if order is None:
        return recurrence.run(*(x[:, :length] for x in inputs), before)[1]
    order = order[:, :length]
    inputs = take(tokens_of(order), *inputs)
    position = torch.arange(length, device=order.device)
    return recurrence.run(*inputs, before, order=torch.where(order < 0, ~position, position))[1]


def plain_norm(
    num_heads: int, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """Return the norm per head as a function of [N, A] in `dtype`."""
    weight, bias = weight.to(dtype), bias.to(dtype)
    return partial(F.group_norm, num_groups=num_heads, weight=weight, bias=bias, eps=eps)


def decode_plainly(
    recurrence: Callable[..., Recurrence],
    products: Any,
    weights: Any,
    norm: Callable[[Tensor], Tensor],
    state: Tensor,
    mask: Tensor | None,
    state_indices: Tensor | None,
) -> Tensor:
    """Run `recurrence` on one token of each sequence, in the dtype of `state`, which is written in place."""
    dtype, shape = state.dtype, products.r.shape
    out_dtype = products.r.dtype
    products = type(products)(*(as_token(x, dtype) for x in products))
    weights = type(weights)(*(None if x is None else x.to(dtype) for x in weights))
    rows = state if state_indices is None else state.index_select(0, state_indices)
    order = None if mask is None else mask.view(-1, 1).long() - 1  # 0: the token, ~0 = -1: padding
    result = recurrence(products, weights, norm, state=rows, order=order)
    if state_indices is None:
        state.copy_(result.state)
    else:
        state.index_copy_(0, state_indices, result.state)
    out = result.out if order is None else result.out.masked_fill(order[..., None] < 0, 0)
    return out.to(out_dtype).view(shape)


def as_token(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """[B, A] or [B, 1, A] -> [B, 1, A] in `dtype`."""
    return None if x is None else x.view(x.shape[0], 1, x.shape[-1]).to(dtype)


class TimeMix(nn.Module):
    """Time mixing: token shift -> projections -> WKV -> norm per head -> gate -> output.

    A generation defines `products` (the matrix products of each token), `recur` (its equations on them) and
    `decode_arguments` (the same for a kernel that computes `recur` for one token). A generation of another form
    overrides `forward`.
    """

    decode_op: ClassVar[str]
    """Name of the op that computes `recur` for one token and writes the WKV state in place."""
    plain_decode: ClassVar[Callable[..., Tensor]]
    """That op in plain torch."""

    def __init__(self, config: VisualRWKVTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        hidden_size, width = config.hidden_size, config.attention_size
        self.receptance = nn.Linear(hidden_size, width, bias=False)
        self.key = nn.Linear(hidden_size, width, bias=False)
        self.value = nn.Linear(hidden_size, width, bias=False)
        self.output = nn.Linear(width, hidden_size, bias=False)
        self.ln_x = nn.GroupNorm(config.num_attention_heads, width, eps=config.group_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        v_first: Tensor | None = None,
        state: LayerState | None = None,
        token_order: TokenOrder = IN_ORDER,
    ) -> MixOutput:
        """Mix each token with those that the layer read before it.

        Args:
            hidden_states: [B, T, C].
            v_first: values of the first layer, [B, T, A] (RWKV-7).
            state: what the layer remembers; None if nothing is to be remembered either.
            token_order: in which order the layer reads.
        """
        carried = previous_token(hidden_states, TIME_MIX_SHIFT, state, token_order)
        shift = partial(
            token_shift,
            hidden_states,
            carried,
            previous=token_order.previous,
            following=token_order.following,
        )
        products = self.products(shift)
        v_first = self.first_values(products, v_first)
        updates = {}
        if decode := self._decode_op(hidden_states, state):
            arguments = self.decode_arguments(products, v_first) | self._norm_arguments()
            assert state is not None
            if state.indices is not None:
                arguments["state_indices"] = state.indices
            out = decode(**arguments, state=state.tensors[WKV], mask=token_order.mask())  # writes the state
        else:
            wkv = None if state is None else state.get(WKV)
            recurrence = self.recur(products, v_first, wkv, token_order)
            out = recurrence.out
            if state is not None:
                after = partial(wkv_state_after, recurrence, token_order) if state.record_past else None
                updates[WKV] = StateUpdate(recurrence.state, after)
        if state is not None:
            updates[TIME_MIX_SHIFT] = store_last_token(hidden_states, carried, state, token_order)
        return MixOutput(self.output(out), v_first, updates)

    def products(self, shift: Callable[..., Sequence[Tensor]]) -> Any:
        """Return the matrix products of the shifted tokens, a NamedTuple of [B, T, A] each.

        `shift(M weights [1, 1, C], dynamic=None)` gives M times [B, T, C], each token mixed with the one before it.
        """
        raise NotImplementedError

    def first_values(self, products: Any, v_first: Tensor | None) -> Tensor | None:
        """Return what the layers after the first get as `v_first`."""
        return v_first

    def recur(
        self, products: Any, v_first: Tensor | None, state: Tensor | None, token_order: TokenOrder
    ) -> Recurrence:
        """Compute the equations of the generation on T tokens, from the WKV state [S, H, K, V]."""
        raise NotImplementedError

    def decode_arguments(self, products: Any, v_first: Tensor | None) -> dict[str, Any]:
        """Return the arguments of `decode_op` for these products, beside state, mask and norm."""
        raise NotImplementedError

    def init_weights(self) -> None:
        """Initialise the parameters as the original does."""
        raise NotImplementedError

    def _decode_op(self, hidden_states: Tensor, state: LayerState | None) -> Callable[..., Tensor] | None:
        """Return the op that computes `recur` and writes the state, for one token, without gradients or a record.

        For states in a pool that is a kernel or the plain op; for rows only a kernel, since `recur` does the same.
        """
        if state is None or WKV not in state.tensors or state.record_past:
            return None
        if hidden_states.shape[1] != 1 or torch.is_grad_enabled():
            return None
        if not norms_each_head(self.ln_x, self.config):
            return None  # these ops do
        wkv = state.tensors[WKV]
        if state.indices is None:
            return kernel(self.decode_op, hidden_states, wkv)
        return kernel(self.decode_op, hidden_states, wkv, state.indices) or self.plain_decode

    def _norm_arguments(self) -> dict[str, Any]:
        return {"norm_weight": self.ln_x.weight, "norm_bias": self.ln_x.bias, "eps": self.ln_x.eps}

    def _layer_position(self) -> tuple[float, float, Tensor]:
        """Return r01 = l / (L - 1), r10 = 1 - l / L and d_i = i / C: what the initialisation depends on."""
        num_layers, hidden_size = self.config.num_hidden_layers, self.config.hidden_size
        return (
            self.layer_idx / max(num_layers - 1, 1),
            1 - self.layer_idx / num_layers,
            torch.arange(hidden_size, dtype=torch.float32) / hidden_size,
        )
