"""Answers that fit a JSON schema, a regular expression, a list of choices or a grammar, whatever the model prefers.

llguidance follows the grammar byte by byte and says before each token which tokens can come next; all others get the
logit -inf. The model's own answer stays as it is if it fits.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import LogitsProcessor

from ..chat_template import TURN_END

MAX_CHARACTERS = 2**16
"""The longest schema, expression or grammar."""
MAX_DEPTH = 64
"""How deep a schema may be nested."""
MAX_PARTS = 1000
"""The most rules, and the most opening brackets, of a grammar. llguidance reads nested ones by recursion, and some
thousands overflow its stack, which ends the process."""
LIMITS = dict(step_max_items=20_000, max_grammar_size=100_000, max_lexer_states=50_000)
"""Of llguidance: the work for one token, the symbols of a grammar, and the memory of its lexer."""
JSON_SPACE = r"( |\n( {0,32}|\t{0,8}))?"
"""White space between the parts of JSON: a space, or a line break and an indentation. There is no blank line, which
would end the turn, and a model that is unsure of what comes next cannot fill its answer with tabs."""
START = '%llguidance {{"no_forcing": true}}\nstart: {space}{body}\n'
"""An answer follows "Assistant:" after a space. The blank line that ends its turn is a token that ends an answer.

