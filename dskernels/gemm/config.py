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
