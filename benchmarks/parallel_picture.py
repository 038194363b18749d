"""What several GPUs do beside one, from the saved results: ``python -m benchmarks.parallel_picture``.

Writes ``docs/images/parallel.svg``: the rate of the exchanges by size, and tokens a second of all GPUs by their number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import charts

RESULTS = Path(__file__).parent / "results" / "h200" / "parallel.json"
COLORS = {"nccl": "#999", "dispatch": "#3a78c2", "combine": "#23804d", "data": "#d08a2e", "expert": "#3a78c2"}
WIDTH, HEIGHT, LEFT, TOP = 270, 190, 56, 40
LABELS = 225  # pixels beside a panel for what its lines are


def main() -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))["found"]
    out = Path("docs/images/parallel.svg")
    out.write_text(draw(found), encoding="utf-8")
    print(out)


def draw(found: Mapping[str, Any]) -> str:
    """Two panels side by side; legible on light and on dark pages."""
    second = LEFT + WIDTH + LABELS
    size = f"0 0 {second + WIDTH + LABELS} {TOP + HEIGHT + 44}"
    style = (
        "text{font:12px sans-serif;fill:#555}.end{text-anchor:end}.mid{text-anchor:middle}"
        "@media(prefers-color-scheme:dark){text{fill:#bbb}}"
    )
    parts = [*_exchanges(found["large"]), f'<g transform="translate({second - LEFT} 0)">', *_training(found), "</g>"]
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}"><style>{style}</style>{"".join(parts)}</svg>\n'


def _exchanges(large: Sequence[Mapping[str, Any]]) -> list[str]:
    """GB/s of a message's bytes, by the tokens of a rank."""
    top = max(row[f"{name}_gb_per_s"] for row in large for name in ("nccl", "dispatch", "combine"))
    most = -(-top // 100) * 100
    labels = [f"{row['tokens']:,}" for row in large]
    parts = _frame("7,168 bf16 a token, its own rank's included, GB/s", "tokens of a rank", labels, most, 100)
    lines = {
        label: ([row[f"{name}_gb_per_s"] for row in large], COLORS[name])
        for name, label in (("nccl", "all-to-all of NCCL"), ("dispatch", "dispatch"), ("combine", "combine"))
    }
    return parts + _lines(lines, most)


def _training(found: Mapping[str, Any]) -> list[str]:
    """Tokens a second of all GPUs, by their number."""
    training, ranks = found["training"], found["ranks"]
    counts = [1, ranks]
    most = -(-ranks * max(training["one"], training["data_gathered"]) // 100_000) * 100_000
    labels = [f"{n} GPU{'s' * (n > 1)}" for n in counts]
    parts = _frame("training, tokens a second of all GPUs", "", labels, most, most / 5)
    one = training["one"]
    lines = {"in proportion": ([one, ranks * one], COLORS["nccl"])}
    for kind, name in (("data", "gathered"), ("expert", "overlap")):
        rate = training[f"{kind}_{name}"]
        lines[f"{kind}={ranks},{name} ({rate / one:.0%} a GPU)"] = ([one, ranks * rate], COLORS[kind])
    return parts + _lines(lines, most)


def _frame(title: str, below: str, labels: Sequence[str], most: float, step: float) -> list[str]:
    parts = [f'<text x="{LEFT}" y="18">{title}</text>']
    value = 0.0
    while value <= most:
        y = _y(value, most)
        parts.append(f'<path d="M{LEFT} {y:.1f}h{WIDTH}" stroke="#999" stroke-opacity="0.35"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">{value:,.0f}</text>')
        value += step
    for i, label in enumerate(labels):
        parts.append(f'<text class="mid" x="{_x(i, len(labels)):.1f}" y="{TOP + HEIGHT + 18}">{label}</text>')
    parts.append(f'<text class="mid" x="{LEFT + WIDTH / 2}" y="{TOP + HEIGHT + 36}">{below}</text>')
    return parts


def _lines(lines: Mapping[str, tuple[Sequence[float], str]], most: float) -> list[str]:
    """Lines by what they are, each the values and the colour; the first, what others are held against, is dashed."""
    labels = charts.spread({label: _y(values[-1], most) for label, (values, _) in lines.items()}, TOP, TOP + HEIGHT)
    parts = []
    for i, (label, (values, color)) in enumerate(lines.items()):
        points = [(_x(at, len(values)), _y(value, most)) for at, value in enumerate(values)]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        dashes = "" if i else ' stroke-dasharray="4 3"'
        parts.append(f'<path d="{path}" fill="none" stroke="{color}" stroke-width="2"{dashes}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in points]
        place = f'x="{LEFT + WIDTH + 6}" y="{labels[label] + 4:.1f}"'
        parts.append(f'<text {place} style="fill:{color}">{label}</text>')
    return parts


def _x(i: int, n: int) -> float:
    return LEFT + WIDTH * (0.12 + 0.8 * i / max(n - 1, 1))


def _y(value: float, most: float) -> float:
    return TOP + HEIGHT * (1 - value / most)


if __name__ == "__main__":
    main()
