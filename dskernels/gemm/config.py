"""Tile choice of the portable GEMM: a pure function of the shape and the number of multiprocessors."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    """Tile of the Hopper kernel: two warpgroups, each `waves` times 64 rows, by `block_n` columns.

    `stages` blocks of K are in flight; `cluster` CTAs share their tile of A (`shared_a`, side by side along N) or of B
    (along M), and walk `group` steps in that direction before one in the other; the loop over K is unrolled `unroll`
    times. `clocks` is what a block of K takes, `tile_clocks` what a tile takes beside them: measured on an H100.
    """

    waves: int
    block_n: int
    stages: int
    cluster: int
    shared_a: bool
    group: int
    clocks: int
    tile_clocks: int
    unroll: int = 4

    @property
    def block_m(self) -> int:
        """Rows of the tile."""
        return 128 * self.waves

    @property
    def tile(self) -> str:
        """Rows and columns."""
        return f"{self.block_m}x{self.block_n}"

    def clusters(self, m: int, n: int) -> int:
        """Clusters' worth of tiles in an `m` x `n` matrix."""
        along_m, along_n = (1, self.cluster) if self.shared_a else (self.cluster, 1)
        return ceil_div(m, self.block_m * along_m) * ceil_div(n, self.block_n * along_n)

    def estimate(self, m: int, n: int, k: int, multiprocessors: int) -> int:
        """Clocks for the product: as many rounds of tiles as the clusters need."""
        rounds = ceil_div(self.clusters(m, n), max(multiprocessors // self.cluster, 1))
        return rounds * (ceil_div(k, 128) * self.clocks + self.tile_clocks)


HOPPER_TALL = HopperConfig(
    waves=2, block_n=128, stages=3, cluster=2, shared_a=True, group=8, clocks=1165, tile_clocks=1900
)
HOPPER_NARROW = HopperConfig(
    waves=1, block_n=192, stages=4, cluster=2, shared_a=False, group=8, clocks=850, tile_clocks=1650
)
# Where C is most of what moves, narrow tiles are 3 to 6% faster one below the other.
HOPPER_NARROW_SHORT = replace(HOPPER_NARROW, group=16)
HOPPER_LOW = HopperConfig(
    waves=1, block_n=128, stages=5, cluster=1, shared_a=True, group=8, clocks=740, tile_clocks=1000
)
# With a scale for each row of B a sum takes twice as many instructions, and unrolling by 4 spills with a bias.
WGRAD_TALL = replace(HOPPER_TALL, unroll=2, clocks=1650)
WGRAD_LOW = replace(HOPPER_LOW, clocks=840)
HOPPER_CONFIGS = {
    128: (HOPPER_TALL, HOPPER_NARROW, HOPPER_NARROW_SHORT, HOPPER_LOW),
    1: (WGRAD_TALL, WGRAD_LOW),
}


def choose_hopper_config(m: int, n: int, k: int, b_rows: int, multiprocessors: int) -> HopperConfig:
    """Config of the Hopper kernel that is estimated to be done first; `b_rows` is the height of a tile of B."""
    config = min(HOPPER_CONFIGS[b_rows], key=lambda config: config.estimate(m, n, k, multiprocessors))
    return HOPPER_NARROW_SHORT if config == HOPPER_NARROW and k <= 2048 else config
