"""A model divided by heads among two processes writes what the whole one writes."""

import copy

import pytest
import torch
from released_folders import write_release, write_text_model
from transformers import AutoProcessor
from vllm_engines import answers, generated, mixed_chats, requests

from visualrwkv_hf import VisualRWKVForCausalLM, VisualRWKVForConditionalGeneration, VisualRWKVTextConfig
from visualrwkv_hf.generations import GENERATIONS


@pytest.mark.parametrize("version", GENERATIONS)
@torch.no_grad()
def test_the_parts_of_a_block_add_up_to_the_whole(version, tmp_path):
    from visualrwkv_hf.vllm.parallel import keep_part

    folder = write_text_model(tmp_path / "model", version)
    whole = VisualRWKVForCausalLM.from_pretrained(folder).eval().model.layers
    parts = [copy.deepcopy(whole) for _ in range(2)]
    for number, blocks in enumerate(parts):
        keep_part(blocks, number, 2)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    values, values_of_parts = None, [None, None]
    for layer, block in enumerate(whole):
        expected, values, _ = block.att(x, values)
        pieces = [blocks[layer].att(x, v) for blocks, v in zip(parts, values_of_parts)]
        values_of_parts = [piece[1] for piece in pieces]
        torch.testing.assert_close(pieces[0][0] + pieces[1][0], expected, atol=1e-5, rtol=1e-5)
        expected = block.ffn(x)[0]
        pieces = [blocks[layer].ffn(x)[0] for blocks in parts]
        torch.testing.assert_close(pieces[0] + pieces[1], expected, atol=1e-5, rtol=1e-5)
        assert pieces[0].norm() > 0.1 * expected.norm(), "one part has everything"


def test_two_processes_write_what_generate_writes(tmp_path, start_engine, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # vLLM wants a NUMA node for each
    folder = write_release(tmp_path / "model", "v7.02")
    processor = AutoProcessor.from_pretrained(folder)
    model = VisualRWKVForConditionalGeneration.from_pretrained(folder).eval()
    chats = mixed_chats(9)
    expected = [generated(model, processor, chat) for chat in chats]
    engine = start_engine(folder, tensor_parallel_size=2, max_num_batched_tokens=64)
    assert answers(engine, requests(processor, chats)) == expected


def test_heads_that_cannot_be_shared_are_refused():
    from visualrwkv_hf.vllm.parallel import refuse_uneven_parts

    config = VisualRWKVTextConfig(hidden_size=64, head_dim=16, intermediate_size=96)
    refuse_uneven_parts(config, 2)
    with pytest.raises(
        ValueError, match=r"tensor_parallel_size=3: .* num_attention_heads \(4\) is no multiple"
    ):
        refuse_uneven_parts(config, 3)
    with pytest.raises(ValueError, match=r"intermediate_size \(98\)"):
        refuse_uneven_parts(VisualRWKVTextConfig(hidden_size=64, head_dim=16, intermediate_size=98), 4)
