"""One picture of several runs: losses, the load of the experts, throughput."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from dskernels.model.plot import FAINT, History, drawing, smoothed

RUNS = ("#2563eb", "#d97706", "#dc2626", "#059669", "#7c3aed", "#0891b2")
LAYERS = "viridis"
WINDOWS = 20  # of a run; throughput is drawn as the median of each, which a step beside something else does not move
PARTS, REPORTED = 30, 0.25  # parts of a run; and how close to bf16, in percent, the report's fp8 runs stay
EVEN = 1.3  # the load, relative to the mean, below which a layer counts as balanced


def plot_runs(runs: Mapping[str, History], path: str | Path, *, title: str = "") -> None:
    """Draws runs: training and held-out loss, MTP loss, the busiest expert of the layers at each step, tokens a second,
    and how much held-out text each expert of each layer got at the end.

    Args:
        runs: by name, each what `train` returned, or `read_history`.
        path: the PNG to write.
        title: a line above.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: a run has no training step.
    """
    for name, history in runs.items():
        if not any("loss" in record for record in history):
            raise ValueError(f"{name}: no training step in its history")
    loads = {name: load for name, history in runs.items() if (load := _last_load(history))}
    rows = -(-len(loads) // 3)
    heights = [3.2, 3.0] + [1.1 + 0.22 * max(map(len, loads.values()))] * rows if loads else [3.2, 3.0]
    with drawing(path, 11.0, sum(heights) + (0.4 if title else 0.0)) as figure:
        if title:
            figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", parse_math=False)
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        left, right = parts[0].subplots(1, 2)
        _draw_losses(left, runs)
        _draw_mtp(right, runs)
        left, right = parts[1].subplots(1, 2)
        _draw_busiest(left, runs)
        _draw_throughput(right, runs)
        _draw_loads(parts[2:], loads)


def plot_pairs(pairs: Mapping[str, tuple[History, History]], path: str | Path, *, title: str = "") -> None:
    """Draws how far a run's losses are from those of another one on the same text, in percent: the mean over each of
    thirty parts of the steps that both have, and held-out text as dots, for the main loss and that of MTP.

    Args:
        pairs: by name, the run that is compared with and the other one.
        path: the PNG to write.
        title: a line above.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: two runs have no step in common.
    """
    with drawing(path, 11.0, 3.4 + (0.4 if title else 0.0)) as figure:
        if title:
            figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", parse_math=False)
        for axes, name, of in zip(figure.subplots(1, 2), ("", "mtp_"), ("Loss", "MTP loss"), strict=True):
            axes.axhspan(-REPORTED, REPORTED, color=FAINT, alpha=0.18, linewidth=0)
            axes.axhline(0.0, color=FAINT, linewidth=1.0)
            for color, (label, (first, second)) in zip(_colors(pairs), pairs.items(), strict=True):
                x, y = difference(first, second, f"{name}loss", PARTS)
                if not x:
                    raise ValueError(f"{label}: no step in common")
                looks, held_out = difference(first, second, f"validation_{name}loss", None)
                last = f", held out {held_out[-1]:+.3f}%" if held_out else ""
                axes.plot(x, y, color=color, linewidth=1.2, alpha=0.7, label=f"{label}{last}")
                axes.plot(looks, held_out, color=color, linewidth=0.0, marker="o", markersize=5)
            low, high = axes.get_ylim()
            axes.set_ylim(low - 0.1 * len(pairs) * (high - low), high)  # room for the legend
            _finish(
                axes, f"{of}: training (lines), held-out text (dots)", f"% apart (grey: ±{REPORTED})", [], "lower right"
            )


def difference(first: History, second: History, name: str, parts: int | None) -> tuple[list[float], list[float]]:
    """Steps, and by how many percent the second run's value is above the first's; averaged over this many parts."""
    here, there = (dict(zip(*_series(history, name), strict=True)) for history in (first, second))
    steps = sorted(here.keys() & there.keys())
    wide = -(-len(steps) // parts) if parts else 1
    groups = [steps[i : i + wide] for i in range(0, len(steps), max(wide, 1))]
    means = [100 * (sum(there[s] for s in group) / (sum(here[s] for s in group) or 1.0) - 1) for group in groups]
    return [sum(group) / len(group) for group in groups], means


def _draw_losses(axes: Any, runs: Mapping[str, History]) -> None:
    shown: list[float] = []
    for i, ((name, history), color) in enumerate(zip(runs.items(), _colors(runs), strict=True)):
        x, y = _series(history, "loss")
        axes.plot(x, smoothed(y), color=color, linewidth=1.0, alpha=0.55)
        looks, held_out = _series(history, "validation_loss")
        last = f", held out {held_out[-1]:.4f}" if held_out else ""
        # Not joined: between two validations the loss is not a straight line. The first runs are visible around the
        # others.
        size = 3.5 + 1.5 * (len(runs) - 1 - i)
        axes.plot(looks, held_out, color=color, linewidth=0.0, marker="o", markersize=size, label=f"{name}{last}")
        shown += smoothed(y)[len(y) // 15 :] + held_out[1:]
    _finish(axes, "Loss: training (faint), held-out text (dots)", "nats per token", shown)


def _draw_mtp(axes: Any, runs: Mapping[str, History]) -> None:
    shown: list[float] = []
    for (name, history), color in zip(runs.items(), _colors(runs), strict=True):
        x, y = _series(history, "mtp_loss")
        if any(y):
            axes.plot(x, smoothed(y), color=color, linewidth=1.4, label=name)
            shown += smoothed(y)[len(y) // 15 :]
    _finish(axes, "MTP loss: the token after the next", "nats per token", shown)


def _draw_busiest(axes: Any, runs: Mapping[str, History]) -> None:
    import matplotlib

    for (name, history), color in zip(runs.items(), _colors(runs), strict=True):
        lines = [record for record in history if record.get("layer_loads")]
        x = [record["step"] for record in lines]
        layers = list(zip(*(record["layer_loads"] for record in lines), strict=True))
        if len(runs) == 1:
            palette = matplotlib.colormaps[LAYERS].resampled(len(layers) + 1)
            for i, load in enumerate(layers):
                axes.plot(x, smoothed(load), color=palette(i), linewidth=1.2, label=f"layer {i}")
        elif layers:
            curves = [smoothed(load) for load in layers]
            low, high = [min(at) for at in zip(*curves, strict=True)], [max(at) for at in zip(*curves, strict=True)]
            axes.fill_between(x, low, high, color=color, alpha=0.25, linewidth=0)
            axes.plot(x, high, color=color, linewidth=1.2, label=name)
    axes.axhline(EVEN, color=FAINT, linewidth=1.0, linestyle="--")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="minor", labelsize=8)
    _finish(axes, "Busiest expert of each MoE layer, a step's text", f"× even load (dashed: {EVEN})", [], "best")
    axes.set_ylim(bottom=1.0)


def _draw_throughput(axes: Any, runs: Mapping[str, History]) -> None:
    highest = 0.0
    for (name, history), color in zip(runs.items(), _colors(runs), strict=True):
        x, y = _series(history, "tokens_per_second")
        x, y = (x[1:], y[1:]) if len(y) > 2 else (x, y)  # the first step compiles
        if not y:
            continue
        wide = -(-len(y) // WINDOWS)
        curve = [median(y[i : i + wide]) for i in range(0, len(y), wide)]
        middle = [median(x[i : i + wide]) for i in range(0, len(x), wide)]
        axes.plot(middle, curve, color=color, linewidth=1.4, label=f"{name}, median {median(y):,.0f}")
        highest = max(highest, *curve)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    _finish(axes, "Throughput", "tokens per second", [], "lower right")
    axes.set_ylim(0.0, highest * 1.25 or 1.0)


def _draw_loads(parts: Sequence[Any], loads: Mapping[str, list[list[int]]]) -> None:
    """A heat map for each run, three in a row, on one scale."""
    for row, part in enumerate(parts):
        names = list(loads)[3 * row : 3 * row + 3]
        panels = part.subplots(1, len(names), squeeze=False)[0]
        for axes, name in zip(panels, names, strict=True):
            even = [[load / (sum(layer) / len(layer) or 1.0) for load in layer] for layer in loads[name]]
            image = axes.imshow(even, cmap="RdBu_r", vmin=0.0, vmax=2.0, aspect="auto", interpolation="nearest")
            busiest = max(map(max, even))
            axes.set_title(f"{name}: busiest {busiest:.2f}× even", fontsize=10, parse_math=False)
            axes.set_yticks(range(len(even)))
            axes.set_xlabel("expert, on held-out text at the end")
            axes.grid(False)
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
        panels[0].set_ylabel("MoE layer")
        bar = part.colorbar(image, ax=list(panels), extend="max", shrink=0.9)
        bar.outline.set_visible(False)
        bar.set_label("1 = even")


def _finish(axes: Any, title: str, label: str, shown: Sequence[float], legend: str = "upper right") -> None:
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.set_xlim(left=0)
    if shown:  # without the first steps, which are far above the rest
        low, high = min(shown), max(shown)
        room = 0.06 * (high - low) or 0.1
        axes.set_ylim(low - room, high + room)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=legend, fontsize=8.5)


def _series(history: History, name: str) -> tuple[list[int], list[float]]:
    lines = [record for record in history if record.get(name) is not None]
    return [record["step"] for record in lines], [record[name] for record in lines]


def _last_load(history: History) -> list[list[int]]:
    looks = [record["load"] for record in history if record.get("load")]
    return looks[-1] if looks else []


def _colors(runs: Mapping[str, Any]) -> list[str]:
    return [RUNS[i % len(RUNS)] for i in range(len(runs))]
