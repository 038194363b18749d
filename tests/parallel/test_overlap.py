"""Two micro-batches at once: the numbers of one after the other, and messages that travel under computation."""

import pytest
import torch
import torch.distributed as dist
from world import run

from dskernels.model.parallel import expert
from dskernels.model.parallel.mail import Collective
from dskernels.model.parallel.overlap import overlapped
from dskernels.model.parallel.plan import Plan, Team, expert_modules, parallelize
from dskernels.types import Routing
from model.tiny import tiny_model


def events(monkeypatch):
    """Notes when messages begin and end, by the trip that they belong to."""
    seen, names = [], {}

    def noted(kind, original):
        def call(trip, *args):
            names.setdefault(id(trip), len(names))
            seen.append((kind, id(trip)))
            return original(trip, *args)

        return call

    for kind, name in (("begin", "_begin"), ("end", "_take")):
        original = getattr(expert.Trip, name)
        monkeypatch.setattr(expert.Trip, name, noted(kind, original))
    return seen


def under_way(seen):
    """How many messages have another begin or end while they travel."""
    count = 0
    for i, (kind, trip) in enumerate(seen):
        if kind == "begin":
            end = next(j for j in range(i + 1, len(seen)) if seen[j] == ("end", trip))
            count += end > i + 1
    return count


def both(rank):
    with pytest.MonkeyPatch.context() as monkeypatch:
        torch.manual_seed(0)
        model = tiny_model(num_hidden_layers=3, n_routed_experts=8, num_experts_per_tok=3, vocab_size=64)
        team = Team.start(Plan(expert=2, reshard=False), "cpu")
        parallelize(model, team)
        generator = torch.Generator().manual_seed(rank)
        texts = [torch.randint(0, 64, (n,), generator=generator) for n in (7, 9)]

        def losses():
            return [lambda text=text: model(text, mtp=True).mtp_logits[0].square().mean() for text in texts]

        def gradients(values):
            sum(values).backward()
            found = [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]
            model.zero_grad()
            return found

        one_by_one = [loss() for loss in losses()]
        wanted = gradients(one_by_one)
        seen = events(monkeypatch)
        together = overlapped(model, losses())
        assert all(torch.equal(a, b) for a, b in zip(together, one_by_one, strict=True))
        messages = len(seen) // 2
        assert messages == 2 * 2 * 3  # two micro-batches, there and back, three layers with experts
        assert under_way(seen) >= messages - 1
        seen.clear()
        for got, want in zip(gradients(together), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        assert len(seen) // 2 == messages
        assert under_way(seen) >= messages - 1

        unshared(rank)

        def fail():
            raise ValueError("no text")

        with pytest.raises((ValueError, RuntimeError), match="no text"):
            overlapped(model, [fail, lambda: 0.0])
        dist.barrier()


def unshared(rank):
    """Without a shared expert, in messages of a fixed size, the last micro-batch's sums leave as they are made."""
    group = dist.group.WORLD
    compute = expert.ExpertParallel(group, 8, mail=Collective(group), tokens=6)
    model = tiny_model(num_hidden_layers=1, n_routed_experts=8)
    moe, _ = next(iter(expert_modules(model)))
    moe.compute = compute
    generator = torch.Generator().manual_seed(rank)
    w13, w2 = torch.randn(4, 32, 16, generator=generator), torch.randn(4, 16, 16, generator=generator)
    xs = [torch.randn(n, 16, generator=generator) for n in (6, 5)]
    ids = [torch.rand(len(x), 8, generator=generator).argsort(1)[:, :3].int() for x in xs]

    def layers(x, ids):
        for _ in range(3):
            x = compute(x, w13, w2, Routing(torch.ones(ids.shape), ids, ids[0], ids[0])) / 8
        return x

    wanted = [layers(x, chosen) for x, chosen in zip(xs, ids, strict=True)]
    found = overlapped(model, [lambda x=x, i=i: layers(x, i) for x, i in zip(xs, ids, strict=True)])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_two_ranks():
    run(2, both)
