"""`visualrwkv convert`: what it makes, what it prints and how it refuses."""

import dataclasses
import hashlib
import io
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_client import convert, hub_environment
from paths import ROOT
from patience import PATIENCE
from released_shapes import RELEASES as RELEASED_SHAPES
from safetensors.torch import load_file
from tiny_checkpoint import write_checkpoint

from visualrwkv_hf import VisualRWKVConfig
from visualrwkv_hf.cli.bars import bytes_bar
from visualrwkv_hf.conversion import ConversionError
from visualrwkv_hf.conversion.checkpoint import sha256_of
from visualrwkv_hf.conversion.folders import EXTRAS_FILE
from visualrwkv_hf.conversion.hub_address import HubFile, parse_address
from visualrwkv_hf.conversion.hub_files import STALE_FILES
from visualrwkv_hf.conversion.infer_config import infer, infer_config
from visualrwkv_hf.conversion.model_card import model_card, quantization_section
from visualrwkv_hf.conversion.releases import RELEASES, Release, ReleasedModel, release_table, released_model
from visualrwkv_hf.encoders import ENCODERS
from visualrwkv_hf.image_processing_visualrwkv import TILINGS
from visualrwkv_hf.modeling_vision import PROJECTORS
from visualrwkv_hf.scan_orders import SCANS
from visualrwkv_hf.training.conversations import PROMPT_FORMATS

