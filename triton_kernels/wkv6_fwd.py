"""The forward kernels of `wkv6`: prepare all chunks at once, then scan from chunk to chunk.

A chunk that begins with the state S [K, K], with D(s, t) and letters as in `.chunks`, has
    A[s, t] = r_t^T D(s, t) k_s for s < t,  A[t, t] = r_t^T diag(u) k_t
    q [K, BT]: r decayed since the chunk began;  kout [K, BT]: k decayed until it ends;  G = sum w [K]
    y  = o0 + S^T q,  o0 = v A [K, BT]
    S' = exp(G) S + N,  N = kout v^T [K, K]
q, o0, N and G do not depend on S, so all chunks prepare them at once; only the last two lines are serial.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import (
    chunk_decays,
    chunk_rows,
    chunk_table,
    count,
    exp,
    finite_log_decay,
    level_decays,
    load_columns,
    operand,
    rows_of_chunk,
    sequence_of_chunk,
    span_of_sequence,
    store_columns,
)
from .launches import (
    MAX_STEPS,
    NAMESPACE,
    WKV6,
    WKV6_STEPS,
    Config,
    has_matrix_units,
    on_device_of,
    precision_of,
    serial,
)

# --- kernels ------------------------------------------------------------------------------------------


@triton.jit
def load_log_decays(w, rows, m_read, i_b, i_h, T, stride_b, stride_t, K: tl.constexpr):
    """Load w [B, T, H, K], which may be one row expanded: [K, BT] float32, 0 (no decay) where masked."""
    offset = i_b * stride_b + (rows - i_b * T) * stride_t + i_h * K
    b_w = tl.load(w + offset[:, None] + tl.arange(0, K)[None, :], mask=m_read[:, None], other=0.0)
    return finite_log_decay(tl.trans(b_w.to(tl.float32)))


@triton.jit(do_not_specialize=["T", "sequences"])
def wkv6_fwd_prepare_kernel(
    r, w, k, v, u, order, cu_seqlens, chunk_starts, sequence_of, q, o0, N, G, A, stride_w_b, stride_w_t, T, sequences,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store q, o0, N, G (and A, if it is not None) of one chunk and head, BV values at a time."""
    DOT: tl.constexpr = q.dtype.element_ty
    i_ch = tl.program_id(0).to(tl.int64)  # chunks outside, heads inside
    i_c, i_h = i_ch // H, i_ch % H
    i_s = sequence_of_chunk(i_c, T, sequence_of, BT)
    if i_s >= sequences:  # there are fewer chunks than there could be
        return
    rows, m_read, _, tokens = rows_of_chunk(i_c, i_s, T, order, cu_seqlens, chunk_starts, BT)
    i_b = tokens // T
    o_t, o_k = tl.arange(0, BT), tl.arange(0, K)
    row, col = o_t[:, None], o_t[None, :]

    b_r = load_columns(r, rows, m_read, i_h, H, K, o_k)
    b_k = load_columns(k, rows, m_read, i_h, H, K, o_k)
    b_w = load_log_decays(w, rows, m_read, i_b, i_h, T, stride_w_b, stride_w_t, K)
    b_u = tl.load(u + i_h * K + o_k).to(tl.float32)
    b_since_start, b_until_end = chunk_decays(b_w, BT, DOT, PRECISION)
    p_q = (i_ch * BT + o_t)[None, :] * K + o_k[:, None]
    tl.store(q + p_q, operand(b_r * b_since_start, DOT, PRECISION))
    tl.store(G + i_ch * K + o_k, tl.sum(b_w, 1))

    b_bonus = tl.sum(b_r * b_u[:, None] * b_k, 0)  # [BT]
    b_A = tl.zeros([BT, BT], tl.float32)
    for level in range(0, LEVELS):
        b_decay, m_second, _m_between, m_meet = level_decays(b_w, level, BT, DOT, PRECISION)
        b_x = operand(tl.where(m_second, b_r, b_k) * b_decay, DOT, PRECISION)
        b_A += tl.where(m_meet, tl.dot(tl.trans(b_x), b_x, input_precision=PRECISION), 0.0)  # symmetric
    b_A = operand(tl.where(row < col, b_A, 0.0), DOT, PRECISION)
    if A is not None:
        b_diagonal = operand(tl.where(row == col, b_bonus[None, :], 0.0), DOT, PRECISION)
        tl.store(A + (i_ch * BT + row) * BT + col, b_A + b_diagonal)
    b_kout = operand(b_k * b_until_end, DOT, PRECISION)
    for i_v in range(0, K, BV):
        o_v = i_v + tl.arange(0, BV)
        b_v = load_columns(v, rows, m_read, i_h, H, K, o_v)  # [BV, BT]
        b_o = tl.dot(operand(b_v, DOT, PRECISION), b_A, input_precision=PRECISION) + b_v * b_bonus[None, :]
        tl.store(o0 + (i_ch * BT + o_t)[None, :] * K + o_v[:, None], b_o.to(DOT))
        b_N = tl.dot(b_kout, tl.trans(operand(b_v, DOT, PRECISION)), input_precision=PRECISION)
        tl.store(N + (i_ch * K + o_k)[:, None] * K + o_v[None, :], b_N.to(DOT))


