"""The recurrence of RWKV-6 and RWKV-5 in Triton, forward and backward; `visualrwkv_hf.wkv.wkv6` is the plain one.

    y_t = r_t^T (S_{t-1} + diag(u) k_t v_t^T),   S_t = diag(exp(w_t)) S_{t-1} + k_t v_t^T

A chunk that begins with the state S, with D(s, t) and letters as in `.chunks` and sums over the chunk, is
    A[t, s] = r_t^T D(s, t) k_s for s < t,  A[t, t] = r_t^T diag(u) k_t
    r_in_t = r_t exp(sum_{j<t} w_j),  k_out_s = k_s exp(sum_{j>s} w_j),  total = sum_j w_j
    y = A v + r_in S,   S' = diag(exp(total)) S + k_out^T v
What does not ask for S is computed for all chunks at once ("prepare"), what does chunk after chunk, for some
columns of the state at a time ("scan"). Backward likewise: the gradients of all states, chunk after chunk in
reverse ("scan"), then everything else for all chunks at once ("inputs").
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import (
    Launch,
    chunk_rows,
    chunk_table,
    finite_log_decay,
    has_matrix_units,
    level_decays,
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
    sums_of,
)

# Up to here stepping token by token is faster than filling a chunk.
MAX_STEPS = 16
# From so many sequences times heads on, few programs each with many columns fill a GPU.
MANY = 256


class Config(NamedTuple):
    """Launches for one head size and size of operands, for few and for many sequences times heads."""

    prepare: Launch
    inputs: Launch
    scan_few: Launch
    scan_many: Launch


# Tokens of a chunk, by the dtype of operands: what registers hold.
CHUNK_SIZES = {torch.bfloat16: 32, torch.float32: 16}

# (head size, bytes of an operand): the fewest warps that do not spill registers where that can be had.
CONFIGS = {
    (32, 2): Config(Launch(32, 4), Launch(16, 4), Launch(16, 4, 2), Launch(32, 4, 3)),
    (64, 2): Config(Launch(64, 4), Launch(16, 4), Launch(16, 4, 2), Launch(32, 4, 2)),
    (128, 2): Config(Launch(64, 8), Launch(16, 8), Launch(16, 8, 2), Launch(32, 4, 2)),
    (32, 4): Config(Launch(16, 4), Launch(16, 8), Launch(16, 4, 2), Launch(32, 4, 2)),
    (64, 4): Config(Launch(64, 4), Launch(16, 8), Launch(16, 4, 2), Launch(32, 4, 2)),
    (128, 4): Config(Launch(32, 8), Launch(16, 8), Launch(16, 4, 2), Launch(32, 8, 2)),
}
# Keys per turn of the backward's product over keys where all at once would spill registers.
KEYS = {torch.float32: 16}
STEPS = {32: Launch(32, 1), 64: Launch(32, 2), 128: Launch(16, 4)}


def chunk_size_of(r: Tensor) -> int:
    return CHUNK_SIZES[precision_of(r).dtype]


def config_of(r: Tensor) -> Config:
    config = CONFIGS[r.shape[-1], precision_of(r).dtype.itemsize]
    if torch.version.hip is None:
        return config
    # AMD's warps are twice as wide, and have all registers where no more than four share a compute unit.
    return Config(*(launch._replace(num_warps=min(4, launch.num_warps)) for launch in config))


# --- forward ------------------------------------------------------------------------------------------


@triton.jit
def load_log_decays(w, rows, m_read, i_b, i_h, T, stride_b, stride_t, K: tl.constexpr):
    """Rows of w [B, T, H, K], which may be one row repeated; 0, so no decay, where masked. [BT, K] float32."""
    offset = i_b * stride_b + (rows - i_b * T) * stride_t + i_h * K
    b_w = tl.load(w + offset[:, None] + tl.arange(0, K)[None, :], mask=m_read[:, None], other=0.0)
    return finite_log_decay(b_w.to(tl.float32))


# Tokens are columns in what follows, [K, BT]: so the warps share the K rows of every product and of w.


@triton.jit
def chunk_decays(b_w, BT: tl.constexpr, DOT: tl.constexpr, DOTS: tl.constexpr):
    """Decay from the start of the chunk until before a token, and behind the token until the end; [K, BT] each."""
    row, col = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    return tl.exp(sums_of(b_w, row < col, DOT, DOTS)), tl.exp(sums_of(b_w, row > col, DOT, DOTS))


@triton.jit(do_not_specialize=["T", "S"])
def wkv6_fwd_prepare_kernel(
    r,
    w,
    k,
    v,
    u,
    order,
    cu_seqlens,
    chunk_starts,
    sequence_of,
    r_in,
    y_0,
    written,
    total,
    A,
    stride_w_b,
    stride_w_t,
    T,
    S,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    LEVELS: tl.constexpr,
    BV: tl.constexpr,
    DOTS: tl.constexpr,
):
    """What a chunk says by itself: r_in, y_0 = A v, written = k_out^T v, total. One program per chunk and head.

    With `A` its transpose is kept there, of [t, s] at [s, t].
    """
    DOT = r_in.dtype.element_ty
    i_p = tl.program_id(0).to(tl.int64)  # chunks outside, heads inside
    i_c, i_h = i_p // H, i_p % H
    i_s = sequence_of_chunk(i_c, T, sequence_of, BT)
    if i_s >= S:  # there are fewer chunks than could be
        return
    rows, m_read, _, tokens = rows_of_chunk(i_c, i_s, T, order, cu_seqlens, chunk_starts, BT)
    i_b = tokens // T
    o_t, o_k = tl.arange(0, BT), tl.arange(0, K)

    b_r = tl.trans(load_rows(r, rows, m_read, i_h, H, K, o_k))  # [K, BT]
    b_k = tl.trans(load_rows(k, rows, m_read, i_h, H, K, o_k))
    b_w = tl.trans(load_log_decays(w, rows, m_read, i_b, i_h, T, stride_w_b, stride_w_t, K))
    b_u = tl.load(u + i_h * K + o_k).to(tl.float32)
    since_start, until_end = chunk_decays(b_w, BT, DOT, DOTS)
    p_k = (i_p * BT + o_t)[None, :] * K + o_k[:, None]
    tl.store(r_in + p_k, operand(b_r * since_start, DOT, DOTS))
    tl.store(total + i_p * K + o_k, tl.sum(b_w, 1))

    b_bonus = tl.sum(b_r * b_u[:, None] * b_k, 0)  # [BT]
    b_A = tl.zeros([BT, BT], tl.float32)
    for level in range(0, LEVELS):
        decay, m_second, _m_between, m_meet = level_decays(b_w, level, BT, DOT, DOTS)
        b_x = operand(tl.where(m_second, b_r, b_k) * decay, DOT, DOTS)
        b_A += tl.where(m_meet, tl.dot(tl.trans(b_x), b_x, input_precision=DOTS), 0.0)  # symmetric
    row, col = o_t[:, None], o_t[None, :]
    b_A = operand(tl.where(row < col, b_A, 0.0), DOT, DOTS)
    if A is not None:
        b_diagonal = operand(tl.where(row == col, b_bonus[None, :], 0.0), DOT, DOTS)
        tl.store(A + (i_p * BT + row) * BT + col, b_A + b_diagonal)
    b_k_out = operand(b_k * until_end, DOT, DOTS)
    for i_v in range(0, K, BV):
        o_v = i_v + tl.arange(0, BV)
        b_v = tl.trans(load_rows(v, rows, m_read, i_h, H, K, o_v))  # [BV, BT]
        b_y = tl.dot(operand(b_v, DOT, DOTS), b_A, input_precision=DOTS) + b_v * b_bonus[None, :]
        tl.store(y_0 + (i_p * BT + o_t)[None, :] * K + o_v[:, None], b_y.to(DOT))
        b_S = tl.dot(b_k_out, tl.trans(operand(b_v, DOT, DOTS)), input_precision=DOTS)
        tl.store(written + (i_p * K + o_k)[:, None] * K + o_v[None, :], b_S.to(DOT))


@triton.jit(do_not_specialize=["T"])
def wkv6_fwd_scan_kernel(
    r_in,
    y_0,
    written,
    total,
    order,
    cu_seqlens,
    chunk_starts,
    initial_state,
    y,
    final_state,
    states,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    DOTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y = y_0 + r_in S, S <- diag(exp(total)) S + written. One program per sequence, head and BV columns.

    With `states` the state at the start of every chunk is kept there.
    """
    DOT = r_in.dtype.element_ty
    i_p = tl.program_id(0).to(tl.int64)
    i_v, i_h, i_s = i_p % (K // BV), i_p // (K // BV) % H, i_p // (K // BV) // H
    first, start, tokens, length = span_of_sequence(i_s, T, cu_seqlens, chunk_starts, BT)
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, K), i_v * BV + tl.arange(0, BV)

    p_S = ((i_s * H + i_h) * K + o_k)[:, None] * K + o_v[None, :]
    b_S = tl.zeros([K, BV], tl.float32)
    if initial_state is not None:
        b_S += tl.load(initial_state + p_S)
    for i in tl.range(0, tl.cdiv(length, BT), num_stages=STAGES):
        i_c = (first + i) * H + i_h
        rows, m_read, m_row = chunk_rows(order, tokens, start, i * BT, length, BT)
        b_r_in = tl.load(r_in + (i_c * BT + o_t)[:, None] * K + o_k[None, :])
        b_y = tl.load(y_0 + (i_c * BT + o_t)[:, None] * K + o_v[None, :]).to(tl.float32)
        p_c = (i_c * K + o_k)[:, None] * K + o_v[None, :]
        b_written = tl.load(written + p_c)
        b_total = tl.load(total + i_c * K + o_k)
        b_y += tl.dot(b_r_in, operand(b_S, DOT, DOTS), input_precision=DOTS)
        store_rows(y, b_y, rows, m_read, m_row, i_h, H, K, o_v)
        if states is not None:
            tl.store(states + p_c, operand(b_S, DOT, DOTS))
        b_S = tl.exp(b_total)[:, None] * b_S + b_written
    tl.store(final_state + p_S, b_S)


