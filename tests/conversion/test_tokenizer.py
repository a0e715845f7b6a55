"""The fast World tokenizer against the original's numbers and against a plain greedy longest match."""

import json
import lzma
import random
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import accumulate

import pytest
import torch
from paths import GOLDEN
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer, TextIteratorStreamer, TokenizersBackend

from visualrwkv_hf.conversion.world_tokenizer import (
    VOCABULARY_PATH,
    VOCABULARY_SHA256,
    build_world_tokenizer,
    byte_alphabet,
    load_world_vocabulary,
    longest_match_pattern,
    world_tokenizer_backend,
)

GOLDEN_CASES = GOLDEN / "g_tokenizer" / "encode"
MEGABYTES_PER_KIND = 2.1  # ten kinds of text below: 21 MB


def golden_rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (GOLDEN_CASES / name).read_text("utf-8").splitlines()]


def is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


@cache
def world() -> dict[bytes, int]:
    return load_world_vocabulary()


@cache
def world_texts() -> list[str]:
    return [token.decode("utf-8") for token in world() if is_utf8(token)]


class GreedyLongestMatch:
    """The independent truth: walk a trie of bytes, remember the last node that was a token."""

    def __init__(self, vocabulary: Mapping[bytes, int]):
        self.root: dict = {}
        for token, token_id in vocabulary.items():
            node = self.root
            for byte in token:
                node = node.setdefault(byte, {})
            node["id"] = token_id

    def __call__(self, content: bytes) -> list[int]:
        ids, start, end = [], 0, len(content)
        while start < end:
            node, position = self.root, start
            while position < end and content[position] in node:
                node = node[content[position]]
                position += 1
                if "id" in node:
                    longest = (node["id"], position)
            token_id, start = longest
            ids.append(token_id)
        return ids


@pytest.fixture(scope="module")
def vocabulary() -> dict[bytes, int]:
    return world()


@pytest.fixture(scope="module")
def greedy(vocabulary) -> GreedyLongestMatch:
    return GreedyLongestMatch(vocabulary)


@pytest.fixture(scope="module")
def tokenizer() -> TokenizersBackend:
    return build_world_tokenizer()


@pytest.fixture(scope="module")
def reloaded(tokenizer, tmp_path_factory) -> TokenizersBackend:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def encode_plain(tokenizer: TokenizersBackend, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, split_special_tokens=True)["input_ids"]


# The vocabulary


def test_vocabulary_has_the_released_facts(vocabulary):
    facts = json.loads((GOLDEN_CASES / "facts.json").read_text("utf-8"))
    assert facts["vocab_sha256"] == VOCABULARY_SHA256
    assert len(vocabulary) == facts["vocab_entries"]
    assert list(vocabulary.values()) == list(range(facts["min_id"], facts["max_id"] + 1))
    assert max(map(len, vocabulary)) == facts["longest_token_bytes"]
    assert all(vocabulary[bytes([b])] == b + 1 for b in range(256))
    assert sum(not is_utf8(token) for token in vocabulary) == 486
    ending_in_newline = {
        str(i): token.hex()
        for token, i in vocabulary.items()
        if token.endswith(b"\n") and token.strip(b"\r\n\t ")
    }
    assert facts["non_blank_tokens_ending_in_newline"].items() <= ending_in_newline.items()


def test_vocabulary_with_another_sha256_is_refused(tmp_path):
    changed = tmp_path / "vocabulary.txt.xz"
    changed.write_bytes(lzma.compress(lzma.decompress(VOCABULARY_PATH.read_bytes()).replace(b"\n", b"\r\n")))
    with pytest.raises(ValueError, match=rf"has sha256 [0-9a-f]{{64}}, but .* has {VOCABULARY_SHA256}"):
        load_world_vocabulary(changed)


