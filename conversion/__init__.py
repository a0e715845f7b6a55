"""Original checkpoints to model folders and back.

```python
from visualrwkv_hf.conversion import to_hf

to_hf("VisualRWKV-v060-3B.pth", "visualrwkv-6-3b", dtype="bfloat16")
```
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import ConversionError
    from .hf_to_original import to_original
    from .new_model import assemble_vlm
    from .original_to_hf import to_hf
    from .state_dicts import convert_state_dict, expected_shapes, load_original, restore_state_dict

MODULE_OF = {
    "ConversionError": "errors",
    "assemble_vlm": "new_model",
    "convert_state_dict": "state_dicts",
    "expected_shapes": "state_dicts",
    "load_original": "state_dicts",
    "restore_state_dict": "state_dicts",
    "to_hf": "original_to_hf",
    "to_original": "hf_to_original",
}
"""Public name -> the module that is imported when the name is first used."""

__all__ = [
    "ConversionError",
    "assemble_vlm",
    "convert_state_dict",
    "expected_shapes",
    "load_original",
    "restore_state_dict",
    "to_hf",
    "to_original",
]


def __getattr__(name: str) -> Any:
    if name not in MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value
