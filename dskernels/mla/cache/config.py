"""Choice of how hopper.cu writes the latent cache: a pure function of what a row holds."""

from __future__ import annotations

from dataclasses import dataclass

WIDEST_LATENT = 512  # columns: half a warp has a token, 32 columns a lane


@dataclass(frozen=True)
class HopperConfig:
    """Options of hopper.cu: warps of a block, each of two tokens, and blocks to an SM."""

    warps: int
    blocks: int


def choose_hopper(fp8: bool) -> HopperConfig:
    """Options for rows of e4m3 or of bf16."""
    # 65,536 tokens: bf16 48.8 us with 4 warps and 8 blocks, 48.4 with 2 and 16; e4m3 40.8 and 41.7.
    return HopperConfig(warps=4, blocks=8) if fp8 else HopperConfig(warps=2, blocks=16)
