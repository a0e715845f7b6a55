"""A page to talk with a model about pictures and films: streamed answers, and how the model reads them.

    pip install -e ".[demo]"
    python examples/web_demo.py [--model visualrwkv-6-1b6] [--port 7860]

The page sends the whole conversation each time. The model keeps the states of what it has read, for each visitor
apart, so that a follow-up reads only its own words. The page loads nothing from elsewhere and works without a network.
It fits a phone, follows the system's dark mode, and says what is being done until the first word comes.
"""

import html
import inspect
import os
import queue
import signal
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

# Before gradio is imported, which would ask its makers for their newest version.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
import typer
from jinja2 import TemplateError
from PIL import Image, ImageDraw, ImageFont

from visualrwkv_hf import Chat, FrameSampling, StateStore, bundled_model
from visualrwkv_hf.inference import load_model, load_processor, read_film, reading_figure

TITLE = "VisualRWKV"
BUNDLED = (
    "**The small model inside the package answers.** It reads signs and bar charts, counts and compares shapes. "
    "Photographs need a released model: `--model v6-1.6b`."
)
REFUSED, WORKING = "\u26a0 Not answered: ", "Working: "
"""How a refusal and a status begin. They stand in the answer's place: after an exception gradio's chat would hang."""
FIGURE_TITLE = "How the model reads this picture"
STATUS_SECONDS = 0.5
"""How often the page hears what is being done before the first word."""
STYLE = """
.gradio-container { max-width: 860px !important; margin: 0 auto !important; padding: 0 !important; }
.gradio-container .main.app { padding: 8px !important; }
.gradio-container .contain { padding: 0 !important; }
footer { display: none !important; }
#head { align-items: center; flex-wrap: nowrap; }
#head h1 { margin: 0; }
#theme { max-width: 44px; min-width: 44px; min-height: 36px; padding: 0; }
#chat { height: max(300px, calc(100dvh - 250px)) !important; }
#chat .examples { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; max-width: 560px; margin: 0 auto; }
#chat .example { min-width: 0 !important; max-width: none !important; }
#chat [data-testid=user] :is(img, video) { max-height: 160px; width: auto; }
#chat :is([aria-label=Share], [data-testid=download-link]) { display: none; }
#figure { overflow-x: auto; background: white; border-radius: 8px; }
#figure img { min-width: 680px; max-width: none; width: 100%; }
@media (max-width: 600px) {
    #limits * { font-size: 13px !important; }
    #chat { height: max(300px, calc(100dvh - 290px)) !important; }
}
"""
"""One column that a phone shows whole. The figure keeps a size at which it can be read, and scrolls sideways.

gradio's buttons that share a film with others are not shown.
"""
SWITCH_THEME = "() => { document.body.classList.toggle('dark') }"
SIDE = 256
"""Height and width of the example pictures, in pixels."""

