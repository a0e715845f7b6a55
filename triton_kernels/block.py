"""One token through a whole block in a few launches: seven in RWKV-7 and RWKV-5, eleven in RWKV-6.

A launch costs more than what it computes for a token, so everything between two matrix products that depend on one
another is one kernel: norm and token shift, all products of the shifted tokens, the recurrence with its low-rank maps,
a product and the residual sum.

A block is taken as it is (any object with the parameters' names), because this package imports only torch and triton.
Letters: B batch, A width of the time mix, C hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .decode import rwkv6_decode, rwkv7_decode_low_rank
from .launches import HEAD_SIZES, call, has_rows_apart
from .norm_shift import norm_shift
from .products import MAX_ROWS, products
from .token_shift import token_shift

TIME_MIX_SHIFT, CHANNEL_MIX_SHIFT, WKV = "token_shift0", "token_shift1", "wkv"
"""Names of a layer's states, as in `visualrwkv_hf.layer_state`; a test compares them."""


def decode_block(
    block: Any, hidden_states: Tensor, v_first: Tensor | None, state: Any, token_order: Any
) -> tuple[Tensor, Tensor | None] | None:
    """Compute `RwkvBlock.forward` of one token of each sequence, without gradients, and write the states in place.

    Args:
        block: the block.
        hidden_states: x, [B, 1, C].
        v_first: layer 0's values [B, 1, A] (RWKV-7), None in layer 0.
        state: a `LayerState`: rows of the batch, or slots of a pool.
        token_order: its `order` [B, 1] is negative at padding.

    Returns:
        The hidden states [B, 1, C] and `v_first`, or None where the block's parts have to compute it one by one:
        because they have been replaced (LoRA, quantized weights) or have hooks, because there are more than 64
        sequences, or because a weight or a state is not as the kernels read it, such as states of another number of
        sequences.
    """
    att, ffn = block.att, block.ffn
    version = att.config.rwkv_version
    mix_time = _TIME_MIXES.get(version)
    if mix_time is None or not _serves(block, hidden_states, v_first, state):
        return None
    mask = None if token_order.order is None else (token_order.order >= 0).contiguous()
    indices = None if state.indices is None else state.indices.contiguous()
    rows = {"mask": mask, "state_indices": indices}
    shifts = (state.tensors[TIME_MIX_SHIFT], state.tensors[CHANNEL_MIX_SHIFT])
    out, v_first = mix_time(att, block.ln1, hidden_states, v_first, shifts[0], state.tensors[WKV], rows)
    hidden_states = _linear(att.output, out, residual=hidden_states)

    x = _shifted(block.ln2, hidden_states, shifts[1], ffn, _CHANNEL_MIX[version], rows, version == 5)
    if version == 7:
        gate = None
        (key,) = products(x, [ffn.key.weight], ["squared_relu"], [True])
    else:
        weights = [ffn.key.weight, ffn.receptance.weight]
        key, gate = products(x, weights, ["squared_relu", "sigmoid"], [True, True])
    return _linear(ffn.value, key, residual=hidden_states, gate=gate), v_first


_CHANNEL_MIX = {5: ("time_mix_k", "time_mix_r"), 6: ("time_maa_k", "time_maa_r"), 7: ("x_k",)}
"""Mix weights of a channel mix, of its key first. RWKV-5's are of the current token."""


def _serves(block: Any, x: Tensor, v_first: Tensor | None, state: Any) -> bool:
    """Return whether the kernels compute what the block's parts would, one by one, and read what they would."""
    return _serves_rows(block.att.config, x, v_first, state) and _serves_parts(block, x.dtype)


def _serves_rows(config: Any, x: Tensor, v_first: Tensor | None, state: Any) -> bool:
    """Return whether there is a state for each row of x, and the states and v_first are laid out as kernels read them.

    Only the plain ops refuse what does not fit; kernels would read and write past the end.
    """
    B, _, C = x.shape
    H, K = config.num_attention_heads, config.head_dim
    shifts, wkv = [state.tensors[TIME_MIX_SHIFT], state.tensors[CHANNEL_MIX_SHIFT]], state.tensors[WKV]
    states = [*shifts, wkv]
    return (
        B <= MAX_ROWS
        and all(rows.shape[0] == B for rows in (states if state.indices is None else [state.indices]))
        and all(type(t) in _TENSORS and t.dtype == x.dtype and t.shape[1:] == (C,) for t in shifts)
        and wkv.dtype == torch.float32
        and wkv.shape[1:] == (H, K, K)
        and K in HEAD_SIZES
        and all(has_rows_apart(t) for t in states)
        and (v_first is None or (v_first.shape[0] == B and v_first.is_contiguous()))
    )


