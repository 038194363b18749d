"""Messages of a fixed size between ranks: the same number of bytes from each to each, whatever the tokens are.

Shapes alone decide what a message holds, so no rank has to wait for numbers from its device, and the host may run ahead
of it. Two classes carry messages: `Collective` by `torch.distributed`, and `CopyEngines` (in
`dskernels.model.parallel.copies`) by the copy engines of the GPUs of one host, which occupy no SM meanwhile.

A message begins and ends on every rank as follows::

    sent = mail.send(outgoing)            # it begins to travel; whatever is computed now runs at the same time
    for rows in mail.arriving(sent):      # the device's stream waits for each piece
        parts = mail.from_rank(sent, 0)   # or whole, or of_all: views of what arrived, to be read on that stream
    mail.finished(sent)                   # it has been read, and its memory may be used again
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

ALIGNMENT = 256  # bytes: each message, and each part of one, begins at a multiple of this


class Part(NamedTuple):
    """Where a tensor that is part of a message lies among the message's bytes.

    Attributes:
        begin: its first byte.
        shape: the tensor's shape.
        dtype: the tensor's dtype.
    """

    begin: int
    shape: torch.Size
    dtype: torch.dtype

    def of(self, message: Tensor) -> Tensor:
        """The tensor, as a view of the message's bytes, uint8 ``[size]``."""
        size = math.prod(self.shape) * self.dtype.itemsize
        return message[self.begin : self.begin + size].view(self.dtype).view(self.shape)


def layout(parts: Sequence[Tensor]) -> tuple[list[Part], int]:
    """Where each of these tensors lies in a message made of them, and the size of the message in bytes."""
    found, end = [], 0
    for part in parts:
        found.append(Part(end, part.shape, part.dtype))
        end += aligned(part.numel() * part.element_size())
    return found, end


def message_bytes(shapes: Sequence[tuple[int, int]]) -> int:
    """Bytes of a message as `layout` makes it, given the number of rows of each part and the bytes of a row."""
    return sum(aligned(rows * width) for rows, width in shapes)


def aligned(size: int) -> int:
    """A number of bytes, rounded up to a multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


Fill = Callable[[int, slice], None]


class Mail(ABC):
    """Messages among the ranks of a group. Every rank sends and receives the same ones in the same order.

    Args:
        group: the ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.ranks, self.rank = group, group.size(), group.rank()

    @abstractmethod
    def send(
        self,
        outgoing: Sequence[Sequence[Tensor]],
        *,
        together: bool = False,
        fill: Fill | None = None,
        columns: Sequence[int] = (),
        into: Sequence[Tensor] | None = None,
    ) -> Any:
        """Begins a message to every rank.

        Args:
            outgoing: for each rank, the parts of the message to it: contiguous tensors, of the same shapes and dtypes
                for all ranks and on all ranks of the group.
            together: whether `whole` will be called, which has the rows of all ranks one after the other. The parts for
                this rank itself are then copied to the others; otherwise they stay where they are.
            fill: ``fill(rank, rows)`` writes these rows of the first part for another rank. It is called for each such
                rank before the rows leave: for all rows at once, or for some of them while others already travel.
            columns: the positions of parts (not of the first) whose columns are contiguous, not their rows, as with
                scales; what arrives of them may be laid out in the same way.
            into: memory for each part, ``[R, rows, width]``, to which what arrives is copied, and this rank's own part
                too. All of it is there when `arriving` ends, and it stays after `finished`.

        Returns:
            The message, as the other methods take it.
        """

    @abstractmethod
    def arriving(self, sent: Any) -> Iterator[slice]:
        """Waits for the message piece by piece, and yields the rows of the first part that each piece consists of.

        A piece has arrived from every rank; the other parts arrive with the first one. It is the device's stream that
        waits, not the host, so a piece has to be read on the stream that is current here.
        """

    @abstractmethod
    def from_rank(self, sent: Any, rank: int) -> list[Tensor]:
        """The parts that a rank has sent to this one; valid from `arriving` to `finished`."""

    def whole(self, sent: Any) -> list[Tensor]:
        """The parts with the rows of all ranks one after the other, of a message sent `together`; valid likewise."""
        by_rank = [self.from_rank(sent, rank) for rank in range(self.ranks)]
        return [torch.cat(parts) for parts in zip(*by_rank, strict=True)]

    @abstractmethod
    def of_all(self, sent: Any) -> Tensor:
        """The first part from all ranks, ``[R, ...]``; valid likewise. Its own place in it is undefined."""

    @abstractmethod
    def finished(self, sent: Any) -> None:
        """Says that the message is read by what is on the stream so far; then its memory may be used again."""

    def settle(self) -> None:  # noqa: B027 - most have nothing to do
        """Tells all ranks what has been read here, where no further message does; a CUDA graph has to end with it."""


class Sent(NamedTuple):
    """A message of a `Collective`.

    Attributes:
        work: the collective operation.
        buffer: uint8 ``[R, bytes]``, what arrives from each rank.
        parts: where each part lies in the bytes from a rank.
        own: the parts for this rank itself.
        into: see `Mail.send`.
    """

    work: dist.Work | None
    buffer: Tensor
    parts: list[Part]
    own: list[Tensor]
    into: Sequence[Tensor] | None


class Collective(Mail):
    """`Mail` by one `all_to_all_single` per message, on any backend of `torch.distributed`."""

    def send(
        self,
        outgoing: Sequence[Sequence[Tensor]],
        *,
        together: bool = False,
        fill: Fill | None = None,
        columns: Sequence[int] = (),
        into: Sequence[Tensor] | None = None,
    ) -> Sent:
        """See `Mail`. `together` changes nothing: `whole` concatenates the rows when it is called."""
        own = list(outgoing[self.rank])
        for rank in range(self.ranks):
            if fill is not None and rank != self.rank:
                fill(rank, slice(0, own[0].shape[0]))
        parts, size = layout(own)
        device = own[0].device
        # At least some bytes: of a message without any, that for rank 1 would begin at an odd address.
        leaving = torch.empty(self.ranks, max(size, ALIGNMENT), dtype=torch.uint8, device=device)
        for rank, tensors in enumerate(outgoing):
            for part, tensor in zip(parts, tensors, strict=True):
                part.of(leaving[rank]).copy_(tensor)
        coming = torch.empty_like(leaving)
        work = dist.all_to_all_single(coming, leaving, group=self.group, async_op=True)
        return Sent(work, coming, parts, own, into)

    def arriving(self, sent: Sent) -> Iterator[slice]:
        """See `Mail`."""
        if sent.work is not None:
            sent.work.wait()
        for rank in range(self.ranks if sent.into is not None else 0):
            for memory, part in zip(sent.into or (), self.from_rank(sent, rank), strict=True):
                memory[rank].copy_(part)
        yield slice(0, sent.own[0].shape[0])

    def from_rank(self, sent: Sent, rank: int) -> list[Tensor]:
        """See `Mail`."""
        return sent.own if rank == self.rank else [part.of(sent.buffer[rank]) for part in sent.parts]

    def of_all(self, sent: Sent) -> Tensor:
        """See `Mail`."""
        return torch.stack([sent.parts[0].of(message) for message in sent.buffer])

    def finished(self, sent: Sent) -> None:
        """See `Mail`."""
