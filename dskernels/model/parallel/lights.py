"""What streams of several GPUs wait for: lights, on or off, in memory that the others write to.

Whoever waits for a light to be on puts it out. So nobody counts, all are off again when all messages have been read,
and a CUDA graph that does the same again finds them as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dskernels.model.parallel.engines import Step, Steps

OFF, ON = 0, 1


class Lights:
    """Of the slots that messages among some ranks lie in.

    Of each slot every rank has a light for each rank and piece, which is on where that has come (*there*); one for each
    other rank while what it has been sent has not been read (*taken*); and one that is on when all that it sends has
    *left*.

    Args:
        addresses: where each rank's lights are; all are off at first.
        rank: this one.
        pieces: the most of a message.
    """

    def __init__(self, addresses: Sequence[int], rank: int, pieces: int) -> None:
        self.addresses, self.rank, self.pieces = addresses, rank, pieces
        self.others = [other for other in range(len(addresses)) if other != rank]
        self.made: dict[tuple[int, ...], Steps] = {}

    @staticmethod
    def needed(slots: int, ranks: int, pieces: int) -> int:
        """Bytes on each rank."""
        return 4 * slots * ranks * (pieces + 1)

    def until_read(self, slot: int, rank: int) -> Steps:
        """What was in the slot has been read by a rank, and is no longer there."""
        taken = self._taken(self.rank, slot, rank)
        return self._once((0, slot, rank), lambda: [Step("wait", taken, OFF), Step("write", taken, ON)])

    def there(self, slot: int, rank: int, piece: int, *, left: bool = False) -> Steps:
        """A rank may know that a piece is there; `left`: and this one, that all has left."""

        def make() -> list[Step]:
            there = self._there(rank, slot, self.rank, piece)
            lights = (there, self._taken(self.rank, slot, self.rank)) if left else (there,)
            return [Step("write", light, ON) for light in lights]

        return self._once((1, slot, rank, piece, left), make)

    def until_there(
        self, slot: int, piece: int, *, own: bool = False, left: bool = False, read: tuple[int, ...] = ()
    ) -> Steps:
        """A piece has come from all other ranks; `own`: from this one too; `left`: what this one sends has left.

        Before, the others may know of these slots that what they have sent has been read.
        """

        def make() -> list[Step]:
            ranks = [*self.others, self.rank] if own else self.others
            lights = [self._there(self.rank, slot, rank, piece) for rank in ranks]
            if left and self.others:
                lights.append(self._taken(self.rank, slot, self.rank))
            waits = (step for light in lights for step in (Step("wait", light, ON), Step("write", light, OFF)))
            return [*self._have_read(read), *waits]

        return self._once((2, slot, piece, own, left, *read), make)

    def have_read(self, slots: tuple[int, ...]) -> Steps:
        """The other ranks may know of these slots that what they have sent has been read."""
        return self._once((3, *slots), lambda: self._have_read(slots))

    def _have_read(self, slots: tuple[int, ...]) -> list[Step]:
        return [Step("write", self._taken(rank, slot, self.rank), OFF) for slot in slots for rank in self.others]

    def _there(self, at: int, slot: int, source: int, piece: int) -> int:
        return self.addresses[at] + 4 * ((slot * len(self.addresses) + source) * (self.pieces + 1) + piece)

    def _taken(self, at: int, slot: int, reader: int) -> int:
        return self._there(at, slot, reader, self.pieces)

    def _once(self, key: tuple[int, ...], make: Callable[[], list[Step]]) -> Steps:
        found = self.made.get(key)
        if found is None:
            found = self.made[key] = Steps(make())
        return found
