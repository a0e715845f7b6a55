"""The web demo in a real browser: pictures, answers as they come, examples, and nothing from elsewhere."""

import importlib.util
from types import ModuleType

import pytest
from browser import CHROMIUM, DEMO, DRIVER, Page, running_demo, wait_for
from PIL import Image
from serving import png
from tiny_training import save_tiny_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from visualrwkv_hf import Chat

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
    """The characters that HTML shows of random words."""
    return "".join(letter for letter in text if letter.isprintable() and not letter.isspace())


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
    assert len(page.find("[data-testid=matplotlib] img")) == 1

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
def test_a_click_on_an_example_asks_it(page):
    page.open()
    wait_for(lambda: len(page.find("button.example")) == 4)
    page.find("button.example")[0].click()
    assert page.watch(0)[-1].strip()
    assert "what color is the shape?" in "".join(page.texts("[data-testid=user]"))
    assert len(page.find("[data-testid=matplotlib] img")) == 1


@needs_chromium
def test_a_question_that_cannot_be_asked_says_why(page):
    page.open()
    page.find("textarea")[0].send_keys("An <image>")
    page.find("[data-testid=submit-button]")[0].click()
    wait_for(lambda: "'<image>', which is reserved" in "".join(page.texts("[data-testid=toast-body]")))


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
        (file,) = example["files"]
        with Image.open(file) as picture:
            assert picture.size == (demo.SIDE, demo.SIDE)
            assert len(picture.getcolors(demo.SIDE**2)) > 1
        assert example["text"].endswith("?")


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
