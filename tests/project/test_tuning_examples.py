"""examples/state_tuning.py and examples/linear_probe.py on the model in the package, with a handful of pictures."""

from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
from two_colors import two_colors


def cells(table: str) -> list[dict[str, str]]:
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("|")
    ]
    return [dict(zip(head, row)) for row in rows]


def test_a_small_shape_lies_in_the_quarter_that_is_its_answer(example):
    state_tuning, seen = example("state_tuning"), set()
    for number in range(40):
        (picture,), question = state_tuning.small_shape(Random(number))
        pixels = np.asarray(picture).astype(int)
        rows, columns = np.nonzero((pixels != pixels[0, 0]).any(-1))
        half = picture.width // 2
        quarter = 2 * (rows.mean() > half) + (columns.mean() > half) + 1
        assert question.answer == str(quarter)
        assert (rows.max() < half or rows.min() >= half) and (columns.max() < half or columns.min() >= half)
        seen.add(question.answer)
    assert seen == set("1234")


def test_state_tuning_prints_its_table(example, monkeypatch, capsys, tmp_path):
    pytest.importorskip("peft")
    state_tuning = example("state_tuning")
    monkeypatch.setattr(state_tuning, "easy_vqa_task", lambda: SimpleNamespace(test=two_colors().test))
    monkeypatch.setattr(state_tuning, "BATCH", 2)
    state_tuning.main(
        steps=1, layer=0, state_rate=1.0, lora_rank=1, lora_rate=1e-3, exams=3, save=tmp_path / "state"
    )
    rows = cells(capsys.readouterr().out)
    assert [row["parameters"] for row in rows] == ["0", "4,352 (0.23%)", "", "6,912 (0.36%)"]
    assert rows[2]["easy-VQA"] == rows[0]["easy-VQA"]  # rows without the state are what they were
    assert rows[1]["file, bytes"] == f"{(tmp_path / 'state' / 'tuned_state.safetensors').stat().st_size:,}"


def test_the_linear_probe_prints_its_table(example, monkeypatch, capsys, tmp_path):
    pytest.importorskip("sklearn")
    linear_probe = example("linear_probe")
    kinds = [
        linear_probe.Problem(
            "colour",
            [(exam.picture, exam.question.answer) for exam in two_colors().test] * 2,
            [(exam.picture, exam.question.answer) for exam in two_colors().test],
        ),
        linear_probe.letters(12, 4),
    ]
    monkeypatch.setattr(linear_probe, "problems", lambda train, test: iter(kinds))
    linear_probe.main(model=None, train=12, test=4, markdown=tmp_path / "table.md")
    printed = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() in printed
    rows = cells(printed)
    assert [row["size"] for row in rows] == ["3,072", "160", "128", "128", "4,096", "128", ""]
    assert {row["colour"] for row in rows[:-1]} == {"100.0%"} and rows[-1]["colour"] == "50.0%"
