"""Pictures in vLLM: from a request to the inputs of the vision tower, and how many tokens a picture takes.

Letters: N pictures, S pixels of a side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

from ..configuration_visualrwkv import VisualRWKVConfig
from ..pictures import to_rgb

LARGEST_SIDE = 2048
"""Sides of the largest picture, in pixels, for which vLLM reserves memory where a picture is cut into more tiles the
larger it is."""


def max_picture_tokens(model_config: Any) -> int:
    """Return how many tokens the largest picture takes, see `LARGEST_SIDE`."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    return MULTIMODAL_REGISTRY.create_processor(model_config).info.max_picture_tokens()


class PictureParser(MultiModalDataParser):
    """vLLM's parser, which gets pictures in RGB as this package makes them so.

    vLLM (0.32) would blend transparent pictures onto white, and clip grey of 16 bits.
    """

    def _parse_image_data(self, data: Any) -> Any:
        pictures = [data] if isinstance(data, Image.Image) else data
        if isinstance(pictures, list | tuple):
            pictures = [to_rgb(one) if isinstance(one, Image.Image) else one for one in pictures]
        return super()._parse_image_data(pictures)


class PictureInfo(BaseProcessingInfo):
    """What vLLM asks about a model's pictures."""

    def get_hf_config(self) -> VisualRWKVConfig:
        return self.ctx.get_hf_config(VisualRWKVConfig)

    def get_data_parser(self) -> MultiModalDataParser:
        return PictureParser(
            expected_hidden_size=self._get_expected_hidden_size(),
            allow_missing_mm_embeddings=self.allow_missing_mm_embeddings,
        )

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.max_picture_tokens()}

    def max_picture_tokens(self) -> int:
        """Return how many tokens the largest picture takes."""
        return self.get_hf_config().num_image_tokens_of(self.num_tiles(LARGEST_SIDE, LARGEST_SIDE))

    def num_tiles(self, height: int, width: int) -> int:
        """Return how many tiles with tokens of their own a picture of this size is cut into."""
        count = getattr(self.get_hf_processor().image_processor, "get_number_of_image_patches", None)
        return 1 if count is None else count(height, width, {})


class LargestPictures(BaseDummyInputsBuilder[PictureInfo]):
    """Makes the pictures with which vLLM measures how much memory a step takes."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return self.info.get_hf_processor().image_token * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> dict:
        images = self._get_dummy_images(
            width=LARGEST_SIDE,
            height=LARGEST_SIDE,
            num_images=mm_counts.get("image", 0),
            overrides=(mm_options or {}).get("image"),
        )
        return {"image": images}


class PictureProcessor(BaseMultiModalProcessor[PictureInfo]):
    """Runs our processor on the pictures of a request, and puts each one's placeholders into the prompt."""

    def _get_hf_mm_text(self, mm_counts: Mapping[str, int]) -> str:
        return self.dummy_inputs.get_dummy_text(mm_counts)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        """Say which part of each tensor belongs to a picture: as many views, or tiles, as it was cut into."""
        vision = self.info.get_hf_config().vision_config
        names = [name for name in vision.pixel_inputs.values() if name in hf_inputs]
        if not names:
            return {}
        pieces = hf_inputs.get("num_tiles")
        if pieces is None:
            count = len(hf_inputs[names[0]]) // vision.num_views
            pieces = torch.full((count,), vision.num_views)
        config = {name: MultiModalFieldConfig.flat_from_sizes("image", pieces) for name in names}
        if "num_tiles" in hf_inputs:
            config["num_tiles"] = MultiModalFieldConfig.batched("image")
        return config

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        config = self.info.get_hf_config()

        def placeholders(number: int) -> list[int]:
            item = out_mm_kwargs["image"][number]
            num_tiles = int(item["num_tiles"].data) if "num_tiles" in item else 1
            return [config.image_token_id] * config.num_image_tokens_of(num_tiles)

        return [PromptReplacement(modality="image", target=[config.image_token_id], replacement=placeholders)]
