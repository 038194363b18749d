"""What the stages of a pipeline hand to each other, between two GPUs and between ranks of a CPU."""

import pytest
import torch
import torch.distributed as dist
from test_copies import begin, needs
from test_plans import check_plan
from world import case, run

from dskernels.model.parallel import pipeline
from dskernels.model.parallel.handover import Handover, Way, rank_of, ways
from dskernels.model.parallel.plan import Plan


def pipelines(rank, gpus):
    device, _ = begin(rank, gpus)
    for schedule in ("dualpipev", "zbv"):
        with case(schedule):
            check_plan(Plan(pipeline=2), schedule, device=device)


@pytest.mark.gpu
def test_pipeline_on_two_gpus():
    needs(2)
    run(2, pipelines, 2, gpus=True)


class Posted(Handover):
    """The same messages by gloo, to see on a CPU that the engine's stages send and take them."""

    def __init__(self, group, microbatches, shape, dtype):
        self.rank, self.ranks, self.microbatches = group.rank(), group.size(), microbatches
        self.incoming, self.group = ways(self.rank, self.ranks), group
        self.shape, self.dtype, self.step, self.sent = shape, dtype, 0, []

    def send(self, way, microbatch, x):
        rank = rank_of(way.stage, self.ranks)
        tag = 1 + self._slot(rank, way, microbatch)
        self.sent.append((x, dist.isend(x, group=self.group, group_dst=rank, tag=tag)))

    def receive(self, way, microbatch):
        found = torch.empty(self.shape, dtype=self.dtype)
        source = rank_of(way.stage + (1 if way.kind == "gradient" else -1), self.ranks)
        dist.recv(found, group=self.group, group_src=source, tag=1 + self._slot(self.rank, way, microbatch))
        return found


def handed_over(rank, plan):
    pipeline.reach_each_other, pipeline.Handover = lambda group: True, Posted
    for schedule in ("dualpipev", "zbv"):
        with case(schedule):
            check_plan(plan, schedule)


@pytest.mark.parametrize("plan", [Plan(pipeline=2), Plan(pipeline=2, expert=2)], ids=["2 ranks", "4 ranks"])
def test_stages_hand_over_what_the_engine_would_post(plan):
    run(plan.ranks, handed_over, plan)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_message_of_a_pipeline_has_one_place(ranks):
    found = [(rank, way) for rank in range(ranks) for way in ways(rank, ranks)]
    wanted = []
    for stage in range(2 * ranks - 1):
        if rank_of(stage, ranks) != rank_of(stage + 1, ranks):
            wanted += [
                (rank_of(stage + 1, ranks), Way("input", stage + 1)),
                (rank_of(stage, ranks), Way("gradient", stage)),
            ]
    assert sorted(found) == sorted(wanted)
