"""Portable Triton kernel that gathers the cached latents of several requests from their pages, packed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.mla.cache.layout import fp8_parts
from dskernels.mla.decode.triton import clamp, load_fp8_rows, load_rows
from dskernels.portable import cast, launch, reason_against_e4m3
from dskernels.validate import ceil_div

PACK_BLOCK = 512  # lengths that are summed up at a time


@triton.jit(do_not_specialize=["requests", "steps", "start", "rows", "columns", "pages", "page_size", "stride_table"])
def gather_kernel(
    p_latent,
    p_scale,
    p_rope,
    p_table,
    p_cu,
    p_first,
    p_out,
    stride_page,
    stride_token,
    stride_table,
    requests,
    steps,
    start,
    rows,
    columns,
    pages,
    page_size,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_R rows (program 0): row i is position first[b] + i + start - cu[b] of its request b."""
    i_row = tl.program_id(0).to(tl.int64) * BLOCK_R
    packed = start + i_row + tl.arange(0, BLOCK_R)
    m_row = (i_row + tl.arange(0, BLOCK_R) < rows) & (packed < tl.load(p_cu + requests))

    low = tl.zeros([BLOCK_R], tl.int32)
    high = low + requests
    for _ in range(steps):
        middle = (low + high) // 2
        before = tl.load(p_cu + middle) <= packed
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    position = tl.maximum(packed - tl.load(p_cu + low) + tl.load(p_first + low), 0)

    # Whatever the integers on the device are, addresses stay within the tables.
    entry = low.to(tl.int64) * stride_table + clamp(position // page_size, columns - 1)
    page = clamp(tl.load(p_table + entry, mask=m_row, other=0), pages - 1)
    o_row = page.to(tl.int64) * stride_page + position % page_size * stride_token
    dtype: tl.constexpr = p_out.dtype.element_ty
    # [BLOCK_R, BLOCK_L], [BLOCK_R, BLOCK_P]
    if FP8:
        latent = load_fp8_rows(p_latent, p_scale, o_row, m_row, dtype, BLOCK_R, LATENT, BLOCK_L)
        rope = cast(load_rows(p_rope, o_row // 2, m_row, ROPE, BLOCK_P).to(tl.float32), dtype)
    else:
        latent = load_rows(p_latent, o_row, m_row, LATENT, BLOCK_L)
        rope = load_rows(p_rope, o_row, m_row, ROPE, BLOCK_P)
    p_out += (i_row + tl.arange(0, BLOCK_R))[:, None] * (LATENT + ROPE)
    o_l = tl.arange(0, BLOCK_L)
    o_p = tl.arange(0, BLOCK_P)
    tl.store(p_out + o_l[None, :], latent, mask=m_row[:, None] & (o_l < LATENT)[None, :])
    tl.store(p_out + LATENT + o_p[None, :], rope, mask=m_row[:, None] & (o_p < ROPE)[None, :])


@triton.jit(do_not_specialize=["requests", "capacity"])
def pack_kernel(p_lengths, p_cu, p_first, p_ends, requests, capacity, BLOCK: tl.constexpr):
    """cu[b + 1] = cu[b] + lengths[b], each between 0 and `capacity`; first[b] = 0; ends = (0, the last of cu)."""
    tl.store(p_cu, 0)
    tl.store(p_ends, 0)
    total = 0
    for start in range(0, requests, BLOCK):
        o_b = start + tl.arange(0, BLOCK)
        m_b = o_b < requests
        length = tl.minimum(tl.maximum(tl.load(p_lengths + o_b, mask=m_b, other=0), 0), capacity)
        tl.store(p_cu + 1 + o_b, total + tl.cumsum(length, 0), mask=m_b)
        tl.store(p_first + o_b, tl.zeros([BLOCK], tl.int32), mask=m_b)
        total += tl.sum(length, 0)
    tl.store(p_ends + 1, total)


def pack_lengths(lengths: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """(cu [B + 1], first [B], ends [2]) of all cached positions of each request."""
    requests = lengths.shape[0]
    cu, first, ends = (lengths.new_empty(n) for n in (requests + 1, requests, 2))
    launch(pack_kernel, (1,), lengths, cu, first, ends, requests, capacity, BLOCK=PACK_BLOCK, num_warps=4)
    return cu, first, ends


def gather_latents(
    cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    first: Tensor,
    start: int,
    rows: int,
    latent_dim: int,
    rope_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    """[rows, latent + rope]; rows after the last packed position are not written."""
    out = cache.new_empty((rows, latent_dim + rope_dim), dtype=dtype)
    requests = first.shape[0]
    if rows == 0 or requests == 0 or cache.shape[0] == 0 or block_table.shape[1] == 0:
        return out
    fp8 = cache.dtype == torch.uint8
    latent, scales, rope = fp8_parts(cache, latent_dim) if fp8 else (cache, None, cache[..., latent_dim:])
    block_r = 16
    launch(
        gather_kernel,
        (ceil_div(rows, block_r),),
        latent,
        scales,
        rope,
        block_table,
        cu_seqlens,
        first,
        out,
        cache.stride(0),
        cache.stride(1),
        block_table.stride(0),
        requests,
        requests.bit_length(),
        start,
        rows,
        block_table.shape[1],
        cache.shape[0],
        cache.shape[1],
        LATENT=latent_dim,
        ROPE=rope_dim,
        FP8=fp8,
        BLOCK_L=triton.next_power_of_2(latent_dim),
        BLOCK_P=triton.next_power_of_2(rope_dim),
        BLOCK_R=block_r,
        num_warps=4,
    )
    return out


def gather_latents_supports(
    cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    first: Tensor,
    start: int,
    rows: int,
    latent_dim: int,
    rope_dim: int,
    dtype: torch.dtype,
) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    if dtype == torch.float64:
        return "float64 runs on the reference only"
    return reason_against_e4m3(cache.device) if cache.dtype == torch.uint8 else None
