"""A skewed router becomes balanced: ``python -m benchmarks.balancing`` runs the experiment and draws it for the docs.

A gate prefers some of 64 experts: their logits differ by up to 2, while the preferences of single tokens have a
standard deviation of 1. At each step 8,192 new tokens choose 6 experts each, and `update_bias` moves every bias by one
step. Random numbers are drawn on the CPU, so that every machine sees the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import dskernels as ds

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "balancing.svg"
EXPERTS, TOP_K, TOKENS = 64, 6, 8192
RATES = (0.0, 0.001, 0.01)
STEPS = 500
EVEN = 0.1  # the load of an average expert varies by 3.6% from batch to batch, and the largest of 64 by about 8%


@dataclass(frozen=True)
class Run:
    """`violation` at each step, and the shares of the experts in the first and the last."""

    rate: float
    violation: list[float]
    first: list[float]
    last: list[float]

    def even_from(self, limit: float = EVEN, window: int = 20) -> int | None:
        """The first step from which on the violation, averaged over `steps` steps, is at most `limit`; None if there
        is none."""
        for i in range(len(self.violation) - window + 1):
            if sum(self.violation[i : i + window]) / window <= limit:
                return i
        return None


def run(rate: float, steps: int = STEPS, tokens: int = TOKENS) -> Run:
    """Let `steps` batches choose experts, moving the bias by `rate` after each."""
    generator = torch.Generator().manual_seed(0)
    skew = torch.linspace(-1, 1, EXPERTS)[torch.randperm(EXPERTS, generator=generator)]
    bias = torch.zeros(EXPERTS)
    statistics = []
    for _ in range(steps):
        logits = torch.randn(tokens, EXPERTS, generator=generator) + skew
        load = ds.route(logits, bias, top_k=TOP_K).load
        statistics.append(ds.load_statistics(load))
        ds.update_bias(bias, load, rate)
    violation = torch.stack([s.violation for s in statistics]).tolist()
    return Run(rate, violation, statistics[0].share.tolist(), statistics[-1].share.tolist())


# ---- drawing ---------------------------------------------------------------------------------------------------------

COLOURS = {0.0: "#b5651d", 0.001: "#2b6cb0", 0.01: "#2f855a"}
HEIGHT, TOP, LEFT, GAP, WIDTH = 240, 40, 60, 90, 380


def draw(runs: Sequence[Run]) -> str:
    """Draw, as an SVG, the violation at each step (left), and the experts' shares at the beginning and the end
    (right)."""
    right = LEFT + WIDTH + GAP
    most = 1.25 * max(runs[0].first)
    height = HEIGHT / max(max(r.violation) for r in runs) / 1.1
    parts = [
        *_axes(LEFT, "MaxVio: largest load / mean load - 1", "step", [0, 0.5, 1.0, 1.5, 2.0], height),
        *_axes(right, "load / mean load, experts in order", "expert", [0, 1, 2], HEIGHT / most),
    ]
    for r in runs:
        points = [(LEFT + i * WIDTH / STEPS, v * height) for i, v in enumerate(r.violation)]
        parts.append(_line(points, COLOURS[r.rate]))
    for step in range(0, STEPS + 1, 100):
        parts.append(_text(LEFT + step * WIDTH / STEPS, TOP + HEIGHT + 18, str(step)))
    for i, r in enumerate(runs):
        y = TOP + 24 + 18 * i + 40
        parts.append(f'<rect x="{LEFT + 250}" y="{y - 9}" width="14" height="4" fill="{COLOURS[r.rate]}"/>')
        parts.append(_text(LEFT + 270, y, f"rate {r.rate:g}", anchor="start"))
    slow = next(r for r in runs if r.rate == 0.001)
    for shares, colour, what in ((slow.first, COLOURS[0.0], "first step"), (slow.last, COLOURS[0.001], "last, 0.001")):
        points = [(right + i * WIDTH / EXPERTS, v * HEIGHT / most) for i, v in enumerate(sorted(shares))]
        parts.append(_line(points, colour))
        y = TOP + 24 + (0 if what == "first step" else 18)
        parts.append(f'<rect x="{right + 30}" y="{y - 9}" width="14" height="4" fill="{colour}"/>')
        parts.append(_text(right + 50, y, what, anchor="start"))
    size = f"{right + WIDTH + 30} {TOP + HEIGHT + 50}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-family="Helvetica, Arial, sans-serif"'
    background = '<rect width="100%" height="100%" fill="#fff"/>'
    return "\n".join([f'{head} font-size="12">', background, *parts, "</svg>", ""])


def _axes(x: float, title: str, below: str, ticks: Sequence[float], height: float) -> list[str]:
    bottom = TOP + HEIGHT
    parts = [
        f'<path d="M{x} {TOP}V{bottom}H{x + WIDTH}" fill="none" stroke="#444"/>',
        _text(x, TOP - 14, title, anchor="start"),
        _text(x + WIDTH / 2, bottom + 36, below),
    ]
    for tick in ticks:
        y = bottom - tick * height
        if y >= TOP:
            parts.append(f'<path d="M{x} {y:.1f}H{x + WIDTH}" stroke="#ddd"/>')
            parts.append(_text(x - 8, y + 4, f"{tick:g}", anchor="end"))
    return parts


def _line(points: Sequence[tuple[float, float]], colour: str) -> str:
    path = " ".join(f"{x:.1f},{TOP + HEIGHT - y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="#222">{text}</text>'


def main() -> None:
    """Run the experiment, print when each rate is balanced, and draw the picture."""
    runs = [run(rate) for rate in RATES]
    for r in runs:
        even = r.even_from()
        when = f"even from step {even}" if even is not None else "not even"
        print(f"rate {r.rate:g}: MaxVio {r.violation[0]:.2f} at first, {r.violation[-1]:.3f} at last, {when}")
    PICTURE.write_text(draw(runs))
    print(f"drawn: {PICTURE}")


if __name__ == "__main__":
    main()