# What a visitor may send. The page's own checks run in the browser, where a stranger can leave them out.
MAX_FILE_BYTES = 20 * 2**20
MAX_PIXELS = 25_000_000
MAX_PICTURES = 16
"""The most pictures in a conversation, the frames of films included."""
FILM = FrameSampling(num_frames=8, max_pixels=MAX_PIXELS)
"""Which frames of a film are read."""
FILM_SECONDS = 30
"""The longest time that decoding a film may take."""
KEPT_FILM_BYTES = 256 * 2**20
"""The most bytes of decoded frames that are kept for further questions, of all visitors together."""
FILMS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm")
"""Names of files that are read as films; all others are pictures."""
MAX_CHARACTERS = 20_000
"""The most characters in a conversation."""
MAX_MESSAGES = 200
MAX_WAITING = 32
"""How many questions may wait for the model."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
COMPUTING = threading.Lock()
"""Is held by the question whose answer is computed: gradio counts questions of the page and of programs apart."""
UPLOAD_HOURS = 6
"""How long an upload is kept."""


def main(
    model: Annotated[
        str | None, typer.Option(help="A folder or a Hub id. Without it the model inside the package.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on.")] = 7860,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 256,
    tuned_state: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of a tuned state, from which the model begins to read."),
    ] = None,
) -> None:
    """Serve the page until it is interrupted."""
    source = model or str(bundled_model())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the uploads are deleted then as well
    with tempfile.TemporaryDirectory() as scratch:
        uploads, examples = Path(scratch).resolve() / "uploads", Path(scratch).resolve() / "examples"
        uploads.mkdir()
        examples.mkdir()
        os.environ["GRADIO_TEMP_DIR"] = str(uploads)
        processor, vlm = load_processor(source), load_model(source, tuned_state=tuned_state)
        answer = answerer(source, processor, vlm, max_new_tokens, (uploads, examples))
        page = build_page(answer, save_examples(examples), model_line(model, vlm, max_new_tokens))
        page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
        page.launch(
            server_name=host,
            server_port=port,
            allowed_paths=[str(examples)],
            max_file_size=MAX_FILE_BYTES,
            theme=gr.themes.Default(primary_hue="indigo"),
            share=False,
            footer_links=[],
            css=STYLE,
        )


def model_line(name: str | None, vlm: Any, max_new_tokens: int) -> str:
    """Return which model answers and what to expect of it, in Markdown.

    Args:
        name: what was asked for; None is the model inside the package.
        vlm: the loaded model.
        max_new_tokens: the longest answer.
    """
    if name is None:
        return BUNDLED
    text, dtype = vlm.config.text_config, str(vlm.dtype).removeprefix("torch.")
    return (
        f"**{html.escape(Path(name).name)} answers**: RWKV-{text.rwkv_version}, "
        f"{vlm.num_parameters() / 1e9:.2g} billion parameters in {dtype} on {vlm.device.type}, "
        f"{vlm.config.num_image_tokens} tokens for a picture, answers of up to {max_new_tokens} tokens. "
        "It can be wrong."
    )


def answerer(source: str, processor: Any, vlm: Any, max_new_tokens: int, folders: Sequence[Path]) -> Callable:
    """Return the function that answers questions of the page.

    Args:
        source: the model's folder or Hub id.
        processor: the model's.
        vlm: the loaded model.
        max_new_tokens: the longest answer.
        folders: where pictures and films may lie.
    """
    states, films = StateStore(), KeptFilms()
    stopped: list[Chat] = []  # whose prompt may still be being read

    def answer(
        message: Mapping[str, Any], history: Sequence[Mapping[str, Any]], request: gr.Request
    ) -> Iterator[tuple[dict, Any, Any]]:
        """Yield the answer so far, again and again, and in the end how the model reads the question's first picture.

        Until the first word comes, what is being done stands in the answer's place.

        Args:
            message: the `text` of a question and the paths of its `files`.
            history: the messages before, as gradio's chatbot holds them.
            request: who asks.
        """
        try:
            question, files = checked_question(message, folders)
            earlier = [message_of(one, folders) for one in without_unanswered(history)]
            asked = [*earlier, message_of_question(question, files)]
            refuse_too_much(asked)
            visitor = f"visitor {request.session_hash}"
            read = films.of(visitor)
            if any(part["type"] == "video" for one in asked for part in one["content"]):
                yield status_of("decoding the film"), gr.skip(), gr.skip()
            earlier = [{**one, "content": with_frames(one["content"], read)} for one in earlier]
            pictures = [picture for file in files for picture in read(file)]
        except (ValueError, TypeError, KeyError, ImportError) as error:
            yield refusal_of(error), gr.skip(), gr.skip()
            return
        own = states.scoped(visitor)
        chat = Chat(vlm, processor, max_new_tokens=max_new_tokens, do_sample=False, state_store=own)
        chat.branches[chat.branch] = earlier
        text = ""
        try:
            while stopped:
                stopped.pop().wait()
            for picture in pictures:
                chat.add_picture(picture)
            stopped.append(chat)
            for piece, status in pieces_or_status(chat, question):
                text += piece
                yield reply_of(text) if text else status_of(status), gr.skip(), gr.skip()
            if not text:
                yield reply_of("(no answer)"), gr.skip(), gr.skip()
            if pictures:
                figure = reading_figure(pictures[0], question, source)
                yield reply_of(text or "(no answer)"), figure, gr.update(visible=True)
        except (ValueError, TemplateError) as error:
            yield refusal_of(error), gr.skip(), gr.skip()

    return answer


def pieces_or_status(chat: Chat, question: str) -> Iterator[tuple[str, str]]:
    """Yield the pieces of an answer, each with no status, and before the first one "" with what is being done.

    The model computes in a thread, so that a visitor who presses Stop is let go also while the prompt is read.

    Raises:
        Exception: whatever asking raised.
    """
    news: queue.Queue[tuple[str, Any]] = queue.Queue()
    is_stopped, doing, began = threading.Event(), ["reading the question"], time.monotonic()

    def run() -> None:
        try:
            with COMPUTING:
                for piece in chat.ask(question, is_stopped.is_set, lambda words: doing.__setitem__(0, words)):
                    news.put(("piece", piece))
            news.put(("end", None))
        except Exception as error:
            news.put(("error", error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            try:
                kind, value = news.get(timeout=STATUS_SECONDS)
            except queue.Empty:
                yield "", f"{doing[0]}, {time.monotonic() - began:.0f} s"
                continue
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value, ""
    finally:
        is_stopped.set()
        thread.join()


def checked_question(message: Mapping[str, Any], folders: Sequence[Path]) -> tuple[str, list[str]]:
    """Return the text of a question and the paths of its pictures and films.

    Raises:
        ValueError: they are none, or may not be opened.
    """
    if not isinstance(message.get("text"), str):
        raise ValueError("A question must be a text.")
    files = [checked_file(file, folders) for file in message.get("files") or ()]
    return inspect.cleandoc(message["text"]), files  # as the chatbot gives it back


def is_film(file: str) -> bool:
    """Return whether a file is read as a film."""
    return file.lower().endswith(FILMS)


def checked_file(path: Any, folders: Sequence[Path]) -> str:
    """Return the path of a picture or a film that a visitor uploaded, or of an example.

    What a page sends is a path, or whatever a stranger writes in its place: another file of this machine, or a URL.

    Raises:
        ValueError: it lies elsewhere, is no picture, or is too large. Films are looked into when they are decoded.
    """
    file = Path(str(path)).resolve()
    if not any(file.is_relative_to(folder) for folder in folders) or not file.is_file():
        raise ValueError(
            "A picture or film must be uploaded here. If it was, it is too old: upload it again."
        )
    if is_film(str(file)):
        return str(file)
    try:
        with Image.open(file, formats=FORMATS) as picture:
            width, height = picture.size
    except Exception as error:  # decoders raise what they like
        raise ValueError(f"A picture must be a file in one of the formats {', '.join(FORMATS)}.") from error
    if width * height > MAX_PIXELS:
        raise ValueError(f"A picture can have {MAX_PIXELS:,} pixels, this one has {width} x {height}.")
    return str(file)


def pictures_of(file: str) -> list[Any]:
    """Return a picture's path, or the frames of a film, which a process of its own decodes.

    Raises:
        ValueError, ImportError: the film cannot be read.
    """
    if not is_film(file):
        return [file]
    try:
        return read_film(
            Path(file).read_bytes(),
            FILM,
            max_frames=MAX_PICTURES,
            max_total_pixels=4 * MAX_PIXELS,
            seconds=FILM_SECONDS,
        )
    except ValueError as error:
        raise ValueError(f"The film {Path(file).name}: {error}") from error


class KeptFilms:
    """The frames of films that were asked about: a follow-up question decodes nothing again.

    Each visitor has frames of their own, so that nobody learns from the time of an answer which films others have sent.
    What was asked about longest ago is dropped first, and is decoded again if it is needed.

    Args:
        most_bytes: how many bytes the frames of all visitors may take together.
    """

    def __init__(self, most_bytes: int = KEPT_FILM_BYTES):
        self.most_bytes, self.num_bytes = most_bytes, 0
        self._frames: OrderedDict[tuple[str, str], tuple[list[Any], int]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, visitor: str) -> Callable[[str], list[Any]]:
        """Return a function that does what `pictures_of` does, and decodes each film of this visitor once."""

        def pictures(file: str) -> list[Any]:
            if not is_film(file):
                return pictures_of(file)
            with self._lock:
                if (visitor, file) in self._frames:
                    self._frames.move_to_end((visitor, file))
                    return self._frames[visitor, file][0]
            frames = pictures_of(file)
            self._keep((visitor, file), frames)
            return frames

        return pictures

    def _keep(self, key: tuple[str, str], frames: list[Any]) -> None:
        num_bytes = sum(3 * frame.width * frame.height for frame in frames)  # in RGB
        with self._lock:
            if num_bytes > self.most_bytes or key in self._frames:
                return
            self._frames[key] = frames, num_bytes
            self.num_bytes += num_bytes
            while self.num_bytes > self.most_bytes:
                self.num_bytes -= self._frames.popitem(last=False)[1][1]


def with_frames(
    content: Sequence[Mapping[str, Any]], read: Callable[[str], list[Any]]
) -> list[Mapping[str, Any]]:
    """Return the content of a message with each film replaced by its frames, which `read` gives."""
    return [
        new
        for part in content
        for new in (
            [{"type": "image", "image": frame} for frame in read(part["path"])]
            if part["type"] == "video"
            else [part]
        )
    ]


def refuse_too_much(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise `ValueError` for a conversation that is too long to be read."""
    parts = [part for message in messages for part in message["content"]]
    if len(messages) > MAX_MESSAGES or sum(len(part.get("text", "")) for part in parts) > MAX_CHARACTERS:
        raise ValueError(
            f"This conversation is too long (over {MAX_CHARACTERS:,} characters): start a new one."
        )
    pictures = sum({"image": 1, "video": FILM.num_frames or 1}.get(part["type"], 0) for part in parts)
    if pictures > MAX_PICTURES:
        raise ValueError(
            f"A conversation can hold {MAX_PICTURES} pictures, and a film is {FILM.num_frames}: start a new one."
        )


