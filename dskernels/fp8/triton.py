"""Portable Triton kernels that quantise to e4m3.

All of them work the same way: a program loads a patch, takes the largest magnitude of each tile, divides, and casts.
The division is IEEE (`div_rn`) and the cast rounds to nearest even, so that the bytes equal the reference's.

Names: `p_` pointer, `i_` index of a program or tile, `o_` offsets, `m_` mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.fp8.config import choose_columns, choose_patch
from dskernels.fp8.layout import empty_quantized
from dskernels.portable import cast, fused_multiply_add, launch, reason_against_e4m3
from dskernels.recording import Recorded
from dskernels.validate import ceil_div

# ---- steps ----------------------------------------------------------------------------------------------------------


@triton.jit
def magnitude(x):
    """|x| as the integer of its bits: ordered like the floats, and a NaN is larger than all, so `tl.max` keeps it."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def tile_scale(amax, UE8M0: tl.constexpr):
    """The scale of a tile from the bits of its largest magnitude: amax / 448, at least 2^-126, and 1 if amax is 0."""
    amax = amax.to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, 448.0)
    scale = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)
    if UE8M0:
        # Round up to a power of two: any bit of the mantissa carries into the exponent. Infinity and NaN do not change.
        power = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = tl.where(scale < float("inf"), power.to(tl.float32, bitcast=True), scale)
    return tl.where(amax == 0.0, 1.0, scale)


@triton.jit
def to_e4m3(x, scale):
    """q = round(x / scale) for |x| <= 448 * scale, with the same bytes as IEEE division, which takes three times as
    long.

    The product with the reciprocal is off by at most 1.5 ulp. One Newton step makes it the nearest float, except for
    quotients within 2^-22 ulp of the middle between two floats, and e4m3 never rounds there. Scale and x are first
    multiplied by a power of two, so that the step neither underflows nor overflows.
    """
    finite = scale < float("inf")
    # Both are multiplied by -1, since `-x` is `0 - x` in Triton, which loses the sign of zero.
    up = (-0x1000000 - (scale.to(tl.int32, bitcast=True) & 0x7F800000)).to(tl.float32, bitcast=True)
    # finite / infinity is 0, infinity / infinity and everything / NaN is NaN
    up = tl.where(finite, up, tl.where(scale == float("inf"), -0.0, scale))
    scale = tl.where(finite, scale * -up, 1.0)
    inverse = tl.div_rn(tl.full(scale.shape, -1.0, tl.float32), scale)
    x = x * up
    q = x * inverse
    return cast(fused_multiply_add(fused_multiply_add(q, scale, x), inverse, q), tl.float8e4nv)


@triton.jit
def store_rows(
    x,
    p_q,
    p_s,
    i_row,
    i_tile,
    rows,
    cols,
    stride_qr,
    stride_sc,
    UE8M0: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr = 1,
):
    """Quantise fp32 `x` [ROWS, 128], the 1x128 tiles at `i_tile` of every STEP-th row from `i_row` on, and store
    them."""
    o_r = i_row + tl.arange(0, ROWS) * STEP
    o_c = i_tile * 128 + tl.arange(0, 128)
    m_r = o_r < rows
    scale = tile_scale(tl.max(magnitude(x), axis=1), UE8M0)
    q = to_e4m3(x, scale[:, None])
    tl.store(p_q + o_r.to(tl.int64)[:, None] * stride_qr + o_c[None, :], q, mask=m_r[:, None] & (o_c < cols)[None, :])
    tl.store(p_s + i_tile.to(tl.int64) * stride_sc + o_r, scale, mask=m_r)


@triton.jit
def load_rows(p_x, i_row, i_col, rows, cols, stride_xr, STEP: tl.constexpr, COLS: tl.constexpr):
    """Every STEP-th row from `i_row` on, from column `i_col` on, [32, COLS] in fp32; zeros beyond the matrix."""
    o_r = i_row + tl.arange(0, 32) * STEP
    o_c = i_col + tl.arange(0, COLS)
    m_x = (o_r < rows)[:, None] & (o_c < cols)[None, :]
    return tl.load(p_x + o_r.to(tl.int64)[:, None] * stride_xr + o_c[None, :], mask=m_x, other=0.0).to(tl.float32)


