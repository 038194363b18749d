"""Triton kernels of `steps`: a program for each sequence, a lane for each of its tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.portable import launch


@triton.jit
def store_places(
    p_tokens,
    p_positions,
    p_slots,
    p_lengths,
    p_cu_seqlens,
    p_block_table,
    token,
    length,
    counted,
    queries,
    pages,
    page_size,
    BLOCK: tl.constexpr,
):
    """The layout of a pass in which this sequence has these tokens, of which the first `counted` end at `length`."""
    i_b = tl.program_id(0).to(tl.int64)
    o_q = tl.arange(0, BLOCK)
    m_q = o_q < queries
    position = length.to(tl.int64) - counted + o_q
    page = position // page_size
    there = m_q & (o_q < counted) & (position >= 0) & (page < pages)
    block = tl.load(p_block_table + i_b * pages + page, mask=there, other=0).to(tl.int64)
    o_t = i_b * queries + o_q
    tl.store(p_tokens + o_t, token, mask=m_q)
    tl.store(p_positions + o_t, position, mask=m_q)
    tl.store(p_slots + o_t, tl.where(there, block * page_size + position % page_size, -1), mask=m_q)
    tl.store(p_lengths + i_b, length)
    tl.store(p_cu_seqlens + i_b, (i_b * queries).to(tl.int32))
    if i_b == tl.num_programs(0) - 1:
        tl.store(p_cu_seqlens + i_b + 1, ((i_b + 1) * queries).to(tl.int32))


@triton.jit(do_not_specialize=["queries", "ahead", "pages", "page_size"])
def place_kernel(
    p_last,
    p_drafts,
    p_lengths,
    p_active,
    p_block_table,
    p_tokens,
    p_positions,
    p_slots,
    p_seen,
    p_cu_seqlens,
    queries,
    ahead,
    pages,
    page_size,
    BLOCK: tl.constexpr,
):
    """The last token and the drafts behind it."""
    i_b = tl.program_id(0).to(tl.int64)
    o_q = tl.arange(0, BLOCK)
    draft = tl.load(p_drafts + i_b * (queries - 1) + o_q - 1, mask=(o_q > 0) & (o_q < queries), other=0)
    token = tl.where(o_q == 0, tl.load(p_last + i_b), draft)
    length = tl.load(p_lengths + i_b) + (ahead + queries) * tl.load(p_active + i_b)
    store_places(
        p_tokens,
        p_positions,
        p_slots,
        p_seen,
        p_cu_seqlens,
        p_block_table,
        token,
        length,
        queries,
        queries,
        pages,
        page_size,
        BLOCK,
    )


@triton.jit(do_not_specialize=["queries", "ends", "pages", "page_size"])
def advance_kernel(
    p_chosen,
    p_accepted,
    p_drafts,
    p_eos,
    p_block_table,
    p_last,
    p_lengths,
    p_active,
    p_left,
    p_new,
    p_tokens,
    p_positions,
    p_slots,
    p_seen,
    p_cu_seqlens,
    p_q_lengths,
    p_rows,
    queries,
    ends,
    pages,
    page_size,
    GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Accept drafts and append the token behind them, up to the end of the text."""
    i_b = tl.program_id(0).to(tl.int64)
    o_q = tl.arange(0, BLOCK)
    m_q = o_q < queries
    draft = tl.load(p_drafts + i_b * (queries - 1) + o_q, mask=o_q < queries - 1, other=0)
    if GREEDY:
        best = tl.load(p_chosen + i_b * queries + o_q, mask=m_q, other=0)
        falls = (o_q >= queries - 1) | (draft != best)  # there is no draft behind the last one
        accepted = tl.min(tl.where(falls, o_q, BLOCK), axis=0)
        last = tl.sum(tl.where(o_q == accepted, best, 0), axis=0)
    else:
        accepted = tl.load(p_accepted + i_b).to(tl.int32)
        last = tl.load(p_chosen + i_b)
    token = tl.where(o_q < accepted, draft, last)

    end = tl.zeros([BLOCK], tl.int32)
    for i in range(ends):
        end += (token == tl.load(p_eos + i_b * ends + i)).to(tl.int32)
    first_end = tl.min(tl.where((end > 0) & (o_q <= accepted), o_q, BLOCK), axis=0)

    active = tl.load(p_active + i_b)
    left = tl.load(p_left + i_b)
    count = tl.minimum(tl.minimum(accepted, first_end) + 1, left) * active
    length = tl.load(p_lengths + i_b) + count
    still = tl.where((first_end < count) | (count >= left), 0, active)

    o_new = i_b * (queries + 2)
    tl.store(p_new + o_new + o_q, token, mask=m_q)
    tl.store(p_new + o_new + queries, count.to(tl.int64))
    tl.store(p_new + o_new + queries + 1, (accepted * active).to(tl.int64))
    tl.store(p_last + i_b, last)
    tl.store(p_left + i_b, left - count)
    tl.store(p_active + i_b, still)
    tl.store(p_lengths + i_b, length * still)

    store_places(
        p_tokens,
        p_positions,
        p_slots,
        p_seen,
        p_cu_seqlens,
        p_block_table,
        token,
        length,
        count,
        queries,
        pages,
        page_size,
        BLOCK,
    )
    tl.store(p_q_lengths + i_b, count)
    tl.store(p_rows + i_b, i_b * queries + accepted)


