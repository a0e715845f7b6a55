"""A saved folder is the model again: by Auto classes, in shards, from disk, and where this package is not installed."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import awake, pixels, prompt, text_config, tiny_vlm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
)

from visualrwkv_hf import (
    StateStore,
    TunedState,
    VisualRWKVConfig,
    VisualRWKVForCausalLM,
    VisualRWKVForConditionalGeneration,
    VisualRWKVImageProcessor,
    VisualRWKVModel,
    VisualRWKVProcessor,
    VisualRWKVTextModel,
    bundled_model,
    remote_code,
)
from visualrwkv_hf.chat_template import release_chat_template
from visualrwkv_hf.conversion.world_tokenizer import build_world_tokenizer
from visualrwkv_hf.image_processing_visualrwkv import image_processor_for

MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors"}
PROCESSOR_FILES = {"chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
LANGUAGE_MODEL_CODE = {
    "channel_mix.py",
    "dispatch.py",
    "generations.py",
    "layer_state.py",
    "low_rank.py",
    "mixing.py",
    "rwkv6_time_mix.py",
    "rwkv7_time_mix.py",
    "time_mix.py",
    "token_order.py",
    "wkv.py",
}
"""What the configuration imports: its table of generations names the classes that compute them."""
CONFIG_CODE = LANGUAGE_MODEL_CODE | {
    "configuration_visualrwkv.py",
    "encoders.py",
    "image_tokens.py",
    "scan_orders.py",
}
FILM_CODE = {"film_formats.py", "film_prompts.py", "films.py", "pictures.py"}
IMAGE_CODE = CONFIG_CODE | {"image_processing_visualrwkv.py", "pictures.py", "remote_code.py"}
PROCESSOR_CODE = (
    CONFIG_CODE
    | FILM_CODE
    | {
        "chat_template.py",
        "processing_visualrwkv.py",
        "remote_code.py",
        "thin_pictures.py",
    }
)
MODEL_CODE = (
    CONFIG_CODE
    | FILM_CODE
    | {
        "cache_layer.py",
        "cache_visualrwkv.py",
        "chat_template.py",
        "decode_graph.py",
        "decode_loop.py",
        "decompression.py",
        "embedding_visualrwkv.py",
        "generation_visualrwkv.py",
        "kept_state.py",
        "loss_visualrwkv.py",
        "modeling_base.py",
        "modeling_rwkv.py",
        "modeling_vision.py",
        "modeling_visualrwkv.py",
        "placement.py",
        "prompt_identity.py",
        "reading_plan.py",
        "remote_code.py",
        "scoring_visualrwkv.py",
        "state_file.py",
        "state_store.py",
        "tuned_state.py",
    }
)
OUTSIDE = """
    import sys

    class NotInstalled:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "visualrwkv_hf":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, NotInstalled())
"""


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm()


@pytest.fixture(scope="module")
def folder(vlm, tmp_path_factory):
    """A model without a processor."""
    path = tmp_path_factory.mktemp("vlm")
    vlm.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def inputs(vlm):
    return {"input_ids": prompt(vlm), "pixel_values": pixels()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Model, processor and the folder that both were saved to, and a picture in it."""
    model = tiny_vlm(vocab_size=65536)
    tokenizer = build_world_tokenizer()
    processor = VisualRWKVProcessor.from_config(model.config, image_processor_for(model.config), tokenizer)
    path = tmp_path_factory.mktemp("whole")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return model, processor, path


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def assert_same_weights(model, expected):
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype and ours[name].equal(theirs[name]) for name in ours)


# Auto classes, with the package imported


@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModelForMultimodalLM])
def test_a_model_is_itself_again(auto, vlm, folder, inputs):
    loaded = auto.from_pretrained(folder)
    assert type(loaded) is VisualRWKVForConditionalGeneration and not loaded.training
    assert_same_weights(loaded, vlm)
    assert logits_of(loaded, inputs).equal(logits_of(vlm, inputs))
    assert type(AutoConfig.from_pretrained(folder)) is VisualRWKVConfig


