"""`visualrwkv chat`: a conversation in the terminal, or questions from a pipe."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..inference.libraries import import_libraries
from ..inference.loading import load_model, load_processor, refuse_unknown_dtype, refuse_weights
from ..inference.pictures import refuse_missing_picture
from .options import (
    AccelerateOption,
    DeviceOption,
    DtypeOption,
    ImagePositionOption,
    MaxNewTokensOption,
    ModelOption,
    TunedStateOption,
    VerboseOption,
    WeightsOption,
    answering_source,
    errors_in_a_sentence,
    refuse_without_effect,
)
from .steps import leave_at_once, say_backend, steps

if TYPE_CHECKING:
    from ..inference.chat import Chat


def chat(
    pictures: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PICTURE]...", help="Pictures to begin with: files or URLs."),
    ] = None,
    model: ModelOption = None,
    max_new_tokens: MaxNewTokensOption = 256,
    temperature: Annotated[
        float,
        typer.Option(
            min=0, help="0 always picks the most likely token; 1 samples from the model's distribution."
        ),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Sample only from the most likely tokens whose probabilities add up to this."
        ),
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Random seed; makes sampling repeatable.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    image_position: ImagePositionOption = None,
    accelerate: AccelerateOption = True,
    weights: WeightsOption = None,
    tuned_state: TunedStateOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Talk about pictures. Type /help for the commands. Questions may also come from a pipe, one per line."""
    with errors_in_a_sentence(verbose):
        for picture in pictures or []:
            refuse_missing_picture(picture)
        refuse_unknown_dtype(dtype)
        refuse_weights(weights, "cpu", accelerate)
        if not temperature:
            refuse_without_effect({"--top-p": top_p != 1}, because="without a --temperature above 0")
        sampling: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            sampling |= {"temperature": temperature, "top_p": top_p}
        source = answering_source(model, weights)
        session = start_chat(
            source,
            device,
            dtype,
            accelerate,
            weights,
            seed,
            tuned_state,
            image_position=image_position,
            max_new_tokens=max_new_tokens,
            **sampling,
        )
        from .chat_terminal import Terminal

        terminal = Terminal(session, verbose)
        terminal.add_pictures(pictures or [])
        all_answered = terminal.run()
        if session.is_busy:
            leave_at_once(not all_answered)
        if not all_answered:
            raise typer.Exit(1)


def start_chat(
    source: str,
    device: str,
    dtype: str,
    accelerate: bool,
    weights: str | None,
    seed: int | None,
    tuned_state: str | None = None,
    **options: Any,
) -> "Chat":
    """Return a [`Chat`] with the model of `source`. The heavy imports are here, so that `--help` is quick."""
    with steps("loading libraries") as step:
        import_libraries()
        from transformers import set_seed

        from ..inference.chat import Chat, chat_inputs

        processor = load_processor(source)
        # What the template refuses is said before the weights are read.
        chat_inputs(processor, [{"role": "user", "content": "?"}], options["image_position"])
        vlm = load_model(
            source, device, dtype, accelerate, report=step, weights=weights, tuned_state=tuned_state
        )
    say_backend(vlm)
    if seed is not None:
        set_seed(seed)
    return Chat(vlm, processor, **options)
