"""A gate: is anything slower than the saved results of this GPU? ``python -m benchmarks gemm --check``

A figure has fallen if it is more than 5% below the saved one in every view: as a time, as a share of the roof that was
measured in the same run, and as a ratio to the same peer timed next to it. A machine that is slower as a whole changes
the first view but not the others; a badly measured roof or peer changes its own view but not the time. And it has to
have fallen in every repetition, since noise goes both ways while a real loss stays. A figure that seems to have fallen
is timed again, including inputs and roofs, until it has not, or three times.
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
    """How one job compares with its saved result.

    Attributes:
        ratios: for each repetition the speed now divided by the speed then, in the most favourable view: below 1 is a
            loss.
        views: the same for each view (time, roof, each peer), in the most favourable repetition.
    """

    saved: SavedRow
    impl: str
    us: float
    ratios: tuple[float, ...]
    views: dict[str, float]

    @property
    def ratio(self) -> float:
        """The most favourable ratio."""
        return max(self.ratios)

    @property
    def fell(self) -> bool:
        """Whether it is a loss."""
        return self.ratio < 1 - MARGIN


def views(now: SavedRow, then: SavedRow, *, same_peers: bool = True) -> dict[str, float]:
    """The speed now divided by the speed then: by time, by share of the roof, and relative to each peer in both.

    A peer only counts if both runs have the same version of it; for torch's own peers that is torch's version.
    """
    found = {"time": then.us / now.us, "roof": now.roof_pct / then.roof_pct}
    if same_peers:
        for name in now.peers.keys() & then.peers.keys():
            found[name] = (now.peers[name] / now.us) / (then.peers[name] / then.us)
    return found


def verdict(repeats: Sequence[SavedRow], then: SavedRow, *, same_peers: bool = True) -> Verdict:
    """The verdict on a job that was timed once or more."""
    seen = [views(now, then, same_peers=same_peers) for now in repeats]
    ratios = tuple(max(view.values()) for view in seen)
    kindest = ratios.index(max(ratios))
    return Verdict(then, repeats[kindest].impl, repeats[kindest].us, ratios, seen[kindest])


def saved_figure(rows: Iterable[SavedRow], impl: str | None) -> SavedRow | None:
    """The saved figure to compare with: that of `impl` if one was asked for, else the fastest, whichever implementation
    it is.

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
    """The verdict on a job, timing it again with `again` if it seems to have fallen.

    Args:
        first: what was timed.
        then: what was saved.
        again: times the job anew; None if that failed.
        same_peers: whether the peers have the same versions.
    """
    repeats = [first]
    while (found := verdict(repeats, then, same_peers=same_peers)).fell and len(repeats) < REPEATS:
        now = again()
        if now is None:
            break
        repeats.append(now)
    return found


def draw(verdicts: Sequence[Verdict], saved: Saved) -> Table:
    """What fell, or a title saying that nothing did."""
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
