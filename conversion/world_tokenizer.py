"""The RWKV World vocabulary as a stock fast tokenizer: one tokenizer.json, no tokenizer class of ours.

RWKV World tokenizes greedily: at each position of the UTF-8 bytes it takes the longest token that matches.
No model of the `tokenizers` library does that, but a regular expression can. The trie of all tokens is
written as one pattern in which every node tries its children before it stops, so what it matches is the
longest token by construction; the model is then a plain lookup of what was matched.

    text -> ByteLevel (one character per byte) -> Split(pattern) -> WordLevel (token -> id)
"""

import ast
import hashlib
import lzma
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import TokenizersBackend

VOCABULARY_PATH = Path(__file__).with_name("rwkv_vocab_v20230424.txt.xz")  # see VOCABULARY.md
VOCABULARY_SHA256 = "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"

VOCAB_SIZE = 65536  # rows of the embedding of every release
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0  # no token of the vocabulary: the original pads and ends documents with it
IMAGE_TOKEN = "<image>"

# What Oniguruma reads as syntax, inside a class or outside. "&&" would be too, but a class repeats nothing.
_PATTERN_SYNTAX = frozenset(r"\^$.|?*+()[]{}-")


def load_world_vocabulary(path: Path = VOCABULARY_PATH) -> dict[bytes, int]:
    """Read the RWKV World vocabulary that this package carries.

    Args:
        path: xz-compressed `rwkv_vocab_v20230424.txt`, one `id repr length` a line.

    Returns:
        token -> id: 65,529 distinct byte strings, ids 1 to 65529 in this order. Every single byte b is
        token b + 1. 486 tokens are not valid UTF-8 by themselves.

    Raises:
        ValueError: the decompressed file has another sha256 than the released one.

    Source: BlinkDL/RWKV-LM (Apache-2.0); see VOCABULARY.md.
    """
    content = lzma.decompress(path.read_bytes())
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != VOCABULARY_SHA256:
        raise ValueError(
            f"{path} has sha256 {sha256}, but the RWKV World vocabulary has {VOCABULARY_SHA256}."
        )
    return dict(_parse_line(line) for line in content.decode("utf-8").splitlines())


def _parse_line(line: str) -> tuple[bytes, int]:
    """`id repr length`: the repr, of a str or of bytes, may itself hold spaces."""
    token_id, rest = line.split(" ", 1)
    literal, length = rest.rsplit(" ", 1)
    token = ast.literal_eval(literal)
    token = token if isinstance(token, bytes) else token.encode("utf-8")
    assert len(token) == int(length), line
    return token, int(token_id)


def byte_alphabet() -> list[str]:
    """Return the character that ByteLevel writes for each byte, [256].

    Printable Latin-1 bytes stand for themselves, the others, in order, for U+0100 onwards.
    """
    characters = pre_tokenizers.ByteLevel.alphabet()
    others = iter(sorted(c for c in characters if ord(c) > 255))
    return [chr(b) if chr(b) in characters else next(others) for b in range(256)]


def longest_match_pattern(tokens: Iterable[str]) -> str:
    """Return the regular expression that matches, at any position, the longest of the given tokens.

    A node of the trie becomes `(?:child|child|[leaves])`, followed by `?` where a token may end. Children
    begin with different characters and `?` is greedy, so the first match found is the longest one. Neither
    look-around nor possessive operators are needed, and a failed branch costs at most one token's length.

    Args:
        tokens: distinct, non-empty strings.

    Returns:
        A pattern for Oniguruma (`tokenizers.Regex`) that Python's `re` understands, too.
    """
    return _trie_pattern(sorted(tokens))


def _trie_pattern(suffixes: list[str]) -> str:
    """Pattern of the sorted, distinct suffixes below one node; an empty one means that a token ends there."""
    ends_here = suffixes[0] == ""
    children = [
        (_escape(first), [suffix[1:] for suffix in group])
        for first, group in groupby(suffixes[ends_here:], key=lambda suffix: suffix[0])
    ]
    alternatives = [first + _trie_pattern(rest) for first, rest in children if rest != [""]]
    leaves = "".join(first for first, rest in children if rest == [""])
    if leaves:
        alternatives.append(f"[{leaves}]")
    if len(alternatives) == 1 and not ends_here:
        return alternatives[0]
    return f"(?:{'|'.join(alternatives)})" + ("?" if ends_here else "")


def _escape(character: str) -> str:
    return "\\" + character if character in _PATTERN_SYNTAX else character


