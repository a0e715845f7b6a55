"""Prefix caching: a request begins from the states that an earlier one with the same beginning has left.

vLLM copies states with a kernel of Triton, which a computer without a GPU does not have: the plugin refuses there. The
tests replace that kernel by plain copies; all else is the code of vLLM and of the plugin.
"""

import ctypes

import pytest
from released_folders import write_release
from transformers import AutoProcessor
from vllm_engines import WORDS, generated, picture, requests, sampling

from visualrwkv_hf import VisualRWKVForConditionalGeneration


def copy_plainly(sources, targets, sizes):
    for source, target, size in zip(sources.tolist(), targets.tolist(), sizes.tolist()):
        ctypes.memmove(target, source, size)


@pytest.fixture
def plain_copies(monkeypatch):
    from vllm.v1.worker import mamba_utils

    from visualrwkv_hf.vllm import engine_config

    monkeypatch.setattr(mamba_utils, "batch_memcpy", copy_plainly)
    monkeypatch.setattr(engine_config, "HAS_TRITON", True)


def long_chats() -> list[list[dict]]:
    """Chats that begin with the same picture and the same long text, and end differently."""
    beginning = " ".join(WORDS * 6)
    image = picture(1)
    return [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": said}]}]
        for said in (f"{beginning} {end}?" for end in ("one", "two red", "three and blue", "four"))
    ]


@pytest.mark.parametrize("release", ["v5.0", "v7.00", "v7.02"])
def test_answers_from_kept_states_are_those_from_the_start(release, tmp_path, start_engine, plain_copies):
    folder = write_release(tmp_path / "model", release)
    processor = AutoProcessor.from_pretrained(folder)
    model = VisualRWKVForConditionalGeneration.from_pretrained(folder).eval()
    chats = long_chats()
    expected = [generated(model, processor, chat) for chat in chats]
    engine = start_engine(folder, enable_prefix_caching=True, block_size=16, max_num_batched_tokens=64)
    given = requests(processor, chats)
    first = engine.generate(given[:1], sampling(), use_tqdm=False)
    others = engine.generate(given, sampling(), use_tqdm=False)
    found = [list(done.outputs[0].token_ids) for done in (*first, *others)]
    assert found == [expected[0], *expected]
    assert others[0].num_cached_tokens >= 64, "the same request again"
    if release != "v5.0":  # there the picture comes after the words that differ
        assert all(done.num_cached_tokens >= 64 for done in others), [x.num_cached_tokens for x in others]


def test_without_triton_prefix_caching_is_refused(tmp_path, start_engine):
    folder = write_release(tmp_path / "model", "v5.0")
    with pytest.raises(ValueError, match="enable_prefix_caching: vLLM copies states with Triton"):
        start_engine(folder, enable_prefix_caching=True)
