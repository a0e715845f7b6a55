"""What a request says about the form of its answer: text, any JSON object, or JSON that fits a schema."""

from collections.abc import Mapping
from typing import Any

from .server_limits import Refusal
from .structured import Grammar

ANY_OBJECT = {"type": "object"}
_KEYS = {"name", "description", "schema", "strict"}


def answer_schema(name: str, value: Any) -> Mapping[str, Any] | None:
    """Return the JSON schema that an answer must fit; None for text.

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
    return ANY_OBJECT if kind == "json_object" else None


def _schema(name: str, given: Any) -> Mapping[str, Any]:
    schema = given.get("schema") if isinstance(given, Mapping) else None
    if not isinstance(schema, Mapping) or given.keys() - _KEYS:
        raise Refusal(
            f"{name} must be an object of {', '.join(sorted(_KEYS))}, with an object as its schema."
        )
    try:
        Grammar.of_json_schema(schema)
    except ValueError as error:
        raise Refusal(str(error)) from error
    return schema


__all__ = ["answer_schema"]
