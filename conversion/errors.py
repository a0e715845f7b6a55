"""The error of this package, and how other people's errors become one sentence."""


class ConversionError(ValueError):
    """A checkpoint or a folder cannot be converted; the message is a sentence for the person who asked for it."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without its full stop, or the error's type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