def test_a_base_model_comes_from_a_whole_one_and_goes_back(vlm, folder, inputs, tmp_path):
    base = AutoModel.from_pretrained(folder)
    assert type(base) is VisualRWKVModel
    assert_same_weights(base, vlm.model)
    base.save_pretrained(tmp_path)
    assert_same_weights(AutoModel.from_pretrained(tmp_path), vlm.model)
    with pytest.raises(ValueError, match=r"lacks 1 tensors of .*: lm_head\.weight"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


@pytest.mark.parametrize("version", [5, 6, 7])
def test_a_language_model_is_itself_again(version, tmp_path):
    model = awake(VisualRWKVForCausalLM(text_config(version)))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is VisualRWKVForCausalLM
    assert_same_weights(loaded, model)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is VisualRWKVTextModel
    assert_same_weights(base, model.model)
    ids = {"input_ids": torch.arange(1, 9)[None]}
    assert logits_of(loaded, ids).equal(logits_of(model, ids))


def test_shards_make_no_difference(vlm, inputs, tmp_path):
    vlm.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert_same_weights(loaded, vlm)
    assert logits_of(loaded, inputs).equal(logits_of(vlm, inputs))


def test_saving_again_in_one_file_leaves_no_shards(vlm, tmp_path):
    vlm.save_pretrained(tmp_path, max_shard_size="100KB")
    vlm.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert_same_weights(AutoModelForImageTextToText.from_pretrained(tmp_path), vlm)


def test_dtype_is_the_checkpoints_or_as_asked(vlm, folder, tmp_path):
    halved = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    wanted = {name: tensor.bfloat16() for name, tensor in vlm.state_dict().items()}
    assert all(tensor.equal(wanted[name]) for name, tensor in halved.state_dict().items())
    halved.save_pretrained(tmp_path)
    assert_same_weights(AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="auto"), halved)
    assert AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").dtype == torch.float32


# Where the weights lie

ON_DISK = {
    "model.vision_tower": "cpu",
    "model.multi_modal_projector": "disk",
    "model.language_model.embed_tokens": "cpu",
    "model.language_model.embed_norm": "cpu",
    "model.language_model.layers.0": "disk",
    "model.language_model.layers.1": "cpu",
    "model.language_model.layers.2": "disk",
    "model.language_model.norm": "cpu",
    "lm_head": "disk",
}


@pytest.mark.parametrize(
    "placement",
    [
        {"device_map": {"": "cpu"}},
        {"device_map": ON_DISK},
        {"device_map": "auto", "max_memory": {"cpu": "120KB"}},
    ],
    ids=["cpu", "some on disk", "little memory"],
)
def test_a_device_map_makes_no_difference(placement, vlm, folder, inputs, tmp_path):
    loaded = AutoModelForImageTextToText.from_pretrained(folder, offload_folder=tmp_path / "off", **placement)
    on_disk = placement["device_map"] != {"": "cpu"}
    assert any(weight.is_meta for weight in loaded.parameters()) == on_disk
    assert logits_of(loaded, inputs).equal(logits_of(vlm, inputs))
    greedy, stores = {"max_new_tokens": 5, "do_sample": False}, (StateStore(), StateStore())
    assert loaded.generate(**inputs, **greedy).equal(vlm.generate(**inputs, **greedy))
    torch.testing.assert_close(loaded.embed(inputs), vlm.embed(inputs))
    scores = [model.score(inputs, [[5, 6], [5, 7, 8]]).log_probs for model in (loaded, vlm)]
    torch.testing.assert_close(*scores)
    states = [
        model.generate(**inputs, **greedy, state_store=store) for model, store in zip((loaded, vlm), stores)
    ]
    assert states[0].equal(states[1])
    tuned = TunedState.of(vlm)
    assert loaded.generate(**inputs, **greedy, initial_state=tuned).equal(vlm.generate(**inputs, **greedy))
    assert not any(tensor.is_meta for tensor in tuned.parameters())


# The processor


def test_a_processor_alone_is_a_folder(whole, tmp_path):
    _, processor, _ = whole
    processor.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == PROCESSOR_FILES | PROCESSOR_CODE
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["auto_map"] == {"AutoProcessor": "processing_visualrwkv.VisualRWKVProcessor"}
    assert type(AutoProcessor.from_pretrained(tmp_path)) is VisualRWKVProcessor
    assert AutoTokenizer.from_pretrained(tmp_path).image_token_id == 65535


