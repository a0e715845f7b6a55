"""The Triton kernels of RWKV-6 and 5 against plain torch in float64, which equals the oracle to 1e-12."""

import functools

import pytest
import torch

pytest.importorskip("triton")

from torch.utils.checkpoint import checkpoint
from triton_interpreter import POISONED_KERNELS, tf32_dots
from wkv_judge import assert_equal, assert_same, relative_error, run

from visualrwkv_hf.triton_kernels import launches, unsupported, wkv6_fwd
from visualrwkv_hf.triton_kernels.wkv6 import wkv6, wkv6_backward, wkv6_forward
from visualrwkv_hf.wkv import wkv6 as plain

pytestmark = POISONED_KERNELS

LENGTHS = (1, 7, 16, 17, 33, 64, 65, 100)

# Relative to the norm of the float64 tensor, of y, the final state and every gradient.
TOLERANCE = {
    torch.float32: 1e-6,  # eps 1.2e-7; measured up to 2e-7, tf32x3 taken as exact
    # Operands rounded to tf32, 2^-11 at most, as is the output: measured up to 3.4e-4.
    torch.float16: 6e-4,
    # Operands, what one kernel leaves for another, and the output rounded to 8 bits, 1.7e-3 each on average:
    # measured up to 3.1e-3.
    torch.bfloat16: 5e-3,
}

LOG_DECAYS = {
    "one": lambda x: 0 * x,
    "slow": lambda x: -1e-4 * x.abs(),
    "zero": lambda x: torch.full_like(x, -torch.inf),
    "-600": lambda x: torch.full_like(x, -600.0),
    "near zero": lambda x: -torch.exp(x + 5),  # -1e2 to -1e4
    "mixed": lambda x: torch.tensor([0.0, -1e-3, -1.0, -20.0, -90.0, -600.0, -1e4, -torch.inf])[
        (x * 1e4).long() % 8
    ],
}


def make_inputs(T, dtype=torch.float32, decay=None, B=2, H=2, K=32, seed=0):
    """r, w, k, v, u and initial state. w is float32, as in the model, whatever the rest is."""
    generator = torch.Generator().manual_seed(seed)
    randn = functools.partial(torch.randn, generator=generator)
    r, noise, k, v = (randn(B, T, H, K) for _ in range(4))
    u, state = randn(H, K), randn(B, H, K, K)
    w = LOG_DECAYS[decay](noise) if decay else -torch.exp(noise - 1)
    r, k, v, u = (x.to(dtype) for x in (r, k, v, u))
    return [r, w, k, v, u, state]


def in_double(inputs, **options):
    return run(plain, [x.double() for x in inputs], **options)


