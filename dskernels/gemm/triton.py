"""Portable Triton kernel of the block-scaled e4m3 GEMM: C[M, N] = A[M, K] @ B[N, K].T.

A program computes tiles of C. It takes K in steps of 128, the length of a scale. The tensor cores multiply each step
from a zero accumulator, since Hopper keeps only about 14 bits while it accumulates e4m3; the result is multiplied by
both scales and added in fp32.

From Hopper on, tiles are loaded through tensor descriptors, and programs are persistent: there are as many as run at
once, and each computes several tiles. Few rows of A are left to `triton_narrow`.

Names: `p_` pointer, `d_` tensor descriptor, `i_` index of a program or tile, `o_` offsets, `m_` mask, `s_` scale.
"""

from __future__ import annotations

import contextvars
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.device import capability, multiprocessors
from dskernels.gemm.config import choose_config, choose_parts
from dskernels.gemm.triton_narrow import narrow
from dskernels.portable import cast, dot, reason_against_e4m3


@triton.jit
def tile_of(i, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row, column) of tile `i`: GROUP_M tiles down, then the next column, so that consecutive tiles share B in L2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first = i // (GROUP_M * tiles_n) * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    inside = i % (GROUP_M * tiles_n)
    return first + inside % height, inside // height


@triton.jit(do_not_specialize=["M", "stride_sak", "stride_sbn"])
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
    TMA: tl.constexpr,
    TMA_STORE: tl.constexpr,
):
    """BLOCK_M x BLOCK_N tiles of C. B_ROWS is the number of rows of B that share a scale, 128 or 1.

    With TMA, tiles are loaded through tensor descriptors, which return zeros outside the matrix; with TMA_STORE, C is
    stored through one.
    """
    if TMA:
        d_a = tl.make_tensor_descriptor(p_a, [M, K], [stride_am, 1], [BLOCK_M, 128])
        d_b = tl.make_tensor_descriptor(p_b, [N, K], [stride_bn, 1], [BLOCK_N, 128])
    if TMA_STORE:
        d_c = tl.make_tensor_descriptor(p_c, [M, N], [stride_cm, 1], [BLOCK_M, BLOCK_N])
    blocks = tl.cdiv(K, 128)
    for i in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        i_m, i_n = tile_of(i, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        # Offsets of pointers are int64, coordinates of descriptors int32.
        o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        o_k = tl.arange(0, 128)
        m_m = o_m < M
        m_n = o_n < N
        o_a = tl.minimum(o_m, M - 1)
        o_b = tl.minimum(o_n, N - 1)
        if B_ROWS == 1:
            o_sb = o_b * stride_sbn
        else:  # BLOCK_N divides 128, so the tile lies within one row of B's blocks
            o_sb = i_n.to(tl.int64) * BLOCK_N // B_ROWS * stride_sbn

        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in tl.range(0, blocks):
            k_s = tl.cast(k, tl.int64)
            s_a = tl.load(p_sa + k_s * stride_sak + o_a)
            s_b = tl.load(p_sb + k_s * stride_sbk + o_sb)
            # [BLOCK_M, 128], [128, BLOCK_N]
            if TMA:
                a = d_a.load([i_m * BLOCK_M, k * 128])
                b = d_b.load([i_n * BLOCK_N, k * 128]).T
            else:
                m_k = o_k < K - k * 128
                a = tl.load(p_a + o_a[:, None] * stride_am + (k * 128 + o_k)[None, :], mask=m_k[None, :], other=0.0)
                b = tl.load(p_b + o_b[None, :] * stride_bn + (k * 128 + o_k)[:, None], mask=m_k[:, None], other=0.0)
            if B_ROWS == 1:
                total += dot(a, b) * s_a[:, None] * s_b[None, :]
            else:
                total += dot(a, b) * (s_a * s_b)[:, None]

        if HAS_BIAS:
            total += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        if TMA_STORE:
            d_c.store([i_m * BLOCK_M, i_n * BLOCK_N], cast(total, p_c.dtype.element_ty))
        else:
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
    processors = multiprocessors(a.device, interpreted=4)
    arch, tma = architecture(a.device), k > 0 and aligned(a) and aligned(b)
    config = choose_config(m, n, b_rows, processors, arch, tma)
    tiles = config.tiles(m, n)
    if config.narrow:
        parts = choose_parts(tiles, triton.cdiv(k, 128), processors)
        narrow(a, a_scale, b, b_scale, b_rows, bias, out, accumulate, config, parts)
        return
    launch = functools.partial(
        fp8_gemm_kernel[(min(tiles, config.resident * processors) if config.tma else tiles,)],
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
        TMA=config.tma,
        TMA_STORE=config.tma and not accumulate and aligned(out),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if config.tma:
        contextvars.copy_context().run(with_scratch, launch, a.device)
    else:
        launch()


def fp8_gemm_supports(a: Tensor, *args: object) -> str | None:
    """Why the GPU of `a` cannot multiply e4m3, or None."""
    return reason_against_e4m3(a.device)


def with_scratch(launch: functools.partial, device: torch.device) -> None:
    """Launch a kernel that creates tensor descriptors; Triton keeps these in memory from its allocator.

    The allocator is set for the current context only. Run this in a copy of the caller's context, so that the caller's
    own allocator stays in place.
    """
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
    launch()


def aligned(x: Tensor) -> bool:
    """Whether TMA can address a matrix: its address and its rows are aligned to 16 bytes."""
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


def architecture(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU, or (0, 0) for another one; the interpreter on the CPU counts as sm_90."""
    if device.type != "cuda":
        return (9, 0)
    return capability(device)
