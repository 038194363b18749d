"""A run on this machine's GPU: roofs, then case after case, a table for each family, and saving the results."""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import check, peers, results, roofline, saved, steadiness, timing
from benchmarks.cases import Case, forget
from benchmarks.results import Failure, Machine, Row
from benchmarks.runner import Runner, one_line

DEVICE = "cuda"
COLUMNS = TextColumn("{task.description:60}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()


@dataclass
class Family:
    """The results of a run for one family."""

    name: str
    timed: list[tuple[Case, Row]] = field(default_factory=list)
    outcomes: list[Row | Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    clocks: dict[str, float | None] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        """The rows that were timed."""
        return [o for o in self.outcomes if isinstance(o, Row)]

    @property
    def failures(self) -> list[Failure]:
        """The cases that were not."""
        return [o for o in self.outcomes if isinstance(o, Failure)]


class Session:
    """The machine, its roofs and a stopwatch, for as many cases as are asked for.

    Args:
        console: where to print.
        impls: implementations to run, None for the one that dskernels chooses.
        seconds: roughly how long to time each rival.
        host: whether to measure the host time of a call.
        commit: the commit to record, if git cannot tell.
    """

    def __init__(
        self,
        console: Console,
        *,
        impls: Sequence[str | None] = (None,),
        seconds: float = 0.3,
        host: bool = False,
        commit: str | None = None,
    ) -> None:
        self.console, self.host = console, host
        machine = Machine.current()
        self.machine = dataclasses.replace(machine, commit=commit) if commit else machine
        if DEVICE == "cuda":
            gc.freeze()  # imported modules stay: each case ends with a garbage collection, which need not scan them
        with console.status("warming up, and measuring the roofs"):
            self._time = timing.Stopwatch(seconds).time
            self.warm_up = steadiness.warm_up(self._time, roofline.products()["bf16"])
            self.roofs, self._mhz = self._look()
        self.runner = Runner(
            torch.device(DEVICE), self._time, self.roofs, tuple(impls), timing.host_cost if host else None
        )

    def introduce(self) -> None:
        """Print what the numbers are measured on."""
        m, roofs = self.machine, self.roofs
        lines = [
            f"{m.gpu}, driver {m.driver}, torch {m.torch}, Triton {m.triton}, CUDA {m.cuda}, CuPy {m.cupy}, "
            f"commit {m.commit}",
            f"{self.warm_up}",
            f"roofs: copy {roofs.copy_gbs:,.0f} GB/s, bf16 {roofs.bf16_tflops:,.0f} TFLOP/s, "
            + ("no fp8" if roofs.fp8_tflops is None else f"fp8 {roofs.fp8_tflops:,.0f} TFLOP/s"),
            "peers missing: " + ("; ".join(f"{name} ({why})" for name, why in peers.missing().items()) or "none"),
        ]
        for line in lines:
            self.console.print(line, highlight=False)
        self.console.print()

    def run(self, chosen: Mapping[str, Sequence[Case]]) -> Iterator[Family]:
        """Run the cases, family by family, and print the results of each."""
        with Progress(*COLUMNS, console=self.console, transient=True) as progress:
            task = progress.add_task("", total=sum(len(cases) for cases in chosen.values()))
            for name, cases in chosen.items():
                if not cases:
                    continue
                family = Family(name)
                for case in cases:
                    progress.update(task, description=case.title)
                    outcome = self.runner.run(case)
                    family.outcomes += outcome.results
                    family.timed += [(case, row) for row in outcome.results if isinstance(row, Row)]
                    family.notes += outcome.notes
                    for what, seconds in outcome.spent.items():
                        family.spent[what] = family.spent.get(what, 0.0) + seconds
                    progress.advance(task)
                forget()
                gc.collect()
                try:
                    after, mhz = self._look()
                except RuntimeError as error:  # a case has left the device unusable: the results before it are kept
                    family.notes.append(f"the roofs could not be measured again, {one_line(error)}")
                else:
                    family.clocks = steadiness.clocks(self.roofs, after, self._mhz, mhz) | {"turns": self.warm_up.turns}
                self._show(family)
                yield family

    def check(self, family: Family) -> bool:
        """Print which figures fell below the saved ones of this GPU; returns whether none did. Without saved results
        there are none to compare."""
        try:
            kept = saved.read(str(results.FOLDER / self.machine.folder / f"{family.name}.json"))[family.name]
        except (saved.NotThere, OSError):
            self.console.print(f"[yellow]{family.name}: nothing is saved of {self.machine.folder} to check[/yellow]")
            return False
        before = saved.by_key([kept])
        same_peers = kept.stamp["torch"] == self.machine.torch
        verdicts = []
        for case, row in family.timed:
            asked = row.impl if self.runner.impls != (None,) else None
            then = check.saved_figure(before.get((row.op, row.workload), ()), asked)
            if then is not None:
                again = functools.partial(self._again, case, row.impl)
                verdicts.append(check.judge(row, then, again, same_peers=same_peers))
        self.console.print(check.draw(verdicts, kept))
        return not any(verdict.fell for verdict in verdicts)

    def _again(self, case: Case, impl: str) -> Row | None:
        """Time a case anew, with freshly measured roofs."""
        roofs, _ = self._look()
        outcome = dataclasses.replace(self.runner, roofs=roofs).run(case)
        rows = (row for row in outcome.results if isinstance(row, Row) and row.impl == impl)
        return next(rows, None)

    def save(self, family: Family, folder: Path | None = None) -> None:
        """Write the file of a family, if anything was timed."""
        if family.rows:
            clocks = family.clocks or None
            path = results.save(family.name, self.machine, self.roofs, family.rows, folder=folder, clocks=clocks)
            self.console.print(f"saved {path}", highlight=False)

    def _look(self) -> tuple[roofline.Roofs, float | None]:
        """Measure the roofs, and the clock at the same time."""
        roofs, mhz = roofline.measure(self._time), steadiness.clock_mhz(roofline.products()["bf16"])
        torch.cuda.empty_cache()
        return roofs, mhz

    def _show(self, family: Family) -> None:
        show = self.console.print
        show(results.draw(family.name, family.outcomes, host=self.host))
        for failure in family.failures:
            title = f"{failure.op} {failure.workload} ({failure.impl})"
            show(f"[red]failed[/red] {title}: {escape(failure.reason)}", highlight=False)
        for note in family.notes:
            show(f"[dim]{escape(note)}[/dim]", highlight=False)
        if family.clocks:
            show(f"[dim]{steadiness.describe(family.clocks)}[/dim]", highlight=False)
        spent = sorted(family.spent.items(), key=lambda item: -item[1])
        parts = ", ".join(f"{what} {seconds:.1f}" for what, seconds in spent)
        show(f"[dim]{sum(family.spent.values()):.0f} s: {parts}[/dim]", highlight=False)
