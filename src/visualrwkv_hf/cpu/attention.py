"""Attention of vision towers in bfloat16, by a CPU's instruction for it.

transformers finds the function of a layer's attention under the name in its configuration. `use_native_attention`
gives the layers of a tower another name, of a function that computes with native ops where they serve, and as "sdpa"
elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .ops import attention_bf16, unsupported
from .products import has_tiles, may_use_panels

NAME, PLAIN = "visualrwkv_native", "sdpa"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention as transformers' function "sdpa" does.

    Args:
        module: the layer.
        query: [N, H, L, D] of N pictures and H heads.
        key: likewise.
        value: likewise.
        attention_mask: None, or a mask for "sdpa".
        dropout: of the weights.
        scaling: of the scores; None is D^(-1/2).
        **kwargs: for "sdpa".

    Returns:
        [N, L, H, D], and None for the weights.
    """
    is_plain = attention_mask is None and not dropout and not any(kwargs.values())
    if is_plain and attends_natively(query, key, value):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return attention_bf16(q, k, v, scale), None
    return sdpa_attention_forward(  # type: ignore[no-any-return]
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


def attends_natively(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether `attention_bf16` computes with these, which is faster than torch where there is no AMX."""
    return (
        query.dtype == key.dtype == value.dtype == torch.bfloat16
        and query.shape == key.shape == value.shape
        and query.numel() > 0
        and may_use_panels(query)
        and not has_tiles()
        and not unsupported("attention_bf16", query, gradient=False)
    )


# At import, because a copied or unpickled model needs it as well.
ALL_ATTENTION_FUNCTIONS.register(NAME, attend)


class NativeAttentionConfig:
    """A layer's configuration, which names `attend` as its attention while the tower's own choice is "sdpa".

    Args:
        config: the tower's configuration, which does not change.
    """

    def __init__(self, config: Any):
        self._config = config

    def __getattr__(self, name: str) -> Any:
        if name == "_config" or name.startswith("__"):  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self._config, name)

    @property
    def _attn_implementation(self) -> str:
        chosen: str = self._config._attn_implementation
        return NAME if chosen == PLAIN else chosen


def use_native_attention(tower: nn.Module) -> None:
    """Let the layers of a tower find `attend`, in place. Layers that read causally, as in a text, are left out.

    SAM's layers, which do not look for a function by name, become layers of another class.
    """
    modules: list[Any] = [*tower.modules()]
    for module in modules:
        if type(module).__name__ == "SamVisionSdpaAttention" and "forward" not in module.__dict__:
            from .sam_attention import NativeSamAttention

            module.__class__ = NativeSamAttention
        config = getattr(module, "config", None)
        is_layer = getattr(module, "is_causal", None) is False and hasattr(module, "head_dim")
        if is_layer and getattr(config, "_attn_implementation", None) == PLAIN:
            module.config = NativeAttentionConfig(config)
