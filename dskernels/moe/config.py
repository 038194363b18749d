"""Block sizes of the permuting kernels: pure functions of the shape."""

from __future__ import annotations

from dataclasses import dataclass

# Choices up to which each is ranked among all by comparing it with every other one: 4M comparisons, in one launch.
MOST_COMPARED = 2048
COMPARE_BLOCK, COMPARE_CHUNK = 16, 128
# Ids that the program which counts them takes at a time.
COMPARE_COUNTED = 1024
# Tokens whose choices one program copies, with one more behind them.
APPEND_TOKENS = 64
# Ids that one program of the counting sort ranks among each other, by comparing all pairs: 4K comparisons. With 128
# (and 32) 32,768 choices took 21.8 (21.4) us on an H200, not 17.5, and 16,384 15.7 (15.5), not 13.8.
SORT_BLOCK = 64
# What one program scans of the counts [blocks, experts] at a time.
SCAN_BLOCKS = 128
SCAN_EXPERTS = 16
MAX_EXPERTS = 1024
# Rows that a program of the SwiGLU takes where there are many. Programs of rows that nobody reads, half of them where
# two ranks' tokens are all there, take time too: on an H200 71 us with one a row, 56 with four (of all rows 54, 56).
SWIGLU_ROWS, FEWEST_SWIGLU = 4, 8192
# Rows whose scales one program copies, and how many of each: read one after the other, they took 10 of the copy's 15 us
# at 128 tokens.
SCALE_ROWS, SCALE_TILES = 128, 8


@dataclass(frozen=True)
class RowConfig:
    """Columns of a row that a program takes at a time, and its warps."""

    width: int
    num_warps: int


def choose_row(columns: int) -> RowConfig:
    """All of a narrow row, 1024 columns of a wide one."""
    width = 128
    while width < min(columns, 1024):
        width *= 2
    return RowConfig(width, num_warps=4)


def choose_copy(columns: int, itemsize: int) -> RowConfig:
    """For a copy: threads that move 16 bytes at once. 1024 columns at most, as 7168 have whole sevenths of those."""
    width = choose_row(columns).width
    return RowConfig(width, num_warps=min(4, max(1, width * itemsize // 512)))