@triton.jit(do_not_specialize=["T"])
def wkv6_fwd_steps_kernel(
    r,
    w,
    k,
    v,
    u,
    order,
    cu_seqlens,
    initial_state,
    y,
    final_state,
    stride_w_b,
    stride_w_t,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    BV: tl.constexpr,
):
    """The recurrence as it stands, token by token. One program per sequence, head and BV columns."""
    i_p = tl.program_id(0).to(tl.int64)
    i_v, i_h, i_s = i_p % (K // BV), i_p // (K // BV) % H, i_p // (K // BV) // H
    _, start, tokens, length = span_of_sequence(i_s, T, cu_seqlens, cu_seqlens, 1)
    i_b = tokens // T
    o_k, o_v = tl.arange(0, K), i_v * BV + tl.arange(0, BV)

    b_u = tl.load(u + i_h * K + o_k).to(tl.float32)
    p_S = ((i_s * H + i_h) * K + o_k)[:, None] * K + o_v[None, :]
    b_S = tl.zeros([K, BV], tl.float32)
    if initial_state is not None:
        b_S += tl.load(initial_state + p_S)
    for i in range(0, length):
        rows, m_read, m_row = chunk_rows(order, tokens, start, i, length, 1)
        b_r = tl.sum(load_rows(r, rows, m_read, i_h, H, K, o_k), 0)  # [K], as there is one row
        b_k = tl.sum(load_rows(k, rows, m_read, i_h, H, K, o_k), 0)
        b_w = tl.sum(load_log_decays(w, rows, m_read, i_b, i_h, T, stride_w_b, stride_w_t, K), 0)
        b_v = load_rows(v, rows, m_read, i_h, H, K, o_v)  # [1, BV]
        b_kv = b_k[:, None] * b_v
        b_y = tl.sum(b_r[:, None] * (b_S + b_u[:, None] * b_kv), 0)
        store_rows(y, b_y[None, :], rows, m_read, m_row, i_h, H, K, o_v)
        b_S = tl.exp(b_w)[:, None] * b_S + b_kv
    tl.store(final_state + p_S, b_S)


# --- backward -----------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T"])
def wkv6_bwd_scan_kernel(
    r_in,
    total,
    order,
    cu_seqlens,
    chunk_starts,
    dy,
    dfinal_state,
    dstates,
    dinitial_state,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    DOTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dS <- diag(exp(total)) dS + r_in^T dy, from the last chunk to the first; `dstates` has dS at a chunk's end.

    One program per sequence, head and BV columns.
    """
    DOT = r_in.dtype.element_ty
    i_p = tl.program_id(0).to(tl.int64)
    i_v, i_h, i_s = i_p % (K // BV), i_p // (K // BV) % H, i_p // (K // BV) // H
    first, start, tokens, length = span_of_sequence(i_s, T, cu_seqlens, chunk_starts, BT)
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, K), i_v * BV + tl.arange(0, BV)

    p_S = ((i_s * H + i_h) * K + o_k)[:, None] * K + o_v[None, :]
    b_dS = tl.zeros([K, BV], tl.float32)
    if dfinal_state is not None:
        b_dS += tl.load(dfinal_state + p_S)
    chunks = tl.cdiv(length, BT)
    for i in tl.range(0, chunks, num_stages=STAGES):
        i_t = chunks - 1 - i
        i_c = (first + i_t) * H + i_h
        rows, m_read, _ = chunk_rows(order, tokens, start, i_t * BT, length, BT)
        b_r_in = tl.load(r_in + (i_c * BT + o_t)[:, None] * K + o_k[None, :])
        b_dy = operand(load_rows(dy, rows, m_read, i_h, H, K, o_v), DOT, DOTS)
        b_total = tl.load(total + i_c * K + o_k)
        tl.store(dstates + (i_c * K + o_k)[:, None] * K + o_v[None, :], operand(b_dS, DOT, DOTS))
        b_dS = tl.exp(b_total)[:, None] * b_dS + tl.dot(tl.trans(b_r_in), b_dy, input_precision=DOTS)
    tl.store(dinitial_state + p_S, b_dS)


@triton.jit(do_not_specialize=["T", "S", "width"])
def wkv6_bwd_inputs_kernel(
    r,
    w,
    k,
    v,
    u,
    order,
    cu_seqlens,
    chunk_starts,
    sequence_of,
    A,
    states,
    total,
    dy,
    dstates,
    dr,
    dw,
    dk,
    dv,
    du,
    stride_w_b,
    stride_w_t,
    T,
    S,
    width,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOTS: tl.constexpr,
):
    """Gradients of r, w, k, v, and of u by the chunk alone. One program per chunk and head.

    width is K, which the compiler must not know: of loops that it unrolls the turns share registers.

    With S and dS' the state at the chunk's start and the gradient of that at its end:
        dA = dy v^T,  dr_in = dy S^T,  dk_out = v dS'^T,  dv = A^T dy + k_out dS'
        dw_j = exp(total) sum_v(S dS') + sum_{t>j} r_in_t dr_in_t + sum_{s<j} k_out_s dk_out_s + [from dA]
    """
    DOT = states.dtype.element_ty
    i_p = tl.program_id(0).to(tl.int64)
    i_c, i_h = i_p // H, i_p % H
    i_s = sequence_of_chunk(i_c, T, sequence_of, BT)
    if i_s >= S:
        return
    rows, m_read, m_row, tokens = rows_of_chunk(i_c, i_s, T, order, cu_seqlens, chunk_starts, BT)
    i_b = tokens // T
    o_t, o_k = tl.arange(0, BT), tl.arange(0, K)

    b_k = tl.trans(load_rows(k, rows, m_read, i_h, H, K, o_k))  # [K, BT]
    b_w = tl.trans(load_log_decays(w, rows, m_read, i_b, i_h, T, stride_w_b, stride_w_t, K))
    _since_start, until_end = chunk_decays(b_w, BT, DOT, DOTS)
    b_k_out = operand(b_k * until_end, DOT, DOTS)
    b_A = tl.trans(tl.load(A + i_p * BT * BT + o_t[:, None] * BT + o_t[None, :]))

    b_dA = tl.zeros([BT, BT], tl.float32)  # rows s, columns t
    b_dbonus = tl.zeros([BT], tl.float32)
    b_dr_in = tl.zeros([K, BT], tl.float32)
    b_dk_out = tl.zeros([K, BT], tl.float32)
    b_dtotal = tl.zeros([K], tl.float32)
    for i_v in range(0, width, BV):
        o_v = i_v + tl.arange(0, BV)
        b_v = tl.trans(load_rows(v, rows, m_read, i_h, H, K, o_v))  # [BV, BT]
        b_dy = tl.trans(load_rows(dy, rows, m_read, i_h, H, K, o_v))
        p_S = (i_p * K + o_k)[:, None] * K + o_v[None, :]
        b_S, b_dS = tl.load(states + p_S), tl.load(dstates + p_S)
        b_dtotal += tl.sum((b_S * b_dS).to(tl.float32), 1)
        b_dv = tl.dot(operand(b_dy, DOT, DOTS), b_A, input_precision=DOTS)
        for i_k in range(0, K if BK == K else width, BK):
            dS_part = b_dS if BK == K else rows_of(b_dS, i_k, BK)
            k_part = b_k_out if BK == K else rows_of(b_k_out, i_k, BK)
            b_dv = tl.dot(tl.trans(dS_part), k_part, b_dv, input_precision=DOTS)
        store_rows(dv, tl.trans(b_dv), rows, m_read, m_row, i_h, H, K, o_v)
        b_dA = tl.dot(tl.trans(operand(b_v, DOT, DOTS)), operand(b_dy, DOT, DOTS), b_dA, input_precision=DOTS)
        b_dr_in = tl.dot(b_S, operand(b_dy, DOT, DOTS), b_dr_in, input_precision=DOTS)
        b_dk_out = tl.dot(b_dS, operand(b_v, DOT, DOTS), b_dk_out, input_precision=DOTS)
        b_dbonus += tl.sum(b_dy * b_v, 0)

    b_dA = tl.where(o_t[:, None] < o_t[None, :], b_dA, tl.trans(b_dA))  # the other half is of no s < t

    # Loaded again, not kept: registers are what this kernel is short of.
    if order is None:
        rows, _, _, _ = rows_of_chunk(i_c, i_s, T, order, cu_seqlens, chunk_starts, BT)
    b_r = tl.trans(load_rows(r, rows, m_read, i_h, H, K, o_k))
    b_k = tl.trans(load_rows(k, rows, m_read, i_h, H, K, o_k))
    b_w = tl.trans(load_log_decays(w, rows, m_read, i_b, i_h, T, stride_w_b, stride_w_t, K))
    since_start, until_end = chunk_decays(b_w, BT, DOT, DOTS)
    b_dr = b_dr_in * since_start
    b_dk = b_dk_out * until_end
    m_before = tl.where(o_t[:, None] < o_t[None, :], 1.0, 0.0).to(DOT)
    b_dw = tl.dot(operand(b_r * b_dr, DOT, DOTS), tl.trans(m_before), input_precision=DOTS)
    b_dw = tl.dot(operand(b_k * b_dk, DOT, DOTS), m_before, b_dw, input_precision=DOTS)
    b_dw += (b_dtotal * tl.exp(tl.load(total + i_p * K + o_k)))[:, None]
    b_u = tl.load(u + i_h * K + o_k).to(tl.float32)[:, None]
    b_dr += b_u * b_k * b_dbonus[None, :]
    b_dk += b_u * b_r * b_dbonus[None, :]
    tl.store(du + i_p * K + o_k, tl.sum(b_r * b_k * b_dbonus[None, :], 1))

    # Where x_s = k_s and x_t = r_t, both decayed, meet, A[t, s] = x_s^T x_t. It has crossed the decays of the
    # tokens between s and t: w_j is given x_t dx_t by all t behind j, if j is in a second half, and x_s dx_s by
    # all s before j, if in a first. These are sums over what crosses j, as small as it has decayed to, where
    # differences of sums over more would leave rounding errors of the largest.
    for level in range(0, LEVELS):
        decay, m_second, m_between, m_meet = level_decays(b_w, level, BT, DOT, DOTS)
        b_x = tl.where(m_second, b_r, b_k) * decay
        b_dA_level = operand(tl.where(m_meet, b_dA, 0.0), DOT, DOTS)
        b_dx = tl.dot(operand(b_x, DOT, DOTS), b_dA_level, input_precision=DOTS)
        b_dr += tl.where(m_second, b_dx * decay, 0.0)
        b_dk += tl.where(m_second, 0.0, b_dx * decay)
        m_between = tl.trans(tl.where(m_between, 1.0, 0.0).to(DOT))
        b_dw = tl.dot(operand(b_x * b_dx, DOT, DOTS), m_between, b_dw, input_precision=DOTS)
    store_rows(dr, tl.trans(b_dr), rows, m_read, m_row, i_h, H, K, o_k)
    store_rows(dw, tl.trans(b_dw), rows, m_read, m_row, i_h, H, K, o_k)
    store_rows(dk, tl.trans(b_dk), rows, m_read, m_row, i_h, H, K, o_k)


# --- launches -----------------------------------------------------------------------------------------


def _heads_together(w: Tensor) -> Tensor:
    """w as it is, be it one row for all tokens, if its heads lie side by side; else a copy."""
    _, _, H, K = w.shape
    return w if w.stride(3) == 1 and (H == 1 or w.stride(2) == K) else w.contiguous()


def _count(r: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """How many sequences there are, and how many chunks there may be."""
    B, T, BT = r.shape[0], r.shape[1], chunk_size_of(r)
    if cu_seqlens is None:
        return B, B * most_chunks(T, 1, BT)
    S = cu_seqlens.shape[0] - 1
    return S, most_chunks(T, S, BT)


def _outputs(
    r: Tensor, cu_seqlens: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `wkv6_forward` returns, not yet written."""
    (_, _, H, K), BT, dtype = r.shape, chunk_size_of(r), precision_of(r).dtype
    S, C = _count(r, cu_seqlens)
    C = C if save else 0
    return (
        torch.empty(r.shape, dtype=r.dtype, device=r.device),
        torch.empty([S, H, K, K], dtype=torch.float32, device=r.device),
        torch.empty([C, H, BT, K], dtype=dtype, device=r.device),
        torch.empty([C, H, K], dtype=torch.float32, device=r.device),
        torch.empty([C, H, BT, BT], dtype=dtype, device=r.device),
        torch.empty([C, H, K, K], dtype=dtype, device=r.device),
    )


@torch.library.custom_op("visualrwkv::wkv6", mutates_args=())
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
    """y and final state; with `save` also r_in, total, A and the states at chunks' starts, which else are empty."""
    outputs = _outputs(r, cu_seqlens, save)
    w, (r, k, v, u) = _heads_together(w), (x.contiguous() for x in (r, k, v, u))
    initial_state, order, cu_seqlens = (
        x if x is None else x.contiguous() for x in (initial_state, order, cu_seqlens)
    )
    with on_device_of(r):
        if not save and (r.shape[1] <= MAX_STEPS or not has_matrix_units(r)):
            _forward_in_steps(r, w, k, v, u, initial_state, order, cu_seqlens, *outputs[:2])
        else:
            _forward_in_chunks(r, w, k, v, u, initial_state, order, cu_seqlens, save, *outputs)
    return outputs


def _forward_in_steps(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    initial_state: Tensor | None,
    order: Tensor | None,
    cu_seqlens: Tensor | None,
    y: Tensor,
    final_state: Tensor,
) -> None:
    _, T, H, K = r.shape
    S, _ = _count(r, cu_seqlens)
    BV, warps, _ = STEPS[K]
    wkv6_fwd_steps_kernel[(S * H * (K // BV),)](
        r, w, k, v, u, order, cu_seqlens, initial_state, y, final_state, w.stride(0), w.stride(1), T,
        H=H, K=K, BV=BV, num_warps=warps, **serial(),
    )  # fmt: skip


def _forward_in_chunks(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    initial_state: Tensor | None,
    order: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
    y: Tensor,
    final_state: Tensor,
    r_in: Tensor,
    total: Tensor,
    A: Tensor,
    states: Tensor,
) -> None:
    _, T, H, K = r.shape
    config, (_, dots) = config_of(r), precision_of(r)
    BT, (S, C) = chunk_size_of(r), _count(r, cu_seqlens)
    chunk_starts, sequence_of = chunk_table(cu_seqlens, T, BT)
    if not save:
        r_in, total = r_in.new_empty([C, H, BT, K]), total.new_empty([C, H, K])
    y_0, written = torch.empty_like(r_in), r_in.new_empty([C, H, K, K])

    BV, warps, stages = config.prepare
    wkv6_fwd_prepare_kernel[(C * H,)](
        r, w, k, v, u, order, cu_seqlens, chunk_starts, sequence_of, r_in, y_0, written, total,
        A if save else None, w.stride(0), w.stride(1), T, S, H=H, K=K, BT=BT, LEVELS=BT.bit_length() - 1, BV=BV,
        DOTS=dots, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    BV, warps, stages = config.scan_many if S * H >= MANY else config.scan_few
    wkv6_fwd_scan_kernel[(S * H * (K // BV),)](
        r_in, y_0, written, total, order, cu_seqlens, chunk_starts, initial_state, y, final_state,
        states if save else None, T, H=H, K=K, BT=BT, BV=BV, DOTS=dots, STAGES=stages, num_warps=warps, **serial(),
    )  # fmt: skip


@wkv6_forward.register_fake
def _(r, w, k, v, u, initial_state, order, cu_seqlens, save):
    return _outputs(r, cu_seqlens, save)


def _gradients(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `wkv6_backward` returns, not yet written."""
    _, _, H, K = r.shape
    dr, dw, dk, dv, du = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (r, w, k, v, u))
    S, _ = _count(r, cu_seqlens)
    return dr, dw, dk, dv, du, torch.empty([S, H, K, K], dtype=torch.float32, device=r.device)


@torch.library.custom_op("visualrwkv::wkv6_backward", mutates_args=())
def wkv6_backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    order: Tensor | None,
    cu_seqlens: Tensor | None,
    r_in: Tensor,
    total: Tensor,
    A: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, w (in full), k, v, u and the initial state from those of y and the final state."""
    _, T, H, K = r.shape
    config, (_, dots) = config_of(r), precision_of(r)
    BT, (S, C) = chunk_size_of(r), _count(r, cu_seqlens)
    dr, dw, dk, dv, du, dinitial_state = _gradients(r, w, k, v, u, cu_seqlens)
    w, (r, k, v, u) = _heads_together(w), (x.contiguous() for x in (r, k, v, u))
    dfinal_state, order, cu_seqlens = (
        x if x is None else x.contiguous() for x in (dfinal_state, order, cu_seqlens)
    )
    dy = torch.zeros_like(v) if dy is None else dy.contiguous()
    dstates = torch.empty_like(states)
    du_of_chunks = torch.zeros_like(total)  # some may not be there, with cu_seqlens
    with on_device_of(r):
        chunk_starts, sequence_of = chunk_table(cu_seqlens, T, BT)
        BV, warps, stages = config.scan_many if S * H >= MANY else config.scan_few
        wkv6_bwd_scan_kernel[(S * H * (K // BV),)](
            r_in, total, order, cu_seqlens, chunk_starts, dy, dfinal_state, dstates, dinitial_state, T,
            H=H, K=K, BT=BT, BV=BV, DOTS=dots, STAGES=stages, num_warps=warps, **serial(),
        )  # fmt: skip
        BV, warps, stages = config.inputs
        BK = KEYS.get(r.dtype, K)
        wkv6_bwd_inputs_kernel[(C * H,)](
            r, w, k, v, u, order, cu_seqlens, chunk_starts, sequence_of, A, states, total, dy, dstates,
            dr, dw, dk, dv, du_of_chunks, w.stride(0), w.stride(1), T, S, K,
            H=H, K=K, BT=BT, LEVELS=BT.bit_length() - 1, BK=BK, BV=BV, DOTS=dots, num_warps=warps,
            num_stages=stages,
        )  # fmt: skip
    du.copy_(du_of_chunks.sum(0))
    return dr, dw, dk, dv, du, dinitial_state


@wkv6_backward.register_fake
def _(dy, dfinal_state, r, w, k, v, u, order, cu_seqlens, r_in, total, A, states):
    return _gradients(r, w, k, v, u, cu_seqlens)


def _save_for_backward(ctx, inputs, output):
    r, w, k, v, u, initial_state, order, cu_seqlens, save = inputs
    _, _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.has_initial_state = initial_state is not None
    if save:
        ctx.save_for_backward(r, w, k, v, u, order, cu_seqlens, *saved)


def _backward(ctx, dy, dfinal_state, *_):
    *gradients, dinitial_state = wkv6_backward(dy, dfinal_state, *ctx.saved_tensors)
    return *gradients, dinitial_state if ctx.has_initial_state else None, None, None, None


wkv6_forward.register_autograd(_backward, setup_context=_save_for_backward)


# --- the op -------------------------------------------------------------------------------------------


def wkv6(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    initial_state: Tensor | None = None,
    order: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`visualrwkv_hf.wkv.wkv6` on a GPU, for head sizes 32, 64 and 128, the same for keys and values.

    Sums are float32. Products have operands of the dtype of r: bfloat16, tf32 for float16 (its 11 bits, and no
    overflow), three times tf32 for float32. Nothing depends on the order in which programs run.

    Args:
        r: receptance, [B, T, H, K], bfloat16, float16 or float32, T >= 1.
        w: log decay, <= 0 and as low as -inf, [B, T, H, K], of any of those dtypes. If it was expanded over B and
            T, as for RWKV-5, it is not written out.
        k: key, [B, T, H, K].
        v: value, [B, T, H, K].
        u: bonus of the current token, [H, K].
        initial_state: S_0, [B, H, K, V] float32; None is zeros.
        order: int64 [B, T]: at position p the recurrence is at token order[b, p] of row b; ~token says that this
            token is a pad, which leaves the state as it is and whose y and gradients are 0. Each token once.
            None is 0, 1, ..., T - 1.
        cu_seqlens: int32 or int64 [S + 1], from 0 to T: with B = 1, where each of S packed sequences begins, and
            the end. Then states are [S, H, K, V], and `order` numbers tokens of all T.

    Returns:
        y [B, T, H, V] in the dtype of r, and S_T [B, H, K, V] in float32.
    """
    save = needs_gradient(r, w, k, v, u, initial_state)
    y, state, *_ = wkv6_forward(r, w, k, v, u, initial_state, order, cu_seqlens, save)
    return y, state
