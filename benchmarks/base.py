"""Compare with another commit on this machine: ``python -m benchmarks gemm --base HEAD~5``.

The library of the other commit is timed by the benchmarks of this tree, so that both do the same jobs. They run in
separate processes, the other commit first and last and this tree twice in between (base, here, here, base), so that
steady drift affects both alike. How much two runs of the same commit differ is shown next to each ratio; a smaller
difference means nothing.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from benchmarks import saved
from benchmarks.saved import SavedRow

ROOT = Path(__file__).parent.parent
ORDER = ("base", "here", "here", "base")


class Failed(Exception):  # noqa: N818 - said to whoever asked, not an error of the program
    """A commit that does not exist, or a run that failed; the message is the end of its output."""


@dataclass(frozen=True)
class Beside:
    """A job, timed twice with each commit, in microseconds."""

    row: SavedRow
    base: tuple[float, ...]
    here: tuple[float, ...]

    @property
    def speedup(self) -> float:
        """How many times as fast it is here."""
        return _middle(self.base) / _middle(self.here)

    @property
    def noise(self) -> float:
        """The largest difference between two runs of the same commit, as a fraction."""
        return max(max(times) / min(times) - 1 for times in (self.base, self.here))

    @property
    def says_something(self) -> bool:
        """Whether the commits differ by more than their own runs do."""
        return abs(math.log(self.speedup)) > math.log1p(self.noise)


def _middle(times: Sequence[float]) -> float:
    return math.prod(times) ** (1 / len(times))


@contextmanager
def checked_out(commit: str) -> Iterator[tuple[str, Path]]:
    """The full name of a commit, and a folder to run in: this tree's benchmarks with that commit's library.

    Args:
        commit: a commit, or the folder of another checkout, for machines that only have the files.
    """
    with tempfile.TemporaryDirectory(prefix="dskernels-base-") as folder:
        tree, place = Path(folder) / "tree", Path(folder) / "run"
        given = (Path(commit) / "dskernels" / "__init__.py").is_file()
        if given:
            name, tree = Path(commit).name, Path(commit).resolve()
        else:
            name = _add_worktree(commit, tree)
        try:
            place.mkdir()
            (place / "dskernels").symlink_to(tree / "dskernels")
            (place / "benchmarks").symlink_to(ROOT / "benchmarks")
            yield name, place
        finally:
            if not given:
                _git("worktree", "remove", "--force", str(tree))


def _add_worktree(commit: str, tree: Path) -> str:
    answer = _git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}")
    if answer.returncode:
        raise Failed(f"no commit {commit}")
    name = answer.stdout.strip()
    answer = _git("worktree", "add", "--detach", str(tree), name)
    if answer.returncode:
        raise Failed(answer.stderr.strip())
    return name


def run(arguments: Sequence[str], place: Path, commit: str, out: Path) -> str:
    """Run the benchmarks in a process that imports the library from `place`; returns what it printed."""
    command = [sys.executable, "-m", "benchmarks", *arguments, "--save", "--out", str(out), "--commit", commit]
    environment = {**os.environ, "PYTHONPATH": str(place)}
    answer = subprocess.run(
        command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if not any(out.glob("*/*.json")):
        raise Failed((answer.stdout.strip().splitlines() or ["it printed nothing"])[-1])
    return answer.stdout


def beside(
    commit: str, arguments: Sequence[str], say: Callable[[str], None], start: Callable[..., str] = run
) -> list[Beside]:
    """Time `commit` and this tree in turns.

    Args:
        commit: what to compare with.
        arguments: what to run: families, filters, seconds.
        say: called with what is about to run.
        start: runs one of them; `run` by default.
    """
    with checked_out(commit) as (name, place), tempfile.TemporaryDirectory(prefix="dskernels-beside-") as folder:
        times: dict[str, list[list[SavedRow]]] = {"base": [], "here": []}
        for turn, who in enumerate(ORDER):
            say(f"{turn + 1} of {len(ORDER)}: {name[:12] if who == 'base' else 'here'}")
            out = Path(folder) / str(turn)
            here = _git("describe", "--always", "--dirty").stdout.strip() or "here"
            printed = start(arguments, *((place, name) if who == "base" else (ROOT, here)), out)
            for line in printed.splitlines():
                if line.startswith("failed "):
                    say(f"  {line}")
            rows = [
                row for gpu in sorted(out.iterdir()) for family in saved.read(str(gpu)).values() for row in family.rows
            ]
            times[who].append(rows)
        return match(times["base"], times["here"])


def match(base: Sequence[Sequence[SavedRow]], here: Sequence[Sequence[SavedRow]]) -> list[Beside]:
    """The jobs that all runs did, whatever implementation did them."""

    def fastest(runs: Sequence[Sequence[SavedRow]]) -> list[dict[tuple[str, str], SavedRow]]:
        return [{row.key: row for row in sorted(rows, key=lambda row: -row.us)} for rows in runs]

    bases, heres = fastest(base), fastest(here)
    return [
        Beside(row, tuple(run[key].us for run in bases), tuple(run[key].us for run in heres))
        for key, row in {row.key: heres[0][row.key] for row in here[0]}.items()
        if all(key in run for run in (*bases, *heres))
    ]


def draw(found: Sequence[Beside], commit: str) -> Table:
    """A line for each job; the ratio is dim if it is within the noise."""
    table = Table(title=f"here against {commit}: above 1 is faster here", title_justify="left", title_style="bold")
    for heading in ("op", "workload", "impl"):
        table.add_column(heading, no_wrap=True)
    for heading in (f"{commit} µs", "here µs", "× as fast", "noise"):
        table.add_column(heading, justify="right", no_wrap=True)
    for job in found:
        style = "dim" if not job.says_something else "green" if job.speedup > 1 else "red"
        table.add_row(
            job.row.op,
            job.row.workload,
            job.row.impl,
            *(" ".join(f"{us:,.1f}" for us in times) for times in (job.base, job.here)),
            f"[{style}]{job.speedup:.3f}[/]",
            f"{job.noise:.1%}",
        )
    return table


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(("git", "-C", str(ROOT), *arguments), capture_output=True, text=True, check=False)
