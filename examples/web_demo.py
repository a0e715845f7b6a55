"""A page to talk with a model about pictures: streamed answers, several pictures, and how the model reads them.

    pip install -e ".[demo]"
    python examples/web_demo.py [--model visualrwkv-6-1b6] [--port 7860]

The page sends the whole conversation each time. The model keeps the states of what it has read, for each visitor
apart, so that a follow-up reads only its own words. The page loads nothing from elsewhere and works without a network.
"""

import html
import inspect
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

# Before gradio is imported, which would ask its makers for their newest version.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
import typer
from jinja2 import TemplateError
from PIL import Image, ImageDraw, ImageFont

from visualrwkv_hf import Chat, StateStore, bundled_model
from visualrwkv_hf.inference import load_model, load_processor, reading_figure

TITLE = "VisualRWKV"
DESCRIPTION = """
A visual language model that reads a line: its memory does not grow, and a follow-up question reads its own words only.
Add one picture or several with the clip, or take an example.
"""
SIDE = 256
"""Height and width of the example pictures, in pixels."""

# What a visitor may send. The page's own checks run in the browser, where a stranger can leave them out.
MAX_FILE_BYTES = 20 * 2**20
MAX_PIXELS = 25_000_000
MAX_PICTURES = 8
"""The most pictures in a conversation."""
MAX_CHARACTERS = 20_000
"""The most characters in a conversation."""
MAX_MESSAGES = 200
MAX_WAITING = 32
"""How many questions may wait for the model."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
UPLOAD_HOURS = 6
"""How long an uploaded picture is kept."""


def main(
    model: Annotated[
        str | None, typer.Option(help="A folder or a Hub id. Without it the model inside the package.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on.")] = 7860,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 256,
) -> None:
    """Serve the page until it is interrupted."""
    source = model or str(bundled_model())
    with tempfile.TemporaryDirectory() as scratch:
        uploads, examples = Path(scratch).resolve() / "uploads", Path(scratch).resolve() / "examples"
        uploads.mkdir()
        examples.mkdir()
        os.environ["GRADIO_TEMP_DIR"] = str(uploads)
        page = build_page(answerer(source, max_new_tokens, (uploads, examples)), save_examples(examples))
        page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
        page.launch(
            server_name=host,
            server_port=port,
            allowed_paths=[str(examples)],
            max_file_size=MAX_FILE_BYTES,
            theme=gr.themes.Default(primary_hue="indigo"),
            share=False,
            footer_links=[],
        )


def answerer(source: str, max_new_tokens: int, folders: Sequence[Path]) -> Callable:
    """Return the function that answers questions of the page with the model of `source`.

    Args:
        source: a folder or a Hub id.
        max_new_tokens: the longest answer.
        folders: where pictures may lie.
    """
    processor = load_processor(source)
    vlm = load_model(source)
    states = StateStore()

    def answer(
        message: Mapping[str, Any], history: Sequence[Mapping[str, Any]], request: gr.Request
    ) -> Iterator[tuple[dict, Any]]:
        """Yield the answer so far, again and again, and in the end how the model reads the question's first picture.

        Args:
            message: the `text` of a question and the paths of its `files`.
            history: the messages before, as gradio's chatbot holds them.
            request: who asks.
        """
        try:
            question, files = checked_question(message, folders)
            earlier = [message_of(one, folders) for one in history]
            refuse_too_much([*earlier, message_of_question(question, files)])
        except (ValueError, TypeError, KeyError) as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error
        visitor = states.scoped(f"visitor {request.session_hash}")
        chat = Chat(vlm, processor, max_new_tokens=max_new_tokens, do_sample=False, state_store=visitor)
        chat.branches[chat.branch] = earlier
        text = ""
        try:
            for file in files:
                chat.add_picture(file)
            for piece in chat.ask(question):
                text += piece
                yield reply_of(text), gr.skip()
            if files:
                yield reply_of(text), reading_figure(files[0], question, source)
        except (ValueError, TemplateError) as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error

    return answer


def checked_question(message: Mapping[str, Any], folders: Sequence[Path]) -> tuple[str, list[str]]:
    """Return the text of a question and the paths of its pictures.

    Raises:
        ValueError: they are none, or may not be opened.
    """
    if not isinstance(message.get("text"), str):
        raise ValueError("A question must be a text.")
    files = [checked_picture(file, folders) for file in message.get("files") or ()]
    return inspect.cleandoc(message["text"]), files  # as the chatbot gives it back


def checked_picture(path: Any, folders: Sequence[Path]) -> str:
    """Return the path of a picture that a visitor uploaded, or of an example.

    What a page sends is a path, or whatever a stranger writes in its place: another file of this machine, or a URL.

    Raises:
        ValueError: it lies elsewhere, is no picture, or is too large.
    """
    file = Path(str(path)).resolve()
    if not any(file.is_relative_to(folder) for folder in folders) or not file.is_file():
        raise ValueError("A picture must be uploaded here. If it was, it is too old: upload it again.")
    try:
        with Image.open(file, formats=FORMATS) as picture:
            width, height = picture.size
    except Exception as error:  # decoders raise what they like
        raise ValueError(f"A picture must be a file in one of the formats {', '.join(FORMATS)}.") from error
    if width * height > MAX_PIXELS:
        raise ValueError(f"A picture can have {MAX_PIXELS:,} pixels, this one has {width} x {height}.")
    return str(file)


def refuse_too_much(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise `ValueError` for a conversation that is too long to be read."""
    parts = [part for message in messages for part in message["content"]]
    if len(messages) > MAX_MESSAGES or sum(len(part.get("text", "")) for part in parts) > MAX_CHARACTERS:
        raise ValueError(
            f"This conversation is too long (over {MAX_CHARACTERS:,} characters): start a new one."
        )
    if sum(part["type"] == "image" for part in parts) > MAX_PICTURES:
        raise ValueError(f"A conversation can hold {MAX_PICTURES} pictures: start a new one.")


