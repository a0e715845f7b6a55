"""Requests and tokens a second that a server answers to 1, 4, 16 and 32 clients at once, each about its own picture.

    python examples/benchmark_serving.py --server visualrwkv --server vllm --server llava

Three servers, one after another: `visualrwkv serve`, `vllm serve` of the same model, and `vllm serve` of a LLaVA with
as many layers of the same width, so with about as many parameters. All have random weights in float32. `--model` takes
a folder for the first two instead, or "bundled", the model inside the package. Each client sends its next question when
it has the whole answer to the last one. On a CPU every server has as many threads as OMP_NUM_THREADS says.
"""

import base64
import io
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NamedTuple

import httpx
import torch
import typer
from benchmarking import machine, markdown_table, report
from PIL import Image
from transformers import AutoTokenizer

from visualrwkv_hf import (
    VisualRWKVConfig,
    VisualRWKVForConditionalGeneration,
    VisualRWKVProcessor,
    bundled_model,
)
from visualrwkv_hf.conversion.world_tokenizer import build_world_tokenizer
from visualrwkv_hf.image_processing_visualrwkv import image_processor_for

SHAPES = {
    "tiny": {"num_hidden_layers": 2, "hidden_size": 128},
    "0.1B": {"num_hidden_layers": 12, "hidden_size": 768},
}
PIXELS, PATCH = 112, 14
ENCODER = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": PIXELS,
    "patch_size": PATCH,
}
LLAVA_TEMPLATE = (
    "{% for message in messages %}User: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %}\n\n{% endfor %}Assistant:"
)
SERVERS = ("visualrwkv", "vllm", "llava")
SECONDS_TO_START = 600
ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Environment of vLLM's build for a CPU: it may use 1 GiB for states and caches, and compute on every core."""


PILLOWS_PIXTRAL = """
    import importlib.abc, importlib.util, sys
    from pathlib import Path

    NAME = "transformers.models.pixtral.image_processing_pixtral"

    class WithPillow(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name == NAME:
                file = Path(path[0]) / "image_processing_pil_pixtral.py"
                return importlib.util.spec_from_file_location(name, file)

    sys.meta_path.insert(0, WithPillow())
"""


class Rates(NamedTuple):
    """Complete answers per second, and their tokens per second."""

    requests: float
    tokens: float


def write_visualrwkv(folder: Path, shape: str) -> Path:
    """Write a VisualRWKV-7 with random weights, and its processor."""
    config = VisualRWKVConfig(
        text_config={"rwkv_version": 7, **SHAPES[shape]}, vision_config={"siglip_config": ENCODER}
    )
    model = VisualRWKVForConditionalGeneration(config)
    for weight in model.parameters():
        if weight.ndim == 2 and not weight.any():
            torch.nn.init.normal_(weight, std=0.02)
    model.save_pretrained(folder)
    processor = VisualRWKVProcessor.from_config(config, image_processor_for(config), build_world_tokenizer())
    processor.save_pretrained(folder)
    return folder


