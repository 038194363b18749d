"""Triton kernels of `few`. A program has some columns of the result and all rows, of which there are a handful.

Names: `p_` pointer, `o_` offsets, `m_` mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from dskernels.model.triton_steps import store_places
from dskernels.portable import INTERPRETED, begin_dependent, cast, launch, programmatic
from dskernels.validate import ceil_div

SINGLE_OR_HALF = (torch.bfloat16, torch.float16, torch.float32)
MOST_ROWS, MOST_WIDTH = 8, 8192
ROWS_BY_COLUMNS, MOST_BLOCK_K = 8, 512  # of a tile that is multiplied at a time: a chip has more programs than work


@triton.jit
def load_stream(p_x, p_update, o_r, o_k, mask, stride_x, stride_update, UPDATE: tl.constexpr):
    """Rows of x + update, fp32 but rounded as the stream is."""
    x = tl.load(p_x + o_r[:, None] * stride_x + o_k[None, :], mask=mask, other=0.0).to(tl.float32)
    if UPDATE:
        more = tl.load(p_update + o_r[:, None] * stride_update + o_k[None, :], mask=mask, other=0.0)
        x = cast(x + more.to(tl.float32), p_x.dtype.element_ty).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["rows"])
def products_kernel(
    p_x,
    p_update,
    p_norm,
    p_weight,
    p_second,
    p_out,
    p_stream,
    p_normed,
    rows,
    K,
    N,
    N_second,
    stride_x,
    stride_update,
    stride_weight,
    stride_second,
    eps,
    UPDATE: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    NORMED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """COLUMNS columns of h @ weight.T, or of h @ second.T behind those; h is the norm of x + update, or a SwiGLU of x,
    or x. The first program also stores x + update and h, where that is wanted.

    WHOLE: K is not more than BLOCK_K. Then the weights, which no kernel of a step writes, are on their way before the
    kernel in front has ended.
    """
    o_r = tl.arange(0, ROWS).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    m_r = (o_r < rows)[:, None]
    dtype: tl.constexpr = p_x.dtype.element_ty
    tiles = tl.cdiv(N, COLUMNS)
    i_n = tl.program_id(0)
    o_n = i_n * COLUMNS + tl.arange(0, COLUMNS)
    p_rows = p_weight + o_n.to(tl.int64)[:, None] * stride_weight
    n = N
    before = 0
    if i_n >= tiles:
        o_n -= tiles * COLUMNS
        p_rows = p_second + o_n.to(tl.int64)[:, None] * stride_second
        n = N_second
        before = N
    m_n = o_n < n
    if WHOLE:
        weight = tl.load(p_rows + o_k[None, :], mask=m_n[:, None] & (o_k < K)[None, :], other=0.0)
    begin_dependent(PROGRAMMATIC)

    inverse = tl.full([ROWS], 1.0, tl.float32)
    if NORM:
        squares = tl.zeros([ROWS], tl.float32)
        for start in range(0, K, BLOCK_K):
            x = load_stream(p_x, p_update, o_r, start + o_k, m_r & (start + o_k < K), stride_x, stride_update, UPDATE)
            squares += tl.sum(x * x, axis=1)
        inverse = 1.0 / tl.sqrt(squares / K + eps)

    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, K, BLOCK_K):
        m_k = start + o_k < K
        if not WHOLE:
            weight = tl.load(p_rows + (start + o_k)[None, :], mask=m_n[:, None] & m_k[None, :], other=0.0)
        h = load_stream(p_x, p_update, o_r, start + o_k, m_r & m_k[None, :], stride_x, stride_update, UPDATE)
        p_tile = o_r[:, None] * K + (start + o_k)[None, :]
        if UPDATE:
            tl.store(p_stream + p_tile, cast(h, dtype), mask=m_r & m_k[None, :] & (i_n == 0))
        if GATED:
            p_up = p_x + o_r[:, None] * stride_x + K + (start + o_k)[None, :]
            up = tl.load(p_up, mask=m_r & m_k[None, :], other=0.0).to(tl.float32)
            h = cast(cast(h * tl.sigmoid(h), dtype).to(tl.float32) * up, dtype).to(tl.float32)
        if NORM:
            scale = tl.load(p_norm + start + o_k, mask=m_k, other=0.0).to(tl.float32)
            h = cast(h * inverse[:, None] * scale[None, :], dtype).to(tl.float32)
        if NORMED:
            tl.store(p_normed + p_tile, cast(h, dtype), mask=m_r & m_k[None, :] & (i_n == 0))
        total += tl.sum(h[:, None, :] * weight.to(tl.float32)[None, :, :], axis=2)
    p_out += o_r[:, None] * (N + N_second) + before + o_n[None, :]
    tl.store(p_out, cast(total, dtype), mask=m_r & m_n[None, :])


@triton.jit
def add_norm_kernel(
    p_x,
    p_update,
    p_norm,
    p_stream,
    p_normed,
    width,
    stride_x,
    stride_update,
    eps,
    WIDTH: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """One row of x + update and of its norm."""
    begin_dependent(PROGRAMMATIC)
    i_r = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, WIDTH)
    m_k = o_k < width
    dtype: tl.constexpr = p_x.dtype.element_ty
    x = tl.load(p_x + i_r * stride_x + o_k, mask=m_k, other=0.0).to(tl.float32)
    x += tl.load(p_update + i_r * stride_update + o_k, mask=m_k, other=0.0).to(tl.float32)
    x = cast(x, dtype)
    tl.store(p_stream + i_r * width + o_k, x, mask=m_k)
    normed = normed_row(x.to(tl.float32), p_norm, o_k, m_k, width, eps)
    tl.store(p_normed + i_r * width + o_k, cast(normed, dtype), mask=m_k)


@triton.jit
def normed_row(x, p_norm, o_k, m_k, width, eps):
    """The norm of a row, which is 0 beyond its width."""
    scale = tl.load(p_norm + o_k, mask=m_k, other=0.0).to(tl.float32)
    return x * (1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)) * scale


@triton.jit
def store_embedded(
    p_embedding,
    p_frequencies,
    p_hidden,
    p_enorm,
    p_hnorm,
    p_out,
    p_cos,
    p_sin,
    i_t,
    token,
    position,
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
):
    """A token's embedding and angles as row i_t; with BESIDE both it and the hidden state behind it are normed."""
    o_k = tl.arange(0, WIDTH)
    m_k = o_k < width
    dtype: tl.constexpr = p_out.dtype.element_ty
    known = m_k & (token >= 0) & (token < vocabulary)
    x = tl.load(p_embedding + token * stride_embedding + o_k, mask=known, other=0.0)
    if BESIDE:
        p_row = p_out + i_t * 2 * width + o_k
        tl.store(p_row, cast(normed_row(x.to(tl.float32), p_enorm, o_k, m_k, width, eps), dtype), mask=m_k)
        hidden = tl.load(p_hidden + i_t * stride_hidden + o_k, mask=m_k, other=0.0).to(tl.float32)
        tl.store(p_row + width, cast(normed_row(hidden, p_hnorm, o_k, m_k, width, eps), dtype), mask=m_k)
    else:
        tl.store(p_out + i_t * width + o_k, x, mask=m_k)
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
    """See `store_embedded`."""
    begin_dependent(PROGRAMMATIC)
    i_t = tl.program_id(0).to(tl.int64)
    token = tl.load(p_tokens + i_t).to(tl.int64)
    position = tl.load(p_positions + i_t)
    store_embedded(
        p_embedding,
        p_frequencies,
        p_hidden,
        p_enorm,
        p_hnorm,
        p_out,
        p_cos,
        p_sin,
        i_t,
        token,
        position,
        vocabulary,
        width,
        pairs,
        stride_embedding,
        stride_hidden,
        scale,
        eps,
        BESIDE,
        WIDTH,
        PAIRS,
    )


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
    store_embedded(
        p_embedding,
        p_frequencies,
        p_hidden,
        p_enorm,
        p_hnorm,
        p_out,
        p_cos,
        p_sin,
        i_b,
        token,
        length.to(tl.int64) - 1,
        vocabulary,
        width,
        pairs,
        stride_embedding,
        stride_hidden,
        scale,
        eps,
        True,
        WIDTH,
        PAIRS,
    )


