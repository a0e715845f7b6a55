"""What a model is doing between the command and the first word, and how fast it was. Quick to import."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

Report = Callable[[str], None]
"""Takes a few words on what is being done now. It may be called from another thread."""


class Speed(NamedTuple):
    """How an answer was generated.

    Attributes:
        prompt_tokens: tokens of the prompt that were read, without those that a kept state had read before.
        first_seconds: from the start of `generate` to the first token: pictures and prompt.
        tokens: generated.
        seconds: from the first token to the last.
    """

    prompt_tokens: int
    first_seconds: float
    tokens: int
    seconds: float

    @property
    def reading(self) -> str:
        """Prompt tokens per second, pictures included, as text."""
        return per_second(self.prompt_tokens, self.first_seconds)

    @property
    def writing(self) -> str:
        """Generated tokens per second after the first one, as text."""
        return per_second(self.tokens - 1, self.seconds)


def per_second(count: int, seconds: float) -> str:
    """Return a rate as text, for example `12.3 tokens/s`."""
    return f"{count / seconds:.3g} tokens/s" if count > 0 and seconds > 0 else "no rate"


def backend_of(model: Any) -> str:
    """Return where and with what a model computes, for example `bfloat16 on cpu, native ops`."""
    device = model.device.type
    kernels = "Triton kernels" if device == "cuda" else "plain torch"
    if device == "cpu" and any(getattr(module, "accelerated", False) for module in model.modules()):
        kernels = "native ops"
    return f"{str(model.dtype).removeprefix('torch.')} on {device}, {kernels}"


class Left(Exception):
    """The answer is not wanted any more: raised in the thread that reads the prompt, before its next piece."""


class Watch:
    """Report which encoder runs and how far the prompt is read, until the first token is generated, or leave it.

    Args:
        model: a `VisualRWKVForConditionalGeneration`.
        num_tokens: of the prompt.
        report: what takes the words; None only counts.
        is_left: asked before each picture and each piece of the prompt; where it returns True the model's call ends
            with [`Left`]. No state is lost by that: the one that was being advanced is thrown away.

    Attributes:
        read: tokens that the language model has read.
    """

    def __init__(
        self,
        model: Any,
        num_tokens: int,
        report: Report | None = None,
        is_left: Callable[[], bool] = lambda: False,
    ):
        self.num_tokens, self.report, self.is_left, self.read = num_tokens, report, is_left, 0
        body = getattr(model, "model", None)
        tower, language_model = (getattr(body, name, None) for name in ("vision_tower", "language_model"))
        self._handles = []
        if language_model is not None:
            self._handles.append(language_model.register_forward_pre_hook(self._reads, with_kwargs=True))
        for name, encoder in tower.named_children() if tower is not None else ():
            self._handles.append(encoder.register_forward_pre_hook(self._encodes(name), with_kwargs=True))

    def close(self) -> None:
        """Take the hooks off the model, so that generating has none. Call it from the thread that generates."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _go_on(self) -> None:
        if self.is_left():
            raise Left

    def _reads(self, module: Any, args: tuple, kwargs: Mapping[str, Any]) -> None:
        self._go_on()
        inputs = kwargs.get("inputs_embeds", kwargs.get("input_ids"))
        if inputs is None and args:
            inputs = args[0]
        if self.report is not None:
            self.report(f"reading the prompt: {self.read} of {self.num_tokens} tokens are read")
        self.read += 0 if inputs is None else inputs.shape[1]

    def _encodes(self, name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple, kwargs: Mapping[str, Any]) -> None:
            self._go_on()
            if self.report is None:
                return
            pixels = next((value for value in (*args, *kwargs.values()) if hasattr(value, "shape")), None)
            count = 1 if pixels is None else len(pixels)
            what = "the picture" if count == 1 else f"{count} pictures or tiles"
            self.report(f"encoding {what} with {name}")

        return hook


@contextlib.contextmanager
def loading_reported(report: Report | None, num_bytes: int) -> Iterator[None]:
    """Replace transformers' bar for weights by `report` while the body loads a model.

    Args:
        report: what takes the words; None shows nothing at all.
        num_bytes: of the weights' files.
    """
    from transformers.utils import logging

    def bar(factory: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        items = args[0] if args else kwargs.get("iterable", ())
        return LoadingBar(items, kwargs.get("total"), report, num_bytes)

    before = logging.set_tqdm_hook(bar)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


class LoadingBar:
    """Take the place of a tqdm bar over the tensors of a model, and report the bytes they stand for."""

    def __init__(self, items: Iterable, total: int | None, report: Report | None, num_bytes: int):
        self.items, self.report, self.num_bytes = items, report, num_bytes
        self.total = total or (len(items) if hasattr(items, "__len__") else 0)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        for number, item in enumerate(self.items):
            if self.report is not None and self.total:
                done = self.num_bytes * number / self.total
                self.report(f"loading weights: about {in_bytes(done)} of {in_bytes(self.num_bytes)}")
            yield item

    def __enter__(self) -> "LoadingBar":
        return self

    def __exit__(self, *_: Any) -> None:
        return None

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def in_bytes(count: float) -> str:
    """Return a number of bytes in decimal units, as file managers and transformers count."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def peak_memory(model: Any = None) -> str:
    """Return the largest memory of this process so far as text, and that of the GPU if the model is on one."""
    parts = []
    with contextlib.suppress(ImportError):  # Windows has no such module
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        parts.append(in_bytes(peak if sys.platform == "darwin" else 1024 * peak))
    device = getattr(model, "device", None)
    if device is not None and device.type == "cuda":
        import torch

        parts.append(f"{in_bytes(torch.cuda.max_memory_allocated(device))} on the GPU")
    return ", ".join(parts) or "unknown"


now = time.perf_counter
