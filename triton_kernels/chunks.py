"""What the chunked WKV kernels share: decayed products, the triangular inverse, chunks and their tables.

Letters as in `visualrwkv_hf.wkv`: B batch, T time, H heads, K / V key / value size of a head, BT tokens of a
chunk, S [K, V] the state. In a kernel D(s, t) stands for exp(w_{s+1} + ... + w_{t-1}), the decay of what token
s wrote until token t reads it.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

HEAD_SIZES = (32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# exp of it is nothing to float32, and sums of it stay far from infinity, which sums of log decays may be.
LOWEST_LOG_DECAY = tl.constexpr(-88.0)


# --- on the host --------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """How a kernel is launched: columns (or keys) of a head per program or turn of its loop, warps, stages."""

    block: int
    num_warps: int
    num_stages: int = 1


class Precision(NamedTuple):
    """How products are formed for inputs of a dtype; they are summed in float32 always.

    Attributes:
        dtype: of operands, and of what one kernel leaves for another.
        dots: `input_precision` of tl.dot where operands are float32.
    """

    dtype: torch.dtype
    dots: str


def precision_of(r: Tensor) -> Precision:
    """bfloat16 as it is; float16 as tf32, which has its bits and does not overflow; float32 in three of those."""
    if r.dtype == torch.bfloat16:
        return Precision(torch.bfloat16, "ieee" if torch.version.hip else "tf32")
    dots = "tf32" if r.dtype == torch.float16 else "tf32x3"
    return Precision(torch.float32, "ieee" if torch.version.hip else dots)


def unsupported(r: Tensor, v: Tensor, gradient: bool = False) -> str:
    """Why these inputs are not for the Triton kernels; empty if they are.

    Args:
        r: [B, T, H, K].
        v: [B, T, H, V].
        gradient: whether one will be asked for.
    """
    K, V = r.shape[-1], v.shape[-1]
    if K != V or K not in HEAD_SIZES:
        return f"head sizes K = V in {HEAD_SIZES} are served, not K = {K} and V = {V}"
    if r.dtype not in DTYPES:
        return f"{r.dtype} is not served"
    if r.device.type != "cuda":
        return "" if interpreted() else f"Triton does not run on {r.device.type}"
    if gradient and not has_matrix_units(r):
        return "gradients need a GPU of compute capability 8.0 or higher"
    return ""


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def has_matrix_units(r: Tensor) -> bool:
    """Whether tl.dot of bfloat16 and tf32 is fast, or there at all, where r is."""
    if r.device.type != "cuda" or torch.version.hip:
        return True
    return torch.cuda.get_device_capability(r.device) >= (8, 0)


def needs_gradient(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def serial() -> dict[str, int]:
    """How a kernel is launched that goes from chunk to chunk or from token to token.

    It has few programs: ptxas should not spill registers for the sake of more of them side by side.
    """
    return {} if torch.version.hip else {"maxnreg": 255}  # AMD's compiler does not know the word


def on_device_of(r: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device(r.device) if r.device.type == "cuda" else nullcontext()


def most_chunks(T: int, sequences: int, BT: int) -> int:
    """The most chunks that this many sequences of T tokens in all can have."""
    return (T + sequences * (BT - 1)) // BT


def chunk_table(cu_seqlens: Tensor | None, T: int, BT: int) -> tuple[Tensor | None, Tensor | None]:
    """Which chunk is whose, worked out on the device, so that the host does not wait for cu_seqlens.

    Args:
        cu_seqlens: where packed sequences begin, and the end, [S + 1]; None for sequences of one length.
        T: tokens of all sequences.
        BT: tokens of a chunk.

    Returns:
        chunk_starts: a sequence's first chunk, int64 [S + 1].
        sequence_of: a chunk's sequence, int64 [most_chunks]; S behind the last chunk.
    """
    if cu_seqlens is None:
        return None, None
    lengths = cu_seqlens.long().diff()
    chunk_starts = pad(((lengths + (BT - 1)) // BT).cumsum(0), (1, 0))
    chunks = torch.arange(most_chunks(T, len(lengths), BT), device=cu_seqlens.device)
    return chunk_starts, torch.searchsorted(chunk_starts, chunks, right=True) - 1


# --- in a kernel --------------------------------------------------------------------------------------


@triton.jit
def operand(x, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """x float32 as an operand of tl.dot. Tensor cores cut what tf32 has no bits for, which shrinks: rounded here."""
    if PRECISION == "tf32" and DOT.is_fp32():
        return tl.where(x == x, _rounded(x, PRECISION), x)
    else:
        return x.to(DOT)


@triton.jit
def _rounded(x, PRECISION: tl.constexpr):
    """x float32, rounded to tf32 if that is read of it. NaN as a GPU makes it, all bits set, then becomes 0."""
    if PRECISION == "tf32":
        bits = x.to(tl.int32, bitcast=True) + 0x1000  # half of the last bit that is read
        return (bits & -0x2000).to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def sums_of(b_w, m_summed, DOT: tl.constexpr, DOTS: tl.constexpr):
    """For every token the sum of the log decays of some: b_w [K, BT], m_summed [BT, BT] -> [K, BT] float32.

    A product with zeros and ones, where a scan would shuffle. Two or three parts of w keep the bits of a sum
    that its exp can show: errors are 2^-17 of the sum for bfloat16, 2^-22 for the others.
    """
    ones = tl.where(m_summed, 1.0, 0.0).to(DOT)
    if DOT.primitive_bitwidth == 16:
        upper = b_w.to(DOT)
        return tl.dot(upper, ones) + tl.dot((b_w - upper.to(tl.float32)).to(DOT), ones)
    else:
        return tl.dot(b_w, ones, input_precision="tf32x3" if DOTS == "tf32" else DOTS)


@triton.jit
def level_decays(b_w, level, BT: tl.constexpr, DOT: tl.constexpr, DOTS: tl.constexpr):
    """Decay to the boundary at which blocks of M = 2^level tokens meet to be blocks of 2 M.

    There a token s of the first half meets a token t of the second: s has decayed to it, t from it. Both
    exponents are sums of log decays, so nothing overflows or cancels:
        decay[s] decay[t] = D(s, t)   for s, t of one block of 2 M, in its first and in its second half.

    Returns:
        decay [K, BT]; m_second [1, BT]: in a second half; m_between [BT, BT]: row is between column and boundary;
        m_meet [BT, BT]: row and column are in the two halves of one block.
    """
    row, col = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    m_second = ((col >> level) & 1) == 1
    m_between = (((row ^ col) >> level) == 0) & ((m_second & (row < col)) | (~m_second & (row > col)))
    decay = tl.exp(sums_of(b_w, m_between, DOT, DOTS))
    return decay, m_second, m_between, ((row ^ col) >> level) == 1


@triton.jit
def rows_of(x, first, N: tl.constexpr):
    """N rows of x [K, D], which is in registers, from the first on: products summed over few need few of those."""
    row = first + tl.arange(0, N)
    return tl.gather(x, tl.broadcast_to(row[:, None], [N, x.shape[1]]), 0)


@triton.jit
def centred(w, BT: tl.constexpr, K: tl.constexpr):
    """Decay factors of a whole chunk, about its middle: rows[t] cols[s] = D(s, t) for s < t.

    For log decays that are known not to be low: a factor reaches exp(-BT / 2 min(w)).

    w: log decay, finite, [BT, K] float32.
    Returns rows [BT, K], cols [BT, K], before [BT, BT]: s < t.
    """
    o_t = tl.arange(0, BT)
    middle = tl.sum(tl.where((o_t < BT // 2)[:, None], w, 0.0), 0)[None, :]
    total = tl.cumsum(w, 0)
    return tl.exp(total - w - middle), tl.exp(middle - total), o_t[:, None] > o_t[None, :]


@triton.jit
def inverse_of_one_minus(A, BT: tl.constexpr, PRECISION: tl.constexpr):
    """(1 - A)^-1 of strictly lower triangular A [BT, BT] float32, by doubling the size of a block.

    With T1, T2 the inverses of two neighbouring blocks, that of both has T2 A21 T1 below the diagonal. Off the
    blocks T is 0, so one product of whole matrices does it for all blocks of a level. (The power series would
    not do: with equal keys the powers of A grow as binomials and cancel.)
    """
    o_t = tl.arange(0, BT)
    row, col = o_t[:, None], o_t[None, :]
    pairs = (row // 2 == col // 2) & (row > col)
    T = tl.where(row == col, 1.0, tl.where(pairs, A, 0.0 * A))  # NaN stays in the sums
    for level in tl.static_range(1, 7):
        if 2**level < BT:
            T = _join_inverses(T, A, BT, 2**level, PRECISION)
    return T


@triton.jit
def _join_inverses(T, A, BT: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr):
    """Inverses of blocks of M -> of blocks of 2 M."""
    row, col = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    A21 = tl.where((row // (2 * M) == col // (2 * M)) & (row // M > col // M), A, 0.0)
    T_rounded = _rounded(T, PRECISION)
    product = tl.dot(T_rounded, _rounded(A21, PRECISION), input_precision=PRECISION)
    return tl.dot(_rounded(product, PRECISION), T_rounded, T, input_precision=PRECISION)


@triton.jit
def chunk_rows(order, tokens, start, i_t, length, BT: tl.constexpr):
    """Which rows of the flattened [B T, ...] a chunk reads.

    order: int64 [B T] or None: position p of a sequence is its token order[p], ~token for a pad.
    tokens: first flattened row that order's numbers count from, int64.
    start: first position of the sequence in order, int64.
    i_t: first position of the chunk in the sequence, whose length is `length`.
    Returns rows int64 [BT]; m_read [BT]: a real token; m_row [BT]: a token or a pad, not past the end.
    """
    # Sums of scalars first, or of vectors: whichever leaves the kernels more registers.
    if order is None:
        o_t = tl.arange(0, BT)
        m_row = o_t < length - i_t
        return start + i_t + o_t, m_row, m_row
    else:  # both ways need a return: what follows one in an `if` is compiled all the same
        o_t = i_t + tl.arange(0, BT)
        m_row = o_t < length
        token = tl.load(order + start + o_t, mask=m_row, other=0)
        m_read = m_row & (token >= 0)
        return tokens + tl.where(token >= 0, token, -1 - token), m_read, m_row


@triton.jit
def span_of_sequence(i_s, T, cu_seqlens, chunk_starts, BT: tl.constexpr):
    """Where a sequence lies: first chunk, first position in order, row its numbers count from, length."""
    if cu_seqlens is None:
        start = i_s.to(tl.int64) * T
        return i_s.to(tl.int64) * tl.cdiv(T, BT), start, start, T
    else:
        start = tl.load(cu_seqlens + i_s).to(tl.int64)
        length = (tl.load(cu_seqlens + i_s + 1).to(tl.int64) - start).to(tl.int32)
        return tl.load(chunk_starts + i_s), start, start * 0, length


@triton.jit
def sequence_of_chunk(i_c, T, sequence_of, BT: tl.constexpr):
    """Whose chunk it is."""
    if sequence_of is None:
        return i_c // tl.cdiv(T, BT)
    else:
        return tl.load(sequence_of + i_c).to(tl.int32)


@triton.jit
def rows_of_chunk(i_c, i_s, T, order, cu_seqlens, chunk_starts, BT: tl.constexpr):
    """`chunk_rows` of chunk i_c, a chunk of sequence i_s, and the row that its numbers count from."""
    first, start, tokens, length = span_of_sequence(i_s, T, cu_seqlens, chunk_starts, BT)
    i_t = (i_c - first).to(tl.int32) * BT
    rows, m_read, m_row = chunk_rows(order, tokens, start, i_t, length, BT)
    return rows, m_read, m_row, tokens


@triton.jit
def load_rows(x, rows, m_rows, i_h, H: tl.constexpr, D: tl.constexpr, o_d):
    """Columns o_d of x [rows, H, D], 0 where masked, [BT, len(o_d)] float32."""
    p_x = x + ((rows * H + i_h) * D)[:, None] + o_d[None, :]
    return tl.load(p_x, mask=m_rows[:, None], other=0.0).to(tl.float32)


@triton.jit
def finite_log_decay(b_w):
    """Log decays as they are, in place of -inf what has the same exp. NaN stays."""
    return tl.maximum(b_w, LOWEST_LOG_DECAY, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_log_decay(w, rows, m_rows, i_h, H: tl.constexpr, D: tl.constexpr, o_d):
    """`load_rows` of log decays, finite."""
    return finite_log_decay(load_rows(w, rows, m_rows, i_h, H, D, o_d))


@triton.jit
def store_rows(x, b_x, rows, m_read, m_row, i_h, H: tl.constexpr, D: tl.constexpr, o_d):
    """The reverse of `load_rows`; 0 into the rows of pads, which are not read but written."""
    p_x = x + ((rows * H + i_h) * D)[:, None] + o_d[None, :]
    tl.store(p_x, tl.where(m_read[:, None], b_x, 0.0).to(x.dtype.element_ty), mask=m_row[:, None])
