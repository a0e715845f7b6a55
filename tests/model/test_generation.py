"""generate() over the recurrent state: every way of decoding, with and without pictures, cached or not."""

from contextlib import contextmanager

import pytest
import torch
from tiny import pixels, prompt, tiny_vlm
from transformers import DynamicCache, StaticCache

from visualrwkv_hf import (
    KeptState,
    StateStore,
    VisualRWKVCache,
    VisualRWKVForConditionalGeneration,
    VisualRWKVStaticCache,
)
from visualrwkv_hf.prompt_identity import Pictures, PromptIdentity, identify_prompt

VERSIONS = (5, 6, 7)
GREEDY = dict(max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda version: f"rwkv{version}")
def model(request) -> VisualRWKVForConditionalGeneration:
    return tiny_vlm(version=request.param)


@pytest.fixture
def inputs(model) -> dict:
    return {"input_ids": prompt(model), "pixel_values": pixels()}


def new_tokens(output: torch.Tensor, inputs: dict) -> torch.Tensor:
    return output[:, inputs["input_ids"].shape[1] :]


@contextmanager
def counted_calls(module):
    """Yield a list that gets an entry at each call of `module`."""
    calls: list = []
    handle = module.register_forward_hook(lambda *args: calls.append(None))
    try:
        yield calls
    finally:
        handle.remove()


def test_cached_equals_recomputed(model, inputs):
    cached = model.generate(**inputs, **GREEDY)
    assert cached.tolist() == model.generate(**inputs, **GREEDY, use_cache=False).tolist()


