"""Build small chats with pictures, configure the models that answer them, and count the tokens that a model reads."""

from contextlib import contextmanager

from PIL import Image, ImageDraw
from tiny import THREE_ENCODERS

GREEDY = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
FIRST = dict(scan="unidirectional", image_position="first")
MODELS = {"rwkv5": dict(version=5, **FIRST), "rwkv6": dict(version=6), "rwkv7": dict(version=7, **FIRST)}
TOWERS = {
    "three encoders": dict(version=7, vision_config=THREE_ENCODERS),
    "views of tiles": dict(version=6, vision_config=dict(THREE_ENCODERS, tile_grid=2)),
    "tiles with tokens": dict(
        version=7, compressor_num_layers=1, compressor_num_tokens=5, compressor_per_tile=True, **FIRST
    ),
}
"""MODELS has one for each generation, TOWERS one for each other way in which a release reads a picture. Both hold
arguments of `tiny_training.tiny_model`."""


def picture(colour: str = "red", width: int = 60) -> Image.Image:
    image = Image.new("RGB", (width, 56), colour)
    ImageDraw.Draw(image).ellipse((10, 10, 40, 30), fill="white")
    return image


def user(text: str | None = None, *colours: str) -> dict:
    content = [{"type": "image", "image": picture(colour)} for colour in colours]
    return {"role": "user", "content": content + ([{"type": "text", "text": text}] if text else [])}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def inputs_of(processor, *messages, **template_variables):
    return processor.apply_chat_template(
        list(messages),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **template_variables,
    )


def batch_of(processor, chats, side: str | None = None):
    """Return the inputs of several chats as a batch, padded on `side`; None means the side that the processor pads."""
    padding = {"padding": True} if side is None else {"padding": True, "padding_side": side}
    return inputs_of(processor, *chats, processor_kwargs=padding)


@contextmanager
def counted_tokens(model):
    """Yield a list that receives, at each forward of the language model, the number of tokens that it reads."""
    read: list[int] = []
    language_model = model.model.language_model
    handle = language_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    try:
        yield read
    finally:
        handle.remove()