NOWHERE = "http://127.0.0.1:1"
"""Nothing listens on port 1."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("original") / "VisualRWKV-tiny.pth")[0]


def refused(*arguments: str | Path) -> str:
    """The sentence with which a command line is refused."""
    answer = convert(*arguments)
    assert answer.code == 1 and answer.out == ""
    assert answer.err.startswith("Error: ") and answer.err.count("\n") == 1, answer.err
    return answer.err


# There and back.


def test_command_there_and_back_is_equal_to_the_bit(checkpoint, tmp_path):
    there = convert(checkpoint, tmp_path / "model")
    assert (there.code, there.out) == (0, f"{tmp_path / 'model'}\n"), there.err
    back = convert("--to-original", tmp_path / "model", tmp_path / "back.pth")
    assert (back.code, back.out) == (0, f"{tmp_path / 'back.pth'}\n"), back.err
    expected, got = torch.load(checkpoint), torch.load(tmp_path / "back.pth")
    assert set(got) == set(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_split_pair_gives_the_same_tensors_as_one_file(checkpoint, tmp_path):
    pair = write_checkpoint(tmp_path / "tiny.pth", split=True)
    assert convert(checkpoint, tmp_path / "one").code == 0
    assert convert(*pair, tmp_path / "two").code == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert set(one) == set(two) and all(torch.equal(one[name], two[name]) for name in one)


def test_options_reach_the_converter(checkpoint, tmp_path):
    positions = {
        "vit.vision_model.embeddings.position_ids": torch.arange(17)[None]
    }  # nothing computes with it
    torch.save(torch.load(checkpoint) | positions, tmp_path / "tiny.pth")
    assert convert(tmp_path / "tiny.pth", tmp_path / "whole").code == 0
    assert (tmp_path / "whole" / EXTRAS_FILE).exists()
    options = ["--dtype", "float16", "--max-shard-size", "9MB", "--no-extras", "--no-verify"]
    options += ["--family", "v6.0", "--tiling", "none"]
    answer = convert(tmp_path / "tiny.pth", tmp_path / "model", *options)
    assert answer.code == 0, answer.err
    shards = sorted((tmp_path / "model").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert {tensor.dtype for shard in shards for tensor in load_file(shard).values()} == {torch.float16}
    assert not (tmp_path / "model" / EXTRAS_FILE).exists()


def test_overwrite_replaces_a_model_folder(checkpoint, tmp_path):
    assert convert(checkpoint, tmp_path / "model").code == 0
    assert "is not empty" in refused(checkpoint, tmp_path / "model")
    assert convert(checkpoint, tmp_path / "model", "--overwrite").code == 0


def test_world_model_and_vision_tower_start_a_vlm(checkpoint, tmp_path):
    tensors = torch.load(checkpoint)
    torch.save(
        {n.removeprefix("rwkv."): t for n, t in tensors.items() if n.startswith("rwkv.")}, tmp_path / "lm.pth"
    )
    tower = {n.removeprefix("vit."): t for n, t in tensors.items() if n.startswith("vit.")}
    torch.save(tower, tmp_path / "clip.pth")
    answer = convert(
        "--world", tmp_path / "lm.pth", "--vision-tower", tmp_path / "clip.pth", tmp_path / "start"
    )
    assert answer.code == 0, answer.err
    embedding = load_file(tmp_path / "start" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(embedding, tensors["rwkv.head.weight"])


def write_start(checkpoint, folder):
    """Write the language model and the tower of a checkpoint, with a tensor that nothing computes with."""
    tensors = torch.load(checkpoint)
    language = {n.removeprefix("rwkv."): t for n, t in tensors.items() if n.startswith("rwkv.")}
    tower = {n.removeprefix("vit."): t for n, t in tensors.items() if n.startswith("vit.")}
    tower["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    torch.save(language, folder / "lm.pth")
    torch.save(tower, folder / "clip.pth")
    return ["--world", folder / "lm.pth", "--vision-tower", folder / "clip.pth"]


@pytest.mark.parametrize("options", [[], ["--no-extras"]])
def test_a_start_keeps_unused_tensors_unless_told(options, checkpoint, tmp_path):
    answer = convert(*write_start(checkpoint, tmp_path), *options, tmp_path / "start")
    assert answer.code == 0, answer.err
    assert (tmp_path / "start" / EXTRAS_FILE).exists() == (not options)


def test_checkpoint_without_vision_takes_the_tower_named(checkpoint, tmp_path):
    tensors = torch.load(checkpoint)
    torch.save({n: t for n, t in tensors.items() if not n.startswith("vit.")}, tmp_path / "trained.pth")
    tower = {n.removeprefix("vit."): t for n, t in tensors.items() if n.startswith("vit.")}
    torch.save(tower, tmp_path / "clip.pth")
    assert "no vision tower" in refused(tmp_path / "trained.pth", tmp_path / "model")
    answer = convert(tmp_path / "trained.pth", tmp_path / "model", "--vision-tower", tmp_path / "clip.pth")
    assert answer.code == 0, answer.err
    assert convert(checkpoint, tmp_path / "whole").code == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "whole"))
    assert set(one) == set(two) and all(torch.equal(one[name], two[name]) for name in one)


# What it prints.


def test_progress_names_the_file_and_counts_to_the_total(checkpoint, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with bytes_bar() as progress:
        progress.expect(2_000_000)
        progress("model-00001-of-00002.safetensors", 1_500_000)
        progress("model-00002-of-00002.safetensors", 500_000)
        progress("verifying", 2_000_000)
    written, verified = terminal.getvalue().strip().split("\n")
    last = written.split("\r")[-1]
    assert last.startswith("model-00002-of-00002.safetensors: 100%") and "2.00M/2.00M" in last
    last = verified.split("\r")[-1]
    assert last.startswith("verifying: 100%") and "2.00M/2.00M" in last


@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}, {"weights": "int4"}])
def test_as_many_bytes_are_written_and_compared_as_are_expected(checkpoint, tmp_path, options):
    from visualrwkv_hf.conversion import to_hf

    counts = Counter()
    to_hf(
        checkpoint,
        tmp_path / "model",
        progress=lambda file, n: counts.update({file: n}),
        expect=lambda n: counts.update(expected=n),
        **options,
    )
    files = [path for path in (tmp_path / "model").glob("*.safetensors") if path.name in counts]
    assert sum(counts[path.name] for path in files) == counts["expected"] > 0
    assert counts["verifying"] == counts["model.safetensors"]


MODELS = [(family, model) for family, release in RELEASES.items() for model in release.models]


def test_list_shows_every_release_with_size_and_scores():
    answer = convert("--list")
    assert answer.code == 0
    for family, model in MODELS:
        assert f"{model.title}  (family {family}, {model.num_bytes / 1e9:.2f} GB)" in answer.out
        assert all(f"  {address}\n" in answer.out + "\n" for address in model.addresses)
    assert "VQAv2 75.8" in answer.out


@pytest.mark.parametrize("released, shapes", list(zip(MODELS, RELEASED_SHAPES.values())), ids=RELEASED_SHAPES)
def test_release_agrees_with_its_tensors(released, shapes):
    family, model = released
    shapes = shapes()
    assert model.num_parameters == sum(math.prod(shape) for shape in shapes.values())
    given = {"projector": "relu"} if family == "uhd" else {}  # its values would tell
    config = infer_config(shapes, **given)
    assert released_model(config) == model
    release = RELEASES[family]
    assert release.rwkv_version == config.text_config.rwkv_version
    assert release.encoders == tuple(config.vision_config.encoders)
    assert (release.scan, release.image_position) == (config.scan, config.image_position)


@pytest.mark.parametrize("model", [model for _, model in MODELS], ids=lambda model: model.title)
def test_release_addresses_name_repository_and_file(model):
    for address, file in zip(model.addresses, model.files, strict=True):
        assert parse_address(address) == HubFile(model.repo, file)


@pytest.mark.parametrize("family", RELEASES)
def test_rows_name_what_other_tables_hold(family):
    release = RELEASES[family]
    assert set(release.encoders) <= ENCODERS.keys() and release.usual_projector in PROJECTORS
    assert release.prompt_format in PROMPT_FORMATS and release.scan in SCANS and release.tiling in TILINGS


def test_the_table_of_the_documentation_comes_from_the_releases():
    assert f"\n{release_table()}\n" in (ROOT / "docs/releases.md").read_text("utf-8")


DUMMY = Release(
    rwkv_version=6,
    encoders=("clip",),
    projector="linear",
    prompt_format="v6.0",
    scan="multidirectional",
    image_position="last",
    vision={"class_token": "first"},
    models=(
        ReleasedModel(
            title="Dummy 0B0",
            hidden_size=64,
            repo="ann/dummy",
            files=("dummy.pth",),
            num_parameters=5_000_000,
            scores={"VQAv2": 12.5},
            source="a test",
        ),
    ),
)


def test_a_release_is_one_row(checkpoint, tmp_path, monkeypatch):
    """A new row is inferred or asked for, converted, has a card with its scores, and is in the list and the table."""
    monkeypatch.setitem(RELEASES, "dummy", DUMMY)
    answer = convert(checkpoint, tmp_path / "model", "--family", "dummy")
    assert answer.code == 0, answer.err
    config = VisualRWKVConfig.from_pretrained(tmp_path / "model")
    assert (config.scan, config.image_position, config.class_token) == ("multidirectional", "last", "first")
    assert config.conversion["family"] == "dummy"
    card = (tmp_path / "model" / "README.md").read_text("utf-8")
    assert "# Shaped like Dummy 0B0" in card and "| VQAv2 | 12.5 |" in card and "a test" in card
    listed = convert("--list").out
    assert "Dummy 0B0  (family dummy, 0.01 GB)\n  hf://ann/dummy/dummy.pth\n  expected: VQAv2 12.5" in listed
    assert "| `dummy` | 0B0 | RWKV-6 | clip | linear | multidirectional | last | none |" in release_table()


def test_an_untrained_model_has_a_card_without_scores(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(RELEASES, "v6.0", dataclasses.replace(RELEASES["v6.0"], models=DUMMY.models))
    answer = convert(*write_start(checkpoint, tmp_path), tmp_path / "start")
    assert answer.code == 0, answer.err
    card = (tmp_path / "start" / "README.md").read_text("utf-8")
    assert "# Shaped like Dummy 0B0, untrained\n" in card and "The projector is untrained" in card
    assert "scores" not in card and "12.5" not in card


def card_of(shapes, names=("finetune.pth",), **given):
    """The card of files with these shapes, as the converter would write it."""
    family, config = infer(shapes, **given)
    sources = [{"name": name, "size": 1, "sha256": "0"} for name in names]
    config.conversion = {"converter_version": 1, "family": family, "sources": sources}
    return model_card(config)


@pytest.mark.parametrize(("shape", "other", "views"), [("v5.0 1B5", "v5.1", 1), ("v6.0 1B6", "v6.01", 2)])
def test_scores_are_those_of_the_family(shape, other, views):
    """v5.1 and v6.01 have language models and encoders of the shapes of v5.0 and v6.0, and no published scores."""
    shapes = RELEASED_SHAPES[shape]()
    title = re.search("# Shaped like (.*)\n", card_of(shapes))[1]
    assert "## Published scores" in card_of(shapes)
    rows, columns = shapes["proj.weight"]
    card = card_of(shapes | {"proj.weight": (rows, views * columns)}, family=other)
    assert f"# Shaped like {title}\n" in card and "scores" not in card


@pytest.mark.parametrize("released, shapes", list(zip(MODELS, RELEASED_SHAPES.values())), ids=RELEASED_SHAPES)
def test_a_released_file_has_its_name_on_the_card(released, shapes):
    family, model = released
    card = card_of(shapes(), model.files, **({"projector": "relu"} if family == "uhd" else {}))
    assert f"# {model.title}\n" in card and f"Reported for {model.title} in {model.source}" in card


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_card_of_few_bits_states_what_was_measured_of_this_model_only(weights):
    """Percentages of another model would be read as this one's."""
    section = quantization_section(weights, {weights: 0.0123})
    assert section.count("%") == 1 and "| 1.23 % |" in section and "docs/quantization.md" in section


