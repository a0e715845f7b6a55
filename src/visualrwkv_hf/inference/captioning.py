"""One question about every picture of a folder: in batches, to a file of JSON lines that grows and is gone on with."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from transformers import BatchFeature

from ..image_processing_visualrwkv import open_picture
from .chat import chat_inputs

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
"""Names of files that are taken for pictures, in small letters. Whatever else lies in the folder is passed over."""


class Batch(NamedTuple):
    """Pictures that are read at once: `names`, and what the processor made of them."""

    names: list[str]
    inputs: BatchFeature


class Captioning:
    """The work on a folder: what is to do, what is done, what cannot be read.

    `output` gets a line `{"picture": ..., "text": ...}` for each picture, named by its path below `folder`, in the
    order of these paths. A run that was killed loses its last batch at most: the next one cuts off half a line and
    does what is missing. `output`.summary.json says what was asked, how far it is, and which files are no pictures;
    the next run tries those again.

    Args:
        folder: pictures, in folders below it as well.
        output: the file of JSON lines.
        settings: `prompt`, `max_new_tokens`, `image_position` and whatever else the answers depend on, as JSON
            values: with other ones the file is not gone on with.

    Attributes:
        bad: name -> why the file cannot be read.

    Raises:
        ValueError: no such folder, no picture in it, or an output that is not this work's.
    """

    def __init__(self, folder: str | os.PathLike, output: str | os.PathLike, settings: dict[str, Any]):
        self.folder, self.output, self.settings = Path(folder), Path(output), settings
        self.summary = self.output.with_name(f"{self.output.name}.summary.json")
        self.bad: dict[str, str] = {}
        self.names = pictures_in(self.folder)
        if not self.names:
            raise ValueError(
                f"There is no picture in {folder}: none of {', '.join(sorted(PICTURE_SUFFIXES))}."
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from writing the same output. The lock of a killed process is none.

        Raises:
            ValueError: another one is writing it.
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
        """The pictures without an answer, in order. It opens the output, and cuts off half a line at its end.

        Raises:
            ValueError: the output is not this work's.
        """
        self._refuse_other_work()
        self.write_summary()
        done = finished_names(self.output)
        return [name for name in self.names if name not in done]

    def run(self, model, processor, batch_size: int) -> Iterator[list[str]]:
        """Answers what is to do, and yields the names of each batch when it is on the disk.

        Args:
            model: a `VisualRWKVForConditionalGeneration`.
            processor: the model's.
            batch_size: pictures that are read at once.
        """
        todo = self.todo()
        chunks = [todo[start : start + batch_size] for start in range(0, len(todo), batch_size)]
        batches = (batch for names in chunks for batch in self._batches(processor, names))
        with open(self.output, "ab") as file:
            for names, inputs in one_ahead(batches):
                texts = self._answers(model, processor, inputs)
                file.write(b"".join(map(as_line, names, texts)))
                file.flush()
                os.fsync(file.fileno())
                yield names
        self.write_summary()

    def write_summary(self) -> None:
        """Writes what was asked and how far it is, whole or not at all."""
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
            raise ValueError(f"{self.output} is there and has no {self.summary.name}: name another output.")
        earlier = json.loads(self.summary.read_text("utf-8"))["settings"]
        for name, value in self.settings.items():
            if earlier.get(name) != value:
                raise ValueError(
                    f"{self.output} was begun with {name} {earlier.get(name)!r}, not {value!r}: name another output, "
                    "or ask as before to go on."
                )

    def _batches(self, processor, names: Sequence[str]) -> Iterator[Batch]:
        """The readable ones of these pictures in a batch; one by one if the processor refuses some of them."""
        opened = {}
        for name in names:
            try:
                opened[name] = open_picture(self.folder / name)
            except ValueError as error:
                self.bad[name] = str(error)
        if not opened:
            return
        try:
            yield Batch(list(opened), self._inputs(processor, list(opened.values())))
        except ValueError:
            for name, picture in opened.items():
                try:
                    yield Batch([name], self._inputs(processor, [picture]))
                except ValueError as error:
                    self.bad[name] = str(error)

    def _inputs(self, processor, pictures: Sequence) -> BatchFeature:
        text = {"type": "text", "text": self.settings["prompt"]}
        chats = [[{"role": "user", "content": [{"type": "image", "image": p}, text]}] for p in pictures]
        return chat_inputs(processor, chats, self.settings["image_position"], padding=True)

    def _answers(self, model, processor, inputs: BatchFeature) -> list[str]:
        inputs = inputs.to(model.device, dtype=model.dtype)
        output = model.generate(**inputs, max_new_tokens=self.settings["max_new_tokens"], do_sample=False)
        return processor.post_process_image_text_to_text(output, prompt_length=inputs["input_ids"].shape[1])


def pictures_in(folder: Path) -> list[str]:
    """The pictures below a folder by their paths there, sorted.

    Raises:
        ValueError: if there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    found = (path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in found)


def finished_names(output: Path) -> set[str]:
    """The pictures that have a whole line. Half a line at the end is cut off: its writer was killed.

    Raises:
        ValueError: a line in the middle is none of ours.
    """
    if not output.exists():
        return set()
    with open(output, "r+b") as file:
        lines = file.readlines()
        if lines and not lines[-1].endswith(b"\n"):
            torn = lines.pop()
            file.truncate(file.tell() - len(torn))
    try:
        return {json.loads(line)["picture"] for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{output} holds a line that is no answer about a picture ({error}).") from error


def as_json(value: dict[str, Any], **options: Any) -> bytes:
    """JSON in UTF-8. What a file name has that is no UTF-8 stands there as an escape, and is read back as it was."""
    return json.dumps(value, ensure_ascii=False, **options).encode("utf-8", "backslashreplace") + b"\n"


def as_line(name: str, text: str) -> bytes:
    return as_json({"picture": name, "text": text})


def one_ahead(items: Iterator) -> Iterator:
    """The items, each made in another thread while the one before it is in use."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        upcoming = pool.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = pool.submit(next, items, None)
            yield item


__all__ = ["Captioning", "pictures_in"]