Where only one text can follow, such as the name of a property, llguidance would allow the tokens of its own choice
alone; without forcing, all tokens that the text can begin with are left to the model.
"""
SPACE = '" "? '


@dataclass(frozen=True)
class Grammar:
    """What an answer must fit, in llguidance's Lark notation, which is checked when a tokenizer is at hand.

    Attributes:
        rules: the rule `body`, and those that it needs.
        is_whole: whether `rules` are a grammar of their own, whose rule is `start`.
    """

    rules: str
    is_whole: bool = False

    @classmethod
    def of_json_schema(cls, schema: Mapping[str, Any] | bool | str) -> "Grammar":
        """Return the grammar of the JSON texts that fit a schema, which may be given as JSON.

        Raises:
            ValueError: it is no JSON schema, too long, or nested too deeply.
        """
        if isinstance(schema, str):
            _refuse_long(schema, "JSON schema")
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"The JSON schema is no JSON: {error}.") from error
        if isinstance(schema, bool):
            schema = {} if schema else {"enum": []}
        if not isinstance(schema, Mapping):
            raise ValueError(f"A JSON schema must be an object, got {type(schema).__name__}.")
        _refuse_deep(schema)
        text = json.dumps({**schema, "x-guidance": {"whitespace_pattern": JSON_SPACE}})
        _refuse_long(text, "JSON schema")
        return cls(f"body: %json {text}")

    @classmethod
    def of_regex(cls, regex: str) -> "Grammar":
        """Return the grammar of the texts that match a whole regular expression, in the syntax of Rust's regex.

        Texts with a blank line are left out, because it would end the turn.
        """
        _refuse_long(regex, "regular expression")
        escaped = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", regex).replace("\n", "\\n")
        return cls(f"body: TEXT\nTEXT: /{escaped}/ & ~/(?s:.*\\n\\n.*)/")

    @classmethod
    def of_choices(cls, choices: Sequence[str]) -> "Grammar":
        """Return the grammar of one of these texts.

        Raises:
            ValueError: there are none, or one is empty or holds a blank line.
        """
        if not isinstance(choices, list | tuple) or not choices:
            raise ValueError(f"Choices must be a list of at least one text, got {choices!r}.")
        for choice in choices:
            if not isinstance(choice, str) or not choice.strip() or TURN_END in choice.strip():
                raise ValueError(f"A choice must be a text without blank lines, got {choice!r}.")
        body = " | ".join(json.dumps(choice.strip(), ensure_ascii=False) for choice in choices)
        _refuse_long(body, "list of choices")
        return cls(f"body: {body}")

    @classmethod
    def of_lark(cls, grammar: str) -> "Grammar":
        """Return a grammar in llguidance's variant of Lark, in which the rule `start` is the whole answer.

        Raises:
            ValueError: it is too long, or has too many rules or brackets.
        """
        _refuse_long(grammar, "grammar")
        for what, count in (
            ("rules", grammar.count(":")),
            ("opening brackets", sum(map(grammar.count, "([{"))),
        ):
            if count > MAX_PARTS:
                raise ValueError(f"A grammar can have {MAX_PARTS:,} {what}, this one has {count:,}.")
        return cls(grammar, is_whole=True)

    def text(self, space: str = SPACE) -> str:
        """Return the grammar of an answer that begins with `space`."""
        if not self.is_whole:
            return START.format(space=space, body="body") + self.rules
        start = START.format(space=space, body="@body")
        parts = [{"name": "answer", "lark_grammar": start}, {"name": "body", "lark_grammar": self.rules}]
        return json.dumps({"grammars": parts})

    def matcher(self, tokenizer: Any) -> Any:
        """Return llguidance's matcher at the beginning of an answer.

        Raises:
            ValueError: the grammar is wrong, too large, or no text fits it.
            ImportError: llguidance is not installed.
        """
        vocabulary = _byte_tokenizer(tokenizer)
        from llguidance import LLMatcher, LLParserLimits

        options: dict[str, Any] = LIMITS | {"verbose_errors": False}
        limits = LLParserLimits(**options)
        without_space, matcher = (
            LLMatcher(vocabulary, self.text(space), log_level=0, limits=limits) for space in ("", SPACE)
        )
        _refuse_error(without_space)
        _allowed(without_space, vocabulary.vocab_size, vocabulary.eos_tokens)
        return matcher


def structured_output(
    tokenizer: Any,
    *,
    json_schema: Mapping[str, Any] | bool | str | None = None,
    regex: str | None = None,
    choices: Sequence[str] | None = None,
    grammar: str | None = None,
) -> "StructuredOutput":
    """Return a logits processor for `model.generate(logits_processor=[...])`: only answers that fit are left.

    ```python
    fits = structured_output(processor, json_schema={"type": "object"})
    output = model.generate(**inputs, logits_processor=[fits], max_new_tokens=100)
    ```

    An answer that is cut off by `max_new_tokens` is the beginning of one that fits.

    Args:
        tokenizer: the model's tokenizer or processor.
        json_schema: a JSON schema, or its text.
        regex: a regular expression in the syntax of Rust's regex, which the whole answer matches.
        choices: the texts of which the answer is one.
        grammar: a grammar in llguidance's variant of Lark.

    Raises:
        ValueError: not exactly one of them is given, it is wrong or too large, or no text fits it.
        ImportError: llguidance is not installed.
    """
    given: dict[Callable[[Any], Grammar], Any] = {
        Grammar.of_json_schema: json_schema,
        Grammar.of_regex: regex,
        Grammar.of_choices: choices,
        Grammar.of_lark: grammar,
    }
    chosen = [(make, value) for make, value in given.items() if value is not None]
    if len(chosen) != 1:
        raise ValueError(f"Give one of json_schema, regex, choices and grammar, got {len(chosen)}.")
    ((make, value),) = chosen
    return StructuredOutput(make(value), tokenizer)


class StructuredOutput(LogitsProcessor):
    """Leaves the tokens that can continue each answer of a batch. [`structured_output`] makes one.

    It follows the answers of one call of `generate` after the other, with any search that adds one token a step.

    Args:
        grammar: what the answers must fit.
        tokenizer: the model's tokenizer or processor.
    """

    def __init__(self, grammar: Grammar, tokenizer: Any):
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self._first = grammar.matcher(tokenizer)
        self._ends = _byte_tokenizer(tokenizer).eos_tokens
        self._prompt: Tensor | None = None
        self._length = 0
        self._followed: dict[tuple[int, ...], Any] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [R, vocab] with -inf for tokens that no fitting answer has here.

        Raises:
            ValueError: no token is left, because nothing that fits begins in this way, or following it takes too much.
        """
        if not self._continues(input_ids):
            self._prompt, self._followed = input_ids.clone(), {}
        assert self._prompt is not None
        answers = [tuple(row) for row in input_ids[:, self._prompt.shape[1] :].tolist()]
        before, self._followed, self._length = self._followed, {}, input_ids.shape[1]
        masks = []
        for answer in answers:
            if answer not in self._followed:
                self._followed[answer] = self._after(answer, before)
            is_ended = any(end in answer for end in self._ends)  # what follows is padding
            masks.append(
                torch.ones(scores.shape[1], dtype=torch.bool)
                if is_ended or self._followed[answer] is None
                else _allowed(self._followed[answer], scores.shape[1], self._ends)
            )
        allowed = torch.stack(masks).to(scores.device)  # bool [R, vocab]
        return scores.masked_fill(~allowed, float("-inf"))

    def _continues(self, input_ids: Tensor) -> bool:
        """Return whether these are the rows of the last call, each by at most one token longer."""
        prompt = self._prompt
        if prompt is None or len(prompt) != len(input_ids):
            return False
        length = prompt.shape[1]
        if not length < input_ids.shape[1] <= self._length + 1:
            return False
        return torch.equal(input_ids[:, :length], prompt)

    def _after(self, answer: tuple[int, ...], before: Mapping[tuple[int, ...], Any]) -> Any:
        """Return a matcher that has followed `answer`, if possible from one that lacks only the last token.

        None for an answer that does not fit: a beam of probability 0, where fewer tokens fit than there are beams.
        """
        if answer and answer[:-1] in before and before[answer[:-1]] is None:
            return None
        known = before.get(answer[:-1]) if answer else None
        matcher, tokens = (self._first, answer) if known is None else (known, answer[-1:])
        matcher = matcher.deep_copy()
        for token in tokens:
            if token in self._ends:
                break
            if not matcher.try_consume_tokens([token]):
                _refuse_error(matcher)
                return None
        return matcher


