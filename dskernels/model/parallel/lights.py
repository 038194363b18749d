"""Lights: the flags that streams of several GPUs wait for, 32-bit numbers in memory that the other GPUs write to.

A light is off or on; one says, for example, that a piece of a message has arrived. Nobody counts messages, so they may
be part of a CUDA graph, which does the same at every replay: it leaves its lights as it found them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from dskernels.model.parallel.engines import Step, Steps

# Values of a light: off and on; the two colours in which some are on in turn, and their colour in a CUDA graph, see
# `Lights`.
OFF, ON = 0, 1
COLOURS, IN_A_GRAPH = (1, 2), 3


class Read(NamedTuple):
    """A message that has been read on this rank.

    Attributes:
        slot: the slot that it lies in.
        lit: number of its pieces whose lights have to be switched off: all of them in a CUDA graph, otherwise none.
    """

    slot: int
    lit: int


class Lights:
    """The lights of all slots in which the messages among a group of ranks lie.

    In its own memory, every rank has the following lights for each slot:

        there[source, piece]   on when this piece of the message from rank `source` has arrived; the source switches it
                               on. `there[rank, 0]`, of the rank itself, stands for what it copied to its own slot.
        taken[reader]          on while rank `reader` has not read what this rank sent to it in this slot, which is not
                               free until then; this rank switches it on, the reader off.
        left                   on when all that this rank sends has left its memory; in the place of `taken[rank]`.

    Outside of CUDA graphs, `there` and `left` are on in one of two colours (values), alternating from one message in
    the slot to the next. A light that is still on from the previous message is therefore not mistaken for that of the
    next one, and nobody has to switch it off. A graph does the same at every replay, so it cannot alternate: there,
    `there` has a third colour and is switched off when the message has been read, and edges of the graph replace
    `left`.

    The methods give steps for a stream (`Engine.take`). They only depend on the arguments, and are made once.

    Args:
        addresses: the address of each rank's lights; all are off at first.
        rank: this rank.
        pieces: the largest number of pieces of a message.
    """

    def __init__(self, addresses: Sequence[int], rank: int, pieces: int) -> None:
        self.addresses, self.rank, self.pieces = addresses, rank, pieces
        self.others = [other for other in range(len(addresses)) if other != rank]
        self.made: dict[Hashable, Steps] = {}

    @staticmethod
    def needed(slots: int, ranks: int, pieces: int) -> int:
        """Bytes of memory for the lights of each rank."""
        return 4 * slots * ranks * (pieces + 1)

    def until_read(self, slot: int, read: tuple[Read, ...] = ()) -> Steps:
        """Wait until all other ranks have read what was sent to them in this slot, then mark it as taken again.

        Before waiting, tell them that the messages `read` have been read here: two ranks that both send would otherwise
        wait for each other.
        """

        def make() -> list[Step]:
            taken = [self._taken(self.rank, slot, rank) for rank in self.others]
            one_by_one = ((Step("wait", light, OFF), Step("write", light, ON)) for light in taken)
            return [*self._have_read(read), *(step for steps in one_by_one for step in steps)]

        return self._once((0, slot, *read), make)

    def there(self, slot: int, piece: int, colour: int, *, left: int | None = None) -> Steps:
        """Tell all other ranks that a piece from this one has arrived there, by lights of this colour.

        If `left` is a colour, also switch on `left` in it, on this rank: with the last piece, all has left.
        """

        def make() -> list[Step]:
            lights = [(self._there(rank, slot, self.rank, piece), colour) for rank in self.others]
            return [Step("write", *light) for light in (*lights, *self._left(slot, left))]

        return self._once((1, slot, piece, colour, left), make)

    def own(self, slot: int, colour: int) -> Steps:
        """Tell this rank that what it sends to itself has been copied to its slot."""
        light = self._there(self.rank, slot, self.rank, 0)
        return self._once((4, slot, colour), lambda: [Step("write", light, colour)])

    def until_there(
        self, slot: int, piece: int, colour: int, *, left: int | None = None, own: int | None = None
    ) -> Steps:
        """Wait until a piece has arrived from all other ranks.

        If `left` is a colour, also wait until all that this rank sends has left; if `own` is one, until what it sends
        to itself is in its slot.
        """

        def make() -> list[Step]:
            lights = [(self._there(self.rank, slot, rank, piece), colour) for rank in self.others]
            if own is not None:
                lights.append((self._there(self.rank, slot, self.rank, 0), own))
            return [Step("wait", *light) for light in (*lights, *self._left(slot, left))]

        return self._once((2, slot, piece, colour, left, own), make)

    def have_read(self, read: tuple[Read, ...]) -> Steps:
        """Tell the other ranks that these messages have been read here, so that their slots are free."""
        return self._once((3, *read), lambda: self._have_read(read))

    def _have_read(self, read: tuple[Read, ...]) -> list[Step]:
        # First switch off what is on here: as soon as another rank knows that its slot is free, it may send again, and
        # switch the same light on.
        here = [
            self._there(self.rank, slot, rank, piece)
            for slot, lit in read
            for rank in self.others
            for piece in range(lit)
        ]
        there = [self._taken(rank, slot, self.rank) for slot, _ in read for rank in self.others]
        return [Step("write", light, OFF) for light in (*here, *there)]

    def _left(self, slot: int, colour: int | None) -> list[tuple[int, int]]:
        return [] if colour is None else [(self._taken(self.rank, slot, self.rank), colour)]

    def _there(self, at: int, slot: int, source: int, piece: int) -> int:
        return self.addresses[at] + 4 * ((slot * len(self.addresses) + source) * (self.pieces + 1) + piece)

    def _taken(self, at: int, slot: int, reader: int) -> int:
        return self._there(at, slot, reader, self.pieces)

    def _once(self, key: Hashable, make: Callable[[], list[Step]]) -> Steps:
        found = self.made.get(key)
        if found is None:
            found = self.made[key] = Steps(make())
        return found
