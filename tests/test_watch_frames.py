"""examples/watch_frames.py: a long stream in constant memory, and what it sees."""

import importlib
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from tiny_training import save_tiny_model, tiny_model, tiny_processor

EXAMPLES = Path(__file__).parents[1] / "examples"
FIRST = dict(version=7, scan="unidirectional", image_position="first")


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("watch_frames")


@pytest.fixture(scope="module")
def model():
    return tiny_model(**FIRST)


def animation(path: Path, num_frames: int) -> Path:
    frames = [Image.new("L", (8, 8), 3 * number % 256) for number in range(num_frames)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    return path


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return 4096 * pages


def test_memory_and_time_per_frame_do_not_grow(example, model, tmp_path):
    """2,000 frames. Keeping 1,000 of their pixels alone would take 38 MB, keys and values of their tokens 9 MB."""
    watcher = example.Watcher(model, tiny_processor(model))
    source = animation(tmp_path / "long.gif", 2000)
    held, times, states = {}, [], set()
    for seen in example.watch(watcher, example.frames_of(source)):
        held[seen.number] = resident_bytes()
        times.append(seen.seconds)
        states.add(seen.state_bytes)
    assert seen.number == 2000 and len(states) == 1
    assert held[2000] - held[1000] < 4 * 2**20
    assert watcher.state.get_seq_length() > 2000 * model.config.num_image_tokens
    assert watcher.ask("How many?", max_new_tokens=4) is not None
    first, last = (1e3 * sum(part) / len(part) for part in (times[:200], times[-200:]))
    print(f"{first:.1f} ms a frame at first, {last:.1f} ms at last")


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


def test_what_cannot_be_watched_is_refused(example, tmp_path, capsys, monkeypatch):
    model = str(save_tiny_model(tmp_path / "model", **FIRST))
    (tmp_path / "film.mp4").write_bytes(b"no film")
    monkeypatch.setitem(__import__("sys").modules, "imageio.v3", None)
    (tmp_path / "empty").mkdir()
    for source, message in (("film.mp4", r"pip install 'imageio[ffmpeg]'"), ("empty", "empty has no frames")):
        with pytest.raises(typer.Exit):
            example.main(tmp_path / source, model)
        assert message in capsys.readouterr().err
