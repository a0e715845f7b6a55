"""`score()`: how probable given answers are after a prompt, from one reading of the prompt and its pictures.

Letters: B prompts, A answers, T tokens of an answer, R rows of a batch, C hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .cache_visualrwkv import VisualRWKVCache
from .chat_template import TURN_END
from .kept_state import KeptState
from .placement import compute_device
from .prompt_identity import picture_inputs_of, pixel_inputs_of
from .reading_plan import drops_caches, mask_of
from .state_store import StateStore
from .tuned_state import InitialStates, TunedState

MAX_LOGITS_BYTES = 2**27
"""How large the float32 logits of answers that are read together may become."""


@dataclass(frozen=True, eq=False)
class AnswerScores:
    """How probable A answers are after each of B prompts. [`~VisualRWKVScoringMixin.score`] gives it.

    Attributes:
        token_log_probs: for each answer the natural logarithm of the probability of each of its tokens, given the
            prompt and the tokens before it: float32 [B, T].
    """

    token_log_probs: Sequence[Tensor]

    @property
    def log_probs(self) -> Tensor:
        """The log-probability of each answer, the sum over its tokens: float32 [B, A]."""
        return torch.stack([tokens.sum(-1) for tokens in self.token_log_probs], -1)

    @property
    def mean_log_probs(self) -> Tensor:
        """The mean over the tokens of each answer, so that long answers are not at a disadvantage: float32 [B, A].

        With the sign changed it is the mean cross-entropy by which the original ranks answers.
        """
        return torch.stack([tokens.mean(-1) for tokens in self.token_log_probs], -1)

    @property
    def probabilities(self) -> Tensor:
        """The probability of each answer if one of them is given: softmax of `log_probs`, float32 [B, A]."""
        return self.log_probs.softmax(-1)


class VisualRWKVScoringMixin:
    """`score()`, for a model that also has a [`VisualRWKVGenerationMixin`] and an `lm_head`."""

    config: Any
    device: torch.device
    model: Any
    state_store: StateStore | None
    lm_head: Any
    get_image_features: Callable
    _read_prompt: Callable[..., tuple[Tensor, VisualRWKVCache]]

    def score(
        self,
        inputs: Mapping[str, Any],
        answers: Sequence[str | Sequence[int] | Tensor],
        *,
        tokenizer=None,
        end_of_turn: bool = False,
        past_key_values: KeptState | None = None,
        state_store: StateStore | None = None,
        initial_state: TunedState | Sequence[TunedState | None] | None = None,
    ) -> AnswerScores:
        """Return the log-probabilities of answers. Nothing is generated.

        ```python
        scores = model.score(inputs, ["yes", "no"], tokenizer=processor.tokenizer, past_key_values=state)
        scores.probabilities  # float32 [B, 2]
        ```

        Each prompt is read once, from a kept state where there is one. What all answers begin with is read once per
        prompt, and the rest of the answers in batches. If pixels require a gradient, the pictures are encoded once and
        each answer is read together with its prompt, so that the scores can be differentiated.

        Args:
            inputs: the model's inputs for B prompts up to where the answer begins, as the processor makes them with
                `add_generation_prompt=True`: always the whole chat. Padding may be on either side.
            answers: A answers, the same for all prompts: texts, or token ids int64 [T].
            tokenizer: the model's tokenizer or processor, for answers that are texts. A text follows "Assistant:" after
                a space, as in training.
            end_of_turn: whether the score of a text includes the token that ends the turn. The probability of "yes"
                then leaves out longer answers that begin with it. Text and end are tokenized together, as in training.
            past_key_values: a state that has read the beginning of the prompts, of one sample or of B.
            state_store: where to look for a state and to leave states in this call, in place of `model.state_store`.
            initial_state: a [`TunedState`] with which the prompts begin in place of zeros, or one for each row; None in
                the list stands for zeros. No gradient reaches it.

        Raises:
            ValueError: no answers, an empty one, texts without a tokenizer; inputs that no state can continue; pixels
                that require a gradient although a kept state has read them; a model that trains with gradient
                checkpointing, unless pixels require a gradient and there is no `initial_state`; as `generate` for a
                kept state and for `initial_state`.
        """
        ids = answer_ids(answers, tokenizer, end_of_turn)
        inputs = _left_padded(inputs)
        if torch.is_grad_enabled() and any(
            inputs[name].requires_grad
            for name in pixel_inputs_of(self.config)
            if inputs.get(name) is not None
        ):
            if past_key_values is not None:
                raise ValueError(
                    "The pixels require a gradient, and a kept state has read them already: leave past_key_values out."
                )
            return self._differentiable_scores(inputs, ids, initial_state)
        with torch.no_grad():
            return self._scores(inputs, ids, past_key_values, state_store, initial_state)

    def _last_logits_by_store(
        self, inputs: Mapping[str, Any], logits_to_keep: int | Tensor, **others: Any
    ) -> Tensor | None:
        """Return the logits [1, 1, vocab_size] of the last token, by way of `state_store`; None if that cannot be.

        It is for a call that wants these logits and nothing else, as transformers' pipeline "decision" makes it for
        each of several questions about one picture: `use_cache=False` and a tensor `logits_to_keep`.
        """
        ids = inputs.get("input_ids")
        if self.state_store is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if drops_caches(self):
            return None
        if (
            ids is None
            or len(ids) != 1
            or not isinstance(logits_to_keep, Tensor)
            or logits_to_keep.numel() != 1
        ):
            return None
        is_asked = others.pop("use_cache", None) is False and int(logits_to_keep) == ids.shape[1] - 1
        if not is_asked or any(value is not None and value is not False for value in others.values()):
            return None
        hidden, _ = self._read_prompt(_left_padded(inputs), None, None)
        return self.lm_head(hidden)[:, None]

    def _scores(
        self,
        inputs: Mapping[str, Any],
        answers: list[list[int]],
        kept: KeptState | None,
        store: StateStore | None,
        initial: TunedState | Sequence[TunedState | None] | None,
    ) -> AnswerScores:
        hidden, cache = self._read_prompt(inputs, kept, store, initial)  # [B, C]
        shared = _common_beginning(answers)
        begun: list[Tensor] = []  # of each shared token: [B]
        if shared:
            tokens = torch.tensor(shared, device=compute_device(self)).expand(len(hidden), -1)
            outputs = self.model(input_ids=tokens, past_key_values=cache, use_cache=True)
            states = torch.cat([hidden[:, None], outputs.last_hidden_state], 1)  # [B, T + 1, C]
            begun = [*self._log_probs(states[:, :-1], tokens).unbind(1)]
            hidden = states[:, -1]
        rests = [answer[len(shared) :] for answer in answers]
        ended = self._scores_of_rests(hidden, cache, rests)
        return AnswerScores([torch.stack([*begun, *rest], 1) for rest in ended])

    def _scores_of_rests(
        self, hidden: Tensor, cache: VisualRWKVCache, rests: list[list[int]]
    ) -> list[list[Tensor]]:
        """Return for each rest of an answer the log-probability of each token [B], after `hidden` [B, C]."""
        firsts = [rest[0] if rest else 0 for rest in rests]
        log_probs = self.lm_head(hidden).float().log_softmax(-1)[:, firsts]  # [B, A]
        scores = [[log_probs[:, a]] if rest else [] for a, rest in enumerate(rests)]
        longer = sorted((a for a, rest in enumerate(rests) if len(rest) > 1), key=lambda a: len(rests[a]))
        while longer:
            longest = len(rests[longer[-1]]) - 1
            row_bytes = 4 * longest * self.lm_head.weight.shape[0]
            count = max(1, MAX_LOGITS_BYTES // (row_bytes * len(hidden)))
            longer, chosen = longer[:-count], longer[-count:]
            for a, tokens in zip(chosen, self._read_rests(cache, [rests[a] for a in chosen])):
                scores[a] += tokens.unbind(-1)
        return scores

    def _read_rests(self, cache: VisualRWKVCache, rests: list[list[int]]) -> list[Tensor]:
        """Return for each rest of at least two tokens the log-probabilities [B, T - 1] after its first token."""
        batch = cache.batch_size
        rows = pad_sequence([torch.tensor(rest) for rest in rests], batch_first=True)  # [A, T]
        rows = rows.to(compute_device(self)).repeat(batch, 1)  # [B * A, T]; pads come last and are not scored
        branches = cache.copy()
        branches.batch_repeat_interleave(len(rests))
        outputs = self.model(input_ids=rows[:, :-1], past_key_values=branches, use_cache=True)
        log_probs = self._log_probs(outputs.last_hidden_state, rows[:, 1:]).unflatten(0, (batch, -1))
        return [log_probs[:, a, : len(rest) - 1] for a, rest in enumerate(rests)]

    def _log_probs(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Return the log-probabilities [R, T] of `tokens` [R, T] after the hidden states [R, T, C]."""
        log_probs = self.lm_head(hidden).float().log_softmax(-1)
        return log_probs.gather(-1, tokens[..., None].to(log_probs.device))[..., 0]

    def _differentiable_scores(
        self,
        inputs: Mapping[str, Any],
        answers: list[list[int]],
        initial: TunedState | Sequence[TunedState | None] | None,
    ) -> AnswerScores:
        """Return the same scores from one plain forward pass for each answer."""
        pictures = {
            name: inputs[name] for name in picture_inputs_of(self.config) if inputs.get(name) is not None
        }
        encoded = {"image": self.get_image_features(**pictures, return_dict=True)}
        device = compute_device(self)
        prompt, mask = inputs["input_ids"].to(device), inputs["attention_mask"].to(device)
        scores = []
        for answer in answers:
            tokens = torch.tensor(answer, device=device).expand(len(prompt), -1)  # [B, T]
            outputs = self.model(
                input_ids=torch.cat([prompt, tokens], 1),
                attention_mask=torch.cat([mask, torch.ones_like(tokens)], 1),
                mm_encoder_outputs=encoded,
                past_key_values=None if initial is None else InitialStates(initial, self, len(prompt)),
                use_cache=False,
            )
            scores.append(self._log_probs(outputs.last_hidden_state[:, -len(answer) - 1 : -1], tokens))
        return AnswerScores(scores)


