"""Portable Triton kernels that sort the choices of experts by expert, stably, on the device.

Up to 2,048 choices are sorted in a single launch, in which each is compared with all others. More go through a counting
sort in three launches:

    count_kernel    counts the ids of each block of 64 choices;
    scan_kernel     turns these counts into sums over the preceding blocks, expert by expert;
    place_kernel    places every choice at (first row of its expert) + (choices of that expert in preceding blocks) +
                    (such choices before it in its own block).

Dropped choices are sorted as if they had chosen one more expert after the last.

Names: `p_` pointer, `i_` index of a program or tile, `o_` offsets, `m_` mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.device import empty
from dskernels.moe.config import (
    APPEND_TOKENS,
    COMPARE_BLOCK,
    COMPARE_CHUNK,
    COMPARE_COUNTED,
    MOST_COMPARED,
    SCAN_EXPERTS,
    SORT_BLOCK,
    choose_scan,
)
from dskernels.portable import launch
from dskernels.validate import ceil_div

# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def load_group(p_experts, o_i, size, first, E):
    """The expert of each choice, counted from `first`; E for dropped ids, E + 1 for choices after the end."""
    expert = tl.load(p_experts + o_i, mask=o_i < size, other=0) - first
    group = tl.where((expert >= 0) & (expert < E), expert, E).to(tl.int32)
    return tl.where(o_i < size, group, E + 1)


@triton.jit
def first_rows(total, p_offsets, E, STORE, BINS: tl.constexpr):
    """The first row of each expert, given its number of choices; with STORE, also store them as the offsets."""
    o_e = tl.arange(0, BINS)
    start = tl.cumsum(total, 0) - total
    tl.store(p_offsets + o_e, start, mask=(o_e <= E) & STORE)
    return start


@triton.jit
def store_places(row, group, o_i, m_i, p_index, p_source, E):
    """Store index[i] = row of choice i, -1 if it was dropped, and source[row] = i, -1 for rows of dropped choices."""
    tl.store(p_index + o_i, tl.where(group < E, row, -1), mask=m_i)
    tl.store(p_source + row, tl.where(group < E, o_i, -1), mask=m_i)


@triton.jit(do_not_specialize=["tokens"])
def append_choices_kernel(
    p_experts,
    p_weights,
    p_all,
    p_all_weights,
    tokens,
    top_k,
    more,
    E,
    stride_w,
    TOKENS: tl.constexpr,
    CHOICES: tl.constexpr,
):
    """Copy the choices of TOKENS tokens with their weights, and append the `more` experts from E on, with weight 1."""
    o_t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    o_j = tl.arange(0, CHOICES)[None, :]
    m_given = (o_t < tokens) & (o_j < top_k)
    m_all = (o_t < tokens) & (o_j < top_k + more)
    expert = tl.load(p_experts + o_t * top_k + o_j, mask=m_given, other=0)
    weight = tl.load(p_weights + o_t * stride_w + o_j, mask=m_given, other=1.0)
    # Ids from E on name no routed expert and are dropped; they must not choose one of the appended experts.
    expert = tl.where(m_given, tl.where(expert < E, expert, -1), E + o_j - top_k)
    tl.store(p_all + o_t * (top_k + more) + o_j, expert, mask=m_all)
    tl.store(p_all_weights + o_t * (top_k + more) + o_j, weight, mask=m_all)


@triton.jit(do_not_specialize=["size", "first"])
def compare_kernel(
    p_experts,
    p_offsets,
    p_index,
    p_source,
    size,
    first,
    E,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """Place BLOCK choices by counting those that come before each; the first program computes the offsets instead."""
    i_b = tl.program_id(0) - 1
    if i_b < 0:
        total = tl.zeros([BINS], tl.int32)
        for start in range(0, size, COUNTED):
            total += tl.histogram(load_group(p_experts, start + tl.arange(0, COUNTED), size, first, E), BINS)
        first_rows(total, p_offsets, E, True, BINS)
    else:
        o_i = i_b * BLOCK + tl.arange(0, BLOCK)
        group = load_group(p_experts, o_i, size, first, E)
        before = tl.zeros([BLOCK, CHUNK], tl.int32)
        for start in range(0, size, CHUNK):
            o_j = start + tl.arange(0, CHUNK)
            other = load_group(p_experts, o_j, size, first, E)
            earlier = (other[None, :] == group[:, None]) & (o_j[None, :] < o_i[:, None])
            before += ((other[None, :] < group[:, None]) | earlier).to(tl.int32)
        store_places(tl.sum(before, 1), group, o_i, o_i < size, p_index, p_source, E)


@triton.jit(do_not_specialize=["size", "first"])
def count_kernel(p_experts, p_counts, size, first, E, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """Count the choices of a block: counts[block, g] is the number of those of expert g."""
    i_b = tl.program_id(0)
    group = load_group(p_experts, i_b * BLOCK + tl.arange(0, BLOCK), size, first, E)
    tl.store(p_counts + i_b.to(tl.int64) * BINS + tl.arange(0, BINS), tl.histogram(group, BINS))


@triton.jit(do_not_specialize=["blocks"])
def scan_kernel(p_counts, p_totals, blocks, BINS: tl.constexpr, BLOCKS: tl.constexpr, EXPERTS: tl.constexpr):
    """Turn the counts of EXPERTS experts into sums over the preceding blocks, in place, and store their totals."""
    o_e = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    total = tl.zeros([EXPERTS], tl.int32)
    for first in range(0, blocks, BLOCKS):
        o_b = first + tl.arange(0, BLOCKS)
        p_tile = p_counts + o_b.to(tl.int64)[:, None] * BINS + o_e[None, :]
        counts = tl.load(p_tile, mask=(o_b < blocks)[:, None], other=0)
        before = tl.cumsum(counts, 0) - counts + total[None, :]
        tl.store(p_tile, before, mask=(o_b < blocks)[:, None])
        total += tl.sum(counts, 0)
    tl.store(p_totals + o_e, total)


@triton.jit(do_not_specialize=["size", "first"])
def place_kernel(
    p_experts,
    p_totals,
    p_before,
    p_offsets,
    p_index,
    p_source,
    size,
    first,
    E,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    """Place the choices of a block, see the top of this file; the first program also stores the offsets."""
    i_b = tl.program_id(0)
    o_i = i_b * BLOCK + tl.arange(0, BLOCK)
    m_i = o_i < size
    group = load_group(p_experts, o_i, size, first, E)
    before = tl.load(p_before + i_b.to(tl.int64) * BINS + group, mask=m_i, other=0)
    start = first_rows(tl.load(p_totals + tl.arange(0, BINS)), p_offsets, E, i_b == 0, BINS)
    earlier_equals = (o_i[None, :] < o_i[:, None]) & (group[None, :] == group[:, None])
    rank = tl.sum(earlier_equals.to(tl.int32), 1)
    store_places(tl.gather(start, group, 0) + before + rank, group, o_i, m_i, p_index, p_source, E)


# ---- launcher -------------------------------------------------------------------------------------------------------


def append_choices(experts: Tensor, weights: Tensor, first: int, more: int) -> tuple[Tensor, Tensor]:
    """`experts` and `weights` [T, k] with `more` choices appended to each token: the experts from `first` on, with
    weight 1. Ids from `first` on that are in `experts` become -1."""
    tokens, top_k = experts.shape
    shape = (tokens, top_k + more)
    appended = empty(experts, shape, experts.dtype), empty(weights, shape, weights.dtype)
    if tokens:
        launch(
            append_choices_kernel,
            (ceil_div(tokens, APPEND_TOKENS),),
            experts.contiguous(),
            weights,
            *appended,
            tokens,
            top_k,
            more,
            first,
            weights.stride(0),
            TOKENS=APPEND_TOKENS,
            CHOICES=1 << (top_k + more - 1).bit_length(),
            num_warps=4,
        )
    return appended


def sort(experts: Tensor, n_experts: int, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the choices `experts` [T, k] by expert, and those of one expert by token.

    The experts are the `n_experts` ids from `first` on; other ids are dropped.

    Returns:
        Offsets int32 [E + 1], where the rows of each expert begin, and their end; index int32 [T, k], the row of each
        choice, -1 if it was dropped; source int32 [T * k], the choice of each row (token * k + j), -1 for the rows
        after the last expert's.
    """
    experts = experts.contiguous()
    size = experts.numel()
    offsets = empty(experts, (n_experts + 1,), torch.int32, (1,))
    index = empty(experts, (experts.shape[0], experts.shape[1]), torch.int32)
    source = empty(experts, (size,), torch.int32, (1,))
    if size == 0:
        return offsets.zero_(), index, source
    bins = max(1 << (n_experts + 1).bit_length(), SCAN_EXPERTS)  # a power of two that holds E + 2
    if size <= MOST_COMPARED:
        launch(
            compare_kernel,
            (ceil_div(size, COMPARE_BLOCK) + 1,),
            experts,
            offsets,
            index,
            source,
            size,
            first,
            n_experts,
            BLOCK=COMPARE_BLOCK,
            CHUNK=COMPARE_CHUNK,
            BINS=bins,
            COUNTED=COMPARE_COUNTED,
            num_warps=4,
        )
        return offsets, index, source
    blocks = ceil_div(size, SORT_BLOCK)
    counts, totals = empty(experts, (blocks, bins), torch.int32), empty(experts, (bins,), torch.int32, (1,))
    launch(count_kernel, (blocks,), experts, counts, size, first, n_experts, BLOCK=SORT_BLOCK, BINS=bins, num_warps=4)
    at_a_time, num_warps = choose_scan(blocks)
    launch(
        scan_kernel,
        (bins // SCAN_EXPERTS,),
        counts,
        totals,
        blocks,
        BINS=bins,
        BLOCKS=at_a_time,
        EXPERTS=SCAN_EXPERTS,
        num_warps=num_warps,
    )
    launch(
        place_kernel,
        (blocks,),
        experts,
        totals,
        counts,
        offsets,
        index,
        source,
        size,
        first,
        n_experts,
        BLOCK=SORT_BLOCK,
        BINS=bins,
        num_warps=8,
    )
    return offsets, index, source
