"""Packed sequences that continue, each in its own slot of a pool of states: with Triton kernels as in plain torch."""

import pytest
import torch
from tiny import awake, text_config
from triton_interpreter import POISONED_KERNELS

from visualrwkv_hf import VisualRWKVForCausalLM
from visualrwkv_hf.dispatch import kernel_backend
from visualrwkv_hf.generations import GENERATIONS
from visualrwkv_hf.layer_state import LayerState, PlainStateHolder, empty_pool
from visualrwkv_hf.token_order import IN_ORDER, token_orders

pytestmark = POISONED_KERNELS


@torch.no_grad()
@pytest.mark.parametrize("version", [5, 6, 7])
def test_kernels_read_and_write_the_slots_of_packed_sequences(version):
    config = text_config(version, head_dim=32, num_hidden_layers=2)
    model = awake(VisualRWKVForCausalLM(config)).model
    ids = torch.randint(1, 300, (1, 9), generator=torch.Generator().manual_seed(0))
    orders = token_orders(torch.arange(9)[None], None, [None], torch.tensor([0, 4, 9]))
    results = []
    for backend in ("torch", "triton"):  # "triton" raises where it has to fall back
        states = GENERATIONS[version].states
        pools = [empty_pool(states, config, 4, torch.float32, "cpu") for _ in model.layers]
        holders = [PlainStateHolder(LayerState(pool, torch.tensor([2, 0]))) for pool in pools]
        with kernel_backend(backend):
            chunks = [model.run_blocks(model.embed_tokens(ids), orders, holders) for _ in range(2)]
            token = model.run_blocks(model.embed_tokens(torch.tensor([[5], [6]])), [IN_ORDER], holders)
        results.append([*chunks, token, *(pool[name] for pool in pools for name in sorted(pool))])
    for plain, fast in zip(*results):
        # float32, values up to 30 after two blocks: summed in another order
        torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-4)
