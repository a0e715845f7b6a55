"""What the chunked WKV kernels share: chunks and their tables, sums and decays, products, the triangular inverse.

Letters as in `visualrwkv_hf.wkv`: B batch, T time, H heads, K = V key and value size of a head, BT tokens of a chunk,
S [K, V] the state. D(s, t) is exp(w_{s+1} + ... + w_{t-1}), the decay of what token s wrote until token t reads it.

Kernels hold a chunk with its tokens as columns, [K, BT], so that a product has K rows: the tensor cores of recent GPUs
take 64 rows at a time, and a chunk has only 16 to 64 tokens. Matrices over pairs of tokens are [s, t], where s writes
and t reads, so they are upper triangular. Local names: i_ indices, o_ offsets, m_ masks, p_ pointers, b_ blocks in
registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

# In place of -inf. exp of it is 0 for all that float32 can tell, and sums of it are finite.
LOWEST_LOG_DECAY = tl.constexpr(-88.0)


def most_chunks(T: int, sequences: int, BT: int) -> int:
    """Return the largest number of chunks that `sequences` sequences of T tokens in all can have."""
    return (T + sequences * (BT - 1)) // BT


def count(r: Tensor, cu_seqlens: Tensor | None, BT: int) -> tuple[int, int]:
    """Return how many sequences there are, and how many chunks there may be."""
    B, T = r.shape[:2]
    if cu_seqlens is None:
        return B, B * most_chunks(T, 1, BT)
    sequences = cu_seqlens.shape[0] - 1
    return sequences, most_chunks(T, sequences, BT)


def chunk_table(cu_seqlens: Tensor | None, T: int, BT: int) -> tuple[Tensor | None, Tensor | None]:
    """Return which chunk belongs to which sequence; computed on the device, so the host need not wait for cu_seqlens.

    Args:
        cu_seqlens: where packed sequences begin, and the end, [S + 1]; None for sequences of one length.
        T: tokens of all sequences.
        BT: tokens of a chunk.

    Returns:
        chunk_starts: the first chunk of each sequence, int64 [S + 1].
        sequence_of: the sequence of each chunk, int64 [most_chunks]; S after the last chunk.
    """
    if cu_seqlens is None:
        return None, None
    lengths = cu_seqlens.long().diff()
    chunk_starts = pad(((lengths + (BT - 1)) // BT).cumsum(0), (1, 0))
    chunks = torch.arange(most_chunks(T, len(lengths), BT), device=cu_seqlens.device)
    return chunk_starts, torch.searchsorted(chunk_starts, chunks, right=True) - 1


# --- products -----------------------------------------------------------------------------------------


@triton.jit
def operand(b_x, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Round b_x, float32, to an operand of tl.dot; to tf32 as well, to which tensor cores would truncate."""
    if PRECISION == "tf32" and DOT.is_fp32():
        bits = b_x.to(tl.int32, bitcast=True) + 0x1000  # half of the last bit that a tensor core reads
        # A GPU's NaN has all bits set: the addition would carry over into the sign and leave 0.
        return tl.where(b_x == b_x, (bits & -0x2000).to(tl.float32, bitcast=True), b_x)
    else:
        return b_x.to(DOT)


