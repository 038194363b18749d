"""Saved results in the middle of sentences, filled in by ``python -m benchmarks --report``.

The text between ``<!-- saved: ... -->`` and ``<!-- /saved -->`` is generated. In the place of the dots are a GPU, an
operation, a workload (or a pattern for several, whose values are given from the smallest to the largest, or one by one
with ``each``), and the quantity: ``h200 fused_experts t8192_* ms``. A line of Markdown must not begin with such a
comment, or it is taken for HTML.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from benchmarks import charts, saved
from benchmarks.saved import Saved, SavedRow

INLINE = re.compile(r"(<!-- saved: ([^>]*?) -->)[^<]*(<!-- /saved -->)")
EACH = "each"


def _peer(row: SavedRow) -> str:
    peer = row.rival or row.best_peer
    if peer is None:
        raise saved.NotThere(f"{row.title}: no peer is saved")
    return peer


def _peer_us(row: SavedRow) -> float:
    return row.peers[_peer(row)]


def _host_us(row: SavedRow) -> float:
    if row.host_us is None:
        raise saved.NotThere(f"{row.title}: what a call costs the host is not saved")
    return row.host_us


def _call_us(row: SavedRow) -> float:
    """Of one call where the workload is a graph of several: ``20x_...``."""
    return row.us / int(row.workload.partition("x_")[0])


# What can be said of a row, and how it is written.
KINDS: Mapping[str, tuple[Callable[[SavedRow], float], Callable[[float], str]]] = {
    "us": (lambda row: row.us, charts.number),
    "ms": (lambda row: row.us / 1e3, charts.number),
    "tflops": (lambda row: row.tflops or 0.0, "{:,.0f}".format),
    "tbs": (lambda row: row.gbs / 1e3, "{:.1f}".format),
    "roof": (lambda row: row.roof_pct, "{:.0f}".format),
    "times": (lambda row: row.times_as_fast(_peer(row)), "{:.2f}".format),
    "peer_us": (_peer_us, charts.number),
    "peer_ms": (lambda row: _peer_us(row) / 1e3, charts.number),
    "call_us": (_call_us, "{:.1f}".format),
    "host": (_host_us, "{:,.0f}".format),
}


def fill(text: str, gpus: Mapping[str, Mapping[str, Saved]]) -> str:
    """The same text with its figures made anew."""
    return INLINE.sub(lambda match: f"{match[1]}{figure(match[2].split(), gpus)}{match[3]}", text)


def figure(words: Sequence[str], gpus: Mapping[str, Mapping[str, Saved]]) -> str:
    """What is said between two marks."""
    asked = " ".join(words)
    one_by_one = words[-1:] == [EACH]
    if len(words) != 4 + one_by_one or words[3] not in KINDS:
        raise saved.NotThere(f"{asked}: expected a GPU, an operation, a workload and one of {', '.join(KINDS)}")
    gpu, op, workload, kind = words[:4]
    jobs = saved.jobs(gpus.get(gpu, {}))
    of, written = KINDS[kind]
    values = [of(row) for row in jobs if fnmatchcase(row.op, op) and fnmatchcase(row.workload, workload)]
    if not values:
        raise saved.NotThere(f"{asked}: nothing of it is saved")
    if one_by_one:
        *front, last = map(written, values)
        return f"{', '.join(front)} and {last}" if front else last
    low, high = written(min(values)), written(max(values))
    return low if low == high else f"{low} to {high}"
