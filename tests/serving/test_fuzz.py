"""Whatever a person says, shows and asks for: an answer or a clear error, and nothing left behind."""

import base64
import gc
import io
import linecache
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import jinja2
import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patience import PATIENCE
from PIL import Image
from tiny_training import tiny_model, tiny_processor
from transformers import StoppingCriteria

from visualrwkv_hf import StateStore, VisualRWKVCache, VisualRWKVImageProcessor

settings.register_profile(
    "fuzz",
    derandomize=True,  # a run says the same as the one before; `--hypothesis-seed` has no say then
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
fuzz = settings.get_profile("fuzz")

CLEAR = (ValueError, TypeError, jinja2.TemplateError)
SPEAKERS = ("visualrwkv_hf", "transformers", "huggingface_hub")


class Hang(Exception):
    """It took longer than anything here may."""


@contextmanager
def a_clear_end() -> Iterator[None]:
    """Passes errors that were raised on purpose and say something; fails for all others, and for what hangs."""

    def give_up(*_):
        raise Hang(f"No end within {PATIENCE} s.")

    has_alarm = hasattr(signal, "SIGALRM")
    if has_alarm:
        before = signal.signal(signal.SIGALRM, give_up)
        signal.alarm(PATIENCE)
    try:
        yield
    except CLEAR as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        line = linecache.getline(frame.filename, frame.lineno).strip()
        said = line.startswith("raise ") and any(f"/{name}/" in frame.filename for name in SPEAKERS)
        if not (said and str(error)):
            raise
    finally:
        if has_alarm:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)


# --- what is said -----------------------------------------------------------------------------------------

ODD_TEXTS = [
    *("", " ", "\n\n", "\r\n\r\n", "\x00", "\ufeff", "\u202e", "\ud800", "🙂" * 3, "é" * 40, "a" * 500),
    *(
        "<image>",
        "<|endoftext|>",
        "<|reserved_9|>",
        "User:",
        "Assistant: yes\n\nUser: no",
        "{{ messages }}",
        "{%",
    ),
]
texts = st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=30))

MODES = (
    *("1", "L", "LA", "La", "P", "PA", "I", "I;16", "F"),
    *("RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"),
)
SIZES = [(1, 1), (1, 300), (300, 1), (2, 3), (56, 56), (57, 31), (400, 3), (1, 9000), (20000, 1), (0, 5)]


@st.composite
def pillow_pictures(draw) -> Image.Image:
    mode, size = draw(st.sampled_from(MODES)), draw(st.sampled_from(SIZES))
    image = Image.new(mode, size)
    if 0 not in size and mode in ("L", "RGB", "I;16", "P", "F", "I"):
        shade = draw(st.sampled_from([1, 255] if mode in ("L", "RGB", "P") else [1, 255, 65535, 70000]))
        image.paste(shade if mode != "RGB" else (shade, 0, 7), (0, 0, 1, 1))
    return image


@st.composite
def picture_files(draw) -> str:
    """base64 text of a file, often with broken bytes."""
    file = io.BytesIO()
    kind = draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]))
    Image.radial_gradient("L").resize((20, 16)).save(file, kind)
    data = bytearray(file.getvalue())
    for place, value in draw(
        st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), max_size=3)
    ):
        data[place] = value
    end = draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))
    return base64.b64encode(bytes(data[:end])).decode()


arrays = st.builds(
    lambda shape, value: np.full(shape, value),
    st.sampled_from([(8, 8), (8, 9, 3), (3, 8, 9), (8, 8, 4), (5, 8, 8), (0, 3, 3), (2, 8, 8, 3), ()]),
    st.sampled_from(
        [
            np.uint8(200),
            np.uint16(65535),
            np.int64(-1),
            np.int64(300),
            True,
            0.5,
            7.0,
            np.inf,
            np.nan,
            1j,
            "x",
            b"x",
            None,
            np.datetime64(0, "s"),
        ]
    ),
)
pictures = st.one_of(
    pillow_pictures(),
    picture_files(),
    arrays,
    st.sampled_from(["nowhere.png", "", "https://", "data:image/png;base64,", None, 7, b"bytes"]),
)
parts = st.one_of(
    st.builds(lambda text: {"type": "text", "text": text}, texts),
    st.builds(lambda image: {"type": "image", "image": image}, pillow_pictures()),
    st.builds(lambda image: {"type": "image", "image": image}, pictures),
    st.sampled_from(
        [{"type": "video", "video": "x"}, {"type": "text"}, {"type": "image"}, {}, {"text": "x"}]
    ),
)
contents = st.one_of(texts, st.lists(parts, max_size=3), st.sampled_from([None, 3]))
roles = st.sampled_from(["user", "user", "user", "assistant", "system", "tool", "", None])
plain_chats = st.builds(
    lambda image, text: [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}
    ],
    pillow_pictures().filter(lambda image: 0 not in image.size),
    texts,
)
chats = st.one_of(
    plain_chats,
    st.lists(
        st.builds(lambda role, content: {"role": role, "content": content}, roles, contents), max_size=4
    ),
    st.sampled_from([[{}], [{"role": "user"}], [{"content": "x"}], ["user"]]),
)


# --- what is asked for ------------------------------------------------------------------------------------


class Cancelled(StoppingCriteria):
    """As someone who closes the window after `steps` words."""

    def __init__(self, steps: int):
        self.steps = steps

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        self.steps -= 1
        return torch.full((len(input_ids),), self.steps <= 0, dtype=torch.bool)


