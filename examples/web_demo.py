"""A page to talk with a model about pictures: answers as they come, several pictures, and how the model reads them.

    pip install -e ".[demo]"
    python examples/web_demo.py [--model visualrwkv-6-1b6] [--port 7860]

The page sends all messages each time. The model keeps the states of what it has read (`model.state_store`), so that
a follow-up reads its own words only. Nothing is loaded from elsewhere, so it also works without a network.
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

from visualrwkv_hf import Chat, bundled_model
from visualrwkv_hf.inference import load_model, load_processor, reading_figure

TITLE = "VisualRWKV"
DESCRIPTION = """
A visual language model that reads a line: its memory does not grow, and a follow-up question reads its own words only.
Add one picture or several with the clip, or take an example.
"""
SIDE = 256
"""Pixels of a side of the example pictures."""


def main(
    model: Annotated[
        str | None, typer.Option(help="A folder or a Hub id. Without it the model inside the package.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen at.")] = 7860,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 256,
) -> None:
    """Serves the page until it is interrupted."""
    source = model or str(bundled_model())
    with tempfile.TemporaryDirectory() as folder:
        page = build_page(answerer(source, max_new_tokens), save_examples(Path(folder)))
        page.launch(
            server_name=host,
            server_port=port,
            allowed_paths=[folder],
            theme=gr.themes.Default(primary_hue="indigo"),
            share=False,
            footer_links=[],
        )


def answerer(source: str, max_new_tokens: int) -> Callable:
    """The function behind the page, with the model of `source`."""
    processor = load_processor(source)
    vlm = load_model(source)

    def answer(
        message: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[dict, Any]]:
        """The answer so far, again and again, and in the end how the model reads the question's first picture.

        Args:
            message: `text` and the paths of the `files` of a question.
            history: the messages before, as gradio's chatbot holds them.
        """
        chat = Chat(vlm, processor, max_new_tokens=max_new_tokens, do_sample=False)
        chat.branches[chat.branch] = [message_of(earlier) for earlier in history]
        text = ""
        try:
            for file in message["files"]:
                chat.add_picture(file)
            for piece in chat.ask(inspect.cleandoc(message["text"])):  # as the chatbot gives it back
                text += piece
                yield reply_of(text), gr.skip()
            if message["files"]:
                yield reply_of(text), reading_figure(message["files"][0], message["text"], source)
        except (ValueError, TemplateError) as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error

    return answer


def reply_of(text: str) -> dict[str, Any]:
    """An answer for gradio's chatbot: a part of a message. Of a plain string it would keep no indentation."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def message_of(earlier: Mapping[str, Any]) -> dict[str, Any]:
    """A message of gradio's chatbot in the words of a chat template."""
    content = [
        {"type": "image", "url": part["file"]["path"]}
        if part["type"] == "file"
        else {"type": "text", "text": part["text"]}
        for part in earlier["content"]
    ]
    return {"role": earlier["role"], "content": content}


def build_page(answer: Callable, examples: Sequence[Mapping[str, Any]]) -> gr.Blocks:
    """The page: a chat on the left, and how the model reads the last picture on the right."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_height=True) as page:
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
                )
            with gr.Column():
                gr.Markdown("### How it reads the picture")
                figure.render()
    return page


# The example pictures, of kinds that the model inside the package knows.


def save_examples(folder: Path) -> list[dict[str, Any]]:
    """Draws the example pictures into `folder`: questions, each with its picture."""
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
"""Name -> what draws it, and a question for it."""


if __name__ == "__main__":
    typer.run(main)
