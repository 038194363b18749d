"""What a run shows while it goes on: lines, a table, TensorBoard, and the operations that its MFU counts."""

import io
import re
import sys
from types import SimpleNamespace

import torch
from rich.console import Console

from dskernels.model import Config
from dskernels.model.progress import TensorBoardLog, TrainingProgress
from dskernels.model.throughput import step_flops

SMALL = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, n_routed_experts=8)
SMALL |= dict(n_group=1, topk_group=1, num_experts_per_tok=2, q_lora_rank=None, routed_scaling_factor=1.0)

LINES = [
    dict(step=0, validation_loss=5.5, validation_mtp_loss=5.5, load=[]),
    dict(step=1, loss=5.25, mtp_loss=5.125, tokens_per_second=1234.5),
    dict(step=2, loss=4.0, mtp_loss=4.5, tokens_per_second=2000.0),
    dict(step=2, validation_loss=4.25, validation_mtp_loss=5.0, load=[]),
]


def shown(terminal, width=120):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=width)
    with TrainingProgress(2, console) as progress:
        for line in LINES:
            progress(line)
    return stream.getvalue()


def test_a_log_gets_a_line_for_each_look_at_held_out_text():
    assert shown(terminal=False).splitlines() == [
        "step 0: held out 5.500",
        "step 2: loss 4.000  MTP 4.500  held out 4.250  2,000 tokens/s",
    ]


def test_a_terminal_gets_a_bar_and_a_table():
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown(terminal=True)).splitlines()
    assert "2/2" in lines[-4]
    heads, first, last = (line.split() for line in lines[-3:])
    assert heads[:5] == ["step", "loss", "MTP", "held", "out"]
    assert first[:4] == ["0", "-", "-", "5.500"]
    assert last[:4] == ["2", "4.000", "4.500", "4.250"]
    assert "2,000" in last


def test_a_narrow_terminal_gets_fewer_columns_and_whole_numbers():
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown(terminal=True, width=60)).splitlines()
    assert lines[-3].split() == ["step", "loss", "MTP", "held", "out", "busiest", "tokens/s", "MFU", "GB"]
    assert lines[-1].split() == ["2", "4.000", "4.500", "4.250", "-", "2,000", "-", "-"]
    assert "…" not in "".join(lines[-3:])


def test_tensorboard_gets_every_number(tmp_path, monkeypatch):
    """A stand-in for its writer, which is not installed everywhere."""
    written, opened = [], []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            opened.append((folder, purge_step))

        def add_scalar(self, *scalar):
            written.append(scalar)

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    log = TensorBoardLog(tmp_path, 3)
    log(dict(step=4, loss=2.5, layer_loads=[1.5, 2.0], mfu=None))
    log(dict(step=4, validation_loss=2.0, load=[[1, 2]]))
    log.close()
    assert opened == [(str(tmp_path / "tensorboard"), 4)]
    assert written == [
        ("training/loss", 2.5, 4),
        ("load/layer 0", 1.5, 4),
        ("load/layer 1", 2.0, 4),
        ("validation/validation_loss", 2.0, 4),
        "closed",
    ]


def test_operations_of_a_step_by_hand():
    """Of one token alone there is one pair of a query and a key; the rest are the products."""
    config = Config.from_name("tiny", **SMALL)
    h, heads, latent = 32, 4, 32 + 16
    attention = h * heads * 48 + h * latent + 32 * heads * 64 + heads * 32 * h
    experts = 3 * h * 16 * (2 + 1) + h * 8  # two chosen, one shared, the router
    head = 257 * h
    plain = 2 * attention + 3 * h * 64 + experts + head
    mtp = attention + experts + 2 * h * h + head
    pair = heads * (48 + 32)
    one = torch.tensor([0, 1])
    assert step_flops(config, one, mtp=False) == 6 * plain + 3 * 2 * pair * 2
    assert step_flops(config, one, mtp=True) == 6 * (plain + mtp) + 3 * 3 * pair * 2
    # Two sequences of three: two times six pairs, and no more.
    two = step_flops(config, torch.tensor([0, 3, 3, 6]), mtp=False)
    assert two == 6 * 6 * plain + 3 * 2 * pair * 2 * 12
