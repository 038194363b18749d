"""Portable Triton kernels that quantise to e4m3.

All of them work the same way: a program loads a patch, takes the largest magnitude of each tile, divides, and casts.
The division is IEEE (`div_rn`) and the cast rounds to nearest even, so that the bytes equal the reference's.

Names: `p_` pointer, `i_` index of a program or tile, `o_` offsets, `m_` mask.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.fp8.config import choose_columns, choose_norm, choose_norm_backward, choose_patch
from dskernels.fp8.layout import empty_quantized
from dskernels.portable import INTERPRETED, cast, reason_against_e4m3

# The L2 policy of what is read once: it does not push out what the next operation reads.
ONCE = tl.constexpr("evict_first")

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
def fused_multiply_add(a, b, c):
    """a * b + c in fp32, rounded once; numpy, which the interpreter computes with, would round the product too."""
    if INTERPRETED:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def to_e4m3(x, scale):
    """q = rne(x / scale) for |x| <= 448 * scale, to the byte of IEEE division, which takes three times as long.

    The product with the reciprocal is 1.5 ulp off at most. One step of Newton's leaves it at the nearest float but for
    quotients within 2^-22 ulp of the middle between two, none of which is a place where e4m3 rounds. Scale and x are
    first multiplied by a power of two, so that the step neither underflows nor overflows.
    """
    finite = scale < float("inf")
    # Both with a minus sign, since `-x` is `0 - x` in Triton, which loses the sign of zero.
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
    """Quantise fp32 `x` [ROWS, 128], the 1x128 tiles at `i_tile` of every STEP-th row from `i_row` on; store them."""
    o_r = i_row + tl.arange(0, ROWS) * STEP
    o_c = i_tile * 128 + tl.arange(0, 128)
    m_r = o_r < rows
    scale = tile_scale(tl.max(magnitude(x), axis=1), UE8M0)
    q = to_e4m3(x, scale[:, None])
    tl.store(p_q + o_r.to(tl.int64)[:, None] * stride_qr + o_c[None, :], q, mask=m_r[:, None] & (o_c < cols)[None, :])
    tl.store(p_s + i_tile.to(tl.int64) * stride_sc + o_r, scale, mask=m_r)


@triton.jit
def load_every_fourth(p_x, i_tile, i_col, k: tl.constexpr, rows, cols, stride_xr, COLS: tl.constexpr):
    """Rows 4 i + k of the 128 of tile `i_tile`, [32, COLS] in fp32, from column `i_col` on; zeros beyond the matrix."""
    o_r = i_tile * 128 + 4 * tl.arange(0, 32) + k
    o_c = i_col + tl.arange(0, COLS)
    m_x = (o_r < rows)[:, None] & (o_c < cols)[None, :]
    return tl.load(
        p_x + o_r.to(tl.int64)[:, None] * stride_xr + o_c[None, :], mask=m_x, other=0.0, eviction_policy=ONCE
    ).to(tl.float32)


@triton.jit
def store_turned(
    x0,
    x1,
    x2,
    x3,
    p_q,
    p_s,
    i_tile,
    i_col,
    rows,
    cols,
    stride_qr,
    stride_sc,
    UE8M0: tl.constexpr,
    COLS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Quantise the columns of a tile of 128 rows and store them as rows; fp32 `xk` [32, COLS] holds rows 4 i + k.

    A thread has four rows of a column that way, which it stores as one word where the rows of the result are whole
    WORDS (`p_q` is then a pointer to int32): single bytes take three times as long to change places.
    """
    o_c = i_col + tl.arange(0, COLS)
    o_w = i_tile * 32 + tl.arange(0, 32)
    amax = tl.maximum(tl.maximum(magnitude(x0), magnitude(x1)), tl.maximum(magnitude(x2), magnitude(x3)))
    scale = tile_scale(tl.max(amax, axis=0), UE8M0)
    tl.store(p_s + i_tile.to(tl.int64) * stride_sc + o_c, scale, mask=o_c < cols)
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
def store_both(
    x0,
    x1,
    x2,
    x3,
    p_q,
    p_s,
    p_qt,
    p_st,
    i_r,
    i_c,
    rows,
    cols,
    stride_qr,
    stride_sc,
    stride_qtr,
    stride_stc,
    UE8M0: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Both quantisations of patch (i_r, i_c) of 128x128."""
    store_rows(x0, p_q, p_s, i_r * 128, i_c, rows, cols, stride_qr, stride_sc, UE8M0, 32, 4)
    store_rows(x1, p_q, p_s, i_r * 128 + 1, i_c, rows, cols, stride_qr, stride_sc, UE8M0, 32, 4)
    store_rows(x2, p_q, p_s, i_r * 128 + 2, i_c, rows, cols, stride_qr, stride_sc, UE8M0, 32, 4)
    store_rows(x3, p_q, p_s, i_r * 128 + 3, i_c, rows, cols, stride_qr, stride_sc, UE8M0, 32, 4)
    store_turned(x0, x1, x2, x3, p_qt, p_st, i_r, i_c * 128, rows, cols, stride_qtr, stride_stc, UE8M0, 128, WORDS)


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
    """q and scale of the patch (program 0, program 1) of matrix (program 2), transposed if asked."""
    i_r, i_c, i_e = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_r = i_r.to(tl.int64) * PATCH_R + tl.arange(0, PATCH_R)
    o_c = i_c.to(tl.int64) * PATCH_C + tl.arange(0, PATCH_C)
    m_x = (o_r < rows)[:, None] & (o_c < cols)[None, :]
    # [PATCH_R, PATCH_C]
    x = tl.load(
        p_x + i_e * stride_xe + o_r[:, None] * stride_xr + o_c[None, :], mask=m_x, other=0.0, eviction_policy=ONCE
    ).to(tl.float32)

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
    """1x128 tiles of x.T, from a patch of 128 rows and COLS columns; if BOTH, those of x too, reading x once."""
    i_r, i_c = tl.program_id(0), tl.program_id(1)
    x0 = load_every_fourth(p_x, i_r, i_c * COLS, 0, rows, cols, stride_xr, COLS)
    x1 = load_every_fourth(p_x, i_r, i_c * COLS, 1, rows, cols, stride_xr, COLS)
    x2 = load_every_fourth(p_x, i_r, i_c * COLS, 2, rows, cols, stride_xr, COLS)
    x3 = load_every_fourth(p_x, i_r, i_c * COLS, 3, rows, cols, stride_xr, COLS)
    if BOTH:
        store_both(
            *(x0, x1, x2, x3, p_q, p_s, p_qt, p_st, i_r, i_c, rows, cols),
            *(stride_qr, stride_sc, stride_qtr, stride_stc, UE8M0, WORDS),
        )
    else:
        store_turned(
            x0, x1, x2, x3, p_qt, p_st, i_r, i_c * COLS, rows, cols, stride_qtr, stride_stc, UE8M0, COLS, WORDS
        )


@triton.jit
def gated(gate, up):
    """silu(gate) * up."""
    return gate * tl.sigmoid(gate) * up


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
    gate = tl.load(p_gate, mask=m_x, other=0.0, eviction_policy=ONCE).to(tl.float32)
    up = tl.load(p_gate + cols, mask=m_x, other=0.0, eviction_policy=ONCE).to(tl.float32)
    store_rows(gated(gate, up), p_q, p_s, i_r * PATCH_R, i_c, rows, cols, stride_qr, stride_sc, UE8M0, PATCH_R)


@triton.jit
def load_gated(p_x, i_tile, i_col, k: tl.constexpr, rows, cols, stride_xr, COLS: tl.constexpr):
    """silu(gate) * up of rows 4 i + k of a tile, [32, COLS]."""
    gate = load_every_fourth(p_x, i_tile, i_col, k, rows, cols, stride_xr, COLS)
    up = load_every_fourth(p_x + cols, i_tile, i_col, k, rows, cols, stride_xr, COLS)
    return gated(gate, up)


@triton.jit(do_not_specialize=["rows", "stride_qtr"])
def swiglu_quantize_columns_kernel(
    p_x,
    p_qt,
    p_st,
    rows,
    cols,
    stride_xr,
    stride_qtr,
    stride_stc,
    UE8M0: tl.constexpr,
    COLS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """1x128 tiles of (silu(gate) * up).T, from a patch of 128 rows and COLS columns."""
    i_r, i_c = tl.program_id(0), tl.program_id(1) * COLS
    x0 = load_gated(p_x, i_r, i_c, 0, rows, cols, stride_xr, COLS)
    x1 = load_gated(p_x, i_r, i_c, 1, rows, cols, stride_xr, COLS)
    x2 = load_gated(p_x, i_r, i_c, 2, rows, cols, stride_xr, COLS)
    x3 = load_gated(p_x, i_r, i_c, 3, rows, cols, stride_xr, COLS)
    store_turned(x0, x1, x2, x3, p_qt, p_st, i_r, i_c, rows, cols, stride_qtr, stride_stc, UE8M0, COLS, WORDS)


@triton.jit
def load_gated_gradient(p_dy, p_x, i_tile, i_col, k: tl.constexpr, rows, cols, stride_dyr, stride_xr):
    """Columns `i_col` on of the gradient of silu(gate) * up, for rows 4 i + k of a tile, [32, 128].

    Columns below `cols` are those of the gate, and the others those of up; a tile may hold some of both.
    """
    o_r = i_tile * 128 + 4 * tl.arange(0, 32) + k
    o_c = i_col + tl.arange(0, 128)
    m_gate = o_c < cols
    m_x = (o_r < rows)[:, None] & (o_c < 2 * cols)[None, :]
    o_gate = tl.where(m_gate, o_c, o_c - cols)[None, :]
    p_x += o_r.to(tl.int64)[:, None] * stride_xr
    dy = tl.load(p_dy + o_r.to(tl.int64)[:, None] * stride_dyr + o_gate, mask=m_x, other=0.0).to(tl.float32)
    gate = tl.load(p_x + o_gate, mask=m_x, other=0.0).to(tl.float32)
    up = tl.load(p_x + cols + o_gate, mask=m_x & m_gate[None, :], other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    return dy * tl.where(m_gate[None, :], up * (s + gate * s * (1.0 - s)), gate * s)


@triton.jit
def load_gate_gradient(p_dy, p_x, i_tile, i_col, k: tl.constexpr, rows, cols, stride_dyr, stride_xr, UP: tl.constexpr):
    """The same where all 128 columns from `i_col` on are the gate's, or UP's, at the same place in their half."""
    dy = load_every_fourth(p_dy, i_tile, i_col, k, rows, cols, stride_dyr, 128)
    gate = load_every_fourth(p_x, i_tile, i_col, k, rows, cols, stride_xr, 128)
    s = tl.sigmoid(gate)
    if UP:
        slope = gate * s
    else:
        slope = load_every_fourth(p_x + cols, i_tile, i_col, k, rows, cols, stride_xr, 128) * (s + gate * s * (1.0 - s))
    return dy * slope


@triton.jit(do_not_specialize=["rows", "stride_qtr", "stride_sc"])
def swiglu_quantize_backward_kernel(
    p_dy,
    p_x,
    p_q,
    p_s,
    p_qt,
    p_st,
    rows,
    cols,
    stride_dyr,
    stride_xr,
    stride_qr,
    stride_sc,
    stride_qtr,
    stride_stc,
    UE8M0: tl.constexpr,
    ALIGNED: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Both quantisations of the gradient of silu(gate) * up, a 128x128 patch of it.

    If ALIGNED, cols % 128 == 0: a program has the patch of the gate and that of up, which need the same inputs.
    """
    i_r, i_c = tl.program_id(0), tl.program_id(1)
    if ALIGNED:
        for half in tl.static_range(2):
            i_tile = i_c + half * (cols // 128)
            x0 = load_gate_gradient(p_dy, p_x, i_r, i_c * 128, 0, rows, cols, stride_dyr, stride_xr, half == 1)
            x1 = load_gate_gradient(p_dy, p_x, i_r, i_c * 128, 1, rows, cols, stride_dyr, stride_xr, half == 1)
            x2 = load_gate_gradient(p_dy, p_x, i_r, i_c * 128, 2, rows, cols, stride_dyr, stride_xr, half == 1)
            x3 = load_gate_gradient(p_dy, p_x, i_r, i_c * 128, 3, rows, cols, stride_dyr, stride_xr, half == 1)
            store_both(
                *(x0, x1, x2, x3, p_q, p_s, p_qt, p_st, i_r, i_tile, rows, 2 * cols),
                *(stride_qr, stride_sc, stride_qtr, stride_stc, UE8M0, WORDS),
            )
    else:
        x0 = load_gated_gradient(p_dy, p_x, i_r, i_c * 128, 0, rows, cols, stride_dyr, stride_xr)
        x1 = load_gated_gradient(p_dy, p_x, i_r, i_c * 128, 1, rows, cols, stride_dyr, stride_xr)
        x2 = load_gated_gradient(p_dy, p_x, i_r, i_c * 128, 2, rows, cols, stride_dyr, stride_xr)
        x3 = load_gated_gradient(p_dy, p_x, i_r, i_c * 128, 3, rows, cols, stride_dyr, stride_xr)
        store_both(
            *(x0, x1, x2, x3, p_q, p_s, p_qt, p_st, i_r, i_c, rows, 2 * cols),
            *(stride_qr, stride_sc, stride_qtr, stride_stc, UE8M0, WORDS),
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
    WHOLE: tl.constexpr,
):
    """1x128 tiles of RMSNorm(x [+ residual]) of one row, kept in registers if WHOLE, else read a second time."""
    i_r = tl.program_id(0).to(tl.int64)
    # A row is walked TILES tiles at a time, as [TILES, 128].
    o_c = tl.arange(0, TILES)[:, None] * 128 + tl.arange(0, 128)[None, :]
    p_x += i_r * stride_xr
    if HAS_RESIDUAL:
        p_residual += i_r * stride_rr
    p_total += i_r * stride_tr
    p_q += i_r * stride_qr
    p_s += i_r
    if WHOLE:
        x = stream(p_x, p_residual, o_c, cols, HAS_RESIDUAL)
        weight = tl.load(p_weight + o_c, mask=o_c < cols, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            tl.store(p_total + o_c, x, mask=o_c < cols)
        x = x.to(tl.float32)
        factor = tl.rsqrt(tl.sum(tl.sum(x * x, axis=1), axis=0) / cols + eps)
        store_normed(x * factor * weight, p_q, p_s, 0, cols, stride_sc, UE8M0, TILES)
    else:
        squares = tl.zeros([TILES, 128], tl.float32)
        for start in range(0, cols, TILES * 128):
            x = stream(p_x, p_residual, start + o_c, cols, HAS_RESIDUAL)
            if HAS_RESIDUAL:
                tl.store(p_total + start + o_c, x, mask=start + o_c < cols)
            squares += x.to(tl.float32) * x.to(tl.float32)
        factor = tl.rsqrt(tl.sum(tl.sum(squares, axis=1), axis=0) / cols + eps)
        for start in range(0, cols, TILES * 128):
            # The sum is formed again rather than read back: a thread may not see what another has stored.
            x = stream(p_x, p_residual, start + o_c, cols, HAS_RESIDUAL).to(tl.float32)
            weight = tl.load(p_weight + start + o_c, mask=start + o_c < cols, other=0.0).to(tl.float32)
            store_normed(x * factor * weight, p_q, p_s, start, cols, stride_sc, UE8M0, TILES)


@triton.jit
def stream(p_x, p_residual, o_c, cols, HAS_RESIDUAL: tl.constexpr):
    """x, or x + residual rounded to x's dtype, at columns `o_c`."""
    x = tl.load(p_x + o_c, mask=o_c < cols, other=0.0, eviction_policy=ONCE)
    if HAS_RESIDUAL:
        residual = tl.load(p_residual + o_c, mask=o_c < cols, other=0.0, eviction_policy=ONCE)
        x = cast(x.to(tl.float32) + residual.to(tl.float32), x.dtype)
    return x


@triton.jit
def store_normed(y, p_q, p_s, start, cols, stride_sc, UE8M0: tl.constexpr, TILES: tl.constexpr):
    """Quantise `y` [TILES, 128], the tiles of a row from column `start` on, and store them."""
    o_c = start + tl.arange(0, TILES)[:, None] * 128 + tl.arange(0, 128)[None, :]
    i_tile = start // 128 + tl.arange(0, TILES)
    scale = tile_scale(tl.max(magnitude(y), axis=1), UE8M0)
    tl.store(p_q + o_c, to_e4m3(y, scale[:, None]), mask=o_c < cols)
    tl.store(p_s + i_tile.to(tl.int64) * stride_sc, scale, mask=i_tile * 128 < cols)


@triton.jit(do_not_specialize=["rows", "programs"])
def rmsnorm_backward_kernel(
    p_dy,
    p_x,
    p_weight,
    p_dresidual,
    p_dx,
    p_partial,
    rows,
    programs,
    cols,
    eps,
    stride_dyr,
    stride_xr,
    stride_rr,
    stride_dxr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx of every programs-th row, and this program's part of dweight, the sum of dy * x * r over its rows.

    A row is BLOCK columns wide at most and stays in registers; the next one is on its way while it is worked on.
    """
    i_p = tl.program_id(0)
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < cols
    weight = tl.load(p_weight + o_c, mask=m_c, other=0.0)
    part = tl.zeros([BLOCK], tl.float32)
    x_next, dy_next = load_row(p_x, stride_xr, i_p, rows, o_c, m_c), load_row(p_dy, stride_dyr, i_p, rows, o_c, m_c)
    for i_r in range(i_p, rows, programs):
        x, dy = x_next.to(tl.float32), dy_next.to(tl.float32)
        x_next = load_row(p_x, stride_xr, i_r + programs, rows, o_c, m_c)
        dy_next = load_row(p_dy, stride_dyr, i_r + programs, rows, o_c, m_c)
        if HAS_RESIDUAL:
            dresidual = load_row(p_dresidual, stride_rr, i_r, rows, o_c, m_c).to(tl.float32)
        factor = tl.rsqrt(tl.sum(x * x, axis=0) / cols + eps)
        g = dy * weight.to(tl.float32)
        mean = tl.sum(g * x, axis=0) * factor / cols
        n = x * factor
        part += dy * n
        dx = factor * (g - n * mean)
        if HAS_RESIDUAL:
            dx += dresidual
        tl.store(p_dx + tl.cast(i_r, tl.int64) * stride_dxr + o_c, cast(dx, p_dx.dtype.element_ty), mask=m_c)
    tl.store(p_partial + i_p.to(tl.int64) * cols + o_c, part, mask=m_c)


@triton.jit
def load_row(p_x, stride, i_r, rows, o_c, m_c):
    """Columns `o_c` of row i_r; zeros beyond the last row."""
    return tl.load(
        p_x + tl.cast(i_r, tl.int64) * stride + o_c, mask=m_c & (i_r < rows), other=0.0, eviction_policy=ONCE
    )


@triton.jit(do_not_specialize=["rows", "programs"])
def rmsnorm_backward_wide_kernel(
    p_dy,
    p_x,
    p_weight,
    p_dresidual,
    p_dx,
    p_partial,
    rows,
    programs,
    cols,
    eps,
    stride_dyr,
    stride_xr,
    stride_rr,
    stride_dxr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same for rows that are wider than registers: BLOCK columns at a time, read twice, the sums kept in memory."""
    i_p = tl.program_id(0)
    o_b = tl.arange(0, BLOCK)
    p_partial += i_p.to(tl.int64) * cols
    for i_r in range(i_p, rows, programs):
        squares = tl.zeros([BLOCK], tl.float32)
        products = tl.zeros([BLOCK], tl.float32)
        for start in range(0, cols, BLOCK):
            o_c = start + o_b
            x = load_row(p_x, stride_xr, i_r, rows, o_c, o_c < cols).to(tl.float32)
            dy = load_row(p_dy, stride_dyr, i_r, rows, o_c, o_c < cols).to(tl.float32)
            weight = tl.load(p_weight + o_c, mask=o_c < cols, other=0.0).to(tl.float32)
            squares += x * x
            products += dy * weight * x
        factor = tl.rsqrt(tl.sum(squares, axis=0) / cols + eps)
        mean = tl.sum(products, axis=0) * factor / cols
        for start in range(0, cols, BLOCK):
            o_c = start + o_b
            x = load_row(p_x, stride_xr, i_r, rows, o_c, o_c < cols).to(tl.float32)
            dy = load_row(p_dy, stride_dyr, i_r, rows, o_c, o_c < cols).to(tl.float32)
            weight = tl.load(p_weight + o_c, mask=o_c < cols, other=0.0).to(tl.float32)
            n = x * factor
            dx = factor * (dy * weight - n * mean)
            if HAS_RESIDUAL:
                dx += load_row(p_dresidual, stride_rr, i_r, rows, o_c, o_c < cols).to(tl.float32)
            tl.store(p_dx + tl.cast(i_r, tl.int64) * stride_dxr + o_c, cast(dx, p_dx.dtype.element_ty), mask=o_c < cols)
            # A thread reads back only what it stored itself: the columns are spread over threads as before.
            part = tl.load(p_partial + o_c, mask=(o_c < cols) & (i_r > i_p), other=0.0)
            tl.store(p_partial + o_c, part + dy * n, mask=o_c < cols)


@triton.jit(do_not_specialize=["parts"])
def sum_parts_kernel(p_partial, p_out, parts, cols, PARTS: tl.constexpr, COLS: tl.constexpr):
    """Sum of `parts` rows of `cols` columns, always in the same order."""
    o_c = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([PARTS, COLS], tl.float32)
    for start in range(0, parts, PARTS):
        o_p = start + tl.arange(0, PARTS)
        m_x = (o_p < parts)[:, None] & (o_c < cols)[None, :]
        total += tl.load(p_partial + o_p.to(tl.int64)[:, None] * cols + o_c[None, :], mask=m_x, other=0.0)
    tl.store(p_out + o_c, cast(tl.sum(total, axis=0), p_out.dtype.element_ty), mask=o_c < cols)


# ---- launchers: they take the arguments of the registered operations ------------------------------------------------


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


def _quantize_columns(x: Tensor, ue8m0: bool, both: bool) -> tuple[Tensor, ...]:
    """Data and scale of x.T in 1x128 tiles, behind those of x [rows, cols] if `both`."""
    rows, cols = x.shape
    data, scale = empty_quantized(x, (1, 128)) if both else (None, None)
    data_t, scale_t = empty_quantized(x, (128, 1), transpose=True)
    config = choose_columns(both)
    grid = (triton.cdiv(rows, 128), triton.cdiv(cols, config.cols))
    if 0 not in grid:
        quantize_columns_kernel[grid](
            x,
            data,
            scale,
            _words(data_t),
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


def _words(data: Tensor) -> Tensor:
    """`data` as int32 where its rows are whole words."""
    return data.view(torch.int32) if data.shape[1] % 4 == 0 else data


def quantize_both(x: Tensor, ue8m0: bool) -> tuple[Tensor, ...]:
    """Data and scale of `x` [rows, cols] in 1x128 tiles, then of x.T."""
    return _quantize_columns(x, ue8m0, both=True)


def swiglu_quantize(gate_up: Tensor, ue8m0: bool, transpose: bool = False) -> tuple[Tensor, Tensor]:
    """Data and scale of silu(gate) * up, or of its transpose, `gate_up` being [T, 2I]."""
    rows, cols = gate_up.shape[0], gate_up.shape[1] // 2
    data, scale = empty_quantized(gate_up[:, :cols], (128, 1) if transpose else (1, 128), transpose)
    if rows == 0 or cols == 0:
        return data, scale
    if transpose:
        config = choose_columns(False)
        swiglu_quantize_columns_kernel[(triton.cdiv(rows, 128), triton.cdiv(cols, config.cols))](
            gate_up,
            _words(data),
            scale,
            rows,
            cols,
            gate_up.stride(0),
            rows,
            scale.stride(1),
            UE8M0=ue8m0,
            COLS=config.cols,
            WORDS=rows % 4 == 0,
            num_warps=config.num_warps,
        )
    else:
        patch = choose_patch((1, 128))
        swiglu_quantize_kernel[(triton.cdiv(rows, patch.rows), triton.cdiv(cols, 128))](
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


def swiglu_quantize_backward(dy: Tensor, gate_up: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Data and scale of the gradient [T, 2I] of silu(gate) * up in 1x128 tiles, then of its transpose."""
    rows, cols = dy.shape
    data, scale = empty_quantized(gate_up, (1, 128))
    data_t, scale_t = empty_quantized(gate_up, (128, 1), transpose=True)
    if rows and cols:
        aligned = cols % 128 == 0
        swiglu_quantize_backward_kernel[(triton.cdiv(rows, 128), triton.cdiv(cols if aligned else 2 * cols, 128))](
            dy,
            gate_up,
            data,
            scale,
            _words(data_t),
            scale_t,
            rows,
            cols,
            dy.stride(0),
            gate_up.stride(0),
            2 * cols,
            scale.stride(1),
            rows,
            scale_t.stride(1),
            UE8M0=ue8m0,
            ALIGNED=aligned,
            WORDS=rows % 4 == 0,
            num_warps=16,
        )
    return data, scale, data_t, scale_t


def rmsnorm_quantize(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, ue8m0: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Data and scale of RMSNorm(x [+ residual]), and that sum (empty without a residual)."""
    rows, cols = x.shape
    data, scale = empty_quantized(x, (1, 128))
    total = torch.empty_like(x) if residual is not None else x.new_empty(0, cols)
    config = choose_norm(cols)
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
            TILES=config.tiles,
            WHOLE=config.whole,
            num_warps=config.num_warps,
        )
    return data, scale, total


def rmsnorm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, dresidual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of RMSNorm(x) w.r.t. x, to which `dresidual` is added, and w.r.t. the weight."""
    rows, cols = x.shape
    dx = torch.empty(rows, cols, dtype=x.dtype, device=x.device)
    if rows == 0 or cols == 0:
        return dx, torch.zeros_like(weight)
    dweight = torch.empty_like(weight)
    config = choose_norm_backward(cols)
    programs = min(rows, config.per_sm * _multiprocessors(x.device))
    partial = torch.empty(programs, cols, dtype=torch.float32, device=x.device)
    kernel = rmsnorm_backward_kernel if config.whole else rmsnorm_backward_wide_kernel
    kernel[(programs,)](
        dy,
        x,
        weight,
        dresidual,
        dx,
        partial,
        rows,
        programs,
        cols,
        eps,
        dy.stride(0),
        x.stride(0),
        0 if dresidual is None else dresidual.stride(0),
        dx.stride(0),
        HAS_RESIDUAL=dresidual is not None,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )
    sum_parts_kernel[(triton.cdiv(cols, 32),)](partial, dweight, programs, cols, PARTS=64, COLS=32, num_warps=4)
    return dx, dweight


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def quantize_supports(x: Tensor, *args: object) -> str | None:
    """Why the GPU of `x` cannot make e4m3, or None."""
    return reason_against_e4m3(x.device)


quantize_both_supports = swiglu_quantize_supports = swiglu_quantize_backward_supports = quantize_supports
rmsnorm_quantize_supports = quantize_supports
