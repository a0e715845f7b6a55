"""transformers' common tests of models, on text models of each generation and on VLMs with one and three encoders.

Beside the tests of models and configurations these are a training until a batch is known by heart, tensor parallelism,
and what happens around generation.
"""

import unittest
from collections.abc import Callable

import torch
from tiny import text_config, vlm_config
from transformers_tests import load, without

from visualrwkv_hf import (
    VisualRWKVConfig,
    VisualRWKVForCausalLM,
    VisualRWKVForConditionalGeneration,
    VisualRWKVModel,
    VisualRWKVTextConfig,
    VisualRWKVTextModel,
)

ModelTesterMixin = load("test_modeling_common").ModelTesterMixin
ConfigTester = load("test_configuration_common").ConfigTester
TrainingTesterMixin = load("test_training_mixin").TrainingTesterMixin
TensorParallelTesterMixin = load("test_tensor_parallel_mixin").TensorParallelTesterMixin

REFUSED = (
    "from_pretrained refuses a checkpoint that lacks tensors, where transformers initialises them and warns."
)

INAPPLICABLE: dict[str, str] = {
    "test_correct_missing_keys": REFUSED,
    "test_model_weights_reload_no_missing_tied_weights": REFUSED,
    "test_generation_tester_mixin_inheritance": "The sdist lacks the generation tests; a stand-in takes their place.",
}
"""Common test -> why it does not apply. The tensor-parallel tests skip themselves: there is no plan, see the docs."""


IMAGE = 5
"""The image placeholder: a small id, because tests that shrink the vocabulary cut larger ones."""


class TextTester:
    """Configurations and inputs of a text model. Attributes are read by the common tests."""

    batch_size, seq_length, is_training = 3, 7, True
    vocab_size, hidden_size, num_hidden_layers = 320, 64, 2
    causal_lm_class = VisualRWKVForCausalLM

    def __init__(self, parent: unittest.TestCase, version: int):
        self.parent, self.version = parent, version

    def get_config(self) -> VisualRWKVTextConfig:
        return text_config(self.version, num_hidden_layers=self.num_hidden_layers)

    def prepare_config_and_inputs_for_common(self) -> tuple:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(IMAGE + 1, 300, (self.batch_size, self.seq_length), generator=generator)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class PictureTester(TextTester):
    """Configurations and inputs of a VLM: one picture in each text."""

    def __init__(self, parent: unittest.TestCase, version: int, vision: dict):
        super().__init__(parent, version)
        self.vision = vision
        config = self.get_config()
        self.seq_length = config.num_image_tokens + 6

    def get_config(self) -> VisualRWKVConfig:
        text = text_config(self.version, num_hidden_layers=self.num_hidden_layers)
        return vlm_config(text_config=text.to_dict(), vision_config=self.vision, image_token_id=IMAGE)

    def prepare_config_and_inputs_for_common(self) -> tuple:
        config, inputs = super().prepare_config_and_inputs_for_common()
        inputs["input_ids"][:, 2 : 2 + config.num_image_tokens] = config.image_token_id
        generator = torch.Generator().manual_seed(1)
        for name, size in pixel_sizes(config).items():
            inputs[name] = torch.randn(self.batch_size, 3, size, size, generator=generator)
        return config, inputs


PIXELS = {
    "clip": "pixel_values",
    "siglip": "pixel_values",
    "dinov2": "pixel_values",
    "sam": "pixel_values_sam",
}


def pixel_sizes(config: VisualRWKVConfig) -> dict[str, int]:
    """Return the name of each encoder's pixels and their size."""
    encoders, sizes = config.vision_config.encoders, {}
    for name, encoder in encoders.items():
        pixels = "pixel_values_siglip" if name == "siglip" and len(encoders) > 1 else PIXELS[name]
        sizes[pixels] = encoder.image_size
    return sizes


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = {"clip_config": {**SIZES, "intermediate_size": 24, "image_size": 28, "patch_size": 14}}
SIGLIP = {"siglip_config": {**SIZES, "intermediate_size": 24, "image_size": 32, "patch_size": 16}}
SAM = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_dim": 16,
    "output_channels": 4,
}
SAM |= {"image_size": 32, "patch_size": 8, "window_size": 2, "global_attn_indexes": [1]}
THREE = {
    "dinov2_config": {**SIZES, "mlp_ratio": 2, "image_size": 28, "patch_size": 14},
    **SIGLIP,
    "sam_config": SAM,
}


def common_tests(
    tester: Callable[[unittest.TestCase], TextTester],
    config_class: type,
    *model_classes: type,
    inapplicable: dict[str, str] | None = None,
) -> type:
    """Return a test class that runs the common tests on these model classes, but for the inapplicable ones."""

    class CommonTests(ModelTesterMixin, TrainingTesterMixin, TensorParallelTesterMixin, unittest.TestCase):
        all_model_classes = model_classes
        model_tester = None  # abstract in the mixins
        has_attentions = False
        _is_composite = config_class is VisualRWKVConfig

        def setUp(self):
            common_properties = (
                ["image_token_id"] if self._is_composite else ["hidden_size", "num_hidden_layers"]
            )
            self.model_tester = tester(self)
            self.config_tester = ConfigTester(
                self, config_class=config_class, has_text_modality=False, common_properties=common_properties
            )

        def test_config(self):
            self.config_tester.run_common_tests()

    return without(CommonTests, INAPPLICABLE | (inapplicable or {}))


TEXT = VisualRWKVTextConfig, VisualRWKVTextModel, VisualRWKVForCausalLM
PICTURES = VisualRWKVConfig, VisualRWKVModel, VisualRWKVForConditionalGeneration

TestRwkv5 = common_tests(lambda case: TextTester(case, 5), *TEXT)
TestRwkv6 = common_tests(lambda case: TextTester(case, 6), *TEXT)
TestRwkv7 = common_tests(lambda case: TextTester(case, 7), *TEXT)
NOT_VLM = {
    "test_capture_outputs_decorator": "It asks for attention maps. RWKV has none, and says so with an error.",
    "test_training_overfit": "It trains a text model of the configuration, which is tested above.",
}
TestClip = common_tests(lambda case: PictureTester(case, 6, CLIP), *PICTURES, inapplicable=NOT_VLM)
TestSiglip = common_tests(lambda case: PictureTester(case, 7, SIGLIP), *PICTURES, inapplicable=NOT_VLM)
TestThreeEncoders = common_tests(
    lambda case: PictureTester(case, 7, THREE),
    *PICTURES,
    inapplicable=NOT_VLM
    | {
        "test_get_image_features_hidden_states": "The hidden states are those of three encoders, one after the other."
    },
)
