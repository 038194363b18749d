"""One page of all saved results, which needs nothing else: ``python -m benchmarks --report``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from benchmarks import charts, curves, saved, tables
from benchmarks.compare import geometric_mean
from benchmarks.saved import Saved, SavedRow

PAGE = Path(__file__).parent / "page"
DOCS = Path(__file__).parent.parent / "docs"
README = DOCS.parent / "README.md"
MOST_RATIO = 3.0  # where a bar of a ratio is full

# What a heading says, and whether the column holds text.
COLUMNS = (
    ("operation", True),
    ("workload", True),
    ("implementation", True),
    ("µs", False),
    ("20% to 80%", False),
    ("TFLOP/s", False),
    ("GB/s", False),
    ("% of roof", False),
    ("× best peer", False),
    ("best peer", True),
    ("host µs", False),
)
ROOFS = ("copy GB/s", "bf16 TFLOP/s", "fp8 TFLOP/s")
STAMP = (
    "family",
    "date",
    "commit",
    "torch, Triton, CUDA",
    "driver",
    *ROOFS,
    "warm after",
    "drift of the roofs",
    "clock MHz",
)


def write(folder: Path, results: Path = saved.FOLDER) -> list[Path]:
    """Write ``report.html`` and its pictures from what is saved, and the tables of the pages there; return the paths.

    Args:
        folder: where to. Beside the documentation README's tables are made as well.
        results: where the saved results are.
    """
    gpus = saved.everything(results)
    if not gpus:
        raise saved.NotThere(f"no results in {results}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    path.write_text(page(gpus), encoding="utf-8")
    pages = [*sorted(folder.rglob("*.md")), *([README] if folder.resolve() == DOCS else [])]
    written = [path, *tables.fill_pages(pages, gpus)]
    try:
        from benchmarks import pictures
    except ImportError:  # matplotlib is an extra
        return written
    return [*written, *pictures.write(gpus, folder / "images")]


def page(gpus: Mapping[str, Mapping[str, Saved]]) -> str:
    """The whole page."""
    style, script = ((PAGE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    buttons = " ".join(f'<button data-gpu="{escape(gpu)}">{escape(gpu.upper())}</button>' for gpu in gpus)
    sections = "\n".join(_gpu(gpu, families) for gpu, families in gpus.items())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>dskernels: benchmark report</title>
<style>
{style}</style>
</head>
<body>
<header><h1>dskernels: benchmark report</h1>
{buttons}
<input id="filter" type="search" placeholder="filter: fp8_gemm m4096" aria-label="filter rows">
<button id="theme">light / dark</button></header>
<main>
<p>Operations of models built like DeepSeek-V3, on the model's own shapes. Times are of the device with a cold L2: the
median, and what 20% and 80% of the runs stayed below. The roof is what the same machine was measured to reach in the
same run, in copying or in matrix products, whichever binds, where a family does not say otherwise. Peers run in the
same process, in turns with ours and in both orders; “× best peer” is the fastest peer's time over ours, so above 1 is
faster than it. A pale bar is of a peer that is no rival: eager PyTorch where it is a chain of kernels, or dskernels
itself without what the row is about.
Compare ratios within a family, whose numbers are of one run, and times between machines with care.</p>
{sections}
</main>
<footer>Written by <code>python -m benchmarks --report</code> from <code>benchmarks/results</code>.</footer>
<script>
{script}</script>
</body>
</html>
"""


def _gpu(gpu: str, families: Mapping[str, Saved]) -> str:
    rows = saved.jobs(families)
    parts = [
        f'<section data-gpu="{escape(gpu)}">',
        f"<h2>{escape(next(iter(families.values())).stamp['gpu'])}</h2>",
        _stamps(families),
        "<h3>Each operation, in the geometric mean of its workloads</h3>",
        _overview(rows),
    ]
    for family in families.values():
        parts.append(f'<div class="family"><h3>{escape(family.family)}</h3>')
        if note := family.stamp.get("note"):
            parts.append(f"<p>{escape(note)}.</p>")
        parts += [_table(family.rows), _charts(family.rows), "</div>"]
    return "\n".join([*parts, "</section>"])


