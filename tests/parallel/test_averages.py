"""Averaged weights on many ranks: those of one process, and they go on with other numbers of ranks."""

import shutil

import pytest
import torch
from test_training import SMALL, corpus, recipe, same_curve
from world import case, run

from dskernels.model import Config, ema, load
from dskernels.model.parallel.plan import Plan, Team
from dskernels.model.parallel.training import train as train_together
from dskernels.model.train import train

MODEL = Config.from_name("tiny", **SMALL)
TWO = [Plan(data=2), Plan(data=2, reshard=False), Plan(expert=2, reshard=False, overlap=True), Plan(pipeline=2)]


@pytest.fixture(scope="module", autouse=True)
def _average_often():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ema, "EMA_EVERY", 1)
        yield


def ranks(rank, plans, folders, options, gpus=False):
    """Several runs with an average in one world, each in its folder."""
    ema.EMA_EVERY = 1
    found = []
    for plan, folder in zip(plans, folders, strict=True):
        with case(plan):
            team = Team.start(plan, torch.device("cuda", rank) if gpus else "cpu")
            found.append(train_together(MODEL, corpus(), recipe(ema=0.9, steps=3), team, out=folder, **options))
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder, with its checkpoints, and the history of one process."""
    out = tmp_path_factory.mktemp("alone")
    history = train(MODEL, corpus(), recipe(ema=0.9, steps=3), out=out, device="cpu", checkpoint_every=1, keep=3)
    return out, history


def same_average(folder, history, alone, rtol=1e-5, distance=1e-2):
    """Within what the order of sums in fp32 makes of two updates: AdamW divides small gradients by small numbers."""
    out, wanted = alone
    with torch.no_grad():
        average, expected, last = (dict(load(path).named_parameters()) for path in (folder / "ema", out / "ema", out))
        for name, weight in average.items():
            moved = float((expected[name] - last[name]).abs().mean())
            assert float((weight - expected[name]).abs().mean()) <= distance * moved, name
    assert history[-1]["ema_validation_loss"] == pytest.approx(wanted[-1]["ema_validation_loss"], rel=rtol)
    assert history[-1]["ema_validation_loss"] != pytest.approx(history[-1]["validation_loss"], rel=1e-4)


def test_every_plan_has_the_average_of_one_process(tmp_path, alone):
    folders = [tmp_path / str(i) for i in range(len(TWO))]
    for of_rank in run(2, ranks, TWO, folders, {}):
        for folder, history in zip(folders, of_rank, strict=True):
            same_curve(history, alone[1])
            same_average(folder, history, alone)


def stopped_after_the_first(folder):
    """As if a run had been stopped between its first and its second checkpoint."""
    for step in (2, 3):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:08d}")


def test_an_average_goes_on_with_other_numbers_of_ranks(tmp_path, alone):
    """From four ranks to two, in a pipeline, and to one process; from one process to two and to four ranks."""
    four = tmp_path / "four"
    run(4, ranks, [Plan(data=2, expert=2)], [four], dict(checkpoint_every=1, keep=3))
    copies = {name: tmp_path / name for name in ("pipeline", "one", "data", "experts")}
    for name, begun in (("pipeline", four), ("one", four), ("data", alone[0]), ("experts", alone[0])):
        shutil.copytree(begun, copies[name])
        stopped_after_the_first(copies[name])
    options = dict(resume=True)
    found = dict(
        zip(
            ("pipeline", "data"),
            run(2, ranks, [Plan(pipeline=2), Plan(data=2)], [copies["pipeline"], copies["data"]], options)[0],
            strict=True,
        )
    )
    found["experts"] = run(4, ranks, [Plan(expert=4, reshard=False)], [copies["experts"]], dict(resume=True))[0][0]
    one = train(MODEL, corpus(), recipe(ema=0.9, steps=3), out=copies["one"], device="cpu", resume=True)
    same_curve(one, alone[1])  # with the lines that the ranks wrote
    found["one"] = one
    for name, history in found.items():
        with case(name):
            same_curve([line for line in history if line["step"] > 1], [line for line in alone[1] if line["step"] > 1])
            same_average(copies[name], history, alone)
            lines = (copies[name] / "metrics.jsonl").read_text().splitlines()
            assert len(lines) == len(alone[1])  # cut where the checkpoint was made


def refused(rank, folder):
    team = Team.start(Plan(data=2), "cpu")
    for changes, said in (
        (dict(ema=0.0), r"step-00000003: another run, its recipe has ema = 0\.9, asked for is 0\.0"),
        (dict(steps=4), "its recipe has steps = 3, asked for is 4"),
    ):
        config = recipe(**{"ema": 0.9, "steps": 3, **changes})
        with case(changes), pytest.raises(ValueError, match=said):
            train_together(MODEL, corpus(), config, team, out=folder, resume=True)
    for name, value in (("checkpoint_every", -1), ("keep", 0)):
        with pytest.raises(ValueError, match=f"{name}: expected at least"):
            train_together(MODEL, corpus(), recipe(ema=0.9, steps=3), team, out=folder, **{name: value})


def test_a_checkpoint_of_another_run_is_refused(alone):
    run(2, refused, str(alone[0]))


def other_runs(rank, folders):
    """One that goes on in micro-batches of another size, which plans may want, and one that begins anew."""
    team = Team.start(Plan(data=2), "cpu")
    on = train_together(MODEL, corpus(), recipe(ema=0.9, steps=3, microbatches=2), team, out=folders[0], resume=True)
    return on, train_together(MODEL, corpus(), recipe(steps=1), team, out=folders[1], resume=False)


def test_what_stays_of_a_run_that_others_go_on_with(tmp_path, alone):
    folders = [tmp_path / name for name in ("on", "anew")]
    for folder in folders:
        shutil.copytree(alone[0], folder)
    stopped_after_the_first(folders[0])
    on, anew = run(2, other_runs, list(map(str, folders)))[0]
    assert [line["step"] for line in on] == [2, 2, 3, 3]
    # Nothing, though the other run was further: the model is that of its own last step.
    assert [line["step"] for line in anew] == [0, 1, 1]
    assert [path.name for path in (folders[1] / "checkpoints").iterdir()] == ["step-00000001"]
    assert len((folders[1] / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.gpu
def test_gpus_have_the_average_of_one(tmp_path):
    """By NCCL and copy engines, copied to the host while the next step runs; one GPU alone has FSDP2 beside none."""
    count = min(torch.cuda.device_count(), 2)
    plans = TWO if count == 2 else [Plan()]
    one, folders = tmp_path / "one", [tmp_path / str(i) for i in range(len(plans))]
    alone = one, run(1, ranks, [Plan(reshard=False)], [one], {}, True, gpus=True)[0][0]
    for folder, history in zip(folders, run(count, ranks, plans, folders, {}, True, gpus=True)[0], strict=True):
        with case(folder):
            same_curve(history, alone[1], rtol=2e-3)
            same_average(folder, history, alone, rtol=2e-3, distance=0.1)
