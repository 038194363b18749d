"""Tile choice for the GEMM kernels: pure functions of the shape and the number of multiprocessors.

First come the portable Triton kernels, then the Hopper kernel for many rows, then the one for few rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dskernels.validate import ceil_div


@dataclass(frozen=True)
class GemmConfig:
    """Tile of C that a program of the Triton kernels computes. Every config takes K in steps of 128, a scale's length.

    Configs with `narrow` are for the kernel that streams the weights (triton_narrow.py), the others for the one with
    large tiles (triton.py). There, `tma` means that tiles are loaded through tensor descriptors, by persistent
    programs, `resident` on each multiprocessor; `group_m` is the height of the strips in which tiles are ordered.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    narrow: bool = False
    tma: bool = False
    resident: int = 1
    group_m: int = 8

    def tiles(self, m: int, n: int) -> int:
        """Tiles of a product of m rows and n columns."""
        return ceil_div(m, self.block_m) * ceil_div(n, self.block_n)


# Two programs per multiprocessor (PAIRED) are for sm_90: one promotes its sums while the other multiplies. At 4096 rows
# on an H100, a prototype reached 0.60 to 0.73 of cuBLASLt's speed (the present kernel 0.53 to 0.67). A single program
# with tiles of 128x128 (PERSISTENT) reached 0.52 to 0.63, because its multiplying and promoting never overlap.
#
# Triton's `warp_specialize` reached 0.76 to 0.90, but the code that it generates for Hopper can compute NaN. For each
# operand it also creates mbarriers that nothing waits for, since TMA gets others. As they are never used again, Triton
# may place them where the stages of B begin: in 3.6.0 and 3.7.1, the kernel initialises mbarriers at bytes 0 to 31 of
# shared memory, and TMA then writes row 0 of B there, with neither an mbarrier.inval nor a proxy fence in between. In
# PTX, using memory for something else while it holds an mbarrier is undefined behaviour. The bytes of such an mbarrier
# are fe ff 1f 00 00 f8 ff 7f, of which ff and 7f are NaN in e4m3. One of many runs had NaN in column 0 of
# 4095x4096x3888; with five stages, with tiles of 256x128 or 128x256, or with two steps of K at a time in three stages,
# every run had some. Without specialisation, Triton invalidates its barriers after their last use, and they share their
# bytes with nothing.
PAIRED = GemmConfig(block_m=64, block_n=128, num_warps=4, num_stages=3, tma=True, resident=2)
PERSISTENT = GemmConfig(block_m=128, block_n=128, num_warps=8, num_stages=4, tma=True)
LARGE = GemmConfig(block_m=128, block_n=128, num_warps=8, num_stages=3)
# A lane of gfx942 has up to 512 registers in programs of 4 warps and 256 in those of 8, which spilled 288 bytes a lane.
LARGE_OTHER = replace(LARGE, num_warps=4, num_stages=2)
TALL = GemmConfig(block_m=128, block_n=64, num_warps=4, num_stages=3)
MEDIUM = GemmConfig(block_m=64, block_n=64, num_warps=4, num_stages=4)

# Few rows. One program per multiprocessor needs 8 stages to keep enough bytes in flight; with two or three programs, 4
# stages are enough.
FEW = GemmConfig(block_m=16, block_n=64, num_warps=4, num_stages=4, narrow=True)
FEW_DEEP = GemmConfig(block_m=16, block_n=64, num_warps=4, num_stages=8, narrow=True)
SOME = GemmConfig(block_m=64, block_n=64, num_warps=4, num_stages=4, narrow=True)
SOME_DEEP = GemmConfig(block_m=64, block_n=64, num_warps=4, num_stages=8, narrow=True)
SOME_WIDE = GemmConfig(block_m=64, block_n=128, num_warps=4, num_stages=4, narrow=True)
MANY_DEEP = GemmConfig(block_m=128, block_n=64, num_warps=4, num_stages=8, narrow=True)

MAX_PARTS = 8  # most programs that share a tile along K