@triton.jit
def sums_of(b_x, weights, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Return sums over tokens with weights 0, 1/2 or 1 of either sign: b_x [K, BT], weights [BT, BT] -> [K, BT].

    A product takes fewer instructions than a scan, which shuffles between threads. And where the weights of a sum are 0
    its terms are absent, while "the sum of all minus the rest" would keep a rounding error of the largest term. Two
    16-bit parts of each term keep its error at 2^-17; float32 operands keep 2^-22.
    """
    if DOT.primitive_bitwidth == 16:
        b_upper = b_x.to(DOT)
        b_lower = (b_x - b_upper.to(tl.float32)).to(DOT)
        return tl.dot(b_lower, weights.to(DOT), tl.dot(b_upper, weights.to(DOT)))
    else:
        return tl.dot(b_x, weights, input_precision="tf32x3" if PRECISION == "tf32" else PRECISION)


@triton.jit
def rows_of(b_x, first, N: tl.constexpr):
    """Return N rows of b_x [K, D], from row `first` on: a product summed over fewer rows needs fewer registers."""
    o_row = first + tl.arange(0, N)
    return tl.gather(b_x, tl.broadcast_to(o_row[:, None], [N, b_x.shape[1]]), 0)


@triton.jit
def inverse_of_one_minus(b_A, BT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Return (1 - A)^-1 as an operand, for strictly upper triangular A [BT, BT], by doubling the size of a block.

    With T1, T2 the inverses of two neighbouring blocks, the inverse of both together has T1 A12 T2 above the diagonal.
    T is 0 outside the blocks, so one product of whole matrices does this for all blocks of a level; what it gives for
    blocks that do not meet is left out. (The power series would not do: with equal keys the powers of A grow as
    binomials and cancel.)
    """
    row, col = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    m_pairs = (row // 2 == col // 2) & (row < col)
    b_T = tl.where(row == col, 1.0, tl.where(m_pairs, b_A, 0.0 * b_A))  # 0 * A passes NaN on
    A = operand(b_A, DOT, PRECISION)
    for level in tl.static_range(1, 7):
        if 2**level < BT:
            m_meet = ((row >> (level + 1)) == (col >> (level + 1))) & ((row >> level) < (col >> level))
            T12 = operand(b_T, DOT, PRECISION)
            b_product = tl.dot(T12, A, input_precision=PRECISION)
            if BT < 64 and DOT.primitive_bitwidth == 16:
                b_product = operand(b_product, DOT, PRECISION)
                b_T = tl.where(m_meet, tl.dot(b_product, T12, input_precision=PRECISION), b_T)
            else:  # the same with more instructions, but there are no registers for a second T
                b_product = operand(tl.where(m_meet, b_product, 0.0), DOT, PRECISION)
                b_T = tl.dot(b_product, T12, b_T, input_precision=PRECISION)
    return operand(b_T, DOT, PRECISION)


# --- decays -------------------------------------------------------------------------------------------


@triton.jit
def exp(b_x):
    """Return exp(b_x), and 0 where that is below the normal numbers of float32.

    tl.exp takes care of these, for which it needs three more instructions of NVIDIA's GPUs than tl.exp2.
    """
    return tl.exp2(b_x * 1.4426950408889634)


@triton.jit
def chunk_decays(b_w, BT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Return the decays from the chunk's start until a token reads, and after a token writes until the end, [K, BT]."""
    row, col = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    b_since_start = sums_of(b_w, tl.where(row < col, 1.0, 0.0), DOT, PRECISION)
    b_until_end = sums_of(b_w, tl.where(row > col, 1.0, 0.0), DOT, PRECISION)
    return exp(b_since_start), exp(b_until_end)


@triton.jit
def centred_log_decays(b_w, BT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Return c [K, BT] float32, c_t = sum_j ([j < t] - 1/2) w_j: the log decay since half of the chunk's has passed.

    exp(c_t) exp(-c_s - w_s) = D(s, t). Both factors are at most exp(-BT / 2 min(w)), so the log decays must be known
    not to be low.
    """
    row, col = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    return sums_of(b_w, tl.where(row < col, 0.5, -0.5), DOT, PRECISION)


@triton.jit
def level_decays(b_w, level, BT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Return the decay to the boundary at which two blocks of M = 2^level tokens meet, for any log decays.

    At this boundary a token s of the first block meets a token t of the second: s has decayed until there, t decays
    from there. Both exponents are sums of log decays, so nothing overflows, and nothing cancels:
        decay[s] decay[t] = D(s, t)   for s, t in the first and the second of two such blocks.

    Returns:
        decay [K, BT]; m_second [1, BT]: the token is in a second block; m_between [BT, BT]: row lies between col and
        the boundary; m_meet [BT, BT]: row and col are in the two blocks of one pair.
    """
    row, col = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    m_second = ((col >> level) & 1) == 1
    m_between = (((row ^ col) >> level) == 0) & ((m_second & (row < col)) | (~m_second & (row > col)))
    b_decay = exp(sums_of(b_w, tl.where(m_between, 1.0, 0.0), DOT, PRECISION))
    return b_decay, m_second, m_between, ((row ^ col) >> level) == 1


# --- rows in memory -----------------------------------------------------------------------------------


@triton.jit
def chunk_rows(order, tokens, start, i_t, length, BT: tl.constexpr):
    """Return the rows of the flattened [B T, ...] that a chunk reads.

    order: int64 [B T] or None: position p of a sequence is its token order[p], ~token for a pad.
    tokens: first flattened row that order's numbers count from, int64.
    start: first position of the sequence in order, int64.
    i_t: first position of the chunk in the sequence, whose length is `length`.
    Returns rows int64 [BT]; m_read [BT]: a real token; m_row [BT]: a token or a pad, not past the end.
    """
    # In each branch the sums are in the order that leaves the kernels more registers.
    if order is None:
        o_t = tl.arange(0, BT)
        m_row = o_t < length - i_t
        return start + i_t + o_t, m_row, m_row
    else:  # not a plain fall-through: Triton compiles what follows an `if` even if that returned
        o_t = i_t + tl.arange(0, BT)
        m_row = o_t < length
        token = tl.load(order + start + o_t, mask=m_row, other=0)
        m_read = m_row & (token >= 0)
        return tokens + tl.where(token >= 0, token, -1 - token), m_read, m_row


@triton.jit
def span_of_sequence(i_s, T, cu_seqlens, chunk_starts, BT: tl.constexpr):
    """Return a sequence's first chunk, first position in order, the row that its numbers count from, and its length."""
    if cu_seqlens is None:
        start = i_s.to(tl.int64) * T
        return i_s.to(tl.int64) * tl.cdiv(T, BT), start, start, T
    else:
        start = tl.load(cu_seqlens + i_s).to(tl.int64)
        length = (tl.load(cu_seqlens + i_s + 1).to(tl.int64) - start).to(tl.int32)
        return tl.load(chunk_starts + i_s), start, start * 0, length


@triton.jit
def sequence_of_chunk(i_c, T, sequence_of, BT: tl.constexpr):
    """Return the sequence that a chunk belongs to."""
    if sequence_of is None:
        return i_c // tl.cdiv(T, BT)
    else:
        return tl.load(sequence_of + i_c).to(tl.int32)


@triton.jit
def rows_of_chunk(i_c, i_s, T, order, cu_seqlens, chunk_starts, BT: tl.constexpr):
    """Return `chunk_rows` of chunk i_c of sequence i_s, and the row that its numbers count from."""
    first, start, tokens, length = span_of_sequence(i_s, T, cu_seqlens, chunk_starts, BT)
    i_t = (i_c - first).to(tl.int32) * BT
    rows, m_read, m_row = chunk_rows(order, tokens, start, i_t, length, BT)
    return rows, m_read, m_row, tokens


@triton.jit
def load_columns(x, rows, m_rows, i_h, H: tl.constexpr, K: tl.constexpr, o_k):
    """Load channels o_k of x [rows, H, K] with tokens as columns, 0 where masked: [len(o_k), BT] float32."""
    p_x = x + ((rows * H + i_h) * K)[:, None] + o_k[None, :]
    return tl.trans(tl.load(p_x, mask=m_rows[:, None], other=0.0).to(tl.float32))


@triton.jit
def finite_log_decay(b_w):
    """Return log decays with -inf replaced by a finite number whose exp is as good as 0. NaN stays."""
    return tl.maximum(b_w, LOWEST_LOG_DECAY, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def store_columns(x, b_x, rows, m_read, m_row, order, i_h, H: tl.constexpr, K: tl.constexpr, o_k):
    """Store b_x [len(o_k), BT], the reverse of `load_columns`, and 0 to the rows of pads, which no chunk reads."""
    p_x = x + ((rows * H + i_h) * K)[:, None] + o_k[None, :]
    b_x = tl.trans(b_x)
    if order is not None:
        b_x = tl.where(m_read[:, None], b_x, 0.0)
    tl.store(p_x, b_x.to(x.dtype.element_ty), mask=m_row[:, None])
