"""One model spread over ranks: losses, loads and gradients of each plan equal to one process."""

import copy

import pytest
import torch
from world import case, run

from dskernels.cli.together import parse_plan
from dskernels.model import Config, DeepseekV3
from dskernels.model.data import Packed
from dskernels.model.loss import losses
from dskernels.model.parallel.pipeline import Pipeline, split
from dskernels.model.parallel.plan import Plan, Team, most_ranks, parallelize
from dskernels.model.parallel.shards import local
from model.tiny import randomize, tiny_model

LAYERS, TOKENS = 4, 12
MTP, BALANCE = 0.3, 0.01


def batch(i, device="cpu"):
    """Text number i; each has as many predictions as any other."""
    generator = torch.Generator().manual_seed(i)
    text = Packed(
        torch.randint(0, 64, (TOKENS,), generator=generator), torch.tensor([0, 3 + i % 6, TOKENS], dtype=torch.int32)
    )
    return text.to(device)


def forward(model, text, share):
    output = model(*text, mtp=True)
    parts = torch.stack(losses(output, text, model.config, balance_alpha=BALANCE)) * share
    return parts, torch.stack([router.routing.load for router in output.routers])


def one_process(model, n, device):
    sums, load = torch.zeros(3, device=device), 0
    for i in range(n):
        parts, here = forward(model, batch(i, device), 1 / n)
        (parts[0] + MTP * parts[1] + parts[2]).backward()
        sums += parts.detach()
        load = load + here
    return sums, load


def in_parallel(model, team, schedule, microbatches):
    """The same over the ranks: losses, loads, and this rank's parameters by name."""
    n, place = microbatches * team.plan.batches, team.place("batch") * microbatches
    if team.plan.pipeline > 1:
        pipeline = Pipeline(model, team, tokens=TOKENS, microbatches=microbatches, schedule=schedule)
        text = [batch(place + i, team.device) for i in range(microbatches)]
        # A second step has to begin where nothing was left by the first.
        for _ in range(2 if schedule == "dualpipev" else 1):
            for parameter in pipeline.named_parameters().values():
                parameter.grad = None
            sums = pipeline.step(text, [(1 / n, 1 / n)] * microbatches, mtp_lambda=MTP, balance_alpha=BALANCE)
            assert all(len(stage.queue) == 0 for stage in pipeline.stages)
        pipeline.reduce()
        return team.total(sums), team.total(pipeline.load()), pipeline.named_parameters()
    parallelize(model, team, tokens=TOKENS)
    sums, load = torch.zeros(3, device=team.device), 0
    for i in range(microbatches):
        parts, here = forward(model, batch(place + i, team.device), 1 / n)
        (parts[0] + MTP * parts[1] + parts[2]).backward()
        sums += parts.detach()
        load = load + here
    return team.total(sums), team.total(load), dict(model.named_parameters())


def check_plan(plan, schedule=None, device="cpu"):
    torch.manual_seed(0)
    whole = tiny_model(num_hidden_layers=LAYERS, n_routed_experts=8, num_experts_per_tok=3, vocab_size=64)
    model = copy.deepcopy(whole)
    team = Team.start(plan, device)
    whole.to(device)
    microbatches = 4 if plan.pipeline > 1 else 2
    sums, load, parameters = in_parallel(model, team, schedule, microbatches)
    wanted_sums, wanted_load = one_process(whole, microbatches * plan.batches, device)
    torch.testing.assert_close(sums, wanted_sums)
    assert torch.equal(load, wanted_load.to(load.dtype))
    wanted = dict(whole.named_parameters())
    assert plan.pipeline > 1 or parameters.keys() == wanted.keys()
    for name, parameter in parameters.items():
        gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        expected = wanted[name].grad
        if ".experts." in name:
            expected = expected.chunk(plan.expert)[team.place("expert")]
        bound = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(
            gradient, expected, rtol=0, atol=bound, msg=lambda said, name=name: f"{name}: {said}"
        )
    return sorted(parameters)


def check_plans(rank, cases):
    found = []
    for plan, *schedule in cases:
        with case(f"{plan} {schedule}"):
            found.append(check_plan(plan, *schedule))
    return found


