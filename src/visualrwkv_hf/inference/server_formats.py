"""What a request says about the form of its answer: text, JSON, or what an expression or a grammar describes."""

from collections.abc import Callable, Mapping
from typing import Any

from .server_limits import Refusal, sentence_of, shown
from .structured import Grammar

ANY_OBJECT = {"type": "object"}
_KEYS = {"name", "description", "schema", "strict"}
FORMS: dict[str, Callable[[Any], Grammar]] = {
    "json": Grammar.of_json_schema,
    "regex": Grammar.of_regex,
    "choice": Grammar.of_choices,
    "grammar": Grammar.of_lark,
}
"""Key of `structured_outputs`, as vLLM's server has it -> what makes a grammar of its value."""


def structured_outputs(name: str, value: Any) -> Grammar:
    """Return what an answer must fit by the field `structured_outputs`.

    Args:
        name: the field's, for messages.
        value: an object with one of the keys of [`FORMS`].

    Raises:
        Refusal: it has another form.
    """
    given = (
        {key: entry for key, entry in value.items() if entry is not None}
        if isinstance(value, Mapping)
        else {}
    )
    if len(given) != 1 or given.keys() - FORMS.keys():
        raise Refusal(f"{name} must be an object with one of {', '.join(FORMS)}, got {shown(value)}.")
    ((kind, entry),) = given.items()
    return _grammar(FORMS[kind], entry)


def _grammar(make: Callable[[Any], Grammar], value: Any) -> Grammar:
    try:
        return make(value)
    except ValueError as error:
        raise Refusal(sentence_of(error)) from error


def answer_format(name: str, value: Any) -> Grammar | None:
    """Return what an answer must fit; None for text.

    Args:
        name: the field's, for messages.
        value: `response_format` of a chat, or `text.format` of a response, where the keys of `json_schema` lie beside
            the type.

    Raises:
        Refusal: it has another form, or the schema is too long or nested too deeply.
    """
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise Refusal(f"{name} must be an object whose type is text, json_object or json_schema.")
    given = {key: entry for key, entry in value.items() if key != "type"}
    if kind == "json_schema":
        if "json_schema" in given and len(given) == 1:
            given = given["json_schema"]
        return _schema(f"{name}.json_schema" if "json_schema" in value else name, given)
    if given:
        raise Refusal(f"{name} of type {kind} has no other keys.")
    return Grammar.of_json_schema(ANY_OBJECT) if kind == "json_object" else None


def _schema(name: str, given: Any) -> Grammar:
    schema = given.get("schema") if isinstance(given, Mapping) else None
    if not isinstance(schema, Mapping) or given.keys() - _KEYS:
        raise Refusal(
            f"{name} must be an object of {', '.join(sorted(_KEYS))}, with an object as its schema."
        )
    return _grammar(Grammar.of_json_schema, schema)


__all__ = ["answer_format", "structured_outputs"]
