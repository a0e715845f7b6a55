"""Bars of bytes on standard error."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def bytes_bar(total: int | None = None) -> Iterator[Callable[[str, int], None]]:
    """Show the bytes written and the file's name on standard error; nothing if it is not a terminal.

    Reading the files back has a bar of its own, which takes the place of the first one.

    Args:
        total: how many bytes there will be, if that is known.

    Yields:
        Callable: takes a file's name, or `VERIFYING`, and the bytes written or compared since the last call.
    """
    from tqdm import tqdm

    from visualrwkv_hf.conversion.folders import VERIFYING

    bars = {False: tqdm(total=total, unit="B", unit_scale=True, disable=None)}

    def progress(file: str, num_bytes: int) -> None:
        is_verifying = file == VERIFYING
        if is_verifying not in bars:
            written = bars[False]
            written.close()
            bars[is_verifying] = tqdm(total=written.n or total, unit="B", unit_scale=True, disable=None)
        bars[is_verifying].set_description(file, refresh=False)
        bars[is_verifying].update(num_bytes)

    try:
        yield progress
    finally:
        for bar in bars.values():
            bar.close()