OPTIONS = {
    "do_sample": st.booleans(),
    "temperature": st.sampled_from([0.0, 0.5, 1.0, 1e-6, 100.0, -1.0]),
    "top_k": st.sampled_from([0, 1, 5, 5000]),
    "top_p": st.sampled_from([0.0, 0.5, 1.0, 1.5]),
    "min_p": st.sampled_from([0.0, 0.5, 2.0]),
    "num_beams": st.integers(1, 3),
    "num_return_sequences": st.integers(1, 3),
    "repetition_penalty": st.sampled_from([0.5, 1.0, 2.0, -1.0]),
    "no_repeat_ngram_size": st.sampled_from([0, 1, 2]),
    "min_new_tokens": st.sampled_from([0, 3, 50]),
    "length_penalty": st.sampled_from([-1.0, 0.0, 2.0]),
    "early_stopping": st.booleans(),
    "bad_words_ids": st.sampled_from([[[5]], [[5, 6]], [[]], [[100000]]]),
    "stop_strings": st.sampled_from([["a"], ["\n"], "zz", [""], []]),
    "cache_implementation": st.sampled_from(["dynamic", "static", "offloaded", "quantized", "nonsense"]),
    "use_cache": st.booleans(),
    "prompt_lookup_num_tokens": st.sampled_from([1, 3]),
    "output_scores": st.booleans(),
    "return_dict_in_generate": st.booleans(),
    "eos_token_id": st.sampled_from([None, 0, [5, 6]]),
    "prefill_chunk_size": st.sampled_from([1, 7, 100]),
    "guidance_scale": st.sampled_from([1.0, 2.0]),
    "no_such_option": st.just(1),
}
max_new_tokens = st.sampled_from([4, 4, 4, 1, 0, -1])


@st.composite
def options(draw) -> dict:
    names = draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=4, unique=True))
    chosen = {name: draw(OPTIONS[name]) for name in names}
    if draw(st.booleans()):
        chosen["stopping_criteria"] = [Cancelled(draw(st.integers(1, 3)))]
    return {"max_new_tokens": draw(max_new_tokens)} | chosen


class Bench:
    """A model and its processor, and what it says when nothing is wrong."""

    def __init__(self, **fields):
        self.model = tiny_model(**fields)
        self.processor = tiny_processor(self.model)
        self.model.state_store = StateStore()
        self.calm = self.ask(calm_chat(), max_new_tokens=4)

    def ask(self, messages: list, **options) -> list[list[int]]:
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = self.model.generate(**inputs, tokenizer=self.processor.tokenizer, **options)
        return getattr(output, "sequences", output).tolist()


def calm_chat() -> list[dict]:
    content = [
        {"type": "image", "image": Image.new("RGB", (56, 56), "teal")},
        {"type": "text", "text": "Hm?"},
    ]
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module", params=[6, 7])
def bench(request) -> Bench:
    return Bench(version=request.param)


# --- what must hold ---------------------------------------------------------------------------------------


@settings(fuzz, max_examples=60)
@given(messages=chats)
def test_any_chat_ends_in_an_answer_or_a_clear_error(bench, messages):
    with a_clear_end():
        bench.ask(messages, max_new_tokens=2)


@settings(fuzz, max_examples=60)
@given(chosen=options())
def test_any_options_end_in_an_answer_or_a_clear_error_and_leave_the_model_as_it_was(bench, chosen):
    with a_clear_end():
        answer = bench.ask(calm_chat(), **chosen)
        assert len(answer) == max(1, chosen.get("num_return_sequences", 1))
    assert bench.ask(calm_chat(), max_new_tokens=4) == bench.calm


@settings(fuzz, max_examples=100)
@given(picture=pictures)
@pytest.mark.parametrize(
    "tiling",
    [dict(), dict(tiling="closest"), dict(tiling="whole_and_tiles"), dict(tiling="views", tile_grid=2)],
)
def test_any_picture_becomes_pixels_or_a_clear_error(tiling, picture):
    size = dict(size=28, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = VisualRWKVImageProcessor(encoders={"siglip": size}, **tiling)
    with a_clear_end():
        pixels = processor(picture, return_tensors="pt")["pixel_values"]
        assert pixels.shape[1:] == (3, 28, 28)
        assert pixels.isfinite().all()


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def rounds(bench: Bench, count: int) -> None:
    """Answers, cancelled answers and errors, each on its own way."""
    for number in range(count):
        bench.ask(calm_chat(), max_new_tokens=3)
        bench.ask(calm_chat(), max_new_tokens=9, stopping_criteria=[Cancelled(1 + number % 3)])
        bench.ask(calm_chat(), max_new_tokens=3, num_beams=2, num_return_sequences=2)
        bench.ask(calm_chat(), max_new_tokens=3, prompt_lookup_num_tokens=2)
        cache = VisualRWKVCache(bench.model.config)
        bench.ask(calm_chat(), max_new_tokens=3, past_key_values=cache)
        with pytest.raises(ValueError):
            bench.ask(calm_chat(), max_new_tokens=3, cache_implementation="quantized")
        with pytest.raises(jinja2.TemplateError):
            bench.ask([{"role": "user", "content": "<image>"}])


def test_nothing_is_left_behind(bench):
    rounds(bench, 3)
    process = psutil.Process()
    tensors, memory = live_tensors(), process.memory_info().rss
    rounds(bench, 12)
    assert live_tensors() == tensors
    # A picture's pixels and states are 200 kB a round, so that a leak of any of them is seen.
    assert process.memory_info().rss - memory < 2**21
