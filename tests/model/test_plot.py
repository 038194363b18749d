"""Pictures: they are drawn, of the size of a card, and what cannot be drawn is said in one line."""

import json
import struct
import sys

import pytest

from dskernels.model.plot import plot_experts, plot_loss, plot_training, read_history
from dskernels.model.plot_runs import plot_runs

pytest.importorskip("matplotlib")


def look(step, *loads):
    return dict(
        step=step, validation_loss=5.0 - step / 10, validation_mtp_loss=5.0, load=[list(load) for load in loads]
    )


def step(number, mtp_loss=4.0):
    return dict(step=number, loss=5.0 / number, mtp_loss=mtp_loss, max_load=2.0)


HISTORY = [look(0, (8, 0, 0, 0), (1, 2, 3, 2)), step(1), step(2), look(2, (2, 2, 2, 2), (0, 0, 0, 0))]


def size_of(path):
    """Width and height from a PNG's header."""
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


def test_pictures_are_drawn(tmp_path):
    plot_loss(HISTORY, tmp_path / "loss.png")
    plot_experts(HISTORY, tmp_path / "experts.png")
    plot_training(HISTORY, tmp_path / "card.png", title="A title")
    plot_training(
        HISTORY, tmp_path / "text.png", title="$not $math", text="def f(x):\n    return x # $a_b$ \\frac \x00\t"
    )
    sizes = {name: size_of(tmp_path / f"{name}.png") for name in ("loss", "experts", "card", "text")}
    assert sizes["card"][0] == sizes["text"][0] >= 1600  # sharp in a README, which is about 800 wide
    assert sizes["text"][1] > sizes["card"][1]


def test_a_model_without_mtp_has_no_curve_of_it(tmp_path):
    plot_loss([step(1, mtp_loss=0.0), step(2, mtp_loss=0.0)], tmp_path / "loss.png")
    assert size_of(tmp_path / "loss.png")


@pytest.mark.parametrize(
    ("plot", "history", "message"),
    [
        (plot_loss, [], "history: no training step"),
        (plot_loss, [look(0, (1, 1))], "history: no training step"),
        (plot_experts, [look(0, (1, 1)), step(1)], "history: needs a look at held-out text before and after"),
        (plot_experts, [look(0), step(1), look(1)], "history: the model has no experts"),
    ],
)
def test_what_cannot_be_drawn_is_said(tmp_path, plot, history, message):
    with pytest.raises(ValueError, match=message):
        plot(history, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_runs_beside_each_other(tmp_path):
    """With and without experts and MTP; four of them, the heat maps in two rows."""
    more = dict(layer_loads=[2.0, 1.5], tokens_per_second=100.0)
    loads = [{**line, **more} if "loss" in line else line for line in HISTORY]
    plot_runs({"one": loads}, tmp_path / "one.png")
    plot_runs({"a": loads, "b": HISTORY, "c": loads, "$d": loads}, tmp_path / "four.png", title="Four $runs")
    plot_runs({"plain": [dict(step(1), mtp_loss=0.0), look(1)]}, tmp_path / "plain.png")
    sizes = [size_of(tmp_path / f"{name}.png") for name in ("plain", "one", "four")]
    assert sizes[0][1] < sizes[1][1] < sizes[2][1]
    with pytest.raises(ValueError, match="b: no training step in its history"):
        plot_runs({"a": loads, "b": [look(0)]}, tmp_path / "x.png")


def test_matplotlib_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"^pictures need matplotlib: pip install 'dskernels\[plot\]'$"):
        plot_loss(HISTORY, tmp_path / "loss.png")


def test_history_is_read_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in HISTORY))
    assert read_history(path) == HISTORY
    path.write_text('{"step": 0}\n{"step": ')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is not JSON"):
        read_history(path)
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl: no such file"):
        read_history(tmp_path / "absent.jsonl")
