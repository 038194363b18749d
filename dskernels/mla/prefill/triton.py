"""Portable Triton kernel of MLA prefill: flash attention over packed sequences of different lengths.

A program takes a tile of BLOCK_M queries of one sequence and one head, and loops over the keys that any of them sees;
only blocks that some of them see partly are masked. A head's key has two parts, A and B: 192 = 128 + 64 needs no
padding to 256, and B may be the rope part that all heads share.

The host knows how many tokens and sequences there are, but not where a sequence ends. So the grid has a tile for every
BLOCK_M tokens and one more for every sequence, and a program finds out which tile it is by bisection of cu_seqlens.

Names: `p_` pointer, `i_` index of a tile, token or head, `o_` offsets, `m_` mask. Shapes in comments: M queries, N
keys; A, B and V are the padded widths of the parts of the key and of the value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.mla.decode.triton import architecture
from dskernels.mla.merge.triton import merge_onto
from dskernels.mla.prefill.config import choose_config, key_parts, padded
from dskernels.portable import cast, dot, launch

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)

# ---- steps, shared with the gradient --------------------------------------------------------------------------------


@triton.jit
def edge(p_cu, i, sequences, tokens):
    """Edge `i` of the spans that divide [0, tokens): 0, then the sequences + 1 values of cu_seqlens, then tokens.

    Span 0 lies before the first sequence (and is empty if cu_seqlens is valid), span i is the i-th sequence, and the
    last span lies after all of them. Whatever cu_seqlens contains, an edge is within [0, tokens].
    """
    inside = tl.minimum(tl.maximum(i - 1, 0), sequences)
    value = tl.minimum(tl.maximum(tl.load(p_cu + inside), 0), tokens)
    return tl.where(i <= 0, 0, tl.where(i > sequences + 1, tokens, value))


@triton.jit
def find_tile(p_cu, i_tile, sequences, tokens, BLOCK: tl.constexpr):
    """(span, first token of the span, its length, first token of the tile in the span) of tile `i_tile`.

    The first tile of a span has the number edge // BLOCK + span. This leaves every span at least the tiles that it
    needs, and each of the tokens // BLOCK + sequences + 2 tiles belongs to a span; superfluous ones begin at its end or
    later.
    """
    low = 0
    high = sequences + 2
    while high - low > 1:
        middle = (low + high) // 2
        before = edge(p_cu, middle, sequences, tokens) // BLOCK + middle <= i_tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    start = edge(p_cu, low, sequences, tokens)
    end = edge(p_cu, low + 1, sequences, tokens)
    return low, start, end - start, (i_tile - start // BLOCK - low) * BLOCK


@triton.jit
def sequence_of(p_cu, i_span, sequences, tokens):
    """(first token, length) of the sequence of a span; the first and the last span have no sequence, so length 0."""
    start = edge(p_cu, i_span, sequences, tokens)
    end = edge(p_cu, i_span + 1, sequences, tokens)
    return start, tl.where((i_span >= 1) & (i_span <= sequences), tl.maximum(end - start, 0), 0)


@triton.jit
def keys_seen(i_m, q_length, k_length, CAUSAL: tl.constexpr):
    """How many keys query `i_m` of a sequence sees: the last query all of them, each earlier one one fewer."""
    if CAUSAL:
        return tl.minimum(tl.maximum(k_length - q_length + 1 + i_m, 0), k_length)
    return k_length + 0 * i_m


@triton.jit
def load_rows(p_x, stride, m_row, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """ROWS rows of WIDTH elements, padded to BLOCK columns; masked rows are zero, since 0 * NaN would be NaN."""
    o_c = tl.arange(0, BLOCK)
    p_rows = p_x + tl.arange(0, ROWS).to(tl.int64)[:, None] * stride + o_c[None, :]
    if WIDTH == BLOCK:
        return tl.load(p_rows, mask=m_row[:, None], other=0.0)
    return tl.load(p_rows, mask=m_row[:, None] & (o_c < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(p_x, x, stride, m_row, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store fp32 `x` to rows of WIDTH elements, rounded to their dtype."""
    o_c = tl.arange(0, BLOCK)
    p_rows = p_x + tl.arange(0, ROWS).to(tl.int64)[:, None] * stride + o_c[None, :]
    tl.store(p_rows, cast(x, p_x.dtype.element_ty), mask=m_row[:, None] & (o_c < WIDTH)[None, :])


