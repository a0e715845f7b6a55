"""A model divided by blocks among stages writes what the whole one writes."""

import copy

import pytest
import torch
from released_folders import released_config, write_release, write_text_model
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer
from vllm_engines import NEW_TOKENS, WORDS, answers, generated, mixed_chats, requests

from visualrwkv_hf import VisualRWKVForCausalLM, VisualRWKVForConditionalGeneration, VisualRWKVTextConfig
from visualrwkv_hf.generations import GENERATIONS
from visualrwkv_hf.token_order import IN_ORDER


@pytest.fixture(autouse=True)
def threads_where_they_are(monkeypatch):
    """vLLM wants a NUMA node for each process."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def stages_of(model, *bounds):
    """A copy of the model for each stage, with the blocks from one bound to the next."""
    from visualrwkv_hf.vllm.stages import Stage, keep_stage

    made = [copy.deepcopy(model) for _ in bounds[1:]]
    for one, begin, end in zip(made, bounds, bounds[1:]):
        keep_stage(one, Stage(begin, end, begin == 0, end == bounds[-1]))
    return made


@pytest.mark.parametrize("version", GENERATIONS)
@torch.no_grad()
def test_stages_one_after_the_other_are_the_whole(version, tmp_path):
    whole = VisualRWKVForCausalLM.from_pretrained(write_text_model(tmp_path / "model", version)).eval()
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1))
    hidden, values = x, None
    stages = stages_of(whole, 0, 1, 3)
    for stage in stages:
        hidden, values = stage.model.run_layers(stage.model.embed_norm(hidden), values, [IN_ORDER])
        hidden = stage.model.norm(hidden)
        assert (values is not None) == GENERATIONS[version].hands_on_values
    torch.testing.assert_close(hidden, whole.model.norm(whole.model.run_blocks(x, [IN_ORDER])))
    assert not stages[0].lm_head.state_dict() and stages[1].lm_head.state_dict()


@pytest.mark.parametrize("release", ["v6.01", "v7.03"])
def test_each_weight_is_in_one_stage(release):
    """The second one has a compressor, whose blocks are not those of the language model."""
    model = VisualRWKVForConditionalGeneration(released_config(release))
    first, second = stages_of(model, 0, 2, 3)
    counts = [sum(weight.numel() for weight in part.parameters()) for part in (model, first, second)]
    assert counts[0] == counts[1] + counts[2]
    names = [name for name, _ in second.named_parameters()]
    assert all(
        name.startswith(("model.language_model.layers.0.", "model.language_model.norm.", "lm_head."))
        for name in names
    )
    assert second.model.language_model.layers[0].layer_idx == 2


def test_devices_that_share_the_heads_hand_on_the_same(monkeypatch):
    """On GPUs vLLM has each of them send a part of every tensor; on CPUs it does not, so an engine here cannot tell."""
    from vllm.sequence import IntermediateTensors

    from visualrwkv_hf.vllm import stages

    hidden, whole = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    parts = whole.chunk(2, -1)
    monkeypatch.setattr(stages, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(stages, "tensor_model_parallel_all_gather", lambda part: torch.cat(parts, -1))
    for rank, part in enumerate(parts):
        monkeypatch.setattr(stages, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        made = stages.handed_on(hidden, part)
        assert torch.equal(made[stages.HIDDEN_STATES], hidden) and torch.equal(made[stages.V_FIRST], whole)
        assert torch.equal(stages.received(IntermediateTensors(made))[1], part)


def test_three_stages_write_what_a_text_model_writes(tmp_path, start_engine):
    """The stage in the middle gets `v_first` and hands it on."""
    folder = write_text_model(tmp_path / "model", 7)
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder).eval(),
    )
    texts = [" ".join(WORDS[: 1 + number % 15]) + f" {number}?" for number in range(12)]
    expected = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        output = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        expected.append(output[0, ids.shape[1] :].tolist())
    engine = start_engine(folder, pipeline_parallel_size=3, max_num_batched_tokens=11)
    assert answers(engine, texts) == expected


@pytest.mark.parametrize(
    "release, options",
    [
        ("v6.01", {"pipeline_parallel_size": 2}),
        ("v7.02", {"pipeline_parallel_size": 2, "tensor_parallel_size": 2}),
    ],
    ids=["four orders", "and by heads"],
)
def test_stages_write_what_generate_writes(release, options, tmp_path, start_engine):
    """The layers of v6.01 read pictures in four orders: the only layer of the second stage reads in the third one."""
    folder = write_release(tmp_path / "model", release)
    processor = AutoProcessor.from_pretrained(folder)
    model = VisualRWKVForConditionalGeneration.from_pretrained(folder).eval()
    chats = mixed_chats(9)
    expected = [generated(model, processor, chat) for chat in chats]
    engine = start_engine(folder, max_num_batched_tokens=64, **options)
    assert answers(engine, requests(processor, chats)) == expected


def test_stages_without_a_block_are_refused(monkeypatch):
    from visualrwkv_hf.vllm.stages import refuse_empty_stages

    config = VisualRWKVTextConfig(num_hidden_layers=3, hidden_size=64, head_dim=16)
    refuse_empty_stages(config, 3)
    with pytest.raises(ValueError, match=r"pipeline_parallel_size=4: .* num_hidden_layers is 3"):
        refuse_empty_stages(config, 4)
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "3,0")
    with pytest.raises(ValueError, match=r"VLLM_PP_LAYER_PARTITION: .* got \[3, 0\]"):
        refuse_empty_stages(config, 2)
