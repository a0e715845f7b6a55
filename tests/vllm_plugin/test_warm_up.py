"""Steps in which vLLM warms up or measures memory: there are no requests, and no places in the pool."""

from types import SimpleNamespace

import pytest
import torch
from released_folders import write_text_model


@pytest.mark.parametrize("metadata", [None, {}], ids=["none", "without our layers"])
def test_a_step_without_metadata_reads_prompts_of_as_many_requests_as_may_be(
    metadata, tmp_path, start_engine, monkeypatch
):
    """vLLM's runner V2 gives an empty dictionary where it tunes kernels."""
    from visualrwkv_hf.vllm import language_model

    engine = start_engine(write_text_model(tmp_path / "model", 7), max_num_seqs=5)
    context = SimpleNamespace(attn_metadata=metadata)
    monkeypatch.setattr(language_model, "get_forward_context", lambda: context)
    seen = []

    @torch.no_grad()
    def warm_up(model):
        def run_blocks(hidden_states, v_first, orders, holders):
            seen.append((orders[0].cu_seqlens.tolist(), [len(h.state().get("wkv")) for h in holders]))
            return original(hidden_states, v_first, orders, holders)

        original, model.run_blocks = model.run_blocks, run_blocks
        pools = [pool.clone() for states in model.states for pool in states.kv_cache]
        made = [model(torch.arange(5, 5 + length), torch.arange(length)) for length in (12, 3)]
        assert all(x.isfinite().all() for x in made) and [x.shape for x in made] == [(12, 64), (3, 64)]
        kept = [pool for states in model.states for pool in states.kv_cache]
        assert all(map(torch.equal, pools, kept)), "a warm-up wrote into vLLM's pool"

    engine.apply_model(warm_up)
    assert seen == [([0, 2, 4, 7, 9, 12], [5] * 3), ([0, 1, 2, 3], [3] * 3)]
