"""Messages between the GPUs of one host by their copy engines: straight into the other's memory, and no SM is taken.

NCCL's kernels hold SMs, and a product that fills all of them waits for the last one: on 2 H200 expert-parallel layers
in bf16 took 8.9 ms each with NCCL's messages under products, and 8.6 ms with all of it one by one. Here a message is a
copy over NVLink on a stream of its own, behind it a number that the driver writes there (a stream memory operation),
and a stream that waits until it reads that number. No kernel takes part, and none polls.

The numbers count messages and come from the host: this cannot be captured in a CUDA graph, and says so.
"""

from __future__ import annotations

import ctypes
import functools
import socket
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dskernels.cuda.driver import check
from dskernels.model.parallel.mail import Mail, Part, layout

SLOTS = 4  # messages that may be under way, or read, at once: two micro-batches have one each in both directions
# Bytes: what has come of a large message is read while the rest travels, in pieces of about so much. A dispatch of
# 59 MB took 232 us in 4 of them, 280 us in 7 of half the size on two streams in turns (of 235 MB 734 and 789 us).
PIECE = 2**24
MOST_PIECES = 8
_AT_LEAST = 0  # CU_STREAM_WAIT_VALUE_GEQ
_INVALID_CONTEXT = 201


class Copied(NamedTuple):
    """A message that has been sent.

    Attributes:
        number: of it, from 0.
        parts: where they lie in its slot.
        pieces: into how many the first part is cut.
        own: what this rank would have sent to itself.
    """

    number: int
    parts: list[Part]
    pieces: int
    own: list[Tensor]

    def piece(self, i: int) -> slice:
        """Its rows."""
        rows = self.own[0].shape[0]
        return slice(rows * i // self.pieces, rows * (i + 1) // self.pieces)


class CopyEngines(Mail):
    """`Mail` for GPUs that reach each other's memory.

    Args:
        group: the ranks. All make this at once.
        size: the most bytes of a message from one rank to another, see `mail.message_bytes`.
        piece: bytes of its first part after which the other rank is told.
    """

    def __init__(self, group: dist.ProcessGroup, size: int, *, piece: int = PIECE) -> None:
        super().__init__(group)
        from torch.distributed import _symmetric_memory as symmetric

        self.size, self.piece = size, piece
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.flags_at = SLOTS * self.ranks * size
        # For each slot and rank: how far it has sent, and how far it has read what is sent to it.
        memory = symmetric.empty(self.flags_at + SLOTS * self.ranks * 8, dtype=torch.uint8, device=self.device)
        handle = symmetric.rendezvous(memory, group)
        self.memory, self.handle = memory, handle
        self.addresses = list(handle.buffer_ptrs)
        memory[self.flags_at :].zero_()
        self.count = 0
        self.stream = torch.cuda.Stream(priority=-1)
        torch.cuda.synchronize()
        dist.barrier(group=group)

    def send(self, outgoing: Sequence[Sequence[Tensor]]) -> Copied:
        """See `Mail`."""
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("messages by copy engines are counted by the host: they cannot be in a CUDA graph")
        own = list(outgoing[self.rank])
        parts, size = layout(own)
        if size > self.size:
            raise ValueError(f"outgoing: expected at most {self.size} bytes for a rank, got {size}")
        rows, row_bytes = own[0].shape[0], own[0].stride(0) * own[0].element_size()
        sent = Copied(self.count, parts, max(1, min(MOST_PIECES, round(rows * row_bytes / self.piece), rows)), own)
        self.count += 1
        slot, turn = sent.number % SLOTS, sent.number // SLOTS
        self.stream.wait_stream(torch.cuda.current_stream())
        on = _Stream(self.stream)
        for rank in self._others():
            there = self._slot(rank, slot, self.rank)
            if turn:  # what was there has been read
                on.wait(self._flag(self.rank, slot, rank, read=True), turn)
            first, *others = outgoing[rank]
            for part, tensor in zip(parts[1:], others, strict=True):
                on.copy(there + part.begin, tensor.data_ptr(), tensor.numel() * tensor.element_size())
            source, arrived = first.data_ptr(), self._flag(rank, slot, self.rank, read=False)
            for i in range(sent.pieces):
                piece = sent.piece(i)
                begin, end = piece.start * row_bytes, piece.stop * row_bytes
                on.copy(there + begin, source + begin, end - begin)
                on.write(arrived, self._reached(turn, i))
            for tensor in outgoing[rank]:
                tensor.record_stream(self.stream)
        return sent

    def arriving(self, sent: Copied) -> Iterator[slice]:
        """See `Mail`."""
        slot, turn = sent.number % SLOTS, sent.number // SLOTS
        for i in range(sent.pieces):
            on = _Stream(torch.cuda.current_stream())
            for rank in self._others():
                on.wait(self._flag(self.rank, slot, rank, read=False), self._reached(turn, i))
            yield sent.piece(i)

    def from_rank(self, sent: Copied, rank: int) -> list[Tensor]:
        """See `Mail`."""
        if rank == self.rank:
            return sent.own
        begin = (sent.number % SLOTS * self.ranks + rank) * self.size
        return [part.of(self.memory[begin : begin + self.size]) for part in sent.parts]

    def finished(self, sent: Copied) -> None:
        """See `Mail`."""
        on = _Stream(torch.cuda.current_stream())
        for rank in self._others():
            on.write(self._flag(rank, sent.number % SLOTS, self.rank, read=True), sent.number // SLOTS + 1)

    def _others(self) -> list[int]:
        """All ranks but this, so that no two send to one at a time if all go on as fast."""
        return [(self.rank + i) % self.ranks for i in range(1, self.ranks)]

    def _slot(self, at: int, slot: int, source: int) -> int:
        """Where rank `at` has the bytes of rank `source`."""
        return self.addresses[at] + (slot * self.ranks + source) * self.size

    def _flag(self, at: int, slot: int, about: int, *, read: bool) -> int:
        """Where a number is on rank `at`: how far rank `about` has sent, or has read what rank `at` sends."""
        return self.addresses[at] + self.flags_at + 8 * (slot * self.ranks + about) + 4 * read

    @staticmethod
    def _reached(turn: int, piece: int) -> int:
        """The number of a piece, larger than all before it in this slot."""
        return turn * MOST_PIECES + piece + 1


class _Stream:
    """What the driver does on a stream, without a kernel; each call takes it a microsecond or two."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.device, self.handle = stream.device, ctypes.c_void_p(stream.cuda_stream)

    def copy(self, target: int, source: int, size: int) -> None:
        """Bytes from one address to another, of any GPU that is mapped here."""
        self._check("cuMemcpyAsync", target, source, size, self.handle)

    def write(self, address: int, value: int) -> None:
        """A number, when all before it on the stream is done and can be seen."""
        self._check("cuStreamWriteValue32_v2", self.handle, address, value & 0xFFFFFFFF, 0)

    def wait(self, address: int, value: int) -> None:
        """Until a number there is as large, by cyclic comparison."""
        self._check("cuStreamWaitValue32_v2", self.handle, address, value & 0xFFFFFFFF, _AT_LEAST)

    def _check(self, name: str, *arguments: object) -> None:
        call = getattr(_driver(), name)
        status = call(*arguments)
        if status == _INVALID_CONTEXT:  # this thread has not called CUDA before
            torch.zeros(1, device=self.device)
            status = call(*arguments)
        check(status, name)


def reach_each_other(group: dist.ProcessGroup) -> bool:
    """Whether all ranks have GPUs of one host that reach each other's memory, and the driver what this needs.

    Every rank of the group has to call it; all get the same answer.
    """
    here: tuple[str, str, bool] = (socket.gethostname(), "", False)
    if torch.cuda.is_available() and dist.get_backend(group) == "nccl":
        device = torch.cuda.current_device()
        others = (i for i in range(torch.cuda.device_count()) if i != device)
        reaches = all(torch.cuda.can_device_access_peer(device, i) for i in others)
        here = (socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid), reaches)
    every: list[tuple[str, str, bool]] = [here] * group.size()
    dist.all_gather_object(every, here, group=group)
    hosts, gpus, reaches_ = zip(*every, strict=True)
    return len(set(hosts)) == 1 and len(set(gpus)) == group.size() and all(reaches_)


@functools.cache
def _driver() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    address, stream, number = ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint32
    library.cuMemcpyAsync.argtypes = (address, address, ctypes.c_size_t, stream)
    library.cuStreamWriteValue32_v2.argtypes = (stream, address, number, ctypes.c_uint)
    library.cuStreamWaitValue32_v2.argtypes = (stream, address, number, ctypes.c_uint)
    return library
