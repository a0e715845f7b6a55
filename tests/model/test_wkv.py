"""The WKV ops in torch, against a float64 oracle, the original's numbers and an independent package."""

import functools
import itertools
import json
import shutil
import subprocess
import sys
import threading
import types
import warnings
from pathlib import Path

import pytest
import torch
from oracles import wkv as oracle
from safetensors.torch import load_file
from torch.nn.functional import normalize
from wkv_judge import assert_same, relative_error, run

from visualrwkv_hf import dispatch, kernel_backend, scan_orders, wkv
from visualrwkv_hf.wkv import wkv6, wkv7

OPS = {"wkv6": (wkv6, oracle.wkv6), "wkv7": (wkv7, oracle.wkv7)}

# Up to MAX_STEPS token by token, then around one chunk, two, and more.
LENGTHS = (1, 2, 7, 16, 17, 31, 32, 33, 63, 64, 65, 100, 200)

# Relative to the norm of the float64 oracle's tensor.
TOLERANCE = {
    torch.float64: 1e-12,  # summed in another order, nothing else
    torch.float32: 1e-6,  # eps 1.2e-7; measured up to 4e-7
    torch.float16: 5e-4,  # computed in float32; rounding the output alone is up to 2^-11 = 4.9e-4
    torch.bfloat16: 3e-3,  # likewise 2^-8 = 3.9e-3 at most, 1.7e-3 on average
}

LOG_DECAYS = {
    "typical": lambda x: -torch.exp(x),
    "slow": lambda x: -1e-4 * x.abs(),
    "one": lambda x: 0 * x,
    "near zero": lambda x: -torch.exp(x + 5),  # -1e2 to -1e4
    "zero": lambda x: torch.full_like(x, -torch.inf),
    "-600": lambda x: torch.full_like(x, -600.0),
    "mixed": lambda x: torch.tensor([0.0, -1e-3, -1.0, -20.0, -90.0, -600.0, -1e4, -torch.inf])[
        (x * 1e4).long() % 8
    ],
}


def make_inputs(op, T, dtype=torch.float32, decay="typical", B=2, H=2, K=8, V=6, seed=0):
    """Inputs of an op, initial state last, all leaves that require a gradient."""
    generator = torch.Generator().manual_seed(seed)
    randn = functools.partial(torch.randn, generator=generator)
    r, k, kk, noise = (randn(B, T, H, K) for _ in range(4))
    v, u, state = randn(B, T, H, V), randn(H, K), randn(B, H, K, V)
    w = LOG_DECAYS[decay](noise)
    inputs = [x.to(dtype) for x in (r, w, k, v)]
    # -inf is a log decay in every dtype, and w is float32 in the model whatever the rest is.
    inputs[1] = w.to(torch.float64 if dtype == torch.float64 else torch.float32)
    if op == "wkv6":
        inputs.append(u.to(dtype))
    else:
        kk, rate = normalize(kk, dim=-1), torch.rand(B, T, H, K, generator=generator)
        inputs += [-kk.to(dtype), (kk * rate).to(dtype)]
    inputs.append(state.to(torch.float64 if dtype == torch.float64 else torch.float32))
    return [x.requires_grad_() for x in inputs]


@functools.cache
def expected_of(op, T, dtype, decay="typical"):
    # In double from the start, so that its gradients are too.
    return run(OPS[op][1], [x.double() for x in make_inputs(op, T, dtype, decay)])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("op", OPS)
