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

from dskernels.fp8.config import choose_patch
from dskernels.fp8.layout import empty_quantized
from dskernels.portable import cast, reason_against_e4m3

# ---- steps ----------------------------------------------------------------------------------------------------------


@triton.jit
def magnitude(x):
    """|x| as the integer of its bits: ordered like the floats, and a NaN is larger than all, so `tl.max` keeps it."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def tile_scale(amax, UE8M0: tl.constexpr):
    """Scale of a tile from the bits of its largest magnitude: amax / 448, at least 2^-126, and 1 where amax is 0."""
    amax = amax.to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, 448.0)
    scale = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)
    if UE8M0:
        # Up to a power of two: any bit of the mantissa carries into the exponent. Infinity and NaN stay.
        power = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = tl.where(scale < float("inf"), power.to(tl.float32, bitcast=True), scale)
    return tl.where(amax == 0.0, 1.0, scale)


@triton.jit
def to_e4m3(x, scale):
    """q = rne(x / scale), clamped to +-448 first because casts differ in what they do on overflow."""
    q = tl.clamp(tl.div_rn(x, scale), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return cast(q, tl.float8e4nv)


@triton.jit
def store_rows(x, p_q, p_s, i_row, i_tile, rows, cols, stride_qr, stride_sc, UE8M0: tl.constexpr, ROWS: tl.constexpr):
    """Quantise fp32 `x` [ROWS, 128], the 1x128 tiles at `i_tile` of rows from `i_row` on, and store them."""
    o_r = i_row + tl.arange(0, ROWS)
    o_c = i_tile * 128 + tl.arange(0, 128)
    m_r = o_r < rows
    scale = tile_scale(tl.max(magnitude(x), axis=1), UE8M0)
    q = to_e4m3(x, scale[:, None])
    tl.store(p_q + o_r.to(tl.int64)[:, None] * stride_qr + o_c[None, :], q, mask=m_r[:, None] & (o_c < cols)[None, :])
    tl.store(p_s + i_tile.to(tl.int64) * stride_sc + o_r, scale, mask=m_r)


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
    """q and scale of the patch (program 0, program 1) of matrix (program 2), transposed if asked."""
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


@triton.jit(do_not_specialize=["rows", "stride_sc"])
def quantize_both_kernel(
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
):
    """Both quantisations of one 128x128 patch: 1x128 tiles of x, and 1x128 tiles of x.T, reading x once."""
    i_r, i_c = tl.program_id(0), tl.program_id(1)
    o_r = i_r * 128 + tl.arange(0, 128)
    o_c = i_c * 128 + tl.arange(0, 128)
    m_x = (o_r < rows)[:, None] & (o_c < cols)[None, :]
    x = tl.load(p_x + o_r.to(tl.int64)[:, None] * stride_xr + o_c[None, :], mask=m_x, other=0.0).to(tl.float32)
    store_rows(x, p_q, p_s, i_r * 128, i_c, rows, cols, stride_qr, stride_sc, UE8M0, 128)
    store_rows(tl.trans(x), p_qt, p_st, i_c * 128, i_r, cols, rows, stride_qtr, stride_stc, UE8M0, 128)


@triton.jit(do_not_specialize=["rows", "stride_sc"])
def swiglu_quantize_kernel(
    p_x, p_q, p_s, rows, cols, stride_xr, stride_qr, stride_sc, UE8M0: tl.constexpr, PATCH_R: tl.constexpr
):
    """1x128 tiles of silu(gate) * up, gate and up being the two halves of a row of 2 * cols."""
    i_r, i_c = tl.program_id(0), tl.program_id(1)
    o_r = i_r * PATCH_R + tl.arange(0, PATCH_R)
    o_c = i_c * 128 + tl.arange(0, 128)
    m_x = (o_r < rows)[:, None] & (o_c < cols)[None, :]
    p_gate = p_x + o_r.to(tl.int64)[:, None] * stride_xr + o_c[None, :]
    gate = tl.load(p_gate, mask=m_x, other=0.0).to(tl.float32)
    up = tl.load(p_gate + cols, mask=m_x, other=0.0).to(tl.float32)
    store_rows(
        gate * tl.sigmoid(gate) * up, p_q, p_s, i_r * PATCH_R, i_c, rows, cols, stride_qr, stride_sc, UE8M0, PATCH_R
    )


@triton.jit(do_not_specialize=["rows", "stride_sc"])
def rmsnorm_quantize_kernel(
    p_x,
    p_residual,
    p_weight,
    p_total,
    p_q,
    p_s,
    rows,
    cols,
    eps,
    stride_xr,
    stride_rr,
    stride_tr,
    stride_qr,
    stride_sc,
    UE8M0: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    TILES: tl.constexpr,
):
    """1x128 tiles of RMSNorm(x [+ residual]) of one row; a second pass over the row quantises it."""
    i_r = tl.program_id(0).to(tl.int64)
    # A row is walked TILES tiles at a time, as [TILES, 128].
    o_c = tl.arange(0, TILES)[:, None] * 128 + tl.arange(0, 128)[None, :]
    p_x += i_r * stride_xr
    p_total += i_r * stride_tr
    squares = tl.zeros([TILES, 128], tl.float32)
    for start in range(0, cols, TILES * 128):
        m_c = start + o_c < cols
        x = tl.load(p_x + start + o_c, mask=m_c, other=0.0)
        if HAS_RESIDUAL:
            residual = tl.load(p_residual + i_r * stride_rr + start + o_c, mask=m_c, other=0.0)
            total = cast(x.to(tl.float32) + residual.to(tl.float32), x.dtype)
            tl.store(p_total + start + o_c, total, mask=m_c)
            x = total
        squares += x.to(tl.float32) * x.to(tl.float32)
    factor = tl.rsqrt(tl.sum(tl.sum(squares, axis=1), axis=0) / cols + eps)
    for start in range(0, cols, TILES * 128):
        m_c = start + o_c < cols
        # The sum is formed again rather than read back: a thread may not see what another has stored.
        x = tl.load(p_x + start + o_c, mask=m_c, other=0.0)
        if HAS_RESIDUAL:
            residual = tl.load(p_residual + i_r * stride_rr + start + o_c, mask=m_c, other=0.0)
            x = cast(x.to(tl.float32) + residual.to(tl.float32), x.dtype)
        weight = tl.load(p_weight + start + o_c, mask=m_c, other=0.0).to(tl.float32)
        y = x.to(tl.float32) * factor * weight
        scale = tile_scale(tl.max(magnitude(y), axis=1), UE8M0)
        i_tile = start // 128 + tl.arange(0, TILES)
        tl.store(p_q + i_r * stride_qr + start + o_c, to_e4m3(y, scale[:, None]), mask=m_c)
        tl.store(p_s + i_tile.to(tl.int64) * stride_sc + i_r, scale, mask=i_tile * 128 < cols)


# ---- launchers: they take the arguments of the registered operations ------------------------------------------------


def quantize(x: Tensor, block_rows: int, block_cols: int, ue8m0: bool, transpose: bool) -> tuple[Tensor, Tensor]:
    """Data and scale of `x` [E?, rows, cols]."""
    rows, cols = x.shape[-2:]
    block = (block_rows, block_cols)
    data, scale = empty_quantized(x, block, transpose)
    patch = choose_patch(block)
    stack = x.dim() == 3
    stride_sr, stride_sc = scale.stride()[-2:]
    grid = (triton.cdiv(rows, patch.rows), triton.cdiv(cols, patch.cols), x.shape[0] if stack else 1)
    if 0 not in grid:
        quantize_kernel[grid](
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


def quantize_both(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Data and scale of `x` [rows, cols] in 1x128 tiles, then of x.T."""
    rows, cols = x.shape
    data, scale = empty_quantized(x, (1, 128))
    data_t, scale_t = empty_quantized(x, (128, 1), transpose=True)
    grid = (triton.cdiv(rows, 128), triton.cdiv(cols, 128))
    if 0 not in grid:
        quantize_both_kernel[grid](
            x,
            data,
            scale,
            data_t,
            scale_t,
            rows,
            cols,
            x.stride(0),
            data.stride(0),
            scale.stride(1),
            data_t.stride(0),
            scale_t.stride(1),
            UE8M0=ue8m0,
            num_warps=8,
        )
    return data, scale, data_t, scale_t


