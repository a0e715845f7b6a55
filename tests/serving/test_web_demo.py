"""The web demo in a real browser: pictures, answers as they come, examples, and nothing from elsewhere."""

import importlib.util
import threading
import time
from types import ModuleType

import pytest
from browser import CHROMIUM, DEMO, DRIVER, Page, running_demo, wait_for
from film_files import mp4
from patience import PATIENCE
from PIL import Image
from serving import png
from tiny_training import save_tiny_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from visualrwkv_hf import Chat, bundled_model, film_frames

for module in ("gradio", "matplotlib", "selenium"):
    pytest.importorskip(module, reason="needs the extras demo and browser")

needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs a Chromium with its driver (Debian: chromium, chromium-driver)"
)
TOKENS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("demo") / "visualrwkv-tiny")


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "log"
    options = ("--model", str(folder), "--max-new-tokens", str(TOKENS))
    with running_demo(log, *options) as url, Page(url) as page:
        yield page


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / f"{colour}.png" for colour in ("red", "green")]
    for path in paths:
        path.write_bytes(png(path.stem))
    return paths


@pytest.fixture(scope="module")
def chat(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return Chat(model, AutoProcessor.from_pretrained(folder), max_new_tokens=TOKENS, do_sample=False)


def shown(text):
    """The characters that HTML shows of random words: those before what may be a tag."""
    before = text.partition("<")[0]
    return "".join(letter for letter in before if letter.isprintable() and not letter.isspace())


@needs_chromium
def test_a_conversation_about_pictures(page, chat, pictures):
    page.open()
    page.requests()
    page.attach(pictures[0])
    seen = page.ask("Which colour\n  is it?")
    chat.add_picture(pictures[0])
    assert shown(seen[-1]) == shown("".join(chat.ask("Which colour\nis it?")))
    lengths = [len(text) for text in seen]
    assert lengths == sorted(lengths) and len({*lengths}) > 2  # it came in pieces
    assert page.texts("#fold button") == ["How the model reads this picture\n\u25bc"]
    page.find("#fold button")[0].click()
    wait_for(lambda: len(page.find("[data-testid=matplotlib] img")) == 1)

    # A follow-up with two pictures: what was said before goes back to the model as it was.
    page.attach(*pictures)
    seen = page.ask("And these?")
    for picture in pictures:
        chat.add_picture(picture)
    assert shown(seen[-1]) == shown("".join(chat.ask("And these?")))
    assert len(page.find("[data-testid=user] img")) == 3

    elsewhere = [url for url in page.requests() if not url.startswith((page.url, "data:", "blob:"))]
    assert not elsewhere


@needs_chromium
def test_a_conversation_about_a_film(page, folder, tmp_path, pictures):
    """The answers are those about its frames, also when the conversation goes on."""
    pytest.importorskip("av", reason="needs the extra video")
    film = tmp_path / "film.mp4"
    film.write_bytes(mp4(tmp_path))
    page.open()
    page.attach(film)
    seen = page.ask("What moves?")
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    chat = Chat(model, AutoProcessor.from_pretrained(folder), max_new_tokens=TOKENS, do_sample=False)
    for frame in film_frames(film):
        chat.add_picture(frame)
    answer = "".join(chat.ask("What moves?"))
    assert shown(seen[-1]) == shown(answer) and shown(answer)
    assert len(page.find("[data-testid=user] video")) == 1
    assert not [button for button in page.find("[aria-label=Share]") if button.is_displayed()]
    page.attach(pictures[0])
    chat.add_picture(pictures[0])
    assert shown(page.ask("And this?")[-1]) == shown("".join(chat.ask("And this?")))


@needs_chromium
def test_a_click_on_an_example_asks_it(page):
    page.open()
    wait_for(lambda: len(page.find("button.example")) == 4)
    page.find("button.example")[0].click()
    assert page.watch(0)[-1].strip()
    assert "what does the sign say?" in "".join(page.texts("[data-testid=user]"))
    wait_for(lambda: page.find("#fold button"))


@needs_chromium
def test_a_question_that_cannot_be_asked_says_why(page):
    page.open()
    assert "'<image>', which is reserved" in page.ask("An <image>")[-1]
    # The page goes on, and the model is not told of what it did not answer.
    assert page.ask("Are you well?")[-1].strip()


@needs_chromium
def test_the_page_says_which_model_answers(page):
    page.open()
    (limits,) = page.texts("#limits")
    assert limits.startswith("visualrwkv-tiny answers: RWKV-") and "in float32 on cpu" in limits


@needs_chromium
def test_a_phone_shows_the_whole_page(page, pictures):
    """Nothing is wider than the screen, and the question can be typed without scrolling."""
    size = dict(width=390, height=780, deviceScaleFactor=1, mobile=True)
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.open()
        script = "return [document.documentElement.scrollWidth, arguments[0].getBoundingClientRect().bottom]"
        width, bottom = page.browser.execute_script(script, page.find("textarea")[0])
        assert width <= 390 and bottom <= 780
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@needs_chromium
def test_the_dark_button_changes_the_colours(page):
    page.open()
    script = "return getComputedStyle(document.querySelector('#chat')).backgroundColor"
    before = page.browser.execute_script(script)
    page.find("#theme")[0].click()
    wait_for(lambda: page.browser.execute_script(script) != before)
    page.find("#theme")[0].click()
    wait_for(lambda: page.browser.execute_script(script) == before)


# --- without a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("web_demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_examples_are_pictures_with_questions(demo, tmp_path):
    examples = demo.save_examples(tmp_path)
    assert len(examples) == len(demo.EXAMPLES)
    for example in examples:
        assert example["files"]
        for file in example["files"]:
            with Image.open(file) as picture:
                assert picture.size == (demo.SIDE, demo.SIDE)
                assert len(picture.getcolors(demo.SIDE**2)) > 1
        assert example["text"].endswith("?")


def test_questions_without_an_answer_are_not_part_of_the_conversation(demo):
    def said(role, text):
        return {"role": role, "content": [{"type": "text", "text": text}]}

    talk = [said("user", "One?"), said("assistant", "Yes."), said("user", f"{demo.REFUSED}is what I see")]
    refused = [said("user", "An <image>"), said("assistant", f"{demo.REFUSED}it is reserved.")]
    stopped = [said("user", "Two?"), demo.status_of("reading the prompt")]
    assert demo.without_unanswered([*talk[:2], *refused, *stopped, talk[2]]) == talk


def test_what_is_done_is_said_until_the_first_word(demo, monkeypatch):
    class Slow:
        def ask(self, question, is_stopped, report):
            report("reading the prompt: 0 of 9 tokens are read")
            assert told.wait(PATIENCE)
            yield "Red"
            yield "."

    told = threading.Event()
    monkeypatch.setattr(demo, "STATUS_SECONDS", 0.01)
    news = demo.pieces_or_status(Slow(), "Which?")
    assert [next(news), next(news)][1][1].startswith("reading the prompt: 0 of 9 tokens are read, ")
    told.set()
    assert [piece for piece, _ in news if piece] == ["Red", "."]


def test_a_visitor_who_stops_is_let_go_while_the_prompt_is_read(demo, monkeypatch):
    class Endless:
        def ask(self, question, is_stopped, report):
            while not is_stopped():
                time.sleep(0.01)
            left.append(question)
            yield from ()

    left = []
    monkeypatch.setattr(demo, "STATUS_SECONDS", 0.01)
    news = demo.pieces_or_status(Endless(), "Which?")
    next(news)
    news.close()
    assert left == ["Which?"]


def test_an_error_of_the_model_reaches_the_page(demo):
    class Broken:
        def ask(self, question, is_stopped, report):
            raise ValueError("no")
            yield

    with pytest.raises(ValueError, match="no"):
        list(demo.pieces_or_status(Broken(), "Which?"))


def test_a_film_is_decoded_once_for_a_visitor_and_within_bounds(demo, monkeypatch):
    frame = Image.new("RGB", (10, 10))
    decoded = []

    def pictures_of(file):
        decoded.append(file)
        return [frame] * 2

    monkeypatch.setattr(demo, "pictures_of", pictures_of)
    films = demo.KeptFilms(most_bytes=2 * 600)  # two films
    for _ in range(3):
        assert films.of("ann")("a.mp4") == [frame] * 2
    assert decoded == ["a.mp4"]
    films.of("bob")("a.mp4")  # does not learn what Ann has sent
    assert decoded == ["a.mp4"] * 2 and films.num_bytes == 1200
    films.of("ann")("a.mp4")
    films.of("ann")("b.mp4")  # in the place of Bob's, asked about longest ago
    assert decoded == ["a.mp4", "a.mp4", "b.mp4"] and films.num_bytes == 1200
    films.of("ann")("a.mp4")
    films.of("bob")("a.mp4")
    assert decoded == ["a.mp4", "a.mp4", "b.mp4", "a.mp4"] and films.num_bytes == 1200
    small = demo.KeptFilms(most_bytes=599)
    for _ in range(2):
        assert small.of("ann")("c.mp4") == [frame] * 2
    assert decoded[-2:] == ["c.mp4"] * 2 and small.num_bytes == 0


def test_frames_take_the_place_of_their_film(demo):
    text, picture = {"type": "text", "text": "What?"}, {"type": "image", "url": "a.png"}
    content = [picture, {"type": "video", "path": "a.mp4"}, text]
    frames = [{"type": "image", "image": number} for number in (1, 2)]
    assert demo.with_frames(content, lambda file: [1, 2]) == [picture, *frames, text]


def test_the_line_about_the_model(demo):
    model = AutoModelForImageTextToText.from_pretrained(bundled_model())
    assert "It reads signs" in demo.model_line(None, model, 9)
    line = demo.model_line("my/<b>", model, 9)
    assert line.startswith("**&lt;b&gt; answers**: RWKV-") and "answers of up to 9 tokens" in line


def test_a_message_of_the_chatbot_in_the_words_of_a_chat_template(demo, tmp_path):
    picture = tmp_path / "a.png"
    picture.write_bytes(png("red"))
    content = [
        {"type": "file", "file": {"path": str(picture)}, "alt_text": None},
        {"type": "text", "text": "Hello"},
    ]
    assert demo.message_of({"role": "user", "content": content, "metadata": None}, [tmp_path]) == {
        "role": "user",
        "content": [{"type": "image", "url": str(picture)}, {"type": "text", "text": "Hello"}],
    }