# --- against float64 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("T", LENGTHS)
def test_equals_float64(T, dtype):
    inputs = make_inputs(T, dtype, B=2 if T < 40 else 1)
    with tf32_dots():
        actual = run(wkv6, inputs)
    assert [x.dtype for x in actual] == [dtype, torch.float32, *(x.dtype for x in inputs)]
    assert_same(actual, in_double(inputs), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("K", [64, 128])
def test_head_sizes(K, dtype):
    inputs = make_inputs(40, dtype, B=1, H=1, K=K)
    with tf32_dots():
        actual = run(wkv6, inputs)
    assert_same(actual, in_double(inputs), TOLERANCE[dtype])


def test_dtypes_may_differ():
    r, w, k, v, u, state = make_inputs(40, torch.bfloat16)
    inputs = [r, w.bfloat16(), k.half(), v.float(), u.float(), state]
    actual = run(wkv6, inputs)
    assert [x.dtype for x in actual[2:]] == [x.dtype for x in inputs]
    assert_same(actual, in_double(inputs), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("decay", LOG_DECAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_decay_from_0_to_1(dtype, decay):
    inputs = make_inputs(40, dtype, decay, B=1, H=1)
    actual = run(wkv6, inputs)
    assert all(x.isfinite().all() for x in actual)
    # What is nothing to float32 may be exp(-600) to float64, or a sum of 0 times something to either.
    expected = [torch.where(x.abs() < 1e-30, 0.0, x) for x in in_double(inputs)]
    assert_same([torch.where(x.abs() < 1e-30, 0.0, x) for x in actual], expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_the_raw_decay(dtype):
    """w = -exp(x): its gradient is multiplied by w, hundreds of times what cancellation would leave of it."""
    r, x, k, v, u, state = make_inputs(64, dtype, B=1)
    x = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)) + 4
    x[..., 3] = 1000  # w = -inf

    def of_raw(function):
        return lambda r, x, k, v, u, state: function(r, -torch.exp(x), k, v, u, state)

    inputs = [r, x, k, v, u, state]
    (*_, actual, _, _, _, _), (*_, expected, _, _, _, _) = (
        run(of_raw(wkv6), inputs),
        run(of_raw(plain), [z.double() for z in inputs]),
    )
    finite = x < 100
    # A few elements of slow decay make up the norm, so their roundings do not average out: 4.9e-3 for bfloat16.
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]
    assert relative_error(actual[finite], expected[finite]) < tolerance
    # Nor does it hide behind the largest: where the decay is e^-50 the gradient is next to nothing.
    fast = finite & (x > 4)
    assert actual[fast].abs().max() < 1e-10


def test_gradient_of_w_where_nothing_is_kept():
    inputs = make_inputs(40)
    inputs[1][..., ::2] = -torch.inf
    dw = run(wkv6, inputs)[3]
    assert dw[..., ::2].abs().max() < 1e-30 and dw[..., 1::2].abs().max() > 0.1


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["w", "k", "v"])
def test_nan_is_not_lost(name, dtype):
    """Nor as a GPU makes it, all bits set: to round it as a number would carry over into the sign, and leave 0."""
    r, w, k, v, u, state = make_inputs(40, dtype, B=1, H=1)
    inputs = {"r": r, "w": w, "k": k.float(), "v": v.float(), "u": u, "initial_state": state}
    inputs[name][:, 20] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    y, state = wkv6(**inputs)
    assert y[:, 21:].isnan().all() and state.isnan().all()


def test_thousands_of_tokens_do_not_drift():
    inputs = make_inputs(2000, torch.bfloat16, "slow", B=1, H=1)
    y, state = wkv6(*inputs)
    expected = plain(*(x.double() for x in inputs))
    assert_same((y, state), expected, TOLERANCE[torch.bfloat16])


# --- what is asked for --------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [5, 40])
def test_no_initial_state_is_zeros(T):
    *inputs, state = make_inputs(T, B=1)
    assert_equal(run(wkv6, inputs), run(lambda *x: wkv6(*x, torch.zeros_like(state)), inputs))


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_of_one_output_only(output):
    def gradients(function, inputs):
        inputs = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(
            function(*inputs)[output].square().sum(), inputs, allow_unused=True, materialize_grads=True
        )

    inputs = make_inputs(20, B=1)
    expected = gradients(plain, [x.double() for x in inputs])
    assert_same(gradients(wkv6, inputs), expected, TOLERANCE[torch.float32])


def test_nothing_is_saved_without_a_gradient():
    inputs = make_inputs(40, B=1)
    saved = wkv6_forward(*inputs, None, None, False)[2:]
    assert not any(x.numel() for x in saved)
    assert_equal(wkv6(*inputs), run(wkv6, inputs)[:2])


@pytest.mark.parametrize("T", [5, 40])
def test_constant_decay_is_not_written_out(T):
    """RWKV-5: w [H, K] expanded over B and T."""
    r, w, k, v, u, state = make_inputs(T, torch.bfloat16)
    w = w[0, 0]

    def expanded(function):
        return lambda r, w, *others: function(r, w.expand(r.shape), *others)

    assert wkv6_fwd.with_heads_together(w.expand(r.shape)).stride()[:2] == (0, 0)
    inputs = [r, w, k, v, u, state]
    expected = run(expanded(plain), [x.double() for x in inputs])
    assert_same(run(expanded(wkv6), inputs), expected, TOLERANCE[torch.bfloat16])


