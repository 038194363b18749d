"""Portable Triton kernel of the block-scaled e4m3 GEMM: C[M, N] = A[M, K] @ B[N, K].T.

A program computes one tile of C. It walks K in steps of 128, the length of a scale: the tensor cores multiply a step
from a fresh accumulator (Hopper keeps only about 14 bits while it accumulates in e4m3), and the result, times both
scales, is added in fp32.

Names: `p_` pointer, `i_` index of a program or tile, `o_` offsets, `m_` mask, `s_` scale.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.gemm.config import choose_config
from dskernels.portable import cast, dot, reason_against_e4m3


@triton.jit
def tile_of(i, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row, column) of tile `i`, going down GROUP_M tiles before the next column, so that neighbours share B in L2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first = i // (GROUP_M * tiles_n) * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    inside = i % (GROUP_M * tiles_n)
    return first + inside % height, inside // height


@triton.jit(do_not_specialize=["M", "stride_sak"])
def fp8_gemm_kernel(
    p_a,
    p_sa,
    p_b,
    p_sb,
    p_bias,
    p_c,
    M,
    N,
    K,
    stride_am,
    stride_sak,
    stride_bn,
    stride_sbn,
    stride_sbk,
    stride_cm,
    B_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One BLOCK_M x BLOCK_N tile of C; B_ROWS is the height of a tile of B that has one scale, 128 or 1."""
    i_m, i_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, 128)
    m_m = o_m < M
    m_n = o_n < N

    p_a_tile = p_a + o_m[:, None] * stride_am + o_k[None, :]
    p_b_tile = p_b + o_n[None, :] * stride_bn + o_k[:, None]
    p_sa_tile = p_sa + o_m
    if B_ROWS == 1:
        p_sb_tile = p_sb + o_n * stride_sbn
    else:  # BLOCK_N divides 128: the tile lies in one block of B
        p_sb_tile = p_sb + i_n.to(tl.int64) * BLOCK_N // B_ROWS * stride_sbn

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(tl.cdiv(K, 128)):
        m_k = o_k < K - k * 128
        # [BLOCK_M, 128], [128, BLOCK_N]
        a = tl.load(p_a_tile, mask=m_m[:, None] & m_k[None, :], other=0.0)
        b = tl.load(p_b_tile, mask=m_n[None, :] & m_k[:, None], other=0.0)
        s_a = tl.load(p_sa_tile, mask=m_m, other=0.0)
        if B_ROWS == 1:
            s_b = tl.load(p_sb_tile, mask=m_n, other=0.0)
            total += dot(a, b) * (s_a[:, None] * s_b[None, :])
        else:
            total += dot(a, b) * (s_a * tl.load(p_sb_tile))[:, None]
        p_a_tile += 128
        p_b_tile += 128
        p_sa_tile += stride_sak
        p_sb_tile += stride_sbk

    if HAS_BIAS:
        total += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_c_tile = p_c + o_m[:, None] * stride_cm + o_n[None, :]
    m_c = m_m[:, None] & m_n[None, :]
    if ACCUMULATE:
        total += tl.load(p_c_tile, mask=m_c, other=0.0).to(tl.float32)
    tl.store(p_c_tile, cast(total, p_c.dtype.element_ty), mask=m_c)


def fp8_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_rows: int,
    bias: Tensor | None,
    out: Tensor,
    accumulate: bool,
) -> None:
    """Fill `out` [M, N], or add to it."""
    (m, k), n = a.shape, b.shape[0]
    if m == 0 or n == 0:
        return
    config = choose_config(m, n, b_rows, multiprocessors(a.device))
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),)
    fp8_gemm_kernel[grid](
        a,
        a_scale,
        b,
        b_scale,
        bias,
        out,
        m,
        n,
        k,
        a.stride(0),
        a_scale.stride(1),
        b.stride(0),
        b_scale.stride(0),
        b_scale.stride(1),
        out.stride(0),
        B_ROWS=b_rows,
        HAS_BIAS=bias is not None,
        ACCUMULATE=accumulate,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def fp8_gemm_supports(a: Tensor, *args: object) -> str | None:
    """Why the GPU of `a` cannot multiply e4m3, or None."""
    return reason_against_e4m3(a.device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU; of the CPU's interpreter, 1."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