# ---- launchers ------------------------------------------------------------------------------------------------------


def products(
    x: Tensor,
    update: Tensor | None,
    norm: Tensor | None,
    weight: Tensor,
    second: Tensor | None,
    eps: float,
    gated: bool,
    with_normed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `few.products`."""
    rows, (n, k) = x.shape[0], weight.shape
    n_second = 0 if second is None else second.shape[0]
    out = x.new_empty(rows, n + n_second)
    stream, normed = (
        x.new_empty(rows, k) if wanted else x.new_empty(0) for wanted in (update is not None, with_normed)
    )
    if rows and n:
        padded, block_k = triton.next_power_of_2(rows), max(16, min(MOST_BLOCK_K, triton.next_power_of_2(k)))
        # The interpreter takes its time by programs, not by what they do.
        columns = 32 if INTERPRETED else max(ROWS_BY_COLUMNS // padded, 2)
        launch(
            products_kernel,
            (ceil_div(n, columns) + ceil_div(n_second, columns),),
            *(x, update, norm, weight, weight if second is None else second, out, stream, normed, rows, k, n, n_second),
            *(x.stride(0), 0 if update is None else update.stride(0), weight.stride(0)),
            *(0 if second is None else second.stride(0), eps),
            UPDATE=update is not None,
            NORM=norm is not None,
            GATED=gated,
            NORMED=with_normed,
            ROWS=padded,
            COLUMNS=columns,
            BLOCK_K=block_k,
            WHOLE=k <= block_k,
            num_warps=4,
            **programmatic(x),
        )
    return out, stream, normed


def add_norm(x: Tensor, update: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `few.add_norm`."""
    rows, width = x.shape
    stream, normed = x.new_empty(rows, width), x.new_empty(rows, width)
    if rows:
        launch(
            add_norm_kernel,
            (rows,),
            *(x, update, norm, stream, normed, width, x.stride(0), update.stride(0), eps),
            WIDTH=triton.next_power_of_2(width),
            num_warps=4 if width <= 2048 else 8,
            **programmatic(x),
        )
    return normed, stream


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
            WIDTH=triton.next_power_of_2(width),
            PAIRS=triton.next_power_of_2(pairs),
            num_warps=4 if width <= 2048 else 8,
            **programmatic(embedding),
        )
    return x, cos, sin


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
    tokens, positions, slots = (drafts.new_empty(rows) for _ in range(3))
    seen, cu_seqlens = torch.empty_like(lengths), lengths.new_empty(rows + 1) if rows else lengths.new_zeros(1)
    x = embedding.new_empty(rows, 2 * width)
    cos, sin = frequencies.new_empty(rows, pairs), frequencies.new_empty(rows, pairs)
    if rows:
        launch(
            look_ahead_kernel,
            (rows,),
            *(logits, drafts, lengths, active, block_table, embedding, frequencies, hidden, enorm, hnorm),
            *(tokens, positions, slots, seen, cu_seqlens, x, cos, sin),
            *(j, drafts.shape[1], vocabulary, block_table.shape[1], page_size, width, pairs),
            *(logits.stride(0), embedding.stride(0), hidden.stride(0), scale, eps),
            BLOCK=min(4096, triton.next_power_of_2(vocabulary)),
            WIDTH=triton.next_power_of_2(width),
            PAIRS=triton.next_power_of_2(pairs),
            num_warps=4 if width <= 2048 else 8,
            **programmatic(embedding),
        )
    return tokens, positions, slots, seen, cu_seqlens, x, cos, sin


