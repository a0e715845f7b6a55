"""The old home of what is now in `visualrwkv_hf.conversion`; kept for one release, with a warning."""

import importlib
import warnings
from typing import Any

MOVED = {
    "to_hf": "original_to_hf",
    "to_original": "hf_to_original",
    "load_original": "state_dicts",
    "convert_state_dict": "state_dicts",
    "restore_state_dict": "state_dicts",
    "expected_shapes": "state_dicts",
}
"""Name -> the module where it is now."""


def __getattr__(name: str) -> Any:
    if name not in MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"visualrwkv_hf.conversion.convert.{name} has moved: import it from visualrwkv_hf.conversion.",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(importlib.import_module(f".{MOVED[name]}", __package__), name)
