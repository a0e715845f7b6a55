"""The Triton kernels of RWKV-7 against the recurrence in float64, over every option of the op."""

import functools
import math

import pytest
import torch
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from triton_interpreter import POISONED_KERNELS, tf32_dots
from triton_interpreter import launches as seen_launches
from wkv_judge import assert_equal, assert_same, relative_error, run

from visualrwkv_hf import wkv
from visualrwkv_hf.triton_kernels import KERNELS, launches, unsupported, wkv7_fwd
from visualrwkv_hf.triton_kernels.launches import LONG, MAX_STEPS
from visualrwkv_hf.triton_kernels.wkv7 import wkv7, wkv7_backward, wkv7_forward

pytestmark = POISONED_KERNELS

LENGTHS = (1, 7, 16, 17, 33, 64, 65, 100)
BOUND = -math.exp(-0.5)  # of RWKV-7's log decays

# Relative to the norm of the float64 tensor. Products of bfloat16 have operands of 8 bits (2^-9 at most), of which a
# gradient passes several; float16's have 10 (tf32) and so are its results; float32's are tf32 three times over.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

DECAYS = {
    "one": lambda x: 0 * x,
    "zero": lambda x: torch.full_like(x, -torch.inf),
    "-600": lambda x: torch.full_like(x, -600.0),
    "mixed": lambda x: torch.tensor([0.0, -1e-3, -1.0, -20.0, -90.0, -600.0, -1e4, -torch.inf])[
        (x * 1e4).long() % 8
    ],
}


def make_inputs(T, dtype=torch.float32, K=32, B=1, H=1, states=None, decay=None, seed=0):
    """r, w, k, v, a, b and the initial state, of `states` sequences; w is float32 as in the model."""
    generator = torch.Generator().manual_seed(seed)
    randn = functools.partial(torch.randn, generator=generator)
    r, k, v, kk, noise = (randn(B, T, H, K) for _ in range(5))
    w = BOUND * torch.sigmoid(noise) if decay is None else DECAYS[decay](noise)
    kk, rate = normalize(kk, dim=-1), torch.rand(B, T, H, K, generator=generator)
    r, k, v, a, b = (x.to(dtype) for x in (r, k, v, -kk, kk * rate))
    return [r, w, k, v, a, b, randn(B if states is None else states, H, K, K)]


def expected_of(inputs, **options):
    """By the plain op in float64, which the oracle judges."""
    return run(wkv.wkv7, [x.double() for x in inputs], **options)


@pytest.mark.parametrize(
    ("T", "dtype", "min_log_decay"),
    [(T, torch.float32, BOUND) for T in LENGTHS]
    + [(T, dtype, BOUND) for T in (16, 65) for dtype in (torch.float16, torch.bfloat16)]
    + [(T, dtype, -torch.inf) for T in (17, 33) for dtype in TOLERANCE],
    ids=str,
)
def test_equals_recurrence(T, dtype, min_log_decay):
    inputs = make_inputs(T, dtype)
    with tf32_dots():
        actual = run(wkv7, inputs, min_log_decay=min_log_decay)
    assert actual[0].dtype == dtype and actual[1].dtype == torch.float32
    assert [x.dtype for x in actual[2:]] == [x.dtype for x in inputs]
    assert_same(actual, expected_of(inputs), TOLERANCE[dtype])


@pytest.mark.parametrize("min_log_decay", [BOUND, -torch.inf])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("K", [64, 128])
def test_head_sizes(K, dtype, min_log_decay):
    inputs = make_inputs(40, dtype, K)
    with tf32_dots():
        actual = run(wkv7, inputs, min_log_decay=min_log_decay)
    assert_same(actual, expected_of(inputs), TOLERANCE[dtype])


