"""transformers' common test of pipelines: each task answers one input, and ten in batches of four.

The sdist has the test that loads a model for a pipeline and gives it batches, not the tests of each task: stand-ins
for those are here.
"""

import unittest
from types import SimpleNamespace
from unittest import mock

import transformers
from PIL import Image
from tiny_training import tiny_model, tiny_processor
from transformers_tests import load, models_folder

from visualrwkv_hf import (
    VisualRWKVForCausalLM,
    VisualRWKVForConditionalGeneration,
    VisualRWKVProcessor,
    VisualRWKVTextModel,
)

# transformers would be imported a second time, from the sdist, to look classes up by name.
with mock.patch("transformers.utils.direct_transformers_import", lambda path: transformers):
    pipelines = load("test_pipeline_mixin")

pipelines.transformers_module = SimpleNamespace(
    TokenizersBackend=transformers.TokenizersBackend,
    CLIPImageProcessor=transformers.CLIPImageProcessorPil,
    VisualRWKVProcessor=VisualRWKVProcessor,
)
pipelines.PROCESSOR_MAPPING_NAMES = {"visualrwkv": "VisualRWKVProcessor"}
pipelines.tiny_model_summary = {
    "VisualRWKVForCausalLM": {"tokenizer_classes": ["TokenizersBackend"], "processor_classes": []},
    "VisualRWKVTextModel": {"tokenizer_classes": ["TokenizersBackend"], "processor_classes": []},
    "VisualRWKVForConditionalGeneration": {
        "tokenizer_classes": ["TokenizersBackend"],
        "processor_classes": ["CLIPImageProcessor"],
    },
}
"""What the Hub's summary of tiny models says of others: model class -> the classes of its tokenizer and processors."""


class OneTask:
    """Stand-in for the tests of one task of transformers.

    Attributes:
        task: the pipeline's name.
        examples: inputs, of which some are drawn for batches.
        answer: the key of an answer under which its text is.
    """

    task: str
    examples: list = ["Hello", "two words"]
    answer = "generated_text"

    def get_test_pipeline(self, model, tokenizer, dtype="float32", **processors):
        made = transformers.pipeline(
            self.task, model=model, tokenizer=tokenizer, dtype=dtype, max_new_tokens=3, **processors
        )
        return made, self.examples

    def run_pipeline_test(self, pipeline, examples):
        for example in examples:
            (answer,) = pipeline(example)
            assert isinstance(answer[self.answer], str | list) and answer[self.answer]


class TextGeneration(OneTask):
    task = "text-generation"


def chat(colour: str, question: str) -> list[dict]:
    picture = {"type": "image", "image": Image.new("RGB", (30, 20), colour)}
    return [{"role": "user", "content": [picture, {"type": "text", "text": question}]}]


class ImageTextToText(OneTask):
    task = "image-text-to-text"
    examples = [chat("red", "Which colour?"), chat("blue", "A longer question: which colour is this?")]


class FeatureExtraction(OneTask):
    task = "feature-extraction"

    def get_test_pipeline(self, model, tokenizer, dtype="float32", **processors):
        return transformers.pipeline(self.task, model=model, tokenizer=tokenizer, dtype=dtype), self.examples

    def run_pipeline_test(self, pipeline, examples):
        (features,) = pipeline(examples[0])
        assert len(features[0]) == pipeline.model.config.get_text_config().hidden_size


for stand_in in (TextGeneration, ImageTextToText, FeatureExtraction):
    pipelines.pipeline_test_mapping[stand_in.task] = {"test": f"{__name__}.{stand_in.__name__}"}


class TestPipelines(pipelines.PipelineTesterMixin, unittest.TestCase):
    """Tasks that none of our classes can do are skipped; so is any-to-any, which needs torchvision."""

    pipeline_model_mapping = {
        "text-generation": VisualRWKVForCausalLM,
        "feature-extraction": VisualRWKVTextModel,
        "image-text-to-text": VisualRWKVForConditionalGeneration,
    }

    @classmethod
    def setUpClass(cls):
        whole = tiny_model()
        text = VisualRWKVForCausalLM(whole.config.text_config)
        text.generation_config = whole.generation_config
        for model in (whole, text, text.model):
            folder = models_folder() / model.config.model_type / type(model).__name__
            model.save_pretrained(folder)
            (tiny_processor(whole) if model is whole else tiny_processor(whole).tokenizer).save_pretrained(
                folder
            )

    def skipTest(self, reason):
        """Fail where the mixin would skip a task of ours, because it found or could load no model."""
        assert "is not in `self.pipeline_model_mapping`" in reason, reason
        super().skipTest(reason)
