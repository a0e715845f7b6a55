"""`visualrwkv info`: what it says is what the model is, and it reads no weight."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_client import client_process
from hub_server import Hub
from huggingface_hub import snapshot_download
from released_folders import released_config
from safetensors.torch import save_file
from tiny import awake, pixels, prompt, text_config
from tiny_training import save_tiny_model, tiny_model, tiny_processor
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from visualrwkv_hf import VisualRWKVCache, VisualRWKVConfig, VisualRWKVForCausalLM, accelerate_on_cpu
from visualrwkv_hf.cli.app import app
from visualrwkv_hf.configuration_visualrwkv import SIZES
from visualrwkv_hf.conversion.checkpoint import SAFETENSORS_DTYPES
from visualrwkv_hf.conversion.releases import RELEASES
from visualrwkv_hf.cpu import packed
from visualrwkv_hf.encoders import ENCODERS
from visualrwkv_hf.generations import GENERATIONS
from visualrwkv_hf.image_processing_visualrwkv import image_processor_for
from visualrwkv_hf.inference import facts, plain_folder
from visualrwkv_hf.inference.facts import facts_of, title_of
from visualrwkv_hf.inference.loading import load_config, may_be_on_hub
from visualrwkv_hf.inference.progress import in_bytes
from visualrwkv_hf.scan_orders import SCANS


def run_info(*arguments):
    return CliRunner().invoke(app, ["info", *map(str, arguments)])


@pytest.fixture(scope="module", params=[5, 6, 7])
def folder(request, tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), version=request.param)


def test_the_numbers_are_the_models(folder):
    facts = json.loads(run_info("--json", folder).stdout)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert facts["language_model"] == f"RWKV-{model.config.text_config.rwkv_version}"
    assert facts["num_parameters"] == sum(weight.numel() for weight in model.parameters())
    assert sum(facts["parameters"].values()) == facts["num_parameters"]
    parts = {"vision tower": model.model.vision_tower, "projector": model.model.multi_modal_projector}
    parts |= {"embedding": model.get_input_embeddings(), "head": model.lm_head}
    for part, module in parts.items():
        assert facts["parameters"][part] == sum(weight.numel() for weight in module.parameters())
    assert facts["num_bytes"] == 4 * facts["num_parameters"] and list(facts["dtypes"]) == ["float32"]
    assert facts["tokens_of_a_picture"] == model.config.num_image_tokens
    assert (facts["scan"], facts["image_position"]) == ("bidirectional", "middle")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_takes_as_many_bytes_as_it_says(dtype, tmp_path):
    model = tiny_model().to(dtype)
    model.save_pretrained(tmp_path)
    state = VisualRWKVCache(model.config)
    with torch.no_grad():
        model(input_ids=prompt(model), pixel_values=pixels().to(dtype), past_key_values=state)
    assert facts_of(tmp_path)["state_bytes"] == state.nbytes


def test_a_person_reads_a_table(folder):
    result = run_info(folder)
    assert result.exit_code == 0, result.stderr
    for words in (
        "2 layers of width 32",
        "1,024 tokens",
        "17 per picture",
        "bidirectional, over a grid of 4 x 4",
    ):
        assert words in result.stdout
    assert "middle (the sandwich): question, picture, question" in result.stdout


def test_a_language_model_has_no_pictures(tmp_path):
    awake(VisualRWKVForCausalLM(text_config(7))).save_pretrained(tmp_path)
    facts = facts_of(tmp_path)
    assert facts["model"] == "RWKV-7, the shape of no release" and "scan" not in facts
    assert list(facts["parameters"]) == ["embedding", "blocks", "head"]
    assert "picture" not in run_info(tmp_path).stdout


def test_tiles_make_the_number_of_tokens_depend_on_the_picture(tmp_path):
    siglip = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=56
    )
    model = tiny_model(7, vision_config={"siglip_config": siglip | {"patch_size": 14}}, scan="unidirectional")
    model.save_pretrained(tmp_path)
    assert "16 per picture" in run_info(tmp_path).stdout
    saved = {"image_processor": image_processor_for(model.config, "smallest").to_dict()}
    (tmp_path / "processor_config.json").write_text(json.dumps(saved))
    assert "16 per tile; larger pictures have more tiles" in run_info(tmp_path).stdout


def test_a_released_shape_has_its_name():
    config = VisualRWKVConfig(
        text_config={"rwkv_version": 6, "hidden_size": 4096, "num_hidden_layers": 32},
        vision_config={"clip_config": {}},
    )
    assert title_of(config) == "shaped like VisualRWKV-6 7B"
    config.conversion = {"family": "v6.0"}
    assert title_of(config) == "shaped like VisualRWKV-6 7B, converted from v6.0"


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's count of what was read")
def test_of_a_large_folder_the_headers_are_read(tmp_path):
    """Its weights are 2 GB of zeros that take no disk."""

    def read_bytes() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    model = tiny_model()
    model.save_pretrained(tmp_path)
    rows = 1 << 24
    header = {"lm_head.weight": {"dtype": "F32", "shape": [rows, 32], "data_offsets": [0, 128 * rows]}}
    header["model.language_model.embed_tokens.weight"] = {
        "dtype": "F32",
        "shape": [0],
        "data_offsets": [128 * rows] * 2,
    }
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 128 * rows)
    facts_of(tmp_path)  # imports
    before = read_bytes()
    assert facts_of(tmp_path)["num_bytes"] == 128 * rows
    assert read_bytes() - before < 2**20


# Without torch.


def plain_and_loaded(folder, monkeypatch):
    """The facts as they are read without torch, and by the classes that load the model."""
    plain = facts_of(folder)
    with monkeypatch.context() as patch:
        patch.setattr(facts, "plain_config", lambda folder: None)
        patch.setattr(facts, "stored_tensors", lambda folder: None)
        return plain, facts_of(folder)


@pytest.mark.parametrize("release", RELEASES)
def test_a_release_is_described_alike_without_torch(release, tmp_path, monkeypatch):
    released_config(release).save_pretrained(tmp_path)
    save_file({"model.language_model.embed_tokens.weight": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    assert plain_folder.plain_config(tmp_path) is not None and plain_folder.stored_tensors(tmp_path)
    plain, loaded = plain_and_loaded(tmp_path, monkeypatch)
    assert plain == loaded


@pytest.mark.parametrize(("side", "depths", "first"), [(64, [1, 1, 1], False), (50, [1, 2], True)])
def test_a_resnet_is_described_alike_without_torch(side, depths, first, tmp_path, monkeypatch):
    resnet = {"embedding_size": 8, "hidden_sizes": [8] * len(depths), "depths": depths, "layer_type": "basic"}
    resnet |= {"image_size": side, "downsample_in_first_stage": first}
    model = tiny_model(7, vision_config={"resnet_config": resnet}, scan="unidirectional")
    model.save_pretrained(tmp_path)
    assert plain_folder.plain_config(tmp_path) is not None
    plain, loaded = plain_and_loaded(tmp_path, monkeypatch)
    assert plain == loaded
    config = json.loads((tmp_path / "config.json").read_text())
    for strange in ("two", [], [1] * 5, [10**9] * len(depths)):
        config["vision_config"]["resnet_config"]["depths"] = strange
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert plain_folder.plain_config(tmp_path) is None
    with pytest.raises(
        ValueError, match=r"sum of vision_config\.resnet_config\.depths .* must be at most 512"
    ):
        load_config(str(tmp_path))  # before so many layers are made


def test_shards_of_few_bits_are_described_alike_without_torch(tmp_path, monkeypatch):
    model = accelerate_on_cpu(tiny_model(version=7).bfloat16(), weights="int8")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert not (tmp_path / "model.safetensors").exists() and plain_folder.stored_tensors(tmp_path)
    plain, loaded = plain_and_loaded(tmp_path, monkeypatch)
    assert plain == loaded and plain["dtypes"].keys() >= {"bfloat16", "int32"}


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weights_of_few_bits_are_counted_as_those_they_were(weights, tmp_path):
    """A word holds eight or four of them; scales and shapes are no parameters."""
    model = tiny_model(version=7).bfloat16()
    model.save_pretrained(tmp_path / "dense")
    accelerate_on_cpu(model, weights=weights).save_pretrained(tmp_path / "few")
    dense, few = (facts_of(tmp_path / name) for name in ("dense", "few"))
    assert few["parameters"] == dense["parameters"] and few["num_parameters"] == dense["num_parameters"]
    assert few["num_bytes"] < dense["num_bytes"] and "int32" in few["dtypes"]


def test_a_folder_is_described_without_torch(folder, tmp_path):
    code = (
        "import sys\nfor name in ('torch', 'transformers', 'numpy'):\n    sys.modules[name] = None\n"
        "from visualrwkv_hf.cli.app import app\napp(sys.argv[1:], standalone_mode=False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "info", str(folder)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "2 layers of width 32" in done.stdout


def test_the_tables_that_are_read_without_torch_are_those_with_it():
    assert {name: row.fold for name, row in ENCODERS.items()} == plain_folder.FOLDS
    assert tuple(SCANS) == plain_folder.SCANS and tuple(GENERATIONS) == plain_folder.VERSIONS
    assert plain_folder.SIZES == SIZES
    assert (facts.PACKED, facts.SCALE, facts.SHAPE, facts.WORD_BITS) == (
        packed.PACKED,
        packed.SCALE,
        packed.SHAPE,
        packed.WORD_BITS,
    )
    assert {
        name: (str(dtype).removeprefix("torch."), dtype.itemsize)
        for name, dtype in SAFETENSORS_DTYPES.items()
    } == plain_folder.DTYPES


@pytest.mark.parametrize(
    "field, value",
    [
        ("scan", "stranger"),
        ("pooling", ["none"]),
        ("pooled_grid_size", 3),
        ("image_token_id", 10**9),
        ("compressor_num_layers", 2),
        ("text_config.hidden_size", "32"),
        ("text_config.head_dim", 5),
        ("text_config.rwkv_version", [7]),
        ("vision_config.clip_config", {}),
        ("vision_config.clip_config.image_size", 1),
        ("vision_config.tile_grid", 3),
        ("vision_config.class_token", None),
    ],
)
def test_a_strange_configuration_is_left_to_the_classes_that_load_it(folder, field, value, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    fields = json.loads((tmp_path / "config.json").read_text())
    place, *names = fields, *field.split(".")
    for name in names[:-1]:
        place = place[name]
    place[names[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert plain_folder.plain_config(tmp_path) is None


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_damaged_weights_are_left_to_the_reader_of_checkpoints(folder, keep, tmp_path):
    content = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:keep])
    assert plain_folder.stored_tensors(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(content + b"x")
    assert plain_folder.stored_tensors(tmp_path) is None


# On the Hub.

FETCHED_FOR_A_HEADER = 100_001
"""Bytes that the Hub's client asks for at first; a longer header it asks for whole."""