def swiglu_quantize(gate_up: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    """Data and scale of silu(gate) * up, `gate_up` being [T, 2I]."""
    rows, cols = gate_up.shape[0], gate_up.shape[1] // 2
    data, scale = empty_quantized(gate_up[:, :cols], (1, 128))
    patch = choose_patch((1, 128))
    grid = (triton.cdiv(rows, patch.rows), triton.cdiv(cols, 128))
    if 0 not in grid:
        swiglu_quantize_kernel[grid](
            gate_up,
            data,
            scale,
            rows,
            cols,
            gate_up.stride(0),
            data.stride(0),
            scale.stride(1),
            UE8M0=ue8m0,
            PATCH_R=patch.rows,
            num_warps=patch.num_warps,
        )
    return data, scale


def rmsnorm_quantize(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, ue8m0: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Data and scale of RMSNorm(x [+ residual]), and that sum (empty without a residual)."""
    rows, cols = x.shape
    data, scale = empty_quantized(x, (1, 128))
    total = torch.empty_like(x) if residual is not None else x.new_empty(0, cols)
    if rows and cols:
        rmsnorm_quantize_kernel[(rows,)](
            x,
            residual,
            weight,
            total,
            data,
            scale,
            rows,
            cols,
            eps,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            total.stride(0),
            data.stride(0),
            scale.stride(1),
            UE8M0=ue8m0,
            HAS_RESIDUAL=residual is not None,
            TILES=min(triton.next_power_of_2(triton.cdiv(cols, 128)), 16),
            num_warps=4,
        )
    return data, scale, total


def quantize_supports(x: Tensor, *args: object) -> str | None:
    """Why the GPU of `x` cannot make e4m3, or None."""
    return reason_against_e4m3(x.device)


quantize_both_supports = swiglu_quantize_supports = rmsnorm_quantize_supports = quantize_supports