def _stamps(families: Mapping[str, Saved]) -> str:
    """What each family was measured on, and how steady that was."""
    lines = []
    for family in families.values():
        s, r, clocks = family.stamp, family.roofs, family.stamp.get("clocks") or {}
        moved = {name: round(clocks[name] - 1, 3) + 0.0 for name in ("copy", "bf16", "fp8") if clocks.get(name)}
        drift = ", ".join(f"{name} {share:+.1%}" for name, share in moved.items()) or "–"
        mhz = [f"{clocks[n]:,.0f}" for n in ("mhz_before", "mhz_after") if clocks.get(n)]
        cells = [
            family.family,
            s["date"][:10],
            s["commit"][:12],
            f"{s['torch']}, {s['triton']}, {s['cuda']}",
            s["driver"],
            *("–" if r.get(name) is None else f"{r[name]:,.0f}" for name in ("copy_gbs", "bf16_tflops", "fp8_tflops")),
            f"{clocks['turns']:.0f} turns" if clocks.get("turns") else "–",
            drift,
            " to ".join(mhz) or "–",
        ]
        lines.append("<tr>" + "".join(f'<td class="text">{escape(str(cell))}</td>' for cell in cells) + "</tr>")
    head = "".join(f'<th class="text">{name}</th>' for name in STAMP)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _overview(rows: Sequence[SavedRow]) -> str:
    operations: dict[str, list[SavedRow]] = {}
    for row in rows:
        operations.setdefault(row.op, []).append(row)
    lines = []
    for op, some in operations.items():
        # Beside rivals where there are any, so that no mean is of both.
        rivals = [row.rival for row in some if row.rival]
        counted = [(row, row.rival if rivals else row.best_peer) for row in some]
        ratios = [row.times_as_fast(peer) for row, peer in counted if peer]
        names = dict.fromkeys(row.label(peer) for row, peer in counted if peer)
        lines.append(
            f'<tr data-title="{escape(op)}">'
            + _text(op)
            + _text(", ".join(dict.fromkeys(row.impl for row in some)))
            + _value(len(some), f"{len(some)}")
            + _share(geometric_mean(row.roof_pct for row in some))
            + (_ratio(geometric_mean(ratios), rival=bool(rivals)) if ratios else _value(None, "–"))
            + _value(min(ratios, default=None), f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "–")
            + _text(", ".join(names) or "–")
            + "</tr>"
        )
    columns = (("operation", True), ("implementation", True), ("workloads", False), ("% of roof", False))
    return _sortable((*columns, ("× best peer", False), ("range", False), ("best peer", True)), lines)


def _table(rows: Sequence[SavedRow]) -> str:
    lines = []
    for row in rows:
        ratio = row.vs_best_peer
        peers = ", ".join(f"{row.label(name)} {charts.number(us)} µs" for name, us in row.peers.items())
        drift = "" if row.drift is None else f"; second half of the runs over the first {row.drift:.3f}"
        lines.append(
            f'<tr data-title="{escape(f"{row.op} {row.workload} {row.impl}")}"'
            f' title="{escape((peers or "no peer") + drift)}">'
            + _text(row.op)
            + _text(row.workload)
            + _text(row.impl)
            + _value(row.us, charts.number(row.us))
            + _value(row.p80 - row.p20, f"{charts.number(row.p20)}–{charts.number(row.p80)}")
            + _value(row.tflops, "–" if row.tflops is None else f"{row.tflops:,.0f}")
            + _value(row.gbs, charts.number(row.gbs))
            + _share(row.roof_pct)
            + (_ratio(ratio, rival=row.rival is not None) if ratio else _value(None, "–"))
            + _text(row.label(row.best_peer) if row.best_peer else "–")
            + _value(row.host_us, "–" if row.host_us is None else f"{row.host_us:,.0f}")
            + "</tr>"
        )
    return _sortable(COLUMNS, lines)


def _charts(rows: Sequence[SavedRow]) -> str:
    figures = [
        f'<figure data-title="{escape(curve.title)}"><figcaption>{escape(curve.title)}</figcaption>'
        f"{charts.scaling(curve)}</figure>"
        for curve in curves.curves(rows)
    ]
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _sortable(columns: Sequence[tuple[str, bool]], lines: Sequence[str]) -> str:
    kinds = (' class="text"' if text else "" for _, text in columns)
    heads = "".join(f"<th{kind}><button>{name}</button></th>" for (name, _), kind in zip(columns, kinds, strict=True))
    body = "\n".join(lines)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _text(text: str) -> str:
    return f'<td class="text">{escape(text)}</td>'


def _value(value: float | None, shown: str) -> str:
    """A cell that sorts by its number; what has none sorts last."""
    return f'<td data-value="{"" if value is None else f"{value:.6g}"}">{shown}</td>'


def _share(percent: float) -> str:
    return _bar(percent, tables.percent(percent), min(100.0, percent))


def _ratio(ratio: float, *, rival: bool) -> str:
    """A bar with a mark where ours and the peer are as fast."""
    mark = f'<b style="left:{100 / MOST_RATIO:.1f}%"></b>'
    kind = "bar lost" if ratio < 1 else "bar" if rival else "bar pale"
    return _bar(ratio, f"{ratio:.2f}", min(100.0, 100 * ratio / MOST_RATIO), mark, kind)


def _bar(value: float, shown: str, width: float, mark: str = "", kind: str = "bar") -> str:
    return (
        f'<td class="{kind}" data-value="{value:.6g}"><i style="width:{width:.1f}%"></i>{mark}<span>{shown}</span></td>'
    )