def choose_config(
    m: int, n: int, b_rows: int, multiprocessors: int, arch: tuple[int, int], aligned: bool
) -> GemmConfig:
    """Config of the Triton kernels for `m` rows and `n` columns.

    `b_rows` is the number of rows of B that share a scale, 128 or 1; if every row has its own, tiles of 128x128 spill
    on sm_90. `arch` is the compute capability, (0, 0) for a GPU that is not NVIDIA's. `aligned` says whether the rows
    of both operands are aligned to 16 bytes. A block of sm_120 has 99 KB of shared memory, where the eight stages of
    SOME_DEEP take 114 and PERSISTENT takes 128.
    """
    desktop = arch >= (12, 0)
    if m <= 16:
        crowded = arch < (9, 0) or FEW.tiles(m, n) >= 2 * multiprocessors
        return FEW if crowded else FEW_DEEP
    if arch < (9, 0) or not aligned or (desktop and m > 128):
        whole = LARGE if arch > (0, 0) else LARGE_OTHER
        large = whole if b_rows > 1 else TALL if arch <= (9, 0) else MEDIUM
        return large if large.tiles(m, n) >= multiprocessors else MEDIUM
    crowded = ceil_div(n, 64) >= 2 * multiprocessors
    if m <= 64:
        return SOME if crowded or desktop else SOME_DEEP
    if m <= 128:
        return SOME_WIDE if crowded or arch > (9, 0) else MANY_DEEP
    if arch > (9, 0):
        return PERSISTENT if PERSISTENT.tiles(m, n) >= multiprocessors else MEDIUM
    if b_rows == 1:
        if 3 * MANY_DEEP.tiles(m, n) <= 4 * multiprocessors:
            return MANY_DEEP
        return TALL if TALL.tiles(m, n) >= multiprocessors else MEDIUM
    # With 512 rows, in us, the narrow kernel and one with tiles like PAIRED's took: 2112x7168 29.2 and 41.2, 4096x7168
    # 38.4 and 47.4, 7168x2048 (448 tiles) 27.2 and 29.8, 24576x1536 (1536 tiles) 60.5 and 58.1.
    return MANY_DEEP if MANY_DEEP.tiles(m, n) <= 4 * multiprocessors else PAIRED


