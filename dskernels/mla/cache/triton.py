"""Portable Triton kernel that normalises, rotates and stores the latents of new tokens; one program writes one row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.fp8.triton import magnitude, tile_scale, to_e4m3
from dskernels.mla.cache.layout import fp8_parts
from dskernels.portable import cast, launch, reason_against_e4m3
from dskernels.validate import ceil_div


@triton.jit(do_not_specialize=["pages", "page_size"])
def write_kernel(
    p_kv,
    p_k_rope,
    p_weight,
    p_cos,
    p_sin,
    p_latent,
    p_scale,
    p_rope,
    p_slots,
    stride_kv,
    stride_k_rope,
    stride_cos,
    stride_sin,
    stride_page,
    stride_token,
    pages,
    page_size,
    eps,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    FP8: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """The row of token (program 0): the latent is [TILES, TILE], with a scale per tile; strides of an fp8 cache are
    in bytes."""
    i_t = tl.program_id(0).to(tl.int64)
    slot = tl.load(p_slots + i_t)
    if (slot >= 0) & (slot < pages.to(tl.int64) * page_size):
        o_row = slot // page_size * stride_page + slot % page_size * stride_token

        o_t = tl.arange(0, TILES)
        o_c = o_t[:, None] * TILE + tl.arange(0, TILE)[None, :]
        m_c = o_c < LATENT
        x = tl.load(p_kv + i_t * stride_kv + o_c, mask=m_c, other=0.0).to(tl.float32)
        weight = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
        y = x * tl.rsqrt(tl.sum(tl.sum(x * x, axis=1), axis=0) / LATENT + eps) * weight
        if FP8:
            scale = tile_scale(tl.max(magnitude(y), axis=1), False)
            tl.store(p_latent + o_row + o_c, to_e4m3(y, scale[:, None]), mask=m_c)
            tl.store(p_scale + o_row // 4 + o_t, scale, mask=o_t * TILE < LATENT)
            o_row = o_row // 2
        else:
            tl.store(p_latent + o_row + o_c, cast(y, p_latent.dtype.element_ty), mask=m_c)

        # [PAIRS, 2]: written as even and odd columns, two of every four bytes would go out, and then the other two.
        o_i = tl.arange(0, PAIRS)
        o_x = o_i[:, None] * 2 + tl.arange(0, 2)[None, :]
        even, odd = tl.split(tl.load(p_k_rope + i_t * stride_k_rope + o_x, mask=o_x < ROPE, other=0.0).to(tl.float32))
        m_i = o_i < ROPE // 2
        cos = tl.load(p_cos + i_t * stride_cos + o_i, mask=m_i, other=0.0)
        sin = tl.load(p_sin + i_t * stride_sin + o_i, mask=m_i, other=0.0)
        y = tl.join(even * cos - odd * sin, even * sin + odd * cos)
        tl.store(p_rope + o_row + o_x, cast(y, p_rope.dtype.element_ty), mask=o_x < ROPE)


def write_latent_cache(
    kv: Tensor,
    k_rope: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    slots: Tensor,
    eps: float,
) -> None:
    """Write the rows of `kv` [T, latent] and `k_rope` [T, rope] to their slots."""
    tokens, latent_dim = kv.shape
    if tokens == 0:
        return
    fp8 = cache.dtype == torch.uint8
    latent, scales, rope = fp8_parts(cache, latent_dim) if fp8 else (cache, None, cache[..., latent_dim:])
    tile = min(128, triton.next_power_of_2(latent_dim))
    launch(
        write_kernel,
        (tokens,),
        kv,
        k_rope,
        norm_weight,
        cos,
        sin,
        latent,
        scales,
        rope,
        slots,
        kv.stride(0),
        k_rope.stride(0),
        cos.stride(0),
        sin.stride(0),
        cache.stride(0),
        cache.stride(1),
        cache.shape[0],
        cache.shape[1],
        eps,
        LATENT=latent_dim,
        ROPE=k_rope.shape[1],
        FP8=fp8,
        TILES=triton.next_power_of_2(ceil_div(latent_dim, tile)),
        TILE=tile,
        PAIRS=triton.next_power_of_2(k_rope.shape[1] // 2),
        num_warps=1,
    )


def write_latent_cache_supports(
    kv: Tensor,
    k_rope: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    slots: Tensor,
    eps: float,
) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    if torch.float64 in (kv.dtype, norm_weight.dtype, cache.dtype):
        return "float64 runs on the reference only"
    return reason_against_e4m3(kv.device) if cache.dtype == torch.uint8 else None
