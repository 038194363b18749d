"""Tiles of the projections around decode: pure functions of shape."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QueriesConfig:
    """What a program makes: `block_t` tokens by `block_l` latent columns of one head."""

    block_t: int
    block_l: int
    num_warps: int


def choose_queries(tokens: int, itemsize: int) -> QueriesConfig:
    """Config for `tokens` tokens of `itemsize` bytes an element: few tokens are one tile, so that weights are read
    once."""
    if itemsize == 4:
        return QueriesConfig(16, 32, 4)
    if tokens <= 16:
        return QueriesConfig(16, 128, 4)
    if tokens <= 32:
        return QueriesConfig(32, 128, 4)
    return QueriesConfig(64, 128, 4)


QUERIES_CONFIGS = tuple({choose_queries(tokens, itemsize): None for tokens in (16, 32, 64) for itemsize in (2, 4)})
