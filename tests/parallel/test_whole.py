"""Weights that ranks have whole: what each updates a part of is what one process updates."""

import copy
import functools
import random
from types import SimpleNamespace

import pytest
import torch
from streams import Queues, Reached
from torch import nn
from world import case, run

from dskernels.model.optimizer import MasterAdamW, clipping
from dskernels.model.parallel import shares, whole
from dskernels.model.parallel.engines import PeerMemory
from dskernels.model.parallel.plan import Plan, Team
from dskernels.model.parallel.shares import CopiedShares
from dskernels.model.parallel.whole import WholeAdamW

STEPS, MICROBATCHES = 3, 2
RECIPE = dict(betas=(0.9, 0.95), weight_decay=0.1, moments=torch.float32)


class Model(nn.Module):
    """Rows that two ranks share, three that they do not, a vector, experts, and a matrix that nothing reaches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(6, 8)
        self.odd = nn.Linear(8, 3, bias=False)
        self.mlp = nn.Module()
        self.mlp.experts = nn.Module()
        self.mlp.experts.w2 = nn.Parameter(torch.randn(2, 3, 4))
        self.unused = nn.Parameter(torch.randn(4, 2))

    def forward(self, x):
        y = self.odd(self.first(x).tanh())
        return torch.einsum("tk,ekn->tn", y, self.mlp.experts.w2).square().sum()


def text(step, rank, i, like):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(100 * step + 10 * rank + i))
    return x.to(like)


def check(rank, dtype, late, device="cpu"):
    team = Team.start(Plan(data=2), device)
    alone = Model().to(device)
    together = copy.deepcopy(alone).to(dtype)
    alone.to(dtype)
    one, two = MasterAdamW(alone, **RECIPE), WholeAdamW(dict(together.named_parameters()), team, **RECIPE)
    assert two.flat.numel() < one.flat.numel()
    if not late:
        assert len(two._buckets) > 2
    for step in range(STEPS):
        for of_rank in range(2):
            for i in range(MICROBATCHES):
                alone(text(step, of_rank, i, alone.unused)).backward()
                one.collect()
        for i in range(MICROBATCHES):
            if i + 1 == MICROBATCHES and not late:
                two.last()
            together(text(step, rank, i, alone.unused)).backward()
            two.collect()
        two.reduce()
        torch.testing.assert_close(two.norm(), one.norm())
        before = together.first.weight._version
        for optimizer in (one, two):
            optimizer.step(0.05, clipping(optimizer.norm(), 0.5))
        assert together.first.weight._version > before  # who keeps its e4m3 copy has to know
        wanted = dict(alone.named_parameters())
        for name, parameter in together.named_parameters():
            with case(f"step {step}: {name}"):
                torch.testing.assert_close(
                    parameter, wanted[name], rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
                )
        for name, rows in two.named(two.flat).items():
            first, total = two.place(name)
            assert total == wanted[name].shape[0]
            masters = one.named(one.flat)[name]
            torch.testing.assert_close(rows, masters[first : first + rows.shape[0]], rtol=1e-2, atol=1e-5)
            assert (rows.shape[0] < total) == two._spread(name)
    return [name for name in two.names if two.writes(name)]


def checks(rank, gpus=False):
    whole.BUCKET, device = 20, f"cuda:{rank}" if gpus else "cpu"
    found = []
    for dtype, late in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
        with case(f"{dtype}, {late}"):
            found.append(check(rank, dtype, late, device))
    return found


def test_ranks_update_what_one_process_does():
    first, second = run(2, checks)
    assert set(first[0]) == set(dict(Model().named_parameters()))
    assert set(second[0]) == {"first.weight", "mlp.experts.w2", "unused"}  # of the others the first writes all


@pytest.mark.gpu
def test_two_gpus_update_what_one_does_by_copy_engines():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    run(2, checks, True, gpus=True)


def test_pipelines_add_up_what_they_have_made_later():
    """Gradients that are put into ``.grad``, after a backward, are collected too; one rank waits for none."""
    model = Model()
    mesh = SimpleNamespace(size=lambda: 1)
    team = SimpleNamespace(group=lambda name: mesh, place=lambda name: 0, plan=Plan(), total=lambda x, name="batch": x)
    optimizer, wanted = WholeAdamW(dict(model.named_parameters()), team, **RECIPE), copy.deepcopy(model)
    for i in range(MICROBATCHES):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, i + 1.0)
        optimizer.collect()
    optimizer.reduce()
    for gradient in optimizer.gradients().values():
        assert torch.equal(gradient, torch.full_like(gradient, 3.0))
    reference = MasterAdamW(wanted, **RECIPE)
    for parameter in wanted.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    reference.collect()
    for each in (optimizer, reference):
        each.step(0.1)
    for parameter, expected in zip(model.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected)
    assert optimizer.norm() == pytest.approx(float(reference.norm()))


def test_shares_are_not_read_or_written_too_early(monkeypatch):
    """Four ranks, experts shared by two of them, in whatever order their streams go on."""
    generator, ranks, steps = random.Random(0), 4, 3
    buckets = [["a.weight", "b.experts.w2"], ["c.weight"]]
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: None)
    monkeypatch.setattr(shares, "Moment", Reached)
    monkeypatch.setattr(shares.dist, "get_process_group_ranks", lambda group: group.ranks)
    for _ in range(6):
        queues, met = Queues(generator), set()
        monkeypatch.setattr(shares, "Engine", queues)
        memories: list[torch.Tensor] = []

        def shared(group, size, memories=memories):
            if not memories:
                memories += [torch.zeros(size, dtype=torch.uint8) for _ in range(ranks)]
            return PeerMemory(memories[group.rank()], [memory.data_ptr() for memory in memories], None)

        def team_of(rank):
            of = {"batch": [*range(ranks)], "data": [rank % 2, rank % 2 + 2]}

            def group(way, of=of):
                ranks = of[way]
                return SimpleNamespace(ranks=ranks, size=lambda: len(ranks), rank=lambda: ranks.index(rank))

            return SimpleNamespace(group=group), of

        def value(step, rank, name, row):
            return 1.0 + 1000 * step + 100 * rank + 10 * row + len(name)

        def fill(tensor, values):
            tensor.copy_(torch.tensor(values)[:, None].expand_as(tensor))

        def compare(tensor, values, about):
            assert torch.equal(tensor, torch.tensor(values)[:, None].expand_as(tensor)), about

        for rank in range(ranks):
            queues.rank = rank
            team, of = team_of(rank)
            rows = {"a.weight": 8, "b.experts.w2": 4, "c.weight": 4}
            weights = {name: nn.Parameter(torch.zeros(n, 3)) for name, n in rows.items()}
            share = CopiedShares(team, weights, buckets, memory=shared)
            main = queues.current(None)
            totals = {name: torch.zeros(n, 3) for name, n in rows.items()}
            sharing = {name: of[shares.dimension(name)] for name in rows}
            each = {name: n // len(sharing[name]) for name, n in rows.items()}
            first = {name: sharing[name].index(rank) * each[name] for name in rows}
            mine = {name: torch.zeros(each[name], 3) for name in rows}

            def summed(parts, *, out, main=main):
                main.call(lambda: out.copy_(torch.stack(list(parts)).sum(0)))

            monkeypatch.setattr(shares, "sum_ranks", summed)
            for step in range(steps):
                for place in (1, 0):
                    for name in buckets[place]:
                        made = [value(step, rank, name, row) for row in range(rows[name])]
                        main.call(functools.partial(fill, totals[name], made))
                    share.send_gradients(place, totals, mine)
                share.gradients(totals, mine)
                for name in rows:
                    own = range(first[name], first[name] + each[name])
                    wanted = [sum(value(step, other, name, row) for other in sharing[name]) for row in own]
                    main.call(functools.partial(compare, mine[name], wanted, f"{step} {rank} {name}"))
                main.call(functools.partial(met.add, (step, rank)))  # the norm of the gradient
                main.call(lambda: None, lambda step=step, met=met: all((step, r) in met for r in range(ranks)))
                for name in rows:  # those who read them have ended
                    main.call(functools.partial(totals[name].fill_, -1.0))
                for place in (0, 1):
                    given = {name: weights[name].data[first[name] :][: each[name]] for name in buckets[place]}
                    for name, data in given.items():
                        made = [value(step, rank, name, row) for row in range(first[name], first[name] + each[name])]
                        main.call(functools.partial(fill, data, made))
                    share.send_weights(place, given)
                share.arrived()
                for name in rows:
                    wanted = [value(step, sharing[name][i // each[name]], name, i) for i in range(rows[name])]
                    main.call(functools.partial(compare, weights[name].data, wanted, f"{step} {rank} {name}"))
        queues.run()
