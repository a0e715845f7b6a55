"""VisualRWKV in vLLM: pictures and text in, text out.

Letters: T tokens of a step, C hidden size, N pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..modeling_rwkv import VisualRWKVTextModel
from ..modeling_visualrwkv import VisualRWKVForConditionalGeneration
from .language_model import RecurrentModel
from .pictures import LargestPictures, PictureInfo, PictureProcessor

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@MULTIMODAL_REGISTRY.register_processor(PictureProcessor, info=PictureInfo, dummy_inputs=LargestPictures)
class VisualRWKV(RecurrentModel, SupportsMultiModal):
    """A model that sees pictures."""

    hf_class = VisualRWKVForConditionalGeneration

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._pictures: Tensor | None = None

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        if modality != "image":
            raise ValueError(f"VisualRWKV reads pictures and text, no {modality}.")
        return "<image>"

    @property
    def blocks(self) -> VisualRWKVTextModel:
        return self.hf.model.language_model

    def get_language_model(self) -> VisualRWKVTextModel:
        return self.blocks

    def embed_multimodal(self, **inputs: Any) -> Sequence[Tensor]:
        """Return the tokens of each picture, N tensors [L, C], from the inputs of the vision tower."""
        if inputs.get("pixel_values") is None:
            return []
        pixels = {name: _joined(value) for name, value in inputs.items() if name.startswith("pixel_values")}
        tiles = inputs.get("num_tiles")
        tiles = None if tiles is None else torch.as_tensor(tiles).flatten().cpu()
        features = self.hf.get_image_features(**pixels, num_tiles=tiles, return_dict=True)
        return list(features.pooler_output)

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Sequence[Tensor] | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """Return the embeddings of a step, [T] -> [T, C], with the tokens of pictures in their places.

        Where these are is kept for the `forward` that follows: it decides in which order the layers read, and the
        ids do not tell it, since a model may also write the placeholder's id.
        """
        embeds = super().embed_input_ids(input_ids)
        self._pictures = None
        if multimodal_embeddings is None or not len(multimodal_embeddings):
            return embeds
        assert is_multimodal is not None
        self._pictures = is_multimodal = is_multimodal.to(embeds.device)
        pictures = torch.cat(list(multimodal_embeddings)).to(embeds)
        return embeds.masked_scatter(is_multimodal[:, None], pictures)

    def orders(self, num_tokens: int) -> Sequence[Tensor | None]:
        """Return the orders in which the layers read a step: pictures are whole and are permuted, text is not."""
        if self._pictures is None:
            return [None]
        return self.hf.model.scan_orders(self._pictures[None, :num_tokens]) or [None]


def _joined(pieces: Any) -> Tensor:
    """Return the views of all pictures, [sum of V, 3, S, S]; vLLM gives those of several requests as a list."""
    pieces = torch.cat(list(pieces)) if isinstance(pieces, list | tuple) else pieces
    return pieces.flatten(0, -4) if pieces.dim() > 4 else pieces
