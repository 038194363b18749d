"""Portable Triton kernels that copy tokens to the rows of their experts (permute), and add rows up again (combine).

Names: `p_` pointer, `i_` index of a program or tile, `o_` offsets, `m_` mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.device import empty
from dskernels.fp8.layout import empty_scale
from dskernels.moe.config import SCALE_ROWS, SCALE_TILES, choose_copy, choose_row, choose_sums
from dskernels.moe.triton_sort import sort
from dskernels.portable import cast, launch
from dskernels.recording import Recorded
from dskernels.types import Fp8Tensor
from dskernels.validate import ceil_div

# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def zero_tail(p_rows, first, last, start, stride, o_h, m_h):
    """Set the columns `o_h` to zero in those rows of [first, last) that are not before `start`."""
    for row in range(tl.maximum(first, start), last):
        p_row = p_rows + tl.cast(row, tl.int64) * stride + o_h
        tl.store(p_row, tl.zeros(o_h.shape, p_rows.dtype.element_ty), mask=m_h)


@triton.jit
def copy_scales(
    p_s,
    p_source,
    p_out,
    i_p,
    rows,
    tiles,
    top_k,
    stride_s_token,
    stride_s,
    stride_out,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Copy TILES scales of each of ROWS rows from their tokens.

    In this direction writes are contiguous, and only reads are scattered, which come from the L2.
    """
    blocks = tl.cdiv(tiles, TILES)
    o_r = i_p // blocks * ROWS + tl.arange(0, ROWS)
    o_c = (i_p % blocks * TILES + tl.arange(0, TILES)).to(tl.int64)
    choice = tl.load(p_source + o_r, mask=o_r < rows, other=-1)
    mask = (o_c < tiles)[:, None] & (choice >= 0)[None, :]
    token = (choice // top_k).to(tl.int64)[None, :]
    scale = tl.load(p_s + o_c[:, None] * stride_s + token * stride_s_token, mask=mask, other=0.0)
    tl.store(p_out + o_c[:, None] * stride_out + o_r[None, :], scale, mask=mask)


@triton.jit
def row_of(p_index, i_t, j, top_k):
    """Row of a token's j-th choice, -1 if that was dropped or j is not below `top_k`. Without an index, token t has row
    t."""
    if p_index is None:
        return tl.where(j < top_k, i_t, -1)
    else:
        return tl.load(p_index + i_t * top_k + j, mask=j < top_k, other=-1).to(tl.int64)


@triton.jit
def load_row(p_y, row, size, stride_y, o_h, m_h):
    """Columns of a row. If there is no such row, nothing is read and these are zeros, which keeps NaN out of sums."""
    return tl.load(p_y + row * stride_y + o_h, mask=m_h & (row >= 0) & (row < size), other=0.0)


@triton.jit
def plus_row(total, y, row, size, p_weights, i_t, j, stride_w, HAS_WEIGHTS: tl.constexpr):
    """Add a row to `total` in fp32, multiplied by its weight if there are weights."""
    y = y.to(tl.float32)
    if HAS_WEIGHTS:
        is_row = (row >= 0) & (row < size)
        y = tl.where(is_row, y * tl.load(p_weights + i_t * stride_w + j, mask=is_row, other=0.0), 0.0)
    return total + y


@triton.jit(do_not_specialize=["rows", "scales", "stride_s", "stride_os"])
def permute_kernel(
    p_x,
    p_s,
    p_offsets,
    p_index,
    p_source,
    p_out,
    p_os,
    rows,
    scales,
    E,
    H,
    tiles,
    top_k,
    stride_x,
    stride_s_token,
    stride_s,
    stride_out,
    stride_os,
    ZERO_TAIL: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Copy WIDTH columns of one token to the rows of its choices; the first `scales` programs copy scales instead.

    With ZERO_TAIL, each token also zeroes its share of the rows after those of the last expert; otherwise these are not
    written.
    """
    i_p = tl.program_id(0) - scales
    if HAS_SCALE:  # noqa: SIM102 - decided at compile time: without scales there is no pointer to them
        if i_p < 0:
            strides = stride_s_token, stride_s, stride_os
            copy_scales(p_s, p_source, p_os, i_p + scales, rows, tiles, top_k, *strides, ROWS, TILES)
            return
    columns = tl.cdiv(H, WIDTH)
    i_t = i_p // columns
    o_h = i_p % columns * WIDTH + tl.arange(0, WIDTH)
    m_h = o_h < H
    x = tl.load(p_x + i_t.to(tl.int64) * stride_x + o_h, mask=m_h)
    for j in range(0, top_k, 4):  # four at a time, so that their indices are loaded together
        row_0, row_1 = row_of(p_index, i_t, j, top_k), row_of(p_index, i_t, j + 1, top_k)
        row_2, row_3 = row_of(p_index, i_t, j + 2, top_k), row_of(p_index, i_t, j + 3, top_k)
        tl.store(p_out + row_0 * stride_out + o_h, x, mask=m_h & (row_0 >= 0))
        tl.store(p_out + row_1 * stride_out + o_h, x, mask=m_h & (row_1 >= 0))
        tl.store(p_out + row_2 * stride_out + o_h, x, mask=m_h & (row_2 >= 0))
        tl.store(p_out + row_3 * stride_out + o_h, x, mask=m_h & (row_3 >= 0))
    if ZERO_TAIL:
        zero_tail(p_out, i_t * top_k, (i_t + 1) * top_k, tl.load(p_offsets + E), stride_out, o_h, m_h)


@triton.jit(do_not_specialize=["size", "came"])
def combine_kernel(
    p_y,
    p_index,
    p_weights,
    p_came,
    p_places,
    p_residual,
    p_out,
    size,
    came,
    H,
    top_k,
    places,
    stride_y,
    stride_w,
    stride_came,
    stride_residual,
    stride_out,
    HAS_WEIGHTS: tl.constexpr,
    HAS_CAME: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Compute WIDTH columns of out[t] = sum over j of weights[t, j] * y[index[t, j]] + sum over i of came[places[t, i]]
    + residual[t], in fp32 and in this order."""
    columns = tl.cdiv(H, WIDTH)
    i_t = (tl.program_id(0) // columns).to(tl.int64)
    o_h = tl.program_id(0) % columns * WIDTH + tl.arange(0, WIDTH)
    m_h = o_h < H
    total = tl.zeros([WIDTH], tl.float32)
    for j in range(0, top_k, 4):  # four at a time, so that four rows are being loaded at once
        row_0, row_1 = row_of(p_index, i_t, j, top_k), row_of(p_index, i_t, j + 1, top_k)
        row_2, row_3 = row_of(p_index, i_t, j + 2, top_k), row_of(p_index, i_t, j + 3, top_k)
        y_0 = load_row(p_y, row_0, size, stride_y, o_h, m_h)
        y_1 = load_row(p_y, row_1, size, stride_y, o_h, m_h)
        y_2 = load_row(p_y, row_2, size, stride_y, o_h, m_h)
        y_3 = load_row(p_y, row_3, size, stride_y, o_h, m_h)
        tl.debug_barrier()  # without it ptxas, to save registers, loads a row only after adding the one before
        total = plus_row(total, y_0, row_0, size, p_weights, i_t, j, stride_w, HAS_WEIGHTS)
        total = plus_row(total, y_1, row_1, size, p_weights, i_t, j + 1, stride_w, HAS_WEIGHTS)
        total = plus_row(total, y_2, row_2, size, p_weights, i_t, j + 2, stride_w, HAS_WEIGHTS)
        total = plus_row(total, y_3, row_3, size, p_weights, i_t, j + 3, stride_w, HAS_WEIGHTS)
    if HAS_CAME:
        for i in range(places):
            row = tl.load(p_places + i_t * places + i)
            m_y = m_h & (row >= 0) & (row < came)
            total += tl.load(p_came + row.to(tl.int64) * stride_came + o_h, mask=m_y, other=0.0).to(tl.float32)
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
    """Compute for one token dy[index[t, j]] = weights[t, j] * dout[t] and dweights[t, j] = <dout[t], y[index[t, j]]>.

    It also zeroes the token's share of the rows of dy after those of the last expert.
    """
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


@Recorded
def permute(x: Tensor, experts: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens copied to rows sorted by expert [T * k, H], with zeros after the last expert's; offsets; and index."""
    offsets, index, source = sort(experts, n_experts)
    out = empty(x, (source.shape[0], x.shape[1]), x.dtype)
    _copy(x, None, offsets, index, source, out, None)
    return out, offsets, index


def permute_rows(x: Tensor | Fp8Tensor, index: Tensor, source: Tensor) -> Tensor | Fp8Tensor:
    """Tokens, plain or in 1x128 tiles, copied to rows sorted by expert [T * k, H]; rows after the last expert's are not
    written. `index` and `source` are those of `sort`."""
    rows = source.shape[0]
    if not isinstance(x, Fp8Tensor):
        out = empty(x, (rows, x.shape[1]), x.dtype)
        _copy(x, None, None, index, source, out, None)
        return out
    out = empty(x.data, (rows, x.shape[1]), x.data.dtype)
    scale = empty_scale(x.scale, (rows, x.scale.shape[1]), x.block)
    # e4m3 is copied as bytes, since Triton takes the dtype only on GPUs that have it.
    _copy(x.data.view(torch.uint8), x.scale, None, index, source, out.view(torch.uint8), scale)
    return Fp8Tensor(out, scale, x.block)


def _copy(
    x: Tensor,
    scale: Tensor | None,
    offsets: Tensor | None,
    index: Tensor,
    source: Tensor,
    out: Tensor,
    out_scale: Tensor | None,
) -> None:
    """Copy tokens to `out` and their scales to `out_scale`; with `offsets`, zero the rows after the last expert's."""
    (tokens, top_k), (rows, width) = index.shape, out.shape
    if rows == 0 or width == 0:
        return
    config = choose_copy(width, x.element_size())
    tiles = ceil_div(width, 128)
    scales = 0 if scale is None else ceil_div(rows, SCALE_ROWS) * ceil_div(tiles, SCALE_TILES)
    launch(
        permute_kernel,
        (scales + tokens * ceil_div(width, config.width),),
        x,
        scale,
        offsets,
        index,
        source,
        out,
        out_scale,
        rows,
        scales,
        0 if offsets is None else offsets.shape[0] - 1,
        width,
        tiles,
        top_k,
        x.stride(0),
        *(0, 0) if scale is None else scale.stride(),
        out.stride(0),
        0 if out_scale is None else out_scale.stride(1),
        ZERO_TAIL=offsets is not None,
        HAS_SCALE=scale is not None,
        WIDTH=config.width,
        ROWS=SCALE_ROWS,
        TILES=SCALE_TILES,
        num_warps=config.num_warps,
    )


def weighted_sum(
    y: Tensor,
    index: Tensor | None,
    weights: Tensor | None,
    residual: Tensor | None = None,
    came: Tensor | None = None,
    places: Tensor | None = None,
    out: Tensor | None = None,
    *,
    partial: bool = False,
) -> Tensor:
    """The sum of each token's rows of `y`, weighted if there are weights, of its rows `places` in `came`, and of
    `residual`; in fp32, in this order, and rounded once.

    Without an index, token t has row t of `y`. `partial` says that the other choices of the tokens are on other ranks:
    it only decides the launch (see `choose_sums`), not the result.
    """
    (tokens, top_k), width = (y.shape[0], 1) if index is None else index.shape, y.shape[1]
    out = empty(y, (tokens, width), y.dtype) if out is None else out
    if tokens and width:
        config = choose_sums(width, partial)
        launch(
            combine_kernel,
            (tokens * ceil_div(width, config.width),),
            y,
            None if index is None else index.contiguous(),
            weights,
            came,
            None if places is None else places.contiguous(),
            residual,
            out,
            y.shape[0],
            0 if came is None else came.shape[0],
            width,
            top_k,
            0 if places is None else places.shape[1],
            y.stride(0),
            0 if weights is None else weights.stride(0),
            0 if came is None else came.stride(0),
            0 if residual is None else residual.stride(0),
            out.stride(0),
            HAS_WEIGHTS=weights is not None,
            HAS_CAME=came is not None,
            HAS_RESIDUAL=residual is not None,
            WIDTH=config.width,
            num_warps=config.num_warps,
        )
    return out


def weighted_sum_into(
    y: Tensor,
    index: Tensor | None,
    weights: Tensor | None,
    came: Tensor | None,
    places: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
) -> None:
    """`weighted_sum` with the arguments of the registered operation `sum_rows`."""
    weighted_sum(y, index, weights, residual, came, places, out, partial=True)


def permute_backward(dy: Tensor, index: Tensor) -> Tensor:
    """The gradient of the tokens: the sum of the gradients of each token's rows."""
    return weighted_sum(dy, index, None)


@Recorded
def combine(y: Tensor, offsets: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of each token's rows."""
    return weighted_sum(y, index, weights)


def combine_backward(dout: Tensor, y: Tensor, offsets: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `y` and of the routing weights."""
    (tokens, top_k), width = index.shape, y.shape[1]
    dy, dweights = empty(y, (y.shape[0], width), y.dtype), empty(weights, (tokens, top_k), weights.dtype)
    if tokens and top_k:
        config = choose_row(width)
        launch(
            combine_backward_kernel,
            (tokens,),
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
            WIDTH=config.width,
            num_warps=config.num_warps,
        )
    return dy, dweights