def test_layout_in_memory_does_not_matter():
    inputs = make_inputs(33, B=1)
    *bthk, u, state = (x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in inputs)
    assert_equal(run(wkv6, [*bthk, u, state]), run(wkv6, inputs))


# --- order and packed sequences -----------------------------------------------------------------------


def permuted(B, T, span, pads, seed=0):
    """Orders with a span of each row read at random, another for each row, and some tokens that are pads."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(T).repeat(B, 1)
    start, end = span
    for row in order:
        row[start:end] = start + torch.randperm(end - start, generator=generator)
    for i, tokens in enumerate(pads):
        is_pad = torch.isin(order[i], torch.tensor(tokens, dtype=torch.int64))
        order[i] = torch.where(is_pad, ~order[i], order[i])
    return order


@pytest.mark.parametrize(
    ("T", "dtype"), [(12, torch.float32), (40, torch.float32), (70, torch.bfloat16)], ids=str
)
def test_order_with_pads(T, dtype):
    order = permuted(3, T, (2, T - 3), [range(4), range(T // 2, T // 2 + 3), range(T - 4, T)])
    inputs = make_inputs(T, dtype, B=3, H=1)
    actual = run(wkv6, inputs, order=order)
    assert_same(actual, in_double(inputs, order=order), TOLERANCE[dtype])
    pads = ~order[order < 0]
    rows = torch.arange(3)[:, None].expand(order.shape)[order < 0]
    assert all(not x[rows, pads].any() for x in (actual[0], *actual[2:6]))


@pytest.mark.parametrize(
    ("lengths", "index"),
    [
        ((40,), torch.int64),
        ((0, 33, 1, 0, 16, 0), torch.int32),
        ((16, 32, 6), torch.int64),
        ((1,) * 9, torch.int32),
    ],
    ids=str,
)
def test_packed_sequences_equal_each_alone(lengths, index):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    T, S = sum(lengths), len(lengths)
    inputs = [*make_inputs(T, B=1, H=1)[:5], make_inputs(1, B=S, H=1)[5]]
    generator = torch.Generator().manual_seed(0)
    order = torch.cat(
        [s + torch.randperm(n, generator=generator) for s, n in zip(cu_seqlens.tolist(), lengths)]
    )[None]
    order[0, ::5] = ~order[0, ::5]
    for options in ({}, {"order": order}):
        actual = run(wkv6, inputs, cu_seqlens=cu_seqlens.to(index), **options)
        expected = in_double(inputs, cu_seqlens=cu_seqlens, **options)
        assert_same(actual, expected, TOLERANCE[torch.float32])
        y, state = wkv6(*inputs, cu_seqlens=cu_seqlens.to(index), **options)
        assert_same((y, state), expected[:2], TOLERANCE[torch.float32])
    assert torch.equal(state[[n == 0 for n in lengths]], inputs[5][[n == 0 for n in lengths]])


def test_cu_seqlens_need_not_lie_side_by_side():
    cu_seqlens = torch.tensor([[0, 1], [25, 2], [40, 3]])[:, 0]
    inputs = [*make_inputs(40, B=1, H=1)[:5], make_inputs(1, H=1)[5]]
    assert_equal(
        run(wkv6, inputs, cu_seqlens=cu_seqlens), run(wkv6, inputs, cu_seqlens=cu_seqlens.contiguous())
    )


# --- kernels and their launches -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_step_by_step_equals_chunks(packed, dtype, monkeypatch):
    inputs = make_inputs(40, dtype, "mixed", B=1)
    options = {"order": permuted(1, 40, (0, 25), [(3, 30, 39)])}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 25, 40])
        inputs[5] = make_inputs(1, B=2)[5]
    expected = plain(*(x.double() for x in inputs), **options)
    for steps in (0, 40):
        monkeypatch.setattr(wkv6_fwd, "MAX_STEPS", steps)
        assert_same(wkv6(*inputs, **options), expected, TOLERANCE[dtype])


def test_a_gpu_without_matrix_units_steps(monkeypatch):
    monkeypatch.setattr(wkv6_fwd, "has_matrix_units", lambda r: False)
    monkeypatch.setattr(wkv6_fwd, "_forward_in_chunks", None)
    inputs = make_inputs(40, torch.float16)
    assert_same(wkv6(*inputs), plain(*(x.double() for x in inputs)), TOLERANCE[torch.float16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_and_many_programs_give_the_same(dtype, monkeypatch):
    inputs = make_inputs(70, dtype, B=1, H=1, K=64)
    monkeypatch.setattr(launches, "FEW", 0)
    many = run(wkv6, inputs)
    monkeypatch.setattr(launches, "FEW", 1000)
    # Other columns at a time, each with the same sums but for their order.
    assert_same(run(wkv6, inputs), [x.double() for x in many], 2e-7)


def test_two_runs_are_bitwise_equal():
    inputs = make_inputs(50, torch.bfloat16, B=1)
    assert_equal(run(wkv6, inputs), run(wkv6, inputs))


# --- within torch -------------------------------------------------------------------------------------


def test_compiles_in_one_graph_for_any_length():
    torch.compiler.reset()
    compiled = torch.compile(wkv6, backend="aot_eager", fullgraph=True)
    for T in (33, 50):
        inputs = make_inputs(T, torch.bfloat16, B=1, H=1)
        assert_equal(run(compiled, inputs), run(wkv6, inputs))
    cu_seqlens, order = torch.tensor([0, 20, 50]), torch.arange(49, -1, -1)
    order = torch.cat([order[30:], order[:30]])[None]
    options = {"order": order, "cu_seqlens": cu_seqlens}
    inputs[5] = inputs[5].repeat(2, 1, 1, 1)
    assert_equal(run(compiled, inputs, **options), run(wkv6, inputs, **options))


@pytest.mark.parametrize("packed", [False, True])
def test_ops_are_registered_as_torch_wants_them(packed, monkeypatch):
    monkeypatch.undo()  # compares outputs, which NaN never equal
    r, w, k, v, u, state = make_inputs(34, B=1, H=1)
    order, cu_seqlens = (None, None)
    if packed:
        order, cu_seqlens = (
            torch.arange(34)[None],
            torch.tensor([0, 17, 34]),
        )  # as many chunks as there may be
        state = state.repeat(2, 1, 1, 1)
    inputs = [x.requires_grad_() for x in (r, w, k, v, u, state)]
    torch.library.opcheck(wkv6_forward, (*inputs, order, cu_seqlens, True))
    with torch.no_grad():
        y, state, *saved = wkv6_forward(*inputs, order, cu_seqlens, True)
        saved = [x.nan_to_num() for x in saved]
        torch.library.opcheck(
            wkv6_backward, (*inputs[:5], order, cu_seqlens, *saved, torch.ones_like(y), state)
        )


def test_checkpoint_changes_nothing():
    inputs = make_inputs(33, torch.bfloat16, B=1)
    expected = run(wkv6, inputs)
    assert_equal(run(lambda *x: checkpoint(wkv6, *x, use_reentrant=False), inputs), expected)


@pytest.mark.parametrize("T", [5, 40])
def test_autocast_changes_nothing(T):
    inputs = make_inputs(T, B=1)
    expected = run(wkv6, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(run(wkv6, inputs), expected)


@pytest.mark.parametrize(
    ("size", "dtype", "message"),
    [
        (16, torch.float32, "not K = 16 and V = 16"),
        (64, torch.float64, "torch.float64"),
        (64, torch.float16, ""),
    ],
)
def test_says_what_is_not_served(size, dtype, message):
    x = torch.zeros(1, 2, 1, size, dtype=dtype)
    reason = unsupported("wkv6", x, x)
    assert message in reason and bool(message) == bool(reason)
