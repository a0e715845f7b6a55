"""Structured output: every answer fits, and an answer that fits anyway is the model's own."""

import json
import random
import re
from functools import cache

import pytest
import torch
from chats import FIRST, batch_of, inputs_of, user
from tiny_training import tiny_model, tiny_processor, world_vocabulary

from visualrwkv_hf.conversion.world_tokenizer import build_world_tokenizer
from visualrwkv_hf.inference.structured import structured_output, token_bytes

pytest.importorskip("llguidance", reason="needs the extra structured")
jsonschema = pytest.importorskip("jsonschema", reason="checks the answers")

TURN_END = 261
PROMPT = torch.tensor([[11, 12]])


@pytest.fixture(scope="module")
def world():
    return build_world_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model(version=7, **FIRST)


@pytest.fixture(scope="module")
def processor(model):
    return tiny_processor(model)


bytes_of = cache(token_bytes)


def written(processor, tokenizer, seed: int, most: int = 400) -> bytes | None:
    """What a model of random logits writes; None if it does not come to an end.

    After half of the tokens those that close something are preferred, since a random text has no reason to end.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = bytes_of(tokenizer)
    ids = PROMPT
    prefer = torch.zeros(len(tokens))
    prefer[[tokens.index(mark) for mark in (b'"', b"}", b"]", b'"}', b'"]', b"0", b",", b":")]] = 12.0
    prefer[[TURN_END, 0]] = 20.0
    for step in range(most):
        scores = torch.randn(1, len(tokens), generator=generator) * 3 + (prefer if step > most // 4 else 0)
        allowed = processor(ids, scores)
        token = int(allowed[0].argmax())
        assert allowed[0, token] > float("-inf")
        if token in (TURN_END, 0):
            return b"".join(tokens[i] for i in ids[0, PROMPT.shape[1] :].tolist())
        assert tokens[token], f"token {token} has no bytes"
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return None


# --- the vocabulary -----------------------------------------------------------------------------------


def test_bytes_of_tokens_are_the_world_vocabularys(world, processor):
    found = {token: number for number, token in enumerate(token_bytes(world)) if token}
    assert found == world_vocabulary()
    not_utf8 = [token for token in found if not is_utf8(token)]
    assert len(not_utf8) == 486
    small = {token: number for number, token in enumerate(token_bytes(processor.tokenizer)) if token}
    assert small == {token: i for token, i in world_vocabulary().items() if i < 1023}


def is_utf8(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_characters_are_allowed_byte_by_byte_and_never_half(world):
    """A choice of one rare character: whatever tokens write it, its bytes are whole."""
    for text in ("é", "日本", "🦜", "\u0800", "\U0010ffff", "a\u0301"):
        for seed in range(5):
            assert written(structured_output(world, choices=[text]), world, seed).decode().strip() == text


# --- fuzz ---------------------------------------------------------------------------------------------

WORDS = ["a", "name", "größe", "日本", 'quo"te', "back\\slash", "🦜", "x y", "n\n"]


def random_schema(rng: random.Random, depth: int = 0) -> dict:
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const"]
    kinds += ["object", "array", "anyOf"] * (depth < 3)
    kind = rng.choice(kinds if depth else ["object", "array", "enum"])
    if kind == "enum":
        return {"enum": rng.sample([*WORDS, 1, -2.5, True, None, {"k": WORDS[3]}], rng.randint(1, 5))}
    if kind == "const":
        return {"const": rng.choice(WORDS)}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]}
    if kind == "string":
        low = rng.randint(0, 3)
        limits = rng.choice(
            [{}, {"minLength": low, "maxLength": low + rng.randint(0, 20)}, {"pattern": "^[a-cé🦜]{1,6}$"}]
        )
        return {"type": "string", **limits}
    if kind == "integer":
        low = rng.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 1000)}
    if kind == "array":
        low = rng.randint(0, 2)
        return {
            "type": "array",
            "items": random_schema(rng, depth + 1),
            "minItems": low,
            "maxItems": low + rng.randint(0, 3),
        }
    if kind == "object":
        names = rng.sample(WORDS, rng.randint(1, 4))
        properties = {name: random_schema(rng, depth + 1) for name in names}
        required = [name for name in names if rng.random() < 0.6]
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }
    return {"type": kind}


def check_fuzz(world, seeds) -> None:
    """What random logits write fits; and a model whose own answer is that text writes it, token by token."""
    ended = 0
    for seed in seeds:
        schema = random_schema(random.Random(seed))
        text = written(structured_output(world, json_schema=schema), world, seed)
        if text is not None:
            ended += 1
            assert b"\n\n" not in text
            jsonschema.validate(json.loads(text.decode()), schema)
            check_own_tokens(world, structured_output(world, json_schema=schema), text.decode())
    assert ended > 0.95 * len(seeds)


def check_own_tokens(world, fits, text: str) -> None:
    """The tokens of an answer are the tokenizer's, as in training, and not those of the random one."""
    ids, scores = PROMPT, torch.zeros(1, 65536)
    for token in [*world.encode(text, add_special_tokens=False), TURN_END]:
        scores[0, token] = 1.0
        assert int(fits(ids, scores).argmax()) == token, (text, world.decode([token]))
        scores[0, token] = 0.0
        ids = torch.cat([ids, torch.tensor([[token]])], 1)