@pytest.fixture(scope="module")
def hub():
    with Hub({"hf_ann": "ann"}) as hub:
        yield hub


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def client(hub, cache):
    with client_process(hub.url, cache) as client:
        yield client


@pytest.fixture(scope="module")
def one_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("one"))


def put_on(hub: Hub, name: str, folder, **options) -> None:
    hub.add(name, {file.name: file.read_bytes() for file in folder.iterdir()}, **options)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_on_the_hub_is_told_of_without_its_weights(hub, client, cache, tmp_path, shards):
    model = tiny_model()
    tiny_processor(model).save_pretrained(tmp_path)
    size = sum(weight.nbytes for weight in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size=f"{size // shards // 1000 + 1}KB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= shards
    name = f"ann/tiny-{shards}"
    put_on(hub, name, tmp_path)
    hub.sent = 0
    assert client(facts_of, name) == facts_of(tmp_path)
    assert not list(cache.rglob("*.safetensors"))
    assert hub.sent <= len(list(tmp_path.glob("*.safetensors"))) * FETCHED_FOR_A_HEADER


def test_what_is_in_the_cache_is_told_of_without_the_hubs_weights(hub, client, one_folder):
    put_on(hub, "ann/cached", one_folder)
    client(snapshot_download, "ann/cached")
    hub.requests.clear()
    assert client(facts_of, "ann/cached") == facts_of(one_folder)
    assert not any("safetensors" in request for request in hub.requests)


def test_a_language_model_on_the_hub_needs_no_processor(hub, client, tmp_path):
    awake(VisualRWKVForCausalLM(text_config(7))).save_pretrained(tmp_path)
    put_on(hub, "ann/text", tmp_path)
    assert client(facts_of, "ann/text") == facts_of(tmp_path)


def test_what_is_not_on_the_hub_is_refused_in_a_sentence(hub, client, one_folder):
    put_on(hub, "ann/secret", one_folder, private=True)
    hub.add("ann/other", {"config.json": b'{"model_type": "llama"}'})
    hub.add("ann/bare", {"config.json": (one_folder / "config.json").read_bytes()})
    hub.add("ann/empty", {"README.md": b"nothing"})
    for name, message in {
        "ann/none": "There is no repository ann/none",
        "ann/secret": "or it is private",
        "ann/other": "holds a model of type 'llama'",
        "ann/bare": "has no file model.safetensors",
        "ann/empty": "ann/empty has no file config.json",
    }.items():
        with pytest.raises(ValueError, match=message):
            client(facts_of, name)
    assert client(facts_of, "ann/secret", token="hf_ann") == facts_of(one_folder)


def test_which_names_may_be_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    assert may_be_on_hub("ann/tiny")
    for folder in (
        "models/tiny",
        "models/tinny",
        "tiny",
        str(tmp_path / "none"),
        "./none",
        "../none",
        "a/b/c",
        "models/",
    ):
        assert not may_be_on_hub(folder), folder


def refused(folder):
    result = run_info(folder)
    assert result.exit_code == 1 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    return line


def test_other_folders_are_refused_in_one_sentence(tmp_path):
    assert "is not a model folder: it has no config.json" in refused(tmp_path)
    assert f"There is no folder {tmp_path / 'none'}" in refused(tmp_path / "none")
    model = tiny_model()
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:1000])
    assert "truncated or damaged" in refused(tmp_path)
    weights.unlink()
    assert "There is no file" in refused(tmp_path) and "model.safetensors" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json cannot be read as JSON" in refused(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "holds a model of type 'llama'" in refused(tmp_path)


def test_bytes_are_in_decimal_units():
    assert [in_bytes(n) for n in (1, 999, 4608, 1_234_567, 7.9e9)] == [
        "1 bytes",
        "999 bytes",
        "4.608 kB",
        "1.235 MB",
        "7.9 GB",
    ]
