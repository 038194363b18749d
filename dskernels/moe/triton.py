"""Portable Triton kernels that permute tokens to experts and back.

`sort` is a stable counting sort on the device: count the ids of each block of 128, sum the counts of each expert over
the blocks before, then place every id at (first row of its expert) + (such ids in blocks before) + (rank in its block).
Dropped ids sort as one more expert after the last.

Names: `p_` pointer, `i_` index of a program or tile, `o_` offsets, `m_` mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.moe.config import SCAN_BLOCKS, SCAN_EXPERTS, SORT_BLOCK, choose_width
from dskernels.portable import cast

# ---- counting sort --------------------------------------------------------------------------------------------------


@triton.jit
def load_group(p_experts, o_i, size, E):
    """Expert of each choice, E for dropped ids, E + 1 after the end."""
    expert = tl.load(p_experts + o_i, mask=o_i < size, other=0)
    group = tl.where((expert >= 0) & (expert < E), expert, E).to(tl.int32)
    return tl.where(o_i < size, group, E + 1)


@triton.jit(do_not_specialize=["size"])
def count_kernel(p_experts, p_counts, size, E, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """counts[block, g] = how many ids of this block are g."""
    i_b = tl.program_id(0)
    group = load_group(p_experts, i_b * BLOCK + tl.arange(0, BLOCK), size, E)
    tl.store(p_counts + i_b.to(tl.int64) * BINS + tl.arange(0, BINS), tl.histogram(group, BINS))


@triton.jit(do_not_specialize=["blocks"])
def scan_kernel(p_counts, p_totals, blocks, BINS: tl.constexpr, BLOCKS: tl.constexpr, EXPERTS: tl.constexpr):
    """Turn the counts of EXPERTS experts into sums over the blocks before, in place, and store the sums over all."""
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


@triton.jit
def offsets_kernel(p_totals, p_offsets, E, BINS: tl.constexpr):
    """offsets[e] = choices that fell on experts before e."""
    o_e = tl.arange(0, BINS)
    total = tl.load(p_totals + o_e)
    tl.store(p_offsets + o_e, tl.cumsum(total, 0) - total, mask=o_e <= E)


@triton.jit(do_not_specialize=["size"])
def place_kernel(p_experts, p_offsets, p_before, p_index, p_source, size, E, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """index[i] = row of choice i, -1 where dropped; source[row] = i, -1 for the rows after the last expert's."""
    i_b = tl.program_id(0)
    o_i = i_b * BLOCK + tl.arange(0, BLOCK)
    m_i = o_i < size
    group = load_group(p_experts, o_i, size, E)
    earlier_equals = (o_i[None, :] < o_i[:, None]) & (group[None, :] == group[:, None])
    rank = tl.sum(earlier_equals.to(tl.int32), 1)
    start = tl.load(p_offsets + group, mask=m_i, other=0)
    before = tl.load(p_before + i_b.to(tl.int64) * BINS + group, mask=m_i, other=0)
    row = start + before + rank
    tl.store(p_index + o_i, tl.where(group < E, row, -1), mask=m_i)
    tl.store(p_source + row, tl.where(group < E, o_i, -1), mask=m_i)