@pytest.mark.parametrize(("K", "dtype", "bounded"), launches.WKV7_OTHER_GPUS, ids=str)
def test_what_other_gpus_launch_equals_recurrence(K, dtype, bounded, monkeypatch):
    min_log_decay = BOUND if bounded else -torch.inf
    inputs = make_inputs(launches.WKV7[K, dtype, bounded].BT + 1, dtype, K)  # two chunks
    usual, _ = wkv7_fwd.config_of(inputs[0], min_log_decay)
    monkeypatch.setattr(launches, "architecture", lambda r: 8)
    config, _ = wkv7_fwd.config_of(inputs[0], min_log_decay)
    assert config == usual._replace(**launches.WKV7_OTHER_GPUS[K, dtype, bounded]) != usual
    with tf32_dots():
        actual = run(wkv7, inputs, min_log_decay=min_log_decay)
    assert_same(actual, expected_of(inputs), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("T", [1, MAX_STEPS, MAX_STEPS + 1])
def test_without_gradient_equals_recurrence(T, dtype):
    inputs = make_inputs(T, dtype, B=2, H=2)
    with tf32_dots(), torch.no_grad():
        actual = wkv7(*inputs)
    assert_same(actual, expected_of(inputs)[:2], TOLERANCE[dtype])


@pytest.mark.parametrize("decay", ["random", "bound", "packed"])
def test_longer_chunks_without_a_backward_equal_recurrence(decay):
    """From LONG tokens on a scan makes half as many steps, of 64 tokens; with a backward to follow it does not."""
    T, packed = LONG + 70, decay == "packed"
    ends = torch.tensor([0, LONG + 70, 2 * LONG]) if packed else None
    inputs = make_inputs(2 * LONG if packed else T, torch.bfloat16, K=64, states=2 if packed else None)
    if decay == "bound":
        inputs[1] = torch.full_like(inputs[1], BOUND)
    order = torch.arange(inputs[0].shape[1])[None]
    order[:, 40:90], order[:, 100] = order[:, 40:90].flip(1), -101
    options = dict(order=order, cu_seqlens=ends)
    expected = wkv.wkv7(*(x.double() for x in inputs), **options)
    with tf32_dots(), torch.no_grad(), seen_launches() as longer:
        actual = wkv7(*inputs, min_log_decay=BOUND, **options)
    assert_same(actual, expected, TOLERANCE[torch.bfloat16])
    with torch.no_grad(), seen_launches() as shorter:
        wkv7(*inputs, min_log_decay=-2.0, **options)  # 64 tokens might overflow
    sizes = [launch.bytes for launch in (*longer, *shorter) if launch.kernel == "wkv7_fwd_scan_kernel"]
    assert len(sizes) == 2 and sizes[0] < 0.8 * sizes[1], "P and N of half as many chunks"


@pytest.mark.parametrize("tokens", [LONG - 1, LONG])
def test_chunks_are_longer_where_it_pays_and_is_safe(tokens, monkeypatch):
    config, longer = launches.WKV7[64, torch.bfloat16, True], tokens >= LONG
    assert wkv7_fwd.tokens_of_chunk(config, tokens, BOUND, save=False) == (64 if longer else 32)
    assert wkv7_fwd.tokens_of_chunk(config, tokens, BOUND, save=True) == 32
    assert wkv7_fwd.tokens_of_chunk(config, tokens, -1.3, save=False) == 32  # exp(1.3 * 32) is above exp(40)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert wkv7_fwd.tokens_of_chunk(config, tokens, BOUND, save=False) == 32


def test_token_by_token_equals_chunks(monkeypatch):
    inputs = make_inputs(40, B=2)
    options = dict(order=pads_and_pictures(2, 40))
    with torch.no_grad():
        chunked = wkv7(*inputs, **options)
        # As on a GPU without matrix units.
        monkeypatch.setattr(wkv7_fwd, "has_matrix_units", lambda r: False)
        stepped = wkv7(*inputs, **options)
    assert_same(stepped, [x.double() for x in chunked], 1e-6)  # float32, summed in another order
    assert not torch.equal(stepped[0], chunked[0])


def pads_and_pictures(B, T):
    """A permutation of a span per row, with pads left (row 0), right (row 1) and in the middle."""
    order = torch.arange(T).repeat(B, 1)
    for row in range(B):
        generator = torch.Generator().manual_seed(row)
        order[row, 3:-5] = 3 + torch.randperm(T - 8, generator=generator)
    order[0, :2] = ~order[0, :2]
    order[-1, -3:] = ~order[-1, -3:]
    order[:, T // 2 : T // 2 + 2] = ~order[:, T // 2 : T // 2 + 2]
    return order


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("T", [12, 40])
def test_order_with_pads(T, dtype):
    inputs, order = make_inputs(T, dtype, B=2), pads_and_pictures(2, T)
    expected = expected_of(inputs, order=order)
    with tf32_dots():
        actual = run(wkv7, inputs, order=order, min_log_decay=BOUND)
        with torch.no_grad():
            forward = wkv7(*inputs, order=order)
    assert_same(actual, expected, TOLERANCE[dtype])
    assert_same(forward, expected[:2], TOLERANCE[dtype])
    pads = torch.zeros(2, T, dtype=torch.bool).scatter_(1, torch.where(order < 0, ~order, order), order < 0)
    for x in (actual[0], *actual[2:8], forward[0]):
        assert not x[pads].any(), "rows of pads are 0"


def test_pads_only():
    inputs = make_inputs(20, B=2)
    actual = run(wkv7, inputs, order=~torch.arange(20).repeat(2, 1))
    assert not any(x.any() for x in (actual[0], *actual[2:8])) and torch.equal(actual[1], inputs[-1])


LENGTHS_PACKED = (1, 0, 33, 17, 0, 16, 0)


@pytest.mark.parametrize(("with_order", "index"), [(False, torch.int32), (True, torch.int64)])
def test_packed_sequences_equal_each_alone(with_order, index):
    ends = torch.tensor((0, *LENGTHS_PACKED)).cumsum(0)
    T, S = int(ends[-1]), len(LENGTHS_PACKED)
    *inputs, states = make_inputs(T, states=S)
    order = torch.arange(T)[None]
    if with_order:
        generator = torch.Generator().manual_seed(0)
        order = torch.cat(
            [
                begin + torch.randperm(end - begin, generator=generator)
                for begin, end in zip(ends.tolist(), ends[1:].tolist())
            ]
        )[None]
        order[:, 20:23] = ~order[:, 20:23]
    packed = run(
        wkv7,
        [*inputs, states],
        order=order if with_order else None,
        cu_seqlens=ends.to(index),
        min_log_decay=BOUND,
    )
    assert_same(
        packed, expected_of([*inputs, states], order=order, cu_seqlens=ends), TOLERANCE[torch.float32]
    )
    with torch.no_grad():
        for s, (begin, end) in enumerate(zip(ends.tolist(), ends[1:].tolist())):
            if begin == end:
                assert torch.equal(packed[1][s], states[s])
                continue
            own = order[:, begin:end]
            y, state = wkv7(
                *(x[:, begin:end] for x in inputs),
                states[s : s + 1],
                order=torch.where(own < 0, own + begin, own - begin),
            )
            # Chunks of other sizes, or none: summed in another order.
            assert_same((y, state), (packed[0][:, begin:end].double(), packed[1][s : s + 1].double()), 1e-6)


def test_short_packed_sequences_token_by_token():
    ends = torch.tensor([0, 1, 1, 4, 9])
    inputs = make_inputs(9, states=4)
    with torch.no_grad():
        actual = wkv7(*inputs, cu_seqlens=ends)
    assert_same(actual, expected_of(inputs, cu_seqlens=ends)[:2], TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("decay", DECAYS)
def test_any_decay_from_0_to_1(decay, dtype):
    inputs = make_inputs(20, dtype, decay=decay)
    with tf32_dots():
        actual = run(wkv7, inputs)
    # What is nothing to float32 may be exp(-600) in float64.
    expected = [x.float().double() for x in expected_of(inputs)]
    tiny = [x.abs().max() < 1e-30 for x in expected]
    assert all(x.abs().max() < 1e-30 for x, small in zip(actual, tiny) if small)
    assert_same(
        [x for x, small in zip(actual, tiny) if not small],
        [x for x, small in zip(expected, tiny) if not small],
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("log_decay", [-5.0, -10.0, -20.0])
def test_gradient_of_uniformly_strong_decays(log_decay, dtype):
    """The gradient of w is e^log_decay times the others; "all minus the rest" would keep rounding errors of these."""
    r, w, k, v, a, b, state = make_inputs(20, dtype)
    inputs = [r, torch.full_like(w, log_decay), k, v, a, b, state]
    actual, expected = run(wkv7, inputs)[3], expected_of(inputs)[3]
    assert relative_error(actual, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equal_keys_do_not_grow(dtype):
    """Each token removes what the last one wrote; powers of A_ab would grow as binomials."""
    r, w, k, v, a, _, state = make_inputs(64, dtype)
    a = a[:, :1].expand_as(a)
    inputs = [r, 1e-3 * w, k, v, a, -a, state]
    with tf32_dots():
        actual = run(wkv7, inputs, min_log_decay=BOUND)
    # Gradients of a and b sum what is mostly parallel and cancels: measured 3 times the others' error.
    assert_same(actual, expected_of(inputs), 3 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_does_not_drift(dtype):
    """The state of slow decays after 2,000 tokens is as near as after one chunk."""
    r, w, k, v, a, b, state = make_inputs(2000, dtype)
    inputs = [r, 1e-3 * w, k, v, a, b, state]
    with tf32_dots(), torch.no_grad():
        actual = wkv7(*inputs, min_log_decay=BOUND)
        expected = wkv.wkv7(*(x.double() for x in inputs))
    assert_same(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", "wkvab")
def test_nan_is_not_lost(name, dtype):
    """Nor as a GPU makes it, all bits set: to round it as a number would carry over into the sign, and leave 0."""
    names = ("r", "w", "k", "v", "a", "b", "initial_state")
    inputs = dict(zip(names, make_inputs(40, dtype)))
    inputs[name] = inputs[name].float()
    inputs[name][:, 20] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    y, state = wkv7(**inputs, min_log_decay=BOUND)
    assert y[:, 20:].isnan().all() and state.isnan().all()


@pytest.mark.parametrize("wanted", ["y", "state"])
def test_one_of_the_two_outputs(wanted):
    def total(op, inputs):
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = op(*inputs)[wanted == "state"]
        return torch.autograd.grad((out * torch.ones_like(out).cumsum(-1)).sum(), inputs)

    # r has no part in the state: its gradient is 0 here and None there.
    inputs = make_inputs(40)
    actual = total(wkv7, inputs)
    expected = total(lambda *x: [y + 0 * x[0].sum() for y in wkv.wkv7(*x)], [x.double() for x in inputs])
    assert_same(actual, expected, TOLERANCE[torch.float32])


def test_without_initial_state():
    *inputs, state = make_inputs(40)
    expected = run(wkv7, [*inputs, torch.zeros_like(state)])
    assert_equal(run(wkv7, inputs), expected[:-1])


def test_inputs_need_not_be_contiguous():
    inputs = make_inputs(20, H=2)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    strided[1] = strided[1][:, :1].expand_as(strided[1])
    inputs[1] = strided[1].contiguous()
    assert_equal(run(wkv7, strided), run(wkv7, inputs))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_two_runs_are_equal(dtype):
    inputs = make_inputs(20, dtype, B=2)
    assert_equal(run(wkv7, inputs), run(wkv7, inputs))


def test_few_and_many_sequences_equal(monkeypatch):
    inputs = make_inputs(20, torch.bfloat16)
    config, _ = wkv7_fwd.config_of(inputs[0], -torch.inf)
    assert config.few != config.many
    few = run(wkv7, inputs)
    monkeypatch.setattr(launches, "FEW", 0)
    assert_equal(run(wkv7, inputs), few)


def test_compiles_in_one_graph():
    inputs = make_inputs(40, B=2)
    options = dict(order=pads_and_pictures(2, 40), min_log_decay=BOUND)
    compiled = torch.compile(wkv7, fullgraph=True, backend="aot_eager")
    assert_equal(run(compiled, inputs, **options), run(wkv7, inputs, **options))


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_registered_as_torch_demands(packed):
    # Lengths that fill the table of chunks: behind its end nothing is written, which no one reads either.
    cu_seqlens = torch.tensor([0, 17, 18]) if packed else None
    *tensors, state = (x.requires_grad_() for x in make_inputs(18, states=2 if packed else None))
    torch.library.opcheck(wkv7_forward, (*tensors, state, None, cu_seqlens, -torch.inf, True))
    torch.library.opcheck(
        wkv7_forward, (*tensors, None, None, cu_seqlens, BOUND, False), test_utils="test_schema"
    )
    with torch.no_grad():
        y, _, *saved = wkv7_forward(*tensors, state, None, cu_seqlens, -torch.inf, True)
        arguments = (*(x.detach() for x in tensors), state.detach(), None, cu_seqlens, -torch.inf)
    torch.library.opcheck(wkv7_backward, (*arguments, *saved, torch.ones_like(y), None))


@pytest.mark.parametrize("min_log_decay", [BOUND, -torch.inf])
def test_recomputing_saves_nothing_and_gives_the_same_gradients(min_log_decay):
    inputs, options = make_inputs(40), dict(min_log_decay=min_log_decay)
    assert_equal(run(wkv7, inputs, recompute=True, **options), run(wkv7, inputs, **options))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        wkv7(*(x.requires_grad_() for x in inputs), recompute=True, **options)
    assert len(saved) == len(inputs)


def test_nothing_is_saved_without_gradient():
    *tensors, state = make_inputs(40)
    assert all(x.numel() == 0 for x in wkv7_forward(*tensors, state, None, None, BOUND, False)[2:])


def test_checkpoint():
    inputs = make_inputs(20)
    again = functools.partial(checkpoint, wkv7, use_reentrant=False)
    assert_equal(run(again, inputs), run(wkv7, inputs))


def test_autocast_changes_nothing():
    inputs = make_inputs(20)
    expected = run(wkv7, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(wkv7, inputs)
    assert_equal(actual, expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 2, 1, 48), torch.float32, "K = 48"),
        ((1, 2, 1, 64), torch.float64, "torch.float64"),
        ((1, 2, 1, 64), torch.bfloat16, ""),
    ],
)
def test_says_what_is_not_served(shape, dtype, message):
    x = torch.zeros(shape, dtype=dtype)
    reason = unsupported("wkv7", x, x)
    assert message in reason and bool(message) == bool(reason)


@pytest.mark.parametrize("op", KERNELS)
def test_no_op_is_served_where_triton_does_not_run(op, monkeypatch):
    x = torch.zeros(1, 2, 1, 64)
    assert not unsupported(op, x, x)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert unsupported(op, x, x) == "Triton does not run on cpu"


@pytest.mark.parametrize("op", ["rwkv6_decode", "rwkv7_decode"])
def test_states_that_share_memory_are_not_served(op):
    x, state = torch.zeros(2, 1, 64), torch.zeros(2, 2, 32, 32)
    assert not unsupported(op, x, state)
    assert "strides (0, 1024, 32, 1)" in unsupported(op, x, state[:1].expand_as(state))
    assert not unsupported(op, x[:1], state[:1].expand(1, -1, -1, -1))


@pytest.mark.parametrize("value", ["1", "true", "True", "on", "yes", "0", "false", ""])
def test_kernels_are_interpreted_where_triton_says_so(value, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert launches.interpreted() == (value not in ("0", "false", ""))


def test_old_gpus_have_no_gradient(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    on_gpu = type(
        "OnGpu", (), {"device": torch.device("cuda"), "dtype": torch.float16, "shape": (1, 2, 1, 64)}
    )()
    why_not = KERNELS["wkv7"].why_not
    assert "8.0" in why_not(on_gpu, on_gpu, gradient=True)
    assert not why_not(on_gpu, on_gpu)
