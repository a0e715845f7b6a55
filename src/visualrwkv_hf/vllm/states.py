"""The states of the layers in vLLM's pool: where they lie, which slot a request has, and how a slot begins.

Letters: S requests of a step, N slots of the pool, T tokens of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backends.linear_attn import (
    LinearAttentionBackend,
    LinearAttentionMetadata,
    LinearAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from ..configuration_visualrwkv import VisualRWKVTextConfig
from ..generations import GENERATIONS
from ..layer_state import LayerState, PlainStateHolder, StateSpec
from .plugin import BACKEND


def state_specs(config: VisualRWKVTextConfig) -> tuple[StateSpec, ...]:
    """Return the states of a layer, in the order in which vLLM's pool keeps them."""
    return GENERATIONS[config.rwkv_version].states


def state_shapes(config: VisualRWKVTextConfig, parts: int = 1) -> tuple[tuple[int, ...], ...]:
    """Return the shape of each state of a layer, of one request, on one of `parts` devices that share the heads."""

    def size(name: str) -> int:
        return getattr(config, name) // (parts if name == "num_attention_heads" else 1)

    return tuple(tuple(map(size, spec.sizes)) for spec in state_specs(config))


def state_dtypes(config: VisualRWKVTextConfig, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Return the dtype of each state: tokens have the model's `dtype`, matrices are float32."""
    return tuple(dtype if len(shape) == 1 else torch.float32 for shape in state_shapes(config))


@dataclass
class RwkvMetadata(LinearAttentionMetadata):
    """What a layer must know of a step, beside vLLM's fields.

    `slots`: the slot of each request, int64 [S]. In a replayed CUDA graph they lie where they lay at its capture.
    """

    slots: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


class RwkvMetadataBuilder(LinearAttentionMetadataBuilder):
    """Makes the metadata of a step, and empties the slots of the requests that begin in it.

    Slots are emptied here and not in the model, because a replayed CUDA graph runs no Python, and a prompt of one
    token is a decode step for vLLM.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        layers = self.vllm_config.compilation_config.static_forward_context
        self.states: list[BlockStates] = [layers[name] for name in self.layer_names]
        self.slots = torch.zeros(
            self.vllm_config.scheduler_config.max_num_seqs, dtype=torch.int64, device=self.device
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> RwkvMetadata:
        """Return the metadata of a step."""
        made = super().build(common_prefix_len, common_attn_metadata, fast_build)
        slots = made.state_indices_tensor
        if len(slots) > len(self.slots):  # a step for profiling
            self.slots = self.slots.new_zeros(len(slots))
        self.slots[: len(slots)].copy_(slots, non_blocking=True)
        self._empty_fresh(common_attn_metadata, slots)
        values = {one.name: getattr(made, one.name) for one in fields(made)}
        return RwkvMetadata(**values, slots=self.slots[: len(slots)])

    def _empty_fresh(self, common: Any, slots: Tensor) -> None:
        """Write zeros into the slots of the requests of which nothing has been read."""
        lengths = common.seq_lens_cpu_upper_bound  # exact for requests that read their prompt
        if lengths is None:
            lengths = common.seq_lens.cpu()
        begin = common.query_start_loc_cpu
        new = begin[1:] - begin[:-1]  # [S]
        fresh = ((lengths[: len(new)] == new) & (new > 0)).nonzero()[:, 0]
        if len(fresh):
            index = slots[fresh.to(slots.device)].long()
            for states in self.states:
                states.empty(index)


class RwkvBackend(LinearAttentionBackend):
    """The kind of state that RWKV layers have; vLLM asks it how the metadata of a step are made."""

    @staticmethod
    def get_name() -> str:
        return BACKEND

    @staticmethod
    def get_builder_cls() -> type[RwkvMetadataBuilder]:
        return RwkvMetadataBuilder


class BlockStates(nn.Module, MambaBase):
    """The states of one block for all requests: vLLM allocates them and fills `kv_cache` with pools [N, ...]."""

    def __init__(self, config: VisualRWKVTextConfig, dtype: torch.dtype, prefix: str):
        super().__init__()
        engine = get_current_vllm_config()
        self.names = [spec.name for spec in state_specs(config)]
        self.shapes = state_shapes(config, engine.parallel_config.tensor_parallel_size)
        self.dtypes = state_dtypes(config, dtype)
        self.prefix = prefix
        self.kv_cache = tuple(torch.empty(0) for _ in self.shapes)
        layers = engine.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"Two blocks of this engine would keep their states as {prefix!r}.")
        layers[prefix] = self

    def get_state_shape(self) -> Sequence[tuple[int, ...]]:
        return self.shapes

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return self.dtypes

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum[BACKEND]

    def empty(self, slots: Tensor) -> None:
        """Write zeros into these slots, int64 [n]."""
        for pool in self.kv_cache:
            pool.index_fill_(0, slots, 0)

    def scratch(self, slots: int, device: torch.device) -> PlainStateHolder:
        """Return a holder of zero states [slots, ...] that lie outside vLLM's pool."""
        made = {
            name: torch.zeros(slots, *shape, dtype=dtype, device=device)
            for name, shape, dtype in zip(self.names, self.shapes, self.dtypes)
        }
        return PlainStateHolder(LayerState(made, indices=torch.arange(slots, device=device)))

    def holder(self, slots: Tensor) -> PlainStateHolder:
        """Return a holder of the states in `slots`, int64 [S], which the block reads and writes."""
        return PlainStateHolder(LayerState(dict(zip(self.names, self.kv_cache)), indices=slots))
