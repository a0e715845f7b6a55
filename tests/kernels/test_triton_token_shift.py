"""The Triton token shift against the equation in float64."""

import pytest
import torch

pytest.importorskip("triton")

from triton_interpreter import POISONED_KERNELS

from visualrwkv_hf.triton_kernels.token_shift import following_of, token_shift

pytestmark = POISONED_KERNELS

# The kernel computes in float32 and rounds once, so of the error little more than that rounding is left.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}


def plain(x, carried, mix, previous=None, dynamic=None):
    """The equation, token by token: [M, B, T, C]."""
    B, T, _ = x.shape
    entries = torch.cat([carried.unflatten(0, (B, -1)), x], 1)  # [B, n + T, C]
    out = []
    for m in range(len(mix)):
        weights = mix[m].flatten() if dynamic is None else mix[m].flatten() + dynamic[m]
        weights = weights.expand(x.shape)
        rows = [
            [
                torch.lerp(x[b, t], entries[b, t if previous is None else previous[b, t]], weights[b, t])
                for t in range(T)
            ]
            for b in range(B)
        ]
        out.append(torch.stack([torch.stack(row) for row in rows]))
    return torch.stack(out)


def inputs(M, B, T, C, dtype=torch.float32, dynamic=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    mix = [normal(1, 1, C) for _ in range(M)]
    return normal(B, T, C), normal(B, C), mix, normal(M, B, T, C) if dynamic else None


def read_in_order(B, T, seed=0):
    """`previous` [B, T] of tokens that are read in random order, a quarter of them pads, and `following`."""
    generator = torch.Generator().manual_seed(seed)
    previous, following = torch.zeros(B, T, dtype=torch.long), torch.full((B, 1 + T), -1)
    for b in range(B):
        last = 0
        pads = torch.rand(T, generator=generator) < 0.25
        for token in torch.randperm(T, generator=generator).tolist():
            previous[b, token] = 1 + token if pads[token] else last
            following[b, previous[b, token]] = token
            last = last if pads[token] else 1 + token
    return previous, following


def error(ours, truth):
    ours, truth = ours.detach().double(), truth.detach().double()
    return float((ours - truth).norm() / truth.norm().clamp(min=1e-300))


def gradients(outputs, tensors):
    """Of a sum of the outputs with random weights in their dtype, in which a bug cannot hide."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator).to(torch.bfloat16) for y in outputs]
    loss = sum((y * w.to(y.dtype)).sum() for y, w in zip(outputs, weights))
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("T, C", [(1, 96), (7, 100), (33, 96), (70, 130)])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("in_order", [False, True])
def test_outputs_and_gradients_match_the_equation(T, C, dtype, dynamic, in_order):
    x, carried, mix, extra = inputs(3, 2, T, C, dtype, dynamic)
    previous, following = read_in_order(2, T) if in_order else (None, None)
    tensors = [x, carried, *mix, *([extra] if dynamic else [])]
    ours = token_shift(x, carried, mix, previous, following, extra)
    found = gradients(ours, tensors)

    exact = [t.detach().double().requires_grad_() for t in tensors]
    truth = plain(*exact[:2], exact[2:5], previous, exact[5] if dynamic else None)
    wanted = gradients(truth.unbind(), exact)
    for y, y_true in zip(ours, truth):
        assert y.dtype == dtype and y.shape == x.shape
        assert error(y, y_true) < TOLERANCE[dtype]
    for g, g_true, t in zip(found, wanted, tensors):
        assert g.dtype == dtype and g.shape == t.shape
        # A gradient that is all 0 (of what nobody reads) must be that exactly.
        assert error(g, g_true) < TOLERANCE[dtype]


@pytest.mark.parametrize("M", range(1, 7))
def test_any_number_of_targets(M):
    x, carried, mix, _ = inputs(M, 1, 5, 96)
    ours = token_shift(x, carried, mix)
    assert len(ours) == M
    assert error(torch.stack(ours), plain(x, carried, mix)) < 1e-6


def test_weights_may_be_one_tensor_of_another_dtype():
    x, carried, mix, _ = inputs(2, 2, 5, 96, torch.bfloat16)
    stacked = torch.stack([m.detach().flatten().float() for m in mix]).requires_grad_()
    ours, separate = token_shift(x, carried.float(), stacked), token_shift(x, carried, mix)
    assert all(torch.equal(y, z) for y, z in zip(ours, separate))
    (gradient,) = gradients(ours, [stacked])
    assert gradient.dtype == torch.float32
    assert error(gradient, torch.stack(gradients(separate, mix)).flatten(1)) < TOLERANCE[torch.bfloat16]


def test_following_is_the_way_back():
    previous, following = read_in_order(3, 20)
    assert torch.equal(following_of(previous), following)


def test_plain_order_given_as_indices_changes_nothing():
    x, carried, mix, _ = inputs(2, 2, 9, 100)
    previous = torch.arange(9).expand(2, 9)
    tensors = [x, carried, *mix]
    with_indices, without = token_shift(x, carried, mix, previous), token_shift(x, carried, mix)
    assert all(torch.equal(y, z) for y, z in zip(with_indices, without))
    assert all(
        torch.equal(g, h) for g, h in zip(gradients(with_indices, tensors), gradients(without, tensors))
    )


def test_packed_sequences_may_all_begin_with_the_carried_token():
    x, carried, mix, _ = inputs(2, 1, 7, 96)
    previous = torch.tensor([[0, 1, 2, 0, 4, 0, 6]])
    following = torch.tensor([[0, 1, 2, -1, 4, -1, 6, -1]])  # of the carried token: any of its readers
    found = gradients(token_shift(x, carried, mix, previous, following), [x, *mix])
    wanted = gradients(plain(x, carried, mix, previous).unbind(), [x, *mix])
    assert all(error(g, h) < 1e-6 for g, h in zip(found, wanted))


def packed(lengths, B, n, seed=0):
    """`previous` [B, T] and `following` of n sequences packed in each row; some tokens are pads."""
    generator = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    previous, following = torch.zeros(B, T, dtype=torch.long), torch.full((B, n + T), -1)
    for b in range(B):
        first = 0
        for i, length in enumerate(lengths):
            last = i
            for token in (first + torch.randperm(length, generator=generator)).tolist():
                is_pad = torch.rand(1, generator=generator).item() < 0.2
                previous[b, token] = n + token if is_pad else last
                following[b, previous[b, token]] = token
                last = last if is_pad else n + token
            first += length
    return previous, following


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("lengths", "B"), [((5, 0, 1, 33), 1), ((1, 1, 1), 1), ((9, 4), 2), ((0, 0, 0, 2), 1)]
)
def test_each_packed_sequence_continues_its_own_carried_token(lengths, B, dtype):
    n, T = len(lengths), sum(lengths)
    x, _, mix, dynamic = inputs(2, B, T, 100, dtype, dynamic=True)
    carried = torch.randn(B * n, 100, generator=torch.Generator().manual_seed(5)).to(dtype).requires_grad_()
    previous, following = packed(lengths, B, n)
    assert torch.equal(following_of(previous, n), following)
    tensors = [x, carried, *mix, dynamic]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    truth = plain(*exact[:2], exact[2:4], previous, exact[4])
    wanted = gradients(truth.unbind(), exact)
    for back in (following, None):
        ours = token_shift(x, carried, mix, previous, back, dynamic)
        assert all(error(y, y_true) < TOLERANCE[dtype] for y, y_true in zip(ours, truth))
        found = gradients(ours, tensors)
        assert all(error(g, g_true) < TOLERANCE[dtype] for g, g_true in zip(found, wanted))


def test_packed_sequences_equal_each_alone():
    lengths = (3, 1, 6)
    x, _, mix, _ = inputs(2, 1, sum(lengths), 96)
    carried = torch.randn(3, 96, generator=torch.Generator().manual_seed(5))
    previous = torch.tensor([[0, 3, 4, 1, 2, 7, 8, 9, 10, 11]])
    together = torch.stack(token_shift(x, carried, mix, previous))
    alone = [
        torch.stack(token_shift(part, carried[i : i + 1], mix)) for i, part in enumerate(x.split(lengths, 1))
    ]
    assert torch.equal(together, torch.cat(alone, 2))


def test_a_token_alone_continues_the_text():
    x, carried, mix, _ = inputs(4, 2, 6, 100, torch.bfloat16)
    whole = torch.stack(token_shift(x, carried, mix))
    for t in range(6):
        before = carried if t == 0 else x[:, t - 1]
        assert torch.equal(torch.stack(token_shift(x[:, t : t + 1], before, mix)), whole[:, :, t : t + 1])


def test_repeats_bit_for_bit():
    x, carried, mix, dynamic = inputs(5, 2, 70, 100, torch.bfloat16, dynamic=True)
    previous, following = read_in_order(2, 70)
    runs = []
    for _ in range(2):
        ours = token_shift(x, carried, mix, previous, following, dynamic)
        runs.append([*ours, *gradients(ours, [x, carried, *mix, dynamic])])
    assert all(torch.equal(first, second) for first, second in zip(*runs))


def test_gradients_of_unused_targets_are_zeros():
    x, carried, mix, _ = inputs(3, 1, 5, 96)
    _, used, _ = token_shift(x, carried, mix)
    first, second, third = torch.autograd.grad(used.sum(), mix)
    assert not first.any() and second.any() and not third.any()


def test_compiles_as_one_graph():
    x, carried, mix, dynamic = inputs(3, 2, 7, 96, dynamic=True)
    previous, following = read_in_order(2, 7)

    def layer(*args):
        return torch.stack(token_shift(*args)) * 2

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for arguments in (
        (x, carried, mix),
        (x, carried, mix, previous, None, dynamic),
        (x, carried, mix, previous, following),
    ):
        ours, eager = compiled(*arguments), layer(*arguments)
        assert torch.equal(ours, eager)
        assert all(
            torch.equal(g, h) for g, h in zip(gradients([ours], [x, *mix]), gradients([eager], [x, *mix]))
        )


@pytest.mark.parametrize("in_order", [False, True])
def test_a_batch_may_be_empty(in_order):
    x, carried, mix, dynamic = inputs(2, 0, 5, 96, dynamic=True)
    previous = torch.zeros(0, 5, dtype=torch.long) if in_order else None
    ours = token_shift(x, carried, mix, previous, None, dynamic)
    assert [y.shape for y in ours] == [x.shape] * 2
    dx, dcarried, *dmix, ddynamic = gradients(ours, [x, carried, *mix, dynamic])
    assert (dx.shape, dcarried.shape, ddynamic.shape) == (x.shape, carried.shape, dynamic.shape)
    assert not any(gradient.any() for gradient in dmix)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("in_order", [False, True])
def test_is_a_well_behaved_custom_op(monkeypatch, dynamic, in_order):
    monkeypatch.undo()  # its own comparisons use torch.empty_like
    x, carried, mix, extra = inputs(2, 2, 5, 96, dynamic=dynamic)
    indices = read_in_order(2, 5) if in_order else (None, None)
    torch.library.opcheck(torch.ops.visualrwkv.token_shift.default, (x, carried, mix, *indices, extra))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 0, 8)), r"T >= 1, got \[2, 0, 8\]"),
        (dict(x=torch.zeros(2, 3, 8, dtype=torch.float64)), "got torch.float64"),
        (dict(carried=torch.zeros(1, 8)), r"carried must be \[S, 8\] with S = 2 sequences.*got \[1, 8\]"),
        (dict(carried=torch.zeros(0, 8)), r"S = 2 sequences.*got \[0, 8\]"),
        (dict(carried=torch.zeros(8)), r"S = 2 sequences.*got \[8\]"),
        (dict(x=torch.zeros(0, 3, 8)), r"S = 0 sequences.*got \[2, 8\]"),
        (dict(carried=torch.zeros(4, 8)), "carried has 2 tokens for each row: previous must say"),
        (
            dict(
                carried=torch.zeros(4, 8),
                previous=torch.zeros(2, 3, dtype=torch.long),
                following=torch.zeros(2, 4, dtype=torch.long),
            ),
            r"following must be \[2, 5\], got \[2, 4\]",
        ),
        (dict(mix=[torch.zeros(9)]), r"C = 8 elements each, got \[\[9\]\]"),
        (dict(mix=[]), "C = 8 elements each"),
        (dict(previous=torch.zeros(2, 4, dtype=torch.long)), r"previous must be \[2, 3\], got \[2, 4\]"),
        (dict(previous=torch.zeros(2, 3, dtype=torch.int32)), "previous must be int64"),
        (dict(following=torch.zeros(2, 4, dtype=torch.long)), "without previous"),
        (dict(dynamic=torch.zeros(2, 2, 3, 8)), r"dynamic must be \[1, 2, 3, 8\]"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    arguments = dict(x=torch.zeros(2, 3, 8), carried=torch.zeros(2, 8), mix=[torch.zeros(8)])
    with pytest.raises(ValueError, match=message):
        token_shift(**(arguments | change))
