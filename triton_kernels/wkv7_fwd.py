"""The forward kernels of `wkv7` (equations: see `.wkv7`): prepare all chunks at once, then scan from chunk to chunk.

With r'_t = r_t exp(w_t), which reads S_{t-1} as a_t does, a chunk that begins with the state S [K, K] has
    A_xy[s, t] = x_t^T D(s, t) y_s for s < t, x in {r', a}, y in {k, b};  T = (1 - A_ab)^-1;
    A_rk, A_rb have r_t^T k_t, r_t^T b_t on their diagonals
    rin, ain [K, BT]: r', a decayed since the chunk began;  kout, bout [K, BT]: k, b decayed until it ends
    u  = u0 + S^T W,  W = ain T [K, BT],  u0 = v A_ak T [K, BT]           (u_t = a_t^T S_{t-1}, what a_t reads)
    y  = o0 + S^T q,  q = rin + W A_rb [K, BT],  o0 = v A_rk + u0 A_rb [K, BT]
    S' = exp(G) S + P S + N,  P = bout W^T [K, K],  N = kout v^T + bout u0^T [K, K],  G = sum w [K]
q, o0, P, N and G do not depend on S, so all chunks prepare them at once; only the last two lines are serial. exp(G)
stays apart from P, because P is rounded: near 1 it would lose what the state must keep.

Where log decays are bounded all factors are taken about half of the chunk's decay instead (the centred frame):
    xr_t = r_t exp(c_t + w_t), xa_t = a_t exp(c_t), yk_s = k_s exp(-c_s - w_s), yb_s = b_s exp(-c_s - w_s)
with c of `centred_log_decays`. Then A_xy = y^T x without further decays (A_rk and A_rb with their diagonals), and xr,
xa, yk, yb take the places of rin, ain, kout, bout in all of the above, once the state is scaled by half of the decay at
both ends of the chunk:
    S~ = exp(G / 2) S,  y = o0 + S~^T q,  S' = exp(G / 2) (S~ + P S~ + N)
Four operands, each computed once, serve every product. `q`, `P`, `N` and the saved states are of that frame.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launches
from .chunks import (
    centred_log_decays,
    chunk_decays,
    chunk_rows,
    chunk_table,
    count,
    exp,
    finite_log_decay,
    inverse_of_one_minus,
    level_decays,
    load_columns,
    operand,
    rows_of,
    rows_of_chunk,
    sequence_of_chunk,
    span_of_sequence,
    store_columns,
)
from .launches import (
    MAX_STEPS,
    NAMESPACE,
    WKV7,
    WKV7_OTHER_GPUS,
    WKV7_STEPS,
    Config,
    has_matrix_units,
    on_device_of,
    precision_of,
    serial,
)

# --- kernels ------------------------------------------------------------------------------------------


@triton.jit
def centred_operands(
    r, w, k, a, b, rows, m_read, i_h, o_k, H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return xr, xa, yk, yb of the centred frame, operands [K, BT], and c and w, [K, BT] float32."""
    b_w = finite_log_decay(load_columns(w, rows, m_read, i_h, H, K, o_k))
    b_c = centred_log_decays(b_w, BT, DOT, PRECISION)
    x_a = operand(load_columns(a, rows, m_read, i_h, H, K, o_k) * exp(b_c), DOT, PRECISION)
    x_r = operand(load_columns(r, rows, m_read, i_h, H, K, o_k) * exp(b_c + b_w), DOT, PRECISION)
    b_out = exp(-b_c - b_w)
    y_k = operand(load_columns(k, rows, m_read, i_h, H, K, o_k) * b_out, DOT, PRECISION)
    y_b = operand(load_columns(b, rows, m_read, i_h, H, K, o_k) * b_out, DOT, PRECISION)
    return x_r, x_a, y_k, y_b, b_c, b_w


