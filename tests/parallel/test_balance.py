"""Redundant experts: every expert has a place, ranks have as much to do, few weights move, and they arrive."""

import copy
import random

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from world import run

import dskernels as ds
from dskernels.model import Config, DeepseekV3, keep_in_fp8
from dskernels.model.parallel.balance import Placement, even, move_experts, place_experts
from dskernels.model.parallel.redundant import RedundantExperts
from dskernels.types import Routing
from model.tiny import randomize


@st.composite
def problems(draw):
    nodes = draw(st.sampled_from([1, 2]))
    ranks = nodes * draw(st.sampled_from([1, 2, 4]))
    groups = draw(st.sampled_from([1, 2, 4]))
    experts = groups * draw(st.integers(1, 6)) * nodes
    least = -(-experts // ranks)
    places = ranks * (least + draw(st.integers(0, 3)))
    load = draw(st.lists(st.integers(0, 1000), min_size=experts, max_size=experts))
    return load, dict(ranks=ranks, places=places, nodes=nodes, groups=groups)


@given(problems())
def test_every_expert_has_a_place_and_every_rank_as_many(problem):
    load, options = problem
    placement = place_experts(load, **options)
    assert len(placement.experts) == options["places"]
    assert set(placement.experts) == set(range(len(load)))
    physical = placement.physical()
    assert sorted(p for row in physical.tolist() for p in row if p >= 0) == list(range(options["places"]))
    if options["nodes"] > 1 and options["groups"] % options["nodes"] == 0:
        each, size = options["ranks"] // options["nodes"], len(load) // options["groups"]
        for node in range(options["nodes"]):
            here = {e // size for r in range(node * each, (node + 1) * each) for e in placement.of_rank(r)}
            assert len(here) == options["groups"] // options["nodes"]
    assert sum(placement.loads(load)) == pytest.approx(sum(load))


@given(problems(), st.randoms(use_true_random=False))
def test_a_new_plan_is_as_even_and_moves_no_more_than_planning_anew(problem, chance):
    load, options = problem
    before = place_experts(load, **options)
    assert place_experts(load, **options, before=before).moves(before) == 0
    drifted = [max(0, round(x * chance.uniform(0.7, 1.3))) for x in load]
    anew, kept = place_experts(drifted, **options), place_experts(drifted, **options, before=before)
    assert set(kept.experts) == set(range(len(load)))
    assert kept.imbalance(drifted) <= anew.imbalance(drifted) * 1.05 + 1e-9


def test_deepseek_v3_on_32_ranks():
    """Prefill as in the report: 256 experts and 32 copies on 4 nodes of 8, load skewed as a Zipf law."""
    chance = random.Random(0)
    load = [round(1e5 / (i + 8)) for i in range(256)]
    chance.shuffle(load)
    options = dict(ranks=32, places=288, nodes=4, groups=8)
    placement = place_experts(load, **options)
    anywhere = place_experts(load, ranks=32, places=288)
    naive = even(256, 32)
    assert naive.imbalance(load) > 2.0
    assert anywhere.imbalance(load) < 1.05
    assert placement.imbalance(load) < 1.2
    little, much = ([round(x * chance.uniform(1 - d, 1 + d)) for x in load] for d in (0.05, 0.5))
    assert place_experts(little, **options, before=placement).moves(placement) == 0
    kept, anew = place_experts(much, **options, before=placement), place_experts(much, **options)
    assert kept.imbalance(much) <= anew.imbalance(much) * 1.05
    assert kept.moves(placement) < anew.moves(placement) / 2


def test_bad_numbers_name_themselves():
    with pytest.raises(ValueError, match="expected places 4 >= 5 experts"):
        place_experts([1] * 5, ranks=2, places=4)
    with pytest.raises(ValueError, match="before"):
        place_experts([1] * 4, ranks=2, places=4, before=even(4, 4))


def moved(rank, before, after):
    weights = torch.stack([torch.full((2, 3), float(expert)) for expert in before.of_rank(rank)])
    result = move_experts(weights, before, after, dist.group.WORLD)
    assert result[:, 0, 0].tolist() == [float(expert) for expert in after.of_rank(rank)]


def test_weights_arrive():
    before = Placement((0, 1, 2, 3, 4, 5, 0, 1), 4, 6)
    after = Placement((4, 4, 2, 0, 3, 5, 1, 0), 4, 6)
    run(4, moved, before, after)


def test_copies_of_experts_mean_the_same_as_one():
    """Routing to places, and experts at places, give what routing to experts gives."""
    torch.manual_seed(0)
    logits, x = torch.randn(20, 6), torch.randn(20, 16)
    w13, w2 = torch.randn(6, 16, 16), torch.randn(6, 16, 8)
    plain = ds.route(logits, top_k=2)
    placement = place_experts(plain.load.tolist(), ranks=2, places=8)
    placed = ds.route(logits, top_k=2, physical=placement.physical())
    assert torch.equal(placed.load, plain.load)
    index = torch.tensor(placement.experts)
    got = ds.fused_experts(x, w13[index], w2[index], Routing(*placed))
    torch.testing.assert_close(got, ds.fused_experts(x, w13, w2, plain))
    counts = torch.bincount(placed.experts.flatten().long(), minlength=8).view(2, 4).sum(1)
    assert int(counts.max()) <= 1.25 * counts.float().mean()


def skewed(fp8):
    """A model that asks for few of its experts."""
    torch.manual_seed(0)
    shape = dict(num_hidden_layers=3, n_routed_experts=8, n_group=1, topk_group=1, num_experts_per_tok=2, vocab_size=64)
    shape |= dict(n_shared_experts=2)
    if fp8:
        shape |= dict(hidden_size=128, moe_intermediate_size=128, intermediate_size=128, q_lora_rank=128)
    model = randomize(DeepseekV3(Config.from_name("tiny", **shape), fp8=fp8))
    for layer in model.moe_layers:
        layer.gate.e_score_correction_bias[[5, 7]] += 0.5
    return keep_in_fp8(model) if fp8 else model


def live(rank, fp8):
    """Expert blocks before and after a change of places give what those with all experts once give."""
    whole = skewed(fp8)
    model = copy.deepcopy(whole)
    redundant = RedundantExperts(model, dist.group.WORLD, places=10)
    addresses = [layer.experts.w13.data_ptr() for layer in redundant.layers]
    generator = torch.Generator().manual_seed(rank)
    texts = [torch.randn(40, whole.config.hidden_size, generator=generator) for _ in range(2)]
    moves = []
    with torch.no_grad():
        for step in range(3):
            x, loads = texts[min(step, 1)], []
            for layer, alone in zip(redundant.layers, whole.moe_layers, strict=True):
                want, router = alone(x)
                torch.testing.assert_close(layer(x)[0], want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
                loads.append(router.routing.load)
            mine, load = torch.stack(loads).long(), redundant.load()
            dist.all_reduce(mine)
            assert torch.equal(load, mine)
            before = redundant.imbalance(load)
            moves.append(redundant.rebalance())
            after = redundant.imbalance(load)
            assert max(after) < max(before) if step == 0 else max(after) <= max(before)
            assert int(redundant.load().sum()) == 0
        if not fp8:  # in e4m3 a rounding turns the choice of an expert further on
            tokens = torch.randint(0, 64, (9,), generator=generator)
            torch.testing.assert_close(model(tokens).logits, whole(tokens).logits, rtol=1e-4, atol=1e-4)
    assert moves[0] > 0
    assert moves[2] == 0  # the same load again
    assert addresses == [layer.experts.w13.data_ptr() for layer in redundant.layers]


def both_kinds(rank):
    for fp8 in (False, True):
        live(rank, fp8)


def test_experts_change_places_between_steps():
    run(2, both_kinds)
