"""The language model in a step of vLLM: all requests in one call, and the class for text models.

Letters: S requests of a step, T tokens of all of them, C hidden size, D directions of a scan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.models.interfaces import HasInnerState, IsAttentionFree, SupportsMambaPrefixCaching

from ..modeling_rwkv import VisualRWKVForCausalLM, VisualRWKVTextModel
from ..token_order import IN_ORDER, token_orders
from .linear import use_fast_ops_of_cpu
from .packed import dense_weights
from .parallel import add_up_parts, keep_part
from .states import BlockStates, RwkvMetadata, state_dtypes, state_shapes

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class RecurrentModel(nn.Module, HasInnerState, IsAttentionFree, SupportsMambaPrefixCaching):
    """What both architectures share: one of our models, made without weights, and a place for the states of each block.

    Attributes:
        hf: our model, with its head.
    """

    hf_class: type[PreTrainedModel]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        model_config = vllm_config.model_config
        self.dtype = model_config.dtype
        with no_init_weights():
            self.hf = self.hf_class(model_config.hf_config).eval().to(model_config.dtype)
        text = model_config.hf_config.get_text_config()
        self.states = nn.ModuleList(
            BlockStates(text, model_config.dtype, f"{prefix}.{layer}" if prefix else f"states.{layer}")
            for layer in range(text.num_hidden_layers)
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
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Read the tokens of a step, [T] or [T, C], and return the last hidden states [T, C]."""
        embeds = inputs_embeds
        if embeds is None:
            assert input_ids is not None
            embeds = self.embed_input_ids(input_ids)
        return self.read_step(embeds)

    def orders(self, num_tokens: int) -> Sequence[Tensor | None]:
        """Return the D orders in which the layers read the tokens of a step, [1, T] each; None: as they stand."""
        return [None]

    def read_step(self, embeds: Tensor) -> Tensor:
        """Read the tokens of all requests in one call, from their states in vLLM's pool, which are updated.

        Rows of `embeds` after the last token are padding of a CUDA graph; they stay as they are.

        Args:
            embeds: [T, C], the tokens of the requests one after another.
        """
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM measures how much memory a step takes
            return self.blocks.norm(self.blocks.run_blocks(embeds[None], [IN_ORDER]))[0]
        steps: list[RwkvMetadata] = [metadata[states.prefix] for states in self.states]
        step = steps[0]
        requests, prefilling = step.num_decodes + step.num_prefills, step.num_prefills > 0
        num_tokens = step.num_decode_tokens + step.num_prefill_tokens
        layers: list[BlockStates] = [*self.states]  # type: ignore[list-item]
        holders = [states.holder(own.slots[:requests]) for states, own in zip(layers, steps, strict=True)]
        tokens, order = embeds[:num_tokens], [IN_ORDER]
        if prefilling:  # all requests packed into one row
            at = torch.arange(num_tokens, device=embeds.device)[None]
            bounds = step.query_start_loc[: requests + 1].long()
            order, tokens = token_orders(at, None, list(self.orders(num_tokens)), bounds), tokens[None]
        else:  # one token of each: as many rows
            tokens = tokens[:, None]
        hidden = self.blocks.norm(self.blocks.run_blocks(tokens, order, holders)).flatten(0, 1)
        if num_tokens == len(embeds):
            return hidden
        return torch.cat([hidden, embeds[num_tokens:]])

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Return the logits of the tokens from which vLLM samples, [S, C] -> [S, vocab_size]."""
        return self.hf.lm_head(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy the weights of a folder into the model.

        transformers reads them, because some encoders are saved under other names than those of their modules. Weights
        of few bits become dense. Of several devices that share the heads each keeps its part.

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


class Rwkv(RecurrentModel):
    """A text model, such as a plain RWKV-World checkpoint becomes."""

    hf_class = VisualRWKVForCausalLM

    @property
    def blocks(self) -> VisualRWKVTextModel:
        return self.hf.model
