"""Tile choice for the grouped products: pure functions of the shape, the dtype and the number of multiprocessors.

Only the device knows how rows are divided into groups. So these functions work with the average size of a group, and
with bounds that hold for any division.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from dskernels.gemm.config import HOPPER_LOW, HOPPER_NARROW, HOPPER_TALL, WGRAD_LOW, WGRAD_TALL, HopperConfig
from dskernels.validate import ceil_div

E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class GroupedConfig:
    """Tile of the result that a program computes, and `block_k`, the step along the reduction.

    For e4m3, `block_k` is 128, the length of a scale.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# In order of height. An e4m3 tile adds the result of each step to its sum outside the tensor cores; so with
# 128 columns, the tallest would spill on sm_89. fp32 is multiplied exactly, by ordinary FMAs, whose operands all pass
# through registers.
FP8_CONFIGS = (
    GroupedConfig(block_m=16, block_n=64, block_k=128, num_warps=4, num_stages=4),
    GroupedConfig(block_m=64, block_n=64, block_k=128, num_warps=4, num_stages=4),
    GroupedConfig(block_m=128, block_n=64, block_k=128, num_warps=8, num_stages=3),
)
# The same on GPUs that are not NVIDIA's. On gfx942 a program of 4 warps has one on each SIMD of a compute unit, so that
# a lane has up to 512 registers; with 8 warps it has 256, and the tallest tile spilled 200 bytes a lane in the product
# and 412 in the weight gradient.
FP8_CONFIGS_OTHER = (
    *FP8_CONFIGS[:-1],
    GroupedConfig(block_m=128, block_n=64, block_k=128, num_warps=4, num_stages=2),
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


def configs_for(dtype: torch.dtype, arch: tuple[int, int]) -> tuple[GroupedConfig, ...]:
    """All tiles for operands of `dtype` on compute capability `arch`, (0, 0) for a GPU that is not NVIDIA's."""
    if dtype == E4M3:
        return FP8_CONFIGS if arch > (0, 0) else FP8_CONFIGS_OTHER
    return SINGLE_CONFIGS if dtype == torch.float32 else HALF_CONFIGS


def choose_config(rows: int, groups: int, dtype: torch.dtype, arch: tuple[int, int]) -> GroupedConfig:
    """The lowest tile of `configs_for` that has as many rows as an average group, or else the highest tile.

    `rows` includes rows that belong to no group, because only the device knows how many these are.
    """
    average = ceil_div(rows, groups)
    configs = configs_for(dtype, arch)
    return next((config for config in configs if average <= config.block_m), configs[-1])


def choose_wgrad_config(n: int, k: int, dtype: torch.dtype, arch: tuple[int, int]) -> GroupedConfig:
    """Tile of dw [N, K] (block_m x block_n), with block_k tokens per step: the highest if the matrix fills it."""
    configs = configs_for(dtype, arch)[1:]
    return configs[-1] if min(n, k) >= configs[-1].block_m else configs[0]


def tile_bound(rows: int, groups: int, block: int) -> int:
    """The most tiles of `block` rows that a division of `rows` into `groups` and a rest can need; no tile is empty."""
    return min(rows, ceil_div(rows, block) + groups)


def padded_width(rows: int, groups: int) -> int:
    """Number of columns of `quantize_grouped`: enough for any division of `rows` into `groups`, each padded to a
    multiple of 128."""
    return 128 * (ceil_div(rows, 128) + groups)


# ---- Hopper, e4m3 ---------------------------------------------------------------------------------------------------

# Tiles of the kernel for many rows: those of the dense product whose clusters, if any, share rows of A. Clusters
# adjacent along M would round every group up to twice as many rows.
#
# If groups are one tile high, all of B comes from memory. Under load, this takes about 3,800 clocks, which three stages
# cannot hide behind 1,280 clocks of work: 32 groups of 190 rows, 4096x7168, take 415 us, or 1,680 clocks per block of
# K. Prefetching B into the L2 4 or 8 blocks before its load made it 431 and 522 us.
GROUPED_LOW = replace(HOPPER_LOW, clocks=690, tile_clocks=600)
GROUPED_NARROW = replace(HOPPER_NARROW, clocks=860, tile_clocks=1650)
# The same tiles, but units of 64 rows without a row of the group are skipped, and the tiles of a group have heights
# that are as equal as units allow. With these products the chip is at its limit of 700 W, at 1.3 to 1.6 GHz, so what
# matters is how many rows are multiplied in vain. For 64 groups of 256 rows, give or take 30%, tiles of 128 rows
# multiply 26% more rows than there are, units 10%. On an H200, in us, whole tiles -> units, 4096x7168: 64 groups of 256
# rows 1,072 -> 1,005, 256 groups of 256 rows as a router fills them 4,349 -> 4,106, 256 groups of 128 rows
# 2,756 -> 2,657; 7168x2048, the same groups: 566 -> 546, 2,224 -> 2,186, 1,386 -> 1,306; but 32 groups of 1,000 rows
# 798 -> 843.
GROUPED_UNITS = replace(GROUPED_NARROW, registers=224, in_units=True)
HOPPER_CONFIGS = (HOPPER_TALL, GROUPED_UNITS, GROUPED_NARROW, GROUPED_LOW)
MASKED_CONFIGS = (HOPPER_TALL, GROUPED_LOW)  # 128x192 is not measured for buffers that most groups do not fill
# Assumed sizes of groups relative to the average, which is all that is known. They matter for rounding: a group of 1.15
# times 256 rows has two tiles of 256.
SHARES = (0.7, 0.85, 1.0, 1.15, 1.3)
HOPPER_WGRAD_CONFIGS = (WGRAD_TALL, WGRAD_LOW)


def choose_hopper_config(rows: int, groups: int, n: int, k: int, multiprocessors: int) -> HopperConfig:
    """Config of the Hopper kernel for many rows with the shortest estimated time.

    On an H200, over 79 shapes with groups that vary by 30%, the choice takes 0.6% more time than the fastest config on
    average. It took 2.7% more without 128x192 and with all groups assumed to have the average size.
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
    """Whether units are worth it: in long groups they skip little, and finding a tile takes longer, which matters if K
    is short."""
    return k >= 2048 and rows <= 320 * groups


def choose_hopper_masked_config(rows: int, groups: int, n: int, k: int, multiprocessors: int) -> HopperConfig:
    """The same for buffers of `rows` rows, which are assumed to be full."""
    return min(MASKED_CONFIGS, key=lambda config: config.estimate(rows, n, k, multiprocessors, groups))


def choose_hopper_wgrad_config(columns: int, groups: int, n: int, k: int, multiprocessors: int) -> HopperConfig:
    """The same for the weight gradient [E, N, K], summed over `columns` padded tokens."""
    average = ceil_div(columns, groups)
    return min(HOPPER_WGRAD_CONFIGS, key=lambda config: config.estimate(n, k, average, multiprocessors, groups))


def use_hopper_small(rows: int, groups: int) -> bool:
    """Whether the kernel for few rows is used for `rows` rows in `groups` groups.

    With 32 groups of 64 rows, 4096x7168 took 342 us in tiles of 128x128, and 386 us with the kernel for few rows.
    """
    return ceil_div(rows, groups) <= 32


def use_hopper_small_masked(rows: int) -> bool:
    """The same if each group has a buffer of `rows` rows, which most groups do not fill.

    With 32 groups of 64 rows, 4096x7168 took 343 us in tiles of 128x128, and 352 us with the kernel for few rows; with
    16 groups 180 and 183.
    """
    return rows <= 32


def hopper_clusters(config: HopperConfig, rows: int, groups: int, n: int) -> int:
    """The most clusters' tiles that a division of `rows` into `groups` can need."""
    return tile_bound(rows, groups, config.block_m) * config.clusters(1, n)
