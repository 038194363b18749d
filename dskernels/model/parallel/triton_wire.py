"""Portable Triton kernels for what has come over the wire: tokens out of e4m3 again, and the choices that are for here.

Names: `p_` pointer, `i_` index of a program, `o_` offsets, `m_` mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.fp8.layout import empty_scale
from dskernels.portable import INTERPRETED, cast, launch, reason_against_e4m3
from dskernels.validate import ceil_div

COLUMNS = 2048  # of a row that a program takes
CHOICES = 1024
ROWS, TILES = 32, 64  # of scales


@triton.jit(do_not_specialize=["stride_exponents"])
def unload_kernel(p_data, p_exponents, p_out, columns, stride_data, stride_exponents, COLUMNS: tl.constexpr):
    """Part of a row: e4m3 times the powers of two whose exponents a byte of each 128 columns has."""
    i_r = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < columns
    x = tl.load(p_data + i_r * stride_data + o_c, mask=m_c, other=0.0).to(tl.float32)
    exponent = tl.load(p_exponents + i_r * stride_exponents + o_c // 128, mask=m_c, other=0).to(tl.int32)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    tl.store(p_out + i_r * columns + o_c, cast(x * scale, p_out.dtype.element_ty), mask=m_c)


def unload(data: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """`data` e4m3 ``[R, H]`` times 2 ** (exponents - 127), uint8 ``[R, ceil(H / 128)]``, whose rows may lie apart.

    Both as `unload_supports` wants them. 8,192 rows of 7,168 take 49 us on an H200; a dispatch that ended in plain
    PyTorch took 756 us in all, and one that ends in this 202.
    """
    rows, columns = data.shape
    out = data.new_empty((rows, columns), dtype=dtype)
    if out.numel():
        grid = (rows, ceil_div(columns, COLUMNS))
        launch(
            unload_kernel, grid, data, exponents, out, columns, data.stride(0), exponents.stride(0), COLUMNS=COLUMNS,
            num_warps=8,
        )  # fmt: skip
    return out


def unload_supports(data: Tensor) -> str | None:
    """Why the kernel does not take it, or None."""
    if not (data.is_cuda or INTERPRETED.value):
        return "it is not on a GPU"
    return reason_against_e4m3(data.device)


@triton.jit
def turn_scales(p_rows, p_scales, i_p, rows, tiles, stride_rows, stride_tile, ROWS: tl.constexpr, TILES: tl.constexpr):
    """Scales of ROWS rows and TILES tiles, a row of them behind the other, to where a tile's rows are."""
    blocks = tl.cdiv(tiles, TILES)
    o_r = (i_p // blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    o_t = (i_p % blocks * TILES + tl.arange(0, TILES)).to(tl.int64)
    mask = (o_r < rows)[:, None] & (o_t < tiles)[None, :]
    scales = tl.load(p_rows + o_r[:, None] * stride_rows + o_t[None, :], mask=mask, other=0.0)
    tl.store(p_scales + o_t[None, :] * stride_tile + o_r[:, None], scales, mask=mask)


@triton.jit(
    do_not_specialize=["size", "stride_weights", "stride_experts", "first", "n", "rows", "stride_rows", "stride_tile"]
)
def choices_kernel(
    p_weights,
    p_experts,
    p_weights_out,
    p_experts_out,
    p_rows,
    p_scales,
    size,
    k,
    stride_weights,
    stride_experts,
    first,
    n,
    rows,
    tiles,
    stride_rows,
    stride_tile,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    """Weights, and ids counted from `first`, -1 for those outside of the `n` from there on; further programs turn
    scales.
    """
    blocks = tl.cdiv(size, CHOICES)
    i_p = tl.program_id(0)
    if HAS_SCALES:  # noqa: SIM102 - decided when compiled: without scales there is no pointer to them
        if i_p >= blocks:
            turn_scales(p_rows, p_scales, i_p - blocks, rows, tiles, stride_rows, stride_tile, ROWS, TILES)
            return
    o_i = i_p * CHOICES + tl.arange(0, CHOICES)
    m_i = o_i < size
    row, column = (o_i // k).to(tl.int64), o_i % k
    tl.store(p_weights_out + o_i, tl.load(p_weights + row * stride_weights + column, mask=m_i, other=0.0), mask=m_i)
    expert = tl.load(p_experts + row * stride_experts + column, mask=m_i, other=-1) - first
    tl.store(p_experts_out + o_i, tl.where((expert >= 0) & (expert < n), expert, -1), mask=m_i)


def choices(
    weights: Tensor, experts: Tensor, first: int, n: int, scales: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Choices fp32 and int32 ``[R, k]``, whose rows may lie apart, of n experts from `first` on, numbered from 0.

    With `scales`, fp32 ``[R, H / 128]`` whose rows may lie apart, these too, laid out as an `Fp8Tensor` has them: a
    launch less, and each between the products of a layer takes it 5 us.
    """
    rows, k = weights.shape
    found = weights.new_empty((rows, k)), experts.new_empty((rows, k))
    turned = None if scales is None else empty_scale(scales, (rows, scales.shape[1]), (1, 128))
    if not (weights.is_cuda or INTERPRETED.value):
        ids = experts - first
        found[0].copy_(weights)
        found[1].copy_(torch.where((ids >= 0) & (ids < n), ids, -1))
        if turned is not None and scales is not None:
            turned.copy_(scales)
    elif rows * k:
        tiles, strides, turning = 0, (0, 0), 0
        if turned is not None and scales is not None:
            tiles, strides = scales.shape[1], (scales.stride(0), turned.stride(1))
            turning = ceil_div(rows, ROWS) * ceil_div(tiles, TILES)
        launch(
            choices_kernel, (ceil_div(rows * k, CHOICES) + turning,), weights, experts, *found, scales, turned,
            rows * k, k, weights.stride(0), experts.stride(0), first, n, rows, tiles, *strides,
            CHOICES=CHOICES, ROWS=ROWS, TILES=TILES, HAS_SCALES=turned is not None, num_warps=4,
        )  # fmt: skip
    return *found, turned
