"""Portable Triton kernel of the block-scaled e4m3 GEMM for few rows of A: it reads the weights once.

There is little to compute, and the time is that of reading B. So programs are not persistent, each computes one small
tile, and what matters is the number of bytes in flight: up to eight blocks of K per program, including their scales.
Loading the scales in the step that uses them instead would cost the latency of memory in each step: 35 µs instead of 22
at 1x4096x7168 on an H100. If there are too few tiles to fill the GPU, several programs share one, each with a part of
K, and `sum_parts_kernel` adds their sums in a fixed order.

Names: `p_` pointer, `i_` index of a program or tile, `o_` offsets, `m_` mask, `s_` scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.gemm.config import MAX_PARTS, GemmConfig
from dskernels.portable import cast, dot, launch
from dskernels.validate import ceil_div


@triton.jit(do_not_specialize=["M", "stride_sak", "stride_sbn", "blocks"])
def narrow_kernel(
    p_a,
    p_sa,
    p_b,
    p_sb,
    p_bias,
    p_c,
    p_parts,
    M,
    N,
    K,
    blocks,
    stride_am,
    stride_sak,
    stride_bn,
    stride_sbn,
    stride_sbk,
    stride_cm,
    B_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of C or, with SPLIT, the part of it from `blocks` blocks of K, which goes to p_parts [parts, M, N].

    Tensor cores multiply at least 64 rows by 8 or 16 columns. So with up to 16 rows of A (SWAP) the operands are
    exchanged: rows of B are the rows of the product, those of A its columns, and the tile of C is transposed at the
    end.
    """
    SWAP: tl.constexpr = BLOCK_M < 64
    tiles_m = tl.cdiv(M, BLOCK_M)
    i_m = tl.program_id(0) % tiles_m
    i_n = tl.program_id(0) // tiles_m
    first = tl.program_id(1) * blocks
    last = tl.minimum(first + blocks, tl.cdiv(K, 128))
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, 128)
    # Rows beyond the last load the last row again, and are not stored.
    o_a = tl.minimum(o_m, M - 1)
    o_b = tl.minimum(o_n, N - 1)
    p_a_tile = p_a + o_a[:, None] * stride_am + o_k[None, :]
    p_b_tile = p_b + o_b[:, None] * stride_bn + o_k[None, :]
    if B_ROWS == 1:
        o_sb = o_b * stride_sbn
    else:  # BLOCK_N divides 128, so the tile lies within one row of B's blocks
        o_sb = i_n.to(tl.int64) * BLOCK_N // B_ROWS * stride_sbn

    if SWAP:
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # With `num_stages` given for the loop, the loads of the scales are pipelined too.
    for k in tl.range(first, last, num_stages=STAGES):
        if EVEN_K:
            a = tl.load(p_a_tile + k * 128)  # [BLOCK_M, 128]
            b = tl.load(p_b_tile + k * 128)  # [BLOCK_N, 128]
        else:
            m_k = o_k < K - k * 128
            a = tl.load(p_a_tile + k * 128, mask=m_k[None, :], other=0.0)
            b = tl.load(p_b_tile + k * 128, mask=m_k[None, :], other=0.0)
        s_a = tl.load(p_sa + tl.cast(k, tl.int64) * stride_sak + o_a)
        s_b = tl.load(p_sb + tl.cast(k, tl.int64) * stride_sbk + o_sb)
        if SWAP:
            if B_ROWS == 1:
                total += dot(b, a.T) * (s_b[:, None] * s_a[None, :])
            else:
                total += dot(b, a.T) * (s_a * s_b)[None, :]
        else:
            if B_ROWS == 1:
                total += dot(a, b.T) * (s_a[:, None] * s_b[None, :])
            else:
                total += dot(a, b.T) * (s_a * s_b)[:, None]

    if SWAP:
        total = total.T
    m_n = o_n < N
    m_c = (o_m < M)[:, None] & m_n[None, :]
    if SPLIT:
        p_part = p_parts + (tl.program_id(1).to(tl.int64) * M + o_m)[:, None] * N + o_n[None, :]
        tl.store(p_part, total, mask=m_c)
    else:
        if HAS_BIAS:
            total += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        p_c_tile = p_c + o_m[:, None] * stride_cm + o_n[None, :]
        if ACCUMULATE:
            total += tl.load(p_c_tile, mask=m_c, other=0.0).to(tl.float32)
        tl.store(p_c_tile, cast(total, p_c.dtype.element_ty), mask=m_c)


@triton.jit(do_not_specialize=["M", "parts"])
def sum_parts_kernel(
    p_parts,
    p_bias,
    p_c,
    M,
    N,
    parts,
    stride_cm,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of a row of C: the sum of its parts, in the same order in every call."""
    i_m = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o_p = tl.arange(0, PARTS)
    m_n = o_n < N
    # [PARTS, BLOCK]
    p_part = p_parts + (o_p.to(tl.int64) * M + i_m)[:, None] * N + o_n[None, :]
    total = tl.sum(tl.load(p_part, mask=(o_p < parts)[:, None] & m_n[None, :], other=0.0), axis=0)
    if HAS_BIAS:
        total += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)
    p_c_row = p_c + i_m * stride_cm + o_n
    if ACCUMULATE:
        total += tl.load(p_c_row, mask=m_n, other=0.0).to(tl.float32)
    tl.store(p_c_row, cast(total, p_c.dtype.element_ty), mask=m_n)


def narrow(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_rows: int,
    bias: Tensor | None,
    out: Tensor,
    accumulate: bool,
    config: GemmConfig,
    parts: int,
) -> None:
    """Fill `out` [M, N], or add to it. Up to `parts` programs share a tile, each with at least one block of K."""
    (m, k), n = a.shape, b.shape[0]
    blocks = max(1, ceil_div(ceil_div(k, 128), parts))
    parts = max(1, ceil_div(ceil_div(k, 128), blocks))
    sums = torch.empty((parts, m, n), dtype=torch.float32, device=out.device) if parts > 1 else None
    launch(
        narrow_kernel,
        (ceil_div(m, config.block_m) * ceil_div(n, config.block_n), parts),
        a,
        a_scale,
        b,
        b_scale,
        bias,
        out,
        sums,
        m,
        n,
        k,
        blocks,
        a.stride(0),
        a_scale.stride(1),
        b.stride(0),
        b_scale.stride(0),
        b_scale.stride(1),
        out.stride(0),
        B_ROWS=b_rows,
        HAS_BIAS=bias is not None and parts == 1,
        ACCUMULATE=accumulate and parts == 1,
        SPLIT=parts > 1,
        EVEN_K=k % 128 == 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if sums is not None:
        launch(
            sum_parts_kernel,
            (ceil_div(n, 256), m),
            sums,
            bias,
            out,
            m,
            n,
            parts,
            out.stride(0),
            HAS_BIAS=bias is not None,
            ACCUMULATE=accumulate,
            PARTS=MAX_PARTS,
            BLOCK=256,
            num_warps=4,
        )
