"""What vLLM calls in each of its processes: it tells vLLM which class runs which of our architectures."""

from __future__ import annotations

import logging
import re
from importlib.metadata import version

SUPPORTED_VLLM = ((0, 32), (0, 33))
"""The first version of vLLM that is supported, and the first one that is not."""

ARCHITECTURES = {
    "VisualRWKVForConditionalGeneration": "visualrwkv_hf.vllm.model:VisualRWKV",
    "VisualRWKVForCausalLM": "visualrwkv_hf.vllm.language_model:Rwkv",
}
"""An architecture that a `config.json` names -> the class that runs it in vLLM."""

BACKEND = "VISUALRWKV"
"""Name of the kind of state in vLLM's table of backends."""

logger = logging.getLogger(__name__)


def register() -> None:
    """Register our architectures, their configuration hooks and their kind of state. A second call changes nothing.

    With a version of vLLM that is not supported nothing is registered and the log says so: vLLM then still serves
    other models, and refuses ours as an unknown architecture.
    """
    if problem := unsupported(vllm_version()):
        logger.error(problem)
        return
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend

    from ..configuration_visualrwkv import VisualRWKVConfig, VisualRWKVTextConfig, VisualRWKVVisionConfig
    from .engine_config import RwkvEngineConfig

    # vLLM has imported transformers' Auto classes before, and transformers 5.19 reads their names only then.
    for config_class in (VisualRWKVConfig, VisualRWKVTextConfig, VisualRWKVVisionConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)

    if BACKEND not in MambaAttentionBackendEnum.__members__:
        register_backend(BACKEND, "visualrwkv_hf.vllm.states.RwkvBackend", is_mamba=True)
    for architecture, path in ARCHITECTURES.items():
        MODELS_CONFIG_MAP[architecture] = RwkvEngineConfig
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(architecture, path)


def vllm_version() -> str:
    """Return the version of the vLLM that is imported: its CPU build is a package of another name."""
    import vllm

    return getattr(vllm, "__version__", None) or version("vllm")


def unsupported(found: str) -> str:
    """Return why a version of vLLM cannot run our models; empty if it can."""
    match = re.match(r"(\d+)\.(\d+)", found)
    first, end = SUPPORTED_VLLM
    if match and first <= (int(match[1]), int(match[2])) < end:
        return ""
    return (
        f"visualrwkv_hf runs in vLLM from {first[0]}.{first[1]} to below {end[0]}.{end[1]}, found {found}: "
        "no VisualRWKV model is registered. Install another version of one of them."
    )


__all__ = ["register"]
