"""Tiles of the portable prefill kernels, and how a cached prefill is divided: pure functions of sizes and GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dskernels.validate import ceil_div

Kernel = Literal["forward", "dq", "dk_dv"]


@dataclass(frozen=True)
class PrefillConfig:
    """The tile of a step: `block_m` queries by `block_n` keys. A program keeps one of the two and loops over the
    other."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# For each kernel, tiles by width, which is the sum of the padded parts of key and value: 128 (64/64), 256 (128/128),
# 320 (192/128), 512 (256/256). Accumulators of that width and two tiles of scores fill the registers; with these head
# dimensions no tile spills.
Tiles = dict[Kernel, dict[int, PrefillConfig]]
HOPPER: Tiles = {
    "forward": {
        128: PrefillConfig(128, 128, num_warps=8, num_stages=2),
        320: PrefillConfig(128, 64, num_warps=8, num_stages=3),
        512: PrefillConfig(128, 32, num_warps=8, num_stages=2),
    },
    "dq": {
        320: PrefillConfig(128, 64, num_warps=8, num_stages=2),
        512: PrefillConfig(128, 32, num_warps=8, num_stages=2),
    },
    "dk_dv": {
        128: PrefillConfig(64, 128, num_warps=8, num_stages=2),
        320: PrefillConfig(32, 128, num_warps=8, num_stages=2),
        512: PrefillConfig(32, 32, num_warps=8, num_stages=2),
    },
}
BLACKWELL: Tiles = {
    "forward": {
        320: PrefillConfig(128, 64, num_warps=8, num_stages=2),
        512: PrefillConfig(128, 32, num_warps=8, num_stages=2),
    },
    "dq": {
        128: PrefillConfig(64, 64, num_warps=4, num_stages=2),
        320: PrefillConfig(128, 64, num_warps=8, num_stages=2),
        512: PrefillConfig(128, 32, num_warps=8, num_stages=2),
    },
    "dk_dv": {
        256: PrefillConfig(64, 128, num_warps=8, num_stages=2),
        320: PrefillConfig(64, 64, num_warps=8, num_stages=2),
        512: PrefillConfig(32, 64, num_warps=8, num_stages=2),
    },
}
# sm_80, sm_89 and sm_120, which have mma.sync and at least 99 KB of shared memory.
AMPERE: Tiles = {
    "forward": {
        128: PrefillConfig(128, 64, num_warps=4, num_stages=2),
        256: PrefillConfig(128, 64, num_warps=8, num_stages=2),
        320: PrefillConfig(128, 32, num_warps=8, num_stages=2),
        512: PrefillConfig(64, 32, num_warps=8, num_stages=2),
    },
    "dq": {
        128: PrefillConfig(128, 64, num_warps=8, num_stages=2),
        320: PrefillConfig(128, 16, num_warps=8, num_stages=2),
        512: PrefillConfig(64, 16, num_warps=8, num_stages=2),
    },
    "dk_dv": {
        128: PrefillConfig(32, 128, num_warps=8, num_stages=2),
        320: PrefillConfig(16, 128, num_warps=8, num_stages=2),
        512: PrefillConfig(32, 32, num_warps=8, num_stages=2),
    },
}
# All others, and the interpreter: within 64 KB of shared memory.
GENERIC: Tiles = {
    "forward": {320: PrefillConfig(64, 32, 4, num_stages=2), 512: PrefillConfig(64, 16, 4, num_stages=2)},
    "dq": {320: PrefillConfig(64, 32, 4, num_stages=1), 512: PrefillConfig(32, 16, 4, num_stages=1)},
    "dk_dv": {320: PrefillConfig(32, 64, 4, num_stages=1), 512: PrefillConfig(16, 32, 4, num_stages=1)},
}
# fp32 is multiplied by the ordinary units, which need all operands in registers.
SINGLE: Tiles = {
    "forward": {320: PrefillConfig(32, 16, 4, num_stages=2), 512: PrefillConfig(16, 32, 4, num_stages=2)},
    "dq": {320: PrefillConfig(32, 16, 4, num_stages=2), 512: PrefillConfig(16, 16, 8, num_stages=2)},
    "dk_dv": {320: PrefillConfig(16, 16, 8, num_stages=1), 512: PrefillConfig(16, 16, 8, num_stages=2)},
}


