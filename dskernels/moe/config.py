"""Block sizes of the permuting kernels: pure functions of the shape."""

from __future__ import annotations

# Ids that one program of the counting sort ranks among each other, by comparing all pairs: 16K comparisons.
SORT_BLOCK = 128
# What one program scans of the counts [blocks, experts] at a time.
SCAN_BLOCKS = 128
SCAN_EXPERTS = 16
MAX_EXPERTS = 1024


def choose_width(columns: int) -> int:
    """Columns of a row that a program takes at a time: all of a narrow row, 8 elements a thread of a wide one."""
    width = 128
    while width < min(columns, 1024):
        width *= 2
    return width
