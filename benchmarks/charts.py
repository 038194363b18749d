"""Pictures of a report as SVG text. Colours are CSS classes, so that the page can be light or dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from benchmarks.curves import OURS, ROOF, SIZES, Curve

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 130, 14, 44
TICK_ROOM, LABEL_ROOM = 46, 15  # pixels that a tick on the x axis needs, and a label at the end of a line


def number(value: float) -> str:
    """Three digits, or all digits before the decimal point: 0.123, 12.3, 1,234."""
    digits = max(0, 2 - math.floor(math.log10(float(f"{value:.2e}")))) if 0 < value < 100 else 0
    return f"{value:,.{digits}f}"


def tick(value: float) -> str:
    """The number at a tick, which is round: 1,000, 30, 0.001."""
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def scaling(curve: Curve) -> str:
    """Time against a size, on logarithmic axes, with the roof."""
    lines = curve.lines
    us = [value for values in lines.values() for value in values if value]
    x = Axis(curve.at[0], curve.at[-1], LEFT, WIDTH - RIGHT)
    y = Axis(min(us) / 1.3, max(us) * 1.3, HEIGHT - BOTTOM, TOP)
    parts = [
        *_grid(x, y, curve),
        *(part for name, values in lines.items() for part in _line(name, values, curve, x, y)),
    ]
    ends = {name: next(y(v) for v in reversed(values) if v) for name, values in lines.items()}
    for name, at in spread(ends, TOP, HEIGHT - BOTTOM).items():
        place = f'x="{WIDTH - RIGHT + 10}" y="{at + 4:.1f}"'
        parts.append(f'<text class="label {colour(name)}" {place}>{escape(curve.label(name))}</text>')
    title = f"{curve.title}: microseconds against {SIZES[curve.size]}"
    body = "\n".join(parts)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">\n'
        f"<title>{escape(title)}</title>\n{body}\n</svg>"
    )


def colour(name: str) -> str:
    """The CSS class of a line: ours and the roof have their own, peers another each."""
    return {OURS: "ours", ROOF: "roof"}.get(name, f"peer-{name}")


class Axis:
    """A logarithmic axis from `low` to `high`, drawn from one pixel to another."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high = low, max(high, low * 1.01)
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Powers of ten, or 1, 2 and 5 times these where there would be fewer than three."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5)):
            found = [step * 10.0**decade for decade in decades for step in steps]
            found = [value for value in found if self.low <= value <= self.high]
            if len(found) >= 3:
                break
        return found


def spread(wanted: dict[str, float], low: float, high: float) -> dict[str, float]:
    """Move labels apart that would overlap, keeping their order, within bounds."""
    names = sorted(wanted, key=wanted.__getitem__)
    at = [wanted[name] for name in names]
    for i in range(1, len(at)):
        at[i] = max(at[i], at[i - 1] + LABEL_ROOM)
    overflow = max(0.0, at[-1] - high) if at else 0.0
    if overflow:
        at[-1] -= overflow
        for i in range(len(at) - 2, -1, -1):
            at[i] = min(at[i], at[i + 1] - LABEL_ROOM)
    return {name: max(low, value) for name, value in zip(names, at, strict=True)}


def _grid(x: Axis, y: Axis, curve: Curve) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for value in y.ticks():
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 8}" y="{y(value) + 4:.1f}">{tick(value)}</text>')
    for value in roomy(curve.at, x):
        parts.append(f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{bottom}" y2="{bottom + 5}"/>')
        parts.append(f'<text class="tick middle" x="{x(value):.1f}" y="{bottom + 18}">{value:,}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text class="tick end" x="{right}" y="{HEIGHT - 8}">{SIZES[curve.size]}</text>')
    parts.append(f'<text class="tick" x="4" y="{HEIGHT - 8}">µs</text>')
    return parts


def roomy(values: Sequence[int], x: Axis) -> list[int]:
    """The labels that have room: always the last, then others from the right."""
    kept: list[int] = []
    for value in sorted(set(values), reverse=True):
        if not kept or x(kept[-1]) - x(value) >= TICK_ROOM:
            kept.append(value)
    return kept


def _line(name: str, values: Sequence[float | None], curve: Curve, x: Axis, y: Axis) -> list[str]:
    points = [(x(at), y(value), at, value) for at, value in zip(curve.at, values, strict=True) if value]
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _, _ in points)
    parts = [f'<polyline class="line {colour(name)}" points="{path}"/>']
    if name != ROOF:
        for px, py, at, value in points:
            hint = f"{curve.label(name)}: {number(value)} µs at {SIZES[curve.size]} {at:,}"
            dot = f'<circle class="dot {colour(name)}" cx="{px:.1f}" cy="{py:.1f}" r="3.5">'
            parts.append(f"{dot}<title>{escape(hint)}</title></circle>")
    return parts
