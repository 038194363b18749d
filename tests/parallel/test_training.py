"""Training on many ranks: the curve of one process, checkpoints for other numbers of ranks, and ranks that die."""

import json
import os
import time

import pytest
import torch
from world import case, run

from dskernels.model import Config, DeepseekV3, load, save
from dskernels.model.data import BOUNDARY, Corpus
from dskernels.model.parallel.plan import Plan, Team
from dskernels.model.parallel.training import train as train_together
from dskernels.model.train import train
from dskernels.model.train_config import TrainConfig

SMALL = dict(num_hidden_layers=4, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, n_routed_experts=8)
SMALL |= dict(n_group=1, topk_group=1, num_experts_per_tok=2, q_lora_rank=None, routed_scaling_factor=1.0)
RECIPE = dict(steps=2, batch_tokens=48, microbatches=4, sequence_length=12, learning_rate=2e-3, warmup_steps=1)
RECIPE |= dict(final_learning_rate=1e-3, validate_every=2, validation_batches=2, bias_update_rate=0.05, clip=0.5)
NUMBERS = ("loss", "mtp_loss", "balance_loss", "gradient_norm", "max_load", "validation_loss", "validation_mtp_loss")


def corpus():
    text = torch.tensor(list(b"for i in range(10):\n    print(i)\n" * 4), dtype=torch.int16)
    boundary = torch.tensor([BOUNDARY], dtype=torch.int16)
    documents = [torch.cat((boundary, text[i:], boundary)) for i in range(4)]
    return Corpus(documents[1:], documents[:1])


def recipe(**changes):
    return TrainConfig(**{**RECIPE, **changes}, precision="fp32", recompute=False)


def one_rank(rank, plan, folder, options):
    team = Team.start(plan, "cpu")
    config = Config.from_name("tiny", **SMALL)
    return train_together(config, corpus(), recipe(), team, out=folder, **options)


def every_plan(rank, plans, folder):
    """Several runs in one world, each in its folder."""
    found = []
    for i, plan in enumerate(plans):
        with case(plan):
            found.append(one_rank(rank, plan, f"{folder}/{i}", {}))
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The history of one process."""
    out = tmp_path_factory.mktemp("alone")
    return train(Config.from_name("tiny", **SMALL), corpus(), recipe(), out=out, device="cpu")


def same_curve(history, wanted, rtol=1e-3):
    assert [line["step"] for line in history] == [line["step"] for line in wanted]
    for line, expected in zip(history, wanted, strict=True):
        for name in NUMBERS:
            if name in expected:
                assert line[name] == pytest.approx(expected[name], rel=rtol, abs=1e-7), (line["step"], name)
        if "load" in expected:
            assert line["load"] == expected["load"]


def test_every_plan_has_the_curve_of_one_process(tmp_path, alone):
    plans = [Plan(data=2), Plan(pipeline=2), Plan(expert=2, reshard=False, overlap=True)]
    histories = run(plans[0].ranks, every_plan, plans, str(tmp_path))
    for of_rank in histories:
        for history in of_rank:
            same_curve(history, alone)
    lines = (tmp_path / "0" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [line["step"] for line in histories[0][0]]
    first, *others = [load(tmp_path / str(i))(torch.arange(12)).logits for i in range(len(plans))]
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-3, atol=1e-3)


def test_a_checkpoint_goes_on_with_other_ranks(tmp_path, alone):
    out = str(tmp_path)
    first = run(4, one_rank, Plan(data=2, expert=2, reshard=False), out, dict(checkpoint_every=1))[0]
    same_curve(first, alone)
    (tmp_path / "checkpoints" / "step-00000002" / "state.json").unlink()  # as if it had been stopped after the first
    second = run(2, one_rank, Plan(pipeline=2), out, dict(resume=True))[0]
    same_curve(second, [line for line in alone if line["step"] > 1])


def test_ranks_begin_with_the_weights_of_another_run(tmp_path):
    config, folder = Config.from_name("tiny", **SMALL), tmp_path / "other"
    torch.manual_seed(5)
    save(DeepseekV3(config), folder)
    wanted = train(config, corpus(), recipe(), out=tmp_path / "one", device="cpu", init=folder)
    found = run(2, one_rank, Plan(expert=2), str(tmp_path / "two"), dict(init=str(folder)))[0]
    same_curve(found, wanted)


def dying(rank, folder):
    """Two ranks, of which one is killed in its second step."""

    team = Team.start(Plan(data=2), "cpu", timeout=20.0)
    if rank == 1:
        from dskernels.model.parallel.team_step import TeamStepper

        original = TeamStepper.backward

        def backward(self, text, step, *rest):
            if step == 1:
                os.kill(os.getpid(), 9)
            return original(self, text, step, *rest)

        TeamStepper.backward = backward
    config = Config.from_name("tiny", **SMALL)
    train_together(config, corpus(), recipe(), team, out=folder, checkpoint_every=1)


def test_a_rank_that_dies_ends_the_run_and_its_checkpoint_goes_on_with_fewer(tmp_path, alone):
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)rank 0: .*RuntimeError.*rank 1: died"):
        run(2, dying, str(tmp_path))
    assert time.monotonic() - start < 60
    assert (tmp_path / "checkpoints" / "step-00000001" / "state.json").is_file()
    rest = run(1, one_rank, Plan(), str(tmp_path), dict(resume=True))[0]
    same_curve(rest, [line for line in alone if line["step"] > 1])


def refuse(rank, folder):
    team = Team.start(Plan(data=2), "cpu")
    config = Config.from_name("tiny", **SMALL)
    with pytest.raises(ValueError, match="microbatches: expected a multiple of the 2 ranks"):
        train_together(config, corpus(), recipe(microbatches=3), team, out=folder)
    pipeline = Team.start(Plan(pipeline=2), "cpu")
    with pytest.raises(ValueError, match="microbatches: expected at least 4, 4 for each of 1 pipelines"):
        train_together(config, corpus(), recipe(microbatches=2), pipeline, out=folder)
    with pytest.raises(ValueError, match="4 ranks expected, but there are 2"):
        Team.start(Plan(data=4), "cpu")


def test_what_does_not_fit_says_so(tmp_path):
    run(2, refuse, str(tmp_path))