def test_generate_equals_a_loop_over_forward(model, inputs):
    ids = inputs["input_ids"]
    for _ in range(GREEDY["max_new_tokens"]):
        with torch.no_grad():
            logits = model(ids, pixel_values=inputs["pixel_values"], use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    assert model.generate(**inputs, **GREEDY).tolist() == ids.tolist()


@pytest.mark.parametrize(
    "options",
    [
        dict(cache_implementation="static"),
        dict(cache_implementation="dynamic"),
        dict(cache_implementation="offloaded"),
        dict(prompt_lookup_num_tokens=3),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_other_ways_give_the_greedy_answer(model, inputs, options):
    assert (
        model.generate(**inputs, **GREEDY, **options).tolist() == model.generate(**inputs, **GREEDY).tolist()
    )


def test_assisted_decoding_by_a_text_model_gives_the_greedy_answer(model):
    """The assistant is another model: its guesses are often wrong and taken back."""
    from tiny import awake, text_config

    from visualrwkv_hf import VisualRWKVForCausalLM

    ids = torch.randint(1, 300, (1, 9), generator=torch.Generator().manual_seed(3))
    assistant = awake(VisualRWKVForCausalLM(text_config(7)), seed=5)
    for helper in (assistant, VisualRWKVForCausalLM(model.config.text_config)):
        helper.eval()
        assisted = model.generate(ids, **GREEDY, assistant_model=helper)
        assert assisted.tolist() == model.generate(ids, **GREEDY).tolist()


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("from_state", [False, True], ids=["whole prompt", "kept state"])
def test_an_assistant_sees_the_picture(version, from_state):
    """The assistant, which has the same weights here, encodes and reads the picture once, and guesses all right."""
    model = tiny_vlm(version=version)
    inputs = {"input_ids": prompt(model, after=12), "pixel_values": pixels()}
    assistant = tiny_vlm(version=version)
    expected = model.generate(**inputs, **GREEDY)
    past = {}
    if from_state:
        with torch.no_grad():
            cache = model(
                inputs["input_ids"][:, :-4], pixel_values=inputs["pixel_values"], use_cache=True
            ).past_key_values
        pictures = Pictures.of(inputs, model.config)
        (whole,) = identify_prompt(model.config, inputs["input_ids"], None, pictures, torch.float32)
        past = {
            "past_key_values": KeptState.of(
                cache, [whole.beginning(len(inputs["input_ids"][0]) - 4)], torch.float32
            )
        }
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    seen = []
    assistant.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("mm_encoder_outputs")), with_kwargs=True
    )
    with counted_calls(model.lm_head) as steps:
        assisted = model.generate(**inputs, **GREEDY, **past, assistant_model=assistant)
    assert assisted.tolist() == expected.tolist()
    assert len(steps) == 2, "10 tokens: all guesses are right, 4 a step, and one is the model's own"
    assert seen[0] and not any(seen[1:])
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    assert torch.equal(torch.cat(list(seen[0]["image"].pooler_output)), torch.cat(list(features)))


def test_an_assistant_of_another_generation_sees_the_picture(model):
    inputs = {"input_ids": prompt(model), "pixel_values": pixels()}
    assistant = tiny_vlm(version=6 if model.config.text_config.rwkv_version == 7 else 7)
    assisted = model.generate(**inputs, **GREEDY, assistant_model=assistant)
    assert assisted.tolist() == model.generate(**inputs, **GREEDY).tolist()


def test_a_text_model_assists_over_a_picture(model, inputs):
    """It reads the placeholders as tokens: its guesses are poor, and the answer is the same."""
    from visualrwkv_hf import VisualRWKVForCausalLM

    assistant = VisualRWKVForCausalLM(model.config.text_config).eval()
    assisted = model.generate(**inputs, **GREEDY, assistant_model=assistant)
    assert assisted.tolist() == model.generate(**inputs, **GREEDY).tolist()


def beam_search(model, inputs: dict, num_beams: int, steps: int) -> tuple[list[int], float]:
    """Plain beam search by recomputing: an oracle for transformers' own over our cache."""
    beams = [([], 0.0)]
    prefix = inputs["input_ids"][0].tolist()
    for _ in range(steps):
        grown = []
        for words, score in beams:
            with torch.no_grad():
                logits = model(
                    torch.tensor([prefix + words]), pixel_values=inputs["pixel_values"], use_cache=False
                ).logits[0, -1]
            logits[model.config.image_token_id] = float("-inf")
            best = torch.log_softmax(logits, -1).topk(num_beams)
            grown += [
                (words + [int(word)], score + float(value)) for value, word in zip(best.values, best.indices)
            ]
        beams = sorted(grown, key=lambda beam: -beam[1])[:num_beams]
    return beams[0]


def test_beam_search_equals_the_plain_algorithm(model, inputs):
    options = dict(GREEDY, max_new_tokens=5, num_beams=3, length_penalty=0.0)
    options["suppress_tokens"] = [
        model.config.image_token_id
    ]  # random weights would write it; the oracle reads it
    found = new_tokens(model.generate(**inputs, **options), inputs)[0].tolist()
    assert found == beam_search(model, inputs, 3, 5)[0]


def test_beams_and_several_pictures_in_a_prompt(model):
    ids = torch.cat([prompt(model), prompt(model, seed=1)], dim=1)
    inputs = {"input_ids": ids.repeat(2, 1), "pixel_values": pixels(4)}
    alone = [
        model.generate(ids, pixel_values=pixels(4)[2 * row : 2 * row + 2], **GREEDY, num_beams=2)
        for row in range(2)
    ]
    together = model.generate(**inputs, **GREEDY, num_beams=2)
    assert together.tolist() == torch.cat(alone).tolist()


def test_num_return_sequences(model, inputs):
    torch.manual_seed(0)
    output = model.generate(
        **inputs, max_new_tokens=8, do_sample=True, num_return_sequences=4, eos_token_id=None
    )
    assert output.shape == (4, inputs["input_ids"].shape[1] + 8)
    assert len({tuple(row) for row in new_tokens(output, inputs).tolist()}) > 1
    beams = model.generate(**inputs, **GREEDY, num_beams=4, num_return_sequences=3)
    assert len({tuple(row) for row in beams.tolist()}) == 3


def test_left_padded_batches_equal_rows_alone(model):
    """A long prompt, a short one and text alone: pads on the left change nothing."""
    words = torch.randint(1, 300, (1, 7), generator=torch.Generator().manual_seed(2))
    rows = [prompt(model, 3, 9), prompt(model, 2, 4, seed=1), words]
    pictures = [pixels(1, seed=1), pixels(1, seed=2), None]
    length = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (length - row.shape[1], 0)) for row in rows])
    mask = torch.cat(
        [torch.nn.functional.pad(torch.ones_like(row), (length - row.shape[1], 0)) for row in rows]
    )
    batch = model.generate(ids, attention_mask=mask, pixel_values=torch.cat(pictures[:2]), **GREEDY)[
        :, length:
    ]
    for row, picture, together in zip(rows, pictures, batch):
        picture = {} if picture is None else {"pixel_values": picture}
        alone = model.generate(row, **picture, **GREEDY)[0, row.shape[1] :]
        assert together.tolist() == alone.tolist()


