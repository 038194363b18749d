"""Patch sizes of the quantising kernels: pure functions of the tile."""

from __future__ import annotations

from dataclasses import dataclass

from dskernels.types import Block


@dataclass(frozen=True)
class PatchConfig:
    """What one program quantises: `rows` x `cols` elements, one tile wide in at least one direction."""

    rows: int
    cols: int
    num_warps: int


def choose_patch(block: Block) -> PatchConfig:
    """Patch for tiles of `block`: about 4K elements (32 a thread), except that a 128x128 tile is a patch of its own."""
    if block == (1, 128):
        return PatchConfig(rows=32, cols=128, num_warps=4)
    if block == (128, 1):
        return PatchConfig(rows=128, cols=32, num_warps=4)
    return PatchConfig(rows=128, cols=128, num_warps=8)