def weights_that_change(rank):
    """e4m3 copies of weights are kept until these change, which FSDP2 does not say."""
    torch.manual_seed(0)
    config = Config.from_name("tiny", num_hidden_layers=2, n_routed_experts=8, num_experts_per_tok=3, vocab_size=64)
    whole = randomize(DeepseekV3(config, fp8=True))
    model = copy.deepcopy(whole)
    team = Team.start(Plan(data=2), "cpu")
    parallelize(model, team)
    for factor in (1.0, 1.5, -1.0):
        with torch.no_grad():
            for parameter in whole.parameters():
                parameter *= factor
            for parameter in model.parameters():
                local(parameter).mul_(factor)
        text = batch(rank)
        torch.testing.assert_close(model(*text, mtp=True).mtp_logits, whole(*text, mtp=True).mtp_logits)
        model(*text, mtp=True).mtp_logits[0].sum().backward()


def test_quantised_weights_follow_those_that_are_gathered():
    run(2, weights_that_change)


def test_two_ranks():
    pipelines = [(Plan(pipeline=2), "dualpipev"), (Plan(pipeline=2), "zbv")]
    fixed = Plan(expert=2, exchange="fixed")
    first, second = run(2, check_plans, [(Plan(data=2),), (fixed,), *pipelines])
    names = set(first[0])
    for place in (2, 3):
        assert set(first[place]) | set(second[place]) == names
        assert set(first[place]).isdisjoint(second[place])
        assert "embed_tokens.weight" in first[place]
        assert "lm_head.weight" in first[place]


def test_four_ranks():
    run(4, check_plans, [(Plan(data=2, expert=2, reshard=False),), (Plan(pipeline=2, expert=2), "dualpipev")])


def test_stages_are_even_and_the_last_is_not_longer():
    assert split(4, 4) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert split(61, 4) == [(0, 16), (16, 31), (31, 46), (46, 61)]
    assert split(7, 4)[-1] == (6, 7)


def test_limits_of_routing_bound_the_ranks_of_a_token():
    config = Config.from_name("deepseek-v3")  # 8 groups, of which 4
    assert most_ranks(config, 8) == 4
    assert most_ranks(config, 16) is None  # 8 ranks, as many as choices
    assert most_ranks(config, 4) is None  # each holds two groups: any 4 may be on all
    assert most_ranks(config.replace(n_group=1, topk_group=1), 8) is None


def test_what_does_not_fit_says_so():
    config = Config.from_name("tiny")
    with pytest.raises(ValueError, match="data: expected at least 1, got 0"):
        Plan(data=0)
    with pytest.raises(ValueError, match='exchange: expected "auto", "counted" or "fixed"'):
        Plan(exchange="some")
    with pytest.raises(ValueError, match="overlap: expected reshard=False and pipeline=1, got reshard=True"):
        Plan(expert=2, overlap=True)
    with pytest.raises(ValueError, match=r"tensor: is for generation, .* to be 1, got 2, 1 and 1"):
        Plan(tensor=2, data=2)
    with pytest.raises(ValueError, match="are 6 ranks, but there are 4"):
        Plan(data=3, expert=2).check(config, 4)
    with pytest.raises(ValueError, match="expert: 3 ranks do not divide n_routed_experts = 16"):
        Plan(expert=3).check(config, 3)
    with pytest.raises(ValueError, match="pipeline: 4 ranks have 8 stages, more than the 4 layers"):
        Plan(pipeline=4).check(config, 4)


def test_plans_of_the_command_line():
    assert parse_plan(None, 4) == Plan(expert=4)
    assert parse_plan("data=2,expert=2", 4) == Plan(data=2, expert=2)
    assert parse_plan("data=2, gathered", 2) == Plan(data=2, reshard=False)
    assert parse_plan("expert=2,overlap", 2) == Plan(expert=2, reshard=False, overlap=True)
    with pytest.raises(ValueError, match="got 'some'"):
        parse_plan("data=2,some", 2)
    with pytest.raises(ValueError, match="is for 2 ranks, torchrun has started 4"):
        parse_plan("expert=2", 4)
