"""Runs that are stopped: the same numbers after it as without, whatever was being done, and one line says where."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from test_train import QUICK, SMALL, numbers
from tiny import small_corpus

from dskernels.model import Config, ema, load, train_state
from dskernels.model.data import Corpus
from dskernels.model.train import Interrupted, TrainConfig, train

MODEL = Config.from_name("tiny", **{**SMALL, "n_routed_experts": 4})
SHORT = {**QUICK, "steps": 6, "batch_tokens": 32, "validate_every": 3, "validation_batches": 1, "ema": 0.9}


@pytest.fixture(scope="module", autouse=True)
def _average_often():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ema, "EMA_EVERY", 2)
        yield


@pytest.fixture(scope="module")
def corpus():
    return small_corpus()


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """The folder and the history of a run that was never stopped."""
    out = tmp_path_factory.mktemp("whole")
    return out, train(MODEL, corpus, TrainConfig(**SHORT), out=out)


def stop_at(step):
    """A progress that ends the run as a killed process does: at once, with nothing cleaned up behind it."""

    class Killed(BaseException):
        pass

    def progress(line):
        if line["step"] == step and "loss" in line:
            raise Killed

    return Killed, progress


def same_files(a, b, *names):
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_a_run_that_stopped_goes_on_as_if_it_had_not(corpus, tmp_path):
    """In bf16 with masters: model, average and history to the bit; stopped twice, once before the first checkpoint."""
    config = TrainConfig(**{**SHORT, "precision": "bf16"}, microbatches=2)
    whole = train(MODEL, corpus, config, out=tmp_path / "whole", checkpoint_every=3)
    for step in (1, 5):
        killed, progress = stop_at(step)
        with pytest.raises(killed):
            train(MODEL, corpus, config, out=tmp_path / "parts", checkpoint_every=3, progress=progress)
    seen = []
    history = train(MODEL, corpus, config, out=tmp_path / "parts", checkpoint_every=3, progress=seen.append)
    assert [line["step"] for line in seen if "loss" in line] == [4, 5, 6]
    assert numbers(history) == numbers(whole)
    lines = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history
    same_files(tmp_path / "whole", tmp_path / "parts", "model.safetensors", "ema/model.safetensors")
    assert not torch.equal(load(tmp_path / "whole").lm_head.weight, load(tmp_path / "whole/ema").lm_head.weight)
    assert history[-1]["ema_validation_loss"] != history[-1]["validation_loss"]
    # A finished run has nothing left to do, and writes the same model again.
    (tmp_path / "parts" / "model.safetensors").unlink()
    assert train(MODEL, corpus, config, out=tmp_path / "parts", checkpoint_every=3, resume=True) == history
    same_files(tmp_path / "whole", tmp_path / "parts", "model.safetensors")


CHILD = """
import sys, time, torch
sys.path[:0] = {path!r}
torch.set_num_threads({threads})
from test_train_state import MODEL, SHORT
from dskernels.model import ema, train_state
from dskernels.model.data import Corpus
from dskernels.model.train import TrainConfig, train

def waiting(path, flush=train_state.flush):
    flush(path)
    if "00000004" in str(path):
        print("writing", flush=True)
        time.sleep(60)

