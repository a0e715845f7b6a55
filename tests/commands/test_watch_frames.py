"""examples/watch_frames.py: a long stream in constant memory, and what it sees."""

import importlib
import sys
from pathlib import Path

import add_examples  # noqa: F401
import av
import imageio.v3 as imageio
import numpy as np
import psutil
import pytest
import torch
import typer
from chats import counted_tokens
from PIL import Image
from tiny_training import save_tiny_model, tiny_model, tiny_processor

FIRST = dict(version=7, scan="unidirectional", image_position="first")


@pytest.fixture
def example():
    return importlib.import_module("watch_frames")


@pytest.fixture(scope="module")
def model():
    return tiny_model(**FIRST)


def animation(path: Path, num_frames: int) -> Path:
    frames = [Image.new("L", (8, 8), 3 * number % 256) for number in range(num_frames)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    return path


SIDE = 16
"""Of the square that moves in `film`, in pixels. It starts at the left, and goes a quarter of that per frame."""


def film(path: Path, num_frames: int, codec: str = "libx264") -> Path:
    """A red square that moves to the right over black."""
    frames = np.zeros((num_frames, 64, 96, 3), np.uint8)
    for number, frame in enumerate(frames):
        frame[16 : 16 + SIDE, SIDE // 4 * number :][:, :SIDE] = (220, 30, 30)
    imageio.imwrite(path, frames, plugin="pyav", codec=codec, fps=10)
    return path


def test_memory_and_tokens_per_frame_do_not_grow(example, model, tmp_path):
    """2,000 frames. Keeping 1,000 of their pixels alone would take 38 MB, keys and values of their tokens 9 MB."""
    watcher = example.Watcher(model, tiny_processor(model))
    source = animation(tmp_path / "long.gif", 2000)
    held, states, process = {}, set(), psutil.Process()
    with counted_tokens(model) as read:
        for seen in example.watch(watcher, example.frames_of(source)):
            held[seen.number] = process.memory_info().rss
            states.add(seen.state_bytes)
    assert seen.number == 2000 and len(states) == 1
    assert held[2000] - held[1000] < 4 * 2**20
    assert watcher.state.get_seq_length() == sum(read) > 2000 * model.config.num_image_tokens
    assert len(read) == 2000 and len(set(read[1:])) == 1, "each frame is read once, and nothing with it"


def test_a_stream_is_a_message_with_many_pictures(example, model):
    """Frame by frame or all in one prompt: the same answer, and asking does not change what is seen."""
    processor = tiny_processor(model)
    watcher = example.Watcher(model, processor)
    frames = [Image.new("RGB", (60, 56), colour) for colour in ("red", "green", "blue")]
    for frame in frames:
        watcher.see(frame)
        before = [tensor.clone() for layer in watcher.state.layers for tensor in layer.tensors().values()]
        answer = watcher.ask("What was it?")
        after = [tensor for layer in watcher.state.layers for tensor in layer.tensors().values()]
        assert all(map(torch.equal, before, after))
    content = [{"type": "image", "image": frame} for frame in frames]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": "What was it?"}]}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    length = inputs["input_ids"].shape[1]
    assert answer == processor.post_process_image_text_to_text(output, prompt_length=length)[0]


def test_it_watches_a_folder(example, tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model", **FIRST)
    (tmp_path / "frames").mkdir()
    for number in range(5):
        Image.new("RGB", (9, 9), (50 * number, 0, 0)).save(tmp_path / "frames" / f"{number}.png")
    (tmp_path / "frames" / "notes.txt").write_text("no picture")
    example.main(tmp_path / "frames", str(model), question="What is it?", every=2, max_new_tokens=3)
    said = capsys.readouterr()
    assert "frame 2: " in said.out and "frame 4: " in said.out and "What is it? " in said.out
    assert "5 frames; the first tenth took" in said.out
    assert "notes.txt" in said.err


def test_a_short_stream_is_asked_about_at_its_end(example, tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model", **FIRST)
    example.main(animation(tmp_path / "short.gif", 3), str(model), question="What is it?", max_new_tokens=3)
    said = capsys.readouterr().out
    assert said.count("What is it? ") == 1 and "frame 3: " in said


@pytest.mark.parametrize(("name", "codec"), [("film.mp4", "libx264"), ("film.webm", "libvpx-vp9")])
def test_frames_of_a_film_are_its_pictures(example, tmp_path, name, codec):
    frames = list(example.frames_of(film(tmp_path / name, 20, codec)))
    assert len(frames) == 20 and {frame.size for frame in frames} == {(96, 64)}
    for number, frame in enumerate(frames):
        left = SIDE // 4 * number
        inside, outside = frame.getpixel((left + SIDE // 2, 24)), frame.getpixel(((left + 48) % 96, 56))
        # What the codec loses of a flat colour; measured at most 2.
        assert np.abs(np.subtract(inside, (220, 30, 30))).max() <= 8 and max(outside) <= 8, number


def test_it_watches_a_film_in_a_state_of_constant_size(example, model, tmp_path):
    watcher = example.Watcher(model, tiny_processor(model))
    seen = list(example.watch(watcher, example.frames_of(film(tmp_path / "film.mp4", 20))))
    assert [frame.number for frame in seen] == list(range(1, 21))
    assert len({frame.state_bytes for frame in seen}) == 1
    assert watcher.state.get_seq_length() > 20 * model.config.num_image_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), **FIRST)


def refused(example, source: Path, model: Path, capsys) -> str:
    with pytest.raises(typer.Exit) as left:
        example.main(source, str(model))
    assert left.value.exit_code == 1
    return capsys.readouterr().err


def test_an_empty_folder_is_refused(example, folder, tmp_path, capsys):
    assert f"Error: {tmp_path} has no frames." in refused(example, tmp_path, folder, capsys)


def sound(path: Path) -> None:
    """A film without a picture."""
    with av.open(path, "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux([*stream.encode(frame), *stream.encode(None)])


def half_a_film(path: Path) -> None:
    content = film(path, 20).read_bytes()
    path.write_bytes(content[: len(content) // 2])


def damaged_film(path: Path) -> None:
    """Its pictures are noise behind an intact description."""
    content = bytearray(film(path, 20).read_bytes())
    pictures = content.index(b"mdat") + 4
    content[pictures : pictures + 500] = np.random.default_rng(0).bytes(500)
    path.write_bytes(content)


BROKEN = {
    "no film": lambda path: path.write_bytes(b"no film" * 1000),
    "empty": lambda path: path.write_bytes(b""),
    "sound alone": sound,
    "half a film": half_a_film,
    "damaged": damaged_film,
}


@pytest.mark.parametrize("write", BROKEN.values(), ids=list(BROKEN))
def test_what_is_no_film_is_refused(example, folder, tmp_path, capsys, write):
    path = tmp_path / "film.mp4"
    write(path)
    assert f"Error: {str(path)!r} cannot be read as a film: " in refused(example, path, folder, capsys)


def test_what_reads_films_is_named_where_it_is_missing(example, folder, tmp_path, capsys, monkeypatch):
    path = film(tmp_path / "film.mp4", 2)
    monkeypatch.setitem(sys.modules, "av", None)
    assert "pip install 'visualrwkv-hf[video]'" in refused(example, path, folder, capsys)


def test_frames_are_taken_by_time(example, tmp_path):
    path = film(tmp_path / "film.mp4", 20)
    assert len(list(example.frames_of(path, fps=2))) == 4
    with pytest.raises(ValueError, match="fps must be a positive number"):
        next(example.frames_of(path, fps=0))


def test_half_a_picture_is_left_out_of_a_folder_and_refused_alone(example, folder, tmp_path, capsys):
    animation(tmp_path / "a.gif", 3)
    Image.effect_noise((64, 64), 50).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes((tmp_path / "b.png").read_bytes()[:2000])
    assert len(list(example.frames_of(tmp_path))) == 2
    assert f"no picture: {tmp_path / 'c.png'}" in capsys.readouterr().err
    assert f"{str(tmp_path / 'c.png')!r} cannot be read as a film: " in refused(
        example, tmp_path / "c.png", folder, capsys
    )