@pytest.mark.parametrize(
    "path, goes",
    [
        ("model.safetensors", True),
        ("model-00003-of-00003.safetensors", True),
        ("model.safetensors.index.json", True),
        ("original_extras.safetensors", True),
        ("adapter/model.safetensors", False),
        ("model-a/x-of-y.safetensors", False),
        ("model-00001/z-of-00003.safetensors", False),
        ("adapter_model.safetensors", False),
    ],
)
def test_a_push_replaces_weights_of_the_top_folder_only(path, goes):
    """As the Hub's client matches `delete_patterns`, where a star matches a slash as well."""
    found = list(huggingface_hub.utils.filter_repo_objects([path], allow_patterns=STALE_FILES))
    assert found == [path] * goes


@pytest.mark.parametrize("is_same", [True, False])
def test_a_download_is_compared_with_the_published_file(is_same, checkpoint, tmp_path, monkeypatch):
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest() if is_same else "0" * 64
    model = dataclasses.replace(DUMMY.models[0], sha256=(digest,))
    monkeypatch.setitem(RELEASES, "dummy", dataclasses.replace(DUMMY, models=(model,)))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kwargs: str(checkpoint))
    answer = convert("hf://ann/dummy/dummy.pth", tmp_path / "model")
    if is_same:
        assert answer.code == 0 and "dummy.pth: its sha256 is that of the published file" in answer.err
        return
    assert answer.code == 1 and not (tmp_path / "model").exists()
    expected = f"its sha256 is {sha256_of(checkpoint)}, that of the release is {digest}"
    assert f"is not the released file: {expected}" in answer.err
    other = convert("hf://ann/dummy/dummy.pth@v1", tmp_path / "model")
    assert other.code == 0  # another revision is another file
    assert "dummy.pth@v1: no sha256 of the published file is known" in other.err


