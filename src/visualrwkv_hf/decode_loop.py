"""The loop of `generate()` where a kernel computes a whole token: next to no Python between two tokens.

It does what `GenerationMixin._sample` does, in the same order, without what only other models need: masks, positions,
inputs and outputs of each step as dictionaries. A test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from .cache_visualrwkv import VisualRWKVCache
from .decode_graph import asks_for_hidden_states, first_that_holds
from .dispatch import accelerated_ops, chosen_backend, kernel

TRIED_STEPS = 2
"""Steps before which a kernel is looked for: hooks that watch the reading of a prompt are gone by the second one."""


def why_stock_loop(model: Any, generation_config: GenerationConfig, cache: object) -> str:
    """Return why `generate()` decodes by transformers' own loop; empty if it may decode by the one here.

    The kernel itself is looked for later, since hooks may go after the first token.
    """
    reasons = {
        f"no kernel computes a whole token on {model.device.type}": model.device.type != "cpu",
        "the cache is of another kind, or there is none": type(cache) is not VisualRWKVCache,
        "hidden states are asked for": asks_for_hidden_states(generation_config),
        "torch.compile was asked for": generation_config.compile_config is not None
        or model._compiled_call_impl is not None,
        "the model assists another": bool(generation_config.is_assistant),
        "the model is in training mode": model.training,
        "autocast computes in another dtype": torch.is_autocast_enabled("cpu"),
        "the model's methods are somebody else's": not _are_ours(model),
    }
    if reason := first_that_holds(reasons):
        return reason
    assert isinstance(cache, VisualRWKVCache)
    if cache.layers[0].record_past:
        return "the past is recorded"
    if chosen_backend() == "torch" or not (
        chosen_backend() == "native" or all(layer.accelerated for layer in _language_model(model).layers)
    ):
        return "native ops are not used"
    return ""


def _are_ours(model: Any) -> bool:
    """Return whether the methods that the loop here does not call are those of this package's classes."""
    package = __name__.rpartition(".")[0]
    names = ("forward", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
    modules = [getattr(type(model), name).__module__ for name in names]
    return all(module.startswith((package, "transformers.")) for module in modules) and not any(
        name in model.__dict__ for name in names
    )


def _language_model(model: Any) -> Any:
    return getattr(model.model, "language_model", model.model)


Step = Callable[[Tensor, bool], tuple[Tensor, Tensor]]
"""(ids [B], whether their logits are to stay) -> the ids [B] of the largest logits, and the logits, float32
[B, vocab_size]. It reads the ids after a cache, whose states it updates in place. Logits that need not stay are
overwritten by the next call."""


def find_step(model: Any, cache: VisualRWKVCache, rows: int) -> Step | None:
    """Return what computes one token of each row after `cache`, or None where no kernel does."""
    body = _language_model(model)
    if any(_has_hooks(module) for module in (model, model.model)):
        return None
    with accelerated_ops():
        token_decode = kernel("token_decode", body.embed_tokens.weight)
    if token_decode is None:
        return None
    return token_decode(body, model.lm_head, [layer.state() for layer in cache.layers], rows)


def _has_hooks(module: nn.Module) -> bool:
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return bool(hooks) or hasattr(module, "_hf_hook")


class Stopping:
    """Ask the criteria which rows end with a new token, as a `StoppingCriteriaList` answers.

    The two that each `generate()` has, of length and of the tokens that end an answer, are asked without tensors.

    Attributes:
        has_eos: whether rows that have ended go on as padding.
        others: the other criteria, which look at all ids.
    """

    def __init__(self, criteria: StoppingCriteriaList):
        self.has_eos = any(hasattr(each, "eos_token_id") for each in criteria)
        self.others: list[Any] = []
        self._max_length, self._ends = float("inf"), set[int]()
        for each in criteria:
            if type(each) is MaxLengthCriteria and each.max_position_embeddings is None:
                self._max_length = min(self._max_length, each.max_length)
            elif type(each) is EosTokenCriteria:
                self._ends |= set(each.eos_token_id.flatten().tolist())
            else:
                self.others.append(each)

    def ended(self, tokens: Sequence[int], length: int, ids: Tensor | None, scores: Any) -> list[bool]:
        """Return which rows end.

        Args:
            tokens: the new token of each row.
            length: of all rows, with the new token.
            ids: int64 [B, length], for the other criteria; None if there are none.
            scores: as for those.
        """
        ended = [length >= self._max_length or token in self._ends for token in tokens]
        for each in self.others:
            ended = [known or new for known, new in zip(ended, each(ids, scores).tolist())]
        return ended


class DecodeLoop:
    """Generate greedily or by sampling, as `GenerationMixin._sample` does, from whose arguments it is made.

    Where no kernel computes a whole token the steps are calls of the model.
    """

    def __init__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: Any,
        model_kwargs: dict[str, Any],
    ):
        self.model, self.config, self.streamer = model, generation_config, streamer
        self.model_kwargs = model_kwargs
        self.cache: VisualRWKVCache = model_kwargs["past_key_values"]
        self.processor, self.stopping = logits_processor, Stopping(stopping_criteria)
        returns = bool(generation_config.return_dict_in_generate)
        self.scores: list[Tensor] | None = [] if returns and generation_config.output_scores else None
        self.raw_logits: list[Tensor] | None = [] if returns and generation_config.output_logits else None
        self.needs_ids = len(logits_processor) > 0 or len(self.stopping.others) > 0
        self.needs_logits = (
            bool(generation_config.do_sample)
            or len(logits_processor) > 0
            or not (self.scores is None and self.raw_logits is None)
        )
        self.length = input_ids.shape[1]
        self.is_done = [False] * len(input_ids)
        self._parts = [input_ids]
        self._step: Step | None = None
        self._tried = 0

    @property
    def ids(self) -> Tensor:
        """All ids so far, int64 [B, length]."""
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts, 1)]
        return self._parts[0]

    @torch.no_grad()
    def run(self) -> GenerateDecoderOnlyOutput | Tensor:
        """Read the prompt and generate until all rows have ended."""
        outputs = self.model._prefill(self.ids, self.config, self.model_kwargs, is_first_iteration=True)
        logits, likeliest = self._taken(outputs), None
        del outputs  # its logits may be large
        while not self._ends_with(self._tokens(logits) if likeliest is None else likeliest):
            logits, likeliest = self._next(self._parts[-1][:, -1])
        if self.streamer is not None:
            self.streamer.end()
        if not self.config.return_dict_in_generate:
            return self.ids
        return GenerateDecoderOnlyOutput(
            sequences=self.ids,
            scores=None if self.scores is None else tuple(self.scores),
            logits=None if self.raw_logits is None else tuple(self.raw_logits),
            past_key_values=self.cache,
        )

    def _tokens(self, logits: Tensor) -> Tensor:
        """Return the next ids [B] by logits, float32 [B, vocab_size]."""
        scores = self.processor(self.ids if self.needs_ids else self._parts[0], logits)
        if self.raw_logits is not None:
            self.raw_logits.append(logits)
        if self.scores is not None:
            self.scores.append(scores)
        if self.config.do_sample:
            return torch.multinomial(F.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        return scores.argmax(-1)

    def _ends_with(self, tokens: Tensor) -> bool:
        """Take in the next ids [B], and return whether all rows have ended."""
        values = tokens.tolist()
        if self.stopping.has_eos and any(self.is_done):
            pad = int(self.config._pad_token_tensor)
            values = [pad if done else value for done, value in zip(self.is_done, values)]
            tokens = torch.tensor(values)
        self._parts.append(tokens[:, None])
        self.length += 1
        ids = self.ids if self.needs_ids else None
        scores = None if self.scores is None or ids is None else tuple(self.scores)
        ended = self.stopping.ended(values, self.length, ids, scores)
        self.is_done = [before or now for before, now in zip(self.is_done, ended)]
        if self.streamer is not None:
            self.streamer.put(tokens)
        return all(self.is_done)

    def _next(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Read ids [B], and return the logits after them and, where nobody looks at those, the likeliest ids [B]."""
        if self._step is None and self._tried < TRIED_STEPS:
            self._tried += 1
            self._step = find_step(self.model, self.cache, len(tokens))
            if self._step is not None and (plan := self.model_kwargs.get("reading_plan")) is not None:
                plan.leave(plan.prompt_length)
        if self._step is None:
            inputs = self.model.prepare_inputs_for_generation(
                self.ids, next_sequence_length=1, **self.model_kwargs
            )
            return self._taken(self.model(**inputs, return_dict=True)), None
        likeliest, logits = self._step(tokens.contiguous(), self.needs_logits)
        self.cache.advance(1)
        return logits, None if self.needs_logits else likeliest

    def _taken(self, outputs: Any) -> Tensor:
        """Return the logits of a call of the model, float32 [B, vocab_size]."""
        self.model_kwargs = self.model._update_model_kwargs_for_generation(outputs, self.model_kwargs)
        return outputs.logits[:, -1].to(torch.float32, copy=True)
