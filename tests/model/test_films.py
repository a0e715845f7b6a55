"""Films: which frames are taken, that they are read as pictures are, and that a stranger's film does no harm."""

from fractions import Fraction

import av
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from film_files import NO_FILMS
from PIL import Image
from tiny_training import tiny_model, tiny_processor

from visualrwkv_hf import FrameSampling, film_frames
from visualrwkv_hf.films import ALL_FRAMES, DEFAULT_FRAMES, iterate_film
from visualrwkv_hf.pictures import open_picture

NUMBER, RATE, STEP = 30, 10, 8
"""Frames of a test film, how many a second, and how much brighter each is than the one before."""

CODECS = {
    "mp4": "libx264",
    "mov": "libx264",
    "mkv": "libx264",
    "webm": "libvpx-vp9",
    "avi": "ffv1",
    "flv": "flv1",
}
ANIMATIONS = ("gif", "png", "webp")


def grey(number: int) -> Image.Image:
    return Image.new("RGB", (96, 64), (STEP * number,) * 3)


def film(folder, ending: str):
    """A film whose frame `n` has the brightness `STEP * n`."""
    path, pictures = folder / f"film.{ending}", [grey(number) for number in range(NUMBER)]
    if ending in ANIMATIONS:
        options = dict(duration=1000 // RATE, lossless=True)
        pictures[0].save(path, save_all=True, append_images=pictures[1:], **options)
    else:
        frames = np.stack([np.asarray(picture) for picture in pictures])
        imageio.imwrite(path, frames, plugin="pyav", codec=CODECS[ending], fps=RATE)
    return path


def numbers(frames) -> list[int]:
    """Which frames of a test film these are."""
    return [round(float(np.asarray(frame).mean()) / STEP) for frame in frames]


@pytest.mark.parametrize("ending", [*CODECS, *ANIMATIONS])
def test_frames_are_taken_by_time(ending, tmp_path):
    path = film(tmp_path, ending)
    even = [
        index * NUMBER // DEFAULT_FRAMES for index in range(DEFAULT_FRAMES)
    ]  # as transformers counts them
    assert numbers(film_frames(path)) == even
    assert numbers(film_frames(str(path), FrameSampling(num_frames=3))) == [0, 10, 20]
    assert numbers(film_frames(path.read_bytes(), FrameSampling(fps=2))) == [0, 5, 10, 15, 20, 25]
    assert numbers(film_frames(path, FrameSampling(num_frames=99))) == [*range(NUMBER)]
    assert numbers(film_frames(path, FrameSampling(fps=99))) == [*range(NUMBER)]
    assert numbers(iterate_film(path, FrameSampling(num_frames=ALL_FRAMES))) == [*range(NUMBER)]


def test_frames_of_uneven_length_are_taken_by_time(tmp_path):
    """Half of this animation's time is its first frame."""
    pictures = [grey(number) for number in range(5)]
    pictures[0].save(
        path := tmp_path / "film.gif",
        save_all=True,
        append_images=pictures[1:],
        duration=[400, 100, 100, 100, 100],
    )
    assert numbers(film_frames(path, FrameSampling(fps=10))) == [0, 1, 2, 3, 4]
    assert numbers(film_frames(path, FrameSampling(fps=2.5))) == [0, 1]
    assert numbers(film_frames(path, FrameSampling(num_frames=4))) == [0, 1, 3]


@pytest.mark.parametrize(
    "duration", [40, 250, [40 + 70 * (number % 3) for number in range(NUMBER)]], ids=["40", "250", "uneven"]
)
def test_animations_of_every_format_give_the_same_frames(duration, tmp_path):
    """Also where a frame is not shown for the 100 ms that stand for an unknown duration."""
    pictures, found = [grey(number) for number in range(NUMBER)], []
    for ending in ANIMATIONS:
        options = dict(save_all=True, append_images=pictures[1:], duration=duration, lossless=True)
        pictures[0].save(path := tmp_path / f"film.{ending}", **options)
        samplings = FrameSampling(), FrameSampling(num_frames=5), FrameSampling(fps=7)
        found.append([numbers(film_frames(path, sampling)) for sampling in samplings])
    gif, png, webp = found
    assert gif == png == webp and [len(frames) for frames in gif[:2]] == [DEFAULT_FRAMES, 5]
    if duration == 40:
        assert webp[0] == [0, 3, 7, 11, 15, 18, 22, 26]


def encoded(path, pictures, start=0, prepare=lambda stream: None):
    """A film of H.264 whose first frame is shown at `start` / RATE seconds."""
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "yuv420p"
        prepare(stream)
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_image(picture)
            frame.pts, frame.time_base = start + number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("ending", ["mp4", "mov"])
def test_frames_that_an_edit_list_hides_are_not_counted(ending, tmp_path):
    """A film that is cut without encoding it again keeps the frames from the last key frame on, and hides them."""
    path = encoded(tmp_path / f"film.{ending}", [grey(number) for number in range(NUMBER)], start=-10)
    with av.open(path) as container:
        assert sum(packet.is_discard for packet in container.demux(video=0)) >= 9
    shown = numbers(film_frames(path, FrameSampling(num_frames=ALL_FRAMES)))
    assert shown == [*range(10, NUMBER)]
    assert numbers(film_frames(path, FrameSampling(num_frames=4))) == [10, 15, 20, 25]


ORIENTATIONS = {
    1: (0, False),
    2: (0, True),
    3: (180, False),
    4: (180, True),
    5: (-90, True),
    6: (-90, False),
    7: (90, True),
    8: (90, False),
}
"""EXIF's orientations: degrees against the clock, and whether the result is mirrored from left to right."""


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_films_are_turned_upright_as_pictures_are(orientation, tmp_path):
    lying = Image.new("RGB", (96, 64), "white")
    lying.paste("black", (0, 0, 48, 32))  # every orientation looks different
    lying.paste("grey", (48, 0, 96, 32))
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying.save(tmp_path / "picture.png", exif=exif)
    upright = open_picture(tmp_path / "picture.png")
    degrees, is_mirrored = ORIENTATIONS[orientation]
    path = encoded(
        tmp_path / "film.mp4",
        [lying, lying],
        prepare=lambda stream: stream.set_display_rotation(degrees, hflip=is_mirrored),
    )
    for frame in film_frames(path):
        assert frame.size == upright.size
        difference = np.asarray(frame).astype(int) - np.asarray(upright)
        assert abs(difference).mean() < 5  # of 255: the film is compressed with losses


def test_lists_and_arrays_are_frames():
    pictures = [grey(number) for number in range(6)]
    array = np.stack([np.asarray(picture) for picture in pictures])
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    for source in (pictures, array, tensor):
        assert numbers(film_frames(source)) == [*range(6)]
        assert numbers(film_frames(source, FrameSampling(num_frames=3))) == [0, 2, 4]


def test_a_long_film_is_decoded_frame_by_frame(tmp_path, monkeypatch):
    """Only frames that are wanted become pictures, and none after the last of them is decoded."""
    made, decoded = [], []

    def looked_at(frames):
        for frame in frames:
            decoded.append(frame.time)
            yield frame

    choose = FrameSampling.choose
    monkeypatch.setattr(
        FrameSampling, "choose", lambda self, frames, times: choose(self, looked_at(frames), times)
    )
    monkeypatch.setattr("visualrwkv_hf.films.to_rgb", lambda frame: made.append(1) or frame.convert("RGB"))
    path = film(tmp_path, "gif")
    frames = iterate_film(path, FrameSampling(fps=1))
    assert numbers([next(frames)]) == [0] and len(decoded) == 1
    assert numbers(frames) == [10, 20] and len(made) == 3
    made.clear(), decoded.clear()
    assert numbers(iterate_film(path, FrameSampling(num_frames=3))) == [0, 10, 20]
    assert len(made) == 3 and len(decoded) == 21


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_frames=0), "num_frames must be a positive integer, got 0"),
        (dict(num_frames=2.5), "num_frames must be a positive integer"),
        (dict(fps=-1), "fps must be a positive number"),
        (dict(fps=float("nan")), "fps must be a positive number"),
        (dict(fps=float("inf")), "fps must be a positive number"),
        (dict(fps=1, num_frames=1), "either num_frames or fps"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FrameSampling(**options)


# What strangers send


def broken(folder, content: bytes):
    (path := folder / "film.mp4").write_bytes(content)
    return path


@pytest.mark.parametrize("content", NO_FILMS.values(), ids=NO_FILMS)
def test_what_is_no_film_is_refused_in_a_sentence(content, tmp_path):
    path = broken(tmp_path, content)
    for source in (path, content):
        with pytest.raises(ValueError, match=r"cannot be read as a film: .*[.]$"):
            film_frames(source)


@pytest.mark.parametrize("ending", ["mp4", "webm", "avi", "gif", "webp"])
def test_half_of_a_film_is_refused_or_gives_what_is_there(ending, tmp_path):
    content = film(tmp_path, ending).read_bytes()
    for length in range(1, len(content), max(len(content) // 40, 1)):
        for sampling in (FrameSampling(fps=5), FrameSampling(num_frames=4)):
            try:
                frames = film_frames(content[:length], sampling)
            except ValueError as error:
                assert "cannot be read as a film" in str(error)
            else:
                assert all(frame.size == (96, 64) for frame in frames)


def test_no_format_that_names_other_files_is_opened(monkeypatch, tmp_path):
    """FFmpeg is told the format: it never guesses a playlist, and opens no file but this one."""
    path, opened, real = film(tmp_path, "mp4"), [], av.open

    def recorded(*args, format=None, **options):
        opened.append(format)
        return real(*args, format=format, **options)

    monkeypatch.setattr(av, "open", recorded)
    film_frames(path)
    for content in (NO_FILMS["playlist"], NO_FILMS["concat"]):
        with pytest.raises(ValueError):
            film_frames(broken(tmp_path, content))
    assert opened == ["mp4", "mp4"]


@pytest.mark.parametrize("ending", ["mp4", "gif"])
def test_frames_that_are_too_large_are_refused_before_they_are_decoded(ending, tmp_path):
    with pytest.raises(
        ValueError, match="its frames are too large: 96 x 64; at most 1,000 pixels are decoded"
    ):
        film_frames(film(tmp_path, ending), FrameSampling(max_pixels=1000))


def test_without_the_decoder_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'visualrwkv-hf\[video\]'"):
        film_frames(film(tmp_path, "mp4"))
    assert len(film_frames(film(tmp_path, "gif"))) == DEFAULT_FRAMES


# In prompts

QUESTION = {"type": "text", "text": "What moves?"}
OPTIONS = dict(tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)


@pytest.fixture(scope="module", params=["first", "middle", "last"])
def model(request):
    return tiny_model(version=6, image_position=request.param, scan="bidirectional")


@pytest.fixture
def path(tmp_path):
    return film(tmp_path, "gif")


def user(*parts) -> list[dict]:
    return [{"role": "user", "content": [*parts, QUESTION]}]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_a_film_is_read_as_its_frames_are(model, path):
    processor = tiny_processor(model)
    frames = [{"type": "image", "image": frame} for frame in film_frames(path, FrameSampling(num_frames=4))]
    wanted = processor.apply_chat_template(user(*frames), **OPTIONS)
    chat = user({"type": "video", "path": str(path)})
    assert_equal(processor.apply_chat_template(chat, num_frames=4, **OPTIONS), wanted)
    assert_equal(processor.apply_chat_template(chat, processor_kwargs={"num_frames": 4}, **OPTIONS), wanted)
    pictures = [part["image"] for part in frames]
    assert_equal(
        processor.apply_chat_template(user({"type": "video", "frames": pictures}), **OPTIONS), wanted
    )
    whole = processor.apply_chat_template(chat, processor_kwargs={"do_sample_frames": False}, **OPTIONS)
    assert_equal(whole, processor.apply_chat_template(chat, num_frames=NUMBER, **OPTIONS))
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text.count("<video>") == 1 and "<image>" not in text
    assert_equal(processor(text=text, videos=path, num_frames=4, return_tensors="pt"), wanted)


@pytest.mark.parametrize("form", ["list of lists", "list", "picture", "array"])
def test_a_film_may_be_one_frame(form):
    """The last piece of a stream often is."""
    processor, frame = tiny_processor(tiny_model(7)), Image.new("RGB", (40, 30), "red")
    film = {"list of lists": [[frame]], "list": [frame], "picture": frame, "array": np.asarray(frame)}[form]
    found = processor(text="User: <video>\nWhat?", videos=film, return_tensors="pt")
    assert_equal(found, processor(text="User: <image>\nWhat?", images=[frame], return_tensors="pt"))


def test_films_and_pictures_keep_their_places(model, path):
    """Two texts, of which one has a picture, a film and a picture."""
    processor = tiny_processor(model)
    texts = ["User: <image>\n<video>\n<image>\nWhat?\n\nAssistant:", "User: <video>\nWhat?\n\nAssistant:"]
    before, after = Image.new("RGB", (40, 40), "red"), Image.new("RGB", (40, 40), "blue")
    frames = film_frames(path, FrameSampling(num_frames=2))
    plain = [text.replace("<video>", "<image>\n<image>") for text in texts]
    options = dict(padding=True, return_tensors="pt")
    wanted = processor(text=plain, images=[[before, *frames, after], frames], **options)
    for images, videos in (([before, after], [path, path]), ([[before, after], []], [[path], [path]])):
        assert_equal(processor(text=texts, images=images, videos=videos, num_frames=2, **options), wanted)


def test_without_films_their_placeholder_is_text(model):
    processor = tiny_processor(model)
    chat = [{"role": "user", "content": "What does the tag <video> do?"}]
    ids = processor.apply_chat_template(chat, **OPTIONS)["input_ids"]
    assert "<video>" in processor.decode(ids[0])


def test_a_text_cannot_move_a_film(model, path):
    """The word <video> in a question is a word, and never a place for frames."""
    processor = tiny_processor(model)
    question = {"type": "text", "text": "<video> What?"}
    chat = [{"role": "user", "content": [{"type": "video", "path": str(path)}, question]}]
    ids = processor.apply_chat_template(chat, num_frames=1, **OPTIONS)["input_ids"]
    assert int((ids == model.config.image_token_id).sum()) == model.config.num_image_tokens
    assert "<video> What?" in processor.decode(ids[0])
    with pytest.raises(ValueError, match="Every <video> needs one film"):
        processor(text=processor.apply_chat_template(chat), videos=path)


@pytest.mark.parametrize(
    "part, message",
    [
        ({}, "needs its film under one of the keys video, url, path, base64 or frames, got 0"),
        ({"path": "a", "url": "b"}, "got 2 of them"),
        ({"path": "missing.mp4"}, "'missing.mp4' cannot be read as a film: there is no such file"),
        ({"frames": []}, "A film needs at least one frame"),
        ({"frames": ["missing.png"]}, "Frame 1 of a film: 'missing.png' cannot be read"),
    ],
)
def test_a_message_whose_film_cannot_be_read_is_refused(model, part, message):
    with pytest.raises(ValueError, match=message):
        tiny_processor(model).apply_chat_template(user({"type": "video", **part}), **OPTIONS)


def test_a_chat_about_a_film_is_read_once(path):
    model = tiny_model(version=7, image_position="first")
    processor = tiny_processor(model)
    chat = [{"role": "user", "content": [{"type": "video", "path": str(path)}]}]
    state = model.read(processor, chat, image_position="first", num_frames=3)
    inputs = processor.apply_chat_template(
        user({"type": "video", "path": str(path)}), image_position="first", num_frames=3, **OPTIONS
    )
    generation = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(
        model.generate(**inputs, **generation), model.generate(**inputs, past_key_values=state, **generation)
    )
    assert state.get_seq_length() > 3 * model.config.num_image_tokens


def test_a_stream_is_watched_in_pieces(path):
    """A stream that is watched in two goes, with a question between, is one message with all its pictures."""
    model = tiny_model(version=7, image_position="first")
    processor = tiny_processor(model)
    frames = film_frames(path, FrameSampling(num_frames=5))
    inputs = processor.apply_chat_template(
        user({"type": "video", "frames": frames}), image_position="first", **OPTIONS
    )
    generation = dict(max_new_tokens=4, do_sample=False)
    wanted = model.generate(**inputs, **generation)[0, inputs["input_ids"].shape[1] :]

    state = model.watch(processor, iter(frames[:2]))
    asked = processor.question_inputs("What?", state)
    model.generate(**asked, past_key_values=state.copy(), **generation)
    assert model.watch(processor, frames[2:], state) is state
    asked = processor.question_inputs(QUESTION["text"], state)
    answer = model.generate(**asked, past_key_values=state.copy(), **generation)
    assert torch.equal(answer[0, asked["input_ids"].shape[1] :], wanted)
