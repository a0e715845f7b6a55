"""Pipeline parallelism: each stage computes some of the blocks and hands what it made of a step on to the next one.

The first stage has the embeddings and the vision tower besides, the last one the final norm and the head.

Letters: T tokens of a step, C hidden size, A width of the time mix, P devices that share the heads of a block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.sequence import IntermediateTensors

from ..configuration_visualrwkv import VisualRWKVTextConfig
from ..generations import GENERATIONS

BEFORE_THE_BLOCKS = ("vision_tower", "multi_modal_projector", "compressor", "embed_tokens", "embed_norm")
"""Modules that the first stage alone has."""
AFTER_THE_BLOCKS = ("norm", "lm_head")
"""Modules that the last stage alone has."""

HIDDEN_STATES, V_FIRST, PICTURES = "hidden_states", "v_first", "pictures"
"""What a stage hands on, by the names that vLLM sends it under: [T, C], [T, A] and [T], all in the model's dtype,
because every way of sending takes that."""


class Stage(NamedTuple):
    """What one process of a pipeline has of a model.

    Attributes:
        begin: number of its first block among all blocks of the model.
        end: number of the first block after it.
        is_first: whether it has what comes before the blocks.
        is_last: whether it has what comes after the blocks.
    """

    begin: int
    end: int
    is_first: bool = True
    is_last: bool = True

    @classmethod
    def of_this_process(cls, num_layers: int) -> Stage:
        """Return the stage that this process has of a model with so many blocks."""
        group = get_pp_group()
        begin, end = get_pp_indices(num_layers, group.rank_in_group, group.world_size)
        return cls(begin, end, group.is_first_rank, group.is_last_rank)

    @property
    def is_whole(self) -> bool:
        """Whether there is no other stage."""
        return self.is_first and self.is_last


def refuse_empty_stages(config: VisualRWKVTextConfig, stages: int) -> None:
    """Raise `ValueError` if one of so many stages would have no block."""
    layers = config.num_hidden_layers
    if stages > layers:
        raise ValueError(
            f"pipeline_parallel_size={stages}: each stage needs a block, and num_hidden_layers is {layers}."
        )
    bounds = [get_pp_indices(layers, stage, stages) for stage in range(stages)]
    counts = [end - begin for begin, end in bounds]
    if 0 in counts:
        raise ValueError(f"VLLM_PP_LAYER_PARTITION: each stage needs a block, got {counts}.")


def keep_stage(model: PreTrainedModel, stage: Stage) -> None:
    """Keep of a model, in place, what a stage computes with. In place of other modules it has ones that do nothing."""
    base: Any = model.model
    text = getattr(base, "language_model", base)
    text.layers = text.layers[stage.begin : stage.end]
    missing: tuple[str, ...] = () if stage.is_first else BEFORE_THE_BLOCKS
    missing += () if stage.is_last else AFTER_THE_BLOCKS
    for parent in (model, base, text):
        for name in missing:
            if getattr(parent, name, None) is not None:
                setattr(parent, name, PPMissingLayer())


def room_for(
    config: VisualRWKVTextConfig, num_tokens: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Return room for what a stage receives of a step of `num_tokens` tokens, by name, beside the pictures."""
    sizes = {HIDDEN_STATES: config.hidden_size}
    if GENERATIONS[config.rwkv_version].hands_on_values:
        sizes[V_FIRST] = config.attention_size
    return {name: torch.zeros(num_tokens, size, dtype=dtype, device=device) for name, size in sizes.items()}


def received(tensors: IntermediateTensors) -> tuple[Tensor, Tensor | None]:
    """Return the hidden states [T, C] and this device's part of v_first [T, A / P], or None, from the stage before."""
    v_first = tensors.tensors.get(V_FIRST)
    parts = get_tensor_model_parallel_world_size()
    if v_first is not None and parts > 1:
        v_first = v_first.chunk(parts, -1)[get_tensor_model_parallel_rank()].contiguous()
    return tensors[HIDDEN_STATES], v_first


def handed_on(hidden_states: Tensor, v_first: Tensor | None) -> dict[str, Tensor]:
    """Return what the next stage receives, by name, beside the pictures.

    Of several devices that share the heads, vLLM has each send a part of every tensor, as if all of them had the same.
    So `v_first` is made whole before.

    Args:
        hidden_states: [T, C].
        v_first: this device's part, [T, A / P].
    """
    if v_first is None:
        return {HIDDEN_STATES: hidden_states}
    if get_tensor_model_parallel_world_size() > 1:
        v_first = tensor_model_parallel_all_gather(v_first.contiguous())
    return {HIDDEN_STATES: hidden_states, V_FIRST: v_first}