# ---- kernel ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tokens_q", "tokens_k", "sequences"])
def forward_kernel(
    p_q,
    p_k,
    p_kb,
    p_v,
    p_cu_q,
    p_cu_k,
    p_out,
    p_lse,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_kbt,
    stride_kbh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    tokens_q,
    tokens_k,
    sequences,
    group,
    scale_log2,
    CAUSAL: tl.constexpr,
    WIDTH_A: tl.constexpr,
    WIDTH_B: tl.constexpr,
    WIDTH_V: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Output and log-sum-exp of a tile (program 0) of queries of a head (program 1); `group` heads share a key."""
    # The last tiles of a causal sequence see the most keys, so they start first.
    i_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    i_span, q_start, q_length, i_m = find_tile(p_cu_q, i_tile, sequences, tokens_q, BLOCK_M)
    if i_m >= q_length:
        return
    k_start, k_length = sequence_of(p_cu_k, i_span, sequences, tokens_k)

    i_q = (q_start + i_m).to(tl.int64)
    k_start = k_start.to(tl.int64)
    p_k += k_start * stride_kt + i_h // group * stride_kh
    p_kb += k_start * stride_kbt + i_h // group * stride_kbh
    p_v += k_start * stride_vt + i_h // group * stride_vh
    o_m = i_m + tl.arange(0, BLOCK_M)
    m_m = o_m < q_length
    # [M, A], [M, B]
    p_q += i_q * stride_qt + i_h * stride_qh
    q_a = load_rows(p_q, stride_qt, m_m, BLOCK_M, WIDTH_A, BLOCK_A)
    if WIDTH_B > 0:
        q_b = load_rows(p_q + WIDTH_A, stride_qt, m_m, BLOCK_M, WIDTH_B, BLOCK_B)

    seen = keys_seen(o_m, q_length, k_length, CAUSAL)
    by_all = keys_seen(i_m, q_length, k_length, CAUSAL)
    by_any = keys_seen(tl.minimum(i_m + BLOCK_M, q_length) - 1, q_length, k_length, CAUSAL)
    total = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    for i_n in range(0, by_any, BLOCK_N):
        i_k = tl.cast(i_n, tl.int64)
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < k_length
        # [N, A], [N, B], and the scores [M, N] in units of log 2
        k_a = load_rows(p_k + i_k * stride_kt, stride_kt, m_n, BLOCK_N, WIDTH_A, BLOCK_A)
        score = dot(q_a, tl.trans(k_a))
        if WIDTH_B > 0:
            k_b = load_rows(p_kb + i_k * stride_kbt, stride_kbt, m_n, BLOCK_N, WIDTH_B, BLOCK_B)
            score += dot(q_b, tl.trans(k_b))
        score *= scale_log2
        if i_n + BLOCK_N > by_all:
            score = tl.where(o_n[None, :] < seen[:, None], score, float("-inf"))
        larger = tl.maximum(largest, tl.max(score, 1))
        # A query that has seen nothing has no largest score yet: -inf - (-inf) would be NaN.
        base = tl.where(larger == float("-inf"), 0.0, larger)
        p = tl.exp2(score - base[:, None])
        shrink = tl.exp2(largest - base)
        weight = weight * shrink + tl.sum(p, 1)
        # [N, V]
        v = load_rows(p_v + i_k * stride_vt, stride_vt, m_n, BLOCK_N, WIDTH_V, BLOCK_V)
        total = total * shrink[:, None] + dot(cast(p, v.dtype), v)
        largest = larger

    # Nothing seen: 0 and -inf. NaN is not equal to 0 and passes through.
    divisor = tl.where(weight == 0, 1.0, weight)
    lse = tl.where(weight == 0, float("-inf"), largest * LN_2 + tl.log(divisor))
    p_out += i_q * stride_ot + i_h * stride_oh
    store_rows(p_out, total / divisor[:, None], stride_ot, m_m, BLOCK_M, WIDTH_V, BLOCK_V)
    tl.store(p_lse + i_h * tokens_q + i_q + tl.arange(0, BLOCK_M), lse, mask=m_m)


# ---- launcher -------------------------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """The two parts of the key, and the widths, in the form that the kernels take.

    Attributes:
        keys: part A and part B (any tensor, if there is none).
        strides: of a token and of a head, in A and then in B; 0 for the heads of a shared B.
        widths: of A, B and the value; 0 if there is no B.
        blocks: the padded widths.
    """

    keys: tuple[Tensor, Tensor]
    strides: tuple[int, int, int, int]
    widths: tuple[int, int, int]
    blocks: tuple[int, int, int]

    @classmethod
    def of(cls, q: Tensor, k: Tensor, k_rope: Tensor | None, v: Tensor) -> Parts:
        """Divide the key."""
        a, b = key_parts(q.shape[2], 0 if k_rope is None else k_rope.shape[1])
        part_b = k_rope[:, None] if k_rope is not None else k[:, :, a:] if b else k
        stride_h = 0 if k_rope is not None else k.stride(1)
        strides = (k.stride(0), k.stride(1), part_b.stride(0), stride_h)
        return cls((k, part_b), strides, (a, b, v.shape[2]), (padded(a), padded(b), padded(v.shape[2])))

    def constants(self) -> dict[str, int]:
        """The widths under the names that they have in the kernels."""
        names = ("WIDTH_A", "WIDTH_B", "WIDTH_V", "BLOCK_A", "BLOCK_B", "BLOCK_V")
        return dict(zip(names, self.widths + self.blocks, strict=True))


def mla_prefill(
    q: Tensor,
    k: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    causal: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Attention output [T, H, V] and log-sum-exp [H, T]."""
    tokens, heads, _ = q.shape
    out = q.new_empty((tokens, heads, v.shape[2]), dtype=out_dtype)
    lse = q.new_empty((heads, tokens), dtype=torch.float32)
    _launch(q, k, k_rope, v, cu_q, cu_k, scale, causal, out, lse)
    return out, lse


def _launch(
    q: Tensor,
    k: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    causal: bool,
    out: Tensor,
    lse: Tensor,
) -> None:
    tokens, heads, _ = q.shape
    if tokens == 0 or heads == 0:
        return
    parts = Parts.of(q, k, k_rope, v)
    config = choose_config("forward", parts.blocks, q.element_size(), architecture(q.device))
    sequences = cu_q.shape[0] - 1
    launch(
        forward_kernel,
        (tokens // config.block_m + sequences + 2, heads),
        q,
        *parts.keys,
        v,
        cu_q,
        cu_k,
        out,
        lse,
        *q.stride()[:2],
        *parts.strides,
        *v.stride()[:2],
        *out.stride()[:2],
        tokens,
        k.shape[0],
        sequences,
        heads // k.shape[1],
        scale * LOG2_E.value,
        CAUSAL=causal,
        **parts.constants(),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def mla_prefill_supports(q: Tensor, k: Tensor, k_rope: Tensor | None, v: Tensor, *rest: object) -> str | None:
    """Why the kernels do not take these arguments, or None."""
    if q.dtype == torch.float64:
        return "float64 runs on the reference only"
    if max(q.shape[2], v.shape[2]) > 256:
        return f"it takes head dimensions up to 256, not {q.shape[2]} and {v.shape[2]}"
    blocks = Parts.of(q, k, k_rope, v).blocks
    if sum(blocks) > 512:
        return f"it takes 512 columns of key and value, not {' + '.join(map(str, blocks))}, as they are when padded"
    return None


def mla_prefill_some(
    q: Tensor,
    k: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Causal attention of some heads: their part of `out` [T, H, V], whose rows contain all heads, and of `lse` [H,
    T]."""
    _launch(q, k, k_rope, v, cu_q, cu_k, scale, True, out, lse)


def mla_prefill_some_supports(
    q: Tensor,
    k: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> str | None:
    """Why the kernels do not take these arguments, or None."""
    if out.stride(2) != 1 or not lse.is_contiguous():
        return f"rows of out, and all of lse, must be contiguous, their strides are {out.stride()} and {lse.stride()}"
    return mla_prefill_supports(q, k, k_rope, v)


def mla_prefill_onto(
    q: Tensor,
    k: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Merge attention to these keys, not causal, into contiguous `out` [T, H, V] and `lse` [H, T]."""
    merge_onto(out, lse, *mla_prefill(q, k, k_rope, v, cu_q, cu_k, scale, False, out.dtype))


def mla_prefill_onto_supports(
    q: Tensor,
    k: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> str | None:
    """Why the kernels do not take these arguments, or None."""
    if not out.is_contiguous() or not lse.is_contiguous():
        return f"out and lse must be contiguous, their strides are {out.stride()} and {lse.stride()}"
    return mla_prefill_supports(q, k, k_rope, v)