def write_llava(folder: Path, like: Path) -> Path:
    """Write a LLaVA-1.5 as wide and deep as a VisualRWKV, with its tokenizer and a processor, but without weights."""
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaProcessor

    config = VisualRWKVConfig.from_pretrained(like)
    tokenizer = AutoTokenizer.from_pretrained(like)
    size, encoder = config.text_config, config.vision_config.siglip_config
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    text = {name: getattr(size, name) for name in same} | {
        "model_type": "llama",
        "intermediate_size": 2
        * size.intermediate_size
        // 3,  # a Llama has three such matrices, an RWKV-7 two
        "max_position_embeddings": 4096,
        "eos_token_id": 0,
        "bos_token_id": 0,
        "pad_token_id": 0,
    }
    vision = {name: getattr(encoder, name) for name in ENCODER} | {"model_type": "clip_vision_model"}
    pixels, patch = encoder.image_size, encoder.patch_size
    llava = LlavaConfig(
        text_config=text,
        vision_config=vision | {"projection_dim": 64},
        image_token_index=config.image_token_id,
        image_seq_length=(pixels // patch) ** 2,
        architectures=["LlavaForConditionalGeneration"],
    )
    llava.save_pretrained(folder)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": pixels}, crop_size=pixels),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    processor.save_pretrained(folder)
    return folder


def without_torchvision(folder: Path) -> dict[str, str]:
    """Return the environment in which vLLM's LLaVA can be imported where torchvision cannot be installed.

    It needs one function of Pixtral's picture processor, which transformers has for Pillow as well. Each process of
    vLLM imports `sitecustomize`, which puts that one in the other's place.
    """
    if find_spec("torchvision"):
        return {}
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(textwrap.dedent(PILLOWS_PIXTRAL), "utf-8")
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


@contextmanager
def serving(server: str, folder: Path, clients: int, log: Path) -> Iterator[str]:
    """Run a server until the block ends, and give its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    if server == "visualrwkv":
        command = ["visualrwkv_hf.cli", "serve", str(folder), "--port", port, "--dtype", "float32"]
    else:
        command = [
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(folder),
            "--port",
            port,
            "--host",
            "127.0.0.1",
        ]
        command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]
        command += ["--max-num-seqs", str(clients), "--served-model-name", folder.name]
        command += ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"]
    environment = ON_CPU | {"HF_HUB_OFFLINE": "1"} | os.environ
    if server == "llava":
        command += ["--load-format", "dummy"]
        environment |= without_torchvision(log.parent / "without_torchvision")
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], stdout=output, stderr=output, env=environment
        )
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + SECONDS_TO_START
        while True:
            has_stopped = process.poll() is not None
            if has_stopped or time.monotonic() > deadline:
                what = "has stopped" if has_stopped else f"does not answer after {SECONDS_TO_START} s"
                raise RuntimeError(f"The server {what}:\n{log.read_text('utf-8')[-4000:]}")
            try:
                if httpx.get(f"{address}/health", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def question(number: int, model: str, tokens: int) -> dict:
    """A question about a picture that no other request has."""
    generator, file = random.Random(number), io.BytesIO()
    picture = Image.frombytes("RGB", (96, 96), generator.randbytes(3 * 96 * 96))
    picture.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": f"What is in picture {number}?"},
    ]
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "temperature": 0,
    }


NUMBERS = itertools.count()
"""Numbers the questions to all servers: a server keeps what it has read, so no two may be about the same picture."""


def rates(address: str, model: str, clients: int, seconds: float, tokens: int) -> Rates:
    """Let so many clients ask for so many seconds; answers that are under way then are waited for and counted."""
    done, failures = [], []
    start = time.perf_counter()

    def ask() -> None:
        try:
            with httpx.Client(timeout=600) as client:
                while time.perf_counter() < start + seconds:
                    body = question(next(NUMBERS), model, tokens)
                    reply = client.post(f"{address}/v1/chat/completions", json=body)
                    reply.raise_for_status()
                    done.append(reply.json()["usage"]["completion_tokens"])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise RuntimeError(f"{len(failures)} of {clients} clients got no answer: {failures[0]}")
    elapsed = time.perf_counter() - start
    return Rates(len(done) / elapsed, sum(done) / elapsed)


def main(
    server: Annotated[
        list[str] | None, typer.Option(help="One of those above; several. Default: all.")
    ] = None,
    clients: Annotated[
        list[int] | None, typer.Option(help="At once; several. Default: 1, 4, 16 and 32.")
    ] = None,
    shape: Annotated[
        str, typer.Option(help=f"Language model of random weights: {', '.join(SHAPES)}.")
    ] = "0.1B",
    model: Annotated[
        Path | None, typer.Option(help='A model folder, or "bundled", in place of random weights.')
    ] = None,
    seconds: Annotated[float, typer.Option(help="Of new questions, for each number of clients.")] = 10,
    tokens: Annotated[int, typer.Option(help="The longest answer.")] = 64,
    markdown: Annotated[Path | None, typer.Option(help="Write the table to this file.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
) -> None:
    """Compare servers."""
    server, clients = server or list(SERVERS), clients or [1, 4, 16, 32]
    folder_of_model = bundled_model() if str(model) == "bundled" else model
    if folder_of_model and not folder_of_model.is_dir():
        raise typer.BadParameter(f"--model: there is no folder {folder_of_model}")
    if unknown := set(server) - set(SERVERS):
        raise typer.BadParameter(f"server must be of {', '.join(SERVERS)}, got {', '.join(unknown)}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        random_model = Path(folder) / "model"
        if not folder_of_model:
            write_visualrwkv(random_model, shape)
        for name in server:
            place = folder_of_model or random_model
            if name == "llava":
                place = write_llava(Path(folder) / "llava", like=place)
            with serving(name, place, max(clients), Path(folder) / "log") as address:
                rates(address, place.name, 1, 0.1, tokens)  # what is compiled or allocated only once
                for count in clients:
                    found = rates(address, place.name, count, seconds, tokens)
                    rows.append({"server": name, "clients": count, **found._asdict()})
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    about = machine() | {"shape": str(model or shape), "tokens": tokens}
    shown = [row | {"requests": f"{row['requests']:.2f}", "tokens": f"{row['tokens']:.1f}"} for row in rows]
    text = f"{about['shape']}, answers of at most {tokens} tokens; {about['device']}, {about['threads']} threads\n\n"
    report(text + markdown_table(shown), {"about": about, "rows": rows}, markdown, json_file)


if __name__ == "__main__":
    typer.run(main)
