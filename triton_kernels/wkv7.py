"""The generalised delta rule of RWKV-7 as Triton kernels: forward, backward, and token by token.

Letters as in `visualrwkv_hf.wkv` and `.chunks`. Within a chunk that begins with the state S [K, V], with
r'_t = r_t exp(w_t), which reads S_{t-1} as a_t does, and D(s, t) the decay between them:

    A_xy[t, s] = x_t^T D(s, t) y_s for s < t, x in {r', a}, y in {k, b}; A_rk, A_rb have r_t^T k_t, r_t^T b_t
    on their diagonals; rin, ain: r', a decayed since the chunk began; kout, bout: k, b decayed until it ends
    sa = A_ak v + A_ab sa + ain S                       [BT, V], what a reads, hence with T = (1 - A_ab)^-1
    sa = u0 + W S,  W = T ain [BT, K],  u0 = T A_ak v [BT, V]
    y  = o0 + q S,  q = rin + A_rb W [BT, K],  o0 = A_rk v + A_rb u0 [BT, V]
    S' = exp(G) S + P S + N,  P = bout^T W [K, K],  N = kout^T v + bout^T u0 [K, V],  G = sum w [K]

q, o0, P, N, G do not depend on S: all chunks at once prepare them, and only the last two lines go from chunk to
chunk. exp(G) stays apart from P, which is rounded: near 1 it would lose what the state must keep.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import (
    Launch,
    centred,
    chunk_rows,
    chunk_table,
    halves,
    has_matrix_units,
    inverse_of_one_minus,
    load_log_decay,
    load_rows,
    most_chunks,
    on_device_of,
    precision_of,
    sequence_of_chunk,
    span_of_sequence,
    store_rows,
)

# Of `halves` in the largest chunk, 64 tokens.
LEVELS = tl.constexpr(6)


@triton.jit
def _products(
    r, w, k, a, b, rows, m_read, i_h, keys, H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    DOT: tl.constexpr, SAFE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A_rk, A_rb, A_ak, A_ab [BT, BT] float32, summed over BK keys at a time."""
    o_t = tl.arange(0, BT)
    A_rk = tl.zeros([BT, BT], tl.float32)
    A_rb = tl.zeros([BT, BT], tl.float32)
    A_ak = tl.zeros([BT, BT], tl.float32)
    A_ab = tl.zeros([BT, BT], tl.float32)
    b_rk = tl.zeros([BT], tl.float32)
    b_rb = tl.zeros([BT], tl.float32)
    for i_k in tl.static_range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        b_w = load_log_decay(w, rows, m_read, i_h, H, K, o_k)
        b_r = load_rows(r, rows, m_read, i_h, H, K, o_k)
        b_k = load_rows(k, rows, m_read, i_h, H, K, o_k)
        b_a = load_rows(a, rows, m_read, i_h, H, K, o_k)
        b_b = load_rows(b, rows, m_read, i_h, H, K, o_k)
        b_rk += tl.sum(b_r * b_k, 1)
        b_rb += tl.sum(b_r * b_b, 1)
        b_r *= tl.exp(b_w)
        for level in tl.static_range(0, LEVELS if SAFE else 1):
            if 2**level < BT:
                f_row, f_col, m_pair = _factors(b_w, BT, BK, 2**level, SAFE)
                x_r, x_a = (b_r * f_row).to(DOT), (b_a * f_row).to(DOT)
                y_k, y_b = tl.trans((b_k * f_col).to(DOT)), tl.trans((b_b * f_col).to(DOT))
                A_rk += tl.where(m_pair, tl.dot(x_r, y_k, input_precision=PRECISION), 0.0)
                A_rb += tl.where(m_pair, tl.dot(x_r, y_b, input_precision=PRECISION), 0.0)
                A_ak += tl.where(m_pair, tl.dot(x_a, y_k, input_precision=PRECISION), 0.0)
                A_ab += tl.where(m_pair, tl.dot(x_a, y_b, input_precision=PRECISION), 0.0)
    diagonal = o_t[:, None] == o_t[None, :]
    A_rk += tl.where(diagonal, b_rk[:, None], 0.0)
    A_rb += tl.where(diagonal, b_rb[:, None], 0.0)
    return A_rk.to(DOT), A_rb.to(DOT), A_ak.to(DOT), A_ab


