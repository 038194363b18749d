"""`Mail` between the GPUs of one host: their copy engines write into each other's memory, and no SM is occupied.

NCCL's kernels hold SMs, and a product that fills all SMs waits for the last one: on 2 H200, expert-parallel layers in
bf16 took 8.9 ms each with NCCL's messages under products, and 8.6 ms without any overlap.

Each rank has memory for SLOTS messages from every rank. Three streams take part in a message:

    the current stream    makes the message, and later waits until the others' are there, to read them;
    `out`                 waits until the message is made and its slot is free on the other ranks, copies it there, and
                          switches on a light behind each piece (a 32-bit flag, see `lights`);
    `near`                copies what stays on this rank, and moves what came out of the slot if it has to be kept.

On the current stream, which runs the products, a message costs no more than an event and a wait: every operation of
the driver between two kernels takes 3 us or more. The host counts nothing, so that messages may be in CUDA graphs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dskernels.model.parallel.engines import Copy, Engine, Moment, PeerMemory
from dskernels.model.parallel.lights import COLOURS, IN_A_GRAPH, Lights, Read
from dskernels.model.parallel.mail import Fill, Mail, Part, aligned

# Messages that may be under way, or not read yet, at once: two micro-batches have one each in both directions.
SLOTS = 4
# Where the pieces of a message end. What has come of a large message is summed up while the rest travels; each piece is
# 3/10 of the one before, as summing takes 3/10 of the time of travelling. On 2 H200, 235 MB each way took 614 us in one
# piece, 5 to 7 us more for each further piece, and 797 us with NCCL.
ENDS = {1: (1.0,), 2: (0.77, 1.0), 3: (0.72, 0.935, 1.0)}
PIECE = 2**24  # bytes that a message needs for each piece: with less, another piece costs more than it gains
# Pieces of a message that is made while it leaves, and the bytes from which on it has several. Of 29 MB, the second
# piece takes 27 us to make at the memory's rate, while the first travels for 31 us. The gain was not timed by itself.
FILLED, FEWEST_FILLED = (0.4, 1.0), 2**23


class Copied(NamedTuple):
    """A message that has been sent, and what will be known of it where it is read.

    Attributes:
        number: messages are numbered from 0, on all ranks alike.
        parts: where each part lies in the slot, of all ranks together: ``[R, rows, width]``, or ``[width, R, rows]``.
        columns: the positions of the parts that lie in the second way, with contiguous columns.
        ends: where the pieces of the first part end, as shares of its rows.
        own: the parts for this rank itself, which stay where they are; None if they were copied to the slot as well.
        kept: whether all that comes is copied out of the slot, so that only this has to be waited for.
        colours: the values of its lights, piece by piece (see `Lights`); the last is that of what this rank sends to
            itself.
    """

    number: int
    parts: list[Part]
    columns: tuple[int, ...]
    ends: tuple[float, ...]
    own: list[Tensor] | None
    kept: bool
    colours: tuple[int, ...]

    @property
    def captured(self) -> bool:
        """Whether it is part of a CUDA graph."""
        return self.colours[0] == IN_A_GRAPH

    @property
    def slot(self) -> int:
        """The slot that it lies in, the same on all ranks."""
        return self.number % SLOTS

    def left_with(self, i: int) -> int | None:
        """With the last piece, the colour of the light that says that the whole message has left; None with others.

        It is None in a graph, too, where edges between its nodes take the place of this light.
        """
        return self.colours[0] if i == len(self.ends) - 1 and not self.captured else None

    def piece(self, i: int) -> slice:
        """The rows of the first part that the i-th piece consists of."""
        begin, end = (int(self.parts[0].shape[1] * part) for part in ((0.0, *self.ends)[i : i + 2]))
        return slice(begin, end)


class CopyEngines(Mail):
    """`Mail` for GPUs that reach each other's memory.

    Messages may be captured in a CUDA graph, by all ranks alike, and be sent outside of graphs as well. What is
    captured has to be read, and settled (`settle`), in the same graph; what was sent before a replay, before it.

    Args:
        group: the ranks. All of them make this object at the same time.
        size: the most bytes of a message from one rank to another, see `mail.message_bytes`.
        piece: bytes that a message needs for each piece of its first part; one that is sent `together` has one piece.
        memory: `needed` bytes on each rank; by default torch's symmetric memory.
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
        self.colours = [[COLOURS[1]] * (len(ENDS) + 1) for _ in range(SLOTS)]  # of each slot's last, not in a graph
        self.read: list[Copied] = []  # messages that have been read, of which the other ranks were not told
        # What stays on this rank has a stream of its own. In one batch with what leaves, both took as long as one after
        # the other: a dispatch of 16,384 tokens 743 us instead of 634.
        device = self.memory.device
        self.out, self.near = (Engine.of(torch.cuda.Stream(device, priority=-1)) for _ in range(2))
        self.now = Moment(device)
        # Tensors that copies read or write stay alive until these are done. (torch's `record_stream` would create an
        # event for each tensor that is let go.)
        self.sending: list[Sequence[Sequence[Tensor]]] = [()] * SLOTS
        # Events of each slot: each piece has left (used in graphs only); what is copied on this rank is there.
        self.gone = [[Moment(device) for _ in ENDS] for _ in range(SLOTS)]
        self.kept = [Moment(device) for _ in range(SLOTS)]

    @staticmethod
    def needed(ranks: int, size: int) -> int:
        """Bytes of memory on each rank for messages of `size`."""
        return SLOTS * ranks * aligned(size) + Lights.needed(SLOTS, ranks, len(ENDS))

    def send(
        self,
        outgoing: Sequence[Sequence[Tensor]],
        *,
        together: bool = False,
        fill: Fill | None = None,
        columns: Sequence[int] = (),
        into: Sequence[Tensor] | None = None,
    ) -> Copied:
        """See `Mail`."""
        if into is not None and (together or columns):
            raise ValueError("into: expected of a message of rows that is not sent together")
        own = list(outgoing[self.rank])
        ends = ENDS[1 if together else max(1, min(len(ENDS), _bytes(own[0]) // self.piece))]
        if fill is not None and not together:
            ends = FILLED if _bytes(own[0]) >= FEWEST_FILLED else ENDS[1]
        sent = self._next(own, ends, together, columns, into is not None)
        self.sending[sent.slot] = [*outgoing, *([] if into is None else [into])]
        if together:  # this rank's own place in the slot is free: the current stream has read what was there
            self.near.follow(self.now)
            here = [self._copy(sent, self.rank, place, tensor) for place, tensor in enumerate(own)]
            self.near.copy_all(here, captured=sent.captured)
            if sent.captured:
                self.kept[sent.slot].record(self.near)
            else:
                self.near.take(self.lights.own(sent.slot, sent.colours[-1]))
        self.out.follow(self.now)
        self.out.take(self.lights.until_read(sent.slot, self._read()))
        for i in range(len(sent.ends)):
            if fill is not None:
                for rank in self._others():
                    fill(rank, sent.piece(i))
                self.now.record(self._current())
                self.out.follow(self.now)
            leaving = [self._copy(sent, rank, 0, outgoing[rank][0], sent.piece(i)) for rank in self._others()]
            if i == 0:  # the other parts travel with the first piece
                places = range(1, len(own))
                leaving += [self._copy(sent, r, place, outgoing[r][place]) for r in self._others() for place in places]
            self.out.copy_all(leaving, captured=sent.captured)
            self.out.take(self.lights.there(sent.slot, i, sent.colours[i], left=sent.left_with(i)))
            if sent.captured:
                self.gone[sent.slot][i].record(self.out)
        if into is not None:
            self._receive(sent, own, into)
        return sent

    def _receive(self, sent: Copied, own: list[Tensor], into: Sequence[Tensor]) -> None:
        """Copies what arrives from the slot to `into`, piece by piece, while the current stream does something else."""

        def copy(source: Tensor, target: Tensor) -> Copy:
            return Copy(target.data_ptr(), source.data_ptr(), _bytes(source))

        here = [copy(part, memory[self.rank]) for part, memory in zip(own, into, strict=True)]
        self.near.follow(self.now)
        self.near.copy_all(here, captured=sent.captured)
        parts = self._parts(sent)
        for i in range(len(sent.ends)):
            if sent.captured:
                self.near.follow(self.gone[sent.slot][i])
            self.near.take(self.lights.until_there(sent.slot, i, sent.colours[i], left=sent.left_with(i)))
            pairs = [(parts[0][rank, sent.piece(i)], into[0][rank, sent.piece(i)]) for rank in self._others()]
            if i == 0:
                places = range(1, len(own))
                pairs += [(parts[place][rank], into[place][rank]) for rank in self._others() for place in places]
            self.near.copy_all([copy(*pair) for pair in pairs], captured=sent.captured)
        self.kept[sent.slot].record(self.near)

    def _next(
        self, own: list[Tensor], ends: tuple[float, ...], together: bool, columns: Sequence[int], kept: bool
    ) -> Copied:
        """The next message, in its slot. The event `now` is recorded: what is to be sent has been computed, except what
        `fill` still writes."""
        if self.count - SLOTS in self.unread:
            raise RuntimeError(f"outgoing: {SLOTS} messages are under way, of which none has been read")
        parts, end = [], 0
        for place, tensor in enumerate(own):
            rows, *width = tensor.shape
            shape = (*width, self.ranks, rows) if place in columns else (self.ranks, rows, *width)
            parts.append(Part(end, torch.Size(shape), tensor.dtype))
            end += aligned(self.ranks * _bytes(tensor))
        if end > self.ranks * self.size:
            raise ValueError(f"outgoing: expected at most {self.size} bytes for a rank, got {end // self.ranks}")
        colours = [IN_A_GRAPH] * len(ends)
        if not torch.cuda.is_current_stream_capturing():
            of_slot, (first, second) = self.colours[self.count % SLOTS], COLOURS
            for i in [*range(len(ends)), *([-1] if together else [])]:
                of_slot[i] = second if of_slot[i] == first else first
            colours = [*of_slot[: len(ends)], of_slot[-1]]
        sent = Copied(self.count, parts, tuple(columns), ends, None if together else own, kept, tuple(colours))
        self.unread.add(self.count)
        self.count += 1
        self.now.record(self._current())
        return sent

    def arriving(self, sent: Copied) -> Iterator[slice]:
        """See `Mail`. With the last piece, the stream also waits until this rank's own message has left.

        So what comes next on the stream may use the memory of what was sent, and no event has to say so.
        """
        if sent.captured != torch.cuda.is_current_stream_capturing():
            raise RuntimeError("sent: expected in the same CUDA graph, or outside as well")
        if sent.kept:
            self._current().follow(self.kept[sent.slot])
            self.sending[sent.slot] = ()
            yield slice(0, sent.parts[0].shape[1])
            return
        for i in range(len(sent.ends)):
            on = self._current()
            if sent.captured:  # in whatever order a graph runs its nodes, a rank sends before it waits
                on.follow(self.gone[sent.slot][i])
                if sent.own is None:
                    on.follow(self.kept[sent.slot])
            own = sent.colours[-1] if sent.own is None and not sent.captured else None
            on.take(self.lights.until_there(sent.slot, i, sent.colours[i], left=sent.left_with(i), own=own))
            if i == len(sent.ends) - 1:
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
        """See `Mail`. The other ranks are told with the next message that is sent, or by `settle`.

        It is `out` that tells them: a write on the current stream would take it 3 us.
        """
        self.unread.remove(sent.number)
        self.read.append(sent)

    def settle(self) -> None:
        """See `Mail`."""
        if self.read:
            self._current().take(self.lights.have_read(self._read()))

    def _read(self) -> tuple[Read, ...]:
        """The messages that have been read; the caller tells the other ranks, so they are forgotten here."""
        if self.read and {sent.captured for sent in self.read} != {torch.cuda.is_current_stream_capturing()}:
            raise RuntimeError("settle: expected behind the last message before a CUDA graph, and the last one in it")
        read = tuple(Read(sent.slot, len(sent.ends) if sent.captured else 0) for sent in self.read)
        self.read.clear()
        return read

    def _copy(self, sent: Copied, rank: int, place: int, tensor: Tensor, rows: slice | None = None) -> Copy:
        """The copy of a part, or of some of its rows, to the place that it has on a rank."""
        part = self.addresses[rank] + sent.slot * self.ranks * self.size + sent.parts[place].begin
        if place in sent.columns:
            rows_, width = tensor.shape
            size, pitch = rows_ * tensor.element_size(), tensor.stride(1) * tensor.element_size()
            return Copy(part + self.rank * size, tensor.data_ptr(), size, width, self.ranks * size, pitch)
        begin, end = (0, _bytes(tensor)) if rows is None else (_bytes(tensor[:at]) for at in (rows.start, rows.stop))
        part += self.rank * _bytes(tensor)
        return Copy(part + begin, tensor.data_ptr() + begin, end - begin)

    def _current(self) -> Engine:
        return Engine.current(self.memory.device)

    def _parts(self, sent: Copied) -> list[Tensor]:
        """The parts of all ranks in the slot, ``[R, rows, width]`` each."""
        begin = sent.slot * self.ranks * self.size
        message = self.memory[begin : begin + self.ranks * self.size]
        parts = [part.of(message) for part in sent.parts]
        return [part.permute(1, 2, 0) if place in sent.columns else part for place, part in enumerate(parts)]

    def _others(self) -> list[int]:
        """All ranks but this one, in such an order that at each position no two ranks have the same one."""
        return [(self.rank + i) % self.ranks for i in range(1, self.ranks)]


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()
