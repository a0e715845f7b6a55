"""Triton's interpreter, as `triton_interpreter` mends it, computes what torch computes in the same dtype."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton_interpreter import NEEDS_INTERPRETER, bytes_of, launches, tf32_dots

pytestmark = NEEDS_INTERPRETER


@triton.jit
def elementwise_kernel(x, y, out, N: tl.constexpr, OP: tl.constexpr):
    o = tl.arange(0, N)
    b_x, b_y = tl.load(x + o), tl.load(y + o)
    if OP == "mul":
        b_out = b_x * b_y
    elif OP == "add":
        b_out = b_x + b_y
    elif OP == "sub":
        b_out = b_x - b_y
    elif OP == "neg":
        b_out = -b_x
    elif OP == "scale":
        b_out = b_x * 0.3
    elif OP == "maximum":
        b_out = tl.maximum(b_x, b_y)
    elif OP == "where":
        b_out = tl.where(b_x < b_y, b_x, b_y)
    elif OP == "clamp":
        b_out = tl.clamp(b_x, -0.5, 0.5)
    elif OP == "exp":
        b_out = tl.exp(b_x.to(tl.float32))
    elif OP == "fp16":
        b_out = b_x.to(tl.float16).to(tl.float32)
    elif OP == "int":
        b_out = (b_x * 10).to(tl.int32).to(tl.float32)
    tl.store(out + o, b_out)


ELEMENTWISE = {
    "mul": lambda x, y: x * y,
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "neg": lambda x, y: -x,
    "scale": lambda x, y: x * torch.tensor(0.3, dtype=x.dtype),
    "maximum": torch.maximum,
    "where": torch.minimum,
    "clamp": lambda x, y: x.clamp(-0.5, 0.5),
    "exp": lambda x, y: x.float().exp(),
    "fp16": lambda x, y: x.half().float(),
    "int": lambda x, y: (x * 10).int().float(),
}


@pytest.mark.parametrize("op", ELEMENTWISE)
def test_bfloat16_elementwise_equals_torch(op):
    x, y = torch.randn(2, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = ELEMENTWISE[op](x, y)
    out = torch.full_like(expected, torch.nan)
    elementwise_kernel[(1,)](x, y, out, 256, op)
    # Bit for bit, but exp, where two libraries may differ in the last bit of float32.
    torch.testing.assert_close(out, expected, rtol=2e-7 if op == "exp" else 0, atol=0)


@triton.jit
def copy_kernel(x, out, N: tl.constexpr, BF16: tl.constexpr):
    o = tl.arange(0, N)
    b_x = tl.load(x + o)
    if BF16:
        b_x = b_x.to(tl.bfloat16).to(tl.float32)
    tl.store(out + o, b_x)


@pytest.mark.parametrize("where", ["cast", "store"])
def test_bfloat16_rounds_to_nearest_even(where):
    generator = torch.Generator().manual_seed(0)
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, torch.inf, -torch.inf, 0.0, 1e-40])
    x = torch.cat([torch.randn(248, generator=generator), ties])
    out = torch.full_like(x, torch.nan, dtype=torch.float32 if where == "cast" else torch.bfloat16)
    copy_kernel[(1,)](x, out, 256, where == "cast")
    torch.testing.assert_close(out.bfloat16(), x.bfloat16(), rtol=0, atol=0)


def test_bfloat16_keeps_nan():
    x = torch.full((4,), torch.nan)
    out = torch.zeros(4, dtype=torch.bfloat16)
    copy_kernel[(1,)](x, out, 4, True)
    assert out.isnan().all()


@triton.jit
def rows_kernel(x, out, N: tl.constexpr, OP: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    b_x = tl.load(x + o)
    if OP == "sum":
        tl.store(out + tl.arange(0, N), tl.sum(b_x, 1))
    elif OP == "max":
        tl.store(out + tl.arange(0, N), tl.max(b_x, 1))
    elif OP == "total":
        tl.store(out, tl.sum(b_x))
    elif OP == "cumsum":
        tl.store(out + o, tl.cumsum(b_x, 1))
    elif OP == "reverse cumsum":
        tl.store(out + o, tl.cumsum(b_x, 1, reverse=True))


REDUCTIONS = {
    "sum": lambda x: x.sum(1),
    "max": lambda x: x.amax(1),
    "total": lambda x: x.sum().view(1),
    "cumsum": lambda x: x.cumsum(1),
    "reverse cumsum": lambda x: x.flip(1).cumsum(1).flip(1),
}


@pytest.mark.parametrize("op", REDUCTIONS)
def test_bfloat16_reductions_equal_torch(op):
    # Small integers: their sums are exact in float32, so that only the last rounding counts.
    x = torch.randint(-40, 40, (16, 16), generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = REDUCTIONS[op](x.float()).bfloat16()
    out = torch.full_like(expected, torch.nan)
    rows_kernel[(1,)](x, out, 16, op)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@triton.jit
def dot_kernel(x, y, out, N: tl.constexpr, PRECISION: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + o, tl.dot(tl.load(x + o), tl.load(y + o), input_precision=PRECISION))


def relative_dot_error(dtype, precision):
    x, y = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.full((32, 32), torch.nan)
    dot_kernel[(1,)](x, y, out, 32, precision)
    expected = x.double() @ y.double()
    return ((out - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_sums_in_float32(dtype):
    assert relative_dot_error(dtype, "ieee") < 1e-6


def test_tf32_dots_cut_only_where_tf32_is_asked_for():
    with tf32_dots():
        # Operands cut to 10 bits lose up to 2^-10 = 1e-3 each.
        assert 1e-4 < relative_dot_error(torch.float32, "tf32") < 2e-3
        assert relative_dot_error(torch.float32, "tf32x3") < 1e-6
        assert relative_dot_error(torch.float32, "ieee") < 1e-6
        assert relative_dot_error(torch.bfloat16, "tf32") < 1e-6  # its 7 bits are within tf32's 10
    assert relative_dot_error(torch.float32, "tf32") < 1e-6


def test_launches_are_counted_with_their_bytes():
    x, out = torch.zeros(256), torch.zeros(256, dtype=torch.bfloat16)
    with launches() as seen:
        copy_kernel[(1,)](x, out, 256, False)
        copy_kernel[(2,)](x, out=out, N=256, BF16=True)
    copy_kernel[(1,)](x, out, 256, False)
    assert seen == [("copy_kernel", 256 * 4 + 256 * 2)] * 2
    assert bytes_of(torch.zeros(1, 1, 3, 4).expand(2, 5, 3, 4)) == 3 * 4 * 4
