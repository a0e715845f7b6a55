"""Checkpoints of strangers: every file ends in a model folder or in one sentence, and in finite time."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from visualrwkv_hf.conversion import ConversionError
from visualrwkv_hf.conversion.checkpoint import Checkpoint, open_tensors, same_bits


def safetensors_with_header_length(path, length: int) -> None:
    """A valid file of one tensor whose header has exactly `length` bytes."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    path.write_bytes(struct.pack("<Q", length) + header.ljust(length) + b"\x07")


@pytest.mark.parametrize("first", [b"<", b"{", b" <", b"\n{"])
def test_a_header_length_may_look_like_text(tmp_path, first):
    length = int.from_bytes(first, "little") + (256 if len(first) == 1 else 0)
    safetensors_with_header_length(tmp_path / "a.safetensors", length)
    assert (tmp_path / "a.safetensors").read_bytes().startswith(first)
    assert Checkpoint([tmp_path / "a.safetensors"])["a"].tolist() == [7]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html><body>404</body></html>", "is a web page"),
        (b"\n\n <!doctype html>", "is a web page"),
        (b'{"a": 12{"', "is a JSON file"),
        (b'{"error"{: "not found"}', "is a JSON file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (struct.pack("<Q", 10**6) + b'{"a":', "truncated or damaged|is not a checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_told(tmp_path, content, message):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ConversionError, match=message):
        open_tensors(tmp_path / "a.pth")


def test_a_dict_that_holds_itself_ends(tmp_path):
    loop: dict = {}
    loop["state_dict"] = loop
    torch.save(loop, tmp_path / "loop.pth")
    with pytest.raises(ConversionError, match="nested more than 8 deep, or hold themselves"):
        open_tensors(tmp_path / "loop.pth")


def test_some_nesting_is_opened(tmp_path):
    nested: dict = {"a": torch.ones(1)}
    for _ in range(7):
        nested = {"state_dict": nested}
    torch.save(nested, tmp_path / "nested.pth")
    assert list(open_tensors(tmp_path / "nested.pth")) == ["a"]


@pytest.mark.parametrize("offset", range(9))
def test_bits_are_compared_from_any_offset(offset):
    """A tensor of bytes behind an odd number of others begins at no multiple of 8 of its storage."""
    values = torch.arange(64, dtype=torch.uint8)
    tensor = values[offset : offset + 40]
    assert same_bits(tensor, tensor.clone()) and same_bits(tensor.clone(), tensor)
    other = tensor.clone()
    other[-1] += 1
    assert not same_bits(tensor, other)
    halves = torch.arange(64, dtype=torch.float16)[offset : offset + 7]
    assert same_bits(halves, halves.clone())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_other_dtypes_are_refused_by_name(tmp_path, dtype, ending):
    path = tmp_path / f"a.{ending}"
    tensors = {"emb.weight": torch.zeros(2, 2, dtype=dtype)}
    try:
        torch.save(tensors, path) if ending == "pth" else save_file(tensors, path)
    except (KeyError, ValueError):
        pytest.skip(f"safetensors cannot hold {dtype}")
    with pytest.raises(ConversionError, match=r"tensor emb\.weight is stored as .*can be stored as float64"):
        Checkpoint([path])


def test_a_sparse_tensor_is_refused(tmp_path):
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "a.pth")
    with pytest.raises(ConversionError, match=r"tensor a is stored as a tensor of layout torch\.sparse_coo"):
        Checkpoint([tmp_path / "a.pth"])
