"""Portable Triton kernel that computes values from latents: a product for each head, quantised in its epilogue."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.device import capability, empty, multiprocessors
from dskernels.fp8.layout import empty_scale
from dskernels.fp8.triton import store_rows
from dskernels.portable import begin_dependent, dot, launch, programmatic, reason_against_e4m3
from dskernels.validate import ceil_div


@triton.jit(do_not_specialize=["tokens", "stride_sc"])
def values_kernel(
    p_x,
    p_w,
    p_q,
    p_s,
    stride_token,
    stride_head,
    stride_w_head,
    stride_w_row,
    stride_qr,
    stride_sc,
    tokens,
    TILES: tl.constexpr,
    LATENT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """One tile of 128 values (program 1) for BLOCK_T tokens (program 0); a head has TILES tiles."""
    begin_dependent(PROGRAMMATIC)
    i_tile = tl.program_id(1)
    i_h = (i_tile // TILES).to(tl.int64)
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_v = i_tile % TILES * 128 + tl.arange(0, 128)
    p_x += o_t.to(tl.int64)[:, None] * stride_token + i_h * stride_head
    p_w += i_h * stride_w_head + o_v.to(tl.int64)[None, :] * stride_w_row
    total = tl.zeros([BLOCK_T, 128], tl.float32)
    for first in range(0, LATENT, BLOCK_L):
        o_l = first + tl.arange(0, BLOCK_L)
        # [BLOCK_T, BLOCK_L], [BLOCK_L, 128]
        x = tl.load(p_x + o_l[None, :], mask=(o_t < tokens)[:, None] & (o_l < LATENT)[None, :], other=0.0)
        w = tl.load(p_w + o_l[:, None], mask=(o_l < LATENT)[:, None], other=0.0)
        total += dot(x, w)
    # If the result of a wgmma is used as integers, ptxas 12.8 takes its bits for the zeros of the accumulator's start:
    # the largest magnitude came out as 0. The float addition in between prevents this, since nothing folds it.
    total += 0.0
    columns = tl.num_programs(1) * 128
    store_rows(
        total, p_q, p_s, tl.program_id(0) * BLOCK_T, i_tile, tokens, columns, stride_qr, stride_sc, False, BLOCK_T
    )


def mla_values_quantize(latents: Tensor, w_uv: Tensor) -> tuple[Tensor, Tensor]:
    """Data and scale of the values [T, H * V] of `latents` [T, H, latent]."""
    tokens, heads, latent = latents.shape
    columns = heads * w_uv.shape[1]
    data = empty(latents, (tokens, columns), torch.float8_e4m3fn)
    scale = empty_scale(latents, (tokens, columns // 128), (1, 128))
    if data.numel() == 0:
        return data, scale
    block_t = choose_tokens(tokens, latents.element_size())
    grid = ceil_div(tokens, block_t), columns // 128
    # One program takes all of a multiprocessor's shared memory.
    arch = capability(latents.device) if latents.is_cuda else None
    roomy = arch is not None and (9, 0) <= arch <= (10, 9)
    deep = roomy and grid[0] * grid[1] <= multiprocessors(latents.device)
    launch(
        values_kernel,
        grid,
        latents,
        w_uv,
        data,
        scale,
        latents.stride(0),
        latents.stride(1),
        w_uv.stride(0),
        w_uv.stride(1),
        data.stride(0),
        scale.stride(1),
        tokens,
        TILES=w_uv.shape[1] // 128,
        LATENT=latent,
        BLOCK_T=block_t,
        **options(latents.element_size(), deep, nvidia=arch != (0, 0)),
        **programmatic(latents),
    )
    return data, scale


def choose_tokens(tokens: int, itemsize: int) -> int:
    """Tokens per program: few tokens are one tile, so that the weights of a head are read once."""
    return 16 if itemsize == 4 else min(max(16, triton.next_power_of_2(tokens)), 64)


def options(itemsize: int, deep: bool, nvidia: bool = True) -> dict[str, int]:
    """Columns of the latent that are multiplied at a time, and options of the launch.

    With 16 bits, 48 KB of a head's 131 are in flight, in `deep` programs 96: 16 heads are only 16 programs. Four stages
    of 64 tokens take 72 KB of shared memory on gfx942, where a block has 64.
    """
    columns = 32 if itemsize == 4 else 128 if deep else 64
    return {"BLOCK_L": columns, "num_stages": 4 if nvidia else 3, "num_warps": 8}


def mla_values_quantize_supports(latents: Tensor, w_uv: Tensor) -> str | None:
    """Why the GPU of these cannot make e4m3, or None."""
    return reason_against_e4m3(latents.device)
