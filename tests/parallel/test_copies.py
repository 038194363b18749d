"""Messages by copy engines, between two GPUs or two processes on one, and what is made of them."""

import ctypes
import functools
import itertools
import random
import types
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import reduce_tensor
from world import run

from dskernels.model import Config
from dskernels.model.parallel import copies
from dskernels.model.parallel.copies import ENDS, SLOTS, CopyEngines
from dskernels.model.parallel.engines import PeerMemory, reach_each_other
from dskernels.model.parallel.exchange import pack
from dskernels.model.parallel.expert import ExpertParallel
from dskernels.model.parallel.fixed import largest_message
from dskernels.model.parallel.mail import Collective, message_bytes
from dskernels.model.parallel.overlap import overlapped
from dskernels.types import Routing


def needs(gpus):
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")


def memory_of_one_gpu(cls, group, size):
    """In place of symmetric memory, which wants a GPU for each rank: mapped by CUDA's handles between processes."""
    own = torch.zeros(size, dtype=torch.uint8, device="cuda:0")
    torch.cuda.synchronize()
    rebuilt = [None] * group.size()
    dist.all_gather_object(rebuilt, reduce_tensor(own), group=group)
    every = [own if rank == group.rank() else build(*args) for rank, (build, args) in enumerate(rebuilt)]
    dist.barrier(group=group)
    return cls(own, [tensor.data_ptr() for tensor in every], every)


class Plain(Collective):
    """By `torch.distributed` through the CPU, where gloo is."""

    def send(self, outgoing, *, together=False, fill=None):
        for rank in range(self.ranks):
            if fill is not None and rank != self.rank:
                fill(rank, slice(0, len(outgoing[rank][0])))
        sent = super().send([[part.cpu() for part in parts] for parts in outgoing], together=together)
        sent.work.wait()
        return sent._replace(work=None)

    def of_all(self, sent):
        return super().of_all(sent).cuda()

    def from_rank(self, sent, rank):
        return [part.cuda() for part in super().from_rank(sent, rank)]


def begin(rank, gpus):
    """The device, and what messages are compared with. What it replaces ends with the world's processes."""
    device, group = torch.device("cuda", rank % gpus), dist.group.WORLD
    torch.cuda.set_device(device)
    if gpus > 1:
        assert reach_each_other(group)
        return device, Collective(group)
    PeerMemory.shared = classmethod(memory_of_one_gpu)
    return device, Plain(group)


# ---- messages -------------------------------------------------------------------------------------------------------


def letters(rank, device, plain):
    """More messages than slots, of several sizes, in pieces, each read late and then again in time."""
    group = dist.group.WORLD
    rows, width = 1000, 513
    size = message_bytes([(rows, 4 * width), (rows, 16)])
    mail = CopyEngines(group, size, piece=rows * width)  # three pieces
    assert SLOTS == 4
    generator = torch.Generator(device).manual_seed(rank)

    def message(n):
        first = torch.randint(0, 2**30, (n, width), device=device, generator=generator, dtype=torch.int32)
        return [first, pack(torch.rand(n, 3, device=device, generator=generator))]

    def read(mail, sent, together):
        pieces = list(mail.arriving(sent))
        parts = mail.whole(sent) if together else mail.from_rank(sent, 1 - rank)
        found = [part.clone() for part in parts]
        mail.finished(sent)
        return found, pieces

    for round_ in range(12):
        sizes = [(rows, 7, 1)[(round_ + i) % 3] for i in range(3)]  # three are under way at once
        together = [(round_ + i) % 2 == 0 for i in range(3)]
        messages = [[message(n), message(n)] for n in sizes]
        torch.cuda._sleep(int(2e6) * ((rank + round_) % 2))  # now the one is late, now the other
        sent = [mail.send(both, together=one) for both, one in zip(messages, together, strict=True)]
        wanted = [
            read(plain, plain.send(both, together=one), one)[0] for both, one in zip(messages, together, strict=True)
        ]
        for one, want, all_of_it in zip(sent, wanted, together, strict=True):
            found, pieces = read(mail, one, all_of_it)
            assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
            assert sum(piece.stop - piece.start for piece in pieces) * (1 + all_of_it) == want[0].shape[0]
            assert len(pieces) <= len(ENDS)
    with pytest.raises(ValueError, match="outgoing: expected at most"):
        mail.send([message(2 * rows)] * 2)
    with pytest.raises(ValueError, match="sent together"):
        mail.whole(sent[0] if not together[0] else sent[1])
    graph = torch.cuda.CUDAGraph()
    big = [message(rows)] * 2
    with pytest.raises(RuntimeError, match="cannot be in a CUDA graph"), torch.cuda.graph(graph):
        mail.send(big)