def test_model_vocabulary_is_contiguous_and_keeps_the_ids(tokenizer, vocabulary):
    assert len(tokenizer) == tokenizer.vocab_size == 65536
    alphabet = byte_alphabet()
    expected = {"".join(alphabet[b] for b in token): i for token, i in vocabulary.items()}
    expected |= {"<|endoftext|>": 0, "<image>": 65535}
    expected |= {f"<|reserved_{i}|>": i for i in range(65530, 65535)}
    assert tokenizer.get_vocab() == expected


# Encoding: the original's numbers


def test_golden_strings(tokenizer):
    rows = golden_rows("strings.jsonl")
    assert len(rows) == 2818
    wrong = [
        row
        for row, ids in zip(rows, encode_plain(tokenizer, [row["text"] for row in rows]), strict=True)
        if ids != row["ids"]
    ]
    assert not wrong


def test_golden_bytes(tokenizer, vocabulary):
    """Bytes that are no text never reach the tokenizer, but its pattern must split them as the original."""
    alphabet = byte_alphabet()
    split = pre_tokenizers.Split(
        Regex(longest_match_pattern("".join(alphabet[b] for b in token) for token in vocabulary)), "isolated"
    )
    rows = golden_rows("bytes.jsonl")
    assert len(rows) == 150
    for row in rows:
        content = bytes.fromhex(row["hex"])
        pieces = split.pre_tokenize_str("".join(alphabet[b] for b in content))
        assert tokenizer.convert_tokens_to_ids([piece for piece, _ in pieces]) == row["ids"]
        if is_utf8(content):
            assert encode_plain(tokenizer, [content.decode("utf-8")]) == [row["ids"]]


def test_golden_facts(tokenizer):
    facts = json.loads((GOLDEN_CASES / "facts.json").read_text("utf-8"))["encode"]
    assert dict(zip(facts, encode_plain(tokenizer, list(facts)), strict=True)) == facts


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        ("User:", [24281, 59]),
        ("User: ", [24281, 59, 33]),
        ("Assistant:", [5585, 41693, 59]),
        ("\n", [11]),
        ("\n\n", [261]),
        ("\n\n\n", [3328]),
        (" \n\n", [3336]),
        ("User: hi\n\n", [24281, 59, 4571, 261]),
        ("Assistant: Yes\n\n", [5585, 41693, 59, 21186, 261]),
        ("User: What is this?\n", [24281, 59, 30031, 4600, 32234, 64, 11]),
        (
            "\nWhat is the name of this bird?\n\n",
            [11, 24326, 4600, 22590, 31496, 4706, 32234, 30289, 64, 261],
        ),
        (
            "Answer the question using a single word or phrase.",
            [40301, 22590, 57009, 40085, 332, 47289, 32497, 4715, 46808, 47],
        ),
    ],
)
def test_prompt_pieces_as_in_the_fact_sheet(tokenizer, text, ids):
    assert tokenizer.encode(text) == ids  # as users call it: nothing is added at either end


# Encoding: greedy longest match on generated text


def blocks(spans: str) -> list[range]:
    """Code points of Unicode blocks, written "first-last" in hexadecimal."""
    ends = [[int(end, 16) for end in span.split("-")] for span in spans.split()]
    return [range(first, last + 1) for first, last in ends]


