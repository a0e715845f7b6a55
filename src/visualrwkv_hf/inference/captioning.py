"""One question about every picture or film in a folder: answered in batches, into a file that can be continued."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from filelock import FileLock, Timeout
from transformers import BatchFeature

from ..film_formats import FILM_SUFFIXES
from ..image_processing_visualrwkv import open_picture
from .chat import chat_inputs
from .pictures import content_parts
from .structured import structured_output

FORMS = ("json_schema", "regex", "grammar")
"""Settings that say what the answers must fit, as arguments of `structured_output`."""

PICTURE_SUFFIXES = frozenset(
    (
        ".avif",
        ".bmp",
        ".gif",
        ".jfif",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".pgm",
        ".png",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    )
)
"""File extensions, in lower case, of what is taken for a picture. Other files in the folder are ignored."""

Item = TypeVar("Item")


class Batch(NamedTuple):
    """Pictures that go through the model together: `names`, and what the processor made of them."""

    names: list[str]
    inputs: BatchFeature


class Captioning:
    """Ask the same question about every picture in a folder, and keep track of what is done.

    `output` gets a line `{"picture": ..., "text": ...}` for each picture, named by its path below `folder`, in the
    order of these paths. A run that is killed loses at most its last batch: the next run cuts off half a line and
    continues with what is missing. `output`.summary.json holds the settings, the progress and the files that cannot
    be read; the next run tries those again. Memory does not grow with the number of answers.

    Args:
        folder: holds the pictures; its subfolders and linked folders are searched too, hidden files are not.
        output: the JSON Lines file.
        settings: `prompt`, `max_new_tokens`, `image_position` and whatever else the answers depend on, as JSON
            values. A file that was begun with other settings is not continued. If `films` is true, films are asked
            about as well, and `num_frames` or `fps` say which of their frames are taken. `json_schema`,
            `regex` or `grammar` is the text of what the answers must fit.

    Attributes:
        names: the pictures, sorted.
        bad: name -> why the file cannot be read.

    Raises:
        ValueError: there is no such folder, or no picture in it.
    """

    def __init__(self, folder: str | os.PathLike, output: str | os.PathLike, settings: dict[str, Any]):
        self.folder, self.output, self.settings = Path(folder), Path(output), settings
        self.summary = self.output.with_name(f"{self.output.name}.summary.json")
        self.bad: dict[str, str] = {}
        suffixes = PICTURE_SUFFIXES | (FILM_SUFFIXES if settings.get("films") else frozenset())
        self.names = pictures_in(self.folder, suffixes)
        if not self.names:
            what = "picture and no film" if settings.get("films") else "picture"
            raise ValueError(
                f"There is no {what} in {folder}: no file ends with {', '.join(sorted(suffixes))}."
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing the same output. A process that is killed leaves no lock.

        Raises:
            ValueError: another process is writing it.
        """
        lock = FileLock(self.output.with_name(f"{self.output.name}.lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise ValueError(f"Another process is writing {self.output}.") from error
        try:
            yield
        finally:
            lock.release()

    def todo(self) -> list[str]:
        """Return the pictures without an answer, in order. Half a line at the end of the output is cut off.

        Raises:
            ValueError: the output is from other settings, or not ours.
        """
        self._refuse_other_work()
        self.write_summary()
        done = finished_names(self.output)
        return [name for name in self.names if name not in done]

    def run(self, model, processor, batch_size: int) -> Iterator[dict[str, str]]:
        """Answer what is left to do, and yield the captions of each batch once they are on the disk.

        Args:
            model: a `VisualRWKVForConditionalGeneration`.
            processor: the model's.
            batch_size: pictures per batch.

        Yields:
            dict[str, str]: picture -> answer.
        """
        batches = (
            batch for names in in_chunks(self.todo(), batch_size) for batch in self._batches(processor, names)
        )
        with open(self.output, "ab") as file:
            for names, inputs in one_ahead(batches):
                captions = dict(zip(names, self._answers(model, processor, inputs), strict=True))
                file.write(b"".join(as_line(name, text) for name, text in captions.items()))
                file.flush()
                os.fsync(file.fileno())
                yield captions
        self.write_summary()

    def write_summary(self) -> None:
        """Write the settings and the progress, whole or not at all."""
        done = finished_names(self.output)
        summary = {
            "settings": self.settings,
            "pictures": len(self.names),
            "answered": len(done.intersection(self.names)),
            "bad": [{"picture": name, "error": error} for name, error in sorted(self.bad.items())],
        }
        unfinished = self.summary.with_name(f".{self.summary.name}")
        unfinished.write_bytes(as_json(summary, indent=2))
        unfinished.replace(self.summary)

    def _refuse_other_work(self) -> None:
        if not self.output.exists() or not self.output.stat().st_size:
            return
        if not self.summary.exists():
            raise ValueError(
                f"{self.output} exists, but {self.summary.name} does not, so it is not continued: use another output."
            )
        try:
            earlier = dict(json.loads(self.summary.read_text("utf-8"))["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.summary} is damaged: use another output.") from error
        for name in sorted(earlier.keys() | self.settings.keys()):
            value = self.settings.get(name)
            if earlier.get(name) != value:
                raise ValueError(
                    f"{self.output} was begun with {name} {earlier.get(name)!r}, not {value!r}: use another output, "
                    "or the earlier settings to continue."
                )

    def _batches(self, processor, names: Sequence[str]) -> Iterator[Batch]:
        """Yield the readable pictures as one batch, or one by one if the processor refuses some of them."""
        opened: dict[str, list] = {}
        for name in names:
            try:
                opened[name] = self._opened(self._regular_file(name))
            except ValueError as error:
                self._note_bad(name, error)
        if not opened:
            return
        try:
            yield Batch(list(opened), self._inputs(processor, list(opened.values())))
        except ValueError:
            for name, parts in opened.items():
                try:
                    yield Batch([name], self._inputs(processor, [parts]))
                except ValueError as error:
                    self._note_bad(name, error)

    def _opened(self, path: Path) -> list[dict[str, Any]]:
        """Return the content parts of a picture, or of a film's frames."""
        if self.settings.get("films") and path.suffix.lower() in FILM_SUFFIXES:
            return content_parts(str(path), self.settings["num_frames"], self.settings["fps"], as_film=True)
        return [{"type": "image", "image": open_picture(path)}]

    def _regular_file(self, name: str) -> Path:
        """Return the path of a picture. Raise `ValueError` for what opening would never end or never find."""
        path = self.folder / name
        if not path.exists():
            raise ValueError("cannot be read as a picture: the link leads nowhere.")
        if not path.is_file():
            raise ValueError("cannot be read as a picture: it is not a file.")
        return path

    def _note_bad(self, name: str, error: ValueError) -> None:
        """Remember why a picture cannot be read, without its path, so that equal reasons are one object."""
        reason, path = str(error), str(self.folder / name)
        for quoted in (repr(path), path):
            reason = reason.replace(quoted, "")
        self.bad[name] = sys.intern(" ".join(reason.split()))

    def _inputs(self, processor, contents: Sequence[list[dict[str, Any]]]) -> BatchFeature:
        text = {"type": "text", "text": self.settings["prompt"]}
        chats = [[{"role": "user", "content": [*parts, text]}] for parts in contents]
        return chat_inputs(processor, chats, self.settings["image_position"], padding=True)

    def _answers(self, model, processor, inputs: BatchFeature) -> list[str]:
        inputs = inputs.to(model.device, dtype=model.dtype)
        form = {name: self.settings[name] for name in FORMS if name in self.settings}
        fits = [structured_output(processor, **form)] if form else []
        output = model.generate(
            **inputs,
            max_new_tokens=self.settings["max_new_tokens"],
            do_sample=False,
            logits_processor=fits,
        )
        return processor.post_process_image_text_to_text(output, prompt_length=inputs["input_ids"].shape[1])


# Finding pictures.


def pictures_in(folder: Path, suffixes: frozenset[str] = PICTURE_SUFFIXES) -> list[str]:
    """Return the files below a folder that end with one of `suffixes`, by their paths there, sorted.

    Hidden files and folders, whose names begin with a dot, are skipped: file managers leave thumbnails and `._` files
    in them. Linked folders are searched like others, each folder once. A link that leads nowhere counts as a picture
    by its name, so that it is reported.

    Raises:
        ValueError: there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    found: list[str] = []
    visited: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:  # linked folders come after all real ones, so that a picture has its name without a link
        links: list[str] = []
        while waiting:
            waiting += _search(folder, waiting.pop(), suffixes, found, links, visited)
        waiting = sorted(links, reverse=True)
    return sorted(found)


def _search(
    folder: Path, place: str, suffixes: frozenset[str], found: list[str], links: list[str], visited: set
) -> list[str]:
    """Add the pictures in `folder / place` to `found` and its linked folders to `links`; return its other folders."""
    status = os.stat(folder / place)
    if (status.st_dev, status.st_ino) in visited:
        return []
    visited.add((status.st_dev, status.st_ino))
    inside: list[str] = []
    with os.scandir(folder / place) as entries:
        for entry in entries:
            name = f"{place}/{entry.name}" if place else entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                (links if entry.is_symlink() else inside).append(name)
            elif os.path.splitext(entry.name)[1].lower() in suffixes:
                found.append(name)
    return inside


# The output file.


def finished_names(output: Path) -> set[str]:
    """Return the pictures that have a whole line. Half a line at the end, of a killed process, is cut off.

    Raises:
        ValueError: a line in the middle is not ours.
    """
    if not output.exists():
        return set()
    finished = set()
    with open(output, "r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):  # the last one
                file.truncate(file.tell() - len(line))
                break
            try:
                finished.add(str(json.loads(line)["picture"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{output} holds a line that is no answer about a picture ({error!r}): use another output."
                ) from error
    return finished


def as_json(value: dict[str, Any], **options: Any) -> bytes:
    """Return JSON in UTF-8. Bytes of a file name that are not UTF-8 become escapes, which are read back unchanged."""
    return json.dumps(value, ensure_ascii=False, **options).encode("utf-8", "backslashreplace") + b"\n"


def as_line(name: str, text: str) -> bytes:
    """Return the line of one picture."""
    return as_json({"picture": name, "text": text})


# Iteration.


def in_chunks(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Yield the items in lists of `size`; the last one may be shorter."""
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Yield the items. Each is made in another thread while the one before it is in use."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        upcoming = pool.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = pool.submit(next, items, None)
            yield item


__all__ = ["Captioning", "pictures_in"]
