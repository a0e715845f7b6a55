"""Engines of vLLM in this process, one at a time. Where vLLM cannot be imported, all tests here are skipped."""

import gc
import os

import pytest

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

try:
    from vllm import LLM
except ImportError as error:
    LLM, PROBLEM = None, f"vLLM cannot be imported: {error}"
else:
    PROBLEM = ""


def pytest_collection_modifyitems(items):
    if PROBLEM:
        for item in items:
            if "vllm_plugin" in str(item.path):
                item.add_marker(pytest.mark.skip(reason=PROBLEM))


@pytest.fixture
def start_engine():
    """Start an engine for a folder, which is stopped after the test."""
    started = []

    def start(folder, **options):
        defaults = dict(
            dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=8, disable_log_stats=True
        )
        started.append(LLM(str(folder), **defaults | options))
        return started[-1]

    yield start
    for engine in started:
        engine.llm_engine.engine_core.shutdown()
    started.clear()
    gc.collect()
