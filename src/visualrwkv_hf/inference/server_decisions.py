"""/v1/systemone: typed questions about one `state`, answered by the probabilities of labels.

The requests, the prompts and the answers are those of transformers' pipeline "decision" and its server. What is ours:
each question goes on from the state that has read the same beginning, so that a picture is read once for all of them.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..state_store import StateStore
from .progress import Left
from .server_limits import Limits, Refusal, sentence_of, shown
from .server_media import refuse_many_tiles
from .server_messages import Medium, bytes_of_base64, refuse_long_text

MAX_QUESTIONS = 64
MAX_NAME = 64
"""The longest name of a picture, in characters."""
CONFIG_FILE, TEMPLATE_FILE = "decision.json", "decision_template.jinja"
"""What a model's folder may say about decisions; see transformers' `DecisionConfig`."""


@dataclass(frozen=True)
class Decision:
    """What a request asks to decide.

    Args:
        state: what the questions are about: a text, or anything that JSON holds.
        questions: name -> question, checked.
        names: of the pictures, as they stand in texts, in the order of the media.
    """

    state: Any
    questions: Mapping[str, Any]
    names: Sequence[str]


def decision_config(source: str | Path) -> Any:
    """Return transformers' settings of decisions for a model, from its folder if it has some.

    None where transformers is too old, or the folder has a template of its own, which is not followed here.
    """
    try:
        from transformers.decision import DecisionConfig
    except ImportError:
        return None
    if (Path(source) / TEMPLATE_FILE).exists():
        return None
    file = Path(source) / CONFIG_FILE
    return DecisionConfig.from_file(file if file.exists() else None)


def read_decision(values: Mapping[str, Any], config: Any, limits: Limits) -> tuple[Decision, list[Medium]]:
    """Return what a request asks to decide, and its pictures.

    Args:
        values: the fields `state`, `questions` and `assets` of the request.
        config: as `decision_config` returns it.
        limits: on pictures and text.

    Raises:
        Refusal: it cannot be read.
    """
    if config is None:
        raise Refusal(
            "This server takes no decisions: transformers is too old, or the model has a template.", 501
        )
    state, questions, assets = (values.get(name) for name in ("state", "questions", "assets"))
    if not isinstance(state, str | dict | list):
        raise Refusal(f"state must be a text, an object or a list, got {shown(state)}.")
    if not isinstance(questions, dict) or not 0 < len(questions) <= MAX_QUESTIONS:
        raise Refusal(f"questions must be an object of 1 to {MAX_QUESTIONS} questions.")
    refuse_long_text([json.dumps([state, questions], ensure_ascii=False)], limits)
    _checked(questions, config)
    assets = {} if assets is None else assets
    if not isinstance(assets, dict) or len(assets) > limits.pictures:
        raise Refusal(f"assets must be an object of at most {limits.pictures} pictures.")
    media = [_picture(name, asset, number) for number, (name, asset) in enumerate(assets.items(), start=1)]
    return Decision(state, questions, list(assets)), media


def _checked(questions: Mapping[str, Any], config: Any) -> list[Any]:
    from transformers.decision import parse_questions

    try:
        return parse_questions(dict(questions), config)
    except ValueError as error:
        raise Refusal(sentence_of(error)) from error


def _picture(name: str, asset: Any, number: int) -> Medium:
    place = f"Picture {number}"
    if not 0 < len(name) <= MAX_NAME:
        raise Refusal(f"{place}: its name in assets must have 1 to {MAX_NAME} characters.")
    data = asset.get("data_base64") if isinstance(asset, dict) else None
    if not isinstance(data, str) or asset.get("type", "image") != "image":
        raise Refusal(f'{place}: it must be given as {{"type": "image", "data_base64": ...}}.')
    if unknown := sorted(asset.keys() - {"type", "format", "data_base64"}):
        raise Refusal(f"{place}: it has unexpected fields: {', '.join(map(shown, unknown[:8]))}.")
    try:
        return Medium(place, bytes_of_base64(data))
    except ValueError as error:
        raise Refusal(f"{place}: it is not valid base64.") from error


class Decider:
    """Answers the questions of requests with a model.

    Args:
        model: a `VisualRWKVForConditionalGeneration`.
        processor: the model's.
        config: as `decision_config` returns it.
        limits: on pictures and prompts.
    """

    def __init__(self, model: Any, processor: Any, config: Any, limits: Limits):
        self.model, self.processor, self.config, self.limits = model, processor, config, limits

    def __call__(
        self,
        decision: Decision,
        pictures: Sequence[Image.Image],
        store: StateStore | None,
        is_over: Callable[[], bool],
    ) -> tuple[dict[str, Any], int]:
        """Return the answers by the names of the questions, and how many tokens the prompts have together.

        Args:
            decision: what is asked.
            pictures: those that `decision.names` names.
            store: where states are looked for and left; without one they are kept for this request only.
            is_over: asked before each question; True ends it.

        Raises:
            ValueError, jinja2.TemplateError: a question cannot be asked.
            Left: `is_over` said so.
        """
        store = StateStore() if store is None else store
        answers, length = {}, 0
        for question in _checked(decision.questions, self.config):
            if is_over():
                raise Left
            inputs = self._inputs(decision, question, pictures)
            labels = self.processor.tokenizer(question.labels, add_special_tokens=False)["input_ids"]
            scores = self.model.score(inputs, labels, state_store=store)
            logits = scores.log_probs / float(self.config.temperature.get(question.type, 1.0))  # [1, A]
            answers[question.name] = question.answer(logits[0].softmax(-1).tolist())
            length += inputs["input_ids"].shape[1]
        return answers, length

    def _inputs(self, decision: Decision, question: Any, pictures: Sequence[Image.Image]) -> Any:
        from transformers.decision.template_utils import DECISION_PROMPT
        from transformers.utils.chat_template_utils import _compile_jinja_template

        text = _compile_jinja_template(DECISION_PROMPT).render(state=decision.state, question=question)
        content = _with_pictures(text, dict(zip(decision.names, pictures)))
        count = sum(part["type"] == "image" for part in content)
        if count > self.limits.pictures:
            raise Refusal(
                f"Question {shown(question.name)} names {count} pictures, at most {self.limits.pictures} can be read."
            )
        refuse_many_tiles(
            [part["image"] for part in content if part["type"] == "image"], self.processor, self.limits
        )
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            sanitize_control_tokens=self.config.sanitize_control_tokens,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        length = inputs["input_ids"].shape[1]
        if length > self.limits.prompt_tokens:
            raise Refusal(f"A prompt has {length} tokens, it can have 1 to {self.limits.prompt_tokens}.")
        return inputs.to(self.model.device, dtype=self.model.dtype)


def _with_pictures(text: str, pictures: Mapping[str, Image.Image]) -> list[dict[str, Any]]:
    """Return a message's content: the text, in which the name of a picture gives its place to the picture."""
    if not pictures:
        return [{"type": "text", "text": text}]
    longest_first = sorted(pictures, key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    return [
        {"type": "image", "image": pictures[piece]} if index % 2 else {"type": "text", "text": piece}
        for index, piece in enumerate(pieces)
        if piece
    ]


__all__ = ["Decider", "Decision", "decision_config", "read_decision"]