def test_a_processor_takes_the_code_of_our_image_processor_along(whole, tmp_path):
    _, processor, _ = whole
    VisualRWKVProcessor(VisualRWKVImageProcessor(), processor.tokenizer).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == PROCESSOR_CODE | IMAGE_CODE


def test_an_image_processor_alone_is_a_folder(tmp_path):
    processor = VisualRWKVImageProcessor(tiling="closest", encoders=SIGLIP)
    processor.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"preprocessor_config.json"} | IMAGE_CODE
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is VisualRWKVImageProcessor and loaded.to_dict() == processor.to_dict()


SIGLIP = {"siglip": {"size": 56, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}}


# Where this package is not installed


def run_outside(script, tmp_path, *arguments):
    """stdout of a script that cannot import this package and reaches no Hub."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "PYTHONIOENCODING": "utf-8",
        "OMP_NUM_THREADS": "1",
    }
    source = textwrap.dedent(OUTSIDE) + textwrap.dedent(script)
    command = [sys.executable, "-c", source, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


def chat_about(picture):
    content = [{"type": "image", "image": str(picture)}, {"type": "text", "text": "What is this?"}]
    return [{"role": "user", "content": content}]


def answer(model, processor, chat):
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :])


REMOTE = """
    import json
    from pathlib import Path

    import torch
    from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

    torch.set_num_threads(1)
    folder, again, chat = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])

    def answer(folder):
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        return model, processor, processor.decode(output[0, inputs["input_ids"].shape[1] :])

    model, processor, first = answer(folder)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    model.save_pretrained(again)
    processor.save_pretrained(again)
    again_model, _, second = answer(again)
    assert all(weight.equal(other) for weight, other in zip(model.parameters(), again_model.parameters()))
    base = AutoModel.from_pretrained(again, trust_remote_code=True)
    assert type(base).__name__ == "VisualRWKVModel"
    pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
    options = {"max_new_tokens": 12, "do_sample": False}
    third = pipe(text=chat, return_full_text=False, generate_kwargs=options)[0]["generated_text"]
    assert not any(name.split(".")[0] == "visualrwkv_hf" for name in sys.modules)
    print(json.dumps([first, second, third]))
