"""Adjust `mkdocs build`: mkdocstrings sees the whole package, and links to files that are no pages become paths."""

import re
import tempfile
from pathlib import Path

from mkdocs.plugins import event_priority

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE_SRC = ("conversion", "triton_kernels")
"""Sub-packages whose folders are beside `src/`."""


@event_priority(100)  # before mkdocstrings, which reads its configuration once
def on_config(config, **kwargs):
    """Let mkdocstrings read the package as it is installed, with the sub-packages whose folders are elsewhere."""
    view = tempfile.TemporaryDirectory()
    package = Path(view.name) / "visualrwkv_hf"
    package.mkdir()
    for path in (ROOT / "src/visualrwkv_hf").iterdir():
        (package / path.name).symlink_to(path)
    for name in OUTSIDE_SRC:
        (package / name).symlink_to(ROOT / name)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [view.name]
    config.extra["package_view"] = view  # removed when mkdocs ends
    return config


def on_page_markdown(markdown, **kwargs):
    """Turn links to files that are not pages (code, tests, examples) into their paths."""
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?:\.\./)+([^)#]*)(?:#[^)]*)?\)", _path, markdown)


def _path(link: re.Match) -> str:
    text, path = link[1].strip("`"), link[2]
    return f"`{path}`" if path.endswith(text) else f"{link[1]} (`{path}`)"
