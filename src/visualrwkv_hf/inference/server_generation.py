"""The one thread that runs the model: who is next, how tokens are chosen, and how they become an answer's text."""

import asyncio
import copy
import hashlib
import json
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..chat_template import TURN_END
from ..processing_visualrwkv import refuse_half_characters
from ..state_store import StateStore
from .progress import Left, Watch
from .server_decisions import Decider, Decision
from .server_limits import Access, Limits, Refusal, sentence_of
from .server_media import open_media, refuse_many_tiles, with_pictures
from .server_messages import Medium
from .server_requests import Asked
from .structured import Grammar, StructuredOutput

logger = logging.getLogger(__name__)

INCOMPLETE = "\ufffd"
"""What the tokenizer makes of bytes that are not a whole character yet."""
LONGEST_CHARACTER = 4
"""In tokens: of UTF-8 in single bytes."""


class Finished(NamedTuple):
    """The end of an answer: "stop" or "length", and how many tokens were read and written."""

    reason: str
    prompt_tokens: int
    completion_tokens: int


class Job:
    """One request that waits for its answer, or gets it.

    Its `events` are pieces of text, and in the end a `Finished`, a `Refusal`, or None if nobody wants it any more.

    Args:
        asked: what is to be answered.
        files: its pictures and films, as bytes.
        client: who asks; clients take turns.
    """

    def __init__(self, asked: Asked, files: Sequence[Medium], client: str):
        self.asked, self.files, self.client = asked, list(files), client
        self.cancelled = threading.Event()
        self.events: asyncio.Queue[str | Finished | Refusal | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def put(self, event: str | Finished | Refusal | None) -> None:
        """Add an event, from any thread."""
        try:
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the loop is closed: the server has ended
            self.cancelled.set()


class Line:
    """Jobs that wait, and the thread that does one after the other. Clients take turns, whoever asks how often.

    Args:
        work: does a job.
        waiting: how many may wait, half of them of one client.
    """

    def __init__(self, work: Callable[[Job], None], waiting: int):
        self._work, self._most = work, waiting
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()
        self._changed = threading.Condition()
        self._current: Job | None = None
        self._closed = False
        self.thread = threading.Thread(target=self._run, name="model", daemon=True)
        self.thread.start()

    def join(self, job: Job) -> None:
        """Put a job at the end of its client's queue.

        Raises:
            Refusal: 503 if too many wait, or the server is stopping.
        """
        with self._changed:
            if self._closed:
                raise Refusal("The server is stopping.", 503)
            own = len(self._waiting.get(job.client, ()))
            if sum(map(len, self._waiting.values())) >= self._most or own >= max(self._most // 2, 1):
                raise Refusal("Too many requests wait for the model. Try again later.", 503)
            self._waiting.setdefault(job.client, deque()).append(job)
            self._changed.notify()

    def leave(self, job: Job) -> None:
        """Give a job up, whether it waits or is being done.

        The model is free after its next token, or the piece of the prompt or the picture that it is reading.
        """
        job.cancelled.set()
        with self._changed:
            queue = self._waiting.get(job.client)
            if queue and job in queue:
                queue.remove(job)
                if not queue:
                    del self._waiting[job.client]
        job.put(None)

    def close(self) -> None:
        """Give all jobs up, and end the thread."""
        with self._changed:
            self._closed = True
            jobs = [job for queue in self._waiting.values() for job in queue]
            jobs += [self._current] if self._current else []
            self._waiting.clear()
            self._changed.notify()
        for job in jobs:
            job.cancelled.set()
            job.put(Refusal("The server is stopping.", 503))

    def _next(self) -> Job | None:
        """Return the first job of the client whose turn it is, or None after the end."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            client, queue = next(iter(self._waiting.items()))
            self._current = queue.popleft()
            if queue:
                self._waiting.move_to_end(client)
            else:
                del self._waiting[client]
            return self._current

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._work(job)
            except (ValueError, TemplateError) as error:
                job.put(error if isinstance(error, Refusal) else Refusal(sentence_of(error)))
            except BaseException:  # a panic of a library in Rust is no Exception
                logger.exception("An answer failed")
                job.put(Refusal("The answer failed. The server's log says why.", 500))
            finally:
                self._current = None
            del job  # its pictures, while the next one is waited for


class AnswerText:
    """The text of an answer, piece by piece: what may still change, or turn out to be a stop string, is held back.

    Args:
        decode: ids -> text.
        stops: texts before which the answer ends.
        strip: whether white space around the answer is left out.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str], strip: bool):
        self._decode, self._stops, self._strip = decode, stops, strip
        self._ids: list[int] = []
        self._held = ""
        self._begun = not strip
        self.stopped = False

    def add(self, token: int) -> str:
        """Return the text that a token makes certain. `stopped` says whether a stop string was found."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if not text.endswith(INCOMPLETE):
            self._ids = []
            return self._take(text)
        # Bytes that become no character are passed on where a cut changes nothing, so that few are decoded again.
        head, tail = self._ids[:-LONGEST_CHARACTER], self._ids[-LONGEST_CHARACTER:]
        if head and (certain := self._decode(head)) + self._decode(tail) == text:
            self._ids = tail
            return self._take(certain)
        return ""

    def end(self) -> str:
        """Return what was held back, at the end of the answer."""
        text = "" if self.stopped else self._take(self._decode(self._ids)) + self._held
        self._held = ""
        return text.rstrip() if self._strip else text

    def _take(self, text: str) -> str:
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        text = self._held + text
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            text = text[: min(found)]
            return text.rstrip() if self._strip else text
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        certain = text[: len(text) - kept]
        certain = certain.rstrip() if self._strip else certain
        self._held = text[len(certain) :]
        return certain


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` may be the beginning of `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


class Sampler(LogitsProcessor):
    """Chooses each token of one answer, by its own rules and its own random numbers.

    With n_j the number of times that token j was generated in this answer, its logit is
    l_j + bias_j - n_j * frequency_penalty - [n_j > 0] * presence_penalty, as OpenAI defines it. The token is the
    largest one at temperature 0, and otherwise drawn from softmax(l / temperature), of which the most probable tokens
    that together reach `top_p` are left.

    Args:
        asked: penalties, bias and seed; without a seed the random numbers are of no request's.
        prompt_length: tokens before the answer.
        temperature, top_p: as above.
    """

    def __init__(self, asked: Asked, prompt_length: int, temperature: float, top_p: float):
        self.asked, self.prompt_length, self.temperature, self.top_p = (
            asked,
            prompt_length,
            temperature,
            top_p,
        )
        self.generator = torch.Generator()
        if asked.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(asked.seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [1, vocab] whose largest one is that of the chosen token."""
        scores = self._adjusted(input_ids[0, self.prompt_length :], scores[0].float())  # [vocab]
        if not self.temperature:
            return scores[None]
        # On the CPU, so that a seed gives the same numbers on every device.
        probabilities = torch.softmax(scores.double().cpu() / self.temperature, dim=-1)
        if self.top_p < 1:
            ordered, places = probabilities.sort(descending=True)
            ordered[1:][ordered.cumsum(0)[:-1] >= self.top_p] = 0
            probabilities = torch.zeros_like(probabilities).scatter_(0, places, ordered)
        token = int(torch.multinomial(probabilities, 1, generator=self.generator))
        chosen = torch.full_like(scores, float("-inf"))
        chosen[token] = 0
        return chosen[None]

    def _adjusted(self, answer: Tensor, scores: Tensor) -> Tensor:
        asked = self.asked
        if asked.presence_penalty or asked.frequency_penalty:
            counts = torch.bincount(answer, minlength=len(scores)).to(scores.dtype)
            scores = scores - counts * asked.frequency_penalty - (counts > 0) * asked.presence_penalty
        if asked.bias:
            tokens = torch.tensor(list(asked.bias), device=scores.device)
            added = torch.tensor(list(asked.bias.values()), device=scores.device, dtype=scores.dtype)
            scores = scores.index_add(0, tokens, added)
        return scores


