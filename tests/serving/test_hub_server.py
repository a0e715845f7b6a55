"""Push and pull with the real client of the Hub, against a small Hub on this machine."""

import json
import runpy
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import hub_client
import pytest
import torch
from hub_client import Client, client_process, hub_environment
from hub_server import Hub
from paths import EXAMPLES
from patience import PATIENCE
from tiny_checkpoint import write_checkpoint

from visualrwkv_hf.conversion import to_hf

ANN, BOB = "hf_ann", "hf_bob"
FIRST_ANSWER = EXAMPLES / "first_answer.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def running_hub() -> Iterator[Hub]:
    with Hub({ANN: "ann", BOB: "bob"}) as hub:
        yield hub


@pytest.fixture
def hub(running_hub: Hub) -> Iterator[Hub]:
    running_hub.requests.clear()
    running_hub.ranges.clear()
    yield running_hub
    running_hub.drop.clear()


@pytest.fixture(scope="module")
def client(running_hub: Hub, folder: Path) -> Iterator[Client]:
    with client_process(running_hub.url, folder / "cache") as client:
        yield client


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    return write_checkpoint(folder / "VisualRWKV-tiny.pth")[0]


@pytest.fixture(scope="module")
def model(checkpoint: Path, folder: Path) -> Path:
    return to_hf(checkpoint, folder / "model")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def files_on(hub: Hub, name: str, revision: str = "main") -> dict[str, bytes]:
    tree = hub.repos[name].files(revision)
    return {path: hub.blobs[file.sha256] for path, file in tree.items() if path != ".gitattributes"}


def refused(client: Client, *arguments: str | Path, token: str | None = None) -> str:
    answer = client(hub_client.convert, *arguments, token=token)
    last = answer.err.splitlines()[-1]
    assert answer.code == 1 and answer.out == "" and last.startswith("Error: "), answer
    assert "Traceback" not in answer.err, answer.err
    return last


# Push.


def test_convert_and_push_puts_the_folder_on_the_hub(hub, client, checkpoint, tmp_path):
    answer = client(hub_client.convert, checkpoint, tmp_path / "m", "--push-to-hub", "ann/pushed", token=ANN)
    assert answer.code == 0, answer.err
    commit = hub.repos["ann/pushed"].sha("main")
    assert answer.out.split() == [str(tmp_path / "m"), f"{hub.url}/ann/pushed/commit/{commit}"]
    assert files_on(hub, "ann/pushed") == files_of(tmp_path / "m")
    assert hub.repos["ann/pushed"].files()["model.safetensors"].is_large
    assert not hub.repos["ann/pushed"].private


def test_a_quantised_model_of_the_hub_has_its_code_and_card(hub, client, checkpoint, tmp_path):
    """Of the model on the Hub only data is fetched; the code is this package's."""
    answer = client(hub_client.convert, checkpoint, tmp_path / "m", "--push-to-hub", "ann/whole", token=ANN)
    assert answer.code == 0, answer.err
    answer = client(hub_client.run, "quantize", "ann/whole", tmp_path / "few")
    assert answer.code == 0, answer.err
    whole, few = files_of(tmp_path / "m"), files_of(tmp_path / "few")
    code = {name for name in whole if name.endswith(".py")}
    assert code and {name: few.get(name) for name in code} == {name: whole[name] for name in code}
    assert few["README.md"].startswith(whole["README.md"].rstrip() + b"\n\n## Weights in int8")
    assert whole.keys() - few.keys() <= {"original_extras.safetensors"}


def test_push_to_a_branch_leaves_main_alone(hub, client, checkpoint, tmp_path):
    options = ["--push-to-hub", "ann/branched", "--revision", "half", "--dtype", "float16"]
    answer = client(hub_client.convert, checkpoint, tmp_path / "m", *options, token=ANN)
    assert answer.code == 0, answer.err
    assert files_on(hub, "ann/branched") == {}
    assert files_on(hub, "ann/branched", "half") == files_of(tmp_path / "m")


def test_second_push_leaves_no_shard_of_the_first(hub, client, checkpoint, tmp_path):
    for options in (["--max-shard-size", "9MB"], []):
        command = [checkpoint, tmp_path / "m", "--push-to-hub", "ann/twice", "--overwrite", *options]
        answer = client(hub_client.convert, *command, token=ANN)
        assert answer.code == 0, answer.err
        assert files_on(hub, "ann/twice") == files_of(tmp_path / "m")