@triton.jit
def store_turned(
    x0,
    x1,
    x2,
    x3,
    p_q,
    p_s,
    i_row,
    i_col,
    rows,
    cols,
    stride_qr,
    stride_sc,
    UE8M0: tl.constexpr,
    COLS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Quantise the columns of 128 rows and store them as rows; fp32 `xk` [32, COLS] contains rows i_row + 4 i + k.

    This gives a thread four rows of a column, which it stores as one word if the rows of the result are whole WORDS
    (`p_q` is then a pointer to int32): exchanging single bytes takes three times as long.
    """
    o_c = i_col + tl.arange(0, COLS)
    o_w = i_row // 4 + tl.arange(0, 32)
    amax = tl.maximum(tl.maximum(magnitude(x0), magnitude(x1)), tl.maximum(magnitude(x2), magnitude(x3)))
    scale = tile_scale(tl.max(amax, axis=0), UE8M0)
    tl.store(p_s + (i_row // 128).to(tl.int64) * stride_sc + o_c, scale, mask=o_c < cols)
    q0 = bits(to_e4m3(x0, scale[None, :]))
    q1 = bits(to_e4m3(x1, scale[None, :]))
    q2 = bits(to_e4m3(x2, scale[None, :]))
    q3 = bits(to_e4m3(x3, scale[None, :]))
    word = tl.trans(q0 | (q1 << 8) | (q2 << 16) | (q3 << 24))
    p_q += o_c.to(tl.int64)[:, None] * (stride_qr // 4 if WORDS else stride_qr)
    m_c = (o_c < cols)[:, None]
    if WORDS:
        tl.store(p_q + o_w[None, :], word, mask=m_c & (o_w * 4 < rows)[None, :])
    else:
        for k in tl.static_range(4):
            o_r = (o_w * 4 + k)[None, :]
            q = ((word >> (8 * k)) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
            tl.store(p_q + o_r, q, mask=m_c & (o_r < rows))


@triton.jit
def bits(q):
    """The byte of an e4m3 value, as an int32."""
    return q.to(tl.uint8, bitcast=True).to(tl.int32)


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "stride_sr", "stride_sc"])
def quantize_kernel(
    p_x,
    p_q,
    p_s,
    rows,
    cols,
    stride_xe,
    stride_xr,
    stride_qe,
    stride_qr,
    stride_se,
    stride_sr,
    stride_sc,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
    PATCH_R: tl.constexpr,
    PATCH_C: tl.constexpr,
    UE8M0: tl.constexpr,
    TRANSPOSE: tl.constexpr,
):
    """q and scale of the patch (program 0, program 1) of matrix (program 2), transposed if asked for."""
    i_r, i_c, i_e = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_r = i_r.to(tl.int64) * PATCH_R + tl.arange(0, PATCH_R)
    o_c = i_c.to(tl.int64) * PATCH_C + tl.arange(0, PATCH_C)
    m_x = (o_r < rows)[:, None] & (o_c < cols)[None, :]
    # [PATCH_R, PATCH_C]
    x = tl.load(p_x + i_e * stride_xe + o_r[:, None] * stride_xr + o_c[None, :], mask=m_x, other=0.0).to(tl.float32)

    p_s += i_e * stride_se
    if TILE_R == 1:
        scale = tile_scale(tl.max(magnitude(x), axis=1), UE8M0)
        tl.store(p_s + o_r * stride_sr + i_c * stride_sc, scale, mask=o_r < rows)
        q = to_e4m3(x, scale[:, None])
    elif TILE_C == 1:
        scale = tile_scale(tl.max(magnitude(x), axis=0), UE8M0)
        tl.store(p_s + i_r * stride_sr + o_c * stride_sc, scale, mask=o_c < cols)
        q = to_e4m3(x, scale[None, :])
    else:
        scale = tile_scale(tl.max(tl.max(magnitude(x), axis=1), axis=0), UE8M0)
        tl.store(p_s + i_r.to(tl.int64) * stride_sr + i_c * stride_sc, scale)
        q = to_e4m3(x, scale)

    p_q += i_e * stride_qe
    if TRANSPOSE:
        tl.store(p_q + o_c[:, None] * stride_qr + o_r[None, :], tl.trans(q), mask=tl.trans(m_x))
    else:
        tl.store(p_q + o_r[:, None] * stride_qr + o_c[None, :], q, mask=m_x)


@triton.jit(do_not_specialize=["rows", "stride_qtr", "stride_sc"])
def quantize_columns_kernel(
    p_x,
    p_q,
    p_s,
    p_qt,
    p_st,
    rows,
    cols,
    stride_xr,
    stride_qr,
    stride_sc,
    stride_qtr,
    stride_stc,
    UE8M0: tl.constexpr,
    BOTH: tl.constexpr,
    COLS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """1x128 tiles of x.T, from 128 rows and COLS columns; if BOTH, of 128 columns, and first those of x too.

    With BOTH, the patch is loaded again from the L2, 64 columns at a time: keeping it all would take 200 registers a
    thread, and 91 us at 4096 x 7168.
    """
    i_r, i_c = tl.program_id(0) * 128, tl.program_id(1)
    if BOTH:
        for i in tl.static_range(4):
            x = load_rows(p_x, i_r + i * 32, i_c * 128, rows, cols, stride_xr, 1, 128)
            store_rows(x, p_q, p_s, i_r + i * 32, i_c, rows, cols, stride_qr, stride_sc, UE8M0, 32)
    for i in tl.static_range(128 // COLS if BOTH else 1):
        i_col = i_c * (128 if BOTH else COLS) + i * COLS
        x0 = load_rows(p_x, i_r, i_col, rows, cols, stride_xr, 4, COLS)
        x1 = load_rows(p_x, i_r + 1, i_col, rows, cols, stride_xr, 4, COLS)
        x2 = load_rows(p_x, i_r + 2, i_col, rows, cols, stride_xr, 4, COLS)
        x3 = load_rows(p_x, i_r + 3, i_col, rows, cols, stride_xr, 4, COLS)
        store_turned(x0, x1, x2, x3, p_qt, p_st, i_r, i_col, rows, cols, stride_qtr, stride_stc, UE8M0, COLS, WORDS)


# ---- launchers: they take the arguments of the registered operations ------------------------------------------------


@Recorded
def quantize(x: Tensor, block_rows: int, block_cols: int, ue8m0: bool, transpose: bool) -> tuple[Tensor, Tensor]:
    """Data and scale of `x` [E?, rows, cols]."""
    if transpose and (block_rows, block_cols) == (128, 1):
        return _quantize_columns(x, ue8m0, both=False)  # type: ignore[return-value]
    rows, cols = x.shape[-2:]
    block = (block_rows, block_cols)
    data, scale = empty_quantized(x, block, transpose)
    patch = choose_patch(block)
    stack = x.dim() == 3
    stride_sr, stride_sc = scale.stride()[-2:]
    grid = (ceil_div(rows, patch.rows), ceil_div(cols, patch.cols), x.shape[0] if stack else 1)
    if 0 not in grid:
        launch(
            quantize_kernel,
            grid,
            x,
            data,
            scale,
            rows,
            cols,
            x.stride(0) if stack else 0,
            x.stride(-2),
            data.stride(0) if stack else 0,
            data.stride(-2),
            scale.stride(0) if stack else 0,
            stride_sc if transpose else stride_sr,
            stride_sr if transpose else stride_sc,
            TILE_R=block_rows,
            TILE_C=block_cols,
            PATCH_R=patch.rows,
            PATCH_C=patch.cols,
            UE8M0=ue8m0,
            TRANSPOSE=transpose,
            num_warps=patch.num_warps,
        )
    return data, scale


def _quantize_columns(x: Tensor, ue8m0: bool, both: bool) -> tuple[Tensor, ...]:
    """Data and scale of x.T in 1x128 tiles, after those of x [rows, cols] if `both`."""
    rows, cols = x.shape
    data, scale = empty_quantized(x, (1, 128)) if both else (None, None)
    data_t, scale_t = empty_quantized(x, (128, 1), transpose=True)
    config = choose_columns()
    grid = (ceil_div(rows, 128), ceil_div(cols, 128 if both else config.cols))
    if 0 not in grid:
        launch(
            quantize_columns_kernel,
            grid,
            x,
            data,
            scale,
            words_of(data_t),
            scale_t,
            rows,
            cols,
            x.stride(0),
            cols,
            scale.stride(1) if scale is not None else 0,
            rows,
            scale_t.stride(1),
            UE8M0=ue8m0,
            BOTH=both,
            COLS=config.cols,
            WORDS=rows % 4 == 0,
            num_warps=config.num_warps,
        )
    return (data_t, scale_t) if data is None or scale is None else (data, scale, data_t, scale_t)


def words_of(data: Tensor) -> Tensor:
    """`data` as int32 if its rows are whole words."""
    return data.view(torch.int32) if data.shape[1] % 4 == 0 else data


@Recorded
def quantize_both(x: Tensor, ue8m0: bool) -> tuple[Tensor, ...]:
    """Data and scale of `x` [rows, cols] in 1x128 tiles, then of x.T."""
    return _quantize_columns(x, ue8m0, both=True)


@Recorded
def quantize_weight(x: Tensor, ue8m0: bool) -> tuple[Tensor, ...]:
    """Data and scale of `x` [E?, rows, cols] in 128x128 blocks, then of x.T: in two passes."""
    return *quantize(x, 128, 128, ue8m0, False), *quantize(x, 128, 128, ue8m0, True)


def quantize_supports(x: Tensor, *args: object) -> str | None:
    """Why the GPU of `x` cannot make e4m3, or None."""
    return reason_against_e4m3(x.device)


quantize_both_supports = quantize_weight_supports = quantize_supports
