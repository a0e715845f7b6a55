"""Answers in the words of OpenAI's API: whole ones as JSON, streamed ones as server-sent events."""

import json
import time
from collections.abc import Mapping
from typing import Any

from .server_generation import Finished
from .server_requests import Asked


def dumps(value: Any) -> bytes:
    """Return JSON in UTF-8; half a character, which JSON can hold and UTF-8 cannot, is escaped."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


def error_body(message: str, status: int) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    kinds = {401: "authentication_error", 404: "not_found_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


class Reply:
    """The words of one answer.

    Args:
        name: of the model.
        identity: of the answer, without the prefix of its kind.
        asked: what was asked.
    """

    def __init__(self, name: str, identity: str, asked: Asked):
        self.name, self.identity, self.asked = name, identity, asked
        self.created = int(time.time())

    def whole(self, text: str, finished: Finished) -> dict[str, Any]:
        """Return the answer at once."""
        raise NotImplementedError

    def start(self) -> bytes:
        """Return the events before the first piece."""
        raise NotImplementedError

    def piece(self, text: str) -> bytes:
        """Return the events of a piece of text."""
        raise NotImplementedError

    def end(self, finished: Finished) -> bytes:
        """Return the events after the last piece."""
        raise NotImplementedError

    def failure(self, message: str) -> bytes:
        """Return the event of an answer that was begun and cannot go on."""
        return _event(error_body(message, 500))


class ChatReply(Reply):
    """/v1/chat/completions."""

    def whole(self, text: str, finished: Finished) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finished.reason}
        return self._body("chat.completion", [choice]) | {"usage": _usage(finished)}

    def start(self) -> bytes:
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, text: str) -> bytes:
        return self._chunk({"content": text})

    def end(self, finished: Finished) -> bytes:
        parts = [self._chunk({}, finished.reason)]
        if self.asked.include_usage:
            parts.append(_event(self._body("chat.completion.chunk", []) | {"usage": _usage(finished)}))
        return b"".join([*parts, DONE])

    def _chunk(self, delta: Mapping[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _event(self._body("chat.completion.chunk", [choice]))

    def _body(self, kind: str, choices: list) -> dict[str, Any]:
        body = {"id": f"chatcmpl-{self.identity}", "object": kind, "created": self.created}
        return body | {"model": self.name, "choices": choices}


class CompletionReply(Reply):
    """/v1/completions."""

    def whole(self, text: str, finished: Finished) -> dict[str, Any]:
        return self._body([self._choice(text, finished.reason)]) | {"usage": _usage(finished)}

    def start(self) -> bytes:
        return b""

    def piece(self, text: str) -> bytes:
        return _event(self._body([self._choice(text)]))

    def end(self, finished: Finished) -> bytes:
        parts = [_event(self._body([self._choice("", finished.reason)]))]
        if self.asked.include_usage:
            parts.append(_event(self._body([]) | {"usage": _usage(finished)}))
        return b"".join([*parts, DONE])

    def _choice(self, text: str, reason: str | None = None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}

    def _body(self, choices: list) -> dict[str, Any]:
        body = {"id": f"cmpl-{self.identity}", "object": "text_completion", "created": self.created}
        return body | {"model": self.name, "choices": choices}


class ResponseReply(Reply):
    """/v1/responses."""

    def __init__(self, name: str, identity: str, asked: Asked):
        super().__init__(name, identity, asked)
        self.number, self.text = 0, ""
        self.place = {"item_id": f"msg_{identity}", "output_index": 0, "content_index": 0}

    def whole(self, text: str, finished: Finished) -> dict[str, Any]:
        incomplete = finished.reason == "length"
        usage = {
            "input_tokens": finished.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": finished.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": finished.prompt_tokens + finished.completion_tokens,
        }
        status = "incomplete" if incomplete else "completed"
        return self._body(status, [self._message(text, status)]) | {
            "incomplete_details": {"reason": "max_output_tokens"} if incomplete else None,
            "usage": usage,
        }

    def start(self) -> bytes:
        response = self._body("in_progress", [])
        message = self._message("", "in_progress") | {"content": []}
        return self._events(
            ("response.created", {"response": response}),
            ("response.in_progress", {"response": response}),
            ("response.output_item.added", {"output_index": 0, "item": message}),
            ("response.content_part.added", self.place | {"part": _output_text("")}),
        )

    def piece(self, text: str) -> bytes:
        self.text += text
        return self._events(("response.output_text.delta", self.place | {"delta": text, "logprobs": []}))

    def end(self, finished: Finished) -> bytes:
        response = self.whole(self.text, finished)
        return self._events(
            ("response.output_text.done", self.place | {"text": self.text, "logprobs": []}),
            ("response.content_part.done", self.place | {"part": _output_text(self.text)}),
            ("response.output_item.done", {"output_index": 0, "item": response["output"][0]}),
            (f"response.{response['status']}", {"response": response}),
        )

    def failure(self, message: str) -> bytes:
        error = {"code": "server_error", "message": message}
        return self._events(
            ("error", error | {"param": None}),
            ("response.failed", {"response": self._body("failed", []) | {"error": error}}),
        )

    def _events(self, *events: tuple[str, dict[str, Any]]) -> bytes:
        parts = []
        for kind, fields in events:
            parts.append(_event({"type": kind, "sequence_number": self.number} | fields, kind))
            self.number += 1
        return b"".join(parts)

    def _message(self, text: str, status: str) -> dict[str, Any]:
        message = {"id": self.place["item_id"], "type": "message", "status": status, "role": "assistant"}
        return message | {"content": [_output_text(text)]}

    def _body(self, status: str, output: list) -> dict[str, Any]:
        return {
            "id": f"resp_{self.identity}",
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": self.name,
            "output": output,
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "parallel_tool_calls": False,
            "temperature": self.asked.temperature,
            "tool_choice": "auto",
            "tools": [],
            "top_p": self.asked.top_p,
            "usage": None,
        }


class DecisionReply(Reply):
    """/v1/systemone. Its text is JSON, and comes whole."""

    def whole(self, text: str, finished: Finished) -> dict[str, Any]:
        usage = {"input_tokens": finished.prompt_tokens, "output_tokens": 0}
        return {"model": self.name, "answers": json.loads(text), "usage": usage}


REPLIES: dict[str, type[Reply]] = {
    "chat": ChatReply,
    "completion": CompletionReply,
    "response": ResponseReply,
    "decision": DecisionReply,
}
"""Kind of request -> the words of its answer."""


def _event(value: Mapping[str, Any], kind: str = "") -> bytes:
    return (f"event: {kind}\n".encode() if kind else b"") + b"data: " + dumps(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def _output_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}


def _usage(finished: Finished) -> dict[str, int]:
    return {
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
    }


__all__ = ["REPLIES", "Reply", "dumps", "error_body"]
