"""Choices of the Hopper kernels of the expert block for a few tokens: pure functions of the shape."""

from __future__ import annotations

from dskernels.gemm.config import SHARED_OF_MULTIPROCESSOR, SHARED_RESERVED, SmallConfig
from dskernels.validate import ceil_div

OPERAND = 8  # tokens are the narrow operand of the tensor cores, which is so wide at least: so many may be run
MOST_CHOICES = 256  # of all tokens
TILE = 64  # rows of a weight that a CTA multiplies at a time
CHUNK = 16  # blocks of K that hopper_few_down.cu quantises at a time

UP = SmallConfig(TILE, OPERAND, split=1, resident=1)
# Of the second product three CTAs fit a multiprocessor, and one of them beside one of the first, which has the rest: it
# finds out what it will need, and its first weights are on their way, while the first product still runs. On an H200 a
# token through Moonlight's shape took 1.871 ms so, 1.886 where the first product has all of a multiprocessor, and then
# 1.99 with two CTAs of the second one, 1.92 with four. To ask the L2 for what is needed next (weights of shared experts
# before the choice is known, those of the second product at the end of the first) cost 1 and 2%.
DOWN_RESIDENT = 3


def most_tokens(hidden: int, inner: int) -> int:
    """Up to how many tokens these kernels are the faster ones, for experts of that size.

    They save launches, and stream weights more slowly: 3.1 to 3.8 TB/s, the grouped products 4.1 to 4.3. A block on an
    H200, microseconds, of Moonlight's size (2048 x 1408) with 1, 2, 3, 4, 6 and 8 tokens: 23.2, 38.5, 51.4, 61.0, 86.7
    and 105, the others 36.7, 50.2, 59.6, 66.3, 84.6 and 97.3. Of DeepSeek-V3's (7168 x 2048) with 1, 2, 4 and 8: 110,
    196, 370 and 677, the others 120, 199, 355 and 630.
    """
    return 4 if hidden * inner <= 2048 * 2048 else 2


def most_chosen(choices: int, routed: int, shared: int) -> int:
    """Experts that so many choices may fall on, and the shared ones."""
    return min(choices, routed) + shared


def up_stages(most: int) -> int:
    """How many blocks of K are in flight: as many as leave room for a CTA of the second product."""
    room = SHARED_OF_MULTIPROCESSOR - SHARED_OF_MULTIPROCESSOR // DOWN_RESIDENT - SHARED_RESERVED
    return (room - up_shared(0, most)) // (UP.stage + 16)


def up_shared(stages: int, most: int) -> int:
    """Shared memory of a CTA of hopper_few_up.cu: the stages, C, and the list of experts."""
    return stages * (UP.stage + 16) + UP.c + 8 + _list(most)


def up_grid(most: int, n: int, multiprocessors: int) -> int:
    """CTAs: one a multiprocessor, or one for each tile that there may be."""
    return min(most * ceil_div(n, TILE), multiprocessors)


def choose_down(n: int, multiprocessors: int) -> SmallConfig:
    """In how many parts the sum is split: as many as leave no CTA waiting for a place."""
    tiles = ceil_div(n, TILE)
    split = max(s for s in (1, 2, 4, 8) if s == 1 or tiles * s <= DOWN_RESIDENT * multiprocessors)
    return SmallConfig(TILE, OPERAND, split, resident=DOWN_RESIDENT)


def down_stages(config: SmallConfig, most: int, choices: int) -> int:
    """How many blocks of K are in flight: as many as fit."""
    room = SHARED_OF_MULTIPROCESSOR // config.resident - SHARED_RESERVED - down_shared(config, 0, most, choices)
    return room // (TILE * 128 + 16)


def down_shared(config: SmallConfig, stages: int, most: int, choices: int) -> int:
    """Shared memory of a CTA of hopper_few_down.cu, in the order of its `Layout`."""
    quantized = CHUNK * OPERAND * (128 + 4)
    received = (config.split - 1) * 2 * TILE * 16
    weights = most * OPERAND * 4 + ceil_div(choices, 2) * 8
    return stages * (TILE * 128 + 16) + quantized + received + weights + 8 + _list(most)


def _list(most: int) -> int:
    """Of `Chosen` in cuda/few_experts.cuh."""
    return 272 + 4 * most
