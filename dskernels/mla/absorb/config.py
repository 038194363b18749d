"""Tiles of the kernels that absorb queries: pure functions of shape."""

from __future__ import annotations

from dataclasses import dataclass

from dskernels.validate import ceil_div


@dataclass(frozen=True)
class QueriesConfig:
    """What a program of triton.py computes: `block_t` tokens by `block_l` latent columns of one head."""

    block_t: int
    block_l: int
    num_warps: int


def choose_queries(tokens: int, itemsize: int) -> QueriesConfig:
    """Config for `tokens` tokens of `itemsize` bytes an element: few tokens are one tile, so weights are read once."""
    if itemsize == 4:
        return QueriesConfig(16, 32, 4)
    if tokens <= 16:
        return QueriesConfig(16, 128, 4)
    if tokens <= 32:
        return QueriesConfig(32, 128, 4)
    return QueriesConfig(64, 128, 4)


QUERIES_CONFIGS = tuple({choose_queries(tokens, itemsize): None for tokens in (16, 32, 64) for itemsize in (2, 4)})

# ---- hopper.cu ------------------------------------------------------------------------------------------------------

NOPE, ROPE, LATENT = 128, 64, 512


@dataclass(frozen=True)
class HopperConfig:
    """What a CTA of hopper.cu computes: `tokens` tokens by `span` latent columns of one head."""

    tokens: int
    span: int

    @property
    def threads(self) -> int:
        """A warpgroup for each 64 columns, at most four."""
        return 128 * min(self.span // 64, 4)

    @property
    def shared(self) -> int:
        """Weights and queries, a barrier for each 64 columns and one more, and room for alignment."""
        return 2 * NOPE * (self.span + self.tokens) + 8 * (self.span // 64 + 1) + 1024


def choose_hopper(tokens: int, heads: int, multiprocessors: int) -> HopperConfig:
    """Config for this many tokens: one tile if possible, in the widest spans that still give every multiprocessor one.

    But spans are 128 while four such CTAs fit on a multiprocessor: 128 heads took 10.7, 11.2 and 13.5 us for 1, 16 and
    64 tokens, with spans of 512 10.9, 11.5 and 14.2. With 128 tokens, 512 took 17.4, 128 and 256 took 19.6.
    """
    tile = min(max(1 << (tokens - 1).bit_length(), 16), 128)
    blocks = heads * ceil_div(tokens, tile)
    spans = (512, 256, 128) if tile == 128 else (128,)
    span = next((s for s in spans if 10 * blocks * (LATENT // s) >= 9 * multiprocessors), 64)
    return HopperConfig(tile, span)


HOPPER_CONFIGS = (
    *(HopperConfig(tokens, span) for tokens in (16, 32, 64) for span in (64, 128)),
    *(HopperConfig(128, span) for span in (64, 128, 256, 512)),
)
