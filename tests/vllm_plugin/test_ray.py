"""The examples for Ray, with the model in the package: a folder becomes a dataset, and two replicas answer."""

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from paths import EXAMPLES
from patience import PATIENCE, wait_until
from released_folders import write_release
from serving import SHAPE_QUESTION, circle_png, png, url_of, user

from visualrwkv_hf import bundled_model

pytest.importorskip("ray")
pytest.importorskip("ray.data.llm")

COLOURS = ("red", "green", "blue", "yellow", "black", "white")
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="module")
def expected():
    """What `generate` answers about each colour."""
    import io

    import torch
    from PIL import Image

    from visualrwkv_hf import VisualRWKVForConditionalGeneration, VisualRWKVProcessor

    folder = bundled_model()
    processor = VisualRWKVProcessor.from_pretrained(folder)
    model = VisualRWKVForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    found = {}
    for colour in COLOURS:
        image = Image.open(io.BytesIO(circle_png(colour)))
        content = [{"type": "image", "image": image}, {"type": "text", "text": SHAPE_QUESTION}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
        found[colour] = processor.decode(output, skip_special_tokens=True).strip()
    assert len(set(found.values())) > 3
    return found


def ran(command: list) -> subprocess.CompletedProcess:
    """Run a command to its end, with what Ray and vLLM need in the environment."""
    return subprocess.run(
        list(map(str, command)),
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def test_a_folder_becomes_a_dataset_and_what_is_there_stays(tmp_path, expected):
    pictures, output = tmp_path / "pictures", tmp_path / "captions"
    (pictures / "inner").mkdir(parents=True)
    output.mkdir()
    for colour in COLOURS:
        (pictures / ("inner" if colour == "white" else "") / f"{colour}.png").write_bytes(circle_png(colour))
    (pictures / "broken.png").write_bytes(circle_png("red")[:60])
    (output / "earlier.json").write_text(
        json.dumps({"picture": "red.png", "text": "from an earlier run"}) + "\n"
    )
    command = [
        sys.executable,
        EXAMPLES / "ray_caption.py",
        pictures,
        output,
        "--model",
        bundled_model(),
        "--cpu",
    ]
    command += ["--question", SHAPE_QUESTION, "--block", "2", "--dtype", "float32", "--tokens", "8"]
    done = ran(command)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "6 pictures; 0 of them without text." in done.stdout
    files = list(output.glob("*.json"))
    assert len(files) == 4, "three blocks of at most two pictures, and the earlier file"
    rows = [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]
    texts = {row["picture"].split("/")[-1].removesuffix(".png"): row["text"] for row in rows}
    assert len(rows) == 7 and texts == expected | {"red": "from an earlier run", "broken": ""}
    (broken,) = (row for row in rows if row["picture"] == "broken.png")
    assert "cannot be read as a picture" in broken["error"]
    command[command.index(SHAPE_QUESTION)] = "Another question?"
    again = ran(command)
    assert again.returncode and "was begun with" in again.stderr


def test_a_picture_that_vllm_refuses_has_an_error_and_the_others_a_text(tmp_path):
    """A picture of v7.04 takes 4 tokens for each tile of 56 x 56 pixels here."""
    model = write_release(tmp_path / "model", "v7.04")
    pictures, output = tmp_path / "pictures", tmp_path / "captions"
    pictures.mkdir()
    for name, side in (("large", 560), ("small", 56)):
        (pictures / f"{name}.png").write_bytes(png("red", side, side))
    command = [sys.executable, EXAMPLES / "ray_caption.py", pictures, output, "--model", model, "--cpu"]
    command += ["--dtype", "float32", "--tokens", "8", "--max-model-len", "256"]
    for said in ("2 pictures; 0 of them without text.", "Every picture has its text."):
        done = ran(command)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        assert said in done.stdout
    lines = [line for file in output.glob("*.json") for line in file.read_text("utf-8").splitlines()]
    large, small = sorted(map(json.loads, lines), key=lambda row: row["picture"])
    assert large.keys() == small.keys() == {"picture", "text", "error"}
    assert not large["text"] and "longer than the maximum model length of 256" in large["error"]
    assert small["text"] and not small["error"]


def test_two_replicas_answer(tmp_path, expected):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        EXAMPLES / "ray_serve.py",
        "--model",
        bundled_model(),
        "--cpu",
        "--replicas",
        "2",
    ]
    command += ["--name", "bundled", "--dtype", "float32", "--port", port]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            list(map(str, command)), stdout=output, stderr=output, env=os.environ | ENVIRONMENT
        )
    try:

        def is_ready() -> bool:
            assert process.poll() is None, log.read_text()[-4000:]
            return "Serving bundled at" in log.read_text()

        wait_until(is_ready, "the start of the replicas", 0.5)
        assert ": 2 running" in log.read_text()
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=PATIENCE)

        def answer(colour: str) -> str:
            reply = client.chat.completions.create(
                model="bundled",
                messages=[user(SHAPE_QUESTION, url_of(circle_png(colour)))],
                max_tokens=8,
                temperature=0,
            )
            return reply.choices[0].message.content.strip()

        with ThreadPoolExecutor(12) as pool:
            assert list(pool.map(answer, COLOURS * 2)) == [expected[colour] for colour in COLOURS * 2]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE)
