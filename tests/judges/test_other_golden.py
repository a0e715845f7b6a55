"""The golden judge on a folder of other sizes than `tests/golden`: it passes right data and finds a wrong value."""

import json
import shutil
from pathlib import Path

import pytest
from golden_cases import Case, read_cases
from golden_judge import check_case
from other_golden import write_other_golden
from safetensors.torch import load_file, save_file

CASES = [
    "d_rwkv7/v700_multi_image",
    "d_rwkv7/v700_text_only",
    "d_rwkv7/v703_visual_token_compressor",
    "f_data/v60_format",
    "j_preproc/tiling",
    "x_ops/wkv7_op",
]


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    return write_other_golden(tmp_path_factory.mktemp("other"))


def test_the_folder_is_small_and_holds_these_cases(other):
    assert read_cases(other) == CASES
    assert sum(path.stat().st_size for path in other.rglob("*") if path.is_file()) < 1.5e6


@pytest.mark.parametrize("case_path", CASES)
def test_right_data_of_other_sizes_pass(case_path, other):
    check_case(other, case_path)


@pytest.mark.parametrize("case_path", CASES)
def test_a_wrong_value_is_found(case_path, other, tmp_path):
    """Every expected tensor, and every row of the text files, is made wrong once."""
    folder = tmp_path / "wrong"
    shutil.copytree(other, folder)
    tensors = Case(other, case_path).expected
    for name, tensor in tensors.items():
        wrong = tensor.clone()
        atol = Case(other, case_path).info["tensors"][f"expected:{name}"]["recommended_atol"]
        wrong.view(-1)[-1] += 3 * atol
        save_file(tensors | {name: wrong}, folder / case_path / "expected.safetensors")
        with pytest.raises(AssertionError, match=name):
            check_case(folder, case_path)
    for file in (folder / case_path).glob("*.json*"):
        if file.name != "case.json":
            right = file.read_text("utf-8")
            for wrong_text in spoilt(file.name, right):
                file.write_text(wrong_text, "utf-8")
                with pytest.raises(AssertionError):
                    check_case(folder, case_path)


def spoilt(name: str, text: str) -> list[str]:
    """Return the contents of a file with one value changed, once for each row."""
    if name == "rows.jsonl":
        rows = [json.loads(line) for line in text.splitlines()]
        for row in rows:
            row["labels"][-1] += 1
    else:
        rows = json.loads(text)
        for row in rows:
            row["uhd_split_image_into_tiles_5"]["crops"][-1][-1] += 1
    written = text.splitlines() if name == "rows.jsonl" else [json.dumps(row) for row in json.loads(text)]
    changed = []
    for number, row in enumerate(rows):
        lines = [*written[:number], json.dumps(row), *written[number + 1 :]]
        changed.append("\n".join(lines) if name == "rows.jsonl" else f"[{','.join(lines)}]")
    return changed


def test_the_data_differ_in_size_from_those_of_the_clone(other):
    from paths import GOLDEN

    for case_path in CASES:
        ours, theirs = (
            {name: list(tensor.shape) for name, tensor in Case(folder, case_path).inputs.items()}
            for folder in (other, GOLDEN)
        )
        assert not ours or ours != theirs, case_path
    assert load_file(other / "weights/language.safetensors")["rwkv.emb.weight"].shape[0] == 290
