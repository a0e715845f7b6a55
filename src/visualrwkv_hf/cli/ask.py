"""`visualrwkv ask`: one question about one picture."""

from typing import Annotated

import typer

from ..inference.loading import load_model, refuse_missing_picture, refuse_unknown_dtype
from .options import (
    DeviceOption,
    DtypeOption,
    ImagePositionOption,
    MaxNewTokensOption,
    ModelOption,
    answering_source,
    errors_in_a_sentence,
)


def ask(
    picture: Annotated[str, typer.Argument(help="A picture: a file or a URL.")],
    question: Annotated[str, typer.Argument(help="What you want to know about it.")],
    model: ModelOption = None,
    max_new_tokens: MaxNewTokensOption = 256,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    image_position: ImagePositionOption = None,
) -> None:
    """Streams the answer to a question about a picture."""
    from jinja2 import TemplateError

    with errors_in_a_sentence(TemplateError):
        refuse_missing_picture(picture)
        refuse_unknown_dtype(dtype)
        source = answering_source(model)

        from transformers import AutoProcessor

        from ..inference.chat import chat_inputs, stream_answer

        processor = AutoProcessor.from_pretrained(source)
        content = [{"type": "image", "url": picture}, {"type": "text", "text": question}]
        inputs = chat_inputs(processor, [{"role": "user", "content": content}], image_position)
        # Behind the inputs: what is wrong with them shows before the weights are read.
        vlm = load_model(source, device, dtype)
        inputs = inputs.to(vlm.device, dtype=vlm.dtype)
        generation = dict(max_new_tokens=max_new_tokens, do_sample=False)
        for piece in stream_answer(vlm, processor.tokenizer, inputs, **generation):
            typer.echo(piece, nl=False)
        typer.echo()