@triton.jit
def centred_products(x_r, x_a, y_k, y_b, BT: tl.constexpr, PRECISION: tl.constexpr):
    """Return A_rk, A_rb, A_ak, A_ab, [s, t] float32, from the operands of the centred frame."""
    row, col = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    A_rk = tl.dot(tl.trans(y_k), x_r, input_precision=PRECISION)
    A_rb = tl.dot(tl.trans(y_b), x_r, input_precision=PRECISION)
    A_ak = tl.dot(tl.trans(y_k), x_a, input_precision=PRECISION)
    A_ab = tl.dot(tl.trans(y_b), x_a, input_precision=PRECISION)
    A_rk, A_rb = tl.where(row <= col, A_rk, 0.0), tl.where(row <= col, A_rb, 0.0)
    return A_rk, A_rb, tl.where(row < col, A_ak, 0.0), tl.where(row < col, A_ab, 0.0)


@triton.jit
def centred_product(y, x, DIAGONAL: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr):
    """Return one of the products that `centred_products` returns; with DIAGONAL for s = t as well as for s < t."""
    row, col = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    return tl.where(row < col + DIAGONAL, tl.dot(tl.trans(y), x, input_precision=PRECISION), 0.0)


@triton.jit
def level_operands(
    r, w, k, a, b, rows, m_read, i_h, o_k, H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return rin, ain, kout, bout as operands [K, BT], for log decays without a bound."""
    b_w = finite_log_decay(load_columns(w, rows, m_read, i_h, H, K, o_k))
    b_since_start, b_until_end = chunk_decays(b_w, BT, DOT, PRECISION)
    b_a = load_columns(a, rows, m_read, i_h, H, K, o_k) * b_since_start
    b_r = load_columns(r, rows, m_read, i_h, H, K, o_k) * exp(b_w) * b_since_start
    b_k = load_columns(k, rows, m_read, i_h, H, K, o_k) * b_until_end
    b_b = load_columns(b, rows, m_read, i_h, H, K, o_k) * b_until_end
    return (
        operand(b_r, DOT, PRECISION),
        operand(b_a, DOT, PRECISION),
        operand(b_k, DOT, PRECISION),
        operand(b_b, DOT, PRECISION),
    )


@triton.jit
def level_products(
    r, w, k, a, b, rows, m_read, i_h, o_k, H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr,
    LEVELS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return A_rk, A_rb, A_ak, A_ab, [s, t] float32, level by level (see `level_decays`)."""
    row, col = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    b_w = finite_log_decay(load_columns(w, rows, m_read, i_h, H, K, o_k))
    b_r = load_columns(r, rows, m_read, i_h, H, K, o_k)
    b_k = load_columns(k, rows, m_read, i_h, H, K, o_k)
    b_a = load_columns(a, rows, m_read, i_h, H, K, o_k)
    b_b = load_columns(b, rows, m_read, i_h, H, K, o_k)
    A_rk = tl.where(row == col, tl.sum(b_r * b_k, 0)[None, :], 0.0)
    A_rb = tl.where(row == col, tl.sum(b_r * b_b, 0)[None, :], 0.0)
    A_ak = tl.zeros([BT, BT], tl.float32)
    A_ab = tl.zeros([BT, BT], tl.float32)
    b_r *= exp(b_w)
    for level in range(0, LEVELS):
        b_decay, m_second, _m_between, m_meet = level_decays(b_w, level, BT, DOT, PRECISION)
        m_pair = m_meet & (row < col)
        x_rk = operand(tl.where(m_second, b_r, b_k) * b_decay, DOT, PRECISION)
        x_ab = operand(tl.where(m_second, b_a, b_b) * b_decay, DOT, PRECISION)
        A_rk += tl.where(m_pair, tl.dot(tl.trans(x_rk), x_rk, input_precision=PRECISION), 0.0)
        b_A = tl.dot(
            tl.trans(x_ab), x_rk, input_precision=PRECISION
        )  # b with r at [s, t], a with k at [t, s]
        A_rb += tl.where(m_pair, b_A, 0.0)
        A_ak += tl.where(m_pair, tl.trans(b_A), 0.0)
        A_ab += tl.where(m_pair, tl.dot(tl.trans(x_ab), x_ab, input_precision=PRECISION), 0.0)
    return A_rk, A_rb, A_ak, A_ab


@triton.jit
def operands_of_keys(
    r, w, k, a, b, rows, m_read, i_h, o_k, H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, LEVELS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the operands [len(o_k), BT] at keys o_k: of the centred frame if LEVELS is 0, else decayed ones."""
    if LEVELS == 0:
        x_r, x_a, y_k, y_b, _b_c, _b_w = centred_operands(
            r, w, k, a, b, rows, m_read, i_h, o_k, H, K, BT, DOT, PRECISION
        )  # fmt: skip
    else:
        x_r, x_a, y_k, y_b = level_operands(
            r, w, k, a, b, rows, m_read, i_h, o_k, H, K, BT, DOT, PRECISION
        )  # fmt: skip
    return x_r, x_a, y_k, y_b


@triton.jit
def products_by_part(
    r, w, k, a, b, rows, m_read, i_h, width, H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, PART: tl.constexpr,
    LEVELS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return A_rk, A_rb, A_ak, A_ab, [s, t] float32, summed over PART keys at a time."""
    A_rk = tl.zeros([BT, BT], tl.float32)
    A_rb = tl.zeros([BT, BT], tl.float32)
    A_ak = tl.zeros([BT, BT], tl.float32)
    A_ab = tl.zeros([BT, BT], tl.float32)
    for i_k in range(0, width, PART):
        o_k = i_k + tl.arange(0, PART)
        if LEVELS == 0:
            x_r, x_a, y_k, y_b, _b_c, _b_w = centred_operands(
                r, w, k, a, b, rows, m_read, i_h, o_k, H, K, BT, DOT, PRECISION
            )  # fmt: skip
            b_rk, b_rb, b_ak, b_ab = centred_products(x_r, x_a, y_k, y_b, BT, PRECISION)
        else:
            b_rk, b_rb, b_ak, b_ab = level_products(
                r, w, k, a, b, rows, m_read, i_h, o_k, H, K, BT, LEVELS, DOT, PRECISION
            )  # fmt: skip
        A_rk += b_rk
        A_rb += b_rb
        A_ak += b_ak
        A_ab += b_ab
    return A_rk, A_rb, A_ak, A_ab


@triton.jit(do_not_specialize=["T", "sequences", "width"])
def wkv7_fwd_prepare_kernel(
    r, w, k, v, a, b, order, cu_seqlens, chunk_starts, sequence_of, q, o0, P, N, G, pairs, operands, T, sequences,
    width, H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, PART: tl.constexpr,
    LEVELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store q, o0, P, N, G of one chunk and head; P and N in BK columns at a time.

    For a backward it also stores T, A_rk, A_rb, A_ak as `pairs` [4, BT, BT], and xr, xa, yk, yb (or rin, ain, kout,
    bout) as `operands` [4, BT, K]; else both are None.
    With PART < K, which needs fewer registers, r, k, a and b are read again for PART keys at a time.
    LEVELS is 0 for the centred frame. width equals K, but is a runtime value on purpose: if the compiler knew it, it
    would unroll the loops, and the unrolled turns would compete for registers.
    """
    i_h = tl.program_id(0) % H
    i_c = tl.program_id(0) // H
    i_s = sequence_of_chunk(i_c, T, sequence_of, BT)
    if i_s >= sequences:  # there are fewer chunks than there could be
        return
    rows, m_read, _, _ = rows_of_chunk(i_c, i_s, T, order, cu_seqlens, chunk_starts, BT)
    i_ch = tl.program_id(0).to(tl.int64)

    DOT: tl.constexpr = q.dtype.element_ty
    o_t, o_k = tl.arange(0, BT), tl.arange(0, K)
    if PART < K:
        A_rk, A_rb, A_ak, A_ab = products_by_part(
            r, w, k, a, b, rows, m_read, i_h, width, H, K, BT, PART, LEVELS, DOT, PRECISION
        )  # fmt: skip
    elif LEVELS == 0:
        x_r, x_a, y_k, y_b, _b_c, b_w = centred_operands(
            r, w, k, a, b, rows, m_read, i_h, o_k, H, K, BT, DOT, PRECISION
        )  # fmt: skip
        if BT < 64:
            A_rk, A_rb, A_ak, A_ab = centred_products(x_r, x_a, y_k, y_b, BT, PRECISION)
        else:  # the others once the inverse has left them its registers
            A_ab = centred_product(y_b, x_a, 0, BT, PRECISION)
    else:
        A_rk, A_rb, A_ak, A_ab = level_products(
            r, w, k, a, b, rows, m_read, i_h, o_k, H, K, BT, LEVELS, DOT, PRECISION
        )  # fmt: skip
        x_r, x_a, y_k, y_b = level_operands(
            r, w, k, a, b, rows, m_read, i_h, o_k, H, K, BT, DOT, PRECISION
        )  # fmt: skip
        b_w = finite_log_decay(load_columns(w, rows, m_read, i_h, H, K, o_k))
    if BT < 64:  # in two places: where the inverse leaves no registers for them, and where it does
        A_rk, A_rb = operand(A_rk, DOT, PRECISION), operand(A_rb, DOT, PRECISION)
        A_ak = operand(A_ak, DOT, PRECISION)
    if PART == K:
        tl.store(G + i_ch * K + o_k, tl.sum(b_w, 1))
    b_T = inverse_of_one_minus(A_ab, BT, DOT, PRECISION)
    if BT == 64:
        A_rb = centred_product(y_b, x_r, 1, BT, PRECISION)
        A_ak = centred_product(y_k, x_a, 0, BT, PRECISION)
        A_rk = centred_product(y_k, x_r, 1, BT, PRECISION)
        A_rk, A_rb = operand(A_rk, DOT, PRECISION), operand(A_rb, DOT, PRECISION)
        A_ak = operand(A_ak, DOT, PRECISION)
    if pairs is not None:
        p_A = pairs + i_ch * (4 * BT * BT) + o_t[:, None] * BT + o_t[None, :]
        tl.store(p_A, b_T)
        tl.store(p_A + BT * BT, A_rk)
        tl.store(p_A + 2 * BT * BT, A_rb)
        tl.store(p_A + 3 * BT * BT, A_ak)

    if PART == K:
        if operands is not None:
            p_x = operands + i_ch * (4 * BT * K) + o_t[None, :] * K + o_k[:, None]
            tl.store(p_x, x_r)
            tl.store(p_x + BT * K, x_a)
            tl.store(p_x + 2 * BT * K, y_k)
            tl.store(p_x + 3 * BT * K, y_b)
        W = operand(tl.dot(x_a, b_T, input_precision=PRECISION), DOT, PRECISION)  # [K, BT]
        b_q = tl.dot(W, A_rb, x_r.to(tl.float32), input_precision=PRECISION)
        tl.store(q + (i_ch * BT + o_t)[None, :] * K + o_k[:, None], operand(b_q, DOT, PRECISION))
        for i_k in range(0, K if BK == K else width, BK):
            o_part = i_k + tl.arange(0, BK)
            W_part = W if BK == K else rows_of(W, i_k, BK)
            b_P = tl.dot(y_b, tl.trans(W_part), input_precision=PRECISION)
            tl.store(P + (i_ch * K + o_k)[:, None] * K + o_part[None, :], operand(b_P, DOT, PRECISION))
    else:
        _x_r, _x_a, y_k, y_b = operands_of_keys(
            r, w, k, a, b, rows, m_read, i_h, o_k, H, K, BT, LEVELS, DOT, PRECISION
        )  # fmt: skip
        if operands is not None:
            p_x = operands + i_ch * (4 * BT * K) + o_t[None, :] * K + o_k[:, None]
            tl.store(p_x + 2 * BT * K, y_k)
            tl.store(p_x + 3 * BT * K, y_b)
        for i_k in range(0, width, PART):
            o_part = i_k + tl.arange(0, PART)
            x_r, x_a, _y_k, _y_b = operands_of_keys(
                r, w, k, a, b, rows, m_read, i_h, o_part, H, K, BT, LEVELS, DOT, PRECISION
            )  # fmt: skip
            if operands is not None:
                p_part = operands + i_ch * (4 * BT * K) + o_t[None, :] * K + o_part[:, None]
                tl.store(p_part, x_r)
                tl.store(p_part + BT * K, x_a)
            b_w = finite_log_decay(load_columns(w, rows, m_read, i_h, H, K, o_part))
            tl.store(G + i_ch * K + o_part, tl.sum(b_w, 1))
            W = operand(tl.dot(x_a, b_T, input_precision=PRECISION), DOT, PRECISION)  # [PART, BT]
            b_q = tl.dot(W, A_rb, x_r.to(tl.float32), input_precision=PRECISION)
            tl.store(q + (i_ch * BT + o_t)[None, :] * K + o_part[:, None], operand(b_q, DOT, PRECISION))
            b_P = tl.dot(y_b, tl.trans(W), input_precision=PRECISION)
            tl.store(P + (i_ch * K + o_k)[:, None] * K + o_part[None, :], operand(b_P, DOT, PRECISION))

    for i_v in range(0, K if BK == K else width, BK):
        o_v = i_v + tl.arange(0, BK)
        b_v = load_columns(v, rows, m_read, i_h, H, K, o_v).to(DOT)  # [BK, BT]
        b_u = operand(tl.dot(b_v, A_ak, input_precision=PRECISION), DOT, PRECISION)
        b_u = operand(tl.dot(b_u, b_T, input_precision=PRECISION), DOT, PRECISION)
        b_o = tl.dot(b_v, A_rk, input_precision=PRECISION)
        b_o = tl.dot(b_u, A_rb, b_o, input_precision=PRECISION)
        tl.store(o0 + (i_ch * BT + o_t)[None, :] * K + o_v[:, None], operand(b_o, DOT, PRECISION))
        b_N = tl.dot(y_k, tl.trans(b_v), input_precision=PRECISION)
        b_N = tl.dot(y_b, tl.trans(b_u), b_N, input_precision=PRECISION)
        tl.store(N + (i_ch * K + o_k)[:, None] * K + o_v[None, :], operand(b_N, DOT, PRECISION))


@triton.jit(do_not_specialize=["T", "width"])
def wkv7_fwd_scan_kernel(
    q, o0, P, N, G, initial_state, order, cu_seqlens, chunk_starts, y, states, final_state, T, width,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, CENTRED: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Store y and the final state of one sequence and head in BV columns, chunk after chunk, BK keys per product.

    With `states` the state that each chunk's products read is kept there: S~ in the centred frame, else S.
    """
    i_v = tl.program_id(0) % (K // BV)
    i_h = tl.program_id(0) // (K // BV) % H
    i_s = tl.program_id(0) // (K // BV) // H
    first, start, tokens, length = span_of_sequence(i_s, T, cu_seqlens, chunk_starts, BT)

    DOT: tl.constexpr = q.dtype.element_ty
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, K), i_v * BV + tl.arange(0, BV)
    p_state = (i_s.to(tl.int64) * H + i_h) * K * K + o_k[:, None] * K + o_v[None, :]
    b_S = tl.zeros([K, BV], tl.float32) if initial_state is None else tl.load(initial_state + p_state)
    # A loop's num_stages is for all of its loads, a kernel's only for those that feed products.
    for i_c in tl.range(0, tl.cdiv(length, BT), num_stages=STAGES):
        i_ch = (first + i_c) * H + i_h
        p_q, p_P = q + i_ch * BT * K + o_t[:, None] * K, P + i_ch * K * K + o_k[:, None] * K
        b_o = tl.load(o0 + i_ch * BT * K + o_t[:, None] * K + o_v[None, :]).to(tl.float32)
        p_S = i_ch * K * K + o_k[:, None] * K + o_v[None, :]
        b_N = tl.load(N + p_S).to(tl.float32)
        b_G = tl.load(G + i_ch * K + o_k)[:, None]
        if CENTRED:
            b_half = exp(0.5 * b_G)
            b_S *= b_half
        b_start = operand(b_S, DOT, PRECISION)
        if states is not None:
            tl.store(states + p_S, b_start)
        b_S = b_S + b_N if CENTRED else exp(b_G) * b_S + b_N
        for i_k in range(0, K if BK == K else width, BK):
            o_part = i_k + tl.arange(0, BK)
            b_part = b_start if BK == K else rows_of(b_start, i_k, BK)
            b_o = tl.dot(tl.load(p_q + o_part[None, :]), b_part, b_o, input_precision=PRECISION)
            b_S = tl.dot(tl.load(p_P + o_part[None, :]), b_part, b_S, input_precision=PRECISION)
        if CENTRED:
            b_S *= b_half
        rows, m_read, m_row = chunk_rows(order, tokens, start, i_c * BT, length, BT)
        store_columns(y, tl.trans(b_o), rows, m_read, m_row, order, i_h, H, K, o_v)
    tl.store(final_state + p_state, b_S)


@triton.jit(do_not_specialize=["T"])
def wkv7_fwd_steps_kernel(
    r, w, k, v, a, b, initial_state, order, cu_seqlens, y, final_state, T, H: tl.constexpr, K: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """Store y and the final state of one sequence and head in BV columns, token by token, without tl.dot."""
    i_v = tl.program_id(0) % (K // BV)
    i_h = tl.program_id(0) // (K // BV) % H
    i_s = tl.program_id(0) // (K // BV) // H
    # There are no chunks, so any tensor will do as the table of where they start.
    _, start, tokens, length = span_of_sequence(i_s, T, cu_seqlens, cu_seqlens, 1)

    o_k, o_v = tl.arange(0, K), i_v * BV + tl.arange(0, BV)
    p_state = (i_s.to(tl.int64) * H + i_h) * K * K + o_k[:, None] * K + o_v[None, :]
    b_S = tl.zeros([K, BV], tl.float32) if initial_state is None else tl.load(initial_state + p_state)
    for i_t in range(0, length):
        row = start + i_t
        m_k, m_v = o_k >= 0, o_v >= 0
        if order is not None:
            token = tl.load(order + row)
            m_k, m_v = o_k * 0 + token >= 0, o_v * 0 + token >= 0
            row = tokens + tl.where(token >= 0, token, -1 - token)
        p_k, p_v = (row * H + i_h) * K + o_k, (row * H + i_h) * K + o_v
        b_r = tl.load(r + p_k, mask=m_k, other=0.0).to(tl.float32)
        b_w = tl.load(w + p_k, mask=m_k, other=0.0).to(tl.float32)
        b_k = tl.load(k + p_k, mask=m_k, other=0.0).to(tl.float32)
        b_a = tl.load(a + p_k, mask=m_k, other=0.0).to(tl.float32)
        b_b = tl.load(b + p_k, mask=m_k, other=0.0).to(tl.float32)
        b_v = tl.load(v + p_v, mask=m_v, other=0.0).to(tl.float32)
        b_u = tl.sum(b_a[:, None] * b_S, 0)
        b_S = exp(b_w)[:, None] * b_S + b_b[:, None] * b_u[None, :] + b_k[:, None] * b_v[None, :]
        b_y = tl.sum(b_r[:, None] * b_S, 0)
        tl.store(y + p_v, tl.where(m_v, b_y, 0.0).to(y.dtype.element_ty))
    tl.store(final_state + p_state, b_S)


# --- launches -----------------------------------------------------------------------------------------


def config_of(r: Tensor, min_log_decay: float) -> tuple[Config, int]:
    """Return the launches, and LEVELS: 0 where the centred frame is safe, as its factors reach at most exp(40)."""
    K = int(r.shape[3])  # under torch.compile it may be a symbol
    bounded = -min_log_decay * WKV7[K, r.dtype, True].BT / 2 <= 40
    config = WKV7[K, r.dtype, bounded]
    if launches.architecture(r) != 9:
        config = config._replace(**WKV7_OTHER_GPUS.get((K, r.dtype, bounded), {}))
    return config, 0 if bounded else config.BT.bit_length() - 1


def tokens_of_chunk(config: Config, tokens: int, min_log_decay: float, save: bool) -> int:
    """Return the tokens of a chunk for sequences of so many; `save` as in `wkv7_forward`."""
    bounded = -min_log_decay * config.long / 2 <= 40
    is_longer = config.long and tokens >= launches.LONG and bounded and not save and torch.version.hip is None
    return config.long if is_longer else config.BT


def _outputs(
    r: Tensor, cu_seqlens: Tensor | None, BT: int, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what `wkv7_forward` returns, not written yet."""
    H, K = r.shape[2:]
    sequences, chunks = count(r, cu_seqlens, BT)
    y, final_state = torch.empty_like(r), r.new_empty((sequences, H, K, K), dtype=torch.float32)
    if not save:
        return y, final_state, *(r.new_empty(0) for _ in range(6))  # type: ignore[return-value]
    dtype = precision_of(r).dtype
    return (
        y,
        final_state,
        r.new_empty((chunks, H, BT, K), dtype=dtype),
        r.new_empty((chunks, H, K, K), dtype=dtype),
        r.new_empty((chunks, H, K), dtype=torch.float32),
        r.new_empty((chunks, H, 4, BT, BT), dtype=dtype),
        r.new_empty((chunks, H, 4, BT, K), dtype=dtype),
        r.new_empty((chunks, H, K, K), dtype=dtype),
    )


@torch.library.custom_op(f"{NAMESPACE}::wkv7", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y, the final state and, saved for a backward (else empty), q, P, G, pairs, operands and states."""
    outputs = _outputs(r, cu_seqlens, config_of(r, min_log_decay)[0].BT, save)
    inputs = (r, w, k, v, a, b, initial_state, order, cu_seqlens)
    with on_device_of(r):
        if not save and (r.shape[1] <= MAX_STEPS or not has_matrix_units(r)):
            _forward_in_steps(*inputs, *outputs[:2])
        else:
            _forward_in_chunks(*inputs, min_log_decay, save, *outputs)
    return outputs


def _forward_in_steps(r, w, k, v, a, b, initial_state, order, cu_seqlens, y, final_state) -> None:
    (_, T, H, K), sequences = r.shape, final_state.shape[0]
    BV, num_warps, _ = WKV7_STEPS[K]
    wkv7_fwd_steps_kernel[(sequences * H * (K // BV),)](
        r, w, k, v, a, b, initial_state, order, cu_seqlens, y, final_state, T,
        H=H, K=K, BV=BV, num_warps=num_warps, **serial(),
    )  # fmt: skip


def _forward_in_chunks(
    r,
    w,
    k,
    v,
    a,
    b,
    initial_state,
    order,
    cu_seqlens,
    min_log_decay,
    save,
    y,
    final_state,
    q,
    P,
    G,
    pairs,
    operands,
    states,
) -> None:
    (_, T, H, K), (dtype, PRECISION) = r.shape, precision_of(r)
    config, LEVELS = config_of(r, min_log_decay)
    tokens = r.shape[0] * T // max(1, len(final_state))  # of a sequence, on average
    BT = tokens_of_chunk(config, tokens, min_log_decay, save)
    sequences, chunks = count(r, cu_seqlens, BT)
    chunk_starts, sequence_of = chunk_table(cu_seqlens, T, BT)
    if not save:
        q = r.new_empty((chunks, H, BT, K), dtype=dtype)
        P = r.new_empty((chunks, H, K, K), dtype=dtype)
        G = r.new_empty((chunks, H, K), dtype=torch.float32)
    o0, N = torch.empty_like(q), torch.empty_like(P)

    BK, num_warps, num_stages = config.prepare
    wkv7_fwd_prepare_kernel[(chunks * H,)](
        r, w, k, v, a, b, order, cu_seqlens, chunk_starts, sequence_of, q, o0, P, N, G, pairs if save else None,
        operands if save else None, T, sequences, K, H=H, K=K, BT=BT, BK=BK, PART=config.prepare_part or K,
        LEVELS=LEVELS, PRECISION=PRECISION, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    BV, num_warps, num_stages = config.scan(sequences * H)
    wkv7_fwd_scan_kernel[(sequences * H * (K // BV),)](
        q, o0, P, N, G, initial_state, order, cu_seqlens, chunk_starts, y, states if save else None, final_state,
        T, K, H=H, K=K, BT=BT, BK=config.part or K, BV=BV, CENTRED=LEVELS == 0, PRECISION=PRECISION,
        STAGES=num_stages, num_warps=num_warps, **serial(),
    )  # fmt: skip


@wkv7_forward.register_fake
def _(r, w, k, v, a, b, initial_state, order, cu_seqlens, min_log_decay, save):
    return _outputs(r, cu_seqlens, config_of(r, min_log_decay)[0].BT, save)
