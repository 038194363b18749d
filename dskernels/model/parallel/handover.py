"""Messages between the stages of a pipeline, by the copy engines of GPUs that reach each other's memory.

With NCCL, a receive is posted long before the data exists, and its kernel holds SMs until then: on 2 H200, a stage's
forward took 11 to 13 ms beside such a kernel and 8 ms without it, which was most of what DualPipeV waited. A stream
that waits for a number in memory holds no SM.

Each rank has a slot for every message of a step, so no message waits until another has been read, and a stage's input
can stay in its slot for the backward. Every slot has a flag, to which the number of the step is written when the
message has arrived. A step may only begin when all ranks have ended the previous one on their streams; the sum of the
losses over the ranks, at the end of every step, ensures that.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage

from dskernels.model.parallel.engines import Engine, Moment, PeerMemory
from dskernels.model.parallel.mail import Part, aligned


class Way(NamedTuple):
    """One of the things that a stage receives from a neighbouring stage on another rank.

    Attributes:
        kind: the stage's input, or the gradient of its output.
        stage: the number of the stage that receives it.
    """

    kind: Literal["input", "gradient"]
    stage: int


class Handover:
    """Messages of one shape between the stages of a pipeline in V shape.

    Args:
        group: the ranks of the pipeline. All of them make this object at the same time.
        microbatches: number of micro-batches of a step.
        shape: shape of a message.
        dtype: dtype of a message.
        memory: memory for all slots and their flags; by default torch's symmetric memory.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        microbatches: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        memory: PeerMemory | None = None,
    ) -> None:
        self.rank, self.ranks, self.microbatches = group.rank(), group.size(), microbatches
        self.incoming = ways(self.rank, self.ranks)
        self.shape, self.dtype = torch.Size(shape), dtype
        self.size = aligned(math.prod(shape) * dtype.itemsize)
        slots = microbatches * max(len(ways(rank, self.ranks)) for rank in range(self.ranks))
        self.flags_at = slots * self.size
        memory = memory or PeerMemory.shared(group, slots * (self.size + 4))
        self.memory, self.addresses, self.keeps = memory
        self.step = 0
        self.stream = torch.cuda.Stream(self.memory.device, priority=-1)
        self.on, self.now = Engine.of(self.stream), Moment(self.memory.device)

    def begin(self) -> None:
        """Begins a step; called on all ranks, when the previous step has ended on all of them."""
        self.step += 1

    def send(self, way: Way, microbatch: int, x: Tensor) -> None:
        """Sends a tensor to a stage of another rank, as soon as the current stream has computed it."""
        rank = rank_of(way.stage, self.ranks)
        slot, x = self._slot(rank, way, microbatch), x.contiguous()
        self.now.record(Engine.current(self.memory.device))
        self.on.follow(self.now)
        self.on.copy(self.addresses[rank] + slot * self.size, x.data_ptr(), x.numel() * x.element_size())
        self.on.write(self.addresses[rank] + self.flags_at + 4 * slot, self.step)
        x.record_stream(self.stream)

    def receive(self, way: Way, microbatch: int) -> Tensor:
        """Makes the current stream wait for a message to a stage of this rank; returns it. It stays until the step
        ends."""
        slot = self._slot(self.rank, way, microbatch)
        Engine.current(self.memory.device).wait(self.addresses[self.rank] + self.flags_at + 4 * slot, self.step)
        return Part(slot * self.size, self.shape, self.dtype).of(self.memory)

    def _slot(self, rank: int, way: Way, microbatch: int) -> int:
        return ways(rank, self.ranks).index(way) * self.microbatches + microbatch


class HandedStage(PipelineStage):
    """A stage of torch's pipeline engine whose messages go by a `Handover`, not by sends and receives of a group."""

    handover: Handover

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Sends the output, and leaves nothing for the engine to post."""
        self._send("input", self.stage_index + 1, fwd_chunk_id, super().get_fwd_send_ops(fwd_chunk_id))
        return []

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Sends the gradient of the input, likewise."""
        self._send("gradient", self.stage_index - 1, bwd_chunk_id, super().get_bwd_send_ops(bwd_chunk_id))
        return []

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Nothing to post: the input is waited for where it is read."""
        return []

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Nothing to post, likewise."""
        return []

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return []

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> Any:
        way = Way("input", self.stage_index)
        if way in self.handover.incoming:
            (info,) = self.args_recv_info[fwd_chunk_id]
            info.buffer = self.handover.receive(way, fwd_chunk_id).requires_grad_(self.has_backward)
        return super()._retrieve_recv_activations(fwd_chunk_id)

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> Any:
        way = Way("gradient", self.stage_index)
        if way in self.handover.incoming:
            (info,) = self.grad_recv_info[bwd_chunk_id]
            info.buffer = self.handover.receive(way, bwd_chunk_id)
        return super()._retrieve_recv_grads(bwd_chunk_id)

    def _send(self, kind: Literal["input", "gradient"], stage: int, chunk: int, posted: list[dist.P2POp]) -> None:
        for operation in posted:
            self.handover.send(Way(kind, stage), chunk, operation.tensor)


def ways(rank: int, ranks: int) -> list[Way]:
    """Everything that the stages of a rank receive from other ranks, in an order that all ranks agree on."""
    found = []
    for stage in (rank, 2 * ranks - 1 - rank):
        if stage > 0 and rank_of(stage - 1, ranks) != rank:
            found.append(Way("input", stage))
        if stage < 2 * ranks - 1 and rank_of(stage + 1, ranks) != rank:
            found.append(Way("gradient", stage))
    return found


def rank_of(place: int, ranks: int) -> int:
    """The rank that has the stage of number `place`: in V shape, rank r has stages r and ``2 * ranks - 1 - r``."""
    return min(place, 2 * ranks - 1 - place)
