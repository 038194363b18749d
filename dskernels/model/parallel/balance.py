"""Redundant experts (EPLB): copies of those that are asked for most, so placed that every rank has the same to do.

A plan gives each expert at least one place, the busiest more, and packs places onto ranks; with groups, those of a
group stay on one node, as node-limited routing wants it. A new plan keeps what an old one has where it may: moving
nearly every expert at each change is what other planners are blamed for. `dskernels.route` takes the places as
``physical``.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """Which expert stands at each place; rank r has the places from ``r * places / ranks`` on.

    Attributes:
        experts: of each place, the expert.
        ranks: how many ranks share the places.
        n_experts: how many experts there are.
    """

    experts: tuple[int, ...]
    ranks: int
    n_experts: int

    @property
    def per_rank(self) -> int:
        """Places of a rank."""
        return len(self.experts) // self.ranks

    def of_rank(self, rank: int) -> tuple[int, ...]:
        """The experts at a rank's places."""
        return self.experts[rank * self.per_rank : (rank + 1) * self.per_rank]

    def physical(self, device: torch.device | str | None = None) -> Tensor:
        """int32 ``[E, R]`` as `dskernels.route` takes it: the places of each expert, -1 behind them."""
        places: list[list[int]] = [[] for _ in range(self.n_experts)]
        for place, expert in enumerate(self.experts):
            places[expert].append(place)
        widest = max(map(len, places))
        return torch.tensor([row + [-1] * (widest - len(row)) for row in places], dtype=torch.int32, device=device)

    def loads(self, load: Sequence[float]) -> list[float]:
        """What each rank has to do, where the copies of an expert share its load evenly."""
        copies = [0] * self.n_experts
        for expert in self.experts:
            copies[expert] += 1
        return [sum(load[expert] / copies[expert] for expert in self.of_rank(rank)) for rank in range(self.ranks)]

    def imbalance(self, load: Sequence[float]) -> float:
        """The busiest rank over the mean: 1 is even."""
        loads = self.loads(load)
        mean = sum(loads) / len(loads)
        return max(loads) / mean if mean else 1.0

    def moves(self, before: Placement) -> int:
        """Places whose weights have to come from another rank, after ``before``."""
        return sum(
            expert not in before.of_rank(rank) for rank in range(self.ranks) for expert in set(self.of_rank(rank))
        )


def even(n_experts: int, ranks: int) -> Placement:
    """Each expert at one place, in order: what there is before anything was measured."""
    return Placement(tuple(range(n_experts)), ranks, n_experts)


