"""Host time of a call, measured alone: nothing is checked or timed on the device, and no peer is made.

A run of all families keeps the host busy with peers and compilers, and then measures up to twice these figures
(`route` 28 to 30 µs instead of 14). So `--host-only` is run separately, and puts its figures into the saved results.

Calls are timed in a row, as a model makes them. The first call after a wait for the device takes up to ten times as
long (`x.add_(1)` two and a half times): in a block of 7 launches that had waited 2.6 ms, the first call took 173 µs,
the second 30, the fifth 17. So the first calls of a row are not counted.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import results
from benchmarks.cases import Call, Case, forget
from benchmarks.results import Machine, rounded
from benchmarks.runner import LEFT_BEHIND, chosen_impl, surviving
from benchmarks.timing import quantile

DEVICE = "cuda"
BEFORE, FEWEST, IN_A_ROW, ROUNDS = 3, 8, 20, 30  # calls of a row: first ones, and those that are timed
LONGEST_S = 0.1  # of the calls of one case, what the device takes for them included, if their rows are not shorter then
Key = tuple[str, str, str]  # operation, workload, implementation


@dataclass
class Costs:
    """Microseconds of each case, those of torch's own `x.add_(1)` beside them, and what failed."""

    add_us: float
    us: dict[Key, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def failed(self, case: Case, reason: str) -> None:
        """Note why a case has no cost."""
        self.failures.append(f"{case.title}: {reason}")


def cost(call: Call) -> float:
    """Microseconds until a call has returned to Python, its work enqueued: the median of rounds of calls in a row."""
    for _ in range(3):  # compiles, allocates, and records
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    once = time.perf_counter() - start
    calls = max(FEWEST, min(IN_A_ROW, int(LONGEST_S / ROUNDS / once)))
    rounds = max(5, min(ROUNDS, int(LONGEST_S / (BEFORE + calls) / once)))
    samples = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        for _ in range(BEFORE):
            call()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter() - start) * 1e6 / calls)
    torch.cuda.synchronize()
    return quantile(sorted(samples), 0.5)


def measure(cases: Sequence[Case], device: torch.device) -> Costs:
    """The costs of those cases whose call does not wait for the device."""
    x = torch.zeros(16, device=device)
    costs = Costs(cost(lambda: x.add_(1)))
    gc.freeze()  # what is imported stays
    for case in cases:
        if case.waits:
            continue
        torch.manual_seed(0)
        with surviving(partial(costs.failed, case)):
            _measure(case, device, costs)
        if torch.cuda.memory_allocated() > LEFT_BEHIND:
            gc.collect()
    forget()
    return costs


def _measure(case: Case, device: torch.device, costs: Costs) -> None:
    arguments = case.inputs(device)
    key = case.op, case.workload.name, chosen_impl(case, arguments, None)
    costs.us[key] = cost(case.ours(arguments, None))


def put_into(path: Path, machine: Machine, costs: Costs) -> int:
    """Put the costs into a family's saved file, and say of which commit they are; how many rows have a new one."""
    document = json.loads(path.read_text(encoding="utf-8"))
    count = 0
    for row in document["rows"]:
        us = costs.us.get((row["op"], row["workload"], row["impl"]))
        if us is not None:
            row["host_us"], count = rounded(us), count + 1
    if count:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        alone = {"commit": machine.commit, "date": now, "add_us": rounded(costs.add_us)}
        document = {name: value for name, value in document.items() if name not in ("rows", "host_alone")} | {
            "host_alone": alone,
            "rows": document["rows"],
        }
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return count


def run(
    console: Console, chosen: Mapping[str, Sequence[Case]], *, commit: str | None, save: bool, folder: Path | None
) -> bool:
    """Measure family by family, print, and with `save` put into the saved files; whether every case could be called."""
    machine = Machine.current()
    machine = dataclasses.replace(machine, commit=commit) if commit else machine
    well = True
    for family, cases in chosen.items():
        costs = measure(cases, torch.device(DEVICE))
        console.print(draw(family, costs))
        for failure in costs.failures:
            console.print(f"[red]failed[/red] {escape(failure)}", highlight=False)
        well &= not costs.failures
        if save:
            path = (folder or results.FOLDER) / machine.folder / f"{family}.json"
            if not path.exists():
                console.print(f"[yellow]{family}: nothing is saved of {machine.folder} to put them into[/yellow]")
                well = False
            else:
                count = put_into(path, machine, costs)
                console.print(f"saved {path}: {count} rows", highlight=False)
    return well


def draw(family: str, costs: Costs) -> Table:
    """One line for each case."""
    title = f"{family}: what a call costs the host, alone (x.add_(1): {costs.add_us:.1f} µs)"
    table = Table(title=title, title_justify="left", title_style="bold")
    for heading in ("op", "workload", "impl"):
        table.add_column(heading, no_wrap=True)
    table.add_column("host µs", justify="right", no_wrap=True)
    for key, us in costs.us.items():
        table.add_row(*key, f"{us:.1f}")
    return table
