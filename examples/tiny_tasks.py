"""All tasks of `train_tiny.py`, by name."""

from collections.abc import Iterable
from pathlib import Path

from tiny_charts import charts_task
from tiny_collections import digits_task, easy_vqa_task, emoji_task
from tiny_data import Task
from tiny_packages import EMOJI, fetched, fonts, words
from tiny_posters import posters_task
from tiny_scenes import comparing_task, counting_task, frames_task, turned_task
from tiny_signs import LONGEST_WORD, reading_task
from tiny_unknown import held_out_photographs, unknown_task

TARGETS = {
    "easy-VQA": 0.97,
    "digits": 0.97,
    "emoji": 0.60,
    "reading": 0.85,
    "counting": 0.95,
    "comparing": 0.95,
    "charts": 0.85,
    "frames": 0.90,
    "triangles": 0.95,
    "posters": 0.85,
    "unknown": 0.80,
}
"""Share of exact answers to reach, by task."""


def all_tasks(folder: Path, validation: bool = False) -> dict[str, Task]:
    """Return the tasks by name; what npm has for them is kept in `folder`.

    With `validation` the pictures, fonts and words of the test are left out, and others are held out in their place.
    What is drawn without fonts is drawn as for the test.

    Raises:
        RuntimeError, ValueError: as `tiny_packages.fetched`.
        ImportError: a library that the pictures need is missing.
    """
    held_out_photographs()  # a missing library is found out before the training and not after it
    files, known_words = fonts(folder, validation), words(folder, LONGEST_WORD, validation)
    known = [
        easy_vqa_task(validation),
        digits_task(validation),
        emoji_task(fetched(EMOJI, folder), validation),
        reading_task(files, known_words),
        counting_task(),
        comparing_task(),
        charts_task(files),
        frames_task(),
        turned_task(),
        posters_task(files, known_words),
    ]
    return {task.name: task for task in [*known, unknown_task(of_one_kind(known))]}


def of_one_kind(tasks: Iterable[Task]) -> list[Task]:
    """Return the tasks that show a single picture with things of one kind."""
    return [task for task in tasks if task.name not in ("frames", "posters", "unknown")]
