"""Triton kernels of `few` that embed tokens, given or just chosen as drafts, and their angles. One program for each
row.

Names: `p_` pointer, `o_` offsets, `m_` mask.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from dskernels.model.triton_few import normed_row, reason_against_rows, whole_row
from dskernels.model.triton_steps import contiguous, empty_places, store_places
from dskernels.portable import INTERPRETED, begin_dependent, cast, launch, programmatic

# ---- a row ----------------------------------------------------------------------------------------------------------


@triton.jit
def load_embedding(p_embedding, token, vocabulary, stride_embedding, o_k, m_k):
    """The embedding of a token, 0 if the id is out of range."""
    known = m_k & (token >= 0) & (token < vocabulary)
    return tl.load(p_embedding + token * stride_embedding + o_k, mask=known, other=0.0)


@triton.jit
def store_beside(p_out, x, p_hidden, p_enorm, p_hnorm, i_t, width, stride_hidden, eps, o_k, m_k):
    """The norm of an embedding, and next to it that of the hidden state, as row i_t."""
    dtype: tl.constexpr = p_out.dtype.element_ty
    p_row = p_out + i_t * 2 * width + o_k
    tl.store(p_row, cast(normed_row(x.to(tl.float32), p_enorm, o_k, m_k, width, eps), dtype), mask=m_k)
    hidden = tl.load(p_hidden + i_t * stride_hidden + o_k, mask=m_k, other=0.0).to(tl.float32)
    tl.store(p_row + width, cast(normed_row(hidden, p_hnorm, o_k, m_k, width, eps), dtype), mask=m_k)


@triton.jit
def store_angles(p_cos, p_sin, p_frequencies, i_t, position, pairs, scale, PAIRS: tl.constexpr):
    """cos and sin of a position, as row i_t."""
    o_p = tl.arange(0, PAIRS)
    m_p = o_p < pairs
    angle = position.to(tl.float32) * tl.load(p_frequencies + o_p, mask=m_p, other=0.0)
    if INTERPRETED:
        cos = tl.cos(angle)
        sin = tl.sin(angle)
    else:
        cos = libdevice.cos(angle)
        sin = libdevice.sin(angle)
    tl.store(p_cos + i_t * pairs + o_p, cos * scale, mask=m_p)
    tl.store(p_sin + i_t * pairs + o_p, sin * scale, mask=m_p)


# ---- of tokens ------------------------------------------------------------------------------------------------------


@triton.jit
def embed_kernel(
    p_tokens,
    p_positions,
    p_embedding,
    p_frequencies,
    p_hidden,
    p_enorm,
    p_hnorm,
    p_out,
    p_cos,
    p_sin,
    vocabulary,
    width,
    pairs,
    stride_embedding,
    stride_hidden,
    scale,
    eps,
    BESIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """A token's embedding and angles; with BESIDE, the embedding and the hidden state next to it are normed."""
    begin_dependent(PROGRAMMATIC)
    i_t = tl.program_id(0).to(tl.int64)
    token = tl.load(p_tokens + i_t).to(tl.int64)
    position = tl.load(p_positions + i_t)
    o_k = tl.arange(0, WIDTH)
    m_k = o_k < width
    x = load_embedding(p_embedding, token, vocabulary, stride_embedding, o_k, m_k)
    if BESIDE:
        store_beside(p_out, x, p_hidden, p_enorm, p_hnorm, i_t, width, stride_hidden, eps, o_k, m_k)
    else:
        tl.store(p_out + i_t * width + o_k, x, mask=m_k)
    store_angles(p_cos, p_sin, p_frequencies, i_t, position, pairs, scale, PAIRS)