ema.EMA_EVERY, train_state.flush = 2, waiting
documents = list(torch.load({text!r}, weights_only=True))
train(MODEL, Corpus(documents[1:], documents[:1]), TrainConfig(**SHORT), out={out!r}, checkpoint_every=2)
"""


def test_kill_9_loses_nothing(corpus, whole, tmp_path):
    """A process that is really killed, two steps behind a checkpoint and in the middle of writing the next."""
    torch.save([*corpus.validation, *corpus.train], tmp_path / "text.pt")
    out = tmp_path / "parts"
    paths = [entry for entry in sys.path if entry] + [os.path.dirname(__file__)]
    code = CHILD.format(path=paths, text=str(tmp_path / "text.pt"), out=str(out), threads=torch.get_num_threads())
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "writing\n"
        os.kill(child.pid, signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert [path.name for path in train_state.checkpoints(out)] == ["step-00000002"]
    assert list((out / "checkpoints").glob(".*.partial"))  # what it was at is there, and is not taken for whole
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 6  # two looks, four steps
    config = TrainConfig(**SHORT)
    history = train(MODEL, corpus, config, out=out, checkpoint_every=2)
    assert numbers(history) == numbers(whole[1])
    same_files(whole[0], out, "model.safetensors", "ema/model.safetensors")
    assert not list((out / "checkpoints").glob(".*.partial"))


def test_the_newest_checkpoints_are_kept(corpus, tmp_path):
    train(MODEL, corpus, TrainConfig(**SHORT), out=tmp_path, checkpoint_every=2, keep=2)
    assert [path.name for path in train_state.checkpoints(tmp_path)] == ["step-00000006", "step-00000004"]
    assert {path.name for path in (tmp_path / "checkpoints" / "step-00000006").iterdir()} == {
        "state.json",
        "state-00001.safetensors",
    }


def test_a_checkpoint_in_several_files(corpus, tmp_path, monkeypatch):
    config = TrainConfig(**{**SHORT, "steps": 3})
    whole = train(MODEL, corpus, config, out=tmp_path / "whole")
    monkeypatch.setattr(train_state, "SHARD", 20_000)
    killed, progress = stop_at(3)
    with pytest.raises(killed):
        train(MODEL, corpus, config, out=tmp_path / "parts", checkpoint_every=2, progress=progress)
    assert len(list(train_state.checkpoints(tmp_path / "parts")[0].glob("*.safetensors"))) > 3
    assert numbers(train(MODEL, corpus, config, out=tmp_path / "parts", resume=True)) == numbers(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_writes_a_checkpoint_and_says_so(corpus, whole, tmp_path, number):
    config = TrainConfig(**SHORT)

    def progress(line):
        if line["step"] == 1:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=r"^stopped after step 2 of 6; .*step-00000002 goes on from there$"):
        train(MODEL, corpus, config, out=tmp_path / "parts", checkpoint_every=2, progress=progress)
    assert signal.getsignal(number) is before
    history = train(MODEL, corpus, config, out=tmp_path / "parts", checkpoint_every=2)
    assert numbers(history) == numbers(whole[1])


def test_another_run_is_not_gone_on_with(corpus, tmp_path):
    config = TrainConfig(**{**SHORT, "steps": 2})
    train(MODEL, corpus, config, out=tmp_path, checkpoint_every=2)
    other = TrainConfig(**{**SHORT, "steps": 2, "learning_rate": 1e-3})
    with pytest.raises(ValueError, match=r"step-00000002: another run, its recipe has learning_rate = 0.01, asked"):
        train(MODEL, corpus, other, out=tmp_path)
    with pytest.raises(ValueError, match="another run, its model has hidden_size = 32"):
        train(MODEL.replace(hidden_size=64), corpus, config, out=tmp_path)
    with pytest.raises(ValueError, match="another run, its text has train = "):
        train(MODEL, Corpus(corpus.train[:2], corpus.validation), config, out=tmp_path)
    with pytest.raises(ValueError, match=r"resume: .* has no checkpoint to go on from"):
        train(MODEL, corpus, config, out=tmp_path / "new", resume=True)
    for name in ("checkpoint_every", "keep"):
        with pytest.raises(ValueError, match=f"{name}: expected at least"):
            train(MODEL, corpus, config, out=tmp_path, **{name: -1})
    history = train(MODEL, corpus, other, out=tmp_path, resume=False)  # begins anew
    assert history[0]["step"] == 0
    assert train_state.checkpoints(tmp_path) == []


def damage(path, how):
    file = path / "state-00001.safetensors"
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "gone":
        file.unlink()
    elif how == "json":
        (path / "state.json").write_text("{")
    elif how == "metrics":
        (path.parent.parent / "metrics.jsonl").write_text("{}\n")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", r"state-00001\.safetensors: cannot be read"),
        ("gone", r"state-00001\.safetensors: no such file"),
        ("json", r"state\.json: not JSON"),
        ("metrics", r"metrics\.jsonl: 3 bytes, the checkpoint was made at"),
    ],
)
def test_a_damaged_checkpoint_is_named(corpus, tmp_path, how, message):
    config = TrainConfig(**{**SHORT, "steps": 2})
    train(MODEL, corpus, config, out=tmp_path, checkpoint_every=1)
    newest, before = train_state.checkpoints(tmp_path)
    damage(newest, how)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as failure:
        train(MODEL, corpus, config, out=tmp_path)
    assert "\n" not in str(failure.value)
    if how in ("cut", "gone"):
        assert str(failure.value).endswith(f"; with {newest} removed, the run goes on from {before}")


# ---- full disks -----------------------------------------------------------------------------------------------------


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_in_rust(*args, **kwargs):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("module", "name", "failure", "message"),
    [
        ("train_state", "save_file", full_in_rust, r"step-00000004: cannot be written \(I/O error: No space left"),
        ("train_state", "flush", full, r"step-00000004: cannot be written \(No space left on device\)"),
        ("writing", "save_file", full_in_rust, r"cannot be written \(I/O error: No space left on device"),
    ],
    ids=["checkpoint", "flush", "export"],
)
def test_a_full_disk_keeps_the_last_checkpoint(corpus, whole, tmp_path, monkeypatch, module, name, failure, message):
    from dskernels.model import writing

    config = TrainConfig(**SHORT)
    where = {"train_state": train_state, "writing": writing}[module]

    with monkeypatch.context() as patched:

        def progress(line):
            if line["step"] == 3:
                patched.setattr(where, name, failure)

        with pytest.raises(OSError, match=message) as error:
            train(MODEL, corpus, config, out=tmp_path, checkpoint_every=2, progress=progress)
    last = train_state.checkpoints(tmp_path)[0]
    assert str(error.value).endswith(f"the last good checkpoint is {last}")
    assert "\n" not in str(error.value)
    history = train(MODEL, corpus, config, out=tmp_path, checkpoint_every=2)
    assert numbers(history) == numbers(whole[1])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is always full")
def test_metrics_on_a_full_disk(corpus, tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"metrics\.jsonl: cannot be written \(No space left on device\)$"):
        train(MODEL, corpus, TrainConfig(**SHORT), out=tmp_path)


def test_what_is_not_finite_leaves_the_last_checkpoint(corpus, tmp_path):
    """The step after it has run by the time it is seen, and has changed nothing."""
    config = TrainConfig(**{**SHORT, "learning_rate": 1e30, "warmup_steps": 10**6, "precision": "bf16"})
    with pytest.raises(FloatingPointError, match=r"^step \d+: loss .*; the last good checkpoint is .*step-0000000\d$"):
        train(MODEL, corpus, config, out=tmp_path, checkpoint_every=1)
    last = train_state.checkpoints(tmp_path)[0]
    assert all(value.isfinite().all() for value in tensors_of(last).values())


def tensors_of(path):
    from safetensors.torch import load_file

    return {name: value for file in path.glob("*.safetensors") for name, value in load_file(file).items()}
