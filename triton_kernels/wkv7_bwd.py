"""The backward kernels of `wkv7`: a scan of the states' gradients in reverse, then all chunks' gradients at once.

With the letters of `.wkv7_fwd`, S and E the state that a chunk's products read and the gradient of what they add to it:
    S' = h (S + P S + N) where S = h S_start;   E = h dS',   dS_start = h (E + P^T E + q dy^T)   (the scan)
with h = exp(G / 2) in the centred frame; else h = 1, and exp(G) S and exp(G) E take the places of S and E as the first
terms of these sums. Then, with u = v A_ak T + S^T ain T, and tokens as columns,
    du = dy A_rb^T + E^T bout,  dz = du T^T,  dv = dy A_rk^T + dz A_ak^T + E^T kout
    dA_rk = v^T dy,  dA_rb = u^T dy,  dA_ak = v^T dz,  dA_ab = u^T dz      ([s, t], where A is not 0)
    drin = S dy,  dain = S dz,  dkout = E v,  dbout = E u                  ([K, BT], before what comes from the A's)

The gradient of a log decay w_j is the sum of x dx over all factors x that w_j decays. Two kernels compute all this,
because a single one would need more registers than there are: the first gives dv, u and dz, the second the rest.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import (
    centred_log_decays,
    chunk_decays,
    chunk_rows,
    chunk_table,
    count,
    exp,
    finite_log_decay,
    level_decays,
    load_columns,
    operand,
    rows_of,
    rows_of_chunk,
    sequence_of_chunk,
    span_of_sequence,
    store_columns,
    sums_of,
)
from .launches import NAMESPACE, on_device_of, precision_of, serial
from .wkv7_fwd import config_of

# --- kernels ------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "width"])
def wkv7_bwd_scan_kernel(
    q, P, G, dy, dfinal_state, order, cu_seqlens, chunk_starts, dstates, dinitial_state, T, width, H: tl.constexpr,
    K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, CENTRED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store E of every chunk, and dS at the start, of one sequence and head in BV columns, last chunk first."""
    i_v = tl.program_id(0) % (K // BV)
    i_h = tl.program_id(0) // (K // BV) % H
    i_s = tl.program_id(0) // (K // BV) // H
    first, start, tokens, length = span_of_sequence(i_s, T, cu_seqlens, chunk_starts, BT)

    DOT: tl.constexpr = q.dtype.element_ty
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, K), i_v * BV + tl.arange(0, BV)
    p_state = (i_s.to(tl.int64) * H + i_h) * K * K + o_k[:, None] * K + o_v[None, :]
    b_dS = tl.zeros([K, BV], tl.float32) if dfinal_state is None else tl.load(dfinal_state + p_state)
    chunks = tl.cdiv(length, BT)
    for i in range(0, chunks):
        i_c = chunks - 1 - i
        i_ch = (first + i_c) * H + i_h
        rows, m_read, _ = chunk_rows(order, tokens, start, i_c * BT, length, BT)
        b_q = tl.load(q + i_ch * BT * K + o_t[:, None] * K + o_k[None, :])
        b_G = tl.load(G + i_ch * K + o_k)[:, None]
        if CENTRED:
            b_half = exp(0.5 * b_G)
            b_dS *= b_half
        b_end = operand(b_dS, DOT, PRECISION)
        tl.store(dstates + i_ch * K * K + o_k[:, None] * K + o_v[None, :], b_end)
        if not CENTRED:
            b_dS *= exp(b_G)
        for i_k in range(0, K if BK == K else width, BK):
            b_P = tl.load(P + i_ch * K * K + (i_k + tl.arange(0, BK))[:, None] * K + o_k[None, :])
            b_part = b_end if BK == K else rows_of(b_end, i_k, BK)
            b_dS = tl.dot(tl.trans(b_P), b_part, b_dS, input_precision=PRECISION)
        b_dy = load_columns(dy, rows, m_read, i_h, H, K, o_v).to(DOT)
        b_dS = tl.dot(tl.trans(b_q), tl.trans(b_dy), b_dS, input_precision=PRECISION)
        if CENTRED:
            b_dS *= b_half
    if dinitial_state is not None:
        tl.store(dinitial_state + p_state, b_dS)


