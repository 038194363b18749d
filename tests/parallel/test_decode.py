"""Generation on several ranks: the tokens of one process, and messages whose size nothing decides."""

import copy

import pytest
import torch
import torch.distributed as dist
from world import run

import dskernels as ds
from dskernels.model import generate
from dskernels.model.parallel.decode import DecodeExperts, parallelize_decode
from dskernels.model.parallel.plan import Plan, Team
from dskernels.types import Routing
from model.tiny import tiny_model

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6]]


def both(rank):
    torch.manual_seed(0)
    whole = tiny_model(num_hidden_layers=2, n_routed_experts=8, num_experts_per_tok=3, vocab_size=64)
    team = Team.start(Plan(tensor=2), "cpu")
    model = parallelize_decode(copy.deepcopy(whole), team)
    assert sum(p.numel() for p in model.parameters()) < 0.7 * sum(p.numel() for p in whole.parameters())
    tokens = torch.tensor(PROMPTS[0])
    torch.testing.assert_close(model(tokens).logits, whole(tokens).logits, rtol=1e-4, atol=1e-4)
    for options in (dict(drafts=1), dict(temperature=0.8, seed=7)):
        texts = [generate(m, PROMPTS, max_new_tokens=6, **options).tokens for m in (model, whole)]
        assert texts[0] == texts[1]

    in_the_model(rank, whole)
    fixed_size(rank, "same", 1e-5)
    fixed_size(rank, "fp8", 0.06)  # a number of e4m3 is off by 2^-4 of itself at most


def in_the_model(rank, whole):
    """It takes what the model hands to whatever multiplies its experts."""
    moe = copy.deepcopy(whole.layers[-1].mlp)
    own = slice(4 * rank, 4 * rank + 4)
    moe.experts.w13, moe.experts.w2 = (torch.nn.Parameter(w[own].detach()) for w in (moe.experts.w13, moe.experts.w2))
    moe.experts.compute = DecodeExperts(dist.group.WORLD, 8)
    x = torch.randn(2, 5, moe.experts.w13.shape[2], generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(moe(x[rank])[0], whole.layers[-1].mlp(x[rank])[0], rtol=1e-4, atol=1e-5)


def fixed_size(rank, wire, tolerance):
    generator = torch.Generator().manual_seed(1)
    w13, w2, s13, s2 = (
        torch.randn(*shape, generator=generator) / 8 for shape in ((8, 64, 32), (8, 32, 32), (64, 32), (32, 32))
    )
    x, gates = torch.randn(2, 5, 32, generator=generator), torch.rand(2, 5, 3, generator=generator)
    ids = torch.randint(-1, 8, (2, 5, 3), generator=generator).int()
    none, own = ids.new_empty(0), slice(4 * rank, 4 * rank + 4)
    routing = Routing(gates[rank], ids[rank], none, none)
    got = DecodeExperts(dist.group.WORLD, 8, wire=wire)(x[rank], w13[own], w2[own], routing, shared=(s13, s2))
    want = ds.fused_experts(x[rank], w13, w2, routing, shared=(s13, s2))
    assert (got - want).norm() <= tolerance * want.norm()


def test_two_ranks():
    run(2, both)


def test_bad_numbers_name_themselves():
    class Group:
        def size(self):
            return 3

    with pytest.raises(ValueError, match="n_experts: 3 ranks do not divide 8"):
        DecodeExperts(Group(), 8)
