"""Tables of saved results in the documentation, filled in by ``python -m benchmarks --report``.

A page says where: what stands between ``<!-- speed: fp8_gemm fp8_gemm_wgrad -->`` and ``<!-- /speed -->`` becomes a
table of these operations; with ``*`` it is one line for each operation that was measured.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.charts import number
from benchmarks.compare import geometric_mean
from benchmarks.saved import Saved, SavedRow

REGION = re.compile(r"(<!-- speed: ([\w* ]+) -->\n).*?(<!-- /speed -->)", re.DOTALL)
NONE = "–"
Results = Mapping[str, Mapping[str, Saved]]  # of each GPU, each family


def fill_pages(folder: Path, gpus: Results) -> list[Path]:
    """Fill in all pages of a folder; return those that have changed."""
    changed = []
    for path in sorted(folder.rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        filled = fill(text, gpus)
        if filled != text:
            path.write_text(filled, encoding="utf-8")
            changed.append(path)
    return changed


def fill(text: str, gpus: Results) -> str:
    """The same page with its tables made anew."""

    def table(match: re.Match[str]) -> str:
        names = match[2].split()
        made = summary(gpus) if names == ["*"] else of_operations(names, gpus)
        return f"{match[1]}{made}\n{match[3]}"

    return REGION.sub(table, text)


def of_operations(names: Sequence[str], gpus: Results) -> str:
    """A line for each workload of these operations, and a group of columns for each GPU that has any of them."""
    found = {gpu: _fastest(families, names) for gpu, families in gpus.items()}
    found = {gpu: rows for gpu, rows in found.items() if rows}
    if not found:
        return "Not measured yet."
    keys = dict.fromkeys(key for op in names for rows in found.values() for key in rows if key[0] == op)
    heads = ["operation", "workload"] if len(names) > 1 else ["workload"]
    heads += [head for gpu in found for head in (f"{gpu.upper()}, µs", "rate", "% of roof", "× best peer")]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for op, workload in keys:
        cells = [f"`{op}`", workload] if len(names) > 1 else [workload]
        for rows in found.values():
            cells += _cells(rows.get((op, workload)))
        lines.append(_line(cells))
    return "\n".join(lines)


def summary(gpus: Results) -> str:
    """A line for each operation: geometric means over its workloads."""
    heads = ["operation"]
    heads += [head for gpu in gpus for head in (f"{gpu.upper()}, workloads", "% of roof", "× best peer", "from … to")]
    found = {gpu: _fastest(families, None) for gpu, families in gpus.items()}
    operations = dict.fromkeys(op for rows in found.values() for op, _ in rows)
    lines = [_line(heads), _line(["---"] * len(heads))]
    for op in operations:
        cells = [f"`{op}`"]
        for rows in found.values():
            some = [row for row in rows.values() if row.op == op]
            ratios = [row.vs_best_peer for row in some if row.vs_best_peer]
            cells += [
                str(len(some)) if some else NONE,
                _percent(geometric_mean(row.roof_pct for row in some)) if some else NONE,
                f"{geometric_mean(ratios):.2f}" if ratios else NONE,
                f"{min(ratios):.2f} … {max(ratios):.2f}" if ratios else NONE,
            ]
        lines.append(_line(cells))
    return "\n".join(lines)


def _fastest(families: Mapping[str, Saved], names: Sequence[str] | None) -> dict[tuple[str, str], SavedRow]:
    rows: dict[tuple[str, str], SavedRow] = {}
    for family in families.values():
        for row in family.rows:
            if (names is None or row.op in names) and (row.key not in rows or row.us < rows[row.key].us):
                rows[row.key] = row
    return rows


def _cells(row: SavedRow | None) -> list[str]:
    if row is None:
        return [NONE] * 4
    rate = f"{row.tflops:,.0f} TFLOP/s" if row.tflops and row.tflops >= 100 else f"{number(row.gbs)} GB/s"
    ratio = NONE if row.vs_best_peer is None else f"{row.vs_best_peer:.2f} `{row.best_peer}`"
    return [number(row.us), rate, _percent(row.roof_pct), ratio]


def _percent(percent: float) -> str:
    return f"{percent:.0f}" if percent >= 1 else f"{percent:.2g}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
