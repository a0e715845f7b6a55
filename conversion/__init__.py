"""Original checkpoints to model folders and back.

```python
from visualrwkv_hf.conversion import to_hf

to_hf("VisualRWKV-v060-3B.pth", "visualrwkv-6-3b", dtype="bfloat16")
```
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
