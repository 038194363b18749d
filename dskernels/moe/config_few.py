"""Choices of the Hopper kernels of the expert block for a few tokens: pure functions of the shape."""

from __future__ import annotations

from dskernels.gemm.config import SHARED_OF_MULTIPROCESSOR, SHARED_RESERVED, SmallConfig
from dskernels.validate import ceil_div

OPERAND = 8  # the tokens are the N operand of wgmma, whose N is at least 8: so these kernels take up to 8 tokens
MOST_CHOICES = 256  # of all tokens together
TILE = 64  # rows of a weight that a CTA multiplies at a time
CHUNK = 16  # blocks of K that hopper_few_down.cu quantises at a time

UP = SmallConfig(TILE, OPERAND, split=1, resident=1)
# CTAs of the second product that fit on a multiprocessor. A CTA of the first product leaves room for one of them: it
# finds out which experts it needs and starts to load its first weights while the first product still runs. On an H200 a
# token through a model of Moonlight's shape took 1.871 ms with that; if the first product has all of a multiprocessor,
# 1.886, then with two CTAs of the second product 1.99 and with four 1.92. Prefetching into the L2 what is needed next
# was slower: by 1% for the weights of shared experts before the choice is known, by 2% for the weights of the second
# product at the end of the first.
DOWN_RESIDENT = 3


def most_tokens(hidden: int, inner: int) -> int:
    """Up to how many tokens these kernels are faster than the grouped products, for experts of that size.

    They save launches, but they stream weights more slowly: at 3.1 to 3.8 TB/s, where the grouped products reach 4.1 to
    4.3. Microseconds of a block on an H200:

    - Moonlight's size (2048 x 1408) with 1, 2, 3, 4, 6 and 8 tokens: 23.2, 38.5, 51.4, 61.0, 86.7 and 105; by grouped
      products 36.7, 50.2, 59.6, 66.3, 84.6 and 97.3.
    - DeepSeek-V3's size (7168 x 2048) with 1, 2, 4 and 8 tokens: 110, 196, 370 and 677; by grouped products 120, 199,
      355 and 630.
    """
    return 4 if hidden * inner <= 2048 * 2048 else 2


def most_chosen(choices: int, routed: int, shared: int) -> int:
    """The largest number of experts that may run: those that so many choices can name, and the shared ones."""
    return min(choices, routed) + shared


def up_stages(most: int) -> int:
    """Pipeline stages of the first product, each a block of K: as many as leave room for a CTA of the second."""
    room = SHARED_OF_MULTIPROCESSOR - SHARED_OF_MULTIPROCESSOR // DOWN_RESIDENT - SHARED_RESERVED
    return (room - up_shared(0, most)) // (UP.stage + 16)


def up_shared(stages: int, most: int) -> int:
    """Bytes of shared memory of a CTA of hopper_few_up.cu: the stages, the tile of C, and the list of experts."""
    return stages * (UP.stage + 16) + UP.c + 8 + _list(most)


def up_grid(most: int, n: int, multiprocessors: int) -> int:
    """Number of CTAs: one per multiprocessor, or one per tile if there cannot be so many tiles."""
    return min(most * ceil_div(n, TILE), multiprocessors)


def choose_down(n: int, multiprocessors: int) -> SmallConfig:
    """Config of the second product: its K is split among as many CTAs as can all run at the same time."""
    tiles = ceil_div(n, TILE)
    split = max(s for s in (1, 2, 4, 8) if s == 1 or tiles * s <= DOWN_RESIDENT * multiprocessors)
    return SmallConfig(TILE, OPERAND, split, resident=DOWN_RESIDENT)


def down_stages(config: SmallConfig, most: int, choices: int) -> int:
    """Pipeline stages of the second product, each a block of K: as many as fit."""
    room = SHARED_OF_MULTIPROCESSOR // config.resident - SHARED_RESERVED - down_shared(config, 0, most, choices)
    return room // (TILE * 128 + 16)


def down_shared(config: SmallConfig, stages: int, most: int, choices: int) -> int:
    """Bytes of shared memory of a CTA of hopper_few_down.cu, in the order of its `Layout`."""
    quantized = CHUNK * OPERAND * (128 + 4)
    received = (config.split - 1) * 2 * TILE * 16
    weights = most * OPERAND * 4 + ceil_div(choices, 2) * 8
    return stages * (TILE * 128 + 16) + quantized + received + weights + 8 + _list(most)


def _list(most: int) -> int:
    """Bytes of the list of experts, `Chosen` in cuda/few_experts.cuh."""
    return 272 + 4 * most
