"""The order in which a layer reads: indices of token shift and order, against a loop over the tokens."""

import copy

import pytest
import torch
from tiny import awake, text_config
from torch.nn import functional as F

from visualrwkv_hf import VisualRWKVForCausalLM
from visualrwkv_hf.generations import GENERATIONS
from visualrwkv_hf.layer_state import LayerState, PlainStateHolder, empty_pool
from visualrwkv_hf.token_order import IN_ORDER, last_token, token_orders, token_shift


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def positions(B, T):
    return torch.arange(T).expand(B, T)


MASKS = {
    "none": None,
    "left": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]).bool(),
    "right and middle": torch.tensor([[1, 1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 1]]).bool(),
    "all": torch.tensor([[0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]]).bool(),
}
ORDERS = {
    "text": None,
    "two patches and five": torch.tensor([[0, 1, 2, 4, 3, 5, 6], [0, 5, 4, 3, 2, 1, 6]]),
}


def by_hand(x, carried, mix, mask, order):
    """What every token sees before it, token by token in the order of reading; and the last one."""
    previous, last = torch.empty_like(x), carried.clone()
    for b in range(x.shape[0]):
        for token in range(x.shape[1]) if order is None else order[b].tolist():
            if mask is not None and not mask[b, token]:
                previous[b, token] = x[b, token]
                continue
            previous[b, token] = last[b]
            last[b] = x[b, token]
    return x + (previous - x) * mix[:, None, None], last


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_token_shift_follows_the_order_past_the_padding(mask, order):
    x, carried, mix = randn(2, 7, 3), randn(2, 3, seed=1), randn(4, 3, seed=2)
    (indices,) = token_orders(positions(2, 7), mask, [order])
    expected, last = by_hand(x, carried, mix, mask, order)
    torch.testing.assert_close(torch.stack(token_shift(x, carried, mix, indices.previous)), expected)
    assert torch.equal(last_token(x, carried, indices), last)


@pytest.mark.parametrize("length", range(1, 8))
def test_last_token_of_the_first_positions(length):
    x, carried = randn(2, 7, 3), randn(2, 3, seed=1)
    mask, order = MASKS["right and middle"], ORDERS["two patches and five"]
    (indices,) = token_orders(positions(2, 7), mask, [order])
    _, expected = by_hand(x, carried, randn(1, 3), mask, order[:, :length])
    assert torch.equal(last_token(x, carried, indices, length), expected)
    assert torch.equal(last_token(x, carried, IN_ORDER, length), x[:, length - 1])


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_following_is_the_inverse_of_previous(mask):
    (indices,) = token_orders(positions(2, 7), mask, [ORDERS["two patches and five"]])
    if indices.following is None:
        assert mask is None
        return
    for previous, following in zip(indices.previous.tolist(), indices.following.tolist()):
        readers = {entry: [t for t, seen in enumerate(previous) if seen == entry] for entry in range(8)}
        assert all(len(tokens) <= 1 for tokens in readers.values()), "one reader at most"
        assert following == [readers[entry][0] if readers[entry] else -1 for entry in range(8)]


def test_data_dependent_weights_are_added():
    x, carried, mix, dynamic = randn(1, 5, 3), randn(1, 3, seed=1), randn(2, 3, seed=2), randn(2, 1, 5, 3)
    constant = token_shift(x, carried, mix)
    only = token_shift(x, carried, torch.zeros_like(mix), dynamic=dynamic)
    both = token_shift(x, carried, mix, dynamic=dynamic)
    for m in range(2):
        torch.testing.assert_close(both[m], constant[m] + only[m] - x)


def test_without_padding_and_order_there_are_no_indices():
    assert token_orders(positions(2, 3), None, [None]) == [IN_ORDER]


@pytest.mark.parametrize("version", [5, 6, 7])
def test_packed_sequences_equal_each_alone(version):
    """What DataCollatorWithFlattening makes: three texts in one row, with the gradient of all of them."""
    model = awake(VisualRWKVForCausalLM(text_config(version))).double()
    texts = [torch.randint(1, 300, (1, n), generator=torch.Generator().manual_seed(n)) for n in (5, 40, 1)]
    cu_seqlens = torch.tensor([0, 5, 45, 46], dtype=torch.int32)
    packed = model(torch.cat(texts, 1), use_cache=False, cu_seq_lens_q=cu_seqlens).logits
    alone = torch.cat([model(text, use_cache=False).logits for text in texts], 1)
    torch.testing.assert_close(packed, alone, atol=1e-10, rtol=0)
    evaluated = model.eval()(torch.cat(texts, 1), use_cache=True, cu_seq_lens_q=cu_seqlens)
    torch.testing.assert_close(evaluated.logits, alone, atol=1e-10, rtol=0)
    assert evaluated.past_key_values is None
    state = model(texts[0], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot continue from past_key_values"):
        model(torch.cat(texts, 1), past_key_values=state, cu_seq_lens_q=cu_seqlens)


@pytest.mark.parametrize("lengths", [(3, 1, 4), (2, 0, 5, 1), (8,), (0, 8)], ids=str)
@pytest.mark.parametrize("mask", [None, "middle"])
def test_shift_of_packed_sequences_begins_with_their_own_carried_tokens(lengths, mask):
    """Each sequence equals itself alone after its carried token; an empty one hands its token on."""
    T, S = sum(lengths), len(lengths)
    x, carried, mix = randn(1, T, 3), randn(S, 3, seed=1), randn(4, 3, seed=2)
    real = None if mask is None else torch.tensor([[t % 3 != 1 for t in range(T)]])
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    (indices,) = token_orders(positions(1, T), real, [None], cu_seqlens)
    shifted, last = token_shift(x, carried, mix, indices.previous), last_token(x, carried, indices)
    for s, (begin, end) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens[1:].tolist())):
        own_real = None if real is None else real[:, begin:end]
        expected, own_last = by_hand(x[:, begin:end], carried[s : s + 1], mix, own_real, None)
        torch.testing.assert_close(torch.stack(shifted)[:, :, begin:end], expected)
        assert torch.equal(last[s : s + 1], own_last)
    for entry, token in enumerate(indices.following[0].tolist()):
        assert token == -1 or indices.previous[0, token] == entry


