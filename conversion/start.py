"""The old home of `start_vlm`, now `visualrwkv_hf.conversion.assemble_vlm`; kept for one release, with a warning."""

import importlib
import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    if name != "start_vlm":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        "visualrwkv_hf.conversion.start.start_vlm is now visualrwkv_hf.conversion.assemble_vlm.",
        DeprecationWarning,
        stacklevel=2,
    )
    return importlib.import_module(".new_model", __package__).assemble_vlm
