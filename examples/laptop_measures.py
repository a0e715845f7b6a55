"""What benchmark_laptop.py measures, each in a process of its own so that the peak memory is its own.

A process that was started for it runs `python laptop_measures.py NAME JSON` and prints one line of JSON: numbers in
seconds, bytes and tokens.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a program that answers imports it as the command `ask` does
    import torch

QUESTION = "What is in the picture, and what is it doing there?"
SIDE = 480
"""Height and width of the picture, in pixels."""


def now() -> float:
    return time.perf_counter()


def peak_bytes() -> int:
    """Return the largest resident memory of this process.

    Linux counts it from the start of the program; `getrusage` would include the memory of the process that started it.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class Watch:
    """Note when a model's vision tower and its language model begin, until the first token is there.

    It is a streamer of `generate`, which gives it the prompt and then each token.
    """

    def __init__(self, model: Any):
        self.began: dict[str, float] = {}
        self.tokens: list[float] = []
        self.is_prompt_seen = False
        tower = model.model.vision_tower
        parts = {"tower": tower, "language model": model.model.language_model}
        self.handles = [
            part.register_forward_pre_hook(self._note(name), with_kwargs=True) for name, part in parts.items()
        ]
        self.encoders: dict[str, float] = {}
        for name, encoder in tower.named_children():
            self.handles += [
                encoder.register_forward_pre_hook(self._note(name), with_kwargs=True),
                encoder.register_forward_hook(self._note_end(name)),
            ]

    def _note(self, name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: self.began.setdefault(name, now()) and None

    def _note_end(self, name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            self.encoders.setdefault(name, now() - self.began[name])

        return hook

    def put(self, tokens: torch.Tensor) -> None:
        if self.is_prompt_seen:
            self.tokens.append(now())
            for handle in self.handles:
                handle.remove()
            self.handles = []
        self.is_prompt_seen = True

    def end(self) -> None:
        pass


def answer_of_ours(folder: str, dtype: str, accelerate: bool, new_tokens: int) -> dict[str, Any]:
    """Load a model as the command `ask` does, and answer one question about one picture.

    Args:
        folder: the model's, which may hold weights in int8 or int4.
        dtype: as `load_model` takes it.
        accelerate: whether with native ops.
        new_tokens: how long the answer is.
    """
    import numpy as np
    from PIL import Image

    from visualrwkv_hf.inference import chat_inputs, load_model, load_processor

    imported = time.process_time()
    started = now()
    processor = load_processor(folder)
    model = load_model(folder, "cpu", dtype, accelerate, huge_pages=False)
    loaded = now()
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    content = [{"type": "image", "image": Image.fromarray(pixels)}, {"type": "text", "text": QUESTION}]
    inputs = chat_inputs(processor, [{"role": "user", "content": content}]).to(
        model.device, dtype=model.dtype
    )
    watch = Watch(model)
    asked = now()
    model.generation_config.eos_token_id = None  # no token of random weights ends the answer
    model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, streamer=watch)
    first = watch.tokens[0]
    return {
        "load": loaded - started,
        "tower": watch.began["language model"] - watch.began["tower"],
        **{f"tower {name}": seconds for name, seconds in watch.encoders.items()},
        "prefill": first - watch.began["language model"],
        "first": first - asked,
        "token": statistics.median(b - a for a, b in itertools.pairwise(watch.tokens)),
        "peak": peak_bytes(),
        "processor": time.process_time(),
        "imports": imported,
        "weight_bytes": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        "prompt_tokens": inputs["input_ids"].shape[1],
        "picture_tokens": int((inputs["input_ids"] == processor.image_token_id).sum()),
    }


def answer_of_llama_cpp(path: str, vocab_size: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """Read a prompt and write tokens with llama.cpp: a language model without a picture.

    Args:
        path: the GGUF file.
        vocab_size: the model's.
        prompt_tokens: length of the prompt.
        new_tokens: length of the answer.
    """
    import torch
    from llama_cpp_engine import reader

    started = now()
    read = reader(Path(path), vocab_size)
    prompt = torch.randint(1, vocab_size, (prompt_tokens,), generator=torch.Generator().manual_seed(0))
    loaded = now()
    logits, state = read(prompt, None)
    first = now()
    times = [first]
    for _ in range(new_tokens - 1):
        logits, state = read(logits.argmax()[None], state)
        times.append(now())
    return {
        "load": loaded - started,
        "prefill": first - loaded,
        "first": first - loaded,
        "token": statistics.median(b - a for a, b in itertools.pairwise(times)),
        "peak": peak_bytes(),
        "processor": time.process_time(),
        "prompt_tokens": prompt_tokens,
    }


ENCODERS = {
    "clip_config": ("CLIPVisionConfig", "CLIPVisionModel"),
    "dinov2_config": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel"),
    "siglip_config": ("SiglipVisionConfig", "SiglipVisionModel"),
    "sam_config": ("SamVisionConfig", "SamVisionModel"),
}
"""Field of a `VisualRWKVVisionConfig` -> transformers' own classes of its configuration and of the encoder."""


def encoders_of_transformers(configs: dict[str, dict[str, Any]], dtype: str) -> dict[str, Any]:
    """Encode a picture with transformers' own encoders, one after the other, as they are by default.

    Args:
        configs: by field of a `VisualRWKVVisionConfig` the fields of each encoder's configuration.
        dtype: of their weights.
    """
    import torch
    import transformers

    numbers: dict[str, Any] = {}
    for field, config in configs.items():
        torch.manual_seed(0)
        config_class, model_class = (getattr(transformers, name) for name in ENCODERS[field])
        encoder = model_class(config_class(**config)).to(getattr(torch, dtype)).eval()
        side = encoder.config.image_size
        pixels = torch.randn(1, 3, side, side, dtype=getattr(torch, dtype))
        with torch.inference_mode():
            for name in ("tower", "again"):
                began = now()
                encoder(pixels)
                taken = now() - began
                numbers[name] = numbers.get(name, 0) + taken
                numbers[f"{name} {field.removesuffix('_config')}"] = taken
        del encoder
    return numbers | {"peak": peak_bytes(), "processor": time.process_time()}


MEASURES = {
    "ours": answer_of_ours,
    "llama.cpp": answer_of_llama_cpp,
    "transformers encoders": encoders_of_transformers,
}


def main() -> None:
    """Run the measure that the command line names, with its arguments in JSON, and print its numbers as JSON."""
    name, arguments = sys.argv[1], json.loads(sys.argv[2])
    if name == "ours":
        from visualrwkv_hf.inference import import_libraries

        import_libraries()
    import torch

    torch.set_num_threads(arguments.pop("threads"))
    with numbers_alone() as out:
        numbers = MEASURES[name](**arguments)
        os.write(out, json.dumps(numbers).encode() + b"\n")


@contextlib.contextmanager
def numbers_alone() -> Iterator[int]:
    """Yield the standard output, which nothing else reaches: what libraries print goes to standard error."""
    sys.stdout.flush()
    out = os.dup(1)
    os.dup2(2, 1)
    try:
        yield out
    finally:
        os.close(out)


if __name__ == "__main__":
    main()