def reply_of(text: str) -> dict[str, Any]:
    """Return an answer for gradio's chatbot as a part of a message: a plain string would lose its indentation."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def refusal_of(error: Exception) -> dict[str, Any]:
    """Return why a question is not answered, as a message. The chatbot reads HTML, in which `<image>` would vanish."""
    return reply_of(f"{REFUSED}{html.escape(str(error), quote=False)}")


def status_of(words: str) -> dict[str, Any]:
    """Return what is being done as a message that the answer will replace."""
    return reply_of(f"{WORKING}{words} \u2026")


def without_unanswered(history: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the messages without refusals, answers that were stopped before their first word, and their questions."""
    kept: list[Mapping[str, Any]] = []
    for one in history:
        parts = one["content"] if one["role"] == "assistant" else ()
        if any(str(part.get("text", "")).startswith((REFUSED, WORKING)) for part in parts):
            del kept[-1:]
        else:
            kept.append(one)
    return kept


def message_of(earlier: Mapping[str, Any], folders: Sequence[Path]) -> dict[str, Any]:
    """Return a message of gradio's chatbot as a chat template takes it.

    Raises:
        ValueError: it holds something else than texts, pictures and films.
    """
    content: list[dict[str, Any]] = []
    for part in earlier["content"]:
        if part["type"] == "file":
            content.append(part_of(checked_file(part["file"]["path"], folders)))
        elif part["type"] == "text" and isinstance(part["text"], str):
            content.append({"type": "text", "text": part["text"]})
        else:
            raise ValueError("A message must hold texts, pictures and films.")
    return {"role": earlier["role"], "content": content}


