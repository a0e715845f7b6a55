"""Watches a stream of pictures in constant memory, and answers a question about it every now and then.

    python examples/watch_frames.py holiday.gif --question "What is happening?" --every 50
    python examples/watch_frames.py frames/ --model visualrwkv-6-1b6
    python examples/watch_frames.py film.mp4 --fps 1              # needs `pip install -e ".[video]"`

All frames belong to one message, like the pictures of a chat, and each is read once into the same state: time
and memory per frame are what they were for the first one. A question is asked of a copy of the state, so that it does
not disturb the stream.
"""

import resource
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from PIL import Image

from visualrwkv_hf import FrameSampling, VisualRWKVCache, bundled_model
from visualrwkv_hf.films import ALL_FRAMES, iterate_film
from visualrwkv_hf.inference import load_model, load_processor
from visualrwkv_hf.pictures import open_picture


def frames_of(source: Path, fps: float | None = None) -> Iterator[Image.Image]:
    """The pictures of a folder by name, or the frames of a film or an animation, one at a time.

    Args:
        source: the folder or the file.
        fps: take so many frames a second of a film; None takes all.

    Raises:
        ValueError: the film cannot be read.
        ImportError: its decoder is not installed.
    """
    if not source.is_dir():
        sampling = FrameSampling(num_frames=ALL_FRAMES) if fps is None else FrameSampling(fps=fps)
        yield from iterate_film(source, sampling)
        return
    for path in sorted(source.iterdir()):
        try:
            yield open_picture(path)
        except ValueError:  # no picture, half of one, or a folder
            typer.secho(f"Left out, for it is no picture: {path}", err=True, fg="yellow")


class Watcher:
    """A model that has seen some frames.

    Attributes:
        state: what it keeps of them.
        num_frames: how many there were.
    """

    def __init__(self, model, processor):
        self.model, self.processor = model, processor
        self.state = VisualRWKVCache(model.config)
        self.num_frames = 0

    def see(self, frame: Image.Image) -> None:
        """Read one more frame."""
        self.model.watch(self.processor, [frame], self.state)
        self.num_frames += 1

    def ask(self, question: str, max_new_tokens: int = 32) -> str:
        """Return the answer to a question about the frames so far."""
        inputs = self.processor.question_inputs(question, self.state)
        output = self.model.generate(
            **{name: tensor.to(self.model.device) for name, tensor in inputs.items()},
            past_key_values=self.state.copy(),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        length = inputs["input_ids"].shape[1]
        return self.processor.post_process_image_text_to_text(output, prompt_length=length)[0]


class Seen(NamedTuple):
    """After a frame: its number, seconds that it took, bytes of the state and of the process at its highest."""

    number: int
    seconds: float
    state_bytes: int
    process_bytes: int

    def __str__(self) -> str:
        return (
            f"frame {self.number:,}: {1e3 * self.seconds:.1f} ms, state {self.state_bytes / 1e6:.3f} MB, "
            f"process {self.process_bytes / 1e6:,.0f} MB"
        )


def watch(watcher: Watcher, frames: Iterator[Image.Image]) -> Iterator[Seen]:
    """Reads the frames one by one."""
    for frame in frames:
        start = time.perf_counter()
        watcher.see(frame)
        if watcher.model.device.type != "cpu":
            torch.accelerator.synchronize()
        elapsed = time.perf_counter() - start
        yield Seen(watcher.num_frames, elapsed, watcher.state.nbytes, highest_memory())


def highest_memory() -> int:
    """The most bytes that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(
    source: Annotated[
        Path, typer.Argument(exists=True, help="A folder of pictures, an animation or a video.")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="A folder or a Hub id. Without it the model inside the package watches."),
    ] = None,
    question: Annotated[str, typer.Option(help="What is asked.")] = "What can be seen?",
    every: Annotated[int, typer.Option(min=1, help="After how many frames.")] = 100,
    fps: Annotated[float | None, typer.Option(help="Frames a second of a film; all without it.")] = None,
    max_frames: Annotated[int | None, typer.Option(min=1, help="Stop after so many.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 32,
) -> None:
    folder = model or str(bundled_model())
    processor = load_processor(folder)
    vlm = load_model(folder, device)
    watcher, times = Watcher(vlm, processor), []

    def report(seen: Seen) -> None:
        print(seen._replace(seconds=statistics.median(times[-every:])))
        print(f"  {question} {watcher.ask(question, max_new_tokens)}")

    try:
        for seen in watch(watcher, islice(frames_of(source, fps), max_frames)):
            times.append(seen.seconds)
            if seen.number % every == 0:
                report(seen)
        if len(times) % every:  # the last frames
            report(seen)
    except (ValueError, ImportError) as error:
        typer.secho(f"Error: {error}", err=True, fg="red")
        raise typer.Exit(1) from error
    if not times:
        typer.secho(f"Error: {source} has no frames.", err=True, fg="red")
        raise typer.Exit(1)
    part = max(1, len(times) // 10)
    print(
        f"{len(times):,} frames; the first tenth took {1e3 * statistics.median(times[:part]):.1f} ms each, the last "
        f"{1e3 * statistics.median(times[-part:]):.1f} ms."
    )


if __name__ == "__main__":
    typer.run(main)
