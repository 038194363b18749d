"""Tile choice of the grouped products: pure functions of the shape and the dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dskernels.validate import ceil_div

E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class GroupedConfig:
    """Tile of the result that a program computes, and the step along the reduction: for e4m3 128, a scale's length."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# In rising height. With 128 columns the tall e4m3 tile, which adds each step to its sum outside the tensor cores,
# spills on sm_89. fp32 is multiplied exactly, by plain FMAs, whose operands all pass through registers.
FP8_CONFIGS = (
    GroupedConfig(block_m=16, block_n=64, block_k=128, num_warps=4, num_stages=4),
    GroupedConfig(block_m=64, block_n=64, block_k=128, num_warps=4, num_stages=4),
    GroupedConfig(block_m=128, block_n=64, block_k=128, num_warps=8, num_stages=3),
)
HALF_CONFIGS = (
    GroupedConfig(block_m=16, block_n=64, block_k=128, num_warps=4, num_stages=4),
    GroupedConfig(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=4),
    GroupedConfig(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3),
)
SINGLE_CONFIGS = (
    GroupedConfig(block_m=16, block_n=64, block_k=32, num_warps=4, num_stages=2),
    GroupedConfig(block_m=64, block_n=64, block_k=16, num_warps=8, num_stages=2),
)


def configs_for(dtype: torch.dtype) -> tuple[GroupedConfig, ...]:
    """All tiles for operands of `dtype`."""
    if dtype == E4M3:
        return FP8_CONFIGS
    return SINGLE_CONFIGS if dtype == torch.float32 else HALF_CONFIGS


def choose_config(rows: int, groups: int, dtype: torch.dtype) -> GroupedConfig:
    """Lowest tile that takes the rows of an average group in one go, or the highest there is.

    `rows` is all that is known without asking the device: it counts those that belong to no group too.
    """
    average = ceil_div(rows, groups)
    configs = configs_for(dtype)
    return next((config for config in configs if average <= config.block_m), configs[-1])


def choose_wgrad_config(n: int, k: int, dtype: torch.dtype) -> GroupedConfig:
    """Tile of N x K (block_m x block_n), with block_k tokens a step: the highest that a small matrix fills."""
    configs = configs_for(dtype)[1:]
    return configs[-1] if min(n, k) >= configs[-1].block_m else configs[0]


def tile_bound(rows: int, groups: int, block: int) -> int:
    """Tiles of `block` rows that any division of `rows` into `groups` and a rest can need; no tile is empty."""
    return min(rows, ceil_div(rows, block) + groups)


def padded_width(rows: int, groups: int) -> int:
    """Columns of `quantize_grouped`: `rows` in any division into `groups`, each padded to a multiple of 128."""
    return 128 * (ceil_div(rows, 128) + groups)
