"""examples/ablate_tiny.py: runs that go on where others stopped, and the table of what has run."""

import json
from pathlib import Path

import add_examples  # noqa: F401

# isort: split
import ablate_tiny
import pytest
import tiny_packages
from filelock import FileLock
from matplotlib import get_data_path
from tiny_charts import charts_task
from tiny_scenes import comparing_task
from tiny_signs import reading_task

SECOND = list(ablate_tiny.VARIANTS)[1]


@pytest.fixture
def packages(monkeypatch) -> None:
    """A font of matplotlib's and a few words, in place of what npm has. Words to be held out have four letters."""
    assert ablate_tiny.LONGEST >= tiny_packages.SHORTEST_TEST_WORD
    font = Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf").read_bytes()
    monkeypatch.setattr(ablate_tiny, "fonts", lambda folder: tiny_packages.Fonts([font] * 6, [font]))
    monkeypatch.setattr(
        ablate_tiny, "words", lambda folder, longest: tiny_packages.Words(["AT", "BED", "CANE"], ["DOGS"])
    )


@pytest.mark.slow
def test_a_run_trains_each_variant(packages, tmp_path):
    tasks = ablate_tiny.ablation_tasks(tmp_path)
    for name in ("scan: multidirectional", "prompt: picture first", "generation: RWKV-5"):
        scores = ablate_tiny.run(tasks, tmp_path, ablate_tiny.VARIANTS[name], 0, (1, 1, 1), 4)
        assert scores.keys() == tasks.keys()
        assert all(0 <= score <= 1 for score in scores.values())


def test_stages_go_from_letters_to_all_tasks():
    found = ablate_tiny.stages((3, 2, 1))
    assert [(stage.steps, longest) for stage, longest in found] == [(3, 1), (2, 2), (1, ablate_tiny.LONGEST)]
    assert [set(stage.shares) for stage, _ in found[:2]] == [{"reading"}, {"reading", "comparing", "charts"}]


def test_no_run_is_made_twice_or_by_two_at_once(tmp_path):
    runs = ablate_tiny.unfinished(tmp_path, seeds=2)
    first, seed, result = next(runs)
    assert (first, seed) == (next(iter(ablate_tiny.VARIANTS)), 0)
    others = [(name, seed) for name, seed, _ in ablate_tiny.unfinished(tmp_path, seeds=2)]
    assert (first, 0) not in others and len(others) == 2 * len(ablate_tiny.VARIANTS) - 1
    result.write_text("{}")
    assert next(runs)[0] == SECOND  # the first one's lock is free again
    runs.close()
    left = [(name, seed) for name, seed, _ in ablate_tiny.unfinished(tmp_path, seeds=2)]
    assert (first, 0) not in left and (SECOND, 0) in left
    with FileLock(tmp_path / "1-0.lock"):
        assert (SECOND, 0) not in [(name, seed) for name, seed, _ in ablate_tiny.unfinished(tmp_path, 2)]


def test_the_table_gives_mean_and_deviation_over_the_seeds_that_have_run(tmp_path):
    font = Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf").read_bytes()
    files = tiny_packages.Fonts([font], [font])
    tasks = {
        "reading": reading_task(files, tiny_packages.Words(["AT"], ["DOG"])),
        "comparing": comparing_task(),
        "charts": charts_task(files),
    }
    for seed, score in enumerate((0.5, 0.7)):
        (tmp_path / f"0-{seed}.json").write_text(json.dumps(dict.fromkeys(tasks, score)))
    (tmp_path / "1-0.json").write_text(json.dumps(dict.fromkeys(tasks, 1.0)))
    rows = [row.split("|")[1:-1] for row in ablate_tiny.table(tmp_path, tasks).splitlines()[2:]]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    assert cells[next(iter(ablate_tiny.VARIANTS))] == ["2"] + ["60.0 ± 14.1"] * 3
    assert cells[SECOND] == ["1"] + ["100.0"] * 3
    assert cells["generation: RWKV-5"] == ["0"] + [""] * 3
    assert len(cells["best guess per question"]) == 4
