"""What streams of several GPUs wait for: lights, that is 32-bit flags, on or off, in memory that the others write to.

Nobody counts messages, so that they may be part of a CUDA graph, which does the same again each time: it finds its
lights as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from dskernels.model.parallel.engines import Step, Steps

OFF, ON = 0, 1
COLOURS, IN_A_GRAPH = (1, 2), 3


class Read(NamedTuple):
    """A message that has been read.

    Attributes:
        slot: where it lies.
        lit: of how many pieces it has lights that have to be put out.
    """

    slot: int
    lit: int


class Lights:
    """Of the slots that messages among some ranks lie in.

    Of each slot every rank has a light for each rank and piece, which is on where that has come (*there*); one for each
    other rank while what it has been sent has not been read (*taken*); and one that is on when all that it sends has
    *left*.

    Outside of CUDA graphs a light is on in one of two colours, that is values, in turn: while it is still on from the
    message before it is not taken for that of the next, and nobody has to put it out. In a graph, which does the same
    at each replay, it has a third one, and is put out.

    Args:
        addresses: where each rank's lights are; all are off at first.
        rank: this one.
        pieces: the most of a message.
    """

    def __init__(self, addresses: Sequence[int], rank: int, pieces: int) -> None:
        self.addresses, self.rank, self.pieces = addresses, rank, pieces
        self.others = [other for other in range(len(addresses)) if other != rank]
        self.made: dict[Hashable, Steps] = {}

    @staticmethod
    def needed(slots: int, ranks: int, pieces: int) -> int:
        """Bytes on each rank."""
        return 4 * slots * ranks * (pieces + 1)

    def until_read(self, slot: int, read: tuple[Read, ...] = ()) -> Steps:
        """What was sent in this slot before has been read by all other ranks, and something else will be there.

        Before that, these ranks may know what has been read here.
        """

        def make() -> list[Step]:
            taken = [self._taken(self.rank, slot, rank) for rank in self.others]
            one_by_one = ((Step("wait", light, OFF), Step("write", light, ON)) for light in taken)
            return [*self._have_read(read), *(step for steps in one_by_one for step in steps)]

        return self._once((0, slot, *read), make)

    def there(self, slot: int, piece: int, colour: int, *, left: int | None = None) -> Steps:
        """All other ranks may know that a piece is there; `left`, another colour: and this one, that all has left."""

        def make() -> list[Step]:
            lights = [(self._there(rank, slot, self.rank, piece), colour) for rank in self.others]
            return [Step("write", *light) for light in (*lights, *self._left(slot, left))]

        return self._once((1, slot, piece, colour, left), make)

    def own(self, slot: int, colour: int) -> Steps:
        """What this rank would have sent to itself is there."""
        light = self._there(self.rank, slot, self.rank, 0)
        return self._once((4, slot, colour), lambda: [Step("write", light, colour)])

    def until_there(
        self, slot: int, piece: int, colour: int, *, left: int | None = None, own: int | None = None
    ) -> Steps:
        """A piece has come from all other ranks; `left`, another colour: and what this one sends has left."""

        def make() -> list[Step]:
            lights = [(self._there(self.rank, slot, rank, piece), colour) for rank in self.others]
            if own is not None:
                lights.append((self._there(self.rank, slot, self.rank, 0), own))
            return [Step("wait", *light) for light in (*lights, *self._left(slot, left))]

        return self._once((2, slot, piece, colour, left, own), make)

    def have_read(self, read: tuple[Read, ...]) -> Steps:
        """The other ranks may know that what they have sent has been read."""
        return self._once((3, *read), lambda: self._have_read(read))

    def _have_read(self, read: tuple[Read, ...]) -> list[Step]:
        # First what is lit here: as soon as another rank knows, it may put it on again.
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
