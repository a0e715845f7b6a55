"""What an engine refuses, with the numbers, before it allocates anything; and a broken request leaves it running."""

import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from paths import ROOT
from PIL import Image
from released_folders import released_config, write_release
from transformers import AutoProcessor
from vllm_engines import answers, mixed_chats, requests, sampling

from visualrwkv_hf import bundled_model
from visualrwkv_hf.image_processing_visualrwkv import region_grid


def engine_options(**fields):
    """What `RwkvEngineConfig` looks at, of an engine without special wishes."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(quantization=None),
        speculative_config=None,
        structured_outputs_config=SimpleNamespace(backend="auto"),
        lora_config=None,
        cache_config=SimpleNamespace(mamba_cache_dtype="auto", mamba_ssm_cache_dtype="auto"),
        offload_config=SimpleNamespace(
            uva=SimpleNamespace(cpu_offload_gb=0), prefetch=SimpleNamespace(offload_group_size=0)
        ),
    )
    for path, value in fields.items():
        *parents, name = path.split("__")
        setattr(functools.reduce(getattr, parents, config), name, value)
    return config


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model_config__quantization": "fp8"}, "quantization='fp8'"),
        ({"speculative_config": object()}, "Speculative decoding is not supported"),
        ({"lora_config": object()}, "Merge the adapter"),
        ({"structured_outputs_config__backend": "guidance"}, "cannot read the World tokenizer"),
        ({"cache_config__mamba_cache_dtype": "float16"}, "mamba_cache_dtype='float16' .* model's dtype"),
        ({"cache_config__mamba_ssm_cache_dtype": "float16"}, "mamba_ssm_cache_dtype='float16' .* float32"),
        ({"offload_config__uva__cpu_offload_gb": 2.0}, "cpu_offload_gb=2.0 .* layers that it makes itself"),
        ({"offload_config__prefetch__offload_group_size": 4}, "offload_group_size=4 .* layers that it makes"),
    ],
)
def test_what_would_be_ignored_is_refused(options, message):
    from visualrwkv_hf.vllm.engine_config import refuse_what_is_missing

    refuse_what_is_missing(engine_options())
    with pytest.raises(ValueError, match=message):
        refuse_what_is_missing(engine_options(**options))


@pytest.mark.parametrize("found", ["0.31.9", "0.33.0", "1.0", "unknown"])
def test_another_vllm_is_named_with_the_bounds(found):
    from visualrwkv_hf.vllm.plugin import unsupported

    assert f"from 0.32 to below 0.33, found {found}" in unsupported(found)
    assert not unsupported("0.32.0") and not unsupported("0.32.1+cpu")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_num_batched_tokens": 16}, "max_num_batched_tokens is 16, but a picture takes 17 tokens"),
        (
            {"max_num_batched_tokens": 64, "long_prefill_token_threshold": 9},
            "long_prefill_token_threshold is 9, but a picture takes 17 tokens",
        ),
        (
            {"max_num_batched_tokens": 64, "max_num_scheduled_tokens": 16},
            "max_num_scheduled_tokens is 16, but a picture takes 17 tokens",
        ),
        (
            {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
            "scheduler_cls is 'vllm.*Scheduler', but only this package's scheduler never cuts a picture",
        ),
        ({"enable_prefix_caching": True}, "this model reads pictures 'bidirectional'"),
    ],
)
def test_an_engine_that_would_cut_pictures_is_refused(options, message, tmp_path, start_engine):
    folder = write_release(tmp_path / "model", "v6.0")
    assert released_config("v6.0").num_image_tokens == 17
    with pytest.raises(ValueError, match=message):
        start_engine(folder, **options)


def test_the_page_says_how_many_tokens_large_pictures_take():
    from visualrwkv_hf.vllm.pictures import LARGEST_SIDE

    page = (ROOT / "docs" / "vllm.md").read_text("utf-8")
    sizes = [(LARGEST_SIDE, LARGEST_SIDE), (1024, 768), (4000, 3000)]
    for is_closest in (False, True):
        for columns, rows in (region_grid(size, 256, is_closest) for size in sizes):
            assert f"{256 * columns * rows:,}" in page


def test_a_release_that_does_not_exist_is_refused(tmp_path, start_engine):
    folder = write_release(tmp_path / "model", "v5.0")
    fields = json.loads((folder / "config.json").read_text())
    fields["text_config"]["rwkv_version"] = 9
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(Exception, match="rwkv_version must be one of 5, 6, 7, got 9"):
        start_engine(folder)


def test_weights_of_another_model_are_refused(tmp_path, start_engine):
    folder, other = (write_release(tmp_path / name, name) for name in ("v5.0", "v6.0"))
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"The folder (lacks|has) \d+ tensors"):
        start_engine(folder)


def test_an_engine_lives_on_after_bad_requests(start_engine):
    from vllm.exceptions import VLLMValidationError

    folder = bundled_model()
    engine = start_engine(folder, max_num_batched_tokens=128, max_model_len=256)
    good = requests(AutoProcessor.from_pretrained(folder), mixed_chats(3))
    expected = answers(engine, good)
    empty = np.zeros((0, 5, 3), np.uint8)
    small = Image.new("RGB", (9, 9))

    def about(pictures, prompt="<image>"):
        return {"prompt": prompt, "multi_modal_data": {"image": pictures}}

    for bad, kind, said in (
        ({"prompt": "a " * 4000}, VLLMValidationError, "maximum context length is 256 tokens"),
        (about([small] * 2), AssertionError, r"prompt replacement for mm_items\['image'\]\[1\]"),
        (about(small, "no place"), AssertionError, r"prompt replacement for mm_items\['image'\]\[0\]"),
        (about(empty), ValueError, "Failed to apply VisualRWKVProcessor"),
    ):
        with pytest.raises(kind, match=said):
            engine.generate([bad], sampling(), use_tqdm=False)
        assert answers(engine, good) == expected