# Addresses.


def test_address_may_name_a_folder_and_a_revision():
    assert parse_address("hf://ann/model/old/a.pth@v1/x") == HubFile("ann/model", "old/a.pth", "v1/x")
    assert str(HubFile("ann/model", "a.pth", "v1")) == "hf://ann/model/a.pth@v1"


@pytest.mark.parametrize("address", ["hf://ann/model", "hf://ann//a.pth", "hf://", "ann/model/a.pth"])
def test_other_addresses_are_refused(address):
    with pytest.raises(ConversionError, match="is not of the form"):
        parse_address(address)


# Refusals: one sentence, exit code 1, nothing written.


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ([], r"The paths must be SOURCE \[SOURCE2\] OUTPUT, got 0 of them"),
        (["a.pth"], "got 1 of them"),
        (["a.pth", "b.pth", "c.pth", "out"], "got 4 of them"),
        (["--to-original", "folder"], "The paths must be --to-original FOLDER OUT.pth, got 1"),
        (["--world", "lm.pth", "--vision-tower", "t", "a", "b"], "The paths must be --world .*, got 2"),
        (["--world", "lm.pth", "out"], "--world needs --vision-tower"),
        (["--private", "a.pth", "out"], "--private has no effect without --push-to-hub"),
        (["--revision", "v1", "a.pth", "out"], "--revision has no effect without --push-to-hub"),
        (["--to-original", "--no-extras", "a", "b"], "--no-extras has no effect with --to-original"),
        (["--to-original", "--max-shard-size", "1GB", "a", "b"], "--max-shard-size has no effect with"),
        (["--to-original", "--no-verify", "a", "b"], "--no-verify has no effect with --to-original"),
        (["--to-original", "--push-to-hub", "u/n", "a", "b"], "--push-to-hub has no effect with"),
        (["missing.pth", "out"], "There is no file missing.pth"),
        (["hf://ann/model", "out"], "hf://ann/model is not of the form hf://owner/repo/file"),
        (["--push-to-hub", "name", "a.pth", "out"], "name is not of the form user/name"),
        (["--to-original", "missing", "out.pth"], "missing is not a model folder"),
    ],
)
def test_wrong_command_lines_are_refused(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert re.search(sentence, refused(*arguments))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--dtype", "int8"], "dtype must be one of"),
        (["--max-shard-size", "much"], "max_shard_size must be a number"),
        (["--family", "v7.00"], "v7.00"),
        (["--tiling", "round"], "round"),
    ],
)
def test_wrong_options_are_refused(checkpoint, options, sentence, tmp_path):
    assert sentence in refused(checkpoint, tmp_path / "model", *options)
    assert not list(tmp_path.iterdir())


def test_without_network_there_is_one_sentence_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "visualrwkv_hf.cli", "convert", "hf://ann/model/a.pth", "model"]
    environment = hub_environment(NOWHERE, tmp_path / "cache")
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 1 and done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"Error: The connection to the Hub at {NOWHERE} failed (")
    assert not (tmp_path / "model").exists()
