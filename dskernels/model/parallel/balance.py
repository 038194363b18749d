"""Redundant experts (EPLB): copies of the most requested experts, distributed so that all ranks have the same load.

A placement gives each expert at least one place, the busiest ones more, and distributes the places over the ranks; with
groups, the experts of a group stay on one node, as node-limited routing requires. A new placement keeps experts where
they are if possible, instead of moving nearly all of them at each change. `dskernels.route` takes the places as
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
    """Which expert is at each place; rank r has the ``places / ranks`` places from ``r * places / ranks`` on.

    Attributes:
        experts: the expert at each place.
        ranks: the number of ranks that share the places.
        n_experts: the number of experts.
    """

    experts: tuple[int, ...]
    ranks: int
    n_experts: int

    @property
    def per_rank(self) -> int:
        """The number of places of a rank."""
        return len(self.experts) // self.ranks

    def of_rank(self, rank: int) -> tuple[int, ...]:
        """The experts at a rank's places."""
        return self.experts[rank * self.per_rank : (rank + 1) * self.per_rank]

    def physical(self, device: torch.device | str | None = None) -> Tensor:
        """The places of each expert, int32 ``[E, R]``, filled up with -1, as `dskernels.route` takes them."""
        places: list[list[int]] = [[] for _ in range(self.n_experts)]
        for place, expert in enumerate(self.experts):
            places[expert].append(place)
        widest = max(map(len, places))
        return torch.tensor([row + [-1] * (widest - len(row)) for row in places], dtype=torch.int32, device=device)

    def loads(self, load: Sequence[float]) -> list[float]:
        """The load of each rank, if the copies of an expert share its load evenly."""
        copies = [0] * self.n_experts
        for expert in self.experts:
            copies[expert] += 1
        return [sum(load[expert] / copies[expert] for expert in self.of_rank(rank)) for rank in range(self.ranks)]

    def imbalance(self, load: Sequence[float]) -> float:
        """The load of the busiest rank divided by the mean; 1 means that all are equal."""
        loads = self.loads(load)
        mean = sum(loads) / len(loads)
        return max(loads) / mean if mean else 1.0

    def moves(self, before: Placement) -> int:
        """How many places need weights from another rank if ``before`` is the placement until now."""
        return sum(
            expert not in before.of_rank(rank) for rank in range(self.ranks) for expert in set(self.of_rank(rank))
        )


def even(n_experts: int, ranks: int) -> Placement:
    """Each expert at one place, in order: the placement before any load has been measured."""
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
    """Place experts by their load.

    Copies are assigned one by one, each to the expert with the most load per copy. Then the copies are placed, the
    heaviest first, each on the rank with the least load that has room and no copy of the same expert yet. If ``nodes``
    divides ``groups``, whole groups are first distributed over the nodes in the same way, and the rest happens within
    each node; otherwise all ranks are treated as one node.

    With ``before``, copies stay on the ranks that have them, as long as no rank has a load more than a factor of
    ``1 + slack`` above the busiest rank of an entirely new placement.

    Args:
        load: how often each expert was chosen, measured; see `Routing.load`.
        ranks: the number of ranks that share the places.
        places: the number of places on all ranks, at least the number of experts, and a multiple of the ranks.
        nodes: the number of nodes that share the ranks.
        groups: the number of groups of the router, each of consecutive experts.
        before: the placement until now.
        slack: see above.

    Raises:
        ValueError: the numbers do not divide each other as they have to, there are fewer places than experts, or
            ``before`` is a placement of other experts, places or ranks.
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
    """The number of copies of each expert that makes the largest load per copy as small as possible; at most ``most``
    of one expert, one for each rank, unless there are more places than that."""
    copies = dict.fromkeys(experts, 1)
    heap = [(-load[expert], expert) for expert in experts]
    heapq.heapify(heap)
    spare = places - len(experts)
    while spare:
        if not heap:  # every expert is on every rank, and places are left: they get second copies on one rank
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
    """The experts of each rank: where they were as far as the bound allows, or else placed anew."""
    fresh = _greedy(load, copies, [[] for _ in range(ranks)], room)
    if before is None:
        return [sorted(rank) for rank in fresh]
    bound = max(_total(load, copies, rank) for rank in fresh) * (1 + slack)
    kept: list[list[int]] = [[] for _ in range(ranks)]
    busy = [sum(load[expert] / copies.get(expert, 1) for expert in rank) for rank in before]
    for expert, n in copies.items():
        # If an expert has fewer copies than before, those on the busiest ranks are dropped.
        there = sorted((r for r in range(ranks) if expert in before[r]), key=busy.__getitem__)
        for rank in there[:n]:
            kept[rank].append(expert)
    moved = _swapped(load, copies, _greedy(load, copies, kept, room), bound)
    return _in_place(fresh if moved is None else moved, before)


def _swapped(
    load: Sequence[float], copies: dict[int, int], packed: list[list[int]], bound: float
) -> list[list[int]] | None:
    """Swap an expert of the busiest rank for one of another rank, always the swap that helps most, until no rank is
    above the bound; None if no swap helps any more."""
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
    """Put the copies that are left, the heaviest first, on the rank with the least load that has room, if possible one
    without a copy of the same expert."""
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
    """The experts of each rank in an order in which those that stay on it keep their places."""
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
    """The experts of each node: whole groups, the same number on each."""
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
    """The same sets of experts, each assigned to the node that has most of them already."""
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
    """The expert weights of this rank for another placement; a rank that has an expert sends it to those that need it.

    Every rank of the group must call this with the same two placements.

    Args:
        weights: ``[places / ranks, ...]``, this rank's, in the order of ``before``.
        before: the placement until now.
        after: the next placement.
        group: the ranks.

    Returns:
        ``[places / ranks, ...]`` in the order of ``after``. ``weights`` is not changed, so steps that are still running
        can finish with it.
    """
    rank = group.rank()
    result = weights.new_empty(after.per_rank, *weights.shape[1:])
    mine = before.of_rank(rank)
    operations = []
    sent = [0] * before.ranks  # of the ranks that have an expert, the one that has sent least so far sends it
    for target in range(after.ranks):
        there = before.of_rank(target)
        arrived: dict[int, int] = {}
        for place, expert in enumerate(after.of_rank(target)):
            if expert in there:
                if target == rank:
                    result[place].copy_(weights[mine.index(expert)])
                continue
            if expert in arrived:  # a second copy on the same rank is made there, after the messages
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
