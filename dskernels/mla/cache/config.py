"""How hopper.cu writes the latent cache: a pure function of the type of its rows."""

from __future__ import annotations

from dataclasses import dataclass

WIDEST_LATENT = 512  # columns: half a warp has one token, 32 columns per lane


@dataclass(frozen=True)
class HopperConfig:
    """Options of hopper.cu: warps per block (each has two tokens), and blocks per SM."""

    warps: int
    blocks: int


def choose_hopper(fp8: bool) -> HopperConfig:
    """Options for rows of e4m3 or of bf16."""
    # 65,536 tokens: bf16 48.8 us with 4 warps and 8 blocks, 48.4 with 2 and 16; e4m3 40.8 and 41.7.
    return HopperConfig(warps=4, blocks=8) if fp8 else HopperConfig(warps=2, blocks=16)