def _serves_parts(block: Any, dtype: torch.dtype) -> bool:
    """Return whether a block is made of what the model makes it of: an adapter, say, computes something else."""
    att, norms = block.att, [block.ln1, block.ln2, block.att.ln_x]
    linear = [part for part in (*att.children(), *block.ffn.children()) if part is not att.ln_x]
    parameters = list(block.parameters())
    return (
        not _has_any_global_hook()
        and not any(
            part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__
            for part in (*norms, *linear, att, block.ffn)
        )
        and all(type(part) is nn.Linear and part.bias is None for part in linear)
        and [type(norm) for norm in norms] == [nn.LayerNorm, nn.LayerNorm, nn.GroupNorm]
        and all(norm.weight is not None and norm.bias is not None for norm in norms)
        and att.ln_x.num_groups == att.config.num_attention_heads
        and all(type(p) in _TENSORS and p.dtype == dtype for p in parameters)
        and all(p.is_contiguous() for p in parameters)
    )


_TENSORS = (Tensor, nn.Parameter)
"""Types of tensors that kernels read: a subclass, such as quantized weights, keeps its values in a way of its own."""


def _linear(layer: nn.Linear, x: Tensor, **added: Tensor | None) -> Tensor:
    return products([x], [layer.weight], ["identity"], [True], **added)[0]


def _shifted(
    norm: nn.LayerNorm,
    x: Tensor,
    carried: Tensor,
    module: nn.Module,
    names: tuple[str, ...],
    rows: dict[str, Tensor | None],
    of_current: bool = False,
    ends: bool = False,
) -> tuple[Tensor, ...]:
    mix = [getattr(module, name) for name in names]
    return norm_shift(
        x, norm.weight, norm.bias, norm.eps, carried, mix, **rows, of_current=of_current, ends=ends
    )


# --- the time mixes: out [B, 1, A], before `output`, and v_first ------------------------------------------


def _rwkv7(att, norm, x, v_first, carried, wkv, rows):
    shifted = _shifted(norm, x, carried, att, ("x_r", "x_k", "x_v", "x_w", "x_a", "x_g"), rows)
    x_r, x_k, x_v, x_w, x_a, x_g = shifted
    linear = [att.receptance.weight, att.key.weight, att.value.weight]
    first = not hasattr(att, "v0")
    down, up = [att.w1, att.a1, att.g1], [att.w2, att.a2, att.g2]
    inputs, functions = [x_r, x_k, x_v, x_w, x_a, x_g], ["tanh", "identity", "sigmoid"]
    if not first:
        down, up, inputs = [*down, att.v1], [*up, att.v2], [*inputs, x_v]
        functions = [*functions, "identity"]
    r, k, v, *low = products(
        inputs, linear + down, ["identity"] * 3 + functions, [True] * 3 + [False] * len(down)
    )
    weights = (att.w0, att.a0, None if first else att.v0, att.k_k, att.k_a, att.r_k)
    out = call(
        rwkv7_decode_low_rank,
        *(r, k, v, None if first else v_first, low, up, *weights, att.ln_x.weight, att.ln_x.bias, wkv),
        *(rows["mask"], rows["state_indices"], att.ln_x.eps),
    )
    return out, v if first else v_first


def _rwkv6(att, norm, x, v_first, carried, wkv, rows):
    x_x, now, before = _shifted(norm, x, carried, att, ("time_maa_x",), rows, ends=True)
    (low,) = products([x_x], [att.time_maa_w1], ["tanh"], [False])
    low = low.view(len(low), 5, att.time_maa_w2.shape[1]).transpose(0, 1)  # [5, B, D]
    dynamic = torch.bmm(low, att.time_maa_w2)[:, :, None]  # [5, B, 1, C]
    mix = [getattr(att, f"time_maa_{name}") for name in "wkvrg"]
    x_w, x_k, x_v, x_r, x_g = token_shift(now, before[:, 0], mix, dynamic=dynamic)
    linear = [att.receptance.weight, att.key.weight, att.value.weight, att.gate.weight]
    r, k, v, gate, low = products(
        [x_r, x_k, x_v, x_g, x_w],
        [*linear, att.time_decay_w1],
        [*["identity"] * 4, "tanh"],
        [*[True] * 4, False],
    )
    (decay,) = products([low], [att.time_decay_w2], ["identity"], [False])
    return _decayed(att, r, decay, k, v, gate, wkv, rows), None


def _rwkv5(att, norm, x, v_first, carried, wkv, rows):
    names = ("time_mix_r", "time_mix_k", "time_mix_v", "time_mix_g")
    shifted = _shifted(norm, x, carried, att, names, rows, of_current=True)
    linear = [att.receptance.weight, att.key.weight, att.value.weight, att.gate.weight]
    r, k, v, gate = products(shifted, linear, ["identity"] * 4, [True] * 4)
    return _decayed(att, r, None, k, v, gate, wkv, rows), None


def _decayed(att, r, decay, k, v, gate, wkv, rows):
    norm = (att.ln_x.weight, att.ln_x.bias, att.ln_x.eps)
    return rwkv6_decode(r, decay, k, v, gate, wkv, att.time_decay, att.time_faaaa, *norm, **rows)


_TIME_MIXES = {5: _rwkv5, 6: _rwkv6, 7: _rwkv7}