def _allowed(matcher: Any, vocab_size: int, ends: Sequence[int]) -> Tensor:
    """Return which tokens can come next, bool [vocab_size]: only `ends` where nothing more fits."""
    if matcher.is_stopped():
        _refuse_error(matcher)
        allowed = torch.zeros(vocab_size, dtype=torch.bool)
        allowed[list(ends)] = True
        return allowed
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    _refuse_error(matcher)
    allowed = torch.zeros(vocab_size, dtype=torch.bool)
    count = min(vocab_size, len(bits))
    allowed[:count] = torch.from_numpy(bits[:count].copy()).bool()
    if not allowed.any():
        raise ValueError("No text fits what the answer must look like.")
    return allowed


def _refuse_error(matcher: Any) -> None:
    """Raise `ValueError` with the first line of what is wrong with a grammar, or with following it."""
    if matcher.is_error():
        error = matcher.get_error()
        if "NoExtension" in error or "Unsatisfiable schema" in error:
            why = error.partition("Unsatisfiable schema: ")[2].split("\n")[0]
            raise ValueError(f"No text fits what the answer must look like{': ' if why else ''}{why}.")
        lines = [line.strip() for line in error.splitlines() if line.strip()]
        cause = next((line.removeprefix("error:").strip() for line in lines if line.startswith("error:")), "")
        raise ValueError(
            f"What the answer must look like cannot be used: {' '.join(filter(None, [lines[0], cause]))[:300]}."
        )


def _refuse_long(text: str, what: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"A {what} must be a text, got {type(text).__name__}.")
    if not 0 < len(text) <= MAX_CHARACTERS:
        raise ValueError(f"A {what} can have 1 to {MAX_CHARACTERS} characters, got {len(text)}.")


def _refuse_deep(schema: Any) -> None:
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH):
        values: Iterable[Any] = (
            value for item in level for value in (item.values() if isinstance(item, Mapping) else item)
        )
        level = [value for value in values if isinstance(value, Mapping | list | tuple)]
        if not level:
            return
    raise ValueError(f"A JSON schema can be nested {MAX_DEPTH} levels deep.")


# --- the vocabulary as bytes ---------------------------------------------------------------------------


def token_bytes(tokenizer: Any) -> list[bytes]:
    """Return the bytes of each token id, [vocab_size]; none for special tokens, and for ids that no text has.

    Raises:
        ValueError: the tokenizer does not write bytes as ByteLevel's characters, as ours do.
    """
    alphabet = {character: bytes([byte]) for byte, character in enumerate(_byte_alphabet())}
    special = set(tokenizer.added_tokens_decoder)
    tokens = [b""] * len(tokenizer)
    for token, number in tokenizer.get_vocab().items():
        if number in special or FILLER.fullmatch(token):
            continue
        try:
            tokens[number] = b"".join(map(alphabet.__getitem__, token))
        except KeyError:
            raise ValueError(
                f"Structured output needs a tokenizer over bytes; token {number} is {token!r}."
            ) from None
    return tokens


FILLER = re.compile(r"<\|reserved_\d+\|>")
"""Ids between the vocabulary and the size of the embedding."""


def _byte_alphabet() -> list[str]:
    """Return the character that ByteLevel writes for each byte, [256]: itself if it is printable Latin-1."""
    characters = pre_tokenizers.ByteLevel.alphabet()
    others = iter(sorted(c for c in characters if ord(c) > 255))
    return [chr(byte) if chr(byte) in characters else next(others) for byte in range(256)]


class _Vocabulary:
    """A tokenizer in the form that llguidance asks for."""

    bos_token_id = None

    def __init__(self, tokenizer: Any):
        (turn_end,) = tokenizer.encode(TURN_END, add_special_tokens=False)
        self.ends = sorted({turn_end, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})
        self.eos_token_id = self.ends[0]
        self.tokens = token_bytes(tokenizer)
        self.special_token_ids = sorted(tokenizer.added_tokens_decoder)
        self._bytes = {token: number for number, token in enumerate(self.tokens) if len(token) == 1}

    def __call__(self, text: bytes | str) -> list[int]:
        """Return single bytes: llguidance asks only to look ahead in forced text, where any tokens would do."""
        text = text.encode() if isinstance(text, str) else text
        return [self._bytes[text[i : i + 1]] for i in range(len(text))]


_byte_tokenizers: WeakKeyDictionary = WeakKeyDictionary()
"""Tokenizer -> what llguidance made of it, which takes a quarter of a second."""


def _byte_tokenizer(tokenizer: Any) -> Any:
    if tokenizer not in _byte_tokenizers:
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError as error:
            raise ImportError(
                "Structured output needs llguidance: pip install 'visualrwkv-hf[structured]'."
            ) from error
        vocabulary = _Vocabulary(tokenizer)
        _byte_tokenizers[tokenizer] = LLTokenizer(
            TokenizerWrapper(vocabulary), n_vocab=len(vocabulary.tokens), eos_token=vocabulary.ends
        )
    return _byte_tokenizers[tokenizer]


__all__ = ["Grammar", "StructuredOutput", "structured_output"]
