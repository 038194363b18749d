"""Choices of the portable kernels of the expert block for a few tokens: pure functions of the shape."""

from __future__ import annotations

from dataclasses import dataclass

MOST_TOKENS = 8
MOST_CHOICES = 64  # of one token, including the shared experts


@dataclass(frozen=True)
class MatvecConfig:
    """The tile of a weight that a program multiplies at a time.

    Attributes:
        rows: rows of the weight.
        columns: columns of each row, a power of two.
        num_warps: warps of the program.
    """

    rows: int
    columns: int
    num_warps: int


def choose_matvec(columns: int, interpreted: bool = False) -> MatvecConfig:
    """Config for a weight with rows of so many columns: four whole rows if they are short, else 512 columns of eight.

    These are estimates, not measurements. Short rows belong to small experts, for which there is room for more
    programs; eight rows of 512 are 8 KB in flight per program, and several programs share a multiprocessor. In Triton's
    interpreter the time grows with the number of programs, so tiles are larger there.
    """
    if interpreted:
        return MatvecConfig(32, max(min(power_of_two(columns), 512), 16), 4)
    if columns <= 256:
        return MatvecConfig(4, max(power_of_two(columns), 16), 4)
    return MatvecConfig(8, 512, 4)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()
