"""Make text safe to show in a terminal. Imports nothing but the standard library."""

import unicodedata

KEPT = frozenset("\n\t\N{SOFT HYPHEN}\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}")
"""Characters of an escaped category that ordinary text needs: lines, emoji sequences, Persian words."""

ESCAPED_CATEGORIES = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
"""Unicode categories: control, format (bidirectional marks, tags), surrogate, line and paragraph separators."""


def printable(text: str) -> str:
    r"""Return `text` with every character that could steer a terminal written as an escape, for example `\x1b`.

    A model's answer, a file name or an error may come from a stranger. Sent as they are, control characters move the
    cursor, change the title or the clipboard, and bidirectional marks make a name read as another one.
    """
    return text if text.isprintable() else "".join(map(_shown, text))


def one_line(text: str) -> str:
    """Return `text` in one line, with runs of white space as one space, and as [`printable`] text."""
    return printable(" ".join(text.split()))


def _shown(character: str) -> str:
    if character in KEPT or unicodedata.category(character) not in ESCAPED_CATEGORIES:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


__all__ = ["one_line", "printable"]