def message_of_question(question: str, files: Sequence[str]) -> dict[str, Any]:
    """Return a question as `message_of` returns messages."""
    return {"role": "user", "content": [*map(part_of, files), {"type": "text", "text": question}]}


def part_of(file: str) -> dict[str, Any]:
    """Return what a message contains for a checked file."""
    return {"type": "video", "path": file} if is_film(file) else {"type": "image", "url": file}


def build_page(answer: Callable, examples: Sequence[Mapping[str, Any]], limits: str) -> gr.Blocks:
    """Return the page: one column with the model, the chat, and below it how the model reads the last picture.

    Args:
        answer: takes a question and yields its answer, the figure and the state of its fold.
        examples: questions with pictures that the empty chat offers.
        limits: which model answers and what it can, in Markdown.
    """
    seconds = UPLOAD_HOURS * 3600
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, seconds)) as page:
        with gr.Row(elem_id="head"):
            gr.Markdown(f"# {TITLE}")
            gr.Button("\u25d0", elem_id="theme", size="sm").click(None, js=SWITCH_THEME)
        gr.Markdown(limits, elem_id="limits")
        fold = gr.Accordion(FIGURE_TITLE, open=False, visible=False, elem_id="fold", render=False)
        with fold:
            figure = gr.Plot(show_label=False, elem_id="figure")
        gr.ChatInterface(
            answer,
            multimodal=True,
            chatbot=gr.Chatbot(elem_id="chat", show_label=False, buttons=["copy"], render_markdown=False),
            textbox=gr.MultimodalTextbox(
                file_types=["image", *FILMS],
                file_count="multiple",
                sources=["upload"],
                placeholder="Add a picture or a film with the clip, then ask",
                show_label=False,
                stop_btn=True,
            ),
            additional_outputs=[figure, fold],
            examples=list(examples),
            cache_examples=False,
            show_progress="hidden",  # the answer's place says what is being done
            flagging_mode="never",
            analytics_enabled=False,
            api_visibility="private",  # the page needs none of it
        )
        fold.render()
    return page


