"""Messages by copy engines, all ranks in one process on the CPU: where they lie, and in which orders streams go on."""

import ctypes
import functools
import itertools
import random
import types
import weakref

import numpy as np
import pytest
import torch

from dskernels.model.parallel import copies
from dskernels.model.parallel.copies import SLOTS, CopyEngines
from dskernels.model.parallel.engines import PeerMemory
from dskernels.model.parallel.mail import message_bytes


def move(copy):
    for row in range(copy.rows):
        target, source = copy.target + row * copy.target_pitch, copy.source + row * copy.source_pitch
        ctypes.memmove(target, source, copy.size)


class AtOnce:
    """In place of `Engine` and `Moment`: what a stream would do is done now, and what it would wait for is there."""

    def __init__(self, *_):
        pass

    of = current = classmethod(lambda cls, _: cls())

    def record(self, on):
        pass

    def follow(self, moment):
        pass

    def copy_all(self, copies, *, captured=False):
        for copy in copies:
            move(copy)

    def take(self, steps):
        for kind, address, value in steps.steps:
            light = ctypes.c_uint32.from_address(address)
            if kind == "write":
                light.value = value
            assert light.value == value


@pytest.mark.parametrize("ranks", [2, 3])
def test_messages_lie_where_they_are_read(monkeypatch, ranks):
    """More messages than slots, on the CPU: all ranks in one process."""
    monkeypatch.setattr(copies, "Engine", AtOnce)
    monkeypatch.setattr(copies, "Moment", AtOnce)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    size = message_bytes([(1000, 4 * 513), (1000, 12), (1000, 20)])
    memories = [torch.zeros(CopyEngines.needed(ranks, size), dtype=torch.uint8) for _ in range(ranks)]
    addresses = [memory.data_ptr() for memory in memories]
    mails = []
    for rank, memory in enumerate(memories):
        group = types.SimpleNamespace(size=lambda: ranks, rank=lambda rank=rank: rank)
        mails.append(CopyEngines(group, size, piece=500_000, memory=PeerMemory(memory, addresses, None)))
    for number in range(3 * SLOTS):
        rows, together = (1000, 7, 1, 0)[number % 4], number % 3 == 0
        to = [
            [
                [torch.randint(0, 2**30, (rows, 513)).int(), torch.rand(rows, 3), torch.rand(5, rows + 3)[:, :rows].mT]
                for _ in range(ranks)
            ]
            for _ in range(ranks)
        ]
        for mail in mails:  # which `arriving` does: here one rank sends all before the next waits
            mail.settle()
        sent = [mail.send(to[rank], together=together, columns=(2,)) for rank, mail in enumerate(mails)]
        for rank, (mail, one) in enumerate(zip(mails, sent, strict=True)):
            assert sum(piece.stop - piece.start for piece in mail.arriving(one)) == rows
            wanted = [to[source][rank] for source in range(ranks)]
            found = [mail.from_rank(one, source) for source in range(ranks)]
            assert all(torch.equal(a, b) for x, y in zip(found, wanted, strict=True) for a, b in zip(x, y, strict=True))
            if together:
                whole = [torch.cat(parts) for parts in zip(*wanted, strict=True)]
                assert all(torch.equal(a, b) for a, b in zip(mail.whole(one), whole, strict=True))
            mail.finished(one)
    for mail in mails:
        mail.settle()
    for _ in range(SLOTS):
        mails[0].send(to[0], columns=(2,))
    with pytest.raises(RuntimeError, match="4 messages are under way"):
        mails[0].send(to[0], columns=(2,))


class Part:
    """Something that a stream does.

    Attributes:
        rank: whose stream that is.
        pace: how often it is chosen where others could go on as well.
        function: does it.
        ready: whether it may be done, as far as lights say.
        behind: parts that have to be done before.
        before: parts that wait for it.
    """

    def __init__(self, rank, pace, function, ready, behind):
        self.rank, self.pace, self.function = rank, pace, function
        self.ready, self.behind, self.before = ready, behind, []
        for part in behind:
            part.before.append(self)


class Work:
    """What streams of several ranks do, in one process, on the CPU: it is done later, in any order that they allow.

    Stands in the place of `Engine` (`of`, `current`) and, by `Moment`, of the events between streams.
    """

    def __init__(self, generator):
        self.generator, self.parts, self.mains, self.rank = generator, [], {}, 0

    def of(self, _):
        return OnStream(self, self.rank)

    def current(self, _):
        if self.rank not in self.mains:
            self.mains[self.rank] = self.of(None)
        return self.mains[self.rank]

    def run(self):
        """All of it, once; fails where every stream waits."""
        for part in self._in_order(lambda part: part.ready()):
            part.function()

    def replay(self):
        """Once more, each rank's parts in an order of its own that allows all of them, where one that waits holds up
        all behind it: a device may run a CUDA graph so."""
        left = {}
        for part in self._in_order(lambda part: True):
            left.setdefault(part.rank, []).append(part)
        for parts in left.values():
            parts.reverse()
        while any(left.values()):
            ready = [parts for parts in left.values() if parts and parts[-1].ready()]
            assert ready, "all graphs wait"
            self.generator.choice(ready).pop().function()

    def all_end_with(self, last):
        """Whether all that is done is done before these are."""
        found, left = set(), list(last)
        while left:
            part = left.pop()
            if part not in found:
                found.add(part)
                left += part.behind
        return len(found) == len(self.parts)

    def _in_order(self, ready):
        missing = {part: len(part.behind) for part in self.parts}
        free = [part for part, n in missing.items() if not n]
        while free:
            able = [part for part in free if ready(part)]
            assert able, "all streams wait"
            part = self.generator.choices(able, [part.pace for part in able])[0]
            yield part
            free.remove(part)
            for other in part.before:
                missing[other] -= 1
                if not missing[other]:
                    free.append(other)


