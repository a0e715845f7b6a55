"""examples/ablate_tiny.py: runs that go on where others stopped, and the table of what has run."""

import json
from pathlib import Path

import add_examples  # noqa: F401

# isort: split
import ablate_tiny
import pytest
import tiny_packages
import torch
import train_tiny
from filelock import FileLock
from matplotlib import get_data_path
from tiny_charts import charts_task
from tiny_scenes import comparing_task
from tiny_signs import reading_task
from transformers import AutoModelForImageTextToText

from visualrwkv_hf import bundled_model

SECOND = list(ablate_tiny.VARIANTS)[1]


@pytest.fixture
def packages(monkeypatch) -> None:
    """A font of matplotlib's and a few words, in place of what npm has."""
    font = Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf").read_bytes()
    few = tiny_packages.Words(["AT", "BED", "CANE"], ["DOGS"])
    monkeypatch.setattr(ablate_tiny, "fonts", lambda folder: tiny_packages.Fonts([font], [font]))
    monkeypatch.setattr(ablate_tiny, "words", lambda folder, longest: few)


@pytest.mark.slow
def test_a_run_trains_each_variant_behind_the_same_tower(packages, tmp_path, monkeypatch):
    trained = []

    def train_stage(model, *arguments, **options):
        train_tiny.train_stage(model, *arguments, **options)
        trained.append({name: weight.clone() for name, weight in model.state_dict().items()})

    monkeypatch.setattr(ablate_tiny, "train_stage", train_stage)
    tasks = ablate_tiny.ablation_tasks(tmp_path)
    shared, seen = ablate_tiny.Shared.of(tasks, seed=0, steps=1), []
    shared.sight.tower.register_forward_pre_hook(lambda _, pictures: seen.append(len(pictures[0])))
    for name in ("scan: multidirectional", "prompt: picture first", "generation: RWKV-5"):
        scores = ablate_tiny.run(tasks, shared, ablate_tiny.VARIANTS[name], seed=0, steps=1, questions=4)
        assert scores.keys() == tasks.keys()
        assert all(0 <= score <= 1 for score in scores.values())
    bundled = AutoModelForImageTextToText.from_pretrained(bundled_model(), dtype="float32").state_dict()
    tower = [name for name in bundled if "vision_tower" in name]
    assert tower
    for weights in trained:
        behind = {name: name.replace("vision_tower.", "vision_tower.tower.") for name in tower}
        assert all(torch.equal(weights[behind[name]], bundled[name]) for name in tower)
    assert sum(seen) == len(shared.sight.known) == train_tiny.BATCH + 3 * 4  # each picture once


def test_what_was_seen_is_what_the_tower_sees():
    bundled = AutoModelForImageTextToText.from_pretrained(bundled_model(), dtype="float32")
    tower = bundled.model.vision_tower.eval()
    sight = ablate_tiny.Sight(tower)
    pictures = torch.rand(4, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = tower(pictures).last_hidden_state
        for order in ([0, 1], [3, 1, 0], [2, 2, 3]):
            found = sight(pictures[order]).last_hidden_state
            torch.testing.assert_close(found, expected[order], rtol=1e-4, atol=1e-5)


def test_results_of_other_settings_are_refused(packages, tmp_path):
    options = dict(data_dir=tmp_path, seeds=1, questions=4, minutes=1, table_only=True, markdown=None)
    ablate_tiny.main(results=tmp_path / "runs", steps=2, **options)
    with pytest.raises(SystemExit, match="Choose another --results"):
        ablate_tiny.main(results=tmp_path / "runs", steps=3, **options)


def test_the_page_says_how_much_was_trained(packages, tmp_path):
    page = tmp_path / "page.md"
    options = dict(data_dir=tmp_path, seeds=1, minutes=1, table_only=True, markdown=page)
    ablate_tiny.main(results=tmp_path / "runs", steps=100, questions=4, **options)
    text = page.read_text()
    assert "(3,200 samples, 100 steps)" in text and "asked up to 4 questions" in text
    assert "| prompt: picture last | 0 |" in text and "{" not in text


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


def test_variants_are_compared_in_pairs_with_the_first(tmp_path):
    """A seed that is hard for both is no difference between them."""
    for seed, score in enumerate((0.5, 0.7, 0.9)):
        (tmp_path / f"0-{seed}.json").write_text(json.dumps({"reading": score}))
    for seed, score in enumerate((0.52, 0.76)):
        (tmp_path / f"1-{seed}.json").write_text(json.dumps({"reading": score}))
    (tmp_path / "2-0.json").write_text(json.dumps({"reading": 0.4}))
    rows = ablate_tiny.differences(tmp_path, {"reading": None}).splitlines()[2:]
    assert [[cell.strip() for cell in row.split("|")[2:-1]] for row in rows[:3]] == [
        ["2", "+4.0 ± 2.0"],
        ["1", "-10.0"],
        ["0", ""],
    ]
