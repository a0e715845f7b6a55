"""The Triton kernels as a repository for the Hub's `kernels` library, for models that are not this package's.

python examples/export_kernels.py visualrwkv-kernels
"""

import base64
import hashlib
import json
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[1]
NAME = "visualrwkv-kernels"
PLAIN = ("dispatch", "low_rank", "scan_orders", "token_order", "wkv")
"""Modules of the package that hold the plain torch functions and the choice between them and the kernels."""

PACKAGE = '''"""RWKV's recurrences, token shift and low-rank maps, as Triton kernels or in plain torch."""

from .dispatch import kernel_backend
from .low_rank import low_rank
from .token_order import IN_ORDER, TokenOrder, token_orders, token_shift
from .wkv import wkv6, wkv7

__all__ = ["IN_ORDER", "TokenOrder", "kernel_backend", "low_rank", "token_orders", "token_shift", "wkv6", "wkv7"]
'''

OLDER = '''"""The package in the folder above, under the name that older versions of the `kernels` library import."""

import importlib.util
import sys
from pathlib import Path

_path = Path(__file__).parents[1] / "__init__.py"
_name = f"{__name__}_{ID}"
_spec = importlib.util.spec_from_file_location(_name, _path)
_package = importlib.util.module_from_spec(_spec)
sys.modules[_name] = _package
_spec.loader.exec_module(_package)
globals().update({name: getattr(_package, name) for name in _package.__all__})
'''

CARD = """---
library_name: kernels
license: apache-2.0
tags: [kernels, rwkv]
---

# RWKV's recurrences in Triton

`wkv6` (RWKV-5 and 6), `wkv7`, `token_shift` and `low_rank`, forward and backward, for heads of 32, 64 and 128 in
bfloat16, float16 and float32. On a CUDA or ROCm device a call runs as Triton kernels; where Triton is missing, or for
other shapes and dtypes, as plain torch, after a warning that says why.

```python
from kernels import get_kernel

rwkv = get_kernel("OWNER/visualrwkv-kernels", version=1, trust_remote_code=True)
y, state = rwkv.wkv7(r, w, k, v, a, b, initial_state, min_log_decay=-0.6065306597126334)  # w is the log decay
```

The docstrings give shapes, dtypes and equations.
"""


def variant_files() -> dict[str, str]:
    """Return the files of the package by path, with imports and names of ops still as they are in this project."""
    kernels = {f"triton_kernels/{path.name}": path for path in sorted((ROOT / "triton_kernels").glob("*.py"))}
    plain = {f"{name}.py": ROOT / "src" / "visualrwkv_hf" / f"{name}.py" for name in PLAIN}
    return {"__init__.py": PACKAGE} | {
        name: path.read_text(encoding="utf-8") for name, path in (kernels | plain).items()
    }


def replaced(files: dict[str, str], name: str, old: str, new: str) -> None:
    """Replace what must be in a file.

    Raises:
        ValueError: it is not there.
    """
    if old not in files[name]:
        raise ValueError(f"{name} does not contain {old!r}.")
    files[name] = files[name].replace(old, new)


def export(folder: Path, version: int = 1) -> Path:
    """Write the repository, and return the folder of its only build, `build/torch-universal`.

    The library may load several versions of a kernel in one process. So modules import one another relatively, and
    ops have a namespace that is made from the contents of all files.

    Args:
        folder: made; it must not exist, or be empty.
        version: the repository's major version, to be raised when a function's arguments change.

    Raises:
        ValueError: the folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty.")
    files = variant_files()
    contents = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    namespace = f"_{NAME.replace('-', '_')}_{contents[:12]}"
    replaced(files, "triton_kernels/launches.py", 'NAMESPACE = "visualrwkv"', f'NAMESPACE = "{namespace}"')
    replaced(files, "dispatch.py", "from visualrwkv_hf.", "from .")
    files[f"{NAME.replace('-', '_')}/__init__.py"] = OLDER.replace("{ID}", namespace)
    build = folder / "build" / "torch-universal"
    for name, text in files.items():
        path = build / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (build / "metadata.json").write_text(json.dumps(metadata(files, namespace, version), indent=2) + "\n")
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    (folder / "LICENSE").write_text((ROOT / "LICENSE").read_text(encoding="utf-8"), encoding="utf-8")
    return build


def metadata(files: dict[str, str], namespace: str, version: int) -> dict[str, object]:
    """Return what the library reads first: a unique name for the module, and what each file must hash to."""
    digests = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for name, text in sorted(files.items())
    }
    return {
        "id": namespace,
        "name": NAME,
        "version": version,
        "license": "Apache-2.0",
        "kernels-minver": "0.17.0",
        "python-depends": [],
        "backend": {"type": "cuda"},
        "digest": {"algorithm": "sha256", "files": digests},
    }


def main(
    folder: Annotated[Path, typer.Argument(help="The folder to make.")],
    version: Annotated[int, typer.Option(help="The repository's major version.")] = 1,
) -> None:
    """Writes a repository that `kernels.get_local_kernel` loads, and `hf upload --repo-type kernel` publishes."""
    try:
        typer.echo(export(folder, version))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


if __name__ == "__main__":
    typer.run(main)
