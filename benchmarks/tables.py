"""Tables of saved results in README and the documentation, filled in by ``python -m benchmarks --report``.

The text of a page between ``<!-- speed: ... -->`` and ``<!-- /speed -->`` is generated. The dots are one of

``fp8_gemm fp8_gemm_wgrad``  a line for each workload of these operations, with all GPUs side by side;
``* h200``                   a line for each operation that was measured on that GPU;
``grid fp8_gemm h200``       an operation with its rows M across and its other sizes down;
``headlines``                README's table, for the GPU that was measured last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks import figures, headlines, saved
from benchmarks.charts import number
from benchmarks.compare import geometric_mean
from benchmarks.curves import sizes_of
from benchmarks.saved import Saved, SavedRow

REGION = re.compile(r"(<!-- speed: ([\w* ]+) -->\n).*?(<!-- /speed -->)", re.DOTALL)
NONE = "–"
NOTHING = "Not measured yet."
Results = Mapping[str, Mapping[str, Saved]]  # for each GPU, each family


def fill_pages(pages: Iterable[Path], gpus: Results) -> list[Path]:
    """Fill in pages; return those that have changed."""
    changed = []
    for path in pages:
        text = path.read_text(encoding="utf-8")
        filled = fill(text, gpus)
        if filled != text:
            path.write_text(filled, encoding="utf-8")
            changed.append(path)
    return changed


def fill(text: str, gpus: Results) -> str:
    """The same page with new tables and new figures in its text (`figures`)."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}{_made(match[2].split(), gpus)}\n{match[3]}"

    return figures.fill(REGION.sub(table, text), gpus)


def _made(words: Sequence[str], gpus: Results) -> str:
    match words:
        case ["headlines"]:
            return lay_out(*headlines.table(gpus))
        case ["*", gpu]:
            return summary(gpus.get(gpu, {}))
        case ["grid", op, gpu]:
            return grid(row for row in saved.jobs(gpus.get(gpu, {})) if row.op == op)
        case operations:
            return of_operations(operations, gpus)


def of_operations(names: Sequence[str], gpus: Results) -> str:
    """A line for each workload of these operations: everything known on the first GPU, less on the others."""
    found = {gpu: {row.key: row for row in saved.jobs(families) if row.op in names} for gpu, families in gpus.items()}
    found = {gpu: rows for gpu, rows in found.items() if rows}
    if not found:
        return NOTHING
    keys = dict.fromkeys(key for op in names for rows in found.values() for key in rows if key[0] == op)
    heads = ["operation", "workload"] if len(names) > 1 else ["workload"]
    for i, gpu in enumerate(found):
        heads += [f"{gpu.upper()}, µs", *(("rate", "% of roof") if i == 0 else ()), "× best peer"]
    lines = []
    for op, workload in keys:
        cells = [f"`{op}`", workload] if len(names) > 1 else [workload]
        rows = [some.get((op, workload)) for some in found.values()]
        say_impl = len({row.impl for row in rows if row}) > 1
        for i, row in enumerate(rows):
            cells += _cells(row, say_impl=say_impl, rates=i == 0)
        lines.append(cells)
    return lay_out(heads, lines)


def _cells(row: SavedRow | None, *, say_impl: bool, rates: bool) -> list[str]:
    if row is None:
        return [NONE] * (4 if rates else 2)
    us = f"{number(row.us)} ({row.impl})" if say_impl and row.impl != "hopper" else number(row.us)
    rate = f"{row.tflops:,.0f} TFLOP/s" if row.tflops and row.tflops >= 100 else f"{number(row.gbs)} GB/s"
    known = [solid(rate), percent(row.roof_pct)] if rates else []
    return [solid(us), *known, _ratio(row, row.best_peer)]


def summary(families: Mapping[str, Saved]) -> str:
    """A line for each operation: geometric means over its workloads, and their range."""
    rows = saved.jobs(families)
    if not rows:
        return NOTHING
    lines = []
    for op in dict.fromkeys(row.op for row in rows):
        some = [row for row in rows if row.op == op]
        peers = [(row, row.rival or _own(row)) for row in some]
        names = dict.fromkeys(row.label(peer) for row, peer in peers if peer)
        eager = [row for row in some if "torch" in row.peers and row.label("torch") not in names]
        lines.append(
            [
                f"`{op}`",
                str(len(some)),
                percent(geometric_mean(row.roof_pct for row in some)),
                mean_and_range([row.times_as_fast(peer) for row, peer in peers if peer]),
                ", ".join(names) or NONE,
                mean_and_range([row.times_as_fast("torch") for row in eager]),
            ]
        )
    return lay_out(["operation", "workloads", "% of roof", "× peer", "which", "× eager torch"], lines)


def _own(row: SavedRow) -> str | None:
    """The variant of ours that a row is compared with if it has no rival."""
    return next((name for name in row.peers if name in saved.OURS_WITHOUT), None)


def grid(rows: Iterable[SavedRow]) -> str:
    """Rates for many rows or times for few, with the ratio to the fastest rival, for each M and the other sizes.

    A rival is named unless it is cuBLASLt. The mean leaves out rows whose only rival is bf16, which would flatter it.
    """
    at: dict[tuple[str, int], SavedRow] = {}
    for row in rows:
        sizes = dict(sizes_of(row.workload))
        m = sizes.pop("m", None)
        if m is not None:
            at[" x ".join(f"{size:,}" for size in sizes.values() if size), m] = row
    if not at:
        return NOTHING
    columns = sorted({m for _, m in at}, reverse=True)
    lines = [[other, *(_grid_cell(at.get((other, m))) for m in columns)] for other in dict.fromkeys(o for o, _ in at)]
    blockwise = [(m, row.vs_rival) for (_, m), row in at.items() if "cublaslt" in row.peers and row.vs_rival]
    if blockwise:
        means = (geometric_mean(ratio for at_m, ratio in blockwise if at_m == m) for m in columns)
        lines.append(["geometric mean", *(f"{mean:.2f}" for mean in means)])
    return lay_out(["N x K", *(f"M {m:,}" for m in columns)], lines)


def _grid_cell(row: SavedRow | None) -> str:
    if row is None:
        return NONE
    value = f"{row.tflops:,.0f} TFLOP/s" if row.tflops and row.tflops >= 800 else f"{number(row.us)} µs"
    if row.rival is None:
        return solid(value)
    ratio = f"{row.vs_rival:.2f}" if row.rival == "cublaslt" else _ratio(row, row.rival)
    return solid(f"{value}, {ratio}")


def solid(text: str) -> str:
    """The same text, never broken into two lines."""
    return text.replace(" ", "\u00a0")


def lay_out(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines))


def mean_and_range(ratios: Sequence[float]) -> str:
    """The geometric mean, and the range."""
    if not ratios:
        return NONE
    mean = f"{geometric_mean(ratios):.2f}"
    return mean if len(ratios) == 1 else solid(f"{mean} ({min(ratios):.2f} to {max(ratios):.2f})")


def percent(value: float) -> str:
    """Without decimals, unless below one."""
    return f"{value:.0f}" if value >= 1 else f"{value:.2g}"


def _ratio(row: SavedRow, peer: str | None) -> str:
    return NONE if peer is None else solid(f"{row.times_as_fast(peer):.2f} {row.label(peer)}")
