"""Tile choice of the routing kernels: a pure function of the numbers of experts and groups."""

from __future__ import annotations

from dataclasses import dataclass

MAX_EXPERTS = 1024


@dataclass(frozen=True)
class RowConfig:
    """What one program holds: `rows` tokens, their experts as `groups` x `members` columns, both powers of two."""

    rows: int
    groups: int
    members: int
    num_warps: int


def choose_config(n_experts: int, n_groups: int = 1) -> RowConfig:
    """One warp for about 512 columns, or for one token of up to 1024.

    A program of a single warp reduces its rows by shuffles alone; two tokens of 256 experts a warp overlap their
    chains of `top_k` dependent reductions. Groups that pad to more than 1024 columns (1000 experts in 40 groups of 25
    do) share the token between warps.
    """
    groups, members = _power_of_two(n_groups), _power_of_two(n_experts // n_groups)
    columns = groups * members
    return RowConfig(rows=max(1, 512 // columns), groups=groups, members=members, num_warps=max(1, columns // 1024))


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
