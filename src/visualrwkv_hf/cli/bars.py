"""A bar of bytes on standard error."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def bytes_bar(total: int | None = None) -> Iterator[Callable[[str, int], None]]:
    """Show the bytes written and the file's name on standard error; nothing if it is not a terminal.

    Args:
        total: how many bytes there will be, if that is known.

    Yields:
        Callable: takes a file's name and the bytes written since the last call.
    """
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:

        def progress(file: str, num_bytes: int) -> None:
            bar.set_description(file, refresh=False)
            bar.update(num_bytes)

        yield progress