def test_op_equals_oracle(op, T, dtype):
    actual = run(OPS[op][0], make_inputs(op, T, dtype))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert actual[0].dtype == dtype and actual[1].dtype == compute
    assert_same(actual, expected_of(op, T, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("chunk_size", [1, 2, 4, 16, 64, 128])
@pytest.mark.parametrize("op", OPS)
def test_any_chunk_size_will_do(op, chunk_size):
    actual = run(OPS[op][0], make_inputs(op, 100), chunk_size=chunk_size)
    assert_same(actual, expected_of(op, 100, torch.float32), TOLERANCE[torch.float32])


@pytest.mark.parametrize("decay", LOG_DECAYS)
@pytest.mark.parametrize("T", [5, 70])
@pytest.mark.parametrize("op", OPS)
def test_any_decay_from_0_to_1(op, T, decay):
    actual = run(OPS[op][0], make_inputs(op, T, decay=decay))
    assert all(x.isfinite().all() for x in actual)
    # What is nothing to float32 may be exp(-600) to the oracle.
    expected = [x.float().double() for x in expected_of(op, T, torch.float32, decay)]
    assert_same(actual, expected, TOLERANCE[torch.float32])


def parallel_keys(T, decay, rate):
    """One key for all tokens: I - A_ab is as far from I as it gets."""
    r, w, _, v, a, _, state = (x.detach() for x in make_inputs("wkv7", T))
    a = a[:1, :1, :1].expand_as(a)
    return [r, torch.full_like(w, decay), -a, v, a, -rate * a, state]


@pytest.mark.parametrize("rate", [1.0, 0.999, 0.5])
@pytest.mark.parametrize("decay", [0.0, -1e-3, -0.6065])
def test_parallel_keys_do_not_cancel(decay, rate):
    inputs = parallel_keys(130, decay, rate)
    expected = run(oracle.wkv7, [x.double() for x in inputs])
    assert_same(run(wkv7, inputs), expected, 2e-6)


@pytest.mark.parametrize("op", OPS)
def test_thousands_of_tokens_do_not_drift(op):
    inputs = make_inputs(op, 4000, B=1, H=1, K=4, V=4, decay="slow")
    actual, expected = OPS[op][0](*inputs), OPS[op][1](*inputs)
    assert_same(actual, expected, 3e-6)  # rounding of 4000 tokens that hardly decay


@pytest.mark.parametrize("cut", [1, 16, 31, 32, 40, 64, 69])
@pytest.mark.parametrize("op", OPS)
def test_prefix_then_suffix_equals_whole(op, cut):
    function, inputs = OPS[op][0], make_inputs(op, 70)
    assert_same(run(in_two, inputs, op=op, cut=cut), run(function, inputs), TOLERANCE[torch.float32])


def in_two(*inputs, op, cut):
    *inputs, state = inputs
    prefix = [x[:, :cut] if x.dim() == 4 else x for x in inputs]
    suffix = [x[:, cut:] if x.dim() == 4 else x for x in inputs]
    y1, state = OPS[op][0](*prefix, state)
    y2, state = OPS[op][0](*suffix, state)
    return torch.cat([y1, y2], 1), state


@pytest.mark.parametrize("op", OPS)
def test_token_by_token_equals_whole(op):
    *inputs, state = (x.detach() for x in make_inputs(op, 40))
    expected = OPS[op][0](*inputs, state)
    before, out = state.clone(), []
    for t in range(40):
        y, state = OPS[op][0](*(x[:, t : t + 1] if x.dim() == 4 else x for x in inputs), state)
        out.append(y)
    assert_same((torch.cat(out, 1), state), expected, TOLERANCE[torch.float32])
    assert torch.equal(before, make_inputs(op, 40)[-1]), "the initial state is the caller's"


def with_pads(inputs, at, pads):
    """Pads as the model makes them (k = w = a = b = 0, r and v are anything) before token `at`."""
    r, w, k, v, *rest, state = (x.detach() for x in inputs)

    def insert(x, value):
        return torch.cat([x[:, :at], torch.full_like(x[:, :1], value).expand(-1, pads, -1, -1), x[:, at:]], 1)

    rest = [insert(x, 0.0) if x.dim() == 4 else x for x in rest]
    return [insert(r, 3.0), insert(w, 0.0), insert(k, 0.0), insert(v, 5.0), *rest, state]


@pytest.mark.parametrize("pads", [1, 3, 32, 45])
@pytest.mark.parametrize("at", [0, 20, 50])
@pytest.mark.parametrize("op", OPS)
def test_pads_leave_no_trace(op, at, pads):
    inputs = make_inputs(op, 50)
    y, state = OPS[op][0](*with_pads(inputs, at, pads))
    y = torch.cat([y[:, :at], y[:, at + pads :]], 1)
    assert_same((y, state), OPS[op][0](*inputs), TOLERANCE[torch.float32])  # chunks begin elsewhere


@pytest.mark.parametrize("pads", [1, 16, 17, 33, 100])
@pytest.mark.parametrize("op", OPS)
def test_only_pads_leave_the_state_bit_equal(op, pads):
    *inputs, state = with_pads(make_inputs(op, 1), 1, pads)
    inputs = [x[:, 1:] if x.dim() == 4 else x for x in inputs]
    assert torch.equal(OPS[op][0](*inputs, state)[1], state)


@pytest.mark.parametrize("T", [3, 45])
@pytest.mark.parametrize("op", OPS)
def test_row_of_a_batch_equals_row_alone(op, T):
    inputs = make_inputs(op, T, B=3)
    whole = OPS[op][0](*inputs)
    alone = OPS[op][0](*(x if x.dim() == 2 else x[1:2] for x in inputs))
    assert_same(alone, [x[1:2] for x in whole], TOLERANCE[torch.float32])


@pytest.mark.parametrize(("B", "H"), [(1, 1), (1, 3), (3, 1)])
@pytest.mark.parametrize("T", [1, 32, 64, 65])
@pytest.mark.parametrize("op", OPS)
def test_layout_in_memory_does_not_matter(op, T, B, H):
    """Whole chunks and single rows and heads are where a reshape may or may not copy."""
    inputs = make_inputs(op, T, B=B, H=H)
    expected = run(OPS[op][1], [x.double() for x in inputs])
    assert_same(run(OPS[op][0], inputs), expected, TOLERANCE[torch.float32])
    inputs = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in inputs]
    assert_same(run(OPS[op][0], inputs), expected, TOLERANCE[torch.float32])


def shuffled(T, B=2, seed=3):
    """A permutation per row, [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(T, generator=generator) for _ in range(B)])


def along(x, order):
    return torch.stack([row[index] for row, index in zip(x, order)])


@pytest.mark.parametrize("T", [1, 5, 45])
@pytest.mark.parametrize("op", OPS)
def test_order_is_reading_permuted_tokens(op, T):
    *inputs, state = make_inputs(op, T)
    order = shuffled(T)

    def permuted(*inputs, **options):
        y, state = OPS[op][0](*(along(x, order) if x.dim() == 4 and x.shape[1] == T else x for x in inputs))
        return along(y, order.argsort(1)), state

    actual = run(OPS[op][0], [*inputs, state], order=order)
    expected = run(lambda *x: permuted(*x[:-1], x[-1]), [*inputs, state])
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("T", [6, 45])
@pytest.mark.parametrize("op", OPS)
def test_pads_in_the_order_are_passed_over(op, T):
    inputs = make_inputs(op, T)
    real = torch.rand(2, T, generator=torch.Generator().manual_seed(5)) > 0.3
    order = shuffled(T)
    signed = torch.where(real.gather(1, order), order, ~order)
    actual = run(OPS[op][0], inputs, order=signed)
    for row in range(2):
        kept = order[row][real[row][order[row]]]  # what is read, as it is read

        def alone(*inputs, row=row, kept=kept):
            *tokens, state = (x if x.dim() == 2 else x[row : row + 1] for x in inputs)
            y, state = OPS[op][0](*(x if x.dim() == 2 else x[:, kept] for x in tokens), state)
            return y, state

        y, state = alone(*inputs)
        assert_same((actual[0][row, kept], actual[1][row]), (y[0].double(), state[0].double()), 1e-6)
    assert not actual[0][~real].any()
    for gradient, x in zip(actual[2:], inputs):
        assert x.shape[:2] != (2, T) or not gradient[~real].any()


@pytest.mark.parametrize("lengths", [[3, 40, 1], [17, 0, 33], [5]])
@pytest.mark.parametrize("op", OPS)
def test_packed_sequences_do_not_see_each_other(op, lengths):
    *inputs, _ = make_inputs(op, sum(lengths), B=1)
    states = torch.randn(len(lengths), 2, 8, 6, generator=torch.Generator().manual_seed(4))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    y, state = OPS[op][0](*inputs, states, cu_seqlens=cu_seqlens)
    for i, (start, end) in enumerate(itertools.pairwise(cu_seqlens)):
        if start == end:
            assert torch.equal(state[i], states[i])
            continue
        alone = OPS[op][0](*(x[:, start:end] if x.dim() == 4 else x for x in inputs), states[i : i + 1])
        assert torch.equal(y[:, start:end], alone[0]) and torch.equal(state[i : i + 1], alone[1])


@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize("op", OPS)
def test_no_initial_state_is_zeros(op, T):
    *inputs, state = make_inputs(op, T)
    for actual, expected in zip(OPS[op][0](*inputs), OPS[op][0](*inputs, torch.zeros_like(state))):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("T", [1, 40])
def test_constant_decay_broadcasts(T):
    """RWKV-5: w [H, K] is the same as w repeated for every token, and so is its gradient."""
    r, w, k, v, u, state = make_inputs("wkv6", T)
    w = w.detach()[0, 0]
    actual = run(wkv6, [r, w, k, v, u, state])
    expected = run(wkv6, [r, w.expand(r.shape).clone(), k, v, u, state])
    expected[3] = expected[3].sum((0, 1))
    assert_same(actual, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("T", [3, 18])
@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op, T):
    inputs = make_inputs(op, T, torch.float64, B=1, H=1, K=3, V=2)
    assert torch.autograd.gradcheck(functools.partial(OPS[op][0], chunk_size=4), inputs)


@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize("op", OPS)
def test_autocast_changes_nothing(op, T):
    inputs = make_inputs(op, T)
    expected = OPS[op][0](*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = OPS[op][0](*inputs)
    for x, y in zip(actual, expected):
        assert torch.equal(x, y)


@pytest.mark.parametrize("op", OPS)
def test_compiles_in_one_graph_for_any_length(op):
    """From the second length on T is a symbol: torch.compile must not reason about it for minutes."""
    torch.compiler.reset()
    function = torch.compile(OPS[op][0], backend="aot_eager", fullgraph=True)
    for T in (1, 40, 70):
        inputs = make_inputs(op, T)
        assert_same(run(function, inputs), run(OPS[op][0], inputs), TOLERANCE[torch.float32])


@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize("op", OPS)
def test_no_value_is_looked_at(op, T):
    """On the meta device there are none: so nothing waits for a GPU either."""
    y, state = OPS[op][0](*(x.detach().to("meta").requires_grad_() for x in make_inputs(op, T)))
    (y.sum() + state.sum()).backward()
    assert y.shape == (2, T, 2, 6) and state.shape == (2, 2, 8, 6)


# --- the original's numbers ---------------------------------------------------------------------------


def golden_wkv5(x, dtype):
    split = functools.partial(torch.unflatten, dim=-1, sizes=(2, 64))
    w = -torch.exp(x["w"].float())
    return wkv6(split(x["r"]), w, split(x["k"]), split(x["v"]), x["u"])


def golden_wkv6(x, dtype):
    split = functools.partial(torch.unflatten, dim=-1, sizes=(2, 64))
    return wkv6(split(x["r"]), split(-torch.exp(x["w"].float())), split(x["k"]), split(x["v"]), x["u"])


def golden_wkv7(x, dtype):
    return wkv7(x["q"], -torch.exp(x["w"].float()), x["k"], x["v"], x["a"], x["b"])


GOLDEN_OPS = {"wkv5_op": golden_wkv5, "wkv6_op": golden_wkv6, "wkv7_op": golden_wkv7}


def golden(folder: Path, case: str, dtype):
    """{name: what ours gives}, {name: what the original gave}, and the case's own account of both."""
    folder = folder / "x_ops" / case
    x = {name: tensor.to(dtype) for name, tensor in load_file(folder / "inputs.safetensors").items()}
    gy = x.pop("gy")
    x = {name: tensor.requires_grad_() for name, tensor in x.items()}
    y, state = GOLDEN_OPS[case](x, dtype)
    gradients = torch.autograd.grad(y.reshape(gy.shape), list(x.values()), gy)
    ours = {"y": y.detach().reshape(gy.shape), "final_state": state.detach().mT}  # theirs is [B, H, V, K]
    ours |= {f"g_{name}": gradient for name, gradient in zip(x, gradients)}
    prefix = {torch.float32: "fp32.", torch.bfloat16: "bf16."}[dtype]
    theirs = load_file(folder / "expected.safetensors")
    theirs = {n.removeprefix(prefix): tensor for n, tensor in theirs.items() if n.startswith(prefix)}
    return ours, theirs, json.loads((folder / "case.json").read_text())["tensors"]


@pytest.mark.parametrize("case", GOLDEN_OPS)
def test_float32_equals_original(golden_folder, case):
    ours, theirs, account = golden(golden_folder, case, torch.float32)
    assert {"y", "g_w"} <= set(theirs) <= set(ours)
    for name, expected in theirs.items():
        # The case says how near float32 can be; where it is silent, 2e-5 of the largest value.
        largest = float(expected.abs().max())
        atol = account[f"expected:fp32.{name}"].get("recommended_atol") or 2e-5 * largest
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", GOLDEN_OPS)
def test_bfloat16_equals_original(golden_folder, case):
    ours, theirs, _ = golden(golden_folder, case, torch.bfloat16)
    assert {"y", "g_w"} <= set(theirs) <= set(ours)
    for name, expected in theirs.items():
        # Both compute in float32 and round the result once to 8 bits, 1.7e-3 on average: two such roundings.
        # Gradients of parameters (u, and w of RWKV-5) are rounded per sample there and once here.
        assert relative_error(ours[name], expected.double()) < 4e-3, name


# --- an independent package ---------------------------------------------------------------------------


def heads_first(*tensors):
    return [x.transpose(1, 2).contiguous() for x in tensors]  # [B, H, T, .]


def test_wkv6_equals_flash_linear_attention():
    naive = pytest.importorskip("fla.ops.rwkv6.recurrent_naive")
    r, w, k, v, u, state = (x.detach() for x in make_inputs("wkv6", 70))
    expected = naive.naive_recurrent_rwkv6(
        *heads_first(r, k, v, w), u, scale=1.0, initial_state=state, output_final_state=True
    )
    y, S = wkv6(r, w, k, v, u, state)
    # They are float32 as well: twice our own tolerance.
    assert_same((y.transpose(1, 2), S), expected, 2e-6)


def test_wkv7_equals_flash_linear_attention():
    naive = pytest.importorskip("fla.ops.generalized_delta_rule.dplr.naive")
    r, w, k, v, a, b, state = (x.detach() for x in make_inputs("wkv7", 70))
    scaled_r = r * r.shape[-1] ** 0.5  # undoes their scale
    expected = naive.dplr_recurrence(*heads_first(scaled_r, k, v, a, b, w), initial_state=state)
    y, S = wkv7(r, w, k, v, a, b, state)
    assert_same((y.transpose(1, 2), S), expected, 2e-6)


# --- refusals and the choice of a kernel --------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": (2, 0, 2, 8)}, r"T >= 1, got \[2, 0, 2, 8\]"),
        ({"r": (2, 5, 16)}, r"r must be \[B, T, H, K\] with T >= 1, got \[2, 5, 16\]"),
        ({"k": (2, 5, 2, 4)}, r"k must be .* = \[2, 5, 2, 8\] as r is, got \[2, 5, 2, 4\]"),
        ({"v": (2, 4, 2, 6)}, r"v must be .* = \[2, 5, 2\], got \[2, 4, 2, 6\]"),
        ({"w": (2, 4, 2, 8)}, r"w must broadcast to .* = \[2, 5, 2, 8\] of r, got \[2, 4, 2, 8\]"),
        ({"state": (2, 2, 6, 8)}, r"initial_state must be .* = \[2, 2, 8, 6\] .*, got \[2, 2, 6, 8\]"),
    ],
)
@pytest.mark.parametrize("op", OPS)
def test_refuses_shapes_that_do_not_fit(op, change, message):
    names = ("r", "w", "k", "v", "u", "state") if op == "wkv6" else ("r", "w", "k", "v", "a", "b", "state")
    inputs = dict(zip(names, make_inputs(op, 5)))
    inputs |= {name: torch.zeros(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        OPS[op][0](*inputs.values())


def test_refuses_other_inputs_that_do_not_fit():
    r, w, k, v, u, _ = make_inputs("wkv6", 5)
    with pytest.raises(ValueError, match=r"order must be \[B, T\] = \[2, 5\] in torch.int64, got \[5\]"):
        wkv6(r, w, k, v, u, order=torch.arange(5))
    with pytest.raises(ValueError, match=r"cu_seqlens must be \[S \+ 1\] and B 1, got \[2\] and B = 2"):
        wkv6(r, w, k, v, u, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"u must be \[H, K\] = \[2, 8\], got \[16\]"):
        wkv6(r, w, k, v, u.flatten())
    for name in ("a", "b"):
        inputs = {"a": k, "b": k, name: k[:, 1:]}
        with pytest.raises(
            ValueError, match=rf"{name} must be .* = \[2, 5, 2, 8\] as r is, got \[2, 4, 2, 8\]"
        ):
            wkv7(r, w, k, v, **inputs)
    with pytest.raises(ValueError, match=r"power of two, got 24"):
        wkv6(r, w, k, v, u, chunk_size=24)
    with pytest.raises(ValueError, match=r"r must be floating point, got torch.int64"):
        wkv6(r.long(), w, k, v, u)


@pytest.mark.parametrize(
    ("inputs", "state"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ],
)
@pytest.mark.parametrize("op", OPS)
def test_refuses_a_state_of_another_dtype(op, inputs, state):
    *inputs, initial_state = make_inputs(op, 5, inputs)
    with pytest.raises(ValueError, match=f"initial_state must be .*, got .* in {state}"):
        OPS[op][0](*inputs, initial_state.to(state))


@pytest.fixture
def fake_kernels(monkeypatch):
    """Kernels that only say that they were called, and serve heads of all sizes but 3."""
    module = types.ModuleType("visualrwkv_hf.triton_kernels")
    module.KERNELS = {
        op: types.SimpleNamespace(kernel=lambda *inputs, op=op: (f"triton {op}", inputs)) for op in OPS
    }
    module.unsupported = lambda op, r, *_, gradient: (
        "heads of 3" if r.shape[-1] == 3 else "float64" if r.dtype == torch.float64 else ""
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(dispatch, "_said", set())


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setitem(sys.modules, "visualrwkv_hf.triton_kernels", None)


@pytest.mark.parametrize("op", OPS)
def test_triton_where_there_is_none_says_so(op, no_kernels):
    inputs = make_inputs(op, 5)
    with (
        pytest.raises(RuntimeError, match=rf'kernel_backend\("triton"\) .* no {op} kernel'),
        kernel_backend("triton"),
    ):
        OPS[op][0](*inputs)
    with kernel_backend("auto"):
        assert torch.is_tensor(OPS[op][0](*inputs)[0])


def test_kernels_are_told_all(fake_kernels):
    order, cu_seqlens = torch.arange(5).flip(0)[None], torch.tensor([0, 2, 5])
    packed = dict(order=order, cu_seqlens=cu_seqlens)
    with kernel_backend("triton"):
        *inputs, _ = make_inputs("wkv6", 5, B=1)
        assert wkv6(*inputs, **packed)[1][5:] == (None, order, cu_seqlens)
        *inputs, _ = make_inputs("wkv7", 5, B=1)
        assert wkv7(*inputs, **packed, min_log_decay=-1.0)[1][6:] == (None, order, cu_seqlens, -1.0)


@pytest.mark.parametrize("op", OPS)
def test_backend_is_chosen_per_block(op, fake_kernels):
    *inputs, state = make_inputs(op, 5)
    with kernel_backend("triton"):
        name, given = OPS[op][0](*inputs, state)
        assert name == f"triton {op}"
        assert all(torch.equal(x, y) for x, y in zip(given, [*inputs, state]))
        with kernel_backend("torch"):
            assert torch.is_tensor(OPS[op][0](*inputs, state)[0])
        assert OPS[op][0](*inputs, state)[0] == f"triton {op}"
    assert torch.is_tensor(OPS[op][0](*inputs, state)[0]), "auto on a CPU is torch"


def test_kernel_is_given_w_in_full(fake_kernels):
    r, w, k, v, u, state = make_inputs("wkv6", 5)
    with kernel_backend("triton"):
        _, given = wkv6(r, w[0, 0], k, v, u, state)
    assert given[1].shape == r.shape


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "expected"),
    [
        ("auto", "cuda", torch.bfloat16, "triton"),
        ("auto", "cpu", torch.float32, "torch"),
        ("torch", "cuda", torch.float32, "torch"),
        ("triton", "cpu", torch.float32, "triton"),
    ],
)
def test_choice_by_device(fake_kernels, backend, device, dtype, expected):
    r = types.SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 1, 1, 4))
    with kernel_backend(backend):
        assert (dispatch.kernel("wkv7", r) is None) == (expected == "torch")


