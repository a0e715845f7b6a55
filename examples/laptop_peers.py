"""The files that llama.cpp reads for benchmark_laptop.py, and whether it computes what this package computes."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from laptop_models import Model, RandomWeights, config_of, original_shapes
from llama_cpp_engine import reader, write_gguf

from visualrwkv_hf import VisualRWKVForCausalLM, VisualRWKVTextConfig
from visualrwkv_hf.conversion import restore_state_dict

TOKENS = 40
"""Length of the text on which logits are compared."""


class LanguageModel(Mapping[str, torch.Tensor]):
    """The language model's weights under the original's names without `rwkv.`."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self.tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[f"rwkv.{name}"]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix("rwkv.") for name in self.tensors if name.startswith("rwkv."))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@torch.inference_mode()
def gguf_file(model: Model, path: Path, precision: str) -> Path:
    """Return `path` with the language model of a shape and the weights of its folder, written first if need be."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        config = config_of(model)
        weights = LanguageModel(RandomWeights(original_shapes(config)))
        unfinished = path.with_suffix(".unfinished")
        write_gguf(unfinished, weights, config.text_config, precision)
        unfinished.replace(path)
    return path


@torch.inference_mode()
def disagreement(generation: int, folder: Path) -> float:
    """Return the relative norm error of llama.cpp's logits on a small model of a generation, in float32.

    Args:
        generation: 6 or 7.
        folder: for the file, which is deleted again.
    """
    torch.manual_seed(0)
    config = VisualRWKVTextConfig(
        rwkv_version=generation, vocab_size=512, hidden_size=128, num_hidden_layers=3
    )
    model = VisualRWKVForCausalLM(config).eval()
    for weight in model.parameters():
        weight.data.add_(torch.randn_like(weight), alpha=0.05)
    tokens = torch.randint(1, config.vocab_size, (TOKENS,))
    expected = model(tokens[None]).logits[0, -1]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / "model.gguf"
        weights = LanguageModel(restore_state_dict(model.state_dict(), config))
        write_gguf(path, weights, config, "float32")
        logits, _ = reader(path, config.vocab_size)(tokens, None)
    return ((logits - expected).norm() / expected.norm()).item()
