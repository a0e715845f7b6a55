"""A conversation about pictures: answers as they come, branches, and a file that goes on where it stopped.

The model's [`StateStore`] remembers what was read: every call gives it all messages, and it reads the new words only.
"""

import io
import json
import os
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from ..cache_visualrwkv import VisualRWKVCache
from ..image_processing_visualrwkv import open_picture
from ..state_store import StateStore

FIRST_BRANCH = "main"
CHAT_FILE = "chat.json"
FORMAT = "visualrwkv chat 1"
"""Stands in `chat.json`: what the file is, and by which rules it was written."""


def chat_inputs(processor, messages: Sequence, image_position: str | None = None, **options) -> BatchFeature:
    """What the model reads of a chat, or of a list of chats, up to the place of the answer.

    Args:
        processor: the model's.
        messages: as for `processor.apply_chat_template`.
        image_position: "first", "middle" or "last"; None: as the model was trained.
        options: for the processor, e.g. `padding=True` for several chats.
    """
    placement = {} if image_position is None else {"image_position": image_position}
    return processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=options,
        **placement,
    )


class AnswerStreamer(TextIteratorStreamer):
    """Yields an answer as it comes, without the white space around it."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._started = False
        self._space = ""  # goes out only if a word follows: the last one ends the turn

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = self._space + text if self._started else text.lstrip()
        words = text.rstrip()
        self._started, self._space = self._started or bool(words), text[len(words) :]
        super().on_finalized_text(words, stream_end)


class StopOnRequest(StoppingCriteria):
    """Ends a generation behind the token at which `event` is found to be set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def stream_answer(model, tokenizer, inputs: Mapping, **generation) -> Generator[str, None, None]:
    """The answer of `model.generate(**inputs, **generation)` in pieces, stripped.

    A consumer that stops, or is interrupted, ends the generation behind the next token.

    Raises:
        Exception: what `generate` raises.
    """
    streamer, stop = AnswerStreamer(tokenizer), threading.Event()
    criteria = StoppingCriteriaList([StopOnRequest(stop)])
    with ThreadPoolExecutor(max_workers=1) as pool:
        run = pool.submit(
            model.generate, **inputs, streamer=streamer, stopping_criteria=criteria, **generation
        )
        run.add_done_callback(lambda _: streamer.text_queue.put(streamer.stop_signal))  # also where it failed
        try:
            yield from filter(None, streamer)
        finally:
            stop.set()
        run.result()


