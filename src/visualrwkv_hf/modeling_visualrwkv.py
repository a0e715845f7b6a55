"""VisualRWKV: picture -> vision tower -> pooling -> projector -> RWKV language model (arXiv 2406.13362).

Letters: N pictures, L tokens of a picture, D channels of the vision tower, B batch, T time, C hidden size.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check

from .configuration_visualrwkv import VisualRWKVConfig
from .embedding_visualrwkv import VisualRWKVEmbeddingMixin
from .generation_visualrwkv import VisualRWKVGenerationMixin
from .image_tokens import class_token_places
from .loss_visualrwkv import loss_options
from .modeling_base import LanguageModelHead, VisualRWKVPreTrainedModel, predicts_next_token
from .modeling_rwkv import RwkvBlock, VisualRWKVTextModel, with_packed_bounds
from .modeling_vision import PROJECTORS, VisualRWKVVisionModel, pool_patches
from .scan_orders import is_identity, num_directions, sequence_orders
from .scoring_visualrwkv import VisualRWKVScoringMixin

COMPRESSOR_MULTIPLE = 16
"""Zero vectors are put before the compressor's input up to a multiple of this length, as in training."""


@dataclass
class VisualRWKVModelOutputWithPast(BaseModelOutputWithPast):
    """As the text model's output; `image_hidden_states` [sum of L, C] are the projected pictures."""

    image_hidden_states: torch.Tensor | None = None


