"""The backward kernels of `wkv6`: a scan of the states' gradients in reverse, then all chunks' gradients at once.

With the letters of `.wkv6_fwd`, S the state at a chunk's start and dS' the gradient of the state at its end:
    dS = exp(G) dS' + q dy^T                                               (the scan; y = o0 + S^T q)
    dA = v^T dy,  dq = S dy,  dkout = dS' v,  dv = dy A^T + dS'^T kout
    dw_j = exp(G) sum_v S dS' + sum_{t>j} q_t dq_t + sum_{s<j} kout_s dkout_s + [what comes from dA]
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
    level_decays,
    load_columns,
    operand,
    rows_of,
    rows_of_chunk,
    sequence_of_chunk,
    span_of_sequence,
    store_columns,
)
from .launches import NAMESPACE, on_device_of, precision_of, serial
from .wkv6_fwd import config_of, load_log_decays, with_heads_together

# --- kernels ------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T"])
def wkv6_bwd_scan_kernel(
    q, G, dy, dfinal_state, order, cu_seqlens, chunk_starts, dstates, dinitial_state, T, H: tl.constexpr,
    K: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Store dS' of every chunk, and dS at the start, of one sequence and head in BV columns, last chunk first."""
    DOT: tl.constexpr = q.dtype.element_ty
    i_p = tl.program_id(0).to(tl.int64)
    i_v, i_h, i_s = i_p % (K // BV), i_p // (K // BV) % H, i_p // (K // BV) // H
    first, start, tokens, length = span_of_sequence(i_s, T, cu_seqlens, chunk_starts, BT)
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, K), i_v * BV + tl.arange(0, BV)

    p_state = ((i_s * H + i_h) * K + o_k)[:, None] * K + o_v[None, :]
    b_dS = tl.zeros([K, BV], tl.float32) if dfinal_state is None else tl.load(dfinal_state + p_state)
    chunks = tl.cdiv(length, BT)
    for i in tl.range(0, chunks, num_stages=STAGES):
        i_c = chunks - 1 - i
        i_ch = (first + i_c) * H + i_h
        rows, m_read, _ = chunk_rows(order, tokens, start, i_c * BT, length, BT)
        b_q = tl.load(q + (i_ch * BT + o_t)[:, None] * K + o_k[None, :])
        b_dy = operand(load_columns(dy, rows, m_read, i_h, H, K, o_v), DOT, PRECISION)
        b_G = tl.load(G + i_ch * K + o_k)
        tl.store(dstates + (i_ch * K + o_k)[:, None] * K + o_v[None, :], operand(b_dS, DOT, PRECISION))
        b_dS = exp(b_G)[:, None] * b_dS
        b_dS += tl.dot(tl.trans(b_q), tl.trans(b_dy), input_precision=PRECISION)
    tl.store(dinitial_state + p_state, b_dS)


