"""How a layer reads: indices of token shift and order, against a loop over what is read."""

import pytest
import torch
from tiny import awake, text_config

from visualrwkv_hf import VisualRWKVForCausalLM
from visualrwkv_hf.token_order import AS_IT_COMES, last_token, readings_of, token_shift


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
def test_token_shift_follows_the_order_past_the_pads(mask, order):
    x, carried, mix = randn(2, 7, 3), randn(2, 3, seed=1), randn(4, 3, seed=2)
    (reading,) = readings_of(positions(2, 7), mask, [order])
    expected, last = by_hand(x, carried, mix, mask, order)
    torch.testing.assert_close(torch.stack(token_shift(x, carried, mix, reading)), expected)
    assert torch.equal(last_token(x, carried, reading), last)


@pytest.mark.parametrize("length", range(1, 8))
def test_last_token_of_the_first_positions(length):
    x, carried = randn(2, 7, 3), randn(2, 3, seed=1)
    mask, order = MASKS["right and middle"], ORDERS["two patches and five"]
    (reading,) = readings_of(positions(2, 7), mask, [order])
    _, expected = by_hand(x, carried, randn(1, 3), mask, order[:, :length])
    assert torch.equal(last_token(x, carried, reading, length), expected)
    assert torch.equal(last_token(x, carried, AS_IT_COMES, length), x[:, length - 1])


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_following_is_the_inverse_of_previous(mask):
    (reading,) = readings_of(positions(2, 7), mask, [ORDERS["two patches and five"]])
    if reading.following is None:
        assert mask is None
        return
    for previous, following in zip(reading.previous.tolist(), reading.following.tolist()):
        readers = {entry: [t for t, seen in enumerate(previous) if seen == entry] for entry in range(8)}
        assert all(len(tokens) <= 1 for tokens in readers.values()), "one reader at most"
        assert following == [readers[entry][0] if readers[entry] else -1 for entry in range(8)]


def test_data_dependent_weights_are_added():
    x, carried, mix, dynamic = randn(1, 5, 3), randn(1, 3, seed=1), randn(2, 3, seed=2), randn(2, 1, 5, 3)
    constant = token_shift(x, carried, mix, AS_IT_COMES)
    only = token_shift(x, carried, torch.zeros_like(mix), AS_IT_COMES, dynamic)
    both = token_shift(x, carried, mix, AS_IT_COMES, dynamic)
    for m in range(2):
        torch.testing.assert_close(both[m], constant[m] + only[m] - x)


def test_one_without_pads_and_order_reads_as_it_comes():
    assert readings_of(positions(2, 3), None, [None]) == [AS_IT_COMES]


@pytest.mark.parametrize("version", [5, 6, 7])
def test_packed_sequences_equal_each_alone(version):
    """What DataCollatorWithFlattening makes: three texts in one row, with the gradient of all of them."""
    model = awake(VisualRWKVForCausalLM(text_config(version))).double()
    texts = [torch.randint(1, 300, (1, n), generator=torch.Generator().manual_seed(n)) for n in (5, 40, 1)]
    cu_seqlens = torch.tensor([0, 5, 45, 46], dtype=torch.int32)
    packed = model(torch.cat(texts, 1), use_cache=False, cu_seq_lens_q=cu_seqlens).logits
    alone = torch.cat([model(text, use_cache=False).logits for text in texts], 1)
    torch.testing.assert_close(packed, alone, atol=1e-10, rtol=0)
    with pytest.raises(ValueError, match="use_cache must be False"):
        model.eval()(torch.cat(texts, 1), use_cache=True, cu_seq_lens_q=cu_seqlens)