def sort(experts: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets int32 [E + 1], index int32 [T, k], and source int32 [T * k], the choice of each row."""
    experts = experts.contiguous()
    size = experts.numel()
    blocks, bins = triton.cdiv(size, SORT_BLOCK), max(triton.next_power_of_2(n_experts + 2), SCAN_EXPERTS)
    offsets = experts.new_zeros(n_experts + 1, dtype=torch.int32)
    index = experts.new_empty(experts.shape, dtype=torch.int32)
    source = experts.new_empty(size, dtype=torch.int32)
    if size:
        counts = experts.new_empty((blocks, bins), dtype=torch.int32)
        totals = experts.new_empty(bins, dtype=torch.int32)
        count_kernel[(blocks,)](experts, counts, size, n_experts, BLOCK=SORT_BLOCK, BINS=bins, num_warps=4)
        scan_kernel[(bins // SCAN_EXPERTS,)](
            counts, totals, blocks, BINS=bins, BLOCKS=SCAN_BLOCKS, EXPERTS=SCAN_EXPERTS, num_warps=4
        )
        offsets_kernel[(1,)](totals, offsets, n_experts, BINS=bins, num_warps=4)
        place_kernel[(blocks,)](
            experts, offsets, counts, index, source, size, n_experts, BLOCK=SORT_BLOCK, BINS=bins, num_warps=4
        )
    return offsets, index, source


# ---- rows to experts and back ---------------------------------------------------------------------------------------


@triton.jit
def zero_tail(p_rows, first, last, start, stride, o_h, m_h):
    """Set the columns `o_h` of rows from `first` to `last` that are at or after `start` to zero."""
    for row in range(tl.maximum(first, start), last):
        p_row = p_rows + tl.cast(row, tl.int64) * stride + o_h
        tl.store(p_row, tl.zeros(o_h.shape, p_rows.dtype.element_ty), mask=m_h)


@triton.jit
def permute_kernel(p_x, p_offsets, p_index, p_out, E, H, top_k, stride_x, stride_out, WIDTH: tl.constexpr):
    """Copy WIDTH columns of one token to the rows of its choices; zero its share of rows after the last expert's."""
    columns = tl.cdiv(H, WIDTH)
    i_t = tl.program_id(0) // columns
    o_h = tl.program_id(0) % columns * WIDTH + tl.arange(0, WIDTH)
    m_h = o_h < H
    x = tl.load(p_x + i_t.to(tl.int64) * stride_x + o_h, mask=m_h)
    for j in range(top_k):
        row = tl.load(p_index + i_t * top_k + j)
        tl.store(p_out + row.to(tl.int64) * stride_out + o_h, x, mask=m_h & (row >= 0))
    zero_tail(p_out, i_t * top_k, (i_t + 1) * top_k, tl.load(p_offsets + E), stride_out, o_h, m_h)


@triton.jit(do_not_specialize=["size"])
def combine_kernel(
    p_y,
    p_index,
    p_weights,
    p_residual,
    p_out,
    size,
    H,
    top_k,
    stride_y,
    stride_w,
    stride_residual,
    stride_out,
    HAS_WEIGHTS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """WIDTH columns of out[t]: the sum over j of weights[t, j] * y[index[t, j]], then + residual[t], all in fp32."""
    columns = tl.cdiv(H, WIDTH)
    i_t = (tl.program_id(0) // columns).to(tl.int64)
    o_h = tl.program_id(0) % columns * WIDTH + tl.arange(0, WIDTH)
    m_h = o_h < H
    total = tl.zeros([WIDTH], tl.float32)
    for j in range(top_k):
        row = tl.load(p_index + i_t * top_k + j)
        # A row is read only for a choice that has one, so that NaN elsewhere stays out of the sum.
        m_y = m_h & (row >= 0) & (row < size)
        y = tl.load(p_y + row.to(tl.int64) * stride_y + o_h, mask=m_y, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            y = tl.where(m_y, y * tl.load(p_weights + i_t * stride_w + j), 0.0)
        total += y
    if HAS_RESIDUAL:
        total += tl.load(p_residual + i_t * stride_residual + o_h, mask=m_h, other=0.0).to(tl.float32)
    tl.store(p_out + i_t * stride_out + o_h, cast(total, p_out.dtype.element_ty), mask=m_h)


@triton.jit(do_not_specialize=["size"])
def combine_backward_kernel(
    p_dout,
    p_y,
    p_offsets,
    p_index,
    p_weights,
    p_dy,
    p_dweights,
    size,
    E,
    H,
    top_k,
    stride_dout,
    stride_y,
    stride_w,
    stride_dy,
    WIDTH: tl.constexpr,
):
    """Of one token: dy[index[t, j]] = weights[t, j] * dout[t], and dweights[t, j] = <dout[t], y[index[t, j]]>."""
    i_t = tl.program_id(0).to(tl.int64)
    for j in range(top_k):
        row = tl.load(p_index + i_t * top_k + j)
        valid = (row >= 0) & (row < size)
        weight = tl.load(p_weights + i_t * stride_w + j)
        products = tl.zeros([WIDTH], tl.float32)
        for first in range(0, H, WIDTH):
            o_h = first + tl.arange(0, WIDTH)
            m_y = (o_h < H) & valid
            dout = tl.load(p_dout + i_t * stride_dout + o_h, mask=m_y, other=0.0).to(tl.float32)
            y = tl.load(p_y + row.to(tl.int64) * stride_y + o_h, mask=m_y, other=0.0).to(tl.float32)
            products += dout * y
            dy = cast(dout * weight, p_dy.dtype.element_ty)
            tl.store(p_dy + row.to(tl.int64) * stride_dy + o_h, dy, mask=m_y)
        tl.store(p_dweights + i_t * top_k + j, tl.sum(products, 0))
    tail = tl.load(p_offsets + E)
    for first in range(0, H, WIDTH):
        o_h = first + tl.arange(0, WIDTH)
        zero_tail(p_dy, i_t * top_k, (i_t + 1) * top_k, tail, stride_dy, o_h, o_h < H)


# ---- launchers ------------------------------------------------------------------------------------------------------


def permute(x: Tensor, experts: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows by expert [T * k, H], offsets and index."""
    (tokens, width), top_k = x.shape, experts.shape[1]
    offsets, index, _ = sort(experts, n_experts)
    out = x.new_empty(tokens * top_k, width)
    if out.numel():
        block = choose_width(width)
        permute_kernel[(tokens * triton.cdiv(width, block),)](
            x,
            offsets,
            index,
            out,
            n_experts,
            width,
            top_k,
            x.stride(0),
            out.stride(0),
            WIDTH=block,
            num_warps=4,
        )
    return out, offsets, index


def weighted_sum(y: Tensor, index: Tensor, weights: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """Sum of each token's rows of `y`, weighted if there are weights, and of `residual`; in fp32, rounded once."""
    (tokens, top_k), width = index.shape, y.shape[1]
    out = y.new_empty(tokens, width)
    if out.numel():
        block = choose_width(width)
        combine_kernel[(tokens * triton.cdiv(width, block),)](
            y,
            index.contiguous(),
            weights,
            residual,
            out,
            y.shape[0],
            width,
            top_k,
            y.stride(0),
            0 if weights is None else weights.stride(0),
            0 if residual is None else residual.stride(0),
            out.stride(0),
            HAS_WEIGHTS=weights is not None,
            HAS_RESIDUAL=residual is not None,
            WIDTH=block,
            num_warps=4,
        )
    return out


def permute_backward(dy: Tensor, index: Tensor) -> Tensor:
    """Gradient of the tokens: the sum of the gradients of their rows."""
    return weighted_sum(dy, index, None)


def combine(y: Tensor, offsets: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of each token's rows."""
    return weighted_sum(y, index, weights)


def combine_backward(dout: Tensor, y: Tensor, offsets: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `y` and of the weights."""
    (tokens, top_k), width = index.shape, y.shape[1]
    dy, dweights = y.new_empty(y.shape), weights.new_empty(weights.shape)
    if tokens and top_k:
        combine_backward_kernel[(tokens,)](
            dout,
            y,
            offsets,
            index.contiguous(),
            weights,
            dy,
            dweights,
            y.shape[0],
            offsets.shape[0] - 1,
            width,
            top_k,
            dout.stride(0),
            y.stride(0),
            weights.stride(0),
            dy.stride(0),
            WIDTH=choose_width(width),
            num_warps=4,
        )
    return dy, dweights