class Writer(StoppingCriteria):
    """Sends an answer on while it is generated, and ends it.

    Args:
        job: whose answer it is.
        text: what makes text of tokens.
        ends: tokens that end an answer and are no part of it.
        seconds: the longest time that it may take.
    """

    def __init__(self, job: Job, text: AnswerText, ends: Sequence[int], seconds: float):
        self.job, self.text, self.ends = job, text, set(ends)
        self.seconds, self.deadline = seconds, time.monotonic() + seconds
        self.count = 0
        self.reason: str | None = None

    def is_over(self) -> bool:
        """Return whether nobody waits for the answer any more, or its time is up."""
        return self.job.cancelled.is_set() or time.monotonic() > self.deadline

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Take the last token of `input_ids` [1, T], and return whether it is the last of the answer, bool [1]."""
        if self.reason is None:
            self._take(int(input_ids[0, -1]))
        return torch.full((1,), self.reason is not None, device=input_ids.device)

    def _take(self, token: int) -> None:
        self.count += 1
        if token in self.ends:
            self.reason = "stop"
        else:
            self._send(self.text.add(token))
            if self.text.stopped:
                self.reason = "stop"
            elif self.count >= self.job.asked.new_tokens or self.is_over():
                self.reason = "length"
        if self.reason is not None:
            self._send(self.text.end())

    def _send(self, text: str) -> None:
        if text:
            self.job.put(text)


class Answerer:
    """Answers jobs with a model; called by one thread only.

    Args:
        model: a `VisualRWKVForConditionalGeneration`.
        processor: the model's.
        limits: on pictures, prompts and answers.
        access: whether clients go on from one another's states.
        decisions: transformers' settings of decisions; None where none are taken.
    """

    def __init__(self, model: Any, processor: Any, limits: Limits, access: Access, decisions: Any = None):
        self.model, self.processor, self.limits, self.access = model, processor, limits, access
        self.decide = Decider(model, processor, decisions, limits)

    def __call__(self, job: Job) -> None:
        """Answer a job.

        Raises:
            ValueError, jinja2.TemplateError: what is asked cannot be read.
        """
        asked, tokenizer = job.asked, self.processor.tokenizer
        if job.cancelled.is_set():
            return
        if asked.decision is not None:
            self._decide(job, asked.decision)
            return
        try:
            inputs = self._inputs(asked, job)
        except Left:
            return
        job.files.clear()
        length = inputs["input_ids"].shape[1]
        if not 0 < length <= self.limits.prompt_tokens:
            raise Refusal(f"The prompt has {length} tokens, it can have 1 to {self.limits.prompt_tokens}.")
        config, own = copy.deepcopy(self.model.generation_config), self.model.generation_config
        default_temperature = (own.temperature or 1.0) if own.do_sample else 0.0
        default_top_p = (own.top_p or 1.0) if own.do_sample else 1.0
        temperature = default_temperature if asked.temperature is None else asked.temperature
        top_p = default_top_p if asked.top_p is None else asked.top_p
        config.update(do_sample=False, temperature=None, top_p=None, top_k=None, num_beams=1)
        config.update(max_new_tokens=asked.new_tokens, num_return_sequences=1, return_dict_in_generate=False)
        is_chat = asked.messages is not None
        text = AnswerText(
            lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
            [*asked.stop, TURN_END] if is_chat else asked.stop,
            strip=is_chat,
        )
        fits: list[LogitsProcessor] = []
        if asked.form is not None:
            fits.append(_structured(tokenizer, asked.form))
        fits.append(Sampler(asked, length, temperature, top_p))  # chooses among the tokens that are left
        writer = Writer(job, text, _ends_of(config), self.limits.answer_seconds)
        if asked.echo and asked.prompt:
            job.put(asked.prompt)
        watch = Watch(self.model, length, is_left=lambda: not writer.count and writer.is_over())
        try:
            self.model.generate(
                **inputs,
                generation_config=config,
                logits_processor=LogitsProcessorList(fits),
                stopping_criteria=StoppingCriteriaList([writer]),
                state_store=self._store_of(job),
            )
        except Left:
            # Whoever gave the job up has put an end to its events already.
            job.put(Refusal(f"The prompt could not be read within {writer.seconds:g} s.", 503))
            return
        finally:
            watch.close()
        job.put(Finished(writer.reason or "length", length, writer.count))

    def _decide(self, job: Job, decision: Decision) -> None:
        deadline = time.monotonic() + self.limits.answer_seconds

        def is_over() -> bool:
            return job.cancelled.is_set() or time.monotonic() > deadline

        pictures = [one for (one,) in open_media(job.files, job.asked.sampling, self.limits, is_over)]
        job.files.clear()
        watch = Watch(self.model, 0, is_left=is_over)
        try:
            answers, length = self.decide(decision, pictures, self._store_of(job), is_over)
        except Left:
            job.put(
                Refusal(f"The questions could not be answered within {self.limits.answer_seconds:g} s.", 503)
            )
            return
        finally:
            watch.close()
        job.put(json.dumps(answers))
        job.put(Finished("stop", length, 0))

    def _store_of(self, job: Job) -> StateStore | None:
        """Return the client's own part of the store of states, or all of it where states are shared."""
        store = self.model.state_store
        if store is None or self.access.share_states:
            return store
        scope = f"{job.client} {job.asked.scope}".encode("utf-8", "backslashreplace")
        return store.scoped(hashlib.sha256(scope).hexdigest())

    def _inputs(self, asked: Asked, job: Job) -> Any:
        if asked.messages is None:
            refuse_half_characters([asked.prompt or ""])
            return self.processor.tokenizer(asked.prompt, return_tensors="pt").to(self.model.device)
        opened = open_media(job.files, asked.sampling, self.limits, job.cancelled.is_set)
        refuse_many_tiles([*chain(*opened)], self.processor, self.limits)
        inputs = self.processor.apply_chat_template(
            with_pictures(asked.messages, opened),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **asked.template,
        )
        return inputs.to(self.model.device, dtype=self.model.dtype)


def _structured(tokenizer: Any, form: Grammar) -> LogitsProcessor:
    try:
        return StructuredOutput(form, tokenizer)
    except ImportError as error:
        raise Refusal(f"This server cannot give answers a form. {error}", 501) from error


def _ends_of(config: GenerationConfig) -> list[int]:
    ends = config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


__all__ = ["AnswerText", "Answerer", "Finished", "Job", "Line", "Sampler", "Writer"]
