"""What `import visualrwkv_hf` brings and what it leaves for later. A process of its own for each: imports stay."""

import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import visualrwkv_hf
from visualrwkv_hf.auto_classes import CONFIGS, TABLES


def run(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


KNOWS_ALL = """
import visualrwkv_hf
from transformers import AutoConfig
from visualrwkv_hf.auto_classes import CONFIGS, TABLES
import importlib

for model_type, name in CONFIGS.items():
    config_class = getattr(visualrwkv_hf, name)
    assert type(AutoConfig.for_model(model_type)) is config_class
for auto_class, table in TABLES.items():
    if auto_class == "AutoConfig":
        continue
    module = importlib.import_module(table.module)
    mapping = getattr(module, table.name.removesuffix("_NAMES"))
    for model_type, value in table.classes.items():
        names = value if isinstance(value, dict) else {"": value}
        found = mapping[getattr(visualrwkv_hf, CONFIGS[model_type])]
        found = found if isinstance(found, dict) else {"": found}
        assert found == {key: getattr(visualrwkv_hf, name) for key, name in names.items()}, (auto_class, found)
        for name in names.values():
            assert getattr(visualrwkv_hf, name).__module__.startswith("visualrwkv_hf.")
visualrwkv_hf.register()
print("all known")
"""


def test_import_loads_nothing_else(tmp_path):
    before = "import sys, torch, transformers; before = set(sys.modules); import visualrwkv_hf"
    loaded = run(f"{before}; print(*sorted(set(sys.modules) - before))", tmp_path).split()
    ours = {"visualrwkv_hf", "visualrwkv_hf.auto_classes"} | {
        f"transformers.models.{name}" for name in CONFIGS
    }
    loaded = {name for name in loaded if name.split(".")[0] not in {*sys.stdlib_module_names, "lazy_loader"}}
    assert loaded == ours


def test_import_needs_neither_torch_nor_transformers(tmp_path):
    loaded = run("import sys, visualrwkv_hf; print(*sys.modules)", tmp_path).split()
    assert not {"torch", "transformers", "numpy", "PIL", "torchvision"} & set(loaded)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("wkv7", "wkv"),
        ("VisualRWKVTextConfig", "configuration_visualrwkv"),
        ("lora_config", "training.recipe"),
        ("bundled_model", "bundled"),
    ],
)
def test_a_name_brings_its_own_file_only(tmp_path, name, module):
    loaded = run(f"import sys; from visualrwkv_hf import {name}; print(*sys.modules)", tmp_path).split()
    assert f"visualrwkv_hf.{module}" in loaded
    assert not [module for module in loaded if module.startswith("visualrwkv_hf.modeling")]


@pytest.mark.parametrize(
    "first",
    [
        "",
        "from transformers import AutoConfig",
        "from transformers import AutoTokenizer",
        "from transformers import AutoProcessor, AutoModelForCausalLM, AutoImageProcessor",
    ],
)
def test_auto_classes_know_the_models_whatever_was_imported_before(tmp_path, first):
    assert run(f"{first}\n{KNOWS_ALL}", tmp_path).strip() == "all known"


@pytest.mark.parametrize(
    "first",
    ["AutoProcessor", "GenerationMixin", "LlamaForCausalLM"],
)
def test_auto_classes_know_the_models_whatever_is_imported_after(tmp_path, first):
    """transformers imports its Auto classes amid the import of others: no class of ours may be imported there."""
    code = f"""
import sys, visualrwkv_hf
from transformers import {first}
loaded = [name for name in sys.modules if name.startswith("visualrwkv_hf.") and name != "visualrwkv_hf.auto_classes"]
assert not loaded, loaded
{KNOWS_ALL}"""
    assert run(code, tmp_path).strip() == "all known"


def test_every_model_type_and_class_is_known_by_its_own_name():
    for model_type, name in CONFIGS.items():
        assert getattr(visualrwkv_hf, name).model_type == model_type
    assert all(set(table.classes) <= set(CONFIGS) for table in TABLES.values())


def test_registering_again_changes_nothing():
    finders, before = list(sys.meta_path), dict(sys.modules)
    visualrwkv_hf.register()
    assert (finders, before) == (sys.meta_path, sys.modules)


WINGS = [f"visualrwkv_hf.{name}" for name in ("conversion", "cpu", "inference", "training")]


def test_star_import_brings_the_public_names(tmp_path):
    names = run(
        "from visualrwkv_hf import *; print(*[name for name in dir() if name[0] != '_'])", tmp_path
    ).split()
    assert sorted(names) == sorted(visualrwkv_hf.__all__)
    assert set(names) <= set(dir(visualrwkv_hf))