def products_supports(x, update, norm, weight, second, eps, gated, with_normed) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    if x.shape[0] > MOST_ROWS:
        return f"it takes up to {MOST_ROWS} rows, there are {x.shape[0]}"
    return _reason_against(x, update, norm, weight, second)


def add_norm_supports(x, update, norm, eps) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    if x.shape[1] > MOST_WIDTH:
        return f"it takes rows of up to {MOST_WIDTH}, they are {x.shape[1]}"
    return _reason_against(x, update, norm)


def embed_supports(tokens, positions, embedding, frequencies, scale, hidden, enorm, hnorm, eps) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    if embedding.shape[1] > MOST_WIDTH:
        return f"it takes rows of up to {MOST_WIDTH}, they are {embedding.shape[1]}"
    if not tokens.is_contiguous() or not positions.is_contiguous():
        return "it takes contiguous tokens and positions"
    return _reason_against(embedding, hidden, enorm, hnorm)


def look_ahead_supports(
    logits, drafts, j, lengths, active, block_table, page_size, embedding, frequencies, scale, hidden, enorm, hnorm, eps
) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    if embedding.shape[1] > MOST_WIDTH:
        return f"it takes rows of up to {MOST_WIDTH}, they are {embedding.shape[1]}"
    if not all(x.is_contiguous() for x in (drafts, lengths, active, block_table)):
        return "it takes contiguous drafts, lengths and tables"
    return _reason_against(embedding, logits, hidden, enorm, hnorm)


def _reason_against(x: Tensor, *others: Tensor | None) -> str | None:
    tensors = [x, *(other for other in others if other is not None)]
    if x.dtype not in SINGLE_OR_HALF or any(other.dtype != x.dtype for other in tensors):
        return f"it takes one dtype of bf16, fp16 and fp32, got {', '.join(str(other.dtype) for other in tensors)}"
    if any(other.stride(-1) != 1 for other in tensors):
        return "it takes rows that are contiguous"
    return None
