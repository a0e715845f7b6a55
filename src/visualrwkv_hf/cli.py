"""The `visualrwkv` command."""

from typing import Annotated

import typer

app = typer.Typer(
    help="VisualRWKV: ask a picture, convert a checkpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def main() -> None:
    """VisualRWKV: ask a picture, convert a checkpoint."""


@app.command()
def ask(
    picture: Annotated[str, typer.Argument(help="A picture: a file or a URL.")],
    question: Annotated[str, typer.Argument(help="What you want to know about it.")],
    model: Annotated[
        str | None,
        typer.Option(help="A folder or a Hub id. Without it the model inside the package answers."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 256,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps or auto.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, or auto for the checkpoint's own.")
    ] = "auto",
    image_position: Annotated[
        str | None,
        typer.Option(help="first, middle (the sandwich) or last. Without it as the model was trained."),
    ] = None,
) -> None:
    """Streams the answer to a question about a picture."""
    try:
        answer_to_terminal(picture, question, model, max_new_tokens, device, dtype, image_position)
    except (ValueError, OSError) as error:
        typer.secho(f"Error: {error}", err=True, fg="red")
        raise typer.Exit(1) from error


def answer_to_terminal(
    picture: str,
    question: str,
    model: str | None,
    max_new_tokens: int,
    device: str,
    dtype: str,
    image_position: str | None,
) -> None:
    """What `visualrwkv ask` does. The heavy imports are here, so that `visualrwkv --help` is quick."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer

    from . import bundled_model

    source = model or str(bundled_model())
    if device == "auto":
        device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    processor = AutoProcessor.from_pretrained(source)
    vlm = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype).to(device).eval()
    content = [{"type": "image", "url": picture}, {"type": "text", "text": question}]
    placement = {} if image_position is None else {"image_position": image_position}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **placement,
    ).to(device, dtype=vlm.dtype)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    vlm.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)


if __name__ == "__main__":
    app()
