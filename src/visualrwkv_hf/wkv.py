"""The WKV recurrences of RWKV-5, 6 and 7, in plain torch unless a faster kernel serves.

Letters: B batch, T time, H heads, K / V key / value size of a head, C tokens of a chunk, n chunks, N = n * B * H.
The state S is [B, H, K, V]: key rows, value columns. (The original CUDA kernel of RWKV-7 keeps the transpose.) The
state and all arithmetic are float32 whatever the dtype of the inputs, inside autocast too; float64 inputs are computed
in float64. r is not scaled.

Both ops read their tokens in any order, skip padding and take several packed sequences:

order: position p of the recurrence is token order[b, p]; an entry ~token (negative) is padding: the state passes it
    unchanged, and its y and its gradients are 0. int64 [B, T].
cu_seqlens: where packed sequences begin and end along T, [0, ..., T] int [S + 1]; B is 1, each sequence has a state
    of its own, and order stays within each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.functional import pad

from .dispatch import kernel
from .scan_orders import inverse_order

CHUNK_SIZE = 32
MAX_STEPS = 16
"""Longest sequence that is computed token by token, which is faster than filling a chunk."""


def wkv6(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    initial_state: Tensor | None = None,
    *,
    order: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence of RWKV-6 (arXiv 2404.05892, section 4.2), and of RWKV-5, whose w does not depend on t.

        y_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T)
        S_t = diag(exp(w_t)) S_{t-1} + k_t v_t^T

    A token with k_t = 0 and w_t = 0 leaves the state as it was.

    Args:
        r: receptance, [B, T, H, K], T >= 1.
        w: log decay, <= 0 and as low as -inf; [B, T, H, K] or anything that broadcasts to it.
        k: key, [B, T, H, K].
        v: value, [B, T, H, V].
        u: bonus of the current token, [H, K].
        initial_state: S_0, [B, H, K, V] in float32 (float64 with float64 inputs), [S, H, K, V] with
            cu_seqlens; None is zeros.
        order: see the module's docstring; None is the order of positions.
        cu_seqlens: likewise; None is one sequence per row.
        chunk_size: tokens that plain torch computes at once, a power of two; changes speed and rounding only.

    Returns:
        y [B, T, H, V] in the dtype of r, and the state after the last token, shaped and typed like the initial one.

    Raises:
        ValueError: shapes that do not fit, T = 0, a state of another dtype, a chunk size that is not a power of two;
            on the CPU also an order that names a token outside the sequence.
        RuntimeError: `kernel_backend("triton")` is in force and there is no such kernel.
    """
    w = _check(r, w, k, v, initial_state, order, cu_seqlens, chunk_size)
    if u.shape != r.shape[2:]:
        raise ValueError(f"u must be [H, K] = {list(r.shape[2:])}, got {list(u.shape)}.")
    gradient = _needs_gradient(r, w, k, v, u, initial_state)
    if triton_wkv6 := kernel("wkv6", r, v, gradient=gradient):
        return triton_wkv6(r, w, k, v, u, initial_state, order, cu_seqlens)

    def compute(r: Tensor, w: Tensor, k: Tensor, v: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
        if _is_open(r) or r.shape[1] <= MAX_STEPS:
            return _wkv6_steps(r, w, k, v, u.to(S.dtype), S)
        return _wkv6_chunks(r, w, k, v, u.to(S.dtype), S, chunk_size)

    return _computed(compute, (r, w, k, v), initial_state, order, cu_seqlens)


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    *,
    order: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    min_log_decay: float = -math.inf,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """Compute the generalised delta rule of RWKV-7 (arXiv 2503.14456, section 4).

        S_t = diag(exp(w_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T
        y_t = r_t^T S_t

    In the model a = -kk, the key to remove, and b = kk * (in-context learning rate). A token with
    w_t = k_t = a_t = b_t = 0 leaves the state as it was.

    Args:
        r: receptance, [B, T, H, K], T >= 1.
        w: log decay, <= 0; [B, T, H, K] or anything that broadcasts to it.
        k: key, [B, T, H, K].
        v: value, [B, T, H, V].
        a: the row with which the state is read before it decays, [B, T, H, K].
        b: the column to which the result is written, [B, T, H, K].
        initial_state: S_0, [B, H, K, V] in float32 (float64 with float64 inputs), [S, H, K, V] with
            cu_seqlens; None is zeros.
        order: see the module's docstring; None is the order of positions.
        cu_seqlens: likewise; None is one sequence per row.
        min_log_decay: a lower bound of w, if known: kernels are faster with it. RWKV-7's is -e^(-1/2).
        chunk_size: tokens that plain torch computes at once, a power of two; changes speed and rounding only.

    Returns:
        y [B, T, H, V] in the dtype of r, and the state after the last token, shaped and typed like the initial one.

    Raises:
        ValueError: shapes that do not fit, T = 0, a state of another dtype, a chunk size that is not a power of two;
            on the CPU also an order that names a token outside the sequence.
        RuntimeError: `kernel_backend("triton")` is in force and there is no such kernel.
    """
    w = _check(r, w, k, v, initial_state, order, cu_seqlens, chunk_size)
    for name, x in (("a", a), ("b", b)):
        if x.shape != r.shape:
            raise ValueError(f"{name} must be [B, T, H, K] = {list(r.shape)} as r is, got {list(x.shape)}.")
    gradient = _needs_gradient(r, w, k, v, a, b, initial_state)
    if triton_wkv7 := kernel("wkv7", r, v, gradient=gradient):
        return triton_wkv7(r, w, k, v, a, b, initial_state, order, cu_seqlens, min_log_decay)

    def compute(
        r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, S: Tensor
    ) -> tuple[Tensor, Tensor]:
        if _is_open(r) or r.shape[1] <= MAX_STEPS:
            return _wkv7_steps(r, w, k, v, a, b, S)
        return _wkv7_chunks(r, w, k, v, a, b, S, chunk_size)

    return _computed(compute, (r, w, k, v, a, b), initial_state, order, cu_seqlens)


def _check(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    order: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> Tensor:
    """Raise for arguments that do not fit; return w as [B, T, H, K]."""
    if r.dim() != 4 or r.shape[1] == 0:
        raise ValueError(f"r must be [B, T, H, K] with T >= 1, got {list(r.shape)}.")
    if not r.is_floating_point():
        raise ValueError(f"r must be floating point, got {r.dtype}.")
    if k.shape != r.shape:
        raise ValueError(f"k must be [B, T, H, K] = {list(r.shape)} as r is, got {list(k.shape)}.")
    if v.dim() != 4 or v.shape[:3] != r.shape[:3]:
        raise ValueError(f"v must be [B, T, H, V] with [B, T, H] = {list(r.shape[:3])}, got {list(v.shape)}.")
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be a power of two, got {chunk_size}.")
    if order is not None and (order.shape != r.shape[:2] or order.dtype != torch.int64):
        raise ValueError(
            f"order must be [B, T] = {list(r.shape[:2])} in torch.int64, got {list(order.shape)} in {order.dtype}."
        )
    if order is not None:
        refuse_tokens_out_of_range("order", order, -r.shape[1], r.shape[1])
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or r.shape[0] != 1):
        raise ValueError(
            f"cu_seqlens must be [S + 1] and B 1, got {list(cu_seqlens.shape)} and B = {r.shape[0]}."
        )
    if initial_state is not None:
        sequences = r.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        shape, dtype = [sequences, r.shape[2], r.shape[3], v.shape[3]], _compute_dtype(r)
        if list(initial_state.shape) != shape or initial_state.dtype != dtype:
            raise ValueError(
                f"initial_state must be [B, H, K, V] = {shape} in {dtype} (inputs are {r.dtype}), "
                f"got {list(initial_state.shape)} in {initial_state.dtype}."
            )
    if w.dim() > 4 or any(i not in (1, j) for i, j in zip(reversed(w.shape), reversed(r.shape))):
        raise ValueError(f"w must broadcast to [B, T, H, K] = {list(r.shape)} of r, got {list(w.shape)}.")
    return w if w.shape == r.shape else w.expand(r.shape)


def refuse_tokens_out_of_range(name: str, order: Tensor, low: int, high: int) -> None:
    """Raise `ValueError` if an entry of `order` is not in low, ..., high - 1.

    Only the CPU looks: on a GPU that would wait for all work before, and its own bounds checks stop the program.
    """
    if order.device.type != "cpu" or torch.compiler.is_compiling() or not order.numel():
        return
    least, most = (int(x) for x in torch.aminmax(order))
    if least < low or most >= high:
        raise ValueError(f"{name} must hold tokens from {low} to {high - 1}, got {least} to {most}.")


def _needs_gradient(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def _compute_dtype(r: Tensor) -> torch.dtype:
    return torch.float64 if r.dtype == torch.float64 else torch.float32


def _computed(
    compute: Callable[..., tuple[Tensor, Tensor]],
    inputs: tuple[Tensor, ...],
    initial_state: Tensor | None,
    order: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run `compute(*inputs, state)` on the tokens in `order`, sequence by sequence."""
    r, _, _, v = inputs[:4]
    B, _, H, K = r.shape
    dtype = _compute_dtype(r)
    with _no_autocast(r.device):
        if initial_state is None:
            sequences = B if cu_seqlens is None else len(cu_seqlens) - 1
            initial_state = torch.zeros(sequences, H, K, v.shape[-1], dtype=dtype, device=r.device)
        inputs = tuple(x.to(dtype) for x in inputs)
        if order is not None:
            inputs = _in_order(inputs, order)
        if cu_seqlens is None:
            out, state = compute(*inputs, initial_state)
        else:
            out, state = _each_sequence(compute, inputs, initial_state, cu_seqlens)
        if order is not None:
            out = _back_in_place(out, order)
        return out.to(r.dtype), state


def _each_sequence(
    compute: Callable[..., tuple[Tensor, Tensor]],
    inputs: tuple[Tensor, ...],
    initial_state: Tensor,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    lengths = cu_seqlens.diff().tolist()
    outs, states = [], []
    for state, *tokens in zip(initial_state.split(1), *(x.split(lengths, 1) for x in inputs)):
        out, state = compute(*tokens, state) if tokens[0].shape[1] else (tokens[3], state)
        outs.append(out)
        states.append(state)
    return torch.cat(outs, 1), torch.cat(states)


def _in_order(inputs: tuple[Tensor, ...], order: Tensor) -> tuple[Tensor, ...]:
    """Return the inputs in the order of reading. At padding all but r and v are 0: nothing is written or decays."""
    padding = (order < 0)[..., None, None]
    r, w, k, v, *ab = take(tokens_of(order), *inputs)
    w, k, *ab = (x.masked_fill(padding, 0) for x in (w, k, *ab))
    return r, w, k, v, *ab


def _back_in_place(out: Tensor, order: Tensor) -> Tensor:
    """Return `out` [B, T, H, V], given by position in the order, by token; 0 at padding."""
    out = out.masked_fill((order < 0)[..., None, None], 0)
    return take(inverse_order(tokens_of(order)), out)[0]


def tokens_of(order: Tensor) -> Tensor:
    """Return the token at each position of an order, padding included."""
    return torch.where(order < 0, ~order, order)


def take(index: Tensor, *sequences: Tensor) -> tuple[Tensor, ...]:
    """Gather from each of `sequences` [B, L, ...] at `index` [B, N] -> [B, N, ...]."""
    B, L = sequences[0].shape[:2]
    rows = (index + L * torch.arange(B, device=index.device)[:, None]).flatten()
    return tuple(x.flatten(0, 1).index_select(0, rows).unflatten(0, index.shape) for x in sequences)


def _no_autocast(device: torch.device) -> AbstractContextManager:
    # Autocast would round the operands of the matrix products below to 8 bits.
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()  # such as the meta device


# --- token by token -----------------------------------------------------------------------------------


def _wkv6_steps(r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    out, S = _stepped(_wkv6_step, S, (r, w.exp(), k, v))
    return out + (r * u * k).sum(-1, keepdim=True) * v, S


def _wkv6_step(S: Tensor, token: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return S_t, and y_t without its bonus, from S_{t-1} [B, H, K, V] and r, decay, k, v [B, H, X] of a token."""
    r, decay, k, v = token
    return torch.addcmul(k[..., None] * v[:, :, None], decay[..., None], S), (r[:, :, None] @ S).squeeze(-2)


def _wkv7_steps(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, S: Tensor
) -> tuple[Tensor, Tensor]:
    return _stepped(_wkv7_step, S, (r, w.exp(), torch.stack([b, k], -1), v, a))


def _wkv7_step(S: Tensor, token: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return S_t and y_t from S_{t-1} [B, H, K, V] and r, decay, (b, k) [B, H, K, 2], v, a of a token."""
    r, decay, bk, v, a = token
    sa_v = torch.cat([a[:, :, None] @ S, v[:, :, None]], -2)  # [B, H, 2, V]
    S = torch.addcmul(bk @ sa_v, decay[..., None], S)
    return S, (r[:, :, None] @ S).squeeze(-2)


def _stepped(
    step: Callable[..., tuple[Tensor, Tensor]], S: Tensor, tokens: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Run `step(S, token) -> S, y` over the T of `tokens` [B, T, H, ...]; return all y [B, T, H, V] and the last S."""
    if _is_open(tokens[0]):
        from torch._higher_order_ops.scan import scan  # still private, so imported only here

        S, ys = scan(step, S, tuple(x.transpose(0, 1) for x in tokens))
        return ys.transpose(0, 1), S
    out = []
    for token in zip(*(x.unbind(1) for x in tokens)):
        S, y = step(S, token)
        out.append(y)
    return torch.stack(out, 1), S


def _is_open(r: Tensor) -> bool:
    """Return whether torch.export leaves the number of tokens open, so that no Python loop may run over them."""
    return isinstance(r.shape[1], torch.SymInt)


# --- chunk by chunk -----------------------------------------------------------------------------------
# Within a chunk that begins with the state S, with D(s, t] = prod_{s < j <= t} diag(exp(w_j)), unrolling
# the recurrence of RWKV-6 gives
#     y_t = r_t^T D(0, t-1] S + sum_{s<t} (r_t^T D(s, t-1] k_s) v_s + (r_t^T diag(u) k_t) v_t
#     S'  = D(0, C] S + sum_s D(s, C] k_s v_s^T
# so a chunk is a few matrix products once the decayed rows, columns and their products are known.


def _decayed_products(rows: Tensor, cols: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute A[t, s] = rows_t^T D(s, t-1] cols_s for s < t and 0 elsewhere, doubling the size of a block each time.

    Two neighbouring blocks meet where the first ends: the columns of the first are decayed to its end, the rows of the
    second from its start. Every exponent is a sum of log decays, so <= 0, and nothing is divided or subtracted: neither
    the decays nor their gradients can overflow or cancel, even for decays of 0 or 1.

    Args:
        rows: [N, C, R, K], R vectors per token.
        cols: [N, C, R, K], likewise.
        w: log decay, [N, C, K].

    Returns:
        A [N, C * R, C * R]; D(0, t-1] rows_t [N, C, R, K]; D(t, C] cols_t [N, C, R, K]; D(0, C] [N, K].
    """
    N, C, R, K = rows.shape
    w = w.flatten(0, 1)  # log decay over a block, [blocks, K]
    A = rows.new_zeros(()).expand(N * C, R, R)  # [blocks, m, m]
    for level in range(C.bit_length() - 1):
        m = R << level
        (A11, A22), (_, rows2), (cols1, _) = (
            _halves(x) for x in (A, rows.view(-1, m, K), cols.view(-1, m, K))
        )
        A = _lower(A11, rows2 @ cols1.mT, A22)
        w1, w2 = _halves(w)
        one, decay1, decay2 = torch.ones_like(w1), w1.exp(), w2.exp()
        rows = rows.view(-1, 2, m, K) * torch.stack([one, decay1], 1)[:, :, None]
        cols = cols.view(-1, 2, m, K) * torch.stack([decay2, one], 1)[:, :, None]
        w = w1 + w2
    return A, rows.view(N, C, R, K), cols.view(N, C, R, K), w.exp()


def _inverse(A: Tensor) -> Tensor:
    """Compute (1 - A)^-1 of strictly lower triangular A [N, C, C], doubling the size of a block each time.

    [[1 - A11, 0], [-A21, 1 - A22]]^-1 = [[T1, 0], [T2 A21 T1, T2]] is substitution by blocks. (The power series is
    useless here: with equal keys the powers of A grow like binomials and cancel.)
    """
    N, C, _ = A.shape
    T = A.new_ones(()).expand(N * C, 1, 1)
    for level in range(C.bit_length() - 1):
        m = 1 << level
        T1, T2 = _halves(T)
        A21 = A.view(N, C // (2 * m), 2 * m, C // (2 * m), 2 * m).diagonal(dim1=1, dim2=3)[:, m:, :m]
        A21 = A21.permute(0, 3, 1, 2).reshape(-1, m, m)
        T = _lower(T1, T2 @ A21 @ T1, T2)
    return T


def _lower(upper_left: Tensor, lower_left: Tensor, lower_right: Tensor) -> Tensor:
    """Join four blocks [i, m, m], of which the upper right is 0, to [i, 2 m, 2 m]."""
    upper = pad(upper_left, (0, upper_left.shape[-1]))
    return torch.cat([upper, torch.cat([lower_left, lower_right], -1)], -2)


def _halves(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the even and the odd blocks of [2 i, ...], [i, ...] each."""
    return blocks[0::2], blocks[1::2]


def _chunks(x: Tensor, C: int) -> Tensor:
    """[B, T, H, X] -> [N, C, X], chunks outermost. Zeros fill the last chunk and leave the state unchanged."""
    B, T, H, X = x.shape
    n = len(range(0, T, C))  # a plain number, where a division would stay symbolic under torch.compile
    x = pad(x, (0, 0, 0, 0, 0, n * C - T))
    return x.view(B, n, C, H, X).permute(1, 0, 3, 2, 4).reshape(-1, C, X).contiguous()


def _unchunk(x: Tensor, B: int, T: int, H: int) -> Tensor:
    """[N, C, X] -> [B, T, H, X], the inverse of `_chunks`."""
    _, C, X = x.shape
    return x.view(-1, B, H, C, X).permute(1, 0, 3, 2, 4).reshape(B, -1, H, X)[:, :T]


def _wkv6_chunks(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, S: Tensor, C: int
) -> tuple[Tensor, Tensor]:
    B, T, H, _ = r.shape
    bonus = _chunks((r * u * k).sum(-1, keepdim=True), C)  # [N, C, 1]
    r, k, v, w = (_chunks(x, C) for x in (r, k, v, w))

    A, r_in, k_out, total = _decayed_products(r[:, :, None], k[:, :, None], w)
    r_in, k_out = r_in.squeeze(2), k_out.squeeze(2)  # [N, C, K]
    out = torch.baddbmm(bonus * v, A, v)  # [N, C, V], from the chunk's own tokens

    per_chunk = (x.unflatten(0, (-1, B * H)).unbind() for x in (total[..., None], k_out.mT @ v))
    S = S.flatten(0, 1)
    states = []
    for total_c, written_c in zip(*per_chunk):
        states.append(S)
        S = torch.addcmul(written_c, total_c, S)
    out = torch.baddbmm(out, r_in, torch.cat(states))
    return _unchunk(out, B, T, H), S.unflatten(0, (B, H))


def _wkv7_chunks(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, S: Tensor, C: int
) -> tuple[Tensor, Tensor]:
    B, T, H, _ = r.shape
    # y_t reads S_t, not S_{t-1}: the row r_t exp(w_t) reads S_{t-1}, and what token t writes is added.
    r_k, r_b = (_chunks((r * x).sum(-1, keepdim=True), C) for x in (k, b))  # [N, C, 1]
    rows = torch.stack([_chunks(r * w.exp(), C), _chunks(a, C)], 2)  # [N, C, 2, K]
    cols = torch.stack([_chunks(k, C), _chunks(b, C)], 2)
    v, w = _chunks(v, C), _chunks(w, C)

    A, rows_in, cols_out, total = _decayed_products(rows, cols, w)
    A_r, A_a = A.view(-1, C, 2, 2 * C).unbind(2)  # [N, C, 2 C], the two columns of a token are neighbours
    A_ak, A_ab = A_a.view(-1, C, C, 2).unbind(-1)
    r_in, a_in = rows_in.unbind(2)  # [N, C, K]
    k_out, b_out = cols_out.unbind(2)

    # sa_t = a_t^T S_{t-1} for all t of a chunk: (1 - A_ab) sa = a_in S + A_ak v, hence sa = W S + sa_0.
    T_ab = _inverse(A_ab)
    W, sa_0 = T_ab @ a_in, T_ab @ (A_ak @ v)
    per_chunk = (
        x.unflatten(0, (-1, B * H)).unbind() for x in (W, sa_0, total[..., None], k_out.mT @ v, b_out.mT)
    )
    S = S.flatten(0, 1)
    states, read = [], []
    for W_c, sa_0c, total_c, written_c, b_out_c in zip(*per_chunk):
        states.append(S)
        read.append(torch.baddbmm(sa_0c, W_c, S))  # [B * H, C, V]
        S = torch.baddbmm(torch.addcmul(written_c, total_c, S), b_out_c, read[-1])

    sa = torch.cat(read)  # [N, C, V]
    out = torch.baddbmm(r_k * v + r_b * sa, A_r, torch.stack([v, sa], 2).view(-1, 2 * C, v.shape[-1]))
    out = torch.baddbmm(out, r_in, torch.cat(states))
    return _unchunk(out, B, T, H), S.unflatten(0, (B, H))