def test_inputs_embeds(model, inputs):
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
        placeholders = inputs["input_ids"] == model.config.image_token_id
        embeds[placeholders] = features[0]
        # No placeholder is left in the embeddings, so the order of the patches has to be told.
        orders = torch.stack([torch.arange(embeds.shape[1]) if o is None else o[0] for o in
                              model.model.scan_orders(placeholders)])[None]  # fmt: skip
        direct = model.generate(inputs_embeds=embeds, scan_orders=orders, **GREEDY)
    assert direct.tolist() == new_tokens(model.generate(**inputs, **GREEDY), inputs).tolist()


def test_inputs_embeds_with_pixels_find_their_placeholders(model, inputs):
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    direct = model.generate(inputs_embeds=embeds, pixel_values=inputs["pixel_values"], **GREEDY)
    assert direct.tolist() == new_tokens(model.generate(**inputs, **GREEDY), inputs).tolist()


def test_a_chat_goes_on_from_a_returned_cache(model, inputs):
    """Second turn over the first one's state == both turns in one prompt."""
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    question = torch.randint(1, 300, (1, 5), generator=torch.Generator().manual_seed(9))
    whole = torch.cat([first.sequences, question], 1)
    expected = model.generate(whole, pixel_values=inputs["pixel_values"], **GREEDY)
    actual = model.generate(whole, past_key_values=first.past_key_values, **GREEDY)
    assert actual.tolist() == expected.tolist()
    # the same with nothing but the new words: the last one generated was not read yet
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    unread = whole[:, first.past_key_values.get_seq_length() :]
    with torch.no_grad():
        logits = model(unread, past_key_values=first.past_key_values).logits[:, -1]
    assert logits.argmax(-1).tolist() == expected[:, whole.shape[1]].tolist()


def test_a_users_cache_is_used(model, inputs):
    cache = VisualRWKVCache(model.config)
    output = model.generate(**inputs, **GREEDY, past_key_values=cache)
    assert cache.get_seq_length() == output.shape[1] - 1


@pytest.mark.parametrize("num_pads", [0, 3], ids=["", "padded"])
def test_a_whole_chat_with_its_pictures_goes_on_from_a_running_cache(model, num_pads):
    """The picture of the first turn is given again, and only that of the second is encoded."""
    first = padded(prompt(model, before=5), num_pads) | {"pixel_values": pixels(3)[:1]}
    cache = VisualRWKVCache(model.config)
    options = GREEDY | {"suppress_tokens": [model.config.image_token_id]}  # random weights would write it
    answer = model.generate(**first, **options, past_key_values=cache)
    for pictures in (pixels(3)[:2], pixels(3)):
        chat = torch.cat([answer, prompt(model, 2, 4, seed=len(pictures))], 1)
        mask = torch.nn.functional.pad(
            first["attention_mask"], (0, chat.shape[1] - first["attention_mask"].shape[1]), value=1
        )
        whole = {"input_ids": chat, "attention_mask": mask, "pixel_values": pictures}
        with counted_calls(model.model.vision_tower) as encoded:
            answer = model.generate(**whole, **options, past_key_values=cache)
        assert len(encoded) == 1
        assert answer.tolist() == model.generate(**whole, **options).tolist()
    chat = torch.cat([answer, torch.ones(1, 4, dtype=torch.long)], 1)
    with counted_calls(model.model.vision_tower) as encoded:
        answer = model.generate(chat, pixel_values=pixels(3), **options, past_key_values=cache.copy())
    assert not encoded
    assert answer.tolist() == model.generate(chat, **options, past_key_values=cache).tolist()
    chat = torch.cat([answer, prompt(model, 2, 4, seed=4)], 1)
    with pytest.raises(ValueError, match="17 image placeholders, the pictures give 51 tokens"):
        model.generate(chat, pixel_values=pixels(3), **options, past_key_values=cache)