@pytest.mark.parametrize("wing", WINGS)
def test_public_names_of_a_wing_exist(wing):
    module = importlib.import_module(wing)
    assert module.__all__ and all(hasattr(module, name) for name in module.__all__)


def test_the_root_lists_few_names():
    """What most users need; the rest is in the wings."""
    assert len(visualrwkv_hf.__all__) <= 32


@pytest.mark.parametrize("name", visualrwkv_hf._MOVED)
def test_names_of_the_last_release_work_with_a_warning(name):
    with pytest.warns(DeprecationWarning, match=f"visualrwkv_hf.{name} has moved: import it from"):
        found = getattr(visualrwkv_hf, name)
    assert found is getattr(importlib.import_module(f"visualrwkv_hf.{visualrwkv_hf._MOVED[name]}"), name)


def test_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="No visualrwkv_hf attribute VisualRWKV8"):
        visualrwkv_hf.VisualRWKV8  # noqa: B018
    with pytest.raises(ImportError, match="VisualRWKV8"):
        from visualrwkv_hf import VisualRWKV8  # noqa: F401


@pytest.mark.parametrize("name", [name for name in visualrwkv_hf.__all__ if name.startswith("VisualRWKV")])
def test_classes_pickle(name):
    found = getattr(visualrwkv_hf, name)
    assert pickle.loads(pickle.dumps(found)) is found
    assert getattr(importlib.import_module(found.__module__), name) is found


def test_a_pickled_configuration_is_read_in_a_new_process(tmp_path):
    config = visualrwkv_hf.VisualRWKVTextConfig(num_hidden_layers=3, hidden_size=64)
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    code = "import pickle; print(pickle.load(open('config.pickle', 'rb')).num_hidden_layers)"
    assert run(code, tmp_path).strip() == "3"


def test_help_of_the_command_needs_neither_torch_nor_transformers(tmp_path):
    code = """
import sys
for name in ("torch", "transformers", "numpy", "PIL"):
    sys.modules[name] = None
from visualrwkv_hf.cli.app import app
app(["--help"], standalone_mode=False)
for command in ("ask", "chat", "caption", "serve", "convert", "info", "show"):
    app([command, "--help"], standalone_mode=False)
"""
    assert "convert" in run(code, tmp_path)


def test_refusals_and_lists_need_neither_torch_nor_transformers(tmp_path):
    """A slip of the finger is answered at once."""
    (tmp_path / "README.md").write_text("No picture.")
    code = """
import sys
for name in ("torch", "transformers", "numpy"):
    sys.modules[name] = None
from visualrwkv_hf.cli.app import app
from typer.testing import CliRunner
for arguments in (
    ["--version"],
    ["convert", "--list"],
    ["models"],
    ["models", "--help"],
    ["ask", ".", "What?"],
    ["ask", "README.md", "What?"],
    ["ask", "missing.png", "What?"],
    ["ask", "--model", "README.md", "https://example.org/a.png", "What?"],
    ["ask", "--model", "./folder", "https://example.org/a.png", "What?"],
    ["chat", "missing.png"],
    ["serve", "./folder"],
    ["info", "./folder"],
):
    done = CliRunner().invoke(app, arguments)
    print(done.exit_code, done.output.strip().splitlines()[-1])
"""
    said = run(code, tmp_path).splitlines()
    assert [line[0] for line in said] == [*"0000", *"1" * 8], said
    assert said[4].startswith("1 Error: . is a folder: `visualrwkv caption` asks")
    assert said[5].startswith("1 Error: 'README.md' cannot be read as a picture")
    assert "There is no folder ./folder" in said[8]


def test_python_looks_for_no_garbage_while_libraries_are_imported(tmp_path):
    code = """
import gc
from visualrwkv_hf.inference.libraries import import_libraries, without_collections
before = gc.get_stats()[2]["collections"]
import_libraries()
import sys
print(gc.get_stats()[2]["collections"] - before, gc.isenabled(), "torch" in sys.modules)
try:
    with without_collections():
        print(gc.isenabled())
        raise KeyError
except KeyError:
    print(gc.isenabled())
gc.disable()
with without_collections():
    pass
print(gc.isenabled())
"""
    assert run(code, tmp_path).split() == ["0", "True", "True", "False", "True", "False"]


def test_describing_a_model_needs_none_of_its_classes(tmp_path):
    """They take seconds to import, and a description needs the configuration and the headers of the weights."""
    code = """
import sys
from visualrwkv_hf.cli.app import app
app(["info", "--json"], standalone_mode=False)
print([name for name in sys.modules if name.startswith("visualrwkv_hf.modeling")])
"""
    said = run(code, tmp_path)
    assert '"num_parameters"' in said and said.splitlines()[-1] == "[]"
