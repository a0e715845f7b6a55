"""The decoding step of `generate()` on a GPU, recorded as a CUDA graph: one launch in place of some hundreds.

A step of one token always runs the same kernels on the same tensors, since the state keeps its addresses. So Python
launches them twice, records them once, and replays the record for all further tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .cache_visualrwkv import VisualRWKVCache

EAGER_STEPS = 2
"""Steps before the one that is recorded: kernels are compiled and libraries initialised by then."""

Capture = Callable[[Callable[[], Any], torch.device], tuple[Any, Callable[[], None]]]
"""(step, device) -> what `step` returned, and a function that runs its kernels again on the same tensors. The step has
not changed any tensor when this returns."""


def capture_on_cuda(step: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
    """Record `step` as a CUDA graph; see [`Capture`].

    Raises:
        RuntimeError: the step waits for the GPU, or does what a graph cannot hold.
    """
    with torch.cuda.device(device):
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            # Other threads may use the GPU meanwhile.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                output = step()
            finally:
                graph.capture_end()
        current.wait_stream(side)
    return output, graph.replay


CAPTURES: dict[str, Capture] = {"cuda": capture_on_cuda}
"""By type of the device, how a step is recorded there."""


def why_no_graph(model: Any, generation_config: Any, cache: object) -> str:
    """Return why `generate()` decodes step by step in Python; empty if it records a step.

    Transformers itself checks `disable_compile`, quantisation and offloading.
    """
    if model.device.type not in CAPTURES:
        return f"nothing is recorded on {model.device.type}"
    reasons = {
        "the cache is of another kind, or is compiled": type(cache) is not VisualRWKVCache,
        "a dynamic state was asked for": generation_config.cache_implementation is not None,
        "torch.compile was asked for": generation_config.compile_config is not None,
        "hidden states are asked for": asks_for_hidden_states(generation_config),
        "beams move states": (generation_config.num_beams or 1) > 1,
        "the model is in training mode": model.training,
        "autocast keeps copies of weights": torch.is_autocast_enabled(model.device.type),
        "the model is on several devices": len(set(getattr(model, "hf_device_map", {}).values())) > 1,
        "the model's weights are spread over processes": is_sharded(model),
    }
    if reason := first_that_holds(reasons):
        return reason
    assert isinstance(cache, VisualRWKVCache)
    if cache.layers[0].record_past:
        return "the past is recorded"
    return "modules have hooks, which run in Python" if has_hooks(model) else ""


def first_that_holds(reasons: dict[str, bool]) -> str:
    """Return the first reason whose condition is true, or an empty string."""
    return next((reason for reason, is_so in reasons.items() if is_so), "")


def asks_for_hidden_states(generation_config: Any) -> bool:
    """Return whether `generate()` is to return hidden states or attentions."""
    return bool(generation_config.output_hidden_states or generation_config.output_attentions)


def has_hooks(model: nn.Module) -> bool:
    """Return whether something is to run in Python whenever a module of the model does.

    What transformers hangs up to collect hidden states does nothing unless they are asked for.
    """
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return True
    hooks = (
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )
    if any(hook.__module__ != "transformers.utils.output_capturing" for hook in hooks):
        return True
    return any(hasattr(module, "_hf_hook") for module in model.modules())  # accelerate's


def is_sharded(model: nn.Module) -> bool:
    """Return whether processes hold parts of the weights: as DTensors (FSDP, tensor parallel) or by DeepSpeed."""
    return any(hasattr(weight, "device_mesh") or hasattr(weight, "ds_id") for weight in model.parameters())


class GraphedStep:
    """Calls a model; from the third call on that only brings another token, it replays a record of the step.

    Used by one `generate()` and thrown away, so it holds no memory afterwards, and a changed adapter or weight is seen
    by the next answer.

    Args:
        model: what is called.
        compiled: returns what runs a step with a static cache, for which `torch.compile` was asked.
    """

    def __init__(self, model: Any, compiled: Callable[[], Callable[..., Any]]):
        self._model = model
        self._compiled = compiled
        self._steps = 0
        self._inputs: dict[str, Any] = {}
        self._output: Any = None
        self._replay: Callable[[], None] | None = None
        self._is_refused = False

    def __call__(self, **inputs: Any) -> Any:
        cache = inputs.get("past_key_values")
        if isinstance(cache, VisualRWKVCache) and cache.is_static:
            return self._compiled()(**inputs)
        if self._is_refused or not self._is_step(inputs):
            return self._model(**inputs)
        self._steps += 1
        if self._steps <= EAGER_STEPS or (self._replay is None and not self._record(inputs)):
            return self._model(**inputs)
        if not self._is_same(inputs):
            return self._model(**inputs)
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                self._inputs[name].copy_(value)
        assert self._replay is not None and isinstance(cache, VisualRWKVCache)
        self._replay()
        cache.advance(1)  # kept in Python, so no part of the record
        return self._output

    @staticmethod
    def _is_step(inputs: dict[str, Any]) -> bool:
        """Return whether these are one token for each sample of a state that has read something."""
        ids, cache = inputs.get("input_ids"), inputs.get("past_key_values")
        if not isinstance(ids, Tensor) or ids.shape[1] != 1 or not isinstance(cache, VisualRWKVCache):
            return False
        return not cache.is_empty and cache.batch_size == ids.shape[0]

    def _is_same(self, inputs: dict[str, Any]) -> bool:
        """Return whether these inputs differ from the recorded ones in the values of tensors only."""
        if inputs.keys() != self._inputs.keys():
            return False
        return all(
            value.shape == known.shape and value.dtype == known.dtype and value.device == known.device
            if isinstance(value, Tensor) and isinstance(known, Tensor)
            else value is known or (not isinstance(value, Tensor) and value == known)
            for value, known in ((value, self._inputs[name]) for name, value in inputs.items())
        )

    def _record(self, inputs: dict[str, Any]) -> bool:
        """Record the step; return False, after a warning, if that cannot be done."""
        self._inputs = {
            name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()
        }
        cache = inputs["past_key_values"]
        length = cache.get_seq_length()
        device = inputs["input_ids"].device
        try:
            self._output, self._replay = CAPTURES[device.type](lambda: self._model(**self._inputs), device)
        except RuntimeError as error:
            self._is_refused = True
            warnings.warn(
                f"The decoding step cannot be recorded as a graph, so it runs slower, in Python: {error}",
                stacklevel=2,
            )
        finally:
            cache.advance(length - cache.get_seq_length())  # the step was counted, but has not run
        return not self._is_refused
