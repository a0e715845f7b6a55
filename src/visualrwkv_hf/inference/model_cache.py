"""The user's cache folder of this package. Quick to import."""

import contextlib
import os
from pathlib import Path

NOTICE = "bundled-model-notice-shown"


def cache_folder() -> Path:
    """Return the folder for what can be made or fetched again. It may not exist yet.

    A relative or empty `XDG_CACHE_HOME` is ignored, as the XDG specification asks for.
    """
    named = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(named) if os.path.isabs(named) else Path.home() / ".cache"
    return base / "visualrwkv_hf"


def is_first_notice() -> bool:
    """Return whether the notice about the bundled model was never shown to this user, and remember that it now is."""
    marker = cache_folder() / NOTICE
    if marker.exists():
        return False
    with contextlib.suppress(OSError):  # without a cache it is shown again
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    return True
