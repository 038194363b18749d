"""Tile choice of the grouped products: pure functions of the shape and the dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from dskernels.gemm.config import HOPPER_LOW, HOPPER_NARROW, HOPPER_TALL, WGRAD_LOW, WGRAD_TALL, HopperConfig
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


# ---- Hopper, e4m3 ---------------------------------------------------------------------------------------------------

# Tiles of the kernel for many rows: those of the dense product whose clusters, if any, share rows of A. Clusters one
# below the other would round each group up to twice the rows.
#
# Where groups are one tile high, all of B comes from memory, under load in about 3,800 clocks, which three stages
# cannot hide behind 1,280 of work: 32 groups of 190 rows, 4096x7168, take 415 us, 1,680 clocks for a block of K. Asking
# for B to come to the L2 4 or 8 blocks ahead of its load made it 431 and 522.
GROUPED_LOW = replace(HOPPER_LOW, clocks=690, tile_clocks=600)
GROUPED_NARROW = replace(HOPPER_NARROW, clocks=860, tile_clocks=1650)
# Such tiles without those units of 64 rows of which none count; a group's tiles are as even as units allow. With these
# products the chip is at its 700 W, at 1.3 to 1.6 GHz, so what counts is what is multiplied for nothing. Of
# 64 groups of 256 rows, give or take 30%, tiles of 128 rows multiply 26% more than there is, units 10%. On an H200, in
# us, 4096x7168: 64 groups of 256 rows 1,072 -> 1,005, 256 of 256 as a router fills them 4,349 -> 4,106, 256 of 128
# 2,756 -> 2,657; 7168x2048: 566 -> 546, 2,224 -> 2,186, 1,386 -> 1,306; but 32 groups of 1,000 798 -> 843.
GROUPED_UNITS = replace(GROUPED_NARROW, registers=224, in_units=True)
HOPPER_CONFIGS = (HOPPER_TALL, GROUPED_UNITS, GROUPED_NARROW, GROUPED_LOW)
MASKED_CONFIGS = (HOPPER_TALL, GROUPED_LOW)  # of buffers that most groups do not fill 128x192 is not measured
# How large groups are beside their average, which alone is known: a group of 1.15 times 256 rows has two tiles of 256.
SHARES = (0.7, 0.85, 1.0, 1.15, 1.3)
HOPPER_WGRAD_CONFIGS = (WGRAD_TALL, WGRAD_LOW)


def choose_hopper_config(rows: int, groups: int, n: int, k: int, multiprocessors: int) -> HopperConfig:
    """Config of the Hopper kernel for many rows that is estimated to be done first.

    On an H200, of 79 shapes with groups that vary by 30%, what is chosen takes 0.6% more than the fastest in the mean;
    without 128x192, and with all groups of the average size, that was 2.7%.
    """
    sizes = [max(1, math.ceil(share * rows / groups)) for share in SHARES]
    if sizes[-1] <= GROUPED_LOW.block_m:  # 32 groups of 96 rows, 4096x7168: 260 us, 271 by 128x192, 304 by 256x128
        return GROUPED_LOW

    def clocks(config: HopperConfig) -> int:
        clusters = ceil_div(groups * sum(config.clusters(size, n) for size in sizes), len(sizes))
        return config.clocks_of(clusters, k, multiprocessors)

    config = min((HOPPER_TALL, GROUPED_NARROW, GROUPED_LOW), key=clocks)
    return GROUPED_UNITS if config == GROUPED_NARROW and _use_units(rows, groups, k) else config


def _use_units(rows: int, groups: int, k: int) -> bool:
    """Whether units pay: of long groups little is left out, and tiles take longer to find, which a short K shows."""
    return k >= 2048 and rows <= 320 * groups


def choose_hopper_masked_config(rows: int, groups: int, n: int, k: int, multiprocessors: int) -> HopperConfig:
    """The same for buffers of `rows` rows, taken for full."""
    return min(MASKED_CONFIGS, key=lambda config: config.estimate(rows, n, k, multiprocessors, groups))


def choose_hopper_wgrad_config(columns: int, groups: int, n: int, k: int, multiprocessors: int) -> HopperConfig:
    """The same for the weight gradient [E, N, K], along `columns` padded tokens."""
    average = ceil_div(columns, groups)
    return min(HOPPER_WGRAD_CONFIGS, key=lambda config: config.estimate(n, k, average, multiprocessors, groups))


def use_hopper_small(rows: int, groups: int) -> bool:
    """Whether the kernel for few rows takes `rows` rows in `groups` groups.

    With 32 groups of 64 rows 4096x7168 took 342 us in tiles of 128x128, and there 386.
    """
    return ceil_div(rows, groups) <= 32


def use_hopper_small_masked(rows: int) -> bool:
    """The same where each group has a buffer of `rows` rows, which most of them do not fill.

    With 32 groups of 64 rows 4096x7168 took 343 us in tiles of 128x128, and there 352; with 16 groups 180 and 183.
    """
    return rows <= 32


def hopper_clusters(config: HopperConfig, rows: int, groups: int, n: int) -> int:
    """The most clusters' worth of tiles that any division of `rows` into groups can need."""
    return tile_bound(rows, groups, config.block_m) * config.clusters(1, n)
