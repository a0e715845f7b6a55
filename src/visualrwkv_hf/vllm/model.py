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
from vllm.sequence import IntermediateTensors

from ..modeling_rwkv import VisualRWKVTextModel
from ..modeling_visualrwkv import VisualRWKVForConditionalGeneration, is_trivial
from .language_model import RecurrentModel
from .pictures import LargestPictures, PictureInfo, PictureProcessor
from .stages import HIDDEN_STATES, PICTURES

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@MULTIMODAL_REGISTRY.register_processor(PictureProcessor, info=PictureInfo, dummy_inputs=LargestPictures)
class VisualRWKV(RecurrentModel, SupportsMultiModal):
    """A model that sees pictures."""

    hf_class = VisualRWKVForConditionalGeneration

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._is_scan_trivial = is_trivial(self.hf.config.scan)
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
        """Return the tokens of each picture, N tensors [L, C], from the inputs of the vision tower.

        In a stage of a pipeline that has no vision tower they are empty: there vLLM (0.32) asks for them only to see
        how much memory they take.
        """
        if inputs.get("pixel_values") is None:
            return []
        pixels = {name: _joined(value) for name, value in inputs.items() if name.startswith("pixel_values")}
        tiles = inputs.get("num_tiles")
        tiles = None if tiles is None else torch.as_tensor(tiles).flatten().cpu()
        if not self.stage.is_first:
            views = len(pixels["pixel_values"]) // self.hf.config.vision_config.num_views
            return [torch.empty(0, 0)] * (views if tiles is None else len(tiles))
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
        if self._pictures is None or not self._pictures[:num_tokens].any():
            return [None]
        return self.hf.model.scan_orders(self._pictures[None, :num_tokens]) or [None]

    def receive(self, tensors: IntermediateTensors) -> tuple[Tensor, Tensor | None]:
        """Return the hidden states and `v_first` of a step, and keep where its pictures are.

        vLLM gives the pictures to the first stage alone.
        """
        self._pictures = None if self._is_scan_trivial else tensors[PICTURES].bool()
        return super().receive(tensors)

    def hand_on(self, hidden_states: Tensor, v_first: Tensor | None) -> IntermediateTensors:
        """Return what the next stage receives, and where the pictures are if that decides how its layers read."""
        made = super().hand_on(hidden_states, v_first)
        if not self._is_scan_trivial:
            made[PICTURES] = torch.zeros_like(hidden_states[:, 0])
            if self._pictures is not None:
                made[PICTURES][: len(self._pictures)] = self._pictures
        return made

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        """Return room for what a stage receives of a step of `batch_size` tokens."""
        room = super().make_empty_intermediate_tensors(batch_size, dtype, device)
        if not self._is_scan_trivial:
            room[PICTURES] = torch.zeros_like(room[HIDDEN_STATES][:, 0])
        return room


def _joined(pieces: Any) -> Tensor:
    """Return the views of all pictures, [sum of V, 3, S, S]; vLLM gives those of several requests as a list."""
    pieces = torch.cat(list(pieces)) if isinstance(pieces, list | tuple) else pieces
    return pieces.flatten(0, -4) if pieces.dim() > 4 else pieces