def test_rows_of_a_running_cache_take_their_own_pictures(model):
    """Row 0 has a picture in both turns, row 1 only in the second."""
    words = torch.randint(1, 300, (1, 26), generator=torch.Generator().manual_seed(6))
    cache = VisualRWKVCache(model.config)
    options = GREEDY | {"suppress_tokens": [model.config.image_token_id]}
    ids = torch.cat([prompt(model), words])
    answers = model.generate(ids, pixel_values=pixels(3)[:1], **options, past_key_values=cache)
    chats = torch.cat([answers, prompt(model, 2, 4, seed=1).repeat(2, 1)], 1)
    found = model.generate(chats, pixel_values=pixels(3), **options, past_key_values=cache)
    assert found.tolist() == model.generate(chats, pixel_values=pixels(3), **options).tolist()


def padded(ids: torch.Tensor, *pads: int) -> dict[str, torch.Tensor]:
    """Put so many pads on the left of each row of `ids`, which begins with as many tokens to drop."""
    mask = torch.stack([torch.arange(ids.shape[1]) >= count for count in pads]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def goes_on(model, output, inputs: dict) -> tuple[list, list]:
    """Return what the model says to further words: from the cache of `output`, and from the whole text."""
    question = torch.randint(
        1, 300, (len(inputs["input_ids"]), 5), generator=torch.Generator().manual_seed(9)
    )
    whole = torch.cat([output.sequences, question], 1)
    more = whole.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.nn.functional.pad(
        inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])), (0, more), value=1
    )
    expected = model.generate(**{**inputs, "input_ids": whole, "attention_mask": mask}, **GREEDY)
    found = model.generate(whole, attention_mask=mask, past_key_values=output.past_key_values, **GREEDY)
    return found.tolist(), expected.tolist()


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 3}], ids=["greedy", "assisted"])
def test_a_returned_cache_counts_the_padding_of_its_prompt(model, options):
    """On a CPU the pads of one row are not read: cut at the cache's length, the next prompt lost nothing even so."""
    inputs = padded(prompt(model, before=7), 4) | {"pixel_values": pixels()}
    cache = VisualRWKVCache(model.config)
    for past in ({}, {"past_key_values": cache}):
        output = model.generate(**inputs, **past, **options, **GREEDY, return_dict_in_generate=True)
        assert output.past_key_values.get_seq_length() == output.sequences.shape[1] - 1
        found, expected = goes_on(model, output, inputs)
        assert found == expected
    assert cache is output.past_key_values


def test_a_cache_from_states_of_different_lengths_counts_the_columns(model):
    """One row has read 12 of its 16 tokens and the other 3 of 11: the cache counts 16, not 12 and 8."""
    inputs = padded(torch.randint(1, 300, (2, 16), generator=torch.Generator().manual_seed(5)), 0, 5)
    states = []
    for ids, mask, length in zip(*inputs.values(), (12, 3)):
        ids = ids[mask.bool()][:length]
        with torch.no_grad():
            cache = model(ids[None], use_cache=True).past_key_values
        states.append(KeptState.of(cache, [PromptIdentity(ids)], torch.float32))
    past = KeptState.stack(states)
    output = model.generate(**inputs, past_key_values=past, **GREEDY, return_dict_in_generate=True)
    assert output.past_key_values.get_seq_length() == output.sequences.shape[1] - 1
    found, expected = goes_on(model, output, inputs)
    assert found == expected