# The examples.


def save_examples(folder: Path) -> list[dict[str, Any]]:
    """Draw the example pictures into `folder`, and return the questions, each with its pictures."""
    examples = []
    for name, (drawings, question) in EXAMPLES.items():
        files = []
        for number, draw_it in enumerate(drawings):
            picture = Image.new("RGB", (SIDE, SIDE), "white")
            draw_it(ImageDraw.Draw(picture))
            files.append(str(folder / f"{name}-{number}.png"))
            picture.save(files[-1])
        examples.append({"text": question, "files": files})
    return examples


def draw_sign(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((0, 0, SIDE, SIDE), fill="#14505a")
    draw.text((SIDE / 2, SIDE / 2), "OPEN", "#fff8e0", ImageFont.load_default(size=80), anchor="mm")


def draw_chart(draw: ImageDraw.ImageDraw) -> None:
    for left, height, color in ((40, 90, "#2850dc"), (110, 190, "#d82828"), (180, 130, "#22963c")):
        draw.rectangle((left, 230 - height, left + 45, 230), fill=color)
    draw.line([(20, 20), (20, 230), (245, 230)], fill="#3c3c3c", width=3)


def draw_things(draw: ImageDraw.ImageDraw) -> None:
    draw.ellipse((24, 110, 84, 170), fill="#2850dc")
    draw.regular_polygon((170, 110, 64), 3, rotation=20, fill="#d82828")


def draw_ball(draw: ImageDraw.ImageDraw, left: float) -> None:
    draw.ellipse((left, 90, left + 64, 154), fill="#f5821e")


EXAMPLES: dict[str, tuple[list[Callable[[ImageDraw.ImageDraw], None]], str]] = {
    "sign": ([draw_sign], "what does the sign say?"),
    "chart": ([draw_chart], "which bar is the tallest?"),
    "things": ([draw_things], "which is larger, the blue circle or the red triangle?"),
    "ball": ([partial(draw_ball, left=left) for left in (170, 120, 70)], "which way does the circle move?"),
}
"""Name -> the functions that draw the pictures, and a question about them. The model in the package knows such ones."""


if __name__ == "__main__":
    typer.run(main)
