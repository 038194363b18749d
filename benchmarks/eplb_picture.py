"""Load of the ranks before and after redundant experts are placed: ``python -m benchmarks.eplb_picture``.

256 experts on 32 ranks of 4 nodes, 32 places more, as DeepSeek-V3 is served for prompts; the load is skewed as a power
law, and drifts by up to a half before the plan is made again. Writes ``docs/images/eplb.svg``.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from dskernels.model.parallel.balance import Placement, even, place_experts

RANKS, PLACES, NODES, GROUPS = 32, 288, 4, 8


def main() -> None:
    chance = random.Random(0)
    load = [round(1e5 / (i + 8)) for i in range(256)]
    chance.shuffle(load)
    drifted = [round(x * chance.uniform(0.5, 1.5)) for x in load]
    within: dict[str, Any] = dict(ranks=RANKS, places=PLACES, nodes=NODES, groups=GROUPS)
    anywhere: dict[str, Any] = dict(ranks=RANKS, places=PLACES)
    rows: list[tuple[str, Placement, list[int]]] = [("one place each", even(256, RANKS), load)]
    for name, options in (("within nodes", within), ("over all ranks", anywhere)):
        plan = place_experts(load, **options)
        after, anew = place_experts(drifted, **options, before=plan), place_experts(drifted, **options)
        rows.append((f"32 copies, {name}", plan, load))
        rows.append(("… after the load has drifted", plan, drifted))
        moves = f"{after.moves(plan)} of {PLACES} weights move (a fresh plan moves {anew.moves(plan)})"
        rows.append((f"… planned again: {moves}", after, drifted))
    Path("docs/images/eplb.svg").write_text(draw(rows))
    for name, placement, loads in rows:
        print(f"{placement.imbalance(loads):.3f}  {name}")


def draw(rows: list[tuple[str, Placement, list[int]]]) -> str:
    """Bars of every rank's load over the mean, a row a placement."""
    height, width, left, parts = 54, 14, 8, []  # so wide that the longest heading fits
    for i, (name, placement, load) in enumerate(rows):
        loads = placement.loads(load)
        mean, top = sum(loads) / len(loads), 24 + i * (height + 26)
        parts.append(f'<text x="{left}" y="{top - 6}">{name}: busiest {max(loads) / mean:.2f} of the mean</text>')
        for rank, each in enumerate(loads):
            tall = each / mean * height / 2.1
            color = "#3a78c2" if each < 1.1 * mean else "#d08a2e"
            x, y = left + rank * (width + 3), top + height - tall
            parts.append(f'<rect x="{x}" y="{y:.1f}" width="{width}" height="{tall:.1f}" fill="{color}"/>')
        line = top + height - height / 2.1
        parts.append(f'<path d="M{left} {line:.1f}h{RANKS * (width + 3)}" stroke="#999" stroke-dasharray="3 3"/>')
    bottom = 24 + len(rows) * (height + 26)
    style = "text{font:12px sans-serif;fill:#555}@media(prefers-color-scheme:dark){text{fill:#bbb}}"
    size = f"0 0 {2 * left + RANKS * (width + 3)} {bottom}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}"><style>{style}</style>' + "".join(parts) + "</svg>\n"
    )


if __name__ == "__main__":
    main()
