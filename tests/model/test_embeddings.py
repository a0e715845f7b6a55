"""Embeddings: one vector for what a model has read, the same alone and in a batch, whatever the padding."""

import pytest
import torch
from chats import MODELS, TOWERS, batch_of, inputs_of, picture, user
from tiny import awake, text_config
from tiny_training import tiny_model, tiny_processor
from transformers import pipeline

from visualrwkv_hf import VisualRWKVForCausalLM

KINDS = MODELS | TOWERS
"""One for each kind of release."""
QUESTIONS = ["Is it red?", "Is it a cat, or is it a dog?", "What?"]
EXACT = dict(rtol=0, atol=1e-5)
"""float32; a batch of other rows adds up in another order."""
STATE = dict(rtol=1e-3, atol=1e-4)
"""A WKV state sums over all tokens, so its numbers are larger."""


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return tiny_model(**KINDS[request.param]).requires_grad_(False)


@pytest.fixture(scope="module")
def rwkv7():
    return tiny_model(**KINDS["rwkv7"]).requires_grad_(False)


@pytest.mark.parametrize("pooling", ["last", "mean", "state"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_of_a_batch_is_embedded_as_alone(model, pooling, side):
    processor = tiny_processor(model)
    chats = [[user(question, colour)] for question, colour in zip(QUESTIONS, ("red", "blue", "green"))]
    inputs = batch_of(processor, chats, side)
    assert len(set(inputs["attention_mask"].sum(1).tolist())) > 1
    together = model.embed(inputs, pooling=pooling, normalize=False)
    assert together.dtype == torch.float32
    for row, chat in zip(together, chats):
        alone = model.embed(inputs_of(processor, *chat), pooling=pooling, normalize=False)[0]
        torch.testing.assert_close(row, alone, **STATE if pooling == "state" else EXACT)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_vectors_are_what_a_forward_and_a_state_hold(model):
    inputs = inputs_of(tiny_processor(model), user("What is it?", "red"))
    outputs = model.model(**inputs, output_hidden_states=True, use_cache=True)
    for layer in (-1, 0, 1, 2):
        hidden = outputs.hidden_states[layer][0]
        for pooling, wanted in (("last", hidden[-1]), ("mean", hidden.mean(0))):
            found = model.embed(inputs, pooling=pooling, layer=layer, normalize=False)
            torch.testing.assert_close(found[0], wanted, **EXACT)
            length = torch.linalg.vector_norm(wanted)
            torch.testing.assert_close(
                model.embed(inputs, pooling=pooling, layer=layer)[0], wanted / length, **EXACT
            )
    for layer, block in ((-1, 1), (1, 0), (2, 1)):
        found = model.embed(inputs, pooling="state", layer=layer, normalize=False)
        states = outputs.past_key_values.layer_tensors()[block]["wkv"]
        torch.testing.assert_close(found[0], states.flatten(), rtol=0, atol=0)


def test_pictures_texts_and_both(rwkv7):
    """Without its head and as a text model, too; in bfloat16 the vectors are float32."""
    processor = tiny_processor(rwkv7)
    size = rwkv7.config.text_config.hidden_size
    pictures = [picture("red"), picture("blue")]
    seen = rwkv7.embed(processor(images=pictures, text=[processor.image_token] * 2, return_tensors="pt"))
    read = rwkv7.embed(
        processor.tokenizer(["a dot", "a long line"], padding=True, return_tensors="pt"), pooling="mean"
    )
    assert seen.shape == read.shape == (2, size)
    torch.testing.assert_close(torch.linalg.vector_norm(seen, dim=1), torch.ones(2), **EXACT)
    ids = processor.tokenizer("a dot", return_tensors="pt")
    for part in (rwkv7.model, rwkv7.model.language_model):
        torch.testing.assert_close(part.embed(ids), rwkv7.embed(ids), rtol=0, atol=0)
    text = awake(VisualRWKVForCausalLM(text_config(7, vocab_size=1024))).bfloat16()
    assert text.embed(ids, pooling="state").dtype == text.embed(ids).dtype == torch.float32


def test_what_padding_holds_does_not_matter(rwkv7):
    ids = torch.tensor([[5, 6, 7, 900, 901]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    for pooling in ("last", "mean"):
        found = rwkv7.embed({"input_ids": ids, "attention_mask": mask}, pooling=pooling)
        torch.testing.assert_close(found, rwkv7.embed({"input_ids": ids[:, :3]}, pooling=pooling), **EXACT)


def test_a_gradient_reaches_pixels_and_weights():
    model = tiny_model(**MODELS["rwkv7"])
    processor = tiny_processor(model)
    for pooling in ("last", "mean"):
        inputs = processor(images=picture(), text=processor.image_token, return_tensors="pt")
        inputs["pixel_values"].requires_grad_()
        model.embed(inputs, pooling=pooling)[0, 0].backward()
        assert inputs["pixel_values"].grad.abs().max() > 0
        assert model.model.multi_modal_projector.parameters().__next__().grad.abs().max() > 0


def test_pipelines(rwkv7):
    """transformers' own: every token's hidden state for a text, every patch's features for a picture."""
    processor = tiny_processor(rwkv7)
    extract = pipeline("feature-extraction", model=rwkv7.model, tokenizer=processor.tokenizer)
    ids = processor.tokenizer("a dot", return_tensors="pt")
    wanted = rwkv7.model(**ids).last_hidden_state
    torch.testing.assert_close(extract("a dot", return_tensors=True), wanted, rtol=0, atol=0)
    pixels = processor.image_processor(picture(), return_tensors="pt")
    tower = rwkv7.model.vision_tower
    see = pipeline("image-feature-extraction", model=tower, image_processor=processor.image_processor)
    torch.testing.assert_close(
        see(picture(), return_tensors=True), tower(**pixels).last_hidden_state, rtol=0, atol=0
    )


def test_what_cannot_be_embedded_is_refused(rwkv7):
    ids = torch.tensor([[5, 6]])
    for inputs, options, message in (
        ({"pixel_values": torch.zeros(1, 3, 56, 56)}, {}, r"needs input_ids \[B, T\].*processor.image_token"),
        ({"input_ids": ids[0]}, {}, r"needs input_ids \[B, T\]"),
        ({"input_ids": ids[:, :0]}, {}, r"the samples have \[0\]"),
        ({"input_ids": ids, "attention_mask": torch.zeros(1, 2)}, {}, r"the samples have \[0\]"),
        ({"input_ids": ids}, dict(pooling="max"), "pooling must be one of last, mean, state, got 'max'"),
        ({"input_ids": ids}, dict(layer=3), "layer must be 0 to 2, or -1"),
        ({"input_ids": ids}, dict(layer=-4), "layer must be 0 to 2, or -1"),
        ({"input_ids": ids}, dict(layer=0, pooling="state"), "layer must be 1 to 2, or -1"),
    ):
        with pytest.raises(ValueError, match=message):
            rwkv7.embed(inputs, **options)
