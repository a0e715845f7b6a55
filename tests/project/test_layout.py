"""Which file may import which, and what a built package holds: the rules of the tree as code."""

import ast
import configparser
import fnmatch
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from paths import EXAMPLES, ROOT, SUPPORT, TESTS

import visualrwkv_hf
from visualrwkv_hf import remote_code

WINGS = ("bundled", "cli", "cpu", "inference", "training", "vllm")
PARTS = {
    "visualrwkv_hf": ROOT / "src/visualrwkv_hf",
    **{f"visualrwkv_hf.{wing}": ROOT / "src/visualrwkv_hf" / wing for wing in WINGS},
    "visualrwkv_hf.triton_kernels": ROOT / "triton_kernels",
    "visualrwkv_hf.conversion": ROOT / "conversion",
}
"""Package -> its folder."""
TEST_MODULES = {path.stem for path in [*TESTS.glob("*.py"), *SUPPORT.glob("*.py")]} | {
    "tests",
    "oracles",
    "support",
}
KERNELS = "visualrwkv_hf.triton_kernels"
KERNEL_PACKAGES = (KERNELS, "visualrwkv_hf.cpu.kernels")
"""Packages of kernels: `dispatch.py` alone imports them, late."""


class Import(NamedTuple):
    """`from .module import name` has level 1; `import module` has name None. `guarded`: inside `try`."""

    file: Path
    line: int
    level: int
    module: str
    name: str | None
    guarded: bool

    @property
    def top(self) -> str:
        return self.module.split(".")[0]

    @property
    def is_kernel(self) -> bool:
        return any(self._is_below(package) for package in KERNEL_PACKAGES)

    @property
    def is_conversion(self) -> bool:
        return self._is_below("visualrwkv_hf.conversion")

    def _is_below(self, package: str) -> bool:
        return not self.level and f"{self.module}.{self.name}.".startswith(f"{package}.")

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}"


def imports_of(*folders: Path) -> Iterator[Import]:
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            yield from _imports(path, ast.parse(path.read_text("utf-8")), guarded=False)


