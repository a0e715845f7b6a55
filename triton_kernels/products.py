"""Matrix products of a few rows, all those that a layer needs at one place in one launch.

Each weight is read once, whatever the number of rows. Letters: B rows, M products, C inputs, N_m outputs, BN / BC / BB
outputs / inputs / rows of a tile.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import DTYPES, NAMESPACE, call, needs_gradient, on_device_of, product_precision, product_tiles

FUNCTIONS = ("identity", "tanh", "sigmoid", "squared_relu")
"""Functions that a product's result may go through."""

MAX_ROWS = 64
"""The most rows: for more, a library's matrix products are faster."""


def products(
    x: Sequence[Tensor],
    weights: Sequence[Tensor],
    functions: Sequence[str],
    by_output: Sequence[bool],
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Compute y_m = residual + gate f_m(x_m W_m) for M products.

    Operands are of the inputs' dtype (float32 is not rounded to tf32); sums, f, gate and residual are float32.

    Args:
        x: M >= 1 tensors [B, C] or [B, 1, C], bfloat16, float16 or float32, B <= 64.
        weights: W_m of the dtype of x, contiguous: [N_m, C] as a linear layer keeps it, or [C, N_m].
        functions: f, M names out of `FUNCTIONS`.
        by_output: M times whether W_m is [N_m, C].
        residual: [B, N] or [B, 1, N], added to each, so that every N_m must be N; None adds nothing.
        gate: likewise, multiplied with each.

    Returns:
        M tensors [B, N_m] or [B, 1, N_m] of the dtype of x.

    Raises:
        ValueError: shapes or dtypes do not fit, a function is unknown, or B > 64.
        RuntimeError: an input requires a gradient.
    """
    _check(x, weights, functions, by_output, residual, gate)
    if needs_gradient(*x, *weights, residual, gate):
        raise RuntimeError("products has no gradient: call it under torch.no_grad().")
    names = [FUNCTIONS.index(name) for name in functions]
    x, weights = [t.contiguous() for t in x], [t.contiguous() for t in weights]
    residual, gate = (None if t is None else t.contiguous() for t in (residual, gate))
    return tuple(call(_products, x, weights, names, list(by_output), residual, gate))


def _check(
    x: Sequence[Tensor],
    weights: Sequence[Tensor],
    functions: Sequence[str],
    by_output: Sequence[bool],
    residual: Tensor | None,
    gate: Tensor | None,
) -> None:
    lengths = len(x), len(weights), len(functions), len(by_output)
    if not x or len(set(lengths)) != 1:
        raise ValueError(f"x, weights, functions and by_output must be of one length >= 1, got {lengths}.")
    if unknown := set(functions) - set(FUNCTIONS):
        raise ValueError(f"functions must be of {', '.join(FUNCTIONS)}, got {', '.join(sorted(unknown))}.")
    *batch, C = x[0].shape
    if len(batch) not in (1, 2) or batch[1:] not in ([], [1]):
        raise ValueError(f"x must be [B, C] or [B, 1, C], got {list(x[0].shape)}.")
    if batch[0] > MAX_ROWS:
        raise ValueError(f"products takes at most {MAX_ROWS} rows, got {batch[0]}.")
    dtypes = {t.dtype for t in (*x, *weights)}
    if len(dtypes) != 1 or x[0].dtype not in DTYPES:
        raise ValueError(f"x and weights must be of one dtype out of {DTYPES}, got {dtypes}.")
    for x_m, w, rows in zip(x, weights, by_output):
        if list(x_m.shape) != [*batch, C] or w.dim() != 2 or w.shape[1 if rows else 0] != C:
            raise ValueError(f"C = {C} inputs of x {list(x_m.shape)} do not fit a weight {list(w.shape)}.")
    if residual is None and gate is None:
        return
    B, widths = batch[0], [w.shape[0 if rows else 1] for w, rows in zip(weights, by_output)]
    for name, added in (("residual", residual), ("gate", gate)):
        for N in widths if added is not None else ():
            if list(added.shape) not in ([B, N], [B, 1, N]):
                raise ValueError(f"{name} must be [B, N] = {[B, N]} or [B, 1, N], got {list(added.shape)}.")


@triton.jit
def applied(b_x, function: tl.constexpr):
    """Return f(b_x), where f is the one of FUNCTIONS at index `function`."""
    if function == 1:
        return 2 * tl.sigmoid(2 * b_x) - 1
    elif function == 2:
        return tl.sigmoid(b_x)
    elif function == 3:
        b_x = tl.maximum(b_x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return b_x * b_x
    else:
        return b_x


@triton.jit
def _product(
    x, w, y, residual, gate, i_n, B, C: tl.constexpr, N: tl.constexpr, FUNCTION: tl.constexpr, ROWS: tl.constexpr,
    BB: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store outputs i_n BN, ... of one product. A weight's rows are the rows of tl.dot, for there are more of them."""
    o_n, o_b = i_n * BN + tl.arange(0, BN), tl.arange(0, BB)
    b_y = tl.zeros([BN, BB], tl.float32)
    for i_c in range(0, C, BC):
        o_c = i_c + tl.arange(0, BC)
        p_w = w + (o_n[:, None] * C + o_c[None, :] if ROWS else o_c[None, :] * N + o_n[:, None])
        b_w = tl.load(p_w, mask=(o_n[:, None] < N) & (o_c[None, :] < C), other=0)
        b_x = tl.load(
            x + o_b[None, :] * C + o_c[:, None], mask=(o_b[None, :] < B) & (o_c[:, None] < C), other=0
        )
        b_y = tl.dot(b_w, b_x, b_y, input_precision=PRECISION)
    b_y = applied(b_y, FUNCTION)
    o_y, m_y = o_b[None, :] * N + o_n[:, None], (o_b[None, :] < B) & (o_n[:, None] < N)
    if gate is not None:
        b_y *= tl.load(gate + o_y, mask=m_y, other=0).to(tl.float32)
    if residual is not None:
        b_y += tl.load(residual + o_y, mask=m_y, other=0).to(tl.float32)
    tl.store(y + o_y, b_y.to(y.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["B"])
def products_fwd_kernel(
    x,  # M pointers
    w,  # M pointers
    y,  # M pointers
    residual,
    gate,
    B,
    M: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,  # M numbers of outputs
    FUNCTION: tl.constexpr,  # M indices of FUNCTIONS
    ROWS: tl.constexpr,  # M times whether w is [N, C]
    BB: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_n = tl.program_id(0)
    for m in tl.static_range(M):
        if (i_n >= 0) & (i_n < tl.cdiv(N[m], BN)):
            _product(
                x[m], w[m], y[m], residual, gate, i_n, B, C, N[m], FUNCTION[m], ROWS[m], BB, BN, BC, PRECISION
            )  # fmt: skip
        i_n -= tl.cdiv(N[m], BN)


@torch.library.custom_op(f"{NAMESPACE}::products", mutates_args=())
def _products(
    x: list[Tensor],
    weights: list[Tensor],
    functions: list[int],
    by_output: list[bool],
    residual: Tensor | None,
    gate: Tensor | None,
) -> list[Tensor]:
    y = _outputs(x, weights, by_output)
    C, N = x[0].shape[-1], tuple(t.shape[-1] for t in y)
    tiles = product_tiles(x[0], max(N))
    with on_device_of(y[0]):
        products_fwd_kernel[(sum(triton.cdiv(n, tiles["BN"]) for n in N),)](
            tuple(x), tuple(weights), tuple(y), residual, gate, x[0].numel() // C, M=len(x), C=C,
            N=N, FUNCTION=tuple(functions), ROWS=tuple(by_output), PRECISION=product_precision(x[0]), **tiles,
        )  # fmt: skip
    return y


def _outputs(x, weights, by_output) -> list[Tensor]:
    """Return the M results, not written yet."""
    return [
        x[0].new_empty(*x[0].shape[:-1], w.shape[0 if rows else 1]) for w, rows in zip(weights, by_output)
    ]


@_products.register_fake
def _(x, weights, functions, by_output, residual, gate):
    return _outputs(x, weights, by_output)
