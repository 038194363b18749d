"""The pictures of saved results that README and the documentation show, drawn by matplotlib, for light and for dark."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
from PIL import Image

from benchmarks import charts, curves, headlines, saved
from benchmarks.compare import geometric_mean
from benchmarks.curves import OURS, ROOF, SIZES, Curve
from benchmarks.saved import Saved, SavedRow

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PANELS = 9  # of the scaling view
PEER_COLOURS = ("p1", "p2", "p3", "p4")


@dataclass(frozen=True)
class Theme:
    """Colours, those of the report."""

    name: str
    page: str
    ink: str
    dim: str
    rule: str
    ours: str
    p1: str
    p2: str
    p3: str
    p4: str


LIGHT = Theme(
    "light", "#ffffff", "#1c2330", "#5b6472", "#e3e6eb", "#1f5fd0", "#c2570c", "#11806a", "#8a3fb5", "#b3315f"
)
DARK = Theme("dark", "#12161d", "#e6e9ef", "#9aa4b2", "#2a313c", "#6fa8ff", "#ff9e57", "#4fd0b0", "#cf95f5", "#ff8bb0")


def write(gpus: Mapping[str, Mapping[str, Saved]], folder: Path) -> list[Path]:
    """Write the pictures of the first GPU for each theme, such as ``peers_dark.png``; their titles name it.

    ``headlines`` has the workloads of README's table, ``peers`` every operation, ``scaling`` times against one size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    families = next(iter(gpus.values()))
    rows = saved.jobs(families)
    swept = families[saved.SWEEPS].rows if saved.SWEEPS in families else rows
    name = next(iter(families.values())).stamp["gpu"]
    paths = []
    for theme in (LIGHT, DARK):
        for kind, figure in (
            ("headlines", _ratios(_of_headlines(rows), f"{name}: times as fast as the fastest tuned peer", theme)),
            ("peers", peers(rows, name, theme)),
            ("scaling", scaling(swept, name, theme)),
        ):
            path = folder / f"{kind}_{theme.name}.png"
            _save(figure, path, theme)
            paths.append(path)
    return paths


def _save(figure, path: Path, theme: Theme) -> None:
    """As a PNG of few colours, a quarter of the bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, facecolor=theme.page)
    plt.close(figure)
    Image.open(buffer).convert("RGB").quantize(64).save(path, optimize=True)


@dataclass
class Ratios:
    """What a line of a picture shows: for each of its workloads how many times as fast it is as which peer."""

    values: list[float] = field(default_factory=list)
    peers: list[str] = field(default_factory=list)

    def add(self, row: SavedRow) -> None:
        """Count a workload, if a rival did it too."""
        if row.rival and row.vs_rival:
            self.values.append(row.vs_rival)
            self.peers.append(row.label(row.rival))

    @property
    def mean(self) -> float:
        """The geometric mean."""
        return geometric_mean(self.values)


def _of_headlines(rows: Sequence[SavedRow]) -> dict[str, Ratios]:
    lines: dict[str, Ratios] = {}
    for headline in headlines.HEADLINES:
        for row in headline.of(rows):
            lines.setdefault(headline.name, Ratios()).add(row)
    return lines


def peers(rows: Sequence[SavedRow], gpu: str, theme: Theme):
    """A dot for each workload, at how many times as fast as its best peer; the mean of each operation beside it."""
    lines: dict[str, Ratios] = {}
    for row in rows:
        lines.setdefault(row.op, Ratios()).add(row)
    title = f"{gpu}: times as fast as the fastest peer, each workload and their geometric mean"
    return _ratios(lines, title, theme)


def _ratios(lines: Mapping[str, Ratios], title: str, theme: Theme):
    """Lines in the order of their means, those without a rival left out."""
    order = sorted((name for name, line in lines.items() if line.values), key=lambda name: lines[name].mean)
    figure, axes = plt.subplots(figsize=(9, 1.1 + 0.25 * len(order)), layout="constrained")
    _dress(axes, theme)
    for i, name in enumerate(order):
        line = lines[name]
        axes.plot(
            line.values, [i] * len(line.values), "o", color=theme.ours, alpha=0.55, markersize=6, markeredgewidth=0
        )
        axes.plot([line.mean] * 2, [i - 0.32, i + 0.32], color=theme.ink, linewidth=2)
        axes.annotate(
            f"{line.mean:.2f}  {', '.join(dict.fromkeys(line.peers))}",
            (1.01, i),
            xycoords=("axes fraction", "data"),
            color=theme.dim,
            fontsize=8.5,
            va="center",
        )
    axes.axvline(1, color=theme.dim, linewidth=1)
    axes.set_xscale("log")
    ticks = [
        tick for tick in (0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50) if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]
    ]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(-0.7, len(order) - 0.3)
    axes.grid(axis="x", color=theme.rule)
    axes.set_title(title, color=theme.ink, fontsize=10)
    return figure


def scaling(rows: Sequence[SavedRow], gpu: str, theme: Theme):
    """Time against a size for some operations, with the roof."""
    chosen = panels(curves.curves(rows))
    columns = min(3, max(1, len(chosen)))
    lines = max(1, -(-len(chosen) // columns))
    figure, grid = plt.subplots(
        lines, columns, figsize=(3.6 * columns, 2.9 * lines), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(chosen) :]:
        axes.set_visible(False)
    for axes, curve in zip(grid.flat, chosen, strict=False):
        _draw(axes, curve, theme)
    figure.suptitle(f"{gpu}: microseconds against one size, the roof dashed", color=theme.ink, fontsize=10)
    return figure


def panels(found: Sequence[Curve]) -> list[Curve]:
    """The longest curve of each operation and size, those with peers first."""
    best: dict[tuple[str, str], Curve] = {}
    for key, some in curves.by_operation(found).items():
        best[key] = max(some, key=lambda curve: (len(curve.lines), len(curve.at)))
    return sorted(best.values(), key=lambda curve: (len(curve.lines) == 2, -len(curve.at)))[:PANELS]


def _draw(axes, curve: Curve, theme: Theme) -> None:
    _dress(axes, theme)
    others = iter(PEER_COLOURS)
    for name, values in curve.lines.items():
        points = [(at, us) for at, us in zip(curve.at, values, strict=True) if us]
        if name == ROOF:
            style = dict(color=theme.dim, linestyle=(0, (4, 3)), linewidth=1.3)
        elif name == OURS:
            style = dict(color=theme.ours, marker="o", markersize=4, linewidth=2)
        else:
            style = dict(color=getattr(theme, next(others, "dim")), marker="o", markersize=3, linewidth=1.2)
        axes.plot(*zip(*points, strict=True), label=curve.label(name), **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    room = charts.Axis(curve.at[0], curve.at[-1], 0, 260)
    shown = charts.roomy(curve.at, room)
    axes.set_xticks(shown, [f"{at:,}" for at in shown])
    axes.set_xticks([], minor=True)
    low, high = axes.get_ylim()
    ticks = charts.Axis(low, high, 0, 1).ticks()
    axes.set_yticks(ticks, [charts.tick(us) for us in ticks])
    axes.set_yticks([], minor=True)
    axes.grid(axis="y", color=theme.rule)
    axes.set_xlabel(SIZES[curve.size], color=theme.dim, fontsize=9)
    axes.set_title(curve.title, color=theme.ink, fontsize=9)
    axes.legend(fontsize=7.5, frameon=False, labelcolor=theme.dim)


def _dress(axes, theme: Theme) -> None:
    axes.set_facecolor(theme.page)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.dim, which="both", labelsize=8.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.rule)