class Chat:
    """A conversation that grows by questions and answers, with branches.

    Args:
        model: a `VisualRWKVForConditionalGeneration`. It is given a [`StateStore`] if it has none.
        processor: the model's.
        image_position: "first", "middle" or "last"; None: as the model was trained.
        generation: for `model.generate`, e.g. `max_new_tokens`, `do_sample`.

    Attributes:
        branches: name -> the messages of a branch.
        branch: the name of the one that goes on.
        pictures: those that wait for the next question, [`PIL.Image.Image`] in RGB.
    """

    def __init__(self, model, processor, image_position: str | None = None, **generation):
        self.model, self.processor = model, processor
        self.image_position, self.generation = image_position, generation
        self.branches: dict[str, list[dict[str, Any]]] = {FIRST_BRANCH: []}
        self.branch = FIRST_BRANCH
        self.pictures: list[Image.Image] = []
        if getattr(model, "state_store", None) is None:
            model.state_store = StateStore()

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages so far, as `processor.apply_chat_template` takes them."""
        return self.branches[self.branch]

    def add_picture(self, source) -> Image.Image:
        """Puts a picture (see `open_picture`) before the next question.

        Raises:
            ValueError: it cannot be read.
        """
        self.pictures.append(open_picture(source))
        return self.pictures[-1]

    def ask(self, question: str) -> Generator[str, None, None]:
        """The answer in pieces. Whoever stops half-way keeps what was said; a question without an answer is dropped.

        Raises:
            ValueError, jinja2.TemplateError: a question that cannot be asked, e.g. one that holds `<image>`.
        """
        content = [_picture_part(picture) for picture in self.pictures] + [{"type": "text", "text": question}]
        asked = [*self.messages, {"role": "user", "content": content}]
        inputs, answer = self._inputs(asked), ""
        try:
            for piece in stream_answer(self.model, self.processor.tokenizer, inputs, **self.generation):
                answer += piece
                yield piece
        finally:
            if answer:
                self.branches[self.branch] = [*asked, {"role": "assistant", "content": answer}]
                self.pictures = []

    def start_branch(self, name: str) -> bool:
        """Goes on with the branch `name`, which starts here if there is none. Returns whether it does.

        Raises:
            ValueError: a name that is empty.
        """
        if not name.strip():
            raise ValueError("A branch needs a name.")
        is_new = name not in self.branches
        if is_new:
            self.branches[name] = list(self.messages)
        self.branch = name
        return is_new

    def reset(self) -> None:
        """Forgets the messages of this branch, and pictures that wait."""
        self.branches[self.branch], self.pictures = [], []

    def save(self, path: str | os.PathLike) -> None:
        """Writes all branches, their pictures and their states to one file, whole or not at all.

        It is a zip of `chat.json`, `pictures/*.png` and `states/*.safetensors`.
        """
        path = Path(path)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.absolute().parent) as scratch:
            whole, state_file = Path(scratch) / "chat", Path(scratch) / "state.safetensors"
            with zipfile.ZipFile(whole, "w") as file:  # stored: neither PNGs nor states get smaller
                states = {}
                for number, (name, messages) in enumerate(self.branches.items(), start=1):
                    if messages:
                        states[name] = f"states/{number}.safetensors"
                        self._state_of(messages).save(state_file)
                        file.write(state_file, states[name])
                chat = {"format": FORMAT, "branch": self.branch, **self._written(file), "states": states}
                file.writestr(CHAT_FILE, json.dumps(chat, indent=2, ensure_ascii=False) + "\n")
            whole.replace(path)

    def load(self, path: str | os.PathLike) -> list[str]:
        """Goes on with a saved chat in the place of this one, without reading its pictures again.

        Returns:
            list[str]: why states could not be taken, if they could not, for example since they are another model's.
            The chat is there all the same; its next question reads all of it.

        Raises:
            ValueError: the file is no saved chat, or damaged.
            OSError: it cannot be read.
        """
        try:
            with zipfile.ZipFile(path) as file:
                chat = json.loads(file.read(CHAT_FILE))
                branches, pictures = _read_back(file, chat)
                states = {name: file.read(member) for name, member in chat["states"].items()}
                branches[chat["branch"]]  # is there
        except (zipfile.BadZipFile, zlib.error, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no saved chat, or damaged ({error}).") from error
        self.branches, self.branch, self.pictures = branches, chat["branch"], pictures
        return [refusal for state in states.values() if (refusal := self._take(state))]

    def _inputs(self, messages: Sequence) -> BatchFeature:
        inputs = chat_inputs(self.processor, messages, self.image_position)
        return inputs.to(self.model.device, dtype=self.model.dtype)

    def _state_of(self, messages: Sequence) -> VisualRWKVCache:
        """What the model keeps of `messages`. It is read again only as far as the store has it no longer."""
        placement = {} if self.image_position is None else {"image_position": self.image_position}
        return self.model.read(self.processor, messages, **placement)

    def _written(self, file: zipfile.ZipFile) -> dict[str, Any]:
        """Branches and waiting pictures for `chat.json`; the pictures go into `file`, each once."""
        names: dict[int, str] = {}

        def name_of(picture: Image.Image) -> str:
            if id(picture) not in names:
                names[id(picture)] = f"pictures/{len(names) + 1}.png"
                picture.save(png := io.BytesIO(), "PNG")
                file.writestr(names[id(picture)], png.getvalue())
            return names[id(picture)]

        branches = {name: _map_pictures(messages, name_of) for name, messages in self.branches.items()}
        return {"branches": branches, "pictures": [name_of(picture) for picture in self.pictures]}

    def _take(self, state: bytes) -> str | None:
        """Puts a saved state into the model's store. Returns why not, if it is refused."""
        with tempfile.TemporaryDirectory() as scratch:
            (state_file := Path(scratch) / "state.safetensors").write_bytes(state)
            try:
                self.model.state_store.add(VisualRWKVCache.load(state_file, self.model, self.processor))
            except ValueError as error:
                return str(error)
        return None


def _picture_part(picture: Image.Image | str) -> dict[str, Any]:
    return {"type": "image", "image": picture}


def _map_pictures(messages: Sequence[Mapping], function: Callable[[Any], Any]) -> list[dict[str, Any]]:
    """The messages with `function` of every picture in its place."""

    def mapped(part: Mapping) -> Mapping:
        return _picture_part(function(part["image"])) if part["type"] == "image" else part

    return [
        {**message, "content": [mapped(part) for part in message["content"]]}
        if isinstance(message["content"], list)
        else dict(message)
        for message in messages
    ]


def _read_back(
    file: zipfile.ZipFile, chat: Mapping
) -> tuple[dict[str, list[dict[str, Any]]], list[Image.Image]]:
    """Branches and waiting pictures of `chat.json`, with the pictures of `file` in their place.

    Raises:
        ValueError, KeyError, TypeError: it is none, or of another version.
    """
    if chat["format"] != FORMAT:
        raise ValueError(f"its format is {chat['format']!r}, this version reads {FORMAT!r}")
    picture_of = cache(lambda name: open_picture(Image.open(io.BytesIO(file.read(name)))))
    branches = {name: _map_pictures(messages, picture_of) for name, messages in chat["branches"].items()}
    return branches, [picture_of(name) for name in chat["pictures"]]


__all__ = ["AnswerStreamer", "Chat", "chat_inputs", "stream_answer"]
