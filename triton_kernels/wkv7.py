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

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import (
    Launch,
    centred,
    chunk_rows,
    chunk_table,
    has_matrix_units,
    inverse_of_one_minus,
    level_decays,
    load_log_decay,
    load_rows,
    most_chunks,
    needs_gradient,
    on_device_of,
    operand,
    precision_of,
    rows_of,
    rows_of_chunk,
    sequence_of_chunk,
    serial,
    span_of_sequence,
    store_rows,
)


@triton.jit
def _products(
    r, w, k, a, b, rows, m_read, i_h, width, H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, DOT: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A_rk, A_rb, A_ak and T = (1 - A_ab)^-1 [BT, BT] as operands; the A's are summed over BK keys at a time.

    LEVELS are those of `level_decays`; 0 where log decays are bounded, so that factors may be `centred`.
    """
    o_t = tl.arange(0, BT)
    diagonal = o_t[:, None] == o_t[None, :]
    A_rk = tl.zeros([BT, BT], tl.float32)
    A_rb = tl.zeros([BT, BT], tl.float32)
    A_ak = tl.zeros([BT, BT], tl.float32)
    A_ab = tl.zeros([BT, BT], tl.float32)
    for i_k in range(0, K if BK == K else width, BK):
        o_k = i_k + tl.arange(0, BK)
        b_w = load_log_decay(w, rows, m_read, i_h, H, K, o_k)
        b_r = load_rows(r, rows, m_read, i_h, H, K, o_k)
        b_k = load_rows(k, rows, m_read, i_h, H, K, o_k)
        b_a = load_rows(a, rows, m_read, i_h, H, K, o_k)
        b_b = load_rows(b, rows, m_read, i_h, H, K, o_k)
        A_rk += tl.where(diagonal, tl.sum(b_r * b_k, 1)[:, None], 0.0)
        A_rb += tl.where(diagonal, tl.sum(b_r * b_b, 1)[:, None], 0.0)
        b_r *= tl.exp(b_w)
        if LEVELS == 0:
            f_row, f_col, m_pair = centred(b_w, BT, BK)
            x_r, x_a = operand(b_r * f_row, DOT, PRECISION), operand(b_a * f_row, DOT, PRECISION)
            y_k, y_b = (
                tl.trans(operand(b_k * f_col, DOT, PRECISION)),
                tl.trans(operand(b_b * f_col, DOT, PRECISION)),
            )
            A_rk += tl.where(m_pair, tl.dot(x_r, y_k, input_precision=PRECISION), 0.0)
            A_rb += tl.where(m_pair, tl.dot(x_r, y_b, input_precision=PRECISION), 0.0)
            A_ak += tl.where(m_pair, tl.dot(x_a, y_k, input_precision=PRECISION), 0.0)
            A_ab += tl.where(m_pair, tl.dot(x_a, y_b, input_precision=PRECISION), 0.0)
        for level in range(0, LEVELS):
            factor, m_second, _m_between, m_meet = _level(b_w, level, BT, DOT, PRECISION)
            m_pair = m_meet & (o_t[:, None] > o_t[None, :])
            x_rk = operand(tl.where(m_second, b_r, b_k) * factor, DOT, PRECISION)
            x_ab = operand(tl.where(m_second, b_a, b_b) * factor, DOT, PRECISION)
            A_rk += tl.where(m_pair, tl.dot(x_rk, tl.trans(x_rk), input_precision=PRECISION), 0.0)
            b_A = tl.dot(x_rk, tl.trans(x_ab), input_precision=PRECISION)  # r b, and k a at [s, t]
            A_rb += tl.where(m_pair, b_A, 0.0)
            A_ak += tl.where(m_pair, tl.trans(b_A), 0.0)
            A_ab += tl.where(m_pair, tl.dot(x_ab, tl.trans(x_ab), input_precision=PRECISION), 0.0)
    A_rk, A_rb, A_ak = (
        operand(A_rk, DOT, PRECISION),
        operand(A_rb, DOT, PRECISION),
        operand(A_ak, DOT, PRECISION),
    )
    return A_rk, A_rb, A_ak, operand(inverse_of_one_minus(A_ab, BT, PRECISION), DOT, PRECISION)


@triton.jit
def _level(b_w, level, BT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """`level_decays` with tokens as rows: the decays [BT, BK], and m_second [BT, 1]."""
    decay, m_second, m_between, m_meet = level_decays(tl.trans(b_w), level, BT, DOT, PRECISION)
    return tl.trans(decay), tl.trans(m_second), m_between, m_meet


@triton.jit
def _decayed_until_end(
    x, w, rows, m_read, i_h, H: tl.constexpr, K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr
):
    """kout or bout of x = k or b [BT, K], an operand. (Computed where it is read: to keep it would take registers.)"""
    o_k = tl.arange(0, K)
    b_w = load_log_decay(w, rows, m_read, i_h, H, K, o_k)
    decay = tl.exp(tl.cumsum(b_w, 0, reverse=True) - b_w)
    return operand(load_rows(x, rows, m_read, i_h, H, K, o_k) * decay, DOT, PRECISION)


@triton.jit
def _decayed(
    w, k, a, b, rows, m_read, i_h, H: tl.constexpr, K: tl.constexpr, o_k, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """ain, kout, bout at keys o_k, operands [BT, len(o_k)]."""
    b_w = load_log_decay(w, rows, m_read, i_h, H, K, o_k)
    decay_in = tl.exp(tl.cumsum(b_w, 0) - b_w)
    decay_out = tl.exp(tl.cumsum(b_w, 0, reverse=True) - b_w)
    b_ain = operand(load_rows(a, rows, m_read, i_h, H, K, o_k) * decay_in, DOT, PRECISION)
    b_kout = operand(load_rows(k, rows, m_read, i_h, H, K, o_k) * decay_out, DOT, PRECISION)
    b_bout = operand(load_rows(b, rows, m_read, i_h, H, K, o_k) * decay_out, DOT, PRECISION)
    return b_ain, b_kout, b_bout


@triton.jit
def _wide_dot(x, y, acc, PRECISION: tl.constexpr):
    """acc + x y, as the transpose of y^T x^T: where x has few rows, warps (and wgmma's 64 rows) share y's columns."""
    return tl.trans(tl.dot(tl.trans(y), tl.trans(x), tl.trans(acc), input_precision=PRECISION))


@triton.jit(do_not_specialize=["T", "S_", "width"])
def wkv7_fwd_prepare_kernel(
    r, w, k, v, a, b, order, cu_seqlens, chunk_starts, sequence_of, q, o0, P, N, G, T, S_, width,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    LEVELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q, o0, P, N, G of one chunk and head, BK keys or values at a time.

    width is K = V, which the compiler must not know: of loops that it unrolls the turns share registers.
    """
    i_h = tl.program_id(0) % H
    i_c = tl.program_id(0) // H
    i_s = sequence_of_chunk(i_c, T, sequence_of, BT)
    if i_s >= S_:
        return
    rows, m_read, _, _ = rows_of_chunk(i_c, i_s, T, order, cu_seqlens, chunk_starts, BT)
    i_ch = tl.program_id(0).to(tl.int64)

    DOT: tl.constexpr = q.dtype.element_ty
    o_t, o_all = tl.arange(0, BT), tl.arange(0, K)
    A_rk, A_rb, A_ak, b_T = _products(
        r, w, k, a, b, rows, m_read, i_h, width, H, K, BT, BK, DOT, LEVELS, PRECISION
    )  # fmt: skip

    zeros = tl.zeros([BT, BK], tl.float32)
    for i_v in range(0, V if BK == V else width, BK):
        o_v = i_v + tl.arange(0, BK)
        b_v = load_rows(v, rows, m_read, i_h, H, V, o_v).to(DOT)
        b_u = operand(_wide_dot(A_ak, b_v, zeros, PRECISION), DOT, PRECISION)
        b_u = operand(_wide_dot(b_T, b_u, zeros, PRECISION), DOT, PRECISION)
        b_o = _wide_dot(A_rk, b_v, zeros, PRECISION)
        b_o = _wide_dot(A_rb, b_u, b_o, PRECISION)
        tl.store(o0 + i_ch * BT * V + o_t[:, None] * V + o_v[None, :], operand(b_o, DOT, PRECISION))
        b_kout = tl.trans(_decayed_until_end(k, w, rows, m_read, i_h, H, K, DOT, PRECISION))
        b_bout = tl.trans(_decayed_until_end(b, w, rows, m_read, i_h, H, K, DOT, PRECISION))
        b_N = tl.dot(b_kout, b_v, input_precision=PRECISION)
        b_N = tl.dot(b_bout, b_u, b_N, input_precision=PRECISION)
        tl.store(N + i_ch * K * V + o_all[:, None] * V + o_v[None, :], operand(b_N, DOT, PRECISION))

    for i_k in range(0, K if BK == K else width, BK):
        o_k = i_k + tl.arange(0, BK)
        b_w = load_log_decay(w, rows, m_read, i_h, H, K, o_k)
        until = tl.cumsum(b_w, 0)  # with t itself
        b_a = load_rows(a, rows, m_read, i_h, H, K, o_k) * tl.exp(until - b_w)
        W = operand(_wide_dot(b_T, operand(b_a, DOT, PRECISION), zeros, PRECISION), DOT, PRECISION)
        b_r = load_rows(r, rows, m_read, i_h, H, K, o_k) * tl.exp(until)
        b_q = _wide_dot(A_rb, W, b_r, PRECISION)
        tl.store(q + i_ch * BT * K + o_t[:, None] * K + o_k[None, :], operand(b_q, DOT, PRECISION))
        tl.store(G + i_ch * K + o_k, tl.sum(b_w, 0))
        b_bout = tl.trans(_decayed_until_end(b, w, rows, m_read, i_h, H, K, DOT, PRECISION))
        b_P = tl.dot(b_bout, W, input_precision=PRECISION)
        tl.store(P + i_ch * K * K + o_all[:, None] * K + o_k[None, :], operand(b_P, DOT, PRECISION))


@triton.jit(do_not_specialize=["T", "width"])
def wkv7_fwd_scan_kernel(
    q, o0, P, N, G, initial_state, order, cu_seqlens, chunk_starts, y, states, final_state, T, width,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y and the state of one sequence and head in BV columns, chunk after chunk, products over BK keys at a time."""
    i_v = tl.program_id(0) % (V // BV)
    i_h = tl.program_id(0) // (V // BV) % H
    i_s = tl.program_id(0) // (V // BV) // H
    first, start, tokens, length = span_of_sequence(i_s, T, cu_seqlens, chunk_starts, BT)

    DOT: tl.constexpr = q.dtype.element_ty
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, K), i_v * BV + tl.arange(0, BV)
    p_state = (i_s.to(tl.int64) * H + i_h) * K * V + o_k[:, None] * V + o_v[None, :]
    b_S = tl.zeros([K, BV], tl.float32) if initial_state is None else tl.load(initial_state + p_state)
    # Stages of the loop are of all its loads, those of a kernel only of what products read.
    for i_c in tl.range(0, tl.cdiv(length, BT), num_stages=STAGES):
        i_ch = (first + i_c) * H + i_h
        p_q, p_P = q + i_ch * BT * K + o_t[:, None] * K, P + i_ch * K * K + o_k[:, None] * K
        b_o = tl.load(o0 + i_ch * BT * V + o_t[:, None] * V + o_v[None, :]).to(tl.float32)
        p_S = i_ch * K * V + o_k[:, None] * V + o_v[None, :]
        b_N = tl.load(N + p_S).to(tl.float32)
        b_G = tl.load(G + i_ch * K + o_k)
        b_start = operand(b_S, DOT, PRECISION)
        if states is not None:
            tl.store(states + p_S, b_start)
        b_S = tl.exp(b_G)[:, None] * b_S + b_N
        for i_k in range(0, K if BK == K else width, BK):
            o_part = i_k + tl.arange(0, BK)
            b_part = b_start if BK == K else rows_of(b_start, i_k, BK)
            b_o = tl.dot(tl.load(p_q + o_part[None, :]), b_part, b_o, input_precision=PRECISION)
            b_S = tl.dot(tl.load(p_P + o_part[None, :]), b_part, b_S, input_precision=PRECISION)
        rows, m_read, m_row = chunk_rows(order, tokens, start, i_c * BT, length, BT)
        store_rows(y, b_o, rows, m_read, m_row, i_h, H, V, o_v)
    tl.store(final_state + p_state, b_S)


@triton.jit(do_not_specialize=["T", "width"])
def wkv7_bwd_scan_kernel(
    q, P, G, dy, dfinal_state, order, cu_seqlens, chunk_starts, dstates, dinitial_state, T, width,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the states at the chunks' ends, of one sequence and head in BV columns, backwards.

    dS = exp(G) dS' + P^T dS' + q^T dy, the product with P over BK keys at a time.
    """
    i_v = tl.program_id(0) % (V // BV)
    i_h = tl.program_id(0) // (V // BV) % H
    i_s = tl.program_id(0) // (V // BV) // H
    first, start, tokens, length = span_of_sequence(i_s, T, cu_seqlens, chunk_starts, BT)

    DOT: tl.constexpr = q.dtype.element_ty
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, K), i_v * BV + tl.arange(0, BV)
    p_state = (i_s.to(tl.int64) * H + i_h) * K * V + o_k[:, None] * V + o_v[None, :]
    b_dS = tl.zeros([K, BV], tl.float32) if dfinal_state is None else tl.load(dfinal_state + p_state)
    n = tl.cdiv(length, BT)
    for i in range(0, n):
        i_c = n - 1 - i
        i_ch = (first + i_c) * H + i_h
        rows, m_read, _ = chunk_rows(order, tokens, start, i_c * BT, length, BT)
        b_q = tl.load(q + i_ch * BT * K + o_t[:, None] * K + o_k[None, :])
        b_G = tl.load(G + i_ch * K + o_k)
        b_end = operand(b_dS, DOT, PRECISION)
        tl.store(dstates + i_ch * K * V + o_k[:, None] * V + o_v[None, :], b_end)
        b_dS = tl.exp(b_G)[:, None] * b_dS
        for i_k in range(0, K if BK == K else width, BK):
            b_P = tl.load(P + i_ch * K * K + (i_k + tl.arange(0, BK))[:, None] * K + o_k[None, :])
            b_part = b_end if BK == K else rows_of(b_end, i_k, BK)
            b_dS = tl.dot(tl.trans(b_P), b_part, b_dS, input_precision=PRECISION)
        b_dy = load_rows(dy, rows, m_read, i_h, H, V, o_v).to(DOT)
        b_dS = tl.dot(tl.trans(b_q), b_dy, b_dS, input_precision=PRECISION)
    if dinitial_state is not None:
        tl.store(dinitial_state + p_state, b_dS)


@triton.jit
def _add_products(dA_k, dA_b, b_dx, b_dy, b_v, b_u, b_S, PRECISION: tl.constexpr):
    """What BV values add to the gradients of A_xk, A_xb [BT, BT] and xin [BT, BK]: dy of x = r, dz of x = a."""
    dA_k = tl.dot(b_dy, tl.trans(b_v), dA_k, input_precision=PRECISION)
    dA_b = tl.dot(b_dy, tl.trans(b_u), dA_b, input_precision=PRECISION)
    return dA_k, dA_b, tl.dot(b_dy, tl.trans(b_S), b_dx, input_precision=PRECISION)


@triton.jit
def _store_gradients_of_keys(
    r, w, k, a, b, dr, dw, dk, da, db, dA_rk, dA_rb, dA_ak, dA_ab, b_dr, b_da, b_dk, b_db, b_dG,
    rows, m_read, m_row, i_h, o_k, H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    DOT: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of r, w, k, a, b at BK keys o_k from those of the A's, rin, ain, kout, bout and exp(G)."""
    o_t = tl.arange(0, BT)
    diagonal = o_t[:, None] == o_t[None, :]
    d_rk = tl.sum(tl.where(diagonal, dA_rk, 0.0), 1)[:, None]
    d_rb = tl.sum(tl.where(diagonal, dA_rb, 0.0), 1)[:, None]
    dA_rk, dA_rb, dA_ak, dA_ab = (
        operand(dA_rk, DOT, PRECISION),
        operand(dA_rb, DOT, PRECISION),
        operand(dA_ak, DOT, PRECISION),
        operand(dA_ab, DOT, PRECISION),
    )

    # A decay's gradient is a sum over the paths that cross it. Rows: what reads at t, from the chunk's start and from
    # columns before t.
    b_w = load_log_decay(w, rows, m_read, i_h, H, K, o_k)
    b_r = load_rows(r, rows, m_read, i_h, H, K, o_k)
    b_k = load_rows(k, rows, m_read, i_h, H, K, o_k)
    b_a = load_rows(a, rows, m_read, i_h, H, K, o_k)
    b_b = load_rows(b, rows, m_read, i_h, H, K, o_k)
    decay = tl.exp(b_w)
    decay_in = tl.exp(tl.cumsum(b_w, 0) - b_w)
    b_dr, b_da = b_dr * decay_in, b_da * decay_in
    by_row = b_r * decay * b_dr + b_a * b_da
    b_dw = tl.cumsum(by_row, 0, reverse=True) - by_row
    b_dw += (tl.exp(tl.sum(b_w, 0)) * b_dG)[None, :]
    if LEVELS == 0:
        f_row, f_col, m_pair = centred(b_w, BT, BK)
        y_k, y_b = operand(b_k * f_col, DOT, PRECISION), operand(b_b * f_col, DOT, PRECISION)
        dx = tl.dot(tl.where(m_pair, dA_rk, 0.0), y_k, input_precision=PRECISION)
        dx = tl.dot(tl.where(m_pair, dA_rb, 0.0), y_b, dx, input_precision=PRECISION)
        b_dr += dx * f_row
        # Of the rounded operands: what does not cross a decay of the chunk then cancels exactly.
        by_row = operand(b_r * decay * f_row, DOT, PRECISION).to(tl.float32) * dx
        dx = tl.dot(tl.where(m_pair, dA_ak, 0.0), y_k, input_precision=PRECISION)
        dx = tl.dot(tl.where(m_pair, dA_ab, 0.0), y_b, dx, input_precision=PRECISION)
        b_da += dx * f_row
        by_row += operand(b_a * f_row, DOT, PRECISION).to(tl.float32) * dx
        b_dw += tl.cumsum(by_row, 0, reverse=True) - by_row
        b_dw += b_r * decay * b_dr
        store_rows(dr, b_dr * decay + d_rk * b_k + d_rb * b_b, rows, m_read, m_row, i_h, H, K, o_k)
        store_rows(da, b_da, rows, m_read, m_row, i_h, H, K, o_k)
        # Loaded anew to save registers.
        b_w = load_log_decay(w, rows, m_read, i_h, H, K, o_k)
        b_r = load_rows(r, rows, m_read, i_h, H, K, o_k)
        b_k = load_rows(k, rows, m_read, i_h, H, K, o_k)
        b_a = load_rows(a, rows, m_read, i_h, H, K, o_k)
        b_b = load_rows(b, rows, m_read, i_h, H, K, o_k)
        decay = tl.exp(b_w)

    # Columns: what is written at s, until the chunk's end and until rows after s.
    decay_out = tl.exp(tl.cumsum(b_w, 0, reverse=True) - b_w)
    b_dk, b_db = b_dk * decay_out, b_db * decay_out
    by_col = b_k * b_dk + b_b * b_db
    b_dw += tl.cumsum(by_col, 0) - by_col
    if LEVELS == 0:
        f_row, f_col, m_pair = centred(b_w, BT, BK)
        x_r, x_a = operand(b_r * decay * f_row, DOT, PRECISION), operand(b_a * f_row, DOT, PRECISION)
        dx = tl.dot(tl.trans(tl.where(m_pair, dA_rk, 0.0)), x_r, input_precision=PRECISION)
        dx = tl.dot(tl.trans(tl.where(m_pair, dA_ak, 0.0)), x_a, dx, input_precision=PRECISION)
        b_dk += dx * f_col
        by_col = operand(b_k * f_col, DOT, PRECISION).to(tl.float32) * dx
        dx = tl.dot(tl.trans(tl.where(m_pair, dA_rb, 0.0)), x_r, input_precision=PRECISION)
        dx = tl.dot(tl.trans(tl.where(m_pair, dA_ab, 0.0)), x_a, dx, input_precision=PRECISION)
        b_db += dx * f_col
        by_col += operand(b_b * f_col, DOT, PRECISION).to(tl.float32) * dx
        # Minus the sum over the rest, not the sum over the columns before: these are scaled up, not down, by the
        # decays before them, and the rows behind, of which not all are read across this token, carry the difference.
        b_dw -= tl.cumsum(by_col, 0, reverse=True)
    else:
        # Rows and columns at once: each token is one or the other, in the second or the first half of a block, and
        # only those on the two sides of a decay give to its gradient, as small as they have become across it.
        b_r *= decay
        m_row_col = o_t[:, None] > o_t[None, :]
        d_rkrk = tl.where(m_row_col, dA_rk, tl.trans(dA_rk))
        d_rkab = tl.where(m_row_col, dA_rb, tl.trans(dA_ak))
        d_abab = tl.where(m_row_col, dA_ab, tl.trans(dA_ab))
        for level in range(0, LEVELS):
            factor, m_second, m_between, m_meet = _level(b_w, level, BT, DOT, PRECISION)
            x_rk = operand(tl.where(m_second, b_r, b_k) * factor, DOT, PRECISION)
            x_ab = operand(tl.where(m_second, b_a, b_b) * factor, DOT, PRECISION)
            dx = tl.dot(tl.where(m_meet, d_rkrk, 0.0), x_rk, input_precision=PRECISION)
            dx = tl.dot(tl.where(m_meet, d_rkab, 0.0), x_ab, dx, input_precision=PRECISION)
            by_token = x_rk.to(tl.float32) * dx
            b_dr += tl.where(m_second, dx * factor, 0.0)
            b_dk += tl.where(m_second, 0.0, dx * factor)
            dx = tl.dot(tl.where(m_meet, tl.trans(d_rkab), 0.0), x_rk, input_precision=PRECISION)
            dx = tl.dot(tl.where(m_meet, d_abab, 0.0), x_ab, dx, input_precision=PRECISION)
            by_token += x_ab.to(tl.float32) * dx
            b_da += tl.where(m_second, dx * factor, 0.0)
            b_db += tl.where(m_second, 0.0, dx * factor)
            crossed = tl.where(m_between, 1.0, 0.0).to(DOT)
            b_dw = tl.dot(crossed, operand(by_token, DOT, PRECISION), b_dw, input_precision=PRECISION)
        b_dw += b_r * b_dr
        store_rows(dr, b_dr * decay + d_rk * b_k + d_rb * b_b, rows, m_read, m_row, i_h, H, K, o_k)
        store_rows(da, b_da, rows, m_read, m_row, i_h, H, K, o_k)
        b_r = load_rows(r, rows, m_read, i_h, H, K, o_k)
    store_rows(dk, b_dk + d_rk * b_r, rows, m_read, m_row, i_h, H, K, o_k)
    store_rows(db, b_db + d_rb * b_r, rows, m_read, m_row, i_h, H, K, o_k)
    store_rows(dw, b_dw, rows, m_read, m_row, i_h, H, K, o_k)


@triton.jit(do_not_specialize=["T", "S_", "width"])
def wkv7_bwd_gradients_kernel(
    r, w, k, v, a, b, dy, order, cu_seqlens, chunk_starts, sequence_of, states, dstates, dr, dw, dk, dv, da, db,
    T, S_, width, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
    LEVELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The inputs' gradients of one chunk and head, given the states at its start and their gradients at its end."""
    i_h = tl.program_id(0) % H
    i_c = tl.program_id(0) // H
    i_s = sequence_of_chunk(i_c, T, sequence_of, BT)
    if i_s >= S_:
        return
    rows, m_read, m_row, _ = rows_of_chunk(i_c, i_s, T, order, cu_seqlens, chunk_starts, BT)
    i_ch = tl.program_id(0).to(tl.int64)

    DOT: tl.constexpr = states.dtype.element_ty
    A_rk, A_rb, A_ak, b_T = _products(
        r, w, k, a, b, rows, m_read, i_h, width, H, K, BT, K, DOT, LEVELS, PRECISION
    )  # fmt: skip

    o_k = tl.arange(0, K)
    b_ain, b_kout, b_bout = _decayed(w, k, a, b, rows, m_read, i_h, H, K, o_k, DOT, PRECISION)
    dA_rk = tl.zeros([BT, BT], tl.float32)
    dA_rb = tl.zeros([BT, BT], tl.float32)
    dA_ak = tl.zeros([BT, BT], tl.float32)
    dA_ab = tl.zeros([BT, BT], tl.float32)
    b_dr = tl.zeros([BT, K], tl.float32)
    b_da = tl.zeros([BT, K], tl.float32)
    b_dk = tl.zeros([BT, K], tl.float32)
    b_db = tl.zeros([BT, K], tl.float32)
    b_dG = tl.zeros([K], tl.float32)
    for i_v in range(0, width, BV):
        o_v = i_v + tl.arange(0, BV)
        p_S = i_ch * K * V + o_k[:, None] * V + o_v[None, :]
        b_S = tl.load(states + p_S)
        b_dS = tl.load(dstates + p_S)
        b_v = load_rows(v, rows, m_read, i_h, H, V, o_v).to(DOT)
        b_z = tl.dot(A_ak, b_v, input_precision=PRECISION)
        b_z = operand(tl.dot(b_ain, b_S, b_z, input_precision=PRECISION), DOT, PRECISION)
        b_u = operand(tl.dot(b_T, b_z, input_precision=PRECISION), DOT, PRECISION)
        b_du = tl.dot(b_bout, b_dS, input_precision=PRECISION)
        b_dv = tl.dot(b_kout, b_dS, input_precision=PRECISION)
        b_dy = load_rows(dy, rows, m_read, i_h, H, V, o_v).to(DOT)
        b_du = operand(tl.dot(tl.trans(A_rb), b_dy, b_du, input_precision=PRECISION), DOT, PRECISION)
        b_dv = tl.dot(tl.trans(A_rk), b_dy, b_dv, input_precision=PRECISION)
        dA_rk, dA_rb, b_dr = _add_products(dA_rk, dA_rb, b_dr, b_dy, b_v, b_u, b_S, PRECISION)
        b_dz = operand(tl.dot(tl.trans(b_T), b_du, input_precision=PRECISION), DOT, PRECISION)
        b_dv = tl.dot(tl.trans(A_ak), b_dz, b_dv, input_precision=PRECISION)
        store_rows(dv, b_dv, rows, m_read, m_row, i_h, H, V, o_v)
        dA_ak, dA_ab, b_da = _add_products(dA_ak, dA_ab, b_da, b_dz, b_v, b_u, b_S, PRECISION)
        b_dk = tl.dot(b_v, tl.trans(b_dS), b_dk, input_precision=PRECISION)
        b_db = tl.dot(b_u, tl.trans(b_dS), b_db, input_precision=PRECISION)
        b_dG += tl.sum(b_S.to(tl.float32) * b_dS.to(tl.float32), 1)
    _store_gradients_of_keys(
        r, w, k, a, b, dr, dw, dk, da, db, dA_rk, dA_rb, dA_ak, dA_ab, b_dr, b_da, b_dk, b_db, b_dG,
        rows, m_read, m_row, i_h, o_k, H, K, BT, K, DOT, LEVELS, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "S_", "width"])
def wkv7_bwd_values_kernel(
    r, w, k, v, a, b, dy, order, cu_seqlens, chunk_starts, sequence_of, states, dstates, dv, u, dz,
    T, S_, width, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    LEVELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The first half of `wkv7_bwd_gradients_kernel`, BK keys and values at a time: dv, and u and dz for the other."""
    i_h = tl.program_id(0) % H
    i_c = tl.program_id(0) // H
    i_s = sequence_of_chunk(i_c, T, sequence_of, BT)
    if i_s >= S_:
        return
    rows, m_read, m_row, _ = rows_of_chunk(i_c, i_s, T, order, cu_seqlens, chunk_starts, BT)
    i_ch = tl.program_id(0).to(tl.int64)

    DOT: tl.constexpr = states.dtype.element_ty
    A_rk, A_rb, A_ak, b_T = _products(
        r, w, k, a, b, rows, m_read, i_h, width, H, K, BT, BK, DOT, LEVELS, PRECISION
    )  # fmt: skip
    for i_v in range(0, width, BK):
        o_v = i_v + tl.arange(0, BK)
        b_v = load_rows(v, rows, m_read, i_h, H, V, o_v).to(DOT)
        b_z = tl.dot(A_ak, b_v, input_precision=PRECISION)
        b_du = tl.zeros([BT, BK], tl.float32)
        b_dv = tl.zeros([BT, BK], tl.float32)
        for i_k in range(0, width, BK):
            o_k = i_k + tl.arange(0, BK)
            b_ain, b_kout, b_bout = _decayed(w, k, a, b, rows, m_read, i_h, H, K, o_k, DOT, PRECISION)
            p_S = i_ch * K * V + o_k[:, None] * V + o_v[None, :]
            b_dS = tl.load(dstates + p_S)
            b_z = tl.dot(b_ain, tl.load(states + p_S), b_z, input_precision=PRECISION)
            b_du = tl.dot(b_bout, b_dS, b_du, input_precision=PRECISION)
            b_dv = tl.dot(b_kout, b_dS, b_dv, input_precision=PRECISION)
        b_dy = load_rows(dy, rows, m_read, i_h, H, V, o_v).to(DOT)
        b_u = operand(tl.dot(b_T, operand(b_z, DOT, PRECISION), input_precision=PRECISION), DOT, PRECISION)
        b_du = operand(tl.dot(tl.trans(A_rb), b_dy, b_du, input_precision=PRECISION), DOT, PRECISION)
        b_dz = operand(tl.dot(tl.trans(b_T), b_du, input_precision=PRECISION), DOT, PRECISION)
        b_dv = tl.dot(tl.trans(A_rk), b_dy, b_dv, input_precision=PRECISION)
        b_dv = tl.dot(tl.trans(A_ak), b_dz, b_dv, input_precision=PRECISION)
        store_rows(dv, b_dv, rows, m_read, m_row, i_h, H, V, o_v)
        p_u = i_ch * BT * V + tl.arange(0, BT)[:, None] * V + o_v[None, :]
        tl.store(u + p_u, b_u)
        tl.store(dz + p_u, b_dz)


@triton.jit(do_not_specialize=["T", "S_", "width"])
def wkv7_bwd_keys_kernel(
    r, w, k, v, a, b, dy, order, cu_seqlens, chunk_starts, sequence_of, states, dstates, u, dz, dr, dw, dk, da, db,
    T, S_, width, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The second half: dr, dw, dk, da, db of one chunk and head at BK keys, BV values at a time."""
    i_ch = tl.program_id(0).to(tl.int64) // (K // BK)
    i_h = (i_ch % H).to(tl.int32)
    i_c = (i_ch // H).to(tl.int32)
    i_s = sequence_of_chunk(i_c, T, sequence_of, BT)
    if i_s >= S_:
        return
    rows, m_read, m_row, _ = rows_of_chunk(i_c, i_s, T, order, cu_seqlens, chunk_starts, BT)

    DOT: tl.constexpr = states.dtype.element_ty
    o_k = tl.program_id(0) % (K // BK) * BK + tl.arange(0, BK)
    dA_rk = tl.zeros([BT, BT], tl.float32)
    dA_rb = tl.zeros([BT, BT], tl.float32)
    dA_ak = tl.zeros([BT, BT], tl.float32)
    dA_ab = tl.zeros([BT, BT], tl.float32)
    b_dr = tl.zeros([BT, BK], tl.float32)
    b_da = tl.zeros([BT, BK], tl.float32)
    b_dk = tl.zeros([BT, BK], tl.float32)
    b_db = tl.zeros([BT, BK], tl.float32)
    b_dG = tl.zeros([BK], tl.float32)
    for i_v in range(0, width, BV):
        o_v = i_v + tl.arange(0, BV)
        p_S = i_ch * K * V + o_k[:, None] * V + o_v[None, :]
        p_u = i_ch * BT * V + tl.arange(0, BT)[:, None] * V + o_v[None, :]
        b_S, b_dS = tl.load(states + p_S), tl.load(dstates + p_S)
        b_u, b_dz = tl.load(u + p_u), tl.load(dz + p_u)
        b_v = load_rows(v, rows, m_read, i_h, H, V, o_v).to(DOT)
        b_dy = load_rows(dy, rows, m_read, i_h, H, V, o_v).to(DOT)
        dA_rk, dA_rb, b_dr = _add_products(dA_rk, dA_rb, b_dr, b_dy, b_v, b_u, b_S, PRECISION)
        dA_ak, dA_ab, b_da = _add_products(dA_ak, dA_ab, b_da, b_dz, b_v, b_u, b_S, PRECISION)
        b_dk = tl.dot(b_v, tl.trans(b_dS), b_dk, input_precision=PRECISION)
        b_db = tl.dot(b_u, tl.trans(b_dS), b_db, input_precision=PRECISION)
        b_dG += tl.sum(b_S.to(tl.float32) * b_dS.to(tl.float32), 1)
    _store_gradients_of_keys(
        r, w, k, a, b, dr, dw, dk, da, db, dA_rk, dA_rb, dA_ak, dA_ab, b_dr, b_da, b_dk, b_db, b_dG,
        rows, m_read, m_row, i_h, o_k, H, K, BT, BK, DOT, LEVELS, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def wkv7_fwd_recurrent_kernel(
    r, w, k, v, a, b, initial_state, order, cu_seqlens, y, final_state, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """y and the state of one sequence and head in BV columns, token by token, without tl.dot."""
    i_v = tl.program_id(0) % (V // BV)
    i_h = tl.program_id(0) // (V // BV) % H
    i_s = tl.program_id(0) // (V // BV) // H
    # There are no chunks: any table will do for where they start.
    _, start, tokens, length = span_of_sequence(i_s, T, cu_seqlens, cu_seqlens, 1)

    o_k, o_v = tl.arange(0, K), i_v * BV + tl.arange(0, BV)
    p_state = (i_s.to(tl.int64) * H + i_h) * K * V + o_k[:, None] * V + o_v[None, :]
    b_S = tl.zeros([K, BV], tl.float32) if initial_state is None else tl.load(initial_state + p_state)
    for i_t in range(0, length):
        row = start + i_t
        m_k, m_v = o_k >= 0, o_v >= 0
        if order is not None:
            token = tl.load(order + row)
            m_k, m_v = o_k * 0 + token >= 0, o_v * 0 + token >= 0
            row = tokens + tl.where(token >= 0, token, -1 - token)
        p_k, p_v = (row * H + i_h) * K + o_k, (row * H + i_h) * V + o_v
        b_r = tl.load(r + p_k, mask=m_k, other=0.0).to(tl.float32)
        b_w = tl.load(w + p_k, mask=m_k, other=0.0).to(tl.float32)
        b_k = tl.load(k + p_k, mask=m_k, other=0.0).to(tl.float32)
        b_a = tl.load(a + p_k, mask=m_k, other=0.0).to(tl.float32)
        b_b = tl.load(b + p_k, mask=m_k, other=0.0).to(tl.float32)
        b_v = tl.load(v + p_v, mask=m_v, other=0.0).to(tl.float32)
        b_sa = tl.sum(b_a[:, None] * b_S, 0)
        b_S = tl.exp(b_w)[:, None] * b_S + b_b[:, None] * b_sa[None, :] + b_k[:, None] * b_v[None, :]
        b_y = tl.sum(b_r[:, None] * b_S, 0)
        tl.store(y + p_v, tl.where(m_v, b_y, 0.0).to(y.dtype.element_ty))
    tl.store(final_state + p_state, b_S)


# --- launches -----------------------------------------------------------------------------------------


class Config(NamedTuple):
    """Launches of the chunked kernels for a head size, a dtype and log decays that are bounded or are not.

    Attributes:
        BT: tokens of a chunk.
        prepare: keys, and then values, per turn of its loops.
        scan: columns per program; fewer where there are few sequences and heads (`FEW`).
        gradients: columns per turn of its loop; None where that would spill registers, and two kernels read the
            states twice instead:
        values: keys and values per turn.
        keys: keys per program.
    """

    BT: int
    prepare: Launch
    scan: Launch
    bwd_scan: Launch
    gradients: Launch | None
    values: Launch = Launch(32, 4)
    keys: Launch = Launch(32, 4)


NARROW, WIDE = Launch(16, 4, 3), Launch(32, 4, 2)


def _configs(K: int) -> dict[tuple[int, torch.dtype, bool], Config]:
    narrow = Launch(16, 8) if K == 128 else NARROW
    num_warps = 8 if K == 128 else 4
    half = Config(16, Launch(min(K, 64), num_warps), WIDE, WIDE, Launch(16, 8) if K < 128 else None)
    single = Config(16, Launch(32, num_warps), narrow, narrow, None)
    table = {
        (torch.bfloat16, True): half,
        (torch.bfloat16, False): half,
        (torch.float16, True): single,
        (torch.float16, False): single,
        (torch.float32, True): single,
        (torch.float32, False): single,
    }
    return {(K, dtype, bounded): config for (dtype, bounded), config in table.items()}


CONFIGS = _configs(32) | _configs(64) | _configs(128)
# The model's own case. All others have more in registers.
CONFIGS[64, torch.bfloat16, True] = Config(32, Launch(64, 4), WIDE, WIDE, Launch(32, 8))
# Where what serves the others spills, with one version of Triton or another.
OTHERWISE: dict[tuple[int, torch.dtype, bool], dict[str, Any]] = {
    (32, torch.bfloat16, True): dict(gradients=Launch(16, 4)),
    (128, torch.bfloat16, True): dict(values=Launch(64, 4)),
    (128, torch.bfloat16, False): dict(keys=Launch(16, 4)),
    (32, torch.float16, True): dict(prepare=Launch(32, 1), values=Launch(32, 2)),
    (32, torch.float16, False): dict(values=Launch(32, 2)),
    (64, torch.float16, True): dict(prepare=Launch(32, 8)),
    (64, torch.float32, True): dict(scan=Launch(16, 4, 2)),
    (64, torch.float32, False): dict(scan=Launch(16, 4, 2)),
}
CONFIGS |= {key: CONFIGS[key]._replace(**launches) for key, launches in OTHERWISE.items()}

# Keys per turn of the scans where a product over all would spill registers.
SCAN_KEYS = {(128, torch.float32): 32}

# Up to how many sequences times heads the scans' programs take 16 columns each, so that there are enough of them.
FEW = 128

# Token by token: up to so many, and whatever the number on GPUs without matrix units.
MAX_STEPS = 16
RECURRENT = {32: Launch(16, 1), 64: Launch(16, 1), 128: Launch(16, 2)}  # by K


def config_of(r: Tensor, min_log_decay: float) -> tuple[Config, bool]:
    """The launches, and whether factors about the middle of a chunk are safe: they reach exp(40) at most."""
    K = int(r.shape[3])  # under torch.compile it may be a symbol
    bounded = -min_log_decay * CONFIGS[K, r.dtype, True].BT / 2 <= 40
    config = CONFIGS[K, r.dtype, bounded]
    # AMD's registers do not hold all gradients at once.
    return config if torch.version.hip is None else config._replace(gradients=None), bounded


def _scan_launch(launch: Launch, programs: int) -> Launch:
    launch = NARROW if programs <= FEW and launch == WIDE else launch
    # AMD's blocks have 64 KiB of shared memory: too little for a large head's chunks ahead of time.
    return launch if torch.version.hip is None else launch._replace(num_stages=1)


def _empty(r: Tensor, v: Tensor, cu_seqlens: Tensor | None, BT: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [chunks, H, BT, K], P [chunks, H, K, K], G [chunks, H, K], states [chunks, H, K, V]."""
    B, T, H, K = r.shape
    dtype = precision_of(r).dtype
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
                H=H, K=K, V=V, BV=BV, num_warps=num_warps, num_stages=num_stages, **serial(),
            )  # fmt: skip
        return y, final_state, *(r.new_empty(0) for _ in range(4))  # type: ignore[return-value]

    config, bounded = config_of(r, min_log_decay)
    BT, (dtype, PRECISION) = config.BT, precision_of(r)
    chunk_starts, sequence_of = chunk_table(cu_seqlens, T, BT)
    q, P, G, states = _empty(r, v, cu_seqlens, BT)
    o0, N = r.new_empty((*q.shape[:3], V), dtype=dtype), torch.empty_like(states)
    with on_device_of(r):
        BK, num_warps, num_stages = config.prepare
        wkv7_fwd_prepare_kernel[(G.shape[0] * H,)](
            r, w, k, v, a, b, order, cu_seqlens, chunk_starts, sequence_of, q, o0, P, N, G, T, sequences, K,
            H=H, K=K, V=V, BT=BT, BK=BK, LEVELS=0 if bounded else BT.bit_length() - 1, PRECISION=PRECISION,
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
        BV, num_warps, num_stages = _scan_launch(config.scan, sequences * H)
        wkv7_fwd_scan_kernel[(sequences * H * (V // BV),)](
            q, o0, P, N, G, initial_state, order, cu_seqlens, chunk_starts, y, states if save else None,
            final_state, T, K, H=H, K=K, V=V, BT=BT, BK=SCAN_KEYS.get((K, r.dtype), K), BV=BV, PRECISION=PRECISION,
            STAGES=num_stages, num_warps=num_warps, **serial(),
        )  # fmt: skip
    if save:
        return y, final_state, q, P, G, states
    return y, final_state, *(r.new_empty(0) for _ in range(4))  # type: ignore[return-value]


@wkv7_forward.register_fake
def _(r, w, k, v, a, b, initial_state, order, cu_seqlens, min_log_decay, save):
    BT = config_of(r, min_log_decay)[0].BT
    saved = _empty(r, v, cu_seqlens, BT) if save else (r.new_empty(0) for _ in range(4))
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
    config, bounded = config_of(r, min_log_decay)
    BT, PRECISION = config.BT, precision_of(r).dots
    chunk_starts, sequence_of = chunk_table(cu_seqlens, T, BT)
    dstates = torch.empty_like(states)
    dy = torch.zeros_like(v) if dy is None else dy
    with on_device_of(r):
        BV, num_warps, num_stages = _scan_launch(config.bwd_scan, sequences * H)
        wkv7_bwd_scan_kernel[(sequences * H * (V // BV),)](
            q, P, G, dy, dfinal_state, order, cu_seqlens, chunk_starts, dstates,
            None if initial_state is None else dinitial_state, T, K,
            H=H, K=K, V=V, BT=BT, BK=SCAN_KEYS.get((K, r.dtype), K), BV=BV, PRECISION=PRECISION,
            num_warps=num_warps, num_stages=num_stages, **serial(),
        )  # fmt: skip
        inputs = (r, w, k, v, a, b, dy, order, cu_seqlens, chunk_starts, sequence_of, states, dstates)
        dr, dw, dk, dv, da, db = gradients
        sizes: dict[str, Any] = dict(
            H=H, K=K, V=V, BT=BT, LEVELS=0 if bounded else BT.bit_length() - 1, PRECISION=PRECISION
        )
        if config.gradients:
            BV, num_warps, num_stages = config.gradients
            wkv7_bwd_gradients_kernel[(G.shape[0] * H,)](
                *inputs, dr, dw, dk, dv, da, db, T, sequences, K, BV=BV, **sizes,
                num_warps=num_warps, num_stages=num_stages,
            )  # fmt: skip
        else:
            u, dz = (q.new_empty((*q.shape[:3], V)) for _ in range(2))
            BK, num_warps, num_stages = config.values
            wkv7_bwd_values_kernel[(G.shape[0] * H,)](
                *inputs, dv, u, dz, T, sequences, K, BK=BK, **sizes, num_warps=num_warps, num_stages=num_stages,
            )  # fmt: skip
            BK, num_warps, num_stages = config.keys
            wkv7_bwd_keys_kernel[(G.shape[0] * H * (K // BK),)](
                *inputs, u, dz, dr, dw, dk, da, db, T, sequences, K, BK=BK, BV=16, **sizes,
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
    saved_tensors = ctx.saved_tensors  # once: with a checkpoint this computes them
    tensors, saved = saved_tensors[:9], saved_tensors[9:]
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
    save = needs_gradient(*tensors, initial_state)
    y, final_state, *_ = wkv7_forward(*tensors, *options, min_log_decay, save)
    return y, final_state
