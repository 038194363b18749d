"""`train` and `generate` on two ranks, as torchrun starts them: the first writes and speaks."""

import json
import os
import sys

import pytest
from world import run

from dskernels import cli
from dskernels.model import Config

pytest.importorskip("matplotlib")

TRAIN = "--batch-tokens 32 --sequence-length 16 --validation-batches 1 --steps 1 --checkpoint-every 1"


def command(*arguments):
    """Its exit status."""
    sys.argv = ["dskernels", *map(str, arguments)]
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def commands(rank, folder):
    os.chdir(folder)
    os.environ["TORCHELASTIC_ERROR_FILE"] = f"{rank}.json"
    train = "train", "config.json", "--data", "text", "--out", "run", "--device", "cpu", *TRAIN.split()
    assert command(*train) == 0
    with open("run/train.json") as file:
        begun = file.read()
    assert command(*train) == 0  # goes on, at its end
    with open("run/train.json") as file:
        assert file.read() == begun
    generate = "generate", "run", "--device", "cpu", "--max-new-tokens", "4"
    assert command(*generate, "--batch", "prompts", "--out", f"texts{rank}") == 0
    assert command(*train, "--plan", "data=3") == 1
    assert command(*generate) == 1


def test_two_ranks(tmp_path):
    config = Config.from_name("tiny", num_hidden_layers=2, n_routed_experts=8, n_group=1, topk_group=1)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    (tmp_path / "text").mkdir()
    for i in range(3):
        (tmp_path / "text" / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 4)
    (tmp_path / "prompts").write_text("def\nreturn\n")
    run(2, commands, str(tmp_path))
    assert len((tmp_path / "texts0").read_text().splitlines()) == 2
    assert not (tmp_path / "texts1").exists()
    for rank in range(2):
        assert "--prompt: expected it, or --batch with a file" in (tmp_path / f"{rank}.json").read_text()
