"""Messages of a fixed size between ranks: as many bytes from each to each, whatever the tokens.

What a message holds is decided by shapes alone, so that no rank has to wait for numbers from its device: the host may
run ahead of it. `Collective` sends them by `torch.distributed`; `dskernels.model.parallel.copies` by the copy engines
of the GPUs of one host, which takes no SM from what is computed meanwhile.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

ALIGNMENT = 256  # bytes: where each part of a message begins, and each message


class Part(NamedTuple):
    """Where a part of a message lies in its bytes.

    Attributes:
        begin: the first byte.
        shape: of the tensor there.
        dtype: of its elements.
    """

    begin: int
    shape: torch.Size
    dtype: torch.dtype

    def of(self, message: Tensor) -> Tensor:
        """That tensor, given the bytes of the message."""
        size = math.prod(self.shape) * self.dtype.itemsize
        return message[self.begin : self.begin + size].view(self.dtype).view(self.shape)


def layout(parts: Sequence[Tensor]) -> tuple[list[Part], int]:
    """The parts of a message of these tensors, and its bytes."""
    found, end = [], 0
    for part in parts:
        found.append(Part(end, part.shape, part.dtype))
        end += aligned(part.numel() * part.element_size())
    return found, end


def message_bytes(shapes: Sequence[tuple[int, int]]) -> int:
    """Bytes of a message with parts of so many rows of so many bytes, as `layout` makes it."""
    return sum(aligned(rows * width) for rows, width in shapes)


def aligned(size: int) -> int:
    """So many bytes, or some more, of which whole parts are made."""
    return -(-size // ALIGNMENT) * ALIGNMENT


Fill = Callable[[int, slice], None]


class Mail(ABC):
    """Messages among the ranks of a group. Every rank sends and takes the same ones in the same order.

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
            outgoing: for each rank the parts of its message, contiguous, of shapes and dtypes that are the same for
                all ranks of the group.
            together: let `whole` have them, the one for this rank too, which else stays where it is.
            fill: writes these rows of the first part for a rank, which is another one; called once for all of them
                before they leave, for some while others already travel.
            columns: the places of parts (not the first) whose columns are contiguous instead, as those of scales are;
                what comes of them may lie in the same way.
            into: memory for each part, ``[R, rows, width]``, to which what comes is copied, and this rank's own part
                too; all of it is there when `arriving` ends, and stays when the message is `finished`.

        Returns:
            What the others take.
        """

    @abstractmethod
    def arriving(self, sent: Any) -> Iterator[slice]:
        """The rows of the first part, piece by piece as they come from every rank; other parts come with the first.

        It is the stream of the device that waits for them.
        """

    @abstractmethod
    def from_rank(self, sent: Any, rank: int) -> list[Tensor]:
        """The parts that a rank has sent here, whose content is valid from `arriving` to `finished`."""

    def whole(self, sent: Any) -> list[Tensor]:
        """The parts with the rows of all ranks behind each other, of a message sent `together`, valid likewise."""
        by_rank = [self.from_rank(sent, rank) for rank in range(self.ranks)]
        return [torch.cat(parts) for parts in zip(*by_rank, strict=True)]

    @abstractmethod
    def of_all(self, sent: Any) -> Tensor:
        """The first part of all ranks, ``[R, ...]``, valid likewise; where this rank's own would be stands anything."""

    @abstractmethod
    def finished(self, sent: Any) -> None:
        """They have been read, by what is on the stream so far: others may come in their place."""

    def settle(self) -> None:  # noqa: B027 - most have nothing to do
        """All ranks get to know what has been read, though no message follows; a CUDA graph has to end so."""


class Sent(NamedTuple):
    """A message of a `Collective`."""

    work: dist.Work | None
    buffer: Tensor
    parts: list[Part]
    own: list[Tensor]
    into: Sequence[Tensor] | None


class Collective(Mail):
    """`Mail` by one `all_to_all_single` a message, on any backend."""

    def send(
        self,
        outgoing: Sequence[Sequence[Tensor]],
        *,
        together: bool = False,
        fill: Fill | None = None,
        columns: Sequence[int] = (),
        into: Sequence[Tensor] | None = None,
    ) -> Sent:
        """See `Mail`; what is to lie together is put together when it is asked for."""
        own = list(outgoing[self.rank])
        for rank in range(self.ranks):
            if fill is not None and rank != self.rank:
                fill(rank, slice(0, own[0].shape[0]))
        parts, size = layout(own)
        device = own[0].device
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