def choose_config(kernel: Kernel, widths: tuple[int, int, int], itemsize: int, arch: tuple[int, int]) -> PrefillConfig:
    """The config of `kernel` for padded `widths` of key parts A, B and value, on compute capability `arch`.

    `arch` is (0, 0) for GPUs that are not NVIDIA's.
    """
    if itemsize == 4:
        tiles = SINGLE
    elif arch < (8, 0):
        tiles = GENERIC
    else:
        tiles = {9: HOPPER, 10: BLACKWELL}.get(arch[0], AMPERE)
    return next(config for width, config in tiles[kernel].items() if sum(widths) <= width)


def key_parts(width: int, rope: int) -> tuple[int, int]:
    """Widths of the two parts into which a key of `width` is divided; `rope`, if not 0, is the width of the shared
    part.

    A key in one piece is divided if that saves padding: 192 = 128 + 64, 96 = 64 + 32; 112 stays whole, padded to 128.
    """
    if rope:
        return width - rope, rope
    first = 1 << (width.bit_length() - 1)
    rest = width - first
    if padded(first) + padded(rest) < padded(width):
        return first, rest
    return width, 0


def padded(width: int) -> int:
    """Width of a tile for `width` columns: a power of two, at least 16, which a product requires; 0 for none."""
    return max(16, 1 << (width - 1).bit_length()) if width else 0


# ---- over the cache -------------------------------------------------------------------------------------------------

QUERY_TILE = 128  # queries of a head that the Hopper kernel computes together
LEAST_FILL = 0.85  # of the multiprocessors' capacity, in whole rounds of tiles


def heads_at_a_time(heads: int, bytes_of_head: int, most_bytes: int, tiles: int, multiprocessors: int) -> int:
    """How many of the `heads` have all of their keys and values (`bytes_of_head`) expanded at a time.

    Among the numbers that fit into `most_bytes`, it is the one whose `tiles` of queries fill the multiprocessors best;
    0 if even that one leaves them idle for much of the time: then some positions of all heads are expanded at a time.
    Dividing by heads needs no merging (which reads and writes fp32 results), and one pass over new and earlier tokens:
    1,024 tokens over 7,168 of 16 heads took 708 us, and 790 by positions; 4,096 over 28,672 of 128 heads 16.0 ms and
    16.4.
    """
    most = heads if bytes_of_head == 0 else most_bytes // bytes_of_head
    if most >= heads:
        return heads

    def rounds(together: int) -> int:
        whole, rest = divmod(heads, together)
        return whole * ceil_div(together * tiles, multiprocessors) + ceil_div(rest * tiles, multiprocessors)

    best = min(range(most, most // 2, -1), key=rounds, default=0)
    return best if best and heads * tiles >= LEAST_FILL * rounds(best) * multiprocessors else 0


def absorbing_pays(tokens: int, requests: int, heads: int, most: int, multiprocessors: int) -> bool:
    """Whether attention of `tokens` new tokens is faster absorbed; if tiles fill the GPU, up to `most` per request are.

    Per cached position and head, a new token costs 2,176 operations absorbed, and 640 with expanded keys and values,
    but the latter run only on as many multiprocessors as there are tiles: 256 new tokens of 16 heads, which are 32
    tiles, took 1.69 ms absorbed over 131,072 positions, and 2.70 expanded.
    """
    if tokens == 0 or requests == 0 or most == 0:
        return False
    fill = min(requests * ceil_div(tokens, requests * QUERY_TILE) * heads / multiprocessors, 1)
    return tokens * (2176 - 640 / fill) <= most * requests * (2176 - 640)


def most_groups(tokens: int, requests: int, group: int) -> int:
    """The maximum number of groups: the last group of every request, and of tokens outside of all requests, may be
    short."""
    return tokens // group + requests + 2


def absorbed_group(heads: int) -> int:
    """How many new tokens of a request are attended to together when absorbed: 128 query rows.

    These are two blocks of decode's Hopper kernel, which load cached rows for each other.
    """
    return ceil_div(128, heads)
