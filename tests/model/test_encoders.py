"""An encoder is one row: a new one, and a pair that no release has, through everything that a model does."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from mean_color import ROW, MeanColorConfig
from tiny import picture
from tiny_training import tiny_model
from transformers import ResNetConfig

from visualrwkv_hf import (
    VisualRWKVConfig,
    VisualRWKVForConditionalGeneration,
    VisualRWKVProcessor,
    VisualRWKVVisionModel,
)
from visualrwkv_hf.conversion.world_tokenizer import build_world_tokenizer
from visualrwkv_hf.encoders import ENCODERS, IMAGENET, pixel_inputs
from visualrwkv_hf.image_processing_visualrwkv import image_processor_for
from visualrwkv_hf.prompt_identity import Pictures

TOKENIZER = build_world_tokenizer()
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CLIP = {**SMALL, "image_size": 28, "patch_size": 14, "intermediate_size": 32}
DINOV2 = {**SMALL, "image_size": 28, "patch_size": 14}
RESNET = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
    "image_size": 16,
}


@pytest.fixture(params=["new", "new and siglip", "clip and dinov2", "resnet"])
def vision(request, monkeypatch) -> dict:
    """Fields of a vision configuration; those of the first two need a row that is in the table for this test."""
    if request.param.startswith("new"):
        monkeypatch.setitem(ENCODERS, "mean", ROW)
    return {
        "new": {"mean_config": {"model_type": MeanColorConfig.model_type}},
        "new and siglip": {"mean_config": {"width": 16}, "siglip_config": CLIP},
        "clip and dinov2": {"clip_config": CLIP, "dinov2_config": DINOV2},
        "resnet": {"resnet_config": RESNET},
    }[request.param]


def model_of(vision: dict) -> VisualRWKVForConditionalGeneration:
    torch.manual_seed(0)
    config = VisualRWKVConfig(
        text_config={"rwkv_version": 7, "hidden_size": 64, "num_hidden_layers": 2}, vision_config=vision
    )
    return VisualRWKVForConditionalGeneration(config).eval()


def inputs_of(processor, image, question="What?"):
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def test_a_tower_of_any_rows_of_the_table_answers(vision, tmp_path):
    """Processor, model, generate, state, save and load."""
    model = model_of(vision)
    processor = VisualRWKVProcessor.from_config(model.config, image_processor_for(model.config), TOKENIZER)
    inputs = inputs_of(processor, picture())
    names = list(model.config.vision_config.pixel_inputs.values())
    assert set(names) == {name for name in inputs if name.startswith("pixel_values")}

    options = {"max_new_tokens": 4, "do_sample": False}
    answer = model.generate(**inputs, **options)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 4
    other = inputs_of(processor, picture(seed=1))
    assert not torch.equal(model(**inputs).logits, model(**other).logits)

    chat = [{"role": "user", "content": [{"type": "image", "image": picture()}]}]
    state = model.read(processor, chat)
    assert torch.equal(model.generate(**inputs, past_key_values=state, **options), answer)
    for name in names:  # each encoder's pixels belong to what the state has read
        changed = inputs | {name: other[name]}
        with pytest.raises(ValueError, match="picture 1 is another one"):
            model.generate(**changed, past_key_values=state, **options)

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = VisualRWKVForConditionalGeneration.from_pretrained(tmp_path)
    same = inputs_of(VisualRWKVProcessor.from_pretrained(tmp_path), picture())
    assert all(torch.equal(same[name], inputs[name]) for name in names)
    assert torch.equal(again(**same).logits, model(**inputs).logits)


def test_a_new_row_is_cut_read_and_normalised_as_it_says(monkeypatch):
    monkeypatch.setitem(ENCODERS, "mean", ROW)
    config = model_of({"mean_config": {"width": 16}}).config
    tower = VisualRWKVVisionModel(config.vision_config)
    assert config.vision_config.hidden_size == 16 and config.vision_config.grid_size == 2
    assert set(tower.state_dict()) == {"mean.proj.weight", "mean.proj.bias"}
    assert image_processor_for(config).encoders == {"mean": {"size": 28, **IMAGENET}}
    pixels = torch.randn(2, 3, 28, 28)
    expected = tower.mean(pixels).last_hidden_state
    assert torch.equal(tower(pixels).last_hidden_state, expected)


def test_every_encoder_of_the_table_has_its_fields():
    config = VisualRWKVConfig()
    for name in ENCODERS:
        assert f"{name}_config" in config.vision_config.sub_configs
        assert hasattr(config.vision_config, f"{name}_config")


@pytest.mark.parametrize(
    ("size", "first", "depths"),
    [(64, False, [1, 1, 1]), (100, False, [1, 1]), (49, True, [1, 1, 1]), (33, False, [1])],
)
def test_a_resnets_grid_is_the_side_of_its_map(size, first, depths):
    """Each halving rounds up, at sizes that are no multiple of the stride too."""
    fields = {"hidden_sizes": [8] * len(depths), "depths": depths, "downsample_in_first_stage": first}
    config = VisualRWKVConfig(vision_config={"resnet_config": {**RESNET, **fields, "image_size": size}})
    tower = VisualRWKVVisionModel(config.vision_config).eval()
    features = tower(torch.randn(2, 3, size, size)).last_hidden_state
    assert features.shape == (2, config.vision_config.grid_size**2, 8)
    feature_map = tower.resnet(torch.zeros(1, 3, size, size)).last_hidden_state
    assert feature_map.shape[-1] == config.vision_config.grid_size


def test_a_resnets_gradients_reach_what_reads_its_pixels():
    """As PEFT asks for, where the weights themselves are frozen."""
    model = model_of({"resnet_config": RESNET}).requires_grad_(False)
    model.enable_input_require_grads()
    outputs = []
    model.model.vision_tower.resnet.embedder.register_forward_hook(lambda *call: outputs.append(call[-1]))
    model.model.vision_tower(torch.randn(1, 3, 16, 16))
    assert outputs[0].requires_grad and model.model.vision_tower.get_input_embeddings() is not None


def test_a_resnets_patches_are_read_row_by_row():
    config = VisualRWKVConfig(vision_config={"resnet_config": RESNET | {"image_size": 64}})
    tower = VisualRWKVVisionModel(config.vision_config).eval()
    pixels = torch.randn(1, 3, 64, 64)
    patches = tower(pixels).last_hidden_state
    feature_map = tower.resnet(pixels).last_hidden_state
    assert torch.equal(patches[0, 11], feature_map[0, :, 1, 3])  # a map of 8 x 8


def test_a_resnet_of_transformers_has_a_picture_size_here():
    stock = ResNetConfig(**{name: value for name, value in RESNET.items() if name != "image_size"})
    for given in (stock, {**stock.to_dict(), "image_size": 224}):
        config = VisualRWKVConfig(vision_config={"resnet_config": given}).vision_config
        assert (config.image_sizes, config.grid_size) == ({"resnet": 224}, 28)

    assert not hasattr(stock, "image_size")  # the caller's own stays as it is


@pytest.mark.parametrize("depths", [[1], [1, 1, 1], []])
def test_a_resnet_has_a_number_for_each_stage(depths):
    with pytest.raises(
        StrictDataclassError, match=r"resnet_config: depths .* must have a number for each stage"
    ):
        VisualRWKVConfig(vision_config={"resnet_config": RESNET | {"depths": depths}})


def test_a_frozen_resnet_keeps_its_statistics():
    """As a tower that is frozen has no other state than its weights, which an adapter or a tuned state relies on."""
    tower = VisualRWKVVisionModel(VisualRWKVConfig(vision_config={"resnet_config": RESNET}).vision_config)
    before = {name: buffer.clone() for name, buffer in tower.named_buffers()}
    tower.requires_grad_(False).train()
    tower(3 + torch.randn(4, 3, 16, 16))
    assert before and all(torch.equal(before[name], buffer) for name, buffer in tower.named_buffers())
    tower.requires_grad_(True).train()
    tower(3 + torch.randn(4, 3, 16, 16))
    assert not all(torch.equal(before[name], buffer) for name, buffer in tower.named_buffers())


def test_a_resnet_has_no_attentions_to_give():
    tower = VisualRWKVVisionModel(VisualRWKVConfig(vision_config={"resnet_config": RESNET}).vision_config)
    with pytest.raises(ValueError, match=r"the encoder resnet gives no attentions\.$"):
        tower(torch.randn(1, 3, 16, 16), output_attentions=True)


def test_the_first_encoder_reads_pixel_values():
    assert pixel_inputs(["sam", "dinov2", "siglip"]) == {
        "dinov2": "pixel_values",
        "siglip": "pixel_values_siglip",
        "sam": "pixel_values_sam",
    }
    assert pixel_inputs(["siglip"]) == {"siglip": "pixel_values"}


def test_pixels_of_an_unknown_encoder_are_refused_by_name():
    model = tiny_model()
    size = next(iter(model.config.vision_config.image_sizes.values()))
    pixels = torch.zeros(1, 3, size, size)
    ids = torch.full((1, model.config.num_image_tokens), model.config.image_token_id)
    for call in (
        lambda **more: model(ids, pixel_values=pixels, **more),
        lambda **more: model.get_image_features(pixels, **more),
        lambda **more: model.model.vision_tower(pixels, **more),
    ):
        call()
        with pytest.raises(ValueError, match=r"pixel_values_dinov3 has no use: the tower has clip"):
            call(pixel_values_dinov3=pixels)
    with pytest.raises(ValueError, match="pixel_values_dinov3"):
        model.generate(ids, pixel_values=pixels, pixel_values_dinov3=pixels, max_new_tokens=1)


@pytest.mark.parametrize("which", ["clip", "clip and dinov2"])
def test_hidden_states_and_attentions_are_given_on_request(which):
    vision = {"clip_config": CLIP} if which == "clip" else {"clip_config": CLIP, "dinov2_config": DINOV2}
    model = model_of(vision)
    pixels = {name: torch.randn(2, 3, 28, 28) for name in model.config.vision_config.pixel_inputs.values()}
    plain = model.get_image_features(**pixels)
    assert plain.hidden_states is None and plain.attentions is None
    outputs = model.get_image_features(**pixels, output_hidden_states=True)
    encoders = model.config.vision_config.encoders
    assert len(outputs.hidden_states) == sum(1 + SMALL["num_hidden_layers"] for _ in encoders)
    assert all(hidden.shape[-1] == 32 for hidden in outputs.hidden_states)
    assert torch.equal(outputs.last_hidden_state, plain.last_hidden_state)
    tower = model.model.vision_tower(**pixels, output_hidden_states=True)
    assert all(torch.equal(a, b) for a, b in zip(tower.hidden_states, outputs.hidden_states))
    as_tuple = model.get_image_features(**pixels, output_hidden_states=True, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], plain.last_hidden_state)

    with pytest.raises(
        ValueError, match=r"the encoder clip gives no attentions; .* attn_implementation='eager'"
    ):
        model.get_image_features(**pixels, output_attentions=True)
    model.set_attn_implementation("eager")
    outputs = model.get_image_features(**pixels, output_attentions=True)
    assert len(outputs.attentions) == 2 * len(encoders)
    assert all(attention.shape[:2] == (2, 4) for attention in outputs.attentions)


def test_the_pixels_of_every_encoder_are_part_of_a_pictures_hash():
    """The hash of a picture in a state: equal for equal pixels, another for any other encoder input."""
    config = VisualRWKVConfig(vision_config={"clip_config": CLIP, "dinov2_config": DINOV2})
    names = config.vision_config.pixel_inputs.values()
    pixels = {name: torch.randn(1, 3, 28, 28) for name in names}
    hashes = Pictures.of(pixels, config).hashes(torch.float32)
    assert Pictures.of(dict(pixels), config).hashes(torch.float32) == hashes
    for name in names:
        other = Pictures.of(pixels | {name: pixels[name] + 1}, config).hashes(torch.float32)
        assert other != hashes
