"""Tile choice of the portable prefill kernels, and how a cached prefill is cut: pure functions of sizes and GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dskernels.validate import ceil_div

Kernel = Literal["forward", "dq", "dk_dv"]


@dataclass(frozen=True)
class PrefillConfig:
    """Tile of a step: `block_m` queries by `block_n` keys. A program keeps one of the two and walks the other."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# For each kernel the tiles by width, the sum of the padded parts of key and value: 128 (64/64), 256 (128/128), 320
# (192/128), 512 (256/256). Accumulators of that width and two tiles of scores fill the registers; for these head
# dimensions none of the tiles spill.
# What wgmma and tcgen05 read from shared memory takes registers on older GPUs: there the walked block is as short as
# 16, so that the tile that stays is large and the reading of L2 small.
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
# sm_80, sm_89 and sm_120, which have mma.sync, and 99 KB of shared memory or more.
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
# Anything else, and the interpreter: within 64 KB of shared memory.
GENERIC: Tiles = {
    "forward": {320: PrefillConfig(64, 32, 4, num_stages=2), 512: PrefillConfig(64, 16, 4, num_stages=2)},
    "dq": {320: PrefillConfig(64, 32, 4, num_stages=1), 512: PrefillConfig(32, 16, 4, num_stages=1)},
    "dk_dv": {320: PrefillConfig(32, 64, 4, num_stages=1), 512: PrefillConfig(16, 32, 4, num_stages=1)},
}
# fp32 is multiplied by the ordinary units, which want all operands in registers.
SINGLE: Tiles = {
    "forward": {320: PrefillConfig(32, 16, 4, num_stages=2), 512: PrefillConfig(16, 32, 4, num_stages=2)},
    "dq": {320: PrefillConfig(32, 16, 4, num_stages=2), 512: PrefillConfig(16, 16, 8, num_stages=2)},
    "dk_dv": {320: PrefillConfig(16, 16, 8, num_stages=1), 512: PrefillConfig(16, 16, 8, num_stages=2)},
}


def choose_config(kernel: Kernel, widths: tuple[int, int, int], itemsize: int, arch: tuple[int, int]) -> PrefillConfig:
    """Config of `kernel` for padded `widths` of key parts A, B and value, on compute capability `arch`.

    `arch` is (0, 0) for what is not an NVIDIA GPU.
    """
    if itemsize == 4:
        tiles = SINGLE
    elif arch < (8, 0):
        tiles = GENERIC
    else:
        tiles = {9: HOPPER, 10: BLACKWELL}.get(arch[0], AMPERE)
    return next(config for width, config in tiles[kernel].items() if sum(widths) <= width)


def key_parts(width: int, rope: int) -> tuple[int, int]:
    """Widths of the two parts that a key of `width` is taken in; `rope`, if not 0, is the width of the shared part.

    A key in one piece is cut where that saves padding: 192 = 128 + 64, 96 = 64 + 32; 112 stays whole, as 128.
    """
    if rope:
        return width - rope, rope
    first = 1 << (width.bit_length() - 1)
    rest = width - first
    if padded(first) + padded(rest) < padded(width):
        return first, rest
    return width, 0


def padded(width: int) -> int:
    """Width of a tile that holds `width` columns: a power of two, at least the 16 that a product takes; 0 for none."""
    return max(16, 1 << (width - 1).bit_length()) if width else 0


# ---- over the cache -------------------------------------------------------------------------------------------------

QUERY_TILE = 128  # queries of a head that the Hopper kernel computes together
LEAST_FILL = 0.85  # of what the multiprocessors could do in the rounds of tiles that there are


def heads_at_a_time(heads: int, bytes_of_head: int, most_bytes: int, tiles: int, multiprocessors: int) -> int:
    """How many of the `heads` have all of their keys and values, `bytes_of_head`, written out together.

    Of the numbers that fit into `most_bytes` the one whose `tiles` of queries fill the multiprocessors best; 0 where
    even they are idle for much of the time: then it is some of the positions, of all heads. Heads apart need no
    merging, which reads and writes fp32 results, and one pass over the new tokens and those before them needs no place
    for both: 1,024 tokens over 7,168 of 16 heads took 708 us, and 790 by positions; 4,096 over 28,672 of 128 heads 16.0
    ms, and 16.4.
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
    """Whether `tokens` new ones are attended to faster absorbed; `most` of a request are, where tiles fill the GPU.

    Of a cached position and a head a new token costs 2,176 operations absorbed, and 640 with keys and values written
    out, but these on as many multiprocessors only as there are tiles: 256 new tokens of 16 heads, which have 32, took
    1.69 ms over 131,072 positions, and 2.70 written out.
    """
    if tokens == 0 or requests == 0 or most == 0:
        return False
    fill = min(requests * ceil_div(tokens, requests * QUERY_TILE) * heads / multiprocessors, 1)
    return tokens * (2176 - 640 / fill) <= most * requests * (2176 - 640)


def most_groups(tokens: int, requests: int, group: int) -> int:
    """Groups that there may be: the last one of every request, and of what is outside of all of them, may be short."""
    return tokens // group + requests + 2


def absorbed_group(heads: int) -> int:
    """How many new tokens of a request are attended to together in absorbed form: 128 query rows, two blocks of the
    Hopper kernel of decode, which load cached rows for each other."""
    return ceil_div(128, heads)
