"""The language model of VisualRWKV: RWKV-5 (x052), RWKV-6 (x060) and RWKV-7 (x070).

The equations of a generation are in its time mix (`rwkv6_time_mix.py`, `rwkv7_time_mix.py`) and in `channel_mix.py`;
`generations.py` has a row for each.

Letters: B batch, T time, S sequences (B, or the packed ones), D directions of a scan, C hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_visualrwkv import VisualRWKVCache, refuse_key_values
from .configuration_visualrwkv import VisualRWKVTextConfig
from .dispatch import accelerated_ops, chosen_backend, kernel, kernel_backend
from .embedding_visualrwkv import VisualRWKVEmbeddingMixin
from .generation_visualrwkv import VisualRWKVGenerationMixin
from .generations import GENERATIONS
from .layer_state import LayerState, StateHolder, StateUpdate
from .loss_visualrwkv import loss_options
from .modeling_base import (
    LanguageModelHead,
    VisualRWKVPreTrainedModel,
    predicts_next_token,
    refuse_output_attentions,
)
from .placement import block_devices
from .scoring_visualrwkv import VisualRWKVScoringMixin
from .token_order import IN_ORDER, TokenOrder, token_orders
from .tuned_state import TunedState

logger = logging.get_logger(__name__)


class BlockOutput(NamedTuple):
    """What a block returns.

    Attributes:
        hidden_states: [B, T, C].
        v_first: what the first block hands to all others, [B, T, A]; None where the generation hands on nothing.
        updates: the states after the last token, by name, but for those that were written in place; empty if no
            state was given. `LayerState.updated(updates)` is the new state.
    """

    hidden_states: Tensor
    v_first: Tensor | None
    updates: dict[str, StateUpdate]


class RwkvBlock(GradientCheckpointingLayer):
    """One block: x + att(ln1 x), then x + ffn(ln2 x), reading the tokens in the block's own order."""

    accelerated = False
    """Whether "auto" picks native ops for this block on a CPU: `accelerate_on_cpu` sets it."""

    def __init__(self, config: VisualRWKVTextConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        generation = GENERATIONS[config.rwkv_version]
        self.ln1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ln2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.att = generation.time_mix(config, layer_idx)
        self.ffn = generation.channel_mix(config, layer_idx)

    def __call__(self, *args, **kwargs):
        if self.gradient_checkpointing and self.training:
            kwargs["backend"] = chosen_backend()  # autograd may compute this again in a thread of its own
        return super().__call__(*args, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        v_first: Tensor | None = None,
        state: LayerState | None = None,
        token_order: TokenOrder = IN_ORDER,
        backend: str | None = None,
    ) -> BlockOutput:
        """Compute the block from plain tensors.

        Only the token shifts and the recurrence look at other tokens, so only they follow `token_order`.

        Args:
            hidden_states: [B, T, C]; [1, T, C] with packed sequences.
            v_first: as the first block returned it; None for the first block.
            state: of S sequences, rows or slots of a pool; `LayerState({})` at the start of a text. None: the block
                neither continues nor returns a state. Without gradients, a step of one token may write the WKV state
                in place.
            token_order: in which order the block reads.
            backend: what `kernel_backend` had chosen, if this may run in another thread.
        """
        chosen_elsewhere = backend not in (None, chosen_backend())
        with (
            kernel_backend(backend) if chosen_elsewhere else nullcontext(),
            accelerated_ops() if self.accelerated else nullcontext(),
        ):
            if (decode := self._decode_kernel(hidden_states, state)) and (
                decoded := decode(self, hidden_states, v_first, state, token_order)
            ):
                return BlockOutput(*decoded, {})
            mixed, v_first, updates = self.att(self.ln1(hidden_states), v_first, state, token_order)
            hidden_states = hidden_states + mixed
            mixed, v_first, more = self.ffn(self.ln2(hidden_states), v_first, state, token_order)
            hidden_states = hidden_states + mixed
        return BlockOutput(hidden_states, v_first, updates | more)

    @staticmethod
    def _decode_kernel(
        hidden_states: Tensor, state: LayerState | None
    ) -> Callable[..., tuple[Tensor, Tensor | None] | None] | None:
        """Return the kernel of a whole block for one token that follows others, without gradients, not recorded.

        It writes the states in place. It returns None where the block or its state is not as it needs them.
        """
        if hidden_states.shape[1] != 1 or state is None or state.record_past or torch.is_grad_enabled():
            return None
        return kernel("block_decode", hidden_states) if state.tensors else None


class VisualRWKVTextModel(VisualRWKVPreTrainedModel, VisualRWKVEmbeddingMixin):
    """The blocks between embedding and head. The norm after the embedding (ln0) is for text and pictures alike.

    Attributes:
        tuned_state: what every text begins with instead of zeros, see [`TunedState.attach`].
    """

    input_modalities = ("text",)
    _can_record_outputs = {"hidden_states": RwkvBlock}

    def __init__(self, config: VisualRWKVTextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(
            RwkvBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.tuned_state: TunedState | None = None
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        scan_orders: Sequence[torch.Tensor | None] | torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Read tokens, from the start of the text or continuing from a cache.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T] or [B, past + T], 0 at padding. Padding changes nothing, wherever it is.
            past_key_values: a [`VisualRWKVCache`], which is updated in place; or a [`KeptState`], which stays as it
                is: a copy of it continues and is returned.
            inputs_embeds: [B, T, C] instead of `input_ids`, before the embedding norm.
            use_cache: whether to return the state; not while training, nor of packed sequences.
            scan_orders: [B, D, T], or D entries [B, T] (None: the order of positions). Layer l reads the sequence
                in order l mod D: at position p it reads token `scan_orders[:, l % D, p]`.
            **kwargs: `output_hidden_states` and the like; of sequences packed in one row `cu_seq_lens_q` [S + 1], or
                `position_ids` [1, T] that begin anew in each, as transformers' `DataCollatorWithFlattening` makes them.

        Raises:
            ValueError: both or none of `input_ids` and `inputs_embeds`; a mask that does not fit; attention maps are
                asked for; packed sequences with a cache.
        """
        refuse_output_attentions(kwargs.get("output_attentions"))
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cu_seqlens = with_packed_bounds(kwargs, inputs_embeds, attention_mask).get("cu_seq_lens_q")
        if use_cache and past_key_values is None and cu_seqlens is None and not self.training:
            past_key_values = VisualRWKVCache(self.config)
        if hasattr(past_key_values, "to_cache"):  # a KeptState, which nothing changes: continue from a copy
            past_key_values = past_key_values.to_cache(block_devices(self), inputs_embeds.dtype)
        refuse_key_values(past_key_values)
        if cu_seqlens is not None:
            if past_key_values is not None:
                raise ValueError(
                    "Packed sequences (cu_seq_lens_q, or position_ids that begin anew) cannot continue from "
                    "past_key_values, which is one state: `run_blocks` takes and returns a state for each."
                )
            cu_seqlens = cu_seqlens.long()
        if past_key_values is not None and self.gradient_checkpointing and self.training:
            logger.warning_once(
                "Gradient checkpointing and a cache exclude each other: the cache is not used."
            )
            past_key_values = None

        length = inputs_embeds.shape[1]
        device = inputs_embeds.device  # in a model over several devices the ids may be on another one
        orders = token_orders(
            torch.arange(length, device=device).expand(inputs_embeds.shape[:2]),
            _on(device, padding_mask(attention_mask, length)),
            [_on(device, order) for order in directions_of_layers(scan_orders)],
            _on(device, cu_seqlens),
        )
        holders = None if past_key_values is None else past_key_values.layers
        if self.tuned_state is not None and (holders is None or past_key_values.is_empty):
            if cu_seqlens is not None:
                raise ValueError("Packed sequences (cu_seq_lens_q) cannot begin with a tuned state.")
            begun = self.tuned_state.holders(len(inputs_embeds), inputs_embeds.dtype, block_devices(self))
            if holders is None:
                holders = begun
            else:
                for layer, holder in zip(holders, begun):
                    layer.update(
                        0, {name: StateUpdate(t.detach()) for name, t in holder.state().tensors.items()}
                    )
        hidden_states = self.run_blocks(inputs_embeds, orders, holders)
        if past_key_values is not None:
            past_key_values.advance(length)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )

    def run_blocks(
        self,
        inputs_embeds: Tensor,
        orders: Sequence[TokenOrder],
        holders: Sequence[StateHolder] | None = None,
    ) -> Tensor:
        """Run the embedding norm and all blocks: [B, T, C] -> [B, T, C], before the final norm.

        Args:
            inputs_embeds: [B, T, C], before the embedding norm; [1, T, C] with packed sequences.
            orders: from `token_orders`; block l reads in order l mod their number.
            holders: one for each block, with the states of the S sequences; updated. None: no state is kept.
        """
        return self.run_layers(self.embed_norm(inputs_embeds), None, orders, holders)[0]

    def run_layers(
        self,
        hidden_states: Tensor,
        v_first: Tensor | None,
        orders: Sequence[TokenOrder],
        holders: Sequence[StateHolder] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the blocks in `layers`: all of a model, or those that one stage of a pipeline has.

        Args:
            hidden_states: [B, T, C], from the block before these; for the first block the normed embeddings.
            v_first: as the first block of the model returned it, [B, T, A]; None if that block is among these.
            orders: see `run_blocks`; l counts all blocks of the model.
            holders: one for each of these blocks, see `run_blocks`.

        Returns:
            The hidden states [B, T, C], and `v_first` for the blocks after these.
        """
        if (decoded := self._decoded(hidden_states, v_first, orders, holders)) is not None:
            return decoded
        layer: Any
        for place, layer in enumerate(self.layers):
            holder = None if holders is None else holders[place]
            hidden_states, v_first, updates = layer(
                hidden_states,
                v_first,
                state=None if holder is None else holder.state(),
                token_order=orders[layer.layer_idx % len(orders)],
            )
            if holder is not None:
                holder.update(hidden_states.shape[1], updates)
        return hidden_states, v_first

    def _decoded(
        self,
        hidden_states: Tensor,
        v_first: Tensor | None,
        orders: Sequence[TokenOrder],
        holders: Sequence[StateHolder] | None,
    ) -> tuple[Tensor, Tensor | None] | None:
        """Return what a kernel of all these blocks makes of one token that follows others, without gradients.

        None where there is no such kernel, or where it cannot serve these blocks or states: they run one by one then.
        """
        is_one_token = hidden_states.shape[1] == 1 and len(orders) == 1 and not torch.is_grad_enabled()
        if holders is None or not is_one_token or len(self.layers) != len(holders):
            return None
        with accelerated_ops() if all(layer.accelerated for layer in self.layers) else nullcontext():
            decode = kernel("blocks_decode", hidden_states)
        states = [holder.state() for holder in holders] if decode else []
        if decode is None or not all(state.tensors for state in states):
            return None
        decoded = decode(self.layers, hidden_states, v_first, states, orders[0])
        for holder in holders if decoded is not None else ():
            holder.update(1, {})
        return decoded


def _on(device: torch.device, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def padding_mask(attention_mask: torch.Tensor | dict | None, length: int) -> torch.Tensor | None:
    """Return which of the last `length` tokens are not padding, bool [B, T]; None if all are not.

    `attention_mask` is [B, past + length], or the dictionary that `generate()` makes of it for a compiled step.
    """
    mask = attention_mask.get("linear_attention") if isinstance(attention_mask, dict) else attention_mask
    if mask is None:
        return None
    if mask.ndim != 2:
        raise ValueError(f"attention_mask must be [B, T], got {tuple(mask.shape)}.")
    if mask.shape[1] < length:
        raise ValueError(f"attention_mask is shorter ({mask.shape[1]}) than the tokens given ({length}).")
    mask = mask[:, mask.shape[1] - length :].bool()
    # Reading the mask's values waits for a GPU: too long for a single token.
    may_look = (length > 1 or mask.device.type == "cpu") and not torch.compiler.is_compiling()
    return None if may_look and bool(mask.all()) else mask


def with_packed_bounds(
    kwargs: dict[str, Any], tokens: Tensor | None, attention_mask: Tensor | dict | None
) -> dict[str, Any]:
    """Return a model's `kwargs` with `cu_seq_lens_q`, int64 [S + 1], if `position_ids` show several packed sequences.

    A sequence begins where a position is not larger than the one before it. Positions say nothing about a batch of
    several rows, and nothing where there is padding, which has positions of its own.

    Args:
        kwargs: arguments of `forward`; returned as they are if they have `cu_seq_lens_q`.
        tokens: ids [B, T] or embeddings [B, T, C].
        attention_mask: see [`VisualRWKVTextModel.forward`].
    """
    positions = kwargs.get("position_ids")
    if positions is None or tokens is None or kwargs.get("cu_seq_lens_q") is not None:
        return kwargs
    rows, length = tokens.shape[:2]
    if rows != 1 or positions.numel() != length or padding_mask(attention_mask, length) is not None:
        return kwargs
    positions = positions.flatten()
    begins = (positions[1:] <= positions[:-1]).nonzero()[:, 0] + 1
    if not len(begins):
        return kwargs
    return kwargs | {"cu_seq_lens_q": F.pad(F.pad(begins, (1, 0)), (0, 1), value=length)}


def directions_of_layers(
    scan_orders: Sequence[torch.Tensor | None] | torch.Tensor | None,
) -> Sequence[torch.Tensor | None]:
    """Return the orders [B, T] that the layers take in turn; None is the order of positions."""
    if scan_orders is None:
        return [None]
    return scan_orders.unbind(1) if isinstance(scan_orders, torch.Tensor) else scan_orders


@predicts_next_token
class VisualRWKVForCausalLM(
    LanguageModelHead,
    VisualRWKVPreTrainedModel,
    VisualRWKVGenerationMixin,
    VisualRWKVScoringMixin,
    VisualRWKVEmbeddingMixin,
):
    """RWKV-5, 6 or 7 with a language-modelling head: what a plain RWKV-World checkpoint becomes."""

    input_modalities = ("text",)
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: VisualRWKVTextConfig):
        super().__init__(config)
        self.model = VisualRWKVTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Return the logits [B, T, vocab_size] and, with labels, the loss.

        Args:
            input_ids: see [`VisualRWKVTextModel.forward`].
            attention_mask: likewise.
            past_key_values: likewise.
            inputs_embeds: likewise.
            labels: [B, T], -100 where there is none.
            use_cache: see [`VisualRWKVTextModel.forward`].
            logits_to_keep: keep the last n positions (0: all), or those that it indexes.
            skip_logits: see [`~LanguageModelHead.logits_and_loss`]: by default a training step whose logits would
                exceed 256 MiB computes the loss in slices and returns `logits=None`.
            **kwargs: of [`VisualRWKVTextModel.forward`]; for the loss `num_items_in_batch`, `label_smoothing` and
                `shift_labels`, see [`visualrwkv_loss`].
        """
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        kwargs = with_packed_bounds(kwargs, tokens, attention_mask)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits, loss = self.logits_and_loss(
            outputs.last_hidden_state, labels, logits_to_keep, skip_logits, **loss_options(kwargs)
        )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


__all__ = [
    "VisualRWKVForCausalLM",
    "VisualRWKVPreTrainedModel",
    "VisualRWKVTextModel",
]
