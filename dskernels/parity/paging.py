"""Paged latent caches for the parity cases: rows on shuffled pages, and poison where nothing may be read."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dskernels.reference.mla import pack_fp8
from dskernels.validate import ceil_div

UNUSED_ENTRY = 2_147_480_000  # for the block table: far outside any cache


def paged_cache(
    seed: int,
    lengths: Sequence[int],
    page_size: int,
    latent_dim: int,
    rope_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    scale: float = 1.0,
    spare_entries: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """A cache with the rows of requests of these lengths, its block table, and the lengths.

    Rows are normal numbers times `scale`; uint8 means e4m3 rows. All other rows are NaN. The table has `spare_entries`
    more columns than the longest request needs, and its unused entries are nonsense.
    """
    generator = torch.Generator().manual_seed(seed)
    columns = max((ceil_div(n, page_size) for n in lengths), default=0) + spare_entries
    used = [ceil_div(n, page_size) for n in lengths]
    pages = torch.randperm(sum(used) + 2, generator=generator)
    table = torch.full((len(lengths), columns), UNUSED_ENTRY, dtype=torch.int32)
    poison = _rows(torch.full((1, latent_dim + rope_dim), math.nan), latent_dim, dtype)
    cache = poison.repeat(len(pages) * page_size, 1)
    for b, n in enumerate(lengths):
        mine, pages = pages[: used[b]], pages[used[b] :]
        table[b, : used[b]] = mine.int()
        position = torch.arange(n)
        row = torch.randn(n, latent_dim + rope_dim, generator=generator) * scale
        cache[mine[position // page_size] * page_size + position % page_size] = _rows(row, latent_dim, dtype)
    cache = cache.unflatten(0, (-1, page_size)).to(device)
    return cache, table.to(device), torch.tensor(lengths, dtype=torch.int32, device=device)


def _rows(row: Tensor, latent_dim: int, dtype: torch.dtype) -> Tensor:
    return pack_fp8(row[:, :latent_dim], row[:, latent_dim:]) if dtype == torch.uint8 else row.to(dtype)
