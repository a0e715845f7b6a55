"""Attention of SAM's tower in bfloat16, by a CPU's instruction for it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.sam.modeling_sam import SamVisionSdpaAttention

from .attention import attends_natively
from .ops import attention_bf16


class NativeSamAttention(SamVisionSdpaAttention):
    """Compute SAM's attention, whose scores have a bias for the row and one for the column of a key.

    transformers adds them up for each pair of tokens first: with 4,096 tokens and 12 heads that takes 400 MB and more
    time than the products. Here they are added as the scores of a query are computed.
    """

    def forward(self, hidden_states: Tensor, output_attentions: bool | None = False) -> tuple[Tensor, None]:
        """[N, height, width, C] -> [N, height, width, C], and None for the weights."""
        (N, height, width, _), H = hidden_states.shape, self.num_attention_heads
        if output_attentions or not self.use_rel_pos or self.training:
            return super().forward(hidden_states, output_attentions)
        heads = hidden_states.reshape(N, height * width, H, -1)
        if not attends_natively(heads, heads, heads):
            return super().forward(hidden_states, output_attentions)
        qkv = self.qkv(hidden_states).view(N, height * width, 3, H, -1)
        q, k, v = qkv.unbind(2)  # [N, L, H, D]
        maps = q.transpose(1, 2).reshape(N * H, height, width, -1)
        rows = self.get_rel_pos(height, height, self.rel_pos_h)  # [height, height, D]
        columns = self.get_rel_pos(width, width, self.rel_pos_w)
        across = torch.einsum("nhwd,hkd->nhwk", maps, rows).reshape(N, H, height * width, height)
        along = torch.einsum("nhwd,wkd->nhwk", maps, columns).reshape(N, H, height * width, width)
        out = attention_bf16(q, k, v, q.shape[-1] ** -0.5, across, along)
        return self.proj(out.view(N, height, width, -1)), None
