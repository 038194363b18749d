"""Curves from saved results: how time grows with one size while the others stay the same.

The name of a workload contains its sizes (``b128_s4096_q1_h128``), so curves are found by name: rows of one operation
that differ in a single number lie on one curve.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.saved import SavedRow

FEWEST = 3  # the least number of points in a curve
OURS, ROOF = "dskernels", "roof"

# Sizes to plot, and their names on an axis. Other parts of a name (n, k) only tell curves apart.
SIZES = {
    "m": "rows M",
    "t": "tokens T",
    "b": "batch",
    "s": "context",
    "h": "heads",
    "e": "experts E",
    "g": "groups",
    "draft": "drafts",
}


@dataclass(frozen=True)
class Curve:
    """Time against one size: ours, the roof, and each peer.

    Attributes:
        op: the operation.
        size: a key of `SIZES`.
        others: the sizes that stay, as the name spells them.
        rows: the points, in order of the size.
        at: the size of each.
    """

    op: str
    size: str
    others: str
    rows: tuple[SavedRow, ...]
    at: tuple[int, ...]

    @property
    def title(self) -> str:
        """What is drawn."""
        return f"{self.op}, {self.others}" if self.others else self.op

    def label(self, line: str) -> str:
        """What a line is called."""
        return line if line in (OURS, ROOF) else self.rows[0].label(line)

    @property
    def lines(self) -> dict[str, list[float | None]]:
        """Microseconds of each line at each point, None where it has none: the roof, each peer, and ours."""
        peers = dict.fromkeys(name for row in self.rows for name in row.peers)
        return {
            ROOF: [row.roof_us for row in self.rows],
            **{name: [row.peers.get(name) for row in self.rows] for name in peers},
            OURS: [row.us for row in self.rows],
        }


def sizes_of(workload: str) -> tuple[tuple[str, int | None], ...]:
    """The parts of a name: ``b128_s4096_varied`` is (("b", 128), ("s", 4096), ("varied", None))."""
    parts = (re.fullmatch(r"([a-z]+?)(\d+)", part) for part in workload.split("_"))
    return tuple(
        (match[1], int(match[2])) if match else (part, None)
        for match, part in zip(parts, workload.split("_"), strict=True)
    )


def curves(rows: Iterable[SavedRow]) -> list[Curve]:
    """Every curve of `FEWEST` points or more; of a job that several implementations did the fastest counts."""
    fastest: dict[tuple[str, str], SavedRow] = {}
    for row in rows:
        if row.key not in fastest or row.us < fastest[row.key].us:
            fastest[row.key] = row
    found: dict[tuple[str, str, str], list[tuple[int, SavedRow]]] = {}
    for row in fastest.values():
        for name, value, others in _axes(row):
            found.setdefault((row.op, name, others), []).append((value, row))
    drawn = []
    for (op, name, others), points in found.items():
        points.sort(key=lambda point: point[0])
        if len({value for value, _ in points}) >= FEWEST:
            drawn.append(Curve(op, name, others, tuple(r for _, r in points), tuple(v for v, _ in points)))
    return drawn


def _axes(row: SavedRow) -> list[tuple[str, int, str]]:
    """Each size of a row that a curve may run along, its value, and the rest of the name."""
    parts = sizes_of(row.workload)
    # h is a number of heads in attention and of channels elsewhere; only attention has a batch or a context beside it.
    attention = row.op.startswith(("mla", "merge", "prefill", "decode"))
    axes = []
    for i, (name, value) in enumerate(parts):
        if value is None or name not in SIZES or (name == "h" and not attention):
            continue
        rest = "_".join(n if v is None else f"{n}{v}" for j, (n, v) in enumerate(parts) if j != i)
        axes.append((name, value, rest))
    return axes


def by_operation(found: Sequence[Curve]) -> dict[tuple[str, str], list[Curve]]:
    """Curves of one operation along one size, which share a picture's axis."""
    grouped: dict[tuple[str, str], list[Curve]] = {}
    for curve in found:
        grouped.setdefault((curve.op, curve.size), []).append(curve)
    return grouped