def test_random_schemas_give_json_that_fits_and_let_it_be(world):
    check_fuzz(world, range(60))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(60, 10_060, 1000))  # in pieces, which two processes share
def test_ten_thousand_random_schemas_give_json_that_fits_and_let_it_be(world, first):
    check_fuzz(world, range(first, first + 1000))


def test_texts_of_other_forms_stay_as_they_are(world):
    for form in (
        dict(choices=["a rectangle", "no"]),
        dict(regex="a [a-z]+"),
        dict(grammar='start: "a " ("rectangle" | "circle")'),
    ):
        check_own_tokens(world, structured_output(world, **form), " a rectangle")


@pytest.mark.parametrize(
    "regex", [r"[0-9]{4}-[0-9]{2}", r"(?i:ja|nein)!*", r"a/b|c\/d", r".{1,8}", r"[é🦜]+x"]
)
def test_random_answers_match_the_expression(world, regex):
    texts = [written(structured_output(world, regex=regex), world, seed) for seed in range(8)]
    ended = [text.decode() for text in texts if text is not None]
    assert ended
    for text in ended:
        assert any(re.fullmatch(regex, option) for option in (text, text.removeprefix(" "))), text


def test_random_answers_are_one_of_the_choices(world):
    choices = ["yes", "yes, it is", "no", 'a "quote" \\ and\na line']
    found = {
        written(structured_output(world, choices=choices), world, seed).decode().strip() for seed in range(60)
    }
    assert found == set(choices)


def test_a_grammar(world):
    grammar = 'start: "(" start ")" | "x"'
    texts = [written(structured_output(world, grammar=grammar), world, seed, most=60) for seed in range(5)]
    ended = [text.decode() for text in texts if text is not None]
    assert ended
    for text in ended:
        assert re.fullmatch(r" ?\(*x\)*", text) and text.count("(") == text.count(")")


# --- in generate --------------------------------------------------------------------------------------


def answer_ids(model, inputs, **options) -> list[int]:
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False, **options)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def test_an_answer_that_fits_is_the_models_own(model, processor):
    """Among the tokens that are whole characters, so that whatever it writes is a text."""
    tokens = token_bytes(processor.tokenizer)
    ends = [token for token, text in enumerate(tokens) if not text or b"\n" in text or not is_utf8(text)]
    options = dict(suppress_tokens=[model.config.image_token_id, 0, *ends])
    for colour in ("red", "blue", "green"):
        inputs = inputs_of(processor, user("What is it?", colour))
        own = answer_ids(model, inputs, **options)
        fits = structured_output(processor, regex="(?s:.*)")
        assert answer_ids(model, inputs, **options, logits_processor=[fits]) == own


def test_scores_of_what_fits_are_not_changed(world):
    scores = torch.randn(1, 65536, generator=torch.Generator().manual_seed(0))
    left = structured_output(world, choices=["yes", "no"])(PROMPT, scores)
    allowed = left > float("-inf")
    assert torch.equal(left[allowed], scores[allowed])
    tokens = token_bytes(world)
    wanted = {b" ", b" y", b"y", b"ye", b"yes", b" yes", b" ye", b"n", b"no", b" n", b" no"} & set(tokens)
    assert {tokens[i] for i in allowed[0].nonzero()[:, 0].tolist()} == wanted


