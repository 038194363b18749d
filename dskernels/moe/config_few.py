"""Choices of the Hopper kernels of the expert block for a few tokens: pure functions of the shape."""

from __future__ import annotations

from dskernels.gemm.config import SHARED_OF_MULTIPROCESSOR, SHARED_RESERVED, SmallConfig
from dskernels.validate import ceil_div

# Tokens are the narrow operand of the tensor cores, 8 at least: so many go through every expert that one of them chose.
MOST_TOKENS = 8
MOST_CHOICES = 256  # of all tokens
TILE = 64  # rows of a weight that a CTA multiplies at a time
CHUNK = 16  # blocks of K that hopper_few_down.cu quantises at a time

UP = SmallConfig(TILE, MOST_TOKENS, split=1, resident=1)
# Of the second product two CTAs fit a multiprocessor: with three experts' blocks in each, all is on its way at once.
DOWN_RESIDENT = 2


def most_chosen(choices: int, routed: int, shared: int) -> int:
    """Experts that so many choices may fall on, and the shared ones."""
    return min(choices, routed) + shared


def up_stages(most: int) -> int:
    """How many blocks of K are in flight: as many as fit."""
    return (SHARED_OF_MULTIPROCESSOR - SHARED_RESERVED - up_shared(0, most)) // (UP.stage + 16)


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
    return SmallConfig(TILE, MOST_TOKENS, split, resident=DOWN_RESIDENT)


def down_stages(config: SmallConfig, most: int, choices: int) -> int:
    """How many blocks of K are in flight: as many as fit."""
    room = SHARED_OF_MULTIPROCESSOR // config.resident - SHARED_RESERVED - down_shared(config, 0, most, choices)
    return room // (TILE * 128 + 16)


def down_shared(config: SmallConfig, stages: int, most: int, choices: int) -> int:
    """Shared memory of a CTA of hopper_few_down.cu, in the order of its `Layout`."""
    quantized = CHUNK * MOST_TOKENS * (128 + 4)
    received = (config.split - 1) * 2 * TILE * 16
    weights = most * MOST_TOKENS * 4 + ceil_div(choices, 2) * 8
    return stages * (TILE * 128 + 16) + quantized + received + weights + 8 + _list(most)


def _list(most: int) -> int:
    """Of `Chosen` in cuda/few_experts.cuh."""
    return 272 + 4 * most
