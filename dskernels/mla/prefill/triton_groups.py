"""Portable Triton kernel that divides the packed new tokens of several requests into groups, each of one request."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dskernels.mla.prefill.config import most_groups
from dskernels.mla.prefill.triton import find_tile
from dskernels.portable import launch

COLUMNS = 512  # columns of the table that a program copies at a time


@triton.jit(do_not_specialize=["tokens", "requests", "columns", "stride_table", "capacity"])
def group_kernel(
    p_table,
    p_lengths,
    p_cu,
    p_token,
    p_place,
    p_rows,
    p_seen,
    p_count,
    stride_table,
    tokens,
    requests,
    columns,
    capacity,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One group: a tile of GROUP tokens of a span; the first and the last span belong to no request."""
    i_group = tl.program_id(0)
    i_span, start, length, first = find_tile(p_cu, i_group, requests, tokens, GROUP)
    count = tl.minimum(tl.maximum(length - first, 0), GROUP)
    request = tl.minimum(tl.maximum(i_span - 1, 0), requests - 1)
    cached = tl.minimum(tl.maximum(tl.load(p_lengths + request), 0), capacity)
    seen = tl.maximum(cached - length + first + count, 0)
    tl.store(p_seen + i_group, tl.where((i_span >= 1) & (i_span <= requests), seen, 0))
    tl.store(p_count + i_group, count)

    o_g = tl.arange(0, BLOCK_G)
    token = start + first + o_g
    m_g = (o_g < count) & (token >= 0) & (token < tokens)
    place = i_group * GROUP + o_g
    tl.store(p_token + place, tl.where(m_g, token, 0), mask=o_g < GROUP)
    tl.store(p_place + token, place, mask=m_g)

    p_from = p_table + request.to(tl.int64) * stride_table
    p_to = p_rows + i_group.to(tl.int64) * columns
    for i_c in range(0, columns, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        tl.store(p_to + o_c, tl.load(p_from + o_c, mask=o_c < columns), mask=o_c < columns)


def group_tokens(
    block_table: Tensor, lengths: Tensor, cu_seqlens_q: Tensor, tokens: int, group: int, page_size: int
) -> tuple[Tensor, ...]:
    """The token of each place, the place of each token, and for each group its row of the table, what it sees, its
    tokens."""
    requests, columns = block_table.shape
    groups = most_groups(tokens, requests, group)
    token, seen, count = (lengths.new_empty(n) for n in (groups * group, groups, groups))
    # Each token has its place, unless cu_seqlens does not ascend.
    place = lengths.new_zeros(tokens)
    rows = lengths.new_empty((groups, columns))
    launch(
        group_kernel,
        (groups,),
        block_table,
        lengths,
        cu_seqlens_q,
        token,
        place,
        rows,
        seen,
        count,
        block_table.stride(0),
        tokens,
        requests,
        columns,
        columns * page_size,
        GROUP=group,
        BLOCK_G=triton.next_power_of_2(group),
        BLOCK_C=COLUMNS,
        num_warps=4,
    )
    return token, place, rows, seen, count
