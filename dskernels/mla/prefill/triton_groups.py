"""Portable Triton kernels that divide the packed new tokens of several requests into groups, each of one request: their
queries move there in one launch, and their results back in another."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dskernels.device import empty
from dskernels.mla.prefill.config import most_groups
from dskernels.mla.prefill.triton import find_tile
from dskernels.portable import launch
from dskernels.validate import ceil_div

COLUMNS = 512  # columns of the table that a program copies at a time
ELEMENTS = 4096  # of queries or results that a program copies at a time


@triton.jit(do_not_specialize=["tokens", "requests", "columns", "stride_table", "capacity", "stride_qt", "stride_qh"])
def group_kernel(
    p_q,
    p_table,
    p_lengths,
    p_cu,
    p_grouped,
    p_queries,
    p_place,
    p_rows,
    p_seen,
    p_count,
    stride_qt,
    stride_qh,
    stride_table,
    tokens,
    heads,
    requests,
    columns,
    capacity,
    WIDTH: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One group (program 0): a tile of GROUP tokens of a span; the first and the last span belong to no request.

    Its first program (1) says what the group is, and the others copy BLOCK_R of its GROUP x heads rows each.
    """
    i_group = tl.program_id(0)
    i_span, start, length, first = find_tile(p_cu, i_group, requests, tokens, GROUP)
    count = tl.minimum(tl.maximum(length - first, 0), GROUP)
    if tl.program_id(1) == 0:
        describe_group(
            p_table,
            p_lengths,
            p_place,
            p_rows,
            p_seen,
            p_count,
            i_group,
            i_span,
            start,
            length,
            first,
            count,
            stride_table,
            tokens,
            requests,
            columns,
            capacity,
            GROUP,
            BLOCK_G,
            BLOCK_C,
        )
    else:
        o_r = (tl.program_id(1) - 1) * BLOCK_R + tl.arange(0, BLOCK_R)
        o_d = tl.arange(0, BLOCK_D)[None, :]
        token = start + first + o_r // heads
        real = (o_r // heads < count) & (token >= 0) & (token < tokens)
        o_q = tl.where(real, token, 0).to(tl.int64) * stride_qt + (o_r % heads).to(tl.int64) * stride_qh
        mask = (o_r < GROUP * heads)[:, None] & (o_d < WIDTH)
        row = tl.load(p_q + o_q[:, None] + o_d, mask=mask & (tokens > 0), other=0.0)
        i_row = (i_group.to(tl.int64) * GROUP * heads + o_r)[:, None]
        tl.store(p_grouped + i_row * WIDTH + o_d, row, mask=mask)
        o_rope = o_d - (WIDTH - ROPE)
        tl.store(p_queries + i_row * (LATENT + ROPE) + LATENT + o_rope, row, mask=mask & (o_rope >= 0))


@triton.jit
def describe_group(
    p_table,
    p_lengths,
    p_place,
    p_rows,
    p_seen,
    p_count,
    i_group,
    i_span,
    start,
    length,
    first,
    count,
    stride_table,
    tokens,
    requests,
    columns,
    capacity,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """How many tokens the group has, what the last of them sees, their places, and the row of their request's table."""
    request = tl.minimum(tl.maximum(i_span - 1, 0), requests - 1)
    cached = tl.minimum(tl.maximum(tl.load(p_lengths + request), 0), capacity)
    seen = tl.maximum(cached - length + first + count, 0)
    tl.store(p_seen + i_group, tl.where((i_span >= 1) & (i_span <= requests), seen, 0))
    tl.store(p_count + i_group, count)

    o_g = tl.arange(0, BLOCK_G)
    token = start + first + o_g
    m_g = (o_g < count) & (token >= 0) & (token < tokens)
    tl.store(p_place + token, i_group * GROUP + o_g, mask=m_g)

    p_from = p_table + request.to(tl.int64) * stride_table
    p_to = p_rows + i_group.to(tl.int64) * columns
    for i_c in range(0, columns, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        tl.store(p_to + o_c, tl.load(p_from + o_c, mask=o_c < columns), mask=o_c < columns)


@triton.jit(do_not_specialize=["tokens", "places"])
def take_results_kernel(
    p_out,
    p_lse,
    p_place,
    p_to,
    p_lse_to,
    tokens,
    places,
    heads,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_H heads (program 1) of a token (program 0): the results of its place."""
    i_token = tl.program_id(0).to(tl.int64)
    o_h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_h = o_h < heads
    mask = m_h[:, None] & (o_d < WIDTH)
    place = tl.minimum(tl.maximum(tl.load(p_place + i_token), 0), places - 1).to(tl.int64)
    row = tl.load(p_out + (place * heads + o_h)[:, None] * WIDTH + o_d, mask=mask)
    tl.store(p_to + (i_token * heads + o_h)[:, None] * WIDTH + o_d, row, mask=mask)
    lse = tl.load(p_lse + (place // GROUP * heads + o_h) * GROUP + place % GROUP, mask=m_h)
    tl.store(p_lse_to + o_h * tokens + i_token, lse, mask=m_h)


def group_tokens(
    q: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    cu_seqlens_q: Tensor,
    group: int,
    page_size: int,
    latent_dim: int,
    rope_dim: int,
) -> tuple[Tensor, ...]:
    """Rows of `q` [T, H, D] place by place [P, H, D], queries [P, H, latent + rope] with their rope part, the place of
    each token, and for each group its row of the table, what its last token sees, and how many tokens it has."""
    (tokens, heads, width), (requests, columns) = q.shape, block_table.shape
    groups = most_groups(tokens, requests, group)
    grouped = empty(q, (groups * group, heads, width), q.dtype)
    queries = empty(q, (groups * group, heads, latent_dim + rope_dim), q.dtype)
    seen, count = (lengths.new_empty(groups) for _ in range(2))
    # Each token has its place, unless cu_seqlens does not ascend: then `take_results` takes whatever there is as one.
    place = lengths.new_empty(tokens)
    rows = lengths.new_empty((groups, columns))
    block_r, block_d = _blocks(group * heads, width)
    launch(
        group_kernel,
        (groups, 1 + ceil_div(group * heads, block_r)),
        q,
        block_table,
        lengths,
        cu_seqlens_q,
        grouped,
        queries,
        place,
        rows,
        seen,
        count,
        q.stride(0),
        q.stride(1),
        block_table.stride(0),
        tokens,
        heads,
        requests,
        columns,
        columns * page_size,
        WIDTH=width,
        LATENT=latent_dim,
        ROPE=rope_dim,
        GROUP=group,
        BLOCK_G=triton.next_power_of_2(group),
        BLOCK_C=COLUMNS,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return grouped, queries, place, rows, seen, count


def take_results(out: Tensor, lse: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of each token's place: [T, H, V] of `out` [P, H, V], and [H, T] of `lse` [groups, H, group]."""
    (places, heads, width), tokens = out.shape, place.shape[0]
    to, lse_to = empty(out, (tokens, heads, width), out.dtype), empty(lse, (heads, tokens), lse.dtype)
    block_h, block_d = _blocks(heads, width)
    if to.numel():
        launch(
            take_results_kernel,
            (tokens, ceil_div(heads, block_h)),
            out,
            lse,
            place,
            to,
            lse_to,
            tokens,
            places,
            heads,
            WIDTH=width,
            GROUP=lse.shape[2],
            BLOCK_H=block_h,
            BLOCK_D=block_d,
            num_warps=4,
        )
    return to, lse_to


def _blocks(rows: int, width: int) -> tuple[int, int]:
    """Rows and columns of a program."""
    block_d = triton.next_power_of_2(width)
    return min(max(ELEMENTS // block_d, 1), triton.next_power_of_2(max(rows, 1))), block_d
