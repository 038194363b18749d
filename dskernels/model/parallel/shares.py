"""The messages of an optimiser whose ranks have whole weights, and each update a part of them: gradients are summed on
the rank that updates with them, and the updated weights are sent to all others.

`Collectives` sends by `torch.distributed`; `CopiedShares` by the copy engines of GPUs of one host, which occupy no SM
that the backward running at the same time could use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dskernels.model.parallel.engines import Engine, Moment, PeerMemory
from dskernels.model.parallel.mail import Part, aligned
from dskernels.model.parallel.optimizer import EXPERTS
from dskernels.model.parallel.plan import Team
from dskernels.model.parallel.symmetric_triton import sum_ranks

# Their names in torch from 2.13 on, and before.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def dimension(name: str) -> str:
    """The dimension of the mesh over which a parameter's gradients are summed: the ranks that hold the same rows of it
    and process different text."""
    return "data" if name.endswith(EXPERTS) else "batch"


class Collectives:
    """One collective for each matrix. All ranks must start the same buckets in the same order.

    Args:
        team: the ranks.
        weights: by name, whole; each of R ranks updates one R-th of the rows.
        buckets: the names in each bucket; every name is in exactly one.
    """

    def __init__(self, team: Team, weights: Mapping[str, nn.Parameter], buckets: Sequence[Sequence[str]]) -> None:
        self.team, self.weights, self.buckets = team, weights, buckets
        self.works: list[dist.Work] = []

    def send_gradients(self, bucket: int, totals: Mapping[str, Tensor], mine: Mapping[str, Tensor]) -> None:
        """Start to sum the gradients of a bucket over the ranks.

        Args:
            bucket: which bucket.
            totals: this rank's gradients, by name.
            mine: by name, where the sums of the rows go that this rank updates.
        """
        for name in self.buckets[bucket]:
            group = self.team.group(dimension(name))
            self.works.append(_reduce_scatter(mine[name], totals[name], group=group, async_op=True))

    def gradients(self, totals: Mapping[str, Tensor], mine: Mapping[str, Tensor]) -> None:
        """Wait until all sums have arrived; on a GPU, here and below, the stream waits and not the host."""
        self._wait()

    def send_weights(self, bucket: int, rows: Mapping[str, Tensor]) -> None:
        """Start to send the rows that this rank has updated, by name, to the other ranks."""
        for name in self.buckets[bucket]:
            group, whole = self.team.group(dimension(name)), self.weights[name].detach()
            self.works.append(_all_gather(whole, rows[name], group=group, async_op=True))

    def arrived(self) -> None:
        """Wait until the rows of the other ranks have arrived."""
        self._wait()

    def _wait(self) -> None:
        for work in self.works:
            work.wait()
        self.works.clear()


class CopiedShares:
    """Copies into memory of the other ranks, which holds their weights and has room for gradients of their rows.

    Between the gradients of a step and its update there must be a sum over all ranks, such as that of the norm of the
    gradient: when it is complete, every rank has read what it received, and the weights may be overwritten.

    Args:
        team: the ranks, whose GPUs can access each other's memory; all ranks must create this at the same time.
        weights: see `Collectives`; they are moved into the shared memory.
        buckets: see `Collectives`.
        memory: by default torch's symmetric memory.
    """

    def __init__(
        self,
        team: Team,
        weights: Mapping[str, nn.Parameter],
        buckets: Sequence[Sequence[str]],
        *,
        memory: Any = PeerMemory.shared,
    ) -> None:
        group = team.group("batch")
        self.buckets, self.rank, self.ranks = buckets, group.rank(), group.size()
        every = dist.get_process_group_ranks(group)
        of = {way: dist.get_process_group_ranks(team.group(way)) for way in ("data", "batch")}
        self.sharing = {
            name: [every.index(rank) for rank in of[dimension(name)]] for names in buckets for name in names
        }
        self.weights_at: dict[str, int] = {}
        self.room_at: dict[str, int] = {}
        size = 0
        for name, ranks in self.sharing.items():
            self.weights_at[name] = size
            size += aligned(weights[name].numel() * weights[name].element_size())
            self.room_at[name] = size
            size += (len(ranks) - 1) * self._rows_bytes(weights[name], ranks)
        self.flags_at = size
        self.own, self.addresses, self.keeps = memory(group, size + 8 * len(buckets) * self.ranks)
        with torch.no_grad():
            for name, at in self.weights_at.items():
                parameter = weights[name]
                parameter.data = Part(at, parameter.shape, parameter.dtype).of(self.own).copy_(parameter)
        self.weights = weights
        self.turn = [1, 1]  # the value that flags have in this step, for gradients and for weights
        device = self.own.device
        self.on, self.now = Engine.of(torch.cuda.Stream(device, priority=-1)), Moment(device)

    def send_gradients(self, bucket: int, totals: Mapping[str, Tensor], mine: Mapping[str, Tensor]) -> None:
        """See `Collectives`."""
        self._follow()
        for name in self.buckets[bucket]:
            ranks = self.sharing[name]
            here = ranks.index(self.rank)
            for there, (rank, rows) in enumerate(zip(ranks, totals[name].chunk(len(ranks)), strict=True)):
                if there != here:
                    size = self._rows_bytes(self.weights[name], ranks)
                    at = self.room_at[name] + _among_others(here, there) * size
                    self.on.copy(self.addresses[rank] + at, rows.data_ptr(), rows.numel() * rows.element_size())
        self._tell(bucket, 0)

    def gradients(self, totals: Mapping[str, Tensor], mine: Mapping[str, Tensor]) -> None:
        """See `Collectives`: sum each bucket when it has arrived, in the order of the ranks."""
        for bucket in reversed(range(len(self.buckets))):
            self._until(bucket, 0)
            for name in self.buckets[bucket]:
                ranks, shape = self.sharing[name], mine[name].shape
                here, size = ranks.index(self.rank), self._rows_bytes(self.weights[name], ranks)
                parts = [
                    totals[name].chunk(len(ranks))[here]
                    if there == here
                    else Part(self.room_at[name] + _among_others(there, here) * size, shape, torch.float32).of(self.own)
                    for there in range(len(ranks))
                ]
                sum_ranks(parts, out=mine[name])
        self.turn[0] += 1

    def send_weights(self, bucket: int, rows: Mapping[str, Tensor]) -> None:
        """See `Collectives`."""
        self._follow()
        for name in self.buckets[bucket]:
            data = rows[name]
            at = data.data_ptr() - self.own.data_ptr()
            for rank in self.sharing[name]:
                if rank != self.rank:
                    self.on.copy(self.addresses[rank] + at, data.data_ptr(), data.numel() * data.element_size())
        self._tell(bucket, 1)

    def arrived(self) -> None:
        """See `Collectives`."""
        for bucket in range(len(self.buckets)):
            self._until(bucket, 1)
        self.turn[1] += 1

    def _follow(self) -> None:
        self.now.record(Engine.current(self.own.device))
        self.on.follow(self.now)

    def _tell(self, bucket: int, kind: int) -> None:
        for rank in range(self.ranks):
            if rank != self.rank:
                self.on.write(self._flag(rank, bucket, self.rank, kind), self.turn[kind])

    def _until(self, bucket: int, kind: int) -> None:
        current = Engine.current(self.own.device)
        for rank in range(self.ranks):
            if rank != self.rank:
                current.wait(self._flag(self.rank, bucket, rank, kind), self.turn[kind])

    def _flag(self, at: int, bucket: int, about: int, kind: int) -> int:
        return self.addresses[at] + self.flags_at + 8 * (bucket * self.ranks + about) + 4 * kind

    @staticmethod
    def _rows_bytes(weight: Tensor, ranks: Sequence[int]) -> int:
        """Room for the gradients of one rank's rows, in fp32."""
        return aligned(weight.numel() // len(ranks) * torch.float32.itemsize)


def _among_others(rank: int, reader: int) -> int:
    """The number of a rank among all ranks except the reader."""
    return rank - (rank > reader)
