"""Attention of SAM's tower without the scores' bias for each pair of tokens, which takes most of its memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.sam.modeling_sam import SamVisionSdpaAttention

from .attention import attends_natively
from .ops import attention_bf16
from .products import may_use_panels

BIAS_BYTES = 1 << 24
"""How large the bias of the queries that are computed together may become.

C's library takes memory for larger tensors from the system anew each time, which is slow.
"""


class NativeSamAttention(SamVisionSdpaAttention):
    """Compute SAM's attention, whose scores have a bias for the row and one for the column of a key.

    transformers adds them up for each pair of tokens first: with 4,096 tokens and 12 heads that takes 400 MB in
    bfloat16, 800 MB in float32, and more time than the products. Here they are added as the scores of a query are
    computed, in bfloat16 by the CPU's instruction for it, and otherwise for some queries at a time.
    """

    def forward(self, hidden_states: Tensor, output_attentions: bool | None = False) -> tuple[Tensor, None]:
        """[N, height, width, C] -> [N, height, width, C], and None for the weights."""
        (N, height, width, _), H = hidden_states.shape, self.num_attention_heads
        is_usual = self.use_rel_pos and not output_attentions and not self.training and bool(N)
        if not is_usual or not may_use_panels(hidden_states):
            return super().forward(hidden_states, output_attentions)
        qkv = self.qkv(hidden_states).view(N, height * width, 3, H, -1)
        q, k, v = qkv.unbind(2)  # [N, L, H, D]
        maps = q.transpose(1, 2).reshape(N * H, height, width, -1)
        rows = self.get_rel_pos(height, height, self.rel_pos_h)  # [height, height, D]
        columns = self.get_rel_pos(width, width, self.rel_pos_w)
        across = torch.einsum("nhwd,hkd->nhwk", maps, rows).reshape(N, H, height * width, height)
        along = torch.einsum("nhwd,wkd->nhwk", maps, columns).reshape(N, H, height * width, width)
        if attends_natively(q, k, v):
            out = attention_bf16(q, k, v, q.shape[-1] ** -0.5, across, along)
        else:
            out = attention_by_parts(q, k, v, across, along)
        return self.proj(out.reshape(N, height, width, -1)), None


def attention_by_parts(q: Tensor, k: Tensor, v: Tensor, across: Tensor, along: Tensor) -> Tensor:
    """Compute softmax(D^(-1/2) q k^T + bias) v in torch, for as many queries at a time as `BIAS_BYTES` allows.

    Args:
        q: [N, L, H, D].
        k: likewise.
        v: likewise.
        across: a bias of each query to each row of a map of keys, [N, H, L, rows] with L = rows * columns.
        along: a bias to each column, [N, H, L, columns].

    Returns:
        [N, L, H, D].
    """
    N, L, H, _ = q.shape
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))  # [N, H, L, D]
    out = torch.empty_like(q)
    some = max(1, BIAS_BYTES // (N * H * L * q.element_size()))
    for start in range(0, L, some):
        part = slice(start, start + some)
        bias = (across[:, :, part, :, None] + along[:, :, part, None, :]).flatten(3)  # [N, H, part, L]
        out[:, :, part] = F.scaled_dot_product_attention(q[:, :, part], k, v, attn_mask=bias)
    return out.transpose(1, 2)
