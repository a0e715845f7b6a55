"""Import transformers' own common tests from its unpacked sdist, as the package `transformers_tests_of_sdist`.

The sdist holds `tests/test_modeling_common.py` and the like, but not what these import from the rest of transformers'
tests. Those parts are replaced by stand-ins that are named here.
"""

import importlib
import importlib.util
import json
import os
import re
import sys
import tempfile
import unittest
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from PIL import Image

PACKAGE = "transformers_tests_of_sdist"

SUMMARY_VARIABLE = "TRANSFORMERS_TINY_MODEL_PATH"
"""Names the folder in which the pipeline tests look for tiny models, and for a summary of them."""


class ExportTesterMixin:
    """Stand-in: the tests of torch.export are not in the sdist."""


class GenerationTesterMixin:
    """Stand-in: the tests of generation are not in the sdist."""


def url_to_local_path(url: str) -> str:
    """Stand-in: return a picture that is made here in place of one of the Hub, and other URLs as they are."""
    if not url.endswith((".png", ".jpg")):
        return url
    path = _scratch() / "picture.png"
    if not path.exists():
        Image.new("RGB", (48, 36), (200, 90, 40)).save(path)
    return str(path)


STAND_INS = {
    "exporters": {},
    "exporters.test_export": {"ExportTesterMixin": ExportTesterMixin},
    "generation": {},
    "generation.test_utils": {"GenerationTesterMixin": GenerationTesterMixin},
    "utils": {},
    "utils.test_configuration_utils": {"config_common_kwargs": {}},
    "distributed_testing_utils": {"run_distributed": None},
}
"""Maps a module of transformers' tests that the sdist lacks to the names that are imported from it."""

TOP_LEVEL_STAND_INS = {"fetch_hub_objects_for_ci": {"url_to_local_path": url_to_local_path}}
"""Maps a module of transformers' folder `utils` that the sdist lacks to the names that are imported from it."""

_folders: list[tempfile.TemporaryDirectory] = []


def _scratch() -> Path:
    """Return a folder that is removed when the tests end."""
    if not _folders:
        _folders.append(tempfile.TemporaryDirectory())
    return Path(_folders[0].name)


def install(tests: Path) -> None:
    """Make the modules of an unpacked sdist's `tests` folder importable by [`load`].

    Raises:
        FileNotFoundError: If the folder does not hold the common tests.
    """
    if not (tests / "test_modeling_common.py").is_file():
        raise FileNotFoundError(
            f"{tests} holds no test_modeling_common.py: unpack the sdist of transformers there."
        )
    (tests / "__init__.py").touch()  # pytest reads this file of a package, and the sdist has none
    package = ModuleType(PACKAGE)
    package.__path__ = [str(tests)]
    sys.modules[PACKAGE] = package
    stand_ins = {f"{PACKAGE}.{name}": content for name, content in STAND_INS.items()} | TOP_LEVEL_STAND_INS
    for name, content in stand_ins.items():
        module = ModuleType(name)
        module.__path__ = []
        module.__dict__.update(content)
        sys.modules[name] = module
    models = models_folder()
    (models / "reports").mkdir(parents=True, exist_ok=True)
    (models / "reports" / "tiny_model_summary.json").write_text(json.dumps({}))
    os.environ[SUMMARY_VARIABLE] = str(models)
    sample = _scratch() / "fixtures" / "sample_text.txt"
    sample.parent.mkdir(exist_ok=True)
    sample.write_text("Some words.\n\nAnd a second paragraph.\n")


def models_folder() -> Path:
    """Return the folder in which the pipeline tests find a model: `MODEL_TYPE/CLASS` below it."""
    return _scratch() / "models"


def fixtures_folder() -> Path:
    """Return the folder that replaces transformers' `tests`; the tests open `fixtures/sample_text.txt` in it."""
    return _scratch()


def markers(tests: Path) -> set[str]:
    """Return the names of the pytest markers that the common tests use, except pytest's own and ours."""
    known = {"parametrize", "skip", "skipif", "xfail", "usefixtures", "slow"}
    helpers = Path(importlib.util.find_spec("transformers").origin).with_name("testing_utils.py")
    found = {
        name
        for file in (*tests.glob("test_*.py"), helpers)
        for name in re.findall(r"\bmark\.(\w+)", file.read_text())
    }
    return found - known


def load(name: str) -> ModuleType:
    """Return a module of the common tests, for example `test_modeling_common`."""
    return importlib.import_module(f"{PACKAGE}.{name}")


def without(tests: type, inapplicable: Mapping[str, str]) -> type:
    """Return a class of tests in which the inapplicable ones are skipped, each with its reason.

    Raises:
        AssertionError: If there is no such test: it was renamed, and the reason may be out of date.
    """
    for name, reason in inapplicable.items():
        assert hasattr(tests, name), f"{tests.__name__} has no test {name}"
        setattr(tests, name, unittest.skip(reason)(lambda self: None))
    return tests