@triton.jit(do_not_specialize=["T", "sequences", "width"])
def wkv6_bwd_gradients_kernel(
    r, w, k, v, u, dy, order, cu_seqlens, chunk_starts, sequence_of, A, G, states, dstates, dr, dw, dk, dv, du,
    stride_w_b, stride_w_t, T, sequences, width, H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the inputs' gradients of one chunk and head, of u by this chunk alone; BV values at a time.

    BK keys at a time for the product over keys. width equals K, but is a runtime value on purpose: if the compiler knew
    it, it would unroll the loops, and the unrolled turns would compete for registers.
    """
    DOT: tl.constexpr = states.dtype.element_ty
    i_ch = tl.program_id(0).to(tl.int64)
    i_c, i_h = i_ch // H, i_ch % H
    i_s = sequence_of_chunk(i_c, T, sequence_of, BT)
    if i_s >= sequences:
        return
    rows, m_read, m_row, tokens = rows_of_chunk(i_c, i_s, T, order, cu_seqlens, chunk_starts, BT)
    i_b = tokens // T
    o_t, o_k = tl.arange(0, BT), tl.arange(0, K)
    row, col = o_t[:, None], o_t[None, :]

    b_k = load_columns(k, rows, m_read, i_h, H, K, o_k)  # [K, BT]
    b_w = load_log_decays(w, rows, m_read, i_b, i_h, T, stride_w_b, stride_w_t, K)
    _b_since_start, b_until_end = chunk_decays(b_w, BT, DOT, PRECISION)
    b_kout = operand(b_k * b_until_end, DOT, PRECISION)
    b_A = tl.trans(tl.load(A + (i_ch * BT + row) * BT + col))

    b_dA = tl.zeros([BT, BT], tl.float32)  # [s, t]
    b_dbonus = tl.zeros([BT], tl.float32)
    b_dr = tl.zeros([K, BT], tl.float32)
    b_dk = tl.zeros([K, BT], tl.float32)
    b_dG = tl.zeros([K], tl.float32)
    for i_v in range(0, width, BV):
        o_v = i_v + tl.arange(0, BV)
        b_v = load_columns(v, rows, m_read, i_h, H, K, o_v)  # [BV, BT]
        b_dy = load_columns(dy, rows, m_read, i_h, H, K, o_v)
        p_S = (i_ch * K + o_k)[:, None] * K + o_v[None, :]
        b_S, b_dS = tl.load(states + p_S), tl.load(dstates + p_S)
        b_dG += tl.sum(b_S.to(tl.float32) * b_dS.to(tl.float32), 1)
        b_dv = tl.dot(operand(b_dy, DOT, PRECISION), b_A, input_precision=PRECISION)
        for i_k in range(0, K if BK == K else width, BK):
            dS_part = b_dS if BK == K else rows_of(b_dS, i_k, BK)
            k_part = b_kout if BK == K else rows_of(b_kout, i_k, BK)
            b_dv = tl.dot(tl.trans(dS_part), k_part, b_dv, input_precision=PRECISION)
        store_columns(dv, b_dv, rows, m_read, m_row, order, i_h, H, K, o_v)
        x_v, x_dy = operand(b_v, DOT, PRECISION), operand(b_dy, DOT, PRECISION)
        b_dA = tl.dot(tl.trans(x_v), x_dy, b_dA, input_precision=PRECISION)
        b_dr = tl.dot(b_S, x_dy, b_dr, input_precision=PRECISION)
        b_dk = tl.dot(b_dS, x_v, b_dk, input_precision=PRECISION)
        b_dbonus += tl.sum(b_dy * b_v, 0)
    b_dA = tl.where(
        row < col, b_dA, tl.trans(b_dA)
    )  # below the diagonal A is 0, so there is room for its transpose

    # Loaded again, not kept: registers are what this kernel is short of.
    if order is None:
        rows, _, _, _ = rows_of_chunk(i_c, i_s, T, order, cu_seqlens, chunk_starts, BT)
    b_r = load_columns(r, rows, m_read, i_h, H, K, o_k)
    b_k = load_columns(k, rows, m_read, i_h, H, K, o_k)
    b_w = load_log_decays(w, rows, m_read, i_b, i_h, T, stride_w_b, stride_w_t, K)
    b_since_start, b_until_end = chunk_decays(b_w, BT, DOT, PRECISION)
    b_dr *= b_since_start
    b_dk *= b_until_end
    m_before = tl.where(row < col, 1.0, 0.0).to(DOT)
    b_dw = tl.dot(operand(b_r * b_dr, DOT, PRECISION), tl.trans(m_before), input_precision=PRECISION)
    b_dw = tl.dot(operand(b_k * b_dk, DOT, PRECISION), m_before, b_dw, input_precision=PRECISION)
    b_dw += (b_dG * exp(tl.load(G + i_ch * K + o_k)))[:, None]
    b_u = tl.load(u + i_h * K + o_k).to(tl.float32)[:, None]
    b_dr += b_u * b_k * b_dbonus[None, :]
    b_dk += b_u * b_r * b_dbonus[None, :]
    tl.store(du + i_ch * K + o_k, tl.sum(b_r * b_k * b_dbonus[None, :], 1))

    # A product of two tokens s < t, x_s = k_s and x_t = r_t decayed to the boundary between their blocks, has crossed
    # the decays between them. w_j gets x_t dx_t of all t after j if j is in the second block, and x_s dx_s of all s
    # before j if it is in the first: sums over what crosses w_j, as small as that has decayed to. Differences of sums
    # over more tokens would leave rounding errors of the largest.
    for level in range(0, LEVELS):
        b_decay, m_second, m_between, m_meet = level_decays(b_w, level, BT, DOT, PRECISION)
        b_x = tl.where(m_second, b_r, b_k) * b_decay
        dA_level = operand(tl.where(m_meet, b_dA, 0.0), DOT, PRECISION)
        b_dx = tl.dot(operand(b_x, DOT, PRECISION), dA_level, input_precision=PRECISION)
        b_dr += tl.where(m_second, b_dx * b_decay, 0.0)
        b_dk += tl.where(m_second, 0.0, b_dx * b_decay)
        m_between = tl.trans(tl.where(m_between, 1.0, 0.0).to(DOT))
        b_dw = tl.dot(operand(b_x * b_dx, DOT, PRECISION), m_between, b_dw, input_precision=PRECISION)
    store_columns(dr, b_dr, rows, m_read, m_row, order, i_h, H, K, o_k)
    store_columns(dw, b_dw, rows, m_read, m_row, order, i_h, H, K, o_k)
    store_columns(dk, b_dk, rows, m_read, m_row, order, i_h, H, K, o_k)


# --- launches -----------------------------------------------------------------------------------------


def _gradients(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what `wkv6_backward` returns, not written yet."""
    (H, K), (sequences, _) = r.shape[2:], count(r, cu_seqlens, 1)
    dr, dw, dk, dv, du = (x.new_empty(x.shape) for x in (r, w, k, v, u))
    return dr, dw, dk, dv, du, r.new_empty((sequences, H, K, K), dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::wkv6_backward", mutates_args=())
def wkv6_backward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    order: Tensor | None,
    cu_seqlens: Tensor | None,
    q: Tensor,
    G: Tensor,
    A: Tensor,
    states: Tensor,
    dy: Tensor | None,
    dfinal_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of r, w (in full), k, v, u and the initial state."""
    (_, T, H, K), PRECISION = r.shape, precision_of(r).dots
    dr, dw, dk, dv, du, dinitial_state = _gradients(r, w, k, v, u, cu_seqlens)
    config, LEVELS = config_of(r)
    BT, (sequences, chunks) = config.BT, count(r, cu_seqlens, config.BT)
    w, (r, k, v, u) = with_heads_together(w), (x.contiguous() for x in (r, k, v, u))
    dfinal_state, order, cu_seqlens = (
        x if x is None else x.contiguous() for x in (dfinal_state, order, cu_seqlens)
    )
    dy = torch.zeros_like(v) if dy is None else dy.contiguous()
    dstates = torch.empty_like(states)
    du_of_chunks = torch.zeros_like(G)  # zeros, because with cu_seqlens there may be fewer chunks
    chunk_starts, sequence_of = chunk_table(cu_seqlens, T, BT)
    with on_device_of(r):
        BV, num_warps, num_stages = config.scan(sequences * H)
        wkv6_bwd_scan_kernel[(sequences * H * (K // BV),)](
            q, G, dy, dfinal_state, order, cu_seqlens, chunk_starts, dstates, dinitial_state, T,
            H=H, K=K, BT=BT, BV=BV, PRECISION=PRECISION, STAGES=num_stages, num_warps=num_warps, **serial(),
        )  # fmt: skip
        BV, num_warps, num_stages = config.gradients
        wkv6_bwd_gradients_kernel[(chunks * H,)](
            r, w, k, v, u, dy, order, cu_seqlens, chunk_starts, sequence_of, A, G, states, dstates,
            dr, dw, dk, dv, du_of_chunks, w.stride(0), w.stride(1), T, sequences, K, H=H, K=K, BT=BT,
            BK=config.part or K, BV=BV, LEVELS=LEVELS, PRECISION=PRECISION, num_warps=num_warps,
            num_stages=num_stages,
        )  # fmt: skip
    du.copy_(du_of_chunks.sum(0))
    return dr, dw, dk, dv, du, dinitial_state


@wkv6_backward.register_fake
def _(r, w, k, v, u, order, cu_seqlens, q, G, A, states, dy, dfinal_state):
    return _gradients(r, w, k, v, u, cu_seqlens)
