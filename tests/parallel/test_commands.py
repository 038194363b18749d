"""`train` and `generate` on two ranks, as torchrun starts them: the first writes and speaks."""

import json
import os
import sys
from types import SimpleNamespace

import pytest
from world import case, run

from dskernels import cli
from dskernels.model import Config
from dskernels.model.train import MEASURED

pytest.importorskip("matplotlib")

TRAIN = "--batch-tokens 32 --sequence-length 16 --validation-batches 1 --steps 1 --checkpoint-every 1"


def command(*arguments):
    """Its exit status."""
    sys.argv = ["dskernels", *map(str, arguments)]
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def write_inputs(folder, layers):
    config = Config.from_name("tiny", num_hidden_layers=layers, n_routed_experts=8, n_group=1, topk_group=1)
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    (folder / "text").mkdir()
    for i in range(3):
        (folder / "text" / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 4)


def commands(rank, folder):
    os.chdir(folder)
    os.environ["TORCHELASTIC_ERROR_FILE"] = f"{rank}.json"
    train = "train", "config.json", "--data", "text", "--out", "run", "--device", "cpu", *TRAIN.split()
    assert command(*train) == 0
    with open("run/train.json") as file:
        begun = file.read()
    if rank == 0:
        os.remove("run/loss.png")
    assert command(*train) == 0  # goes on, at its end
    assert rank or os.path.isfile("run/loss.png")  # of the whole run, as is all that it says in the end
    with open("run/train.json") as file:
        assert file.read() == begun
    generate = "generate", "run", "--device", "cpu", "--max-new-tokens", "4"
    assert command(*generate, "--batch", "prompts", "--out", f"texts{rank}") == 0
    assert command(*train, "--plan", "data=3") == 1
    assert command(*generate) == 1


def test_two_ranks(tmp_path):
    write_inputs(tmp_path, layers=2)
    (tmp_path / "prompts").write_text("def\nreturn\n")
    run(2, commands, str(tmp_path))
    assert len((tmp_path / "texts0").read_text().splitlines()) == 2
    assert not (tmp_path / "texts1").exists()
    for rank in range(2):
        assert "--prompt: expected it, or --batch with a file" in (tmp_path / f"{rank}.json").read_text()


class Events(list):
    """A stand-in for TensorBoard's writer, which is not installed everywhere: what it was given."""

    def SummaryWriter(self, folder, purge_step):  # noqa: N802 - the name of what it stands for
        self.append((folder, purge_step))
        return SimpleNamespace(add_scalar=lambda *scalar: self.append(scalar), close=lambda: self.append("closed"))


def watched(rank, folder, plans):
    """What each run writes for TensorBoard: of two steps, and of the same command once more, which has none to do."""
    os.chdir(folder)
    found = []
    for i, plan in enumerate(plans):
        options = ["--out", f"run-{plan}", "--device", "cpu", *TRAIN.split(), "--steps", 2, "--batch-tokens", 64]
        options += ["--microbatches", 4, "--tensorboard", *(() if plan is None else ("--plan", plan))]
        with case(plan):
            for _ in range(1 if i else 2):
                sys.modules["torch.utils.tensorboard"] = events = Events()
                assert command("train", "config.json", "--data", "text", *options) == 0
                found.append(list(events))
    return found


def test_tensorboard_gets_what_one_process_writes(tmp_path):
    """With every kind of plan; once, from the first rank."""
    write_inputs(tmp_path, layers=4)
    wanted = run(1, watched, str(tmp_path), [None])[0][0]
    plans = ["data=2", "data=2,gathered", "expert=2,overlap", "pipeline=2"]
    first, second = run(2, watched, str(tmp_path), plans)
    assert not any(second)
    assert first.pop(1) == [("run-data=2/tensorboard", 3), "closed"]  # goes on behind the second step
    tags = [scalar[0] for scalar in wanted[1:-1]]
    assert {"training/loss", "training/learning_rate", "load/layer 0", "validation/validation_loss"} <= set(tags)
    for plan, events in zip(plans, first, strict=True):
        assert events[0] == (f"run-{plan}/tensorboard", None)
        assert [scalar[0] for scalar in events[1:-1]] == tags
        for (tag, value, step), (_, expected, at) in zip(events[1:-1], wanted[1:-1], strict=True):
            assert step == at
            if tag.removeprefix("training/") not in MEASURED:
                assert value == pytest.approx(expected, rel=1e-3, abs=1e-7), (plan, tag, step)
        assert events[-1] == wanted[-1] == "closed"


def without_tensorboard(rank, folder):
    os.chdir(folder)
    os.environ["TORCHELASTIC_ERROR_FILE"] = f"{rank}.json"
    sys.modules["torch.utils.tensorboard"] = None
    if rank == 0:  # torchrun ends the others
        assert command("train", "config.json", "--data", "text", "--device", "cpu", "--tensorboard") == 1


def test_a_missing_tensorboard_is_reported_before_anything_is_read(tmp_path):
    run(2, without_tensorboard, str(tmp_path))
    assert "pip install 'dskernels[tensorboard]'" in (tmp_path / "0.json").read_text()
    assert not (tmp_path / "run").exists()