"""


def test_a_folder_answers_where_the_package_is_not_installed(whole, tmp_path):
    model, processor, path = whole
    Image.effect_mandelbrot((70, 60), (-2, -1, 1, 1), 50).convert("RGB").save(tmp_path / "picture.png")
    chat = chat_about(tmp_path / "picture.png")
    expected = answer(model, processor, chat)
    again = tmp_path / "again"
    first, second, third = json.loads(run_outside(REMOTE, tmp_path, path, again, json.dumps(chat)))
    assert expected and first == second == expected
    assert third == processor.decode(
        processor.tokenizer.encode(expected, add_special_tokens=False), skip_special_tokens=True
    )
    wanted = MODEL_FILES | PROCESSOR_FILES | MODEL_CODE | PROCESSOR_CODE
    assert {file.name for file in path.iterdir()} == wanted
    assert {file.name for file in again.iterdir()} == wanted
    # The folder that was saved there is the same for who has the package.
    assert answer(
        AutoModelForImageTextToText.from_pretrained(again), AutoProcessor.from_pretrained(again), chat
    ) == (expected)


REMOTE_PARTS = """
    import torch
    from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoProcessor

    torch.set_num_threads(1)
    text, image, both = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(text, trust_remote_code=True)
    print(model(torch.arange(1, 9)[None]).logits.double().sum().item())
    alone = AutoImageProcessor.from_pretrained(image, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(both, trust_remote_code=True)
    assert processor.image_processor.to_dict() == alone.to_dict()
    processor.save_pretrained(both + "/again")
    again = AutoProcessor.from_pretrained(both + "/again", trust_remote_code=True)
    assert again.to_dict() == processor.to_dict()
    print(type(again.image_processor).__module__.split(".")[0], again.image_processor.tiling)
"""


def test_parts_load_where_the_package_is_not_installed(whole, tmp_path):
    text, image, both = (tmp_path / name for name in ("text", "image", "both"))
    model = awake(VisualRWKVForCausalLM(text_config(7)))
    model.save_pretrained(text)
    image_processor = VisualRWKVImageProcessor(tiling="closest", encoders=SIGLIP)
    image_processor.save_pretrained(image)
    processor = VisualRWKVProcessor.from_config(whole[0].config, image_processor, whole[1].tokenizer)
    processor.save_pretrained(both)
    total, kind = run_outside(REMOTE_PARTS, tmp_path, text, image, both).splitlines()
    assert float(total) == model(torch.arange(1, 9)[None]).logits.double().sum().item()
    assert kind == "transformers_modules closest"
    assert type(AutoProcessor.from_pretrained(both).image_processor) is VisualRWKVImageProcessor
    # Saving once more elsewhere keeps to the package's own code.
    again = AutoProcessor.from_pretrained(both / "again")
    assert again.image_processor.to_dict() == image_processor.to_dict()


def test_every_class_of_an_auto_map_can_be_found():
    targets = {target for auto_map in remote_code.MODEL_CODE.values() for target in auto_map.values()}
    targets |= set(remote_code.PROCESSOR_CODE.values()) | set(remote_code.IMAGE_PROCESSOR_CODE.values())
    for target in targets:
        module, name = target.split(".")
        assert hasattr(__import__(f"visualrwkv_hf.{module}", fromlist=[name]), name), target


def test_needed_modules_are_followed_to_the_end():
    assert {f"{name}.py" for name in remote_code.needed_modules({"modeling_visualrwkv"})} == MODEL_CODE
    assert {f"{name}.py" for name in remote_code.needed_modules({"processing_visualrwkv"})} == PROCESSOR_CODE


def test_saved_code_is_not_written_through_links(tmp_path, caplog):
    (tmp_path / "elsewhere.py").write_text("mine")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "scan_orders.py").symlink_to(tmp_path / "elsewhere.py")
    (tmp_path / "model" / "encoders.py").symlink_to(tmp_path / "nothing.py")
    remote_code.copy_code(tmp_path / "model", remote_code.PROCESSOR_CODE)
    assert (tmp_path / "elsewhere.py").read_text() == "mine" and not (tmp_path / "nothing.py").exists()
    for name in ("scan_orders.py", "encoders.py"):
        assert not (tmp_path / "model" / name).is_symlink()
        source = Path(remote_code.__file__).with_name(name)
        assert (tmp_path / "model" / name).read_bytes() == source.read_bytes()
    assert not caplog.records


def test_a_users_own_file_is_kept_and_named(tmp_path, caplog):
    (tmp_path / "pictures.py").write_text("mine")
    remote_code.copy_code(tmp_path, remote_code.PROCESSOR_CODE)
    assert (tmp_path / "pictures.py.old").read_text() == "mine"
    assert "pictures.py had other contents" in caplog.text and "*.py.old" in caplog.text
    caplog.clear()
    remote_code.copy_code(tmp_path, remote_code.PROCESSOR_CODE)  # now they are the same
    assert not caplog.records and (tmp_path / "pictures.py.old").read_text() == "mine"


def test_a_processor_is_made_by_code_that_came_from_a_folder(whole, tmp_path):
    """`from_config` reads no file beside the code: transformers copies code alone."""
    _, _, folder = whole
    script = (
        OUTSIDE
        + f"""
    from transformers import AutoConfig, AutoProcessor
    folder = {str(folder)!r}
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    made = type(processor).from_config(config, processor.image_processor, processor.tokenizer)
    assert made.chat_template == processor.chat_template
    print("made", type(made).__module__)
    """
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "made transformers_modules" in done.stdout


@pytest.mark.parametrize("trust", [None, False, True])
def test_the_bundled_model_loads_offline_whatever_is_trusted(trust, monkeypatch):
    """Its `auto_map` names classes for those who look for them there, TRL for one; its code is the package's."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = bundled_model()
    options = {} if trust is None else {"trust_remote_code": trust}
    config = AutoConfig.from_pretrained(folder, **options)
    assert config.auto_map == remote_code.MODEL_CODE["visualrwkv"]
    assert type(config) is VisualRWKVConfig
    model = AutoModelForImageTextToText.from_pretrained(folder, **options)
    assert type(model) is VisualRWKVForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(folder, **options)) is VisualRWKVProcessor


