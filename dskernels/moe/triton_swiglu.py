"""Portable Triton kernels of the SwiGLU between the products of an expert, and of its gradient.

Names: `p_` pointer, `i_` index of a program or tile, `o_` offsets, `m_` mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.moe.config import FEWEST_SWIGLU, SWIGLU_ROWS, choose_row
from dskernels.moe.packed import parts_of, scales_at
from dskernels.portable import cast, launch
from dskernels.validate import ceil_div

# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def swiglu_kernel(
    p_x, p_offsets, p_out, rows, groups, width, stride_x, stride_out, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    """Compute WIDTH columns of silu(gate) * up of ROWS rows; gate and up are the halves of a row of 2 * width."""
    columns = tl.cdiv(width, WIDTH)
    i_r = (tl.program_id(0) // columns).to(tl.int64) * ROWS
    if p_offsets is not None:
        rows = tl.load(p_offsets + groups)
        if i_r >= rows:  # rows behind the last group are never read
            return
    o_c = tl.program_id(0) % columns * WIDTH + tl.arange(0, WIDTH)
    for row in tl.static_range(ROWS):
        m_c = (o_c < width) & (i_r + row < rows)
        p_row = p_x + (i_r + row) * stride_x + o_c
        gate = tl.load(p_row, mask=m_c, other=0.0).to(tl.float32)
        up = tl.load(p_row + width, mask=m_c, other=0.0).to(tl.float32)
        hidden = cast(gate * tl.sigmoid(gate) * up, p_out.dtype.element_ty)
        tl.store(p_out + (i_r + row) * stride_out + o_c, hidden, mask=m_c)


@triton.jit
def swiglu_backward_kernel(
    p_x,
    p_scales,
    p_dhidden,
    p_source,
    p_index,
    p_weights,
    p_dx,
    p_hidden,
    p_dweights,
    width,
    stride_x,
    stride_scales,
    first_scale,
    stride_dhidden,
    stride_dx,
    stride_hidden,
    HAS_SCALES: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Compute for one row dx [2 * width], weight * hidden [width], and dweight = <dhidden, hidden>.

    `dhidden` is not yet multiplied by the routing weight. With HAS_SCALES, x is e4m3 in tiles of 128 columns, see
    `packed`.
    """
    i_r = tl.program_id(0).to(tl.int64)
    weight = 1.0
    if HAS_WEIGHTS:
        # There are as many choices as rows, so program r can also zero the gradient of choice r if that was dropped.
        tl.store(p_dweights + i_r, 0.0, mask=tl.load(p_index + i_r) < 0)
        choice = tl.load(p_source + i_r)
        if choice < 0:  # a row behind the last expert's, which is never read
            return
        weight = tl.load(p_weights + choice)
    products = tl.zeros([WIDTH], tl.float32)
    for first in range(0, width, WIDTH):
        o_c = first + tl.arange(0, WIDTH)
        m_c = o_c < width
        gate = tl.load(p_x + i_r * stride_x + o_c, mask=m_c, other=0.0).to(tl.float32)
        up = tl.load(p_x + i_r * stride_x + width + o_c, mask=m_c, other=0.0).to(tl.float32)
        if HAS_SCALES:
            p_row = p_scales + i_r * stride_scales + first_scale
            gate *= tl.load(p_row + o_c // 128, mask=m_c, other=0.0)
            up *= tl.load(p_row + (width + o_c) // 128, mask=m_c, other=0.0)
        dhidden = tl.load(p_dhidden + i_r * stride_dhidden + o_c, mask=m_c, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        products += dhidden * silu * up
        # silu' = sigmoid * (1 + gate * (1 - sigmoid))
        dgate = dhidden * weight * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        dup = dhidden * weight * silu
        dtype = p_dx.dtype.element_ty
        tl.store(p_dx + i_r * stride_dx + o_c, cast(dgate, dtype), mask=m_c)
        tl.store(p_dx + i_r * stride_dx + width + o_c, cast(dup, dtype), mask=m_c)
        tl.store(p_hidden + i_r * stride_hidden + o_c, cast(silu * up * weight, dtype), mask=m_c)
    if HAS_WEIGHTS:
        tl.store(p_dweights + choice, tl.sum(products, 0))


@triton.jit(do_not_specialize=["rows", "parts"])
def sum_of_choices_kernel(p_parts, p_source, p_index, p_out, rows, parts, BLOCK: tl.constexpr):
    """Sum the parts [parts, rows] of BLOCK rows, in order, and store each sum where the row's choice stands.

    It also stores 0 for those of the BLOCK choices of the same numbers that were dropped.
    """
    o_r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_out + o_r, 0.0, mask=tl.load(p_index + o_r, mask=o_r < rows, other=0) < 0)
    choice = tl.load(p_source + o_r, mask=o_r < rows, other=-1)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(parts):
        total += tl.load(p_parts + tl.cast(i, tl.int64) * rows + o_r, mask=choice >= 0, other=0.0)
    tl.store(p_out + choice, total, mask=choice >= 0)


# ---- launchers ------------------------------------------------------------------------------------------------------


def swiglu(gate_up: Tensor, offsets: Tensor | None = None) -> Tensor:
    """silu(gate) * up [R, I] of `gate_up` [R, 2I]; rows from ``offsets[-1]`` on stay uninitialised."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    hidden = gate_up.new_empty(rows, width)
    if hidden.numel():
        config = choose_row(width)
        together = SWIGLU_ROWS if rows >= FEWEST_SWIGLU else 1
        launch(
            swiglu_kernel,
            (ceil_div(rows, together) * ceil_div(width, config.width),),
            gate_up,
            offsets,
            hidden,
            rows,
            0 if offsets is None else offsets.shape[0] - 1,
            width,
            gate_up.stride(0),
            hidden.stride(0),
            WIDTH=config.width,
            ROWS=together,
            num_warps=config.num_warps,
        )
    return hidden


def swiglu_backward(
    gate_up: Tensor, dhidden: Tensor, source: Tensor | None, index: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradient of `gate_up`, the weighted activation, and the gradient of the routing weights (0 for dropped choices).

    `gate_up` is a plain matrix, or packed (see `packed`). Result rows without a choice (source -1) stay uninitialised,
    as no product reads them.
    """
    rows, width = dhidden.shape
    packed = gate_up.dtype == torch.uint8
    dgate_up = dhidden.new_empty(rows, 2 * width) if packed else torch.empty_like(gate_up)
    hidden = torch.empty_like(dhidden)
    x, scales = parts_of(gate_up) if packed else (gate_up, None)
    dweights = None if weights is None else torch.empty_like(weights)
    if rows:
        config = choose_row(width)
        launch(
            swiglu_backward_kernel,
            (rows,),
            x,
            scales,
            dhidden,
            source,
            index,
            weights,
            dgate_up,
            hidden,
            dweights,
            width,
            x.stride(0),
            0 if scales is None else scales.stride(0),
            scales_at(2 * width) // 4,
            dhidden.stride(0),
            dgate_up.stride(0),
            hidden.stride(0),
            HAS_SCALES=packed,
            HAS_WEIGHTS=weights is not None,
            WIDTH=config.width,
            num_warps=config.num_warps,
        )
    return dgate_up, hidden, dweights


def sum_of_choices(parts: Tensor, source: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """For each choice the sum of the parts [P, R] of its row, and 0 if it was dropped; of the shape of `weights`."""
    out, rows = torch.empty_like(weights), source.shape[0]
    if rows:
        grid = (ceil_div(rows, 256),)
        launch(sum_of_choices_kernel, grid, parts, source, index, out, rows, parts.shape[0], BLOCK=256, num_warps=4)
    return out
