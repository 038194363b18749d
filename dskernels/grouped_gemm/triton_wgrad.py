"""Portable Triton kernels of the grouped weight gradient, and of quantising its operands along tokens.

They find groups with the plan of `dskernels.grouped_gemm.triton`, made for tiles of 128 tokens.

Names: `p_` pointer, `i_` index of a program or tile, `o_` offsets, `m_` mask, `s_` scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.fp8.layout import empty_scale
from dskernels.fp8.triton import store_rows
from dskernels.gemm.triton import architecture
from dskernels.grouped_gemm.config import choose_wgrad_config, padded_width
from dskernels.grouped_gemm.triton import group_of_tile, lanes, plan
from dskernels.portable import cast, dot, launch, reason_against_e4m3
from dskernels.validate import ceil_div


@triton.jit(do_not_specialize=["P", "top_k", "stride_sdyt", "stride_sxt"])
def grouped_wgrad_kernel(
    p_dy,
    p_sdy,
    p_x,
    p_sx,
    p_plan,
    p_source,
    p_dw,
    P,
    E,
    N,
    K,
    top_k,
    stride_dyn,
    stride_dyt,
    stride_sdyt,
    stride_xk,
    stride_xt,
    stride_sxt,
    stride_dwe,
    stride_dwn,
    FP8: tl.constexpr,
    GATHER_DY: tl.constexpr,
    GATHER_X: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One tile of dw [E, N, K], summed over a group's tokens: rows of [T, N] and [T, K], or with FP8 columns of [N, P]
    and [K, P]."""
    tiles_k = tl.cdiv(K, BLOCK_K)
    i_k = tl.program_id(0) % tiles_k
    i_n = tl.program_id(0) // tiles_k % tl.cdiv(N, BLOCK_N)
    i_e = tl.program_id(0) // tiles_k // tl.cdiv(N, BLOCK_N)
    if FP8:
        # The plan is made for tiles of 128, so a padded group begins at its first tile.
        first = tl.minimum(tl.load(p_plan + (E + 2) + i_e), P // 128) * 128
        last = tl.minimum(tl.load(p_plan + (E + 2) + i_e + 1), P // 128) * 128
    else:
        first = tl.load(p_plan + i_e)
        last = tl.load(p_plan + i_e + 1)
    if ACCUMULATE and first >= last:
        return
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m_n = o_n < N
    m_k = o_k < K
    p_dy_rows = p_dy + o_n.to(tl.int64) * stride_dyn
    p_x_rows = p_x + o_k.to(tl.int64) * stride_xk
    p_sdy_rows = p_sdy + (first // 128).to(tl.int64) * stride_sdyt + o_n
    p_sx_rows = p_sx + (first // 128).to(tl.int64) * stride_sxt + o_k
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for t in range(first, last, BLOCK_T):
        o_t = t + tl.arange(0, BLOCK_T)
        m_t = o_t < last
        o_dy = o_t.to(tl.int64)
        o_x = o_t.to(tl.int64)
        if GATHER_DY:
            o_dy = tl.load(p_source + o_t, mask=m_t, other=0).to(tl.int64) // top_k
        if GATHER_X:
            o_x = tl.load(p_source + o_t, mask=m_t, other=0).to(tl.int64) // top_k
        # [BLOCK_N, BLOCK_T], [BLOCK_T, BLOCK_K]; masked elements are never read, so NaN beyond a group has no effect
        dy = tl.load(p_dy_rows[:, None] + o_dy[None, :] * stride_dyt, mask=m_n[:, None] & m_t[None, :], other=0.0)
        x = tl.load(p_x_rows[None, :] + o_x[:, None] * stride_xt, mask=m_k[None, :] & m_t[:, None], other=0.0)
        if FP8:
            s_dy = tl.load(p_sdy_rows, mask=m_n, other=0.0)
            s_x = tl.load(p_sx_rows, mask=m_k, other=0.0)
            total += dot(dy, x) * (s_dy[:, None] * s_x[None, :])
            p_sdy_rows += stride_sdyt
            p_sx_rows += stride_sxt
        else:
            total += dot(dy, x)
    p_tile = p_dw + i_e.to(tl.int64) * stride_dwe + o_n.to(tl.int64)[:, None] * stride_dwn + o_k[None, :]
    m_tile = m_n[:, None] & m_k[None, :]
    if ACCUMULATE:
        total += tl.load(p_tile, mask=m_tile, other=0.0)
    tl.store(p_tile, cast(total, p_dw.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["P", "top_k", "stride_sc"])
def quantize_grouped_kernel(
    p_x,
    p_plan,
    p_source,
    p_q,
    p_s,
    P,
    E,
    K,
    top_k,
    stride_xt,
    stride_qr,
    stride_sc,
    UE8M0: tl.constexpr,
    GATHER: tl.constexpr,
    GROUPS: tl.constexpr,
    PATCH: tl.constexpr,
):
    """Quantise 128 tokens of one group, for PATCH rows of the result [K, P]; tiles that no group fills become zero."""
    i_tile, i_k = tl.program_id(0), tl.program_id(1)
    i_g = tl.minimum(group_of_tile(p_plan, i_tile, E, GROUPS), E)
    o_t = tl.load(p_plan + i_g) + (i_tile - tl.load(p_plan + (E + 2) + i_g)) * 128 + tl.arange(0, 128)
    m_t = (o_t < tl.load(p_plan + i_g + 1)) & (i_g < E)
    o_k = i_k * PATCH + tl.arange(0, PATCH)
    if GATHER:
        o_x = tl.load(p_source + o_t, mask=m_t, other=0).to(tl.int64) // top_k
    else:
        o_x = o_t.to(tl.int64)
    # [PATCH, 128]
    p_tile = p_x + o_x[None, :] * stride_xt + o_k[:, None]
    x = tl.load(p_tile, mask=m_t[None, :] & (o_k < K)[:, None], other=0.0).to(tl.float32)
    store_rows(x, p_q, p_s, i_k * PATCH, i_tile, K, P, stride_qr, stride_sc, UE8M0, PATCH)


# ---- launchers ------------------------------------------------------------------------------------------------------


def grouped_wgrad(
    dy: Tensor,
    dy_scale: Tensor | None,
    x: Tensor,
    x_scale: Tensor | None,
    offsets: Tensor,
    out: Tensor,
    accumulate: bool,
    source: Tensor | None = None,
    top_k: int = 1,
    gather: str | None = None,
) -> None:
    """Fill `out` [E, N, K] with, or add to it, the products over the tokens of each group.

    Tokens are the columns of e4m3 operands, and the rows of others. With `source` int32 [T], token r of the operand
    named by `gather`, "dy" or "x", is row ``source[r] // top_k`` of it.
    """
    groups, n, k = out.shape
    if n == 0 or k == 0:
        return
    fp8 = dy_scale is not None
    # Without e4m3 there are no scales; the kernel does not use the tensors that are passed in their place.
    s_dy, s_x = (dy, x) if dy_scale is None or x_scale is None else (dy_scale, x_scale)
    if fp8:
        # [N, P] and [K, P]: tokens are columns, and each group has whole tiles of 128
        tokens, (stride_dyn, stride_dyt), (stride_xk, stride_xt) = dy.shape[1], dy.stride(), x.stride()
    else:
        tokens, (stride_dyt, stride_dyn), (stride_xt, stride_xk) = dy.shape[0], dy.stride(), x.stride()
        if source is not None:
            tokens = source.shape[0]
    config = choose_wgrad_config(n, k, dy.dtype, architecture(dy.device))
    grid = (groups * ceil_div(n, config.block_m) * ceil_div(k, config.block_n),)
    launch(
        grouped_wgrad_kernel,
        grid,
        dy,
        s_dy,
        x,
        s_x,
        plan(offsets, tokens, 128),
        source,
        out,
        tokens,
        groups,
        n,
        k,
        top_k,
        stride_dyn,
        stride_dyt,
        s_dy.stride(1),
        stride_xk,
        stride_xt,
        s_x.stride(1),
        out.stride(0),
        out.stride(1),
        FP8=fp8,
        GATHER_DY=gather == "dy",
        GATHER_X=gather == "x",
        ACCUMULATE=accumulate,
        BLOCK_N=config.block_m,
        BLOCK_K=config.block_n,
        BLOCK_T=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def quantize_grouped(
    x: Tensor, offsets: Tensor, ue8m0: bool, source: Tensor | None = None, top_k: int = 1
) -> tuple[Tensor, Tensor]:
    """Data e4m3 [K, P] and scale [K, P / 128] of x.T; with `source`, token r is row ``source[r] // top_k`` of `x`."""
    k, groups = x.shape[1], offsets.shape[0] - 1
    rows = x.shape[0] if source is None else source.shape[0]
    width = padded_width(rows, groups)
    data = x.new_empty((k, width), dtype=torch.float8_e4m3fn)
    scale = empty_scale(x, (k, width // 128), (1, 128))
    if k:
        launch(
            quantize_grouped_kernel,
            (width // 128, ceil_div(k, 64)),
            x,
            plan(offsets, rows, 128),
            source,
            data,
            scale,
            width,
            groups,
            k,
            top_k,
            x.stride(0),
            data.stride(0),
            scale.stride(1),
            UE8M0=ue8m0,
            GATHER=source is not None,
            GROUPS=lanes(groups),
            PATCH=64,
            num_warps=8,
        )
    return data, scale


def grouped_wgrad_supports(dy: Tensor, dy_scale: Tensor | None, *args: object) -> str | None:
    """Why the GPU of `dy` does not support the product, or None."""
    return None if dy_scale is None else reason_against_e4m3(dy.device)


def quantize_grouped_supports(x: Tensor, *args: object) -> str | None:
    """Why the GPU of `x` does not support e4m3, or None."""
    return reason_against_e4m3(x.device)