def test_push_with_a_dropped_upload_is_tried_again(hub, client, checkpoint, tmp_path):
    hub.drop["upload"] = 1
    options = ["--push-to-hub", "ann/dropped", "--dtype", "float32"]  # other bytes than the Hub has already
    answer = client(hub_client.convert, checkpoint, tmp_path / "m", *options, token=ANN)
    assert answer.code == 0, answer.err
    assert hub.drop["upload"] == 0
    assert files_on(hub, "ann/dropped") == files_of(tmp_path / "m")


@pytest.mark.parametrize("kind", ["upload", "commit"])
def test_push_that_never_gets_through_commits_nothing(hub, client, checkpoint, tmp_path, kind):
    other = tmp_path / "other.pth"
    tensors = torch.load(checkpoint)
    tensors["rwkv.emb.weight"][1:300] = {"upload": 0.25, "commit": 0.75}[kind]
    torch.save(tensors, other)
    hub.drop[kind] = 100
    options = ["--push-to-hub", f"ann/lost-{kind}"]
    sentence = refused(client, other, tmp_path / "m", *options, token=ANN)
    assert "The connection to the Hub" in sentence and "The converted folder is complete" in sentence
    assert files_on(hub, f"ann/lost-{kind}") == {}
    assert (tmp_path / "m" / "config.json").exists()


def test_model_and_processor_push_themselves(hub, client, tmp_path):
    original = runpy.run_path(str(FIRST_ANSWER))["original_checkpoint"](tmp_path / "golden.safetensors")
    heads = {"vision_config": {"clip_config": {"num_attention_heads": 4}}}
    folder = to_hf(original, tmp_path / "golden", image_position="first", **heads)
    client(hub_client.push_model, str(folder), "ann/golden", private=True, token=ANN)
    pushed = files_on(hub, "ann/golden")
    expected = set(files_of(folder)) - {"original_extras.safetensors"}
    assert hub.repos["ann/golden"].private and set(pushed) >= expected, expected - set(pushed)
    local, pulled = (
        client(hub_client.weights_of, str(folder)),
        client(hub_client.weights_of, "ann/golden", token=ANN),
    )
    assert pulled == local


def test_saving_with_a_push_sends_the_code_as_well(hub, client, model, tmp_path):
    client(hub_client.save_and_push, str(model), str(tmp_path / "saved"), "ann/saved", ANN)
    pushed = files_on(hub, "ann/saved")
    assert hub.repos["ann/saved"].private and {
        "modeling_visualrwkv.py",
        "wkv.py",
        "model.safetensors",
    } <= set(pushed)
    assert {name: pushed[name] for name in files_of(tmp_path / "saved")} == files_of(tmp_path / "saved")


# Refused pushes: before anything is converted.


@pytest.mark.parametrize(
    "token, name, sentence",
    [
        (None, "ann/refused", "needs a token"),
        ("hf_nobody", "ann/refused", "The Hub does not know this token"),
        (ANN, "ann/re fused", "is not a name that a repository can have"),
    ],
)
def test_push_is_refused_before_the_conversion(hub, client, checkpoint, tmp_path, token, name, sentence):
    assert sentence in refused(client, checkpoint, tmp_path / "m", "--push-to-hub", name, token=token)
    assert not (tmp_path / "m").exists() and name not in hub.repos


def test_push_to_another_ones_name_is_refused(hub, client, checkpoint, tmp_path):
    sentence = refused(client, checkpoint, tmp_path / "m", "--push-to-hub", "ann/not-bobs", token=BOB)
    assert "This token may not write to ann/not-bobs" in sentence
    assert "ann/not-bobs" not in hub.repos


def test_private_push_to_a_public_repository_is_refused(hub, client, checkpoint, tmp_path):
    hub.add("ann/public", {"README.md": b"public"})
    options = ["--push-to-hub", "ann/public", "--private"]
    assert "ann/public is public already" in refused(client, checkpoint, tmp_path / "m", *options, token=ANN)
    assert not (tmp_path / "m").exists()


# Pull.


def test_from_pretrained_loads_the_revision_asked_for(hub, client, model, folder):
    hub.add("ann/revisions", files_of(model))
    first = hub.repos["ann/revisions"].sha("main")
    other = to_hf(folder / "VisualRWKV-tiny.pth", folder / "other", dtype="float16")
    hub.add("ann/revisions", files_of(other))
    local = client(hub_client.weights_of, str(model))
    assert client(hub_client.weights_of, "ann/revisions", revision=first) == local
    assert (
        client(hub_client.weights_of, "ann/revisions") == client(hub_client.weights_of, str(other)) != local
    )