class OnStream:
    """A stream of `Work`."""

    def __init__(self, work, rank):
        self.work, self.rank, self.pace, self.last = work, rank, 1e-9 + work.generator.random() ** 4, None

    def call(self, function, ready=lambda: True, after=None):
        behind = {part for part in (self.last, after) if part is not None}
        self.last = Part(self.rank, self.pace, function, ready, behind)
        self.work.parts.append(self.last)

    def copy_all(self, copies, *, captured=False):
        for copy in self.work.generator.sample(copies, len(copies)):
            self.call(functools.partial(move, copy))

    def take(self, steps):
        for kind, address, value in steps.steps:
            light = ctypes.c_uint32.from_address(address)
            if kind == "write":
                self.call(functools.partial(setattr, light, "value", value))
            else:
                self.call(lambda: None, lambda light=light, value=value: light.value == value)

    def follow(self, moment):
        self.call(lambda: None, after=moment.last)


class Reached:
    """In place of `Moment`."""

    def __init__(self, _):
        self.last = None

    def record(self, on):
        self.last = on.last


def drawn(generator):
    """An order in which messages are sent and read, the same on every rank: what, number, and in which way."""
    program, unread, number = [], [], 0
    while number < 4 * SLOTS + 2 or unread:
        more = number < 4 * SLOTS + 2 and len(unread) < SLOTS and number - SLOTS not in unread
        if more and generator.random() < 0.6:
            program.append(("send", number, generator.choice(("apart", "together", "into"))))
            unread.append(number)
            number += 1
        elif unread:
            program.append(("read", unread.pop(generator.randrange(len(unread))), ""))
    return program


def enact(mail, main, program, turn, keeps):
    """Sends and reads on one rank; what is sent says from whom and to whom it is, and the turn when it is written."""

    def value(number, source, to):
        return 1 + 1000 * (number + 100 * turn[0]) + 10 * source + to

    def write(memory, *which):
        memory.fill(value(*which))

    def compare(found, *which):
        assert (found == value(*which)).all(), f"turn {turn[0]}, message, from, to: {which}"

    def memory_of(width, *shape):
        memory = np.zeros((*shape, 8, width), np.int32)  # outlives the tensor, as memory of a GPU does
        keeps.append(memory)
        tensor = torch.from_numpy(memory)
        weakref.finalize(tensor, main.call, functools.partial(memory.fill, -1))  # whoever has it next writes at once
        return memory, tensor

    sent, into = {}, {}
    for what, number, way in program:
        if what == "send":
            parts, firsts = [[] for _ in range(mail.ranks)], {}
            for to, width in itertools.product(range(mail.ranks), (16, 1)):
                memory, tensor = memory_of(width)
                parts[to].append(tensor)
                if width == 16 and to != mail.rank and number % 3 == 0:  # is made as it leaves
                    firsts[to] = memory
                else:
                    main.call(functools.partial(write, memory, number, mail.rank, to))
                del tensor

            def fill(to, piece, firsts=firsts, number=number):
                main.call(functools.partial(write, firsts[to][piece], number, mail.rank, to))

            if way == "into":
                into[number] = [memory_of(width, mail.ranks)[1] for width in (16, 1)]
            together, fill = way == "together", fill if firsts else None
            sent[number] = mail.send(parts, together=together, fill=fill, into=into.get(number))
            del parts
        else:
            one = sent.pop(number)
            list(mail.arriving(one))
            kept = into.pop(number, None)
            if kept is not None:
                mail.finished(one)
            for source in range(mail.ranks):
                for part in mail.from_rank(one, source) if kept is None else [memory[source] for memory in kept]:
                    found = part.detach().view(part.shape)  # another view, which is no tensor that was sent
                    main.call(functools.partial(compare, found, number, source, mail.rank))
            if kept is None:
                mail.finished(one)
            del one, part, found, kept
    mail.settle()


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("captured", [False, True])
def test_nothing_is_read_or_written_too_early(monkeypatch, captured, ranks):
    """Messages are read, slots and memory of what was sent used again, in whatever order streams or graphs go on."""
    generator = random.Random(ranks)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
    monkeypatch.setattr(copies, "Moment", Reached)
    monkeypatch.setattr(copies, "FEWEST_FILLED", 0)
    size = message_bytes([(8, 64), (8, 4)])
    for _ in range(6 if captured else 12):
        work, turn, keeps, program, mails = Work(generator), [0], [], drawn(generator), []
        monkeypatch.setattr(copies, "Engine", work)
        memories = [torch.zeros(CopyEngines.needed(ranks, size), dtype=torch.uint8) for _ in range(ranks)]
        addresses = [memory.data_ptr() for memory in memories]
        for rank in range(ranks):
            work.rank = rank
            group = types.SimpleNamespace(size=lambda: ranks, rank=lambda rank=rank: rank)
            mail = CopyEngines(group, size, piece=200, memory=PeerMemory(memories[rank], addresses, None))
            mails.append(mail)
            enact(mail, work.current(None), program, turn, keeps)
        assert not captured or work.all_end_with(main.last for main in work.mains.values())
        for again in range(4 if captured else 1):
            turn[0] = again
            (work.replay if again % 2 else work.run)()
