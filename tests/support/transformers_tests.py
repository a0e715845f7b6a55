"""transformers' own common tests, imported from its unpacked sdist as the package `transformers_tests_of_sdist`.

The sdist holds `tests/test_modeling_common.py` and the like, but not what these import from the rest of transformers'
tests. Those parts are replaced by stand-ins that are named here.
"""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

PACKAGE = "transformers_tests_of_sdist"


class ExportTesterMixin:
    """Stand-in: the tests of torch.export are not in the sdist."""


class GenerationTesterMixin:
    """Stand-in: the tests of generation are not in the sdist."""


STAND_INS = {
    "exporters": {},
    "exporters.test_export": {"ExportTesterMixin": ExportTesterMixin},
    "generation": {},
    "generation.test_utils": {"GenerationTesterMixin": GenerationTesterMixin},
    "utils": {},
    "utils.test_configuration_utils": {"config_common_kwargs": {}},
    "distributed_testing_utils": {"run_distributed": None},
}
"""Module of transformers' tests that the sdist lacks -> what is imported from it."""


def install(tests: Path) -> None:
    """Make the modules of an unpacked sdist's `tests` folder importable by [`load`].

    Raises:
        FileNotFoundError: If the folder does not hold the common tests.
    """
    if not (tests / "test_modeling_common.py").is_file():
        raise FileNotFoundError(
            f"{tests} holds no test_modeling_common.py: unpack the sdist of transformers there."
        )
    (tests / "__init__.py").touch()  # the sdist has none, and pytest reads that of a package
    package = ModuleType(PACKAGE)
    package.__path__ = [str(tests)]
    sys.modules[PACKAGE] = package
    for name, content in STAND_INS.items():
        module = ModuleType(f"{PACKAGE}.{name}")
        module.__path__ = []
        module.__dict__.update(content)
        sys.modules[module.__name__] = module


def markers(tests: Path) -> set[str]:
    """Return the names of the pytest markers that the common tests use, except pytest's own and ours."""
    known = {"parametrize", "skip", "skipif", "xfail", "usefixtures", "slow"}
    found = {
        name for file in tests.glob("test_*.py") for name in re.findall(r"\bmark\.(\w+)", file.read_text())
    }
    return found - known


def load(name: str) -> ModuleType:
    """Return a module of the common tests, for example `test_modeling_common`."""
    return importlib.import_module(f"{PACKAGE}.{name}")
