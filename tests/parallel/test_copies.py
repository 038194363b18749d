"""Messages by copy engines, between two GPUs or two processes on one, and what is made of them."""

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import reduce_tensor
from world import run

from dskernels.model import Config
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

    def send(self, outgoing, *, together=False, fill=None, columns=(), into=None):
        for rank in range(self.ranks):
            if fill is not None and rank != self.rank:
                fill(rank, slice(0, len(outgoing[rank][0])))
        sent = super().send([[part.cpu() for part in parts] for parts in outgoing], together=together)
        sent.work.wait()
        return sent._replace(work=None, into=into)

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
    size = message_bytes([(rows, 4 * width), (rows, 16), (rows, 12)])
    mail = CopyEngines(group, size, piece=rows * width)  # three pieces
    assert SLOTS == 4
    generator = torch.Generator(device).manual_seed(rank)

    def message(n):
        first = torch.randint(0, 2**30, (n, width), device=device, generator=generator, dtype=torch.int32)
        scales = torch.rand(3, n + n % 4, device=device, generator=generator)[:, :n].mT
        return [first, pack(torch.rand(n, 3, device=device, generator=generator)), scales]

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
        sent = [mail.send(both, together=one, columns=(2,)) for both, one in zip(messages, together, strict=True)]
        wanted = [
            read(plain, plain.send(both, together=one), one)[0] for both, one in zip(messages, together, strict=True)
        ]
        for one, want, all_of_it in zip(sent, wanted, together, strict=True):
            found, pieces = read(mail, one, all_of_it)
            assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
            assert sum(piece.stop - piece.start for piece in pieces) * (1 + all_of_it) == want[0].shape[0]
            assert len(pieces) <= len(ENDS)
    with pytest.raises(ValueError, match="outgoing: expected at most"):
        mail.send([message(2 * rows)] * 2, columns=(2,))
    with pytest.raises(ValueError, match="sent together"):
        mail.whole(sent[0] if not together[0] else sent[1])
    with pytest.raises(ValueError, match="into: expected of a message of rows"):
        mail.send(messages[0], columns=(2,), into=[])
    kept(mail, message, read, plain)
    captured(mail, message, read, plain)


def kept(mail, message, read, plain):
    """What comes is copied to other memory while something else runs, in a CUDA graph too."""

    def both_ways(messages):
        sent = []
        for both in messages:
            into = [part.new_full((2, *part.shape), -1) for part in both[0]]
            sent.append((mail.send(both, into=into), into))
            torch.cuda._sleep(int(1e5) * mail.rank)
        for one, _ in sent:
            list(mail.arriving(one))
            mail.finished(one)
        return [into for _, into in sent]

    def wanted(both):
        return [read(plain, plain.send(both), False)[0], both[mail.rank]]

    def check(messages, found):
        for both, into in zip(messages, found, strict=True):
            for rank, want in zip((1 - mail.rank, mail.rank), wanted(both), strict=True):
                assert all(torch.equal(memory[rank], part) for memory, part in zip(into, want, strict=True))

    for rows in (1000, 3, 0, 1000, 1):
        messages = [[message(rows)[:2], message(rows)[:2]] for _ in range(3)]
        check(messages, both_ways(messages))
    messages, graph = [[message(1000)[:2], message(1000)[:2]] for _ in range(3)], torch.cuda.CUDAGraph()
    mail.settle()
    with torch.cuda.graph(graph):
        found = both_ways(messages)
        mail.settle()
    for _ in range(3):
        for both in messages:
            for part in (part for parts in both for part in parts):
                part.copy_(message(1000)[0] if part.shape[1] == 513 else part)
        for memory in (memory for into in found for memory in into):
            memory.fill_(-1)
        graph.replay()
        check(messages, found)


def captured(mail, message, read, plain):
    """More messages than slots in a CUDA graph, replayed with other numbers, and messages outside in between."""
    rows, graph = 1000, torch.cuda.CUDAGraph()
    both = [message(rows), message(rows)]
    mail.settle()
    with torch.cuda.graph(graph):
        found = []
        for pair in range(3):
            sent = [mail.send(both, together=(i + pair) % 2 == 0, columns=(2,)) for i in range(2)]
            found += [read(mail, one, (i + pair) % 2 == 0)[0] for i, one in enumerate(sent)]
        mail.settle()
    for replay in range(4):
        for parts, others in zip(both, [message(rows), message(rows)], strict=True):
            for part, other in zip(parts, others, strict=True):
                part.copy_(other)
        graph.replay()
        for i, got in enumerate(found):
            together = (i % 2 + i // 2) % 2 == 0
            want = read(plain, plain.send(both, together=together), together)[0]
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), (replay, i)
        if replay % 2:
            outside = mail.send(both, columns=(2,))
            want = read(plain, plain.send(both), False)[0]
            assert all(torch.equal(a, b) for a, b in zip(read(mail, outside, False)[0], want, strict=True))
            mail.settle()
    outside = mail.send(both, columns=(2,))
    with pytest.raises(RuntimeError, match="in the same CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        next(iter(mail.arriving(outside)))
    read(mail, outside, False)


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
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # micro-batches have threads of their own
            together = overlapped(model, [lambda half=half: model(*half) for half in halves])
        for _ in range(3):
            for out in together:
                out.fill_(float("nan"))
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(together, wanted, strict=True))


def exchanges(rank, gpus):
    device, plain = begin(rank, gpus)
    letters(rank, device, plain)
    layers(rank, device, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("gpus", [1, 2])
def test_copy_engines(gpus):
    needs(gpus)
    run(2, exchanges, gpus, gpus=gpus > 1)