@triton.jit(do_not_specialize=["T"])
def wkv6_fwd_scan_kernel(
    q, o0, N, G, initial_state, order, cu_seqlens, chunk_starts, y, states, final_state, T, H: tl.constexpr,
    K: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Store y and the final state of one sequence and head in BV columns, chunk after chunk.

    With `states` the state at the start of every chunk is kept there.
    """
    DOT: tl.constexpr = q.dtype.element_ty
    i_p = tl.program_id(0).to(tl.int64)
    i_v, i_h, i_s = i_p % (K // BV), i_p // (K // BV) % H, i_p // (K // BV) // H
    first, start, tokens, length = span_of_sequence(i_s, T, cu_seqlens, chunk_starts, BT)
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, K), i_v * BV + tl.arange(0, BV)

    p_state = ((i_s * H + i_h) * K + o_k)[:, None] * K + o_v[None, :]
    b_S = tl.zeros([K, BV], tl.float32) if initial_state is None else tl.load(initial_state + p_state)
    for i in tl.range(0, tl.cdiv(length, BT), num_stages=STAGES):
        i_ch = (first + i) * H + i_h
        rows, m_read, m_row = chunk_rows(order, tokens, start, i * BT, length, BT)
        b_q = tl.load(q + (i_ch * BT + o_t)[:, None] * K + o_k[None, :])
        b_o = tl.load(o0 + (i_ch * BT + o_t)[:, None] * K + o_v[None, :]).to(tl.float32)
        p_S = (i_ch * K + o_k)[:, None] * K + o_v[None, :]
        b_N = tl.load(N + p_S)
        b_G = tl.load(G + i_ch * K + o_k)
        b_start = operand(b_S, DOT, PRECISION)
        b_o += tl.dot(b_q, b_start, input_precision=PRECISION)
        store_columns(y, tl.trans(b_o), rows, m_read, m_row, order, i_h, H, K, o_v)
        if states is not None:
            tl.store(states + p_S, b_start)
        b_S = exp(b_G)[:, None] * b_S + b_N
    tl.store(final_state + p_state, b_S)


@triton.jit(do_not_specialize=["T"])
def wkv6_fwd_steps_kernel(
    r, w, k, v, u, initial_state, order, cu_seqlens, y, final_state, stride_w_b, stride_w_t, T, H: tl.constexpr,
    K: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Store y and the final state of one sequence and head in BV columns, token by token, without tl.dot."""
    i_p = tl.program_id(0).to(tl.int64)
    i_v, i_h, i_s = i_p % (K // BV), i_p // (K // BV) % H, i_p // (K // BV) // H
    # There are no chunks, so any tensor will do as the table of where they start.
    _, start, tokens, length = span_of_sequence(i_s, T, cu_seqlens, cu_seqlens, 1)
    i_b = tokens // T
    o_k, o_v = tl.arange(0, K), i_v * BV + tl.arange(0, BV)

    b_u = tl.load(u + i_h * K + o_k).to(tl.float32)
    p_state = ((i_s * H + i_h) * K + o_k)[:, None] * K + o_v[None, :]
    b_S = tl.zeros([K, BV], tl.float32) if initial_state is None else tl.load(initial_state + p_state)
    for i in range(0, length):
        rows, m_read, m_row = chunk_rows(order, tokens, start, i, length, 1)
        b_r = tl.sum(load_columns(r, rows, m_read, i_h, H, K, o_k), 1)  # [K]: the sum over one token
        b_k = tl.sum(load_columns(k, rows, m_read, i_h, H, K, o_k), 1)
        b_w = tl.sum(load_log_decays(w, rows, m_read, i_b, i_h, T, stride_w_b, stride_w_t, K), 1)
        b_v = tl.sum(load_columns(v, rows, m_read, i_h, H, K, o_v), 1)  # [BV]
        b_kv = b_k[:, None] * b_v[None, :]
        b_y = tl.sum(b_r[:, None] * (b_S + b_u[:, None] * b_kv), 0)
        store_columns(y, b_y[:, None], rows, m_read, m_row, order, i_h, H, K, o_v)
        b_S = exp(b_w)[:, None] * b_S + b_kv
    tl.store(final_state + p_state, b_S)


# --- launches -----------------------------------------------------------------------------------------


def config_of(r: Tensor) -> tuple[Config, int]:
    """Return the launches, and LEVELS of `level_decays`."""
    config = WKV6[int(r.shape[3]), r.dtype]  # under torch.compile the shape may be a symbol
    if torch.version.hip is not None:
        # AMD's warps are twice as wide, and have all registers where no more than four share a compute unit.
        config = config._replace(
            **{
                name: getattr(config, name)._replace(num_warps=min(4, getattr(config, name).num_warps))
                for name in ("prepare", "few", "many", "gradients")
            }
        )
    return config, config.BT.bit_length() - 1


def with_heads_together(w: Tensor) -> Tensor:
    """Return w unchanged, even if it is one row for all tokens, if its heads lie side by side; else a copy."""
    _, _, H, K = w.shape
    return w if w.stride(3) == 1 and (H == 1 or w.stride(2) == K) else w.contiguous()


def _outputs(
    r: Tensor, cu_seqlens: Tensor | None, BT: int, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what `wkv6_forward` returns, not written yet."""
    H, K = r.shape[2:]
    sequences, chunks = count(r, cu_seqlens, BT)
    y, final_state = r.new_empty(r.shape), r.new_empty((sequences, H, K, K), dtype=torch.float32)
    if not save:
        return y, final_state, *(r.new_empty(0) for _ in range(4))  # type: ignore[return-value]
    dtype = precision_of(r).dtype
    return (
        y,
        final_state,
        r.new_empty((chunks, H, BT, K), dtype=dtype),
        r.new_empty((chunks, H, K), dtype=torch.float32),
        r.new_empty((chunks, H, BT, BT), dtype=dtype),
        r.new_empty((chunks, H, K, K), dtype=dtype),
    )


@torch.library.custom_op(f"{NAMESPACE}::wkv6", mutates_args=())
def wkv6_forward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    initial_state: Tensor | None,
    order: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y, the final state and, saved for the backward (else empty), q, G, A and the chunks' first states."""
    outputs = _outputs(r, cu_seqlens, config_of(r)[0].BT, save)
    w, (r, k, v, u) = with_heads_together(w), (x.contiguous() for x in (r, k, v, u))
    initial_state, order, cu_seqlens = (
        x if x is None else x.contiguous() for x in (initial_state, order, cu_seqlens)
    )
    inputs = (r, w, k, v, u, initial_state, order, cu_seqlens)
    with on_device_of(r):
        if not save and (r.shape[1] <= MAX_STEPS or not has_matrix_units(r)):
            _forward_in_steps(*inputs, *outputs[:2])
        else:
            _forward_in_chunks(*inputs, save, *outputs)
    return outputs


def _forward_in_steps(r, w, k, v, u, initial_state, order, cu_seqlens, y, final_state) -> None:
    (_, T, H, K), sequences = r.shape, final_state.shape[0]
    BV, num_warps, _ = WKV6_STEPS[K]
    wkv6_fwd_steps_kernel[(sequences * H * (K // BV),)](
        r, w, k, v, u, initial_state, order, cu_seqlens, y, final_state, w.stride(0), w.stride(1), T,
        H=H, K=K, BV=BV, num_warps=num_warps, **serial(),
    )  # fmt: skip


def _forward_in_chunks(
    r, w, k, v, u, initial_state, order, cu_seqlens, save, y, final_state, q, G, A, states
) -> None:
    (_, T, H, K), PRECISION = r.shape, precision_of(r).dots
    config, LEVELS = config_of(r)
    BT, (sequences, chunks) = config.BT, count(r, cu_seqlens, config.BT)
    chunk_starts, sequence_of = chunk_table(cu_seqlens, T, BT)
    if not save:
        q = r.new_empty((chunks, H, BT, K), dtype=precision_of(r).dtype)
        G = r.new_empty((chunks, H, K), dtype=torch.float32)
    o0, N = torch.empty_like(q), q.new_empty((chunks, H, K, K))

    BV, num_warps, num_stages = config.prepare
    wkv6_fwd_prepare_kernel[(chunks * H,)](
        r, w, k, v, u, order, cu_seqlens, chunk_starts, sequence_of, q, o0, N, G, A if save else None,
        w.stride(0), w.stride(1), T, sequences, H=H, K=K, BT=BT, BV=BV, LEVELS=LEVELS, PRECISION=PRECISION,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    BV, num_warps, num_stages = config.scan(sequences * H)
    wkv6_fwd_scan_kernel[(sequences * H * (K // BV),)](
        q, o0, N, G, initial_state, order, cu_seqlens, chunk_starts, y, states if save else None, final_state, T,
        H=H, K=K, BT=BT, BV=BV, PRECISION=PRECISION, STAGES=num_stages, num_warps=num_warps, **serial(),
    )  # fmt: skip


@wkv6_forward.register_fake
def _(r, w, k, v, u, initial_state, order, cu_seqlens, save):
    return _outputs(r, cu_seqlens, config_of(r)[0].BT, save)
