"""What this package relies on inside transformers is as it was when somebody looked at it last."""

import hashlib
import inspect
import textwrap

import pytest
import transformers
from transformers.generation import GenerationMixin

from visualrwkv_hf.generation_visualrwkv import TRANSFORMERS_INTERNALS, VisualRWKVGenerationMixin

CHECKED = {
    "_prepare_cache_for_generation": {"db8510d0381fedf2": "5.23.0"},
    "prepare_inputs_for_generation": {"378c9d0cf4aaec04": "5.23.0"},
    "_validate_model_kwargs": {"19d86a7310c152ef": "5.23.0"},
    "_maybe_prepare_encoder_kwargs_for_generation": {"68323d5baf6120c6": "5.23.0"},
    "_valid_auto_compile_criteria": {"6052ccc63e9281f9": "5.23.0"},
    "_expand_inputs_for_generation": {"542e518cca8974cd": "5.23.0"},
    "_prefill": {"a81b872bfc7223af": "5.23.0"},
    "_sample": {"61160ef8c1211049": "5.23.0"},
    "_assisted_decoding": {"34ef66021abac642": "5.23.0"},
}
"""Hashes of the source of each method that was checked, and the first version of transformers that has it."""


def digest(function) -> str:
    """Return a hash of a function's source."""
    return hashlib.sha256(textwrap.dedent(inspect.getsource(function)).encode()).hexdigest()[:16]


def refuse_change(name: str, function, checked: dict[str, str]) -> None:
    """Fail if the source of `function` is none of those that were checked."""
    found = digest(function)
    assert found in checked, (
        f"transformers {transformers.__version__} has another GenerationMixin.{name} (source {found}) than the "
        f"versions that were checked ({', '.join(checked.values())}). {TRANSFORMERS_INTERNALS[name]} Read what has "
        f"changed, run tests/model, and add {found!r} to CHECKED here."
    )


@pytest.mark.parametrize("name", TRANSFORMERS_INTERNALS)
def test_an_internal_of_transformers_is_one_that_was_checked(name):
    refuse_change(name, getattr(GenerationMixin, name), CHECKED[name])


def test_a_change_is_told_by_name_and_reason():
    def _prefill():
        pass

    with pytest.raises(AssertionError, match=r"has another GenerationMixin\._prefill .* Relied on: it calls"):
        refuse_change("_prefill", _prefill, CHECKED["_prefill"])


def test_the_table_names_all_that_is_overridden():
    """And no private method is overridden but these two."""
    methods = [name for name, value in vars(VisualRWKVGenerationMixin).items() if inspect.isfunction(value)]
    overridden = {name for name in methods if hasattr(GenerationMixin, name)} - {"generate"}
    assert overridden == {
        name for name, why in TRANSFORMERS_INTERNALS.items() if why.startswith("Overridden")
    }
    private = {name for name in overridden if name.startswith("_")}
    assert private == {"_prepare_cache_for_generation", "_sample"}
    assert CHECKED.keys() == TRANSFORMERS_INTERNALS.keys()
