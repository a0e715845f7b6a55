"""transformers' common tests of processors, image processors and tokenizers, on those of tiny models."""

import unittest

from tiny_training import tiny_model, tiny_processor
from transformers import TokenizersBackend
from transformers_tests import fixtures_folder, load, without

from visualrwkv_hf import VisualRWKVImageProcessor, VisualRWKVProcessor
from visualrwkv_hf.processing_visualrwkv import CONFIG_FIELDS

processing = load("test_processing_common")
image_processing = load("test_image_processing_common")
tokenization = load("test_tokenization_common")
backend = load("test_tokenizers_backend_mixin")


class SomeProcessor(processing.ProcessorTesterMixin, unittest.TestCase):
    """Take the parts of a tiny model's processor, instead of parts of the Hub."""

    processor_class = VisualRWKVProcessor
    video_token = "<video>"  # not of the processor: without films it is text

    @classmethod
    def _setup_from_components(cls):
        return tiny_processor(tiny_model())

    @staticmethod
    def prepare_processor_dict():
        fields = {name: getattr(tiny_model().config, name) for name in CONFIG_FIELDS}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


TestProcessor = without(
    SomeProcessor,
    {
        "test_init_arguments_not_in_processor_kwargs": "pad_prompt_to_multiple_of is a field of the processor that "
        "a call can override, as the fields of image processors are.",
    },
)
del SomeProcessor


class ImageTester(image_processing.ImageProcessingTester):
    """Name the class and the fields of the image processor of several encoders."""

    encoders = {
        "dinov2": {"size": 28, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.4, 0.3]},
        "siglip": {"size": 32, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
    }

    def _get_image_processing_classes(self):
        return {"pil": VisualRWKVImageProcessor}

    def prepare_image_processor_dict(self):
        return {"encoders": self.encoders}

    def expected_output_image_shape(self, images):
        size = self.encoders["dinov2"]["size"]
        return self.num_channels, size, size


class SomeImageProcessor(image_processing.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = ImageTester


ENCODERS_DECIDE = "The options are refused: each encoder was trained with one size and one mean, in RGB."
TestImageProcessor = without(
    SomeImageProcessor,
    {
        "test_call_numpy_4_channels": ENCODERS_DECIDE,
        "test_image_processor_from_dict_with_kwargs_has_attributes": ENCODERS_DECIDE,
        "test_new_models_require_torchvision_backend": "Pixels are bit-equal to the original's, which Pillow resizes.",
    },
)
del SomeImageProcessor


class SomeTokenizer(tokenization.TokenizerTesterMixin, unittest.TestCase):
    """Take a tiny model's tokenizer, with the first 1,024 tokens of the World vocabulary."""

    tokenizer_class = TokenizersBackend

    @classmethod
    def setUpClass(cls):
        tokenization.get_tests_dir = lambda: str(fixtures_folder())
        super().setUpClass()
        tiny_processor(tiny_model()).tokenizer.save_pretrained(cls.tmpdirname)
        cls.tokenizers_list = [(cls.tokenizer_class, cls.tmpdirname, {})]


TestTokenizer = without(SomeTokenizer, {})
del SomeTokenizer


class SomeBackend(backend.TokenizersBackendTesterMixin, unittest.TestCase):
    tokenizer_class = TokenizersBackend

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        tiny_processor(tiny_model()).tokenizer.save_pretrained(cls.tmpdirname)
        cls.tokenizers_list = [(cls.tokenizer_class, cls.tmpdirname, {})]


FIXED_VOCABULARY = (
    "The World vocabulary is given, and the longest token is taken at each place: nothing is trained."
)
TestTokenizersBackend = without(
    SomeBackend,
    {
        "test_alignment_methods": "Every token counts as a word: the vocabulary knows no words.",
        "test_training_new_tokenizer": FIXED_VOCABULARY,
        "test_training_new_tokenizer_with_special_tokens_change": FIXED_VOCABULARY,
    },
)
del SomeBackend