def world_tokenizer_backend(
    vocabulary: Mapping[bytes, int], special_tokens: Mapping[str, int], vocab_size: int
) -> Tokenizer:
    """Return a tokenizer that encodes by greedy longest match over UTF-8 bytes, and decodes any ids.

    Ids that neither mapping names become the fillers `<|reserved_{id}|>`. The model's vocabulary must be
    contiguous, or tokens added later would get other ids after a reload. Fillers are no added tokens, so no
    text encodes to them: the pattern never matches one as a whole.

    Args:
        vocabulary: token -> id; must hold all 256 single bytes, so that every text can be encoded.
        special_tokens: text -> id, matched as a whole in text before anything else.
        vocab_size: number of ids; ids are 0 to vocab_size - 1.

    Returns:
        `tokenizers.Tokenizer` without post-processor, whose `get_vocab_size()` is vocab_size.

    Raises:
        ValueError: a single byte is missing, a token is empty, an id is outside [0, vocab_size) or given
            twice, or a special token or filler has the text of a token of the vocabulary.
    """
    _check_vocabulary(vocabulary, special_tokens, vocab_size)
    alphabet = byte_alphabet()
    byte_tokens = {"".join(alphabet[b] for b in token): i for token, i in vocabulary.items()}
    unused = set(range(vocab_size)) - set(byte_tokens.values()) - set(special_tokens.values())
    fillers = {f"<|reserved_{i}|>": i for i in sorted(unused)}
    if clash := sorted(byte_tokens.keys() & (special_tokens.keys() | fillers.keys())):
        raise ValueError(
            f"{clash} are tokens of the vocabulary and cannot be special tokens or fillers as well."
        )

    backend = Tokenizer(models.WordLevel({**byte_tokens, **special_tokens, **fillers}))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
            pre_tokenizers.Split(Regex(longest_match_pattern(byte_tokens)), "isolated"),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in special_tokens])
    return backend


def _check_vocabulary(
    vocabulary: Mapping[bytes, int], special_tokens: Mapping[str, int], vocab_size: int
) -> None:
    if missing := [bytes([b]) for b in range(256) if bytes([b]) not in vocabulary]:
        raise ValueError(f"The vocabulary lacks {len(missing)} of the 256 single bytes: {missing}.")
    if b"" in vocabulary:
        raise ValueError(f"The vocabulary holds the empty token (id {vocabulary[b'']}).")
    seen: dict[int, bytes | str] = {}
    tokens: list[tuple[bytes | str, int]] = [*vocabulary.items(), *special_tokens.items()]
    for token, i in tokens:
        if not 0 <= i < vocab_size:
            raise ValueError(f"Token {token!r} has id {i}, outside [0, {vocab_size}).")
        if i in seen:
            raise ValueError(f"Tokens {seen[i]!r} and {token!r} have the same id {i}.")
        seen[i] = token


def build_world_tokenizer(
    vocabulary: Mapping[bytes, int] | None = None,
    vocab_size: int = VOCAB_SIZE,
    image_token_id: int | None = None,
) -> TokenizersBackend:
    """Return the tokenizer of VisualRWKV, ready for `save_pretrained(dir)` and `AutoTokenizer.from_pretrained(dir)`.

    `<|endoftext|>` (id 0) ends and pads; there is no token that begins a text, and none is added. `<image>`
    is `tokenizer.image_token`. Padding is on the left, as generation wants it.

    In plain text, as in any stock tokenizer, the words `<image>` and `<|endoftext|>` become the special
    tokens. With `split_special_tokens=True` they are encoded as the text they are, which is what the original
    tokenizer does: use it for text that a user typed.

    Decoding differs from the original on purpose where the bytes are not valid UTF-8: the original returns
    one U+FFFD for the whole text, this one replaces what is broken and keeps the rest, like
    `bytes.decode("utf-8", errors="replace")`. A text cut inside a character so stays readable.

    Args:
        vocabulary: token -> id, the RWKV World vocabulary if None. A smaller one must hold all single bytes
            and leave id 0 and image_token_id free.
        vocab_size: number of ids, `len(tokenizer)`.
        image_token_id: id of `<image>`; the last one, vocab_size - 1, if None (65535 in v6.20 and v7.00).

    Raises:
        ValueError: as `world_tokenizer_backend`.
    """
    special_tokens = {
        END_OF_TEXT: END_OF_TEXT_ID,
        IMAGE_TOKEN: vocab_size - 1 if image_token_id is None else image_token_id,
    }
    return TokenizersBackend(
        tokenizer_object=world_tokenizer_backend(
            load_world_vocabulary() if vocabulary is None else vocabulary, special_tokens, vocab_size
        ),
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
