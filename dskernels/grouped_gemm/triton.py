"""Portable Triton kernels of the grouped products, and the plan of which rows and tiles belong to a group.

The group sizes stay on the device. `plan_kernel` turns offsets into the first row and the first tile of every group.
The grid of a product has as many programs as any group sizes can need tiles, and each program looks up the group of its
tile; programs beyond the last tile return at once. The rows after the last group are treated as one more group, whose
product has no terms, so that they become zero.

Offsets are clamped to [0, T] and replaced by their running maximum: whatever they are, groups are disjoint and within
the tensors.

Names: `p_` pointer, `i_` index of a program or tile, `o_` offsets, `m_` mask, `s_` scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.gemm.triton import architecture
from dskernels.grouped_gemm.config import GroupedConfig, choose_config, tile_bound
from dskernels.portable import cast, dot, launch, reason_against_e4m3
from dskernels.validate import ceil_div

# ---- which rows and tiles belong to a group -------------------------------------------------------------------------


@triton.jit
def larger(a, b):
    """The step of a running maximum."""
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["T"])
def plan_kernel(p_offsets, p_plan, T, E, BLOCK: tl.constexpr, GROUPS: tl.constexpr):
    """plan[0, g] = first row of group g, plan[1, g] = its first tile of BLOCK rows; group E is the rest, E + 1 the end.

    plan[0] is the running maximum of offsets[0 .. E], with the first taken as 0; plan[1] counts the tiles before g.
    """
    o_g = tl.arange(0, GROUPS)
    start = tl.load(p_offsets + o_g, mask=(o_g > 0) & (o_g <= E), other=0)
    end = tl.load(p_offsets + o_g + 1, mask=o_g < E, other=T)
    start = tl.associative_scan(tl.minimum(tl.maximum(start, 0), T), 0, larger)
    end = tl.associative_scan(tl.minimum(tl.maximum(end, 0), T), 0, larger)
    tiles = tl.where(o_g <= E, (end - start + (BLOCK - 1)) // BLOCK, 0)
    first_tile = tl.cumsum(tiles, 0) - tiles
    tl.store(p_plan + o_g, tl.where(o_g <= E, start, T), mask=o_g <= E + 1)
    tl.store(p_plan + (E + 2) + o_g, first_tile, mask=o_g <= E + 1)


@triton.jit
def group_of_tile(p_plan, i_tile, E, GROUPS: tl.constexpr):
    """The group of tile `i_tile`: the number of groups that end at or before it; E + 1 for tiles after the last."""
    o_g = tl.arange(0, GROUPS)
    end = tl.load(p_plan + (E + 2) + o_g + 1, mask=o_g <= E, other=2147483647)
    return tl.sum((end <= i_tile).to(tl.int32), 0)


# ---- products -------------------------------------------------------------------------------------------------------


@triton.jit
def multiply(
    p_a_rows,
    p_sa_rows,
    p_b_rows,
    p_sb,
    m_m,
    m_n,
    K,
    stride_ak,
    stride_sak,
    stride_bk,
    stride_sbk,
    FP8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """fp32 [BLOCK_M, BLOCK_N], the products of rows of a and rows of b, given pointers to the rows' first elements.

    For e4m3, each step starts from a zero accumulator and has scales of its own: one for each row of a, and one for all
    rows of b, since BLOCK_K is 128 and a tile lies within one block of 128 rows. The sum of the steps is fp32.
    """
    o_k = tl.arange(0, BLOCK_K)
    p_a = p_a_rows[:, None] + o_k[None, :] * stride_ak
    p_b = p_b_rows[None, :] + o_k[:, None] * stride_bk
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        m_k = o_k < K - k * BLOCK_K
        # [BLOCK_M, BLOCK_K], [BLOCK_K, BLOCK_N]
        a = tl.load(p_a, mask=m_m[:, None] & m_k[None, :], other=0.0)
        b = tl.load(p_b, mask=m_n[None, :] & m_k[:, None], other=0.0)
        if FP8:
            s_a = tl.load(p_sa_rows, mask=m_m, other=0.0)
            total += dot(a, b) * (s_a * tl.load(p_sb))[:, None]
            p_sa_rows += stride_sak
            p_sb += stride_sbk
        else:
            total += dot(a, b)
        p_a += BLOCK_K * stride_ak
        p_b += BLOCK_K * stride_bk
    return total


@triton.jit(do_not_specialize=["stride_sam", "stride_sak", "top_k"])
def grouped_gemm_kernel(
    p_a,
    p_sa,
    p_b,
    p_sb,
    p_plan,
    p_source,
    p_c,
    E,
    N,
    K,
    top_k,
    stride_am,
    stride_ak,
    stride_sam,
    stride_sak,
    stride_be,
    stride_bn,
    stride_bk,
    stride_sbe,
    stride_sbn,
    stride_sbk,
    stride_cm,
    FP8: tl.constexpr,
    GATHER: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of c [T, N]. With GATHER, row r of the batch is row source[r] // top_k of a."""
    # Consecutive programs take all columns of a tile of rows, so programs that run at the same time share rows of a and
    # an expert's matrix in L2.
    tiles_n = tl.cdiv(N, BLOCK_N)
    i_tile = tl.program_id(0) // tiles_n
    i_n = tl.program_id(0) % tiles_n
    i_g = group_of_tile(p_plan, i_tile, E, GROUPS)
    if i_g > E:
        return
    first = tl.load(p_plan + i_g) + (i_tile - tl.load(p_plan + (E + 2) + i_g)) * BLOCK_M
    o_m = first + tl.arange(0, BLOCK_M)
    m_m = o_m < tl.load(p_plan + i_g + 1)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    if GATHER:
        o_a = tl.load(p_source + o_m, mask=m_m & (i_g < E), other=0).to(tl.int64) // top_k
    else:
        o_a = o_m.to(tl.int64)
    o_b = o_n.to(tl.int64)
    total = multiply(
        p_a + o_a * stride_am,
        p_sa + o_a * stride_sam,
        p_b + i_g.to(tl.int64) * stride_be + o_b * stride_bn,
        p_sb + i_g.to(tl.int64) * stride_sbe + i_n * BLOCK_N // 128 * stride_sbn,
        m_m,
        m_n,
        tl.where(i_g < E, K, 0),
        stride_ak,
        stride_sak,
        stride_bk,
        stride_sbk,
        FP8,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    p_tile = p_c + o_m.to(tl.int64)[:, None] * stride_cm + o_n[None, :]
    tl.store(p_tile, cast(total, p_c.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["M", "stride_ae", "stride_sae", "stride_sam", "stride_sak", "stride_ce"])
def grouped_gemm_masked_kernel(
    p_a,
    p_sa,
    p_b,
    p_sb,
    p_counts,
    p_c,
    M,
    N,
    K,
    stride_ae,
    stride_am,
    stride_sae,
    stride_sam,
    stride_sak,
    stride_be,
    stride_bn,
    stride_sbe,
    stride_sbn,
    stride_sbk,
    stride_ce,
    stride_cm,
    FP8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of c [E, M, N], unless all of its rows are beyond counts[e]."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    i_n = tl.program_id(0) % tiles_n
    i_m = tl.program_id(0) // tiles_n % tl.cdiv(M, BLOCK_M)
    i_e = (tl.program_id(0) // tiles_n // tl.cdiv(M, BLOCK_M)).to(tl.int64)
    count = tl.minimum(tl.load(p_counts + i_e), M)
    if i_m * BLOCK_M >= count:
        return
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < count
    m_n = o_n < N
    total = multiply(
        p_a + i_e * stride_ae + o_m * stride_am,
        p_sa + i_e * stride_sae + o_m * stride_sam,
        p_b + i_e * stride_be + o_n * stride_bn,
        p_sb + i_e * stride_sbe + i_n * BLOCK_N // 128 * stride_sbn,
        m_m,
        m_n,
        K,
        1,
        stride_sak,
        1,
        stride_sbk,
        FP8,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    p_tile = p_c + i_e * stride_ce + o_m[:, None] * stride_cm + o_n[None, :]
    tl.store(p_tile, cast(total, p_c.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


# ---- launchers ------------------------------------------------------------------------------------------------------


def plan(offsets: Tensor, rows: int, block: int) -> Tensor:
    """First row, and first tile of `block` rows, of each group: int32 [2, E + 2], see `plan_kernel`."""
    groups = offsets.shape[0] - 1
    result = offsets.new_empty(2, groups + 2)
    launch(plan_kernel, (1,), offsets, result, rows, groups, BLOCK=block, GROUPS=lanes(groups), num_warps=4)
    return result


def lanes(groups: int) -> int:
    """Size of a block that holds an entry for each group, the rest, and the end: a power of two."""
    return triton.next_power_of_2(groups + 2)


def product(
    a: Tensor,
    a_scale: Tensor | None,
    b: Tensor,
    b_scale: Tensor | None,
    offsets: Tensor,
    out: Tensor,
    source: Tensor | None = None,
    top_k: int = 1,
) -> None:
    """Fill `out` [T, N] with the product of each row of `a` [T, K] and its group's matrix of `b` [E, N, K].

    Strides are arbitrary. With `source` int32 [T], row r of the batch is row ``source[r] // top_k`` of `a`, which may
    then have any number of rows.
    """
    (rows, n), (groups, _, k) = out.shape, b.shape
    if rows == 0 or n == 0:
        return
    config = choose_config(rows, groups, a.dtype, architecture(a.device))
    # Without e4m3 there are no scales; the kernel does not use the tensors that are passed in their place.
    s_a, s_b = (a, b) if a_scale is None or b_scale is None else (a_scale, b_scale)
    grid = (tile_bound(rows, groups, config.block_m) * ceil_div(n, config.block_n),)
    launch(
        grouped_gemm_kernel,
        grid,
        a,
        s_a,
        b,
        s_b,
        plan(offsets, rows, config.block_m),
        source,
        out,
        groups,
        n,
        k,
        top_k,
        a.stride(0),
        a.stride(1),
        s_a.stride(0),
        s_a.stride(1),
        *b.stride(),
        *s_b.stride(),
        out.stride(0),
        FP8=a_scale is not None,
        GATHER=source is not None,
        GROUPS=lanes(groups),
        **tile_options(config),
    )


def tile_options(config: GroupedConfig) -> dict[str, int]:
    """The options of a launch with this config."""
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def grouped_gemm(
    a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor | None, offsets: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """Product of each row of `a` [T, K] and its group's matrix of `b` [E, N, K]."""
    out = a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)
    product(a, a_scale, b, b_scale, offsets, out)
    return out


def grouped_gemm_out(
    a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor | None, offsets: Tensor, out: Tensor
) -> None:
    """The same, into `out`."""
    product(a, a_scale, b, b_scale, offsets, out)


def grouped_gemm_masked(
    a: Tensor, a_scale: Tensor | None, b: Tensor, b_scale: Tensor | None, counts: Tensor, out: Tensor
) -> None:
    """Fill the first counts[e] rows of `out` [E, M, N] for each e."""
    groups, rows, n = out.shape
    if rows == 0 or n == 0:
        return
    config = choose_config(groups * rows, groups, a.dtype, architecture(a.device))
    s_a, s_b = (a, b) if a_scale is None or b_scale is None else (a_scale, b_scale)
    grid = (groups * ceil_div(rows, config.block_m) * ceil_div(n, config.block_n),)
    launch(
        grouped_gemm_masked_kernel,
        grid,
        a,
        s_a,
        b,
        s_b,
        counts,
        out,
        rows,
        n,
        a.shape[2],
        a.stride(0),
        a.stride(1),
        *s_a.stride(),
        b.stride(0),
        b.stride(1),
        *s_b.stride(),
        out.stride(0),
        out.stride(1),
        FP8=a_scale is not None,
        **tile_options(config),
    )


def grouped_gemm_supports(a: Tensor, a_scale: Tensor | None, *args: object) -> str | None:
    """Why the GPU of `a` does not support the product, or None."""
    return None if a_scale is None else reason_against_e4m3(a.device)


grouped_gemm_out_supports = grouped_gemm_masked_supports = grouped_gemm_supports