def _imports(path: Path, node: ast.AST, guarded: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(path, node.lineno, 0, alias.name, None, guarded)
    elif isinstance(node, ast.ImportFrom):
        for alias in node.names:
            yield Import(path, node.lineno, node.level, node.module or "", alias.name, guarded)
    elif isinstance(node, ast.Try):
        for child in node.body:
            yield from _imports(path, child, True)
        for child in [*node.handlers, *node.orelse, *node.finalbody]:
            yield from _imports(path, child, guarded)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _imports(path, child, guarded)


def refuse(found: Iterator[Import]) -> None:
    assert not [str(item) for item in found]


# --- who may import whom ------------------------------------------------------------------------------


ROOT_PACKAGE = PARTS["visualrwkv_hf"]
ROOT_ONLY = {"__init__", "auto_classes"}
"""Modules of the root package that do not travel to the Hub."""

WING_MAY_IMPORT = {
    "bundled": set(),
    "cli": {"inference", "training"},
    "inference": {"bundled", "cpu"},
    "training": set(),
    "cpu": set(),
    "vllm": {"cpu"},
}
"""Wing -> the other wings that it may import. Each may import the root."""


def test_the_root_is_what_travels_to_the_hub():
    """A saved model takes along what `auto_map` names and what that imports: all of the root, and nothing else."""
    targets = {target for auto_map in remote_code.MODEL_CODE.values() for target in auto_map.values()}
    targets |= {*remote_code.PROCESSOR_CODE.values(), *remote_code.IMAGE_PROCESSOR_CODE.values()}
    shipped = remote_code.needed_modules({remote_code.module_of(target) for target in targets})
    assert shipped == {path.stem for path in ROOT_PACKAGE.glob("*.py")} - ROOT_ONLY


def test_the_root_imports_only_the_root():
    """transformers ships to the Hub what `from .name import` names, and looks for nothing else.

    `__init__` names the modules of public names, wings included, without importing them.
    """
    items = [item for item in imports_of(ROOT_PACKAGE) if item.file.parent == ROOT_PACKAGE]
    items = [item for item in items if item.file.stem != "__init__"]
    refuse(
        item
        for item in items
        if (item.level and (item.level != 1 or not (ROOT_PACKAGE / f"{item.module}.py").exists()))
        or (not item.level and item.top == "visualrwkv_hf" and not item.is_kernel)
    )


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_imports_the_root_and_named_wings(wing):
    """`from .name` is a file of the wing, `from ..name` of the root or of a wing that it may use."""
    folder = PARTS[f"visualrwkv_hf.{wing}"]
    names = [f"{other}.{path.stem}" for other in WING_MAY_IMPORT[wing] for path in wing_files(other)]
    others = {name.removesuffix(".__init__") for name in names}
    allowed = {1: {path.stem for path in wing_files(wing)}, 2: {"", *others}}
    allowed[2] |= {path.stem for path in ROOT_PACKAGE.glob("*.py")}
    refuse(item for item in imports_of(folder) if item.level and item.module not in allowed[item.level])
    absolute = [item for item in imports_of(folder) if not item.level and item.top == "visualrwkv_hf"]
    refuse(item for item in absolute if not (wing in MAY_IMPORT_CONVERSION and item.is_conversion))


CONVERSION_MAY_IMPORT = {"cpu.packed", "cpu.rounding"}
"""Modules of wings that conversion imports, since files hold what the native ops compute with."""

MAY_IMPORT_CONVERSION = {"cli", "inference"}


def wing_files(wing: str) -> list[Path]:
    return sorted(PARTS[f"visualrwkv_hf.{wing}"].glob("*.py"))


def test_only_the_command_imports_typer_and_rich():
    refuse(
        item
        for item in imports_of(*PARTS.values())
        if item.top in {"typer", "rich"} and item.file.parent != PARTS["visualrwkv_hf.cli"]
    )


def test_only_the_plugin_imports_vllm():
    refuse(
        item
        for item in imports_of(*PARTS.values(), EXAMPLES)
        if item.top == "vllm" and item.file.parent not in (PARTS["visualrwkv_hf.vllm"], EXAMPLES)
    )


@pytest.mark.parametrize("part", ["visualrwkv_hf.triton_kernels", "visualrwkv_hf.conversion"])
def test_flat_packages_import_files_beside_them(part):
    folder = PARTS[part]
    names = {"", *(path.stem for path in folder.glob("*.py"))}
    refuse(item for item in imports_of(folder) if item.level > 1 or (item.level and item.module not in names))


def test_kernels_are_imported_in_one_place_and_may_be_missing():
    everywhere = imports_of(*PARTS.values(), EXAMPLES)
    choice = ROOT_PACKAGE / "dispatch.py"
    kernels = [item for item in everywhere if item.is_kernel]
    refuse(item for item in kernels if item.file != choice or not item.guarded)
    assert kernels


def test_kernels_import_torch_and_triton_only():
    refuse(
        item
        for item in imports_of(PARTS[KERNELS])
        if not item.level and item.top not in {"torch", "triton", *sys.stdlib_module_names}
    )


def test_conversion_imports_the_package_absolutely():
    names = {path.stem for path in PARTS["visualrwkv_hf.conversion"].glob("*.py")}
    items = list(imports_of(PARTS["visualrwkv_hf.conversion"]))
    refuse(item for item in items if item.level and (item.module or item.name) not in names)
    refuse(item for item in items if f"{item.module}.".startswith("visualrwkv_hf.conversion."))
    wings = tuple(f"visualrwkv_hf.{wing}." for wing in WINGS)
    used = {item.module for item in items if item.module.startswith(wings)}
    assert used == {f"visualrwkv_hf.{module}" for module in CONVERSION_MAY_IMPORT}


def test_bare_folder_names_are_no_modules():
    """`triton_kernels` is the name of other people's packages."""
    refuse(
        item
        for item in imports_of(*PARTS.values(), EXAMPLES, TESTS)
        if not item.level and item.top in {"triton_kernels", "conversion", "src"}
    )


def test_only_tests_import_tests():
    refuse(
        item for item in imports_of(*PARTS.values(), EXAMPLES) if not item.level and item.top in TEST_MODULES
    )


def test_oracles_import_torch_only():
    items = list(imports_of(TESTS / "oracles"))
    refuse(item for item in items if item.level or item.top not in {"torch", *sys.stdlib_module_names})
    assert items


def test_examples_use_public_names():
    ours = [item for item in imports_of(EXAMPLES) if item.top == "visualrwkv_hf"]
    refuse(item for item in ours if not is_public(item))
    assert ours


def is_public(item: Import) -> bool:
    """Whether a name is in the list of a package, or one that the root package had in an earlier version."""
    if item.name is None or item.module.startswith("visualrwkv_hf.conversion"):
        return True
    listed = getattr(importlib.import_module(item.module), "__all__", ())
    return item.name in listed or item.module == f"visualrwkv_hf.{visualrwkv_hf._MOVED.get(item.name)}"


def test_public_names_exist():
    missing = [name for name in visualrwkv_hf.__all__ if not hasattr(visualrwkv_hf, name)]
    assert not missing
    assert len(set(visualrwkv_hf.__all__)) == len(visualrwkv_hf.__all__)


@pytest.mark.parametrize("part", PARTS)
def test_names_in_all_exist(part):
    names = [path.stem for path in PARTS[part].glob("*.py") if path.stem != "__init__"]
    if part == KERNELS:
        pytest.importorskip("triton")
    if part == "visualrwkv_hf.vllm":
        pytest.importorskip("vllm")
    for name in names:
        module = importlib.import_module(f"{part}.{name}")
        assert all(hasattr(module, public) for public in getattr(module, "__all__", ())), name


# --- what an import does ------------------------------------------------------------------------------

IMPORT = """
import sys
for name in ("triton", "timm", "torchvision", "typer"):
    sys.modules[name] = None
import visualrwkv_hf
loaded = sorted(name for name in sys.modules if name.startswith(("visualrwkv_hf.conv", "visualrwkv_hf.triton")))
assert not loaded, loaded
print(visualrwkv_hf.__version__)
"""


def test_import_needs_neither_kernels_nor_conversion(tmp_path):
    """transformers' own modules import Triton if it is there, so ours must do where it cannot be imported."""
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == visualrwkv_hf.__version__


# --- what is built ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", "utf-8")
    return parser


def test_setup_cfg_lists_the_packages(setup_cfg):
    options = setup_cfg["options"]
    folders = dict(line.split(" = ") for line in options["package_dir"].strip().splitlines())
    top = {part: folder for part, folder in PARTS.items() if part.removeprefix("visualrwkv_hf.") not in WINGS}
    assert {name: ROOT / folder for name, folder in folders.items()} == top
    assert options["packages"].split() == list(PARTS)


def test_every_folder_with_code_is_a_package_of_the_list():
    """A sub-package that `packages` does not list works in editable mode and is missing from the wheel."""
    folders = {path.parent for folder in PARTS.values() for path in folder.rglob("*.py")}
    assert folders == set(PARTS.values())


def test_package_data_patterns_match_every_file(setup_cfg):
    data = setup_cfg["options.package_data"]
    for part, folder in PARTS.items():
        patterns = data.get(part, "").split()
        others = [path.relative_to(folder).as_posix() for path in data_files(folder)]
        unmatched = [name for name in others if not any(fnmatch.fnmatch(name, p) for p in patterns)]
        assert not unmatched, part
        useless = [p for p in patterns if not any(fnmatch.fnmatch(name, p) for name in others)]
        assert not useless, part


def data_files(folder: Path) -> list[Path]:
    """Files in a package's folder that are not code."""
    return [
        path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix not in (".py", ".pyc")
    ]


def test_wheel_holds_every_file(tmp_path):
    source, target = tmp_path / "source", tmp_path / "wheel"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in PARTS.values():
        shutil.copytree(folder, source / folder.relative_to(ROOT), ignore=ignore, dirs_exist_ok=True)
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(target)], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        built = set(archive.namelist())
        entry_points = archive.read(
            next(name for name in built if name.endswith("entry_points.txt"))
        ).decode()
    expected = {
        f"{part.replace('.', '/')}/{path.relative_to(folder).as_posix()}"
        for part, folder in PARTS.items()
        for path in [*folder.glob("*.py"), *data_files(folder)]
    }
    assert {name for name in built if ".dist-info/" not in name} == expected
    assert any(name.endswith("/licenses/LICENSE") for name in built)
    assert "visualrwkv = visualrwkv_hf.cli.app:app" in entry_points
    assert f"-{visualrwkv_hf.__version__}-" in wheel.name


def test_version_has_one_value():
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert version and version[1] == visualrwkv_hf.__version__


MACHINE = re.compile(
    r"(?<![\w.])/(work|tmp|opt|root|home|Users)/|pythonhosted\.org|pypi\.org/simple|index-url|find-links"
)
"""Places of one machine and where it gets its packages."""


def test_no_file_knows_a_machine():
    files = [path for folder in [*PARTS.values(), EXAMPLES] for path in folder.rglob("*")]
    files = [path for path in [*files, ROOT / "README.md"] if path.suffix in TEXT_SUFFIXES]
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        if MACHINE.search(line)
    ]
    assert files and not found


TEXT_SUFFIXES = {".py", ".md", ".jinja", ".json", ".ipynb", ".txt", ".toml", ".sh"}