def reply_of(text: str) -> dict[str, Any]:
    """Return an answer for gradio's chatbot as a part of a message: a plain string would lose its indentation."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def message_of(earlier: Mapping[str, Any], folders: Sequence[Path]) -> dict[str, Any]:
    """Return a message of gradio's chatbot as a chat template takes it.

    Raises:
        ValueError: it holds something else than texts and pictures.
    """
    content: list[dict[str, Any]] = []
    for part in earlier["content"]:
        if part["type"] == "file":
            content.append({"type": "image", "url": checked_picture(part["file"]["path"], folders)})
        elif part["type"] == "text" and isinstance(part["text"], str):
            content.append({"type": "text", "text": part["text"]})
        else:
            raise ValueError("A message must hold texts and pictures.")
    return {"role": earlier["role"], "content": content}


def message_of_question(question: str, files: Sequence[str]) -> dict[str, Any]:
    """Return a question as `message_of` returns messages."""
    pictures = [{"type": "image", "url": file} for file in files]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": question}]}


def build_page(answer: Callable, examples: Sequence[Mapping[str, Any]]) -> gr.Blocks:
    """Return the page: a chat on the left, and how the model reads the last picture on the right."""
    seconds = UPLOAD_HOURS * 3600
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, fill_height=True, delete_cache=(600, seconds)
    ) as page:
        gr.Markdown(f"# {TITLE}\n{DESCRIPTION}")
        with gr.Row(equal_height=False):
            figure = gr.Plot(show_label=False, render=False)
            with gr.Column():
                gr.ChatInterface(
                    answer,
                    multimodal=True,
                    chatbot=gr.Chatbot(height=480, show_label=False, buttons=["copy"], render_markdown=False),
                    textbox=gr.MultimodalTextbox(
                        file_types=["image"],
                        file_count="multiple",
                        sources=["upload"],
                        placeholder="Ask about a picture",
                        show_label=False,
                    ),
                    additional_outputs=[figure],
                    examples=list(examples),
                    cache_examples=False,
                    flagging_mode="never",
                    analytics_enabled=False,
                    api_visibility="private",  # the page needs none of it
                )
            with gr.Column():
                gr.Markdown("### How it reads the picture")
                figure.render()
    return page


# The example pictures are of kinds that the model inside the package knows.


def save_examples(folder: Path) -> list[dict[str, Any]]:
    """Draw the example pictures into `folder`, and return the questions, each with its picture."""
    examples = []
    for name, (draw_it, question) in EXAMPLES.items():
        picture = Image.new("RGB", (SIDE, SIDE), "white")
        draw_it(ImageDraw.Draw(picture))
        picture.save(folder / f"{name}.png")
        examples.append({"text": question, "files": [str(folder / f"{name}.png")]})
    return examples


def draw_circle(draw: ImageDraw.ImageDraw) -> None:
    draw.ellipse((70, 60, 190, 180), fill="#dc1e1e")


def draw_triangle(draw: ImageDraw.ImageDraw) -> None:
    draw.polygon([(128, 60), (60, 190), (196, 190)], fill="#1e46dc")


def draw_digit(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((0, 0, SIDE, SIDE), fill="black")
    draw.text((SIDE / 2, SIDE / 2), "7", fill="white", font=ImageFont.load_default(size=200), anchor="mm")


def draw_face(draw: ImageDraw.ImageDraw) -> None:
    draw.ellipse((16, 16, 240, 240), fill="#fcc21b")
    for x in (88, 168):
        draw.ellipse((x - 14, 84, x + 14, 120), fill="#513a1f")
    draw.arc((70, 90, 186, 196), 20, 160, fill="#513a1f", width=12)


EXAMPLES = {
    "circle": (draw_circle, "what color is the shape?"),
    "triangle": (draw_triangle, "what shape is in the image?"),
    "digit": (draw_digit, "what digit is this?"),
    "face": (draw_face, "what kind of emoji is this?"),
}
"""Name -> the function that draws the picture, and a question about it."""


if __name__ == "__main__":
    typer.run(main)