@triton.jit
def mix(x):
    """`chance._mix`: the output function of SplitMix64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit(do_not_specialize=["ahead", "count", "purposes", "first", "numbers"])
def chances_kernel(p_stream, p_places, p_out, ahead, count, purposes, first, numbers, BLOCK: tl.constexpr):
    """`chance.uniform` for every place and purpose."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = o < numbers
    i_b = o // (count * purposes)
    place = tl.load(p_places + i_b, mask=mask, other=0) + ahead + o // purposes % count
    purpose = first + o % purposes
    stream = tl.load(p_stream + i_b, mask=mask, other=0).to(tl.uint64, bitcast=True)
    counter = (4 * place.to(tl.int64) + purpose).to(tl.uint64, bitcast=True)
    bits = mix(stream + counter * 0x9E3779B97F4A7C15) & 0xFFFFFF
    tl.store(p_out + o, bits.to(tl.int32).to(tl.float32) * 5.9604644775390625e-08, mask=mask)  # 2^-24


def place(
    last: Tensor, drafts: Tensor, lengths: Tensor, active: Tensor, block_table: Tensor, page_size: int, ahead: int
) -> tuple[Tensor, ...]:
    """See `steps.place`."""
    rows, queries = last.shape[0], drafts.shape[1] + 1
    out = empty_places(last, lengths, queries)
    if rows:
        block = triton.next_power_of_2(queries)
        arguments = (last, drafts, lengths, active, block_table, *out, queries, ahead, block_table.shape[1], page_size)
        launch(place_kernel, (rows,), *arguments, BLOCK=block, num_warps=1)
    return out


def advance(
    chosen: Tensor,
    accepted: Tensor | None,
    drafts: Tensor,
    eos: Tensor,
    block_table: Tensor,
    last: Tensor,
    lengths: Tensor,
    active: Tensor,
    left: Tensor,
    new: Tensor,
    page_size: int,
) -> tuple[Tensor, ...]:
    """See `steps.advance`."""
    rows, queries = last.shape[0], drafts.shape[1] + 1
    out = (*empty_places(last, lengths, queries), torch.empty_like(lengths), torch.empty_like(last))
    if rows:
        launch(
            advance_kernel,
            (rows,),
            *(chosen, accepted, drafts, eos, block_table, last, lengths, active, left, new, *out),
            *(queries, eos.shape[1], block_table.shape[1], page_size),
            GREEDY=accepted is None,
            BLOCK=triton.next_power_of_2(queries),
            num_warps=1,
        )
    return out


def chances(stream: Tensor, places: Tensor, ahead: int, count: int, purposes: int, first: int) -> Tensor:
    """See `steps.chances`."""
    out = torch.empty(stream.shape[0], count, purposes, device=stream.device)
    if out.numel():
        numbers = ahead, count, purposes, first, out.numel()
        launch(chances_kernel, (triton.cdiv(out.numel(), 128),), stream, places, out, *numbers, BLOCK=128, num_warps=1)
    return out


def empty_places(last: Tensor, lengths: Tensor, queries: int) -> tuple[Tensor, ...]:
    """The tensors that `store_places` fills."""
    rows = last.shape[0]
    tokens = [last.new_empty(rows * queries) for _ in range(3)]
    cu_seqlens = lengths.new_empty(rows + 1) if rows else lengths.new_zeros(1)
    return (*tokens, torch.empty_like(lengths), cu_seqlens)


def contiguous(*tensors: Tensor | None) -> str | None:
    """Why a kernel that takes contiguous tensors does not take these, or None."""
    if all(tensor is None or tensor.is_contiguous() for tensor in tensors):
        return None
    return "it takes contiguous tensors"


def place_supports(last, drafts, lengths, active, block_table, page_size, ahead) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    return contiguous(last, drafts, lengths, active, block_table)


def advance_supports(chosen, accepted, drafts, eos, block_table, last, lengths, active, left, new, page_size):
    """Why the kernel does not take these arguments, or None."""
    return contiguous(chosen, accepted, drafts, eos, block_table, last, lengths, active, left, new)


def chances_supports(stream, places, ahead, count, purposes, first) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    return contiguous(stream, places)