def test_rows_of_a_batch_beams_and_calls_after_one_another(model, processor):
    choices = ["red dot", "blue line", "no"]
    fits = structured_output(processor, choices=choices)
    chats = [[user("What is it?", "red")], [user("Is it? Or not?", "blue")]]
    inputs = batch_of(processor, chats)
    for options in ({}, dict(num_beams=3), dict(do_sample=True, num_return_sequences=2), {}):
        output = model.generate(
            **inputs, logits_processor=[fits], max_new_tokens=30, **{"do_sample": False, **options}
        )
        texts = processor.post_process_image_text_to_text(output, prompt_length=inputs["input_ids"].shape[1])
        assert set(texts) <= set(choices)


# --- refusals -----------------------------------------------------------------------------------------

DEEP: dict = {}
for _ in range(70):
    DEEP = {"items": DEEP}
REFUSED = {
    "nothing": ({}, "Give one of json_schema, regex, choices and grammar, got 0"),
    "two": (dict(regex="a", choices=["a"]), "got 2"),
    "no choices": (dict(choices=[]), "at least one text"),
    "empty choice": (dict(choices=["a", " "]), "without blank lines"),
    "false": (dict(json_schema=False), "No text fits"),
    "contradiction": (
        dict(json_schema={"allOf": [{"type": "string"}, {"type": "number"}]}),
        "No text fits what the answer must look like: incompatible types",
    ),
    "no end": (dict(json_schema={"$ref": "#"}), "No text fits"),
    "no json": (dict(json_schema="{"), "is no JSON"),
    "a list": (dict(json_schema="[]"), "must be an object, got list"),
    "deep": (dict(json_schema=DEEP), "nested 64 levels deep"),
    "long": (dict(regex="x" * 70_000), "1 to 65536 characters, got 70000"),
    "wide": (
        dict(json_schema={"type": "object", "properties": {f"p{i}": {} for i in range(9000)}}),
        "can have 1 to 65536 characters",
    ),
    "type": (dict(json_schema={"type": "colour"}), "Invalid type: colour"),
    "elsewhere": (dict(json_schema={"$ref": "http://127.0.0.1:1/schema"}), "cannot be used"),
    "regex": (dict(regex="(a"), "unclosed group"),
    "look-around": (dict(regex="a(?=b)"), "look-around"),
    "only blank lines": (dict(regex="\n\n"), "No text fits"),
    "grammar": (dict(grammar="start: other"), "unknown name"),
    "brackets": (
        dict(grammar="start: " + "a{" * 2000),
        "can have 1,000 opening brackets, this one has 2,000",
    ),
    "rules": (dict(grammar="a:b\n" * 1001), "can have 1,000 rules, this one has 1,001"),
    "no list": (dict(choices=5), "Choices must be a list of at least one text, got 5"),
    "an object": (dict(choices={"a": 1}), "Choices must be a list"),
}


@pytest.mark.parametrize("given, message", REFUSED.values(), ids=REFUSED)
def test_what_no_answer_can_fit_is_refused_in_a_sentence(processor, given, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        structured_output(processor, **given)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


HOSTILE = {
    "length": dict(json_schema={"type": "string", "minLength": 10**9}),
    "items": dict(json_schema={"type": "array", "items": {}, "minItems": 10**8}),
    "powers": dict(regex="((a{1,100}){1,100}){1,100}"),
    "stars": dict(regex="(a*)*(a*)*(a*)*b"),
    "templates": dict(grammar="start: " + "a{" * 1000),
    "endless": dict(json_schema={"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}),
}


@pytest.mark.parametrize("given", HOSTILE.values(), ids=HOSTILE)
def test_what_never_ends_is_followed_or_refused(processor, given):
    """Each step does a limited amount of work: forty of them come to an end."""
    try:
        written(structured_output(processor, **given), processor.tokenizer, 0, most=40)
    except ValueError as error:
        assert "\n" not in str(error)
