"""Patch sizes of the quantising kernels: pure functions of the tile."""

from __future__ import annotations

from dataclasses import dataclass

from dskernels.types import Block
from dskernels.validate import ceil_div


@dataclass(frozen=True)
class PatchConfig:
    """What one program quantises: `rows` x `cols` elements, one tile wide in at least one direction."""

    rows: int
    cols: int
    num_warps: int


def choose_patch(block: Block) -> PatchConfig:
    """The patch for tiles of `block`: about 4K elements (32 per thread), except that a 128x128 tile is a patch of
    its own."""
    if block == (1, 128):
        return PatchConfig(rows=32, cols=128, num_warps=4)
    if block == (128, 1):
        return PatchConfig(rows=128, cols=32, num_warps=4)
    return PatchConfig(rows=128, cols=128, num_warps=8)


def choose_columns(operands: int = 1) -> PatchConfig:
    """A patch of 128 rows whose columns are quantised and become rows: 41 us at 4096 x 7168, other shapes 45 to 56.

    With two operands (a gated product) it has twice the warps, and with three (its gradient) four times, since sm_89
    would spill otherwise.
    """
    return PatchConfig(rows=128, cols=64, num_warps=4 << (operands - 1))


@dataclass(frozen=True)
class NormConfig:
    """How a program walks its row: `tiles` of 128 columns at a time, which are the `whole` row or a part of it."""

    tiles: int
    whole: bool
    num_warps: int


def choose_norm(cols: int) -> NormConfig:
    """A row of up to 16,384 columns stays in registers, 32 elements per thread: 131 us at 7168 x 16384, otherwise
    202."""
    tiles = 1 << max(ceil_div(cols, 128) - 1, 0).bit_length()
    if tiles <= 128:
        return NormConfig(tiles, True, num_warps=max(4, tiles // 8))
    return NormConfig(16, False, num_warps=4)


@dataclass(frozen=True)
class NormBackwardConfig:
    """How programs walk rows, `per_sm` to an SM: `block` columns at a time, which are the `whole` row or a part."""

    block: int
    whole: bool
    num_warps: int
    per_sm: int


def choose_norm_backward(cols: int) -> NormBackwardConfig:
    """A row of up to 8,192 columns, and its part of the weight's gradient, stay in registers."""
    block = max(1 << max(cols - 1, 0).bit_length(), 128)
    if block <= 8192:
        num_warps = min(max(block // 512, 1), 16)
        return NormBackwardConfig(block, True, num_warps, per_sm=max(16 // num_warps, 1))
    return NormBackwardConfig(4096, False, 8, per_sm=2)


MATRIX, PRODUCT, GRADIENT = 0, 1, 2
BY_ROW, BY_COLUMN, BY_TILE = 1, 2, 3
SHARES = {(1, 128): BY_ROW, (128, 1): BY_COLUMN, (128, 128): BY_TILE}


@dataclass(frozen=True)
class HopperConfig:
    """Options of hopper.cu: what is quantised, which elements share a scale in each result, and how the work is
    divided."""

    source: int
    plain: int
    transposed: int
    warps: int
    blocks: int
    down: bool
    kept: bool = False

    @property
    def rows(self) -> int:
        """Rows of a tile of 128 columns."""
        return 16 * self.warps

    @property
    def shared(self) -> int:
        """Dynamic shared memory of a block: half of a gradient waits there in fp32."""
        return self.rows * 128 * 4 if self.source == GRADIENT else 0


# As many blocks per SM as registers allow without spilling. `down` orders tiles so that the rows of a transposed result
# are filled by tiles that run at the same time: 2% faster if it is the only result (129 us against 132 at 7168 x
# 16384), and 2% slower if there are two (180 against 176) and for SwiGLU (60.7 against 60.0 at 4096 x 7168).
QUANTIZE_BOTH = HopperConfig(MATRIX, BY_ROW, BY_COLUMN, warps=8, blocks=3, down=False)
QUANTIZE_WEIGHT = HopperConfig(MATRIX, BY_TILE, BY_TILE, warps=8, blocks=2, down=False)  # 3 blocks would spill
SWIGLU = HopperConfig(PRODUCT, BY_ROW, 0, warps=4, blocks=4, down=False)
SWIGLU_KEPT = HopperConfig(PRODUCT, BY_ROW, 0, warps=4, blocks=4, down=False, kept=True)
SWIGLU_TRANSPOSED = HopperConfig(PRODUCT, 0, BY_COLUMN, warps=8, blocks=2, down=False)
SWIGLU_BACKWARD = HopperConfig(GRADIENT, BY_ROW, BY_COLUMN, warps=8, blocks=2, down=False)
PLAIN = {
    (1, 128): HopperConfig(MATRIX, BY_ROW, 0, warps=4, blocks=8, down=False),
    (128, 1): HopperConfig(MATRIX, BY_COLUMN, 0, warps=8, blocks=3, down=False),
    (128, 128): HopperConfig(MATRIX, BY_TILE, 0, warps=8, blocks=4, down=False),
}
TRANSPOSED = {
    block: HopperConfig(MATRIX, 0, share, warps=8, blocks=3 if share == BY_ROW else 4, down=True)
    for block, share in SHARES.items()
}
BOTH = (QUANTIZE_BOTH, QUANTIZE_WEIGHT)
HOPPER_CONFIGS = (*PLAIN.values(), *TRANSPOSED.values(), *BOTH, SWIGLU, SWIGLU_KEPT, SWIGLU_TRANSPOSED, SWIGLU_BACKWARD)


def choose_hopper(block: Block, transpose: bool) -> HopperConfig:
    """Options for a matrix in tiles of `block` (of x, even if the result is x.T)."""
    return (TRANSPOSED if transpose else PLAIN)[block]


@dataclass(frozen=True)
class HopperNormConfig:
    """Options of hopper_norm.cu: a row is `per` chunks of 8 columns for each thread of `warps`; `blocks` per SM."""

    warps: int
    per: int
    blocks: int


WIDEST_NORM = 32768  # columns: 32 warps


def choose_hopper_norm(cols: int) -> HopperNormConfig:
    """Options for rows of `cols` columns.

    On an H200, microseconds of 4096 rows with 4 chunks, 3, 2 a thread: 37.7, 40.3, 42.3 at 7168 columns. With 4, 2, 1:
    15.2, 13.8, 14.1 at 1536.
    """
    per = 4 if cols >= 4096 else 2 if cols >= 1024 else 1
    warps = ceil_div(cols, 8 * 32 * per)
    return HopperNormConfig(warps, per, blocks=min(35 // warps, 16) or 1)