def answer_ids(
    answers: Sequence[str | Sequence[int] | Tensor], tokenizer=None, end_of_turn: bool = False
) -> list[list[int]]:
    """Return the token ids of answers, which are texts or ids already.

    Raises:
        ValueError: there are none, one is empty, or a text comes without a tokenizer.
    """
    if isinstance(answers, str) or not len(answers):
        raise ValueError(f"score() needs a list of at least one answer, got {answers!r}.")
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    ids = []
    for number, answer in enumerate(answers):
        if isinstance(answer, str):
            if tokenizer is None:
                raise ValueError("Answers that are texts need tokenizer=processor.tokenizer.")
            text = f" {answer.strip()}{TURN_END if end_of_turn else ''}" if answer.strip() else ""
            # split_special_tokens: an answer is text, even where it contains the name of a special token
            answer = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        ids.append([int(token) for token in answer])
        if not ids[-1]:
            raise ValueError(f"Answer {number} is empty.")
    return ids


def _common_beginning(answers: list[list[int]]) -> list[int]:
    """Return the tokens with which all answers begin."""
    columns = zip(*answers)
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]


def _left_padded(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs with all padding on the left, and with a mask: an answer follows the last token."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise ValueError(
            "score() needs input_ids [B, T], as the processor makes them with return_tensors='pt'."
        )
    mask = mask_of(ids, inputs.get("attention_mask"))
    mask = torch.ones_like(ids) if mask is None else mask
    order = mask.bool().int().argsort(dim=1, stable=True)
    return {**inputs, "input_ids": ids.gather(1, order), "attention_mask": mask.gather(1, order)}


__all__ = ["AnswerScores", "VisualRWKVScoringMixin"]
