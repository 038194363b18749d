"""Block sizes of the kernels that sort choices, copy rows and compute the SwiGLU: pure functions of the shape."""

from __future__ import annotations

from dataclasses import dataclass, replace

# Up to this many choices, the rank of each is found by comparing it with every other one: 4M comparisons at most, in a
# single launch. More choices take the counting sort.
MOST_COMPARED = 2048
# A program ranks this many choices, and compares them with this many others at a time.
COMPARE_BLOCK, COMPARE_CHUNK = 16, 128
# In the same launch one program counts the ids of each expert; it reads this many at a time.
COMPARE_COUNTED = 1024
# Number of tokens whose choices one program copies when it appends the shared experts to them.
APPEND_TOKENS = 64
# Number of ids that one program of the counting sort ranks among each other by comparing all pairs: 4K comparisons. On
# an H200, 32,768 choices took 17.5 us with 64, 21.8 with 128 and 21.4 with 32; 16,384 took 13.8, 15.7 and 15.5.
SORT_BLOCK = 64
# The part of the counts [blocks, experts] that one program scans at a time: the larger one where the smaller would take
# more than two rounds, each of which waits for memory. In profiles of layers on H200, 256 blocks took 3.1 us in two
# rounds of 128 and 4.1 in one of 512; 512 blocks took 5.6 in four and 4.5 in one.
SCAN_BLOCKS = (128, 512)
SCAN_EXPERTS = 16
MAX_EXPERTS = 1024
# Rows per program of the SwiGLU, if there are at least FEWEST_SWIGLU rows. Programs whose rows nobody reads take time
# too; they are half of all on a rank that sorts the tokens of two ranks, whose choices are half its own: on an H200
# 71 us with one row per program, 56 with four (54 and 56 if all rows are read).
SWIGLU_ROWS, FEWEST_SWIGLU = 4, 8192
# A program copies the scales of this many rows, and this many scales of each: copied one after another, they took 10 of
# the 15 us of the whole copy at 128 tokens.
SCALE_ROWS, SCALE_TILES = 128, 8


@dataclass(frozen=True)
class RowConfig:
    """How many columns of a row a program takes at a time, and its number of warps."""

    width: int
    num_warps: int


def choose_scan(blocks: int) -> tuple[int, int]:
    """How many blocks a program scans at a time, and its number of warps."""
    few, many = SCAN_BLOCKS
    return (few, 4) if blocks <= 2 * few else (many, 8)


def choose_row(columns: int) -> RowConfig:
    """Config for rows of so many columns: a program takes a narrow row at once, a wide one by 1024 columns."""
    width = 128
    while width < min(columns, 1024):
        width *= 2
    return RowConfig(width, num_warps=4)


def choose_sums(columns: int, partial: bool) -> RowConfig:
    """Config for sums of rows of so many columns; `partial`: of tokens of which other ranks have the other choices.

    Where half of the choices are dropped, more columns a thread keep as many bytes under way: 2,048 tokens on an H200
    took 37.7 us with two warps and 40.4 with four, and with all choices 1,024 tokens 32.9 and 32.5.
    """
    config = choose_row(columns)
    return replace(config, num_warps=2) if partial else config


def choose_copy(columns: int, itemsize: int) -> RowConfig:
    """Config for copies, of as many threads as move the columns with 16 bytes each.

    At most 1024 columns, of which the 7168 of DeepSeek-V3 are a whole number.
    """
    width = choose_row(columns).width
    return RowConfig(width, num_warps=min(4, max(1, width * itemsize // 512)))
