"""Portable Triton kernel that packs the input of the SwiGLU in e4m3, for the format see `packed`.

Names: `p_` pointer, `i_` index of a program or tile, `o_` offsets, `m_` mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.fp8.triton import load_rows, magnitude, tile_scale, to_e4m3
from dskernels.moe.packed import packed_width, parts_of, scales_at
from dskernels.portable import launch
from dskernels.validate import ceil_div


@triton.jit(do_not_specialize=["rows"])
def pack_kernel(p_x, p_q, p_s, rows, cols, stride_x, stride_q, stride_s, first_scale):
    """Quantise 32 rows of 128 columns, and store their e4m3 values and their scales."""
    i_r, i_c = tl.program_id(0) * 32, tl.program_id(1)
    x = load_rows(p_x, i_r, i_c * 128, rows, cols, stride_x, 1, 128)
    o_r = (i_r + tl.arange(0, 32)).to(tl.int64)
    o_c = i_c * 128 + tl.arange(0, 128)
    m_r = o_r < rows
    scale = tile_scale(tl.max(magnitude(x), axis=1), False)
    q = to_e4m3(x, scale[:, None])
    tl.store(p_q + o_r[:, None] * stride_q + o_c[None, :], q, mask=m_r[:, None] & (o_c < cols)[None, :])
    tl.store(p_s + o_r * stride_s + first_scale + i_c, scale, mask=m_r)


def packed(gate_up: Tensor) -> Tensor:
    """`gate_up` [R, C] quantised in 1x128 tiles, packed."""
    rows, cols = gate_up.shape
    out = gate_up.new_empty((rows, packed_width(cols)), dtype=torch.uint8)
    if rows and cols:
        data, scale = parts_of(out)
        grid = (ceil_div(rows, 32), ceil_div(cols, 128))
        strides = gate_up.stride(0), data.stride(0), scale.stride(0), scales_at(cols) // 4
        launch(pack_kernel, grid, gate_up, data, scale, rows, cols, *strides, num_warps=4)
    return out