@dataclass
class VisualRWKVCausalLMOutputWithPast(ModelOutput):
    """`loss` scalar, `logits` [B, T, vocab_size], `past_key_values`, `hidden_states`, `image_hidden_states`."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None


class VisualTokenCompressor(nn.Module):
    """Visual Token Compressor of v7.03 and v7.04: RWKV-7 blocks, every other one from the end, then fewer tokens."""

    def __init__(self, config: VisualRWKVConfig):
        super().__init__()
        self.config = config
        text = config.text_config
        self.embed_norm = nn.LayerNorm(text.hidden_size, eps=text.layer_norm_eps)
        self.layers = nn.ModuleList(
            RwkvBlock(text, layer_idx) for layer_idx in range(config.compressor_num_layers)
        )
        self.norm = nn.LayerNorm(text.hidden_size, eps=text.layer_norm_eps)

    def forward(self, tokens: torch.Tensor, num_tiles: int) -> torch.Tensor:
        """Reduce all tokens of pictures with `num_tiles` tiles each, [N, L, C], to the tokens kept, [N, L', C]."""
        return self.reduce(self.read(tokens), num_tiles)

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Apply the blocks: [N, L, C] -> [N, L, C]. The zero vectors before the tokens are read as tokens."""
        length = tokens.shape[1]
        hidden_states = self.embed_norm(F.pad(tokens, (0, 0, -length % COMPRESSOR_MULTIPLE, 0)))
        v_first: torch.Tensor | None = None
        for layer_idx, layer in enumerate(self.layers):
            backwards = layer_idx % 2 == 1
            if backwards:
                hidden_states, v_first = hidden_states.flip(1), v_first.flip(1)
            hidden_states, v_first, _ = layer(hidden_states, v_first)
            if backwards:
                hidden_states, v_first = hidden_states.flip(1), v_first.flip(1)
        return self.norm(hidden_states)[:, -length:]

    def reduce(self, tokens: torch.Tensor, num_tiles: int) -> torch.Tensor:
        """Reduce [N, L, C] to [N, L', C], with L' the configuration's `num_image_tokens_of(num_tiles)`."""
        rule = self.config.image_tokens
        if rule.reduction == "pool":
            return F.adaptive_avg_pool1d(tokens.transpose(1, 2), rule.count(num_tiles)).transpose(1, 2)
        positions = rule.positions(num_tiles)
        return tokens[:, positions.start : positions.stop : positions.step]


class VisualRWKVModel(VisualRWKVPreTrainedModel, VisualRWKVEmbeddingMixin):
    """VisualRWKV without its language-modelling head."""

    config_class = VisualRWKVConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")

    def __init__(self, config: VisualRWKVConfig):
        super().__init__(config)
        self.vision_tower = VisualRWKVVisionModel(config.vision_config)
        self.multi_modal_projector = PROJECTORS[config.projector](
            config.vision_config.hidden_size,
            config.text_config.hidden_size,
            config.text_config.layer_norm_eps,
        )
        self.compressor = VisualTokenCompressor(config) if config.compressor_num_layers else None
        self.language_model = VisualRWKVTextModel(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.language_model.embed_tokens = value

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Pool and project the tower's features: [N, L, D] -> [N, L', C]."""
        return self.multi_modal_projector(pool_patches(features, self.config))

    def compress(self, tokens: torch.Tensor, num_tiles: torch.Tensor | None) -> list[torch.Tensor]:
        """Make the tokens of each picture, N tensors [L', C], of projected tiles [sum of tiles, L, C].

        `num_tiles` [N] says how many tiles in a row belong to a picture; None: one each.
        """
        counts = [1] * len(tokens) if num_tiles is None else num_tiles.tolist()
        if sum(counts) != len(tokens):
            raise ValueError(f"num_tiles counts {sum(counts)} tiles, pixel_values holds {len(tokens)}.")
        pictures = [tiles.flatten(0, 1) for tiles in tokens.split(counts)]  # N x [tiles * L, C]
        if self.compressor is None:
            return pictures
        return [self.compressor(picture[None], count)[0] for picture, count in zip(pictures, counts)]

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor | None = None,
        num_tiles: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Return pictures as the language model reads them.

        Args:
            pixel_values: [views, 3, S, S] for the first encoder of the tower.
            num_tiles: [N] tiles of each picture, where the image processor tiles.
            kwargs: of [`VisualRWKVVisionModel.forward`]: `pixel_values_{name}` for every further encoder,
                `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `last_hidden_state` [views or pictures, L, D] of the tower, `pooler_output`: a list of N projected
            pictures [L', C], and what was asked for of the tower's `hidden_states` and `attentions`.
        """
        outputs = self.vision_tower(pixel_values, **(kwargs | {"return_dict": True}))
        features = outputs.last_hidden_state
        return BaseModelOutputWithPooling(
            last_hidden_state=features,
            pooler_output=self.compress(self.project(features), num_tiles),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor
    ) -> torch.BoolTensor:
        """Return which positions hold a picture's token, [B, T]; without ids, by the placeholder's embedding."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        placeholder = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(placeholder)).all(-1)

    def insert_images(
        self,
        inputs_embeds: torch.Tensor,
        placeholders: torch.BoolTensor,
        image_features: torch.Tensor,
    ) -> torch.Tensor:
        """Replace the placeholders [B, T] in `inputs_embeds` [B, T, C] by `image_features` [sum of L, C]."""
        found = placeholders.sum()
        torch_compilable_check(
            found == image_features.shape[0],
            lambda: (
                f"The text has {int(found)} image placeholders, the pictures give {image_features.shape[0]} tokens; "
                f"a picture of one tile takes {self.config.num_image_tokens}. Was the text cut, or are there more or "
                "fewer pictures than <image> in it?"
            ),
        )
        return inputs_embeds.masked_scatter(placeholders[..., None].to(inputs_embeds.device), image_features)

    def scan_orders(self, placeholders: torch.BoolTensor) -> tuple[torch.Tensor | None, ...] | None:
        """Return the layers' distinct orders for pictures at `placeholders` [B, T], each [B, T]; None: the text's.

        Raises:
            ValueError: if a picture does not lie whole in this sequence.
        """
        config = self.config
        height, width = config.pooled_grid
        if not height or is_trivial(config.scan):
            return None
        orders = sequence_orders(
            placeholders, config.scan, height, width, *class_token_places(config.class_token)
        )
        return self.without_identities(orders)

    def without_identities(self, orders: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """[B, D, T] -> D entries, None for those that leave every order as it is: they cost nothing then."""
        scan = self.config.scan
        if orders.shape[1] != num_directions(scan):
            raise ValueError(
                f"scan_orders has {orders.shape[1]} directions, scan {scan!r} has {num_directions(scan)}."
            )
        return tuple(
            None if is_identity(scan, direction) else order
            for direction, order in enumerate(orders.unbind(1))
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        num_tiles: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        scan_orders: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VisualRWKVModelOutputWithPast:
        """Read text and pictures.

        Args:
            input_ids: [B, T], with `config.image_token_id` once for every token of a picture.
            pixel_values: see [`~VisualRWKVModel.get_image_features`].
            num_tiles: likewise.
            attention_mask: see [`VisualRWKVTextModel.forward`].
            past_key_values: likewise.
            inputs_embeds: [B, T, C] in place of `input_ids`.
            scan_orders: [B, D, T], in which order the layers read, as `processor(..., return_scan_orders=True)`
                gives it; by default derived from the placeholders.
            mm_encoder_outputs: pictures that were encoded before, in place of the pixels.
            kwargs: `pixel_values_{name}` as for [`~VisualRWKVModel.get_image_features`]; all others are for
                [`VisualRWKVTextModel.forward`].

        Raises:
            ValueError: if pictures and placeholders do not match, or a picture is cut by the end of the sequence
                while the layers read it in different orders.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        encoded = (mm_encoder_outputs or {}).get("image")
        pixels = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("pixel_values")}
        pixels = {name: value for name, value in pixels.items() if value is not None}
        if pixel_values is not None:
            pixels["pixel_values"] = pixel_values
        if pixels and encoded is not None:
            raise ValueError("Give either pixel_values or mm_encoder_outputs, not both.")
        if pixels:
            encoded = self.get_image_features(**pixels, num_tiles=num_tiles, return_dict=True)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        image_features = None
        if encoded is not None:
            placeholders = self.get_placeholder_mask(input_ids, inputs_embeds)
            image_features = torch.cat(list(encoded.pooler_output)).to(inputs_embeds)  # [sum of L, C]
            inputs_embeds = self.insert_images(inputs_embeds, placeholders, image_features)
            orders = (
                self.scan_orders(placeholders)
                if scan_orders is None
                else self.without_identities(scan_orders)
            )
        else:
            self._refuse_empty_placeholders(input_ids)
            orders = None if scan_orders is None else self.without_identities(scan_orders)

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            scan_orders=orders,
            **kwargs,
        )
        return VisualRWKVModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            image_hidden_states=image_features,
        )

    def _refuse_empty_placeholders(self, input_ids: torch.LongTensor | None) -> None:
        """Raise `ValueError` for placeholders without a picture, which would be answered as if there were one."""
        if input_ids is None or input_ids.shape[1] == 1 or torch.compiler.is_compiling():
            return
        found = int((input_ids == self.config.image_token_id).sum())
        if found:
            raise ValueError(f"The text has {found} image placeholders, but no pixel_values were given.")


