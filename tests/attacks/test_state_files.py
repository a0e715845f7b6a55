"""State files of strangers: every fault is a `ValueError` of one sentence. A killed save leaves a whole file."""

import json
import os
import random
import re
import struct
import subprocess
import sys

import pytest
import torch
from chats import MODELS, user
from patience import PATIENCE
from safetensors.torch import load, save
from tiny_training import tiny_model, tiny_processor

from visualrwkv_hf import KeptState

LONGEST_MESSAGE = 700


@pytest.fixture(scope="module")
def model():
    return tiny_model(**MODELS["rwkv7"])


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> bytes:
    """Return the bytes of a right state file, of two rows with a picture each."""
    processor = tiny_processor(model)
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    states = [model.read(processor, [user(None, colour)]) for colour in ("red", "blue")]
    KeptState.stack(states).save(path)
    return path.read_bytes()


def taken_apart(data: bytes) -> tuple[dict, bytes]:
    """Return header and tensors of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_together(header: dict | bytes, tensors: bytes) -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + tensors


def refusal(tmp_path, data: bytes, **options) -> str:
    """Return the message with which a file is refused."""
    path = tmp_path / "state"
    path.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        KeptState.load(path, **options)
    message = str(caught.value)
    assert type(caught.value) is ValueError and len(message) < LONGEST_MESSAGE + len(str(path))
    assert message.isprintable(), "nothing in a file reaches the terminal as a command"
    return message


def with_tensor(data: bytes, name: str, tensor: torch.Tensor) -> bytes:
    """Return the file with these values in the place of a tensor of the same size in bytes."""
    header, tensors = taken_apart(data)
    start, end = header[name]["data_offsets"]
    values = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    assert len(values) == end - start
    return put_together(header, tensors[:start] + values + tensors[end:])


def with_metadata(data: bytes, **metadata: str | None) -> bytes:
    header, tensors = taken_apart(data)
    header["__metadata__"] = {
        name: value for name, value in (header["__metadata__"] | metadata).items() if value is not None
    }
    return put_together(header, tensors)


def edited(data: bytes, name: str, **fields) -> bytes:
    header, tensors = taken_apart(data)
    header[name] |= fields
    return put_together(header, tensors)


def renamed(data: bytes, old: str, new: str) -> bytes:
    header, tensors = taken_apart(data)
    return put_together({new if name == old else name: part for name, part in header.items()}, tensors)


def without(data: bytes, name: str) -> bytes:
    """Return a whole safetensors file that lacks one of the tensors."""
    tensors = load(data)
    del tensors[name]
    return save(tensors, taken_apart(data)[0]["__metadata__"])


def with_beginnings(data, part):
    """The file with this JSON as the tuned states with which its samples began."""
    fingerprint = f'{{"model": {{}}, "processor": {{}}, "tuned_state": {part}}}'
    return with_metadata(data, fingerprint=fingerprint)


NAN, INFINITE = torch.full((2, 2, 16, 16), float("nan")), torch.zeros(2, 32)
INFINITE[1, 31] = float("inf")
SECRET = "\x1b]0;owned\x07\u202e" * 99

FAULTS = {
    "empty": (lambda data: b"", "not a whole state"),
    "cut": (lambda data: data[:-1], "not a whole state"),
    "longer": (lambda data: data + b"more", "not a whole state"),
    "header cut": (lambda data: data[:20], "not a whole state"),
    "header of 4 GiB": (lambda data: struct.pack("<Q", 1 << 32) + data[8:], r"begins with 4,294,967,296 bytes"),
    "header of 2^64": (lambda data: b"\xff" * 8 + data[8:], "bytes of names"),
    "header of 9 MB": (lambda data: put_together(b" " * (9 << 20), b""), "bytes of names"),
    "header no JSON": (lambda data: put_together(b"{" * 200, b""), "not a whole state"),
    "header deep": (lambda data: put_together(b'{"a":' * 100_000, b""), "not a whole state"),
    "header no UTF-8": (lambda data: put_together(b"\xff\xfe" * 50, b""), "not a whole state"),
    "no metadata": (lambda data: put_together({"__metadata__": {}}, b""), "no state of VisualRWKV"),
    "other format": (lambda data: with_metadata(data, format="pt"), "no state of VisualRWKV"),
    "version missing": (lambda data: with_metadata(data, version=None), "a state of version None"),
    "version hostile": (lambda data: with_metadata(data, version=SECRET), "a state of version"),
    "pixel dtype missing": (lambda data: with_metadata(data, pixel_dtype=None), "its pixel_dtype is None"),
    "pixel dtype no dtype": (lambda data: with_metadata(data, pixel_dtype="nn"), "its pixel_dtype is nn"),
    "pixel dtype hostile": (lambda data: with_metadata(data, pixel_dtype=SECRET), "its pixel_dtype is"),
    "fingerprint missing": (lambda data: with_metadata(data, fingerprint=None), "fingerprint cannot be read"),
    "fingerprint deep": (lambda data: with_metadata(data, fingerprint="[" * 60_000), "fingerprint cannot be read"),
    "fingerprint long": (lambda data: with_metadata(data, fingerprint=" " * 70_000), "fingerprint cannot be read"),
    "fingerprint a list": (lambda data: with_metadata(data, fingerprint="[]"), "fingerprint cannot be read"),
    "fingerprint of lists": (
        lambda data: with_metadata(data, fingerprint='{"model": [], "processor": {}}'),
        "fingerprint cannot be read",
    ),
    "fingerprint of digits": (
        lambda data: with_metadata(data, fingerprint='{"model": {"a": ' + "9" * 9999 + '}, "processor": {}}'),
        "fingerprint cannot be read",
    ),
    "fingerprint with more": (
        lambda data: with_metadata(data, fingerprint='{"model": {}, "processor": {}, "more": {}}'),
        "fingerprint cannot be read",
    ),
    "beginnings missing": (lambda data: with_beginnings(data, "{}"), "with which tuned state each of 2 samples"),
    "beginnings of one": (lambda data: with_beginnings(data, '{"identities": ["a"]}'), "each of 2 samples began"),
    "beginnings a text": (lambda data: with_beginnings(data, '{"identities": "ab"}'), "each of 2 samples began"),
    "beginnings of lists": (
        lambda data: with_beginnings(data, '{"identities": [null, []]}'), "each of 2 samples began"
    ),
    "NaN": (lambda data: with_tensor(data, "layers.1.wkv", NAN), r"layers.1.wkv holds NaN or infinite"),
    "infinity": (lambda data: with_tensor(data, "layers.0.token_shift1", INFINITE), "token_shift1 holds NaN"),
    "name unknown": (lambda data: renamed(data, "layers.0.wkv", "weights"), "a tensor named weights"),
    "name hostile": (lambda data: renamed(data, "layers.0.wkv", SECRET), "a tensor named"),
    "name of a path": (lambda data: renamed(data, "layers.0.wkv", "../../x"), "a tensor named ../../x"),
    "layer missing": (lambda data: renamed(data, "layers.0.wkv", "layers.7.wkv"), "layer 2 is missing"),
    "layer of many digits": (
        lambda data: renamed(data, "layers.0.wkv", f"layers.{'9' * 5000}.wkv"), "a tensor named layers.999"
    ),
    "shift missing": (lambda data: without(data, "layers.1.token_shift1"), "do not have the same states"),
    "row missing": (lambda data: without(data, "read_ids.1"), "of 2 samples, the file says what 1 have read"),
    "rows renumbered": (lambda data: renamed(data, "read_ids.1", "read_ids.3"), "read_ids.1 is missing"),
    "hashes missing": (lambda data: without(data, "picture_hashes.0"), "do not fit each other"),
    "shape of three": (
        lambda data: edited(data, "layers.0.token_shift0", shape=[2, 1, 32]), "token_shift0 has shape"
    ),
    "shape turned": (
        lambda data: edited(data, "layers.0.token_shift0", shape=[32, 2]), "is of 32 samples"
    ),
    "shape negative": (
        lambda data: edited(data, "layers.0.token_shift0", shape=[-2, 32]), "not a whole state"
    ),
    "shape overflowing": (
        lambda data: edited(data, "layers.0.token_shift0", shape=[2**62, 2**62]), "not a whole state"
    ),
    "dtype of words": (lambda data: edited(data, "read_ids.0", dtype="F64"), "dtype F64"),
    "dtype of states": (lambda data: edited(data, "layers.0.wkv", dtype="I32"), "dtype I32"),
    "dtype unknown": (lambda data: edited(data, "layers.0.wkv", dtype="Q4"), "not a whole state"),
    "offsets beyond": (
        lambda data: edited(data, "layers.0.wkv", data_offsets=[0, 1 << 40]), "not a whole state"
    ),
    "offsets overlapping": (
        lambda data: edited(data, "layers.0.wkv", data_offsets=[0, 4096]), "not a whole state"
    ),
    "picture ends beyond": (
        lambda data: with_tensor(data, "picture_ends.0", torch.tensor([1 << 40])), "picture_ends holds"
    ),
    "picture ends before it": (
        lambda data: with_tensor(data, "picture_ends.0", torch.tensor([-1])), "picture_ends holds -1"
    ),
    "another hash": (
        lambda data: with_tensor(data, "picture_hashes.1", torch.zeros(1, 32, dtype=torch.uint8)),
        r"another hash \(row 1\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_in_one_sentence(whole, fault, tmp_path):
    damage, expected = FAULTS[fault]
    (tmp_path / "right").write_bytes(whole)
    KeptState.load(tmp_path / "right")
    message = refusal(tmp_path, damage(whole))
    assert re.search(expected, message), message


def test_damage_at_random_is_refused_or_harmless(whole, model, tmp_path):
    """2,000 files with bytes changed, cut out or put in: what loads is finite and of the right shapes."""
    dice, path, loaded = random.Random(0), tmp_path / "state", 0
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(dice.choice((1, 1, 2, 5, 40))):
            place = dice.randrange(header_end if dice.random() < 0.7 else len(data))
            what = dice.random()
            if what < 0.7:
                data[place] = dice.randrange(256)
            elif what < 0.85:
                del data[place : place + dice.choice((1, 8, 100))]
            else:
                data[place:place] = dice.randbytes(dice.choice((1, 8, 100)))
        path.write_bytes(data)
        try:
            state = KeptState.load(path, model)
        except ValueError as error:
            assert type(error) is ValueError and str(error).isprintable(), error
            assert len(str(error)) < LONGEST_MESSAGE + len(str(path))
        else:
            loaded += 1
            assert all(bool(t.isfinite().all()) for layer in state.layers for t in layer.values())
            assert [tuple(t.shape) for t in state.layers[1].values()] == [(2, 32), (2, 32), (2, 2, 16, 16)]
    assert loaded, "bytes inside of tensors may be any"


def test_shapes_of_another_model_are_refused_whatever_the_fingerprint_says(whole, model, tmp_path):
    """A fingerprint is only a claim."""
    path = tmp_path / "state"
    path.write_bytes(whole)
    state = KeptState.load(path)
    halves = [
        {name: tensor[..., :16] if name != "wkv" else tensor[:, :1] for name, tensor in layer.items()}
        for layer in state.layers
    ]
    forged = KeptState(halves, state.prompts, state.pixel_dtype, state.fingerprint)
    forged.save(path)
    assert "token_shift0 of shape [16] in layer 0, the model's is of [32]" in refusal(
        tmp_path, path.read_bytes(), model=model
    )
    with pytest.raises(ValueError, match=r"The state has a token_shift0 of shape \[16\]"):
        model.generate(torch.ones(2, 99, dtype=torch.long), past_key_values=KeptState.load(path))
    fewer = KeptState(state.layers[:1], state.prompts, state.pixel_dtype, state.fingerprint)
    fewer.save(path)
    assert "has 1 layers, the model has 2" in refusal(tmp_path, path.read_bytes(), model=model)


def test_a_hostile_fingerprint_is_shown_in_short(whole, model, tmp_path):
    fields = {SECRET + str(number): SECRET for number in range(5)}
    fingerprint = json.dumps({"model": fields, "processor": {}})
    path = tmp_path / "state"
    path.write_bytes(with_metadata(whole, fingerprint=fingerprint))
    with pytest.raises(ValueError, match="was read by another model") as caught:
        KeptState.load(path, model)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 5000


def test_what_is_no_file_is_refused(whole, tmp_path):
    with pytest.raises(FileNotFoundError):
        KeptState.load(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError):
        KeptState.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is not a regular file"):
        KeptState.load(tmp_path / "pipe")


def test_a_huge_file_is_not_read(whole, tmp_path):
    """Neither one above the limit nor one of holes, which takes no room on the disk."""
    path = tmp_path / "state"
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"bytes, more than max_bytes \(1,000\)"):
        KeptState.load(path, max_bytes=1000)
    os.truncate(path, 5 << 30)
    with pytest.raises(ValueError, match=r"5,368,709,120 bytes, more than max_bytes"):
        KeptState.load(path)


KILLER = """
import os, random, signal, sys, time
import torch
from visualrwkv_hf import KeptState
from visualrwkv_hf.prompt_identity import PromptIdentity

