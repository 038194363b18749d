"""Portable Triton kernels that quantise RMSNorm, and its gradient. Names as in triton.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.device import multiprocessors
from dskernels.fp8.config import choose_norm, choose_norm_backward
from dskernels.fp8.layout import empty_quantized
from dskernels.fp8.triton import magnitude, quantize_supports, tile_scale, to_e4m3
from dskernels.portable import INTERPRETED, cast, fused_multiply_add, launch
from dskernels.validate import ceil_div

INFINITE = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=["stride_sc"])
def rmsnorm_quantize_kernel(
    p_x,
    p_residual,
    p_weight,
    p_total,
    p_normed,
    p_q,
    p_s,
    cols,
    eps,
    stride_xr,
    stride_rr,
    stride_tr,
    stride_nr,
    stride_qr,
    stride_sc,
    UE8M0: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    NORMED: tl.constexpr,
    TILES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """1x128 tiles of RMSNorm(x [+ residual]) of one row, which is kept in registers if WHOLE, and otherwise read
    twice."""
    i_r = tl.program_id(0).to(tl.int64)
    # A row is processed TILES tiles at a time, as [TILES, 128].
    o_c = tl.arange(0, TILES)[:, None] * 128 + tl.arange(0, 128)[None, :]
    p_x += i_r * stride_xr
    if HAS_RESIDUAL:
        p_residual += i_r * stride_rr
    p_total += i_r * stride_tr
    p_normed += i_r * stride_nr
    p_q += i_r * stride_qr
    p_s += i_r
    if WHOLE:
        x = stream(p_x, p_residual, o_c, cols, HAS_RESIDUAL)
        weight = tl.load(p_weight + o_c, mask=o_c < cols, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            tl.store(p_total + o_c, x, mask=o_c < cols)
        x = x.to(tl.float32)
        high, low = squared(x)
        total = sum_of_pairs(high, low)
        if not total < INFINITE:
            total = tl.sum(tl.sum(square_in_fp64(x), axis=1), axis=0)
        factor = norm_factor(total, cols, eps)
        store_normed(x * factor * weight, p_normed, p_q, p_s, 0, cols, stride_sc, UE8M0, NORMED, TILES)
    else:
        high, low = tl.zeros([TILES, 128], tl.float32), tl.zeros([TILES, 128], tl.float32)
        for start in range(0, cols, TILES * 128):
            x = stream(p_x, p_residual, start + o_c, cols, HAS_RESIDUAL)
            if HAS_RESIDUAL:
                tl.store(p_total + start + o_c, x, mask=start + o_c < cols)
            square, rest = squared(x.to(tl.float32))
            high, low = add_pairs(high, low, square, rest)
        total = sum_of_pairs(high, low)
        if not total < INFINITE:
            total = tl.zeros_like(total)
            for start in range(0, cols, 128):
                x = stream(p_x, p_residual, start + tl.arange(0, 128), cols, HAS_RESIDUAL)
                total += tl.sum(square_in_fp64(x), axis=0)
        factor = norm_factor(total, cols, eps)
        for start in range(0, cols, TILES * 128):
            # The sum is computed again rather than read back: a thread may not see what another has stored.
            x = stream(p_x, p_residual, start + o_c, cols, HAS_RESIDUAL).to(tl.float32)
            weight = tl.load(p_weight + start + o_c, mask=start + o_c < cols, other=0.0).to(tl.float32)
            store_normed(x * factor * weight, p_normed, p_q, p_s, start, cols, stride_sc, UE8M0, NORMED, TILES)


# The factor of a row has the reference's bits, and so have the scales: one ulp of the factor could be up to five ulp of
# a scale. For this the squares are summed with twice the mantissa: each sum is a float and the remainder that it leaves
# out. fp64, which is slow on some GPUs, is only used if a square exceeds fp32 (such as that of 2e19) or is not finite.


@triton.jit
def add_pairs(high_a, low_a, high_b, low_b):
    """Sum of two numbers, each of which is a pair of floats (Knuth, TAOCP 2, 4.2.2, theorem B)."""
    high = high_a + high_b
    of_b = high - high_a
    return high, low_a + low_b + ((high_a - (high - of_b)) + (high_b - of_b))


@triton.jit
def squared(x):
    """x^2 as a pair of floats."""
    square = x * x
    return square, fused_multiply_add(x, x, 0.0 - square)


@triton.jit
def square_in_fp64(x):
    """x^2."""
    x = x.to(tl.float64)
    return x * x


@triton.jit
def sum_of_pairs(high, low):
    """The sum of all high + low [TILES, 128], in fp64."""
    if INTERPRETED:
        total = tl.sum(tl.sum(high.to(tl.float64) + low.to(tl.float64), axis=1), axis=0)
    else:
        high, low = tl.reduce((high, low), 1, add_pairs)
        high, low = tl.reduce((high, low), 0, add_pairs)
        total = high.to(tl.float64) + low.to(tl.float64)
    return total


@triton.jit
def norm_factor(total, cols, eps):
    """1 / sqrt(total / cols + eps), each operation rounded to nearest."""
    mean = (total / cols).to(tl.float32)
    return tl.div_rn(tl.full(mean.shape, 1.0, tl.float32), tl.sqrt_rn(mean + eps))


@triton.jit
def stream(p_x, p_residual, o_c, cols, HAS_RESIDUAL: tl.constexpr):
    """x, or x + residual rounded to x's dtype, at columns `o_c`."""
    x = tl.load(p_x + o_c, mask=o_c < cols, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(p_residual + o_c, mask=o_c < cols, other=0.0)
        x = cast(x.to(tl.float32) + residual.to(tl.float32), x.dtype)
    return x


@triton.jit
def store_normed(
    y, p_normed, p_q, p_s, start, cols, stride_sc, UE8M0: tl.constexpr, NORMED: tl.constexpr, TILES: tl.constexpr
):
    """Quantise `y` [TILES, 128], the tiles of a row from column `start` on; store them and, if NORMED, `y` itself."""
    o_c = start + tl.arange(0, TILES)[:, None] * 128 + tl.arange(0, 128)[None, :]
    i_tile = start // 128 + tl.arange(0, TILES)
    scale = tile_scale(tl.max(magnitude(y), axis=1), UE8M0)
    tl.store(p_q + o_c, to_e4m3(y, scale[:, None]), mask=o_c < cols)
    tl.store(p_s + i_tile.to(tl.int64) * stride_sc, scale, mask=i_tile * 128 < cols)
    if NORMED:
        tl.store(p_normed + o_c, cast(y, p_normed.dtype.element_ty), mask=o_c < cols)


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

    A row is at most BLOCK columns wide and stays in registers; the next row is loaded while this one is processed.
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
    return tl.load(p_x + tl.cast(i_r, tl.int64) * stride + o_c, mask=m_c & (i_r < rows), other=0.0)


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
    """The same for rows that do not fit in registers: BLOCK columns at a time, read twice, with the sums kept in
    memory."""
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
            # A thread only reads back what it stored itself: columns are distributed over threads as before.
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


def rmsnorm_quantize(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, ue8m0: bool, with_normed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Data and scale of RMSNorm(x [+ residual]), that sum, and the norm; results not asked for have no rows."""
    rows, cols = x.shape
    data, scale = empty_quantized(x, (1, 128))
    total = torch.empty_like(x) if residual is not None else x.new_empty(0, cols)
    normed = x.new_empty(rows if with_normed else 0, cols)
    config = choose_norm(cols)
    if rows and cols:
        launch(
            rmsnorm_quantize_kernel,
            (rows,),
            x,
            residual,
            weight,
            total,
            normed,
            data,
            scale,
            cols,
            eps,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            total.stride(0),
            normed.stride(0),
            data.stride(0),
            scale.stride(1),
            UE8M0=ue8m0,
            HAS_RESIDUAL=residual is not None,
            NORMED=with_normed,
            TILES=config.tiles,
            WHOLE=config.whole,
            num_warps=config.num_warps,
        )
    return data, scale, total, normed


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
    programs = min(rows, config.per_sm * multiprocessors(x.device, interpreted=2))
    partial = torch.empty(programs, cols, dtype=torch.float32, device=x.device)
    kernel = rmsnorm_backward_kernel if config.whole else rmsnorm_backward_wide_kernel
    launch(
        kernel,
        (programs,),
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
    launch(sum_parts_kernel, (ceil_div(cols, 32),), partial, dweight, programs, cols, PARTS=64, COLS=32, num_warps=4)
    return dx, dweight


rmsnorm_quantize_supports = quantize_supports