@triton.jit
def _gradients_of_readers(
    v, dy, u, dz, states, rows, m_read, i_ch, i_h, o_t, o_k, width, H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return dA_rk, dA_rb, dA_ak, dA_ab [BT, BT], and S dy, S dz [BK, BT] at keys o_k; float32, BV values at a time."""
    dA_rk = tl.zeros([BT, BT], tl.float32)
    dA_rb = tl.zeros([BT, BT], tl.float32)
    dA_ak = tl.zeros([BT, BT], tl.float32)
    dA_ab = tl.zeros([BT, BT], tl.float32)
    b_dr = tl.zeros([BK, BT], tl.float32)
    b_da = tl.zeros([BK, BT], tl.float32)
    for i_v in range(0, K if BV == K else width, BV):
        o_v = i_v + tl.arange(0, BV)
        p_u = (i_ch * BT + o_t)[None, :] * K + o_v[:, None]
        b_S = tl.load(states + (i_ch * K + o_k)[:, None] * K + o_v[None, :])
        b_v = load_columns(v, rows, m_read, i_h, H, K, o_v).to(DOT)  # [BV, BT]
        b_dy = load_columns(dy, rows, m_read, i_h, H, K, o_v).to(DOT)
        b_u, b_dz = tl.load(u + p_u), tl.load(dz + p_u)
        dA_rk = tl.dot(tl.trans(b_v), b_dy, dA_rk, input_precision=PRECISION)
        dA_rb = tl.dot(tl.trans(b_u), b_dy, dA_rb, input_precision=PRECISION)
        dA_ak = tl.dot(tl.trans(b_v), b_dz, dA_ak, input_precision=PRECISION)
        dA_ab = tl.dot(tl.trans(b_u), b_dz, dA_ab, input_precision=PRECISION)
        b_dr = tl.dot(b_S, b_dy, b_dr, input_precision=PRECISION)
        b_da = tl.dot(b_S, b_dz, b_da, input_precision=PRECISION)
    return dA_rk, dA_rb, dA_ak, dA_ab, b_dr, b_da


@triton.jit
def _gradients_of_writers(
    v, u, states, dstates, rows, m_read, i_ch, i_h, o_t, o_k, width, H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return E v, E u [BK, BT], and the sum of S E over values [BK], at keys o_k; float32, BV values at a time."""
    b_dk = tl.zeros([BK, BT], tl.float32)
    b_db = tl.zeros([BK, BT], tl.float32)
    b_dG = tl.zeros([BK], tl.float32)
    for i_v in range(0, K if BV == K else width, BV):
        o_v = i_v + tl.arange(0, BV)
        p_S = (i_ch * K + o_k)[:, None] * K + o_v[None, :]
        b_S, b_E = tl.load(states + p_S), tl.load(dstates + p_S)
        b_dG += tl.sum(b_S.to(tl.float32) * b_E.to(tl.float32), 1)
        b_v = load_columns(v, rows, m_read, i_h, H, K, o_v).to(DOT)  # [BV, BT]
        b_u = tl.load(u + (i_ch * BT + o_t)[None, :] * K + o_v[:, None])
        b_dk = tl.dot(b_E, b_v, b_dk, input_precision=PRECISION)
        b_db = tl.dot(b_E, b_u, b_db, input_precision=PRECISION)
    return b_dk, b_db, b_dG


@triton.jit
def _store_centred_gradients(
    w, v, u, operands, states, dstates, dr, dw, dk, da, db, dA_rk, dA_rb, dA_ak, dA_ab, b_dr, b_da,
    rows, m_read, m_row, order, i_ch, i_h, o_t, o_k, width, H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store dr, dw, dk, da, db from the A's gradients and from what the states give xr, xa.

    With X = xr dxr + xa dxa and Y = yk dyk + yb dyb of each token, and dyk = E v, dyb = E u before the A's add theirs,
        dw_j = sum_v S E + sum_s Y(before)_s + [xr dxr]_j + sum_{t>j} X_t - sum_{s>=j} Y_s
    The first two terms are what crosses the chunk's end, the rest removes and adds what begins or ends on the way. All
    are products of the same rounded operands, so a pair of tokens that does not lie on the two sides of j cancels; with
    bounded decays what is left is not much smaller than what cancels.

    dr and da are stored before E v and E u are computed, which saves a quarter of the registers.
    """
    row, col = o_t[:, None], o_t[None, :]
    dA_rk = operand(tl.where(row <= col, dA_rk, 0.0), DOT, PRECISION)
    dA_rb = operand(tl.where(row <= col, dA_rb, 0.0), DOT, PRECISION)
    dA_ak = operand(tl.where(row < col, dA_ak, 0.0), DOT, PRECISION)
    dA_ab = operand(tl.where(row < col, dA_ab, 0.0), DOT, PRECISION)
    p_x = operands + i_ch * (4 * BT * K) + o_t[None, :] * K + o_k[:, None]
    y_k, y_b = tl.load(p_x + 2 * BT * K), tl.load(p_x + 3 * BT * K)
    b_w = finite_log_decay(load_columns(w, rows, m_read, i_h, H, K, o_k))
    b_in = exp(centred_log_decays(b_w, BT, DOT, PRECISION))
    b_da = tl.dot(y_k, dA_ak, b_da, input_precision=PRECISION)
    b_da = tl.dot(y_b, dA_ab, b_da, input_precision=PRECISION)
    store_columns(da, b_da * b_in, rows, m_read, m_row, order, i_h, H, K, o_k)
    x_a = tl.load(p_x + BT * K)
    b_after = x_a.to(tl.float32) * b_da
    b_in *= exp(b_w)
    b_dr = tl.dot(y_k, dA_rk, b_dr, input_precision=PRECISION)
    b_dr = tl.dot(y_b, dA_rb, b_dr, input_precision=PRECISION)
    store_columns(dr, b_dr * b_in, rows, m_read, m_row, order, i_h, H, K, o_k)
    x_r = tl.load(p_x)
    b_own = x_r.to(tl.float32) * b_dr

    b_dk, b_db, b_dG = _gradients_of_writers(
        v, u, states, dstates, rows, m_read, i_ch, i_h, o_t, o_k, width, H, K, BT, BK, BV, DOT, PRECISION
    )  # fmt: skip
    b_dG += tl.sum(y_k.to(tl.float32) * b_dk + y_b.to(tl.float32) * b_db, 1)
    b_out = 1.0 / b_in
    b_dk = tl.dot(x_r, tl.trans(dA_rk), b_dk, input_precision=PRECISION)
    b_dk = tl.dot(x_a, tl.trans(dA_ak), b_dk, input_precision=PRECISION)
    store_columns(dk, b_dk * b_out, rows, m_read, m_row, order, i_h, H, K, o_k)
    b_own -= y_k.to(tl.float32) * b_dk
    b_db = tl.dot(x_r, tl.trans(dA_rb), b_db, input_precision=PRECISION)
    b_db = tl.dot(x_a, tl.trans(dA_ab), b_db, input_precision=PRECISION)
    store_columns(db, b_db * b_out, rows, m_read, m_row, order, i_h, H, K, o_k)
    b_own -= y_b.to(tl.float32) * b_db
    b_after = sums_of(b_own + b_after, tl.where(row > col, 1.0, 0.0), DOT, PRECISION)
    store_columns(dw, b_own + b_after + b_dG[:, None], rows, m_read, m_row, order, i_h, H, K, o_k)


@triton.jit
def _store_level_gradients(
    r, w, k, a, b, dr, dw, dk, da, db, dA_rk, dA_rb, dA_ak, dA_ab, b_dr, b_da, b_dk, b_db, b_dG,
    rows, m_read, m_row, order, i_h, o_k, width, H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr,
    LEVELS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store dr, dw, dk, da, db from the A's gradients and from what the states give rin, ain, kout, bout.

    A product of two tokens s < t has crossed the decays between them, on the level at which their blocks meet. There
    every token is in a first block, where it writes (k, b), or in a second, where it reads (r, a). w_j gets x dx of the
    tokens on the far side of j from the boundary. Each sum holds only what crosses w_j, so it is as small as that has
    decayed to; a difference of larger sums would keep their rounding errors.
    """
    row, col = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    d_rk = tl.sum(tl.where(row == col, dA_rk, 0.0), 0)[None, :]
    d_rb = tl.sum(tl.where(row == col, dA_rb, 0.0), 0)[None, :]
    d_rkrk = operand(tl.where(row < col, dA_rk, tl.trans(dA_rk)), DOT, PRECISION)
    d_abrk = operand(tl.where(row < col, dA_rb, tl.trans(dA_ak)), DOT, PRECISION)
    d_abab = operand(tl.where(row < col, dA_ab, tl.trans(dA_ab)), DOT, PRECISION)

    b_w = finite_log_decay(load_columns(w, rows, m_read, i_h, H, K, o_k))
    b_r = load_columns(r, rows, m_read, i_h, H, K, o_k) * exp(b_w)
    b_k = load_columns(k, rows, m_read, i_h, H, K, o_k)
    b_a = load_columns(a, rows, m_read, i_h, H, K, o_k)
    b_b = load_columns(b, rows, m_read, i_h, H, K, o_k)
    b_since_start, b_until_end = chunk_decays(b_w, BT, DOT, PRECISION)
    b_dr, b_da = b_dr * b_since_start, b_da * b_since_start
    b_dk, b_db = b_dk * b_until_end, b_db * b_until_end
    b_dw = sums_of(b_r * b_dr + b_a * b_da, tl.where(row > col, 1.0, 0.0), DOT, PRECISION)
    b_dw += sums_of(b_k * b_dk + b_b * b_db, tl.where(row < col, 1.0, 0.0), DOT, PRECISION)
    b_dw += (exp(tl.sum(b_w, 1)) * b_dG)[:, None]

    for level in range(0, tl.minimum(width, LEVELS)):  # LEVELS, but the compiler cannot unroll it
        b_factor, m_second, m_between, m_meet = level_decays(b_w, level, BT, DOT, PRECISION)
        x_rk = operand(tl.where(m_second, b_r, b_k) * b_factor, DOT, PRECISION)
        x_ab = operand(tl.where(m_second, b_a, b_b) * b_factor, DOT, PRECISION)
        b_dx = tl.dot(x_rk, tl.where(m_meet, d_rkrk, 0.0), input_precision=PRECISION)
        b_dx = tl.dot(x_ab, tl.where(m_meet, d_abrk, 0.0), b_dx, input_precision=PRECISION)
        b_token = x_rk.to(tl.float32) * b_dx
        b_dr += tl.where(m_second, b_dx * b_factor, 0.0)
        b_dk += tl.where(m_second, 0.0, b_dx * b_factor)
        b_dx = tl.dot(x_rk, tl.where(m_meet, tl.trans(d_abrk), 0.0), input_precision=PRECISION)
        b_dx = tl.dot(x_ab, tl.where(m_meet, d_abab, 0.0), b_dx, input_precision=PRECISION)
        b_token += x_ab.to(tl.float32) * b_dx
        b_da += tl.where(m_second, b_dx * b_factor, 0.0)
        b_db += tl.where(m_second, 0.0, b_dx * b_factor)
        b_dw += sums_of(b_token, tl.where(tl.trans(m_between), 1.0, 0.0), DOT, PRECISION)
    b_dw += b_r * b_dr
    store_columns(dw, b_dw, rows, m_read, m_row, order, i_h, H, K, o_k)
    store_columns(da, b_da, rows, m_read, m_row, order, i_h, H, K, o_k)
    # Read again, not kept: registers are what this kernel is short of.
    b_dr *= exp(finite_log_decay(load_columns(w, rows, m_read, i_h, H, K, o_k)))
    store_columns(dr, b_dr + d_rk * b_k + d_rb * b_b, rows, m_read, m_row, order, i_h, H, K, o_k)
    b_r = load_columns(r, rows, m_read, i_h, H, K, o_k)
    store_columns(dk, b_dk + d_rk * b_r, rows, m_read, m_row, order, i_h, H, K, o_k)
    store_columns(db, b_db + d_rb * b_r, rows, m_read, m_row, order, i_h, H, K, o_k)


@triton.jit(do_not_specialize=["T", "sequences", "width"])
def wkv7_bwd_values_kernel(
    v, dy, order, cu_seqlens, chunk_starts, sequence_of, pairs, operands, states, dstates, dv, u, dz, T, sequences,
    width, H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store dv, u and dz of one chunk and head, given its S, E, A's and operands; BV values, BK keys at a time."""
    i_h = tl.program_id(0) % H
    i_c = tl.program_id(0) // H
    i_s = sequence_of_chunk(i_c, T, sequence_of, BT)
    if i_s >= sequences:
        return
    rows, m_read, m_row, _ = rows_of_chunk(i_c, i_s, T, order, cu_seqlens, chunk_starts, BT)
    i_ch = tl.program_id(0).to(tl.int64)

    DOT: tl.constexpr = states.dtype.element_ty
    o_t = tl.arange(0, BT)
    p_A = pairs + i_ch * (4 * BT * BT) + o_t[:, None] * BT + o_t[None, :]
    b_T, A_rk = tl.load(p_A), tl.load(p_A + BT * BT)
    A_rb, A_ak = tl.load(p_A + 2 * BT * BT), tl.load(p_A + 3 * BT * BT)
    for i_v in range(0, K if BV == K else width, BV):
        o_v = i_v + tl.arange(0, BV)
        b_v = load_columns(v, rows, m_read, i_h, H, K, o_v).to(DOT)  # [BV, BT]
        b_dy = load_columns(dy, rows, m_read, i_h, H, K, o_v).to(DOT)
        b_u = tl.dot(b_v, A_ak, input_precision=PRECISION)
        b_du = tl.dot(b_dy, tl.trans(A_rb), input_precision=PRECISION)
        b_dv = tl.dot(b_dy, tl.trans(A_rk), input_precision=PRECISION)
        for i_k in range(0, K if BK == K else width, BK):
            o_k = i_k + tl.arange(0, BK)
            p_S = (i_ch * K + o_k)[:, None] * K + o_v[None, :]
            p_x = operands + i_ch * (4 * BT * K) + o_t[:, None] * K + o_k[None, :]
            b_S, b_E = tl.load(states + p_S), tl.load(dstates + p_S)
            x_a, y_k, y_b = tl.load(p_x + BT * K), tl.load(p_x + 2 * BT * K), tl.load(p_x + 3 * BT * K)
            b_u = tl.dot(tl.trans(b_S), tl.trans(x_a), b_u, input_precision=PRECISION)
            b_du = tl.dot(tl.trans(b_E), tl.trans(y_b), b_du, input_precision=PRECISION)
            b_dv = tl.dot(tl.trans(b_E), tl.trans(y_k), b_dv, input_precision=PRECISION)
        p_u = (i_ch * BT + o_t)[None, :] * K + o_v[:, None]
        b_u = tl.dot(operand(b_u, DOT, PRECISION), b_T, input_precision=PRECISION)
        tl.store(u + p_u, operand(b_u, DOT, PRECISION))
        b_du = operand(b_du, DOT, PRECISION)
        b_dz = operand(tl.dot(b_du, tl.trans(b_T), input_precision=PRECISION), DOT, PRECISION)
        tl.store(dz + p_u, b_dz)
        b_dv = tl.dot(b_dz, tl.trans(A_ak), b_dv, input_precision=PRECISION)
        store_columns(dv, b_dv, rows, m_read, m_row, order, i_h, H, K, o_v)


@triton.jit(do_not_specialize=["T", "sequences", "width"])
def wkv7_bwd_keys_kernel(
    r, w, k, v, a, b, dy, order, cu_seqlens, chunk_starts, sequence_of, operands, states, dstates, u, dz, dr, dw, dk,
    da, db, T, sequences, width, H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    LEVELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store dr, dw, dk, da, db of one chunk and head in BK keys, given u and dz too; BV values at a time."""
    i_ch = tl.program_id(0).to(tl.int64) // (K // BK)
    i_h = (i_ch % H).to(tl.int32)
    i_c = (i_ch // H).to(tl.int32)
    i_s = sequence_of_chunk(i_c, T, sequence_of, BT)
    if i_s >= sequences:
        return
    rows, m_read, m_row, _ = rows_of_chunk(i_c, i_s, T, order, cu_seqlens, chunk_starts, BT)

    DOT: tl.constexpr = states.dtype.element_ty
    o_t, o_k = tl.arange(0, BT), tl.program_id(0) % (K // BK) * BK + tl.arange(0, BK)
    dA_rk, dA_rb, dA_ak, dA_ab, b_dr, b_da = _gradients_of_readers(
        v, dy, u, dz, states, rows, m_read, i_ch, i_h, o_t, o_k, width, H, K, BT, BK, BV, DOT, PRECISION
    )  # fmt: skip
    if LEVELS == 0:
        _store_centred_gradients(
            w, v, u, operands, states, dstates, dr, dw, dk, da, db, dA_rk, dA_rb, dA_ak, dA_ab, b_dr, b_da,
            rows, m_read, m_row, order, i_ch, i_h, o_t, o_k, width, H, K, BT, BK, BV, DOT, PRECISION,
        )  # fmt: skip
    else:
        b_dk, b_db, b_dG = _gradients_of_writers(
            v, u, states, dstates, rows, m_read, i_ch, i_h, o_t, o_k, width, H, K, BT, BK, BV, DOT, PRECISION
        )  # fmt: skip
        _store_level_gradients(
            r, w, k, a, b, dr, dw, dk, da, db, dA_rk, dA_rb, dA_ak, dA_ab, b_dr, b_da, b_dk, b_db, b_dG,
            rows, m_read, m_row, order, i_h, o_k, width, H, K, BT, LEVELS, DOT, PRECISION,
        )  # fmt: skip


# --- launches -----------------------------------------------------------------------------------------


@torch.library.custom_op(f"{NAMESPACE}::wkv7_backward", mutates_args=())
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
    pairs: Tensor,
    operands: Tensor,
    states: Tensor,
    dy: Tensor | None,
    dfinal_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of r, w, k, v, a, b and the initial state (empty if there is none)."""
    (_, T, H, K), PRECISION = r.shape, precision_of(r).dots
    dr, dw, dk, dv, da, db, dinitial_state = _gradients(r, w, k, v, a, b, initial_state)
    config, LEVELS = config_of(r, min_log_decay)
    BT, (sequences, chunks) = config.BT, count(r, cu_seqlens, config.BT)
    chunk_starts, sequence_of = chunk_table(cu_seqlens, T, BT)
    dstates = torch.empty_like(states)
    dy = torch.zeros_like(v) if dy is None else dy
    with on_device_of(r):
        BV, num_warps, num_stages = config.scan(sequences * H)
        wkv7_bwd_scan_kernel[(sequences * H * (K // BV),)](
            q, P, G, dy, dfinal_state, order, cu_seqlens, chunk_starts, dstates,
            None if initial_state is None else dinitial_state, T, K, H=H, K=K, BT=BT, BK=config.part or K, BV=BV,
            CENTRED=LEVELS == 0, PRECISION=PRECISION, num_warps=num_warps, num_stages=num_stages, **serial(),
        )  # fmt: skip
        u, dz = torch.empty_like(q), torch.empty_like(q)
        BV, num_warps, num_stages = config.gradients
        wkv7_bwd_values_kernel[(chunks * H,)](
            v, dy, order, cu_seqlens, chunk_starts, sequence_of, pairs, operands, states, dstates, dv, u, dz, T,
            sequences, K, H=H, K=K, BT=BT, BK=config.values_part or K, BV=BV, PRECISION=PRECISION,
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
        BK, num_warps, num_stages = config.keys
        wkv7_bwd_keys_kernel[(chunks * H * (K // BK),)](
            r, w, k, v, a, b, dy, order, cu_seqlens, chunk_starts, sequence_of, operands, states, dstates, u, dz,
            dr, dw, dk, da, db, T, sequences, K, H=H, K=K, BT=BT, BK=BK, BV=config.turn or K, LEVELS=LEVELS,
            PRECISION=PRECISION, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    return dr, dw, dk, dv, da, db, dinitial_state


def _gradients(
    r, w, k, v, a, b, initial_state
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what `wkv7_backward` returns, not written yet."""
    state = r.new_empty(0) if initial_state is None else torch.empty_like(initial_state)
    empty = torch.empty_like
    return empty(r), empty(w), empty(k), empty(v), empty(a), empty(b), state


@wkv7_backward.register_fake
def _(
    r, w, k, v, a, b, initial_state, order, cu_seqlens, min_log_decay, q, P, G, pairs, operands, states, dy,
    dfinal_state,
):  # fmt: skip
    return _gradients(r, w, k, v, a, b, initial_state)