def layers(rank, device, plain):
    """An expert-parallel layer by copy engines has the bits of the others, forward and backward."""
    group = dist.group.WORLD
    experts, hidden, inner, k, capacity = 16, 1024, 256, 4, 4096
    mail = CopyEngines(group, largest_message(capacity, hidden, k, torch.bfloat16))
    ways_to_send = [dict(mail=plain, tokens=capacity), dict(mail=mail, tokens=capacity)]
    if not isinstance(plain, Plain):
        ways_to_send.append({})  # counted
    torch.manual_seed(3)
    w13, w2 = (
        (torch.randn(experts, *shape, device=device) / 32).bfloat16()
        for shape in ((2 * inner, hidden), (hidden, inner))
    )
    own = slice(rank * experts // 2, (rank + 1) * experts // 2)
    torch.manual_seed(10 + rank)
    for wire, fp8, n in (
        ("same", False, 4096),
        ("fp8", True, 3000 + rank),
        ("same", True, 5 * rank),
        ("same", True, 4096 - rank),
        ("fp8", False, 4096),
    ):
        x = torch.randn(n, hidden, device=device).bfloat16()
        ids = torch.rand(n, experts, device=device).topk(k).indices.int()
        ids[::7, 1] = -1
        none = ids.new_empty(0)
        gates, dout = torch.rand(n, k, device=device), torch.randn(n, hidden, device=device).bfloat16()
        found = []
        for options in (*ways_to_send, ways_to_send[1]):
            compute = ExpertParallel(group, experts, wire=wire, **options)
            leaves = [t.clone().requires_grad_() for t in (x, gates, w13[own], w2[own])]
            out = compute(leaves[0], *leaves[2:], Routing(leaves[1], ids, none, none), fp8=fp8)
            out.backward(dout)
            with torch.no_grad():  # what came is read where it came
                again = compute(leaves[0], *leaves[2:], Routing(leaves[1], ids, none, none), fp8=fp8)
            assert n < 2000 or torch.equal(out, again), "quantised where they are, or where they come, tokens differ"
            found.append([out.detach(), *(leaf.grad for leaf in leaves), again])
        for again in found[1:]:
            for a, b, name in zip(found[0], again, ("out", "dx", "dgates", "dw13", "dw2", "again"), strict=True):
                assert torch.equal(a, b), f"{name} of wire {wire}, fp8 {fp8}: {(a - b).abs().max()}"

    class Three(torch.nn.Module):
        def __init__(self):
            super().__init__()
            from dskernels.model.moe import MoE

            with torch.device("meta"):
                self.moe = MoE(Config.from_name("tiny"), False)
            self.moe.experts.compute = ExpertParallel(group, experts, mail=mail, tokens=capacity)

        def forward(self, x, ids, gates):
            none = ids.new_empty(0)
            for _ in range(3):
                x = self.moe.experts.compute(x, w13[own], w2[own], Routing(gates, ids, none, none))
            return x

    model = Three()
    halves = [(x[i::2].contiguous(), ids[i::2].contiguous(), gates[i::2].contiguous()) for i in range(2)]
    with torch.no_grad():
        wanted = [model(*half) for half in halves]
        for _ in range(3):
            together = overlapped(model, [lambda half=half: model(*half) for half in halves])
            assert all(torch.equal(a, b) for a, b in zip(together, wanted, strict=True))


class AtOnce:
    """In place of `Engine` and `Moment`: what a stream would do is done now, and what it would wait for is there."""

    def __init__(self, *_):
        pass

    of = current = classmethod(lambda cls, _: cls())

    def record(self, on):
        pass

    def follow(self, moment):
        pass

    def copy(self, target, source, size):
        ctypes.memmove(target, source, size)

    def write(self, address, value):
        ctypes.c_uint32.from_address(address).value = value

    def wait(self, address, value):
        assert ctypes.c_uint32.from_address(address).value >= value


@pytest.mark.parametrize("ranks", [2, 3])
def test_messages_lie_where_they_are_read(monkeypatch, ranks):
    """More messages than slots, on the CPU: all ranks in one process."""
    monkeypatch.setattr(copies, "Engine", AtOnce)
    monkeypatch.setattr(copies, "Moment", AtOnce)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    size = message_bytes([(1000, 4 * 513), (1000, 12)])
    memories = [torch.zeros(CopyEngines.needed(ranks, size), dtype=torch.uint8) for _ in range(ranks)]
    addresses = [memory.data_ptr() for memory in memories]
    mails = []
    for rank, memory in enumerate(memories):
        group = types.SimpleNamespace(size=lambda: ranks, rank=lambda rank=rank: rank)
        mails.append(CopyEngines(group, size, piece=500_000, memory=PeerMemory(memory, addresses, None)))
    for number in range(3 * SLOTS):
        rows, together = (1000, 7, 1, 0)[number % 4], number % 3 == 0
        to = [
            [[torch.randint(0, 2**30, (rows, 513)).int(), torch.rand(rows, 3)] for _ in range(ranks)]
            for _ in range(ranks)
        ]
        for mail in mails:  # which `send` does: here one rank sends all before the next
            mail.tell_read()
        sent = [mail.send(to[rank], together=together) for rank, mail in enumerate(mails)]
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
        mail.tell_read()
    for _ in range(SLOTS):
        mails[0].send(to[0])
    with pytest.raises(RuntimeError, match="4 messages are under way"):
        mails[0].send(to[0])


class Queues:
    """Streams of several ranks in one process, on the CPU: what is on them is done later, in any order that they allow.

    Stands in the place of `Engine` (`of`, `current`) and, by `Moment`, of the events between streams.
    """

    def __init__(self, generator):
        self.generator, self.queues, self.mains, self.rank = generator, [], {}, 0

    def of(self, _):
        self.queues.append(OnQueue([]))
        return self.queues[-1]

    def current(self, _):
        if self.rank not in self.mains:
            self.mains[self.rank] = self.of(None)
        return self.mains[self.rank]

    def run(self):
        """All of it; fails where every stream waits."""
        speeds = {id(queue): self.generator.random() ** 4 for queue in self.queues}
        while waiting := [queue for queue in self.queues if queue.work]:
            ready = [queue for queue in waiting if queue.work[0][0]()]
            assert ready, "all streams wait"
            self.generator.choices(ready, [speeds[id(queue)] for queue in ready])[0].work.pop(0)[1]()


class OnQueue:
    """A stream of `Queues`."""

    def __init__(self, work):
        self.work = work

    def call(self, function, ready=lambda: True):
        self.work.append((ready, function))

    def copy(self, target, source, size):
        self.call(lambda: ctypes.memmove(target, source, size))

    def write(self, address, value):
        self.call(lambda: setattr(ctypes.c_uint32.from_address(address), "value", value))

    def wait(self, address, value):
        self.call(lambda: None, lambda: ctypes.c_uint32.from_address(address).value >= value)

    def follow(self, moment):
        number = moment.asked
        self.call(lambda: None, lambda: moment.reached >= number)


class Reached:
    """In place of `Moment`."""

    def __init__(self, _):
        self.asked = self.reached = 0

    def record(self, on):
        self.asked += 1
        on.call(lambda number=self.asked: setattr(self, "reached", number))


@pytest.mark.parametrize("ranks", [2, 3])
def test_nothing_is_read_or_written_too_early(monkeypatch, ranks):
    """Messages are read, slots and memory of what was sent used again, in whatever order streams go on."""
    generator = random.Random(ranks)

    def compare(found, value):
        assert (found == value).all(), f"message {value // 100} from {value // 10 % 10} to {(value - 1) % 10}"

    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(copies, "Moment", Reached)
    monkeypatch.setattr(copies, "FEWEST_FILLED", 0)
    size, rows = message_bytes([(8, 64), (8, 4)]), 8
    for _ in range(12):
        queues = Queues(generator)
        monkeypatch.setattr(copies, "Engine", queues)
        memories = [torch.zeros(CopyEngines.needed(ranks, size), dtype=torch.uint8) for _ in range(ranks)]
        addresses = [memory.data_ptr() for memory in memories]
        program, unread, number = [], [], 0
        while number < 4 * SLOTS or unread:
            if number < 4 * SLOTS and len(unread) < SLOTS and number - SLOTS not in unread and generator.random() < 0.6:
                program.append(("send", number, generator.random() < 0.5))
                unread.append(number)
                number += 1
            elif unread:
                program.append(("read", unread.pop(generator.randrange(len(unread))), False))
        keeps, mails = [], []
        for rank in range(ranks):
            queues.rank = rank
            group = types.SimpleNamespace(size=lambda: ranks, rank=lambda rank=rank: rank)
            mail = CopyEngines(group, size, piece=200, memory=PeerMemory(memories[rank], addresses, None))
            mails.append(mail)
            main, sent = queues.current(None), {}
            for what, number, together in program:
                if what == "send":
                    parts, firsts = [[] for _ in range(ranks)], {}
                    for to, width in itertools.product(range(ranks), (16, 1)):
                        memory = np.zeros((rows, width), np.int32)  # outlives the tensor, as memory of a GPU does
                        keeps.append(memory)
                        parts[to].append(torch.from_numpy(memory))
                        value = 1 + number * 100 + rank * 10 + to
                        if width == 16 and to != rank and number % 3 == 0:  # is made as it leaves
                            firsts[to] = memory, value
                        else:
                            main.call(functools.partial(memory.fill, value))
                        # Whoever has it next writes to it at once.
                        weakref.finalize(parts[to][-1], main.call, functools.partial(memory.fill, -1))

                    def fill(to, piece, firsts=firsts, main=main):
                        main.call(functools.partial(firsts[to][0][piece].fill, firsts[to][1]))

                    sent[number] = mail.send(parts, together=together, fill=fill if firsts else None)
                    del parts
                else:
                    one = sent.pop(number)
                    list(mail.arriving(one))
                    for source in range(ranks):
                        value = 1 + number * 100 + source * 10 + rank
                        for part in mail.from_rank(one, source):
                            found = part.detach().view(part.shape)  # another view, which is no tensor that was sent
                            main.call(functools.partial(compare, found, value))
                    mail.finished(one)
                    del one, part, found
        queues.run()


def exchanges(rank, gpus):
    device, plain = begin(rank, gpus)
    letters(rank, device, plain)
    layers(rank, device, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("gpus", [1, 2])
def test_copy_engines(gpus):
    needs(gpus)
    run(2, exchanges, gpus, gpus=gpus > 1)
