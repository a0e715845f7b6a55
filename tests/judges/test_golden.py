"""The original's numbers, case by case. `pytest tests/judges/test_golden.py --golden FOLDER` takes another folder."""

import pytest
from golden_cases import read_cases
from golden_judge import check_case


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = metafunc.config.getoption("golden").resolve()
    metafunc.parametrize("case_path", read_cases(folder))


def test_case_equals_the_original(golden_folder, case_path):
    check_case(golden_folder, case_path)
