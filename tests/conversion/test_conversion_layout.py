"""The converter's tables agree with the model's, and the names that pages used before still work, with a warning."""

import importlib
import re

import pytest
from paths import ROOT

from visualrwkv_hf import conversion
from visualrwkv_hf.conversion.encoders import ORIGINAL_ENCODERS, encoders_together
from visualrwkv_hf.conversion.releases import THREE_ENCODERS
from visualrwkv_hf.encoders import ENCODERS


def test_every_encoder_has_its_keys():
    """What only conversion knows of an encoder is keyed by the same names; no original checkpoint has a ResNet."""
    assert ENCODERS.keys() - {"resnet"} == ORIGINAL_ENCODERS.keys()
    assert set(encoders_together()) == set(THREE_ENCODERS)
    for row in ORIGINAL_ENCODERS.values():
        assert (row.alone is None) == (not row.files_alone)
        assert (row.together is None) == (not row.files_together)


@pytest.mark.parametrize("name", ["to_hf", "to_original", "load_original", "restore_state_dict"])
def test_old_places_still_work_with_a_warning(name):
    old = importlib.import_module("visualrwkv_hf.conversion.convert")
    with pytest.warns(DeprecationWarning, match=f"convert.{name} has moved: import it from visualrwkv_hf"):
        assert getattr(old, name) is getattr(conversion, name)


def test_the_old_name_of_assemble_vlm_warns():
    old = importlib.import_module("visualrwkv_hf.conversion.start")
    with pytest.warns(DeprecationWarning, match=r"is now visualrwkv_hf\.conversion\.assemble_vlm"):
        assert old.start_vlm is conversion.assemble_vlm
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = old.nothing


def test_public_names_are_listed_once():
    assert len(set(conversion.__all__)) == len(conversion.__all__)
    assert all(getattr(conversion, name) for name in conversion.__all__)


def test_a_release_is_checked_for_files_that_there_are():
    """The workflow that publishes a tag looks for some files of the wheel, and imports what it installs."""
    workflow = (ROOT / ".github/workflows/publish.yml").read_text("utf-8")
    named = re.findall(r"test -f installed/visualrwkv_hf/(\S+)", workflow)
    assert named
    for name in named:
        is_apart = name.startswith(("conversion/", "triton_kernels/"))
        assert ((ROOT if is_apart else ROOT / "src/visualrwkv_hf") / name).is_file(), name
    assert "import visualrwkv_hf" in workflow


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "a-00001-of-00002.safetensors", "/a.safetensors", "../a.safetensors", "a/b", ""],
)
def test_an_index_may_name_what_load_model_takes(name, tmp_path):
    """The converter and `load_model` agree on which files an index may name."""
    from visualrwkv_hf.conversion.checkpoint import SHARD
    from visualrwkv_hf.inference.checks import refuse_strange_index

    try:
        refuse_strange_index({"weight_map": {"x": name}}, tmp_path)
        is_taken = True
    except ValueError:
        is_taken = False
    assert is_taken == bool(SHARD.fullmatch(name))
