"""`visualrwkv ask`: one question about one picture or film."""

import json
from typing import Annotated, Any, NamedTuple

import typer

from ..inference.libraries import import_libraries
from ..inference.loading import load_model, load_processor, refuse_unknown_dtype, refuse_weights
from ..inference.pictures import content_parts, refuse_missing_picture
from .options import (
    AccelerateOption,
    DeviceOption,
    DtypeOption,
    FpsOption,
    GrammarOption,
    ImagePositionOption,
    JsonSchemaOption,
    MaxNewTokensOption,
    ModelOption,
    NumFramesOption,
    RegexOption,
    TunedStateOption,
    VerboseOption,
    WeightsOption,
    answering_source,
    errors_in_a_sentence,
    form_of,
    show_answer,
    structured,
)
from .steps import leave_at_once, say, say_backend, speed_report, steps

STANDARD_INPUT = "/dev/stdin"
INTERRUPTED = 130
"""Exit code of Ctrl-C, as shells count it."""


def ask(
    picture: Annotated[
        str, typer.Argument(help="Picture or film: a file, a URL, a pipe, or - for standard input.")
    ],
    question: Annotated[str, typer.Argument(help="Question about it.")],
    model: ModelOption = None,
    max_new_tokens: MaxNewTokensOption = 256,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    image_position: ImagePositionOption = None,
    num_frames: NumFramesOption = None,
    fps: FpsOption = None,
    choices: Annotated[
        str | None,
        typer.Option(
            "--choices",
            help="Answers with commas between them: print how probable each is, and generate nothing.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --choices: print JSON.")] = False,
    json_schema: JsonSchemaOption = None,
    regex: RegexOption = None,
    grammar: GrammarOption = None,
    accelerate: AccelerateOption = True,
    weights: WeightsOption = None,
    tuned_state: TunedStateOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Ask one question about one picture or film and print the answer as it is generated."""
    with errors_in_a_sentence(verbose):
        picture = STANDARD_INPUT if picture == "-" else picture
        refuse_missing_picture(picture)
        refuse_unknown_dtype(dtype)
        refuse_weights(weights, "cpu", accelerate)
        if as_json and choices is None:
            raise ValueError("--json prints the probabilities of --choices, which are missing.")
        for option, value in (("json-schema", json_schema), ("regex", regex), ("grammar", grammar)):
            if choices is not None and value is not None:
                raise ValueError(f"Give either --choices or --{option}, not both.")
        form = form_of(json_schema, regex, grammar)
        answers = None if choices is None else listed(choices)
        source = answering_source(model, weights)
        sampling = dict(num_frames=num_frames, fps=fps)
        try:
            asked = read(
                picture,
                question,
                source,
                device,
                dtype,
                image_position,
                sampling,
                accelerate,
                weights,
                form,
                tuned_state,
            )
            if answers is not None:
                choose(asked, answers, as_json)
            else:
                answer(asked, verbose, max_new_tokens)
        except KeyboardInterrupt:
            show_answer("\n")
            leave_at_once(INTERRUPTED)


def listed(choices: str) -> list[str]:
    """Return the answers of `--choices`.

    Raises:
        ValueError: one is empty or given twice.
    """
    answers = [choice.strip() for choice in choices.split(",")]
    if not all(answers):
        raise ValueError(f"--choices needs answers with commas between them, got {choices!r}.")
    if len(set(answers)) < len(answers):
        raise ValueError(f"--choices names an answer twice: {choices!r}.")
    return answers


class Asked(NamedTuple):
    """A question that is ready for the model. `processors` restrict the answer."""

    model: Any
    processor: Any
    inputs: Any
    processors: list[Any]


def read(
    picture: str,
    question: str,
    source: str,
    device: str,
    dtype: str,
    image_position: str | None,
    sampling: dict[str, Any],
    accelerate: bool,
    weights: str | None,
    form: dict[str, str],
    tuned_state: str | None,
) -> Asked:
    """Load the model and make its inputs."""
    with steps("loading libraries") as step:
        import_libraries()
        from ..inference.chat import chat_inputs

        step("reading the picture")
        processor = load_processor(source)
        content = [*content_parts(picture, **sampling), {"type": "text", "text": question}]
        # The inputs come before the weights, so that what is wrong with them is said without a wait.
        inputs = chat_inputs(processor, [{"role": "user", "content": content}], image_position)
        processors = structured(processor, form)
        vlm = load_model(
            source,
            device,
            dtype,
            accelerate,
            report=step,
            weights=weights,
            tuned_state=tuned_state,
            huge_pages=False,
        )
    say_backend(vlm)
    return Asked(vlm, processor, inputs.to(vlm.device, dtype=vlm.dtype), processors)


def answer(asked: Asked, verbose: bool, max_new_tokens: int) -> None:
    """Stream the answer to standard output."""
    from ..inference.streaming import Generation

    with steps("reading the prompt") as step:
        generation = Generation(
            asked.model,
            asked.processor.tokenizer,
            asked.inputs,
            report=step,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            logits_processor=asked.processors,
        )
        pieces = generation.pieces()
        piece = next(pieces, None)
    while piece is not None:
        show_answer(piece)
        piece = next(pieces, None)
    show_answer("\n")
    if verbose:
        say(speed_report(generation, asked.model))


def choose(asked: Asked, answers: list[str], as_json: bool) -> None:
    """Print how probable each answer is, the most probable one first."""
    with steps("reading the prompt"):
        scores = asked.model.score(asked.inputs, answers, tokenizer=asked.processor, end_of_turn=True)
    rows = [
        {
            "answer": answer,
            "probability": probability,
            "log_probability": log_probability,
            "tokens": tokens[0].tolist(),
        }
        for answer, probability, log_probability, tokens in zip(
            answers,
            scores.probabilities[0].tolist(),
            scores.log_probs[0].tolist(),
            scores.token_log_probs,
        )
    ]
    rows.sort(key=lambda row: -row["log_probability"])
    if as_json:
        show_answer(json.dumps({"answer": rows[0]["answer"], "choices": rows}, ensure_ascii=False), "\n")
        return
    width = max(len(answer) for answer in answers)
    for row in rows:
        show_answer(f"{row['answer']:{width}}  {row['probability']:7.2%}", "\n")
