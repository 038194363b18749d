"""`Mail` between the GPUs of one host by their copy engines: straight into the other's memory, and no SM is taken.

NCCL's kernels hold SMs, and a product that fills all of them waits for the last one: on 2 H200 expert-parallel layers
in bf16 took 8.9 ms each with NCCL's messages under products, and 8.6 ms with all of it one by one.

Nothing of it is counted by the host (dskernels.model.parallel.lights), so that it may be part of a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dskernels.model.parallel.engines import Engine, Moment, PeerMemory
from dskernels.model.parallel.lights import Lights
from dskernels.model.parallel.mail import Fill, Mail, Part, aligned

SLOTS = 4  # messages that may be under way, or read, at once: two micro-batches have one each in both directions
# What has come of a large message is summed while the rest travels. A piece is 3/10 of the one before, as long as it
# takes to sum that. On 2 H200 235 MB each way took 614 us in one piece, 5 to 7 more for each other, and NCCL 797.
ENDS = {1: (1.0,), 2: (0.77, 1.0), 3: (0.72, 0.935, 1.0)}
PIECE = 2**24  # bytes, for each piece: less is not worth another one
# A message that is made as it leaves: of 29 MB the second piece should be made, in 27 us at the memory's rate, while
# the first travels for 31 at the link's. What that gains was not timed by itself.
FILLED, FEWEST_FILLED = (0.4, 1.0), 2**23


class Copied(NamedTuple):
    """A message that has been sent.

    Attributes:
        number: of it, from 0.
        parts: where they lie in its slot, each of all ranks, ``[R, ...]``.
        ends: of the pieces that the first part is cut into, as shares of it.
        own: what this rank would have sent to itself; None where it did.
        captured: whether it is in a CUDA graph.
    """

    number: int
    parts: list[Part]
    ends: tuple[float, ...]
    own: list[Tensor] | None
    captured: bool

    @property
    def slot(self) -> int:
        """Where it lies."""
        return self.number % SLOTS

    def piece(self, i: int) -> slice:
        """Its rows."""
        begin, end = (int(self.parts[0].shape[1] * part) for part in ((0.0, *self.ends)[i : i + 2]))
        return slice(begin, end)


class CopyEngines(Mail):
    """`Mail` for GPUs that reach each other's memory.

    Messages may be captured in a CUDA graph, by all ranks alike, and be sent outside of it as well: what is captured
    has to be read, and settled, in the same graph, and whatever was sent before a replay likewise, before it.

    Args:
        group: the ranks. All make this at once.
        size: the most bytes of a message from one rank to another, see `mail.message_bytes`.
        piece: bytes for each piece of its first part; a message that is to lie together comes in one.
        memory: of `needed` bytes; by default torch's symmetric memory.
    """

    def __init__(
        self, group: dist.ProcessGroup, size: int, *, piece: int = PIECE, memory: PeerMemory | None = None
    ) -> None:
        super().__init__(group)
        self.size, self.piece = aligned(size), piece
        memory = memory or PeerMemory.shared(group, self.needed(self.ranks, size))
        self.memory, self.addresses, self.keeps = memory  # slots, and behind them the lights
        behind = SLOTS * self.ranks * self.size
        self.lights = Lights([address + behind for address in self.addresses], self.rank, len(ENDS))
        self.count, self.unread = 0, set[int]()
        self.read: list[Copied] = []  # messages of which the others have not been told that they have been read
        # What is for this rank itself waits for no link.
        device = self.memory.device
        self.out, self.near = (Engine.of(torch.cuda.Stream(device, priority=-1)) for _ in range(2))
        self.now = Moment(device)
        # What is being sent lives until it has left. (torch's `record_stream` would make an event for each tensor that
        # is let go.)
        self.sending: list[Sequence[Sequence[Tensor]]] = [()] * SLOTS
        # In a graph: where each piece of a message has left, and what of it stays here is there.
        self.gone, self.kept = ([[Moment(device) for _ in range(n)] for _ in range(SLOTS)] for n in (len(ENDS), 1))

    @staticmethod
    def needed(ranks: int, size: int) -> int:
        """Bytes of memory on each rank for messages of `size`."""
        return SLOTS * ranks * aligned(size) + Lights.needed(SLOTS, ranks, len(ENDS))

    def send(self, outgoing: Sequence[Sequence[Tensor]], *, together: bool = False, fill: Fill | None = None) -> Copied:
        """See `Mail`."""
        own = list(outgoing[self.rank])
        ends = ENDS[1 if together else max(1, min(len(ENDS), _bytes(own[0]) // self.piece))]
        if fill is not None and not together:
            ends = FILLED if _bytes(own[0]) >= FEWEST_FILLED else ENDS[1]
        sent = self._next([(tensor.shape, tensor.dtype) for tensor in own], ends, None if together else own)
        self.sending[sent.slot] = outgoing
        if together:  # what was there has been read, by what the stream waits for anyway
            self.near.follow(self.now)
            for place, tensor in enumerate(own):
                self._copy(sent, self.rank, place, tensor, self.near)
            if sent.captured:
                self.kept[sent.slot][0].record(self.near)
            else:
                self.near.take(self.lights.there(sent.slot, self.rank, 0))
        self.out.follow(self.now)
        for rank in self._others():
            self.out.take(self.lights.until_read(sent.slot, rank))
            for place, tensor in enumerate(outgoing[rank][1:], start=1):
                self._copy(sent, rank, place, tensor, self.out)
        for i in range(len(sent.ends)):
            if fill is not None:
                for rank in self._others():
                    fill(rank, sent.piece(i))
                self.now.record(self._current())
                self.out.follow(self.now)
            for rank in self._others():
                self._copy(sent, rank, 0, outgoing[rank][0], self.out, sent.piece(i))
                left = rank == self._others()[-1] and i == len(sent.ends) - 1 and not sent.captured
                self.out.take(self.lights.there(sent.slot, rank, i, left=left))
            if sent.captured:
                self.gone[sent.slot][i].record(self.out)
        return sent

    def _next(
        self, parts: Sequence[tuple[torch.Size, torch.dtype]], ends: tuple[float, ...], own: list[Tensor] | None
    ) -> Copied:
        """A message with a slot of its own, behind what is on the stream."""
        if self.count - SLOTS in self.unread:
            raise RuntimeError(f"outgoing: {SLOTS} messages are under way, of which none has been read")
        placed, end = [], 0
        for shape, dtype in parts:
            placed.append(Part(end, torch.Size((self.ranks, *shape)), dtype))
            end += aligned(self.ranks * math.prod(shape) * dtype.itemsize)
        if end > self.ranks * self.size:
            raise ValueError(f"outgoing: expected at most {self.size} bytes for a rank, got {end // self.ranks}")
        sent = Copied(self.count, placed, ends, own, torch.cuda.is_current_stream_capturing())
        if sent.slot in [other.slot for other in self.read]:  # or a graph could wait for this behind the message itself
            self.settle()
        self.unread.add(self.count)
        self.count += 1
        self.now.record(self._current())
        return sent

    def arriving(self, sent: Copied) -> Iterator[slice]:
        """See `Mail`. With the last piece it is waited until this rank's own message has left, too.

        So whatever is behind it on the stream may have its memory, and no event has to say so.
        """
        if sent.captured != torch.cuda.is_current_stream_capturing():
            raise RuntimeError("sent: expected in the same CUDA graph, or outside as well")
        for i in range(len(sent.ends)):
            on, last = self._current(), i == len(sent.ends) - 1
            if sent.captured:  # events in place of its own lights: in whatever order a graph runs, it sends, then waits
                on.follow(self.gone[sent.slot][i])
                if sent.own is None:
                    on.follow(self.kept[sent.slot][0])
            own, left = (which and not sent.captured for which in (sent.own is None, last))
            on.take(self.lights.until_there(sent.slot, i, own=own, left=left, read=self._read()))
            if last:
                self.sending[sent.slot] = ()
            yield sent.piece(i)

    def from_rank(self, sent: Copied, rank: int) -> list[Tensor]:
        """See `Mail`."""
        if rank == self.rank and sent.own is not None:
            return sent.own
        return [part[rank] for part in self._parts(sent)]

    def whole(self, sent: Copied) -> list[Tensor]:
        """See `Mail`."""
        if sent.own is not None:
            raise ValueError("sent: expected a message that was sent together")
        return [part.flatten(0, 1) for part in self._parts(sent)]

    def of_all(self, sent: Copied) -> Tensor:
        """See `Mail`."""
        return self._parts(sent)[0]

    def finished(self, sent: Copied) -> None:
        """See `Mail`. The others are told where the next message is waited for, or by `settle`.

        A number that the stream writes by itself takes it 3 us: a layer of two micro-batches 35 of 3,110.
        """
        self.unread.remove(sent.number)
        self.read.append(sent)

    def settle(self) -> None:
        """See `Mail`."""
        if self.read:
            self._current().take(self.lights.have_read(self._read()))

    def _read(self) -> tuple[int, ...]:
        """The slots of which the others are told now."""
        if self.read and {sent.captured for sent in self.read} != {torch.cuda.is_current_stream_capturing()}:
            raise RuntimeError("settle: expected behind the last message before a CUDA graph, and the last one in it")
        slots = tuple(sent.slot for sent in self.read)
        self.read.clear()
        return slots

    def _copy(self, sent: Copied, rank: int, place: int, tensor: Tensor, on: Engine, rows: slice | None = None) -> None:
        """Rows of a part, or all, to where a rank has them."""
        begin, end = (0, _bytes(tensor)) if rows is None else (_bytes(tensor[:at]) for at in (rows.start, rows.stop))
        part = sent.slot * self.ranks * self.size + sent.parts[place].begin + self.rank * _bytes(tensor)
        on.copy(self.addresses[rank] + part + begin, tensor.data_ptr() + begin, end - begin)

    def _current(self) -> Engine:
        return Engine.current(self.memory.device)

    def _parts(self, sent: Copied) -> list[Tensor]:
        """Of all ranks, ``[R, ...]`` each."""
        begin = sent.slot * self.ranks * self.size
        return [part.of(self.memory[begin : begin + self.ranks * self.size]) for part in sent.parts]

    def _others(self) -> list[int]:
        """All ranks but this, so that no two send to one at a time if all go on as fast."""
        return [(self.rank + i) % self.ranks for i in range(1, self.ranks)]


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()