folder, kills = sys.argv[1], int(sys.argv[2])
path = os.path.join(folder, "state")
torch.set_num_threads(1)

def state_of(value):
    shapes = {"token_shift0": (1, 768), "token_shift1": (1, 768), "wkv": (1, 12, 64, 64)}
    layers = [{name: torch.full(shape, value) for name, shape in shapes.items()} for _ in range(12)]
    prompt = PromptIdentity(torch.full((50,), int(value)))
    return KeptState(layers, (prompt,), fingerprint={"model": {"value": value}, "processor": {}})

states = [state_of(1.0), state_of(2.0)]
states[0].save(path)
start = time.perf_counter()
states[0].save(path)
duration = time.perf_counter() - start
dice, killed_inside = random.Random(0), 0
for kill in range(kills):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        for number in range(10**9):
            os.write(writer, b"(")
            states[number % 2].save(path)
            os.write(writer, b")")
    os.close(writer)
    marks = b""
    while marks.count(b"(") < 2 + kill % 3:  # it saves: once at least, and is in the next one
        marks += os.read(reader, 1)
    time.sleep(dice.random() * duration)
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "it has ended by itself"
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    while more := os.read(reader, 4096):
        marks += more
    os.close(reader)
    killed_inside += marks.endswith(b"(")
    found = KeptState.load(path)
    value = found.layers[0]["wkv"].flatten()[0].item()
    assert value in (1.0, 2.0) and found.fingerprint["model"] == {"value": value}
    assert all(bool((t == value).all()) for layer in found.layers for t in layer.values())
    assert found.read_ids[0].tolist() == [int(value)] * 50
print(killed_inside)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_save_that_is_killed_leaves_a_whole_file(tmp_path):
    """kill -9 at 20 random moments of saves that run: the file is the old one or the new one."""
    command = [sys.executable, "-c", KILLER, str(tmp_path), "20"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= 5, "most of the kills hit a save that had begun and had not ended"
