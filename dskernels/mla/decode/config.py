"""Tiles and splits of the decode kernels: pure functions of shape and GPU."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from dskernels.validate import ceil_div

MAX_SPLITS = 128

# The cost of a split in addition to its positions: its prologue, the partial output that it writes, and its share of
# combining.
SPLIT_OVERHEAD = 128
COMBINE_OVERHEAD = 8


@dataclass(frozen=True)
class DecodeConfig:
    """What a program holds: `block_m` query rows (heads and new tokens, packed), and `block_n` cached positions per
    step."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


NARROW = DecodeConfig(block_m=16, block_n=32, num_warps=4, num_stages=2)
SMALL = DecodeConfig(block_m=32, block_n=32, num_warps=4, num_stages=2)
MEDIUM = DecodeConfig(block_m=32, block_n=32, num_warps=8, num_stages=2)
WIDE = DecodeConfig(block_m=64, block_n=32, num_warps=8, num_stages=2)
NARROW_FP8 = DecodeConfig(block_m=16, block_n=32, num_warps=8, num_stages=2)
MEDIUM_FP8 = DecodeConfig(block_m=32, block_n=16, num_warps=8, num_stages=2)
SINGLE = DecodeConfig(block_m=16, block_n=16, num_warps=8, num_stages=3)
LOW_OTHER = DecodeConfig(block_m=16, block_n=16, num_warps=4, num_stages=2)


def choose_config(rows: int, value_dim: int, itemsize: int, fp8_cache: bool, arch: tuple[int, int]) -> DecodeConfig:
    """Config for `rows` query rows of `itemsize` bytes an element, on compute capability `arch` ((0, 0): not NVIDIA).

    A row of 512 takes 2 KB of accumulators, which limits the number of rows; with fewer rows, the cache is read more
    often. 64 fit if tensor cores take operands from shared memory (sm_90, sm_100), otherwise 32. The remaining
    registers limit the positions (64 of them spill a few on sm_90), and unpacking e4m3 takes some.

    On GPUs that are not NVIDIA's, all programs have 4 warps. Then a lane of gfx942 has up to 512 registers; with 8
    warps it has 256, and the kernel spilled 460 bytes a lane with fp32, 584 to 840 with an e4m3 cache. With such a
    cache in pages of 8, 32 positions still spilled 364 bytes.
    """
    if arch == (0, 0):
        return LOW_OTHER if itemsize == 4 or (fp8_cache and value_dim > 256) else NARROW
    if itemsize == 4:
        return SINGLE
    if fp8_cache and value_dim > 256:
        return NARROW_FP8 if rows <= 16 else MEDIUM_FP8
    if not fp8_cache and (rows <= 16 or arch < (8, 0)):
        return NARROW
    if value_dim <= 256:
        return SMALL
    return WIDE if rows > 32 and arch[0] in (9, 10) else MEDIUM


@functools.lru_cache(maxsize=4096)
def choose_splits(programs: int, capacity: int, multiprocessors: int) -> int:
    """How many programs share the cached positions of one request and row block; there are `programs` of those.

    It minimises the time of the slowest multiprocessor, counted in positions, for requests that fill their block table.
    Only sizes known to the host matter: the lengths stay on the device, and each program takes its share of the actual
    length.
    """
    if programs == 0 or capacity == 0:
        return 1

    def cost(splits: int) -> int:
        waves = ceil_div(programs * splits, multiprocessors)
        return waves * (ceil_div(capacity, splits) + SPLIT_OVERHEAD) + (splits - 1) * COMBINE_OVERHEAD

    # More than four waves would only help lengths far below the capacity, and badly.
    most = min(MAX_SPLITS, ceil_div(capacity, SPLIT_OVERHEAD), max(1, 4 * multiprocessors // programs))
    return min(range(1, most + 1), key=cost)


# ---- hopper.cu ------------------------------------------------------------------------------------------------------

VALUE, ROPE = 512, 64
BLOCK = 64  # query rows of a CTA, and cached positions per step
MOST_ROWS = 64 * BLOCK
MOST_REQUESTS = 16384  # a CTA sums up their lengths in shared memory
TMA, ROWS, E4M3 = 0, 1, 2  # loaders

# Queries, two stages of positions, the weights; maxima and sums of the rows; two work items; 18 barriers.
SHARED = 3 * BLOCK * (VALUE + ROPE) * 2 + BLOCK * BLOCK * 2 + 6 * BLOCK * 4 + 2 * 32 + 18 * 8


@dataclass(frozen=True)
class HopperConfig:
    """How rows of the cache get into shared memory, and how the work is divided; see hopper.cu."""

    loader: int
    box_rows: int = BLOCK
    prefetch: int = 0
    cluster: int = 1
    boundary: int = 2
    whole: int = 8
    registers: int = 232


def choose_hopper_config(rows: int, page_size: int, fp8_cache: bool) -> HopperConfig:
    """Config for `rows` query rows of a request over a cache of this page size."""
    if fp8_cache:
        return HopperConfig(E4M3, prefetch=2, registers=200)
    cluster = 1 if ceil_div(rows, BLOCK) % 2 else 2
    box_rows = math.gcd(page_size, BLOCK)
    if box_rows < 8:
        return HopperConfig(ROWS, registers=208)
    # 16 requests of 16,384, 128 heads: 137.5 us if a request counts as 3 additional blocks, 139.0 with 2, 140.9 with 1.
    boundary = 2 if cluster == 1 else 3
    # A thread that loads more than one box per block needs more than 40 registers.
    registers = 232 if box_rows == BLOCK else 224
    return HopperConfig(TMA, box_rows, cluster=cluster, boundary=boundary, registers=registers)


# ---- hopper_rows.cu -------------------------------------------------------------------------------------------------

THREADS = 384
UNIT = 16  # cached rows that are loaded, and released, together
ROW_BYTES = VALUE + VALUE // 128 * 4 + ROPE * 2


@dataclass(frozen=True)
class HopperRowsConfig:
    """Query rows of a CTA, cached rows that shared memory holds (in units of 16), and shares; see hopper_rows.cu."""

    width: int
    units: int
    registers: int = 224
    boundary: int = 2
    whole: int = 8


def use_rows(rows: int) -> bool:
    """Whether hopper_rows.cu, instead of hopper.cu, takes `rows` query rows over an e4m3 cache.

    A version for 64 rows was 5% faster with 128 requests of 4,096 and 64 heads (202.4 and 213.6 us) and 4% with 128
    heads, but 11% slower with four uneven requests.
    """
    return rows <= 32


def choose_rows_config(rows: int) -> HopperRowsConfig:
    """Config for up to 32 query rows of a request: no wider than they are, with all of shared memory."""
    return HopperRowsConfig(16, units=18) if rows <= 16 else HopperRowsConfig(32, units=15)


def rows_shared(width: int, units: int) -> int:
    """Bytes of shared memory of hopper_rows.cu: cached rows, queries, weights of two blocks times four scales, and
    small items."""
    rows = ceil_div(units * UNIT * ROW_BYTES, 1024) * 1024
    operands = rows + ((VALUE + ROPE) // 64 + 2 * 4) * width * 128
    return operands + width * 4 + 9 * (width + 4) * 4 + 2 * 32 + (2 * units + 2) * 8