def test_after_assisted_decoding_the_cache_records_no_past(model, inputs):
    """Else each further token would add a whole state to it."""
    own = VisualRWKVCache(model.config)
    for past in ({}, {"past_key_values": own}):
        output = model.generate(
            **inputs, **GREEDY, **past, prompt_lookup_num_tokens=3, return_dict_in_generate=True
        )
        cache = output.past_key_values
        assert not any(layer.record_past or any(layer.history.values()) for layer in cache.layers)
        found, expected = goes_on(model, output, inputs)
        assert found == expected
        assert not any(any(layer.history.values()) for layer in cache.layers)
    assert cache is own


def test_a_cache_that_its_user_records_goes_on_recording(model, inputs):
    cache = VisualRWKVCache(model.config)
    cache.activate_past_recording()
    words = inputs["input_ids"][:, -6:]
    model.generate(words, past_key_values=cache, **GREEDY)
    assert cache.is_recording_past(0)
    cache.crop(-5)
    fresh = VisualRWKVCache(model.config)
    with torch.no_grad():
        model(model.generate(words, **GREEDY)[:, : cache.get_seq_length()], past_key_values=fresh)
    for found, expected in zip(cache.layer_tensors(), fresh.layer_tensors()):
        for name in expected:  # float32, the same tokens read in other pieces
            torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)


def test_training_with_gradient_checkpointing_is_refused_where_a_cache_is_needed(model, inputs):
    """It reads without a cache: each token would be the answer to the one before it alone."""
    state = model(**inputs, use_cache=True).past_key_values
    expected = model.generate(**inputs, **GREEDY, use_cache=False)
    model.model.language_model.gradient_checkpointing = True
    model.train()
    try:
        for needs_cache in (
            lambda: model.generate(**inputs, **GREEDY),
            lambda: model.generate(inputs["input_ids"][:, -3:], past_key_values=state, **GREEDY),
            lambda: model.score(inputs, [[5]]),
            lambda: model.read(None, []),
            lambda: model.watch(None, []),
        ):
            with pytest.raises(ValueError, match=r"gradient checkpointing excludes: call model.eval\(\)"):
                needs_cache()
        assert model.generate(**inputs, **GREEDY, use_cache=False).tolist() == expected.tolist()
        # With a store, calls for the last logits alone read by way of a cache.
        model.state_store = StateStore(2)
        last = torch.tensor([inputs["input_ids"].shape[1] - 1])
        with torch.no_grad():
            found = model(**inputs, use_cache=False, logits_to_keep=last).logits
            # float32, the head's product with another number of rows
            expected_logits = model(**inputs, use_cache=False).logits[:, -1:]
        torch.testing.assert_close(found, expected_logits, atol=1e-5, rtol=1e-5)
        assert model.eval().generate(**inputs, **GREEDY).tolist() == expected.tolist()
    finally:
        model.state_store = None
        model.eval().model.language_model.gradient_checkpointing = False


def test_a_key_value_cache_is_refused(model, inputs):
    with pytest.raises(ValueError, match=r"must be a KeptState or a VisualRWKVCache, got DynamicCache"):
        model.generate(**inputs, **GREEDY, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="'quantized' has no meaning"):
        model.generate(**inputs, **GREEDY, cache_implementation="quantized")


def test_chunked_prefill_may_cut_text_but_no_picture(model, inputs):
    with pytest.raises(ValueError, match="must lie whole in one forward"):
        model.generate(**inputs, **GREEDY, prefill_chunk_size=5)
    after = prompt(model, before=2, after=40)
    chunk = 2 + model.config.num_image_tokens
    expected = model.generate(after, pixel_values=inputs["pixel_values"], **GREEDY)
    actual = model.generate(after, pixel_values=inputs["pixel_values"], **GREEDY, prefill_chunk_size=chunk)
    assert actual.tolist() == expected.tolist()


