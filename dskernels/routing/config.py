"""Tiles of the routing kernels: pure functions of the sizes and the device."""

from __future__ import annotations

from dataclasses import dataclass

from dskernels.validate import ceil_div

MAX_EXPERTS = 1024
MAX_HOPPER_CHOICES = 32  # a lane for each


@dataclass(frozen=True)
class RowConfig:
    """What one program holds: `rows` tokens, with their experts as `groups` x `members` columns, both powers of two."""

    rows: int
    groups: int
    members: int
    num_warps: int


def choose_config(n_experts: int, n_groups: int = 1) -> RowConfig:
    """One warp for about 512 columns, or for one token of up to 1024.

    A program of one warp reduces its rows by shuffles alone; two tokens of 256 experts in a warp overlap their chains
    of `top_k` dependent reductions. If groups pad to more than 1024 columns (as 1000 experts in 40 groups of 25),
    several warps share the token.
    """
    groups, members = _power_of_two(n_groups), _power_of_two(n_experts // n_groups)
    columns = groups * members
    return RowConfig(rows=max(1, 512 // columns), groups=groups, members=members, num_warps=max(1, columns // 1024))


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


# Warps per block, by the maximum number of experts per lane: with one more, an SM's registers do not suffice.
MOST_WARPS = {8: 32, 12: 24, 32: 16, MAX_EXPERTS: 8}


@dataclass(frozen=True)
class HopperConfig:
    """What the Hopper kernel is compiled for, and its grid.

    Blocks have up to `most_warps` warps, and an SM is to hold `resident` of them. A launch has `blocks` blocks of
    `warps` warps. A block takes `rows` tokens, which its warps take in turns.
    """

    most_warps: int
    resident: int
    warps: int
    rows: int
    blocks: int


def choose_hopper_config(n_tokens: int, experts_a_lane: int, multiprocessors: int) -> HopperConfig:
    """As many warps as the registers of a token's experts allow, in one block per SM; few tokens are one block.

    For 8,192 and 32,768 tokens of 256 experts, one block of 32 warps took 6.4 and 16.5 us, 2 of 16 took 7.1 and 17.2:
    each block adds its counts to the same 1 KB. If there is room for a warp without tokens, the last one zeroes and
    waits (see hopper.cu) while the others work: 128 tokens took 2.4 us instead of 2.9.
    """
    most_warps, resident = next(n for most, n in MOST_WARPS.items() if experts_a_lane <= most), 1
    if n_tokens <= 8:
        return HopperConfig(most_warps, resident, warps=8, rows=8, blocks=1)
    rows = max(4, ceil_div(n_tokens, resident * multiprocessors))
    return HopperConfig(most_warps, resident, min(most_warps, rows + 1), rows, ceil_div(n_tokens, rows))


def experts_a_lane(n_experts: int, n_groups: int) -> int:
    """How many of a token's experts a lane holds: from part of a group, or from several groups (see hopper.cu)."""
    if n_groups > 32:
        return ceil_div(n_groups, 32) * (n_experts // n_groups)
    return ceil_div(n_experts // n_groups, 32 // _power_of_two(n_groups))


@dataclass(frozen=True)
class GateConfig:
    """The tile of the product of hidden states and gate weights, whose K is divided among `parts` programs."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    parts: int


LONG_SUM = 2048  # tokens from which on the gradient of the gate's weight has a tile of its own


def choose_gate_config(
    m: int, n: int, k: int, wide: bool, multiprocessors: int, arch: tuple[int, int], *, of_weight: bool = False
) -> GateConfig:
    """The tile for ``[m, k] @ [n, k].T``: K is divided until there is a program for each multiprocessor.

    `wide`: an operand is fp32, which is multiplied in three bf16 pieces and takes more registers. The gradient of the
    weight (`of_weight`) has all tokens as its K, and needs many programs, each of which waits for its loads.

    `arch` is the compute capability, (0, 0) for a GPU that is not NVIDIA's. On gfx942, 8 warps on a tile of 16x64
    spilled 176 bytes a lane, and 4 stages of 128x64x64 take 72 of a block's 64 KB of shared memory.
    """
    nvidia = arch > (0, 0)
    if wide and of_weight and k >= LONG_SUM:
        tile, multiprocessors = (64, 64, 32, 8, 4), 4 * multiprocessors
    elif wide:
        tile = (16, 64, 64, 8 if nvidia else 4, 3) if m <= 64 else (128, 64, 32, 8, 3)
    elif m <= 16:
        tile = (16, 32, 128, 4, 4)
    else:
        tile = (64, 64, 64, 4, 4) if m <= 512 or n <= 64 else (128, 64, 64, 8, 4 if nvidia else 3)
    block_m, block_n, block_k, num_warps, num_stages = tile
    tiles = ceil_div(m, block_m) * ceil_div(n, block_n)
    parts = max(1, min(MAX_PARTS, multiprocessors // tiles, ceil_div(k, 2 * block_k)))
    return GateConfig(block_m, block_n, block_k, num_warps, num_stages, parts)


MAX_PARTS = 32
