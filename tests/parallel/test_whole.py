"""Weights that ranks have whole: what each updates a part of is what one process updates."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from world import case, run

from dskernels.model.optimizer import MasterAdamW, clipping
from dskernels.model.parallel import whole
from dskernels.model.parallel.plan import Plan, Team
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
