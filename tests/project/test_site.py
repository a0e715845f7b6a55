"""The documentation site: every public name is on the API page, every page is in the navigation, the site builds."""

import importlib
import importlib.util
import re
import subprocess
import sys

import pytest
from paths import ROOT

import visualrwkv_hf

DOCS = ROOT / "docs"
PACKAGES = [
    "visualrwkv_hf",
    *(f"visualrwkv_hf.{name}" for name in ("conversion", "cpu", "inference", "training")),
]
CONSTANTS = {"PROMPT_FORMATS", "TRAINABLE_PARTS"}
"""Public names without a docstring of their own; the pages that use them explain them."""


def names_on_the_api_page() -> list[str]:
    return re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text("utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_on_the_api_page(package):
    listed = set(names_on_the_api_page())
    root = set(visualrwkv_hf.__all__)
    names = importlib.import_module(package).__all__
    expected = {f"{package}.{name}" for name in names if package == "visualrwkv_hf" or name not in root}
    assert {name for name in expected if name.rsplit(".", 1)[1] not in CONSTANTS} <= listed


def test_names_on_the_api_page_exist_and_have_docstrings():
    for name in names_on_the_api_page():
        module, attribute = name.rsplit(".", 1)
        assert getattr(importlib.import_module(module), attribute).__doc__, name


def test_every_page_is_in_the_navigation():
    navigation = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text("utf-8"))
    pages = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    assert sorted(navigation) == sorted(pages)


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
    reason='the site needs pip install -e ".[docs]"',
)
def test_the_site_builds_without_a_warning(tmp_path):
    """`strict: true` in mkdocs.yml makes every warning an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api" / "index.html").read_text("utf-8")
    assert all(f'id="{name}"' in page for name in names_on_the_api_page())
