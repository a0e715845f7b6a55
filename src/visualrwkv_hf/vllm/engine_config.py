"""The configuration hook: what an engine that runs our models must do, and what it cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import TYPE_CHECKING

from vllm.model_executor.models.config import MambaModelConfig
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON

from ..configuration_visualrwkv import VisualRWKVConfig
from ..cpu.packed import METHOD, refuse_strange_quantization
from ..modeling_visualrwkv import is_trivial
from .media import register_picture_connector
from .parallel import refuse_uneven_parts
from .pictures import max_picture_tokens
from .stages import refuse_empty_stages

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SCHEDULER = "visualrwkv_hf.vllm.scheduler.whole_picture_scheduler"

ITS_OWN_LAYERS = "its own linear layers, and these models have torch's"
STATES = "the states of tokens have the model's dtype, and matrices are float32"
SUPPORTED: Mapping[str, tuple[tuple, str]] = {
    "model_config.quantization": (
        (None, METHOD),
        f"vLLM's quantisation replaces {ITS_OWN_LAYERS}. Folders that `visualrwkv quantize` wrote ({METHOD}) can be "
        "served, with dense weights.",
    ),
    "cache_config.mamba_cache_dtype": (("auto",), f"{STATES}."),
    "cache_config.mamba_ssm_cache_dtype": (("auto", "float32"), f"{STATES}."),
    "offload_config.uva.cpu_offload_gb": ((0,), "vLLM offloads only layers that it makes itself."),
    "offload_config.prefetch.offload_group_size": ((0,), "vLLM offloads only layers that it makes itself."),
}
"""Option of vLLM's configuration -> the values that it may have, and why no other."""


class RwkvEngineConfig(MambaModelConfig):
    """vLLM calls this once for an engine, before it allocates anything."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Set what a model needs of the engine.

        Raises:
            ValueError: the engine is to do what these models cannot do, or cannot read a picture at once where the
                layers must see all of it.
        """
        refuse_what_is_missing(vllm_config)
        register_picture_connector()
        write_compact_json(vllm_config)
        read_dense_weights(vllm_config)
        config = vllm_config.model_config.hf_config
        parallel = vllm_config.parallel_config
        refuse_uneven_parts(config.get_text_config(), parallel.tensor_parallel_size)
        refuse_empty_stages(config.get_text_config(), parallel.pipeline_parallel_size)
        prepare_stages(vllm_config)
        if isinstance(config, VisualRWKVConfig) and not is_trivial(config.scan):
            read_pictures_whole(vllm_config, config)
        if vllm_config.cache_config.enable_prefix_caching and not HAS_TRITON:
            raise ValueError(
                "enable_prefix_caching: vLLM copies states with Triton, which is not there. Leave the option out, or "
                "use a GPU."
            )
        super().verify_and_update_config(vllm_config)


def refuse_what_is_missing(vllm_config: VllmConfig) -> None:
    """Raise `ValueError` for options of vLLM that would be ignored or fail later, with a reason."""
    for option, (allowed, reason) in SUPPORTED.items():
        if (value := attrgetter(option)(vllm_config)) not in allowed:
            raise ValueError(f"{option.rpartition('.')[-1]}={value!r} is not supported: {reason}")
    if vllm_config.speculative_config is not None:
        raise ValueError(
            "Speculative decoding is not supported: a state in vLLM's pool cannot be taken back."
        )
    if vllm_config.structured_outputs_config.backend == "guidance":
        raise ValueError(
            "structured_outputs_config.backend is 'guidance', but llguidance cannot read the World tokenizer: its "
            "pattern is nested too deeply. Leave the option out, or choose 'xgrammar'."
        )
    if vllm_config.lora_config is not None:
        raise ValueError(
            f"LoRA adapters are not supported by the vLLM plugin: vLLM's LoRA replaces {ITS_OWN_LAYERS}. Merge the "
            "adapter into the model first."
        )


def write_compact_json(vllm_config: VllmConfig) -> None:
    """Have structured output follow xgrammar and write JSON without white space, unless the user names a backend.

    A small model fills JSON with white space until the answer has its longest length. And vLLM would fall back from
    xgrammar to llguidance, see `refuse_what_is_missing`.
    """
    wanted = vllm_config.structured_outputs_config
    if wanted.backend == "auto":
        wanted.backend, wanted.disable_any_whitespace = "xgrammar", True


def read_dense_weights(vllm_config: VllmConfig) -> None:
    """Have vLLM take a folder of packed weights for one of dense weights: `load_weights` makes them dense.

    Raises:
        ValueError: the folder's weights are packed in a way that this package does not read.
    """
    model = vllm_config.model_config
    if model.quantization is not None:
        refuse_strange_quantization(model.hf_config.__dict__.pop("quantization_config", None), "config.json")
        model.quantization = None


def prepare_stages(vllm_config: VllmConfig) -> None:
    """Have the stages of a pipeline on a CPU warm up, with `enforce_eager` as well.

    There vLLM (0.32) makes the room for what a stage receives only in a warm-up, and leaves that out with
    `enforce_eager`. For our models this option changes nothing else on a CPU: none is marked to be compiled.
    """
    if vllm_config.parallel_config.pipeline_parallel_size > 1 and current_platform.is_cpu():
        vllm_config.model_config.enforce_eager = False


def read_pictures_whole(vllm_config: VllmConfig, config: VisualRWKVConfig) -> None:
    """Have the scheduler never cut a picture: some layers read its last patch first."""
    if vllm_config.cache_config.enable_prefix_caching:
        raise ValueError(
            f"enable_prefix_caching: this model reads pictures {config.scan!r}, and vLLM keeps states at block bounds, "
            "which may lie inside a picture. Only models with scan 'unidirectional' can have prefix caching."
        )
    scheduler = vllm_config.scheduler_config
    needed = max_picture_tokens(vllm_config.model_config)
    for name in ("max_num_batched_tokens", "max_num_scheduled_tokens", "long_prefill_token_threshold"):
        budget = getattr(scheduler, name)
        if budget and budget < needed:
            raise ValueError(
                f"{name} is {budget}, but a picture takes {needed} tokens, which must be read in one step: this "
                f"model's layers read pictures {config.scan!r}. Set it to at least {needed}."
            )
    if scheduler.scheduler_cls not in (None, SCHEDULER):
        raise ValueError(
            f"scheduler_cls is {scheduler.scheduler_cls!r}, but only this package's scheduler never cuts a picture, "
            f"and this model's layers read pictures {config.scan!r}. Leave the option out."
        )
    scheduler.disable_chunked_mm_input = True
    scheduler.scheduler_cls = SCHEDULER
