"""Tile choice of the portable GEMM: a pure function of the shape and the number of multiprocessors."""

from __future__ import annotations

from dataclasses import dataclass

from dskernels.validate import ceil_div


@dataclass(frozen=True)
class GemmConfig:
    """Tile of C that a program computes. K is walked 128 at a time, the length of a scale, whatever the config."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    group_m: int = 8


SMALL = GemmConfig(block_m=16, block_n=64, num_warps=4, num_stages=4)
MEDIUM = GemmConfig(block_m=64, block_n=64, num_warps=4, num_stages=4)
LARGE = GemmConfig(block_m=128, block_n=128, num_warps=8, num_stages=3)
TALL = GemmConfig(block_m=128, block_n=64, num_warps=4, num_stages=3)
CONFIGS = {128: (SMALL, MEDIUM, LARGE), 1: (SMALL, MEDIUM, TALL)}


def choose_config(m: int, n: int, b_rows: int, multiprocessors: int) -> GemmConfig:
    """Largest tile that still gives every multiprocessor one; for decode (m <= 32) the narrowest, bandwidth being all.

    `b_rows` is the height of a tile of B: with a scale for each row of B, 128x128 spills 84 registers on sm_90.
    """
    if m <= 32:
        return SMALL
    large = CONFIGS[b_rows][-1]
    if ceil_div(m, large.block_m) * ceil_div(n, large.block_n) >= multiprocessors:
        return large
    return MEDIUM


@dataclass(frozen=True)
class HopperConfig:
    """Tile of the Hopper kernel: two warpgroups, each `waves` times 64 rows, by 128 columns.

    `stages` blocks of K are in flight; `cluster` CTAs side by side share their tile of A; tiles are walked down `group`
    rows before the next column; C leaves through `c_buffers` buffers of 64x64 for each warpgroup.
    """

    waves: int
    stages: int
    cluster: int
    group: int
    c_buffers: int

    @property
    def block_m(self) -> int:
        """Rows of the tile."""
        return 128 * self.waves


# Against cuBLASLt at M = 4096, mean of five shapes: 1.077 in groups of 16 rows, 1.062 of 8; a fourth stage gains 0.4%
# where K >= 7168 and loses 3 to 8% elsewhere, as it leaves only two buffers for C.
HOPPER_TALL = HopperConfig(waves=2, stages=3, cluster=2, group=16, c_buffers=4)
# At M = 64 to 512: 0.95 to 1.00, against 0.90 to 0.92 with clusters of two and 0.61 to 0.96 with tall tiles.
HOPPER_LOW = HopperConfig(waves=1, stages=5, cluster=1, group=8, c_buffers=2)
HOPPER_CONFIGS = (HOPPER_TALL, HOPPER_LOW)


def choose_hopper_config(m: int) -> HopperConfig:
    """Config of the Hopper kernel for `m` rows."""
    return HOPPER_LOW if m <= 512 else HOPPER_TALL