SCRIPTS = blocks(
    "20-7E A0-24F 250-2FF 370-3FF 400-52F 530-58F 900-97F 980-9FF A00-A7F B80-BFF C00-C7F D00-D7F E00-E7F "
    "E80-EFF F00-FFF 1000-109F 10A0-10FF 1200-137F 13A0-13FF 1780-17FF 1800-18AF 1E00-1FFF 2000-206F "
    "2070-214F 2190-22FF 2500-27BF 2800-28FF A000-A48F 10300-1034F 12000-123FF 1D400-1D7FF E000-F8FF "
    "FF00-FFEF"
)
EAST_ASIA = blocks(
    "1100-11FF 3000-303F 3040-30FF 3100-312F 3400-4DBF 4E00-9FFF AC00-D7A3 F900-FAFF 20000-2A6DF"
)
RIGHT_TO_LEFT = blocks("590-5FF 600-6FF 700-77F 8A0-8FF FB50-FDFF FE70-FEFF")
MARKS = blocks("300-36F 483-489 5B0-5C7 64B-65F 1AB0-1AFF 20D0-20FF")
EMOJI = blocks("1F300-1F64F 1F680-1F6FF 1F900-1FAFF 2600-26FF")
EMOJI_JOINTS = ["", "", "\u200d", "\ufe0f", "\ufe0f\u200d", "\u20e3", *map(chr, range(0x1F3FB, 0x1F400))]
BIDI = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
SPACES = [*" \t\n\r\x0b\x0c\x85\xa0\u2003\u2028\u3000\ufeff", "\r\n"]
CONTROLS = [*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0)), "\ufffd", "\ufffe", "\uffff", "\U0010ffff"]
CODE = r"""
def class return import for while if else self. np. == != <= >= -> => :: && || ++ -- += ** // /* */ <!-- -->
<div> </div> {} [] () ({ }) ]; }; \n \\ \x00 %d %s ${ }} {{ # ### //// ==== ---- **** ____ 0x 1e-4 'a' ""
User: Assistant: <image <|endoftext |> <|im_start|> int* std::vector<int> public static void println! fn &mut
"""
CODE_WORDS = CODE.split()


def letters(rng: random.Random, scripts: list[range], most: int) -> str:
    return "".join(map(chr, rng.choices(rng.choice(scripts), k=rng.randint(1, most))))


def any_code_points(rng: random.Random) -> str:
    code_points = rng.choices(range(0x110000), k=50)
    return "".join(chr(c) for c in code_points if not 0xD800 <= c <= 0xDFFF)  # surrogates are no text


def mixed_scripts(rng: random.Random) -> str:
    return letters(rng, SCRIPTS, 12) + rng.choice(["", " ", "\n", ". ", ", "])


def east_asia(rng: random.Random) -> str:
    return letters(rng, EAST_ASIA, 20) + rng.choice("，。！？、…「」 \n")


def right_to_left(rng: random.Random) -> str:
    return rng.choice(BIDI) * rng.randint(0, 1) + letters(rng, RIGHT_TO_LEFT, 15) + rng.choice(" \n،؟.1aא")


def combining_marks(rng: random.Random) -> str:
    return letters(rng, SCRIPTS + EAST_ASIA + RIGHT_TO_LEFT, 1) + letters(rng, MARKS, 5)


def emoji(rng: random.Random) -> str:
    return letters(rng, EMOJI, 1) + rng.choice(EMOJI_JOINTS) + " " * (rng.random() < 0.1)


def whitespace_and_digits(rng: random.Random) -> str:
    return rng.choice(SPACES) * rng.randint(1, 140) + str(rng.getrandbits(rng.randint(1, 200)))


def code_and_controls(rng: random.Random) -> str:
    return rng.choice(CODE_WORDS) + rng.choice(["", " ", "\n", "\n    ", "\t", rng.choice(CONTROLS)])


def long_runs(rng: random.Random) -> str:
    piece = letters(rng, SCRIPTS + EAST_ASIA + RIGHT_TO_LEFT + EMOJI, 2)
    return piece * rng.randint(1, 400)


def vocabulary_tokens(rng: random.Random) -> str:
    """Whole tokens and tokens cut short or doubled: the places where a longer match begins and then fails."""
    token = rng.choice(world_texts())
    return rng.choice([token, token, token[:-1], token[1:], token + token[:1], token * 2])


KINDS: list[Callable[[random.Random], str]] = [
    any_code_points,
    mixed_scripts,
    east_asia,
    right_to_left,
    combining_marks,
    emoji,
    whitespace_and_digits,
    code_and_controls,
    long_runs,
    vocabulary_tokens,
]


