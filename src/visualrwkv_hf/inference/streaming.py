"""Answers that come piece by piece from a thread of their own, and that can be left at any time."""

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from .progress import Left, Report, Speed, Watch, now

POLL_SECONDS = 0.05
"""How often a consumer that waits for words looks whether it is to stop."""


class AnswerStreamer(TextIteratorStreamer):
    """Yield an answer as it is generated, without the white space around it."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._started = False
        self._space = ""  # sent only if a word follows: the last white space ends the turn

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = self._space + text if self._started else text.lstrip()
        words = text.rstrip()
        self._started, self._space = self._started or bool(words), text[len(words) :]
        super().on_finalized_text(words, stream_end)


class StopOnRequest(StoppingCriteria):
    """End a generation after the token at which `event` is found to be set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class Generation:
    """`model.generate(**inputs, **generation)` in a thread, which ends when the answer does or after `stop()`.

    Args:
        model: a `VisualRWKVForConditionalGeneration`.
        tokenizer: the model's.
        inputs: one prompt, as `chat_inputs` gives it.
        report: takes words on what is done before the first token, from that thread.
        generation: for `model.generate`.
    """

    def __init__(self, model, tokenizer, inputs: Mapping, report: Report | None = None, **generation):
        self._streamer, self._stop = AnswerStreamer(tokenizer), threading.Event()
        self._error: BaseException | None = None
        self._watch = Watch(model, inputs["input_ids"].shape[1], report, self._stop.is_set)
        self._token_times: list[float] = []
        self._started = now()
        criteria = StoppingCriteriaList([StopOnRequest(self._stop), self._count])
        arguments = dict(inputs) | dict(streamer=self._streamer, stopping_criteria=criteria) | generation
        # A daemon: a program that ends does not wait for the piece of a prompt that is still being read.
        self._thread = threading.Thread(target=self._run, args=(model, arguments), daemon=True)
        self._thread.start()

    def _run(self, model, arguments: dict[str, Any]) -> None:
        try:
            model.generate(**arguments)
        except Left:  # as asked for by `stop`
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._watch.close()
            self._streamer.text_queue.put(self._streamer.stop_signal)  # also where it failed

    def _count(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.Tensor:
        self._watch.close()
        self._token_times.append(now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    @property
    def speed(self) -> Speed:
        """How fast it was until now."""
        times = self._token_times or [now()]
        first, last = times[0], times[-1]
        return Speed(self._watch.read, first - self._started, len(self._token_times), last - first)

    def pieces(self, is_stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Yield the answer in pieces until it ends, or until `is_stopped()`, which is asked while it waits.

        Raises:
            Exception: whatever `generate` raised.
        """
        while not is_stopped():
            try:
                piece = self._streamer.text_queue.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            if piece == self._streamer.stop_signal:
                self.wait()
                return
            if piece:
                yield piece

    def stop(self) -> None:
        """Ask the generation to end after its next token, or the piece of the prompt that is being read.

        It returns at once; `wait()` waits for the end.
        """
        self._stop.set()

    @property
    def is_running(self) -> bool:
        """Whether it still computes."""
        return self._thread.is_alive()

    def join(self) -> None:
        """Wait for the end, whatever it is."""
        self._thread.join()

    def wait(self) -> None:
        """Wait for the end.

        Raises:
            Exception: whatever `generate` raised.
        """
        self.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def stream_answer(model, tokenizer, inputs: Mapping, **generation) -> Generator[str, None, None]:
    """Yield the answer of `model.generate(**inputs, **generation)` in pieces, without white space around it.

    A consumer that stops, or is interrupted, ends the generation after its next token, or the piece of the prompt that
    is being read, and waits for that.

    Raises:
        Exception: whatever `generate` raised.
    """
    run = Generation(model, tokenizer, inputs, **generation)
    try:
        yield from run.pieces()
    finally:
        run.stop()
        run.wait()


__all__ = ["AnswerStreamer", "Generation", "StopOnRequest", "stream_answer"]