def embed(
    tokens: Tensor,
    positions: Tensor,
    embedding: Tensor,
    frequencies: Tensor,
    scale: float,
    hidden: Tensor | None,
    enorm: Tensor | None,
    hnorm: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `few.embed` and `few.embed_beside`."""
    rows, (vocabulary, width), pairs = tokens.shape[0], embedding.shape, frequencies.shape[0]
    x = embedding.new_empty(rows, width if hidden is None else 2 * width)
    cos, sin = frequencies.new_empty(rows, pairs), frequencies.new_empty(rows, pairs)
    if rows:
        launch(
            embed_kernel,
            (rows,),
            *(tokens, positions, embedding, frequencies, hidden, enorm, hnorm, x, cos, sin),
            *(vocabulary, width, pairs, embedding.stride(0), 0 if hidden is None else hidden.stride(0), scale, eps),
            BESIDE=hidden is not None,
            **whole_row(width),
            PAIRS=triton.next_power_of_2(pairs),
            **programmatic(embedding),
        )
    return x, cos, sin


def embed_supports(tokens, positions, embedding, frequencies, scale, hidden, enorm, hnorm, eps) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    reason = reason_against_rows(embedding.shape[1], embedding, hidden, enorm, hnorm)
    return reason or contiguous(tokens, positions)


# ---- of drafts ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["j", "drafts", "vocabulary", "pages", "page_size"])
def look_ahead_kernel(
    p_logits,
    p_drafts,
    p_lengths,
    p_active,
    p_block_table,
    p_embedding,
    p_frequencies,
    p_hidden,
    p_enorm,
    p_hnorm,
    p_tokens,
    p_positions,
    p_slots,
    p_seen,
    p_cu_seqlens,
    p_out,
    p_cos,
    p_sin,
    j,
    drafts,
    vocabulary,
    pages,
    page_size,
    width,
    pairs,
    stride_logits,
    stride_embedding,
    stride_hidden,
    scale,
    eps,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """The most likely token of one sequence as its draft j, and the pass that takes it in."""
    begin_dependent(PROGRAMMATIC)
    i_b = tl.program_id(0).to(tl.int64)
    o_v = tl.arange(0, BLOCK)
    best = tl.full([], -float("inf"), tl.float32)
    token = tl.zeros([], tl.int32)
    for start in range(0, vocabulary, BLOCK):
        x = tl.load(p_logits + i_b * stride_logits + start + o_v, mask=start + o_v < vocabulary, other=-float("inf"))
        x = x.to(tl.float32)
        most = tl.max(x, axis=0)
        first = tl.min(tl.where(x == most, start + o_v, vocabulary), axis=0)
        token = tl.where((most > best) & (first < vocabulary), first, token)
        best = tl.maximum(best, most)
    token = token.to(tl.int64)
    tl.store(p_drafts + i_b * drafts + j, token)
    length = tl.load(p_lengths + i_b) + (j + 1) * tl.load(p_active + i_b)
    store_places(
        p_tokens, p_positions, p_slots, p_seen, p_cu_seqlens, p_block_table, token, length, 1, 1, pages, page_size, 1
    )
    o_k = tl.arange(0, WIDTH)
    m_k = o_k < width
    row = load_embedding(p_embedding, token, vocabulary, stride_embedding, o_k, m_k)
    store_beside(p_out, row, p_hidden, p_enorm, p_hnorm, i_b, width, stride_hidden, eps, o_k, m_k)
    store_angles(p_cos, p_sin, p_frequencies, i_b, length.to(tl.int64) - 1, pairs, scale, PAIRS)


def look_ahead(
    logits: Tensor,
    drafts: Tensor,
    j: int,
    lengths: Tensor,
    active: Tensor,
    block_table: Tensor,
    page_size: int,
    embedding: Tensor,
    frequencies: Tensor,
    scale: float,
    hidden: Tensor,
    enorm: Tensor,
    hnorm: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    """See `few.look_ahead`."""
    rows, (vocabulary, width), pairs = logits.shape[0], embedding.shape, frequencies.shape[0]
    places = empty_places(drafts, lengths, 1)
    x = embedding.new_empty(rows, 2 * width)
    cos, sin = frequencies.new_empty(rows, pairs), frequencies.new_empty(rows, pairs)
    if rows:
        launch(
            look_ahead_kernel,
            (rows,),
            *(logits, drafts, lengths, active, block_table, embedding, frequencies, hidden, enorm, hnorm),
            *(*places, x, cos, sin),
            *(j, drafts.shape[1], vocabulary, block_table.shape[1], page_size, width, pairs),
            *(logits.stride(0), embedding.stride(0), hidden.stride(0), scale, eps),
            BLOCK=min(4096, triton.next_power_of_2(vocabulary)),
            **whole_row(width),
            PAIRS=triton.next_power_of_2(pairs),
            **programmatic(embedding),
        )
    return *places, x, cos, sin


def look_ahead_supports(
    logits, drafts, j, lengths, active, block_table, page_size, embedding, frequencies, scale, hidden, enorm, hnorm, eps
) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    reason = reason_against_rows(embedding.shape[1], embedding, logits, hidden, enorm, hnorm)
    return reason or contiguous(drafts, lengths, active, block_table)
