"""What a request of an OpenAI client asks for: every field is checked before anything is generated.

A field either works, or has no influence on an answer and is passed over, or is refused with a sentence. Nothing that
changes an answer is ignored.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jinja2 import nodes
from transformers.utils.chat_template_utils import _compile_jinja_template

from ..films import FrameSampling
from .server_decisions import Decision, read_decision
from .server_formats import answer_format, structured_outputs
from .server_limits import Limits, Refusal, shown
from .server_messages import Medium, read_messages, refuse_long_text
from .structured import Grammar

DEFAULT_NEW_TOKENS = 1024
"""The longest answer to a request that does not say how long it may be."""
LEAST_FPS, MOST_FPS = 1e-3, 1000.0
"""Of a film: frames a second that may be taken."""
LEAST_TEMPERATURE = 1e-6
"""Below it logits divided by the temperature leave the range of float32; 0 is greedy decoding."""


@dataclass
class Asked:
    """What a request asks for.

    Args:
        kind: "chat", "completion", "response" or "decision".
        messages: a chat for the processor, in which the content `{"type": "image", "image": n}`, or
            `{"type": "video", "video": n}`, is medium n; None for the others.
        prompt: the text of a completion.
        media: the pictures and films in their order.
        sampling: which frames of films are taken.
        template: variables of the chat template.
        new_tokens: the longest answer.
        temperature, top_p: None: as the model's generation_config says.
        stop: texts that end an answer.
        bias: token -> what is added to its logit.
        form: what the answer must fit.
        decision: the questions of a decision.
    """

    kind: str
    messages: list[dict[str, Any]] | None = None
    prompt: str | None = None
    media: list[Medium] = field(default_factory=list)
    sampling: FrameSampling = field(default_factory=FrameSampling)
    template: dict[str, Any] = field(default_factory=dict)
    new_tokens: int = DEFAULT_NEW_TOKENS
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    scope: str = ""
    form: Grammar | None = None
    decision: Decision | None = None


@dataclass(frozen=True)
class Rules:
    """What of a request depends on the model and on the server.

    Args:
        limits: of the server.
        name: of the model.
        aliases: what clients may call it as well.
        vocab_size: the ids that `logit_bias` may name are below it.
        template: the variables of the model's chat template and their types, see [`template_variables`].
        decisions: transformers' settings of decisions; None where none are taken.
    """

    limits: Limits
    name: str
    aliases: frozenset[str]
    vocab_size: int
    template: Mapping[str, type]
    decisions: Any = None


def template_variables(template: str) -> dict[str, type]:
    """Return the variables that a chat template gives a default, `{% set x = x | default(...) %}`, and their types.

    Those are the ones that whoever renders it may set.
    """
    tree = _compile_jinja_template(template).environment.parse(template)
    found = {}
    for assigned in tree.find_all(nodes.Assign):
        value, target = assigned.node, assigned.target
        if (
            isinstance(value, nodes.Filter)
            and value.name == "default"
            and isinstance(value.node, nodes.Name)
            and isinstance(target, nodes.Name)
            and value.node.name == target.name
            and value.args
            and isinstance(value.args[0], nodes.Const)
        ):
            found[target.name] = type(value.args[0].value)
    return found


def parse_json(body: bytes, limits: Limits) -> dict[str, Any]:
    """Return the object that the body of a request holds.

    Raises:
        Refusal: it is no JSON object, or holds so many values that they would take gigabytes.
    """
    if sum(map(body.count, (b",", b":", b"[", b"{"))) > limits.json_marks:
        raise Refusal("The body of the request holds too many values.", 413)
    try:
        parsed = json.loads(body, parse_constant=_refuse_constant)
    except Refusal:
        raise
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise Refusal("The body of the request must be JSON.") from error
    if not isinstance(parsed, dict):
        raise Refusal("The body of the request must be a JSON object.")
    return parsed


def _refuse_constant(name: str) -> Any:
    raise Refusal(f"The body of the request must be JSON, which has no {name}.")


def read_request(kind: str, body: Mapping[str, Any], rules: Rules) -> Asked:
    """Return what the body of a request asks for.

    Args:
        kind: "chat", "completion", "response" or "decision".
        body: the JSON object.
        rules: of the server and its model.

    Raises:
        Refusal: a field has a value that it cannot have, or is none; 404 for a model that is not here.
    """
    if unknown := sorted(body.keys() - FIELDS[kind].keys()):
        raise Refusal(f"Unexpected fields in the request: {', '.join(map(shown, unknown[:8]))}.")
    values: dict[str, Any] = {}
    for name, value in body.items():
        if value is not None:
            values[name] = FIELDS[kind][name](name, value, rules)
    asked = Asked(kind)
    if kind == "decision":
        asked.decision, asked.media = read_decision(values, rules.decisions, rules.limits)
        asked.scope = values.get("prompt_cache_key", "")
        return asked
    new_tokens = ("max_completion_tokens", "max_tokens", "max_output_tokens")
    default = min(DEFAULT_NEW_TOKENS, rules.limits.new_tokens)
    asked.new_tokens = next((values[name] for name in new_tokens if name in values), default)
    for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "stream", "echo"):
        if name in values:
            setattr(asked, name, values[name])
    asked.stop, asked.bias = values.get("stop", []), values.get("logit_bias", {})
    asked.template = values.get("chat_template_kwargs", {})
    asked.include_usage = values.get("stream_options", False)
    asked.scope = values.get("prompt_cache_key", "")
    forms = [values[name] for name in ("response_format", "text", "structured_outputs") if values.get(name)]
    if len(forms) > 1:
        raise Refusal("An answer can have one form: leave out structured_outputs or the other one.")
    asked.form = forms[0] if forms else None
    if kind == "completion":
        asked.prompt = values.get("prompt")
        if asked.prompt is None:
            raise Refusal("prompt must be a text, got None.")
        refuse_long_text([asked.prompt], rules.limits)
    else:
        source = "messages" if kind == "chat" else "input"
        if source not in values:
            raise Refusal(
                f"{source} must be {'a list of at least one message' if kind == 'chat' else 'a text or a list'}."
            )
        asked.sampling = values.get("media_io_kwargs", asked.sampling)
        asked.messages, asked.media = read_messages(
            values[source], values.get("instructions"), source, rules.limits
        )
    return asked


# Fields. A check takes a field's name, its value, which is not null, and the rules; it returns what the value means.

Check = Callable[[str, Any, Rules], Any]


def _refuse(name: str, wanted: str, value: Any) -> Refusal:
    return Refusal(f"{name} must be {wanted}, got {shown(value)}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _number(least: float, most: float) -> Check:
    def check(name: str, value: Any, rules: Rules) -> float:
        if not _is_number(value) or not least <= value <= most:
            raise _refuse(name, f"a number from {least} to {most}", value)
        return float(value)

    return check


def _temperature(name: str, value: Any, rules: Rules) -> float:
    if not _is_number(value) or not (value == 0 or LEAST_TEMPERATURE <= value <= 2):
        raise _refuse(name, f"0 or a number from {LEAST_TEMPERATURE} to 2", value)
    return float(value)


def _whole(name: str, value: Any, least: int, most: int) -> int:
    if not _is_number(value) or value != int(value) or not least <= value <= most:
        raise _refuse(name, f"an integer from {least} to {most}", value)
    return int(value)


def _new_tokens(name: str, value: Any, rules: Rules) -> int:
    return _whole(name, value, 1, rules.limits.new_tokens)


def _seed(name: str, value: Any, rules: Rules) -> int:
    return _whole(name, value, -(2**63), 2**63 - 1)


def _flag(name: str, value: Any, rules: Rules) -> bool:
    if not isinstance(value, bool):
        raise _refuse(name, "true or false", value)
    return value


def _text(name: str, value: Any, rules: Rules) -> str:
    if not isinstance(value, str):
        raise _refuse(name, "a text", value)
    return value


def _anything(name: str, value: Any, rules: Rules) -> Any:
    return value


def _only(*values: Any) -> Check:
    def check(name: str, value: Any, rules: Rules) -> Any:
        if not any(type(value) is type(allowed) and value == allowed for allowed in values):
            allowed = " or ".join(json.dumps(one) for one in (*values, None))
            raise Refusal(f"{name} can only be {allowed} here, got {shown(value)}.")
        return value

    return check


def _model(name: str, value: Any, rules: Rules) -> str:
    if not isinstance(value, str) or value not in {rules.name, *rules.aliases}:
        raise Refusal(f"There is no model {shown(value)} here: the model is {rules.name!r}.", 404)
    return value


def _stop(name: str, value: Any, rules: Rules) -> list[str]:
    limits, stops = rules.limits, [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > limits.stops:
        raise _refuse(name, f"a text or a list of at most {limits.stops}", value)
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= limits.stop_characters:
            raise Refusal(
                f"A stop string must have 1 to {limits.stop_characters} characters, got {shown(stop)}."
            )
    return stops


def _logit_bias(name: str, value: Any, rules: Rules) -> dict[int, float]:
    if not isinstance(value, dict):
        raise _refuse(name, "an object of token ids and numbers", value)
    bias = {}
    for token, added in value.items():
        if not re.fullmatch(r"[0-9]{1,9}", token, re.ASCII) or int(token) >= rules.vocab_size:
            raise Refusal(f"A key of {name} must be a token id below {rules.vocab_size}, got {shown(token)}.")
        if not _is_number(added) or not -100 <= added <= 100:
            raise Refusal(f"A value of {name} must be a number from -100 to 100, got {shown(added)}.")
        bias[int(token)] = float(added)
    return bias


def _template(name: str, value: Any, rules: Rules) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _refuse(name, "an object", value)
    for variable, given in value.items():
        if variable not in rules.template:
            known = ", ".join(rules.template) or "none"
            raise Refusal(
                f"{name} cannot hold {shown(variable)}: the variables of the chat template are {known}."
            )
        if type(given) is not rules.template[variable]:
            wanted = {str: "a text", bool: "true or false"}.get(rules.template[variable], "another type")
            raise _refuse(variable, wanted, given)
    return value


def _media_options(name: str, value: Any, rules: Rules) -> FrameSampling:
    given = value.get("video", {}) if isinstance(value, dict) and not value.keys() - {"video"} else None
    if not isinstance(given, dict) or given.keys() - {"num_frames", "fps"}:
        raise _refuse(name, 'an object such as {"video": {"num_frames": 4}} or {"video": {"fps": 1}}', value)
    given = {key: entry for key, entry in given.items() if entry is not None}
    if "num_frames" in given:
        given["num_frames"] = _whole("num_frames", given["num_frames"], 1, rules.limits.pictures)
    if "fps" in given:
        given["fps"] = _number(LEAST_FPS, MOST_FPS)("fps", given["fps"], rules)
    if len(given) > 1:
        raise Refusal(f"{name} can have either num_frames or fps.")
    return FrameSampling(**given)


def _stream_options(name: str, value: Any, rules: Rules) -> bool:
    known = {"include_usage", "include_obfuscation"}
    if not isinstance(value, dict) or value.keys() - known:
        raise _refuse(name, f"an object of {' and '.join(sorted(known))}", value)
    return value.get("include_usage") is not None and _flag(name, value["include_usage"], rules)


def _format(name: str, value: Any, rules: Rules) -> Grammar | None:
    return answer_format(name, value)


def _structured(name: str, value: Any, rules: Rules) -> Grammar:
    return structured_outputs(name, value)


def _text_options(name: str, value: Any, rules: Rules) -> Grammar | None:
    if not isinstance(value, dict) or value.keys() - {"format", "verbosity"}:
        raise _refuse(name, "an object of format and verbosity", value)
    if value.get("verbosity") is not None:
        _only("medium")("text.verbosity", value["verbosity"], rules)
    return None if value.get("format") is None else answer_format("text.format", value["format"])


def _reasoning(name: str, value: Any, rules: Rules) -> None:
    if not isinstance(value, dict) or any(given not in (None, "none") for given in value.values()):
        raise _refuse(name, "null or {}: the model does not reason before it answers", value)


_SHARED: dict[str, Check] = {
    "model": _model,
    "stream": _flag,
    "stream_options": _stream_options,
    "temperature": _temperature,
    "top_p": _number(0, 1),
    "seed": _seed,
    "prompt_cache_key": _text,
    "structured_outputs": _structured,
    # Without influence on an answer.
    "user": _anything,
    "metadata": _anything,
    "safety_identifier": _anything,
    "service_tier": _anything,
    "store": _anything,
    "prompt_cache_retention": _anything,
    "prompt_cache_options": _anything,
}
_OF_CHATS: dict[str, Check] = {
    "chat_template_kwargs": _template,
    "media_io_kwargs": _media_options,
    "parallel_tool_calls": _anything,  # without tools it has no influence
    "tools": _only([]),
    "tool_choice": _only("none", "auto"),
    "top_logprobs": _only(0),
}
_OF_SAMPLING: dict[str, Check] = {
    "max_tokens": _new_tokens,
    "frequency_penalty": _number(-2, 2),
    "presence_penalty": _number(-2, 2),
    "logit_bias": _logit_bias,
    "stop": _stop,
    "n": _only(1),
}
FIELDS: dict[str, dict[str, Check]] = {
    "chat": _SHARED
    | _OF_CHATS
    | _OF_SAMPLING
    | {
        "messages": _anything,
        "max_completion_tokens": _new_tokens,
        "logprobs": _only(False),
        "response_format": _format,
        "functions": _only([]),
        "function_call": _only("none", "auto"),
        "modalities": _only(["text"]),
        "audio": _only(),
        "prediction": _anything,  # it would only make an answer faster
        "reasoning_effort": _only("none"),
        "verbosity": _only("medium"),
        "web_search_options": _only(),
        "moderation": _only(),
    },
    "completion": _SHARED
    | _OF_SAMPLING
    | {"prompt": _text, "echo": _flag, "suffix": _only(""), "best_of": _only(1), "logprobs": _only(False)},
    "response": _SHARED
    | _OF_CHATS
    | {
        "input": _anything,
        "instructions": _text,
        "max_output_tokens": _new_tokens,
        "text": _text_options,
        "reasoning": _reasoning,
        "background": _only(False),
        "conversation": _only(),
        "include": _only([]),
        "max_tool_calls": _anything,  # without tools it has no influence
        "moderation": _only(),
        "previous_response_id": _only(),
        "prompt": _only(),
        "truncation": _only("disabled"),
    },
    "decision": {
        "model": _model,
        "state": _anything,
        "questions": _anything,
        "assets": _anything,
        "prompt_cache_key": _text,
    },
}
"""Route -> field -> its check."""

__all__ = ["Asked", "Rules", "parse_json", "read_request", "template_variables"]