@triton.jit
def _factors(b_w, BT: tl.constexpr, K: tl.constexpr, M: tl.constexpr, SAFE: tl.constexpr):
    """Those of one level, or of the whole chunk where that is safe."""
    if SAFE:
        return halves(b_w, BT, K, M)
    else:
        return centred(b_w, BT, K)


@triton.jit
def _wide_dot(x, y, acc, PRECISION: tl.constexpr):
    """acc + x y, as the transpose of y^T x^T: where x has few rows, warps (and wgmma's 64 rows) share y's columns."""
    return tl.trans(tl.dot(tl.trans(y), tl.trans(x), tl.trans(acc), input_precision=PRECISION))


@triton.jit
def _after(by_row, BT: tl.constexpr, K: tl.constexpr, M: tl.constexpr, SAFE: tl.constexpr):
    """Sum over the rows behind each token, which are those of its half of a block where factors are by `halves`."""
    if SAFE:
        by_row = tl.reshape(by_row, [BT // M, M, K])
        return tl.reshape(tl.cumsum(by_row, 1, reverse=True) - by_row, [BT, K])
    else:
        return tl.cumsum(by_row, 0, reverse=True) - by_row


@triton.jit
def _before(by_col, BT: tl.constexpr, K: tl.constexpr, M: tl.constexpr, SAFE: tl.constexpr):
    """Sum over the columns before each token, likewise.

    Where they are `centred` minus the sum over the rest: the columns are scaled up, not down, by the decays before
    them, and the rows behind, of which not all are read across this token, carry the difference.
    """
    if SAFE:
        by_col = tl.reshape(by_col, [BT // M, M, K])
        return tl.reshape(tl.cumsum(by_col, 1) - by_col, [BT, K])
    else:
        return -tl.cumsum(by_col, 0, reverse=True)


@triton.jit(do_not_specialize=["T"])
def wkv7_fwd_prepare_kernel(
    r, w, k, v, a, b, order, cu_seqlens, chunk_starts, sequence_of, q, o0, P, N, G, T, S_, keys,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, SAFE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """q, o0, P, N, G of one chunk and head."""
    i_h = tl.program_id(0) % H
    i_c = tl.program_id(0) // H
    i_s = sequence_of_chunk(i_c, T, sequence_of, BT)
    if i_s >= S_:
        return
    first, start, tokens, length = span_of_sequence(i_s, T, cu_seqlens, chunk_starts, BT)
    i_t = (i_c - first).to(tl.int32) * BT
    rows, m_read, m_row = chunk_rows(order, tokens, start, i_t, length, BT)
    i_ch = tl.program_id(0).to(tl.int64)

    DOT: tl.constexpr = q.dtype.element_ty
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, K), tl.arange(0, V)
    A_rk, A_rb, A_ak, A_ab = _products(
        r, w, k, a, b, rows, m_read, i_h, keys, H, K, BT, BK, DOT, SAFE, PRECISION
    )  # fmt: skip
    b_T = inverse_of_one_minus(A_ab, BT, PRECISION).to(DOT)

    b_v = load_rows(v, rows, m_read, i_h, H, V, o_v).to(DOT)
    zeros = tl.zeros([BT, V], tl.float32)
    b_u = _wide_dot(A_ak, b_v, zeros, PRECISION).to(DOT)
    b_u = _wide_dot(b_T, b_u, zeros, PRECISION).to(DOT)
    b_o = _wide_dot(A_rk, b_v, zeros, PRECISION)
    b_o = _wide_dot(A_rb, b_u, b_o, PRECISION)
    tl.store(o0 + i_ch * BT * V + o_t[:, None] * V + o_v[None, :], b_o.to(DOT))

    b_w = load_log_decay(w, rows, m_read, i_h, H, K, o_k)
    until = tl.cumsum(b_w, 0)  # with t itself
    b_a = load_rows(a, rows, m_read, i_h, H, K, o_k) * tl.exp(until - b_w)
    W = _wide_dot(b_T, b_a.to(DOT), tl.zeros([BT, K], tl.float32), PRECISION).to(DOT)
    b_r = load_rows(r, rows, m_read, i_h, H, K, o_k) * tl.exp(until)
    b_q = _wide_dot(A_rb, W, b_r, PRECISION)
    tl.store(q + i_ch * BT * K + o_t[:, None] * K + o_k[None, :], b_q.to(DOT))
    for i_k in tl.static_range(0, K, BK):
        o_j = i_k + tl.arange(0, BK)
        b_wj = load_log_decay(w, rows, m_read, i_h, H, K, o_j)
        tl.store(G + i_ch * K + o_j, tl.sum(b_wj, 0))
        decay = tl.exp(tl.cumsum(b_wj, 0, reverse=True) - b_wj)
        b_kout = tl.trans((load_rows(k, rows, m_read, i_h, H, K, o_j) * decay).to(DOT))
        b_bout = tl.trans((load_rows(b, rows, m_read, i_h, H, K, o_j) * decay).to(DOT))
        b_P = tl.dot(b_bout, W, input_precision=PRECISION)
        tl.store(P + i_ch * K * K + o_j[:, None] * K + o_k[None, :], b_P.to(DOT))
        b_N = tl.dot(b_kout, b_v, input_precision=PRECISION)
        b_N = tl.dot(b_bout, b_u, b_N, input_precision=PRECISION)
        tl.store(N + i_ch * K * V + o_j[:, None] * V + o_v[None, :], b_N.to(DOT))


@triton.jit(do_not_specialize=["T"])
def wkv7_fwd_scan_kernel(
    q, o0, P, N, G, initial_state, order, cu_seqlens, chunk_starts, y, states, final_state, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y and the state of one sequence and head in BV columns, chunk after chunk."""
    i_v = tl.program_id(0) % (V // BV)
    i_h = tl.program_id(0) // (V // BV) % H
    i_s = tl.program_id(0) // (V // BV) // H
    first, start, tokens, length = span_of_sequence(i_s, T, cu_seqlens, chunk_starts, BT)

    DOT: tl.constexpr = q.dtype.element_ty
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, K), i_v * BV + tl.arange(0, BV)
    p_state = (i_s.to(tl.int64) * H + i_h) * K * V + o_k[:, None] * V + o_v[None, :]
    if initial_state is None:
        b_S = tl.zeros([K, BV], tl.float32)
    else:
        b_S = tl.load(initial_state + p_state)
    for i_c in range(0, tl.cdiv(length, BT)):
        i_ch = (first + i_c) * H + i_h
        b_q = tl.load(q + i_ch * BT * K + o_t[:, None] * K + o_k[None, :])
        b_P = tl.load(P + i_ch * K * K + o_k[:, None] * K + o_k[None, :])
        b_o = tl.load(o0 + i_ch * BT * V + o_t[:, None] * V + o_v[None, :]).to(tl.float32)
        p_S = i_ch * K * V + o_k[:, None] * V + o_v[None, :]
        b_N = tl.load(N + p_S).to(tl.float32)
        b_G = tl.load(G + i_ch * K + o_k)
        b_start = b_S.to(DOT)
        if states is not None:
            tl.store(states + p_S, b_start)
        b_o = tl.dot(b_q, b_start, b_o, input_precision=PRECISION)
        b_S = tl.dot(b_P, b_start, tl.exp(b_G)[:, None] * b_S + b_N, input_precision=PRECISION)
        rows, m_read, m_row = chunk_rows(order, tokens, start, i_c * BT, length, BT)
        store_rows(y, b_o, rows, m_read, m_row, i_h, H, V, o_v)
    tl.store(final_state + p_state, b_S)


@triton.jit(do_not_specialize=["T"])
def wkv7_bwd_scan_kernel(
    q, P, G, dy, dfinal_state, order, cu_seqlens, chunk_starts, dstates, dinitial_state, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the states at the chunks' ends, of one sequence and head in BV columns, backwards.

        dS = exp(G) dS' + P^T dS' + q^T dy
    """
    i_v = tl.program_id(0) % (V // BV)
    i_h = tl.program_id(0) // (V // BV) % H
    i_s = tl.program_id(0) // (V // BV) // H
    first, start, tokens, length = span_of_sequence(i_s, T, cu_seqlens, chunk_starts, BT)

    DOT: tl.constexpr = q.dtype.element_ty
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, K), i_v * BV + tl.arange(0, BV)
    p_state = (i_s.to(tl.int64) * H + i_h) * K * V + o_k[:, None] * V + o_v[None, :]
    if dfinal_state is None:
        b_dS = tl.zeros([K, BV], tl.float32)
    else:
        b_dS = tl.load(dfinal_state + p_state)
    n = tl.cdiv(length, BT)
    for i in range(0, n):
        i_c = n - 1 - i
        i_ch = (first + i_c) * H + i_h
        rows, m_read, _ = chunk_rows(order, tokens, start, i_c * BT, length, BT)
        b_q = tl.load(q + i_ch * BT * K + o_t[:, None] * K + o_k[None, :])
        b_P = tl.load(P + i_ch * K * K + o_k[:, None] * K + o_k[None, :])
        b_G = tl.load(G + i_ch * K + o_k)
        b_end = b_dS.to(DOT)
        tl.store(dstates + i_ch * K * V + o_k[:, None] * V + o_v[None, :], b_end)
        b_dS = tl.dot(tl.trans(b_P), b_end, tl.exp(b_G)[:, None] * b_dS, input_precision=PRECISION)
        if dy is not None:
            b_dy = load_rows(dy, rows, m_read, i_h, H, V, o_v).to(DOT)
            b_dS = tl.dot(tl.trans(b_q), b_dy, b_dS, input_precision=PRECISION)
    if dinitial_state is not None:
        tl.store(dinitial_state + p_state, b_dS)


@triton.jit(do_not_specialize=["T"])
def wkv7_bwd_gradients_kernel(
    r, w, k, v, a, b, dy, order, cu_seqlens, chunk_starts, sequence_of, states, dstates, dr, dw, dk, dv, da, db,
    T, S_, keys, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    SAFE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The inputs' gradients of one chunk and head, given the states at its start and their gradients at its end."""
    i_h = tl.program_id(0) % H
    i_c = tl.program_id(0) // H
    i_s = sequence_of_chunk(i_c, T, sequence_of, BT)
    if i_s >= S_:
        return
    first, start, tokens, length = span_of_sequence(i_s, T, cu_seqlens, chunk_starts, BT)
    i_t = (i_c - first).to(tl.int32) * BT
    rows, m_read, m_row = chunk_rows(order, tokens, start, i_t, length, BT)
    i_ch = tl.program_id(0).to(tl.int64)

    DOT: tl.constexpr = states.dtype.element_ty
    o_t, o_v = tl.arange(0, BT), tl.arange(0, V)
    A_rk, A_rb, A_ak, A_ab = _products(
        r, w, k, a, b, rows, m_read, i_h, keys, H, K, BT, BK, DOT, SAFE, PRECISION
    )  # fmt: skip
    b_T = inverse_of_one_minus(A_ab, BT, PRECISION).to(DOT)

    b_v = load_rows(v, rows, m_read, i_h, H, V, o_v).to(DOT)
    b_z = tl.zeros([BT, V], tl.float32)
    b_du = tl.zeros([BT, V], tl.float32)
    b_dv = tl.zeros([BT, V], tl.float32)
    for i_k in tl.static_range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        b_w = load_log_decay(w, rows, m_read, i_h, H, K, o_k)
        b_ain = load_rows(a, rows, m_read, i_h, H, K, o_k) * tl.exp(tl.cumsum(b_w, 0) - b_w)
        p_S = i_ch * K * V + o_k[:, None] * V + o_v[None, :]
        b_z = _wide_dot(b_ain.to(DOT), tl.load(states + p_S), b_z, PRECISION)
        decay_out = tl.exp(tl.cumsum(b_w, 0, reverse=True) - b_w)
        b_kout = (load_rows(k, rows, m_read, i_h, H, K, o_k) * decay_out).to(DOT)
        b_bout = (load_rows(b, rows, m_read, i_h, H, K, o_k) * decay_out).to(DOT)
        b_dS = tl.load(dstates + p_S)
        b_du = _wide_dot(b_bout, b_dS, b_du, PRECISION)
        b_dv = _wide_dot(b_kout, b_dS, b_dv, PRECISION)
    b_z = _wide_dot(A_ak, b_v, b_z, PRECISION).to(DOT)
    b_u = _wide_dot(b_T, b_z, tl.zeros([BT, V], tl.float32), PRECISION).to(DOT)
    if dy is None:
        b_dy = tl.zeros([BT, V], DOT)
    else:
        b_dy = load_rows(dy, rows, m_read, i_h, H, V, o_v).to(DOT)
    b_du = _wide_dot(tl.trans(A_rb), b_dy, b_du, PRECISION).to(DOT)
    b_dz = _wide_dot(tl.trans(b_T), b_du, tl.zeros([BT, V], tl.float32), PRECISION).to(DOT)
    b_dv = _wide_dot(tl.trans(A_rk), b_dy, b_dv, PRECISION)
    b_dv = _wide_dot(tl.trans(A_ak), b_dz, b_dv, PRECISION)
    store_rows(dv, b_dv, rows, m_read, m_row, i_h, H, V, o_v)

    dA_rk = tl.dot(b_dy, tl.trans(b_v), input_precision=PRECISION)
    dA_rb = tl.dot(b_dy, tl.trans(b_u), input_precision=PRECISION)
    dA_ak = tl.dot(b_dz, tl.trans(b_v), input_precision=PRECISION).to(DOT)
    dA_ab = tl.dot(b_dz, tl.trans(b_u), input_precision=PRECISION).to(DOT)
    diagonal = o_t[:, None] == o_t[None, :]
    d_rk = tl.sum(tl.where(diagonal, dA_rk, 0.0), 1)[:, None]
    d_rb = tl.sum(tl.where(diagonal, dA_rb, 0.0), 1)[:, None]
    dA_rk, dA_rb = dA_rk.to(DOT), dA_rb.to(DOT)
    for i_k in tl.static_range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        zeros = tl.zeros([BT, BK], tl.float32)
        p_S = i_ch * K * V + o_k[:, None] * V + o_v[None, :]

        # Rows: what reads at t, from the chunk's start and from columns before t.
        b_w = load_log_decay(w, rows, m_read, i_h, H, K, o_k)
        b_r = load_rows(r, rows, m_read, i_h, H, K, o_k)
        b_k = load_rows(k, rows, m_read, i_h, H, K, o_k)
        b_a = load_rows(a, rows, m_read, i_h, H, K, o_k)
        b_b = load_rows(b, rows, m_read, i_h, H, K, o_k)
        b_S = tl.load(states + p_S)
        decay = tl.exp(b_w)
        decay_in = tl.exp(tl.cumsum(b_w, 0) - b_w)
        b_dr = _wide_dot(b_dy, tl.trans(b_S), zeros, PRECISION) * decay_in
        b_da = _wide_dot(b_dz, tl.trans(b_S), zeros, PRECISION) * decay_in
        by_row = b_r * decay * b_dr + b_a * b_da
        b_dw = tl.cumsum(by_row, 0, reverse=True) - by_row
        for level in tl.static_range(0, LEVELS if SAFE else 1):
            if 2**level < BT:
                f_row, f_col, m_pair = _factors(b_w, BT, BK, 2**level, SAFE)
                y_k, y_b = (b_k * f_col).to(DOT), (b_b * f_col).to(DOT)
                dx = _wide_dot(tl.where(m_pair, dA_rk, 0.0), y_k, zeros, PRECISION)
                dx = _wide_dot(tl.where(m_pair, dA_rb, 0.0), y_b, dx, PRECISION)
                b_dr += dx * f_row
                by_row = (b_r * decay * f_row).to(DOT).to(tl.float32) * dx
                dx = _wide_dot(tl.where(m_pair, dA_ak, 0.0), y_k, zeros, PRECISION)
                dx = _wide_dot(tl.where(m_pair, dA_ab, 0.0), y_b, dx, PRECISION)
                b_da += dx * f_row
                by_row += (b_a * f_row).to(DOT).to(tl.float32) * dx
                b_dw += _after(by_row, BT, BK, 2**level, SAFE)
        b_dw += b_r * decay * b_dr
        store_rows(dr, b_dr * decay + d_rk * b_k + d_rb * b_b, rows, m_read, m_row, i_h, H, K, o_k)
        store_rows(da, b_da, rows, m_read, m_row, i_h, H, K, o_k)

        # Columns: what is written at s, until the chunk's end and until rows after s.
        b_w = load_log_decay(w, rows, m_read, i_h, H, K, o_k)
        b_r = load_rows(r, rows, m_read, i_h, H, K, o_k)
        b_k = load_rows(k, rows, m_read, i_h, H, K, o_k)
        b_a = load_rows(a, rows, m_read, i_h, H, K, o_k)
        b_b = load_rows(b, rows, m_read, i_h, H, K, o_k)
        b_S, b_dS = tl.load(states + p_S), tl.load(dstates + p_S)
        decay = tl.exp(b_w)
        decay_out = tl.exp(tl.cumsum(b_w, 0, reverse=True) - b_w)
        b_dk = _wide_dot(b_v, tl.trans(b_dS), zeros, PRECISION) * decay_out
        b_db = _wide_dot(b_u, tl.trans(b_dS), zeros, PRECISION) * decay_out
        by_col = b_k * b_dk + b_b * b_db
        b_dw += tl.cumsum(by_col, 0) - by_col
        b_dG = tl.exp(tl.sum(b_w, 0)) * tl.sum(b_S.to(tl.float32) * b_dS.to(tl.float32), 1)
        b_dw += b_dG[None, :]
        for level in tl.static_range(0, LEVELS if SAFE else 1):
            if 2**level < BT:
                f_row, f_col, m_pair = _factors(b_w, BT, BK, 2**level, SAFE)
                x_r, x_a = (b_r * decay * f_row).to(DOT), (b_a * f_row).to(DOT)
                dx = _wide_dot(tl.trans(tl.where(m_pair, dA_rk, 0.0)), x_r, zeros, PRECISION)
                dx = _wide_dot(tl.trans(tl.where(m_pair, dA_ak, 0.0)), x_a, dx, PRECISION)
                b_dk += dx * f_col
                by_col = (b_k * f_col).to(DOT).to(tl.float32) * dx
                dx = _wide_dot(tl.trans(tl.where(m_pair, dA_rb, 0.0)), x_r, zeros, PRECISION)
                dx = _wide_dot(tl.trans(tl.where(m_pair, dA_ab, 0.0)), x_a, dx, PRECISION)
                b_db += dx * f_col
                by_col += (b_b * f_col).to(DOT).to(tl.float32) * dx
                b_dw += _before(by_col, BT, BK, 2**level, SAFE)
        store_rows(dk, b_dk + d_rk * b_r, rows, m_read, m_row, i_h, H, K, o_k)
        store_rows(db, b_db + d_rb * b_r, rows, m_read, m_row, i_h, H, K, o_k)
        store_rows(dw, b_dw, rows, m_read, m_row, i_h, H, K, o_k)


@triton.jit(do_not_specialize=["T"])
def wkv7_fwd_recurrent_kernel(
    r, w, k, v, a, b, initial_state, order, cu_seqlens, y, final_state, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """y and the state of one sequence and head in BV columns, token by token, without tl.dot."""
    i_v = tl.program_id(0) % (V // BV)
    i_h = tl.program_id(0) // (V // BV) % H
    i_s = tl.program_id(0) // (V // BV) // H
    _, start, tokens, length = span_of_sequence(i_s, T, cu_seqlens, cu_seqlens, 1)

    o_k, o_v = tl.arange(0, K), i_v * BV + tl.arange(0, BV)
    p_state = (i_s.to(tl.int64) * H + i_h) * K * V + o_k[:, None] * V + o_v[None, :]
    if initial_state is None:
        b_S = tl.zeros([K, BV], tl.float32)
    else:
        b_S = tl.load(initial_state + p_state)
    for i_t in range(0, length):
        row = start + i_t
        read = True
        if order is not None:
            token = tl.load(order + row)
            read = token >= 0
            row = tokens + tl.where(read, token, -1 - token)
        p_k, p_v = (row * H + i_h) * K + o_k, (row * H + i_h) * V + o_v
        b_r = tl.load(r + p_k, mask=read, other=0.0).to(tl.float32)
        b_w = tl.load(w + p_k, mask=read, other=0.0).to(tl.float32)
        b_k = tl.load(k + p_k, mask=read, other=0.0).to(tl.float32)
        b_a = tl.load(a + p_k, mask=read, other=0.0).to(tl.float32)
        b_b = tl.load(b + p_k, mask=read, other=0.0).to(tl.float32)
        b_v = tl.load(v + p_v, mask=read, other=0.0).to(tl.float32)
        b_sa = tl.sum(b_a[:, None] * b_S, 0)
        b_S = tl.exp(b_w)[:, None] * b_S + b_b[:, None] * b_sa[None, :] + b_k[:, None] * b_v[None, :]
        b_y = tl.sum(b_r[:, None] * b_S, 0)
        tl.store(y + p_v, tl.where(read, b_y, 0.0).to(y.dtype.element_ty))
    tl.store(final_state + p_state, b_S)


# --- launches -----------------------------------------------------------------------------------------


class Config(NamedTuple):
    """Launches of the chunked kernels. BT: tokens of a chunk."""

    BT: int
    prepare: Launch
    scan: Launch
    bwd_scan: Launch
    gradients: Launch


# From how many sequences times heads on the scans fill a GPU with wide programs; below, narrow ones share the work.
MANY = 256

# (K, operands of 16 bits?, MANY?). BT does not depend on the last: what the forward saves, the backward reads.
CONFIGS = {
    (K, half, many): Config(32, Launch(K, 4), Launch(32, 4), Launch(32, 4), Launch(32, 8))
    for K in (32, 64, 128)
    for half in (False, True)
    for many in (False, True)
}

# Token by token: up to so many, and whatever the number on GPUs without matrix units.
MAX_STEPS = 16
RECURRENT = {32: Launch(16, 1), 64: Launch(16, 1), 128: Launch(16, 2)}  # by K


def config_of(r: Tensor, sequences: int) -> Config:
    half = precision_of(r).dtype.itemsize == 2
    return CONFIGS[r.shape[3], half, sequences * r.shape[2] >= MANY]


def chunk_size_of(r: Tensor) -> int:
    return CONFIGS[r.shape[3], precision_of(r).dtype.itemsize == 2, True].BT


def is_safe(min_log_decay: float, BT: int) -> bool:
    """Whether factors about the middle of a chunk might overflow, exp(40) being far from that."""
    return -min_log_decay * BT / 2 > 40


def _empty(r: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [chunks, H, BT, K], P [chunks, H, K, K], G [chunks, H, K], states [chunks, H, K, V]."""
    B, T, H, K = r.shape
    BT, dtype = chunk_size_of(r), precision_of(r).dtype
    chunks = B * most_chunks(T, 1, BT) if cu_seqlens is None else most_chunks(T, cu_seqlens.shape[0] - 1, BT)
    q, P, states = (
        r.new_empty((chunks, H, *shape), dtype=dtype) for shape in ((BT, K), (K, K), (K, v.shape[3]))
    )
    return q, P, r.new_empty((chunks, H, K), dtype=torch.float32), states


def _empty_outputs(r: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    sequences = r.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = torch.empty_like(v, dtype=r.dtype)
    return y, r.new_empty((sequences, *r.shape[2:], v.shape[3]), dtype=torch.float32)


@torch.library.custom_op("visualrwkv::wkv7", mutates_args=())
def wkv7_forward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    order: Tensor | None,
    cu_seqlens: Tensor | None,
    min_log_decay: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, the final state and, to save for the backward or else empty, q, P, G and the chunks' first states."""
    T, H, K = r.shape[1:]
    V = v.shape[3]
    y, final_state = _empty_outputs(r, v, cu_seqlens)
    sequences = final_state.shape[0]
    if not save and (T <= MAX_STEPS or not has_matrix_units(r)):
        BV, num_warps, num_stages = RECURRENT[K]
        with on_device_of(r):
            wkv7_fwd_recurrent_kernel[(sequences * H * (V // BV),)](
                r, w, k, v, a, b, initial_state, order, cu_seqlens, y, final_state, T,
                H=H, K=K, V=V, BV=BV, num_warps=num_warps, num_stages=num_stages,
            )  # fmt: skip
        return y, final_state, *(r.new_empty(0) for _ in range(4))

    config, (dtype, PRECISION) = config_of(r, sequences), precision_of(r)
    BT = config.BT
    chunk_starts, sequence_of = chunk_table(cu_seqlens, T, BT)
    q, P, G, states = _empty(r, v, cu_seqlens)
    o0, N = r.new_empty((*q.shape[:3], V), dtype=dtype), torch.empty_like(states)
    with on_device_of(r):
        BK, num_warps, num_stages = config.prepare
        wkv7_fwd_prepare_kernel[(G.shape[0] * H,)](
            r, w, k, v, a, b, order, cu_seqlens, chunk_starts, sequence_of, q, o0, P, N, G, T, sequences, K,
            H=H, K=K, V=V, BT=BT, BK=BK, SAFE=is_safe(min_log_decay, BT), PRECISION=PRECISION,
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
        BV, num_warps, num_stages = config.scan
        wkv7_fwd_scan_kernel[(sequences * H * (V // BV),)](
            q, o0, P, N, G, initial_state, order, cu_seqlens, chunk_starts, y, states if save else None,
            final_state, T, H=H, K=K, V=V, BT=BT, BV=BV, PRECISION=PRECISION,
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    if save:
        return y, final_state, q, P, G, states
    return y, final_state, *(r.new_empty(0) for _ in range(4))


@wkv7_forward.register_fake
def _(r, w, k, v, a, b, initial_state, order, cu_seqlens, min_log_decay, save):
    saved = _empty(r, v, cu_seqlens) if save else (r.new_empty(0) for _ in range(4))
    return *_empty_outputs(r, v, cu_seqlens), *saved


@torch.library.custom_op("visualrwkv::wkv7_backward", mutates_args=())
def wkv7_backward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    order: Tensor | None,
    cu_seqlens: Tensor | None,
    min_log_decay: float,
    q: Tensor,
    P: Tensor,
    G: Tensor,
    states: Tensor,
    dy: Tensor | None,
    dfinal_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, w, k, v, a, b and the initial state (empty if there is none)."""
    T, H, K = r.shape[1:]
    V = v.shape[3]
    *gradients, dinitial_state = _empty_gradients(r, w, k, v, a, b, initial_state)
    sequences = r.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    config, PRECISION = config_of(r, sequences), precision_of(r).dots
    BT = config.BT
    chunk_starts, sequence_of = chunk_table(cu_seqlens, T, BT)
    dstates = torch.empty_like(states)
    with on_device_of(r):
        BV, num_warps, num_stages = config.bwd_scan
        wkv7_bwd_scan_kernel[(sequences * H * (V // BV),)](
            q, P, G, dy, dfinal_state, order, cu_seqlens, chunk_starts, dstates,
            None if initial_state is None else dinitial_state, T,
            H=H, K=K, V=V, BT=BT, BV=BV, PRECISION=PRECISION, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
        BK, num_warps, num_stages = config.gradients
        wkv7_bwd_gradients_kernel[(G.shape[0] * H,)](
            r, w, k, v, a, b, dy, order, cu_seqlens, chunk_starts, sequence_of, states, dstates, *gradients,
            T, sequences, K, H=H, K=K, V=V, BT=BT, BK=BK, SAFE=is_safe(min_log_decay, BT), PRECISION=PRECISION,
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    return *gradients, dinitial_state


def _empty_gradients(r, w, k, v, a, b, initial_state):
    state = r.new_empty(0) if initial_state is None else torch.empty_like(initial_state)
    return *(torch.empty_like(x) for x in (r, w, k, v, a, b)), state


@wkv7_backward.register_fake
def _(r, w, k, v, a, b, initial_state, order, cu_seqlens, min_log_decay, q, P, G, states, dy, dfinal_state):
    return _empty_gradients(r, w, k, v, a, b, initial_state)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.min_log_decay, _ = inputs
    _, _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *saved)


def _backward(ctx, dy, dfinal_state, *_):
    tensors, saved = ctx.saved_tensors[:9], ctx.saved_tensors[9:]
    dy, dfinal_state = (None if x is None else x.contiguous() for x in (dy, dfinal_state))
    *gradients, dstate = wkv7_backward(*tensors, ctx.min_log_decay, *saved, dy, dfinal_state)
    return *gradients, dstate if ctx.needs_input_grad[6] else None, None, None, None, None


wkv7_forward.register_autograd(_backward, setup_context=_setup_context)


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    order: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    min_log_decay: float = -torch.inf,
) -> tuple[Tensor, Tensor]:
    """The generalised delta rule of RWKV-7 (arXiv 2503.14456, section 4), as `visualrwkv_hf.wkv.wkv7`.

        S_t = diag(exp(w_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T
        y_t = r_t^T S_t

    Computed in float32 from products of the precision of r's dtype (`precision_of`).

    Args:
        r: receptance, [B, T, H, K] in bfloat16, float16 or float32; K = V in 32, 64, 128.
        w: log decay, <= 0 and as low as -inf, [B, T, H, K].
        k: key, [B, T, H, K].
        v: value, [B, T, H, V].
        a: what is read from the state before it decays, [B, T, H, K].
        b: where that is written, [B, T, H, K].
        initial_state: S_0, [B, H, K, V] float32, or [S, H, K, V] with cu_seqlens; None is zeros.
        order: which token of its row is read when, int64 [B, T], each token once; ~token where it is a pad, which the
            state passes over and whose y is 0. None is 0, 1, 2, ...
        cu_seqlens: where sequences that are packed along T begin, and T at last, int32 or int64 [S + 1]; B is 1.
            order then counts from the beginning of the pack, and each sequence keeps to its own tokens.
        min_log_decay: what w is known to be at least; if not low, there is less to compute.

    Returns:
        y [B, T, H, V] in the dtype of r; the final state, like the initial one.
    """
    tensors = [x.contiguous() for x in (r, w, k, v, a, b)]
    options = [None if x is None else x.contiguous() for x in (initial_state, order, cu_seqlens)]
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*tensors, initial_state))
    y, final_state, *_ = wkv7_forward(*tensors, *options, min_log_decay, save)
    return y, final_state
