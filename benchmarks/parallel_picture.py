"""What several GPUs do beside one, from the saved results: ``python -m benchmarks.parallel_picture``.

Writes ``docs/images/parallel.svg``: the rate of the exchanges by size, and tokens a second of all GPUs by their number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "h200" / "parallel.json"
COLORS = {"nccl": "#999", "dispatch": "#3a78c2", "combine": "#23804d", "data": "#d08a2e", "expert": "#3a78c2"}
WIDTH, HEIGHT, LEFT, TOP = 330, 190, 56, 40


def main() -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))["found"]
    out = Path("docs/images/parallel.svg")
    out.write_text(draw(found), encoding="utf-8")
    print(out)


def draw(found: Mapping[str, Any]) -> str:
    """Two panels side by side; legible on light and on dark pages."""
    second = LEFT + WIDTH + 90
    size = f"0 0 {second + WIDTH + 60} {TOP + HEIGHT + 44}"
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
    parts = _frame("exchange of 7,168 bf16 a token, GB/s", "tokens of a rank", labels, most, 100)
    for name in ("nccl", "dispatch", "combine"):
        points = [(_x(i, len(large)), _y(row[f"{name}_gb_per_s"], most)) for i, row in enumerate(large)]
        label = "all-to-all of NCCL" if name == "nccl" else name
        parts += _line(points, COLORS[name], label, dashed=name == "nccl", up=name != "combine")
    return parts


def _training(found: Mapping[str, Any]) -> list[str]:
    """Tokens a second of all GPUs, by their number."""
    training, ranks = found["training"], found["ranks"]
    counts = [1, ranks]
    most = -(-ranks * max(training["one"], training["data_gathered"]) // 100_000) * 100_000
    labels = [f"{n} GPU{'s' * (n > 1)}" for n in counts]
    parts = _frame("training, tokens a second of all GPUs", "", labels, most, most / 5)
    lines = {"in proportion": ranks * training["one"]}
    lines |= {
        f"data={ranks},gathered": ranks * training["data_gathered"],
        f"expert={ranks},overlap": ranks * training["expert_overlap"],
    }
    for i, (label, rate) in enumerate(lines.items()):
        points = [(_x(0, 2), _y(training["one"], most)), (_x(1, 2), _y(rate, most))]
        color = COLORS.get(label.partition("=")[0], "#999")
        share = "" if i == 0 else f" ({rate / ranks / training['one']:.0%} a GPU)"
        parts += _line(points, color, label + share, dashed=i == 0, up=i != 1, shift=-14 + 15 * i)
    return parts


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


def _line(
    points: Sequence[tuple[float, float]], color: str, label: str, *, dashed: bool, up: bool, shift: float = 0.0
) -> list[str]:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dashes = ' stroke-dasharray="4 3"' * dashed
    parts = [f'<path d="{path}" fill="none" stroke="{color}" stroke-width="2"{dashes}/>']
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in points]
    x, y = points[-1]
    place = y + (shift or (-8 if up else 16))
    parts.append(f'<text class="end" x="{x - 4:.1f}" y="{place:.1f}" style="fill:{color}">{label}</text>')
    return parts


def _x(i: int, n: int) -> float:
    return LEFT + WIDTH * (0.12 + 0.8 * i / max(n - 1, 1))


def _y(value: float, most: float) -> float:
    return TOP + HEIGHT * (1 - value / most)


if __name__ == "__main__":
    main()
