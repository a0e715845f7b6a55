"""The language model in a step of vLLM: all requests in one call, and the class for text models.

Letters: S requests of a step, T tokens of all of them, C hidden size, D directions of a scan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.models.interfaces import (
    HasInnerState,
    IsAttentionFree,
    SupportsMambaPrefixCaching,
    SupportsPP,
)
from vllm.sequence import IntermediateTensors

from ..layer_state import StateHolder
from ..modeling_rwkv import VisualRWKVForCausalLM, VisualRWKVTextModel
from ..token_order import IN_ORDER, TokenOrder, token_orders
from .linear import use_fast_ops_of_cpu
from .packed import dense_weights
from .parallel import add_up_parts, keep_part
from .stages import Stage, handed_on, keep_stage, received, room_for
from .states import BlockStates, RwkvMetadata, state_dtypes, state_shapes

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class RecurrentModel(nn.Module, HasInnerState, IsAttentionFree, SupportsMambaPrefixCaching, SupportsPP):
    """What both architectures share: one of our models, made without weights, and a place for the states of each block.

    Attributes:
        stage: which part of the model this process has.
        hf: this part of our model.
    """

    hf_class: type[PreTrainedModel]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        model_config = vllm_config.model_config
        self.dtype = model_config.dtype
        text = model_config.hf_config.get_text_config()
        self.stage = Stage.of_this_process(text.num_hidden_layers)
        self.max_num_seqs = vllm_config.scheduler_config.max_num_seqs
        device = torch.get_default_device()
        # All of a model may be more than a device holds. Memory of the CPU that nobody writes to takes no place.
        with no_init_weights(), nullcontext() if self.stage.is_whole else torch.device("cpu"):
            hf = self.hf_class(model_config.hf_config).eval()
        keep_stage(hf, self.stage)
        self.hf = hf.to(device, model_config.dtype)
        self.states = nn.ModuleList(
            BlockStates(text, model_config.dtype, f"{prefix}.{layer}" if prefix else f"states.{layer}")
            for layer in range(self.stage.begin, self.stage.end)
        )

    @property
    def blocks(self) -> VisualRWKVTextModel:
        """The language model without its head."""
        raise NotImplementedError

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings of tokens, [T] -> [T, C]."""
        return self.hf.get_input_embeddings()(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | IntermediateTensors:
        """Read the tokens of a step, [T] or [T, C], and return the last hidden states [T, C].

        A stage of a pipeline that is not the first one reads what the one before has made of the tokens, and one that
        is not the last one returns what the next one reads.
        """
        if intermediate_tensors is not None:
            hidden_states, v_first = self.receive(intermediate_tensors)
        elif inputs_embeds is not None:
            hidden_states, v_first = inputs_embeds, None
        else:
            assert input_ids is not None
            hidden_states, v_first = self.embed_input_ids(input_ids), None
        hidden_states, v_first = self.read_step(hidden_states, v_first)
        return hidden_states if self.stage.is_last else self.hand_on(hidden_states, v_first)

    def receive(self, tensors: IntermediateTensors) -> tuple[Tensor, Tensor | None]:
        """Return the hidden states and `v_first` of a step from the stage before, see `read_step`."""
        return received(tensors)

    def hand_on(self, hidden_states: Tensor, v_first: Tensor | None) -> IntermediateTensors:
        """Return what the next stage receives."""
        return IntermediateTensors(handed_on(hidden_states, v_first))

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        """Return room for what a stage receives of a step of `batch_size` tokens."""
        return IntermediateTensors(room_for(self.hf.config.get_text_config(), batch_size, dtype, device))

    def orders(self, num_tokens: int) -> Sequence[Tensor | None]:
        """Return the D orders in which the layers read the tokens of a step, [1, T] each; None: as they stand."""
        return [None]

    def read_step(self, hidden_states: Tensor, v_first: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Read the tokens of all requests in one call, from their states in vLLM's pool, which are updated.

        Rows after the last token are padding of a CUDA graph; nobody reads what is returned for them.

        Args:
            hidden_states: [T, C], the tokens of the requests one after another: their embeddings in the first stage.
            v_first: what the first block of RWKV-7 hands to all others, [T, A]; None in the first stage.

        Returns:
            Both after the blocks of this stage.
        """
        metadata = get_forward_context().attn_metadata or {}
        if self.states[0].prefix not in metadata:  # vLLM warms up, or measures how much memory a step takes
            return self.warm_up(hidden_states, v_first)
        steps: list[RwkvMetadata] = [metadata[states.prefix] for states in self.states]
        step = steps[0]
        requests, prefilling = step.num_decodes + step.num_prefills, step.num_prefills > 0
        num_tokens = step.num_decode_tokens + step.num_prefill_tokens
        layers: list[BlockStates] = [*self.states]  # type: ignore[list-item]
        holders = [states.holder(own.slots[:requests]) for states, own in zip(layers, steps, strict=True)]
        order, at = [IN_ORDER], 1  # one token of each request: as many rows
        if prefilling:  # all requests packed into one row
            bounds = step.query_start_loc[: requests + 1].long()
            order, at = packed_orders(self.orders(num_tokens), bounds, num_tokens), 0
        tokens = hidden_states[:num_tokens].unsqueeze(at)
        values = None if v_first is None else v_first[:num_tokens].unsqueeze(at)
        return _flat(*self.run_blocks(tokens, values, order, holders), len(hidden_states))

    def warm_up(self, hidden_states: Tensor, v_first: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Read the tokens of a step as prompts of as many requests as there may be, without the pool; see `read_step`.

        A step with prompts gathers the states of all its requests, one layer after another: vLLM measures these too.
        The layers share the states of one, because their values do not matter.
        """
        length, device = len(hidden_states), hidden_states.device
        requests = min(self.max_num_seqs, length)
        layer: Any = self.states[0]
        holders = [layer.scratch(requests, device)] * len(self.states)
        bounds = torch.arange(requests + 1, device=device) * length // requests
        values = None if v_first is None else v_first[None]
        order = packed_orders([None], bounds, length)
        return _flat(*self.run_blocks(hidden_states[None], values, order, holders), length)

    def run_blocks(
        self,
        hidden_states: Tensor,
        v_first: Tensor | None,
        orders: Sequence[TokenOrder],
        holders: Sequence[StateHolder] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the blocks of this stage, see `VisualRWKVTextModel.run_layers`, and the norms that it has."""
        blocks = self.blocks
        hidden_states, v_first = blocks.run_layers(blocks.embed_norm(hidden_states), v_first, orders, holders)
        return blocks.norm(hidden_states), v_first

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Return the logits of the tokens from which vLLM samples, [S, C] -> [S, vocab_size]."""
        return self.hf.lm_head(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy the weights of a folder into the model.

        transformers reads them, because some encoders are saved under other names than those of their modules. Weights
        of few bits become dense. Each of several devices that share the heads keeps its part, and so does each stage of
        a pipeline.

        Raises:
            ValueError: the folder lacks tensors of the model, has others or has some of another shape, or holds NaN
                or infinite weights.
        """
        config = self.hf.config
        try:
            loaded = self.hf_class.from_pretrained(
                None, config=config, state_dict=dense_weights(weights), dtype=self.dtype
            )
        except ValueError as error:
            raise ValueError(str(error).replace("None", "The folder", 1)) from error
        keep_stage(loaded, self.stage)
        self.hf.load_state_dict(loaded.state_dict())
        del loaded
        parts = get_tensor_model_parallel_world_size()
        if parts > 1:
            keep_part(self.blocks.layers, get_tensor_model_parallel_rank(), parts)
        if self.hf.device.type == "cpu":
            use_fast_ops_of_cpu(self.hf, whole_blocks=parts == 1)
        if parts > 1:
            add_up_parts(self.blocks.layers)
        return {name for name, _ in self.named_parameters()}

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        parts = vllm_config.parallel_config.tensor_parallel_size
        return state_shapes(vllm_config.model_config.hf_config.get_text_config(), parts)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        config = vllm_config.model_config
        return state_dtypes(config.hf_config.get_text_config(), config.dtype)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Callable, ...]:
        """Return how prefix caching copies each state of a layer: whole, for tokens and matrices alike."""
        return (get_temporal_copy_spec,) * 3


def packed_orders(orders: Sequence[Tensor | None], bounds: Tensor, num_tokens: int) -> list[TokenOrder]:
    """Return `orders` of T tokens for requests packed into one row, where request s has bounds[s] to bounds[s + 1]."""
    positions = torch.arange(num_tokens, device=bounds.device)[None]
    return token_orders(positions, None, orders, bounds)


def _flat(hidden_states: Tensor, v_first: Tensor | None, length: int) -> tuple[Tensor, Tensor | None]:
    """Return rows of tokens one after another, and padding: [B, T, C] -> [length, C], and `v_first` likewise."""

    def flat(x: Tensor) -> Tensor:
        x = x.flatten(0, 1)
        return x if len(x) == length else nn.functional.pad(x, (0, 0, 0, length - len(x)))

    return flat(hidden_states), None if v_first is None else flat(v_first)


class Rwkv(RecurrentModel):
    """A text model, such as a plain RWKV-World checkpoint becomes."""

    hf_class = VisualRWKVForCausalLM

    @property
    def blocks(self) -> VisualRWKVTextModel:
        return self.hf.model
