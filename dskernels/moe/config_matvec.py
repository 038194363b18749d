"""Choices of the portable kernels of the expert block for a few tokens: pure functions of the shape."""

from __future__ import annotations

from dataclasses import dataclass

MOST_TOKENS = 8
MOST_CHOICES = 64  # of a token, the shared experts among them


@dataclass(frozen=True)
class MatvecConfig:
    """What a program multiplies at a time.

    Attributes:
        rows: of the weight.
        columns: of each, a power of two.
        num_warps: of the program.
    """

    rows: int
    columns: int
    num_warps: int


def choose_matvec(columns: int, interpreted: bool = False) -> MatvecConfig:
    """For a weight with rows of so many columns: four whole rows where they are short, else 512 columns of eight.

    Estimates: short rows are of small experts, for which there is room for more programs; eight rows of 512 are 8 KB in
    flight for each program, of which several share a multiprocessor. Triton's interpreter takes its time by programs.
    """
    if interpreted:
        return MatvecConfig(32, max(min(power_of_two(columns), 512), 16), 4)
    if columns <= 256:
        return MatvecConfig(4, max(power_of_two(columns), 16), 4)
    return MatvecConfig(8, 512, 4)


def power_of_two(n: int) -> int:
    """The smallest one that is not below n."""
    return 1 << max(n - 1, 0).bit_length()
