"""Two sets of results side by side, as ratios: ``python -m benchmarks --compare h100 h200``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rich.table import Table

from benchmarks.saved import SWEEPS, Saved, SavedRow, by_key


@dataclass(frozen=True)
class Pair:
    """The same job in both sets."""

    a: SavedRow
    b: SavedRow

    @property
    def speedup(self) -> float:
        """How many times as fast the second one is."""
        return self.a.us / self.b.us


def pairs(a: Iterable[Saved], b: Iterable[Saved]) -> list[Pair]:
    """The jobs that are in both sets; if several implementations did one, those of the same name, else the fastest.

    A family is compared with itself or, if the other set has none of that name, with whichever family did its jobs.
    """
    b = list(b)
    others_of = {one.family: [one] for one in b}
    found = []
    for one in a:
        of_b = by_key(others_of.get(one.family, [] if one.family == SWEEPS else b))
        for key, rows in by_key([one]).items():
            others = {row.impl: row for row in of_b.get(key, ())}
            if not others:
                continue
            same = [Pair(row, others[row.impl]) for row in rows if row.impl in others]
            found += same or [Pair(*(min(some, key=lambda row: row.us) for some in (rows, others.values())))]
    return found


def geometric_mean(ratios: Iterable[float]) -> float:
    """The geometric mean of ratios; 1 if there are none."""
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logs) / len(logs)) if logs else 1.0


def introduce(name: str, saved: Mapping[str, Saved]) -> list[str]:
    """What a set of results was measured on; families of one run share a line."""
    lines: dict[str, list[str]] = {}
    for family in saved.values():
        s, r = family.stamp, family.roofs
        line = f"{s['gpu']}, torch {s['torch']}, commit {s['commit'][:12]}, {s['date'][:10]}"
        if r:
            fp8 = "no fp8" if r.get("fp8_tflops") is None else f"fp8 {r['fp8_tflops']:,.0f}"
            line += f", copy {r['copy_gbs']:,.0f} GB/s, bf16 {r['bf16_tflops']:,.0f}, {fp8} TFLOP/s"
        lines.setdefault(line, []).append(family.family)
    return [f"{name}  {line} ({', '.join(families)})" for line, families in lines.items()]


def draw(found: Iterable[Pair], a: str = "A", b: str = "B") -> Table:
    """A line for each job, and the geometric mean for each operation."""
    table = Table(title=f"{b} against {a}: above 1 is faster", title_justify="left", title_style="bold")
    for heading in ("op", "workload", "impl"):
        table.add_column(heading, no_wrap=True)
    for heading in (f"{a} µs", f"{b} µs", "× as fast", "% roof", "× best peer"):
        table.add_column(heading, justify="right", no_wrap=True)
    operations: dict[str, list[Pair]] = {}
    for pair in found:
        operations.setdefault(pair.a.op, []).append(pair)
    for op, some in operations.items():
        for pair in some:
            impls = dict.fromkeys((pair.a.impl, pair.b.impl))
            table.add_row(
                op,
                pair.a.workload,
                " → ".join(impls),
                *(f"{row.us:,.1f}" for row in (pair.a, pair.b)),
                _ratio(pair.speedup),
                " → ".join(f"{row.roof_pct:.0f}" for row in (pair.a, pair.b)),
                " → ".join(f"{row.vs_best_peer:.2f}" if row.vs_best_peer else "–" for row in (pair.a, pair.b)),
            )
        if len(some) > 1:
            mean = geometric_mean(pair.speedup for pair in some)
            table.add_row("", "geometric mean", "", "", "", _ratio(mean), style="dim", end_section=True)
        else:
            table.add_section()
    return table


def _ratio(ratio: float) -> str:
    colour = "green" if ratio > 1.05 else "red" if ratio < 0.95 else "default"
    return f"[{colour}]{ratio:.3f}[/]"
