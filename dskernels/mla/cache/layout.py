"""Layout of the paged latent cache: plain rows, or rows of bytes with an e4m3 latent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dskernels.validate import ceil_div, check_tensor

TILE = 128  # latent elements that share one scale


def fp8_row_bytes(latent_dim: int, rope_dim: int) -> int:
    """Bytes of an e4m3 row: the latent, one fp32 scale for each 128 of it, the rope part in bf16."""
    return latent_dim + 4 * ceil_div(latent_dim, TILE) + 2 * rope_dim


def fp8_parts(cache: Tensor, latent_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of an e4m3 cache that begin at row 0: its latent in e4m3, its scales in fp32, its rope part in bf16."""
    scales = cache.view(torch.float32)[..., latent_dim // 4 :]
    rope = cache.view(torch.bfloat16)[..., fp8_row_bytes(latent_dim, 0) // 2 :]
    return cache.view(torch.float8_e4m3fn), scales, rope


def check_latent_cache(
    name: str,
    cache: Any,
    latent_dim: int,
    rope_dim: int,
    *,
    dtype: torch.dtype | tuple[torch.dtype, ...],
    like: Tensor,
) -> None:
    """Check that `cache` is ``[pages, page_size, latent + rope]`` of `dtype`, or uint8 with e4m3 rows."""
    allowed = (dtype,) if isinstance(dtype, torch.dtype) else dtype
    check_tensor(name, cache, dtype=(*allowed, torch.uint8), shape=("pages", "page_size", "row"), like=like)
    fp8 = cache.dtype == torch.uint8
    width = fp8_row_bytes(latent_dim, rope_dim) if fp8 else latent_dim + rope_dim
    if cache.shape[2] != width:
        what = f"{width} bytes of an e4m3 row" if fp8 else f"latent {latent_dim} + rope {rope_dim} = {width} columns"
        raise ValueError(f"{name}: expected shape [pages, page_size, {what}], got {list(cache.shape)}")
    if cache.shape[1] == 0:
        raise ValueError(f"{name}: expected a page size of at least 1, got {list(cache.shape)}")
    if fp8 and latent_dim % 4:
        raise ValueError(f"{name}: expected a latent dimension that is a multiple of 4 in uint8, got {latent_dim}")
    if fp8 and (cache.stride(0) % 4 or cache.stride(1) % 4 or cache.storage_offset() % 4):
        raise ValueError(
            f"{name}: expected rows that start at multiples of 4 bytes, got strides {list(cache.stride())} "
            f"from byte {cache.storage_offset()}"
        )