def test_a_unidirectional_picture_may_be_cut():
    model = tiny_vlm(version=7, scan="unidirectional")
    inputs = {"input_ids": prompt(model), "pixel_values": pixels()}
    for size in (1, 5):
        chunked = model.generate(**inputs, **GREEDY, prefill_chunk_size=size)
        assert chunked.tolist() == model.generate(**inputs, **GREEDY).tolist()


def test_the_static_cache_is_one_for_transformers(model, inputs):
    """`generate()` and exporters ask `isinstance`."""
    output = model.generate(**inputs, **GREEDY, cache_implementation="static", return_dict_in_generate=True)
    cache = output.past_key_values
    assert isinstance(cache, StaticCache) and isinstance(cache, VisualRWKVCache) and cache.is_compileable
    assert int(cache.get_seq_length()) == output.sequences.shape[1] - 1
    longer = torch.cat([output.sequences, inputs["input_ids"][:, :1]], 1)
    expected = model.generate(longer, pixel_values=inputs["pixel_values"], **GREEDY)
    assert model.generate(longer, past_key_values=cache, **GREEDY).tolist() == expected.tolist()
    copied = cache.copy()
    assert type(copied) is VisualRWKVStaticCache and copied.get_seq_length() == cache.get_seq_length()
    cache.reset()
    assert int(cache.get_seq_length()) == 0 != int(copied.get_seq_length())


def test_static_cache_compiles_without_graph_breaks_or_recompilation(model, inputs):
    """One graph for every step: the step's tensors keep their shapes, and the length is no Python number."""
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    expected = model.generate(**inputs, **GREEDY)
    cache = VisualRWKVStaticCache(model.config)
    with torch.no_grad():
        logits = model(**inputs, past_key_values=cache, use_cache=True).logits
        step = torch.compile(model, backend=count, fullgraph=True)
        words = []
        for _ in range(GREEDY["max_new_tokens"]):
            words.append(logits[:, -1:].argmax(-1))
            logits = step(input_ids=words[-1], past_key_values=cache, use_cache=True).logits
    assert torch.cat(words, 1).tolist() == new_tokens(expected, inputs).tolist()
    assert len(graphs) == 1
    assert int(cache.get_seq_length()) == inputs["input_ids"].shape[1] + GREEDY["max_new_tokens"]