def test_remote_code_answers_where_the_package_cannot_be_imported(hub, model, tmp_path):
    hub.add("ann/remote", files_of(model))
    script = """
import sys
sys.modules["visualrwkv_hf"] = None  # every import of it fails
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained("ann/remote", trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained("ann/remote", trust_remote_code=True)
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=text, images=Image.new("RGB", (56, 56), "red"), return_tensors="pt")
print(model.generate(**inputs.to(dtype=model.dtype), max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1])
"""
    environment = hub_environment(hub.url, tmp_path / "cache")
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"]
    assert any("/resolve/" in request for request in hub.requests)


def test_checkpoint_is_downloaded_by_its_address(hub, client, checkpoint, model, tmp_path):
    hub.add("ann/original", {"old/tiny.pth": checkpoint.read_bytes()})
    commit = hub.repos["ann/original"].sha("main")
    for name, address in (("a", "old/tiny.pth"), ("b", f"old/tiny.pth@{commit}")):
        answer = client(hub_client.convert, f"hf://ann/original/{address}", tmp_path / name)
        assert answer.code == 0, answer.err
        weights = (tmp_path / name / "model.safetensors").read_bytes()
        assert weights == (model / "model.safetensors").read_bytes()
    fetched = [request for request in hub.requests if request.startswith("GET") and request.count("/") == 1]
    assert len(fetched) == 1, "what is there is not fetched again"


def test_dropped_download_goes_on_where_it_stopped(hub, client, checkpoint, model, tmp_path):
    hub.add("ann/resumed", {"tiny.pth": checkpoint.read_bytes()})
    hub.drop["download"] = 2
    answer = client(hub_client.convert, "hf://ann/resumed/tiny.pth", tmp_path / "m")
    assert answer.code == 0, answer.err
    assert hub.drop["download"] == 0
    assert len(hub.ranges) == 2 and min(hub.ranges) > 0
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_download_that_never_gets_through_leaves_nothing(hub, client, tmp_path):
    hub.add("ann/lost", {"tiny.pth": b"PK" + bytes(1000)})
    hub.drop["download"] = 1000
    sentence = refused(client, "hf://ann/lost/tiny.pth", tmp_path / "m")
    assert "The connection to the Hub" in sentence
    assert not list(tmp_path.iterdir())


def test_private_repository_needs_its_owners_token(hub, client, checkpoint, tmp_path):
    hub.add("ann/secret", {"tiny.pth": checkpoint.read_bytes()}, private=True)
    for token in (None, BOB):
        sentence = refused(client, "hf://ann/secret/tiny.pth", tmp_path / "m", token=token)
        assert "There is no repository ann/secret, or it is private" in sentence
        assert not list(tmp_path.iterdir())
    answer = client(hub_client.convert, "hf://ann/secret/tiny.pth", tmp_path / "m", token=ANN)
    assert answer.code == 0, answer.err


@pytest.mark.parametrize(
    "address, token, sentence",
    [
        ("ann/nothing/tiny.pth", None, "There is no repository ann/nothing, or it is private"),
        ("ann/files/missing.pth", None, "ann/files has no file missing.pth at revision main."),
        ("ann/files/a.pth@v9", None, "ann/files has no revision v9."),
        ("ann/files/a.pth", "hf_nobody", "The Hub does not know this token"),
        ("ann/files/page.pth", None, "is a web page: the download went wrong."),
    ],
)
def test_what_cannot_be_had_is_one_sentence(hub, client, tmp_path, address, token, sentence):
    hub.add("ann/files", {"a.pth": b"PK", "page.pth": b"<html>"})
    assert sentence in refused(client, f"hf://{address}", tmp_path / "m", token=token)
    assert not list(tmp_path.iterdir())


# The server itself, where the client would forgive.


def test_server_shows_no_private_repository_without_a_token(hub):
    hub.add("ann/hidden", {"a.pth": b"secret"}, private=True)
    for path in ("api/models/ann/hidden", "api/models/ann/hidden/tree/main", "ann/hidden/resolve/main/a.pth"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{hub.url}/{path}", timeout=PATIENCE)
        assert caught.value.code == 401
        assert json.loads(caught.value.read()) == {"error": "Repository not found"}


def test_storage_refuses_a_token_and_a_wrong_name(hub):
    for headers, message in (
        ({"Authorization": f"Bearer {ANN}"}, "A token was sent"),
        ({}, "does not have the sha256"),
    ):
        request = urllib.request.Request(
            f"{hub.store.url}/{'0' * 64}", data=b"x", headers=headers, method="PUT"
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=PATIENCE)
        assert caught.value.code == 400 and message in caught.value.headers["X-Error-Message"]
