"""Portable Triton kernels that quantise silu(gate) * up and its gradient. Names as in triton.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dskernels.fp8.config import choose_columns, choose_patch
from dskernels.fp8.layout import empty_quantized
from dskernels.fp8.triton import load_rows, quantize_supports, store_rows, store_turned, words_of
from dskernels.portable import launch, sigmoid
from dskernels.recording import Recorded
from dskernels.validate import ceil_div


@triton.jit
def gated(gate, up):
    """silu(gate) * up."""
    return gate * sigmoid(gate) * up


@triton.jit(do_not_specialize=["rows", "stride_sc"])
def swiglu_quantize_kernel(
    p_x, p_q, p_s, rows, cols, stride_xr, stride_qr, stride_sc, UE8M0: tl.constexpr, PATCH_R: tl.constexpr
):
    """1x128 tiles of silu(gate) * up; gate and up are the two halves of a row of 2 * cols."""
    i_r, i_c = tl.program_id(0), tl.program_id(1)
    o_r = i_r * PATCH_R + tl.arange(0, PATCH_R)
    o_c = i_c * 128 + tl.arange(0, 128)
    m_x = (o_r < rows)[:, None] & (o_c < cols)[None, :]
    p_gate = p_x + o_r.to(tl.int64)[:, None] * stride_xr + o_c[None, :]
    gate = tl.load(p_gate, mask=m_x, other=0.0).to(tl.float32)
    up = tl.load(p_gate + cols, mask=m_x, other=0.0).to(tl.float32)
    store_rows(gated(gate, up), p_q, p_s, i_r * PATCH_R, i_c, rows, cols, stride_qr, stride_sc, UE8M0, PATCH_R)


@triton.jit
def load_gated(p_x, i_row, i_col, rows, cols, stride_xr, COLS: tl.constexpr):
    """silu(gate) * up of every fourth row from `i_row` on, [32, COLS]."""
    gate = load_rows(p_x, i_row, i_col, rows, cols, stride_xr, 4, COLS)
    up = load_rows(p_x + cols, i_row, i_col, rows, cols, stride_xr, 4, COLS)
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
    i_r, i_c = tl.program_id(0) * 128, tl.program_id(1) * COLS
    x0 = load_gated(p_x, i_r, i_c, rows, cols, stride_xr, COLS)
    x1 = load_gated(p_x, i_r + 1, i_c, rows, cols, stride_xr, COLS)
    x2 = load_gated(p_x, i_r + 2, i_c, rows, cols, stride_xr, COLS)
    x3 = load_gated(p_x, i_r + 3, i_c, rows, cols, stride_xr, COLS)
    store_turned(x0, x1, x2, x3, p_qt, p_st, i_r, i_c, rows, cols, stride_qtr, stride_stc, UE8M0, COLS, WORDS)


@triton.jit
def load_gated_gradient(
    p_dy, p_x, i_row, i_col, rows, cols, stride_dyr, stride_xr, STEP: tl.constexpr, COLS: tl.constexpr
):
    """The gradient of silu(gate) * up: every STEP-th row from `i_row` on, COLS of its 2 * cols columns from `i_col` on.

    The first `cols` columns belong to the gate, the others to up; a tile may have some of both.
    """
    o_r = i_row + tl.arange(0, 32) * STEP
    o_c = i_col + tl.arange(0, COLS)
    m_gate = o_c < cols
    m_x = (o_r < rows)[:, None] & (o_c < 2 * cols)[None, :]
    o_gate = tl.where(m_gate, o_c, o_c - cols)[None, :]
    p_x += o_r.to(tl.int64)[:, None] * stride_xr
    dy = tl.load(p_dy + o_r.to(tl.int64)[:, None] * stride_dyr + o_gate, mask=m_x, other=0.0).to(tl.float32)
    gate = tl.load(p_x + o_gate, mask=m_x, other=0.0).to(tl.float32)
    up = tl.load(p_x + cols + o_gate, mask=m_x & m_gate[None, :], other=0.0).to(tl.float32)
    s = sigmoid(gate)
    return dy * tl.where(m_gate[None, :], up * (s + gate * s * (1.0 - s)), gate * s)


@triton.jit
def load_half_gradient(
    p_dy, p_x, i_row, i_col, rows, cols, stride_dyr, stride_xr, STEP: tl.constexpr, COLS: tl.constexpr, UP: tl.constexpr
):
    """The same, from column `i_col` of the gate's half on, or of up's if UP."""
    dy = load_rows(p_dy, i_row, i_col, rows, cols, stride_dyr, STEP, COLS)
    gate = load_rows(p_x, i_row, i_col, rows, cols, stride_xr, STEP, COLS)
    s = sigmoid(gate)
    if UP:
        return dy * gate * s
    up = load_rows(p_x + cols, i_row, i_col, rows, cols, stride_xr, STEP, COLS)
    return dy * up * (s + gate * s * (1.0 - s))


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
    COLS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Both quantisations of the gradient of silu(gate) * up, for a 128x128 patch of it.

    If ALIGNED, cols % 128 == 0: a program has the patch of the gate and that of up, which need the same inputs. They
    are read again from the caches for each of the results, which is cheaper than keeping them.
    """
    i_r, i_c = tl.program_id(0) * 128, tl.program_id(1)
    for half in tl.static_range(2 if ALIGNED else 1):
        i_tile = i_c + half * (cols // 128)
        for i in range(4):
            if ALIGNED:
                x = load_half_gradient(
                    p_dy, p_x, i_r + i * 32, i_c * 128, rows, cols, stride_dyr, stride_xr, 1, 128, half == 1
                )
            else:
                x = load_gated_gradient(p_dy, p_x, i_r + i * 32, i_c * 128, rows, cols, stride_dyr, stride_xr, 1, 128)
            store_rows(x, p_q, p_s, i_r + i * 32, i_tile, rows, 2 * cols, stride_qr, stride_sc, UE8M0, 32)
        for i in range(128 // COLS):
            i_col = i_c * 128 + i * COLS
            if ALIGNED:
                x0 = load_half_gradient(p_dy, p_x, i_r, i_col, rows, cols, stride_dyr, stride_xr, 4, COLS, half == 1)
                x1 = load_half_gradient(
                    p_dy, p_x, i_r + 1, i_col, rows, cols, stride_dyr, stride_xr, 4, COLS, half == 1
                )
                x2 = load_half_gradient(
                    p_dy, p_x, i_r + 2, i_col, rows, cols, stride_dyr, stride_xr, 4, COLS, half == 1
                )
                x3 = load_half_gradient(
                    p_dy, p_x, i_r + 3, i_col, rows, cols, stride_dyr, stride_xr, 4, COLS, half == 1
                )
            else:
                x0 = load_gated_gradient(p_dy, p_x, i_r, i_col, rows, cols, stride_dyr, stride_xr, 4, COLS)
                x1 = load_gated_gradient(p_dy, p_x, i_r + 1, i_col, rows, cols, stride_dyr, stride_xr, 4, COLS)
                x2 = load_gated_gradient(p_dy, p_x, i_r + 2, i_col, rows, cols, stride_dyr, stride_xr, 4, COLS)
                x3 = load_gated_gradient(p_dy, p_x, i_r + 3, i_col, rows, cols, stride_dyr, stride_xr, 4, COLS)
            i_col += half * cols
            store_turned(
                x0, x1, x2, x3, p_qt, p_st, i_r, i_col, rows, 2 * cols, stride_qtr, stride_stc, UE8M0, COLS, WORDS
            )


# ---- launchers: they take the arguments of the registered operations ------------------------------------------------


@Recorded
def swiglu_quantize(gate_up: Tensor, ue8m0: bool, transpose: bool = False) -> tuple[Tensor, Tensor]:
    """Data and scale of silu(gate) * up, or of its transpose, `gate_up` being [T, 2I]."""
    rows, cols = gate_up.shape[0], gate_up.shape[1] // 2
    data, scale = empty_quantized(gate_up[:, :cols], (128, 1) if transpose else (1, 128), transpose)
    if rows == 0 or cols == 0:
        return data, scale
    if transpose:
        config = choose_columns(operands=2)
        launch(
            swiglu_quantize_columns_kernel,
            (ceil_div(rows, 128), ceil_div(cols, config.cols)),
            gate_up,
            words_of(data),
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
        launch(
            swiglu_quantize_kernel,
            (ceil_div(rows, patch.rows), ceil_div(cols, 128)),
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


@Recorded
def swiglu_quantize_backward(dy: Tensor, gate_up: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Data and scale of the gradient [T, 2I] of silu(gate) * up in 1x128 tiles, then of its transpose."""
    rows, cols = dy.shape
    data, scale = empty_quantized(gate_up, (1, 128))
    data_t, scale_t = empty_quantized(gate_up, (128, 1), transpose=True)
    if rows and cols:
        aligned, config = cols % 128 == 0, choose_columns(operands=3)
        launch(
            swiglu_quantize_backward_kernel,
            (ceil_div(rows, 128), ceil_div(cols if aligned else 2 * cols, 128)),
            dy,
            gate_up,
            data,
            scale,
            words_of(data_t),
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
            COLS=config.cols,
            WORDS=rows % 4 == 0,
            num_warps=config.num_warps,
            # Rounded as in the reference: if the terms of a tile's largest element nearly cancel, the scale would show
            # it.
            enable_fp_fusion=False,
        )
    return data, scale, data_t, scale_t


swiglu_quantize_supports = swiglu_quantize_backward_supports = quantize_supports