def test_state_is_constant_in_length(model):
    def held(tokens: int) -> int:
        cache = VisualRWKVCache(model.config)
        ids = torch.randint(1, 300, (1, tokens), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            model(ids, past_key_values=cache)
        return sum(t.nbytes for layer in cache.layers for t in layer.tensors().values())

    assert held(10) == held(200) > 0


@torch.no_grad()
def test_cropping_takes_tokens_back(model):
    ids = torch.randint(1, 300, (2, 30), generator=torch.Generator().manual_seed(2))
    cache = VisualRWKVCache(model.config)
    model(ids[:, :12], past_key_values=cache)
    cache.activate_past_recording()
    model(ids[:, 12:20], past_key_values=cache)
    model(ids[:, 20:21], past_key_values=cache)
    cache.crop(-4)  # the last step and three tokens of the one before
    assert cache.get_seq_length() == 17
    after = model(ids[:, 17:], past_key_values=cache).logits
    torch.testing.assert_close(after, model(ids, use_cache=False).logits[:, 17:], atol=2e-5, rtol=0)
    with pytest.raises(RuntimeError, match=r"Cannot remove 14 tokens: only the last 13 are recorded"):
        cache.crop(-14)
    with pytest.raises(ValueError, match="as a negative int, got 3"):
        cache.crop(3)
    with pytest.raises(RuntimeError, match="needs a recorded past"):
        VisualRWKVCache(model.config).crop(-1)


@torch.no_grad()
def test_cache_of_a_batch_can_be_taken_apart(model):
    ids = torch.randint(1, 300, (3, 8), generator=torch.Generator().manual_seed(4))
    cache = model(ids).past_key_values
    cache.batch_select_indices(torch.tensor([2]))
    cache.batch_repeat_interleave(2)
    step = model(ids[2:, :1].repeat(2, 1), past_key_values=cache).logits
    alone = model(torch.cat([ids[2:], ids[2:, :1]], 1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(step, alone.repeat(2, 1, 1), atol=2e-5, rtol=0)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(
        model(ids[:2], past_key_values=cache).logits,
        model(ids[:2], use_cache=False).logits,
        atol=2e-5,
        rtol=0,
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", [VisualRWKVCache, VisualRWKVStaticCache])
def test_running_caches_are_copied_stacked_and_taken_apart(model, kind):
    """Each continues by itself: nothing that happens to a copy happens to the cache."""
    ids = torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(4))
    caches = [kind(model.config) for _ in range(2)]
    for row, cache in zip(ids, caches):
        model(row[None, :8], past_key_values=cache)
    both = kind.stack(caches)
    assert type(both) is kind and both.batch_size == 2 and both.nbytes == 2 * caches[0].nbytes
    expected = model(ids, use_cache=False).logits[:, 8:]
    for _ in range(2):  # the second time from the same cache
        for number, other in enumerate((both.copy(), both.to("cpu"), kind.stack([both[0], both[-1]]))):
            assert type(other) is kind, number
            logits = model(ids[:, 8:], past_key_values=other).logits
            # float32, a few hundred terms in another order
            torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
            assert int(other.get_seq_length()) == 9 and int(both.get_seq_length()) == 8
    with pytest.raises(IndexError, match="2 samples, asked for 2"):
        both[2]
    with pytest.raises(ValueError, match="at least one"):
        kind.stack([])


def test_pictures_and_placeholders_must_match(model, inputs):
    with pytest.raises(ValueError, match="17 image placeholders, the pictures give 34 tokens"):
        model(inputs["input_ids"], pixel_values=pixels(2))
    with pytest.raises(ValueError, match="17 image placeholders, but no pixel_values"):
        model(inputs["input_ids"])
    with pytest.raises(ValueError, match="0 image placeholders, the pictures give 17"):
        model(torch.ones(1, 5, dtype=torch.long), pixel_values=pixels())
    with pytest.raises(ValueError, match=r"scan_orders has 1 directions, scan 'bidirectional' has 2"):
        model(**inputs, scan_orders=torch.arange(26)[None, None])


def test_scan_orders_given_equal_scan_orders_derived(model, inputs):
    ids = torch.cat([inputs["input_ids"], prompt(model, 1, 8, seed=2)])
    orders = torch.stack(
        [torch.arange(ids.shape[1]).expand(ids.shape) if order is None else order
         for order in model.model.scan_orders(ids == model.config.image_token_id)], 1)  # fmt: skip
    with torch.no_grad():
        derived = model(ids, pixel_values=pixels(2)).logits
        given = model(ids, pixel_values=pixels(2), scan_orders=orders).logits
    torch.testing.assert_close(given, derived, atol=0, rtol=0)


def test_packed_samples_with_pictures_are_told_apart_by_their_positions(model):
    """Logits and loss are those with `cu_seq_lens_q`, and the logits those of each sample alone."""
    rows = [prompt(model), prompt(model, 1, 8, seed=2), torch.ones(1, 4, dtype=torch.long)]
    ids, lengths = torch.cat(rows, 1), [row.shape[1] for row in rows]
    packed = {"input_ids": ids, "labels": ids, "pixel_values": pixels(2)}
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    with torch.no_grad():
        found = model(**packed, position_ids=torch.cat([torch.arange(length) for length in lengths])[None])
        told = model(**packed, cu_seq_lens_q=bounds)
        alone = [model(row, pixel_values=pixels(2)[i : i + 1]).logits for i, row in enumerate(rows[:2])]
    assert torch.equal(found.logits, told.logits) and torch.equal(found.loss, told.loss)
    # float32, the same sums in another order
    torch.testing.assert_close(found.logits[:, : -lengths[-1]], torch.cat(alone, 1), atol=1e-4, rtol=1e-4)
