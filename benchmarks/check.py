"""A gate: has anything become slower than what was saved of this GPU? ``python -m benchmarks gemm --check``

A figure has fallen if it is more than 5% below the saved one however it is looked at: as a time, as a share of the roof
that was measured in its own run, and as a ratio to the same peer timed beside it. A machine that is slower as a whole
moves the first and leaves the others; a roof or a peer that was measured badly moves one of these and leaves the time.
And it has to have fallen in every repetition: noise goes both ways, a loss stays. What fell is timed again, inputs and
roofs too, until it once did not fall, or three times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich.box import HEAVY_HEAD
from rich.table import Table

from benchmarks.saved import Saved, SavedRow

MARGIN = 0.05
REPEATS = 3


@dataclass(frozen=True)
class Verdict:
    """How one job stands beside what was saved of it.

    Attributes:
        ratios: for each repetition the speed now over that of then, by the kindest of its views: below 1 is a loss.
        views: the same by each view (time, roof, each peer), of the kindest repetition.
    """

    saved: SavedRow
    impl: str
    us: float
    ratios: tuple[float, ...]
    views: dict[str, float]

    @property
    def ratio(self) -> float:
        """The kindest of all."""
        return max(self.ratios)

    @property
    def fell(self) -> bool:
        """Whether it is a loss."""
        return self.ratio < 1 - MARGIN


def views(now: SavedRow, then: SavedRow, *, same_peers: bool = True) -> dict[str, float]:
    """The speed now over that of then, by time, by share of the roof, and beside each peer that is in both.

    A peer counts only where both runs have the same version of it, which for those of torch is torch's.
    """
    found = {"time": then.us / now.us, "roof": now.roof_pct / then.roof_pct}
    if same_peers:
        for name in now.peers.keys() & then.peers.keys():
            found[name] = (now.peers[name] / now.us) / (then.peers[name] / then.us)
    return found


def verdict(repeats: Sequence[SavedRow], then: SavedRow, *, same_peers: bool = True) -> Verdict:
    """Of one job that was timed once or more."""
    seen = [views(now, then, same_peers=same_peers) for now in repeats]
    ratios = tuple(max(view.values()) for view in seen)
    kindest = ratios.index(max(ratios))
    return Verdict(then, repeats[kindest].impl, repeats[kindest].us, ratios, seen[kindest])


def saved_figure(rows: Iterable[SavedRow], impl: str | None) -> SavedRow | None:
    """The figure to hold: of `impl` where one was asked for, else the fastest, whatever made it.

    So a job that a slower implementation takes over is a loss too.
    """
    candidates = [row for row in rows if impl is None or row.impl == impl]
    return min(candidates, key=lambda row: row.us, default=None)


def judge(
    first: SavedRow,
    then: SavedRow,
    again: Callable[[], SavedRow | None],
    *,
    same_peers: bool = True,
) -> Verdict:
    """The verdict on a job, with `again` to time it once more where it seems to have fallen.

    Args:
        first: what was timed.
        then: what was saved.
        again: times the job anew; None if that failed.
        same_peers: whether the peers are the same versions.
    """
    repeats = [first]
    while (found := verdict(repeats, then, same_peers=same_peers)).fell and len(repeats) < REPEATS:
        now = again()
        if now is None:
            break
        repeats.append(now)
    return found


def draw(verdicts: Sequence[Verdict], saved: Saved) -> Table:
    """What fell, or a title that says that nothing did."""
    fallen = [v for v in verdicts if v.fell]
    source = f"saved on {saved.stamp['date'][:10]} at {saved.stamp['commit'][:12]}"
    title = f"{saved.family}: {len(fallen)} of {len(verdicts)} figures fell by more than {MARGIN:.0%} ({source})"
    style = "bold red" if fallen else "bold green"
    table = Table(
        title=title,
        title_justify="left",
        title_style=style,
        show_header=bool(fallen),
        box=HEAVY_HEAD if fallen else None,
    )
    for heading in ("op", "workload", "impl"):
        table.add_column(heading, no_wrap=True)
    for heading in ("saved µs", "µs", "speed", "in each repetition"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("by time, roof, peers")
    for v in sorted(fallen, key=lambda v: v.ratio):
        impls = " → ".join(dict.fromkeys((v.saved.impl, v.impl)))
        table.add_row(
            v.saved.op,
            v.saved.workload,
            impls,
            f"{v.saved.us:,.1f}",
            f"{v.us:,.1f}",
            f"{v.ratio:.3f}",
            " ".join(f"{ratio:.3f}" for ratio in v.ratios),
            ", ".join(f"{name} {ratio:.3f}" for name, ratio in v.views.items()),
        )
    return table
