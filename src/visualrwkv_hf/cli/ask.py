"""`visualrwkv ask`: one question about one picture or film."""

from typing import Annotated, Any

import typer

from ..inference.loading import load_model, load_processor, refuse_unknown_dtype
from ..inference.pictures import content_parts, refuse_missing_picture
from .options import (
    AccelerateOption,
    DeviceOption,
    DtypeOption,
    FpsOption,
    ImagePositionOption,
    MaxNewTokensOption,
    ModelOption,
    NumFramesOption,
    VerboseOption,
    answering_source,
    errors_in_a_sentence,
    show_answer,
)
from .steps import leave_at_once, say, say_backend, speed_report, steps

INTERRUPTED = 130
"""Exit code of Ctrl-C, as shells count it."""


def ask(
    picture: Annotated[
        str, typer.Argument(help="Picture or film: a file, a URL, or a pipe such as /dev/stdin.")
    ],
    question: Annotated[str, typer.Argument(help="Question about it.")],
    model: ModelOption = None,
    max_new_tokens: MaxNewTokensOption = 256,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    image_position: ImagePositionOption = None,
    num_frames: NumFramesOption = None,
    fps: FpsOption = None,
    accelerate: AccelerateOption = True,
    verbose: VerboseOption = False,
) -> None:
    """Ask one question about one picture or film and print the answer as it is generated."""
    with errors_in_a_sentence(verbose):
        refuse_missing_picture(picture)
        refuse_unknown_dtype(dtype)
        source = answering_source(model)
        options = dict(max_new_tokens=max_new_tokens, do_sample=False)
        try:
            sampling = dict(num_frames=num_frames, fps=fps)
            answer(
                picture,
                question,
                source,
                device,
                dtype,
                image_position,
                sampling,
                accelerate,
                verbose,
                options,
            )
        except KeyboardInterrupt:
            show_answer("\n")
            leave_at_once(INTERRUPTED)


def answer(
    picture: str,
    question: str,
    source: str,
    device: str,
    dtype: str,
    image_position: str | None,
    sampling: dict[str, Any],
    accelerate: bool,
    verbose: bool,
    options: dict[str, Any],
) -> None:
    """Load the model and stream its answer to standard output."""
    with steps("loading libraries") as step:
        from ..inference.chat import chat_inputs
        from ..inference.streaming import Generation

        step("reading the picture")
        processor = load_processor(source)
        content = [*content_parts(picture, **sampling), {"type": "text", "text": question}]
        # The inputs come before the weights, so that what is wrong with them is said without a wait.
        inputs = chat_inputs(processor, [{"role": "user", "content": content}], image_position)
        vlm = load_model(source, device, dtype, accelerate, report=step)
    say_backend(vlm)
    with steps("reading the prompt") as step:
        inputs = inputs.to(vlm.device, dtype=vlm.dtype)
        generation = Generation(vlm, processor.tokenizer, inputs, report=step, **options)
        pieces = generation.pieces()
        piece = next(pieces, None)
    while piece is not None:
        show_answer(piece)
        piece = next(pieces, None)
    show_answer("\n")
    if verbose:
        say(speed_report(generation, vlm))