def is_trivial(scan: str) -> bool:
    """Return whether every layer reads in the order of the text."""
    return all(is_identity(scan, direction) for direction in range(num_directions(scan)))


@predicts_next_token
class VisualRWKVForConditionalGeneration(
    LanguageModelHead,
    VisualRWKVPreTrainedModel,
    VisualRWKVGenerationMixin,
    VisualRWKVScoringMixin,
    VisualRWKVEmbeddingMixin,
):
    """VisualRWKV with its language-modelling head: pictures and text in, text out.

    Example:

    ```python
    >>> from PIL import Image
    >>> from transformers import AutoProcessor
    >>> from visualrwkv_hf import VisualRWKVForConditionalGeneration

    >>> processor = AutoProcessor.from_pretrained(folder)
    >>> model = VisualRWKVForConditionalGeneration.from_pretrained(folder)
    >>> messages = [{"role": "user", "content": [
    ...     {"type": "image", "image": Image.open("cat.png")}, {"type": "text", "text": "What is this?"}]}]
    >>> inputs = processor.apply_chat_template(
    ...     messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    >>> output = model.generate(**inputs, max_new_tokens=20)
    >>> processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
    ```"""

    config_class = VisualRWKVConfig
    input_modalities = ("image", "text")
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: VisualRWKVConfig):
        super().__init__(config)
        self.model = VisualRWKVModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(
        self, pixel_values: torch.FloatTensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """See [`VisualRWKVModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        num_tiles: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        scan_orders: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VisualRWKVCausalLMOutputWithPast:
        """Return the logits [B, T, vocab_size] and, with labels, the loss.

        All pictures are encoded in one batch and all tokens are read at once. `generate()` on a CPU does it picture by
        picture and piece by piece (see [`VisualRWKVGenerationMixin`]), so its logits may differ by rounding.

        Args: see [`VisualRWKVModel.forward`] for the inputs, and [`VisualRWKVForCausalLM.forward`] for `labels`,
        `logits_to_keep`, `skip_logits` and the options of the loss: a training step whose logits would exceed 256 MiB
        returns `logits=None` by default. With a `state_store` a call for the last logits alone (`use_cache=False`, a
        tensor `logits_to_keep`, no gradients) reads only what no stored state has read.
        """
        pictures = {"pixel_values": pixel_values, "num_tiles": num_tiles}
        pictures |= {name: kwargs[name] for name in kwargs if name.startswith("pixel_values")}
        others = {name: kwargs[name] for name in kwargs if not name.startswith("pixel_values")}
        last_logits = self._last_logits_by_store(
            {"input_ids": input_ids, "attention_mask": attention_mask, **pictures},
            logits_to_keep,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            scan_orders=scan_orders,
            labels=labels,
            mm_encoder_outputs=mm_encoder_outputs,
            **others,
        )
        if last_logits is not None:
            return VisualRWKVCausalLMOutputWithPast(logits=last_logits)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        kwargs = with_packed_bounds(kwargs, tokens, attention_mask)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            num_tiles=num_tiles,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            scan_orders=scan_orders,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        logits, loss = self.logits_and_loss(
            outputs.last_hidden_state, labels, logits_to_keep, skip_logits, **loss_options(kwargs)
        )
        return VisualRWKVCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            image_hidden_states=outputs.image_hidden_states,
        )


__all__ = ["VisualRWKVForConditionalGeneration", "VisualRWKVModel", "VisualRWKVPreTrainedModel"]
