"""Bars of bytes on standard error."""

import contextlib
from collections.abc import Iterator
from typing import Any


class BytesBar:
    """Show the bytes written and the file's name on standard error; nothing if it is not a terminal.

    Reading the files back has a bar of its own, which takes the place of the first one.
    """

    def __init__(self) -> None:
        self.total: int | None = None
        self.bars: dict[bool, Any] = {}

    def expect(self, total: int) -> None:
        """Take how many bytes will be written."""
        self.total = total

    def __call__(self, file: str, num_bytes: int) -> None:
        """Take a file's name, or `VERIFYING`, and the bytes written or compared since the last call."""
        from tqdm import tqdm

        from visualrwkv_hf.conversion.folders import VERIFYING

        is_verifying = file == VERIFYING
        if is_verifying not in self.bars:
            total = self.total
            if is_verifying and False in self.bars:
                self.bars[False].close()
                total = self.bars[False].n
            self.bars[is_verifying] = tqdm(total=total, unit="B", unit_scale=True, disable=None)
        self.bars[is_verifying].set_description(file, refresh=False)
        self.bars[is_verifying].update(num_bytes)

    def close(self) -> None:
        """Leave the bars as they are."""
        for bar in self.bars.values():
            bar.close()


@contextlib.contextmanager
def bytes_bar() -> Iterator[BytesBar]:
    """Yield a bar, and close it at the end."""
    bar = BytesBar()
    try:
        yield bar
    finally:
        bar.close()
