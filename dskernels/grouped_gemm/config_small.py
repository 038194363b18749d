"""Choices for the Hopper kernel for groups of few rows: pure functions of shapes, which are known on the host."""

from __future__ import annotations

from dskernels.gemm.config import SHARED_OF_MULTIPROCESSOR, SHARED_RESERVED, SmallConfig
from dskernels.validate import ceil_div


def choose_masked_config(rows: int) -> SmallConfig:
    """Config for buffers of `rows` rows."""
    return _config(rows)


def choose_contiguous_config(rows: int, groups: int) -> SmallConfig:
    """Config for `rows` rows in `groups` groups: a tile fits a group of 1.5 times the average size."""
    return _config(ceil_div(3 * rows, 2 * groups))


def _config(rows: int) -> SmallConfig:
    """The lowest tile with `rows` rows, 64 at most, by 64 rows of B, and one CTA per multiprocessor.

    32 groups of 64 rows, 4096x7168, took 351 us on an H100; with two CTAs per multiprocessor 361, with three 383; in
    tiles of 128 rows of B 356. With 256 groups of 4 rows on average, tiles of 8, 16 and 32 tokens were within 0.5%.
    """
    tokens = next((size for size in (8, 16, 32) if rows <= size), 64)
    return SmallConfig(64, tokens, split=1, resident=1)


def stages(config: SmallConfig, groups: int) -> int:
    """Pipeline stages, the blocks of K in flight: as many as fit."""
    room = SHARED_OF_MULTIPROCESSOR // config.resident - SHARED_RESERVED - shared_bytes(config, 0, groups)
    return room // _stage(config)


def shared_bytes(config: SmallConfig, stages: int, groups: int) -> int:
    """Bytes of shared memory of a CTA, as laid out in hopper_small.cu: the stages, C, and the table of groups."""
    warps = config.tile // 16 + 1
    return stages * _stage(config) + config.c + 8 + (groups + 1) * 8 + warps * 8


def _stage(config: SmallConfig) -> int:
    """Bytes of a stage: tiles of B and A, scales of `tokens` + 4 rows of A in a multiple of 128 bytes, two barriers."""
    return (config.tile + config.tokens) * 128 + ceil_div(config.tokens + 4, 32) * 128 + 16


def grid(config: SmallConfig, rows: int, groups: int, n: int, multiprocessors: int) -> int:
    """Number of CTAs: as many as are resident, but no more than a division of `rows` rows into groups has tiles."""
    most = min(rows, rows // config.tokens + groups)
    return min(most * ceil_div(n, config.tile), config.resident * multiprocessors)
