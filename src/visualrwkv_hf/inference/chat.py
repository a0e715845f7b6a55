"""A conversation about pictures: answers as they are generated, branches, and a file to continue from.

The model's [`StateStore`] remembers what it has read: every question hands over all messages, and only the new words
are read.
"""

import os
import tempfile
import zipfile
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import BatchFeature

from ..image_processing_visualrwkv import open_picture
from ..kept_state import KeptState
from ..state_store import StateStore
from ..tuned_state import identity_of_beginning, store_of_beginning
from .pictures import open_named_picture
from .progress import Report
from .saved_chat import ChatWriter, picture_part, read_chat
from .streaming import Generation

FIRST_BRANCH = "main"


def chat_inputs(processor, messages: Sequence, image_position: str | None = None, **options) -> BatchFeature:
    """Return the model's inputs for a chat, or a list of chats, up to where the answer begins.

    Args:
        processor: the model's.
        messages: as for `processor.apply_chat_template`.
        image_position: "first", "middle" or "last"; None: as the model was trained.
        options: for the processor, e.g. `padding=True` for several chats.

    Raises:
        jinja2.TemplateError, ValueError: messages that cannot be asked.
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


class Chat:
    """A conversation that grows by questions and answers, with branches.

    Args:
        model: a `VisualRWKVForConditionalGeneration`. It is given a [`StateStore`] if it has none.
        processor: the model's.
        image_position: "first", "middle" or "last"; None: as the model was trained.
        generation: for `model.generate`, e.g. `max_new_tokens`, `do_sample`, `initial_state`, `state_store`.

    Attributes:
        branches: name -> the messages of a branch.
        branch: the name of the current one.
        pictures: those that wait for the next question, [`PIL.Image.Image`] in RGB.
        last: the last [`Generation`], with its speed.
    """

    last: Generation

    def __init__(self, model, processor, image_position: str | None = None, **generation):
        self.model, self.processor = model, processor
        self.image_position, self.generation = image_position, generation
        self.branches: dict[str, list[dict[str, Any]]] = {FIRST_BRANCH: []}
        self.branch = FIRST_BRANCH
        self.pictures: list[Image.Image] = []
        self._left: Generation | None = None
        if getattr(model, "state_store", None) is None:
            model.state_store = StateStore()

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages so far, as `processor.apply_chat_template` takes them."""
        return self.branches[self.branch]

    def add_picture(self, source: Any) -> Image.Image:
        """Put a picture before the next question.

        Args:
            source: a path, a URL or a pipe, or what `open_picture` takes.

        Raises:
            ValueError: it cannot be read.
        """
        self.pictures.append(opened(source))
        return self.pictures[-1]

    def ask(
        self,
        question: str,
        is_stopped: Callable[[], bool] = lambda: False,
        report: Report | None = None,
    ) -> Generator[str, None, None]:
        """Yield the answer in pieces. An answer that is left half-way stays in the chat as far as it was given.

        A question without any answer is dropped. If it is left while the prompt is still being read, the current piece
        of it is read to its end in the background, so that this returns at once; the next question waits for that.

        Args:
            question: the text.
            is_stopped: asked several times a second, also before the first word; True ends the answer.
            report: takes words on what is done before the first word.

        Raises:
            ValueError, jinja2.TemplateError: the question cannot be asked, e.g. because it contains `<image>`.
        """
        content = [picture_part(picture) for picture in self.pictures] + [{"type": "text", "text": question}]
        asked = [*self.messages, {"role": "user", "content": content}]
        if report is not None and self.is_busy:
            report("finishing what was stopped")
        self.wait()
        inputs, answer = self._inputs(asked), ""
        run = self.last = Generation(self.model, self.processor.tokenizer, inputs, report, **self.generation)
        try:
            for piece in run.pieces(is_stopped):
                answer += piece
                yield piece
        finally:
            run.stop()
            self._left = run
            if answer:
                self.branches[self.branch] = [*asked, {"role": "assistant", "content": answer}]
                self.pictures = []
                self.wait()  # for one token at most

    def wait(self) -> None:
        """Wait until an answer that was left has let go of the model."""
        if self._left is not None:
            left, self._left = self._left, None
            left.join()

    @property
    def is_busy(self) -> bool:
        """Whether an answer that was left still computes."""
        return self._left is not None and self._left.is_running

    def start_branch(self, name: str) -> bool:
        """Continue with the branch `name`, or start it here if it does not exist. Return whether it is new.

        Raises:
            ValueError: the name is empty.
        """
        if not name.strip():
            raise ValueError("A branch needs a name.")
        is_new = name not in self.branches
        if is_new:
            self.branches[name] = list(self.messages)
        self.branch = name
        return is_new

    def reset(self) -> None:
        """Forget the messages of this branch, and pictures that wait."""
        self.branches[self.branch], self.pictures = [], []

    def save(self, path: str | os.PathLike) -> None:
        """Write all branches, their pictures and their states to one file, whole or not at all.

        It is a zip of `chat.json`, `pictures/*.png` and `states/*.safetensors`.

        Raises:
            ValueError: all pictures together have too many pixels to be read again.
        """
        self.wait()
        path = Path(path)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.absolute().parent) as scratch:
            whole, state_file = Path(scratch) / "chat", Path(scratch) / "state.safetensors"
            with zipfile.ZipFile(whole, "w") as file:
                writer = ChatWriter(file)
                for name, messages in self.branches.items():
                    if messages:
                        self._state_of(messages).save(state_file)
                        writer.add_state(name, state_file)
                writer.finish(self.branches, self.branch, self.pictures)
            whole.replace(path)

    def load(self, path: str | os.PathLike) -> list[str]:
        """Continue with a saved chat in place of this one, without reading its pictures again.

        Returns:
            list[str]: reasons why states could not be used, for example because they are another model's or began with
            another tuned state. The chat is there all the same; its next question reads all of it.

        Raises:
            ValueError: the file is not a saved chat, or damaged.
            OSError: it cannot be read.
        """
        saved = read_chat(path)
        self.branches, self.branch, self.pictures = saved.branches, saved.branch, saved.pictures
        return [refusal for state in saved.states.values() if (refusal := self._take(state))]

    def _inputs(self, messages: Sequence) -> BatchFeature:
        inputs = chat_inputs(self.processor, messages, self.image_position)
        return inputs.to(self.model.device, dtype=self.model.dtype)

    def _state_of(self, messages: Sequence) -> KeptState:
        """Return the state after `messages`. Only what the store no longer has is read again."""
        placement = {} if self.image_position is None else {"image_position": self.image_position}
        begun = {
            name: self.generation[name]
            for name in ("initial_state", "state_store")
            if name in self.generation
        }
        return self.model.read(self.processor, messages, **begun, **placement)

    def _take(self, state: bytes) -> str | None:
        """Put a saved state into the model's store. Return why not, if it is refused."""
        with tempfile.TemporaryDirectory() as scratch:
            (state_file := Path(scratch) / "state.safetensors").write_bytes(state)
            try:
                kept = KeptState.load(state_file, self.model, self.processor)
                initial = self.generation.get("initial_state")
                if [*kept.beginnings] != [identity_of_beginning(self.model, initial)]:
                    raise ValueError(
                        "it did not begin as this model does, with the same tuned state or with none."
                    )
                store = self.generation.get("state_store", self.model.state_store)
                if (store := store_of_beginning(store, self.model, initial)) is not None:
                    store.add(kept)
            except ValueError as error:
                return str(error).replace(f"{state_file}", "its state")
        return None


def opened(source: Any) -> Image.Image:
    """Return a picture in RGB from a path, URL or pipe, or from what `open_picture` takes."""
    return open_named_picture(source) if isinstance(source, str) else open_picture(source)


__all__ = ["Chat", "chat_inputs"]
