"""Import what a program needs that answers questions about pictures, in less time than by itself."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Keep Python from looking for cycles of garbage while the body imports modules.

    Importing torch and transformers makes a million objects that all stay. Python would look through them again and
    again, which takes a quarter of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def import_libraries() -> None:
    """Import torch, transformers and the classes of model and processor, some three seconds of processor time."""
    with without_collections():
        from ..modeling_visualrwkv import VisualRWKVForConditionalGeneration  # noqa: F401
        from ..processing_visualrwkv import VisualRWKVProcessor  # noqa: F401
        from .chat import Chat  # noqa: F401
        from .streaming import Generation  # noqa: F401


__all__ = ["import_libraries"]