def place_experts(
    load: Sequence[float],
    *,
    ranks: int,
    places: int,
    nodes: int = 1,
    groups: int = 1,
    before: Placement | None = None,
    slack: float = 0.05,
) -> Placement:
    """Places experts by their load.

    Copies are given one by one to the expert with most load a copy; then the heaviest copies go first, each to the
    rank with least to do that has room and no copy of it yet. With ``groups`` that nodes divide, groups are packed onto
    nodes first in the same way and all of this happens within a node; else over all ranks at once.

    With ``before``, copies stay on ranks that have them, as long as no rank gets more than ``slack`` above what placing
    anew would give its busiest.

    Args:
        load: choices that fell on each expert, measured; see `Routing.load`.
        ranks: ranks that share the places.
        places: in all, at least as many as experts, a multiple of the ranks.
        nodes: nodes that share the ranks.
        groups: groups of the routing, each of consecutive experts.
        before: the placement until now.
        slack: see above.

    Raises:
        ValueError: numbers that do not divide each other, or fewer places than experts.
    """
    n = len(load)
    if places < n or places % ranks or ranks % nodes or n % groups:
        raise ValueError(
            f"places, ranks, nodes, groups: expected places {places} >= {n} experts and ranks {ranks} to divide them, "
            f"nodes {nodes} to divide the ranks, groups {groups} to divide the experts"
        )
    if before is not None and (before.ranks != ranks or len(before.experts) != places or before.n_experts != n):
        raise ValueError("before: expected a placement of the same experts at as many places of as many ranks")
    if groups % nodes:
        nodes = 1
    if before is not None:
        anew = place_experts(load, ranks=ranks, places=places, nodes=nodes, groups=groups)
        if before.imbalance(load) <= anew.imbalance(load) * (1 + slack):
            return before
    members = _pack_groups(load, groups, nodes, before) if nodes > 1 else [list(range(n))]
    each, of_node = ranks // nodes, places // nodes
    result: list[list[int]] = []
    for node, experts in enumerate(members):
        copies = _copies(load, experts, of_node, most=each)
        old = None if before is None else [before.of_rank(node * each + i) for i in range(each)]
        result += _pack(load, copies, each, of_node // each, old, slack)
    return Placement(tuple(expert for rank in result for expert in rank), ranks, n)


def _copies(load: Sequence[float], experts: Sequence[int], places: int, most: int) -> dict[int, int]:
    """How many copies of each expert, so that the largest load a copy is as small as may be; at most one a rank."""
    copies = dict.fromkeys(experts, 1)
    heap = [(-load[expert], expert) for expert in experts]
    heapq.heapify(heap)
    spare = places - len(experts)
    while spare:
        if not heap:  # more places than ranks have use for: second copies on one rank
            most += 1
            heap = [(-load[expert] / copies[expert], expert) for expert in experts]
            heapq.heapify(heap)
        _, expert = heapq.heappop(heap)
        if copies[expert] >= most:
            continue
        copies[expert] += 1
        spare -= 1
        heapq.heappush(heap, (-load[expert] / copies[expert], expert))
    return copies


def _pack(
    load: Sequence[float],
    copies: dict[int, int],
    ranks: int,
    room: int,
    before: Sequence[Sequence[int]] | None,
    slack: float,
) -> list[list[int]]:
    """The experts of each rank: anew, or, if that serves, as far as may be where they were."""
    fresh = _greedy(load, copies, [[] for _ in range(ranks)], room)
    if before is None:
        return [sorted(rank) for rank in fresh]
    bound = max(_total(load, copies, rank) for rank in fresh) * (1 + slack)
    kept: list[list[int]] = [[] for _ in range(ranks)]
    busy = [sum(load[expert] / copies.get(expert, 1) for expert in rank) for rank in before]
    for expert, n in copies.items():
        # Of copies that are one too many, those on the busiest ranks go.
        there = sorted((r for r in range(ranks) if expert in before[r]), key=busy.__getitem__)
        for rank in there[:n]:
            kept[rank].append(expert)
    moved = _swapped(load, copies, _greedy(load, copies, kept, room), bound)
    return _in_place(fresh if moved is None else moved, before)


def _swapped(
    load: Sequence[float], copies: dict[int, int], packed: list[list[int]], bound: float
) -> list[list[int]] | None:
    """Swaps an expert of the busiest rank for one of another, the swap that helps most first, until none is above the
    bound; None if that gets stuck."""
    each = {expert: load[expert] / n for expert, n in copies.items()}
    sums = [_total(load, copies, rank) for rank in packed]
    while max(sums) > bound:
        busiest = max(range(len(sums)), key=lambda r: sums[r])
        best: tuple[float, int, int, int] | None = None
        for rank, there in enumerate(packed):
            for out in packed[busiest]:
                for back in there:
                    gain = each[out] - each[back]
                    if rank == busiest or gain <= 0 or out in there or back in packed[busiest]:
                        continue
                    worse = max(sums[busiest] - gain, sums[rank] + gain)
                    if worse < sums[busiest] and (best is None or worse < best[0]):
                        best = worse, rank, out, back
        if best is None:
            return None
        _, rank, out, back = best
        for place, leaves, comes, change in ((busiest, out, back, -1), (rank, back, out, 1)):
            packed[place][packed[place].index(leaves)] = comes
            sums[place] += change * (each[out] - each[back])
    return packed


def _greedy(load: Sequence[float], copies: dict[int, int], kept: Sequence[Sequence[int]], room: int) -> list[list[int]]:
    """Puts what is left, heaviest first, on the rank with least to do that has room, and no copy of it if possible."""
    packed = [list(rank) for rank in kept]
    sums = [_total(load, copies, rank) for rank in packed]
    left = dict(copies)
    for expert in (expert for rank in packed for expert in rank):
        left[expert] -= 1
    for expert in sorted(left, key=lambda e: (-load[e] / copies[e], e)):
        for _ in range(left[expert]):
            free = [r for r in range(len(packed)) if len(packed[r]) < room]
            apart = [r for r in free if expert not in packed[r]]
            least = min(apart or free, key=lambda r: (sums[r], r))
            packed[least].append(expert)
            sums[least] += load[expert] / copies[expert]
    return packed


def _in_place(ranks: Sequence[Sequence[int]], before: Sequence[Sequence[int]]) -> list[list[int]]:
    """The experts of each rank in an order in which those that stay keep their places."""
    result = []
    for experts, old in zip(ranks, before, strict=True):
        left, row = list(experts), []
        for expert in old:
            stays = expert in left
            row.append(expert if stays else -1)
            if stays:
                left.remove(expert)
        left.sort()
        result.append([left.pop(0) if expert < 0 else expert for expert in row])
    return result


def _pack_groups(load: Sequence[float], groups: int, nodes: int, before: Placement | None) -> list[list[int]]:
    """The experts of each node: whole groups, as many on each."""
    size = len(load) // groups
    weights = [sum(load[g * size : (g + 1) * size]) for g in range(groups)]
    of_node: list[list[int]] = [[] for _ in range(nodes)]
    sums = [0.0] * nodes
    for g in sorted(range(groups), key=lambda g: (-weights[g], g)):
        free = [node for node in range(nodes) if len(of_node[node]) < groups // nodes]
        node = min(free, key=lambda node: (sums[node], not _was_on(before, g * size, node, nodes), node))
        of_node[node].append(g)
        sums[node] += weights[g]
    packed = [[expert for g in sorted(found) for expert in range(g * size, (g + 1) * size)] for found in of_node]
    return packed if before is None else _name_nodes(packed, before, nodes)


def _name_nodes(packed: list[list[int]], before: Placement, nodes: int) -> list[list[int]]:
    """The same sets of experts, each given to the node that has most of it already."""
    each = before.ranks // nodes
    there = [{e for r in range(node * each, (node + 1) * each) for e in before.of_rank(r)} for node in range(nodes)]
    named: list[list[int]] = [[] for _ in range(nodes)]
    pairs = [(-len(there[node].intersection(part)), i, node) for i, part in enumerate(packed) for node in range(nodes)]
    placed: set[int] = set()
    for _, i, node in sorted(pairs):
        if i not in placed and not named[node]:
            named[node] = packed[i]
            placed.add(i)
    return named


def _was_on(before: Placement | None, expert: int, node: int, nodes: int) -> bool:
    if before is None:
        return False
    each = before.ranks // nodes
    return any(expert in before.of_rank(r) for r in range(node * each, (node + 1) * each))


def _total(load: Sequence[float], copies: dict[int, int], experts: Sequence[int]) -> float:
    return sum(load[expert] / copies[expert] for expert in experts)


# ---- moving weights -------------------------------------------------------------------------------------------------


@torch.no_grad()
def move_experts(weights: Tensor, before: Placement, after: Placement, group: dist.ProcessGroup) -> Tensor:
    """A rank's stack of expert weights for another placement: what is not here is sent by a rank that has it.

    Args:
        weights: ``[places / ranks, ...]``, in the order of ``before``.
        before: the placement until now.
        after: the next one. Every rank of the group calls this with the same two.
        group: the ranks.

    Returns:
        ``[places / ranks, ...]`` in the order of ``after``. The stack that was given is left as it is, so that steps
        that are under way may finish with it.
    """
    rank = group.rank()
    result = weights.new_empty(after.per_rank, *weights.shape[1:])
    mine = before.of_rank(rank)
    operations = []
    sent = [0] * before.ranks  # copies of one expert take turns in sending it
    for target in range(after.ranks):
        there = before.of_rank(target)
        arrived: dict[int, int] = {}
        for place, expert in enumerate(after.of_rank(target)):
            if expert in there:
                if target == rank:
                    result[place].copy_(weights[mine.index(expert)])
                continue
            if expert in arrived:  # a second copy on the same rank is copied there, after the messages
                continue
            arrived[expert] = place
            source = min((r for r in range(before.ranks) if expert in before.of_rank(r)), key=lambda r: (sent[r], r))
            sent[source] += 1
            if target == rank:
                operations.append(dist.P2POp(dist.irecv, result[place], group=group, group_peer=source))
            elif source == rank:
                row = weights[mine.index(expert)].contiguous()
                operations.append(dist.P2POp(dist.isend, row, group=group, group_peer=target))
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    here = after.of_rank(rank)
    for place, expert in enumerate(here):
        if here.index(expert) != place and expert not in mine:
            result[place].copy_(result[here.index(expert)])
    return result