def test_a_save_with_a_push_writes_the_weights_once(tmp_path, monkeypatch):
    from transformers import modeling_utils

    from visualrwkv_hf import modeling_base

    written, pushed, write = [], [], modeling_utils.safe_save_file
    monkeypatch.setattr(
        modeling_utils,
        "safe_save_file",
        lambda *args, **options: written.append(1) or write(*args, **options),
    )
    monkeypatch.setattr(modeling_base, "push_saved", lambda *args, **options: pushed.append(args[2]))
    tiny_vlm().save_pretrained(tmp_path, push_to_hub=True, repo_id="ann/one")
    assert len(written) == 1 and pushed == ["ann/one"]


def test_the_bundled_chat_template_is_that_of_the_source():
    position = VisualRWKVConfig.from_pretrained(bundled_model()).image_position
    saved = (bundled_model() / "chat_template.jinja").read_text("utf-8")
    assert saved == release_chat_template(position)


def test_code_in_a_folder_is_left_alone_where_it_is_the_package(tmp_path):
    """Copying a file onto itself would empty it."""
    for name in ("remote_code.py", "scan_orders.py"):
        (tmp_path / name).symlink_to(remote_code.__file__.replace("remote_code.py", name))
    remote_code.copy_code(tmp_path, {"AutoConfig": "scan_orders.Any"})
    assert (tmp_path / "scan_orders.py").stat().st_size > 1000


# Refusals


def save_with(model, path, **changes):
    state = {name: tensor for name, tensor in model.state_dict().items() if changes.get(name, 0) is not None}
    model.save_pretrained(path, state_dict=state | {k: v for k, v in changes.items() if v is not None})


NAN = torch.full((64, 32), float("nan"))
PROJECTOR = "model.multi_modal_projector.proj.weight"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({PROJECTOR: None}, rf"lacks 1 tensors of VisualRWKVForConditionalGeneration: {PROJECTOR}"),
        (
            {"model.vision_tower.odd": torch.ones(2)},
            r"has 1 tensors that .* does not: model\.vision_tower\.odd",
        ),
        ({PROJECTOR: torch.ones(3, 4)}, rf"another shape than .*: {PROJECTOR} \[3, 4\] for \[64, 32\]"),
        ({PROJECTOR: NAN}, rf"NaN or infinite weights in 1 tensors: {PROJECTOR}"),
    ],
    ids=["missing", "unexpected", "misshapen", "NaN"],
)
def test_a_folder_that_is_not_the_model_is_refused(changes, message, vlm, tmp_path):
    save_with(vlm, tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


# Embeddings, checkpointing


def test_gradient_checkpointing_gives_the_same_gradients(vlm, folder, inputs):
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == vlm.config.image_token_id, -100)
    gradients = []
    for checkpointing in (False, True):
        model = VisualRWKVForConditionalGeneration.from_pretrained(folder).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
            kinds = {type(layer).__name__ for layer in layers}
            assert {"RwkvBlock", "CLIPEncoderLayer"} <= kinds
        model(**inputs, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    assert any("vision_tower" in name for name in plain)
    for name in plain:  # float32; the recomputed forward is the same
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-5, atol=1e-6, msg=name)


def test_embeddings_can_be_resized(folder, inputs):
    model = VisualRWKVForConditionalGeneration.from_pretrained(folder)
    before = logits_of(model, inputs)
    assert model.get_input_embeddings() is model.model.language_model.embed_tokens
    model.resize_token_embeddings(330)
    assert model.config.text_config.vocab_size == 330 and model.lm_head.weight.shape == (330, 64)
    assert logits_of(model, inputs)[..., :320].equal(before)


def test_resized_embeddings_are_saved(folder, inputs, tmp_path):
    model = VisualRWKVForConditionalGeneration.from_pretrained(folder)
    model.resize_token_embeddings(330)
    model.save_pretrained(tmp_path)
    assert_same_weights(AutoModelForImageTextToText.from_pretrained(tmp_path), model)


def test_embedding_and_head_are_tied_only_if_asked(vlm, folder, tmp_path):
    loaded = VisualRWKVForConditionalGeneration.from_pretrained(folder)
    assert not loaded.lm_head.weight.equal(loaded.get_input_embeddings().weight)
    tied = tiny_vlm(tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    tied.save_pretrained(tmp_path)
    loaded = VisualRWKVForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert_same_weights(loaded, tied)