def generated_texts(kind: Callable[[random.Random], str], megabytes: float) -> Iterator[str]:
    """Texts of 1 to about 4,000 characters, together at least so many megabytes of UTF-8."""
    rng = random.Random(kind.__name__)
    left = megabytes * 1e6
    while left > 0:
        length, pieces = rng.randint(1, 4000), []
        while length > 0:
            pieces.append(kind(rng))
            length -= len(pieces[-1])
        yield (text := "".join(pieces))
        left -= len(text.encode("utf-8"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_equals_greedy_longest_match_and_decodes_to_the_text(tokenizer, greedy, kind):
    texts = list(generated_texts(kind, MEGABYTES_PER_KIND))
    ids = encode_plain(tokenizer, texts)
    # Not one comparison of the lists: pytest would print megabytes.
    assert not [t[:200] for t, i in zip(texts, ids, strict=True) if i != greedy(t.encode("utf-8"))]
    assert not [t[:200] for t, d in zip(texts, tokenizer.batch_decode(ids), strict=True) if d != t]


def test_every_token_that_is_text_encodes_to_itself(tokenizer, vocabulary):
    ids = encode_plain(tokenizer, world_texts())
    assert ids == [[vocabulary[text.encode("utf-8")]] for text in world_texts()]


@pytest.mark.parametrize(
    "character", list(" a0=\n.") + ["\u00e9", "\u3042", "\u0a26", "\u4e2d", "\U0001f600", "\x00"]
)
def test_long_run_of_one_character(tokenizer, greedy, character):
    """Work that grows with the square of a run would not end at this length."""
    run = character * 200_000
    ids = tokenizer.encode(run)
    assert ids == greedy(run.encode("utf-8"))
    assert tokenizer.decode(ids) == run


def test_run_of_spaces_is_cut_into_longest_tokens(tokenizer, vocabulary):
    ids = tokenizer.encode(" " * 200_000)  # 1,562 times the token of 128 spaces, and 64 more
    assert ids == [vocabulary[b" " * 128]] * 1562 + tokenizer.encode(" " * 64)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_offsets_are_the_characters_that_hold_the_token(tokenizer, vocabulary, kind):
    length_of = {i: len(token) for token, i in vocabulary.items()}
    texts = list(generated_texts(kind, 0.05))
    encoding = tokenizer(texts, split_special_tokens=True, return_offsets_mapping=True)
    for text, ids, offsets in zip(texts, encoding["input_ids"], encoding["offset_mapping"], strict=True):
        character_of = [i for i, c in enumerate(text) for _ in c.encode("utf-8")]  # [bytes]
        ends = list(accumulate(length_of[i] for i in ids))
        assert ends[-1] == len(character_of)
        starts = [0, *ends[:-1]]
        assert offsets == [(character_of[s], character_of[e - 1] + 1) for s, e in zip(starts, ends)]


# Special tokens


def test_special_tokens(tokenizer):
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (0, 0, None)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|endoftext|>")
    assert (tokenizer.image_token, tokenizer.image_token_id) == ("<image>", 65535)
    assert sorted(tokenizer.all_special_ids) == [0, 65535]
    assert sorted(tokenizer.added_tokens_decoder) == [0, 65535]  # no filler is matched in text


def test_special_tokens_in_text_are_special_and_strip_nothing(tokenizer):
    ids = tokenizer.encode("a <image> b\n<|endoftext|>\n")
    assert ids == [*tokenizer.encode("a "), 65535, *tokenizer.encode(" b\n"), 0, *tokenizer.encode("\n")]
    assert tokenizer.decode(ids) == "a <image> b\n<|endoftext|>\n"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a  b\n\n"


@pytest.mark.parametrize("text", ["<image>", "<|endoftext|>", "User: <image>\n<|endoftext|>\n\n"])
def test_split_special_tokens_reads_them_as_text(tokenizer, greedy, text):
    ids = tokenizer.encode(text, split_special_tokens=True)
    assert ids == greedy(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text
    assert not {0, 65535} & set(ids)


@pytest.mark.parametrize("filler", range(65530, 65535))
def test_fillers_decode_but_no_text_encodes_to_them(tokenizer, greedy, filler):
    text = tokenizer.decode([filler])
    assert text == f"<|reserved_{filler}|>"
    assert tokenizer.encode(text) == greedy(text.encode("utf-8"))


def test_batches_are_padded_on_the_left(tokenizer):
    batch = tokenizer(["User:", "\n\n", ""], padding=True)
    assert dict(batch) == {
        "input_ids": [[24281, 59], [0, 261], [0, 0]],
        "attention_mask": [[1, 1], [0, 1], [0, 0]],
    }


# Decoding


def test_golden_decode(tokenizer):
    rows = golden_rows("decode.jsonl") + golden_rows("bytes.jsonl")
    assert len(rows) == 301
    for row in rows:
        content = bytes.fromhex(row["hex"])
        decoded = tokenizer.decode(row["ids"])
        if is_utf8(content):
            assert decoded == row.get("text", decoded) == content.decode("utf-8")
        else:
            # Deliberate: the original returns one U+FFFD for the whole text, we keep what is readable.
            assert row.get("text", "\ufffd") == "\ufffd"
            assert decoded == content.decode("utf-8", errors="replace")


def test_streaming_never_shows_half_a_character(tokenizer):
    text = "안녕 세상 😀👩‍👩‍👧 你好，龘𠀀 ਦਦ é\u0301 ⠿ end\n"
    ids = tokenizer.encode(text)
    assert any("\ufffd" in tokenizer.decode([i]) for i in ids)  # or the test would show nothing
    streamer = TextIteratorStreamer(tokenizer)
    for i in ids:
        streamer.put(torch.tensor([i]))
    streamer.end()
    pieces = list(streamer)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


# Saving and loading


def test_save_and_reload_changes_nothing(tokenizer, reloaded):
    assert type(reloaded) is TokenizersBackend
    assert reloaded.get_vocab() == tokenizer.get_vocab()
    assert len(reloaded) == 65536
    assert reloaded.special_tokens_map == tokenizer.special_tokens_map
    assert (reloaded.image_token, reloaded.image_token_id) == ("<image>", 65535)
    assert (reloaded.eos_token_id, reloaded.pad_token_id, reloaded.bos_token_id) == (0, 0, None)
    assert (reloaded.padding_side, reloaded.model_input_names) == ("left", ["input_ids", "attention_mask"])
    assert reloaded.clean_up_tokenization_spaces is False
    texts = [row["text"] for row in golden_rows("strings.jsonl")]
    ids = encode_plain(reloaded, texts)
    assert ids == encode_plain(tokenizer, texts)
    assert reloaded.batch_decode(ids) == texts
    assert reloaded(texts)["input_ids"] == tokenizer(texts)["input_ids"]


def test_saving_again_writes_the_same_files(tokenizer, reloaded, tmp_path):
    tokenizer.save_pretrained(tmp_path / "first")
    reloaded.save_pretrained(tmp_path / "second")
    written = [(tmp_path / folder / "tokenizer.json").read_bytes() for folder in ("first", "second")]
    assert written[0] == written[1]
    config = json.loads((tmp_path / "first" / "tokenizer_config.json").read_text("utf-8"))
    assert config["tokenizer_class"] == "TokenizersBackend"
    assert "auto_map" not in config


def test_tokens_added_later_keep_their_ids_after_a_reload(reloaded, tmp_path):
    """What a gap in the model's vocabulary would break."""
    extended = AutoTokenizer.from_pretrained(reloaded.name_or_path)
    extended.add_tokens(["<new>"])
    extended.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.encode("a<new>") == extended.encode("a<new>") == [98, 65536]


# Other vocabularies


def cut_down(tokens: list[bytes]) -> dict[bytes, int]:
    """All single bytes and these tokens, with ids 1, 2, 3, …"""
    return {
        token: i for i, token in enumerate(dict.fromkeys([*(bytes([b]) for b in range(256)), *tokens]), 1)
    }


def subset_of_world() -> list[bytes]:
    return list(world())[::23]


def regular_expression_syntax() -> list[bytes]:
    rng = random.Random(0)
    return ["".join(rng.choices(r"\^$.|?*+()[]{}-&:=!<a", k=rng.randint(2, 5))).encode() for _ in range(3000)]


@pytest.mark.parametrize(
    "tokens", [list, subset_of_world, regular_expression_syntax], ids=lambda f: f.__name__
)
def test_cut_down_vocabulary(tokens, tmp_path):
    small = cut_down(tokens())  # `list`: single bytes and nothing else
    vocab_size = len(small) + 4  # id 0, two fillers, <image>
    greedy = GreedyLongestMatch(small)
    build_world_tokenizer(small, vocab_size).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    assert len(tokenizer) == vocab_size
    assert (tokenizer.pad_token_id, tokenizer.image_token_id) == (0, vocab_size - 1)
    rng = random.Random(1)
    syntax = ["".join(rng.choices(r"\^$.|?*+()[]{}-&:=!<a", k=50)) for _ in range(500)]
    for texts in [syntax, *(list(generated_texts(kind, 0.05)) for kind in KINDS)]:
        ids = encode_plain(tokenizer, texts)
        assert ids == [greedy(text.encode("utf-8")) for text in texts]
        assert tokenizer.batch_decode(ids) == texts
    assert tokenizer.encode("<image>") == [vocab_size - 1]


def test_image_token_id_can_be_another_unused_id():
    tokenizer = build_world_tokenizer(cut_down([]), vocab_size=300, image_token_id=297)
    assert (tokenizer.image_token_id, len(tokenizer)) == (297, 300)
    assert tokenizer.convert_ids_to_tokens([296, 298]) == ["<|reserved_296|>", "<|reserved_298|>"]


def test_pattern_prefers_the_longest_token_even_past_a_gap():
    pattern = longest_match_pattern(["a", "b", "c", "abc", "abcab"])  # "ab" and "abca" are no tokens
    assert re.findall(pattern, "ababcabcabcab") == ["a", "b", "abcab", "c", "abcab"]


def without(*tokens: bytes) -> dict[bytes, int]:
    return {token: i for token, i in cut_down([]).items() if token not in tokens}


@pytest.mark.parametrize(
    ("vocabulary", "special_tokens", "message"),
    [
        (without(b"A", b"\xff"), {}, r"lacks 2 of the 256 single bytes: [b'A', b'\xff']."),
        (cut_down([]) | {b"": 257}, {}, "holds the empty token (id 257)."),
        (cut_down([]) | {b"ab": 300}, {}, "Token b'ab' has id 300, outside [0, 300)."),
        (cut_down([]) | {b"ab": -1}, {}, "Token b'ab' has id -1, outside [0, 300)."),
        (cut_down([]), {"<image>": 300}, "Token '<image>' has id 300, outside [0, 300)."),
        (cut_down([]) | {b"ab": 98}, {}, "Tokens b'a' and b'ab' have the same id 98."),
        (cut_down([]), {"<image>": 98}, "Tokens b'a' and '<image>' have the same id 98."),
        (cut_down([b"<image>"]), {"<image>": 299}, "['<image>'] are tokens of the vocabulary"),
        (cut_down([b"<|reserved_299|>"]), {}, "['<|reserved_299|>'] are tokens of the vocabulary"),
    ],
)
def test_vocabulary_that_cannot_work_is_refused(vocabulary, special_tokens, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        world_tokenizer_backend(vocabulary, special_tokens, vocab_size=300)
