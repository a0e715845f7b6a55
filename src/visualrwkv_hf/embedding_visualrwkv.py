"""`embed()`: one vector for what a model has read, a picture, a text or both.

Letters: B samples, T tokens, C hidden size, H heads, K = V size of a head, L number of layers.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .cache_visualrwkv import VisualRWKVCache
from .layer_state import WKV
from .placement import compute_device, text_model_of
from .reading_plan import mask_of

Pooling = Literal["last", "mean", "state"]


def last_token(hidden_states: Tensor, mask: Tensor) -> Tensor:
    """Return the hidden state of the last token that is not padding: [B, T, C], [B, T] -> [B, C]."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * positions).argmax(1)  # [B]
    return hidden_states[torch.arange(len(last), device=last.device), last]


def mean_of_tokens(hidden_states: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the hidden states of all tokens that are not padding: [B, T, C], [B, T] -> [B, C]."""
    # where(): what is computed at padding may be anything, and 0 * inf is not 0
    kept = torch.where(mask[..., None], hidden_states, 0)
    return kept.sum(1) / mask.sum(1, keepdim=True)


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"last": last_token, "mean": mean_of_tokens}
"""How hidden states become one vector; "state" reads the recurrent state instead."""


class VisualRWKVEmbeddingMixin:
    """`embed()`, for a model of this package that reads tokens, with or without a head."""

    config: Any
    base_model: Any
    training: bool

    def embed(
        self,
        inputs: Mapping[str, Any],
        *,
        pooling: Pooling = "last",
        layer: int = -1,
        normalize: bool = True,
    ) -> Tensor:
        """Return one vector for each sample. Gradients are computed as in `forward`: use `torch.no_grad()`.

        ```python
        inputs = processor(images=pictures, text=[processor.image_token] * len(pictures), return_tensors="pt")
        with torch.no_grad():
            vectors = model.embed(inputs)  # float32 [B, C]
        ```

        No release was trained to give embeddings. Padding changes no vector, on whichever side it is.

        Args:
            inputs: the model's inputs as the processor or the tokenizer makes them: `input_ids` [B, T] with or
                without an `attention_mask` and pictures.
            pooling: "last", the hidden state of the last token, which has read all others; "mean", the mean of the
                hidden states of all tokens, those of pictures included; "state", the WKV state of a layer after the
                last token.
            layer: which hidden states, by the number of blocks that have computed them, as in `hidden_states` of a
                forward: 1 to L, or 0 for the embeddings; L or -1 is after the final norm. For "state" 1 to L, the
                block whose state is taken.
            normalize: whether to divide each vector by its Euclidean norm, so that the product of two is their cosine.

        Returns:
            float32 [B, C]; for "state" [B, H K V], 64 C in the released models.

        Raises:
            ValueError: an unknown pooling, no such layer, no `input_ids`, or a sample without tokens.
        """
        number = self._layer_number(layer, pooling)
        device = compute_device(self)
        tensors = {name: tensor.to(device) for name, tensor in inputs.items() if isinstance(tensor, Tensor)}
        mask = _real_tokens(tensors)
        if pooling == "state":
            if self.training and text_model_of(self).gradient_checkpointing:
                raise ValueError(
                    "pooling='state' reads a cache, which gradient checkpointing excludes: call model.eval()."
                )
            cache = VisualRWKVCache(self.config)
            self.base_model(**tensors, past_key_values=cache, use_cache=True)
            vectors = cache.layer_tensors()[number - 1][WKV].flatten(1)
        else:
            is_last = number == self.config.get_text_config(decoder=True).num_hidden_layers
            outputs = self.base_model(**tensors, use_cache=False, output_hidden_states=not is_last)
            hidden = outputs.last_hidden_state if is_last else outputs.hidden_states[number]
            vectors = POOLINGS[pooling](hidden.float(), mask.to(hidden.device))
        return F.normalize(vectors, dim=-1) if normalize else vectors

    def _layer_number(self, layer: int, pooling: str) -> int:
        """Return the number of blocks up to `layer`, 0 to L.

        Raises:
            ValueError: there is no such layer, or no such pooling.
        """
        if pooling not in (*POOLINGS, "state"):
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, state, got {pooling!r}.")
        count = self.config.get_text_config(decoder=True).num_hidden_layers
        number = layer + count + 1 if layer < 0 else layer
        least = 1 if pooling == "state" else 0
        if not least <= number <= count:
            raise ValueError(
                f"layer must be {least} to {count}, or -1 for the last, with pooling {pooling!r}, got {layer}."
            )
        return number


def _real_tokens(inputs: Mapping[str, Tensor]) -> Tensor:
    """Return which tokens are not padding, bool [B, T].

    Raises:
        ValueError: there are no `input_ids` [B, T], or a sample has no tokens.
    """
    ids = inputs.get("input_ids")
    if ids is None or ids.ndim != 2:
        raise ValueError(
            "embed() needs input_ids [B, T], as the processor makes them with return_tensors='pt'; the text of a "
            "picture alone is processor.image_token."
        )
    mask = mask_of(ids, inputs.get("attention_mask"))
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    lengths = mask.sum(1)
    if not ids.numel() or bool((lengths == 0).any()):
        raise ValueError(f"Every sample needs a token to be embedded, the samples have {lengths.tolist()}.")
    return mask


__all__ = ["VisualRWKVEmbeddingMixin"]
