"""Make the chats for tests of the vLLM plugin, and get the answers of `generate` and of a vLLM engine to them."""

import io

import numpy as np
import torch
from PIL import Image
from serving import circle_png

NEW_TOKENS = 6
QUESTION = "a red square, what is to the left of it and why would it be there"
WORDS = tuple(QUESTION.split())


def picture(number: int) -> Image.Image:
    random = np.random.default_rng(number)
    height, width = random.integers(40, 150, 2)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def strange_pngs() -> dict[str, bytes]:
    """Return PNGs of a circle, by its colour: transparent, and grey of 16 bits. vLLM itself makes them all white."""
    transparent, black = (Image.open(io.BytesIO(circle_png(colour))) for colour in ("red", "black"))
    transparent.putalpha(0)
    levels = np.where(np.asarray(black.convert("L")) < 128, 257, 65535).astype(np.uint16)
    made = {}
    for colour, picture, mode in (("red", transparent, "RGBA"), ("black", Image.fromarray(levels), "I;16")):
        assert picture.mode == mode
        picture.save(file := io.BytesIO(), "PNG")
        made[colour] = file.getvalue()
    return made


def mixed_chats(count: int, new_picture=picture) -> list[list[dict]]:
    """Return chats with one picture, no picture and two pictures in turn, and with questions of 1 to 15 words."""
    chats = []
    for number in range(count):
        pictures = [new_picture(10 * number + n) for n in range((1, 0, 2)[number % 3])]
        question = " ".join(WORDS[: 1 + number * 7 % 15]) + f" {number}?"
        content = [{"type": "image", "image": image} for image in pictures]
        chats.append([{"role": "user", "content": [*content, {"type": "text", "text": question}]}])
    return chats


@torch.no_grad()
def generated(model, processor, chat) -> list[int]:
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def requests(processor, chats) -> list[dict]:
    """Return what an engine takes for each chat: the text of the chat template, and the pictures."""
    made = []
    for chat in chats:
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        request = {"prompt": text}
        if pictures := [part["image"] for part in chat[0]["content"] if part["type"] == "image"]:
            request["multi_modal_data"] = {"image": pictures}
        made.append(request)
    return made


def sampling(**options):
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=NEW_TOKENS, **options)


def answers(engine, given) -> list[list[int]]:
    return [list(done.outputs[0].token_ids) for done in engine.generate(given, sampling(), use_tqdm=False)]


def answers_after_preemption(engine, given, every: int = 3) -> list[list[int]]:
    """Return the engine's answers when all running requests are preempted after every `every` steps, up to five times.

    The engine then has to read them again.
    """
    core, found = engine.llm_engine, {}
    scheduler = core.engine_core.engine_core.scheduler
    for number, request in enumerate(given):
        core.add_request(str(number), request, sampling())
    steps = preempted = 0
    while core.has_unfinished_requests():
        for done in core.step():
            if done.finished:
                found[int(done.request_id.split("-")[0])] = list(done.outputs[0].token_ids)
        steps += 1
        if steps % every == 0 and steps <= 5 * every:
            preempted += sum(request.num_computed_tokens > 0 for request in scheduler.running)
            scheduler.reset_prefix_cache(reset_running_requests=True)
    assert preempted > 3, "no request had been read"
    return [found[number] for number in range(len(given))]