@pytest.mark.parametrize(
    ("dtype", "size", "reason"), [(torch.float64, 4, "float64"), (torch.float32, 3, "heads of 3")]
)
def test_what_no_kernel_serves_runs_as_torch_and_says_so_once(fake_kernels, dtype, size, reason):
    r = types.SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(1, 1, 1, size))
    with pytest.warns(UserWarning, match=f"wkv7 runs as plain torch.*{reason}"):
        assert dispatch.kernel("wkv7", r) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.kernel("wkv7", r) is None
    with kernel_backend("triton"), pytest.raises(RuntimeError, match=reason):
        dispatch.kernel("wkv7", r)


def test_backend_of_one_thread_is_not_that_of_another():
    seen = []
    with kernel_backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(dispatch._chosen.backend))
        thread.start()
        thread.join()
        seen.append(dispatch._chosen.backend)
    assert seen == ["auto", "torch"] and dispatch._chosen.backend == "auto"


def test_backend_is_restored_after_an_error():
    with pytest.raises(KeyError), kernel_backend("torch"):
        raise KeyError
    assert dispatch._chosen.backend == "auto"


def test_refuses_an_unknown_backend():
    message = "Unknown kernel backend 'cuda': choose from auto, torch, triton, native"
    with pytest.raises(ValueError, match=message), kernel_backend("cuda"):
        pass


def test_files_run_alone_without_triton(tmp_path):
    """As remote code they do: torch is all they import."""
    folder = tmp_path / "alone"
    folder.mkdir()
    for file in (wkv.__file__, dispatch.__file__, scan_orders.__file__):
        shutil.copy(file, folder)
    program = (
        "import sys, torch; sys.modules['triton'] = None; sys.modules['visualrwkv_hf'] = None;"
        "from alone.wkv import wkv6; x = torch.ones(1, 40, 1, 2);"
        "print(wkv6(x, -x, x, x, x[0, 0])[0].shape)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert result.stdout.strip() == "torch.Size([1, 40, 1, 2])"


@pytest.mark.parametrize("order", [[0, 1, 3], [0, 1, -4]], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_orders_outside_the_sequence_are_refused(op, order):
    """Three tokens, and the same order in both rows: 3 is none of them, ~3 = -4 no padding of theirs."""
    inputs = [x.detach() for x in make_inputs(op, 3)]
    with pytest.raises(ValueError, match="order must hold tokens from -3 to 2, got "):
        OPS[op][0](*inputs, order=torch.tensor([order, order]))