@pytest.mark.parametrize("order", [None, "reversed"])
def test_a_batch_of_no_rows_stays_one(order):
    x, carried, mix = randn(0, 5, 3), randn(0, 3), randn(2, 3)
    given = None if order is None else torch.arange(4, -1, -1).expand(0, 5)
    (indices,) = token_orders(positions(0, 5), None, [given], None)
    assert [one.shape for one in token_shift(x, carried, mix, indices.previous)] == [(0, 5, 3)] * 2
    assert last_token(x, carried, indices).shape == (0, 3)


def test_gradients_of_carried_tokens_are_those_of_each_sequence():
    x, mix = randn(1, 5, 3), randn(2, 3, seed=2)
    carried = randn(2, 3, seed=1).requires_grad_()
    (indices,) = token_orders(positions(1, 5), None, [None], torch.tensor([0, 2, 5]))
    torch.stack(token_shift(x, carried, mix, indices.previous)).sum().backward()
    torch.testing.assert_close(carried.grad, mix.sum(0).expand(2, 3))


@torch.no_grad()
@pytest.mark.parametrize("version", [5, 6, 7])
@pytest.mark.parametrize("pooled", [False, True], ids=["rows", "pool"])
def test_continued_packed_sequences_equal_each_alone(version, pooled):
    """Chunked prefill: three texts in one row, each continuing its own state, which may be a slot of a pool."""
    model = awake(VisualRWKVForCausalLM(text_config(version))).double()
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 300, (1, n), generator=generator) for n in (30, 7, 25)]
    cuts = [(0, 12, 30), (0, 5, 7), (0, 1, 25)]  # where each text's two chunks begin and end
    holders = [holder_of(model.config, pooled) for _ in model.model.layers]
    chunks = []
    for number in (0, 1):
        parts = [text[:, cut[number] : cut[number + 1]] for text, cut in zip(texts, cuts)]
        lengths = torch.tensor([part.shape[1] for part in parts])
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
        embeds = model.model.embed_tokens(torch.cat(parts, 1))
        orders = token_orders(positions(1, embeds.shape[1]), None, [None], cu_seqlens)
        chunks.append(model.model.run_blocks(embeds, orders, holders).split(lengths.tolist(), 1))
    for text, chunk in zip(texts, zip(*chunks)):
        alone = model(text, use_cache=False).logits
        torch.testing.assert_close(
            model.lm_head(model.model.norm(torch.cat(chunk, 1))), alone, atol=1e-9, rtol=0
        )

    # The sequences decode on as the rows of a batch, and a row alone gives the same.
    tokens = torch.tensor([[5], [6], [7]])
    embeds = model.model.embed_tokens(tokens)
    decoded = model.lm_head(model.model.norm(model.model.run_blocks(embeds, [IN_ORDER], holders)))
    for row, text in enumerate(texts):
        alone = model(torch.cat([text, tokens[row : row + 1]], 1), use_cache=False).logits[0, -1:]
        torch.testing.assert_close(decoded[row], alone, atol=1e-9, rtol=0)
    if pooled:
        pool = holders[0].state().tensors
        assert all((tensor[torch.tensor([0, 1, 3, 5])] == 7).all() for tensor in pool.values()), (
            "others' slots"
        )


@torch.no_grad()
@pytest.mark.parametrize("version", [5, 6, 7])
def test_blocks_in_two_parts_equal_all_at_once(version):
    """A prompt that the layers read in two orders, and a token after it: the second part begins with layer 1."""
    whole = awake(VisualRWKVForCausalLM(text_config(version))).double().model
    first, second = copy.deepcopy(whole), copy.deepcopy(whole)
    first.layers, second.layers = whole.layers[:1], whole.layers[1:]
    expected, found = ([PlainStateHolder(LayerState({})) for _ in whole.layers] for _ in range(2))
    prompt, token = randn(2, 7, 64).double(), randn(2, 1, 64, seed=1).double()
    for tokens, orders in (
        (prompt, token_orders(positions(2, 7), None, [*ORDERS.values()])),
        (token, [IN_ORDER]),
    ):
        hidden, values = first.run_layers(first.embed_norm(tokens), None, orders, found[:1])
        hidden, _ = second.run_layers(hidden, values, orders, found[1:])
        torch.testing.assert_close(hidden, whole.run_blocks(tokens, orders, expected), atol=1e-12, rtol=0)


SLOTS = torch.tensor([4, 6, 2])


def holder_of(config, pooled: bool) -> PlainStateHolder:
    """A layer's state at the start: none, or three slots of a pool of seven, the others full of sevens."""
    if not pooled:
        return PlainStateHolder(LayerState({}))
    pool = empty_pool(GENERATIONS[config.rwkv_version].states, config, 7, torch.float64, "cpu")
    pool = {name: torch.full_like(tensor, 7, dtype=torch.float64) for name, tensor in pool.items()}
    for tensor in pool.values():
        tensor[SLOTS] = 0
    return PlainStateHolder(LayerState(pool, SLOTS))


def test_orders_outside_the_sequence_are_refused():
    with pytest.raises(ValueError, match="scan_orders must hold tokens from 0 to 2, got 0 to 3"):
        token_orders(positions(1, 3), None, [torch.tensor([[0, 1, 3]])])