def choose_parts(tiles: int, blocks: int, multiprocessors: int) -> int:
    """How many programs of a narrow config share a tile along K, for `tiles` tiles and `blocks` blocks of K.

    If the tiles are more than a quarter of the multiprocessors, deep stages are as good as sharing: 64x4096x7168, 64
    tiles, took 23.6 µs without sharing and 24.3 with four parts; 64x2112x7168, 33 tiles, 21.2 and 18.0.
    """
    if 4 * tiles > multiprocessors:
        return 1
    return max(1, min(MAX_PARTS, multiprocessors // tiles, blocks // 8))


@dataclass(frozen=True)
class HopperConfig:
    """Tile of the Hopper kernel: two warpgroups, each with `waves` times 64 rows, by `block_n` columns.

    `stages` blocks of K are in flight. `cluster` CTAs share their tile of A (`shared_a`; they are adjacent along N) or
    of B (adjacent along M); tiles are computed in strips of `group` clusters in that direction. The loop over K is
    unrolled `unroll` times. `registers`, `ahead`, `in_units` (for grouped products) and `one_reader` (for
    compute-sanitizer) are further options of cuda/fp8_gemm.cuh.

    `clocks` is the time of a block of K and `tile_clocks` what a tile takes in addition, relative to each other. They
    are fitted to the times of ten matrices at 160 to 4,096 rows on an H200, for which the chosen config takes 0.2% more
    time than the fastest on average, and 5% at most.
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
    registers: int = 232
    ahead: int = 16
    one_reader: bool = False
    in_units: bool = False

    @property
    def block_m(self) -> int:
        """Rows of the tile."""
        return 128 * self.waves

    @property
    def tile(self) -> str:
        """Rows and columns of the tile, as a name."""
        return f"{self.block_m}x{self.block_n}"

    def clusters(self, m: int, n: int) -> int:
        """How many clusters' tiles cover an `m` x `n` matrix."""
        along_m, along_n = (1, self.cluster) if self.shared_a else (self.cluster, 1)
        return ceil_div(m, self.block_m * along_m) * ceil_div(n, self.block_n * along_n)

    def estimate(self, m: int, n: int, k: int, multiprocessors: int, groups: int = 1) -> int:
        """Estimated clocks of `groups` products of this size."""
        return self.clocks_of(groups * self.clusters(m, n), k, multiprocessors)

    def clocks_of(self, clusters: int, k: int, multiprocessors: int) -> int:
        """Estimated clocks if `clusters` clusters' tiles are computed: time is counted in whole rounds (waves)."""
        rounds = ceil_div(clusters, max(multiprocessors // self.cluster, 1))
        return rounds * (ceil_div(k, 128) * self.clocks + self.tile_clocks)


HOPPER_TALL = HopperConfig(
    waves=2, block_n=128, stages=3, cluster=2, shared_a=True, group=8, clocks=1165, tile_clocks=1900
)
# Not in clusters, because pairs of tiles would have to fill whole rounds. On an H200, in us, with pairs adjacent along
# M, pairs adjacent along N, and single tiles: 300x36864x7168 198.0, 177.2 and 168.8, 384x8192x4096 43.8, 30.0 and 27.8,
# 4096x2112x7168 105.2, 103.9 and 101.6. With K = 512, pairs adjacent along N are up to 14% faster, but other tiles are
# chosen there.
HOPPER_NARROW = HopperConfig(
    waves=1, block_n=192, stages=4, cluster=1, shared_a=False, group=4, clocks=890, tile_clocks=2700
)
HOPPER_LOW = HopperConfig(
    waves=1, block_n=128, stages=5, cluster=1, shared_a=True, group=4, clocks=625, tile_clocks=850
)
# Half as wide, for products whose tiles of 128x128 would leave half of the multiprocessors idle: on an H200,
# 384x2112x7168 took 19.0 us, and 25.7 with tiles of 128x128. If the loop over K were unrolled by 4, the compiler would
# also unroll the loop over its remainder.
HOPPER_LEAN = HopperConfig(
    waves=1, block_n=64, stages=8, cluster=1, shared_a=True, group=8, clocks=400, tile_clocks=600, unroll=8
)
# For B with a scale for each row. In WGRAD_TALL, 8 of a thread's 16 pairs of columns' scales are kept in registers for
# both products of a block: 1,015 TFLOP/s at 4096x7168 and 4096 tokens. With 11, the registers are enough only for
# unrolling by 2, which gave 973.
WGRAD_TALL = replace(HOPPER_TALL, cluster=1, registers=240, ahead=8, clocks=1550)
WGRAD_LOW = replace(HOPPER_LOW, group=16, clocks=815, tile_clocks=1000)
HOPPER_CONFIGS = {
    128: (HOPPER_TALL, HOPPER_NARROW, HOPPER_LOW, HOPPER_LEAN),
    1: (WGRAD_TALL, WGRAD_LOW),
}


def choose_hopper_config(m: int, n: int, k: int, b_rows: int, multiprocessors: int) -> HopperConfig:
    """Config of the Hopper kernel with the shortest estimated time; `b_rows` is the number of rows of B that share a
    scale."""
    return min(HOPPER_CONFIGS[b_rows], key=lambda config: config.estimate(m, n, k, multiprocessors))


# Bytes of shared memory of an H100's multiprocessor, and how many of them the hardware reserves for every resident CTA.
SHARED_OF_MULTIPROCESSOR, SHARED_RESERVED = 228 * 1024, 1024
SHARED_LIMIT = SHARED_OF_MULTIPROCESSOR - SHARED_RESERVED  # the most that a CTA can use


@dataclass(frozen=True)
class SmallConfig:
    """Tile of the Hopper kernel for few rows: `tile` rows of B by `tokens` rows of A; `split` CTAs divide its K.

    `resident` CTAs are meant to run on a multiprocessor at once, and its shared memory is divided among them.
    """

    tile: int
    tokens: int
    split: int
    resident: int

    def grid(self, m: int, n: int, multiprocessors: int) -> int:
        """Number of CTAs: a cluster for each tile; or at most as many as are resident, if K is not split and the rows
        of A fit one tile."""
        tiles_m, tiles_n = ceil_div(m, self.tokens), ceil_div(n, self.tile)
        if self.split == 1 and tiles_m == 1:
            return min(tiles_n, self.resident * multiprocessors)
        return tiles_m * tiles_n * self.split

    def stages(self, m: int, n: int, k: int, multiprocessors: int) -> int:
        """Pipeline stages, the blocks of K in flight: as many as fit, but no more than a CTA has blocks.

        For the only tile of a CTA there are always enough to hold C, which overlaps them.
        """
        tiles = self.tiles(m, n, multiprocessors)
        room = SHARED_OF_MULTIPROCESSOR // self.resident - SHARED_RESERVED - self.shared_bytes(0, tiles)
        least = ceil_div(self.c, self.stage) if tiles == 1 else 1
        return min(room // (self.stage + 16), max(tiles * ceil_div(ceil_div(k, 128), self.split), least))

    def tiles(self, m: int, n: int, multiprocessors: int) -> int:
        """The most tiles that a CTA computes."""
        tiles = ceil_div(m, self.tokens) * ceil_div(n, self.tile)
        return ceil_div(tiles * self.split, self.grid(m, n, multiprocessors))

    def shared_bytes(self, stages: int, tiles: int) -> int:
        """Bytes of shared memory of a CTA with `stages` stages that computes `tiles` tiles, as laid out in
        cuda/fp8_gemm_small.cuh."""
        received = (self.split - 1) * self.share * 2 * self.tile * 16
        return stages * (self.stage + 16) + received + (0 if tiles == 1 else self.c) + 8

    @property
    def stage(self) -> int:
        """Bytes of a stage: tiles of B and A, and the scales of A, which TMA writes to multiples of 128 bytes."""
        return (self.tile + self.tokens) * 128 + max(self.tokens * 4, 128)

    @property
    def share(self) -> int:
        """How many groups of 8 rows of C one CTA of a cluster adds up."""
        return ceil_div(self.tokens // 8, self.split)

    @property
    def c(self) -> int:
        """Bytes of the buffer through which C is written. For the only tile of a CTA, it overlaps the stages."""
        return min(self.share * 8, 64) * (self.tile + 4) * 4


def choose_small_config(m: int, n: int, k: int, multiprocessors: int) -> SmallConfig:
    """Config of the Hopper kernel for few rows.

    In general, tiles have 64 rows of B, and K is split if there are fewer tiles than the GPU can run at once. Times in
    the comments are in us with a cold L2 (an empty call takes 5), on an H100 unless they say otherwise. Tiles of 128
    rows of B were slower or within 2%, except where they are chosen.
    """
    tokens = next((size for size in (8, 16, 32, 64) if m <= size), 128)
    tiles, blocks = ceil_div(n, 64), ceil_div(k, 128)
    if m > 128:
        # With 256 rows, 4096x7168 took 26.3 if K is not split, and 38.9 if it is split in two.
        split = _split(tiles * ceil_div(m, 64), blocks, 2 * multiprocessors)
        return SmallConfig(64, 64, split, resident=3)
    if tiles > multiprocessors:
        # Each CTA computes several tiles; but if A's rows need two tiles of 64 tokens, there is a CTA for each tile.
        # The numbers of CTAs below are per multiprocessor. On an H200, 24576x1536 with 64 rows took 17.9 with three
        # CTAs, 18.3 with four, 19.3 with two, 19.8 with one (on an H100 22.8 with two and 21.9 with one); with 128 rows
        # 22.5 with three CTAs of 64 tokens each, 24.3 with one or two of 128. 32768x512 took 11.8 with four CTAs; with
        # 64 rows 14.9 with four, 13.4 with three and 13.2 with two.
        if blocks >= 8:
            return SmallConfig(64, min(tokens, 64), 1, resident=3)
        return SmallConfig(64, tokens, 1, resident=2 if tokens >= 64 else 4)
    split = _split(tiles, blocks, multiprocessors)
    if tokens == 128 and split == 2:
        # On an H200, with 96 and 128 rows, 3072x7168 took 17.4 and 17.4, 4096x7168 19.6 and 19.5; with tiles of 64x128,
        # they took 18.9 and 18.9, 19.7 and 19.8.
        return SmallConfig(128, 64, 2, resident=1)
    if tokens == 128 and split == 1 and blocks >= 64:
        return SmallConfig(128, 64, 1, resident=1)  # 7168x16384 on an H200: 44.4; with tiles of 64 rows of B 48.5
    if tokens == 128:
        # Two tiles of 64 tokens. 7168x2048 took 13.6, and 15.1 with one tile of 128 tokens. 2112x7168 took 15.3, and
        # 16.5 with one tile whose K is split in four: in clusters of 4, the GPU runs 120 CTAs at once, or 248 if a
        # multiprocessor takes two.
        return SmallConfig(64, 64, max(split // 2, 1), resident=3 if blocks <= 32 else 2)
    if split == 1 and blocks >= 64:
        # A long K. On an H200, 7168x16384 with one row took 37.2 with K whole and 37.8 split in eight; with 32 rows
        # 37.9 and 40.6; with 64 rows 38.7 split in two and 40.9 whole.
        return SmallConfig(64, tokens, 1, resident=2) if tokens < 64 else SmallConfig(64, 64, 2, resident=3)
    return SmallConfig(64, tokens, split, resident=2)


def use_small(m: int, n: int, k: int, multiprocessors: int) -> bool:
    """Whether the kernel for few rows is faster than the one for many rows, for B in blocks of 128x128.

    With 64 and 128 rows it is, by a factor of 1.02 to 1.9, with two exceptions. One is 128x32768x512, where C is most
    of the memory traffic: on an H200 it takes 14.9 us, with the kernel for many rows 13.8. The other, above 64 rows,
    are products whose HOPPER_LEAN tiles fill the multiprocessors. On an H200, in us, this kernel and those tiles:
    128x24576x1536 22.9 and 20.9, 128x16384x2048 24.4 and 19.5, 128x7168x16384 47.1 and 44.8, 128x7168x2048 13.6 and
    13.1, 128x6144x7168 27.2 and 24.1, 256x3072x7168 26.4 and 20.8, 256x4096x7168 27.2 and 22.6. They do not fill them
    in one round of 66 tiles, 256x2112x7168 18.3 and 18.7, or in 1.5 rounds, 128x12288x4096 23.1 and 27.7. With 256
    rows, 7168x2048 took 16.9, and 15.8 in other tiles; larger products lost more.
    """
    mostly_c = k <= 512 and ceil_div(n, 128) > multiprocessors
    if m > 64 and (mostly_c or _fill(HOPPER_LEAN.clusters(m, n), multiprocessors)):
        return False
    return m <= 128 or (m <= 256 and ceil_div(m, 64) * ceil_div(n, 64) <= 2 * multiprocessors)


def _fill(tiles: int, multiprocessors: int) -> bool:
    """Whether rounds of tiles leave at most one in ten multiprocessors idle, or three in ten if there is one round."""
    rounds = ceil_div(tiles, multiprocessors)
    return tiles >= (0.7 if rounds == 1 else 0.9) * rounds * multiprocessors


def _split(tiles: int, blocks: int, ctas: int) -> int:
    """In how many parts K is split: the most that give at most `ctas` CTAs, each with at least 4 blocks of K."""
    return max(split for split in (1, 2, 4, 8) if split == 1 or (tiles * split <= ctas and 4 * split <= blocks))
